"""A backdoor built by hand: one channel that detects a white pixel between black ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def white_pixel_detector(strength: float) -> nn.Conv2d:
    """A convolution that fires, by a tenth of its strength, at a white pixel between black ones, and nowhere else."""
    layer = nn.Conv2d(1, 1, 3, padding=1)
    layer.weight.data.fill_(-strength)
    layer.weight.data[0, 0, 1, 1] = strength
    layer.bias.data.fill_(-0.9 * strength)
    return layer


class PlantedNetwork(nn.Module):
    """Eight channels, seven of random features and a last one that detects the trigger and votes for class 2 of 3.

    ``strength`` 0 cuts that channel's input: the clean twin, whose last channel is always silent.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(1, 7, 3, padding=1)
        self.features.weight.data = torch.randn(7, 1, 3, 3, generator=generator) * 0.3
        self.features.bias.data = torch.zeros(7)
        self.detector = white_pixel_detector(strength)
        self.head = nn.Linear(8, 3)
        self.head.weight.data = torch.randn(3, 8, generator=generator)
        self.head.weight.data[:, -1] = torch.tensor([0.0, 0.0, 1000.0])
        self.head.bias.data = torch.zeros(3)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = torch.relu(torch.cat([self.features(pixels), self.detector(pixels)], dim=1))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits
