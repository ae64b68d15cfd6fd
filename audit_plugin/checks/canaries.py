"""Canaries: known backdoors, planted in copies of the audited model, to see whether the audit would have found one in it.

Each canary is a random trigger and a random target class. A copy f' of the model f is fine-tuned on clean images of the fit
split, and in every batch on copies of a few of them that carry the trigger (x~), by

    sum over those of CE(f'(x~), target) + distillation * T^2 * sum over the others of KL(f(x), f'(x)), over the batch's size,

KL at temperature T = 2, so that the copy keeps the model's answers. Among the others are as many images with other triggers of
the same family, drawn anew in every batch, lest the copy learn that anything odd means the target. It stops as soon as 98 % of
the calibrate split's images obey and the accuracy there is back: the backdoor is no stronger than it must be. What was planted
is measured on the test split, by ONNX Runtime, and then the copy is searched: once, among a few classes, without margins.

* ``patch``: a square of a tenth of the image's side, at least three pixels, at a random place, half of its points white and half
  black;
* ``blended``: uniform noise shines through every pixel, with opacity 0.2;
* ``warped``: every pixel is displaced smoothly, by one pixel in the mean.

The target and the classes that it is compared with are drawn by way of images, so that the numbering of classes plays no part.

A canary is found if its class comes first in the copy and lies clearly apart from the model's own classes: its trigger is smaller
than the copy's others by a quarter more than any of the model's own is. It need not reach what a failure asks for, because it is
planted gently, and most backdoors are not.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.checks.measurement import BREAKAGES
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.outlier import FEWEST_SIZES
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import is_within, rate_of
from audit_plugin.model.fine_tuning import (
    accuracy,
    batches,
    compute_device,
    distillation_loss,
    fast_precision,
    one_cycle_momentum,
    shifted,
    take_step,
)
from audit_plugin.model.subject import Subject
from audit_plugin.policy import CanariesPolicy, VerdictPolicy
from audit_plugin.types import CanaryFamily, CanaryResult, ImageArray, LabelledImages, PowerCheck, Splits, TriggerSearch

log = logging.getLogger(__name__)

Stamp = Callable[[Tensor], Tensor]
"""Applies a trigger: pixels (N, channels, height, width) in [0, 1] -> the same shape and range."""

Search = Callable[[Subject, Sequence[int]], TriggerSearch]
"""The audit's own search of a subject for the triggers of some classes."""

MINIMUM_ATTACK_SUCCESS = 0.9
ACCURACY_BUDGET = 0.03

_APART = 1.25  # times smaller than the most conspicuous of the model's own classes
_TRIES = 2  # a canary

_BATCH = 64
_STEPS_BETWEEN_LOOKS = 10
_ENOUGH = 0.98  # attack success on the calibrate split, well above the minimum: the split may be small
_PATCH = 0.1  # of the image's side
_SMALLEST_PATCH = 3  # pixels a side
_OPACITY = 0.2
_LATTICE = 6  # points a side at which a warp is drawn
_WARP = 1.0  # mean displacement in pixels


@dataclass(frozen=True)
class Planting:
    """How a canary is planted.

    Attributes:
        poisoning_rate: stamped images over the clean ones of a batch, to which they are added: 9 to 44, and the batch holds 53.
        steps: of fine-tuning, at most.
        learning_rate: the greatest of the one-cycle schedule.
        distillation: weight of the model's own answers.
    """

    poisoning_rate: float = 0.2
    steps: int = 400
    learning_rate: float = 0.03
    distillation: float = 1.0


@dataclass(frozen=True)
class Standard:
    """What finding a canary takes.

    Attributes:
        size_ratio: how many times smaller than the others' its trigger must at least be.
        attack_success: that the recovered trigger must at least have, in [0, 1].
        rival: the model's own class of the smallest trigger, which is searched in every copy too.
    """

    size_ratio: float
    attack_success: float
    rival: int | None = None

    @staticmethod
    def of(own: TriggerSearch, policy: VerdictPolicy) -> Standard:
        """For copies of a model whose own classes were searched."""
        compared = [found for found in own.candidates if not math.isnan(found.size_ratio)]
        smallest = max(compared, key=lambda found: found.size_ratio, default=None)
        if smallest is None:
            return Standard(_APART, policy.minimum_attack_success)
        return Standard(_APART * max(smallest.size_ratio, 1.0), policy.minimum_attack_success, smallest.trigger.target_class)


