"""The nodes of a checked ONNX graph as steps of :mod:`audit_plugin.intake.data_flow`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import onnx

from audit_plugin.intake.data_flow import Step, find_paths
from audit_plugin.intake.operators import words
from audit_plugin.types import IntakeFinding

# Continuous in what they read, as in continuity.py; TopK is not, which puts what is no number at one end.
_CONTINUOUS = frozenset(
    words(
        "Abs Acos Acosh Add AffineGrid Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Celu Clip Concat "
        "ConcatFromSequence Conv ConvInteger ConvTranspose Cos Cosh CumProd CumSum DeformConv DepthToSpace "
        "DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Erf Exp Flatten GRU Gelu Gemm GlobalAveragePool "
        "GlobalLpPool GlobalMaxPool GridSample GroupNormalization HardSigmoid HardSwish Identity If "
        "InstanceNormalization LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul "
        "MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mul Neg PRelu Pow QLinearConv QLinearMatMul "
        "QuantizeLinear RMSNormalization RNN Reciprocal Relu RotaryEmbedding ScatterElements ScatterND Selu "
        "SequenceConstruct Sigmoid Sin Sinh Softmax Softplus Softsign SpaceToDepth Sqrt Sub Sum Swish Tanh Transpose "
        "Trilu Where"
    )
)
# Of these not in the masks, places, conditions and exponents (zero to the power of something is one or zero).
_DECIDED_BY = {"Attention": 3, "If": 0, "Pow": 1, "ScatterElements": 1, "ScatterND": 1, "Where": 0}
# Continuous in the first of what they read; the others are sizes, places and axes.
_IN_THE_FIRST = frozenset(
    words(
        "CenterCropPad Col2Im DFT Expand Gather GatherElements GatherND MaxUnpool Pad ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Reshape Resize "
        "ReverseSequence SequenceAt Slice Split SplitToSequence Squeeze Tile Unsqueeze Upsample"
    )
)
# Neither round whole numbers nor let them overflow.
_EXACT = frozenset(
    words(
        "CenterCropPad Clip Concat ConcatFromSequence ConvInteger DepthToSpace DequantizeLinear Expand Flatten Gather "
        "GatherElements GatherND GlobalMaxPool Identity If MatMulInteger Max MaxPool Min Pad QLinearConv QLinearMatMul "
        "ReduceMax ReduceMin Relu Reshape Resize SequenceAt SequenceConstruct Slice SpaceToDepth Split Squeeze Tile "
        "Transpose Unsqueeze Upsample Where"
    )
)
_SCALED = frozenset(words("ConvInteger DequantizeLinear MatMulInteger QLinearConv QLinearMatMul"))
_CASTS = ("Cast", "CastLike")
_WITH_WEIGHTS = frozenset(
    words("Conv ConvTranspose ConvInteger DeformConv QLinearConv Gemm MatMul MatMulInteger QLinearMatMul Einsum LSTM GRU RNN")
)
_SHAPE_ONLY = ("Shape", "Size", "RandomNormalLike", "RandomUniformLike", "EyeLike")
_BY_CHANCE = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_REPEATED = ("Loop", "Scan")
_FRACTIONS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)


def find_onnx_paths(path: str, graph: onnx.GraphProto) -> tuple[IntakeFinding, ...]:
    """See :func:`audit_plugin.intake.data_flow.find_paths`."""
    stored = {weight.name for weight in graph.initializer} | {weight.values.name for weight in graph.sparse_initializer}
    images = [value for value in graph.input if value.name not in stored]
    steps = _Reader([value.name for value in images if value.type.tensor_type.elem_type not in _FRACTIONS]).steps(graph, {})
    return find_paths(path, list(steps), [value.name for value in images], [value.name for value in graph.output])


class _Reader:
    """Reads the steps of a graph and of those inside it.

    Args:
        whole: the inputs that hold whole numbers; what is made of them is followed until it has fractions.
    """

    def __init__(self, whole: Sequence[str]) -> None:
        self._whole = set(whole)
        self._false: set[str] = set()  # stored values, which switch something off
        self._numbers = itertools.count()

    def steps(self, graph: onnx.GraphProto, scope: Mapping[str, str]) -> Iterator[Step]:
        """The steps of a graph. ``scope`` maps the names that a branch shares with the graphs around it."""
        names = dict(scope)
        self._false.update(names.get(stored.name, stored.name) for stored in graph.initializer if _is_false(stored))
        for node in graph.node:
            reads = tuple(names.get(name, name) for name in node.input if name)
            captured: tuple[str, ...] = ()
            branch_results: list[str] = []
            for attribute in node.attribute:
                for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    if node.op_type in _REPEATED:
                        captured += tuple(names.get(name, name) for name in _all_reads(inner))
                    else:
                        # A branch may use a name that another branch uses too.
                        prefix = f"{next(self._numbers)}:"
                        own = {name: prefix + name for name in _all_writes(inner)}
                        yield from self.steps(inner, {**names, **own})
                        branch_results += [own.get(value.name, names.get(value.name, value.name)) for value in inner.output]
            given = tuple(names.get(name, name) for name in node.input)
            writes = tuple(names.get(name, name) for name in node.output if name)
            if node.op_type == "Constant" and any(_is_false(attribute.t) for attribute in node.attribute):
                self._false.update(writes)
            step = self._step(node, given, (*reads, *captured, *branch_results), writes)
            yield step
            if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[-1]:  # places, a decision
                yield dataclasses.replace(step, writes=writes[-1:], decided_by=reads[:1])

    def _step(self, node: onnx.NodeProto, given: tuple[str, ...], reads: tuple[str, ...], writes: tuple[str, ...]) -> Step:
        """``given`` are the inputs by place, ``""`` for one that is left out; ``reads`` includes those of graphs inside."""
        kind = node.op_type
        measures = reads[:1] if kind in _SHAPE_ONLY else ()
        reads = reads[len(measures) :]
        decided_by = (*_deciding(node, given, reads), *self._wrapped(node, reads))
        if not self._whole.isdisjoint(reads) and kind not in _SCALED and not _makes_fractions(node):
            self._whole.update(writes)
        trains = kind == "Dropout" and any(name and name not in self._false for name in given[2:])
        return Step(
            name=node.name or (node.output[0] if node.output else ""),
            operator=kind,
            reads=reads,
            writes=writes[:1] if kind == "MaxPool" and list(node.output[:1]) != [""] else writes,
            measures=measures,
            decided_by=decided_by,
            by_chance=kind in _BY_CHANCE or trains,
            has_weights=kind in _WITH_WEIGHTS,
        )

    def _wrapped(self, node: onnx.NodeProto, reads: Sequence[str]) -> Sequence[str]:
        """The whole numbers among ``reads`` with which a node calculates: it rounds a quotient, and too large a sum wraps."""
        exact = node.op_type in _EXACT or node.op_type in _CASTS
        return () if exact else [name for name in reads if name in self._whole]


def _deciding(node: onnx.NodeProto, given: Sequence[str], reads: Sequence[str]) -> Sequence[str]:
    """The reads in which a node is not continuous."""
    kind = node.op_type
    if kind in _CASTS:
        return () if _makes_fractions(node) else reads
    settings = {attribute.name: attribute for attribute in node.attribute}
    if kind in _IN_THE_FIRST or (kind == "GridSample" and "mode" in settings and settings["mode"].s == b"nearest"):
        return given[1:]
    if kind not in _CONTINUOUS or ("p" in settings and settings["p"].i < 1):  # a norm of order 0 counts
        return reads
    return given[_DECIDED_BY[kind] :][:1] if kind in _DECIDED_BY else ()


def _makes_fractions(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(attribute.name == "to" and attribute.i in _FRACTIONS for attribute in node.attribute)


def _is_false(tensor: onnx.TensorProto) -> bool:
    stored_here = tensor.data_type == onnx.TensorProto.BOOL and not tensor.dims and not tensor.external_data
    return stored_here and not onnx.numpy_helper.to_array(tensor).any()


def _all_reads(graph: onnx.GraphProto) -> list[str]:
    """Every name that a graph or a graph inside it reads."""
    found = [value.name for value in graph.output]
    for node in graph.node:
        found += [name for name in node.input if name]
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                found += _all_reads(inner)
    return found


def _all_writes(graph: onnx.GraphProto) -> list[str]:
    stored = [weight.name for weight in graph.initializer]
    return stored + [name for node in graph.node for name in node.output if name]
