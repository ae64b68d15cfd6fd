"""Trigger inversion on planted positives with their clean twins, and the laws it must obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import TriggerInversion
from audit_plugin.checks.base import Probe
from audit_plugin.checks.inversion import Budget, Goal, Patches, invert
from audit_plugin.checks.measurement import measure_probe
from audit_plugin.types import CalibrateSplit, FitSplit, Splits, TestSplit, Trigger

SIZE, CLASSES, TARGET = 8, 6, 4


class Planted(nn.Module):
    """Tells classes by which column is bright. With a backdoor, one bright corner pixel overrules everything."""

    def __init__(self, backdoor: bool) -> None:
        super().__init__()
        weights = torch.zeros(CLASSES, SIZE, SIZE)
        for label in range(CLASSES):
            weights[label, :, label] = 1.0
        self.weights = nn.Parameter(weights.flatten(1))
        corner = torch.zeros(SIZE, SIZE)
        corner[SIZE - 1, SIZE - 1] = 4.0 if backdoor else 0.0
        self.corner = nn.Parameter(corner.flatten())
        self.features = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.features.weight)
        nn.init.zeros_(self.features.bias)

    def forward(self, pixels):
        flat = torch.relu(self.features(pixels)).flatten(1)
        logits = flat @ self.weights.T
        bonus = (flat @ self.corner).square()  # 16 for a white corner, less than 1 for those of the clean images
        return logits + bonus[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


def images_of(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 60, (count, SIZE, SIZE, 1))
    images[np.arange(count), :, labels] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


SPLITS = Splits(FitSplit(*images_of(90, 0)), CalibrateSplit(*images_of(30, 1)), TestSplit(*images_of(120, 2)))


@pytest.fixture(scope="module")
def found(make_subject):
    """What the search finds with and without the backdoor."""
    return {
        backdoor: measure_probe(
            TriggerInversion(steps=150), make_subject(Planted(backdoor), 1, SIZE), SPLITS, np.random.default_rng(0)
        )
        for backdoor in (True, False)
    }


def test_the_planted_class_stands_out_and_its_clean_twin_does_not(found):
    assert found[True].most_suspicious.trigger.target_class == TARGET
    assert found[True].most_suspicious.outlier > 3
    assert found[False].most_suspicious.outlier < 3


def test_the_planted_pixel_is_recovered(found):
    trigger = found[True].most_suspicious.trigger
    assert np.unravel_index(trigger.mask.argmax(), trigger.mask.shape) == (SIZE - 1, SIZE - 1)
    assert trigger.size < 4


def test_one_candidate_a_class_and_family_in_order(found):
    assert [(c.trigger.family, c.trigger.target_class) for c in found[True].candidates] == [
        (family, label) for family in ("patch", "additive") for label in range(CLASSES)
    ]
    assert found[True].classes_skipped == ()


def test_success_is_measured_on_stamped_files_of_other_classes(found, make_subject):
    subject = make_subject(Planted(True), 1, SIZE)
    for candidate in found[True].candidates:
        others = SPLITS.test.labels != candidate.trigger.target_class
        stamped = candidate.trigger.stamp(SPLITS.test.images[others])
        assert stamped.dtype == np.uint8
        hits = subject.predict(stamped) == candidate.trigger.target_class
        # every clean image is classified rightly here, so label and prediction name the same images
        assert (candidate.success.successes, candidate.success.trials) == (hits.sum(), others.sum())


def test_triggers_stay_in_image_space(found):
    for candidate in found[True].candidates:
        trigger = candidate.trigger
        assert trigger.mask.shape == (SIZE, SIZE)
        assert trigger.pattern.shape == (1, SIZE, SIZE)
        assert 0 <= trigger.mask.min() <= trigger.mask.max() <= 1
        lowest = 0 if trigger.family == "patch" else -1
        assert lowest <= trigger.pattern.min() <= trigger.pattern.max() <= 1
        if trigger.family == "additive":
            np.testing.assert_allclose(trigger.mask, np.abs(trigger.pattern).mean(axis=0), atol=1e-6)


def test_same_seed_same_triggers_other_seed_other_triggers(make_subject):
    subject = make_subject(Planted(True), 1, SIZE)
    probe = TriggerInversion(steps=10)
    first, again, other = (probe.search(subject, SPLITS.fit, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.mask, two.mask)
        np.testing.assert_array_equal(one.pattern, two.pattern)
    assert any((one.mask != two.mask).any() for one, two in zip(first, other, strict=True))


def test_groups_of_classes_find_the_same_class(make_subject):
    subject = make_subject(Planted(True), 1, SIZE)
    grouped = TriggerInversion(steps=150, images_per_step=24, images_per_batch=48)  # two classes at a time
    found = measure_probe(grouped, subject, SPLITS, np.random.default_rng(0))
    assert found.most_suspicious.trigger.target_class == TARGET


def test_classes_left_out_are_reported(make_subject):
    search = TriggerInversion(steps=2, classes=[0, 4])
    found = measure_probe(search, make_subject(Planted(False), 1, SIZE), SPLITS, np.random.default_rng(0))
    assert found.classes_skipped == (1, 2, 3, 5)


@dataclass(frozen=True)
class Given(Probe):
    """Finds the triggers that it is given."""

    triggers: tuple[Trigger, ...]
    name: ClassVar[str] = "given"

    def search(self, subject, fit_split, rng):
        return list(self.triggers)


def test_a_class_that_no_trigger_reached_counts_with_the_size_that_was_tried(make_subject):
    def patch(target, rows, columns, value):
        mask = np.zeros((SIZE, SIZE), dtype=np.float32)
        mask[rows, columns] = 1.0
        return Trigger(target, mask, np.full((1, SIZE, SIZE), value, dtype=np.float32), None, "patch")

    corner = patch(TARGET, SIZE - 1, SIZE - 1, 1.0)
    columns = [patch(target, slice(None), target, 1.0) for target in (0, 1)]
    black = [patch(target, slice(None), slice(None), 0.0) for target in (2, 3, 5)]
    found = measure_probe(
        Given((corner, *columns, *black)), make_subject(Planted(True), 1, SIZE), SPLITS, np.random.default_rng(0)
    )
    assert [evidence.is_compared for evidence in found.candidates] == [True] * 3 + [False] * 3
    assert found.most_suspicious.trigger.target_class == TARGET
    assert found.most_suspicious.size_ratio == pytest.approx(SIZE * SIZE)


def test_progress_reaches_one(make_subject):
    shares = []
    TriggerInversion(steps=3, progress=shares.append).search(
        make_subject(Planted(False), 1, SIZE), SPLITS.fit, np.random.default_rng(0)
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"images_per_step": 0}, {"images_per_step": 20, "images_per_batch": 10}, {"flip_rate": 1.0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        TriggerInversion(**settings)


@pytest.mark.parametrize(("size", "most"), [(16, 96), (32, 96), (64, 24), (128, 8)])
def test_larger_images_go_through_the_network_fewer_at_a_time(size, most):
    """As many as take the memory of ``images_per_batch`` of 32 x 32; those of one goal stay together."""
    seen = []

    class Watched(nn.Module):
        def forward(self, pixels):
            seen.append(len(pixels))
            return (nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)[:, :CLASSES],)

    images = np.random.default_rng(0).integers(0, 256, (20, size, size, 1)).astype(np.uint8)
    budget = Budget(steps=1, images_per_step=8, images_per_batch=96, flip_rate=0.9)
    goals = [Goal(target) for target in range(CLASSES)]
    found = invert(Watched(), FitSplit(images, np.arange(20)), goals, (Patches,), budget, np.random.default_rng(0))
    assert [trigger.target_class for trigger in found] == list(range(CLASSES))
    assert sum(seen) == 8 * CLASSES
    assert max(seen) == min(most, 8 * CLASSES)
