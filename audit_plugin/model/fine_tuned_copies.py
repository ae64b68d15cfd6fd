"""Fine-tuned copies of a subject, watched on clean images that they do not learn from; among them copies that forget the task.

A copy forgets while it is taught wrong labels (BaDExpert: Xie et al. 2024, Algorithm 1), drawn anew with every pass among all
other classes, at a learning rate that grows until it has forgotten enough.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import accuracy, compute_device, fitting_steps, predicted, trained_weights
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit

log = logging.getLogger(__name__)

FEWEST_IMAGES = 50

FIRST_RATE, LAST_RATE = 1e-5, 0.05
"""Learning rates of a copy that is to forget."""

_HELD_OUT = 0.2
_BATCH = 64
_GROWTH = 1.05  # of the rate with every step
_STEPS_BETWEEN_LOOKS = 2


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned copy, and what it does with held-out clean images: its accuracy and its most frequent answer's share."""

    module: nn.Module
    learning_rate: float
    accuracy: float
    largest_class_share: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.2f}, most frequent class {self.largest_class_share:.2f}"


class Tuning:
    """The images of the fit split, four fifths to learn from and one fifth, held out, to see what was learned.

    Attributes:
        labels, held_out_labels: of the images to learn from, and of those held out.
        accuracy: of the subject on held-out images.

    Raises:
        InapplicableError: there are fewer than 50 images, or the weights are in half precision.
    """

    def __init__(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> None:
        if len(fit_split) < FEWEST_IMAGES:
            raise InapplicableError(
                f"Fine-tuning needs at least {FEWEST_IMAGES} clean images in the fit split, there are {len(fit_split)}. "
                "Give more clean images."
            )
        if any(weight.dtype == torch.float16 for weight in subject.torch_module().parameters()):
            raise InapplicableError("Its weights are float16, too coarse to be fine-tuned. Give the float32 model.")
        self._subject = subject
        self._seed = int(rng.integers(2**62))
        self._device = compute_device()
        order = rng.permutation(len(fit_split))
        cut = round(len(order) * _HELD_OUT)
        pixels = torch.from_numpy(to_pixels(fit_split.images)).to(self._device)
        labels = torch.from_numpy(fit_split.labels).to(self._device)
        self._pixels, self.labels = pixels[order[cut:]], labels[order[cut:]]
        self._held_out_pixels, self.held_out_labels = pixels[order[:cut]], labels[order[:cut]]
        self.class_count = subject.class_count
        self.accuracy = accuracy(self.copy(), self._held_out_pixels, self.held_out_labels)

    def copy(self) -> nn.Module:
        """A fresh copy of the model; every copy sees its batches in the same order."""
        self._generator = torch.Generator().manual_seed(self._seed)
        return self._subject.trainable_copy().to(self._device)

    def wrong_labels(self) -> Tensor:
        """For each image one of the other classes, all alike; others with every call."""
        offsets = torch.randint(1, self.class_count, self.labels.shape, generator=self._generator)
        return (self.labels + offsets.to(self._device)) % self.class_count

    def steps(self, module: nn.Module, optimizer: torch.optim.Optimizer, labels: Tensor) -> Iterator[None]:
        """One pass over the images with these labels, one step an iteration."""
        return fitting_steps(module, self._pixels, labels, optimizer, self._generator, _BATCH)

    def measured(self, module: nn.Module, learning_rate: float) -> FineTuned:
        """What it does with held-out images."""
        answers = predicted(module, self._held_out_pixels)
        share = float(torch.bincount(answers, minlength=self.class_count).max()) / max(len(answers), 1)
        return FineTuned(module, learning_rate, float((answers == self.held_out_labels).float().mean()), share)


def forgetting_copies(tuning: Tuning, accuracies: Sequence[float]) -> Iterator[FineTuned]:
    """One copy as it was when its held-out accuracy first was at most each of ``accuracies``, which fall.

    Fewer than asked where the last learning rate did not suffice.

    Raises:
        InapplicableError: fine-tuning made a weight NaN or infinite; such a copy has forgotten nothing, it is broken.
    """
    module = tuning.copy()
    optimizer = torch.optim.Adam(trained_weights(module), lr=FIRST_RATE)
    growth = torch.optim.lr_scheduler.ExponentialLR(optimizer, _GROWTH)
    steps = itertools.chain.from_iterable(tuning.steps(module, optimizer, tuning.wrong_labels()) for _ in itertools.count())
    waiting = list(accuracies)
    for step, _ in enumerate(steps, start=1):
        rate = float(growth.get_last_lr()[0])
        growth.step()
        if step % _STEPS_BETWEEN_LOOKS == 0:
            if not all(bool(weight.isfinite().all()) for weight in trained_weights(module)):
                raise InapplicableError(
                    f"A copy that was to forget broke at the learning rate {rate:.1e}: a weight is no number."
                )
            found = tuning.measured(module, rate)
            while waiting and found.accuracy <= waiting[0]:
                log.debug("Forgetting at rate %.1e: %s", rate, found)
                yield dataclasses.replace(found, module=copy.deepcopy(module))
                waiting.pop(0)
        if not waiting or growth.get_last_lr()[0] > LAST_RATE:
            return
