"""What is appended to a model keeps out of the way of the model's own names, and suits every version of ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.model.export import LOGITS
from audit_plugin.model.reductions import COSINES, append_flag, append_layerwise_score
from audit_plugin.model.runtime import Session

FEATURES, CLASSES = 6, 3
APPENDED = (
    "predicted_class", "tiny_norm", "centroids_0", "features_0", "centroid_0", "ones_0", "products_0", "product_0", "squares_0",
    "square_0", "norm_0", "safe_norm_0", "cosine_0", "layer_weights", "class_weights", "weighted_cosines", "layer_ones",
    "row_shape", "cosine_sums", "cosine_sum", "class_means", "class_mean", "class_deviations", "class_deviation", "below_mean",
)  # fmt: skip


def chain(names: tuple[str, ...] = (), opset: int = 18) -> onnx.ModelProto:
    """pixels + 1 + 1 + ... -> tap -> logits, its weights and values called by ``names`` in turn."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "pixels"
    for weight, following in zip(names[::2], names[1::2], strict=False):
        weights.append(numpy_helper.from_array(np.ones(FEATURES, dtype=np.float32), weight))
        nodes.append(helper.make_node("Add", [value, weight], [following], name=following))
        value = following
    weights.append(numpy_helper.from_array(rng.normal(size=(FEATURES, CLASSES)).astype(np.float32), "head"))
    nodes += [helper.make_node("Relu", [value], ["tap"]), helper.make_node("MatMul", ["tap", "head"], [LOGITS])]
    source = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", FEATURES])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("tap", FEATURES), (LOGITS, CLASSES))
    ]
    graph = helper.make_graph(nodes, "chain", [source], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def scores_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    scored = append_layerwise_score(
        model,
        centroids={"tap": rng.normal(size=(CLASSES, FEATURES)).astype(np.float32)},
        weights=np.ones((CLASSES, 1), dtype=np.float32),
        mean=np.ones(CLASSES, dtype=np.float32),
        deviation=np.ones(CLASSES, dtype=np.float32),
        score="score",
    )
    onnx.checker.check_model(scored, full_check=True)
    return Session(scored.SerializeToString()).run(rng.normal(size=(5, FEATURES)).astype(np.float32))


def test_model_with_the_names_of_the_appended_nodes_is_scored_alike() -> None:
    named_alike = scores_of(chain(APPENDED))
    expected = scores_of(chain(tuple(f"own_{name}" for name in APPENDED)))
    assert set(named_alike) == {LOGITS, "score", COSINES}
    for name, values in expected.items():
        np.testing.assert_array_equal(named_alike[name], values)


@pytest.mark.parametrize("opset", [7, 11, 12, 13, 17, 18, 20, 23])
def test_layerwise_score_in_every_version_of_onnx(opset: int) -> None:
    rng = np.random.default_rng(2)
    layers = {"tap": FEATURES, LOGITS: CLASSES}
    centroids = {layer: rng.normal(size=(CLASSES, size)).astype(np.float32) for layer, size in layers.items()}
    weights, mean = rng.integers(0, 2, (CLASSES, 2)).astype(np.float32), rng.normal(size=CLASSES).astype(np.float32)
    deviation = rng.uniform(0.1, 1.0, CLASSES).astype(np.float32)
    model = chain(opset=opset)
    scored = append_layerwise_score(model, centroids=centroids, weights=weights, mean=mean, deviation=deviation, score="score")
    onnx.checker.check_model(scored, full_check=True)
    pixels = rng.normal(size=(30, FEATURES)).astype(np.float32)
    pixels[0] = -1.0  # nothing passes the ReLU: a layer of length 0
    before, values = (Session(item.SerializeToString()).run(pixels) for item in (model, scored))

    predicted = before[LOGITS].argmax(axis=1)
    assert set(predicted) == set(range(CLASSES))
    cosines = np.zeros((30, 2))
    for column, (layer, centroid) in enumerate(centroids.items()):
        own = centroid[predicted].astype(np.float64)
        lengths = np.linalg.norm(before[layer].astype(np.float64), axis=1) * np.linalg.norm(own, axis=1)
        cosines[:, column] = (before[layer] * own).sum(axis=1) / np.maximum(lengths, 1e-12)
    np.testing.assert_array_equal(values[COSINES][0], 0.0)
    np.testing.assert_allclose(values[COSINES], cosines, atol=1e-5)  # sums of six float32 products
    expected = (mean[predicted] - (cosines * weights[predicted]).sum(axis=1)) / deviation[predicted]
    np.testing.assert_allclose(values["score"], expected, rtol=1e-4, atol=1e-4)  # divided by deviations from 0.1 up
    assert values["score"].shape == (30,)


@pytest.mark.parametrize("opset", [7, 9, 13, 18, 23])
def test_flag_is_a_score_above_its_threshold_in_every_version_of_onnx(opset: int) -> None:
    ones = np.ones(CLASSES, dtype=np.float32)
    centroids = {"tap": np.random.default_rng(3).normal(size=(CLASSES, FEATURES)).astype(np.float32)}
    scored = append_layerwise_score(
        chain(opset=opset), centroids=centroids, weights=ones[:, None], mean=ones, deviation=ones, score="score"
    )
    pixels = np.random.default_rng(4).normal(size=(40, FEATURES)).astype(np.float32)
    threshold = float(Session(scored.SerializeToString()).run(pixels)["score"][7])  # one score lies on it, and is not above it
    flagged = append_flag(scored, score="score", threshold=threshold, flag="flag")
    onnx.checker.check_model(flagged, full_check=True)
    assert [output.name for output in flagged.graph.output] == [*(output.name for output in scored.graph.output), "flag"]
    values = Session(flagged.SerializeToString()).run(pixels)
    assert (values["flag"].dtype, values["flag"].shape) == (np.bool_, (40,))
    np.testing.assert_array_equal(values["flag"], values["score"] > np.float32(threshold))
    assert not values["flag"][7]
    assert 0 < values["flag"].sum() < 40
    pixels[3] = np.nan
    values = Session(flagged.SerializeToString()).run(pixels)
    assert np.flatnonzero(np.isnan(values["score"])).tolist() == [3]
    assert values["flag"][3]
