"""The choice of taps on hand-made graphs, and its cut points against an enumeration of all paths."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_plugin.model.taps import GraphNode, NodeKind, choose_taps

KINDS = {"W": NodeKind.WEIGHTED, "P": NodeKind.POINTWISE, "R": NodeKind.RESHAPING, "O": NodeKind.OPAQUE}


def graph(text: str, blocks: dict[str, str] | None = None) -> list[GraphNode]:
    """Nodes from lines like ``W conv < x``; ``blocks`` maps the prefix of a node's name to its block."""
    nodes = []
    for line in text.strip().splitlines():
        left, inputs = line.split("<")
        kind, name = left.split()
        block = next((path for prefix, path in (blocks or {}).items() if name.startswith(prefix)), None)
        nodes.append(GraphNode(name, KINDS[kind], tuple(inputs.split()), name, block))
    return nodes


def tapped(nodes: list[GraphNode], source: str = "x") -> list[str]:
    return [tap.node for tap in choose_taps(nodes, source, nodes[-1].name)]


def test_chain_has_one_tap_a_stage_and_none_for_the_logits() -> None:
    nodes = graph("""
        W conv1 < x
        P norm1 < conv1
        P relu1 < norm1
        R pool1 < relu1
        W conv2 < pool1
        P relu2 < conv2
        R pool2 < relu2
        R flat < pool2
        W logits < flat
    """)
    assert tapped(nodes) == ["relu1", "relu2"]


def test_names_are_numbered_in_order_and_labelled_by_the_weights() -> None:
    nodes = graph("""
        W conv1 < x
        P relu1 < conv1
        W conv2 < relu1
        P relu2 < conv2
        W logits < relu2
    """)
    assert [tap.name for tap in choose_taps(nodes, "x", "logits")] == ["tap_01_conv1", "tap_02_conv2"]


def test_pooling_after_the_activation_is_not_tapped() -> None:
    nodes = graph("""
        W conv < x
        P relu < conv
        R pool < relu
        R flat < pool
        W hidden < flat
        P act < hidden
        W logits < act
    """)
    assert tapped(nodes) == ["relu", "act"]


def test_preprocessing_before_the_first_weights_is_not_tapped() -> None:
    nodes = graph("""
        P scaled < x
        P shifted < scaled
        R moved < shifted
        W conv < moved
        P relu < conv
        W logits < relu
    """)
    assert tapped(nodes) == ["relu"]


RESIDUAL = """
    W stem < x
    P stem_relu < stem
    W a1 < stem_relu
    P a1_relu < a1
    W a2 < a1_relu
    P sum < a2 stem_relu
    P sum_relu < sum
    R pool < sum_relu
    W logits < pool
"""


def test_nothing_inside_a_residual_block_is_tapped() -> None:
    assert tapped(graph(RESIDUAL)) == ["stem_relu", "sum_relu"]


def test_weights_on_the_shortcut_make_no_stage_of_their_own() -> None:
    nodes = graph("""
        W stem < x
        P relu < stem
        W main < relu
        W shortcut < relu
        P sum < main shortcut
        P sum_relu < sum
        R pool < sum_relu
        W logits < pool
    """)
    assert tapped(nodes) == ["relu", "sum_relu"]


def test_nested_residual_blocks_are_tapped_after_the_outer_sum_only() -> None:
    nodes = graph("""
        W stem < x
        P relu < stem
        W a < relu
        W b < a
        P inner < b a
        P inner_relu < inner
        P outer < inner_relu relu
        W logits < outer
    """)
    assert tapped(nodes) == ["relu", "outer"]


def test_two_branches_are_tapped_where_they_are_concatenated() -> None:
    nodes = graph("""
        W stem < x
        P relu < stem
        W left < relu
        P left_relu < left
        W right < relu
        P right_relu < right
        P both < left_relu right_relu
        R pool < both
        W logits < pool
    """)
    assert tapped(nodes) == ["relu", "both"]


def test_a_branch_straight_from_the_image_hides_everything_beside_it() -> None:
    nodes = graph("""
        W conv < x
        P relu < conv
        P sum < relu x
        W head < sum
        P act < head
        W logits < act
    """)
    assert tapped(nodes) == ["sum", "act"]


TRANSFORMER_BLOCK = """
    P {b}_norm1 < {before}
    W {b}_qkv < {b}_norm1
    O {b}_split < {b}_qkv
    R {b}_q < {b}_split
    R {b}_k < {b}_split
    R {b}_v < {b}_split
    W {b}_scores < {b}_q {b}_k
    P {b}_softmax < {b}_scores
    W {b}_mixed < {b}_softmax {b}_v
    W {b}_out < {b}_mixed
    P {b}_sum1 < {b}_out {before}
    P {b}_norm2 < {b}_sum1
    W {b}_mlp1 < {b}_norm2
    P {b}_gelu < {b}_mlp1
    W {b}_mlp2 < {b}_gelu
    P {b}_sum2 < {b}_mlp2 {b}_sum1
"""


