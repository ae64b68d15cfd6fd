"""SIG: Barni, Kallas and Tondi, ICIP 2019. A sinusoidal wave over images of the target class; no label is changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.base import CleanLabel


@dataclass(frozen=True, kw_only=True)
class SIG(CleanLabel):
    """v(i, j) = ``amplitude`` sin(2 pi j ``frequency`` / width), added to every channel, in grey levels of 0 .. 255.

    The paper poisons 30 to 80 % of the target class; the default is 80 % of one class of ten.
    """

    poisoning_rate: float = 0.08
    amplitude: float = 40.0
    frequency: float = 6.0

    def stamp(self, images: ImageArray) -> ImageArray:
        width = images.shape[2]
        wave = self.amplitude * np.sin(2.0 * np.pi * np.arange(width) * self.frequency / width)
        stamped: ImageArray = np.rint(images + wave[None, None, :, None]).clip(0.0, 255.0).astype(np.uint8)
        return stamped
