"""Training for the zoo: one recipe, the same for clean and backdoored models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import LabelledImages


def train(
    model: nn.Module,
    data: LabelledImages,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 0.01,
    batch: int = 64,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train in place with Adam and a one-cycle schedule; returns the model in evaluation mode.

    Args:
        model: pixels in [0, 1] -> logits; initialise it under a seed of your own.
        data: uint8 images with labels.
        seed: of the order of the images.
        progress: called with the share of the work done.
    """
    pixels, labels = torch.from_numpy(to_pixels(data.images)), torch.from_numpy(data.labels)
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(batch):
            with _fast_precision():
                logits = model(pixels[rows].contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress((epoch + 1) / epochs)
    return model.eval()


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model built under a seed, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _fast_precision() -> contextlib.AbstractContextManager[object]:
    """bfloat16 for training where the CPU multiplies in it; never for a reported score."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
