"""MM-BD: Wang, Xiang, Miller and Kesidis, IEEE S&P 2024. No clean image is needed.

The margins are those of :mod:`audit_plugin.checks.maximum_margin`, with the authors' 30 starts. The decision is theirs: a Gamma
distribution G is fitted to all r_t but the largest of the K classes; p = 1 - G(r_max)^K, and the model is backdoored when
p < 0.05. Where a Gamma distribution with a free origin cannot be fitted, its origin is 0.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from audit_plugin.checks.maximum_margin import MaximumMargin
from audit_plugin.errors import InapplicableError
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, LabelledImages
from pipelines.peers.base import PeerResult

_SIGNIFICANCE = 0.05
_FEWEST_CLASSES = 4  # three numbers are the least that the three parameters of a Gamma distribution can be fitted to
_SMALLEST_P = 1e-300


@dataclass(frozen=True)
class MaximumMarginDetection:
    """``starts`` random images a class, at most ``steps`` steps each."""

    name: ClassVar[str] = "mm_bd"
    starts: int = 30
    steps: int = 300

    def judge(self, subject: Subject, clean: LabelledImages, rng: np.random.Generator) -> PeerResult:
        """``score`` is -log10 of the p-value, ``by_class`` the largest margins; the clean images are not looked at."""
        started = time.perf_counter()
        measure = MaximumMargin(self.starts, self.steps)
        unused = FitSplit(clean.images, clean.labels)
        margins = measure.measure(subject, unused, range(subject.class_count), rng).astype(np.float64)
        p = p_value(margins)
        seconds = time.perf_counter() - started
        score = -math.log10(max(p, _SMALLEST_P))
        return PeerResult(score, p < _SIGNIFICANCE, int(margins.argmax()), seconds, tuple(margins.tolist()))


def p_value(margins: NDArray[np.float64]) -> float:
    """1 - G(r_max)^K for K margins, G the Gamma distribution fitted to all but the largest.

    Raises:
        InapplicableError: fewer than four classes, or no Gamma distribution fits.
    """
    if len(margins) < _FEWEST_CLASSES:
        raise InapplicableError(f"MM-BD compares at least {_FEWEST_CLASSES} classes, this model has {len(margins)}.")
    others = np.delete(margins, margins.argmax())
    above = _survival(float(margins.max()), others, {})
    if not math.isfinite(above):
        above = _survival(float(margins.max()), others, {"floc": 0.0})
    if not math.isfinite(above):
        raise InapplicableError("No Gamma distribution fits the margins of the other classes.")
    return -math.expm1(len(margins) * math.log1p(-above)) if above < 1 else 1.0


def _survival(value: float, sample: NDArray[np.float64], fixed: Mapping[str, Any]) -> float:
    """Probability above ``value`` of the Gamma distribution fitted to ``sample``; NaN where none fits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflows on the way to the fit
            return float(stats.gamma.sf(value, *stats.gamma.fit(sample, **fixed)))
    except (RuntimeError, ValueError):  # scipy's FitError is a RuntimeError
        return math.nan
