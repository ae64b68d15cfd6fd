"""BeniFul elimination on digits: the true trigger, which the repair never saw, is gone; accuracy stays; nothing else changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.subject import check_parity
from audit_plugin.repair import BenifulRepair, FineTuning, beniful
from audit_plugin.repair.measurement import measure_repair
from audit_plugin.types import FitSplit, Splits

QUICK = BenifulRepair(rounds=1, epochs=1, steps=25)


def weights_of(subject):
    return {name: value.clone() for name, value in subject.torch_module().state_dict().items()}


def repaired(attacked, triggers=None, repair=QUICK, seed=0):
    triggers = attacked.triggers if triggers is None else triggers
    return repair.repair(attacked.subject, attacked.splits, triggers, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def result(attacked):
    before = weights_of(attacked.subject)
    outcome = repaired(attacked, repair=BenifulRepair(steps=200))
    after = weights_of(attacked.subject)
    assert all(torch.equal(before[name], after[name]) for name in before), "the original was changed"
    return outcome


def test_the_loss_is_the_one_of_the_page(attacked, monkeypatch):
    """Cross-entropy and divergence are means over images and stand-ins together, the divergence times four, and the features
    count in full."""
    monkeypatch.setattr(beniful, "fast_precision", lambda device: contextlib.nullcontext())
    known, tuned = attacked.subject.torch_module(), attacked.subject.trainable_copy()
    with torch.no_grad():
        for index, weight in enumerate(tuned.parameters()):
            weight += 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    benign = QUICK._benign_features(attacked.subject, attacked.splits.fit, np.random.default_rng(0))
    fit = attacked.splits.fit
    clean, labels = torch.from_numpy(to_pixels(fit.images[:20])), torch.from_numpy(fit.labels[:20])
    stamped = clean.flip(3)
    u, w, temperature = 0.9, 2.0, 2.0
    with torch.no_grad():
        found = float(beniful._Objective(known, benign, u, w)(tuned, clean, stamped, labels))
        own, answers, answers_to_stamped = known(clean), tuned(clean), tuned(stamped)

        def divergence(logits):
            wanted, reached = ((values / temperature).log_softmax(dim=1) for values in (own[-1], logits))
            return (wanted.exp() * (wanted - reached)).sum(dim=1).mean()

        entropies = [functional.cross_entropy(values[-1], labels) for values in (answers, answers_to_stamped)]
        divergences = [divergence(values[-1]) for values in (answers, answers_to_stamped)]
        standardised = [benign.features.standardised(values[benign.index]) for values in (answers, answers_to_stamped, own)]
        distances = [
            ((standardised[0] - standardised[2]) ** 2).mean(),
            ((standardised[1] - benign.features(standardised[2], labels)) ** 2).mean(),
        ]
    stated = (1 - u) * sum(entropies) / 2 + u * temperature**2 * sum(divergences) / 2 + w * sum(distances)
    assert min(float(part) for part in (*entropies, *divergences, *distances)) > 1e-4, "every term counts"
    assert found == pytest.approx(float(stated), rel=1e-4)


def test_the_true_trigger_no_longer_works(attacked, result):
    assert attacked.success(attacked.subject) > 0.95
    assert attacked.success(result.subject) < 0.1


def test_plain_fine_tuning_leaves_the_backdoor(attacked):
    """So that it is the repair that removes it, and not any training on clean images."""
    tuned = FineTuning(epochs=4).repair(attacked.subject, attacked.splits, attacked.triggers, np.random.default_rng(0))
    assert attacked.success(tuned.subject) > 0.5


def test_accuracy_stays_within_the_budget(attacked, result):
    """On images that chose nothing: the budget of 2 points, and one more for the noise of some 240 images (0.8 deviations)."""
    assert attacked.accuracy(result.subject) > attacked.accuracy(attacked.subject) - 0.03


def test_the_facts_say_what_was_done(result):
    facts = json.loads(json.dumps(result.facts))
    assert 1 <= len(facts["rounds"]) <= 3
    assert all(set(entry["trigger_sizes"]) == {"patch", "additive"} for entry in facts["rounds"])
    assert all(0.0 <= entry["calibrate_accuracy"] <= 1.0 for entry in facts["rounds"])
    assert facts["calibrate_accuracy_before"] > 0.9
    assert set(facts["natural_sizes"]) == {"patch", "additive"}, "the triggers of the backdoor are smaller than other classes'"


@pytest.mark.slow
def test_a_natural_trigger_is_not_unlearned(attacked, other_class):
    """A class without a backdoor: its trigger is no smaller than those of most classes, so it is no stand-in."""
    natural = tuple(trigger for trigger in other_class if trigger.target_class != 7)
    facts = repaired(attacked, natural).facts
    assert facts["natural_sizes"] == {}


def test_the_repaired_copy_is_a_subject_like_the_original(attacked, result):
    assert result.subject.summary == attacked.subject.summary
    check_parity(result.subject, attacked.rest.images[:8])


def test_the_measurement_sees_it_on_the_test_split(attacked, result):
    test = attacked.splits.test
    report = measure_repair("beniful", attacked.subject, result.subject, test, attacked.triggers, result.facts)
    assert report.target_class == 7
    assert report.trigger_count == 2
    assert report.accuracy_before.trials == report.accuracy_after.trials == len(test)
    assert report.accuracy_before.value == np.mean(attacked.subject.predict(test.images) == test.labels)
    assert report.flip_rate_before.value > 0.8
    assert report.flip_rate_after.value < 0.2
    moved = (test.labels != 7) & (attacked.subject.predict(test.images) != 7)
    assert report.flip_rate_before.trials == report.flip_rate_after.trials == moved.sum()
    by_hand = max(np.mean(result.subject.predict(trigger.stamp(test.images[moved])) == 7) for trigger in attacked.triggers)
    assert report.flip_rate_after.value == pytest.approx(by_hand)


@pytest.mark.slow
def test_the_seed_decides(attacked):
    first, again, other = (repaired(attacked, seed=seed) for seed in (0, 0, 1))
    images = attacked.rest.images[:50]
    np.testing.assert_array_equal(first.subject.logits(images), again.subject.logits(images))
    assert first.facts == again.facts
    assert not np.array_equal(first.subject.logits(images), other.subject.logits(images))


@pytest.mark.slow
def test_the_test_split_plays_no_part(attacked):
    splits = attacked.splits
    emptied = Splits(splits.fit, splits.calibrate, dataclasses.replace(splits.test, images=splits.test.images * 0))
    images = attacked.rest.images[:50]
    first = repaired(attacked).subject.logits(images)
    np.testing.assert_array_equal(first, repaired(attacked._replace(splits=emptied)).subject.logits(images))


def test_normalisation_keeps_its_statistics(attacked, result):
    before, after = (dict(subject.torch_module().named_buffers()) for subject in (attacked.subject, result.subject))
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)


def test_triggers_of_two_classes_and_none_are_refused(attacked, other_class):
    with pytest.raises(ValueError, match=r"of one class, got those of the classes \[6, 7\]"):
        repaired(attacked, other_class)
    with pytest.raises(ValueError, match="of one class"):
        repaired(attacked, ())
    for triggers, found in ((other_class, r"got 2 of the classes \[6, 7\]"), ((), r"got 0 of the classes \[\]")):
        with pytest.raises(ValueError, match=found):
            measure_repair("beniful", attacked.subject, attacked.subject, attacked.splits.test, triggers, {})


def test_a_network_without_layers_is_inapplicable(attacked, make_subject):
    subject = make_subject(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), 1, 16)
    assert not subject.summary.taps
    with pytest.raises(InapplicableError, match="no intermediate layer"):
        QUICK.repair(subject, attacked.splits, attacked.triggers, np.random.default_rng(0))


def test_too_few_images_are_inapplicable(attacked):
    fit = attacked.splits.fit
    splits = dataclasses.replace(attacked.splits, fit=FitSplit(fit.images[:5], fit.labels[:5]))
    with pytest.raises(InapplicableError, match="at least 10 clean images in the fit split, there are 5"):
        QUICK.repair(attacked.subject, splits, attacked.triggers, np.random.default_rng(0))
