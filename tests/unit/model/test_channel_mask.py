"""A masked network answers like the original with its channels set to zero by hand, in every form it can have."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from audit_plugin.errors import InapplicableError
from audit_plugin.model.channel_mask import MASKED_LOGITS, append_masked_logits, with_channel_mask
from audit_plugin.model.export import LOGITS
from audit_plugin.model.load import Network, _probe
from audit_plugin.model.subject import Subject, check_parity, prepare_subject
from audit_plugin.model.torch_graph import choose_graph_taps, plain_graph
from audit_plugin.types import InputSpec

CHANNELS, CLASSES, SIZE = 5, 3, 8
# Both sides sum in float32 in orders of their own: about 1e-6 of the largest magnitude.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class Residual(nn.Module):
    """Two blocks, the second one a residual, so that the value of the first is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images)
        values = torch.relu(values + self.second(values))
        return self.head(values.mean(dim=(2, 3)).view(images.shape[0], -1))

    def by_hand(self, images: torch.Tensor, kept: torch.Tensor, tap: int) -> torch.Tensor:
        values = self.first(images)
        if tap == 0:
            values = values * kept[:, None, None]
        values = torch.relu(values + self.second(values))
        if tap == 1:
            values = values * kept[:, None, None]
        return self.head(values.mean(dim=(2, 3)))


def torch_network(module: nn.Module, size: int = SIZE, batch: int | None = None, channels: int = 3) -> Network:
    example = torch.zeros(batch or 4, channels, size, size)
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    graph = plain_graph(torch.export.export(module.eval(), (example,), dynamic_shapes=dynamic))
    network = _probe(graph, (batch or -1, channels, size, size), batch or -1)
    return dataclasses.replace(network, batch_size=batch)  # also where the graph would take any


