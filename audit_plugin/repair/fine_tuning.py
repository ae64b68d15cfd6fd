"""Plain fine-tuning on clean images: the baseline that every repair is compared with. It need not remove a dormant backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import batch_count, compute_device, fitting_steps, one_cycle_momentum
from audit_plugin.model.subject import Subject
from audit_plugin.repair.base import Repair, RepairedModel
from audit_plugin.types import Splits, Trigger


@dataclass(frozen=True)
class FineTuning(Repair):
    """``epochs`` passes over the fit split with one-cycle momentum; ``learning_rate`` is the greatest of the cycle."""

    name: ClassVar[str] = "fine_tuning"
    epochs: int = 10
    learning_rate: float = 0.01
    batch: int = 64

    def repair(self, subject: Subject, splits: Splits, triggers: Sequence[Trigger], rng: np.random.Generator) -> RepairedModel:
        """Fine-tune a copy; the triggers play no part.

        Raises:
            InapplicableError: the model gives no gradients.
        """
        device = compute_device()
        module = subject.trainable_copy().to(device)
        pixels = torch.from_numpy(to_pixels(splits.fit.images)).to(device)
        labels = torch.from_numpy(splits.fit.labels).to(device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        steps = self.epochs * batch_count(len(labels), self.batch)
        optimizer, schedule = one_cycle_momentum(module, self.learning_rate, steps)
        for _ in range(self.epochs):
            for _ in fitting_steps(module, pixels, labels, optimizer, generator, self.batch):
                schedule.step()
        return RepairedModel(subject.retrained(module.cpu()), {"epochs": self.epochs, "learning_rate": self.learning_rate})
