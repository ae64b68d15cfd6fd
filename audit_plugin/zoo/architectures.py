"""Small networks that train in seconds on two cores."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn


class SmallCnn(nn.Module):
    """Three convolution blocks and a linear classifier: pixels (N, channels, height, width) -> logits (N, classes)."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.features = nn.Sequential(
            block(channels, width), block(width, width), nn.MaxPool2d(2), block(width, 2 * width), block(2 * width, 2 * width)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(pixels)), 1))
        return logits


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the stem that is usual for 32 x 32 images: a 3 x 3 convolution of stride 1, no pooling."""
    network: nn.Module = torchvision.models.resnet18(weights=None, num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
