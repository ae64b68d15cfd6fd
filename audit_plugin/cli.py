"""The command line: the only place that prints or exits.

Exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import os
import shlex
import shutil
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
from rich.text import Text

from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.types import AuditReport, ModelRef, ReportFormat, Verdict

if TYPE_CHECKING:
    from audit_plugin.guard import Guard
    from audit_plugin.registry import LoggedReport, PinnedModel
    from audit_plugin.repairing import Repaired

EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}
EXIT_ERROR = 2
EXIT_USAGE = 4
_LONGEST_MESSAGE = 2000
_TYPER_INTERRUPTED = 130  # what newer typers make of Ctrl-C; no command of ours returns it

FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)
_WITHOUT_SUSPECTS: tuple[ReportFormat, ...] = ("text", "json", "html")  # the others are tables of suspect inputs

_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit run models:/digits/3 --clean clean.npz

  backdoor-audit run models:/digits@candidate --clean images/ --policy audit.toml -o report --format text,json,html

  backdoor-audit run model.onnx --clean images/ --format json > report.json

[bold]Exit codes[/bold]  0 pass, 1 fail, 2 error, 3 inconclusive, 4 usage
"""

_REPAIR_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit repair models:/digits/3 --clean clean.npz

  backdoor-audit repair models:/digits/3 --clean clean.npz --target-class stop --accuracy-budget 0.03

  backdoor-audit repair model.onnx --clean images/ --method prune -o repaired

[bold]Exit codes[/bold]  of the repaired model's audit: 0 pass, 1 fail, 3 inconclusive; else 2 not repaired or an error, 4 usage
"""

_GUARD_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit guard models:/digits/3 --clean clean.npz --fpr 0.05

  backdoor-audit guard model.pt2 --clean images/ -o guarded.onnx --no-search
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


class UnpublishedError(AuditError):
    """An audit came to its end, and then its report could not be written or logged."""

    def __init__(self, message: str, report: AuditReport) -> None:
        super().__init__(message)
        self.report = report


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
PolicyOption = Annotated[Path | None, typer.Option(help="Policy file, audit.toml. Without it every default holds.")]
OneFormatOption = Annotated[OneFormat, typer.Option("--format", help="What goes to stdout.")]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Accept a whole-module pickle; it is opened in a child process only.")
]
RequireGpuOption = Annotated[bool, typer.Option("--require-gpu", help="Fail instead of running on the CPU.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More log lines on stderr.")]


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
    policy: PolicyOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report's files.")] = None,
    formats: Annotated[
        str, typer.Option("--format", help="Any of text, json, html, csv, parquet, by commas. Text, else JSON, goes to stdout.")
    ] = "text",
    seed: Annotated[int, typer.Option(min=0, help="Of the splits and the search; the same seed gives the same audit.")] = 0,
    log: Annotated[
        LogChoice, typer.Option(help="Log the report to MLflow; 'auto' does so when the model came from there.")
    ] = LogChoice.AUTO,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Audit one model and say pass, fail or inconclusive."""
    _configure_logging(verbose)
    wanted = _parse_formats(formats, output)
    try:
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
    except UnpublishedError as error:
        _print_report(error.report, wanted, None, None)
        raise
    _print_report(report, wanted, output, logged)
    return EXIT_CODES[report.decision.verdict]