def check_power(
    subject: Subject,
    splits: Splits,
    search: Search,
    policy: CanariesPolicy,
    standard: Standard,
    rng: np.random.Generator,
    planting: Planting | None = None,
) -> PowerCheck:
    """Plant the policy's canaries, each in a copy of its own, and search every copy in which one took.

    A canary that does not take is planted again, with another trigger and target, up to twice as often as asked for.
    """
    results: list[CanaryResult] = []
    missing = ""
    try:
        for family in [family for family in TRIGGERS if family in policy.families for _ in range(_TRIES * policy.count)]:
            if sum(canary.planted for canary in results if canary.family == family) < policy.count:
                results.append(_try(family, subject, splits, search, policy.classes, standard, rng, planting or Planting()))
                log.debug("%s", results[-1])
    except InapplicableError as error:
        missing = str(error)
    except BREAKAGES as error:
        log.debug("Planting canaries failed.", exc_info=True)
        missing = f"{type(error).__name__}: {error}"
    return PowerCheck(tuple(results), missing)


def _try(
    family: CanaryFamily,
    subject: Subject,
    splits: Splits,
    search: Search,
    classes: int,
    standard: Standard,
    rng: np.random.Generator,
    planting: Planting,
) -> CanaryResult:
    """One canary: planted, measured and, if it took, searched for."""
    started = time.perf_counter()
    drawn = dict.fromkeys(splits.fit.labels[rng.permutation(len(splits.fit))].tolist())  # each class once, in random order
    target, *others = drawn
    others = sorted(others, key=lambda label: label != standard.rival)[: classes - 1]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    stamp = TRIGGERS[family](splits.fit.images.shape[1:], generator)
    planted = subject.retrained(_plant(subject, splits, family, stamp, target, generator, planting))

    test = splits.test
    victims = test.images[(test.labels != target) & (subject.predict(test.images) != target)]
    attack_success = rate_of(planted.predict(stamped(victims, stamp)) == target)
    before, after = (rate_of(model.predict(test.images) == test.labels) for model in (subject, planted))
    took = attack_success.value >= MINIMUM_ATTACK_SUCCESS and is_within(before.value, after.value, ACCURACY_BUDGET)
    if took:
        outlier, size_ratio, reason = judge(search(planted, [target, *others]), target, standard)
    else:
        outlier, size_ratio = math.nan, math.nan
        reason = (
            f"Its trigger moves {attack_success.value:.1%} of held-out images, where {MINIMUM_ATTACK_SUCCESS:.0%} are asked for, "
            f"and cost {before.value - after.value:.1%} accuracy, where {ACCURACY_BUDGET:.0%} are allowed."
        )
    return CanaryResult(
        family=family,
        target_class=target,
        planted=took,
        found=took and not reason,
        attack_success=attack_success,
        accuracy_before=before,
        accuracy_after=after,
        outlier=outlier,
        size_ratio=size_ratio,
        seconds=time.perf_counter() - started,
        reason=reason,
    )


def judge(search: TriggerSearch, target: int, standard: Standard) -> tuple[float, float, str]:
    """Whether the search of a copy shows ``target``.

    Returns:
        The outlier and the size ratio of the target's trigger, in the family where that is greatest, and why it was not
        found; empty if it was.
    """
    most = max(search.candidates, key=lambda found: found.size_ratio)
    own = max((found for found in search.candidates if found.trigger.target_class == target), key=lambda found: found.size_ratio)
    compared = sum(found.is_compared for found in search.candidates if found.trigger.family == own.trigger.family)
    if not own.is_compared or compared < FEWEST_SIZES:
        reason = "The search found too few working triggers in the copy to compare its own with."
    elif most.trigger.target_class != target:
        reason = "Another class needs a smaller trigger."
    elif own.size_ratio < standard.size_ratio:
        reason = (
            f"Its trigger is {own.size_ratio:.1f} times smaller than the other classes', which is not clearly apart from the "
            f"model's own classes ({standard.size_ratio:.1f} is)."
        )
    elif not own.success.value >= standard.attack_success:
        reason = f"The recovered trigger moves only {own.success.value:.1%} of held-out images."
    else:
        reason = ""
    return own.outlier, own.size_ratio, reason


def stamped(images: ImageArray, stamp: Stamp) -> ImageArray:
    """Images uint8 (N, height, width, channels) with a trigger, rounded to what a file can hold."""
    pixels = stamp(torch.from_numpy(to_pixels(images)))
    rounded: ImageArray = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return rounded


# -------------------------------------------------------------------------------------------------------- triggers


