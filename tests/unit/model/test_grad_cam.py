"""Grad-CAM against class activation maps, which it equals where global average pooling meets a linear head."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from audit_plugin.errors import InapplicableError
from audit_plugin.model.export import InBatches
from audit_plugin.model.grad_cam import grad_cam
from audit_plugin.model.load import Network
from audit_plugin.model.subject import prepare_subject
from audit_plugin.types import InputSpec

SIZE, CLASSES = 16, 3
SPEC = InputSpec(SIZE, SIZE, 3)
NAMES = tuple("abc")


class Averaged(nn.Module):
    """Convolutions, global average pooling, a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(5, 7, 3, padding=1, stride=2), nn.Tanh()
        )
        self.head = nn.Linear(7, CLASSES)

    def forward(self, pixels):
        return self.head(self.body(pixels).mean(dim=(2, 3)))


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def enlarged(maps, size):
    """Bilinear, pixel centres aligned, the border repeated; (N, height, width) -> (N, size, size)."""

    def weights(length):
        matrix = np.zeros((size, length))
        for row in range(size):
            place = min(max((row + 0.5) * length / size - 0.5, 0.0), length - 1.0)
            low = int(place)
            high = min(low + 1, length - 1)
            matrix[row, low] += 1.0 - (place - low)
            matrix[row, high] += place - low
        return matrix

    return np.einsum("ah,nhw,bw->nab", weights(maps.shape[1]), maps, weights(maps.shape[2]))


def class_activation_maps(subject, images, classes, head):
    """ReLU(sum_k w_ck A_k), enlarged, over its maximum; Zhou et al. 2016, equation 2. A is the last tap."""
    value = subject.session.run(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)[subject.summary.taps[-1]]
    weight = head.weight.detach().numpy()[classes]
    maps = enlarged(np.maximum(np.einsum("nk,nkhw->nhw", weight, value), 0.0), SIZE)
    largest = maps.max(axis=(1, 2), keepdims=True)
    return np.where(largest > 0, maps / np.where(largest > 0, largest, 1.0), 0.0)


@pytest.fixture(scope="module")
def model():
    return Averaged()


@pytest.fixture(scope="module")
def subject(model, make_subject):
    return make_subject(model, 3, SIZE)


@pytest.mark.parametrize("label", range(CLASSES))
def test_equals_the_class_activation_map(subject, model, label):
    images, classes = pictures(40), np.full(40, label)
    found = grad_cam(subject, images, classes)
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1
    np.testing.assert_allclose(found, class_activation_maps(subject, images, classes, model.head), atol=1e-5)


def test_each_image_gets_the_map_of_its_own_class(subject):
    images, classes = pictures(12), np.arange(12) % CLASSES
    found = grad_cam(subject, images, classes)
    for label in range(CLASSES):
        alone = grad_cam(subject, images[classes == label], classes[classes == label])
        np.testing.assert_allclose(found[classes == label], alone, atol=1e-5)
    assert np.abs(found - grad_cam(subject, images, (classes + 1) % CLASSES)).max() > 0.1


def test_batches_do_not_matter(subject):
    images, classes = pictures(70), np.arange(70) % CLASSES
    found = grad_cam(subject, images, classes)
    np.testing.assert_allclose(np.concatenate([grad_cam(subject, images[i : i + 1], classes[i : i + 1]) for i in (0, 33, 69)]),
                               found[[0, 33, 69]], atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(grad_cam(subject, images[::-1], classes[::-1].copy()), found[::-1], atol=1e-5)


def test_no_images_no_maps(subject):
    assert grad_cam(subject, pictures(0), np.zeros(0, dtype=np.int64)).shape == (0, SIZE, SIZE)


def test_works_where_gradients_are_switched_off(subject):
    images, classes = pictures(3), np.zeros(3, dtype=np.int64)
    with torch.no_grad():
        switched_off = grad_cam(subject, images, classes)
    np.testing.assert_array_equal(switched_off, grad_cam(subject, images, classes))


def test_a_fixed_batch_size_gives_the_same_maps(subject):
    fixed = prepare_subject(dataclasses.replace(subject.network, batch_size=4), SPEC, flavour="pt2", class_names=NAMES)
    assert isinstance(fixed.torch_module(), InBatches)
    images, classes = pictures(6), np.arange(6) % CLASSES
    np.testing.assert_allclose(grad_cam(fixed, images, classes), grad_cam(subject, images, classes), atol=1e-5)


def test_an_onnx_model_gives_the_same_maps(subject, model):
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(), (torch.zeros(2, 3, SIZE, SIZE),), buffer, dynamo=False, opset_version=17, dynamic_axes={"x": {0: "batch"}},
        input_names=["x"],
    )  # fmt: skip
    network = Network(onnx.load_from_string(buffer.getvalue()), (-1, 3, SIZE, SIZE), CLASSES, None, False)
    converted = prepare_subject(network, SPEC, flavour="onnx", class_names=NAMES)
    images, classes = pictures(6), np.arange(6) % CLASSES
    np.testing.assert_allclose(grad_cam(converted, images, classes), grad_cam(subject, images, classes), atol=1e-5)


