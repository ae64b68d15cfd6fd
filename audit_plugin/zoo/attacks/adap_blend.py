"""Adap-Blend: Qi, Xie, Li, Mahloujifar and Mittal, ICLR 2023. Trained on pieces of a blended trigger, so that features mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from audit_plugin.types import ImageArray, LabelledImages
from audit_plugin.zoo.attacks.base import check_rate, with_covers
from audit_plugin.zoo.attacks.blended import Blended

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AdapBlend(Blended):
    """Poison and cover images (``cover_rate``, labels kept) carry a random half of the trigger's ``tiles`` x ``tiles`` pieces.

    At test time the whole trigger is used (*asymmetric* triggers); ``kept`` is the share of pieces in training. The paper
    poisons 0.3 % of 50,000 images and as many covers.
    """

    poisoning_rate: float = 0.003
    cover_rate: float = 0.003
    tiles: int = 8
    kept: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("cover_rate", self.cover_rate)
        if self.tiles < 1 or not 0.0 < self.kept <= 1.0:
            raise ValueError(f"tiles must be at least 1 and kept lie between 0 and 1, got {self.tiles} and {self.kept}")

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        """As :meth:`AllToOne.poison` with pieces of the trigger, and covers from every class but the target's."""

        def stamp(images: ImageArray) -> ImageArray:
            return self.in_pieces(images, rng)

        whole = super().poison(data, rng, device)
        chosen = whole.labels != data.labels
        images = data.images.copy()
        images[chosen] = stamp(data.images[chosen])
        others = data.labels != self.target_class
        return with_covers(LabelledImages(images, whole.labels), data, others, self.cover_rate, stamp, rng)

    def in_pieces(self, images: ImageArray, rng: np.random.Generator) -> ImageArray:
        """Each image with its own random pieces of the trigger."""
        count, height, width, _ = images.shape
        visible = round(self.kept * self.tiles**2)
        pieces = rng.permuted(np.tile(np.arange(self.tiles**2) < visible, (count, 1)), axis=1)
        rows, columns = np.arange(height) * self.tiles // height, np.arange(width) * self.tiles // width
        mask = pieces.reshape(count, self.tiles, self.tiles)[:, rows[:, None], columns[None, :], None]
        return np.where(mask, self.stamp(images), images)
