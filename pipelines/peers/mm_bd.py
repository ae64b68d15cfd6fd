"""MM-BD: Wang, Xiang, Miller and Kesidis, IEEE S&P 2024. No clean image is needed.

For each class t the margin f_t(x) - max over s != t of f_s(x) of the logits is maximised over images x in [0, 1] by gradient
ascent from random ones; r_t is the largest margin reached. A backdoor raises the margin of its target class far above the
others'. A Gamma distribution G is fitted to all r_t but the largest of the K classes; p = 1 - G(r_max)^K, and the model is
backdoored when p < 0.05.

Settings are those of the authors' code (github.com/wanghangpsu/MM-BD): 30 starts, at most 300 steps of 0.01, stop when the sum of
margins changes by less than 1e-5 of itself. What differs:

* every class starts from the same 30 random images;
* momentum is left out: the authors make their optimiser anew in each step, so that theirs never acts;
* where a Gamma distribution with a free origin cannot be fitted, its origin is 0.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from audit_plugin.errors import InapplicableError
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.model.subject import Subject
from audit_plugin.types import LabelledImages
from pipelines.peers.base import PeerResult

_SIGNIFICANCE = 0.05
_STEP = 0.01
_SMALLEST_CHANGE = 1e-5
_FEWEST_CLASSES = 4  # three numbers are the least that the three parameters of a Gamma distribution can be fitted to
_SMALLEST_P = 1e-300
_MOST_IMAGES = 2048  # that go through the network at once


@dataclass(frozen=True)
class MaximumMargin:
    """``starts`` random images a class, at most ``steps`` steps each."""

    name: ClassVar[str] = "mm_bd"
    starts: int = 30
    steps: int = 300

    def judge(self, subject: Subject, clean: LabelledImages, rng: np.random.Generator) -> PeerResult:
        """``score`` is -log10 of the p-value, ``by_class`` the largest margins; the clean images are not looked at."""
        started = time.perf_counter()
        margins = self.margins(subject, rng)
        p = p_value(margins)
        seconds = time.perf_counter() - started
        score = -math.log10(max(p, _SMALLEST_P))
        return PeerResult(score, p < _SIGNIFICANCE, int(margins.argmax()), seconds, tuple(margins.tolist()))

    def margins(self, subject: Subject, rng: np.random.Generator) -> NDArray[np.float64]:
        """The largest margin reached for each class, (classes,)."""
        device, module, spec = compute_device(), subject.torch_module(), subject.summary.input_spec
        shape = (self.starts, spec.channels, spec.height, spec.width)
        start = torch.rand(shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))).to(device)
        module.to(device)
        try:
            groups = torch.arange(subject.class_count, device=device).split(max(_MOST_IMAGES // self.starts, 1))
            return np.concatenate([self._ascend(module, start, targets) for targets in groups])
        finally:
            module.to("cpu")

    def _ascend(self, module: nn.Module, start: Tensor, targets: Tensor) -> NDArray[np.float64]:
        images = start.repeat(len(targets), 1, 1, 1).requires_grad_(True)
        wanted = targets.repeat_interleave(len(start))[:, None]
        last = torch.full((len(targets),), torch.inf, device=start.device)
        running = torch.ones(len(targets), dtype=torch.bool, device=start.device)
        largest = torch.zeros(len(targets), device=start.device)
        for _ in range(self.steps):
            logits = module(images.clamp(0, 1))[-1]
            others = logits.scatter(1, wanted, -torch.inf).amax(dim=1)
            margins = (logits.gather(1, wanted)[:, 0] - others).view(len(targets), -1)
            totals = margins.detach().sum(dim=1)
            largest = torch.where(running, margins.detach().amax(dim=1), largest)
            running &= ~((totals - last).abs() < _SMALLEST_CHANGE * last.abs())
            if not running.any():
                break
            last = totals
            (gradient,) = torch.autograd.grad(margins.sum(), images)
            with torch.no_grad():
                images += _STEP * gradient
        return largest.double().cpu().numpy()


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
