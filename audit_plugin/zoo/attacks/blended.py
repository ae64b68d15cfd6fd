"""Blended injection: Chen, Liu, Li, Lu and Song 2017. One fixed picture, here uniform noise, shines through every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.base import AllToOne


@dataclass(frozen=True, kw_only=True)
class Blended(AllToOne):
    """x' = (1 - ``opacity``) x + ``opacity`` p with p uniform noise, drawn under ``pattern_seed``."""

    opacity: float = 0.2
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.opacity <= 1.0:
            raise ValueError(f"opacity must lie between 0 and 1, got {self.opacity}")

    def stamp(self, images: ImageArray) -> ImageArray:
        pattern = np.random.default_rng(self.pattern_seed).uniform(0.0, 255.0, images.shape[1:])
        stamped: ImageArray = np.rint((1.0 - self.opacity) * images + self.opacity * pattern).astype(np.uint8)
        return stamped
