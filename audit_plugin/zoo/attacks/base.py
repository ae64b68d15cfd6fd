"""What every attack of the zoo is: a way to stamp images, and a way to poison a training set with them."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np

from audit_plugin.types import ImageArray, LabelledImages


@dataclass(frozen=True)
class Attack(abc.ABC):
    """``poisoning_rate`` is the share of all training images that are stamped and relabelled to ``target_class``."""

    target_class: int
    poisoning_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.poisoning_rate < 1.0:
            raise ValueError(f"poisoning_rate must lie between 0 and 1, got {self.poisoning_rate}")

    @abc.abstractmethod
    def stamp(self, images: ImageArray) -> ImageArray:
        """Images uint8 (N, height, width, channels) with the trigger; the input is not changed."""

    def poison(self, data: LabelledImages, rng: np.random.Generator) -> LabelledImages:
        """A copy of the training set with ``poisoning_rate`` of it, drawn from the other classes, stamped and relabelled."""
        images, labels = data.images.copy(), data.labels.copy()
        candidates = np.flatnonzero(labels != self.target_class)
        count = min(round(self.poisoning_rate * len(labels)), len(candidates))
        chosen = rng.choice(candidates, size=count, replace=False)
        images[chosen] = self.stamp(images[chosen])
        labels[chosen] = self.target_class
        return LabelledImages(images, labels)
