"""The check on activation norms, whose score is computed inside the ONNX graph, against plain NumPy on the same feature maps."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import ActivationNormScorer
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.reductions import NORMS
from audit_plugin.types import FitSplit
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.train import initialised, train

_spec = importlib.util.spec_from_file_location(
    "activation_norm_reference", Path(__file__).parent / "activation_norm_reference.py"
)
reference_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_module)

# float32 norms carry a relative error of about 1e-6, which the whitening enlarges by at most the square root of the
# covariance's condition number, about 30 here.
RELATIVE, ABSOLUTE = 1e-3, 1e-3


class EluCnn(nn.Module):
    """With activations of both signs, so that the magnitude matters."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 12, 3, stride=2), nn.ELU())
        self.head = nn.Linear(12, classes)

    def forward(self, pixels):
        return self.head(self.body(pixels).mean(dim=(2, 3)))


def brightness_split(classes, count=80, size=8):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, size, size, 3))
    images[np.arange(count), :, labels * 2] += 120  # a bright column tells the class
    return FitSplit(images.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def trained():
    split = brightness_split(4)
    return train(initialised(lambda: SmallCnn(3, 4, width=8), 0), split, epochs=12, seed=0, batch=20), split


def fit(subject, split):
    return ActivationNormScorer().fit(subject, split, np.random.default_rng(0))


@pytest.fixture(scope="module", params=["relu", "elu"])
def fitted(request, trained, make_subject):
    """A subject, its fit split, the fitted check and the reference for each of the three norms."""
    model, split = trained
    subject = make_subject(model if request.param == "relu" else initialised(lambda: EluCnn(4), 3), 3, 8)
    vectors, predicted = norms_and_classes(subject, split.images)
    return subject, split, fit(subject, split), [reference_module.ActivationNormReference(v, predicted, 4) for v in vectors]


def norms_and_classes(subject, images):
    """Three arrays (N, channels), by the reference, and the predicted classes."""
    maps = subject.session.run(to_pixels(images))[subject.summary.taps[-1]].astype(np.float64)
    return [np.stack(rows) for rows in zip(*map(reference_module.norms_of, maps), strict=True)], subject.predict(images)


def unseen(count=40):
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def test_scores_and_baselines_agree_on_new_images(fitted):
    subject, _, check, references = fitted
    images = unseen()
    vectors, predicted = norms_and_classes(subject, images)
    found = [check.score(images), check.baselines(images)["l1 norm"], check.baselines(images)["l2 norm"]]
    for scores, reference, rows in zip(found, references, vectors, strict=True):
        expected = [reference.score(row, label) for row, label in zip(rows, predicted, strict=True)]
        np.testing.assert_allclose(scores, expected, rtol=RELATIVE, atol=ABSOLUTE)


def test_norms_that_leave_the_graph_agree(fitted):
    subject, _, check, _ = fitted
    images = unseen(10)
    shown = check.distributions(images, images[::-1], images[:3])
    channels = [int(item.quantity.rpartition(" ")[2]) for item in shown[:: len(NORMS)]]
    vectors, _ = norms_and_classes(subject, images)
    for index, item in enumerate(shown):
        expected = vectors[index % len(NORMS)][:, channels[index // len(NORMS)]]
        np.testing.assert_allclose(item.clean, expected, rtol=1e-5)
        np.testing.assert_allclose(item.stamped, expected[::-1], rtol=1e-5)
        np.testing.assert_allclose(item.suspects, expected[:3], rtol=1e-5)


def test_shrinkage_agrees(fitted):
    *_, check, references = fitted
    found = list(check.facts["covariance_shrinkage"].values())
    np.testing.assert_allclose(found, [reference.shrinkage for reference in references], rtol=1e-4)


def test_the_order_of_images_and_of_batches_does_not_matter(fitted):
    _, split, check, _ = fitted
    scores = check.score(split.images)
    order = np.random.default_rng(2).permutation(len(split))
    np.testing.assert_allclose(check.score(split.images[order]), scores[order], rtol=RELATIVE, atol=ABSOLUTE)
    one_by_one = np.concatenate([check.score(split.images[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(one_by_one, scores[:5], rtol=RELATIVE, atol=ABSOLUTE)


# ---------------------------------------------------------------------------------- changes that change nothing


class Relabelled(nn.Module):
    def __init__(self, inner, order):
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, pixels):
        return self.inner(pixels)[:, self.order]


def permuted(model, order):
    """The same function, the channels of its last block in another order."""
    changed = copy.deepcopy(model)
    convolution, normalisation, _ = changed.features[-1]
    for layer in (convolution, normalisation):
        for tensor in {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.values():
            if tensor.ndim:
                tensor.data = tensor.data[order]
    weight = changed.classifier.weight.data
    changed.classifier.weight.data = weight.view(len(weight), len(order), -1)[:, order].flatten(1)
    return changed


def scaled(model, factor):
    """The same function, its last feature map ``factor`` times as large."""
    changed = copy.deepcopy(model)
    normalisation = changed.features[-1][1]
    normalisation.weight.data *= factor
    normalisation.bias.data *= factor
    changed.classifier.weight.data /= factor
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda model: Relabelled(model, torch.tensor([2, 0, 3, 1])),
        lambda model: permuted(model, torch.randperm(16, generator=torch.Generator().manual_seed(0))),
        lambda model: scaled(model, 64.0),
        pytest.param(lambda model: scaled(model, 1 / 64), marks=pytest.mark.slow),
    ],
    ids=["classes relabelled", "channels permuted", "activations larger", "activations smaller"],
)
def test_what_changes_no_answer_changes_no_score(trained, make_subject, change):
    model, split = trained
    images = np.concatenate([split.images, unseen()])
    plain, changed = (fit(make_subject(each, 3, 8), split) for each in (model, change(model)))
    np.testing.assert_allclose(changed.score(images), plain.score(images), rtol=RELATIVE, atol=ABSOLUTE)
    for name, scores in plain.baselines(images).items():
        np.testing.assert_allclose(changed.baselines(images)[name], scores, rtol=RELATIVE, atol=ABSOLUTE)
