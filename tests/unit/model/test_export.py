"""A network becomes one ONNX model with taps that torch and ONNX Runtime agree on, normalisation included."""

from __future__ import annotations

import dataclasses
import importlib
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from audit_plugin.errors import ExportError
from audit_plugin.intake import inspect
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS, PIXELS
from audit_plugin.model.load import Network, _probe, load_network
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import PARITY_TOLERANCE, Subject, check_parity, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import InputSpec
from tests.conftest import network_of as network_of_shape


def network_of(module: nn.Module, size: int, channels: int = 3) -> Network:
    example = torch.zeros(4, channels, size, size)
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return _probe(plain_graph(program), (-1, channels, size, size), -1)


def subject_of(module: nn.Module, size: int, **spec: object) -> Subject:
    network = network_of(module, size)
    names = tuple(str(index) for index in range(network.class_count))
    return prepare_subject(network, InputSpec(size, size, 3, **spec), flavour="pt2", class_names=names)  # type: ignore[arg-type]


def pictures(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


class InPlace(nn.Module):
    """Overwrites every intermediate value: the sum, the activation, the scaled one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.relu(self.first(images))
        later = self.second(values)
        later += values
        later = self.relu(later)
        pooled = later.mean(dim=(2, 3))
        later.mul_(100)
        return self.head(pooled)


def small_vgg11() -> nn.Module:
    """VGG-11 with narrow linear layers: the published ones hold half a gigabyte."""
    module = torchvision.models.vgg11(num_classes=10)
    layers = [nn.Linear(512 * 7 * 7, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout()]
    module.classifier = nn.Sequential(*layers, nn.Linear(32, 10))
    return module


ARCHITECTURES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "vgg11": small_vgg11,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
    "vit": lambda: VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=10),
}
EXPECTED_TAPS = {"resnet18": 9, "vgg11": 10, "mobilenet_v2": 19, "vit": 4}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "mobilenet_v2" else name for name in ARCHITECTURES],
)
def known(request: pytest.FixtureRequest) -> tuple[str, Subject]:
    torch.manual_seed(0)
    module = ARCHITECTURES[request.param]()
    return request.param, subject_of(module, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def test_known_architectures_have_one_tap_a_block(known: tuple[str, Subject]) -> None:
    name, subject = known
    assert len(subject.summary.taps) == EXPECTED_TAPS[name], subject.summary.taps


def test_torch_and_onnx_runtime_agree_on_every_tap(known: tuple[str, Subject]) -> None:
    _, subject = known
    entries = check_parity(subject, pictures(3, 32))
    assert [entry.tap for entry in entries] == [*subject.summary.taps, LOGITS]
    assert max(entry.relative_difference for entry in entries) < PARITY_TOLERANCE


def test_onnx_model_takes_pixels_and_ends_with_the_logits(known: tuple[str, Subject]) -> None:
    graph = known[1].onnx_model.graph
    assert [value.name for value in graph.input] == [PIXELS]
    assert [value.name for value in graph.output] == [*known[1].summary.taps, LOGITS]


def test_taps_take_gradients_with_frozen_weights(known: tuple[str, Subject]) -> None:
    module = known[1].torch_module()
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    module(pixels)[-1].sum().backward()
    assert pixels.grad is not None
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.fixture(scope="module")
def in_place() -> Subject:
    return subject_of(InPlace(), 8)


def test_in_place_operations_do_not_overwrite_taps(in_place: Subject) -> None:
    module, images, subject = InPlace(), pictures(3, 8), in_place
    check_parity(subject, images)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    with torch.no_grad():
        first = module.first(pixels).relu()
        last = (module.second(first) + first).relu()
        in_torch = subject.torch_module()(pixels)
    in_runtime = list(subject.session.run(pixels.numpy()).values())
    assert len(in_torch) == len(in_runtime) == 3
    for place, expected in enumerate([first, last, module.head(last.mean(dim=(2, 3)))]):
        np.testing.assert_allclose(in_torch[place].detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(in_runtime[place], expected.detach(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- normalisation


class TokensFirst(nn.Module):
    """Patches, two layers on (tokens, N, channels), and the mean over tokens: the usual layout of nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = torch.relu(self.patches(pixels)).flatten(2).permute(2, 0, 1)
        tokens = torch.relu(self.second(torch.relu(self.first(tokens))))
        logits: torch.Tensor = self.head(tokens.mean(0))
        return logits


@pytest.mark.parametrize("batch", [None, 5, 16])  # there are 16 tokens
@pytest.mark.parametrize("as_onnx", [False, True])
def test_layers_that_put_tokens_first_are_left_out(batch: int | None, as_onnx: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, images = TokensFirst().eval(), pictures(7, 16)
    network = network_of_shape(module, (3, 16, 16), batch)
    if as_onnx:
        dynamic = None if batch else ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(module, (torch.rand(batch or 4, 3, 16, 16),), dynamic_shapes=dynamic, dynamo=True)
        assert program is not None
        program.save(tmp_path / "model.onnx")
        network = load_network(tmp_path / "model.onnx", inspect(tmp_path))
    subject = prepare_subject(network, InputSpec(16, 16, 3), flavour="onnx", class_names=tuple("abcde"))
    assert len(subject.summary.taps) == 1, subject.summary.taps  # the patches
    check_parity(subject, images)
    with torch.no_grad():
        expected = module(torch.from_numpy(to_pixels(images))).numpy()
    np.testing.assert_allclose(subject.logits(images), expected, atol=1e-5)


class Passing(nn.Module):
    """Its class scores are the mean of each channel, so they show what reached the model."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, torch.eye(3)[:, :, None, None]).mean(dim=(2, 3))


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)},
        {"low": -1.0, "high": 1.0},
        {"low": 0.0, "high": 255.0, "mean": (123.0, 116.0, 103.0), "std": (58.0, 57.0, 57.0)},
    ],
)
def test_normalisation_is_that_of_the_specification(spec: dict[str, object]) -> None:
    images = pictures(5, 8)
    subject = subject_of(Passing(), 8, **spec)
    given = InputSpec(8, 8, 3, **spec)  # type: ignore[arg-type]
    pixels = images.astype(np.float64) / 255
    expected = (given.low + pixels * (given.high - given.low) - np.array(given.mean)) / np.array(given.std)
    np.testing.assert_allclose(subject.logits(images), expected.mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- torch's list of operators


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one each time that torch lists its operators; the list that is kept begins anew."""
    from torch.onnx._internal.exporter import _registration

    plain, made = _registration.onnxscript_apis.get_torchlib_ops, []
    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", lambda: made.append(None) or plain())
    return made


def test_operators_are_listed_for_the_first_export_alone(listings: list[object]) -> None:
    first, second = (subject_of(InPlace(), 8).onnx_model.graph for _ in range(2))
    assert len(listings) == 1
    assert [node.op_type for node in first.node] == [node.op_type for node in second.node]
    assert first.initializer == second.initializer
    torch.onnx.export(torch.nn.ReLU(), (torch.zeros(2, 3),), dynamo=True, verbose=False)
    assert len(listings) == 2  # nobody else's exports change


@pytest.mark.parametrize("missing", ["onnxscript_apis.get_torchlib_ops", "onnxscript_apis"])
def test_a_torch_that_keeps_its_operators_elsewhere_exports_too(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "torch.onnx._internal.exporter._registration"
    elsewhere = types.SimpleNamespace(onnxscript_apis=object()) if "." in missing else object()
    plain = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: elsewhere if name == place else plain(name, *rest))
    images = pictures(3, 8)
    check_parity(subject_of(InPlace(), 8), images)


# ----------------------------------------------------------------------------------------------------------- parity


def broken(subject: Subject, change: float) -> Subject:
    """The same subject, with one initialiser of the second convolution changed in its ONNX form alone."""
    model = onnx.ModelProto()
    model.CopyFrom(subject.onnx_model)
    kernels = [weight for weight in model.graph.initializer if len(weight.dims) == 4]
    values = numpy_helper.to_array(kernels[1]) * (1 + change)
    kernels[1].CopyFrom(numpy_helper.from_array(values.astype(np.float32), kernels[1].name))
    return dataclasses.replace(subject, onnx_model=model, session=Session(model.SerializeToString()))


def test_changed_weight_is_reported_at_the_first_tap_behind_it(in_place: Subject) -> None:
    with pytest.raises(ExportError, match="part at") as caught:
        check_parity(broken(in_place, 0.1), pictures(3, 8))
    assert f"'{in_place.summary.taps[1]}'" in str(caught.value)


def test_change_below_the_tolerance_is_accepted(in_place: Subject) -> None:
    entries = check_parity(broken(in_place, 1e-5), pictures(3, 8))
    assert entries[0].relative_difference < 1e-6
    assert 0 < entries[1].relative_difference < 1e-4


def test_nan_is_no_agreement(in_place: Subject) -> None:
    with pytest.raises(ExportError, match="part at"):
        check_parity(broken(in_place, float("nan")), pictures(3, 8))
