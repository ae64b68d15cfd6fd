"""BeniFul elimination: Li, Zhang and Ma 2024 (arXiv 2410.14723). Pulls the features of triggered inputs back to benign ones.

With h the features of the suspect model at a middle layer, x a clean image with label y, x~ the same image with a stand-in for
the trigger, and VAE the auto-encoder of benign features that the detection uses, a copy (h', logits f') is fine-tuned on

    CE(f'(x), y) + CE(f'(x~), y) + weight * d(h'(x), h(x)) + weight * d(h'(x~), VAE(h(x))),

d being the mean squared difference of averaged, standardised features. No code and no settings of the paper are public, so
these are ours:

* Stand-ins are recovered triggers and, beside them, random patches, blends and warps (:mod:`audit_plugin.repair.surrogates`).
* After every round the trigger of the class is searched again in the copy, since the first search seldom finds all of a
  backdoor. In a family where it is still less than ``growth`` times as large as at first, it joins the stand-ins of the next
  round; larger ones are natural features, and unlearning those costs accuracy. Each round is gentler than the last. A third
  round cost a network with a Blended backdoor three points of accuracy and removed nothing more.
* Of the states after the rounds, the last one within the accuracy budget on the calibrate split is kept, the first one if none
  is. No true trigger is ever looked at.
* Normalisation keeps the statistics that the model was saved with.
"""

from __future__ import annotations

import copy
import logging
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
from audit_plugin.model.benign_features import FEWEST_ROWS, BenignFeatures, Windows, fit_benign_features
from audit_plugin.model.fine_tuning import batch_count, batches, compute_device, fast_precision, predicted, shifted, take_step
from audit_plugin.model.subject import Subject
from audit_plugin.repair.base import Repair, RepairedModel
from audit_plugin.repair.surrogates import Surrogates
from audit_plugin.types import FitSplit, Splits, Trigger

log = logging.getLogger(__name__)

_BATCH = 64
_GENTLER = 0.6  # the learning rate of a round over that of the round before
_DEPTH = 2 / 3  # of the network, where features are compared
_SEARCH = Budget(steps=100, images_per_step=24, images_per_batch=512, flip_rate=0.9)


@dataclass(frozen=True)
class BenifulRepair(Repair):
    """The repair.

    Attributes:
        accuracy_budget: most accuracy, in [0, 1], that may be lost on the calibrate split.
        rounds: of fine-tuning, a search for the trigger before each but the first.
        epochs: passes over the fit images in a round.
        feature_weight: of the feature distances in the loss.
        growth: a trigger that is found again joins the stand-ins while it is less than this many times as large as at first.
        latent_size, steps: of the auto-encoder, as in the detection.
    """

    name: ClassVar[str] = "beniful"
    accuracy_budget: float = 0.02
    rounds: int = 2
    epochs: int = 5
    learning_rate: float = 0.01
    feature_weight: float = 0.5
    growth: float = 12.0
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
        original = copy.deepcopy(module).requires_grad_(False)
        benign = self._benign_features(subject, splits.fit, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        held_out = torch.from_numpy(to_pixels(splits.calibrate.images)).to(device)
        held_out_labels = torch.from_numpy(splits.calibrate.labels).to(device)
        right_before = predicted(module, held_out) == held_out_labels

        known, goal = list(triggers), Goal(targets.pop(), triggers[0].source_class)
        sizes = _smallest(triggers)
        kept: dict[str, Tensor] | None = None
        history: list[dict[str, Any]] = []
        for number in range(self.rounds):
            rate = self.learning_rate * _GENTLER**number
            self._round(module, original, benign, splits.fit, Surrogates(known, generator, device), generator, rate)
            found = self._search(module, splits.fit, goal, rng)
            right = predicted(module, held_out) == held_out_labels
            history.append({"calibrate_accuracy": _mean(right), "trigger_sizes": _smallest(found)})
            log.debug("Repair: %s", history[-1])
            if kept is None or _mean(right_before) - _mean(right) <= self.accuracy_budget:
                kept = copy.deepcopy(module.state_dict())
            known.extend(trigger for trigger in found if trigger.size < self.growth * sizes.get(trigger.family, 0.0))
        module.load_state_dict(kept or {})
        facts = {"rounds": history, "calibrate_accuracy_before": _mean(right_before)}
        return RepairedModel(subject.retrained(module.cpu()), facts)

    def _round(
        self,
        module: nn.Module,
        original: nn.Module,
        benign: _Benign,
        fit_split: FitSplit,
        surrogates: Surrogates,
        generator: torch.Generator,
        learning_rate: float,
    ) -> None:
        """Fine-tune for some epochs with one-cycle momentum."""
        device = compute_device()
        pixels = torch.from_numpy(to_pixels(fit_split.images)).to(device)
        labels = torch.from_numpy(fit_split.labels).to(device)
        weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = self.epochs * batch_count(len(labels), _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
        for _ in range(self.epochs):
            for rows in batches(len(labels), _BATCH, generator):
                clean = shifted(pixels[rows], generator)
                both = torch.cat([clean, surrogates.stamp(clean)]).contiguous(memory_format=torch.channels_last)
                with fast_precision(device):
                    answers = module(both)
                    with torch.no_grad():
                        known = original(both[: len(rows)])
                loss = functional.cross_entropy(answers[-1].float(), labels[rows].repeat(2))
                loss = loss + self.feature_weight * benign.distances(answers, known, labels[rows])
                take_step(optimizer, loss)
                schedule.step()

    def _search(self, module: nn.Module, fit_split: FitSplit, goal: Goal, rng: np.random.Generator) -> list[Trigger]:
        """The trigger of the class as it would be found in the copy now, one a family."""
        frozen = copy.deepcopy(module).requires_grad_(False)
        families = (Patches,) if goal.source_class is not None else (Patches, Perturbations)
        found = invert(frozen, fit_split, [goal], families, _SEARCH, rng)
        module.to(compute_device())
        return found

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
        features = subject.session.collect(fit_split.images, taps[index])
        windows = Windows.of(features.shape[1:])
        fitted = fit_benign_features(
            windows.average(features),
            fit_split.labels,
            windows,
            subject.class_count,
            rng,
            latent_size=self.latent_size,
            steps=self.steps,
        )
        return _Benign(index, fitted.module.to(compute_device()))


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


def _mean(right: Tensor) -> float:
    return float(right.float().mean())


def _smallest(triggers: Sequence[Trigger]) -> dict[str, float]:
    """The size of the smallest trigger of each family, in pixels."""
    sizes: dict[str, float] = {}
    for trigger in triggers:
        sizes[trigger.family] = min(trigger.size, sizes.get(trigger.family, trigger.size))
    return sizes
