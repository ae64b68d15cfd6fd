"""The repair as one function: audit, repair a copy, measure it on images that had no part in it, keep to the accuracy budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audit_plugin.audit import audit
from audit_plugin.errors import ExportError, InapplicableError, IntakeError, RepairError, SubjectError, UsageError, nearest
from audit_plugin.intake import inspect
from audit_plugin.maths.rates import is_within
from audit_plugin.model.load import load_network
from audit_plugin.model.save import save_network
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.policy import REPAIRS, Policy
from audit_plugin.preparation import prepare
from audit_plugin.progress import NoProgress, Progress
from audit_plugin.repair import BenifulRepair, Repair, RepairedModel
from audit_plugin.repair.measurement import measure_repair
from audit_plugin.repair.norm_pruning import NormPruning
from audit_plugin.report.summaries import trigger_searches
from audit_plugin.types import AuditReport, ImageArray, ModelRef, RepairReport, Splits, Trigger

log = logging.getLogger(__name__)

_PAIR_STANDS_OUT = "pair-stands-out"  # the verdict's reason when the suspected class is that of a pair of classes
_SAME_ANSWERS = 1e-3  # of the largest logit: what two exports of one network may differ by


@dataclass(frozen=True)
class Repaired:
    """A repaired copy that kept to its accuracy budget.

    Attributes:
        audited: the audit of the original that the repair rests on.
        repair: what was done, and what it measured on the test split.
        file: the copy, on its own input scale, as ``model.pt2`` or ``model.onnx``, which the static check accepts and which was
            read back.
    """

    audited: AuditReport
    repair: RepairReport
    file: Path


def repair_model(
    model: ModelRef,
    folder: Path,
    clean: Path,
    destination: Path,
    *,
    target_class: str | None = None,
    method: str | None = None,
    accuracy_budget: float | None = None,
    policy: Policy | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    progress: Progress | None = None,
) -> Repaired:
    """Repair a copy of one pinned model; the model itself is not touched.

    Args:
        model, folder, clean, policy, seed, allow_pickle, require_gpu, progress: as for :func:`audit_plugin.audit.audit`.
        destination: folder for the repaired model's file; made if missing.
        target_class: name or index of the class whose trigger is to go; needed where the audit suspects none, and it wins.
        method: ``beniful`` or ``prune``; by default the policy's.
        accuracy_budget: most accuracy that the repair may cost, in [0, 1); by default the policy's.

    Raises:
        RepairError: no class is suspected, nothing was recovered for it, the method cannot repair this model, or it costs more
            than the budget.
        UsageError: there is no such class or method, or the budget is out of range.
        IntakeError, SubjectError, ExportError, CleanSetError: the audit could not be made.
    """
    policy = policy or Policy()
    progress = progress or NoProgress()
    budget = policy.repair.accuracy_budget if accuracy_budget is None else accuracy_budget
    chosen = repair_of(method or policy.repair.method, budget)

    progress.stage("Preparing the model for repair")
    prepared = prepare(model, folder, clean, policy, seed=seed, allow_pickle=allow_pickle, require_gpu=require_gpu)
    original, splits = prepared.subject, prepared.splits
    named = None if target_class is None else class_index(target_class, original.summary.class_names)

    report = audit(
        model, folder, clean, policy=policy, seed=seed, allow_pickle=allow_pickle, require_gpu=require_gpu, progress=progress
    )
    target = _target(report, named)
    triggers = recovered_triggers(report, target)

    progress.stage(f"Repairing: {chosen.name}")
    repaired = _repair(chosen, original, splits, triggers, seed)

    progress.stage("Measuring the repaired model")
    measured = measure_repair(chosen.name, original, repaired.subject, splits.test, triggers, repaired.facts)
    _check_budget(measured, budget, model)

    progress.stage("Saving the repaired model and reading it back")
    file = _save(repaired.subject, destination, splits.test.images)
    return Repaired(report, measured, file)


def repair_of(method: str, accuracy_budget: float) -> Repair:
    """A repair by its name, configured.

    Raises:
        UsageError: there is no such method, or the budget lies outside [0, 1).
    """
    if method not in REPAIRS:
        raise UsageError(f"There is no repair method '{method}'.{nearest(method, REPAIRS)}")
    if not 0.0 <= accuracy_budget < 1.0:
        raise UsageError(f"The accuracy budget must lie in [0, 1), got {accuracy_budget:g}; 0.02 are two points.")
    if method == NormPruning.name:
        return NormPruning(accuracy_budget=accuracy_budget)
    return BenifulRepair(accuracy_budget=accuracy_budget)


def class_index(wanted: str, class_names: Sequence[str]) -> int:
    """Index of a class given by its name or its index; a name wins.

    Raises:
        UsageError: there is none; the line names the nearest.
    """
    if wanted in class_names:
        return class_names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(class_names):
        return int(wanted)
    raise UsageError(f"The model has no class '{wanted}'.{nearest(wanted, class_names)}")


def recovered_triggers(report: AuditReport, target_class: int) -> tuple[Trigger, ...]:
    """What the audit recovered for a class, of every family, and where the suspicion rests on a pair of classes, those of such
    pairs first, the one that stands out most at the head. Natural waves are left out.

    Raises:
        RepairError: nothing was.
    """
    found = [
        candidate
        for _, search in trigger_searches(report)
        for candidate in sorted(search.candidates, key=lambda candidate: candidate.suspicion, reverse=True)
        if candidate.trigger.target_class == target_class and not candidate.is_natural_wave
    ]
    of_class = tuple(candidate.trigger for candidate in found if candidate.trigger.source_class is None)
    of_pairs = tuple(candidate.trigger for candidate in found if candidate.trigger.source_class is not None)
    decision = report.decision
    rests_on_pair = any(reason.code == _PAIR_STANDS_OUT for reason in decision.reasons)
    triggers = (*of_pairs, *of_class) if rests_on_pair and decision.suspected_class == target_class else of_class
    if not triggers:
        name = report.subject.class_names[target_class]
        reasons = " ".join(reason.message for reason in decision.reasons[:2])
        raise RepairError(f"The audit recovered no trigger for class '{name}', so there is nothing to repair it with. {reasons}")
    return triggers


def _target(report: AuditReport, named: int | None) -> int:
    """The class to repair: the one that the user named, else the suspected one."""
    decision = report.decision
    if named is not None:
        if decision.suspected_class is not None and decision.suspected_class != named:
            names = report.subject.class_names
            log.warning("Repairing class '%s'; the audit suspects '%s'.", names[named], names[decision.suspected_class])
        return named
    if decision.suspected_class is None:
        raise RepairError(
            f"The audit of {report.model.pinned_uri} suspects no class (verdict: {decision.verdict}), so nothing was repaired. "
            "If you know the attacker's class, name it with --target-class."
        )
    return decision.suspected_class


def _repair(chosen: Repair, subject: Subject, splits: Splits, triggers: Sequence[Trigger], seed: int) -> RepairedModel:
    try:
        return chosen.repair(subject, splits, triggers, np.random.default_rng(seed))
    except InapplicableError as error:
        (other,) = [method for method in REPAIRS if method != chosen.name]
        raise RepairError(f"'{chosen.name}' cannot repair this model: {error} The other method is --method {other}.") from error


def _check_budget(measured: RepairReport, budget: float, model: ModelRef) -> None:
    """On the test split: the methods keep to the budget on the calibrate split, which they choose by."""
    before, after = measured.accuracy_before, measured.accuracy_after
    if not is_within(before.value, after.value, budget):
        raise RepairError(
            f"The repair by '{measured.method}' was given up: accuracy falls from {before.value:.1%} to {after.value:.1%} on "
            f"{before.trials} test images, more than the budget of {budget:.1%}. Nothing was registered or written, and "
            f"{model.pinned_uri} is as it was. Give more clean images, or allow more with --accuracy-budget."
        )


def _save(repaired: Subject, destination: Path, images: ImageArray) -> Path:
    """Write the copy and make sure that whoever opens the file, by way of the static check, gets the same answers."""
    file = save_network(repaired.network, destination)
    summary = repaired.summary
    try:
        intake = inspect(destination)
        _, first, second, third = repaired.network.input_shape
        network = load_network(file, intake, input_shape=(-1, first, second, third))
        again = prepare_subject(network, summary.input_spec, flavour=intake.flavour, class_names=summary.class_names)
    except (IntakeError, SubjectError, ExportError) as error:
        raise RepairError(f"The repaired model cannot be saved as a file that can be audited: {error}") from error
    expected, found = repaired.logits(images), again.logits(images)
    difference = float(np.abs(expected - found).max() / max(float(np.abs(expected).max()), 1e-6))
    if not difference <= _SAME_ANSWERS:
        raise RepairError(f"The repaired model answers otherwise once it is saved (relative difference {difference:.1e}).")
    return file
