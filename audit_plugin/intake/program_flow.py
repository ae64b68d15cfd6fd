"""The nodes of a checked ``models/model.json`` as steps of :mod:`audit_plugin.intake.data_flow`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit_plugin.intake import operators
from audit_plugin.intake.continuity import (
    BY_CHANCE,
    CHANCE_IN_TRAINING,
    CONTINUOUS,
    MASKED,
    PLACED,
    REARRANGING,
    WITH_BRANCHES,
    WITH_PLACES,
)
from audit_plugin.intake.data_flow import Step, find_changed, find_paths
from audit_plugin.types import IntakeFinding

_SYMBOLIC = frozenset([*(f"_operator.{name}" for name in ("eq", "ne", "le", "lt", "ge", "gt")), "torch.sym_ite", "torch.sym_not"])
_WITH_WEIGHTS = frozenset(
    operators.words(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution linear addmm "
        "addmv addbmm baddbmm bmm mm mv matmul einsum bilinear tensordot inner dot vdot chain_matmul lstm gru rnn_relu "
        "rnn_tanh"
    )
)
_SHAPE_ONLY = frozenset(
    operators.words(
        "sym_size sym_numel sym_stride sym_storage_offset zeros_like ones_like full_like empty_like rand_like "
        "randn_like new_zeros new_ones new_full new_empty"
    )
)
_VIEWS = frozenset(
    operators.words(
        "alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk contiguous detach "
        "diagonal dsplit expand expand_as flatten hsplit imag lift_fresh mT moveaxis movedim narrow numpy_T adjoint "
        "permute positive ravel real reshape reshape_as resolve_conj resolve_neg select slice split split_with_sizes "
        "squeeze swapaxes swapdims t tensor_split to transpose unbind unflatten unfold unsafe_chunk unsafe_split "
        "unsqueeze view view_as view_as_complex view_as_real vsplit dropout alpha_dropout feature_dropout "
        "feature_alpha_dropout meshgrid type_as _unsafe_view"
    )
)
# Views only where nothing has to be copied, or of several values at once.
_PERHAPS_COPIES = frozenset(
    operators.words(
        "alpha_dropout atleast_1d atleast_2d atleast_3d broadcast_tensors contiguous dropout feature_alpha_dropout "
        "feature_dropout flatten meshgrid ravel reshape reshape_as to type_as"
    )
)
_OWNERS = ("self", "input", "tensors")  # what torch calls the first argument of a view, or of what works in place
_LIKE_ANOTHER = ("expand_as", "reshape_as", "view_as")
_TYPED_AS_ANOTHER = ("to", "type_as")
_OUT_OVERLOADS = frozenset(operators.words("out dim_max dim_min dim_values values values_stable"))
_WITH_STATISTICS = frozenset(
    operators.words(
        "batch_norm cudnn_batch_norm instance_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional"
    )
)
_POWERS = frozenset(operators.words("float_power linalg_norm linalg_vector_norm norm pow"))
_SMALLEST_POWER = 0.1  # below it the power of anything but zero is nearly one: it counts
_GRIDS = ("grid_sampler", "grid_sampler_2d")
_BETWEEN_PIXELS = (0, 2)  # bilinear and bicubic; 1 takes the nearest pixel
_LOWEST_BEND = 10  # where softplus turns into the identity, a jump unless it is high
_TRAINS = ("train", "training", "use_input_stats")
# Overloads that read sizes or places from a tensor, or the same bits as another type.
_JUMPING = frozenset(
    operators.words(
        "narrow.Tensor repeat_interleave.Tensor repeat_interleave.self_Tensor tensor_split.tensor_indices_or_sections view.dtype"
    )
)
_POSITIONAL, _BY_NAME = 1, 2  # ArgumentKind in torch/_export/serde/schema.py
# ScalarType there, without the types of eight bits: to round to one of them is a decision.
_COMPLEX = (9, 10, 11)
_WITH_FRACTIONS = (6, 7, 8, 13, *_COMPLEX)
_STORED = ("parameter", "buffer", "tensor_constant")


def find_program_paths(path: str, program: Any) -> tuple[IntakeFinding, ...]:
    """See :func:`audit_plugin.intake.data_flow.find_paths`."""
    module = program["graph_module"]
    graph = module["graph"]
    sources = [
        name for spec in module["signature"]["input_specs"] if "user_input" in spec for name in _names(spec["user_input"]["arg"])
    ]
    return find_paths(path, _Reader(graph).steps, sources, _names(graph["outputs"]))


def find_changed_state(program: Any) -> list[str]:
    """Full names of the parameters, buffers and constants that the graph, or one inside it, changes when it runs.

    Some ways stay unseen here; :func:`audit_plugin.model.state.with_changed_state` looks at the loaded program.
    """
    module = program["graph_module"]
    stored = {
        spec[kind]["arg"]["name"]: spec[kind][f"{kind}_name"]
        for spec in module["signature"]["input_specs"]
        for kind in _STORED
        if kind in spec
    }
    return find_changed(_Reader(module["graph"]).steps, stored)


class _Reader:
    """Reads the steps of a graph and of those inside it.

    The file declares which values hold numbers with a fraction; :mod:`audit_plugin.model.declared_types` makes sure of it.
    """

    def __init__(self, graph: Any) -> None:
        self._fractions: set[str] = set()
        self._complex: set[str] = set()
        self._numbers = itertools.count()
        self.steps = list(self._steps(graph, {}, ""))

    def _steps(self, graph: Any, inputs: Mapping[str, str], prefix: str) -> Iterator[Step]:
        """The steps of a graph, whose names get ``prefix`` unless they are ``inputs``, known by other names outside."""

        def outer(argument: Any) -> tuple[str, ...]:
            return tuple(inputs.get(name, prefix + name) for name in _names(argument))

        declared = [(inputs.get(name, prefix + name), value["dtype"]) for name, value in graph["tensor_values"].items()]
        self._fractions.update(name for name, kind in declared if kind in _WITH_FRACTIONS)
        self._complex.update(name for name, kind in declared if kind in _COMPLEX)
        for node in graph["nodes"]:
            arguments = [
                _Argument(entry["name"], entry["arg"], entry.get("kind"), outer(entry["arg"])) for entry in node["inputs"]
            ]
            writes = tuple(name for output in node["outputs"] for name in outer(output))
            graphs = [argument.value["as_graph"]["graph"] for argument in arguments if "as_graph" in argument.value]
            if not graphs:
                yield from self._plain_steps(node, _Call(node["target"], arguments), writes)
                continue
            given = tuple(name for argument in arguments for name in argument.reads)
            for inner in graphs:
                own = f"{next(self._numbers)}:"
                formal = _names(inner["inputs"])
                # A wrapper passes its operands in order; were there more or fewer, each could be any of them.
                pairs = dict(zip(formal, given, strict=True)) if len(formal) == len(given) else {}
                for name in formal if not pairs else ():
                    yield Step(name, node["target"], given, (own + name,), shares=given, surely_shares=False)
                yield from self._steps(inner, pairs, own)
                results = tuple(pairs.get(name, own + name) for name in _names(inner["outputs"]))
                for name in writes:
                    yield Step(name, node["target"], results, (name,), shares=results, surely_shares=len(results) == 1)

    def _plain_steps(self, node: Any, call: _Call, writes: tuple[str, ...]) -> Iterator[Step]:
        reads, measures = call.reads_and_measures
        outputs = writes[:1] if call.aten in WITH_PLACES else writes
        name = node.get("name") or (writes[0] if writes else call.aten)
        operator = call.target.removeprefix("torch.ops.")
        yield Step(
            name=name,
            operator=operator,
            reads=reads,
            writes=outputs,
            measures=measures,
            decided_by=tuple(read for read in self._deciding(call, outputs) if read in reads),
            always=call.target in _SYMBOLIC,
            by_chance=call.is_by_chance,
            has_weights=call.aten in _WITH_WEIGHTS,
            shares=call.shares,
            changes=call.changes,
            updates=call.updates,
            surely_shares=call.aten not in _PERHAPS_COPIES and not call.writes_elsewhere,
        )
        if outputs != writes:
            yield Step(name, operator, reads, writes[1:], decided_by=reads, by_chance=call.is_by_chance)

    def _deciding(self, call: _Call, outputs: Sequence[str]) -> Sequence[str]:
        """The reads in which an operator is not continuous."""
        keeps_numbers = call.aten in REARRANGING or call.aten in PLACED or call.aten in MASKED
        branches = call.aten in WITH_BRANCHES and not self._complex.isdisjoint(outputs)
        if not (keeps_numbers or call.aten in CONTINUOUS) or call.jumps or branches:
            return call.all
        if not self._fractions.issuperset(outputs):
            # A result without fractions: a whole number that is only passed on was rounded elsewhere.
            rounded = [name for name in call.all if name in self._fractions] if keeps_numbers else call.all
            return (*rounded, *call.places)
        if call.aten in MASKED:
            return [name for name in call.all if name not in self._fractions]
        return call.places


@dataclass(frozen=True)
class _Argument:
    """One argument of a node: the name it is passed by, its value as the file has it, and what it reads."""

    name: str
    value: Any
    kind: int | None
    reads: tuple[str, ...]

    @property
    def number(self) -> float | None:
        """The number that the file gives for it, None where it gives none."""
        given = self.value.get("as_int", self.value.get("as_float"))
        return None if given is None else float(given)


class _Call:
    """What one node asks of which operator. torch goes by the arguments' names, whatever their order in the file."""

    def __init__(self, target: str, arguments: Sequence[_Argument]) -> None:
        parts = target.split(".")
        self.target = target
        self.aten, self.overload = (parts[3].removesuffix("_"), parts[4]) if len(parts) == 5 else ("", "")
        self._arguments = list(arguments)
        self._by_name = {argument.name: argument for argument in arguments}
        self.all = self._reads_but()

    def _reads_but(self, *names: str) -> tuple[str, ...]:
        return tuple(name for argument in self._arguments if argument.name not in names for name in argument.reads)

    def _reads_of(self, *names: str) -> tuple[str, ...]:
        return tuple(name for argument in self._arguments if argument.name in names for name in argument.reads)

    @property
    def reads_and_measures(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What it reads, and what it reads for its shape alone."""
        if self.aten in _SHAPE_ONLY:
            return self._reads_but("self"), self._reads_of("self")
        if self.aten in _LIKE_ANOTHER:
            return self._reads_but("other"), self._reads_of("other")
        if self.aten in _TYPED_AS_ANOTHER:
            return self._reads_but("other"), ()
        return self.all, ()

    @property
    def places(self) -> tuple[str, ...]:
        """Of an operator that is continuous in some of its arguments only: the others."""
        if self.aten in PLACED:
            return self._reads_but("weight" if self.aten == "embedding" else "self")
        if self.aten in _GRIDS and self._number("interpolation_mode") not in _BETWEEN_PIXELS:
            return self._reads_but("input")
        if self.aten in ("pow", "float_power"):
            return self._reads_of("exponent")  # zero to the power of something is one or zero
        return self._reads_of("attn_mask", "attn_bias")  # minus infinity is the way to leave something out

    @property
    def jumps(self) -> bool:
        """Whether its settings make an operator jump that else is continuous."""
        if f"{self.aten}.{self.overload.removesuffix('_out')}" in _JUMPING:
            return True
        if self.aten in ("div", "divide"):
            return any("as_string" in argument.value for argument in self._arguments)
        if self.aten in _POWERS:
            numbers = (argument.number for argument in self._arguments)
            return any(number is not None and abs(number) < _SMALLEST_POWER for number in numbers)
        if self.aten == "softplus" and "threshold" in self._by_name:
            bend = self._number("threshold")
            return bend is None or not bend >= _LOWEST_BEND
        return False

    @property
    def is_by_chance(self) -> bool:
        """Whether its result holds random numbers."""
        if self.aten in BY_CHANCE:
            return True
        if self.aten not in CHANCE_IN_TRAINING:
            return False
        if "attention" in self.aten:
            rates = (argument.number for argument in self._arguments if argument.name != "scale" or argument.kind != _BY_NAME)
            return any(rate not in (None, 0.0) for rate in rates)
        trains = any(self._value(name).get("as_bool") is not False for name in _TRAINS if name in self._by_name)
        return trains and self._number("p" if "dropout" in self.aten else "dropout") != 0.0

    @property
    def shares(self) -> tuple[str, ...]:
        """What it reads whose memory its result shares."""
        if self.writes_elsewhere:
            return self.all
        if self.aten in _VIEWS or operators.is_in_place(self.target):
            return tuple(dict.fromkeys((*self._arguments[0].reads, *self._reads_of(*_OWNERS)))) if self._arguments else ()
        return ()

    @property
    def changes(self) -> tuple[str, ...]:
        """What it writes to beside its result."""
        if operators.is_in_place(self.target):
            return self._reads_of(*_OWNERS)
        if self.writes_elsewhere:
            return tuple(name for argument in self._arguments if argument.kind != _POSITIONAL for name in argument.reads)
        return ()

    @property
    def updates(self) -> tuple[str, ...]:
        """The running statistics that it brings up to date, which an operator's own name does not tell."""
        trains = self.aten in _WITH_STATISTICS and any(self._value(name).get("as_bool") for name in _TRAINS)
        return self._reads_of("running_mean", "running_var") if trains else ()

    @property
    def writes_elsewhere(self) -> bool:
        """Whether it is given the memory for its result, always by name."""
        return self.overload in _OUT_OVERLOADS or self.overload.endswith("_out")

    def _number(self, name: str) -> float | None:
        return self._by_name[name].number if name in self._by_name else None

    def _value(self, name: str) -> Any:
        return self._by_name[name].value if name in self._by_name else {}


def _names(argument: Any) -> list[str]:
    """Names of the tensors and symbols in an argument."""
    match argument:
        case {"as_graph": _}:
            return []
        case {"name": str(name)} | {"as_name": str(name)}:
            return [name]
        case dict():
            return [name for member in argument.values() for name in _names(member)]
        case list():
            return [name for member in argument for name in _names(member)]
    return []
