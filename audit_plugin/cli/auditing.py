"""``backdoor-audit run``, and what other commands need of it: one audit, made and published."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit_plugin.cli.console import (
    EXIT_CODES,
    FORMATS,
    AllowPickleOption,
    LogChoice,
    PolicyOption,
    RequireGpuOption,
    VerboseOption,
    check_output,
    configure_logging,
    parse_formats,
    print_report,
    reason_of,
    show_progress,
)
from audit_plugin.errors import AuditError
from audit_plugin.types import AuditReport, ReportFormat

if TYPE_CHECKING:
    from audit_plugin.promotion import PromotionSuite
    from audit_plugin.registry import LoggedReport


_log = logging.getLogger(__name__)


RUN_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit run models:/digits/3 --clean clean.npz

  backdoor-audit run models:/digits@candidate --clean images/ --policy audit.toml -o report --format text,json,html

  backdoor-audit run model.onnx --clean images/ --quick --format json > report.json

[bold]Exit codes[/bold]  0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage
"""


class UnpublishedError(AuditError):
    """An audit came to its end, and then its report could not be written or logged."""

    def __init__(self, message: str, report: AuditReport) -> None:
        super().__init__(message)
        self.report = report


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_URI",
            help="models:/name/1, models:/name@alias, models:/m-<id>, runs:/<run>/<name>, a local folder, an .onnx or .pt2 file.",
        ),
    ],
    clean: Annotated[
        str,
        typer.Option(
            help="Clean labelled images: a folder a class, an .npz (uint8 NHWC 'images', 'labels'), or an artifact URI."
        ),
    ],
    suspects: Annotated[
        str | None, typer.Option(help="Inputs to score one by one: a folder, an .npz, or an artifact URI; labels not needed.")
    ] = None,
    policy: PolicyOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report's files.")] = None,
    formats: Annotated[
        str, typer.Option("--format", help=f"Any of {', '.join(FORMATS)}, by commas. Text, else JSON, goes to stdout.")
    ] = "text",
    seed: Annotated[int, typer.Option(min=0, help="Of the splits and the search; the same seed gives the same audit.")] = 0,
    log: Annotated[
        LogChoice, typer.Option(help="Log the report to MLflow; 'auto' does so when the model came from there.")
    ] = LogChoice.AUTO,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look: one canary of each family, one search. No gate counts it; logged with '--log always' alone.",
        ),
    ] = False,
    verbose: VerboseOption = False,
) -> int:
    """Audit one model and say pass, fail or inconclusive."""
    configure_logging(verbose)
    wanted = parse_formats(formats, output)
    report, _ = audit_and_print(
        model,
        clean,
        suspects=suspects,
        policy_file=policy,
        output=output,
        formats=wanted,
        seed=seed,
        log=log,
        allow_pickle=allow_pickle,
        require_gpu=require_gpu,
        quick=quick,
    )
    return EXIT_CODES[report.decision.verdict]


def audit_and_print(
    model: str, clean: str, *, formats: Sequence[ReportFormat], output: Path | None, **options: Any
) -> tuple[AuditReport, LoggedReport | None]:
    """:func:`audit_and_publish`, as this command line asks, with the report on stdout even where it could not be published."""
    command = shlex.join(["backdoor-audit", *sys.argv[1:]])
    try:
        report, logged = audit_and_publish(model, clean, formats=formats, output=output, command=command, **options)
    except UnpublishedError as error:
        print_report(error.report, formats, None, None)
        raise
    print_report(report, formats, output, logged)
    return report, logged


def audit_and_publish(
    model: str,
    clean: str,
    *,
    suspects: str | None = None,
    policy_file: Path | None = None,
    output: Path | None = None,
    formats: Sequence[ReportFormat] = ("text",),
    seed: int = 0,
    log: LogChoice = LogChoice.AUTO,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    quick: bool = False,
    command: str = "",
) -> tuple[AuditReport, LoggedReport | None]:
    """Pin, audit, write and log one model, with progress on stderr.

    Nothing is written or logged unless the audit came to its end.

    Raises:
        UnpublishedError: it did, and then its report could not be written or logged, or Ctrl-C came.
    """
    from audit_plugin.policy import load_policy
    from audit_plugin.promotion import load_suite
    from audit_plugin.requirements import suite_path

    policy = load_policy(policy_file)
    if quick:
        policy = policy.quick()
    suite = load_suite(suite_path(policy.gate, policy_file))
    if output is not None:
        check_output(output)
    with show_progress() as progress:
        progress.stage("Starting")
        from audit_plugin.publishing import audit_pinned
        from audit_plugin.registry import check_writing, pin

        try:
            progress.stage("Fetching the model")
            with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
                pinned = pin(model, Path(temporary))
                # a quick audit on a version would take the place of one that the gate counts
                publish = log is LogChoice.ALWAYS or (log is LogChoice.AUTO and pinned.came_from_mlflow and not quick)
                if publish:
                    check_writing()
                report = audit_pinned(
                    pinned,
                    clean,
                    suspects=suspects,
                    policy=policy,
                    seed=seed,
                    allow_pickle=allow_pickle,
                    require_gpu=require_gpu,
                    command=command,
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the audit came to its end; nothing was written or logged.") from None
        progress.stage("Writing the report")
        return report, _publish(report, output, formats, suite if publish else None)


def _publish(
    report: AuditReport, output: Path | None, formats: Sequence[ReportFormat], suite: PromotionSuite | None
) -> LoggedReport | None:
    """Write the report, and log it, judged by the promotion suite, unless that is None."""
    from audit_plugin import publishing
    from audit_plugin.registry import redacted
    from audit_plugin.report.write import write_report

    step, written = "written", ""
    try:
        if output is not None:
            write_report(report, output, formats)
            written = f" Its files are in '{output}'."
        if suite is None:
            return None
        step = "logged"
        return publishing.publish(report, suite)
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, minutes of work must not be lost by it
        _log.debug("The report was not %s.", step, exc_info=True)
        raise UnpublishedError(redacted(f"The report was not {step} completely.{written} {reason_of(error)}"), report) from error