class Corner(nn.Module):
    """Class 0 from the brightness of the upper left quarter, class 1 from the lower right one, class 2 against all light."""

    def __init__(self, channels_last=False):
        super().__init__()
        self.channels_last = channels_last
        self.light = nn.Conv2d(3, 4, 1)
        nn.init.constant_(self.light.weight, 1.0)
        nn.init.zeros_(self.light.bias)
        places = torch.zeros(CLASSES, 4, SIZE, SIZE)
        places[0, :, : SIZE // 2, : SIZE // 2] = 1.0
        places[1, :, SIZE // 2 :, SIZE // 2 :] = 1.0
        places[2] = -1.0
        self.places = nn.Parameter(places)

    def forward(self, pixels):
        if self.channels_last:
            light = nn.functional.linear(pixels.permute(0, 2, 3, 1), self.light.weight[:, :, 0, 0])
            return torch.relu(light).permute(0, 3, 1, 2).flatten(1) @ self.places.flatten(1).T
        return torch.relu(self.light(pixels)).flatten(1) @ self.places.flatten(1).T


def two_lights():
    """Black, with a bright upper left and a bright lower right corner of 4 x 4 pixels; (2, SIZE, SIZE, 3)."""
    images = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    images[0, :4, :4] = images[1, -4:, -4:] = 255
    return images


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_network_that_looks_at_a_corner_is_seen_to(make_subject, channels_last):
    subject = make_subject(Corner(channels_last), 3, SIZE)
    images = two_lights()
    assert subject.predict(images).tolist() == [0, 1]
    found = grad_cam(subject, images, np.array([0, 1]))
    expected = np.stack([images[i, :, :, 0] / 255.0 for i in range(2)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_speaks_against_a_class_is_not_shown(make_subject):
    found = grad_cam(make_subject(Corner(), 3, SIZE), two_lights(), np.array([2, 2]))
    np.testing.assert_array_equal(found, 0.0)


# ------------------------------------------------------------------------------------------------ inapplicable


class Detached(Averaged):
    def forward(self, pixels):
        return self.head(self.body(pixels).mean(dim=(2, 3)).detach())


class Cut(nn.Module):
    """What an exported subject's module returns, its logits made without the tap."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        *taps, logits = self.inner(pixels)
        return (*(tap.clone() for tap in taps), logits)


def test_a_model_without_gradients_is_inapplicable(make_subject, subject):
    images, classes = pictures(2), np.zeros(2, dtype=np.int64)
    with pytest.raises(InapplicableError, match="the model gives none"):
        grad_cam(make_subject(Detached(), 3, SIZE), images, classes)
    with pytest.raises(InapplicableError, match="the model gives none"):
        grad_cam(dataclasses.replace(subject, _module=Cut(subject.torch_module())), images, classes)
    with pytest.raises(InapplicableError, match="cannot be converted: no such operator"):
        grad_cam(dataclasses.replace(subject, _module=None, _module_missing="no such operator"), images, classes)


def test_a_model_without_height_and_width_is_inapplicable(make_subject):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(InapplicableError, match="height and width"):
        grad_cam(make_subject(flat, 3, SIZE), pictures(2), np.zeros(2, dtype=np.int64))


@pytest.mark.parametrize("classes", [[0], [0, 1, 2], [0, CLASSES], [-1, 0]])
def test_classes_that_do_not_fit_are_named(subject, classes):
    with pytest.raises(ValueError, match="class"):
        grad_cam(subject, pictures(2), np.array(classes))
