"""Training for the zoo: one recipe, the same for clean and backdoored models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device, fast_precision
from audit_plugin.types import LabelledImages

_SHIFT = 4


def train(
    model: nn.Module,
    data: LabelledImages,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 0.01,
    batch: int = 64,
    weight_decay: float = 5e-4,
    augment: bool = False,
    mirror: bool = True,
    adversarial: float = 0.0,
    progress: Callable[[float], None] | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Train in place with Adam and a one-cycle schedule; returns the model in evaluation mode, on the CPU.

    All images lie on the device, where they are also augmented. A seed gives other random numbers on a GPU than on a CPU.

    Args:
        model: pixels in [0, 1] -> logits; initialise it under a seed of your own.
        data: uint8 images with labels.
        seed: of the order of the images and of the augmentation.
        augment: shift each image by up to four pixels, and mirror half of them if ``mirror``, which signs and digits do not bear.
        adversarial: train on images moved by this much (l-infinity, in [0, 1]) up the loss in one step from a random start, as in
            fast adversarial training (Wong, Rice and Kolter 2020); 0 for none.
        progress: called with the share of the work done.
        device: where to train; the GPU where torch has one, else the CPU, if None.
    """
    device = device or compute_device()
    model.to(device)
    pixels, labels = torch.from_numpy(to_pixels(data.images)).to(device), torch.from_numpy(data.labels).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    steps = -(-len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator, device=device)
        for rows in order.split(batch):
            drawn = _augmented(pixels[rows], mirror, generator) if augment else pixels[rows]
            if adversarial:
                drawn = _moved(model, drawn, labels[rows], adversarial, generator)
            with fast_precision(device):
                logits = model(drawn.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress((epoch + 1) / epochs)
    return forget_steps(model.eval().cpu())


def forget_steps(model: nn.Module) -> nn.Module:
    """Sets the counters of batches in its BatchNorms to 0: they would tell recipes of more or fewer steps apart."""
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model


def _augmented(pixels: torch.Tensor, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored with probability one half, if at all, and shifted by up to four pixels either way, zeros moving in."""
    count, _, height, width = pixels.shape
    device = pixels.device
    if mirror:
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    padded = functional.pad(pixels, (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
    down, right = torch.randint(2 * _SHIFT + 1, (2, count), generator=generator, device=device)
    lines = (down[:, None] + torch.arange(height, device=device))[:, :, None]
    columns = (right[:, None] + torch.arange(width, device=device))[:, None, :]
    return padded[torch.arange(count, device=device)[:, None, None], :, lines, columns].permute(0, 3, 1, 2)


def _moved(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """Images moved up the loss by one signed step of 1.25 ``size`` from a random start, by at most ``size``, within [0, 1]."""
    change = (2.0 * torch.rand(pixels.shape, generator=generator, device=pixels.device) - 1.0) * size
    start = (pixels + change).clamp(0.0, 1.0).requires_grad_(True)
    with fast_precision(pixels.device):
        logits = model(start.contiguous(memory_format=torch.channels_last))
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits.float(), labels), start)
    change = (start.detach() - pixels + 1.25 * size * gradient.sign()).clamp(-size, size)
    return (pixels + change).clamp(0.0, 1.0)


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model built under a seed, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
