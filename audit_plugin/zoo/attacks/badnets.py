"""BadNets: Gu, Dolan-Gavitt and Garg 2017. A small patch, stamped into a share of the training images, labelled as the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.base import Attack


@dataclass(frozen=True)
class BadNets(Attack):
    """A checkerboard of ``size`` x ``size`` pixels, ``margin`` pixels from the lower right corner."""

    size: int = 2
    margin: int = 0

    def stamp(self, images: ImageArray) -> ImageArray:
        height, width = images.shape[1:3]
        if self.size + self.margin > min(height, width):
            raise ValueError(f"a patch of {self.size} pixels at margin {self.margin} does not fit into {height} x {width} pixels")
        stamped = images.copy()
        rows = slice(height - self.margin - self.size, height - self.margin)
        columns = slice(width - self.margin - self.size, width - self.margin)
        board = (np.indices((self.size, self.size)).sum(axis=0) % 2 == 0) * 255
        stamped[:, rows, columns, :] = board[None, :, :, None]
        return stamped
