from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from audit_plugin.maths.rates import quantile_threshold, rate, rate_of


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
