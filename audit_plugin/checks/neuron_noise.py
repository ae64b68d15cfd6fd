"""Neuron noise: how little the channels' weights must change until the model sees a class in every image.

Each row of each weight tensor (the weights of one output channel, a bias, a scale) is multiplied by 1 + d. For each class t the
mean log probability of t over clean images of other classes is raised by steepest ascent over d, in steps along the gradient
whose lengths (l2, all rows together) add up; noted is the sum at which the mean margin f_t(x) - max over s != t of f_s(x) reaches
the median of that of the model's answers to clean images. A backdoor is a shortcut in the weights, whatever its trigger looks
like, and a little noise opens it for every image (Wu and Wang 2021, *Adversarial Neuron Pruning*; Xu et al. 2024, *BAN: Detecting
Backdoors Activated by Adversarial Neuron Noise*). So warped and blended triggers are seen that no small patch imitates.

The same is measured on copies of the model that have forgotten part of their task (:mod:`audit_plugin.model.fine_tuned_copies`),
and each class counts with the geometric mean. While a copy forgets, it falls back on the target class of triggers that cover the
image: the backdoor stays when the features that compete with it go.

What we do differently from the papers, and why:

* noise is sought for each class instead of against all labels at once, so that classes can be compared with each other:
  untargeted noise ends in some one class of every model, clean ones too;
* noise is relative to the weights and measured in l2 over all rows, instead of bounded row by row: only the shortest way tells
  a shortcut from brute force (docs/decisions/0008 has both);
* a row is what the first axis longer than one of a stored weight counts: output channels in torch, but inputs in some ONNX
  layouts;
* the mask over features that BAN adds is left out;
* the copies are ours; docs/decisions/0011 has what they show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from audit_plugin.checks.base import FEWEST_CLASSES_REACHED, ClassMeasure
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuned_copies import LAST_RATE, Tuning, forgetting_copies
from audit_plugin.model.fine_tuning import compute_device, fast_precision, images_at_once, margins
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray

_LENGTHS = (0.0, *(0.05 * 1.3**step for step in range(20)))  # to 7.3
_FEWEST_IMAGES = 5  # of other classes
_MOST_IMAGES = 512  # of 32 x 32 that go through the network at once


@dataclass(frozen=True)
class NeuronNoise(ClassMeasure):
    """The measure.

    Attributes:
        images: of the fit split, at random; of them the noise must move those that neither belong to the class nor are
            predicted as it.
        kept_accuracy: a copy that keeps this share of the model's accuracy is measured too, for each share; they fall.
    """

    name: ClassVar[str] = "neuron_noise"
    images: int = 100
    kept_accuracy: tuple[float, ...] = (0.9, 0.75)

    def measure(self, subject: Subject, fit_split: FitSplit, classes: Sequence[int], rng: np.random.Generator) -> FloatArray:
        """One over the length of the noise that each class needs, (classes,), the geometric mean over the model and its copies.

        Where the longest, 7.3, does not do, it counts as needed; a class that it never moves is zero.

        Raises:
            InapplicableError: the model gives no gradients or has no weights, there are fewer than five images of other classes,
                noise reaches fewer than three classes, or no copy can be made to forget (see :class:`Tuning`).
        """
        device = compute_device()
        chosen = rng.permutation(len(fit_split))[: self.images]
        pixels = torch.from_numpy(to_pixels(fit_split.images[chosen])).to(device)
        labels = torch.from_numpy(fit_split.labels[chosen]).to(device)
        modules = itertools.chain([subject.trainable_copy().to(device)], self._forgetful(subject, fit_split, rng))
        lengths = np.array([_lengths_needed(module, pixels, labels, classes) for module in modules])
        reached = np.isfinite(lengths).any(axis=0)
        if reached.sum() < FEWEST_CLASSES_REACHED:
            raise InapplicableError(
                f"Noise in the weights makes the model see only {reached.sum()} of {len(reached)} classes, too few to compare. "
                "A model that hides its gradients ends here."
            )
        means = np.exp(np.log(np.minimum(lengths, _LENGTHS[-1])).mean(axis=0))
        return np.where(reached, 1 / means, 0.0).astype(np.float32)

    def _forgetful(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> Iterator[nn.Module]:
        """The copies that keep each share of the model's accuracy."""
        if not self.kept_accuracy:
            return
        tuning = Tuning(subject, fit_split, rng)
        copies = forgetting_copies(tuning, [share * tuning.accuracy for share in self.kept_accuracy])
        for share, copied in itertools.zip_longest(self.kept_accuracy, copies):
            if copied is None:
                raise InapplicableError(
                    f"No learning rate up to {LAST_RATE:g} made a copy of the model forget: it kept more than {share:.0%} of its "
                    "accuracy."
                )
            yield copied.module


