"""The command line: the only place that prints or exits.

Exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage.
"""

from __future__ import annotations

import enum
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.types import AuditReport, ReportFormat, Verdict

if TYPE_CHECKING:
    from audit_plugin.registry import LoggedReport

EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}
EXIT_ERROR = 2
EXIT_USAGE = 4
_TYPER_INTERRUPTED = 130  # what newer typers make of Ctrl-C; no command of ours returns it

FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)

_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit run models:/digits/3 --clean clean.npz

  backdoor-audit run models:/digits@candidate --clean images/ --policy audit.toml -o report --format text,json,html

  backdoor-audit run model.onnx --clean images/ --format json > report.json

[bold]Exit codes[/bold]  0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage
"""

app = typer.Typer(
    help="Audit registered image classifiers for backdoors.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_click_errors = sys.modules[typer.BadParameter.__module__]  # click's own, or those of the copy that newer typers carry
_log = logging.getLogger("audit_plugin.cli")  # also when run as __main__
_stdout = Console(highlight=False, soft_wrap=True)
_stderr = Console(stderr=True, highlight=False)


class LogChoice(enum.StrEnum):
    """Whether a report goes to MLflow."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@app.command(epilog=_EXAMPLES)
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
    policy: Annotated[Path | None, typer.Option(help="Policy file, audit.toml. Without it every default holds.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report's files.")] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Any of text, json, html, separated by commas. Text, else JSON, goes to stdout.")
    ] = "text",
    seed: Annotated[int, typer.Option(min=0, help="Of the splits and the search; the same seed gives the same audit.")] = 0,
    log: Annotated[
        LogChoice, typer.Option(help="Log the report to MLflow; 'auto' does so when the model came from there.")
    ] = LogChoice.AUTO,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept a whole-module pickle; it is opened in a child process only.")
    ] = False,
    require_gpu: Annotated[bool, typer.Option("--require-gpu", help="Fail instead of running on the CPU.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More log lines on stderr.")] = False,
) -> int:
    """Audit one model and say pass, fail or inconclusive."""
    _configure_logging(verbose)
    wanted = _parse_formats(formats, output)
    report, logged = audit_and_publish(
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
        command=shlex.join(["backdoor-audit", *sys.argv[1:]]),
    )
    _print_report(report, wanted, output, logged)
    return EXIT_CODES[report.decision.verdict]


@app.command()
def doctor() -> int:
    """Say what this installation can do: versions, execution providers that really load, whether MLflow answers."""
    from audit_plugin.doctor import diagnose

    _configure_logging(verbose=False)
    table = Table("", "what", "found", box=None, pad_edge=False)
    findings = diagnose()
    for finding in findings:
        mark = "[green]ok[/green]" if finding.works else "[red]no[/red]" if finding.required else "[yellow]--[/yellow]"
        table.add_row(mark, finding.name, finding.detail)
    _stdout.print(table)
    return 0 if all(finding.works for finding in findings if finding.required) else EXIT_ERROR


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's models, data and MLflow database go.")] = Path("demo"),
) -> int:
    """Train a clean and a backdoored digit classifier, register both in an MLflow of their own, and audit them."""
    from pipelines.demo import EXPECTED, prepare_demo

    _configure_logging(verbose=False)
    with _progress() as progress:
        prepared = prepare_demo(folder.resolve(), progress.stage)
    right = True
    for uri, expected in zip(prepared.model_uris, EXPECTED, strict=True):
        _stdout.rule(uri)
        report, logged = audit_and_publish(
            uri,
            str(prepared.clean_images),
            output=folder / "reports" / uri.rsplit("/", 2)[-2],
            formats=FORMATS,
            command=f"MLFLOW_TRACKING_URI={prepared.tracking_uri} backdoor-audit run {uri} --clean {prepared.clean_images}",
        )
        _print_report(report, ("text",), folder / "reports" / uri.rsplit("/", 2)[-2], logged)
        right = right and (report.decision.verdict, report.decision.suspected_class) == expected
    _stdout.rule()
    _stdout.print("Open the MLflow UI and look at the experiment 'backdoor-audits':")
    _stdout.print(f"  {shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri {prepared.tracking_uri} --port 5000")
    if not right:
        raise AuditError("The demo did not find what it planted; please report this.")
    return 0


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
    command: str = "",
) -> tuple[AuditReport, LoggedReport | None]:
    """Pin, audit, write and log one model, with progress on stderr.

    Nothing is written or logged unless the audit came to its end.
    """
    from audit_plugin.policy import load_policy

    policy = load_policy(policy_file)
    if output is not None:
        _check_output(output)
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Starting")
        from audit_plugin.audit import audit
        from audit_plugin.registry import check_server, fetch_images, log_report, pin
        from audit_plugin.report.write import write_report

        progress.stage("Fetching the model")
        work = Path(temporary)
        pinned = pin(model, work)
        publish = log is LogChoice.ALWAYS or (log is LogChoice.AUTO and pinned.came_from_mlflow)
        if publish:
            check_server()  # before minutes of work whose result it could not take
        report = audit(
            pinned.reference,
            pinned.folder,
            fetch_images(clean, work / "clean"),
            suspects=fetch_images(suspects, work / "suspects") if suspects else None,
            policy=policy,
            seed=seed,
            allow_pickle=allow_pickle,
            require_gpu=require_gpu,
            command=command,
            progress=progress,
        )
        progress.stage("Writing the report")
        if output is not None:
            write_report(report, output, formats)
        logged = None
        if publish:
            write_report(report, work / "report", FORMATS)
            logged = log_report(report, work / "report")
    return report, logged


