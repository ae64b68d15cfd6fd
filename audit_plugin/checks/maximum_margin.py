"""Maximum margin: how surely the model can be made to see each class, whatever the image.

For each class t the margin f_t(x) - max over s != t of f_s(x) of the logits is maximised over images x in [0, 1] by gradient
ascent from random ones; r_t is the largest, over the starts, of the margins at its end (Wang, Xiang, Miller and Kesidis 2024).
Training with a backdoor raises the margin of its target class far above the others', for triggers too that no patch imitates. No
clean image is needed.

What we do differently from the authors' code (github.com/wanghangpsu/MM-BD), and why:

* their decision, p < 0.05 for a Gamma distribution fitted to the other classes, is not taken: on clean models it holds far too
  often. A margin is compared with the other classes', together with the size of the class's trigger
  (:func:`audit_plugin.maths.outlier.class_outliers`);
* 5 random starts instead of 30, the same ones for every class;
* momentum is left out: the authors make their optimiser anew in each step, so that theirs never acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from audit_plugin.checks.base import FEWEST_CLASSES_REACHED, ClassMeasure
from audit_plugin.errors import InapplicableError
from audit_plugin.model.fine_tuning import compute_device, images_at_once, margins
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray

_STEP = 0.01
_SMALLEST_CHANGE = 1e-5
_MOST_IMAGES = 2048  # of 32 x 32 that go through the network at once


@dataclass(frozen=True)
class MaximumMargin(ClassMeasure):
    """The measure.

    Attributes:
        starts: random images a class.
        steps: of gradient ascent, at most; a class stops when the sum of its margins changes by less than 1e-5 of itself.
    """

    name: ClassVar[str] = "maximum_margin"
    starts: int = 5
    steps: int = 300

    def measure(self, subject: Subject, fit_split: FitSplit, classes: Sequence[int], rng: np.random.Generator) -> FloatArray:
        """The largest margin reached for each class, (classes,); no image of ``fit_split`` is used.

        Raises:
            InapplicableError: the model gives no gradients, or the ascent finds images of fewer than three classes: it led
                nowhere, and there is nothing to compare.
        """
        device, module, spec = compute_device(), subject.torch_module(), subject.summary.input_spec
        shape = (self.starts, spec.channels, spec.height, spec.width)
        start = torch.rand(shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))).to(device)
        module.to(device)
        try:
            groups = torch.tensor(list(classes), device=device).split(max(images_at_once(_MOST_IMAGES, start) // self.starts, 1))
            found = np.concatenate([self._ascend(module, start, targets) for targets in groups])
        finally:
            module.to("cpu")
        reached = int((found > 0).sum())
        if reached < FEWEST_CLASSES_REACHED:
            raise InapplicableError(
                f"Gradient ascent found images of only {reached} of {len(found)} classes, too few to compare margins. A model "
                "that hides its gradients, or whose logits differ by very little, ends here."
            )
        return found

    def _ascend(self, module: nn.Module, start: Tensor, targets: Tensor) -> FloatArray:
        images = start.repeat(len(targets), 1, 1, 1).requires_grad_(True)
        wanted = targets.repeat_interleave(len(start))
        last = torch.full((len(targets),), torch.inf, device=start.device)
        running = torch.ones(len(targets), dtype=torch.bool, device=start.device)
        largest = torch.zeros(len(targets), device=start.device)
        for _ in range(self.steps):
            reached = margins(module(images.clamp(0, 1))[-1], wanted).view(len(targets), -1)
            totals = reached.detach().sum(dim=1)
            largest = torch.where(running, reached.detach().amax(dim=1), largest)
            running &= ~((totals - last).abs() < _SMALLEST_CHANGE * last.abs())
            if not running.any():
                break
            last = totals
            if not reached.requires_grad:
                raise InapplicableError("No gradient reaches the pixels, for the model takes whole numbers.")
            (gradient,) = torch.autograd.grad(reached.sum(), images)
            with torch.no_grad():
                images += _STEP * gradient
        found: FloatArray = largest.float().cpu().numpy()
        return found