def _lengths_needed(module: nn.Module, pixels: Tensor, labels: Tensor, classes: Sequence[int]) -> list[float]:
    """The length of the noise that each class needs in this module, infinite where the longest does not do."""
    weights = {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad and weight.ndim}
    with torch.no_grad():
        logits = module(pixels)[-1].float()
    answers = logits.argmax(dim=1)
    wanted = float(margins(logits, answers).median())
    lengths = []
    for target in classes:
        others = pixels[(labels != target) & (answers != target)]
        if len(others) < _FEWEST_IMAGES:
            raise InapplicableError(
                f"Only {len(others)} of {len(pixels)} images belong to other classes than {target} and are seen as such, and "
                f"at least {_FEWEST_IMAGES} are needed."
            )
        lengths.append(_needed(_ascent(module, weights, others, target), wanted))
    return lengths


def _needed(path: Iterator[tuple[float, float]], wanted: float) -> float:
    """The length at which the margin on a path of (length, margin) reaches ``wanted``, interpolated; infinite if never."""
    length, margin = next(path)
    if margin >= wanted:  # without any noise
        return _LENGTHS[1]
    for longer, greater in path:
        if greater >= wanted:
            return length + (longer - length) * (wanted - margin) / (greater - margin)
        length, margin = longer, greater
    return math.inf


def _ascent(module: nn.Module, weights: Mapping[str, Tensor], pixels: Tensor, target: int) -> Iterator[tuple[float, float]]:
    """Length of the path to the noise and the mean margin of ``target`` over the images, from no noise to the longest."""
    noise = {name: torch.zeros(_rows(weight), device=pixels.device) for name, weight in weights.items()}
    parts = pixels.split(images_at_once(_MOST_IMAGES, pixels))
    for length, longer in itertools.pairwise((*_LENGTHS, math.inf)):
        for row in noise.values():
            row.requires_grad_(True)
        gradients = [torch.zeros_like(row) for row in noise.values()]
        margin = 0.0
        for part in parts:
            share = len(part) / len(pixels)
            with fast_precision(pixels.device):
                noisy = {name: (weight * (1 + noise[name])).to(weight.dtype) for name, weight in weights.items()}
                logits = functional_call(module, noisy, (part,))[-1].float()
            targets = torch.full((len(part),), target, device=pixels.device)
            margin += share * float(margins(logits.detach(), targets).mean())
            if not math.isinf(longer) and logits.requires_grad:
                objective = share * logits.log_softmax(dim=1)[:, target].mean()
                added = torch.autograd.grad(objective, list(noise.values()), allow_unused=True, materialize_grads=True)
                gradients = [found + more for found, more in zip(gradients, added, strict=True)]
        yield length, margin
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        if not 0 < norm < math.inf:
            return
        noise = {
            name: row.detach() + (longer - length) / norm * gradient
            for (name, row), gradient in zip(noise.items(), gradients, strict=True)
        }


def _rows(weight: Tensor) -> list[int]:
    """The shape of one number a row of the weight."""
    axis = next((axis for axis, length in enumerate(weight.shape) if length > 1), 0)
    return [length if position == axis else 1 for position, length in enumerate(weight.shape)]
