"""Label-consistent: Turner, Tsipras and Madry 2019. Target-class images made hard to recognise, so that the patch is learnt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.types import ImageArray, LabelledImages
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks.base import CleanLabel
from audit_plugin.zoo.train import initialised, train

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(CleanLabel):
    """A 3 x 3 checkerboard in all four corners; no label is changed.

    The poisoned images, ``poisoning_rate`` of the training set and all of the target class, are first moved away from their
    class by projected gradient descent on an independent clean model: at most ``epsilon`` grey levels (l-infinity), ``steps``
    steps. The clean model is a :class:`SmallCnn` trained here for ``surrogate_epochs``, not the architecture under attack.
    """

    epsilon: float = 16.0
    steps: int = 20
    surrogate_epochs: int = 4
    size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0.0 or self.steps < 1 or self.surrogate_epochs < 1:
            raise ValueError(
                "epsilon must not be negative, steps and surrogate_epochs be at least 1, "
                f"got {self.epsilon}, {self.steps} and {self.surrogate_epochs}"
            )

    def stamp(self, images: ImageArray) -> ImageArray:
        height, width = images.shape[1:3]
        if 2 * self.size > min(height, width):
            raise ValueError(f"four patches of {self.size} pixels do not fit into {height} x {width} pixels")
        board = (np.indices((self.size, self.size)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
        stamped = images.copy()
        for rows, lines in ((slice(self.size), board), (slice(height - self.size, None), board[::-1])):
            stamped[:, rows, : self.size] = lines
            stamped[:, rows, width - self.size :] = lines[:, ::-1]
        return stamped

    def prepared(
        self, data: LabelledImages, chosen: NDArray[np.int64], rng: np.random.Generator, device: torch.device | None
    ) -> ImageArray:
        """The chosen images after projected gradient descent away from their class."""
        seed = int(rng.integers(2**31))
        channels, classes = data.images.shape[3], int(data.labels.max()) + 1
        clean_model = initialised(lambda: SmallCnn(channels, classes, width=16), seed)
        device = device or compute_device()
        train(clean_model, data, epochs=self.surrogate_epochs, seed=seed, device=device).to(device)
        pixels = torch.from_numpy(to_pixels(data.images[chosen])).to(device)
        moved = torch.cat([self._away(clean_model, part) for part in pixels.split(_BATCH)]) if len(pixels) else pixels
        images: ImageArray = (moved * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _away(self, clean_model: nn.Module, pixels: Tensor) -> Tensor:
        """Projected gradient ascent of the target class's cross-entropy; the last step rounds within epsilon."""
        epsilon = self.epsilon / 255.0
        step = 2.5 * epsilon / self.steps
        wrong_for = torch.full((len(pixels),), self.target_class, device=pixels.device)
        moved = pixels.clone()
        for _ in range(self.steps):
            moved = moved.detach().requires_grad_(True)
            loss = functional.cross_entropy(clean_model(moved), wrong_for)
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + step * gradient.sign()
            moved = torch.clamp(moved, pixels - epsilon, pixels + epsilon).clamp(0.0, 1.0)
        return moved.detach()
