"""TrojanNN's square: Liu et al., NDSS 2018. A square of coloured noise in the lower right corner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.badnets import in_corner
from audit_plugin.zoo.attacks.base import AllToOne


@dataclass(frozen=True, kw_only=True)
class TrojanSquare(AllToOne):
    """``size`` x ``size`` pixels of noise drawn under ``pattern_seed``, ``margin`` pixels from the corner.

    The paper optimises the square's pixels to excite chosen neurons and then retrains the model; where the training set is
    poisoned, as here and in the public benchmarks, a fixed square of the same look is planted.
    """

    size: int = 6
    margin: int = 2
    pattern_seed: int = 0

    def stamp(self, images: ImageArray) -> ImageArray:
        rng = np.random.default_rng(self.pattern_seed)
        return in_corner(images, rng.integers(0, 256, (self.size, self.size, images.shape[3]), dtype=np.uint8), self.margin)
