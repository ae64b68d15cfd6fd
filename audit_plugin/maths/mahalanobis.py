"""Distance of a vector from the mean of its class, in units of what is usual within the classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from audit_plugin.types import LabelArray

SMALLEST_DEVIATION = 0.1
"""Features that vary less than this, as a share of the root mean square over all features, are taken to vary this much."""

_SMALLEST_EIGENVALUE = 1e-4  # of the mean; only a covariance that a handful of vectors leaves singular has one below


@dataclass(frozen=True)
class ClassGaussians:
    """A mean for each class and one whitening for all.

    |(x - means[c]) @ whitening|^2 is the squared Mahalanobis distance of x from class c divided by the number of features:
    about 1 for a vector of the class.

    Attributes:
        means: (classes, features).
        whitening: (features, features).
        shrinkage: of the covariance, 0 (none) to 1 (features taken as independent and alike).
    """

    means: NDArray[np.float64]
    whitening: NDArray[np.float64]
    shrinkage: float


def floored_deviation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation of each feature of (N, features), with the floor :data:`SMALLEST_DEVIATION`; (features,)."""
    deviation: NDArray[np.float64] = values.std(axis=0)
    floored: NDArray[np.float64] = np.maximum(deviation, SMALLEST_DEVIATION * np.sqrt(np.mean(deviation**2)))
    return floored


def fit_class_gaussians(values: NDArray[np.float64], classes: LabelArray, class_count: int) -> ClassGaussians:
    """Class means and the pooled within-class covariance, shrunk as Ledoit and Wolf (2004) do.

    Features are divided by their deviation within the classes first, so that shrinking treats them alike. A class without
    vectors takes the mean of all.

    Args:
        values: (N, features).
        classes: (N,), in [0, class_count).

    Raises:
        ValueError: nothing varies within the classes.
    """
    means = np.tile(values.mean(axis=0), (class_count, 1))
    for label in np.unique(classes):
        means[label] = values[classes == label].mean(axis=0)
    residuals = values - means[classes]
    deviation = floored_deviation(residuals)
    if not deviation.max() > 0:
        raise ValueError("the values do not vary within the classes")
    fitted = LedoitWolf(assume_centered=True).fit(residuals / deviation)
    variances, directions = np.linalg.eigh(fitted.covariance_)
    variances = np.maximum(variances, _SMALLEST_EIGENVALUE * variances.mean())
    whitening = directions / np.sqrt(variances * values.shape[1]) / deviation[:, None]
    return ClassGaussians(means, whitening, float(fitted.shrinkage_))
