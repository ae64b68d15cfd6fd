from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from audit_plugin.maths.outlier import (
    NOISE_SPREAD,
    PAIR_SPREAD_FLOOR,
    SPREAD_FLOOR,
    USUAL_SPREAD,
    class_outliers,
    others_ratios,
    pair_outliers,
    size_ratios,
    small_side_outliers,
)

sizes = st.lists(st.floats(0.1, 1e4), min_size=4, max_size=40).map(np.array)


def test_against_scipy_when_the_median_absolute_deviation_is_the_largest_spread():
    values = np.exp(np.concatenate([np.full(10, 1.0), np.full(10, 5.0), [3.0]]))  # two heaps: MAD exceeds the deviation
    spread = stats.median_abs_deviation(np.log(values), scale="normal")
    assert spread > np.log(values).std(ddof=1) > SPREAD_FLOOR
    # scipy's 'normal' scale has more digits than 1.4826
    np.testing.assert_allclose(small_side_outliers(values), (np.median(np.log(values)) - np.log(values)) / spread, rtol=1e-4)


def test_the_class_itself_does_not_widen_the_spread_it_is_judged_by():
    values = np.array([30.0, 35, 40, 45, 50, 55, 60, 65, 70, 1.0])
    expected = (np.median(np.log(values)) - np.log(1.0)) / max(
        np.log(values[:9]).std(ddof=1), stats.median_abs_deviation(np.log(values), scale="normal")
    )
    assert small_side_outliers(values)[9] == pytest.approx(expected, rel=1e-4)


@given(sizes, st.floats(0.01, 100))
def test_only_ratios_count(values, factor):
    np.testing.assert_allclose(small_side_outliers(values * factor), small_side_outliers(values), atol=1e-6)


@given(sizes)
def test_the_smallest_is_the_greatest_outlier(values):
    outliers = small_side_outliers(values)
    assert outliers[values.argmin()] == pytest.approx(outliers.max(), rel=1e-9)
    assert outliers.max() >= 0


