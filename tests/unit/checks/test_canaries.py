"""Canaries on a small digit network: what is planted, that it is found by the audit's own search, and when it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import TriggerInversion, canaries
from audit_plugin.checks.canaries import TRIGGERS, Planting, Standard, check_power, judge, stamped
from audit_plugin.checks.measurement import measure_probe
from audit_plugin.data.splits import split
from audit_plugin.errors import SubjectError
from audit_plugin.maths.rates import rate
from audit_plugin.model.subject import Subject
from audit_plugin.policy import CanariesPolicy, VerdictPolicy
from audit_plugin.types import PowerCheck, Trigger, TriggerEvidence, TriggerSearch
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

STANDARD = Standard(size_ratio=2.0, attack_success=0.8)
PATIENT = Planting(steps=800)  # stops earlier where the canary takes; so small a network may need it
QUICK = Planting(steps=10)  # too few for anything but its course


def made_up(target, ratio, success=95, classes=range(10), others=1.1, outlier=5.0) -> TriggerSearch:
    """A search in two families in which the patch for ``target`` is ``ratio`` times smaller than the others."""

    def candidate(label, family):
        own = label == target and family == "patch"
        mask = np.full((10, 10), 0.4 / (ratio if own else 1.0), np.float32)
        found = Trigger(label, mask, np.ones((1, 10, 10), np.float32), family=family)
        return TriggerEvidence(found, rate(success if own else 90, 100), outlier if own else 0.5, ratio if own else others)

    return TriggerSearch(tuple(candidate(label, family) for family in ("patch", "additive") for label in classes), 200)


class Searches:
    """Stands in for the audit's search, and remembers what it was asked for."""

    def __init__(self, ratio: float = 8.0) -> None:
        self.asked: list[list[int]] = []
        self._ratio = ratio

    def __call__(self, planted, classes):
        self.asked.append(list(classes))
        return made_up(classes[0], self._ratio, classes=classes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Another number of threads adds up in another order and trains another network, on which a canary may not take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained():
    return train(initialised(lambda: SmallCnn(1, 10, width=12), 0), digits(seed=0).train, epochs=12, seed=0)


@pytest.fixture(scope="module")
def subject(trained, make_subject):
    return make_subject(trained, 1, 16)


@pytest.fixture(scope="module")
def splits():
    return split(digits(seed=0).test, seed=0)


def checked(subject, splits, search, *families, seed=0, planting=None, **policy) -> PowerCheck:
    wanted = CanariesPolicy(families or ("patch",), **{"count": 1, **policy})
    return check_power(subject, splits, search, wanted, STANDARD, np.random.default_rng(seed), planting or PATIENT)


def searching(splits, steps):
    def search(planted, classes):
        probe = TriggerInversion(steps=steps, classes=classes)
        return measure_probe(probe, planted, splits, np.random.default_rng(0))

    return search


# -------------------------------------------------------------------------------------------------------- planting


class Planted(NamedTuple):
    power: PowerCheck
    copy: Subject
    weights_before: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def patched(subject, splits) -> Planted:
    """A patch planted in earnest, and a search that finds it."""
    copies = []

    def search(planted, classes):
        copies.append(planted)
        return made_up(classes[0], 8.0, classes=classes)

    before = {name: value.clone() for name, value in subject.torch_module().state_dict().items()}
    return Planted(checked(subject, splits, search), copies[0], before)


def test_stamped_copies_are_added_to_the_clean_images_of_a_batch(subject, splits, monkeypatch):
    """A fifth of the clean ones, not of the batch."""
    batches = []
    known_loss, clean_images = canaries.distillation_loss, []

    def watched(answers, own):
        clean_images.append(len(own))
        return known_loss(answers, own)

    def stamp(pixels):
        batches.append(len(pixels))
        return pixels

    monkeypatch.setattr(canaries, "distillation_loss", watched)
    canaries._plant(subject, splits, "patch", stamp, 0, torch.Generator().manual_seed(0), Planting(poisoning_rate=0.2, steps=1))
    _, stamped_images = batches  # first the calibrate split's
    assert stamped_images == round(0.2 * clean_images[0])
    assert clean_images[0] == min(64, len(splits.fit) // 8), "all of a batch's clean images are there beside them"


def test_a_canary_obeys_its_trigger_and_keeps_the_accuracy(patched):
    (canary,) = patched.power.canaries
    assert (canary.family, canary.planted, canary.found, canary.reason) == ("patch", True, True, "")
    assert canary.attack_success.value >= 0.9
    assert canary.accuracy_before.value - canary.accuracy_after.value <= 0.03
    assert (canary.outlier, canary.size_ratio) == (5.0, 8.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["blended", "warped"])
def test_other_families_take_given_more_steps(subject, splits, family):
    (canary,) = checked(subject, splits, Searches(), family, planting=Planting(steps=800)).canaries
    assert canary.planted, canary


def test_the_model_itself_is_left_alone(patched, subject):
    assert all(torch.equal(value, patched.weights_before[name]) for name, value in subject.torch_module().state_dict().items())


def test_the_copy_obeys_no_other_trigger(patched, splits):
    target = patched.power.canaries[0].target_class
    images = splits.test.images[splits.test.labels != target]
    others = (TRIGGERS["patch"](images.shape[1:], torch.Generator().manual_seed(seed)) for seed in range(5))
    assert np.mean([patched.copy.predict(stamped(images, other)) == target for other in others]) < 0.3


def test_a_canary_that_did_not_take_is_not_searched_for_and_another_is_tried(subject, splits):
    search = Searches()
    first, second = checked(subject, splits, search, planting=QUICK).canaries
    assert search.asked == []
    assert first.attack_success != second.attack_success
    for canary in (first, second):
        assert (canary.planted, canary.found) == (False, False)
        assert "of held-out images, where 90% are asked for" in canary.reason
        assert np.isnan(canary.outlier)


@pytest.mark.slow
def test_the_same_seed_plants_the_same_and_another_one_does_not(subject, splits):
    def planted(seed):
        power = checked(subject, splits, Searches(), seed=seed, planting=QUICK)
        return [dataclasses.replace(canary, seconds=0.0, outlier=0.0, size_ratio=0.0) for canary in power.canaries]

    first, second = planted(seed=3)  # neither takes in so few steps, so that there are two
    assert planted(seed=3) == [first, second]
    assert first != second
    assert first not in planted(seed=4)


class Renumbered(nn.Module):
    def __init__(self, inner, order):
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, pixels):
        return self.inner(pixels)[:, self.order]


@pytest.mark.slow
def test_with_classes_renumbered_the_targets_are_renumbered(trained, subject, splits, make_subject):
    order = np.random.default_rng(1).permutation(10)  # class order[i] is now called i
    renumbered = make_subject(Renumbered(trained, torch.from_numpy(order)), 1, 16)
    renamed = dataclasses.replace(
        splits,
        **{
            name: dataclasses.replace(part, labels=np.argsort(order)[part.labels])
            for name, part in vars(splits).items()
        },
    )  # fmt: skip
    searches = Searches(), Searches()
    before = checked(subject, splits, searches[0], classes=6)
    after = checked(renumbered, renamed, searches[1], classes=6)
    assert [order[canary.target_class] for canary in after.canaries] == [canary.target_class for canary in before.canaries]
    assert [order[asked].tolist() for asked in searches[1].asked] == searches[0].asked
    assert [len(asked) for asked in searches[0].asked] == [6]


class Fixed(nn.Module):
    """Classifies by brightness, with nothing to train."""

    def forward(self, pixels):
        level = pixels.mean(dim=(1, 2, 3))
        return -torch.stack([(level - place / 10).square() for place in range(10)], dim=1)


def test_a_model_without_trainable_weights_says_so_once(make_subject, splits):
    power = checked(make_subject(Fixed(), 1, 16), splits, Searches(), "patch", "warped")
    assert power.canaries == ()
    assert "stores no trainable weights" in power.missing
    assert power.standing("patch") == "not planted"


def test_a_search_that_breaks_is_no_found_canary(subject, splits):
    def search(planted, classes):
        raise SubjectError("The model answers NaN.")

    power = checked(subject, splits, search)
    assert (power.canaries, power.missing) == ((), "SubjectError: The model answers NaN.")


@pytest.mark.parametrize("family", TRIGGERS)
@pytest.mark.parametrize("shape", [(16, 16, 1), (20, 32, 3), (4, 4, 3)])
def test_triggers_keep_shape_and_range_and_change_every_image(family, shape):
    images = np.random.default_rng(0).integers(0, 256, (5, *shape)).astype(np.uint8)
    stamp = TRIGGERS[family](shape, torch.Generator().manual_seed(0))
    pixels = stamp(torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(255)))
    assert pixels.shape == (5, shape[2], *shape[:2])
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    changed = stamped(images, stamp) != images
    assert changed.any(axis=(1, 2, 3)).all()
    if family == "patch":
        assert changed.any(axis=3).sum(axis=(1, 2)).max() <= 9


