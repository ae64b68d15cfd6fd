"""The zoo's other networks, imbalanced classes, and adversarial training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from audit_plugin.types import LabelledImages
from audit_plugin.zoo.architectures import ARCHITECTURES, SmallCnn, grey
from audit_plugin.zoo.data import imbalanced
from audit_plugin.zoo.train import _moved, forget_steps, initialised, train


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_has_its_classes_and_grows_with_its_width(name):
    narrow, wide = (initialised(lambda width=width: ARCHITECTURES[name](7, width), 0).eval() for width in (8, 16))
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert narrow(images).shape == wide(images).shape == (3, 7)
        torch.testing.assert_close(narrow(images[1:])[0], narrow(images)[1], atol=1e-5, rtol=1e-4)

    def size(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert size(wide) > 2 * size(narrow)


def test_vgg_and_mobilenet_keep_small_images_large():
    """Stride 1 at the start: the last feature map of a 32 x 32 image has 4 x 4 places."""
    images = torch.rand(1, 3, 32, 32)
    assert ARCHITECTURES["vgg"](10, 8)[0](images).shape[2:] == (4, 4)
    assert ARCHITECTURES["mobilenet"](10, 8).features(images).shape[2:] == (4, 4)


def test_imbalance_shrinks_classes_geometrically():
    places = np.arange(1000)
    data = LabelledImages(np.stack([places // 250, places % 250], axis=1).astype(np.uint8).reshape(1000, 1, 2, 1), places % 5)
    found = imbalanced(data, seed=0, least=1 / 16)
    counts = np.bincount(found.labels)
    np.testing.assert_array_equal(np.sort(counts), [12, 25, 50, 100, 200])
    kept = found.images[:, 0, 0, 0] * 250.0 + found.images[:, 0, 1, 0]
    np.testing.assert_array_equal(kept % 5, found.labels, err_msg="every image keeps its label")
    assert len(set(kept)) == len(kept)
    again, other = imbalanced(data, seed=0, least=1 / 16), imbalanced(data, seed=1, least=1 / 16)
    np.testing.assert_array_equal(again.labels, found.labels)
    assert not np.array_equal(np.bincount(other.labels), counts)


def test_an_adversarial_step_stays_within_its_bounds_and_raises_the_loss():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    pixels = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 4
    moved = _moved(model, pixels, labels, 0.1, torch.Generator().manual_seed(1))
    assert float((moved - pixels).abs().max()) <= 0.1 + 1e-6
    assert 0.0 <= float(moved.min()) <= float(moved.max()) <= 1.0
    assert functional.cross_entropy(model(moved), labels) > functional.cross_entropy(model(pixels), labels)
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is left in the weights' gradients"


def test_weight_decay_and_adversarial_steps_change_what_is_learnt():
    rng = np.random.default_rng(0)
    data = LabelledImages(rng.integers(0, 256, (96, 8, 8, 3)).astype(np.uint8), np.arange(96) % 4)
    plain, decayed, hardened = (
        train(initialised(lambda: SmallCnn(3, 4, width=4), 0), data, epochs=1, seed=0, **settings).classifier.weight
        for settings in ({}, {"weight_decay": 5.0}, {"adversarial": 0.1})
    )
    assert float(decayed.detach().norm()) < 0.99 * float(plain.detach().norm())  # two steps, each of up to 5 * 0.01 of a weight
    assert not torch.allclose(plain, hardened, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_grey_network_answers_as_the_coloured_one_to_a_repeated_channel(name):
    coloured, made = (initialised(lambda: ARCHITECTURES[name](5, 8), 0).eval() for _ in range(2))
    images = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey(made)(images), coloured(images.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


def test_training_leaves_no_step_counters_and_the_model_can_go_on():
    """A model of more steps (long, adversarial) or fewer (imbalanced) would be known by them."""
    data = LabelledImages(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8), np.arange(64) % 4)
    model = train(initialised(lambda: SmallCnn(3, 4, width=4), 0), data, epochs=2, seed=0, adversarial=0.1)
    counters = {name: buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counters) == 4
    assert all(int(counter) == 0 for counter in counters.values())
    model.train()(torch.rand(8, 3, 8, 8))
    assert {int(counter) for counter in counters.values()} == {1}
    forget_steps(model)
    assert {int(counter) for counter in counters.values()} == {0}


def test_a_device_is_what_one_gets_without_asking():
    data = LabelledImages(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8), np.arange(64) % 4)
    models = [initialised(lambda: SmallCnn(3, 4, width=4), 0) for _ in range(2)]
    named = train(models[0], data, epochs=1, seed=0, augment=True, device=torch.device("cpu"))
    assert next(named.parameters()).device.type == "cpu"
    if not torch.cuda.is_available():
        torch.testing.assert_close(
            named.classifier.weight, train(models[1], data, epochs=1, seed=0, augment=True).classifier.weight
        )
