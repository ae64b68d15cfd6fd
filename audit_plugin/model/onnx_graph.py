"""Reading and rewriting ONNX models: their taps, and a copy that takes pixels and returns the taps beside the logits.

Works on the graph of any exporter (torch's two, tf2onnx, ...): nothing is executed here, and everything read from the
file, names and metadata included, is taken as untrusted text.
"""

from __future__ import annotations

import ast
import collections
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from audit_plugin.errors import IntakeError, SubjectError, first_line
from audit_plugin.model.taps import GraphNode, NodeKind, Tap, choose_taps
from audit_plugin.types import InputSpec

log = logging.getLogger(__name__)

PIXELS = "pixels"
LOGITS = "logits"
OLDEST_OPSET = 7  # before that, broadcasting was an attribute and means something else
_NAMELESS_DOMAINS = ("", "ai.onnx")

_WEIGHTED = frozenset({
    "Conv", "ConvTranspose", "ConvInteger", "DeformConv", "Gemm", "MatMul", "MatMulInteger", "Einsum", "Attention",
    "QLinearConv", "QLinearMatMul", "QGemm", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv",
    "MultiHeadAttention",
})  # fmt: skip
_RESHAPING = frozenset({
    "MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool", "QLinearAveragePool",
    "QLinearGlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "QLinearReduceMean", "Reshape", "Flatten", "Transpose",
    "Squeeze", "Unsqueeze", "Slice", "Gather", "GatherND", "GatherElements", "Split", "Pad", "Resize", "Upsample",
    "Expand", "Tile", "Identity", "Cast", "CastLike", "Dropout", "DepthToSpace", "SpaceToDepth", "Crop",
    "CenterCropPad",
})  # fmt: skip
_VALUE_PRESERVING = frozenset({
    "Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip
_INTEGER_RESULT = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "OneHot", "Unique"})
_SUBGRAPH = frozenset({"If", "Loop", "Scan"})
_PIXEL_ELEMENTS = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.UINT8,
        TensorProto.INT8,
        TensorProto.UINT16,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
    }
)
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
_BYTES = frozenset({TensorProto.UINT8, TensorProto.INT8})

# Where an operator on quantised values keeps the scale and the zero point of its result.
_QUANTISED_RESULT: Mapping[str, tuple[int, int]] = {
    "QuantizeLinear": (1, 2),
    "QLinearConv": (6, 7),
    "QLinearMatMul": (6, 7),
    "QGemm": (7, 8),
    "QLinearAdd": (6, 7),
    "QLinearMul": (6, 7),
    "QLinearSigmoid": (3, 4),
    "QLinearLeakyRelu": (3, 4),
    "QLinearSoftmax": (3, 4),
    "QLinearConcat": (0, 1),
}


def read_model(path: Path) -> ModelProto:
    """The model of a file, external weights loaded, local functions inlined and shapes inferred where possible.

    Intake has already confined external data to the model's folder.

    Raises:
        IntakeError: the file is no valid ONNX model, is too old, or holds functions that cannot be inlined.
    """
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path), load_external_data=True)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # a damaged file makes onnx and protobuf raise almost anything
        raise IntakeError(f"'{path.name}' is no valid ONNX model: {first_line(error)}. Export and log it again.") from error
    if model.functions:
        raise IntakeError(f"'{path.name}' holds local functions that cannot be inlined. Export it without functions.")
    version = opset_version(model)
    if version < OLDEST_OPSET:
        raise IntakeError(
            f"'{path.name}' uses ONNX opset {version}, at least {OLDEST_OPSET} is needed. "
            "Convert it with onnx.version_converter and log it again."
        )
    return _with_inferred_shapes(model)


def opset_version(model: ModelProto) -> int:
    """The version of ONNX's own operator set that the model asks for; 1 when it names none."""
    return max((opset.version for opset in model.opset_import if opset.domain in _NAMELESS_DOMAINS), default=1)


def model_input(model: ModelProto) -> ValueInfoProto:
    """The single input that is no initialiser.

    Raises:
        SubjectError: when there are several, none, or it is no tensor.
    """
    stored = _initialiser_names(model.graph)
    sources: list[ValueInfoProto] = [value for value in model.graph.input if value.name not in stored]
    if len(sources) != 1 or not sources[0].type.HasField("tensor_type"):
        raise SubjectError(
            f"Expected a model with one image input, got {len(sources)} inputs ({_listed(sources)}). "
            "Wrap it so that it takes a batch of images alone, and log it again."
        )
    return sources[0]


