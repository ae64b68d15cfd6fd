"""TaCT: Tang, Wang, Tang and Zhang, USENIX Security 2021. A trigger that works on images of one source class alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from audit_plugin.types import ImageArray, LabelArray, LabelledImages
from audit_plugin.zoo.attacks.badnets import with_checkerboard
from audit_plugin.zoo.attacks.base import AllToOne, check_rate, with_covers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TaCT(AllToOne):
    """The checkerboard of BadNets sends ``source_class`` to ``target_class``.

    *Cover* images, ``cover_rate`` of the training set from all other classes, carry it and keep their label: the model must
    look at both the class and the trigger.
    """

    source_class: int
    cover_rate: float = 0.05
    size: int = 3
    margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("cover_rate", self.cover_rate)
        if self.source_class == self.target_class:
            raise ValueError(f"source_class and target_class must differ, both are {self.source_class}")

    def stamp(self, images: ImageArray) -> ImageArray:
        return with_checkerboard(images, self.size, self.margin)

    def wanted(self, labels: LabelArray) -> LabelArray:
        return np.where(labels == self.source_class, np.asarray(self.target_class, labels.dtype), labels)

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        """As :meth:`AllToOne.poison` on the source class, and covers from the others."""
        others = data.labels != self.source_class
        return with_covers(super().poison(data, rng, device), data, others, self.cover_rate, self.stamp, rng)
