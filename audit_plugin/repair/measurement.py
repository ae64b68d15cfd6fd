"""What a repair achieved, on images that had no part in it. No repair reports its own success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audit_plugin.checks.measurement import victims
from audit_plugin.maths.rates import rate_of
from audit_plugin.model.subject import Subject
from audit_plugin.types import LabelArray, Rate, RepairReport, TestSplit, Trigger


def measure_repair(
    method: str,
    before: Subject,
    after: Subject,
    test: TestSplit,
    triggers: Sequence[Trigger],
    facts: Mapping[str, Any],
) -> RepairReport:
    """Accuracy and flip rate of the original and of the repaired copy.

    Args:
        triggers: the recovered ones that the repair got, of one class; at least one.
        facts: of the :class:`~audit_plugin.repair.base.RepairedModel`.

    Raises:
        ValueError: no trigger, or triggers of several classes.
    """
    targets = {trigger.target_class for trigger in triggers}
    if len(targets) != 1:
        raise ValueError(f"expected recovered triggers of one class, got {len(triggers)} of the classes {sorted(targets)}")
    predictions = before.predict(test.images)
    return RepairReport(
        method=method,
        target_class=targets.pop(),
        trigger_count=len(triggers),
        accuracy_before=rate_of(predictions == test.labels),
        accuracy_after=rate_of(after.predict(test.images) == test.labels),
        flip_rate_before=_greatest_flip_rate(before, test, predictions, triggers),
        flip_rate_after=_greatest_flip_rate(after, test, predictions, triggers),
        facts=facts,
    )


def _greatest_flip_rate(subject: Subject, test: TestSplit, predictions: LabelArray, triggers: Sequence[Trigger]) -> Rate:
    """Of the trigger that succeeds most. ``predictions`` of the original decide which images a trigger is to move."""
    rates = []
    for trigger in triggers:
        stamped = trigger.stamp(test.images[victims(trigger, test.labels, predictions)])
        rates.append(rate_of(subject.predict(stamped) == trigger.target_class))
    return max(rates, key=lambda rate: -1.0 if np.isnan(rate.value) else rate.value)
