"""What the command line and MLflow's plugins share: a pinned model becomes a report, a report goes to MLflow."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from pathlib import Path

from audit_plugin import confined
from audit_plugin.confined.jobs import AuditJob
from audit_plugin.policy import Policy
from audit_plugin.progress import Progress
from audit_plugin.promotion import PromotionSuite, judge, load_suite
from audit_plugin.registry import LoggedReport, PinnedModel, fetch_images, log_report, redacted
from audit_plugin.report.write import FORMATS, write_report
from audit_plugin.types import SUSPECT_FORMATS, AuditReport


def audit_pinned(
    pinned: PinnedModel,
    clean: str,
    *,
    suspects: str | None = None,
    policy: Policy,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    command: str,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> AuditReport:
    """Fetch the images and audit in a confined child process; options are those of :func:`audit_plugin.audit.audit`.

    ``clean`` and ``suspects`` are paths or MLflow artifact URIs. The report shows no credentials, neither of ``command`` nor of
    ``clean``.

    Raises:
        AuditError: see :func:`audit_plugin.confined.audit`, also for ``stop``.
    """
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        work = Path(temporary)
        job = AuditJob(
            model=pinned.reference,
            folder=pinned.folder,
            clean=fetch_images(clean, work / "clean"),
            suspects=fetch_images(suspects, work / "suspects") if suspects else None,
            policy=policy,
            seed=seed,
            allow_pickle=allow_pickle,
            require_gpu=require_gpu,
            command=redacted(command),
        )
        report = confined.audit(job, progress=progress, stop=stop)
    # What was fetched lay in a folder that is gone.
    return dataclasses.replace(report, clean_set=dataclasses.replace(report.clean_set, source=redacted(clean)))


def publish(report: AuditReport, suite: PromotionSuite | None = None) -> LoggedReport:
    """Judge a report by the promotion suite (the shipped one by default) and log it in every form that has something to show.

    See :func:`audit_plugin.registry.log_report`.
    """
    promotion = judge(report, suite or load_suite(None))
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        folder = Path(temporary)
        write_report(report, folder, [form for form in FORMATS if report.suspects or form not in SUSPECT_FORMATS])
        return log_report(report, folder, promotion)
