"""``backdoor-audit scan``: the whole registry."""

from __future__ import annotations

import enum
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from audit_plugin.cli.console import (
    AllowPickleOption,
    OneFormat,
    OneFormatOption,
    PolicyOption,
    RequireGpuOption,
    VerboseOption,
    check_output,
    complain,
    configure_logging,
    stderr,
    stdout,
)
from audit_plugin.report.sanitise import clean_text

if TYPE_CHECKING:
    from pipelines.scan.engine import Engine
    from pipelines.scan.summary import Row, Summary

_log = logging.getLogger(__name__)
_MOST_LISTED = 200
_STYLES = {"fail": "bold red", "error": "red", "inconclusive": "yellow", "no clean images": "yellow", "pass": "green"}

SCAN_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit scan --policy audit.toml

  backdoor-audit scan --policy audit.toml --promoted --fail-on new --notify-command "mail -s backdoor ops@example.org"

  backdoor-audit scan --policy audit.toml --filter "name = 'digits'" --since 7d --jobs 2 --format json

[bold]Exit codes[/bold]  0 all pass, 1 a version fails, 2 one could not be audited, 3 one has no verdict, 4 usage
"""


class EngineChoice(enum.StrEnum):
    """Who carries out the audits."""

    LOCAL = "local"
    RAY = "ray"


class FailOn(enum.StrEnum):
    """Which failing versions make the scan fail."""

    ANY = "any"
    NEW = "new"


def scan(
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Versions that fit this, in MLflow's language: \"name = 'digits'\".")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Versions with this alias; may be given several times.")] = None,
    promoted: Annotated[
        bool, typer.Option("--promoted", help="Versions with an alias or stage that the policy's section gate protects.")
    ] = False,
    since: Annotated[
        str | None, typer.Option(help="Versions registered since: a duration (12h, 7d, 2w) or a date (2026-01-31).")
    ] = None,
    policy: PolicyOption = None,
    engine: Annotated[EngineChoice, typer.Option(help="Where the audits run.")] = EngineChoice.LOCAL,
    jobs: Annotated[int, typer.Option(min=1, help="Audits that run at the same time.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; without it Ray starts on this machine.")] = None,
    ray_cpus: Annotated[float, typer.Option(min=0.0, help="CPUs that an audit takes of the Ray cluster.")] = 1.0,
    ray_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs, or the fraction of one, that an audit takes.")] = 0.0,
    again: Annotated[bool, typer.Option("--again", help="Audit also what has an audit that counts.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="Most audits; the other versions wait for a later scan.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be audited, and do nothing.")] = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="Exit code 1 for any failing version, or only for newly failing ones.")
    ] = FailOn.ANY,
    notify_command: Annotated[
        str | None, typer.Option(help="Run when a promoted version newly fails; gets JSON on standard input. No shell.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for summary.json and summary.html.")] = None,
    format_: OneFormatOption = OneFormat.TEXT,
    seed: Annotated[int, typer.Option(min=0, help="Of the splits and the search.")] = 0,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Audit every version in the registry that has no audit which still counts. Run it again to go on where it stopped."""
    configure_logging(verbose)
    if output is not None:
        check_output(output, "summary")
    from pipelines import scan_registry
    from pipelines.scan.listing import Scope
    from pipelines.scan.notify import parse_command

    options = scan_registry.Options(
        scope=Scope(filter_, tuple(sorted(set(alias or ()))), promoted, since),
        policy_file=policy,
        seed=seed,
        allow_pickle=allow_pickle,
        require_gpu=require_gpu,
        again=again,
        limit=limit,
        notify_command=parse_command(notify_command),
    )
    with _stopping() as stop:
        if dry_run:
            summary = scan_registry.dry_run(options, stop)
        else:
            carrying_out = _engine(engine, jobs, ray_address, ray_cpus, ray_gpus)
            # What a library prints meanwhile, as Ray does when a worker dies, is not the report.
            with _watching() as watcher, redirect_stdout(sys.stderr):
                summary = scan_registry.scan(options, carrying_out, watcher, stop)
    if output is not None:
        scan_registry.write_summary(summary, output)
    if format_ is OneFormat.JSON:
        sys.stdout.write(json.dumps(summary.document(), indent=2) + "\n")
    else:
        _print_summary(summary)
    return 0 if dry_run else summary.exit_code(fail_on.value)


