"""The layer-wise check, whose cosines are reduced inside the ONNX graph, against plain NumPy on the same features."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import LayerwiseScorer
from audit_plugin.checks.layerwise import class_statistics
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS
from audit_plugin.types import FitSplit
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.train import initialised, train

_spec = importlib.util.spec_from_file_location("layerwise_reference", Path(__file__).parent / "layerwise_reference.py")
reference_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_module)


@pytest.fixture(scope="module", params=[4, 3])
def fitted(request, make_subject):
    """A briefly trained network of five layers with 4 or 3 classes, its fitted check, the images and the reference."""
    classes = request.param
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    images = rng.integers(0, 120, (60, 8, 8, 3))
    images[np.arange(60), :, labels * 2] += 120  # a bright column tells the class
    split = FitSplit(images.astype(np.uint8), labels.astype(np.int64))
    model = train(initialised(lambda: SmallCnn(3, classes, width=8), 0), split, epochs=12, seed=0, batch=20)
    subject = make_subject(model, 3, 8)
    check = LayerwiseScorer().fit(subject, split, rng)
    return subject, split, check, reference_module.LayerwiseReference(features_of(subject, split.images), labels, classes)


def features_of(subject, images):
    values = subject.session.run(to_pixels(images))
    return [values[layer].reshape(len(images), -1).astype(np.float64) for layer in (*subject.summary.taps, LOGITS)]


def test_layers_of_interest_agree(fitted):
    subject, _, check, reference = fitted
    layers = (*subject.summary.taps, LOGITS)
    assert check.facts["layer_of_interest_by_class"] == [layers[number - 1] for number in reference.interest.values()]


@pytest.mark.parametrize(("mean_cosines", "interest"), [([0.1, 0.2, 0.4, 0.5, 0.9], 2), ([0.1, 0.9], 1)])
def test_the_logits_are_of_interest_only_where_nothing_else_is(mean_cosines, interest):
    count = len(mean_cosines)
    cosines = np.tile(mean_cosines, (6, 1)) + 0.01 * np.random.default_rng(0).random((6, count))
    found = class_statistics(cosines, np.zeros(6, np.int64), 1, layer_count=count, first=1)
    assert found.layer_of_interest[0] == interest
    summed = [max(interest - 2, 0) <= column <= interest for column in range(count)]
    np.testing.assert_array_equal(found.weights[0], np.array(summed, np.float32))


def test_scores_agree_on_new_images(fitted):
    # float32 cosines carry an error of about 1e-6; sigma is 0.01 to 0.1, so scores agree to about 1e-3.
    subject, _, check, reference = fitted
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    features, predicted = features_of(subject, images), subject.predict(images)
    expected = [reference.score([layer[i] for layer in features], predicted[i]) for i in range(40)]
    np.testing.assert_allclose(check.score(images), expected, rtol=1e-3, atol=5e-3)


def test_the_profile_holds_the_cosines_that_are_summed(fitted):
    subject, split, check, reference = fitted
    profile = check.profile(split.images)
    layers = (*subject.summary.taps, LOGITS)
    features, predicted = features_of(subject, split.images), subject.predict(split.images)
    for column, layer in enumerate(check.profile_layers):
        number = layers.index(layer) + 1
        expected = [
            reference_module.cosine(features[number - 1][i], reference.centroid[predicted[i]][number]) for i in range(len(split))
        ]
        np.testing.assert_allclose(profile[:, column], expected, atol=1e-5)


def test_the_order_of_images_and_of_batches_does_not_matter(fitted):
    _, split, check, _ = fitted
    scores = check.score(split.images)
    order = np.random.default_rng(2).permutation(len(split))
    np.testing.assert_allclose(check.score(split.images[order]), scores[order], atol=1e-3)
    np.testing.assert_allclose(np.concatenate([check.score(split.images[i : i + 1]) for i in range(5)]), scores[:5], atol=1e-3)


class Relabelled(nn.Module):
    def __init__(self, inner, order):
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, pixels):
        return self.inner(pixels)[:, self.order]


def test_relabelling_the_classes_changes_nothing(make_subject):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    images = (rng.integers(0, 100, (48, 8, 8, 1)) + labels[:, None, None, None] * 40).astype(np.uint8)
    split = FitSplit(images, labels)
    model = train(initialised(lambda: SmallCnn(1, 4, width=8), 1), split, epochs=3, seed=0)
    order = torch.tensor([2, 0, 3, 1])
    new_label = np.argsort(order.numpy())
    plain = LayerwiseScorer().fit(make_subject(model, 1, 8), split, rng)
    renamed = LayerwiseScorer().fit(make_subject(Relabelled(model, order), 1, 8), FitSplit(images, new_label[labels]), rng)
    np.testing.assert_allclose(renamed.score(images), plain.score(images), rtol=1e-3, atol=1e-2)


def test_a_class_without_images_makes_its_inputs_suspicious(fitted, make_subject):
    subject, split, _, _ = fitted
    without = split.labels != 1
    check = LayerwiseScorer().fit(subject, FitSplit(split.images[without], split.labels[without]), np.random.default_rng(0))
    assert check.facts["classes_with_too_few_images"] == [1]
    predicted = subject.predict(split.images)
    assert set(predicted.tolist()) == set(split.labels.tolist())
    scores = check.score(split.images)
    assert scores[predicted == 1].min() > 2.5
    assert np.median(scores[predicted == 0]) < 2.5


def test_too_few_images_and_one_layer_are_inapplicable(fitted, make_subject):
    subject, split, _, _ = fitted
    with pytest.raises(InapplicableError, match="No class has 3 clean images"):
        LayerwiseScorer().fit(subject, FitSplit(split.images[:2], split.labels[:2]), np.random.default_rng(0))
    flat = make_subject(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 1, 8)
    with pytest.raises(InapplicableError, match="no intermediate block"):
        LayerwiseScorer().fit(flat, FitSplit(split.images[:, :, :, :1], split.labels), np.random.default_rng(0))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau must be positive"):
        LayerwiseScorer(tau=tau)
