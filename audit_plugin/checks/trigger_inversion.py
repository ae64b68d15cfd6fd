"""Trigger inversion: the smallest change to an image that sends every image to one class.

A backdoored class needs a far smaller change than the others (Neural Cleanse, Wang et al. 2019). The loss and the two families of
triggers are those of :mod:`audit_plugin.checks.inversion`; triggers that add to scattered pixels escape a search for
patches alone.

What we do differently from the authors' code, and why:

* all classes are optimised in one batch, each with its own lambda, so that an audit of 10 classes takes seconds, not minutes;
* mask and pattern are sigmoids instead of (tanh + 1) / 2, starting from a faint mask, and few steps (200 instead of 1,000):
  enough to tell sizes apart, since only their ratio is used;
* the flip rate is a running mean over batches and leaves out images of the class itself, which need no trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from audit_plugin.checks.base import Probe
from audit_plugin.checks.inversion import Budget, Goal, Patches, Perturbations, invert
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, Trigger


@dataclass(frozen=True)
class TriggerInversion(Probe):
    """The probe.

    Attributes:
        steps, images_per_step, images_per_batch, flip_rate: see :class:`audit_plugin.checks.inversion.Budget`.
        classes: which to search; None for all.
        progress: called with the share of the work done.
    """

    name: ClassVar[str] = "trigger_inversion"
    steps: int = 200
    images_per_step: int = 24
    images_per_batch: int = 512
    flip_rate: float = 0.97
    classes: Sequence[int] | None = None
    progress: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self._budget()

    def search(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> list[Trigger]:
        """One candidate a class and family.

        Raises:
            InapplicableError: the model gives no gradients.
        """
        classes = range(subject.class_count) if self.classes is None else self.classes
        goals = [Goal(target) for target in classes]
        return invert(subject.torch_module(), fit_split, goals, (Patches, Perturbations), self._budget(), rng, self.progress)

    def _budget(self) -> Budget:
        return Budget(self.steps, self.images_per_step, self.images_per_batch, self.flip_rate)
