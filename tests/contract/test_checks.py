"""Every registered check keeps the contract; a new one is measured by these tests as soon as it is registered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audit_plugin.checks import (
    CLASS_MEASURES,
    INPUT_SCORERS,
    PROBES,
    BadExpertScorer,
    ClassMeasure,
    FittedScorer,
    InputScorer,
)
from audit_plugin.checks.measurement import measure_classes
from audit_plugin.policy import SCORERS
from audit_plugin.types import FitSplit, Trigger
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

ROOT = Path(__file__).parents[2]
CHECKS = (*CLASS_MEASURES, *PROBES, *INPUT_SCORERS)


@pytest.fixture(scope="module")
def digit_subject(make_subject):
    data = digits(seed=0, size=8)
    model = train(initialised(lambda: SmallCnn(1, 10, width=8), 0), data.train, epochs=3, seed=0)
    return make_subject(model, 1, 8), FitSplit(data.test.images[:300], data.test.labels[:300]), data.test.images[300:400]


def test_names_are_unique():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)


def test_a_policy_may_name_every_check_on_inputs_and_no_other():
    assert tuple(check.name for check in INPUT_SCORERS) == SCORERS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_has_a_page_and_a_paper(check):
    page = (ROOT / "docs" / "checks" / f"{check.name}.md").read_text(encoding="utf-8")
    for heading in ("## Assumption", "## Blind spots", "## Measured"):
        assert heading in page, f"docs/checks/{check.name}.md lacks the section '{heading}'"


@pytest.mark.parametrize("check", [*CLASS_MEASURES, *INPUT_SCORERS], ids=lambda check: check.name)
def test_what_measures_numbers_has_a_reference(check):
    assert (ROOT / "tests" / "reference" / f"test_{check.name}.py").is_file()


@pytest.fixture(scope="module")
def fitted(digit_subject) -> Callable[[type[InputScorer]], FittedScorer]:
    """Each scorer fitted once, since some take seconds; fails if that changes the model."""
    subject, _, images = digit_subject

    @functools.cache
    def fit(scorer: type[InputScorer]) -> FittedScorer:
        before = subject.onnx_model.SerializeToString(), subject.logits(images)
        found = fit_once(scorer, digit_subject)
        found.score(images)
        assert subject.onnx_model.SerializeToString() == before[0], "fitting changed the model"
        np.testing.assert_array_equal(subject.logits(images), before[1])
        return found

    return fit


def fit_once(scorer: type[InputScorer], digit_subject) -> FittedScorer:
    subject, split, _ = digit_subject
    return scorer().fit(subject, split, np.random.default_rng(0))


@pytest.mark.parametrize("scorer", INPUT_SCORERS, ids=lambda check: check.name)
class TestInputScorers:
    def test_one_finite_score_an_image_and_the_model_is_left_as_it_was(self, scorer, fitted, digit_subject):
        scores = fitted(scorer).score(digit_subject[2])
        assert scores.shape == (100,)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        assert scores.std() > 0

    def test_no_images_no_scores(self, scorer, fitted, digit_subject):
        assert fitted(scorer).score(digit_subject[2][:0]).shape == (0,)

    def test_two_fits_with_one_seed_agree(self, scorer, fitted, digit_subject):
        first, second = (found.score(digit_subject[2]) for found in (fitted(scorer), fit_once(scorer, digit_subject)))
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


# Of a backdoor expert that is no law: it judges how firmly an image is answered, and noise is answered without confidence.
@pytest.mark.parametrize(
    "scorer", [scorer for scorer in INPUT_SCORERS if scorer is not BadExpertScorer], ids=lambda check: check.name
)
def test_nonsense_is_more_suspicious_than_digits_to_what_knows_benign_features(scorer, fitted, digit_subject):
    noise = np.random.default_rng(3).integers(0, 256, digit_subject[2].shape).astype(np.uint8)
    assert np.median(fitted(scorer).score(noise)) > np.median(fitted(scorer).score(digit_subject[2]))


@pytest.mark.parametrize("probe", PROBES, ids=lambda check: check.name)
def test_probes_return_triggers_that_fit_the_images(probe, digit_subject):
    subject, split, images = digit_subject
    settings = {"steps": 3} if hasattr(probe, "steps") else {}
    triggers = probe(**settings).search(subject, split, np.random.default_rng(0))
    assert {trigger.target_class for trigger in triggers} == set(range(10))
    for trigger in triggers:
        assert isinstance(trigger, Trigger)
        assert trigger.stamp(images).shape == images.shape
        assert trigger.size > 0


@pytest.mark.parametrize("measure", CLASS_MEASURES, ids=lambda check: check.name)
def test_measures_give_one_number_a_class_and_agree_with_themselves(measure, digit_subject):
    (subject, split, _), classes = digit_subject, [7, 1, 4, 2]
    found, again = (measure().measure(subject, split, classes, np.random.default_rng(0)) for _ in range(2))
    assert found.shape == (4,)
    np.testing.assert_array_equal(found, again)
    turned = measure().measure(subject, split, classes[::-1], np.random.default_rng(0))
    np.testing.assert_allclose(turned[::-1], found, rtol=1e-3)
    of_all = measure_classes(measure(), subject, split, 10, np.random.default_rng(0))
    assert of_all.ratios[of_all.most_suspicious] == max(of_all.ratios) >= 1


class Odd(ClassMeasure):
    name = "odd"

    def __init__(self, answer):
        self.answer = answer

    def measure(self, subject, fit_split, classes, rng):
        return np.array(self.answer)


@pytest.mark.parametrize("answer", [[1.0], [1.0, np.nan], [np.inf, 1.0], [[1.0, 2.0]]])
def test_a_measure_that_breaks_the_contract_is_caught(answer, digit_subject):
    with pytest.raises(RuntimeError, match="Odd returned no finite number"):
        measure_classes(Odd(answer), *digit_subject[:2], 2, np.random.default_rng(0))


class Broken(FittedScorer):
    def __init__(self, answer):
        self.answer = answer

    def _score(self, images):
        return self.answer


@pytest.mark.parametrize("answer", [np.zeros(3), np.zeros((2, 1)), np.array([0.0, np.nan]), np.array([np.inf, 0.0])])
def test_a_scorer_that_breaks_the_contract_is_caught(answer):
    with pytest.raises(RuntimeError, match="returned"):
        Broken(answer).score(np.zeros((2, 4, 4, 1), dtype=np.uint8))
