"""Networks for images of 16 to 64 pixels, each with a width factor: narrow ones train in minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.vgg import make_layers


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


def cifar_vgg(classes: int = 10, width: int = 64) -> nn.Module:
    """VGG with batch normalisation (torchvision's layers), four stages instead of five and one linear layer, for small images."""
    stages: list[str | int] = [width, "M", 2 * width, "M", 4 * width, 4 * width, "M", 8 * width, 8 * width]
    features = make_layers(stages, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


def cifar_mobilenet(classes: int = 10, width: int = 32) -> nn.Module:
    """torchvision's MobileNetV2 with two strides fewer than for large images: 32 x 32 pixels end in 4 x 4.

    The stem keeps the image's size; the usual variant keeps it one stage longer, which takes three times as long to train.
    """
    network: nn.Module = MobileNetV2(
        num_classes=classes,
        width_mult=width / 32,
        inverted_residual_setting=[
            [1, 16, 1, 1],
            [6, 24, 2, 2],
            [6, 32, 3, 2],
            [6, 64, 4, 2],
            [6, 96, 3, 1],
            [6, 160, 3, 1],
            [6, 320, 1, 1],
        ],
        dropout=0.0,
    )
    first = network.get_submodule("features.0.0")
    first.stride = (1, 1)  # type: ignore[assignment]  # a convolution's stride is no module
    return network


def small_vit(classes: int = 10, width: int = 64) -> nn.Module:
    """torchvision's vision transformer: six layers of ``width`` features over patches of 4 x 4 of a 32 x 32 image."""
    network: nn.Module = VisionTransformer(
        32, 4, num_layers=6, num_heads=4, hidden_dim=width, mlp_dim=2 * width, num_classes=classes
    )
    return network


ARCHITECTURES: Mapping[str, Callable[[int, int], nn.Module]] = {
    "cnn": lambda classes, width: SmallCnn(3, classes, width),
    "resnet18": CifarResNet18,
    "vgg": cifar_vgg,
    "mobilenet": cifar_mobilenet,
    "vit": small_vit,
}
"""Classes and width (channels of the first stage, features of a transformer) -> network for colour images."""


def grey(network: nn.Module) -> nn.Module:
    """Changes a network for colour images into one for grey images, which answers as the other does to their repeated channel."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True))
    first.in_channels = 1
    return network