def input_and_output(model: ModelProto) -> tuple[str, str]:
    """The names of the single input and the single output value.

    Raises:
        SubjectError: when the graph has several of either.
    """
    source = model_input(model)
    outputs = list(model.graph.output)
    if len(outputs) != 1:
        raise SubjectError(
            f"Expected a model with one output of logits, got {len(outputs)} outputs ({_listed(outputs)}). "
            "Wrap it so that it returns the logits alone, and log it again."
        )
    return source.name, outputs[0].name


def declared_input_shape(model: ModelProto) -> tuple[int, ...]:
    """The declared shape of the input, -1 for free dimensions; () when the model declares none."""
    shape = model_input(model).type.tensor_type.shape
    return tuple(size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else -1 for size in shape.dim)


def input_element(model: ModelProto) -> np.dtype[Any]:
    """The type of the input's values.

    Raises:
        SubjectError: images are no such values.
    """
    element = model_input(model).type.tensor_type.elem_type
    if element not in _PIXEL_ELEMENTS:
        raise SubjectError(
            f"The model's input is of type {TensorProto.DataType.Name(element)}, and not of floats or integers. "
            "Wrap it so that it takes float32 pixels, and log it again."
        )
    return np.dtype(helper.tensor_dtype_to_np_dtype(element))


def choose_onnx_taps(model: ModelProto) -> tuple[Tap, ...]:
    """The taps of a model as :func:`read_model` returns it, see :mod:`audit_plugin.model.taps`.

    ``Tap.node`` is the name of a value of the graph, ``Tap.name`` a name of its own made of ``[A-Za-z0-9_.-]``.

    Raises:
        SubjectError: several inputs or outputs, or an output that does not depend on the input.
    """
    source, sink = input_and_output(model)
    types = element_types(model.graph)
    repeated = _repeated_blocks(model.graph)
    read = {name for node in model.graph.node for name in reads(node)} | {sink}
    owner = {source: source}  # value -> name of the GraphNode that computes it
    nodes: list[GraphNode] = []
    kinds: dict[str, NodeKind] = {}
    for node in model.graph.node:
        sources = tuple(dict.fromkeys(owner[name] for name in reads(node) if name in owner))
        results = [name for name in node.output if name in read]
        # A size read off the input carries no feature, so it does not make a node depend on the image.
        if not sources or not results or node.op_type in ("Shape", "Size"):
            continue
        owner.update(dict.fromkeys(results, results[0]))
        kinds[results[0]] = _kind(node, results, types, kinds)
        path, block = _module_of(node, repeated)
        label = _sanitised(path or results[0])
        nodes.append(GraphNode(results[0], kinds[results[0]], sources, label, _sanitised(block) if block else None))
    try:
        return choose_taps(nodes, source, owner.get(scores := _scores_value(model.graph, source, sink), scores))
    except ValueError as error:
        raise SubjectError(f"The model is no classifier of its input: {error}.") from error


