"""BeniFul elimination: Li, Zhang and Ma 2024 (arXiv 2410.14723). Pulls the features of triggered inputs back to benign ones.

With h the features of the suspect model at a middle layer, x a clean image with label y, x~ the same image with a stand-in for
the trigger, and VAE the auto-encoder of benign features that the detection uses, a copy (h', logits f') is fine-tuned on

    (1 - u) [CE(f'(x), y) + CE(f'(x~), y)] / 2 + u T^2 [KL(f(x), f'(x)) + KL(f(x), f'(x~))] / 2
        + w d(h'(x), h(x)) + w d(h'(x~), VAE(h(x))),

f and h being the original's, CE and KL means over the images, so that the halves make a mean over images and stand-ins together,
KL taken at temperature T = 2, and d the mean squared difference of averaged, standardised features. No code and no settings of
the paper are public, so these are ours:

* The labels of a few hundred images teach less than the original knows, so its own answers to clean images are kept (u = 0.9).
* Stand-ins are recovered triggers and, beside them, random patches, blends and warps (:mod:`audit_plugin.repair.surrogates`).
* A recovered trigger is a stand-in only where it is clearly smaller than those of other classes. Every class has some trigger;
  unlearning a natural one took three points of accuracy from a clean network. Where none is smaller, what must go is not known,
  and so neither is what may stay: then random stand-ins and labels teach (u = 0, w = 0.2), which still removes a warp.
* After every round the trigger of the class is searched again in the copy, since the first search seldom finds all of a
  backdoor. While it is still smaller than those of other classes, it joins the stand-ins of the next round. Each round is gentler
  than the last.
* Of the states after the rounds, the last one within the accuracy budget on the calibrate split is kept, the first one if none
  is. No true trigger is ever looked at.
* Normalisation keeps the statistics that the model was saved with.
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from audit_plugin.checks.inversion import Budget, Goal, Patches, Perturbations, invert
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import is_within
from audit_plugin.model.benign_features import FEWEST_ROWS, BenignFeatures, averaged_features, fit_benign_features
from audit_plugin.model.fine_tuning import (
    accuracy,
    batch_count,
    batches,
    compute_device,
    distillation_loss,
    fast_precision,
    one_cycle_momentum,
    shifted,
    take_step,
)
from audit_plugin.model.subject import Subject
from audit_plugin.repair.base import Repair, RepairedModel
from audit_plugin.repair.surrogates import Surrogates
from audit_plugin.types import FitSplit, Splits, Trigger

log = logging.getLogger(__name__)

_BATCH = 64
_GENTLER = 0.6  # the learning rate of a round over that of the round before
_CLASSES_COMPARED = 9  # most other classes whose triggers are searched for comparison
_CONSPICUOUS = 0.8  # of their median size: backdoored networks had 0.05 to 0.6, clean ones 0.95 and more
_BLIND_FEATURE_WEIGHT = 0.2  # w where no trigger is known
_DEPTH = 2 / 3  # of the network, where features are compared
_SEARCH = Budget(steps=100, images_per_step=24, images_per_batch=512, flip_rate=0.9)


@dataclass(frozen=True)
class BenifulRepair(Repair):
    """The repair.

    Attributes:
        accuracy_budget: most accuracy, in [0, 1], that may be lost on the calibrate split.
        rounds: of fine-tuning, a search for the trigger before each but the first.
        epochs: passes over the fit images in a round.
        distillation, feature_weight: u and w of the loss, where a stand-in was recovered.
        latent_size, steps: of the auto-encoder, as in the detection.
    """

    name: ClassVar[str] = "beniful"
    accuracy_budget: float = 0.02
    rounds: int = 3
    epochs: int = 5
    learning_rate: float = 0.01
    distillation: float = 0.9
    feature_weight: float = 2.0
    latent_size: int = 32
    steps: int = 600

    def repair(self, subject: Subject, splits: Splits, triggers: Sequence[Trigger], rng: np.random.Generator) -> RepairedModel:
        """Fine-tune a copy until the class's trigger is gone.

        Raises:
            InapplicableError: the model gives no gradients or has no intermediate layer, or there are too few images to fit.
            ValueError: the triggers are none, or of several classes.
        """
        targets = {trigger.target_class for trigger in triggers}
        if len(targets) != 1:
            raise ValueError(f"expected recovered triggers of one class, got those of the classes {sorted(targets)}")
        device = compute_device()
        module = subject.trainable_copy().to(device)
        benign = self._benign_features(subject, splits.fit, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        held_out = torch.from_numpy(to_pixels(splits.calibrate.images)).to(device)
        held_out_labels = torch.from_numpy(splits.calibrate.labels).to(device)
        accuracy_before = accuracy(module, held_out, held_out_labels)

        goal = Goal(targets.pop(), triggers[0].source_class)
        natural = _natural_sizes(module, splits.fit, goal, subject.class_count, rng)
        stand_ins = [trigger for trigger in triggers if trigger.family in natural or trigger.family == "wave"]
        original = copy.deepcopy(module).requires_grad_(False)
        distillation, feature_weight = (self.distillation, self.feature_weight) if stand_ins else (0.0, _BLIND_FEATURE_WEIGHT)
        objective = _Objective(original, benign, distillation, feature_weight)
        kept: dict[str, Tensor] | None = None
        history: list[dict[str, Any]] = []
        for number in range(self.rounds):
            rate = self.learning_rate * _GENTLER**number
            self._round(module, objective, splits.fit, Surrogates(stand_ins, generator, device), generator, rate)
            found = _search(module, splits.fit, [goal], rng)
            reached = accuracy(module, held_out, held_out_labels)
            history.append({"calibrate_accuracy": reached, "trigger_sizes": {trigger.family: trigger.size for trigger in found}})
            log.debug("Repair: %s", history[-1])
            if kept is None or is_within(accuracy_before, reached, self.accuracy_budget):
                kept = copy.deepcopy(module.state_dict())
            stand_ins += [trigger for trigger in found if trigger.size < natural.get(trigger.family, 0.0)]
        module.load_state_dict(kept or {})
        facts = {"natural_sizes": natural, "rounds": history, "calibrate_accuracy_before": accuracy_before}
        return RepairedModel(subject.retrained(module.cpu()), facts)

    def _round(
        self,
        module: nn.Module,
        objective: _Objective,
        fit_split: FitSplit,
        surrogates: Surrogates,
        generator: torch.Generator,
        learning_rate: float,
    ) -> None:
        """Fine-tune for some epochs with one-cycle momentum."""
        device = compute_device()
        pixels = torch.from_numpy(to_pixels(fit_split.images)).to(device)
        labels = torch.from_numpy(fit_split.labels).to(device)
        optimizer, schedule = one_cycle_momentum(module, learning_rate, self.epochs * batch_count(len(labels), _BATCH))
        for _ in range(self.epochs):
            for rows in batches(len(labels), _BATCH, generator):
                clean = shifted(pixels[rows], generator)
                take_step(optimizer, objective(module, clean, surrogates.stamp(clean), labels[rows]))
                schedule.step()

    def _benign_features(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> _Benign:
        taps = subject.summary.taps
        if not taps:
            raise InapplicableError("The network has no intermediate layer whose features could be pulled to benign ones.")
        if len(fit_split) < FEWEST_ROWS:
            raise InapplicableError(
                f"The repair learns from at least {FEWEST_ROWS} clean images in the fit split, there are {len(fit_split)}. "
                "Give more clean images."
            )
        index = round(_DEPTH * (len(taps) - 1))
        windows, averaged = averaged_features(
            subject.session, fit_split.images, taps[index], self.latent_size, subject.class_count
        )
        fitted = fit_benign_features(
            averaged,
            fit_split.labels,
            windows,
            subject.class_count,
            rng,
            latent_size=self.latent_size,
            steps=self.steps,
        )
        return _Benign(index, fitted.module.to(compute_device()))


@dataclass(frozen=True)
class _Objective:
    """The loss; ``original`` is the frozen model, ``distillation`` and ``feature_weight`` are u and w."""

    original: nn.Module
    benign: _Benign
    distillation: float
    feature_weight: float

    def __call__(self, module: nn.Module, clean: Tensor, stamped: Tensor, labels: Tensor) -> Tensor:
        """Loss of a copy on images (N, ...), the same with stand-ins, and their labels (N,)."""
        both = torch.cat([clean, stamped]).contiguous(memory_format=torch.channels_last)
        with fast_precision(both.device):
            answers = module(both)
            with torch.no_grad():
                known = self.original(both[: len(clean)])
        logits = answers[-1].float()
        right = functional.cross_entropy(logits, labels.repeat(2))
        alike = distillation_loss(logits, known[-1].float().repeat(2, 1)) / len(logits)
        features = self.benign.distances(answers, known, labels)
        return (1 - self.distillation) * right + self.distillation * alike + self.feature_weight * features


@dataclass(frozen=True)
class _Benign:
    """The auto-encoder, and the tap that it belongs to."""

    index: int
    features: BenignFeatures

    def distances(self, answers: Sequence[Tensor], known: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The two feature terms of the loss; ``answers`` of the copy for clean and then stamped images, ``known`` of the
        original for the clean ones."""
        clean, stamped = self.features.standardised(answers[self.index].float()).chunk(2)
        wanted = self.features.standardised(known[self.index].float())
        with torch.no_grad():
            benign = self.features(wanted, labels)
        return functional.mse_loss(clean, wanted) + functional.mse_loss(stamped, benign)


