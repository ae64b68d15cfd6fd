"""A second end of a network inside its own graph: which nodes are copied, and which graphs cannot be cut."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.errors import InapplicableError
from audit_plugin.model.benign_features import BenignFeatures, Windows
from audit_plugin.model.export import LOGITS, PIXELS
from audit_plugin.model.reconstruction import DISAGREEMENT, LOG_DISTANCE, Term, append_bounded_sum, append_reconstruction
from audit_plugin.model.runtime import Session

CHANNELS, SIZE, CLASSES = 2, 4, 3
node = helper.make_node


def benign(seed=0, windows=1):
    torch.manual_seed(seed)
    shape = Windows((CHANNELS, SIZE, SIZE), windows)
    return BenignFeatures(shape, torch.zeros(shape.feature_count), torch.ones(shape.feature_count), CLASSES, 2).requires_grad_(
        False
    )


def model_of(nodes, *, opset=17, batch="batch", stored=(), outputs=("tap", LOGITS), order=range(CLASSES)):
    """``nodes`` lead from pixels to ``tap`` and from there to ``flat``, which a linear layer turns into the logits."""
    weight = np.random.default_rng(0).normal(size=(CHANNELS * SIZE * SIZE, CLASSES)).astype(np.float32)[:, list(order)]
    nodes = [*nodes, node("MatMul", ["flat", "weight"], [LOGITS], name="head")]
    shapes = {"tap": [batch, CHANNELS, SIZE, SIZE], LOGITS: [batch, CLASSES]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [batch, CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(weight, "weight"), *stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


PLAIN = [node("Relu", [PIXELS], ["tap"]), node("Tanh", ["tap"], ["active"]), node("Flatten", ["active"], ["flat"])]


def pixels(count=6):
    return np.random.default_rng(1).normal(size=(count, CHANNELS, SIZE, SIZE)).astype(np.float32)


def terms(model, features=None, batch_size=None):
    added = append_reconstruction(model, "tap", features or benign())
    onnx.checker.check_model(added, full_check=True)
    return Session(added.SerializeToString(), batch_size=batch_size).run(pixels())


def expected(features=None, values=None):
    """The terms of PLAIN by torch."""
    features = features or benign()
    weight = torch.from_numpy(numpy_helper.to_array(model_of(PLAIN).graph.initializer[0]).copy())
    tap = torch.relu(torch.from_numpy(pixels())) if values is None else values

    def rest(value):
        return torch.tanh(value).flatten(1) @ weight

    classes = rest(tap).argmax(dim=1)
    moved = rest(features.reconstruct(tap, classes))
    apart = 0.5 * (rest(tap).softmax(dim=1) - moved.softmax(dim=1)).abs().sum(dim=1)
    return {LOG_DISTANCE: features.distance(tap, classes).log().numpy(), DISAGREEMENT: apart.numpy()}


def assert_as_expected(found, features=None):
    for name, values in expected(features).items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)  # float32 sums of 32 products


@pytest.mark.parametrize("opset", [7, 9, 13, 18, 21])
@pytest.mark.parametrize("windows", [1, 2])
def test_terms_agree_with_torch_in_every_version_of_the_operators(opset, windows):
    features = benign(windows=windows)
    assert expected(features)[DISAGREEMENT].max() > 0.1
    assert_as_expected(terms(model_of(PLAIN, opset=opset), features), features)


def test_the_model_itself_is_left_alone_and_only_numbers_an_image_leave():
    model = model_of(PLAIN)
    before = model.SerializeToString()
    added = append_reconstruction(model, "tap", benign())
    assert model.SerializeToString() == before
    assert [output.name for output in added.graph.output] == [LOGITS, LOG_DISTANCE, DISAGREEMENT]
    found = Session(added.SerializeToString()).run(pixels())
    np.testing.assert_array_equal(found[LOGITS], Session(before).run(pixels())[LOGITS])
    assert {value.ndim for name, value in found.items() if name != LOGITS} == {1}


def test_the_end_is_copied_and_its_weights_are_shared():
    added = append_reconstruction(model_of(PLAIN), "tap", benign())
    readers = [entry for entry in added.graph.node if "weight" in entry.input]
    assert len(readers) == 2
    assert [tensor.name for tensor in added.graph.initializer].count("weight") == 1
    copied = [entry.op_type for entry in added.graph.node if any(name.startswith("audit_end_") for name in entry.output)]
    assert copied == ["Tanh", "Flatten", "MatMul"]


def test_a_tap_that_nothing_reads_is_followed_back_through_identities():
    nodes = [
        node("Relu", [PIXELS], ["own"]),
        node("Identity", ["own"], ["same"]),
        node("Tanh", ["same"], ["active"]),
        node("Flatten", ["active"], ["flat"]),
    ]
    exposed = [*nodes, node("Identity", ["same"], ["tap"])]
    assert_as_expected(terms(model_of(exposed)))


def test_sizes_read_off_the_image_are_no_path_around_the_tap():
    stored = [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in (("first", [0]), ("rest", [-1]))]
    nodes = [
        *PLAIN[:2],
        node("Shape", [PIXELS], ["sizes"]),
        node("Gather", ["sizes", "first"], ["count"]),
        node("Concat", ["count", "rest"], ["shape"], axis=0),
        node("Reshape", ["active", "shape"], ["flat"]),
    ]
    assert_as_expected(terms(model_of(nodes, stored=stored)))


def test_what_a_subgraph_reads_is_replaced_too():
    def branch(name):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("Tanh", ["tap"], [name])], name, [], [value])

    stored = [numpy_helper.from_array(np.array(True), "always")]
    choice = node("If", ["always"], ["active"], then_branch=branch("yes"), else_branch=branch("no"))
    nodes = [PLAIN[0], choice, PLAIN[2]]
    assert_as_expected(terms(model_of(nodes, stored=stored)))


def test_a_fixed_batch_size_gives_the_same_terms():
    stored = [numpy_helper.from_array(np.array([4, CHANNELS * SIZE * SIZE], dtype=np.int64), "shape")]
    nodes = [*PLAIN[:2], node("Reshape", ["active", "shape"], ["flat"])]
    assert_as_expected(terms(model_of(nodes, batch=4, stored=stored), batch_size=4))


def test_relabelling_the_classes_changes_nothing():
    order = [2, 0, 1]
    renamed = benign()
    for layer in (renamed.encoder, renamed.decoder):
        layer.weight[:, -CLASSES:] = layer.weight[:, -CLASSES:][:, order].clone()
    assert_as_expected(terms(model_of(PLAIN, order=order), renamed))


def test_permuting_the_channels_of_features_and_auto_encoder_changes_no_distance():
    features, swapped = benign(), benign()
    order = np.arange(CHANNELS * SIZE * SIZE).reshape(CHANNELS, -1)[::-1].ravel().copy()
    swapped.encoder.weight[:, : len(order)] = features.encoder.weight[:, order]
    swapped.output.weight[:], swapped.output.bias[:] = features.output.weight[order], features.output.bias[order]
    tap = torch.relu(torch.from_numpy(pixels()))
    classes = torch.arange(len(tap)) % CLASSES
    np.testing.assert_allclose(swapped.distance(tap.flip(1), classes), features.distance(tap, classes), atol=1e-6)


def test_perfect_reconstruction_is_far_below_any_other_and_finite():
    features = benign()
    features.output.weight.zero_(), features.output.bias.zero_()
    model = append_reconstruction(model_of(PLAIN), "tap", features)
    dark = Session(model.SerializeToString()).run(-np.ones((2, CHANNELS, SIZE, SIZE), dtype=np.float32))  # the tap is all zero
    np.testing.assert_allclose(dark[LOG_DISTANCE], np.log(1e-12), rtol=1e-3)
    np.testing.assert_array_equal(dark[DISAGREEMENT], 0.0)


@pytest.mark.parametrize("between", ["Cast", "DequantizeLinear"])
def test_a_tap_on_another_scale_than_the_rest_reads_is_refused(between):
    stored = []
    if between == "Cast":
        nodes = [
            node("Cast", [PIXELS], ["half"], to=TensorProto.FLOAT16),
            node("Tanh", ["half"], ["active"]),
            node("Cast", ["active"], ["back"], to=TensorProto.FLOAT),
            node("Cast", ["half"], ["tap"], to=TensorProto.FLOAT),
        ]
    else:
        stored = [numpy_helper.from_array(np.array(0.1, dtype=np.float32), "scale")]
        stored.append(numpy_helper.from_array(np.array(0, dtype=np.int8), "zero"))
        nodes = [
            node("QuantizeLinear", [PIXELS, "scale", "zero"], ["bytes"]),
            node("DequantizeLinear", ["bytes", "scale", "zero"], ["back"]),
            node("DequantizeLinear", ["bytes", "scale", "zero"], ["tap"]),
        ]
    model = model_of([*nodes, node("Flatten", ["back"], ["flat"])], stored=stored)
    with pytest.raises(InapplicableError, match=f"'tap' as float32 numbers .a {between} node stands between"):
        append_reconstruction(model, "tap", benign())


def test_a_path_around_the_tap_is_refused():
    nodes = [*PLAIN[:2], node("Add", ["active", PIXELS], ["sum"]), node("Flatten", ["sum"], ["flat"])]
    with pytest.raises(InapplicableError, match="a path around the tap 'tap'"):
        append_reconstruction(model_of(nodes), "tap", benign())


def test_the_second_term_is_bounded_on_both_sides():
    model = append_bounded_sum(append_reconstruction(model_of(PLAIN), "tap", benign()), Term(1.0, 2.0), Term(0.2, 0.1), score="s")
    found = Session(model.SerializeToString()).run(pixels(200))
    second = (found[DISAGREEMENT] - 0.2) / 0.1
    assert second.min() < 0 < 1 < second.max()
    np.testing.assert_allclose(found["s"], (found[LOG_DISTANCE] - 1.0) / 2.0 + np.clip(second, 0.0, 1.0), atol=1e-5)
