"""The zoo's attack changes what it says and nothing else; its training repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audit_plugin.types import LabelledImages
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train


@pytest.fixture
def data() -> LabelledImages:
    rng = np.random.default_rng(0)
    return LabelledImages(rng.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8), np.arange(200) % 10)


def test_stamp_changes_the_corner_alone_and_not_its_input(data: LabelledImages) -> None:
    before = data.images.copy()
    stamped = BadNets(target_class=3).stamp(data.images)
    np.testing.assert_array_equal(data.images, before)
    np.testing.assert_array_equal(stamped[:, -2:, -2:, 0], np.broadcast_to([[255, 0], [0, 255]], (200, 2, 2)))
    stamped[:, -2:, -2:] = before[:, -2:, -2:]
    np.testing.assert_array_equal(stamped, before)


def test_margin_moves_the_patch_inwards(data: LabelledImages) -> None:
    changed = (BadNets(target_class=3, size=3, margin=2).stamp(data.images) != data.images).any(axis=(0, 3))
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 5, 3, 5)


def test_patch_larger_than_the_image_is_an_error(data: LabelledImages) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        BadNets(target_class=3, size=8, margin=1).stamp(data.images)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_poisoning_rate_lies_between_nought_and_one(rate: float) -> None:
    with pytest.raises(ValueError, match="poisoning_rate"):
        BadNets(target_class=3, poisoning_rate=rate)


def test_poison_relabels_its_share_of_the_other_classes(data: LabelledImages) -> None:
    attack = BadNets(target_class=3, poisoning_rate=0.1)
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    assert relabelled.sum() == 20
    assert (poisoned.labels[relabelled] == 3).all()
    np.testing.assert_array_equal(poisoned.images[relabelled], attack.stamp(data.images[relabelled]))
    np.testing.assert_array_equal(poisoned.images[~relabelled], data.images[~relabelled])


def test_digits_are_split_without_overlap_and_the_same_for_a_seed() -> None:
    first, again, other = digits(seed=0), digits(seed=0), digits(seed=1)
    assert len(first.train) + len(first.test) == 1797
    assert first.train.images.shape[1:] == (16, 16, 1)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.labels, other.train.labels)
    assert set(first.test.labels.tolist()) == set(range(10))


def test_training_moves_the_weights_and_repeats_itself(data: LabelledImages) -> None:
    bright = LabelledImages((data.images // 8 + (data.labels * 22)[:, None, None, None]).astype(np.uint8), data.labels)
    shares: list[float] = []
    state = torch.random.get_rng_state()
    models = [initialised(lambda: SmallCnn(1, 10, width=4), 0) for _ in range(3)]
    first, second = (train(model, bright, epochs=2, seed=0, progress=shares.append) for model in models[:2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert shares == [0.5, 1.0, 0.5, 1.0]
    assert not first.training
    assert not torch.equal(first.classifier.weight, models[2].classifier.weight)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
