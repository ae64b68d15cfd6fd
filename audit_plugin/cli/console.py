"""What all commands share: exit codes, the two consoles, common options, progress, logging."""

from __future__ import annotations

import enum
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.types import AuditReport, ReportFormat, Verdict

if TYPE_CHECKING:
    from audit_plugin.registry import LoggedReport


EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}
EXIT_ERROR = 2
EXIT_USAGE = 4
LONGEST_MESSAGE = 2000

FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)

_log = logging.getLogger(__name__)
stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False)


class _PatientFile(io.FileIO):
    """A standard stream: once nobody reads it any more, what is written goes nowhere."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(content)


def outlive_readers() -> None:
    """From now on this process goes on when whoever reads its output leaves, as ``head -1`` does.

    Rich, typer and Python itself would each end it, and with an exit code that says that an audit failed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed by the caller, or replaced in this process
        file = _PatientFile(stream.fileno(), "w", closefd=False)
        patient = io.TextIOWrapper(
            file if stream.write_through else io.BufferedWriter(file),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, patient)


class LogChoice(enum.StrEnum):
    """Whether a report goes to MLflow."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class OneFormat(enum.StrEnum):
    """What a command prints that prints one document."""

    TEXT = "text"
    JSON = "json"


# Options that several commands share.
PolicyOption = Annotated[
    Path | None, typer.Option(envvar="BACKDOOR_AUDIT_POLICY", help="Policy file, audit.toml. Without it every default holds.")
]
OneFormatOption = Annotated[OneFormat, typer.Option("--format", help="What goes to stdout.")]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Accept a whole-module pickle; it is opened in a child process only.")
]
RequireGpuOption = Annotated[bool, typer.Option("--require-gpu", help="Fail instead of running on the CPU.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More log lines on stderr.")]


def parse_formats(formats: str, output: Path | None) -> tuple[ReportFormat, ...]:
    named = [part.strip() for part in formats.split(",") if part.strip()]
    for name in named:
        if name not in FORMATS:
            raise UsageError(f"There is no format '{name}'.{nearest(name, FORMATS)}")
    wanted = tuple(known for known in FORMATS if known in named)
    if not wanted:
        raise UsageError(f"Name at least one format of {', '.join(FORMATS)}.")
    for name in wanted:
        if output is None and name not in ("text", "json"):
            raise UsageError(f"A report in the format {name} needs a folder to go to: add -o FOLDER.")
    return wanted


def check_output(output: Path, what: str = "report") -> None:
    """Nobody waits for an audit to learn that its report has no place."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"The {what} cannot be written to '{output}': '{place}' is no folder that you may write to.")


def print_report(report: AuditReport, formats: Sequence[str], output: Path | None, logged: LoggedReport | None) -> None:
    from audit_plugin.report.schema import dumps, to_document
    from audit_plugin.report.text import render_text

    if "text" in formats:
        stdout.print(render_text(report), markup=False)
        if output is not None:
            stdout.print(f"Report: {output.resolve()}", markup=False)
        if logged is not None:
            stdout.print(f"MLflow run: {logged.page or logged.run_id}", markup=False)
    elif "json" in formats:
        sys.stdout.write(dumps(to_document(report)) + "\n")


def complain(message: str) -> None:
    from audit_plugin.report.sanitise import clean_text

    stderr.print(f"error: {clean_text(message, LONGEST_MESSAGE)}", markup=False, style="bold red", soft_wrap=True)


def reason_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    return str(error) if isinstance(error, AuditError | OSError) else f"{type(error).__name__}: {error}"


class _StageProgress:
    """One line on stderr: the present stage and, where it is known, how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def stage(self, name: str) -> None:
        if not self._progress.console.is_terminal:
            _log.info("%s", name)
        self._progress.reset(self._task, description=name, total=None)

    def advance(self, share: float) -> None:
        self._progress.update(self._task, total=1.0, completed=share)


@contextmanager
def show_progress() -> Iterator[_StageProgress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield _StageProgress(progress)


class _VisibleFormatter(logging.Formatter):
    """A log line may quote the model, whose control characters must not reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        from audit_plugin.report.sanitise import clean_text

        is_traceback = bool(record.exc_info)
        return clean_text(super().format(record), None if is_traceback else LONGEST_MESSAGE, multiline=is_traceback)


def configure_logging(verbose: bool) -> None:
    handler = RichHandler(console=stderr, show_path=False, show_time=False, markup=False)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("audit_plugin", "pipelines"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for the report alone
    if not verbose:
        # Other libraries' notes about their own internals are not what a user of an audit should read.
        warnings.simplefilter("ignore")
        for package in ("mlflow", "torch", "great_expectations", "alembic"):
            logging.getLogger(package).setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # MLflow sets its own level when it is imported
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