def onnx_network(module: nn.Module, size: int = SIZE) -> Network:
    example = (torch.zeros(4, 3, size, size),)
    exported = torch.onnx.export(
        module.eval(), example, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    assert exported is not None
    return _probe(exported.model_proto, (-1, 3, size, size), -1)


def subject_of(network: Network) -> Subject:
    size = network.input_shape[2]
    names = tuple(str(index) for index in range(network.class_count))
    flavour = "onnx" if isinstance(network.program, onnx.ModelProto) else "pt2"
    return prepare_subject(network, InputSpec(size, size, 3), flavour=flavour, class_names=names)


def pictures(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def pixels_of(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


NETWORKS = {
    "torch": lambda: torch_network(Residual()),
    "torch, fixed batch": lambda: torch_network(Residual(), batch=4),
    "onnx": lambda: onnx_network(Residual()),
}
FORMS = ["torch", pytest.param("torch, fixed batch", marks=pytest.mark.slow), "onnx"]
MASK = np.array([True, False, True, True, False])


@pytest.mark.parametrize("tap", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_acts_as_if_set_by_hand(form: str, tap: int) -> None:
    network = NETWORKS[form]()
    original = subject_of(network)
    name = original.summary.taps[tap]
    masked = original.with_network(with_channel_mask(network, name, MASK[:, None, None]))
    images = pictures(10)  # no multiple of the fixed batch size
    with torch.no_grad():
        expected = Residual().eval().by_hand(pixels_of(images), torch.from_numpy(MASK).float(), tap).numpy()
    np.testing.assert_allclose(masked.logits(images), expected, **TOLERANCE)
    assert masked.summary.flavour == original.summary.flavour
    assert masked.summary.batch_size == original.summary.batch_size
    assert masked.summary.taps == original.summary.taps
    check_parity(masked, images)
    value = masked.session.run(pixels_of(images).numpy(), [name])[name]
    before = original.session.run(pixels_of(images).numpy(), [name])[name]
    np.testing.assert_allclose(value, before * MASK[:, None, None], **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_the_original_is_left_as_it_was(form: str) -> None:
    network = NETWORKS[form]()
    subject = subject_of(network)
    before = subject.logits(pictures(4)), str(network.program if form == "onnx" else network.program.graph)
    with_channel_mask(network, subject.summary.taps[-1], MASK[:, None, None])
    assert str(network.program if form == "onnx" else network.program.graph) == before[1]
    np.testing.assert_array_equal(subject_of(network).logits(pictures(4)), before[0])


@pytest.mark.parametrize("form", FORMS)
def test_masks_can_be_laid_on_top_of_each_other(form: str) -> None:
    network = NETWORKS[form]()
    subject = subject_of(network)
    name, other = subject.summary.taps[-1], np.array([False, True, True, True, True])[:, None, None]
    twice = with_channel_mask(with_channel_mask(network, name, MASK[:, None, None]), name, other)
    once = with_channel_mask(network, name, MASK[:, None, None] & other)
    np.testing.assert_allclose(subject_of(twice).logits(pictures(4)), subject_of(once).logits(pictures(4)), **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_fine_tuning_leaves_the_mask_alone(form: str) -> None:
    network = NETWORKS[form]()
    subject = subject_of(network)
    name = subject.summary.taps[-1]
    masked = subject.with_network(with_channel_mask(network, name, MASK[:, None, None]))
    module = masked.trainable_copy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    retrained = masked.retrained(module)
    value = retrained.session.run(pixels_of(pictures(4)).numpy(), [name])[name]
    assert np.abs(value[:, MASK]).max() > 0
    assert np.abs(value[:, ~MASK]).max() == 0
    assert np.abs(retrained.logits(pictures(4)) - masked.logits(pictures(4))).max() > 0.01


@pytest.mark.parametrize("batch", [None, 4])
def test_a_masked_program_survives_a_file(batch: int | None) -> None:
    network = torch_network(Residual(), batch=batch)
    subject = subject_of(network)
    masked = with_channel_mask(network, subject.summary.taps[-1], MASK[:, None, None])
    example, dynamic = torch.zeros(batch or 4, 3, SIZE, SIZE), None if batch else ({0: torch.export.Dim("batch")},)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(masked.program, (example,), dynamic_shapes=dynamic), stream)
    stream.seek(0)
    loaded = plain_graph(torch.export.load(stream))
    again = subject_of(dataclasses.replace(masked, program=loaded))
    np.testing.assert_allclose(again.logits(pictures(6)), subject_of(masked).logits(pictures(6)), **TOLERANCE)
    assert again.summary.taps == subject.summary.taps
    last = again.session.run(pixels_of(pictures(4)).numpy(), [again.summary.taps[-1]])[again.summary.taps[-1]]
    assert np.abs(last[:, ~MASK]).max() == 0


KNOWN = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
    "vit": lambda: VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=10),
}


@pytest.mark.parametrize(
    "architecture",
    ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow), pytest.param("vit", marks=pytest.mark.slow)],
)
def test_known_architectures_keep_every_tap_whichever_is_masked(architecture: str) -> None:
    torch.manual_seed(0)
    network = torch_network(KNOWN[architecture](), size=32)
    taps = choose_graph_taps(network.program)
    nodes = {node.name: node for node in network.program.graph.nodes}
    for tap in taps:
        shape = nodes[tap.node].meta["val"].shape[1:]
        mask = np.ones((shape[0], 1, 1) if len(shape) == 3 else shape[-1], dtype=np.bool_)
        masked = with_channel_mask(network, tap.name, mask)
        assert [found.name for found in choose_graph_taps(masked.program)] == [found.name for found in taps]


# ------------------------------------------------------------------------------------------- many masks in one pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tap", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_masked_logits_are_those_of_masked_networks(form: str, tap: int) -> None:
    network = NETWORKS[form]()
    subject = subject_of(network)
    name = subject.summary.taps[tap]
    masks = [MASK[:, None, None], ~MASK[:, None, None], np.ones((CHANNELS, 1, 1), dtype=np.bool_)]
    model = append_masked_logits(subject.onnx_model, name, masks)
    found = subject.open_session(model).collect(pictures(10), MASKED_LOGITS).reshape(10, 3, CLASSES)
    for index, mask in enumerate(masks):
        expected = subject_of(with_channel_mask(network, name, mask)).logits(pictures(10))
        np.testing.assert_allclose(found[:, index], expected, **TOLERANCE)
    np.testing.assert_allclose(found[:, 2], subject.logits(pictures(10)), **TOLERANCE)


# ------------------------------------------------------------------------------------------- ONNX models by hand


def hand_made(opset: int, element: int = TensorProto.FLOAT, ir: int = 8) -> Network:
    """Conv (no activation, no module path) -> mean over positions -> product with the head; the tap is the convolution."""
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(element)
    weights = [
        numpy_helper.from_array(rng.normal(size=(CHANNELS, 3, 3, 3)).astype(dtype), "kernel"),
        numpy_helper.from_array(rng.normal(size=(CHANNELS, CLASSES)).astype(dtype), "head"),
    ]
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["map"], name="convolution"),
        helper.make_node("GlobalAveragePool", ["map"], ["map_masked"]),  # a name that the mask would like to have
        helper.make_node("Flatten", ["map_masked"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    source = helper.make_tensor_value_info("images", element, ["batch", 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("scores", element, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "model", [source], [scores], weights)
    if ir < 4:
        graph.input.extend(helper.make_tensor_value_info(value.name, element, value.dims) for value in weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(model)
    return Network(onnx.shape_inference.infer_shapes(model), (-1, 3, SIZE, SIZE), CLASSES, None, False)


@pytest.mark.parametrize(
    ("opset", "element", "ir"),
    [(7, TensorProto.FLOAT, 3), (12, TensorProto.FLOAT, 8), (17, TensorProto.FLOAT16, 8), (20, TensorProto.FLOAT, 9)],
)
def test_every_version_and_precision_of_onnx(opset: int, element: int, ir: int) -> None:
    network = hand_made(opset, element, ir)
    subject = subject_of(network)
    (tap,) = subject.summary.taps
    assert tap == "tap_01_map"
    masked = with_channel_mask(network, tap, MASK[:, None, None])
    onnx.checker.check_model(masked.program, full_check=True)
    repaired = subject.with_network(masked)
    assert repaired.summary.taps == (tap,)
    pixels = pixels_of(pictures(4)).numpy()
    before, after = (item.session.run(pixels) for item in (subject, repaired))
    np.testing.assert_array_equal(after[tap], before[tap] * MASK[:, None, None])
    head = numpy_helper.to_array(network.program.graph.initializer[1]).astype(np.float64)
    half = 30 if element == TensorProto.FLOAT16 else 1  # float16 keeps three digits
    expected = after[tap].mean(axis=(2, 3), dtype=np.float64) @ head
    np.testing.assert_allclose(after[LOGITS], expected, rtol=1e-4 * half, atol=1e-4 * half)
    model = append_masked_logits(subject.onnx_model, tap, [MASK[:, None, None]])
    found = subject.open_session(model).run(pixels)[MASKED_LOGITS]
    np.testing.assert_allclose(found, after[LOGITS], rtol=1e-4 * half, atol=1e-4 * half)


def quantised() -> Network:
    """A convolution on bytes, its result pooled and multiplied with the head as real numbers."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(np.float32(1 / 255), "scale"),
        numpy_helper.from_array(np.uint8(0), "zero"),
        numpy_helper.from_array(np.float32(0.05), "map_scale"),
        numpy_helper.from_array(np.uint8(128), "map_zero"),
        numpy_helper.from_array(rng.integers(-99, 99, (CHANNELS, 3, 3, 3)).astype(np.int8), "kernel"),
        numpy_helper.from_array(np.float32(0.01), "kernel_scale"),
        numpy_helper.from_array(np.int8(0), "kernel_zero"),
        numpy_helper.from_array(rng.normal(size=(CHANNELS, CLASSES)).astype(np.float32), "head"),
    ]
    read = ["bytes", "scale", "zero", "kernel", "kernel_scale", "kernel_zero", "map_scale", "map_zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["bytes"]),
        helper.make_node("QLinearConv", read, ["map"]),
        helper.make_node("MaxPool", ["map"], ["pooled"], kernel_shape=[6, 6]),
        helper.make_node("DequantizeLinear", ["pooled", "map_scale", "map_zero"], ["real"]),
        helper.make_node("Flatten", ["real"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    source = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "model", [source], [scores], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return Network(onnx.shape_inference.infer_shapes(model), (-1, 3, SIZE, SIZE), CLASSES, None, False)


def test_quantised_values_are_refused() -> None:
    network = quantised()
    subject = subject_of(network)
    tap = subject.summary.taps[-1]
    with pytest.raises(InapplicableError, match="holds quantised values"):
        with_channel_mask(network, tap, MASK[:, None, None])
    with pytest.raises(InapplicableError, match="holds quantised values"):
        append_masked_logits(subject.onnx_model, tap, [MASK[:, None, None]])


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_an_unknown_tap_is_named(form: str) -> None:
    with pytest.raises(ValueError, match=r"one of tap_01.*; got 'tap_09_blocks'"):
        with_channel_mask(NETWORKS[form](), "tap_09_blocks", MASK[:, None, None])


@pytest.mark.parametrize("shape", [(CHANNELS,), (CHANNELS + 1, 1, 1), (1, CHANNELS, 1, 1)])
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_a_mask_of_another_shape_is_refused(form: str, shape: tuple[int, ...]) -> None:
    network = NETWORKS[form]()
    with pytest.raises(ValueError, match=r"broadcasts against 'tap_02.*' of shape \(5, 8, 8\)"):
        with_channel_mask(network, subject_of(network).summary.taps[1], np.ones(shape, dtype=np.bool_))
