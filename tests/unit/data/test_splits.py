"""Splits: disjoint by content, stratified, and a function of the seed and the set of images alone."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_plugin.data.splits import allocate, content_hashes, split
from audit_plugin.errors import AuditError, CleanSetError, UsageError
from audit_plugin.types import CalibrateSplit, FitSplit, LabelledImages, Splits, TestSplit

Content = tuple[bytes, int]


def numbered(contents: list[int], labels: list[int]) -> LabelledImages:
    """Image k is the number k in base 256, so that equal numbers are equal images."""
    images = np.array([[number % 256, number // 256] for number in contents], np.uint8).reshape(-1, 2, 1, 1)
    return LabelledImages(images, np.array(labels, np.int64))


def contents(part: LabelledImages) -> list[Content]:
    return [(image.tobytes(), int(label)) for image, label in zip(part.images, part.labels, strict=True)]


def parts(splits: Splits) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    return splits.fit, splits.calibrate, splits.test


def same(left: Splits, right: Splits) -> bool:
    return all(contents(a) == contents(b) for a, b in zip(parts(left), parts(right), strict=True))


@st.composite
def clean_sets(draw: st.DrawFn) -> LabelledImages:
    """Two to four classes of 3 to 12 distinct images, some of them repeated, in any order."""
    sizes = draw(st.lists(st.integers(3, 12), min_size=2, max_size=4))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    rows = list(range(len(labels))) + draw(st.lists(st.integers(0, len(labels) - 1), max_size=6))
    rows = draw(st.permutations(rows))
    return numbered(rows, [labels[row] for row in rows])


seeds = st.integers(0, 2**32 - 1)


@given(data=clean_sets(), seed=seeds)
def test_no_image_is_in_two_splits_and_none_is_lost(data: LabelledImages, seed: int) -> None:
    fit, calibrate, test = (contents(part) for part in parts(split(data, seed=seed)))
    together = fit + calibrate + test
    assert len(set(together)) == len(together)
    assert set(together) == set(contents(data))


@given(data=clean_sets(), seed=seeds)
def test_each_class_gives_each_split_its_share_and_at_least_one(data: LabelledImages, seed: int) -> None:
    fractions = (0.5, 0.2, 0.3)
    splits = split(data, seed=seed, fractions=fractions)
    sizes = Counter(label for _, label in set(contents(data)))
    for part, fraction in zip(parts(splits), fractions, strict=True):
        counts = Counter(part.labels.tolist())
        for label, size in sizes.items():
            assert counts[label] >= 1
            assert abs(counts[label] - fraction * size) < 1


@given(data=clean_sets(), seed=seeds)
def test_the_same_seed_gives_the_same_splits(data: LabelledImages, seed: int) -> None:
    assert same(split(data, seed=seed), split(data, seed=seed))


@given(data=clean_sets(), seed=seeds, random=st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(data: LabelledImages, seed: int, random: object) -> None:
    order = list(range(len(data)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert same(split(data, seed=seed), split(LabelledImages(data.images[order], data.labels[order]), seed=seed))


@given(data=clean_sets(), seed=seeds, names=st.permutations(range(4)), offset=st.integers(0, 50))
def test_the_numbering_of_the_classes_does_not_matter(data: LabelledImages, seed: int, names: list[int], offset: int) -> None:
    renamed = np.array(names)[data.labels] + offset
    before, after = split(data, seed=seed), split(LabelledImages(data.images, renamed), seed=seed)
    for old, new in zip(parts(before), parts(after), strict=True):
        np.testing.assert_array_equal(old.images, new.images)
        np.testing.assert_array_equal(np.array(names)[old.labels] + offset, new.labels)


@given(count=st.integers(0, 400), weights=st.tuples(*[st.integers(1, 100)] * 3))
def test_allocation_adds_up_and_stays_near_the_shares(count: int, weights: tuple[int, int, int]) -> None:
    fractions = tuple(weight / sum(weights) for weight in weights)
    counts = allocate(count, fractions)  # type: ignore[arg-type]
    assert sum(counts) == count
    assert min(counts) >= (1 if count >= 3 else 0)
    # Where no share is below one, nothing has to be moved: every count is a share rounded down or up.
    if min(fraction * count for fraction in fractions) >= 1:
        assert all(abs(part - fraction * count) < 1 for part, fraction in zip(counts, fractions, strict=True))


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (10, (5, 2, 3)), (100, (50, 20, 30))]
)
def test_allocation_by_hand(count: int, expected: tuple[int, int, int]) -> None:
    assert allocate(count, (0.5, 0.2, 0.3)) == expected


def test_another_seed_gives_another_split() -> None:
    data = numbered(list(range(60)), [0, 1] * 30)
    assert len({tuple(contents(split(data, seed=seed).fit)) for seed in range(10)}) == 10


def test_every_image_lands_in_every_split_about_as_often_as_its_share() -> None:
    data = numbered(list(range(40)), [0, 1] * 20)
    runs = 400
    hits = Counter(content for seed in range(runs) for content in contents(split(data, seed=seed).fit))
    rates = np.array([hits[content] / runs for content in contents(data)])
    # Six standard deviations of a binomial rate with p = 0.5.
    assert np.abs(rates - 0.5).max() < 6 * np.sqrt(0.25 / runs)


def test_splits_are_types_of_their_own_in_mixed_order() -> None:
    splits = split(numbered(list(range(200)), [0] * 100 + [1] * 100), seed=1)
    assert isinstance(splits.fit, FitSplit)
    assert isinstance(splits.calibrate, CalibrateSplit)
    assert isinstance(splits.test, TestSplit)
    assert [len(part) for part in parts(splits)] == [100, 40, 60]
    for part in parts(splits):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert set(part.labels[: len(part) // 2].tolist()) == {0, 1}


def test_nothing_random_leaks_in_or_out() -> None:
    data = numbered(list(range(30)), [0, 1] * 15)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = split(data, seed=3)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(6)
    assert same(first, split(data, seed=3))


def test_copies_are_dropped_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    data = numbered([0, 1, 2, 3, 4, 5, 0, 0, 3], [0, 0, 0, 1, 1, 1, 0, 0, 1])
    with caplog.at_level(logging.WARNING, logger="audit_plugin.data.splits"):
        splits = split(data, seed=0)
    assert sum(len(part) for part in parts(splits)) == 6
    assert "3 of 9 clean images are copies" in caplog.text


def test_an_image_under_two_labels_is_dropped_altogether() -> None:
    data = numbered([0, 1, 2, 9, 3, 4, 5, 9], [0, 0, 0, 0, 1, 1, 1, 1])
    splits = split(data, seed=0)
    assert sum(len(part) for part in parts(splits)) == 6
    assert all((bytes([9, 0]), label) not in contents(part) for part in parts(splits) for label in (0, 1))


def test_a_single_class_is_refused() -> None:
    with pytest.raises(CleanSetError, match=r"all 12 clean images are of class 4.*add images of the others"):
        split(numbered(list(range(12)), [4] * 12), seed=0)


def test_a_class_with_too_few_images_is_named_with_both_numbers() -> None:
    data = numbered(list(range(9)), [0] * 4 + [1] * 3 + [7] * 2)
    with pytest.raises(CleanSetError, match=r"class 7 has 2; at least 3 are needed"):
        split(data, seed=0)
    with pytest.raises(CleanSetError, match=r"class 1 has 3, class 7 has 2; at least 4 are needed"):
        split(data, seed=0, minimum_per_class=4)
    assert 7 in split(data, seed=0, minimum_per_class=2).fit.labels


def test_copies_do_not_count_towards_the_minimum() -> None:
    data = numbered([0, 1, 2, 3, 3, 3, 4], [0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(CleanSetError, match=r"class 1 has 2 \(of 4; copies count once\)"):
        split(data, seed=0)


def test_many_short_classes_stay_one_line() -> None:
    with pytest.raises(CleanSetError, match=r"class 4 has 1, and 15 more classes; at least 3") as caught:
        split(numbered(list(range(20)), list(range(20))), seed=0)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AuditError)


def test_missing_labels_and_empty_sets_are_refused() -> None:
    with pytest.raises(CleanSetError, match="2 of 4 clean images have no label"):
        split(numbered([0, 1, 2, 3], [0, 1, -1, -1]), seed=0)
    with pytest.raises(CleanSetError, match="got 0 images and 0 labels"):
        split(numbered([], []), seed=0)
    with pytest.raises(CleanSetError, match="got 2 images and 1 labels"):
        split(LabelledImages(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(1, np.int64)), seed=0)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.0), (0.5, 0.2, 0.4), (0.7, 0.6, -0.3), (0.5, 0.5), (1.0, float("nan"), 0.1)])
def test_senseless_fractions_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="three fractions above 0 that sum to 1"):
        split(numbered(list(range(6)), [0, 0, 0, 1, 1, 1]), seed=0, fractions=fractions)


def test_a_senseless_minimum_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        split(numbered(list(range(6)), [0, 0, 0, 1, 1, 1]), seed=0, minimum_per_class=0)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_hashes_agree_exactly_where_images_do(numbers: list[int]) -> None:
    hashes = content_hashes(numbered(numbers, [0] * len(numbers)).images)
    for left in range(len(numbers)):
        for right in range(len(numbers)):
            assert (hashes[left] == hashes[right]) == (numbers[left] == numbers[right])
