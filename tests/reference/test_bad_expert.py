"""BaDExpert's scores, computed inside the ONNX graph, against plain NumPy on the logits of the three networks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.model.expert_graph import AUXILIARY, EXPERT, OWN, TRIANGLE, append_expert_score
from audit_plugin.model.export import LOGITS, PIXELS
from audit_plugin.model.runtime import Session

_spec = importlib.util.spec_from_file_location("bad_expert_reference", Path(__file__).parent / "bad_expert_reference.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

CLASSES = 5
SCORE = "bad_expert"
CERTAIN = 200.0  # a logit so far ahead that the softmax is exactly 0 or 1 in float32
LOWEST, HIGHEST = -np.log(1e7), np.log(1e7)  # what S is bounded to, as -log S


def network(line, lines, opset=18):
    """The logits are one line of the 'image': each such network reads its own, so a test chooses all logits itself."""
    stored = [numpy_helper.from_array(np.array(value), name) for name, value in (("line", line), ("shape", [-1, CLASSES]))]
    gather = helper.make_node("Gather", [PIXELS, "line"], ["row"], axis=2)
    reshape = helper.make_node("Reshape", ["row", "shape"], [LOGITS])
    source = helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", 1, lines, CLASSES])
    sink = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph([gather, reshape], "line", [source], [sink], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def scored(logits, k=0.5, opset=18):
    """Outputs of the joined graph for logits (N, networks, classes) of model, experts and auxiliary model."""
    logits = np.asarray(logits, np.float32)
    lines = logits.shape[1]
    model, *experts, auxiliary = (network(line, lines, opset) for line in range(lines))
    joined = append_expert_score(model, experts, auxiliary, k=k, score=SCORE)
    onnx.checker.check_model(joined)
    return Session(joined.SerializeToString()).run(logits[:, None])


def drawn(count, scale, seed=0, experts=1):
    return np.random.default_rng(seed).normal(scale=scale, size=(count, 2 + experts, CLASSES)).astype(np.float32)


def certain(p, q):
    """Logits of an image of predicted class 0 with these probabilities, each 0, 1 or between."""

    def row(probability):
        rest = [0.0] * (CLASSES - 1)
        if probability in (0.0, 1.0):
            return [CERTAIN if probability else -CERTAIN, *rest]
        return [np.log(probability * (CLASSES - 1) / (1.0 - probability)), *rest]

    return [[1.0, *[0.0] * (CLASSES - 1)], row(p), row(q)]


@pytest.mark.parametrize("k", [0.5, 0.4, 0.2])
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("experts", [1, 3])
def test_probabilities_and_score_agree(k, scale, experts):
    # A float32 softmax is good to a few units in the seventh digit.
    logits = drawn(200, scale, experts=experts)
    found = scored(logits, k)
    expected = np.array([reference.probabilities(*image) for image in logits])
    for name, column in ((OWN, 0), (EXPERT, -2), (AUXILIARY, -1)):
        np.testing.assert_allclose(found[name], expected[:, column], atol=1e-6)
    differences = [reference.difference(m, known, q, k) for m, *known, q in expected]
    np.testing.assert_allclose(found[SCORE], differences, atol=2e-6)
    np.testing.assert_array_equal(found[LOGITS], logits[:, 0])


@pytest.mark.parametrize("k", [0.5, 0.4, 0.2])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_triangle_agrees(k, scale):
    # From the graph's own p and q: 1 - p and k - q lose digits that no float32 implementation can keep.
    found = scored(drawn(200, scale), k)
    pairs = zip(found[EXPERT].astype(np.float64), found[AUXILIARY].astype(np.float64), strict=True)
    s = np.array([reference.triangle(p, q, float(np.float32(k))) for p, q in pairs])
    np.testing.assert_allclose(found[TRIANGLE], np.clip(-np.log(np.maximum(s, 1e-30)), LOWEST, HIGHEST), atol=1e-4)


# p, q, k and the paper's S. Where p = 1 and q >= k its second term is 0 / 0, taken as infinite: that is its limit for p -> 1.
EDGES = [
    (0.9, 0.6, 0.5, 0.6 / 0.45),  # q above k
    (0.9, 0.5, 0.5, 0.5 / 0.45),  # q at k, up to rounding
    (1.0, 1.0, 0.5, 2.0),
    (1.0, 1.0, 0.4, 2.5),
    (1.0, 0.9, 0.5, 1.8),
    (1.0, 0.0, 0.5, 0.0),  # the backdoor's corner
    (1.0, 0.2, 0.5, 0.0),
    (0.5, 0.0, 0.5, 0.0),
    (0.0, 0.0, 0.5, 2.0),  # 0 / 0 in the first term; the bounds make it 1 / k
    (0.0, 0.3, 0.5, 5.0),
    (0.0, 1.0, 0.5, np.inf),  # nothing suspicious about it
]


@pytest.mark.parametrize(("p", "q", "k", "s"), EDGES)
def test_edges(p, q, k, s):
    found = {name: value[0] for name, value in scored([certain(p, q)], k).items() if name != LOGITS}
    assert found[EXPERT] == pytest.approx(p, abs=1e-6)
    assert found[AUXILIARY] == pytest.approx(q, abs=1e-6)
    assert found[SCORE] == pytest.approx(found[OWN] + p - k * q, abs=1e-6)
    if 0.0 < s < np.inf:
        assert found[TRIANGLE] == pytest.approx(-np.log(s), abs=1e-4)
    elif s == 0.0:  # 1e-7 over at least 1 / 5
        assert found[TRIANGLE] > np.log(1e7) - np.log(5) - 0.01
    else:
        assert found[TRIANGLE] == pytest.approx(LOWEST, abs=1e-3)


def test_triangle_is_continuous_at_a_certain_expert():
    almost, entirely = scored([certain(1 - 1e-6, 1.0), certain(1.0, 1.0)])[TRIANGLE]
    assert almost == pytest.approx(entirely, abs=1e-4)


@pytest.mark.parametrize("output", [SCORE, TRIANGLE])
def test_knowing_expert_raises_and_knowing_auxiliary_lowers(output):
    steps = np.linspace(0.02, 0.98, 25)
    for fixed in (0.05, 0.4, 0.9):
        assert (np.diff(scored([certain(p, fixed) for p in steps])[output]) > -1e-5).all()
        assert (np.diff(scored([certain(fixed, q) for q in steps])[output]) < 1e-5).all()


def test_the_order_of_early_experts_does_not_matter_and_the_last_is_the_papers():
    logits = drawn(60, 2.0, experts=3)
    expected = scored(logits)
    swapped = scored(logits[:, [0, 2, 1, 3, 4]])
    for name in (SCORE, TRIANGLE, EXPERT):
        np.testing.assert_allclose(swapped[name], expected[name], atol=1e-5)
    alone = scored(logits[:, [0, 3, 4]])
    for name in (TRIANGLE, EXPERT, AUXILIARY):
        np.testing.assert_allclose(alone[name], expected[name], atol=1e-6)


def test_relabelling_shifting_and_reordering_change_nothing():
    logits = drawn(60, 2.0)
    expected = scored(logits)
    relabelled = scored(logits[:, :, [3, 0, 4, 1, 2]])
    shifted = scored(logits + np.array([3.0, -2.0, 5.0], np.float32)[:, None])
    order = np.random.default_rng(1).permutation(60)
    reordered = scored(logits[order])
    for name in (SCORE, TRIANGLE, OWN, EXPERT, AUXILIARY):  # another order of sums, and rounding of the shifted logits
        np.testing.assert_allclose(relabelled[name], expected[name], atol=1e-4)
        np.testing.assert_allclose(shifted[name], expected[name], atol=1e-3 if name == TRIANGLE else 1e-5)
        np.testing.assert_allclose(reordered[name], expected[name][order], atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_older_and_newer_opsets_agree(opset):
    logits = drawn(20, 2.0)
    expected = scored(logits)
    for name, values in scored(logits, opset=opset).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5)
