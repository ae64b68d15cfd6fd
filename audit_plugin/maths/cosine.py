"""Cosine similarity to a class centroid, leaving out the image itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TINY = 1e-12


def leave_one_out_cosine(
    dots: NDArray[np.float64], squared_norms: NDArray[np.float64], sum_squared_norm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosine of each feature with the sum of the *other* features of its class.

    The centroid's direction is that of the sum S, so with d = a . S and n = |a|^2 the feature's own part is subtracted
    without a second sum: a . (S - a) = d - n and |S - a|^2 = |S|^2 - 2 d + n.

    Args:
        dots: (N,), a . S with the feature a inside S.
        squared_norms: (N,), |a|^2.
        sum_squared_norm: (N,) or scalar, |S|^2 of the feature's class.

    Returns:
        (N,) in [-1, 1]; 0 where the feature or the rest of its class is zero.
    """
    others = np.sqrt(np.maximum(sum_squared_norm - 2.0 * dots + squared_norms, 0.0))
    scale = np.sqrt(squared_norms) * others
    cosine = np.divide(dots - squared_norms, scale, out=np.zeros_like(dots), where=scale > _TINY)
    bounded: NDArray[np.float64] = np.clip(cosine, -1.0, 1.0)
    return bounded