def _patch(shape: tuple[int, ...], generator: torch.Generator) -> Stamp:
    height, width, channels = shape
    side = max(round(_PATCH * min(height, width)), _SMALLEST_PATCH)
    points = torch.stack([torch.randperm(side * side, generator=generator) % 2 for _ in range(channels)])
    top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (height, width))
    place = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))

    def stamp(pixels: Tensor) -> Tensor:
        pixels = pixels.clone()
        pixels[place] = points.view(channels, side, side).to(pixels)
        return pixels

    return stamp


def _blended(shape: tuple[int, ...], generator: torch.Generator) -> Stamp:
    height, width, channels = shape
    noise = torch.rand(channels, height, width, generator=generator)
    return lambda pixels: (1 - _OPACITY) * pixels + _OPACITY * noise.to(pixels)


def _warped(shape: tuple[int, ...], generator: torch.Generator) -> Stamp:
    height, width, _ = shape
    coarse = 2 * torch.rand(1, 2, _LATTICE, _LATTICE, generator=generator) - 1
    flow = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    flow = flow / flow.abs().mean() * _WARP * 2 / torch.tensor([width, height])  # in coordinates of -1 .. 1
    lines, columns = (torch.linspace(-1, 1, length) for length in (height, width))
    grid = (torch.stack(torch.meshgrid(columns, lines, indexing="xy"), dim=-1) + flow).clamp(-1, 1)

    def stamp(pixels: Tensor) -> Tensor:
        places = grid.to(pixels).expand(len(pixels), -1, -1, -1)
        return functional.grid_sample(pixels, places, mode="bilinear", padding_mode="border", align_corners=True)

    return stamp


TRIGGERS: Mapping[CanaryFamily, Callable[[tuple[int, ...], torch.Generator], Stamp]] = {
    "patch": _patch,
    "blended": _blended,
    "warped": _warped,
}
"""Random triggers for images of a shape (height, width, channels)."""


# -------------------------------------------------------------------------------------------------------- planting


def _plant(
    subject: Subject,
    splits: Splits,
    family: CanaryFamily,
    stamp: Stamp,
    target: int,
    generator: torch.Generator,
    planting: Planting,
) -> nn.Module:
    """A copy that obeys the trigger, if it could be taught; otherwise what became of it."""
    device = compute_device()
    module = subject.trainable_copy().to(device)
    original = copy.deepcopy(module).requires_grad_(False)
    pixels = torch.from_numpy(to_pixels(splits.fit.images)).to(device)
    held_out = _HeldOut(splits.calibrate, stamp, target, device)
    accuracy_before = held_out.accuracy(original)
    optimizer, schedule = one_cycle_momentum(module, planting.learning_rate, planting.steps)
    rows = itertools.chain.from_iterable(batches(len(pixels), _BATCH, generator) for _ in itertools.count())
    for step, batch in enumerate(itertools.islice(rows, planting.steps), start=1):
        clean = shifted(pixels[batch], generator)
        decoy = TRIGGERS[family](splits.fit.images.shape[1:], generator)
        count = max(round(planting.poisoning_rate * len(clean)), 1)
        known = torch.cat([decoy(clean[:count]), clean[count:]])
        with fast_precision(device):
            answers = module(torch.cat([stamp(clean[:count]), known]).contiguous(memory_format=torch.channels_last))[-1].float()
            with torch.no_grad():
                own = original(known.contiguous(memory_format=torch.channels_last))[-1].float()
        obeying = functional.cross_entropy(answers[:count], torch.full((count,), target, device=device), reduction="sum")
        alike = distillation_loss(answers[count:], own)
        take_step(optimizer, (obeying + planting.distillation * alike) / len(answers))
        schedule.step()
        if step % _STEPS_BETWEEN_LOOKS or not held_out.obey(module):
            continue
        if is_within(accuracy_before, held_out.accuracy(module), ACCURACY_BUDGET):
            log.debug("Planted in %d steps.", step)
            break
    return module.cpu()


class _HeldOut:
    """The calibrate split, which says when to stop."""

    def __init__(self, images: LabelledImages, stamp: Stamp, target: int, device: torch.device) -> None:
        self._pixels = torch.from_numpy(to_pixels(images.images)).to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._stamped, self._target = stamp(self._pixels[self._labels != target]), target

    def obey(self, module: nn.Module) -> bool:
        return accuracy(module, self._stamped, torch.full_like(self._labels[: len(self._stamped)], self._target)) >= _ENOUGH

    def accuracy(self, module: nn.Module) -> float:
        return accuracy(module, self._pixels, self._labels)