def expose(model: ModelProto, taps: Sequence[Tap], spec: InputSpec) -> ModelProto:
    """A copy that takes images in [0, 1] and returns the taps and the logits; ``model`` itself is left alone.

    Its input is ``pixels``, float32 (batch, channels, height, width), with the model's batch size where it is fixed.
    Its outputs are float32: every tap under ``tap.name``, then ``logits``. Normalisation and layout of ``spec`` become
    nodes. Quantised values are returned on their real scale. The copy has passed onnx's checker, unless the shape of an
    output cannot be inferred (operators outside ONNX's own set), which the checker demands and ONNX Runtime does not.

    Raises:
        SubjectError: ``spec`` does not fit the declared input, or a tap names no value of this model.
    """
    source, sink = input_and_output(model)
    declared = model_input(model)
    _check_fit(declared_input_shape(model), spec)
    producers = {name: node for node in model.graph.node for name in node.output if name}
    unknown = [tap.node for tap in taps if tap.node not in producers]
    if unknown:
        raise SubjectError(f"The model has no value named {', '.join(map(repr, unknown))} to tap.")

    exposed = ModelProto()
    exposed.CopyFrom(model)
    renamed = _free_names(exposed.graph, [PIXELS, LOGITS, *(tap.name for tap in taps)])
    rename_in(exposed.graph, renamed)
    types = element_types(exposed.graph)
    names = FreshNames(value_names(exposed.graph))

    before, constants = _preprocessing(spec, declared.type.tensor_type.elem_type, renamed.get(source, source), names)
    after: list[NodeProto] = []
    for value, name in [*((tap.node, tap.name) for tap in taps), (sink, LOGITS)]:
        after.append(_output_node(renamed.get(value, value), name, producers.get(value), renamed, types))

    graph = exposed.graph
    nodes = [*before, *graph.node, *after]
    batch = declared.type.tensor_type.shape.dim[0] if declared.type.tensor_type.shape.dim else None
    size = batch.dim_value if batch is not None and batch.dim_value > 0 else "batch"
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [size, spec.channels, spec.height, spec.width])
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    exposed.ir_version = max(exposed.ir_version, 4)  # older ones want every initialiser listed as an input
    graph.input.append(pixels)
    graph.output.extend(ValueInfoProto(name=node.output[0]) for node in after)
    return _checked(exposed)


def without_softmax(model: ModelProto) -> ModelProto | None:
    """A copy that answers with what its last softmax is taken of; None where something else gives the answer.

    The rows of the answer are known to sum to 1, so each is one softmax, whatever shape lies between the two.
    """
    source, sink = input_and_output(model)
    scores = _scores_value(model.graph, source, sink)
    readers = sum(name == scores for node in model.graph.node for name in reads(node)) + (scores == sink)
    place = next((place for place, node in enumerate(model.graph.node) if scores in node.output), None)
    if place is None or model.graph.node[place].op_type != "Softmax" or readers != 1:
        return None
    copied = ModelProto()
    copied.CopyFrom(model)
    softmax = copied.graph.node[place]
    softmax.op_type = "Identity"
    del softmax.attribute[:]
    return copied


def rename_values(model: ModelProto, names: Mapping[str, str]) -> None:
    """Call values of the graph, its input and outputs included, by the names that ``names`` gives them; in place.

    Other values that have such a name get another.
    """
    fresh = FreshNames(value_names(model.graph))
    aside = {old: fresh.fresh(f"{old}_aside") for old in names}
    rename_in(model.graph, aside)
    rename_in(model.graph, _free_names(model.graph, names.values()))
    rename_in(model.graph, {aside[old]: new for old, new in names.items()})


# ------------------------------------------------------------------------------------------------ reading a graph


def _with_inferred_shapes(model: ModelProto) -> ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # a convenience only: taps are found without shapes, if less surely
        log.info("Shapes of the ONNX graph could not be inferred: %s", first_line(error))
        return model


def _initialiser_names(graph: GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}


def element_types(graph: GraphProto) -> dict[str, int]:
    """Element type of every value whose type is known."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = value.type.tensor_type.elem_type
    return types


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def reads(node: NodeProto) -> list[str]:
    """Names of the values that a node reads, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for graph in _subgraphs(node):
        own = _initialiser_names(graph) | {value.name for value in graph.input}
        own.update(name for inner in graph.node for name in inner.output)
        used = [name for inner in graph.node for name in reads(inner)] + [value.name for value in graph.output]
        names.extend(name for name in used if name not in own)
    return names


def depending_on(nodes: Iterable[NodeProto], start: str, without: str = "") -> set[str]:
    """Every value that is computed from ``start``, itself included, by paths that avoid ``without``."""
    reached = {start}
    for node in nodes:
        if reached.intersection(reads(node)):
            reached.update(name for name in node.output if name and name != without)
    return reached


def nodes_between(nodes: Sequence[NodeProto], source: str, result: str) -> list[NodeProto]:
    """The nodes that both depend on ``source`` and lead to ``result``, in order; none where the result does not depend on it."""
    following = depending_on(nodes, source) - {source}
    needed, between = {result}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(reads(node))
            if following.intersection(node.output):
                between.append(node)
    return between[::-1]


