"""``backdoor-audit repair`` and ``guard``: what makes a new model of an audited one."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit_plugin.cli.auditing import UnpublishedError, audit_and_publish
from audit_plugin.cli.console import (
    EXIT_CODES,
    AllowPickleOption,
    OneFormat,
    OneFormatOption,
    PolicyOption,
    RequireGpuOption,
    VerboseOption,
    check_output,
    configure_logging,
    print_report,
    reason_of,
    show_progress,
    stdout,
)
from audit_plugin.confined.jobs import AuditJob, GuardJob, RepairJob, RepairResult
from audit_plugin.errors import AuditError, UsageError
from audit_plugin.types import ONNX_FILE, PT2_FILE, AuditReport, GuardReport, ModelRef

if TYPE_CHECKING:
    from audit_plugin.registry import LoggedReport, PinnedModel


_log = logging.getLogger(__name__)


REPAIR_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit repair models:/digits/3 --clean clean.npz

  backdoor-audit repair models:/digits/3 --clean clean.npz --target-class stop --accuracy-budget 0.03

  backdoor-audit repair model.onnx --clean images/ --method prune -o repaired

[bold]Exit codes[/bold]  of the repaired model's audit: 0 pass, 1 fail, 3 inconclusive; else 2 not repaired or an error, 4 usage
"""

GUARD_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit guard models:/digits/3 --clean clean.npz --fpr 0.05

  backdoor-audit guard model.pt2 --clean images/ -o guarded.onnx --no-search
"""


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
    configure_logging(verbose)
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
            f"The repaired model is {uri}, but its audit did not come to its end, so it has no verdict. {reason_of(error)}"
        ) from error
    _print_repair(repaired, uri, report, logged, format_)
    return EXIT_CODES[report.decision.verdict]


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
    configure_logging(verbose)
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
) -> tuple[RepairResult, str]:
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
        check_output(output, "repaired model")
    with show_progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Starting")
        from audit_plugin import confined
        from audit_plugin.registry import check_writing, fetch_images, pin, register_repaired

        work = Path(temporary)
        try:
            progress.stage("Fetching the model")
            pinned = pin(model, work)
            original = pinned.reference
            if original.name is not None:
                check_writing()
            _check_place(original, output)
            common = AuditJob(
                original, pinned.folder, fetch_images(clean, work / "clean"), policy, seed, allow_pickle, require_gpu
            )
            repaired, file = confined.repair(
                RepairJob(common, target_class, method, accuracy_budget), work / "repaired", progress=progress
            )
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the repair came to its end; nothing was registered or written.") from None
        if output is not None:
            progress.stage("Writing the repaired model")
            output.mkdir(parents=True, exist_ok=True)
            return repaired, str(shutil.copy(file, output))
        progress.stage("Registering the repaired model")
        try:
            return repaired, register_repaired(original, file, repaired.repair, repaired.audited.subject)
        except (Exception, KeyboardInterrupt) as error:
            _log.debug("The repaired model was not registered.", exc_info=True)
            raise AuditError(
                f"The model was repaired, but registering it did not come to its end. {reason_of(error)} {original.pinned_uri} "
                f"is as it was. Whether '{original.name}' has a new version, its tag audit.repaired_from tells."
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
) -> tuple[GuardReport, str | None]:
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
        check_output(output.absolute().parent, "guard")
        if output.exists():
            raise UsageError(f"'{output}' exists, and no model file is overwritten. Choose another name.")
    with show_progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Starting")
        from audit_plugin import confined
        from audit_plugin.registry import check_writing, fetch_images, pin, register_guard

        work = Path(temporary)
        try:
            progress.stage("Fetching the model")
            pinned = pin(model, work)
            registered_name = _guard_name(pinned, name, output)
            if registered_name is not None:
                check_writing()
            common = AuditJob(
                pinned.reference, pinned.folder, fetch_images(clean, work / "clean"), policy, seed, allow_pickle, require_gpu
            )
            built, file = confined.guard(GuardJob(common, false_positive_rate, search), work / "guarded", progress=progress)
        except KeyboardInterrupt:
            raise AuditError("Interrupted before the guard was ready; nothing was registered or written.") from None
        if output is not None:
            progress.stage("Writing the guard")
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, output)
        if registered_name is None:
            return built, None
        progress.stage("Registering the guard")
        try:
            return built, register_guard(built, file, registered_name)
        except (Exception, KeyboardInterrupt) as error:
            _log.debug("The guard was not registered.", exc_info=True)
            place = "" if output is None else f" It is in '{output}'."
            raise AuditError(
                f"The guard was built, but registering it failed; a run without a version may remain in MLflow.{place} "
                f"{reason_of(error)}"
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


def _print_repair(
    repaired: RepairResult, uri: str, report: AuditReport | None, logged: LoggedReport | None, format_: OneFormat
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
    stdout.print(render_repair(repaired.repair, repaired.audited, uri), markup=False)
    if report is not None:
        print_report(report, ("text",), None, logged)


def _print_guard(built: GuardReport, file: str | None, uri: str | None, format_: OneFormat) -> None:
    from audit_plugin.report.guards import guard_document, render_guard
    from audit_plugin.report.schema import dumps

    if format_ is OneFormat.JSON:
        sys.stdout.write(dumps(guard_document(built, file, uri)))
    else:
        stdout.print(render_guard(built, file, uri), markup=False, end="")
