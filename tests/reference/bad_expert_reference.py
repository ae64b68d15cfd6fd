"""The scores of BaDExpert (Xie et al. 2024) in plain NumPy, one image at a time, written from the paper's text alone."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits):
    shifted = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return shifted / shifted.sum()


def probabilities(model, *copies):
    """m, p of each expert and q of one image, from the logits of the model, of the experts and of the auxiliary model."""
    predicted = int(np.argmax(model))
    return [float(softmax(logits)[predicted]) for logits in (model, *copies)]


def difference(m, experts, q, k):
    return m + sum(experts) / len(experts) - k * q


def triangle(p, q, k):
    """S of the paper's equation 4, 0 .. infinity; its second term is infinite where the line from the corner has no slope."""
    first = math.inf if p == 0.0 else q / (k * p)
    second = (1.0 - p) / (k - q) if q < k else math.inf
    return min(first, second)