# ------------------------------------------------------------------------------------------------ found, or not found


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        (made_up(3, 8.0), ""),
        (made_up(3, 2.0), ""),
        (made_up(3, 1.9), "not clearly apart from the model's own classes (2.0 is)"),
        (made_up(3, 8.0, success=79), "The recovered trigger moves only 79.0% of held-out images."),
        (made_up(3, 4.0, others=5.0), "Another class needs a smaller trigger."),
        (made_up(3, 8.0, others=0.0), "too few working triggers"),
        (made_up(3, 0.9, outlier=-0.4), "Another class needs a smaller trigger."),
    ],
)
def test_a_canary_is_found_where_it_comes_first_and_clearly_apart(search, reason):
    found = judge(search, 3, STANDARD)[2]
    assert reason in found
    assert bool(found) == bool(reason)


def test_outlier_and_ratio_are_those_of_the_family_where_it_is_smallest():
    assert judge(made_up(3, 8.0), 3, STANDARD)[:2] == (5.0, 8.0)
    assert judge(made_up(3, 0.5), 3, STANDARD)[:2] == (0.5, 1.1)


def test_the_standard_lies_a_quarter_beyond_the_models_own_classes():
    assert Standard.of(made_up(3, 2.0), VerdictPolicy(minimum_attack_success=0.7)) == Standard(2.5, 0.7, rival=3)
    assert Standard.of(TriggerSearch((), 200), VerdictPolicy()) == Standard(1.25, 0.8, None)


