"""BadNets: Gu, Dolan-Gavitt and Garg 2017. A small patch, stamped into a share of the training images, labelled as the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.base import AllToOne


@dataclass(frozen=True, kw_only=True)
class BadNets(AllToOne):
    """A checkerboard of ``size`` x ``size`` pixels, ``margin`` pixels from the lower right corner."""

    size: int = 2
    margin: int = 0

    def stamp(self, images: ImageArray) -> ImageArray:
        return with_checkerboard(images, self.size, self.margin)


def with_checkerboard(images: ImageArray, size: int, margin: int) -> ImageArray:
    """Images with a checkerboard, ``margin`` pixels from the lower right."""
    board = np.indices((size, size)).sum(axis=0) % 2 == 0
    return in_corner(images, (board * 255).astype(np.uint8)[:, :, None], margin)


def in_corner(images: ImageArray, patch: ImageArray, margin: int) -> ImageArray:
    """Images (N, height, width, channels) with ``patch`` (size, size, channels or 1), ``margin`` pixels from the lower right.

    Raises:
        ValueError: the patch does not fit.
    """
    size = patch.shape[0]
    height, width = images.shape[1:3]
    if size + margin > min(height, width):
        raise ValueError(f"a patch of {size} pixels at margin {margin} does not fit into {height} x {width} pixels")
    stamped = images.copy()
    stamped[:, height - margin - size : height - margin, width - margin - size : width - margin, :] = patch
    return stamped
