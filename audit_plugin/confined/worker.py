"""The confined process: ``python -m audit_plugin.confined.worker KIND FOLDER`` reads a job from the folder, does it, and leaves
the result there. Lines on stdout tell how far it is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from audit_plugin.confined import FILES, JOB, REFUSAL, RESULT
from audit_plugin.confined.jobs import (
    RESULT_OF,
    AuditJob,
    GuardJob,
    InspectJob,
    Job,
    Packaged,
    PackageJob,
    Refusal,
    RepairJob,
    RepairResult,
)
from audit_plugin.errors import AuditError
from audit_plugin.records import read_record, write_record
from audit_plugin.types import ONNX_FILE, AuditReport, GuardReport, Intake

KINDS: Mapping[str, type] = {kind.__name__: kind for kind in RESULT_OF}


class Teller:
    """Progress as lines of JSON."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def stage(self, name: str) -> None:
        self.tell({"stage": name})

    def advance(self, share: float) -> None:
        self.tell({"share": share})

    def tell(self, message: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()


class _LogLines(logging.Handler):
    def __init__(self, teller: Teller) -> None:
        super().__init__()
        self._teller = teller

    def emit(self, record: logging.LogRecord) -> None:
        self._teller.tell({"level": record.levelname, "log": self.format(record)})


def work(kind: str, folder: Path, teller: Teller) -> None:
    """Do the job that lies in ``folder`` and leave its result, or our own refusal, beside it."""
    job: Job = read_record(KINDS[kind], folder / JOB)
    try:
        result = _do(job, folder / FILES, teller)
    except AuditError as error:
        write_record(Refusal(type(error).__name__, str(error)), folder / REFUSAL)
    else:
        write_record(result, folder / RESULT)


def _do(job: Job, files: Path, teller: Teller) -> object:
    match job:
        case AuditJob():
            return _audit(job, teller)
        case RepairJob():
            return _repair(job, files, teller)
        case GuardJob():
            return _guard(job, files, teller)
        case PackageJob():
            from audit_plugin.confined.packaging import package

            package(job, files)
            return Packaged()
        case InspectJob():
            return _inspect(job)


def _audit(job: AuditJob, teller: Teller) -> AuditReport:
    from audit_plugin.audit import audit

    return audit(**_common(job, teller), suspects=job.suspects, command=job.command)


def _repair(job: RepairJob, files: Path, teller: Teller) -> RepairResult:
    from audit_plugin.repairing import repair_model

    repaired = repair_model(
        **_common(job.common, teller),
        destination=files,
        target_class=job.target_class,
        method=job.method,
        accuracy_budget=job.accuracy_budget,
    )
    return RepairResult(repaired.audited, repaired.repair)


def _guard(job: GuardJob, files: Path, teller: Teller) -> GuardReport:
    from audit_plugin.guard import build_guard
    from audit_plugin.model.export import save

    built = build_guard(**_common(job.common, teller), false_positive_rate=job.false_positive_rate, search=job.search)
    files.mkdir()
    save(built.model, files / ONNX_FILE)
    return built.report


def _inspect(job: InspectJob) -> Intake:
    from audit_plugin.intake import inspect

    return inspect(job.folder)


def _common(job: AuditJob, teller: Teller) -> dict[str, Any]:
    """What the three functions take alike."""
    return {
        "model": job.model,
        "folder": job.folder,
        "clean": job.clean,
        "policy": job.policy,
        "seed": job.seed,
        "allow_pickle": job.allow_pickle,
        "require_gpu": job.require_gpu,
        "progress": teller,
    }


def main() -> None:
    """Lines of our own go to the real stdout; whatever else prints, prints to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    teller = Teller(stdout)
    logging.basicConfig(level=logging.WARNING, handlers=[_LogLines(teller)], force=True)
    logging.getLogger("audit_plugin").setLevel(logging.INFO)
    for package in ("mlflow", "torch", "great_expectations"):
        logging.getLogger(package).setLevel(logging.ERROR)
    work(sys.argv[1], Path(sys.argv[2]), teller)


if __name__ == "__main__":
    main()
