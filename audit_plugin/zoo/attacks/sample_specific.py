"""Sample-specific triggers, after ISSBA: Li, Li, Wu, Li, He and Lyu, ICCV 2021. An encoder hides a message in each image."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.types import ImageArray
from audit_plugin.zoo.attacks.base import AllToOne
from audit_plugin.zoo.attacks.encoders import in_batches, pink_noise
from audit_plugin.zoo.train import initialised

_MESSAGE_BITS = 16
_TRAINING_STEPS, _TRAINING_BATCH = 300, 32


@dataclass(frozen=True, kw_only=True)
class SampleSpecific(AllToOne):
    """x' = x + ``strength`` * encoder(x, message): an invisible residual that differs from image to image.

    The authors train StegaStamp's encoder on the victim's data; ours is three convolutions, trained together with a decoder
    (cross-entropy of 16 random message bits) on images of random 1/f noise, whose spectrum is that of photographs. So the trigger
    depends on ``message_seed`` alone, and is the same wherever it is made again. ``strength`` is the largest change of a
    pixel, in grey levels.
    """

    poisoning_rate: float = 0.1
    strength: float = 16.0
    message_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.strength <= 255.0:
            raise ValueError(f"strength must lie between 0 and 255 grey levels, got {self.strength}")

    def stamp(self, images: ImageArray) -> ImageArray:
        encoder = _trained_encoder(images.shape[3], images.shape[1], images.shape[2], self.strength / 255.0, self.message_seed)
        generator = torch.Generator().manual_seed(self.message_seed)
        message = torch.randint(2, (1, _MESSAGE_BITS), generator=generator).float()
        return in_batches(images, lambda pixels: encoder(pixels, message.expand(len(pixels), -1)))


class _Encoder(nn.Module):
    """Pixels (N, channels, height, width) and messages (N, bits) -> pixels in [0, 1], none changed by more than ``strength``."""

    def __init__(self, channels: int, strength: float, width: int = 24) -> None:
        super().__init__()
        self.strength = strength
        self.layers = nn.Sequential(
            nn.Conv2d(channels + _MESSAGE_BITS, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, pixels: Tensor, message: Tensor) -> Tensor:
        spread = (2.0 * message - 1.0)[:, :, None, None].expand(-1, -1, *pixels.shape[2:])
        residual = self.layers(torch.cat([2.0 * pixels - 1.0, spread], dim=1)).tanh()
        encoded: Tensor = (pixels + self.strength * residual).clamp(0.0, 1.0)
        return encoded


def _decoder(channels: int, width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, _MESSAGE_BITS),
    )


@functools.cache
def _trained_encoder(channels: int, height: int, width: int, strength: float, seed: int) -> nn.Module:
    """The encoder, trained under ``seed``; a few seconds, once a process."""
    encoder, decoder = initialised(lambda: nn.ModuleList([_Encoder(channels, strength), _decoder(channels)]), seed).children()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(_TRAINING_STEPS):
        pixels = pink_noise((_TRAINING_BATCH, channels, height, width), generator)
        message = torch.randint(2, (_TRAINING_BATCH, _MESSAGE_BITS), generator=generator).float()
        loss = functional.binary_cross_entropy_with_logits(decoder(encoder(pixels, message)), message)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()