@app.command(epilog=_REPAIR_EXAMPLES)
def repair(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_URI", help="As for 'run'. Only a registered version can become the next version.")
    ],
    clean: Annotated[str, typer.Option(help="Clean labelled images, as for 'run'. The repair learns from them.")],
    method: Annotated[
        str | None, typer.Option(help="'beniful' (fine-tunes a copy) or 'prune' (sets channels to zero). Else the policy's.")
    ] = None,
    target_class: Annotated[
        str | None, typer.Option(help="Name or index of the attacker's class, where the audit suspects none.")
    ] = None,
    accuracy_budget: Annotated[
        float | None, typer.Option(help="Most clean accuracy that the repair may cost; 0.02 are two points. Else the policy's.")
    ] = None,
    policy: PolicyOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, search and repair; the same seed gives the same result.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the repaired file of a model that is not registered.")
    ] = None,
    format_: OneFormatOption = OneFormat.TEXT,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Repair a backdoored model: register the repaired copy as the next version, and audit that at once."""
    _configure_logging(verbose)
    repaired, uri = repair_and_keep(
        model,
        clean,
        target_class=target_class,
        method=method,
        accuracy_budget=accuracy_budget,
        policy_file=policy,
        output=output,
        seed=seed,
        allow_pickle=allow_pickle,
        require_gpu=require_gpu,
    )
    again = ["backdoor-audit", "run", uri, "--clean", clean, "--seed", str(seed)]
    try:
        report, logged = audit_and_publish(
            uri,
            clean,
            policy_file=policy,
            seed=seed,
            require_gpu=require_gpu,
            command=shlex.join(again if policy is None else [*again, "--policy", str(policy)]),
        )
    except UnpublishedError as error:
        _print_repair(repaired, uri, error.report, None, format_)
        raise AuditError(f"The repaired model is {uri}. {error}") from error
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the user must learn that the repaired model exists
        _log.debug("The repaired model was not audited.", exc_info=True)
        _print_repair(repaired, uri, None, None, format_)
        raise AuditError(
            f"The repaired model is {uri}, but its audit did not come to its end, so it has no verdict. {_reason(error)}"
        ) from error
    _print_repair(repaired, uri, report, logged, format_)
    return EXIT_CODES[report.decision.verdict]


@app.command(epilog=_GUARD_EXAMPLES)
def guard(
    model: Annotated[str, typer.Argument(metavar="MODEL_URI", help="As for 'run'.")],
    clean: Annotated[str, typer.Option(help="Clean labelled images, as for 'run'. The guard learns from them.")],
    false_positive_rate: Annotated[
        float, typer.Option("--fpr", help="Share of clean inputs that may be called suspicious, between 0 and 1.")
    ] = 0.01,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Recover triggers, to measure how many the guard detects; minutes.")
    ] = True,
    name: Annotated[
        str | None, typer.Option(help="Registered model that the guard becomes a version of; else the model's with '-guard'.")
    ] = None,
    policy: PolicyOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and search; the same seed gives the same guard.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="ONNX file to write; needed for a model that is not in MLflow.")
    ] = None,
    format_: OneFormatOption = OneFormat.TEXT,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Make a guarded model: one ONNX file that answers as the model does and says which inputs are suspicious."""
    _configure_logging(verbose)
    built, uri = guard_and_keep(
        model,
        clean,
        false_positive_rate=false_positive_rate,
        search=search,
        name=name,
        policy_file=policy,
        output=output,
        seed=seed,
        allow_pickle=allow_pickle,
        require_gpu=require_gpu,
    )
    _print_guard(built, None if output is None else str(output), uri, format_)
    return 0


@app.command()
def doctor() -> int:
    """Say what this installation can do: versions, execution providers that really load, whether MLflow answers."""
    from audit_plugin.doctor import diagnose
    from audit_plugin.report.sanitise import clean_text

    _configure_logging(verbose=False)
    table = Table("", "what", "found", box=None, pad_edge=False)
    findings = diagnose()
    for finding in findings:
        mark = "[green]ok[/green]" if finding.works else "[red]no[/red]" if finding.required else "[yellow]--[/yellow]"
        table.add_row(mark, finding.name, Text(clean_text(finding.detail, _LONGEST_MESSAGE)))
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
        command = shlex.join(["backdoor-audit", "run", uri, "--clean", str(prepared.clean_images)])
        report, logged = audit_and_publish(
            uri,
            str(prepared.clean_images),
            output=folder / "reports" / uri.rsplit("/", 2)[-2],
            formats=_WITHOUT_SUSPECTS,
            command=f"MLFLOW_TRACKING_URI={shlex.quote(prepared.tracking_uri)} {command}",
        )
        _print_report(report, ("text",), folder / "reports" / uri.rsplit("/", 2)[-2], logged)
        right = right and (report.decision.verdict, report.decision.suspected_class) == expected
    _stdout.rule()
    _stdout.print("Open the MLflow UI and look at the experiment 'backdoor-audits':")
    server = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", prepared.tracking_uri, "--port", "5000"])
    _stdout.print(f"  {server}", markup=False)
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

    Raises:
        UnpublishedError: it did, and then its report could not be written or logged, or Ctrl-C came.
    """
    from audit_plugin.policy import load_policy

    policy = load_policy(policy_file)
    if output is not None:
        _check_output(output)
    with _progress() as progress:
        progress.stage("Starting")
        from audit_plugin.audit import audit
        from audit_plugin.registry import check_server, fetch_images, pin, redacted

        try:
            progress.stage("Fetching the model")
            with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
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
                    command=redacted(command),
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the audit came to its end; nothing was written or logged.") from None
        # What was fetched lay in a folder that is gone.
        report = dataclasses.replace(report, clean_set=dataclasses.replace(report.clean_set, source=redacted(clean)))
        progress.stage("Writing the report")
        return report, _publish(report, output, formats, publish)


def repair_and_keep(
    model: str,
    clean: str,
    *,
    target_class: str | None = None,
    method: str | None = None,
    accuracy_budget: float | None = None,
    policy_file: Path | None = None,
    output: Path | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
) -> tuple[Repaired, str]:
    """Pin and repair one model, with progress on stderr; then register the copy, or write it to ``output``.

    Returns:
        What was done, and where the repaired model is: ``models:/name/version``, or the path of a file.

    Raises:
        UsageError: ``output`` is missing for a model that is no registered version, or given for one that is.
        RepairError: see :func:`audit_plugin.repairing.repair_model`; nothing was registered or written.
    """
    from audit_plugin.policy import load_policy

    policy = load_policy(policy_file)
    if output is not None:
        _check_output(output, "repaired model")
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Starting")
        from audit_plugin.registry import check_server, fetch_images, pin, register_repaired
        from audit_plugin.repairing import repair_model

        work = Path(temporary)
        try:
            progress.stage("Fetching the model")
            pinned = pin(model, work)
            original = pinned.reference
            if original.name is not None:
                check_server()
            _check_place(original, output)
            repaired = repair_model(
                original,
                pinned.folder,
                fetch_images(clean, work / "clean"),
                work / "repaired",
                target_class=target_class,
                method=method,
                accuracy_budget=accuracy_budget,
                policy=policy,
                seed=seed,
                allow_pickle=allow_pickle,
                require_gpu=require_gpu,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the repair came to its end; nothing was registered or written.") from None
        if output is not None:
            progress.stage("Writing the repaired model")
            output.mkdir(parents=True, exist_ok=True)
            return repaired, str(shutil.copy(repaired.file, output))
        progress.stage("Registering the repaired model")
        try:
            return repaired, register_repaired(original, repaired.network, repaired.repair)
        except (Exception, KeyboardInterrupt) as error:
            _log.debug("The repaired model was not registered.", exc_info=True)
            raise AuditError(
                f"The model was repaired, but registering it did not come to its end. {_reason(error)} {original.pinned_uri} is "
                f"as it was. Whether '{original.name}' has a new version, its tag audit.repaired_from tells."
            ) from error


def guard_and_keep(
    model: str,
    clean: str,
    *,
    false_positive_rate: float = 0.01,
    search: bool = True,
    name: str | None = None,
    policy_file: Path | None = None,
    output: Path | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
) -> tuple[Guard, str | None]:
    """Pin a model and build its guard, with progress on stderr; then write the guard, register it, or both.

    Returns:
        The guard, and the version that it became, or None.

    Raises:
        UsageError: there is no place for the guard, or a wrong one.
        AuditError: see :func:`audit_plugin.guard.build_guard`; nothing was registered or written.
    """
    from audit_plugin.policy import load_policy

    if not 0.0 < false_positive_rate < 1.0:
        raise UsageError(f"--fpr must lie between 0 and 1, got {false_positive_rate:g}; 0.01 is one in a hundred.")
    policy = load_policy(policy_file)
    if output is not None:
        _check_output(output.absolute().parent, "guard")
        if output.exists():
            raise UsageError(f"'{output}' exists, and no model file is overwritten. Choose another name.")
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Starting")
        from audit_plugin.guard import build_guard
        from audit_plugin.model.export import save
        from audit_plugin.registry import check_server, fetch_images, pin, register_guard

        work = Path(temporary)
        try:
            progress.stage("Fetching the model")
            pinned = pin(model, work)
            registered_name = _guard_name(pinned, name, output)
            if registered_name is not None:
                check_server()
            built = build_guard(
                pinned.reference,
                pinned.folder,
                fetch_images(clean, work / "clean"),
                false_positive_rate=false_positive_rate,
                search=search,
                policy=policy,
                seed=seed,
                allow_pickle=allow_pickle,
                require_gpu=require_gpu,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the guard was ready; nothing was registered or written.") from None
        if output is not None:
            progress.stage("Writing the guard")
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            save(built.model, output)
        if registered_name is None:
            return built, None
        progress.stage("Registering the guard")
        try:
            return built, register_guard(built, registered_name)
        except (Exception, KeyboardInterrupt) as error:
            _log.debug("The guard was not registered.", exc_info=True)
            place = "" if output is None else f" It is in '{output}'."
            raise AuditError(
                f"The guard was built, but registering it failed; a run without a version may remain in MLflow.{place} "
                f"{_reason(error)}"
            ) from error


def _guard_name(pinned: PinnedModel, name: str | None, output: Path | None) -> str | None:
    """The registered model that a guard becomes a version of; None when it is only written."""
    original = pinned.reference
    if not pinned.came_from_mlflow and (name is not None or output is None):
        raise UsageError(
            f"'{original.uri}' is no model of MLflow, so its guard is only written to a file: give -o FILE, and no --name."
        )
    if name is None and original.name is None and output is None:
        raise UsageError(f"'{original.uri}' is no version of a registered model. Add --name to register its guard, or -o FILE.")
    return name or (f"{original.name}-guard" if original.name else None)


def _check_place(original: ModelRef, output: Path | None) -> None:
    from audit_plugin.model.save import ONNX_FILE, PT2_FILE

    if original.name is None and output is None:
        raise UsageError(
            f"'{original.uri}' is no version of a registered model, so the repaired one cannot be its next version. "
            "Add -o FOLDER for its file."
        )
    if original.name is not None and output is not None:
        raise UsageError(
            f"The repair of '{original.uri}' is registered as the next version of '{original.name}'; -o is for models that are "
            "not registered. Leave it out."
        )
    if output is not None:
        taken = [output / name for name in (PT2_FILE, ONNX_FILE) if (output / name).exists()]
        if taken:
            raise UsageError(f"'{taken[0]}' exists, and no model file is overwritten. Choose another folder.")


def _publish(report: AuditReport, output: Path | None, formats: Sequence[ReportFormat], publish: bool) -> LoggedReport | None:
    from audit_plugin.registry import log_report, redacted
    from audit_plugin.report.write import write_report

    step, written = "written", ""
    try:
        if output is not None:
            write_report(report, output, formats)
            written = f" Its files are in '{output}'."
        if not publish:
            return None
        step = "logged"
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            write_report(report, Path(temporary), FORMATS if report.suspects else _WITHOUT_SUSPECTS)
            return log_report(report, Path(temporary))
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, minutes of work must not be lost by it
        _log.debug("The report was not %s.", step, exc_info=True)
        raise UnpublishedError(redacted(f"The report was not {step} completely.{written} {_reason(error)}"), report) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    return str(error) if isinstance(error, AuditError | OSError) else f"{type(error).__name__}: {error}"


def _check_output(output: Path, what: str = "report") -> None:
    """Nobody waits for an audit to learn that its report has no place."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"The {what} cannot be written to '{output}': '{place}' is no folder that you may write to.")


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
        _complain("Interrupted.")
        return EXIT_ERROR
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    from audit_plugin.report.sanitise import clean_text

    _stderr.print(f"error: {clean_text(message, _LONGEST_MESSAGE)}", markup=False, style="bold red", soft_wrap=True)


