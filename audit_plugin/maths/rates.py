"""Proportions with their intervals, thresholds with a stated false-positive rate, and the area under the ROC curve."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from audit_plugin.types import FloatArray, Rate

_ROUNDING = 1e-6  # of a difference of two proportions, in single precision too


def rate(successes: int, trials: int, confidence: float = 0.95) -> Rate:
    """A proportion with its Clopper-Pearson interval (exact, never too narrow); without trials it is NaN in [0, 1]."""
    if trials == 0:
        return Rate(math.nan, 0, 0, 0.0, 1.0)
    tail = (1.0 - confidence) / 2.0
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1.0 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return Rate(successes / trials, int(successes), int(trials), float(low), float(high))


def rate_of(flags: NDArray[np.bool_]) -> Rate:
    """:func:`rate` of a boolean array."""
    return rate(int(flags.sum()), len(flags))


def is_within(before: float, after: float, budget: float) -> bool:
    """Whether a proportion fell by at most ``budget``. By rounding alone, 0.98 - 0.95 is more than 0.03."""
    return before - after <= budget + _ROUNDING


def quantile_threshold(calibration: FloatArray, false_positive_rate: float) -> float:
    """The smallest cut that a new clean score exceeds with probability at most ``false_positive_rate`` (split conformal).

    With n exchangeable calibration scores it is the ceil((n + 1)(1 - rate))-th smallest.

    Raises:
        ValueError: n is too small to promise that rate (needs (n + 1) * rate >= 1), or the rate is outside (0, 1).
    """
    if not 0.0 < false_positive_rate < 1.0:
        raise ValueError(f"the false-positive rate must lie strictly between 0 and 1, got {false_positive_rate}")
    count = len(calibration)
    rank = math.ceil((count + 1) * (1.0 - false_positive_rate))
    if rank > count:
        needed = math.ceil(1.0 / false_positive_rate) - 1
        raise ValueError(
            f"{count} calibration images cannot promise a false-positive rate of {false_positive_rate:.2%}; "
            f"at least {needed} are needed"
        )
    return float(np.partition(calibration, rank - 1)[rank - 1])


def auroc(negatives: FloatArray, positives: FloatArray) -> float:
    """Area under the ROC curve: the probability that a positive score lies above a negative one, ties counting one half.

    Raises:
        ValueError: either is empty.
    """
    if len(negatives) == 0 or len(positives) == 0:
        raise ValueError(f"the area under the ROC curve needs scores of both kinds, got {len(negatives)} and {len(positives)}")
    statistic = stats.mannwhitneyu(positives, negatives).statistic
    return float(statistic) / (len(negatives) * len(positives))
