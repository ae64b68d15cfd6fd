"""How far one class stands out from a model's others: by a small trigger, a large margin, little noise in the weights."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

_MAD_TO_SIGMA = 1.4826  # makes the median absolute deviation of normal data estimate its standard deviation

SPREAD_FLOOR = 0.35
"""Least spread of log sizes of classes. Ten classes give a poor median absolute deviation, and a small one turns an ordinary
difference into an outlier: a class must then still be 3.4 times smaller than the median to lie 3.5 deviations below it. Clean
networks of 43 classes have one that is 2.4 times smaller."""

PAIR_SPREAD_FLOOR = 0.2
"""The same for pairs of classes, of which there are many."""

USUAL_SPREAD = 0.4
"""Spread of a clean model's log sizes and margins together. With it, a class stands 3.5 deviations apart where the two ratios
multiply to 4.06; docs/decisions/0007 has the figures."""

NOISE_SPREAD = 0.22
"""Spread of a clean model's logs of noise ratios. With it, a class stands 3.5 deviations apart where the next needs 2.16 times
the noise; docs/decisions/0008 has the figures."""

WAVE_RESPONSE = 0.15
"""Response to a wave that counts as one deviation, in medians of the margins of the model's own answers: 3.5 deviations are half
of that margin, in nine images of ten. docs/decisions/0009 has the figures."""

FEWEST_SIZES = 3
"""With fewer finite sizes nothing is compared."""

_LARGEST_RATIO = 100.0  # the next class may reach nothing


def class_outliers(
    sizes: NDArray[np.float64],
    relative_margins: NDArray[np.float64] | None = None,
    relative_noise: NDArray[np.float64] | None = None,
    tried: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """How far each class stands out, in deviations; the greatest of three views.

    * Its trigger against this model's own spread: :func:`small_side_outliers`. Nine other classes estimate that spread badly.
    * Its trigger and its margin together, against the spread that clean models usually have:
      (log of :func:`size_ratios` + log of the margins' :func:`others_ratios`) / :data:`USUAL_SPREAD`. The two are measured
      independently, one on images and one without any; a backdoor moves both. A margin counts at most as much as the trigger:
      it is easily faked.
    * How little noise in the weights it needs: :func:`noise_outliers`. Triggers that are not small are seen by this alone.

    Args:
        sizes: (classes,), positive; infinite where no trigger was found.
        relative_margins, relative_noise: (classes,), the :func:`others_ratios`; None where they were not measured.
        tried: see :func:`small_side_outliers`.

    Returns:
        (classes,); of infinite sizes, what noise alone says, minus infinity without it. By triggers no class stands out where
        fewer than three sizes are finite.
    """
    outliers = small_side_outliers(sizes, tried=tried)
    if np.isfinite(sizes).sum() >= FEWEST_SIZES:
        logs = _logs(size_ratios(sizes, tried))
        if relative_margins is not None:
            logs = logs + np.minimum(_logs(np.maximum(relative_margins, 1.0)), np.maximum(logs, 0.0))
        outliers = np.maximum(outliers, logs / USUAL_SPREAD)
    if relative_noise is not None:
        outliers = np.maximum(outliers, noise_outliers(relative_noise))
    return outliers


def noise_outliers(relative_noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each class stands out by the noise that it needs: log of the :func:`others_ratios` / :data:`NOISE_SPREAD`."""
    return _logs(relative_noise) / NOISE_SPREAD


def _logs(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithms, minus infinity for zero."""
    return np.log(ratios, where=ratios > 0, out=np.full(len(ratios), -np.inf))


def size_ratios(sizes: NDArray[np.float64], tried: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """How many times smaller each size is than the median of the others, (classes,); zero for infinite sizes.

    The median is that of logarithms; without another class the ratio is one. Arguments as of :func:`small_side_outliers`.
    """
    logs = np.log(_least_sizes(sizes, tried))
    ratios = np.zeros(len(sizes))
    for index in np.flatnonzero(np.isfinite(sizes)):
        others = np.delete(logs, index)
        ratios[index] = np.exp(np.median(others)) / sizes[index] if len(others) else 1.0
    return ratios


def _least_sizes(sizes: NDArray[np.float64], tried: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The sizes, and in place of infinite ones what the class takes at least: no smaller than any trigger that works."""
    finite = np.isfinite(sizes)
    largest = sizes[finite].max() if finite.any() else 1.0
    return np.where(finite, sizes, largest if tried is None else np.fmax(tried, largest))


def others_ratios(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each class's value over the largest of the other classes', (classes,), in [0, 100].

    100 where no other class's is positive, zero where the class's own is not.
    """
    ratios = np.zeros(len(values))
    for index in np.flatnonzero(values > 0):
        others = np.delete(values, index).max(initial=0.0)
        ratios[index] = min(values[index] / others, _LARGEST_RATIO) if others > 0 else _LARGEST_RATIO
    return ratios


def small_side_outliers(
    sizes: NDArray[np.float64], floor: float = SPREAD_FLOOR, tried: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Robust deviations of log sizes below their median, positive when suspiciously small.

    Neural Cleanse (Wang et al. 2019) divides |size - median| by 1.4826 MAD. We take the logarithm, because sizes differ by
    factors, and keep the sign, because only small triggers are suspicious. The spread is the largest of 1.4826 MAD, the
    standard deviation of the *other* classes and ``floor``: with ten classes the MAD alone is often far too small, and a clean
    model's ordinary smallest class becomes an outlier.

    Args:
        sizes: (classes,), positive; infinite where no trigger was found. Such a class counts as large: who trains a model so
            that most classes cannot be reached must not hide the one that can.
        tried: (classes,), how large the triggers were that did not work, where sizes are infinite; there the class counts with
            that or with the largest finite size, whichever is larger. None is the latter.

    Returns:
        (classes,); minus infinity for infinite sizes, all zero when fewer than three sizes are finite.
    """
    finite = np.isfinite(sizes)
    if finite.sum() < FEWEST_SIZES:
        return np.where(finite, 0.0, -np.inf)
    logs = np.log(_least_sizes(sizes, tried))
    median = np.median(logs)
    deviation = _MAD_TO_SIGMA * np.median(np.abs(logs - median))
    outliers = np.full(len(logs), -np.inf)
    for index in np.flatnonzero(finite):
        spread = float(np.delete(logs, index).std(ddof=1))
        outliers[index] = (median - logs[index]) / max(float(deviation), spread, floor)
    return outliers


def pair_outliers(sizes: NDArray[np.float64], floor: float = PAIR_SPREAD_FLOOR) -> NDArray[np.float64]:
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