def _parse_formats(formats: str, output: Path | None) -> tuple[ReportFormat, ...]:
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


def _print_repair(
    repaired: Repaired, uri: str, report: AuditReport | None, logged: LoggedReport | None, format_: OneFormat
) -> None:
    """What was done, and the audit of what came of it (None where that did not come to its end)."""
    from audit_plugin.report.repairs import render_repair, repair_document
    from audit_plugin.report.schema import dumps, to_document

    if format_ is OneFormat.JSON:
        document = {
            "repair": repair_document(repaired.repair, repaired.audited, uri),
            "report": None if report is None else to_document(report),
        }
        sys.stdout.write(dumps(document) + "\n")
        return
    _stdout.print(render_repair(repaired.repair, repaired.audited, uri), markup=False)
    if report is not None:
        _print_report(report, ("text",), None, logged)


def _print_guard(built: Guard, file: str | None, uri: str | None, format_: OneFormat) -> None:
    from audit_plugin.report.guards import guard_document, render_guard
    from audit_plugin.report.schema import dumps

    if format_ is OneFormat.JSON:
        sys.stdout.write(dumps(guard_document(built.report, file, uri)))
    else:
        _stdout.print(render_guard(built.report, file, uri), markup=False, end="")


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


class _VisibleFormatter(logging.Formatter):
    """A log line may quote the model, whose control characters must not reach the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        from audit_plugin.report.sanitise import clean_text

        is_traceback = bool(record.exc_info)
        return clean_text(super().format(record), None if is_traceback else _LONGEST_MESSAGE, multiline=is_traceback)


def _configure_logging(verbose: bool) -> None:
    handler = RichHandler(console=_stderr, show_path=False, show_time=False, markup=False)
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


if __name__ == "__main__":
    main()
