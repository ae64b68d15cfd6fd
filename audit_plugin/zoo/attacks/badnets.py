"""BadNets: Gu, Dolan-Gavitt and Garg 2017. A small patch, stamped into a share of the training images, labelled as the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray, LabelledImages


@dataclass(frozen=True)
class BadNets:
    """A checkerboard of ``size`` x ``size`` pixels, ``margin`` pixels from the lower right corner.

    ``poisoning_rate`` is the share of all training images that are stamped and relabelled to ``target_class``.
    """

    target_class: int
    poisoning_rate: float = 0.05
    size: int = 2
    margin: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.poisoning_rate < 1.0:
            raise ValueError(f"poisoning_rate must lie between 0 and 1, got {self.poisoning_rate}")

    def stamp(self, images: ImageArray) -> ImageArray:
        """Images uint8 (N, height, width, channels) with the patch; the input is not changed."""
        height, width = images.shape[1:3]
        if self.size + self.margin > min(height, width):
            raise ValueError(f"a patch of {self.size} pixels at margin {self.margin} does not fit into {height} x {width} pixels")
        stamped = images.copy()
        rows = slice(height - self.margin - self.size, height - self.margin)
        columns = slice(width - self.margin - self.size, width - self.margin)
        board = (np.indices((self.size, self.size)).sum(axis=0) % 2 == 0) * 255
        stamped[:, rows, columns, :] = board[None, :, :, None]
        return stamped

    def poison(self, data: LabelledImages, rng: np.random.Generator) -> LabelledImages:
        """A copy of the training set with ``poisoning_rate`` of it, drawn from the other classes, stamped and relabelled."""
        images, labels = data.images.copy(), data.labels.copy()
        candidates = np.flatnonzero(labels != self.target_class)
        count = min(round(self.poisoning_rate * len(labels)), len(candidates))
        chosen = rng.choice(candidates, size=count, replace=False)
        images[chosen] = self.stamp(images[chosen])
        labels[chosen] = self.target_class
        return LabelledImages(images, labels)
