"""Small networks that train in seconds on two cores."""

from __future__ import annotations

import torch
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


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, values: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(values)))))
        merged: Tensor = self.relu(inner + self.shortcut(values))
        return merged


class CifarResNet18(nn.Module):
    """ResNet-18 with the stem that is usual for 32 x 32 images (a 3 x 3 convolution of stride 1, no pooling).

    ``width`` is the number of channels of the first stage: 64 is the paper's network, 32 trains four times as fast.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            blocks += [_BasicBlock(inputs, outputs, stride), _BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.blocks(self.stem(pixels))), 1))
        return logits
