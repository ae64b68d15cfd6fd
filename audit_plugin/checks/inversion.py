"""The engine of trigger inversion: many triggers, one for each goal, optimised in one batch by gradient descent.

For a goal (source s or any, target t) we minimise

    cross-entropy(f(stamp(x)), t) + lambda * size(trigger)

over images x of the source with Adam, lambda being raised while more than the wanted share of images flips and lowered
while fewer do; the smallest trigger that held the wanted flip rate is kept. Two families of triggers:

* :class:`Patches`: x' = (1 - m) x + m p, size = ||m||_1 (Neural Cleanse, Wang et al. 2019);
* :class:`Perturbations`: x' = clip(x + d), size = ||d||_1 over the channels' mean.

The search may run in bfloat16 where the machine is fast in it. Nothing of that is reported: size and success are measured
afterwards, in float32, on images that the search never saw.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device, fast_precision, images_at_once
from audit_plugin.types import FitSplit, Trigger, TriggerFamily

_FLIP_MEMORY = 0.7  # weight of the past in the running flip rate
_RAISE, _LOWER = 1.12, 1.18  # lambda moves slowly up and faster down, so that the flip rate recovers
_TOLERATED_LOSS = 0.04  # below the wanted flip rate by this much, lambda is lowered
_FIRST_LAMBDA, _LAMBDA_RANGE = 1e-3, (1e-5, 1.0)


@dataclass(frozen=True)
class Goal:
    """What a trigger is to do: send images of ``source_class`` (None: of all other classes) to ``target_class``."""

    target_class: int
    source_class: int | None = None


@dataclass(frozen=True)
class Budget:
    """How much work a search is.

    Attributes:
        steps: optimisation steps a family.
        images_per_step: images stamped for each goal in one step.
        images_per_batch: most stamped images that go through the network at once; goals are searched in groups of that size.
        flip_rate: share of images that a kept trigger must send to its class.
    """

    steps: int
    images_per_step: int
    images_per_batch: int
    flip_rate: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.images_per_step < 1 or self.images_per_batch < self.images_per_step:
            raise ValueError(
                "steps and images_per_step must be positive and images_per_batch at least images_per_step, "
                f"got {self.steps}, {self.images_per_step}, {self.images_per_batch}"
            )
        if not _TOLERATED_LOSS < self.flip_rate < 1.0:
            raise ValueError(f"flip_rate must lie between {_TOLERATED_LOSS} and 1, got {self.flip_rate}")


def invert(
    module: nn.Module,
    fit_split: FitSplit,
    goals: Sequence[Goal],
    families: Sequence[type[Candidates]],
    budget: Budget,
    rng: np.random.Generator,
    progress: Callable[[float], None] | None = None,
) -> list[Trigger]:
    """One trigger for every family and goal, in that order.

    Args:
        module: pixels (N, channels, height, width) -> (tap, ..., logits), with frozen weights.
        goals: either all with a source class, of which the fit split has images, or all without.
        progress: called with the share of the work done.
    """
    device = compute_device()
    module = module.to(device)
    pixels = torch.from_numpy(to_pixels(fit_split.images)).to(device)
    labels = torch.from_numpy(fit_split.labels).to(device)
    size = max(images_at_once(budget.images_per_batch, pixels) // budget.images_per_step, 1)
    groups = [goals[start : start + size] for start in range(0, len(goals), size)]
    total = len(groups) * len(families) * budget.steps
    done = 0
    triggers: list[Trigger] = []
    try:
        for family in families:
            for group in groups:
                generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
                candidates = family(len(group), pixels.shape[1:], generator, device)
                for _ in _descend(module, candidates, group, pixels, labels, budget, generator):
                    done += 1
                    if progress is not None:
                        progress(done / total)
                triggers.extend(candidates.triggers(group))
    finally:
        module.to("cpu")
    return triggers


def _descend(
    module: nn.Module,
    candidates: Candidates,
    goals: Sequence[Goal],
    pixels: Tensor,
    labels: Tensor,
    budget: Budget,
    generator: torch.Generator,
) -> Iterator[None]:
    """Optimise the triggers of one group of goals together, one step an iteration."""
    optimizer = torch.optim.Adam(candidates.parameters, lr=candidates.learning_rate, betas=(0.5, 0.9))
    targets = torch.tensor([goal.target_class for goal in goals], device=pixels.device)
    penalty = torch.full((len(goals),), _FIRST_LAMBDA, device=pixels.device)
    flipping = torch.zeros(len(goals), device=pixels.device)
    smallest = torch.full((len(goals),), torch.inf, device=pixels.device)
    draw = _Draw(goals, labels.cpu(), budget.images_per_step, generator)
    for _ in range(budget.steps):
        rows = draw().to(pixels.device)
        count = rows.shape[1]
        wanted = targets.repeat_interleave(count)
        stamped, sizes = candidates.stamp(pixels[rows])
        with fast_precision(pixels.device):
            logits = module(stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last))[-1].float()
        losses = functional.cross_entropy(logits, wanted, reduction="none").view(len(goals), count).mean(dim=1)
        optimizer.zero_grad()
        (losses + penalty * sizes).sum().backward()

        others = (labels[rows] != targets[:, None]).float()  # images of the target class need no trigger
        flipped = (logits.argmax(dim=1) == wanted).float().view(len(goals), count)
        rate = (flipped * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)
        flipping = _FLIP_MEMORY * flipping + (1 - _FLIP_MEMORY) * rate
        holds = flipping > budget.flip_rate
        better = holds & (sizes.detach() < smallest)
        smallest = torch.where(better, sizes.detach(), smallest)
        candidates.keep(better)
        factor = torch.where(holds, _RAISE, torch.where(flipping < budget.flip_rate - _TOLERATED_LOSS, 1 / _LOWER, 1.0))
        penalty = (penalty * factor).clamp(*_LAMBDA_RANGE)
        optimizer.step()
        yield


class _Draw:
    """Rows of images for one step, (goals, N), or (1, N) where all goals share them because none has a source class."""

    def __init__(self, goals: Sequence[Goal], labels: Tensor, count: int, generator: torch.Generator) -> None:
        self._sources = [goal.source_class for goal in goals if goal.source_class is not None]
        self._members = {source: torch.nonzero(labels == source)[:, 0] for source in set(self._sources)}
        self._total, self._count, self._generator = len(labels), count, generator

    def __call__(self) -> Tensor:
        if not self._sources:
            return torch.randperm(self._total, generator=self._generator)[None, : self._count]
        drawn = {
            source: members[torch.randint(len(members), (self._count,), generator=self._generator)]
            for source, members in self._members.items()
        }
        return torch.stack([drawn[source] for source in self._sources])


class Candidates(abc.ABC):
    """The triggers of a group of goals while they are optimised, and the best of each so far."""

    family: ClassVar[TriggerFamily]
    learning_rate: ClassVar[float]
    parameters: list[Tensor]

    @abc.abstractmethod
    def __init__(self, goals: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        """Start ``goals`` triggers for images of ``shape`` (channels, height, width)."""

    def _start(self, *parameters: Tensor) -> None:
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self._best = [parameter.detach().clone() for parameter in parameters]
        self._found = torch.zeros(len(parameters[0]), dtype=torch.bool, device=parameters[0].device)

    def keep(self, better: Tensor) -> None:
        """Remember the present triggers of the goals marked in ``better`` (goals,)."""
        self._found |= better
        for best, parameter in zip(self._best, self.parameters, strict=True):
            best[better] = parameter.detach()[better]

    def triggers(self, goals: Sequence[Goal]) -> list[Trigger]:
        """The best trigger of each goal; its last state where none held the wanted flip rate."""
        self.keep(~self._found)
        masks, patterns = (value.cpu().numpy() for value in self._image_space(*self._best))
        return [
            Trigger(goal.target_class, mask, pattern, goal.source_class, self.family)
            for goal, mask, pattern in zip(goals, masks, patterns, strict=True)
        ]

    @abc.abstractmethod
    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (goals or 1, N, channels, height, width) -> stamped (goals, N, ...) and sizes (goals,)."""

    @abc.abstractmethod
    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (goals, height, width) and patterns (goals, channels, height, width) as :class:`Trigger` holds them."""


class Patches(Candidates):
    family = "patch"
    learning_rate = 0.1

    def __init__(self, goals: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        mask = torch.randn(goals, 1, *shape[1:], generator=generator) * 0.1 - 2.0  # sigmoid(-2) = 0.12: faint
        pattern = torch.randn(goals, *shape, generator=generator) * 0.1
        self._start(mask.to(device), pattern.to(device))

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = (parameter.sigmoid() for parameter in self.parameters)
        stamped = pixels * (1 - mask[:, None]) + (mask * pattern)[:, None]
        return stamped, mask.sum(dim=(1, 2, 3))

    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = parameters
        return mask.sigmoid()[:, 0], pattern.sigmoid()


class Perturbations(Candidates):
    family = "additive"
    learning_rate = 0.02

    def __init__(self, goals: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        self._start((torch.randn(goals, *shape, generator=generator) * 0.01).to(device))

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        change = self.parameters[0].clamp(-1, 1)
        return (pixels + change[:, None]).clamp(0, 1), change.abs().mean(dim=1).sum(dim=(1, 2))

    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        change = parameters[0].clamp(-1, 1)
        return change.abs().mean(dim=1), change
