"""The nodes of a checked ONNX graph as steps of :mod:`audit_plugin.intake.data_flow`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import onnx

from audit_plugin.intake.data_flow import Step, find_paths
from audit_plugin.intake.operators import words
from audit_plugin.types import IntakeFinding

_DECIDING = frozenset(
    words(
        "Equal Less LessOrEqual Greater GreaterOrEqual Not And Or Xor BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BitShift "
        "IsNaN IsInf Sign Floor Ceil Round Mod ArgMax ArgMin Hardmax NonZero Unique Bernoulli Multinomial ThresholdedRelu "
        "Shrink OneHot NonMaxSuppression"
    )
)
_CASTS = ("Cast", "CastLike")
_WITH_INDICES = ("TopK", "MaxPool")  # their second output is a place, a decision
_WITH_WEIGHTS = frozenset(
    words("Conv ConvTranspose ConvInteger DeformConv QLinearConv Gemm MatMul MatMulInteger QLinearMatMul Einsum LSTM GRU RNN")
)
_SHAPE_ONLY = ("Shape", "Size", "RandomNormalLike", "RandomUniformLike", "EyeLike")
_REPEATED = ("Loop", "Scan")
_CONTINUOUS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)


def find_onnx_paths(path: str, graph: onnx.GraphProto) -> tuple[IntakeFinding, ...]:
    """See :func:`audit_plugin.intake.data_flow.find_paths`."""
    stored = {weight.name for weight in graph.initializer} | {weight.values.name for weight in graph.sparse_initializer}
    steps = list(_steps(graph, {}, itertools.count()))
    sources = [value.name for value in graph.input if value.name not in stored]
    return find_paths(path, steps, sources, [value.name for value in graph.output])


def _steps(graph: onnx.GraphProto, scope: Mapping[str, str], numbers: Iterator[int]) -> Iterator[Step]:
    """The steps of a graph. ``scope`` maps the names that a branch shares with the graphs around it."""
    names = dict(scope)
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
                    prefix = f"{next(numbers)}:"
                    own = {name: prefix + name for name in _all_writes(inner)}
                    yield from _steps(inner, {**names, **own}, numbers)
                    branch_results += [own.get(value.name, names.get(value.name, value.name)) for value in inner.output]
        writes = tuple(names.get(name, name) for name in node.output if name)
        step = _step(node, reads, captured, tuple(branch_results), writes)
        yield step
        if node.op_type in _WITH_INDICES and len(node.output) > 1 and node.output[-1]:
            yield dataclasses.replace(step, writes=writes[-1:], decided_by=reads[:1])


def _step(
    node: onnx.NodeProto, reads: tuple[str, ...], captured: tuple[str, ...], results: tuple[str, ...], writes: tuple[str, ...]
) -> Step:
    kind = node.op_type
    decided_by: tuple[str, ...] = ()
    if kind in _DECIDING or (kind in _CASTS and not _stays_continuous(node)):
        decided_by = reads
    elif kind in _REPEATED:
        decided_by = reads + captured
    elif kind == "If":
        decided_by = reads[:1]
    return Step(
        name=node.name or (node.output[0] if node.output else ""),
        operator=kind,
        reads=(reads[1:] if kind in _SHAPE_ONLY else reads) + captured + results,
        writes=writes[:1] if kind in _WITH_INDICES and list(node.output[:1]) != [""] else writes,
        decided_by=decided_by,
        has_weights=kind in _WITH_WEIGHTS,
    )


def _stays_continuous(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(attribute.name == "to" and attribute.i in _CONTINUOUS for attribute in node.attribute)


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
