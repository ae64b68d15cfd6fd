"""The nodes of a checked ``models/model.json`` as steps of :mod:`audit_plugin.intake.data_flow`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit_plugin.intake import operators
from audit_plugin.intake.data_flow import Step, find_paths
from audit_plugin.types import IntakeFinding

_DECIDING = frozenset(
    operators.words(
        "eq ne le lt ge gt greater greater_equal less less_equal not_equal isfinite isinf isnan nan_to_num xlogy atan2 "
        "logical_and logical_not logical_or logical_xor bitwise_and bitwise_left_shift bitwise_not bitwise_or "
        "bitwise_right_shift bitwise_xor sign sgn signbit copysign angle ceil floor round trunc fix frac fmod remainder "
        "floor_divide argmax argmin argsort any all count_nonzero bernoulli threshold hardshrink masked_select one_hot "
        "item _local_scalar_dense bool byte int long short"
    )
)
_SYMBOLIC = frozenset([*(f"_operator.{name}" for name in ("eq", "ne", "le", "lt", "ge", "gt")), "torch.sym_ite", "torch.sym_not"])
_WITH_INDICES = frozenset(
    operators.words(
        "max min sort topk median cummax cummin mode max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    )
)
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
        "feature_alpha_dropout"
    )
)
_BY_NAME = 2  # ArgumentKind in torch/_export/serde/schema.py
_CONTINUOUS = (6, 7, 8, 9, 10, 11, 13, 29, 30, 31, 32, 33)  # ScalarType in torch/_export/serde/schema.py


@dataclass(frozen=True)
class _Argument:
    """One argument of a node: the name it may be passed by, its value as the file has it, and what it reads."""

    name: str
    value: Any
    kind: int | None
    reads: tuple[str, ...]


def find_program_paths(path: str, program: Any) -> tuple[IntakeFinding, ...]:
    """See :func:`audit_plugin.intake.data_flow.find_paths`."""
    module = program["graph_module"]
    graph = module["graph"]
    sources = [
        name for spec in module["signature"]["input_specs"] if "user_input" in spec for name in _names(spec["user_input"]["arg"])
    ]
    return find_paths(path, list(_steps(graph, {}, "", itertools.count())), sources, _names(graph["outputs"]))


def _steps(graph: Any, inputs: Mapping[str, str], prefix: str, numbers: Iterator[int]) -> Iterator[Step]:
    """The steps of a graph, whose names get ``prefix`` unless they are ``inputs``, known by other names outside."""

    def outer(argument: Any) -> tuple[str, ...]:
        return tuple(inputs.get(name, prefix + name) for name in _names(argument))

    for node in graph["nodes"]:
        arguments = [_Argument(entry["name"], entry["arg"], entry.get("kind"), outer(entry["arg"])) for entry in node["inputs"]]
        writes = tuple(name for output in node["outputs"] for name in outer(output))
        graphs = [argument.value["as_graph"]["graph"] for argument in arguments if "as_graph" in argument.value]
        if not graphs:
            yield from _plain_steps(node, arguments, writes)
            continue
        given = tuple(name for argument in arguments for name in argument.reads)
        for inner in graphs:
            own = f"{next(numbers)}:"
            formal = _names(inner["inputs"])
            # A wrapper passes its operands in order; were there more or fewer, each could be any of them.
            pairs = dict(zip(formal, given, strict=True)) if len(formal) == len(given) else {}
            for name in formal if not pairs else ():
                yield Step(name, node["target"], given, (own + name,), shares=given)
            yield from _steps(inner, pairs, own, numbers)
            results = tuple(pairs.get(name, own + name) for name in _names(inner["outputs"]))
            for name in writes:
                yield Step(name, node["target"], results, (name,), shares=results)


def _plain_steps(node: Any, arguments: Sequence[_Argument], writes: tuple[str, ...]) -> Iterator[Step]:
    target: str = node["target"]
    parts = target.split(".")
    aten, overload = (parts[3].removesuffix("_"), parts[4]) if len(parts) == 5 else ("", "")
    reads = tuple(name for argument in arguments for name in argument.reads)
    named = [argument for argument in arguments[1:] if argument.name == "self"]
    positional = next((argument for argument in arguments if argument.kind != _BY_NAME), None)
    shares: tuple[str, ...] = ()
    if "out" in overload:
        shares = reads
    elif aten in _VIEWS or operators.is_in_place(target):
        owners = [*arguments[:1], *([positional] if positional else []), *named]
        shares = tuple(name for argument in owners for name in argument.reads)
    if aten in _SHAPE_ONLY and arguments and arguments[0].name == "self" and not named:
        reads = reads[len(arguments[0].reads) :]
    name, operator = node.get("name") or (writes[0] if writes else aten), target.removeprefix("torch.ops.")
    places = aten in _WITH_INDICES
    yield Step(
        name=name,
        operator=operator,
        reads=reads,
        writes=writes[:1] if places else writes,
        decided_by=reads if aten in _DECIDING or _rounds(aten, arguments) or _casts(arguments) else (),
        typed_by=reads[1:] if aten in ("to", "type_as") else (),
        always=target in _SYMBOLIC,
        has_weights=aten in _WITH_WEIGHTS,
        shares=shares,
    )
    if places and len(writes) > 1:
        yield Step(name, operator, reads, writes[1:], decided_by=reads)


def _casts(arguments: Sequence[_Argument]) -> bool:
    """Whether the values become whole numbers or booleans."""
    kinds = [argument.value["as_scalar_type"] for argument in arguments if "as_scalar_type" in argument.value]
    return any(kind not in _CONTINUOUS for kind in kinds)


def _rounds(aten: str, arguments: Sequence[_Argument]) -> bool:
    return aten in ("div", "divide") and any("as_string" in argument.value for argument in arguments)


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
