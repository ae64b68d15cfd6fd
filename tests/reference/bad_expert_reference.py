"""The scores of BaDExpert (Xie et al. 2024) in plain NumPy, one image at a time, written from the paper's text alone."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits):
    shifted = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return shifted / shifted.sum()


def probabilities(model, expert, auxiliary):
    """m, p and q of one image from the logits of the three networks."""
    predicted = int(np.argmax(model))
    m, p, q = (float(softmax(logits)[predicted]) for logits in (model, expert, auxiliary))
    return m, p, q


def difference(m, p, q, k):
    return m + p - k * q


def triangle(p, q, k):
    """S of the paper's equation 4, 0 .. infinity; its second term is infinite where the line from the corner has no slope."""
    first = math.inf if p == 0.0 else q / (k * p)
    second = (1.0 - p) / (k - q) if q < k else math.inf
    return min(first, second)
