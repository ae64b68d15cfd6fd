from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from audit_plugin.maths.rates import auroc, is_within, quantile_threshold, rate, rate_of


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_clopper_pearson(counts):
    successes, trials = counts
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    found = rate(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_a_rate_without_trials_knows_nothing():
    found = rate(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


def test_rate_of_counts_true():
    assert rate_of(np.array([True, False, True, True])).successes == 3


@pytest.mark.parametrize("wanted", [0.01, 0.05, 0.2])
def test_quantile_threshold_keeps_its_promise_on_average(wanted):
    # Split conformal: over calibration draws, a new score exceeds the cut with probability at most `wanted`. 4,000 repetitions
    # put three standard errors at 3 * sqrt(0.2 * 0.8 / 4000) = 0.019 for the largest rate.
    rng = np.random.default_rng(0)
    exceeded = [rng.normal() > quantile_threshold(rng.normal(size=120).astype(np.float32), wanted) for _ in range(4000)]
    assert np.mean(exceeded) <= wanted + 3 * math.sqrt(wanted * (1 - wanted) / 4000)
    assert np.mean(exceeded) >= wanted - 1 / 121 - 3 * math.sqrt(wanted * (1 - wanted) / 4000)


def test_quantile_threshold_by_hand():
    scores = np.arange(1, 100, dtype=np.float32)  # n = 99: rank ceil(100 * 0.95) = 95
    assert quantile_threshold(scores, 0.05) == 95.0


def test_quantile_threshold_refuses_what_it_cannot_promise():
    with pytest.raises(ValueError, match=r"18 calibration images .* at least 19"):
        quantile_threshold(np.zeros(18, dtype=np.float32), 0.05)
    assert quantile_threshold(np.arange(19, dtype=np.float32), 0.05) == 18.0


@pytest.mark.parametrize("impossible", [0.0, 1.0, -0.1])
def test_quantile_threshold_refuses_impossible_rates(impossible):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        quantile_threshold(np.zeros(100, dtype=np.float32), impossible)


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=40)  # few values, many ties


@given(scores, scores)
def test_auroc_is_that_of_scikit_learn_ties_included(clean, attacked):
    negatives, positives = np.array(clean, np.float32), np.array(attacked, np.float32)
    truth = np.repeat([0, 1], [len(clean), len(attacked)])
    assert auroc(negatives, positives) == pytest.approx(roc_auc_score(truth, np.concatenate([negatives, positives])), abs=1e-12)
    assert auroc(negatives, positives) + auroc(positives, negatives) == pytest.approx(1.0, abs=1e-12)


def test_auroc_depends_on_the_order_alone():
    rng = np.random.default_rng(0)
    negatives, positives = rng.normal(size=300).astype(np.float32), rng.normal(1.0, size=200).astype(np.float32)
    expected = auroc(negatives, positives)
    assert auroc(np.exp(negatives), np.exp(positives)) == pytest.approx(expected, abs=1e-12)
    assert auroc(negatives[::-1], positives) == expected


def test_auroc_of_what_is_apart_and_of_what_is_alike():
    ones, zeros = np.ones(5, np.float32), np.zeros(3, np.float32)
    assert (auroc(zeros, ones), auroc(ones, zeros), auroc(ones, ones)) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize(("negatives", "positives"), [(0, 2), (2, 0), (0, 0)])
def test_auroc_needs_scores_of_both_kinds(negatives, positives):
    with pytest.raises(ValueError, match=f"scores of both kinds, got {negatives} and {positives}"):
        auroc(np.zeros(negatives, np.float32), np.zeros(positives, np.float32))


def test_a_fall_of_exactly_the_budget_is_within_it():
    for number in range(11, 101):
        for dtype in (float, np.float32):
            before, after, less = (float(dtype(count / 100)) for count in (number, number - 3, number - 4))
            assert is_within(before, after, 0.03)
            assert not is_within(before, less, 0.03)
    assert is_within(0.5, 0.9, 0.0)
