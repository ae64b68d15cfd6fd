"""Clean images that somebody mislabelled, exchanged or stamped on purpose, so that an audit sees something else.

No advisory: see "What is not closed" in the threat model for what remains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.audit import audit
from audit_plugin.data.expectations import check_clean_set
from audit_plugin.data.splits import content_hashes, split
from audit_plugin.data.stability import FOLDS, LEVEL, contradicted, excess_p_values, folds_of, most_contradicted
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.policy import policy_from
from audit_plugin.types import ImageArray, InputSpec, LabelArray, LabelledImages, ModelRef, Verdict
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.policies import FAST

NAMES = tuple("0123456789")
SPEC = InputSpec(16, 16, 1)
ATTACK = BadNets(target_class=7, poisoning_rate=0.05)

Poisoning = Callable[[ImageArray, LabelArray, np.random.Generator], tuple[ImageArray, LabelArray]]


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    data = ATTACK.poison(digits(seed=0).train, np.random.default_rng(0))
    return train(initialised(lambda: SmallCnn(channels=1, classes=10, width=12), 0), data, epochs=20, seed=0).eval()


def broken(network: nn.Module, images: ImageArray, labels: LabelArray) -> set[str]:
    """Names of the required expectations that the model's answers on these images do not meet."""
    with torch.no_grad():
        scores = network(torch.from_numpy(to_pixels(images))).numpy()
    ranked = np.sort(scores, axis=1)
    results = check_clean_set(
        LabelledImages(images, labels),
        class_names=NAMES,
        predictions=scores.argmax(axis=1),
        input_spec=SPEC,
        minimum_images_per_class=2,
        minimum_clean_accuracy=0.5,
        margins=ranked[:, -1] - ranked[:, -2],
    )
    return {result.name for result in results if result.required and not result.success}


