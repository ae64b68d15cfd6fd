"""The score on activation norms in plain NumPy, one image and one channel at a time, with Ledoit and Wolf's formulas written out.

Norms: Cheng et al. 2020 (arXiv 2002.12162). Shrinkage: Ledoit and Wolf 2004, *A well-conditioned estimator for large-dimensional
covariance matrices*, the mean being known.
"""

from __future__ import annotations

import numpy as np

FLOOR = 0.1


def norms_of(maps):
    """``maps`` (channels, height, width) of one image -> its l-infinity, l1 and l2 norms, each (channels,)."""
    largest = [max(abs(float(value)) for value in channel.ravel()) for channel in maps]
    total = [sum(abs(float(value)) for value in channel.ravel()) for channel in maps]
    length = [sum(float(value) ** 2 for value in channel.ravel()) ** 0.5 for channel in maps]
    return np.array(largest), np.array(total), np.array(length)


def shrunk_covariance(rows):
    """Ledoit and Wolf's estimate from centred rows (n, p), and its shrinkage b^2 / d^2."""
    n, p = rows.shape
    sample = sum(np.outer(row, row) for row in rows) / n
    m = np.trace(sample) / p
    d2 = np.sum((sample - m * np.eye(p)) ** 2) / p
    b2 = min(sum(np.sum((np.outer(row, row) - sample) ** 2) / p for row in rows) / n**2, d2)
    return b2 / d2 * m * np.eye(p) + (1 - b2 / d2) * sample, b2 / d2


class ActivationNormReference:
    """``vectors``: (N, channels) of one norm; ``predicted`` (N,)."""

    def __init__(self, vectors, predicted, classes):
        self.mean = {}
        for label in range(classes):
            members = [vector for vector, other in zip(vectors, predicted, strict=True) if other == label]
            self.mean[label] = np.mean(members if members else vectors, axis=0)
        residuals = np.array([vector - self.mean[label] for vector, label in zip(vectors, predicted, strict=True)])
        deviation = np.sqrt(np.mean((residuals - residuals.mean(axis=0)) ** 2, axis=0))
        self.deviation = np.maximum(deviation, FLOOR * np.sqrt(np.mean(deviation**2)))
        self.covariance, self.shrinkage = shrunk_covariance(residuals / self.deviation)

    def score(self, vector, predicted):
        residual = (vector - self.mean[predicted]) / self.deviation
        return float(residual @ np.linalg.solve(self.covariance, residual)) / len(vector)
