"""The graph of a ``.pt2`` (``models/model.json``), which torch deserialises, compiles and runs, against a closed grammar.

Where the text goes in torch, and so what each rule is for:

* node targets are walked with getattr from ``torch``, ``operator`` and ``math`` (``torch.os.system`` works): a list of
  allowed operators;
* names of nodes and arguments are pasted into the source of ``forward``, which is executed: plain identifiers;
* names of parameters are walked with getattr and setattr: dotted names without dunders;
* sizes are evaluated by sympy, guards are executed, nestings import types: see :mod:`audit_plugin.intake.expressions`;
* custom objects, operators as arguments, sub-graphs that run on a condition: not allowed at all.
"""

from __future__ import annotations

import math
from typing import Any

from audit_plugin.intake import operators
from audit_plugin.intake.expressions import guard, nesting, output_key, size_expression, symbol_name
from audit_plugin.intake.refusal import LARGEST_VALUE, quoted
from audit_plugin.intake.structure import (
    MalformedError,
    Rule,
    array,
    boolean,
    dotted_name,
    empty,
    identifier,
    integer,
    mapping,
    number,
    one_of,
    optional,
    record,
    text,
    union,
)

_LONGEST_GRAPH = 200_000

# ScalarType in torch/_export/serde/schema.py, without UNKNOWN
DTYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 2,
    7: 4,
    8: 8,
    9: 4,
    10: 8,
    11: 16,
    12: 1,
    13: 2,
    28: 2,
    29: 1,
    30: 1,
    31: 1,
    32: 1,
    33: 1,
}
DTYPE_BYTES |= {34: 4, 35: 8}
_STRIDED = 7

_MAKERS = frozenset(
    operators.words(
        "arange broadcast_to constant_pad_nd empty expand eye full linspace logspace new_empty new_full new_ones new_zeros "
        "normal ones pad rand randint randn randperm repeat repeat_interleave tile tril_indices triu_indices uniform "
        "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_trilinear3d "
        "zeros one_hot reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"
    )
)
# Makers of which a single number is no size, but what fills the value, or a bound; torch takes none for their lists of sizes.
_FILLED = frozenset(operators.words("constant_pad_nd full new_full pad randint"))

_dtype = one_of(*DTYPE_BYTES)
_device = record({"type": one_of("cpu", "cuda", "mps", "meta")}, {"index": optional(one_of(*range(64)))})
_plain_word = text(r"[A-Za-z0-9_ .,\->()=!<*+/%:']*", longest=300)  # "reflect", an einsum, the message of an assertion

_size_hint = optional(union({"as_int": integer, "as_bool": boolean, "as_float": number}))
_symbolic = record({"expr_str": size_expression}, {"hint": _size_hint})
_size = union({"as_expr": _symbolic, "as_int": integer})


def tensor_metadata(size: Rule) -> Rule:
    """A TensorMeta whose sizes match ``size`` and are no more than can be meant."""
    fields = record(
        {
            "dtype": _dtype,
            "sizes": array(size, 64),
            "requires_grad": boolean,
            "device": _device,
            "strides": array(size, 64),
            "storage_offset": size,
            "layout": one_of(_STRIDED),
        }
    )

    def check(value: Any) -> None:
        fields(value)
        _check_count(math.prod(size["as_int"] for size in value["sizes"] if size.get("as_int", 0) > 1))

    return check


_tensor = record({"name": identifier})
_size_argument = union({"as_name": identifier, "as_int": integer})
_float_argument = union({"as_name": identifier, "as_float": number})
_bool_argument = union({"as_name": identifier, "as_bool": boolean})
_optional_tensor = union({"as_tensor": _tensor, "as_none": boolean})
_CONSTANTS: dict[str, Rule] = {"as_none": boolean, "as_int": integer, "as_float": number, "as_bool": boolean}
_VALUES: dict[str, Rule] = {
    **_CONSTANTS,
    "as_tensor": _tensor,
    "as_tensors": array(_tensor),
    "as_ints": array(integer),
    "as_floats": array(number),
    "as_bools": array(boolean),
    "as_string": _plain_word,
    "as_sym_int": _size_argument,
    "as_sym_ints": array(_size_argument),
    "as_sym_float": _float_argument,
    "as_sym_floats": array(_float_argument),
    "as_sym_bool": _bool_argument,
    "as_sym_bools": array(_bool_argument),
    "as_scalar_type": _dtype,
    "as_memory_format": one_of(1, 2, 3, 4),
    "as_layout": one_of(_STRIDED),
    "as_device": _device,
    "as_optional_tensor": _optional_tensor,
    "as_optional_tensors": array(_optional_tensor),
}
_argument = union(_VALUES)
# Text as an input of the graph is pasted between quotes into executed guards: only numbers are allowed beside tensors.
_graph_input = union({**_CONSTANTS, "as_tensor": _tensor, "as_sym_int": _size_argument})


def _graph(value: object) -> None:
    _GRAPH(value)


_wrapper_argument = union({**_VALUES, "as_graph": record({"name": identifier, "graph": _graph})})


def _node(value: object) -> None:
    target = value.get("target") if isinstance(value, dict) else None
    if not isinstance(target, str) or not (operators.is_allowed(target) or target in operators.WRAPPERS):
        raise MalformedError(
            f"a node that calls {quoted(target)}, which is not among the operators that image classifiers need "
            "(audit_plugin/intake/operators.py),"
        )
    (_WRAPPER_NODE if target in operators.WRAPPERS else _PLAIN_NODE)(value)
    _check_asked(target, value)


