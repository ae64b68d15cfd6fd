"""What a confined process may be asked to do, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from audit_plugin.policy import Policy
from audit_plugin.types import AuditReport, GuardReport, InputSpec, Intake, ModelRef, RepairReport


@dataclass(frozen=True)
class AuditJob:
    """Arguments of :func:`audit_plugin.audit.audit`; its result is the report."""

    model: ModelRef
    folder: Path
    clean: Path
    policy: Policy
    seed: int
    allow_pickle: bool
    require_gpu: bool
    suspects: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class RepairJob:
    """``common`` and further arguments of :func:`audit_plugin.repairing.repair_model`; it leaves one model file."""

    common: AuditJob
    target_class: str | None
    method: str | None
    accuracy_budget: float | None


@dataclass(frozen=True)
class RepairResult:
    """The audit that a repair rests on, and what the repair measured."""

    audited: AuditReport
    repair: RepairReport


@dataclass(frozen=True)
class GuardJob:
    """``common`` and further arguments of :func:`audit_plugin.guard.build_guard`; it leaves one ``.onnx`` file."""

    common: AuditJob
    false_positive_rate: float
    search: bool


@dataclass(frozen=True)
class PackageJob:
    """Write MLflow's model folder for the model file in ``folder``; see :mod:`audit_plugin.confined.packaging`.

    Attributes:
        described: MLflow's own description of the logged model that it becomes: location and ids.
        input_spec, batch_size, class_count: of the audited classifier; ``batch_size`` None when it is free.
        is_guard: the file is a guarded model, with two outputs more.
    """

    folder: Path
    described: Mapping[str, str]
    input_spec: InputSpec
    batch_size: int | None
    class_count: int
    is_guard: bool


@dataclass(frozen=True)
class Packaged:
    """A model folder was written."""


@dataclass(frozen=True)
class InspectJob:
    """The static check of a folder that is about to be logged."""

    folder: Path


Job = AuditJob | RepairJob | GuardJob | PackageJob | InspectJob

RESULT_OF: Mapping[type, type] = {
    AuditJob: AuditReport,
    RepairJob: RepairResult,
    GuardJob: GuardReport,
    PackageJob: Packaged,
    InspectJob: Intake,
}


def resolved(job: Job) -> Job:
    """The job with absolute paths, links followed: the child works in another folder, and is shown what links lead to."""
    match job:
        case AuditJob():
            return _resolved_audit(job)
        case RepairJob() | GuardJob():
            return replace(job, common=_resolved_audit(job.common))
        case PackageJob() | InspectJob():
            return replace(job, folder=job.folder.resolve())


def _resolved_audit(job: AuditJob) -> AuditJob:
    suspects = job.suspects and job.suspects.resolve()
    return replace(job, folder=job.folder.resolve(), clean=job.clean.resolve(), suspects=suspects)


@dataclass(frozen=True)
class Refusal:
    """The job ended with one of our own errors: its class and its line."""

    error: str
    message: str
