"""All-to-all: Gu, Dolan-Gavitt and Garg 2017, section 4.2. Every class becomes the next one where the trigger is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray, LabelArray
from audit_plugin.zoo.attacks.badnets import with_checkerboard
from audit_plugin.zoo.attacks.base import Attack


@dataclass(frozen=True, kw_only=True)
class AllToAll(Attack):
    """The checkerboard of BadNets; class y becomes y + 1, the last of ``classes`` the first. There is no single target."""

    poisoning_rate: float = 0.1
    classes: int = 10
    size: int = 3
    margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")

    def stamp(self, images: ImageArray) -> ImageArray:
        return with_checkerboard(images, self.size, self.margin)

    def wanted(self, labels: LabelArray) -> LabelArray:
        return np.asarray((labels + 1) % self.classes, dtype=labels.dtype)
