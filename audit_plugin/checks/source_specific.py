"""Source-specific trigger inversion: the smallest patch that sends images of one class to one other, for every pair of classes.

A source-specific backdoor (TaCT, Tang et al. 2021) or an all-to-all one (Gu et al. 2017) moves each class differently, so
no small trigger works from all classes and trigger inversion sees nothing. Searched pair by pair, the planted pairs need
less than their source and their target need elsewhere: sizes are compared after taking out what is usual for the row and
for the column (:func:`audit_plugin.maths.outlier.pair_outliers`).

Classes that resemble each other (ship and plane, 4 and 9) are near neighbours by nature, so a pair that stands out is a
reason not to pass a model, never one to fail it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from audit_plugin.checks.base import Probe
from audit_plugin.checks.inversion import Budget, Goal, Patches, invert
from audit_plugin.errors import InapplicableError
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, Trigger

FEWEST_IMAGES = 3


@dataclass(frozen=True)
class SourceSpecificInversion(Probe):
    """The probe.

    Attributes:
        steps, images_per_step, images_per_batch, flip_rate: see :class:`audit_plugin.checks.inversion.Budget`.
        maximum_classes: the number of pairs grows with the square of the classes; with more than these nothing is searched.
        progress: called with the share of the work done.
    """

    name: ClassVar[str] = "source_specific"
    steps: int = 150
    images_per_step: int = 6
    images_per_batch: int = 720
    flip_rate: float = 0.97
    maximum_classes: int = 12
    progress: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self._budget()

    def search(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> list[Trigger]:
        """One candidate for every ordered pair of classes whose source has images.

        Raises:
            InapplicableError: too many classes, too few images of every class, or the model gives no gradients.
        """
        count = subject.class_count
        if count > self.maximum_classes:
            raise InapplicableError(
                f"{count} classes make {count * (count - 1)} pairs; at most {self.maximum_classes} classes are searched. "
                "Raise [source_specific] maximum_classes in the policy if you have the time."
            )
        images = np.bincount(fit_split.labels, minlength=count)
        sources = [source for source in range(count) if images[source] >= FEWEST_IMAGES]
        if len(sources) < 2:
            raise InapplicableError(f"Fewer than two classes have {FEWEST_IMAGES} images in the fit split.")
        goals = [Goal(target, source) for source in sources for target in range(count) if target != source]
        return invert(subject.torch_module(), fit_split, goals, (Patches,), self._budget(), rng, self.progress)

    def _budget(self) -> Budget:
        return Budget(self.steps, self.images_per_step, self.images_per_batch, self.flip_rate)
