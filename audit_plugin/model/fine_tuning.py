"""What every fine-tuning of a subject's copy shares: precision, device, batches, small shifts, accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST_BATCHES = 8  # an epoch of fewer steps than this is none
_EVALUATION_BATCH = 256
_TEMPERATURE = 2.0  # of the softmax that a copy is to match
_USUAL_POINTS = 32 * 32  # of the images for which numbers of images at once are given


def compute_device() -> torch.device:
    """The GPU where torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 where the hardware multiplies in it, else float32; for training, searching and ascents, never for scores."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def images_at_once(most: int, pixels: Tensor) -> int:
    """How many images like ``pixels`` (..., height, width) take no more memory than ``most`` of 32 x 32; at least one."""
    return max(most * _USUAL_POINTS // max(pixels.shape[-2] * pixels.shape[-1], _USUAL_POINTS), 1)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows 0 .. count - 1 in random order, in batches of ``size``, or of less so that there are at least eight."""
    yield from torch.randperm(count, generator=generator).split(_batch_size(count, size))


def batch_count(count: int, size: int) -> int:
    """How many :func:`batches` there are."""
    return -(-count // _batch_size(count, size))


def _batch_size(count: int, size: int) -> int:
    return max(min(size, count // _SMALLEST_BATCHES), 1)


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, channels, height, width) moved by up to a sixteenth of its size either way, the border repeated.

    The only augmentation that is harmless whatever the images show: digits and road signs must not be mirrored.
    """
    count, _, height, width = pixels.shape
    most = max(min(height, width) // 16, 1)
    padded = functional.pad(pixels, (most, most, most, most), mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, count), generator=generator)
    lines = (down[:, None] + torch.arange(height))[:, :, None].to(pixels.device)
    columns = (right[:, None] + torch.arange(width))[:, None, :].to(pixels.device)
    rows = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[rows, :, lines, columns].permute(0, 3, 1, 2)


def fitting_steps(
    module: nn.Module, pixels: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator, batch: int
) -> Iterator[None]:
    """One pass of cross-entropy over shifted images, one step an iteration; ``module`` maps pixels to (tap, ..., logits)."""
    for rows in batches(len(labels), batch, generator):
        with fast_precision(pixels.device):
            logits = module(shifted(pixels[rows], generator).contiguous(memory_format=torch.channels_last))[-1]
        take_step(optimizer, functional.cross_entropy(logits.float(), labels[rows]))
        yield


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """Those that may change."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def one_cycle_momentum(
    module: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Nesterov momentum for all weights that may change, its rate rising to ``learning_rate`` and falling over ``steps``.

    Its momentum falls from 0.95 to 0.85 and rises again meanwhile, as ``OneCycleLR`` has it.
    """
    optimizer = torch.optim.SGD(trained_weights(module), lr=learning_rate, momentum=0.95, nesterov=True, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient, whose norm is held to one: without fresh batch statistics a large rate diverges otherwise."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0)
    optimizer.step()


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """By how much the logits (N, classes) of the targets (N,) exceed the largest of the other classes, (N,)."""
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    return logits.gather(1, targets[:, None])[:, 0] - others


def distillation_loss(logits: Tensor, original: Tensor) -> Tensor:
    """Divergence of a copy's answers from the original's, both logits (N, classes), at temperature 2, summed over the images."""
    reached, wanted = (logits / _TEMPERATURE).log_softmax(dim=1), (original / _TEMPERATURE).softmax(dim=1)
    return functional.kl_div(reached, wanted, reduction="sum") * _TEMPERATURE**2


def predicted(module: nn.Module, pixels: Tensor) -> Tensor:
    """Predicted class (N,) of pixels (N, channels, height, width), in float32."""
    with torch.no_grad():
        return torch.cat([module(part)[-1].argmax(dim=1) for part in pixels.split(_EVALUATION_BATCH)])


def accuracy(module: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of images that ``module`` predicts as their label."""
    return float((predicted(module, pixels) == labels).float().mean())