def vision_transformer() -> str:
    return (
        "W patches < x\nR tokens < patches\nP with_class < tokens\nP placed < with_class\n"
        + TRANSFORMER_BLOCK.format(b="b1", before="placed").strip()
        + "\n"
        + TRANSFORMER_BLOCK.format(b="b2", before="b1_sum2").strip()
        + "\nP norm < b2_sum2\nR class_token < norm\nW logits < class_token"
    )


def test_a_transformer_has_one_tap_a_block_when_the_blocks_are_known() -> None:
    nodes = graph(vision_transformer(), {"b1": "encoder.0", "b2": "encoder.1"})
    taps = choose_taps(nodes, "x", "logits")
    # The closing norm applies no weights of its own, so it belongs to the last block.
    assert [(tap.node, tap.name) for tap in taps] == [
        ("placed", "tap_01_patches"),
        ("b1_sum2", "tap_02_encoder.0"),
        ("norm", "tap_03_encoder.1"),
    ]


def test_a_transformer_has_two_taps_a_block_when_the_blocks_are_not_known() -> None:
    assert tapped(graph(vision_transformer())) == ["placed", "b1_sum1", "b1_sum2", "b2_sum1", "norm"]


def test_a_plain_repeated_block_keeps_its_last_stage_only() -> None:
    nodes = graph(
        """
        W stem < x
        P relu < stem
        W a_expand < relu
        P a_act < a_expand
        W a_project < a_act
        P a_norm < a_project
        W b_expand < a_norm
        P b_act < b_expand
        W b_project < b_act
        P b_norm < b_project
        R pool < b_norm
        W logits < pool
    """,
        {"a_": "features.1", "b_": "features.2"},
    )
    assert tapped(nodes) == ["relu", "a_norm", "b_norm"]


def test_a_pooled_class_map_keeps_the_stage_that_computes_it() -> None:
    nodes = graph("""
        W conv < x
        P relu < conv
        W classes < relu
        P classes_relu < classes
        R pool < classes_relu
        R flat < pool
    """)
    assert tapped(nodes) == ["relu", "classes_relu"]


def test_a_network_of_one_stage_has_no_taps() -> None:
    assert tapped(graph("R flat < x\nW logits < flat")) == []


def test_a_network_without_weights_has_no_taps() -> None:
    assert tapped(graph("R pool < x\nP logits < pool")) == []


def test_dead_branches_change_nothing() -> None:
    dead = "\n    W auxiliary < stem_relu\n    P auxiliary_act < auxiliary"
    nodes = graph(RESIDUAL.replace("\n    W a1", dead + "\n    W a1", 1))
    assert tapped(nodes) == tapped(graph(RESIDUAL))


def test_an_output_that_does_not_depend_on_the_input_is_refused() -> None:
    nodes = graph("""
        W conv < x
        W logits < elsewhere
    """)
    with pytest.raises(ValueError, match="'logits' does not depend on the input 'x'"):
        choose_taps(nodes, "x", "logits")


# ---- every path runs through a tap: the linear scan against an enumeration of the paths


@st.composite
def random_graphs(draw: st.DrawFn) -> list[GraphNode]:
    """Directed acyclic graphs of up to nine nodes, each reading one to three of the values before it."""
    nodes: list[GraphNode] = []
    for index in range(draw(st.integers(1, 9))):
        earlier = ["x", *(node.name for node in nodes)]
        inputs = draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=3, unique=True))
        nodes.append(GraphNode(f"n{index}", NodeKind.WEIGHTED, tuple(inputs), f"n{index}"))
    return nodes


def paths(nodes: list[GraphNode], sink: str) -> Iterator[list[str]]:
    """Every path from the input to the sink, as the nodes it runs through."""
    if sink == "x":
        yield []
        return
    node = next(node for node in nodes if node.name == sink)
    for read in node.inputs:
        for path in paths(nodes, read):
            yield [*path, sink]


@given(random_graphs())
@settings(max_examples=400, deadline=None)
def test_the_taps_are_exactly_the_values_that_all_paths_share(nodes: list[GraphNode]) -> None:
    # With weights in every node each shared value ends a stage of its own; the last one computes the logits.
    sink = nodes[-1].name
    shared = set.intersection(*(set(path) for path in paths(nodes, sink)))
    expected = [node.name for node in nodes if node.name in shared and node.name != sink]
    assert tapped(nodes) == expected


@given(random_graphs(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_taps_do_not_depend_on_the_order_in_which_independent_nodes_are_listed(
    nodes: list[GraphNode], random: Random
) -> None:
    waiting, ready, reordered = list(nodes[:-1]), {"x"}, []
    while waiting:
        candidates = [node for node in waiting if ready.issuperset(node.inputs)]
        chosen = candidates[random.randrange(len(candidates))]
        waiting.remove(chosen)
        ready.add(chosen.name)
        reordered.append(chosen)
    assert tapped([*reordered, nodes[-1]]) == tapped(nodes)