def _check_asked(target: str, node: Any) -> None:
    """Refuse a node that makes a giant value out of a few numbers; sizes that it reads from other values are not known here."""
    parts = target.split(".")
    if len(parts) != 5 or parts[3].removesuffix("_") not in _MAKERS:
        return
    for entry in node["inputs"]:
        argument = entry["arg"]
        single = [] if parts[3] in _FILLED else [argument.get("as_int", 1)]
        numbers = argument.get("as_ints", single)
        if "as_sym_ints" in argument:
            numbers = [size["as_int"] for size in argument["as_sym_ints"] if "as_int" in size]
        counts = [abs(number) for number in numbers if abs(number) > 1]
        _check_count(max(counts, default=0) if "pad" in parts[3] or "range" in parts[3] else math.prod(counts))


def _check_count(count: int) -> None:
    if count > LARGEST_VALUE:
        raise MalformedError(f"a tensor of {count:.3g} numbers, more than the limit of {LARGEST_VALUE},")


# Most of it is only kept by torch, but `"""` or a carriage return could end the comment in which debug output repeats it.
_comment = text(r"(?:(?!\"\"\")[\n\t\x20-\x7e\x80-\U0010ffff])*", longest=200_000)
# Names starting with torch, _operator or math are resolved with getattr, and the result kept beside the node.
_origin = (
    r"[A-Za-z0-9_]+,(?:torch\.(?:nn|_C|functional|special|fft|linalg|Tensor|ops)\.(?!__)[A-Za-z0-9_]+(?:\.(?!__)[A-Za-z0-9_]+)*|torch\.(?!_)[a-z0-9_]+"
    r"|_operator\.[a-z_]+|math\.[a-z0-9_]+|torchvision\.[A-Za-z0-9_.]+|(?!torch|_operator|math)[A-Za-z0-9_.<>]+)"
)
_node_metadata = record(
    {},
    {
        "stack_trace": _comment,
        "nn_module_stack": _comment,
        "torch_fn": _comment,
        "from_node": _comment,
        "custom": _comment,
        "source_fn_stack": text(f"{_origin}(?:;{_origin})*", longest=20_000),
    },
)


def _node_rule(argument: Rule) -> Rule:
    """An input's name may be empty, but only the inputs of wrappers have none."""
    named = record({"name": text(r"(?!__)[A-Za-z0-9_]*"), "arg": argument}, {"kind": optional(one_of(0, 1, 2))})
    return record(
        {"target": lambda value: None, "inputs": array(named), "outputs": array(_argument), "metadata": _node_metadata},
        {"is_hop_single_tensor_return": optional(boolean), "name": optional(identifier)},
    )


_PLAIN_NODE = _node_rule(_argument)
_WRAPPER_NODE = _node_rule(_wrapper_argument)

_GRAPH = record(
    {
        "inputs": array(_graph_input),
        "outputs": array(_argument),
        "nodes": array(_node, _LONGEST_GRAPH),
        "tensor_values": mapping(identifier, tensor_metadata(_size)),
        "sym_int_values": mapping(identifier, _size),
        "sym_bool_values": mapping(identifier, union({"as_expr": _symbolic, "as_bool": boolean})),
    },
    {
        "is_single_tensor_return": boolean,
        "custom_obj_values": empty,
        "sym_float_values": mapping(identifier, union({"as_expr": _symbolic, "as_float": number})),
    },
)

_input = union(
    {
        "user_input": record({"arg": _graph_input}),
        "parameter": record({"arg": _tensor, "parameter_name": dotted_name}),
        "buffer": record({"arg": _tensor, "buffer_name": dotted_name, "persistent": boolean}),
        "tensor_constant": record({"arg": _tensor, "tensor_constant_name": dotted_name}),
        "constant_input": record({"name": identifier, "value": union(_CONSTANTS)}),
    }
)
_output = union(
    {
        "user_output": record({"arg": _argument}),
        "buffer_mutation": record({"arg": _tensor, "buffer_name": dotted_name}),
        "parameter_mutation": record({"arg": _tensor, "parameter_name": dotted_name}),
        "user_input_mutation": record({"arg": _tensor, "user_input_name": identifier}),
    }
)
_call = record(
    {"fqn": text(r"[A-Za-z0-9_.@\-]*")},
    {
        "signature": optional(
            record(
                {
                    "inputs": array(_argument),
                    "outputs": array(_argument),
                    "in_spec": nesting(identifier),
                    "out_spec": nesting(output_key),
                },
                {"forward_arg_names": optional(array(identifier, 1_000))},
            )
        )
    },
)
_version = text(r"[A-Za-z0-9.+<=_\-]*", longest=100)

exported_program: Rule = record(
    {
        "graph_module": record(
            {
                "graph": _graph,
                "signature": record({"input_specs": array(_input), "output_specs": array(_output)}),
                "module_call_graph": array(_call),
            },
            {"metadata": mapping(one_of("custom"), _comment), "treespec_namedtuple_fields": empty},
        ),
        "opset_version": mapping(one_of("aten"), integer),
        "range_constraints": mapping(symbol_name, record({"min_val": optional(integer), "max_val": optional(integer)})),
        "schema_version": record({"major": integer, "minor": integer}),
    },
    {
        "verifiers": array(one_of("TRAINING", "ATEN", ""), 4),
        "torch_version": _version,
        "guards_code": array(guard, 10_000),
    },
)
"""The whole of ``models/model.json``."""

payload_config: Rule = record(
    {
        "config": mapping(
            dotted_name,
            record(
                {
                    "path_name": text(r"(weight|tensor)_[0-9]{1,9}"),
                    "is_param": boolean,
                    "use_pickle": one_of(False),
                    "tensor_meta": tensor_metadata(union({"as_int": integer})),
                }
            ),
        )
    }
)
"""Where the weights or constants lie, and their shapes; pickled ones are refused."""