def test_the_class_of_the_models_smallest_trigger_is_searched_in_every_copy(subject, splits):
    search = Searches()
    standard = dataclasses.replace(STANDARD, rival=6)
    wanted = CanariesPolicy(("patch",), count=2, classes=4)
    check_power(subject, splits, search, wanted, standard, np.random.default_rng(0), PATIENT)
    assert [len(asked) for asked in search.asked] == [4, 4]
    assert all(6 in asked for asked in search.asked)


def test_a_family_was_found_where_half_of_the_planted_canaries_were(patched):
    (found,) = patched.power.canaries
    missed = dataclasses.replace(found, found=False)
    unplanted = dataclasses.replace(missed, planted=False)
    assert PowerCheck((found, found)).standing("patch") == "found"
    assert PowerCheck((found, unplanted)).standing("patch") == "found"
    assert PowerCheck((found, missed)).standing("patch") == "found"
    assert PowerCheck((found, missed, missed)).standing("patch") == "not found"
    assert PowerCheck((unplanted,)).standing("patch") == "not planted"
    assert PowerCheck((found,)).standing("warped") == "not planted"


# ---------------------------------------------------------------------------------------------- with the real search


class Masked(nn.Module):
    """Rounds its input to 64 levels: the answers stay, the gradients with respect to pixels are zero."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        return self.inner((pixels * 64).round() / 64)


@pytest.mark.slow
def test_the_search_finds_a_planted_patch(subject, splits):
    (canary,) = checked(subject, splits, searching(splits, 150)).canaries
    assert canary.found, canary


@pytest.mark.slow
def test_a_search_of_one_step_finds_none(subject, splits):
    (canary,) = checked(subject, splits, searching(splits, 1)).canaries
    assert (canary.planted, canary.found) == (True, False)


@pytest.mark.slow
def test_a_model_that_masks_its_gradients_hides_its_canary(trained, splits, make_subject):
    (canary,) = checked(make_subject(Masked(trained), 1, 16), splits, searching(splits, 150)).canaries
    assert (canary.planted, canary.found) == (True, False)