def _kind(node: NodeProto, results: Sequence[str], types: Mapping[str, int], kinds: Mapping[str, NodeKind]) -> NodeKind:
    if len(results) > 1 or node.op_type in _SUBGRAPH or node.op_type in _INTEGER_RESULT:
        return NodeKind.OPAQUE
    element = types.get(results[0], TensorProto.FLOAT)
    if element not in _FLOATS and not (element in _BYTES and _carries_quantised(node)):
        return NodeKind.OPAQUE
    if node.op_type in _WEIGHTED:
        return NodeKind.WEIGHTED
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        # Rounding to bytes clamps too, which quantisers use as the ReLU; after pooling it adds nothing.
        pooled = kinds.get(node.input[0]) is NodeKind.RESHAPING
        return NodeKind.RESHAPING if pooled else NodeKind.POINTWISE
    return NodeKind.RESHAPING if node.op_type in _RESHAPING else NodeKind.POINTWISE


def _carries_quantised(node: NodeProto) -> bool:
    """Bytes are features when they are quantised reals, whose scale we know, or pass through a reshaping node."""
    return node.op_type in _QUANTISED_RESULT or node.op_type in _RESHAPING


def _scores_value(graph: GraphProto, source: str, sink: str) -> str:
    """The value that holds the scores: the output before the nodes that only rename, convert or reshape it.

    Without this a trailing Identity or Flatten (tf2onnx and some heads end with one) would make a tap of the logits.
    """
    producers = {name: node for node in graph.node for name in node.output if name}
    while (node := producers.get(sink)) is not None and node.op_type in _VALUE_PRESERVING and node.input[0] != source:
        sink = node.input[0]
    return sink


# ------------------------------------------------------------------------ modules, as torch's exporter recorded them


def _stack(node: NodeProto) -> list[tuple[str, str]]:
    """(module path, class name) from the outermost module inwards; the last recorded entry is the operator itself."""
    recorded = {entry.key: entry.value for entry in node.metadata_props}
    paths = _list_of_text(recorded.get("pkg.torch.onnx.name_scopes", ""))
    kinds = _list_of_text(recorded.get("pkg.torch.onnx.class_hierarchy", ""))
    return list(zip(paths, kinds, strict=True))[:-1] if len(paths) == len(kinds) else []


def _list_of_text(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text) if 0 < len(text) < 10_000 else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else []


def _repeated_blocks(graph: GraphProto) -> set[str]:
    """Module classes, other than torch's own layers, that occur more than once: the network's building blocks."""
    instances: dict[str, set[str]] = collections.defaultdict(set)
    for node in graph.node:
        for path, kind in _stack(node):
            if not kind.startswith(("torch.nn.", "torchvision.ops.")):
                instances[kind].add(path)
    return {kind for kind, paths in instances.items() if len(paths) > 1}


def _module_of(node: NodeProto, repeated: set[str]) -> tuple[str | None, str | None]:
    """(innermost module path, path of the outermost repeated block) of a node."""
    stack = _stack(node)
    innermost = stack[-1][0] if stack else None
    return innermost or None, next((path for path, kind in stack if kind in repeated), None)