@given(sizes, st.randoms())
def test_order_of_classes_does_not_matter(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    np.testing.assert_allclose(small_side_outliers(values[order]), small_side_outliers(values)[order], atol=1e-9)


def test_equal_sizes_are_no_outliers_and_the_floor_bounds_small_differences():
    assert np.all(small_side_outliers(np.full(10, 40.0)) == 0)
    almost = np.full(10, 40.0)
    almost[3] = 30.0  # with a median absolute deviation of zero this would be infinitely far out
    assert small_side_outliers(almost)[3] == pytest.approx(np.log(40 / 30) / SPREAD_FLOOR)


def test_a_class_without_a_trigger_is_never_suspicious():
    values = np.array([40.0, np.inf, 38.0, 42.0, 4.0])
    outliers = small_side_outliers(values)
    assert outliers[1] == -np.inf
    assert outliers.argmax() == 4


@pytest.mark.parametrize("statistic", [small_side_outliers, size_ratios, class_outliers])
def test_classes_that_cannot_be_reached_hide_no_other(statistic):
    """Else a model that resists every trigger but the attacker's, and those of a few classes, would show no outlier."""
    all_reached = np.array([11.0, 28.0, 30.0, 32.0, 34.0, 200.0, 200.0, 200.0, 200.0, 200.0])
    half_reached = np.where(all_reached < 200, all_reached, np.inf)
    expected = np.where(all_reached < 200, statistic(all_reached), 0.0 if statistic is size_ratios else -np.inf)
    np.testing.assert_allclose(statistic(half_reached, tried=all_reached), expected)
    assert statistic(half_reached)[0] >= statistic(half_reached[:5])[0]


def test_two_sizes_tell_nothing():
    assert small_side_outliers(np.array([1.0, 100.0])).tolist() == [0.0, 0.0]
    assert small_side_outliers(np.array([1.0, np.inf, np.inf])).tolist() == [0.0, -np.inf, -np.inf]


def pair_sizes(seed=0, classes=8):
    """Sizes that are a row effect times a column effect, but for noise: what clean classes would give."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(0, 0.6, (classes, 1)) + rng.normal(0, 0.6, (1, classes)) + rng.normal(3, 0.1, (classes, classes))
    np.fill_diagonal(logs, np.nan)
    return np.exp(logs)


def test_a_planted_pair_stands_out_against_its_row_and_column():
    sizes = pair_sizes()
    assert np.nanmax(pair_outliers(sizes)) < 3
    sizes[2, 5] /= 8
    found = pair_outliers(sizes)
    assert np.unravel_index(found.argmax(), found.shape) == (2, 5)
    assert found[2, 5] > 5


def test_a_backdoored_column_is_no_pair():
    sizes = pair_sizes()
    sizes[:, 3] /= 20  # all to one: every source needs little for class 3
    assert np.nanmax(pair_outliers(sizes)) < 3


def test_all_to_all_stands_out_in_every_row():
    sizes = pair_sizes()
    planted = [(row, (row + 1) % 8) for row in range(8)]
    for pair in planted:
        sizes[pair] /= 8
    found = pair_outliers(sizes)
    assert {tuple(np.unravel_index(index, found.shape)) for index in np.argsort(found, axis=None)[-8:]} == set(planted)


def test_pairs_by_hand():
    logs = np.log(np.array([[np.nan, 4.0, 4, 4], [4, np.nan, 4, 1], [4, 4, np.nan, 4], [4, 4, 4, np.nan]]))
    found = pair_outliers(np.exp(logs))
    assert found[1, 3] == pytest.approx(np.log(4) / PAIR_SPREAD_FLOOR)
    assert found[0, 1] == pytest.approx(0)
    assert np.isneginf(np.diag(found)).all()


def test_pairs_without_a_trigger_or_with_too_few_others_are_never_suspicious():
    sizes = pair_sizes()
    sizes[0, 1] = np.inf
    assert pair_outliers(sizes)[0, 1] == -np.inf
    assert np.isneginf(pair_outliers(np.full((3, 3), 2.0))).all()


# ------------------------------------------------------------------------------------------------ sizes and margins


def test_a_ratio_compares_with_the_other_classes_alone():
    ratios = size_ratios(np.array([5.0, 20.0, 40.0]))
    np.testing.assert_allclose(ratios, [np.sqrt(20 * 40) / 5, np.sqrt(5 * 40) / 20, np.sqrt(5 * 20) / 40])
    assert size_ratios(np.array([5.0])).tolist() == [1.0]


def test_a_class_that_was_not_reached_counts_as_large():
    sizes = np.array([5.0, 20.0, np.inf])
    np.testing.assert_allclose(size_ratios(sizes), [4.0, 0.5, 0.0])  # as the largest that works
    np.testing.assert_allclose(size_ratios(sizes, np.array([1.0, 1.0, 80.0])), [8.0, 1.0, 0.0])  # or larger, if that was tried
    np.testing.assert_allclose(size_ratios(sizes, np.array([1.0, 1.0, 3.0])), [4.0, 0.5, 0.0])
    assert size_ratios(np.full(3, np.inf)).tolist() == [0.0, 0.0, 0.0]


def test_a_margin_is_compared_with_the_largest_other():
    np.testing.assert_allclose(others_ratios(np.array([10.0, 40.0, 20.0])), [0.25, 2.0, 0.5])
    assert others_ratios(np.array([-1.0, 3.0, -2.0])).tolist() == [0.0, 100.0, 0.0]
    assert others_ratios(np.array([-1.0, -3.0])).tolist() == [0.0, 0.0]


def test_size_and_margin_multiply():
    values = np.array([25.0, 30, 35, 14, 40, 45, 50, 55, 60, 40])
    margins = np.full(10, 30.0)
    margins[3] = 60.0
    # Neither the size, 40 / 14 of the median, nor the margin would be a failure's 3.5 alone.
    assert class_outliers(values, others_ratios(margins))[3] == pytest.approx(np.log(40 / 14 * 2) / USUAL_SPREAD)
    assert class_outliers(values)[3] < 3.5 < class_outliers(values, others_ratios(margins))[3]


@pytest.mark.parametrize("size", [60.0, 40.0, 39.4, 30.0, 22.0])
def test_a_margin_counts_at_most_as_much_as_the_trigger(size):
    values, margins = np.full(10, 40.0), np.full(10, 30.0)
    values[3], margins[3] = size, 1e6
    expected = max(0.0, 2 * np.log(40 / size)) / USUAL_SPREAD
    assert class_outliers(values, others_ratios(margins))[3] <= max(expected, np.log(40 / size) / SPREAD_FLOOR) + 1e-9
    assert class_outliers(values, others_ratios(margins))[3] < 3.5


def test_a_decoys_margin_does_not_hide_the_true_target():
    values = np.array([40.0, 22, 70, 26, 55, 30, 90, 9, 60, 25])
    margins = np.full(10, 30.0)
    margins[7], margins[3] = 75.0, 300.0
    assert class_outliers(values, others_ratios(margins)).argmax() == 7


@given(sizes)
def test_with_equal_margins_a_class_stands_out_no_less_than_by_its_size(values):
    outliers = class_outliers(values, others_ratios(np.full(len(values), 7.0)))
    assert (outliers >= small_side_outliers(values) - 1e-9).all()
    np.testing.assert_allclose(outliers, class_outliers(values), atol=1e-9)


@given(sizes, st.floats(0.01, 100), st.floats(0.01, 100), st.randoms())
def test_only_ratios_of_sizes_and_margins_count_and_no_order(values, size_factor, margin_factor, random):
    margins = np.array([random.uniform(1, 50) for _ in values])
    order = np.array(random.sample(range(len(values)), len(values)))
    expected = class_outliers(values, others_ratios(margins))
    np.testing.assert_allclose(class_outliers(values * size_factor, others_ratios(margins * margin_factor)), expected, atol=1e-6)
    np.testing.assert_allclose(class_outliers(values[order], others_ratios(margins[order])), expected[order], atol=1e-9)


def test_a_class_without_a_trigger_stands_out_by_no_margin():
    assert class_outliers(np.array([40.0, np.inf, 38.0, 42.0]), others_ratios(np.array([1.0, 90.0, 1.0, 1.0])))[1] == -np.inf


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
def test_a_class_stands_out_by_noise_alone_whatever_its_trigger(ratio):
    noise = np.full(10, 0.3)
    noise[3] = ratio
    for size in (40.0, 400.0, np.inf):  # usual, large, none found
        values = np.full(10, 40.0)
        values[3] = size
        by_size = class_outliers(values)[3]
        assert class_outliers(values, None, noise)[3] == pytest.approx(max(np.log(ratio) / NOISE_SPREAD, by_size))


@given(sizes)
def test_with_equal_noise_triggers_alone_say_who_stands_out(values):
    outliers = class_outliers(values, None, others_ratios(np.full(len(values), 3.0)))
    np.testing.assert_allclose(outliers, np.maximum(class_outliers(values), 0.0), atol=1e-12)
