"""Audits, repairs and guards in a confined child process: all that opens a model runs there, none of it here.

This is the caller's half. It imports neither torch nor onnx; it writes a job, has :mod:`audit_plugin.confined.worker` do it in
the :mod:`audit_plugin.sandbox`, and reads back plain data, which a process that was taken over may have written: every field is
of its declared type, every file a plain file. What the caller knows itself, it does not take from there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from audit_plugin import errors
from audit_plugin.confined.jobs import (
    RESULT_OF,
    AuditJob,
    GuardJob,
    InspectJob,
    Job,
    PackageJob,
    Refusal,
    RepairJob,
    RepairResult,
    resolved,
)
from audit_plugin.errors import AuditError, SandboxError
from audit_plugin.intake.files import list_files
from audit_plugin.policy import SandboxPolicy
from audit_plugin.progress import Progress
from audit_plugin.records import RecordError, read_record, write_record
from audit_plugin.report.sanitise import clean_text
from audit_plugin.sandbox import Limits, run_isolated
from audit_plugin.types import AuditReport, GuardReport, Intake, Isolation, SubjectSummary

WORKER = "audit_plugin.confined.worker"
JOB, RESULT, REFUSAL, FILES = "job", "result", "refusal", "files"
_MOST_MESSAGES = 10_000
_LONGEST_MESSAGE = 2000
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

log = logging.getLogger(__name__)


def audit(job: AuditJob, *, progress: Progress | None = None, stop: threading.Event | None = None) -> AuditReport:
    """:func:`audit_plugin.audit.audit` in a child process.

    Args:
        job: paths and options.
        progress: told about stages.
        stop: when set, the audit is given up.

    Raises:
        SandboxError: the child was stopped, exceeded a limit, or gave back something else than a report.
        AuditError: as for ``audit``; one clear line.
    """
    with _work(job, job.policy.sandbox, progress, stop) as done:
        return _known(done.result, job, done.isolation)


def repair(job: RepairJob, destination: Path, *, progress: Progress | None = None) -> tuple[RepairResult, Path]:
    """:func:`audit_plugin.repairing.repair_model` in a child process; its model file is put into ``destination``.

    Raises:
        SandboxError, AuditError: as for :func:`audit`.
    """
    with _work(job, job.common.policy.sandbox, progress) as done:
        audited = _known(done.result.audited, job.common, done.isolation)
        return dataclasses.replace(done.result, audited=audited), done.take_file(destination)


def guard(job: GuardJob, destination: Path, *, progress: Progress | None = None) -> tuple[GuardReport, Path]:
    """:func:`audit_plugin.guard.build_guard` in a child process; its ONNX file is put into ``destination``.

    Raises:
        SandboxError, AuditError: as for :func:`audit`.
    """
    with _work(job, job.common.policy.sandbox, progress) as done:
        return dataclasses.replace(done.result, model=job.common.model), done.take_file(destination)


def package(
    file: Path, described: Mapping[str, str], subject: SubjectSummary, destination: Path, *, is_guard: bool = False
) -> None:
    """MLflow's model folder for a model file, put at ``destination``; checked as by an audit, by a process of its own.

    Args:
        file: alone in its folder.
        described: location and ids of the logged model that it becomes.
        subject: the classifier that it was made of.

    Raises:
        IntakeError: an audit would refuse the folder.
        SandboxError, AuditError: as for :func:`audit`.
    """
    job = PackageJob(file.parent, described, subject.input_spec, subject.batch_size, subject.class_count, is_guard)
    with _work(job, SandboxPolicy()) as done:
        shutil.copytree(done.files, destination)
    inspect(destination)


def inspect(folder: Path) -> Intake:
    """:func:`audit_plugin.intake.inspect` in a child process.

    Raises:
        IntakeError: the folder is refused.
        SandboxError: as for :func:`audit`.
    """
    with _work(InspectJob(folder), SandboxPolicy()) as done:
        intake: Intake = done.result
        return intake


def _known(report: AuditReport, job: AuditJob, isolation: Isolation) -> AuditReport:
    """A report about what was asked, whatever the child says it was."""
    return dataclasses.replace(
        report,
        model=job.model,
        policy=job.policy.document(),
        policy_digest=job.policy.digest,
        seed=job.seed,
        command=job.command,
        isolation=isolation,
    )


@dataclasses.dataclass(frozen=True)
class _Done:
    """A job's result, and the folder with the files that it left, none of them a link."""

    result: Any
    isolation: Isolation
    files: Path

    def take_file(self, destination: Path) -> Path:
        files = sorted(list_files(self.files)) if self.files.exists() else []
        if len(files) != 1:
            raise SandboxError(f"Expected one model file from the sandbox, got {len(files)}.")
        destination.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(self.files / files[0], destination))


