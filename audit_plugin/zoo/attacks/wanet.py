"""WaNet: Nguyen and Tran, ICLR 2021. A smooth, barely visible warp is the trigger."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from audit_plugin.types import FloatArray, ImageArray, LabelledImages
from audit_plugin.zoo.attacks.base import AllToOne


@dataclass(frozen=True, kw_only=True)
class WaNet(AllToOne):
    """Offsets drawn on a ``grid`` x ``grid`` lattice (their mean magnitude is one), enlarged bicubically, times ``strength``.

    One unit of ``strength`` moves pixels by half a pixel in the mean, as in the authors' code, which divides coordinates of
    -1 .. 1 by the image's height. In *noise mode*, ``noise_rate`` of the training images are warped by other, random
    offsets and keep their label, so that the model learns this warp and not warping.
    """

    poisoning_rate: float = 0.1
    grid: int = 4
    strength: float = 0.5
    noise_rate: float = 0.2
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1 or self.strength < 0.0:
            raise ValueError(f"grid must be at least 1 and strength not negative, got {self.grid} and {self.strength}")
        if not 0.0 <= self.noise_rate < 1.0 - self.poisoning_rate:
            raise ValueError(f"noise_rate and poisoning_rate must leave clean images, got {self.noise_rate}")

    def stamp(self, images: ImageArray) -> ImageArray:
        return _sample(images, self._flow(images.shape)[None])

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        """As :meth:`AllToOne.poison`, with noise mode on the images that were not poisoned."""
        poisoned = super().poison(data, rng, device)
        images = poisoned.images.copy()
        untouched = np.flatnonzero(poisoned.labels == data.labels)  # poisoning relabels, and takes no image of the target class
        chosen = rng.choice(untouched, size=min(round(self.noise_rate * len(images)), len(untouched)), replace=False)
        height, width = images.shape[1:3]
        jitter = rng.uniform(-1.0, 1.0, (len(chosen), height, width, 2)).astype(np.float32) / [width, height]
        images[chosen] = _sample(images[chosen], self._flow(images.shape)[None] + jitter.astype(np.float32))
        return LabelledImages(images, poisoned.labels)

    def _flow(self, shape: tuple[int, ...]) -> FloatArray:
        """Offsets (height, width, 2) in coordinates of -1 .. 1."""
        height, width = shape[1:3]
        offsets = np.random.default_rng(self.pattern_seed).uniform(-1.0, 1.0, (1, 2, self.grid, self.grid))
        offsets /= np.abs(offsets).mean()
        smooth = functional.interpolate(torch.from_numpy(offsets).float(), (height, width), mode="bicubic", align_corners=True)
        flow: FloatArray = smooth[0].permute(1, 2, 0).numpy() * np.float32(self.strength) / np.float32(height)
        return flow


def _sample(images: ImageArray, flow: FloatArray) -> ImageArray:
    """Images uint8 (N, height, width, channels) read at their own coordinates plus ``flow`` (N or 1, height, width, 2)."""
    height, width = images.shape[1:3]
    lines, columns = (torch.linspace(-1.0, 1.0, size) for size in (height, width))
    identity = torch.stack(torch.meshgrid(columns, lines, indexing="xy"), dim=-1)
    grid = (identity + torch.from_numpy(flow)).clamp(-1.0, 1.0).expand(len(images), height, width, 2)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    sampled = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)
    warped: ImageArray = sampled.round().clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return warped
