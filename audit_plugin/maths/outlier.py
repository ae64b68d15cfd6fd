"""How far the smallest of a few values lies from the rest."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

_MAD_TO_SIGMA = 1.4826  # makes the median absolute deviation of normal data estimate its standard deviation

SPREAD_FLOOR = 0.2
"""Least spread of log sizes. Ten classes give a poor median absolute deviation, and a small one turns an ordinary
difference into an outlier: a class must then still be 1.8 times smaller than the median to lie three deviations below
it."""


def small_side_outliers(sizes: NDArray[np.float64], floor: float = SPREAD_FLOOR) -> NDArray[np.float64]:
    """Robust deviations of log sizes below their median, positive when suspiciously small.

    Neural Cleanse (Wang et al. 2019) divides |size - median| by 1.4826 MAD. We take the logarithm, because sizes differ by
    factors, and keep the sign, because only small triggers are suspicious. The spread is the largest of 1.4826 MAD, the
    standard deviation of the *other* classes and ``floor``: with ten classes the MAD alone is often far too small, and a clean
    model's ordinary smallest class becomes an outlier.

    Args:
        sizes: (classes,), positive; infinite where no trigger was found (such a class counts as large).

    Returns:
        (classes,); minus infinity for infinite sizes, all zero when fewer than three sizes are finite.
    """
    logs = np.log(sizes)
    finite = np.isfinite(logs)
    if finite.sum() < 3:
        return np.where(finite, 0.0, -np.inf)
    median = np.median(logs[finite])
    deviation = _MAD_TO_SIGMA * np.median(np.abs(logs[finite] - median))
    outliers = np.full(len(logs), -np.inf)
    for index in np.flatnonzero(finite):
        others = logs[finite & (np.arange(len(logs)) != index)]
        outliers[index] = (median - logs[index]) / max(float(deviation), float(others.std(ddof=1)), floor)
    return outliers


def pair_outliers(sizes: NDArray[np.float64], floor: float = SPREAD_FLOOR) -> NDArray[np.float64]:
    """How much smaller the trigger of a pair of classes is than its source and its target let expect, in robust deviations.

    The expected log size is row median + column median - median of all: some classes are easy to leave, some easy to reach.

    Args:
        sizes: (classes, classes), from row to column; NaN where not searched, infinite where no trigger was found.

    Returns:
        (classes, classes); minus infinity where there is no finite size, all of them when fewer than ten are finite.
    """
    finite = np.isfinite(sizes)
    outliers = np.full(sizes.shape, -np.inf)
    if finite.sum() < 10:
        return outliers
    logs = np.where(finite, np.log(np.where(finite, sizes, 1.0)), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows and columns without any finite size stay NaN
        expected = np.nanmedian(logs, axis=1, keepdims=True) + np.nanmedian(logs, axis=0, keepdims=True) - np.nanmedian(logs)
    below = expected - logs
    spread = max(_MAD_TO_SIGMA * float(np.nanmedian(np.abs(below - np.nanmedian(below)))), floor)
    outliers[finite] = below[finite] / spread
    return outliers
