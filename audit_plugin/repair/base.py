"""The contract of a repair: it gets clean images and *recovered* triggers, never the true one, and returns a new subject."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from audit_plugin.model.subject import Subject
from audit_plugin.types import Splits, Trigger


@dataclass(frozen=True)
class RepairedModel:
    """A repaired copy of a subject, in the same flavour; ``facts`` say what was done, JSON values only."""

    subject: Subject
    facts: Mapping[str, Any] = field(default_factory=dict)


class Repair(abc.ABC):
    """A method that removes a backdoor from a copy of the model; the subject itself is never changed.

    Learns from the fit split and decides when to stop on the calibrate split; the test split is for whoever measures it.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def repair(self, subject: Subject, splits: Splits, triggers: Sequence[Trigger], rng: np.random.Generator) -> RepairedModel:
        """Make a repaired copy.

        Args:
            triggers: recovered ones of the suspected class, of any family; at least one.

        Raises:
            InapplicableError: the method cannot repair this model, with the reason.
        """
