"""Which intermediate values of a network are worth looking at: one *tap* a block, found from the graph alone.

A value can be a tap when every path from the input to the logits runs through it (so inside a residual block nothing is, after
it something is). The chain of those values is cut into stages, a new one wherever weights are applied; the tap of a stage
is its last activation, normalisation or residual sum, so pooling and reshaping after it do not count. Where
the exporter recorded the module that each node came from, the stages of one repeated block class (a transformer's encoder
block, an inverted residual) are merged and only the last one is kept.

On torchvision's ResNet-18 this gives the layers of Jebreel et al. 2023 (stem after ReLU, eight blocks after their last
ReLU); on MobileNetV2 their 17 blocks plus the stem and the last feature map (they take its pooled vector instead).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


class NodeKind(enum.Enum):
    """What a node does to the features."""

    WEIGHTED = "weighted"  # convolution, linear, matrix product
    POINTWISE = "pointwise"  # activation, normalisation, residual sum, concatenation of branches
    RESHAPING = "reshaping"  # pooling, flattening, slicing: no new feature
    OPAQUE = "opaque"  # several outputs or an integer value: never a tap


@dataclass(frozen=True)
class GraphNode:
    """One node that depends on the input, in topological order.

    ``inputs`` names only the nodes among these (and the graph input) that it reads; ``block`` is the repeated module it
    belongs to, ``label`` the most readable name known for it.
    """

    name: str
    kind: NodeKind
    inputs: tuple[str, ...]
    label: str
    block: str | None = None


@dataclass(frozen=True)
class Tap:
    """A value to expose: ``node`` in the graph and the ``name`` it gets as an ONNX output."""

    node: str
    name: str


@dataclass
class _Stage:
    node: GraphNode | None
    label: str
    block: str | None
    pooled_after: bool = False


def choose_taps(nodes: Sequence[GraphNode], source: str, sink: str) -> tuple[Tap, ...]:
    """The taps of a graph from ``source`` (its input) to ``sink`` (the logits), in order; the logits themselves are not one.

    Raises:
        ValueError: when the sink does not depend on the source.
    """
    stages: list[_Stage] = []
    for segment in _segments(nodes, source, sink):
        value = segment[-1]
        weighted = [node for node in segment if node.kind is NodeKind.WEIGHTED]
        if weighted:
            block = next((node.block for node in reversed(weighted) if node.block), None)
            stages.append(_Stage(None, block or weighted[-1].label, block))
        if not stages:
            continue  # preprocessing before the first weights
        if value.kind in (NodeKind.WEIGHTED, NodeKind.POINTWISE):
            stages[-1].node, stages[-1].pooled_after = value, False
        elif value.kind is NodeKind.RESHAPING:
            stages[-1].pooled_after = True
    if stages and not stages[-1].pooled_after:
        stages.pop()  # that stage computes the logits
    kept = [
        stage
        for stage, following in itertools.zip_longest(stages, stages[1:])
        if stage.node is not None and not (stage.block and following and following.block == stage.block)
    ]
    return tuple(
        Tap(stage.node.name, f"tap_{index:02d}_{stage.label}") for index, stage in enumerate(kept, start=1) if stage.node
    )


def _segments(nodes: Sequence[GraphNode], source: str, sink: str) -> list[list[GraphNode]]:
    """The nodes between input and logits, cut after every value that all paths run through."""
    live = _live_nodes(nodes, source, sink)
    last_reader: dict[str, int] = {}
    for index, node in enumerate(live):
        for read in node.inputs:
            last_reader[read] = index
    segments: list[list[GraphNode]] = [[]]
    furthest = last_reader.get(source, 0)
    for index, node in enumerate(live):
        segments[-1].append(node)
        # Cut when nothing computed earlier is read after this node: then all paths run through it.
        if furthest <= index:
            segments.append([])
        furthest = max(furthest, last_reader.get(node.name, index))
    return [segment for segment in segments if segment]


def _live_nodes(nodes: Sequence[GraphNode], source: str, sink: str) -> list[GraphNode]:
    """Nodes on some path from the source to the sink."""
    reached = {source}
    forward = []
    for node in nodes:
        if reached.intersection(node.inputs):
            reached.add(node.name)
            forward.append(node)
    if sink not in reached:
        raise ValueError(f"the output '{sink}' does not depend on the input '{source}'")
    needed = {sink}
    live = []
    for node in reversed(forward):
        if node.name in needed:
            needed.update(node.inputs)
            live.append(node)
    return live[::-1]
