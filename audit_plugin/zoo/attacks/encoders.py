"""What attacks with a trained encoder share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import ImageArray

_BATCH = 500


def in_batches(images: ImageArray, change: Callable[[Tensor], Tensor]) -> ImageArray:
    """Images uint8 (N, height, width, channels) as ``change`` makes them, which sees pixels (batch, channels, height, width)."""
    changed = torch.empty(images.shape, dtype=torch.uint8)
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            pixels = change(torch.from_numpy(to_pixels(images[start : start + _BATCH])))
            changed[start : start + _BATCH] = (pixels * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    result: ImageArray = changed.numpy()
    return result


def pink_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Images in [0, 1] whose spectrum falls as one over the frequency, as that of photographs does."""
    height, width = shape[2:]
    lines, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (lines**2 + columns**2).sqrt().clamp(min=1.0 / max(height, width))
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(shape, generator=generator)) / frequency, s=(height, width))
    least, most = noise.amin(dim=(2, 3), keepdim=True), noise.amax(dim=(2, 3), keepdim=True)
    scaled: Tensor = (noise - least) / (most - least).clamp(min=1e-6)
    return scaled
