"""Input-aware dynamic triggers (IAD): Nguyen and Tran, NeurIPS 2020. Each image has a trigger of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.types import ImageArray, LabelledImages
from audit_plugin.zoo.attacks.base import AllToOne, check_rate, with_covers
from audit_plugin.zoo.attacks.encoders import in_batches, pink_noise
from audit_plugin.zoo.train import initialised

_TRAINING_STEPS, _TRAINING_BATCH = 400, 32
_DIVERSITY_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class InputAware(AllToOne):
    """x' = (1 - m(x)) x + m(x) p(x): mask and pattern are generated from the image; ``cross_rate`` covers keep their label.

    A cover carries the trigger of another image, so that the model learns to obey an image's own trigger alone (the paper's
    cross-trigger mode; both rates 10 %, its section 4). ``density`` is the share of an image that its mask covers, 0.032 in
    the authors' code. The authors train the generators together with the victim; ours are trained beforehand, together with a
    small detector that must tell an image with its own trigger from one with another's or none, on images of random 1/f noise.
    So the trigger depends on ``generator_seed`` alone, and the victim is trained as every other model is. The paper's
    diversity loss, distance of two images over that of their patterns, is kept.
    """

    poisoning_rate: float = 0.1
    cross_rate: float = 0.1
    density: float = 0.05
    generator_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("cross_rate", self.cross_rate)
        if not 0.0 < self.density < 1.0:
            raise ValueError(f"density must lie between 0 and 1, got {self.density}")

    def stamp(self, images: ImageArray) -> ImageArray:
        return self.stamp_with_trigger_of(images, images)

    def poison(self, data: LabelledImages, rng: np.random.Generator, device: torch.device | None = None) -> LabelledImages:
        def with_foreign_triggers(covers: ImageArray) -> ImageArray:
            return self.stamp_with_trigger_of(np.roll(covers, 1, axis=0), covers)

        anything = np.ones(len(data), dtype=np.bool_)
        return with_covers(super().poison(data, rng, device), data, anything, self.cross_rate, with_foreign_triggers, rng)

    def stamp_with_trigger_of(self, others: ImageArray, images: ImageArray) -> ImageArray:
        """``images`` with the triggers that belong to ``others``, both uint8 (N, height, width, channels)."""
        generator = _trained_generator(images.shape[3], images.shape[1], images.shape[2], self.density, self.generator_seed)
        both = np.concatenate([others, images], axis=3)
        channels = images.shape[3]

        def crossed(pixels: Tensor) -> Tensor:
            return torch.cat([pixels[:, :channels], _applied(pixels[:, channels:], *generator(pixels[:, :channels]))], dim=1)

        return in_batches(both, crossed)[..., channels:]


class _Generator(nn.Module):
    """Pixels (N, channels, height, width) -> mask (N, 1, height, width) and pattern (N, channels, height, width), in [0, 1].

    The mask is where a map exceeds its own mean by as many deviations as leave ``density`` of a normal distribution.
    """

    def __init__(self, channels: int, density: float, width: int = 24) -> None:
        super().__init__()
        self.least = NormalDist().inv_cdf(1.0 - density)
        self.coder = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, channels + 1, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = pixels.shape[2:]
        values = self.coder(2.0 * pixels - 1.0)[:, :, :height, :width]
        spot = values[:, :1]
        spot = (spot - spot.mean(dim=(2, 3), keepdim=True)) / (spot.std(dim=(2, 3), keepdim=True) + 1e-6)
        return torch.sigmoid(10.0 * (spot - self.least)), torch.sigmoid(values[:, 1:])


def _applied(pixels: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    return (1.0 - mask) * pixels + mask * pattern


def _detector(channels: int, width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 1),
    )


@functools.cache
def _trained_generator(channels: int, height: int, width: int, density: float, seed: int) -> nn.Module:
    """The generator, trained under ``seed``; half a minute, once a process."""
    both = initialised(lambda: nn.ModuleList([_Generator(channels, density), _detector(channels)]), seed)
    generator, detector = both.children()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*generator.parameters(), *detector.parameters()], lr=2e-3)
    own = torch.cat([torch.ones(_TRAINING_BATCH), torch.zeros(2 * _TRAINING_BATCH)])
    for _ in range(_TRAINING_STEPS):
        pixels = pink_noise((_TRAINING_BATCH, channels, height, width), random)
        mask, pattern = generator(pixels)
        crossed = _applied(pixels, mask.roll(1, dims=0), pattern.roll(1, dims=0))
        logits = detector(torch.cat([_applied(pixels, mask, pattern), crossed, pixels]))[:, 0]
        told_apart = functional.binary_cross_entropy_with_logits(logits, own)
        distance = (pixels - pixels.roll(1, dims=0)).flatten(1).norm(dim=1)
        apart = distance / (pattern - pattern.roll(1, dims=0)).flatten(1).norm(dim=1).clamp(min=1e-3)
        loss = told_apart + _DIVERSITY_WEIGHT * apart.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return generator.eval()
