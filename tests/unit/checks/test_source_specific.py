"""The search over pairs of classes on a planted source-specific backdoor and its clean twin."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import SourceSpecificInversion
from audit_plugin.checks.base import Probe
from audit_plugin.checks.measurement import measure_probe
from audit_plugin.errors import InapplicableError
from audit_plugin.types import CalibrateSplit, FitSplit, Splits, TestSplit, Trigger

SIZE, CLASSES, SOURCE, TARGET = 8, 6, 1, 4


class Planted(nn.Module):
    """Tells classes by their bright column. With the backdoor, a bright corner turns the source class into the target."""

    def __init__(self, backdoor: bool) -> None:
        super().__init__()
        self.strength = 6.0 if backdoor else 0.0
        self.features = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.features.weight)
        nn.init.zeros_(self.features.bias)

    def forward(self, pixels):
        image = torch.relu(self.features(pixels))[:, 0]
        columns = image.sum(dim=1)[:, :CLASSES]
        is_source = torch.sigmoid(8 * (columns[:, SOURCE] - 4))  # a bright column sums up to about 5, a dark one to about 1
        bonus = self.strength * image[:, -1, -1] * is_source
        return columns + bonus[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


def images_of(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 60, (count, SIZE, SIZE, 1))
    images[:, -1, -1] = 0
    images[np.arange(count), :, labels] += 130
    return images.astype(np.uint8), labels.astype(np.int64)


SPLITS = Splits(FitSplit(*images_of(90, 0)), CalibrateSplit(*images_of(30, 1)), TestSplit(*images_of(120, 2)))


@pytest.mark.parametrize("backdoor", [True, False])
def test_the_planted_pair_stands_out_and_its_clean_twin_has_none(make_subject, backdoor):
    subject = make_subject(Planted(backdoor), 1, SIZE)
    found = measure_probe(SourceSpecificInversion(steps=150), subject, SPLITS, np.random.default_rng(0))
    assert found.is_source_specific
    assert len(found.candidates) == CLASSES * (CLASSES - 1)
    trigger = found.most_suspicious.trigger
    if backdoor:
        assert (trigger.source_class, trigger.target_class) == (SOURCE, TARGET)
        assert found.most_suspicious.outlier > 5
        assert found.most_suspicious.success.trials == 20  # the source's images in the test split
    else:
        assert found.most_suspicious.outlier < 5


def test_many_classes_are_said_not_to_be_searched(make_subject):
    subject = make_subject(Planted(False), 1, SIZE)
    with pytest.raises(InapplicableError, match="6 classes make 30 pairs; at most 5"):
        SourceSpecificInversion(maximum_classes=5).search(subject, SPLITS.fit, np.random.default_rng(0))


def test_sources_without_images_are_left_out(make_subject):
    subject = make_subject(Planted(False), 1, SIZE)
    kept = np.isin(SPLITS.fit.labels, [0, 2])
    split = FitSplit(SPLITS.fit.images[kept], SPLITS.fit.labels[kept])
    found = SourceSpecificInversion(steps=1).search(subject, split, np.random.default_rng(0))
    assert {trigger.source_class for trigger in found} == {0, 2}
    one = FitSplit(split.images[split.labels == 0], split.labels[split.labels == 0])
    with pytest.raises(InapplicableError, match="Fewer than two classes"):
        SourceSpecificInversion(steps=1).search(subject, one, np.random.default_rng(0))


def test_classes_with_too_few_images_are_told_as_no_sources(make_subject):
    fit = SPLITS.fit
    kept = np.flatnonzero((fit.labels != 1) | (np.cumsum(fit.labels == 1) <= 2))  # two images of class 1
    few = dataclasses.replace(SPLITS, fit=FitSplit(fit.images[kept], fit.labels[kept]))
    search = SourceSpecificInversion(steps=150)
    found = measure_probe(search, make_subject(Planted(False), 1, SIZE), few, np.random.default_rng(0))
    assert found.classes_skipped == (1,)
    assert any(candidate.trigger.target_class == 1 for candidate in found.candidates)


@dataclasses.dataclass(frozen=True)
class Found(Probe):
    """Hands out a patch of two points for every pair; those of the ``sources`` lie where they do something."""

    name: ClassVar[str] = "found"
    sources: tuple[int, ...] = ()

    def search(self, subject, fit_split, rng):
        triggers = []
        for source, target in itertools.permutations(range(CLASSES), 2):
            mask = np.zeros((SIZE, SIZE), np.float32)
            mask[:, target if source in self.sources else -1] = 1
            mask[:, source] = mask[:, target]
            pattern = np.zeros((1, SIZE, SIZE), np.float32)
            pattern[:, :, target] = 1
            triggers.append(Trigger(target, mask, pattern, source))
        return triggers


def test_a_source_counts_as_searched_only_where_half_of_its_candidates_work(make_subject):
    subject = make_subject(Planted(False), 1, SIZE)
    found = measure_probe(Found(sources=(0, 2, 5)), subject, SPLITS, np.random.default_rng(0))
    assert {candidate.trigger.source_class for candidate in found.candidates if candidate.is_compared} == {0, 2, 5}
    assert found.classes_skipped == (1, 3, 4)
