"""Which layer holds the last feature map, and its norms in graphs of every layout and version."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.maths.mahalanobis import ClassGaussians
from audit_plugin.model.export import LOGITS
from audit_plugin.model.feature_maps import FeatureMap, has_channels_last, last_feature_map
from audit_plugin.model.reductions import L1, L2, L_INFINITY, NORMS, append_norm_score, append_norms
from audit_plugin.model.runtime import Session


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(8, 6, 6), (16, 3, 3)], (1, 16, 9)),
        ([(8, 6, 6), (16, 3, 3), (40,)], (1, 16, 9)),  # a hidden linear layer
        ([(8, 6, 6), (16, 1, 1)], (0, 8, 36)),  # pooled away
        ([(8, 6, 6), (17, 48)], (1, 48, 17)),  # tokens
        ([(8, 6, 6), (1, 48)], (0, 8, 36)),  # one token
        ([(7, 7, 96)], (0, 96, 49)),  # channels last
        ([(7, 7, 7)], (0, 7, 49)),
        ([(8, 3, 5)], (0, 8, 15)),
        ([(0, 4, 4)], None),
        ([(40,), ()], None),
        ([], None),
    ],
)
def test_last_feature_map(shapes, expected):
    found = last_feature_map({f"tap_{index}": shape for index, shape in enumerate(shapes)}, (32, 32))
    assert (found and (int(found.layer[4:]), found.channel_count, found.position_count)) == expected


def test_tokens_are_passed_over_where_height_and_width_are_needed():
    shapes = {"conv": (8, 6, 6), "tokens": (17, 48)}
    assert last_feature_map(shapes, (32, 32), dimensions=(4,)) == FeatureMap("conv", (8, 6, 6), False)


@pytest.mark.parametrize(
    ("shape", "image_size", "expected"),
    [
        ((16, 16, 32), (32, 64), False),  # as many channels as rows
        ((16, 16, 32), (32, 32), True),
        ((16, 32, 16), (32, 64), True),
        ((32, 16, 10), (64, 32), True),
        ((32, 16, 8), (64, 32), False),  # 32:16 is 16:8
        ((64, 7, 15), (30, 61), False),  # rounded
        ((7, 15, 64), (30, 61), True),
    ],
)
def test_the_aspect_ratio_of_images_tells_where_channels_are(shape, image_size, expected):
    assert has_channels_last(shape, image_size) is expected


def model_with(shape, opset):
    """pixels -> map = 2 * pixels -> logits = its mean over everything, times (1, -1), with names like those that are appended."""
    value = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", *shape])
    size = int(np.prod(shape))
    head = np.array([[1.0, -1.0]], dtype=np.float32).repeat(size, axis=0) / size
    weights = [numpy_helper.from_array(np.float32(2.0), "norm_map_shape"), numpy_helper.from_array(head, "norm_position_ones")]
    nodes = [
        helper.make_node("Mul", ["pixels", "norm_map_shape"], ["map"], name="norm_map"),
        helper.make_node("Flatten", ["map"], ["norm_magnitudes"], name="norm_largest", axis=1),
        helper.make_node("MatMul", ["norm_magnitudes", "norm_position_ones"], [LOGITS], name="norm_sum"),
    ]
    outputs = [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["batch", *shape])]
    outputs.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", 2]))
    graph = helper.make_graph(nodes, "model", [value], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [7, 12, 17, 18, 20])
@pytest.mark.parametrize(
    ("feature_map", "axes"),
    [
        (FeatureMap("map", (3, 4, 5), False), (2, 3)),
        (FeatureMap("map", (4, 4, 3), True), (1, 2)),
        (FeatureMap("map", (6, 3), True), (1,)),
    ],
    ids=["channels first", "channels last", "tokens"],
)
def test_norms_and_scores_in_every_layout_and_version(feature_map, axes, opset):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(7, *feature_map.shape)).astype(np.float32)
    magnitudes = np.abs(2 * pixels.astype(np.float64))
    expected = {
        L_INFINITY: magnitudes.max(axis=axes),
        L1: magnitudes.sum(axis=axes),
        L2: np.sqrt((magnitudes**2).sum(axis=axes)),
    }
    model = model_with(feature_map.shape, opset)
    plain = append_norms(model, feature_map)
    onnx.checker.check_model(plain, full_check=True)
    values = Session(plain.SerializeToString()).run(pixels)
    assert set(values) == {LOGITS, *NORMS}
    for norm in NORMS:
        np.testing.assert_allclose(values[norm], expected[norm], rtol=1e-5)

    gaussians = {norm: ClassGaussians(rng.normal(size=(2, 3)), rng.normal(size=(3, 3)), 0.0) for norm in NORMS}
    scored = append_norm_score(model, feature_map, gaussians, {norm: f"{norm}_score" for norm in NORMS})
    onnx.checker.check_model(scored, full_check=True)
    values = Session(scored.SerializeToString()).run(pixels)
    predicted = values[LOGITS].argmax(axis=1)
    assert set(predicted) == {0, 1}
    for norm, gaussian in gaussians.items():
        distances = (((expected[norm] - gaussian.means[predicted]) @ gaussian.whitening) ** 2).sum(axis=1)
        np.testing.assert_allclose(values[f"{norm}_score"], distances, rtol=1e-4)
        np.testing.assert_allclose(values[norm], expected[norm], rtol=1e-5)