def as_it_is(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    return images, labels


def shuffled_labels(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    wrong = rng.random(len(labels)) < 0.25
    return images, np.where(wrong, rng.permutation(labels), labels)


def exchanged_classes(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    return images, np.where(labels == 3, 4, np.where(labels == 4, 3, labels))


def class_of_noise(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    noise = rng.integers(0, 256, images.shape, dtype=np.uint8)
    return np.where((labels == 3)[:, None, None, None], noise, images), labels


def class_of_others(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    others = images[rng.choice(np.flatnonzero(labels != 3), len(images))]
    return np.where((labels == 3)[:, None, None, None], others, images), labels


def late_part(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    """A tenth that was appended later, with labels of another numbering."""
    late = np.arange(len(labels)) >= 0.9 * len(labels)
    return images, np.where(late, (labels + 1) % 10, labels)


def triggers(images: ImageArray, labels: LabelArray, rng: np.random.Generator) -> tuple[ImageArray, LabelArray]:
    stamped = rng.random(len(labels)) < 0.2
    return np.where(stamped[:, None, None, None], ATTACK.stamp(images), images), labels


@pytest.mark.parametrize(
    ("poison", "expected"),
    [
        (as_it_is, set()),
        (shuffled_labels, {"labels-not-contradicted"}),
        (exchanged_classes, {"errors-even-over-classes", "labels-not-contradicted"}),
        (class_of_noise, {"errors-even-over-classes"}),
        (class_of_others, {"errors-even-over-classes", "labels-not-contradicted"}),
        (late_part, {"errors-even-over-folds", "labels-not-contradicted"}),
        (triggers, {"labels-not-contradicted"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_poisoned_set_breaks_a_required_expectation(poison: Poisoning, expected: set[str], backdoored: nn.Module) -> None:
    test = digits(seed=0).test
    found = broken(backdoored, *poison(test.images, test.labels, np.random.default_rng(1)))
    assert found >= expected
    assert bool(found) == bool(expected)


def test_triggers_under_the_target_label_are_not_seen(backdoored: nn.Module) -> None:
    """The stated limit: here model and labels agree, and nothing in the answers tells."""
    test = digits(seed=0).test
    stamped = np.random.default_rng(1).random(len(test)) < 0.1
    images = np.where(stamped[:, None, None, None], ATTACK.stamp(test.images), test.images)
    assert broken(backdoored, images, np.where(stamped, ATTACK.target_class, test.labels)) == set()


@pytest.mark.parametrize(
    "poison", [triggers, *(pytest.param(way, marks=pytest.mark.slow) for way in (shuffled_labels, exchanged_classes, late_part))]
)
def test_the_audit_is_inconclusive_then(poison: Poisoning, backdoored: nn.Module, tmp_path: Path) -> None:
    """On a backdoored model too: what is measured on such images proves nothing either way."""
    folder = tmp_path / "model"
    folder.mkdir()
    program = torch.export.export(backdoored, (torch.rand(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    test = digits(seed=0).test
    images, labels = poison(test.images, test.labels, np.random.default_rng(1))
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    manifest = manifest_of(folder)
    policy = policy_from(
        {
            **FAST,
            "scoring": {"checks": ["activation_norm"]},
            "trigger_inversion": {"steps": 60, "searches": 1},
        }
    )
    report = audit(ModelRef("model", "model", digest_of(manifest), manifest), folder, tmp_path / "clean.npz", policy=policy)
    assert report.decision.verdict is Verdict.INCONCLUSIVE
    assert any(reason.code.startswith("clean-set-") for reason in report.decision.reasons)


# ------------------------------------------------------------------------------------------------ honest sets pass


def honest_errors(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Binomial errors of a model that finds one class three times as hard as the others, from 3 to 60 images a class."""
    counts = rng.integers(3, 61, groups)
    rates = np.full(groups, rng.choice([0.0, 0.01, 0.05, 0.1, 0.2]))
    rates[rng.integers(groups)] *= 3
    return rng.binomial(counts, rates), counts


@pytest.mark.parametrize("groups", [FOLDS, 10, 43])
def test_fewer_than_one_honest_set_in_a_hundred_is_flagged(groups: int) -> None:
    rng = np.random.default_rng(groups)
    flagged = 0
    for _ in range(1_000):
        errors, counts = honest_errors(rng, groups)
        flagged += bool((excess_p_values(errors, counts) < LEVEL / groups).any())
    assert flagged < 10


@pytest.mark.parametrize("error_rate", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("count", [30, 300])
def test_fewer_than_one_honest_set_in_a_hundred_contradicts_its_labels(error_rate: float, count: int) -> None:
    """Errors of which 7 % are surer than the median right answer: the most that the measured networks had."""
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(1_000):
        wrong = rng.random(count) < error_rate
        sure = wrong & (rng.random(count) < 0.07)
        margins = np.where(wrong, np.where(sure, 9.0, 0.1), rng.random(count) + 1)
        share = contradicted(np.zeros(count, int), wrong.astype(int), margins).mean()
        flagged += bool(share > most_contradicted(count, wrong.mean()))
    assert flagged < 10


def test_a_class_that_is_wrong_altogether_is_found_from_five_images_on() -> None:
    for count, found in ((4, False), (5, True)):
        errors, counts = np.full(10, 1), np.full(10, 30)
        errors[2] = counts[2] = count
        assert bool(excess_p_values(errors, counts)[2] < LEVEL / 10) is found


def test_empty_groups_and_perfect_models_are_no_exception() -> None:
    values = excess_p_values(np.array([0, 0, 0]), np.array([5, 0, 7]))
    assert np.isnan(values).tolist() == [False, True, False]
    assert (values[[0, 2]] == 1).all()


def test_folds_cut_each_class_in_its_order() -> None:
    labels = np.array([0] * 10 + [1] * 3)
    assert folds_of(labels).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 1, 3]


def test_a_model_that_is_never_right_contradicts_everything() -> None:
    assert contradicted(np.zeros(4, int), np.ones(4, int), np.ones(4)).all()


def test_copies_reach_one_split_only() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    parts = split(LabelledImages(np.concatenate([images, images, images]), np.tile(np.arange(40) % 4, 3)), seed=0)
    hashes = [set(content_hashes(part.images)) for part in (parts.fit, parts.calibrate, parts.test)]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 40
