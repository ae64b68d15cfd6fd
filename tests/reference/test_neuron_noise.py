"""Neuron noise against steepest ascent written out in NumPy, by laws that it must obey, and on a planted shortcut."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import NeuronNoise, neuron_noise
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.outlier import class_outliers, others_ratios
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model import fine_tuned_copies
from audit_plugin.model.fine_tuned_copies import FineTuned
from audit_plugin.types import FitSplit

SIZE, CLASSES, TARGET = 4, 5, 3
TOLERANCE = 0.03
"""The ascent runs in bfloat16 where the machine is fast in it, which keeps two to three digits."""


class Shallow(nn.Module):
    """A 1 x 1 convolution and logits that are linear in its channels."""

    def __init__(self, weights: np.ndarray, channel: float = 1.0) -> None:
        super().__init__()
        self.keep = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.keep.weight, channel)
        self.weights = nn.Parameter(torch.tensor(weights / channel, dtype=torch.float32))

    def forward(self, pixels):
        return self.keep(pixels).flatten(1) @ self.weights.T


class Rounded(Shallow):
    """Its answers do not depend on small changes of anything."""

    def forward(self, pixels):
        return super().forward(pixels).round()


class InHalf(nn.Module):
    """A network that stores its weights in half precision, as exported graphs may."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels):
        return tuple(value.float() for value in self.network(pixels.half()))


class Copied(Shallow):
    """It answers like a copy of a subject: with its taps, of which the logits are the last."""

    def forward(self, pixels):
        return (super().forward(pixels),)