def _engine(choice: EngineChoice, jobs: int, address: str | None, cpus: float, gpus: float) -> Engine:
    if choice is EngineChoice.RAY:
        from pipelines.ray_engine import RayEngine

        return RayEngine(address, jobs=jobs, cpus=cpus, gpus=gpus)
    from pipelines.scan.engine import LocalEngine

    if jobs > 1:  # audits that each take all cores wait for each other; what the user has set is left alone
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    return LocalEngine(jobs)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a scan ends in order; the second time they end it at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        complain("Interrupted; what is being written is finished first.")
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watcher:
    """A bar on a terminal, else a line for each version."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("Looking at the registry", total=None)

    def found(self, total: int) -> None:
        self._progress.update(self._task, description="Scanning", total=total)

    def ended(self, row: Row, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, description=clean_text(row.uri, 60))
        loud = row.audited or row.outcome != "pass"
        if not self._progress.console.is_terminal or loud:
            how = f"{row.seconds:.0f} s" if row.audited else "earlier audit" if row.run_id else clean_text(row.reason, 200)
            line = f"{done}/{total} {clean_text(row.uri, 100)}: {row.outcome} ({how})"
            self._progress.console.print(line, markup=False, style=_STYLES.get(row.outcome, ""), soft_wrap=True)


@contextmanager
def _watching() -> Iterator[_Watcher]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield _Watcher(progress)


def _print_summary(summary: Summary) -> None:
    from pipelines.scan.summary import OUTCOMES
    from pipelines.scan_registry import scan_address

    wanted = sorted(summary.of(*(outcome for outcome in OUTCOMES if outcome != "pass")), key=_attention)
    new = set(summary.drift.newly_failing)
    if wanted:
        table = Table("version", "outcome", "", "why", box=None, pad_edge=False, width=None if stdout.is_terminal else 220)
        for row in wanted[:_MOST_LISTED]:
            marks = [word for word, holds in (("promoted", row.promoted), ("new", row.uri in new)) if holds]
            suspected = f"class {clean_text(row.suspected, 40)}: " if row.suspected else ""
            table.add_row(
                Text(clean_text(row.uri, 80)),
                Text(row.outcome, style=_STYLES.get(row.outcome, "")),
                ", ".join(marks),
                Text(clean_text(f"{suspected}{row.reason}", 200)),
            )
        stdout.print(table)
        if len(wanted) > _MOST_LISTED:
            stdout.print(f"... and {len(wanted) - _MOST_LISTED} more")
    metrics = summary.metrics
    counts = ", ".join(f"{len(summary.of(outcome))} {outcome}" for outcome in OUTCOMES if summary.of(outcome))
    stdout.print(
        f"{metrics['found']} versions: {counts or 'none in scope'}. {metrics['audited']} audited, {metrics['skipped']} with an "
        f"audit that counts, {summary.seconds:.0f} s."
    )
    drift = summary.drift
    changes = {"newly failing": drift.newly_failing, "newly passing": drift.newly_passing, "with changed files": drift.changed}
    changes |= {"new": drift.new, "gone": drift.gone}
    if summary.previous is not None:
        told = ", ".join(f"{len(uris)} {name}" for name, uris in changes.items() if uris)
        stdout.print(f"Since the last scan: {told or 'nothing changed'}.")
    for note in summary.notes:
        stdout.print(clean_text(note, 1000), markup=False)
    if summary.run_id is not None:
        stdout.print(f"MLflow run: {scan_address(summary.run_id) or summary.run_id}", markup=False)


def _attention(row: Row) -> tuple[int, bool]:
    from pipelines.scan.summary import OUTCOMES

    return OUTCOMES.index(row.outcome), not row.promoted