@contextmanager
def _work(
    job: Job, sandbox: SandboxPolicy, progress: Progress | None = None, stop: threading.Event | None = None
) -> Iterator[_Done]:
    """Have a job done; its files exist within the block only."""
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        work = Path(temporary).resolve()
        job = resolved(job)
        write_record(job, work / JOB)
        isolation = _run(type(job).__name__, work, _inputs(job), sandbox, _Relay(progress), stop)
        for folder in (RESULT, REFUSAL, FILES):
            if (work / folder).exists() or (work / folder).is_symlink():
                list_files(work / folder)
        if (work / REFUSAL).exists():
            raise _error(_read(Refusal, work / REFUSAL))
        yield _Done(_read(RESULT_OF[type(job)], work / RESULT), isolation, work / FILES)


def _run(
    kind: str, work: Path, readable: Sequence[Path], sandbox: SandboxPolicy, relay: _Relay, stop: threading.Event | None
) -> Isolation:
    limits = Limits(seconds=sandbox.time_limit_minutes * 60, memory_bytes=int(sandbox.memory_gib * 1024**3))
    isolation = run_isolated(
        WORKER,
        [kind, str(work)],
        working_folder=work,
        readable=readable,
        limits=limits,
        gpu=True,
        required=sandbox.required,
        on_line=relay.take,
        stop=stop,
    )
    if not isolation.is_complete:
        log.warning("The sandbox is incomplete (%s): %s", isolation.mechanism, isolation.summary)
    return isolation


def _inputs(job: Job) -> list[Path]:
    """What a job reads."""
    if isinstance(job, InspectJob | PackageJob):
        return [job.folder]
    common = job if isinstance(job, AuditJob) else job.common
    return [path for path in (common.folder, common.clean, common.suspects) if path is not None]


def _read(kind: type[Any], folder: Path) -> Any:
    try:
        return read_record(kind, folder)
    except RecordError as error:
        raise SandboxError(f"The sandboxed process gave back no result that can be read: {error}.") from error


def _error(refusal: Refusal) -> AuditError:
    kind = getattr(errors, refusal.error, None)
    known = isinstance(kind, type) and issubclass(kind, AuditError)
    return (kind if known else SandboxError)(clean_text(refusal.message, _LONGEST_MESSAGE))  # type: ignore[misc]


class _Relay:
    """Passes on what the child says of its progress, and its log; all of it is untrusted text."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._taken = 0

    def take(self, line: str) -> None:
        self._taken += 1
        if self._taken > _MOST_MESSAGES:
            return
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            message = json.loads(line)
            if "log" in message and message["level"] in _LEVELS:
                log.log(logging.getLevelName(message["level"]), "%s", clean_text(message["log"], _LONGEST_MESSAGE))
            elif self._progress is not None and "stage" in message:
                self._progress.stage(clean_text(message["stage"], 100))
            elif self._progress is not None and "share" in message:
                share = float(message["share"])
                if not math.isnan(share):
                    self._progress.advance(min(max(share, 0.0), 1.0))
