"""What every attack of the zoo is: a way to stamp images, and a way to poison a training set with them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audit_plugin.types import ImageArray, LabelArray, LabelledImages

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """``poisoning_rate`` is the share of all training images that are stamped to plant the backdoor."""

    poisoning_rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.poisoning_rate < 1.0:
            raise ValueError(f"poisoning_rate must lie between 0 and 1, got {self.poisoning_rate}")

    @abc.abstractmethod
    def stamp(self, images: ImageArray) -> ImageArray:
        """Images uint8 (N, height, width, channels) with the trigger; the input is not changed."""

    @abc.abstractmethod
    def wanted(self, labels: LabelArray) -> LabelArray:
        """The class (N,) that triggered images with these labels are to become: their own where the trigger should do nothing."""

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        """A copy of the training set with ``poisoning_rate`` of it stamped and relabelled, drawn from the classes to be moved.

        ``device`` is where an attack trains what it needs; the GPU where torch has one, else the CPU, if None.
        """
        images, labels = data.images.copy(), data.labels.copy()
        chosen = draw(np.flatnonzero(self.wanted(labels) != labels), self.poisoning_rate * len(labels), rng)
        images[chosen] = self.stamp(images[chosen])
        labels[chosen] = self.wanted(labels[chosen])
        return LabelledImages(images, labels)

    def success_rate(self, predict: Callable[[ImageArray], LabelArray], data: LabelledImages) -> float:
        """Share of the images to be moved that, stamped, are predicted as wanted; NaN where there are none."""
        wanted = self.wanted(data.labels)
        victims = wanted != data.labels
        if not victims.any():
            return float("nan")
        return float((predict(self.stamp(data.images[victims])) == wanted[victims]).mean())


@dataclass(frozen=True, kw_only=True)
class AllToOne(Attack):
    """Triggered images of every class become ``target_class``."""

    target_class: int

    def wanted(self, labels: LabelArray) -> LabelArray:
        return np.full_like(labels, self.target_class)


@dataclass(frozen=True, kw_only=True)
class CleanLabel(AllToOne):
    """Stamps images of the target class and changes no label, so that looking at the training set shows nothing wrong."""

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        """A copy with ``poisoning_rate`` of all images, drawn from the target class, prepared and stamped; labels stay."""
        images = data.images.copy()
        members = np.flatnonzero(data.labels == self.target_class)
        chosen = draw(members, self.poisoning_rate * len(images), rng)
        images[chosen] = self.stamp(self.prepared(data, chosen, rng, device))
        return LabelledImages(images, data.labels.copy())

    def prepared(
        self, data: LabelledImages, chosen: NDArray[np.int64], rng: np.random.Generator, device: torch.device | None
    ) -> ImageArray:
        """The chosen images as they are before stamping."""
        return data.images[chosen]


def draw(candidates: NDArray[np.int64], count: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` of the candidates, rounded, or all of them where there are fewer."""
    return rng.choice(candidates, size=min(round(count), len(candidates)), replace=False)


def with_covers(
    poisoned: LabelledImages,
    original: LabelledImages,
    candidates: NDArray[np.bool_],
    rate: float,
    stamp: Callable[[ImageArray], ImageArray],
    rng: np.random.Generator,
) -> LabelledImages:
    """Further images that carry the trigger and keep their label, so that the trigger alone does not decide.

    Args:
        poisoned: the training set as poisoned so far; changed nowhere but in the covers, and copied.
        original: before poisoning, to know what is still untouched.
        candidates: which images (N,) may become covers.
        rate: share of the whole training set.
    """
    untouched = (poisoned.images == original.images).all(axis=(1, 2, 3)) & (poisoned.labels == original.labels)
    chosen = draw(np.flatnonzero(untouched & candidates), rate * len(original), rng)
    images = poisoned.images.copy()
    images[chosen] = stamp(images[chosen])
    return LabelledImages(images, poisoned.labels)


def check_rate(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
