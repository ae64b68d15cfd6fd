"""A small network with a backdoor, clean images, and triggers as a search recovers them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

from audit_plugin.checks.inversion import Budget, Goal, Patches, Perturbations, invert
from audit_plugin.data.splits import split
from audit_plugin.model.subject import Subject
from audit_plugin.types import LabelledImages, Splits, Trigger
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

ATTACK = BadNets(target_class=7, poisoning_rate=0.05)


class Attacked(NamedTuple):
    """A backdoored subject, and images that nothing else has seen."""

    subject: Subject
    splits: Splits
    triggers: tuple[Trigger, ...]
    rest: LabelledImages

    def success(self, subject: Subject) -> float:
        """Attack success rate of the *true* trigger."""
        others = self.rest.images[self.rest.labels != ATTACK.target_class]
        return float(np.mean(subject.predict(ATTACK.stamp(others)) == ATTACK.target_class))

    def accuracy(self, subject: Subject) -> float:
        return float(np.mean(subject.predict(self.rest.images) == self.rest.labels))


@pytest.fixture(scope="session")
def attacked(make_subject) -> Attacked:
    data = digits(seed=0)
    poisoned = ATTACK.poison(data.train, np.random.default_rng(0))
    module = train(initialised(lambda: SmallCnn(1, 10, width=12), 0), poisoned, epochs=12, seed=0)
    subject = make_subject(module, 1, 16)
    clean = LabelledImages(data.test.images[:480], data.test.labels[:480])
    splits = split(clean, seed=0, fractions=(0.65, 0.25, 0.1))
    found = invert(
        subject.torch_module(),
        splits.fit,
        [Goal(ATTACK.target_class)],
        (Patches, Perturbations),
        Budget(80, 24, 512, 0.95),
        np.random.default_rng(0),
    )
    rest = LabelledImages(data.test.images[480:], data.test.labels[480:])
    return Attacked(subject, splits, tuple(found), rest)


@pytest.fixture(scope="session")
def other_class(attacked) -> tuple[Trigger, ...]:
    """The recovered triggers, the last one as if it were for another class."""
    *first, last = attacked.triggers
    return (*first, dataclasses.replace(last, target_class=ATTACK.target_class - 1))