def _search(module: nn.Module, fit_split: FitSplit, goals: Sequence[Goal], rng: np.random.Generator) -> list[Trigger]:
    """The triggers of the goals as they would be found now, one a family and goal."""
    frozen = copy.deepcopy(module).requires_grad_(False)
    families = (Patches,) if any(goal.source_class is not None for goal in goals) else (Patches, Perturbations)
    return invert(frozen, fit_split, goals, families, _SEARCH, rng)


def _natural_sizes(
    module: nn.Module, fit_split: FitSplit, goal: Goal, class_count: int, rng: np.random.Generator
) -> dict[str, float]:
    """The median size of some other classes' triggers in each family where the goal's own is clearly smaller."""
    others = [target for target in range(class_count) if target not in (goal.target_class, goal.source_class)]
    compared = rng.permutation(others)[:_CLASSES_COMPARED].tolist()
    sizes: dict[str, list[float]] = {}
    for trigger in _search(module, fit_split, [goal, *(Goal(target, goal.source_class) for target in compared)], rng):
        sizes.setdefault(trigger.family, []).append(trigger.size)
    most = float(np.prod(fit_split.images.shape[1:3]))  # where there is nothing to compare with
    medians = {family: statistics.median(natural or [most]) for family, (_, *natural) in sizes.items()}
    return {family: median for family, median in medians.items() if sizes[family][0] < _CONSPICUOUS * median}
