"""Stand-ins for a trigger that nobody knows: the recovered ones, and random patches, blends and warps beside them.

Random ones keep a repair from unlearning nothing but the very pixels that a search happened to find. Their ranges are those of
visible but harmless changes; no attack's own pattern is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from audit_plugin.types import Trigger

_RECOVERED_SHARE = 0.6  # of the images get a recovered trigger, where there is one
_LARGEST_PATCH = 0.2  # of the image's side
_OPACITIES = (0.05, 0.3)
_WARPS = (0.2, 1.7)  # mean displacement, in half pixels


class Surrogates:
    """Stamps each image with one stand-in, drawn at random."""

    def __init__(self, triggers: Sequence[Trigger], generator: torch.Generator, device: torch.device) -> None:
        self._generator = generator
        self._kinds: list[Callable[[Tensor], Tensor]] = [
            lambda pixels: random_patch(pixels, generator),
            lambda pixels: random_blend(pixels, generator),
            lambda pixels: random_warp(pixels, generator),
            *(_recovered(trigger, device) for trigger in triggers),
        ]
        share = _RECOVERED_SHARE if triggers else 0.0
        random, recovered = len(self._kinds) - len(triggers), len(triggers)
        self._odds = torch.tensor([(1 - share) / random] * random + [share / max(recovered, 1)] * recovered)

    def stamp(self, pixels: Tensor) -> Tensor:
        """pixels (N, channels, height, width) in [0, 1] -> the same shape and range."""
        stamped = pixels.clone()
        kinds = torch.multinomial(self._odds, len(pixels), replacement=True, generator=self._generator).to(pixels.device)
        for index, kind in enumerate(self._kinds):
            rows = kinds == index
            if rows.any():
                stamped[rows] = kind(pixels[rows])
        return stamped


def _recovered(trigger: Trigger, device: torch.device) -> Callable[[Tensor], Tensor]:
    """:meth:`Trigger.stamp` for pixels."""
    pattern = torch.from_numpy(trigger.pattern).to(device)
    if trigger.is_added:
        return lambda pixels: (pixels + pattern).clamp(0, 1)
    mask = torch.from_numpy(trigger.mask).to(device)
    return lambda pixels: pixels * (1 - mask) + mask * pattern


def random_patch(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A rectangle of noise or of one colour at a random place in each image, up to a fifth of its side."""
    count, channels, height, width = pixels.shape
    inside = torch.ones(count, 1, height, width, dtype=torch.bool)
    for axis, length in ((2, height), (3, width)):
        side = torch.randint(1, max(round(_LARGEST_PATCH * length), 1) + 1, (count, 1), generator=generator)
        first = (torch.rand(count, 1, generator=generator) * (length - side + 1)).long()
        places = torch.arange(length)[None]
        within = (places >= first) & (places < first + side)
        inside &= within.view(count, 1, *((length, 1) if axis == 2 else (1, length)))
    noise = torch.rand(pixels.shape, generator=generator)
    colour = torch.rand(count, channels, 1, 1, generator=generator).round().expand(pixels.shape)
    noisy = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(inside.to(pixels.device), torch.where(noisy, noise, colour).to(pixels.device), pixels)


def random_blend(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a random grain shining through each image with a random opacity."""
    count, channels, height, width = pixels.shape
    grain = 2 ** int(torch.randint(0, 4, (1,), generator=generator))
    coarse = torch.rand(count, channels, -(-height // grain), -(-width // grain), generator=generator)
    noise = functional.interpolate(coarse, (height, width), mode="nearest").to(pixels.device)
    opacity = (_OPACITIES[0] + torch.rand(count, 1, 1, 1, generator=generator) * (_OPACITIES[1] - _OPACITIES[0])).to(
        pixels.device
    )
    return (1 - opacity) * pixels + opacity * noise


def random_warp(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Smooth random displacements of about a pixel."""
    count, _, height, width = pixels.shape
    lattice = int(torch.randint(3, 6, (1,), generator=generator))
    coarse = torch.randn(count, 2, lattice, lattice, generator=generator)
    flow = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    strength = _WARPS[0] + torch.rand(count, 1, 1, 1, generator=generator) * (_WARPS[1] - _WARPS[0])
    flow = flow / flow.abs().mean(dim=(1, 2, 3), keepdim=True) * strength / torch.tensor([width, height])
    lines, columns = (torch.linspace(-1, 1, length) for length in (height, width))
    identity = torch.stack(torch.meshgrid(columns, lines, indexing="xy"), dim=-1)
    grid = (identity + flow).clamp(-1, 1).to(pixels.device)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)