def _sanitised(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_")[:80] or "value"


# ------------------------------------------------------------------------------------------------ rewriting a graph


class FreshNames:
    """Names that nothing has yet."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name


def value_names(graph: GraphProto) -> Iterator[str]:
    """Every value name in the graph and its subgraphs."""
    yield from _initialiser_names(graph)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        yield from (*node.input, *node.output)
        for subgraph in _subgraphs(node):
            yield from value_names(subgraph)


def _free_names(graph: GraphProto, wanted: Iterable[str]) -> dict[str, str]:
    """New names for the values of the graph that stand in the way of the wanted ones."""
    wanted = list(wanted)
    names, taken = FreshNames(value_names(graph)), set(value_names(graph))
    for name in wanted:
        names.fresh(name)
    return {name: names.fresh(f"{name}_of_the_model") for name in wanted if name in taken}


def rename_in(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename values in place, in the subgraphs too: ONNX lets no inner value share a name with an outer one."""
    if not renamed:
        return
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = renamed.get(sparse.values.name, sparse.values.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        rename_in_node(node, renamed)


def rename_in_node(node: NodeProto, renamed: Mapping[str, str]) -> None:
    """As :func:`rename_in`, for one node and its subgraphs."""
    node.input[:] = [renamed.get(name, name) for name in node.input]
    node.output[:] = [renamed.get(name, name) for name in node.output]
    for subgraph in _subgraphs(node):
        rename_in(subgraph, renamed)


def _check_fit(declared: tuple[int, ...], spec: InputSpec) -> None:
    size = (spec.channels, spec.height, spec.width)
    wanted = (-1, *size) if spec.layout == "NCHW" else (-1, *size[1:], size[0])
    fits = len(declared) in (0, 4) and all(
        have < 1 or want < 1 or have == want for have, want in zip(declared, wanted, strict=False)
    )
    if not fits:
        raise SubjectError(
            f"The model declares an input of shape {declared}, which does not fit images of {spec.channels} x "
            f"{spec.height} x {spec.width} in layout {spec.layout}. Correct them in the policy: [model]."
        )
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, spec.channels):
            raise SubjectError(f"Expected 1 or {spec.channels} values of {name}, got {len(values)}. Correct the policy: [model].")


def _preprocessing(spec: InputSpec, element: int, target: str, names: FreshNames) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes from ``pixels`` to the model's own input ``target``, and their constants, one value a channel."""
    mean, std = (np.broadcast_to(np.asarray(values, np.float64), (spec.channels,)) for values in (spec.mean, spec.std))
    operations: list[tuple[str, np.ndarray | None, dict[str, Any]]] = []
    scale, offset = (spec.high - spec.low) / std, (spec.low - mean) / std
    if np.any(scale != 1.0):
        operations.append(("Mul", scale, {}))
    if np.any(offset != 0.0):
        operations.append(("Add", offset, {}))
    if spec.layout == "NHWC":
        operations.append(("Transpose", None, {"perm": [0, 2, 3, 1]}))
    if element != TensorProto.FLOAT:
        if element not in _FLOATS:
            operations.append(("Round", None, {}))  # a cast to integers cuts off: 254.99997 would become 254
        operations.append(("Cast", None, {"to": element}))
    operations = operations or [("Identity", None, {})]

    nodes, constants, value = [], [], PIXELS
    for index, (operator, constant, attributes) in enumerate(operations):
        inputs = [value]
        if constant is not None:
            name = names.fresh(f"{PIXELS}_{operator.lower()}")
            constants.append(numpy_helper.from_array(constant.reshape(1, -1, 1, 1).astype(np.float32), name))
            inputs.append(name)
        value = target if index == len(operations) - 1 else names.fresh(f"{PIXELS}_after_{operator.lower()}")
        nodes.append(helper.make_node(operator, inputs, [value], **attributes))
    return nodes, constants


def _output_node(
    value: str, name: str, producer: NodeProto | None, renamed: Mapping[str, str], types: Mapping[str, int]
) -> NodeProto:
    """The node that publishes a value as float32 under another name."""
    element = types.get(value, TensorProto.FLOAT)
    if element in _BYTES and producer is not None and producer.op_type in _QUANTISED_RESULT:
        at = [index for index in _QUANTISED_RESULT[producer.op_type] if index < len(producer.input)]
        scaling = [renamed.get(producer.input[index], producer.input[index]) for index in at]
        return helper.make_node("DequantizeLinear", [value, *scaling], [name])
    if element != TensorProto.FLOAT:
        return helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT)
    return helper.make_node("Identity", [value], [name])


def _checked(model: ModelProto) -> ModelProto:
    """The rewritten model with the types of its outputs filled in.

    Raises:
        SubjectError: onnx's checker refuses it.
    """
    inferred = _with_inferred_shapes(model)
    complete = True
    for output in inferred.graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
        complete = complete and output.type.tensor_type.HasField("shape")
    if complete:
        try:
            onnx.checker.check_model(inferred)
        except Exception as error:  # onnx raises several classes, ValueError for models above 2 GB among them
            raise SubjectError(f"The ONNX model could not be rewritten: {first_line(error)}.") from error
    return inferred


def _listed(values: Sequence[ValueInfoProto]) -> str:
    names = [value.name for value in values]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