def _check_output(output: Path) -> None:
    """Nobody waits for an audit to learn that its report has no place."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"The report cannot be written to '{output}': '{place}' is no folder that you may write to.")


def main() -> None:
    """Entry point: one clear line and the right exit code for everything that can go wrong."""
    # Read when torch is first imported. Threads that spin while they wait made an audit ten times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), prog_name="backdoor-audit", standalone_mode=False)
    except _click_errors.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _complain(error.format_message())
        return EXIT_USAGE
    except UsageError as error:
        _complain(str(error))
        return EXIT_USAGE
    except AuditError as error:
        _complain(str(error))
        return EXIT_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = _TYPER_INTERRUPTED
    except OSError as error:
        _complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        return EXIT_ERROR
    except Exception as error:
        _log.debug("Unexpected error.", exc_info=True)
        _complain(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}. Run again with --verbose for details."
        )
        return EXIT_ERROR
    if code == _TYPER_INTERRUPTED:
        _complain("Interrupted; nothing was written or logged.")
        return EXIT_ERROR
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    from audit_plugin.report.sanitise import clean_text

    _stderr.print(f"error: {clean_text(message, 2000)}", markup=False, style="bold red", soft_wrap=True)


def _parse_formats(formats: str, output: Path | None) -> tuple[ReportFormat, ...]:
    named = [part.strip() for part in formats.split(",") if part.strip()]
    for name in named:
        if name not in FORMATS:
            raise UsageError(f"There is no format '{name}'.{nearest(name, FORMATS)}")
    wanted = tuple(known for known in FORMATS if known in named)
    if not wanted:
        raise UsageError(f"Name at least one format of {', '.join(FORMATS)}.")
    if "html" in wanted and output is None:
        raise UsageError("An HTML report needs a folder to go to: add -o FOLDER.")
    return wanted


def _print_report(report: AuditReport, formats: Sequence[str], output: Path | None, logged: LoggedReport | None) -> None:
    from audit_plugin.report.schema import dumps, to_document
    from audit_plugin.report.text import render_text

    if "text" in formats:
        _stdout.print(render_text(report), markup=False)
        if output is not None:
            _stdout.print(f"Report: {output.resolve()}", markup=False)
        if logged is not None:
            _stdout.print(f"MLflow run: {logged.page or logged.run_id}", markup=False)
    elif "json" in formats:
        sys.stdout.write(dumps(to_document(report)) + "\n")


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
def _progress() -> Iterator[_StageProgress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as progress:
        yield _StageProgress(progress)


def _configure_logging(verbose: bool) -> None:
    handler = RichHandler(console=_stderr, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
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


if __name__ == "__main__":
    main()