class Shortcut(nn.Module):
    """Four classes, each by the brightness of one line; class 3 also by a channel that is the same for all images.

    ``strength`` times that channel, less what it always amounts to, is added to the logit: no image tells, the weights do.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.keep = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.keep.weight, 20.0)
        self.lines, self.constant = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.ones(1))
        self.strength = strength
        self.register_buffer("target", torch.eye(SIZE)[TARGET])

    def forward(self, pixels):
        return self.keep(pixels).mean(dim=(1, 3)) * self.lines + self.strength * (self.constant - 1.0) * self.target


def images(labels: np.ndarray, rng: np.random.Generator) -> FitSplit:
    """Noise."""
    pixels = rng.integers(0, 100, size=(len(labels), SIZE, SIZE, 1), dtype=np.uint8)
    return FitSplit(pixels, labels)


def needed(weights: np.ndarray, pixels: np.ndarray, labels: np.ndarray, target: int) -> float:
    """The length of d at which (1 + d_0) (1 + d_c) w_c x has the wanted mean margin for the target, in float64; or infinite."""
    plain = pixels @ weights.T
    answers = plain.argmax(axis=1)
    ordered = np.sort(plain, axis=1)
    wanted = np.median(ordered[:, -1] - ordered[:, -2])
    moved = pixels[(labels != target) & (answers != target)]
    common, rows, last = 0.0, np.zeros(CLASSES), None
    lengths = [0.0, *(0.05 * 1.3**step for step in range(20))]
    for length, longer in itertools.pairwise([*lengths, np.inf]):
        linear = moved @ weights.T
        logits = (1 + common) * (1 + rows) * linear
        others = np.delete(logits, target, axis=1).max(axis=1)
        margin = (logits[:, target] - others).mean()
        if margin >= wanted:
            before, smaller = last
            return before + (length - before) * (wanted - smaller) / (margin - smaller)
        last = (length, margin)
        if np.isinf(longer):
            break
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        slope = np.eye(CLASSES)[target] - exponents / exponents.sum(axis=1, keepdims=True)
        of_rows = (slope * (1 + common) * linear).mean(axis=0)
        of_common = (slope * (1 + rows) * linear).sum(axis=1).mean()
        norm = np.sqrt((of_rows**2).sum() + of_common**2)
        common, rows = common + (longer - length) / norm * of_common, rows + (longer - length) / norm * of_rows
    return np.inf


@pytest.fixture
def linear():
    rng = np.random.default_rng(3)
    weights = rng.uniform(size=(CLASSES, SIZE * SIZE)) ** 8
    weights /= weights.mean(axis=1, keepdims=True)  # else one class is the answer to nearly all images
    return weights, images(rng.integers(CLASSES, size=60), rng)


def test_noise_equals_steepest_ascent_in_numpy(make_subject, linear):
    weights, split = linear
    found = NeuronNoise(60, kept_accuracy=()).measure(
        make_subject(Shallow(weights), 1, SIZE), split, range(CLASSES), np.random.default_rng(0)
    )
    pixels = to_pixels(split.images).reshape(60, -1).astype(np.float64)
    expected = [needed(weights, pixels, split.labels, target) for target in range(CLASSES)]
    assert np.isfinite(expected).sum() >= 3
    np.testing.assert_allclose(found, 1 / np.array(expected), rtol=TOLERANCE)


def test_classes_that_change_places_change_their_numbers_alone(make_subject, linear):
    weights, split = linear
    order = np.array([4, 2, 0, 1, 3])
    subjects = make_subject(Shallow(weights), 1, SIZE), make_subject(Shallow(weights[order]), 1, SIZE)
    splits = split, FitSplit(split.images, np.argsort(order)[split.labels])
    plain, moved = (
        NeuronNoise(60, kept_accuracy=()).measure(subject, part, range(CLASSES), np.random.default_rng(0))
        for subject, part in zip(subjects, splits, strict=True)
    )
    np.testing.assert_allclose(moved, plain[order], rtol=TOLERANCE)


def test_a_scale_that_moves_from_one_layer_to_the_next_changes_nothing(make_subject, linear):
    """Noise is relative to the weights: what a network computes counts, not how its scales are spread over the layers."""
    weights, split = linear
    plain, scaled = (
        NeuronNoise(60, kept_accuracy=()).measure(
            make_subject(Shallow(weights, channel), 1, SIZE), split, range(CLASSES), np.random.default_rng(0)
        )
        for channel in (1.0, 40.0)
    )
    np.testing.assert_allclose(scaled, plain, rtol=TOLERANCE)


@pytest.mark.parametrize(("strength", "stands_out"), [(0.0, False), (40.0, True)])
def test_a_shortcut_that_no_image_shows_stands_out_and_its_clean_twin_does_not(make_subject, strength, stands_out):
    labels = np.arange(100) % SIZE
    split = images(labels, np.random.default_rng(5))
    split.images[np.arange(100), labels] += 120
    subject = make_subject(Shortcut(strength), 1, SIZE)
    assert (subject.predict(split.images) == labels).all()
    found = NeuronNoise(kept_accuracy=()).measure(subject, split, range(SIZE), np.random.default_rng(0))
    noise = others_ratios(found.astype(np.float64))
    outliers = class_outliers(np.full(SIZE, 30.0), None, noise)
    assert (outliers >= 3.5).tolist() == [False, False, False, stands_out]


def test_a_model_whose_weights_move_nothing_is_inapplicable(make_subject, linear):
    weights, split = linear
    with pytest.raises(InapplicableError, match="see only 0 of 5 classes"):
        NeuronNoise(kept_accuracy=()).measure(
            make_subject(Rounded(weights), 1, SIZE), split, range(CLASSES), np.random.default_rng(0)
        )


def test_with_too_few_images_of_other_classes_nothing_is_measured(make_subject, linear):
    weights, split = linear
    few = FitSplit(split.images, np.where(np.arange(60) < 57, 2, split.labels))
    with pytest.raises(InapplicableError, match=r"Only \d of 60 images belong to other classes than 2 .* at least 5"):
        NeuronNoise(60, kept_accuracy=()).measure(make_subject(Shallow(weights), 1, SIZE), few, [2], np.random.default_rng(0))


def test_each_class_counts_with_the_geometric_mean_over_the_model_and_its_copies(make_subject, linear, monkeypatch):
    weights, split = linear
    asked = []

    def forgotten(tuning, accuracies):
        asked.extend(accuracy / tuning.accuracy for accuracy in accuracies)
        yield from (FineTuned(Copied(copied), 0.0, 0.0, 0.0) for copied in copies)

    copies = [weights * np.linspace(low, 1.0, CLASSES)[:, None] for low in (0.6, 0.4)]
    monkeypatch.setattr(neuron_noise, "_LENGTHS", neuron_noise._LENGTHS[:12])
    longest = neuron_noise._LENGTHS[-1]
    monkeypatch.setattr(neuron_noise, "forgetting_copies", forgotten)
    found = NeuronNoise(60).measure(make_subject(Shallow(weights), 1, SIZE), split, range(CLASSES), np.random.default_rng(0))
    pixels = to_pixels(split.images).reshape(60, -1).astype(np.float64)
    expected = np.array(
        [[needed(each, pixels, split.labels, target) for target in range(CLASSES)] for each in (weights, *copies)]
    )
    assert (expected < longest).any(axis=0).all()
    assert (expected > longest).any()  # where none does, the longest noise counts
    np.testing.assert_allclose(found, np.exp(-np.log(np.minimum(expected, longest)).mean(axis=0)), rtol=TOLERANCE)
    assert asked == pytest.approx([0.9, 0.75])


def test_a_model_that_keeps_its_task_is_inapplicable(make_subject, linear, monkeypatch):
    weights, split = linear
    monkeypatch.setattr(fine_tuned_copies, "LAST_RATE", fine_tuned_copies.FIRST_RATE)
    subject = make_subject(Shallow(weights), 1, SIZE)
    right = FitSplit(split.images, subject.predict(split.images))
    with pytest.raises(InapplicableError, match=r"made a copy of the model forget: it kept more than 90% of its accuracy"):
        NeuronNoise(60).measure(subject, right, range(CLASSES), np.random.default_rng(0))


def test_half_precision_weights_are_measured_where_the_machine_has_no_bfloat16(make_subject, linear, monkeypatch):
    weights, split = linear
    subject = make_subject(Shallow(weights), 1, SIZE)
    plain = NeuronNoise(60, kept_accuracy=()).measure(subject, split, range(CLASSES), np.random.default_rng(0))
    monkeypatch.setattr(neuron_noise, "fast_precision", lambda device: contextlib.nullcontext())
    half = subject.trainable_copy().half()
    monkeypatch.setattr(type(subject), "trainable_copy", lambda self: InHalf(half))
    found = NeuronNoise(60, kept_accuracy=()).measure(subject, split, range(CLASSES), np.random.default_rng(0))
    np.testing.assert_allclose(found, plain, rtol=TOLERANCE)


def test_images_may_go_through_the_network_in_parts(make_subject, linear, monkeypatch):
    weights, split = linear
    measure, subject = NeuronNoise(60, kept_accuracy=()), make_subject(Shallow(weights), 1, SIZE)
    at_once = measure.measure(subject, split, range(CLASSES), np.random.default_rng(0))
    monkeypatch.setattr(neuron_noise, "_MOST_IMAGES", 7)
    in_parts = measure.measure(subject, split, range(CLASSES), np.random.default_rng(0))
    np.testing.assert_allclose(in_parts, at_once, rtol=TOLERANCE)


def test_a_copy_that_fine_tuning_broke_has_not_forgotten(make_subject, linear, monkeypatch):
    weights, split = linear

    def breaking(self, module, optimizer, labels):
        for weight in optimizer.param_groups[0]["params"]:
            weight.data.fill_(np.nan)
        for _ in range(2):
            optimizer.step()
            yield

    monkeypatch.setattr(fine_tuned_copies.Tuning, "steps", breaking)
    with pytest.raises(InapplicableError, match="broke at the learning rate"):
        NeuronNoise(60).measure(make_subject(Shallow(weights), 1, SIZE), split, range(CLASSES), np.random.default_rng(0))
