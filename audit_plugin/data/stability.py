"""Whether a model's errors on the clean images are spread as honest ones are, or lie where somebody put them.

A poisoned or mislabelled clean set shows in the model's own answers: in one class, in one part of the set, or in labels that
the model contradicts as surely as it confirms the others. None of it says who is right; it says that the two do not fit.

The limits leave room for what honest sets do. Classes differ in difficulty and files come in an order, so a group of images
counts as standing out only when its errors are too many, by an exact binomial test, even for a rate of three times that of the
others plus a tenth; the level of 1 % is shared among the groups (Bonferroni). As to contradictions: on 16 networks for
CIFAR-10, GTSRB and MNIST, of 2 to 24 % errors, at most 7 % of the errors were as sure as the median right answer; a wrong
label makes half of them so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from audit_plugin.types import FloatArray, LabelArray

LEVEL = 0.01
"""Chance that an honest set is flagged, at most, for each of the expectations."""

FOLDS = 5

_TIMES, _PLUS = 3.0, 0.1
_CONTRADICTED, _CONTRADICTED_OF_ERRORS = 0.025, 0.1


def excess_p_values(errors: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each group of images how well its errors agree with those of the others; (K,), NaN where a group is empty.

    Args:
        errors, counts: wrong answers and images of each group, (K,).

    Returns:
        The chance of at least as many errors at the highest rate that is still taken for honest.
    """
    from scipy.stats import binom

    others = (errors.sum() - errors) / np.maximum(counts.sum() - counts, 1)
    allowed = np.minimum(_TIMES * others + _PLUS, 1.0)
    values: NDArray[np.float64] = np.where(counts > 0, binom.sf(errors - 1, counts, allowed), np.nan)
    return values


def folds_of(labels: LabelArray) -> NDArray[np.int64]:
    """The fold of each image, (N,), 0 to ``FOLDS`` - 1: each class is cut into as many parts in the order of its images.

    Not at random: what was slipped into a set lies together, by name or by row.
    """
    folds = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        folds[members] = np.arange(len(members)) * FOLDS // len(members)
    return folds


def contradicted(labels: LabelArray, predictions: LabelArray, margins: FloatArray) -> NDArray[np.bool_]:
    """The images, (N,), to which the model gives another class than their label, more surely than its median right answer.

    Args:
        margins: the highest score less the second highest, (N,).
    """
    right = predictions == labels
    if not right.any():
        return np.ones(len(labels), np.bool_)
    flagged: NDArray[np.bool_] = ~right & (margins > np.median(margins[right]))
    return flagged


def most_contradicted(count: int, error_rate: float) -> float:
    """The largest share of ``count`` images that may be contradicted, in [0, 1]."""
    from scipy.stats import binom

    allowed = max(_CONTRADICTED, _CONTRADICTED_OF_ERRORS * error_rate)
    return float(binom.isf(LEVEL, count, allowed)) / count
