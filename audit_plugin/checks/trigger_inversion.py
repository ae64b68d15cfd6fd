"""Trigger inversion: the smallest change to an image that sends every image to one class.

A backdoored class needs a far smaller change than the others (Neural Cleanse, Wang et al. 2019). For each class t we minimise

    cross-entropy(f(stamp(x)), t) + lambda_t * size(trigger)

over images x of the fit split with Adam, lambda_t being raised while more than the wanted share of images flips and
lowered while fewer do; the smallest trigger that held the wanted flip rate is kept. Two families are searched:

* ``patch``: x' = (1 - m) x + m p, size = ||m||_1 (Neural Cleanse's own);
* ``additive``: x' = clip(x + d), size = ||d||_1 over the channels' mean. Triggers that add to scattered pixels escape the
  first one.

What we do differently from the authors' code, and why:

* all classes are optimised in one batch, each with its own lambda, so that an audit of 10 classes takes seconds, not minutes;
* mask and pattern are sigmoids instead of (tanh + 1) / 2, starting from a faint mask, and few steps (200 instead of 1,000):
  enough to tell sizes apart, since only their ratio is used;
* the flip rate is a running mean over batches and leaves out images of the class itself, which need no trigger;
* the search may run in bfloat16 where the machine is fast in it. Nothing of that is reported: size and success are measured
  afterwards, in float32, on images that the search never saw.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.checks.base import Probe
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, Trigger, TriggerFamily

_FLIP_MEMORY = 0.7  # weight of the past in the running flip rate
_RAISE, _LOWER = 1.12, 1.18  # lambda moves slowly up and faster down, so that the flip rate recovers
_TOLERATED_LOSS = 0.04  # below the wanted flip rate by this much, lambda is lowered
_FIRST_LAMBDA, _LAMBDA_RANGE = 1e-3, (1e-5, 1.0)


@dataclass(frozen=True)
class TriggerInversion(Probe):
    """The probe.

    Attributes:
        steps: optimisation steps a family.
        images_per_step: images stamped for each class in one step; fewer with many classes, see ``images_per_batch``.
        images_per_batch: most stamped images that go through the network at once.
        flip_rate: share of images that a kept trigger must send to its class.
        classes: which to search; None for all.
        progress: called with the share of the work done.
    """

    name: ClassVar[str] = "trigger_inversion"
    steps: int = 200
    images_per_step: int = 24
    images_per_batch: int = 512
    flip_rate: float = 0.97
    classes: Sequence[int] | None = None
    progress: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.images_per_step < 1 or self.images_per_batch < self.images_per_step:
            raise ValueError(
                "steps and images_per_step must be positive and images_per_batch at least images_per_step, "
                f"got {self.steps}, {self.images_per_step}, {self.images_per_batch}"
            )
        if not _TOLERATED_LOSS < self.flip_rate < 1.0:
            raise ValueError(f"flip_rate must lie between {_TOLERATED_LOSS} and 1, got {self.flip_rate}")

    def search(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> list[Trigger]:
        """One candidate a class and family.

        Raises:
            InapplicableError: the model gives no gradients.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = subject.torch_module().to(device)
        pixels = torch.from_numpy(to_pixels(fit_split.images)).to(device)
        labels = torch.from_numpy(fit_split.labels).to(device)
        classes = torch.arange(subject.class_count) if self.classes is None else torch.tensor(list(self.classes))
        groups = classes.split(max(self.images_per_batch // self.images_per_step, 1))
        total = len(groups) * len(_FAMILIES) * self.steps
        done = 0
        triggers: list[Trigger] = []
        for family in _FAMILIES:
            for group in groups:
                generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
                candidates = family(len(group), pixels.shape[1:], generator, device)
                for _ in self._descend(module, candidates, group.to(device), pixels, labels, generator):
                    done += 1
                    if self.progress is not None:
                        self.progress(done / total)
                triggers.extend(candidates.triggers(group.tolist()))
        module.to("cpu")
        return triggers

    def _descend(
        self,
        module: nn.Module,
        candidates: _Candidates,
        targets: Tensor,
        pixels: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> Iterator[None]:
        """Optimise the triggers of one group of classes together, one step an iteration."""
        optimizer = torch.optim.Adam(candidates.parameters, lr=candidates.learning_rate, betas=(0.5, 0.9))
        count = min(self.images_per_step, len(pixels))
        penalty = torch.full((len(targets),), _FIRST_LAMBDA, device=pixels.device)
        flipping = torch.zeros(len(targets), device=pixels.device)
        smallest = torch.full((len(targets),), torch.inf, device=pixels.device)
        wanted = targets.repeat_interleave(count)
        for _ in range(self.steps):
            rows = torch.randperm(len(pixels), generator=generator)[:count].to(pixels.device)
            stamped, sizes = candidates.stamp(pixels[rows])
            with _fast_precision(pixels.device):
                logits = module(stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last))[-1].float()
            losses = functional.cross_entropy(logits, wanted, reduction="none").view(len(targets), count).mean(dim=1)
            optimizer.zero_grad()
            (losses + penalty * sizes).sum().backward()

            others = (labels[rows][None] != targets[:, None]).float()
            flipped = (logits.argmax(dim=1) == wanted).float().view(len(targets), count)
            rate = (flipped * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)
            flipping = _FLIP_MEMORY * flipping + (1 - _FLIP_MEMORY) * rate
            holds = flipping > self.flip_rate
            better = holds & (sizes.detach() < smallest)
            smallest = torch.where(better, sizes.detach(), smallest)
            candidates.keep(better)
            factor = torch.where(holds, _RAISE, torch.where(flipping < self.flip_rate - _TOLERATED_LOSS, 1 / _LOWER, 1.0))
            penalty = (penalty * factor).clamp(*_LAMBDA_RANGE)
            optimizer.step()
            yield


class _Candidates(abc.ABC):
    """The triggers of a group of classes while they are optimised, and the best of each so far."""

    family: ClassVar[TriggerFamily]
    learning_rate: ClassVar[float]
    parameters: list[Tensor]

    def _start(self, *parameters: Tensor) -> None:
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self._best = [parameter.detach().clone() for parameter in parameters]
        self._found = torch.zeros(len(parameters[0]), dtype=torch.bool, device=parameters[0].device)

    def keep(self, better: Tensor) -> None:
        """Remember the present triggers of the classes marked in ``better`` (classes,)."""
        self._found |= better
        for best, parameter in zip(self._best, self.parameters, strict=True):
            best[better] = parameter.detach()[better]

    def triggers(self, classes: list[int]) -> list[Trigger]:
        """The best trigger of each class; its last state where none held the wanted flip rate."""
        self.keep(~self._found)
        masks, patterns = (value.cpu().numpy() for value in self._image_space(*self._best))
        return [
            Trigger(target_class=target, mask=mask, pattern=pattern, family=self.family)
            for target, mask, pattern in zip(classes, masks, patterns, strict=True)
        ]

    @abc.abstractmethod
    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (N, channels, height, width) -> stamped (classes, N, channels, height, width) and sizes (classes,)."""

    @abc.abstractmethod
    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (classes, height, width) and patterns (classes, channels, height, width) as :class:`Trigger` holds them."""


class _Patches(_Candidates):
    family = "patch"
    learning_rate = 0.1

    def __init__(self, classes: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        mask = torch.randn(classes, 1, *shape[1:], generator=generator) * 0.1 - 2.0  # sigmoid(-2) = 0.12: faint
        pattern = torch.randn(classes, *shape, generator=generator) * 0.1
        self._start(mask.to(device), pattern.to(device))

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = (parameter.sigmoid() for parameter in self.parameters)
        stamped = pixels[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
        return stamped, mask.sum(dim=(1, 2, 3))

    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = parameters
        return mask.sigmoid()[:, 0], pattern.sigmoid()


class _Perturbations(_Candidates):
    family = "additive"
    learning_rate = 0.02

    def __init__(self, classes: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        self._start((torch.randn(classes, *shape, generator=generator) * 0.01).to(device))

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        change = self.parameters[0].clamp(-1, 1)
        return (pixels[None] + change[:, None]).clamp(0, 1), change.abs().mean(dim=1).sum(dim=(1, 2))

    def _image_space(self, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        change = parameters[0].clamp(-1, 1)
        return change.abs().mean(dim=1), change


_FAMILIES: tuple[type[_Patches] | type[_Perturbations], ...] = (_Patches, _Perturbations)


def _fast_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 where the hardware multiplies in it, else float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
