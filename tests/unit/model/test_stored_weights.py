"""However a file stores the weights of its layers, they are parameters in the shape in which the layers read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from audit_plugin.checks import NeuronNoise
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import FitSplit

SIZE, CLASSES = 6, 4


class Plain(nn.Module):
    """Normalised pixels, a convolution, batch normalisation, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("mean", torch.full((1, 2, 1, 1), 0.4))
        self.conv, self.norm, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Linear(5 * SIZE * SIZE, CLASSES)
        self.norm.running_mean += torch.rand(5)
        with torch.no_grad():  # untrained, it would see one class nearly everywhere
            self.head.bias -= Plain.forward(self.eval(), torch.rand(200, 2, SIZE, SIZE)).mean(dim=0)

    def forward(self, images):
        values = torch.relu(self.norm(self.conv(images - self.mean)))
        return self.head(values.flatten(1))


class Stored(Plain):
    """The same with the weights of its layers kept in another way."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.conv, self.norm, self.head):
            for name in ("weight", "bias"):
                weight = layer._parameters.pop(name).detach()
                self.keep(layer, name, weight)

    def keep(self, layer, name, weight):
        raise NotImplementedError

    def of(self, layer, name):
        raise NotImplementedError

    def forward(self, images):
        weight, bias = (self.of(self.conv, name) for name in ("weight", "bias"))
        values = functional.conv2d(images - self.mean, weight, bias, padding=1)
        weight, bias = (self.of(self.norm, name) for name in ("weight", "bias"))
        values = functional.batch_norm(values, self.norm.running_mean, self.norm.running_var, weight, bias)
        weight, bias = (self.of(self.head, name) for name in ("weight", "bias"))
        return functional.linear(torch.relu(values).flatten(1), weight, bias)


class AsBuffers(Stored):
    def keep(self, layer, name, weight):
        layer.register_buffer(name, weight)

    def of(self, layer, name):
        return getattr(layer, name)


class SqueezedOut(Stored):
    def keep(self, layer, name, weight):
        layer.register_parameter(name, nn.Parameter(weight[None]))

    def of(self, layer, name):
        return getattr(layer, name).squeeze(0)


class PutTogether(Stored):
    """From a sum of two, in one row."""

    def keep(self, layer, name, weight):
        layer.shape = {**getattr(layer, "shape", {}), name: weight.shape}
        layer.register_parameter(f"{name}_half", nn.Parameter(weight.reshape(1, -1) / 2))
        layer.register_buffer(f"{name}_other", weight.reshape(1, -1) / 2)

    def of(self, layer, name):
        return (getattr(layer, f"{name}_half") + getattr(layer, f"{name}_other")).reshape(layer.shape[name])


class Turned(Plain):
    """Its last weight is stored as (inputs, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(self.head.weight.detach().T.contiguous())
        del self.head.weight

    def forward(self, images):
        values = torch.relu(self.norm(self.conv(images - self.mean)))
        return functional.linear(values.flatten(1), self.turned.T, self.head.bias)


def graph_of(module):
    example = torch.zeros(3, 2, SIZE, SIZE)
    return plain_graph(torch.export.export(module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)))


@pytest.fixture(scope="module")
def images():
    return torch.rand(7, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [AsBuffers, SqueezedOut, PutTogether])
def test_weights_stored_otherwise_become_the_parameters_that_the_layers_read(kind, images):
    plain, graph = graph_of(Plain()), graph_of(kind())
    torch.testing.assert_close(graph(images), plain(images), rtol=0, atol=1e-5)
    expected = sorted((tuple(weight.shape), float(weight.detach().sum())) for weight in plain.parameters())
    found = sorted((tuple(weight.shape), float(weight.detach().sum())) for weight in graph.parameters())
    assert [shape for shape, _ in found] == [shape for shape, _ in expected]
    np.testing.assert_allclose([total for _, total in found], [total for _, total in expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AsBuffers, SqueezedOut, PutTogether])
def test_what_no_gradient_trained_stays_as_it_was(kind):
    assert {"mean", "norm.running_mean", "norm.running_var"} <= set(dict(graph_of(kind()).named_buffers()))


def test_parameters_that_are_read_directly_or_turned_round_are_left_alone(images):
    names = set(dict(Plain().named_parameters()))
    assert set(dict(graph_of(Plain()).named_parameters())) == names
    turned = graph_of(Turned())
    assert set(dict(turned.named_parameters())) == (names - {"head.weight"}) | {"turned"}
    torch.testing.assert_close(turned(images), graph_of(Plain())(images))


def test_a_weight_that_two_layers_share_is_one_parameter():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = nn.Parameter(torch.rand(1, 2, 2))

        def forward(self, images):
            weight = self.kept.squeeze(0)
            return functional.linear(torch.relu(functional.linear(images.mean((2, 3)), weight)), weight)

    (weight,) = graph_of(Twice()).parameters()
    assert weight.shape == (2, 2)


@pytest.mark.parametrize("kind", [AsBuffers, SqueezedOut, PutTogether])
def test_noise_in_the_weights_is_the_same_however_they_are_stored(kind, make_subject):
    """Both are one computation on the same numbers; halves that are added again cost a rounding."""
    rng = np.random.default_rng(0)
    subjects = [make_subject(module, 2, SIZE) for module in (Plain(), kind())]
    pictures = rng.integers(0, 256, (80, SIZE, SIZE, 2)).astype(np.uint8)
    split = FitSplit(pictures, subjects[0].predict(pictures))
    measure = NeuronNoise(images=60, kept_accuracy=())
    plain, stored = (measure.measure(subject, split, range(CLASSES), np.random.default_rng(0)) for subject in subjects)
    assert (plain > 0).sum() >= 3
    np.testing.assert_allclose(stored, plain, rtol=1e-2)


def test_a_copy_of_a_model_that_keeps_its_weights_as_buffers_may_be_trained(make_subject):
    trained = [weight for weight in make_subject(AsBuffers(), 2, SIZE).trainable_copy().parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == sum(weight.numel() for weight in Plain().parameters())
