"""``backdoor-audit gate``, ``verify``, ``waive`` and ``keygen``: who may be promoted, and who says so."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit_plugin.cli.auditing import audit_and_print
from audit_plugin.cli.console import (
    EXIT_CODES,
    FORMATS,
    AllowPickleOption,
    LogChoice,
    OneFormat,
    OneFormatOption,
    PolicyOption,
    RequireGpuOption,
    VerboseOption,
    complain,
    configure_logging,
    parse_formats,
    show_progress,
    stderr,
    stdout,
)
from audit_plugin.errors import RegistryError, UsageError
from audit_plugin.types import SUSPECT_FORMATS, ReportFormat, Verdict

if TYPE_CHECKING:
    from audit_plugin.attestation import Statement
    from audit_plugin.gate import Requirements, Standing, VersionFacts


_log = logging.getLogger(__name__)
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_FORMATS = tuple(name for name in FORMATS if name not in SUSPECT_FORMATS)

GATE_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit gate models:/digits/3 --clean clean.npz --promote champion

  backdoor-audit gate models:/digits/3 --clean clean.npz -o report --format sarif,junit,markdown

  backdoor-audit gate models:/digits/3        with the images that the policy's section clean_images names

[bold]Exit codes[/bold]  0 may be promoted, 1 fail, 2 error, 3 inconclusive, 4 usage
"""

VERIFY_EXAMPLES = """

[bold]Examples[/bold]

  BACKDOOR_AUDIT_VERIFYING_KEYS=verifying.pem backdoor-audit verify models:/digits@champion

[bold]Exit codes[/bold]  0 may be deployed, 1 failed, changed or forged, 2 error, 3 no audit that counts, 4 usage
"""

WAIVE_EXAMPLES = """

[bold]Examples[/bold]

  backdoor-audit waive models:/digits/3 --by "Ada Lovelace" --reason "Outage 4711, audit follows" --days 2

  backdoor-audit waive models:/digits/3 --by "Ada Lovelace" --reason "Audited now" --revoke
"""


def gate(
    model: Annotated[str, typer.Argument(metavar="MODEL_URI", help="A version of a registered model, as for 'run'.")],
    clean: Annotated[
        str | None, typer.Option(help="Clean labelled images, as for 'run'. Else those in the policy's section clean_images.")
    ] = None,
    promote: Annotated[str | None, typer.Option(metavar="ALIAS", help="Alias that the version gets if it may.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Audit even if there is an audit that counts.")] = False,
    policy: PolicyOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report's files.")] = None,
    formats: Annotated[str, typer.Option("--format", help=f"Any of {', '.join(_FORMATS)}, by commas.")] = "text",
    seed: Annotated[int, typer.Option(min=0, help="Of the splits and the search.")] = 0,
    allow_pickle: AllowPickleOption = False,
    require_gpu: RequireGpuOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Find out whether a version may be promoted: by its signed audit if that counts, else by a new one. Then promote it."""
    from audit_plugin.requirements import clean_images_of, load_requirements

    configure_logging(verbose)
    wanted = parse_formats(formats, output)
    if of_suspects := [name for name in wanted if name in SUSPECT_FORMATS]:
        raise UsageError(f"{of_suspects[0]} is a table of suspect inputs, and 'gate' takes none. Use 'run' with --suspects.")
    requirements = load_requirements(policy)
    version, standing = _look_at(model, requirements)
    uri = version.uri
    if standing.counts and not again:
        if standing.attestation is not None:
            _fetch_report(standing.attestation, wanted, output)
        elif output is not None:
            _log.warning("%s is promoted by a waiver, not by an audit, so there is no report to write. Add --again for one.", uri)
        code = _standing_code(standing)
        _print_standing(version, standing, OneFormat.JSON if "json" in wanted and "text" not in wanted else OneFormat.TEXT)
    else:
        clean = clean or clean_images_of(version.name, policy)
        if clean is None:
            reasons = " ".join(reason.message for reason in standing.reasons)
            raise UsageError(
                f"{uri} has no audit that counts, and --clean is missing for a new one: the policy's [clean_images] names none. "
                f"{reasons}".strip()
            )
        _check_key(requirements)
        report, logged = audit_and_print(
            uri,
            clean,
            policy_file=policy,
            output=output,
            formats=wanted,
            seed=seed,
            log=LogChoice.ALWAYS,
            allow_pickle=allow_pickle,
            require_gpu=require_gpu,
        )
        if os.environ.get(_STEP_SUMMARY):
            from audit_plugin.report.markdown import render_markdown

            _add_to_step_summary(render_markdown(report))
        code = EXIT_CODES[report.decision.verdict]
        if code == 0 and logged is not None and not logged.promotion.allowed:
            for result in logged.promotion.results:
                if not result.success:
                    complain(f"The promotion suite does not allow {uri}: {result.description} Observed: {result.observed}")
            code = EXIT_CODES[Verdict.FAIL]
        if logged is not None and not logged.signed:
            _log.warning(
                "The verdict is not signed, so a registry with a gate will not count it. Set BACKDOOR_AUDIT_SIGNING_KEY."
            )
    if code == 0 and promote is not None:
        from audit_plugin.registry import promote as give_alias

        give_alias(version.name, version.version, promote)
        stderr.print(f"{uri} is '{promote}' now.", markup=False)
    return code


def _check_key(requirements: Requirements) -> None:
    """Find out before the audit that its verdict would not count: by none of the keys that may sign, or by no key."""
    from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, signer_from_environment

    accepted = requirements.verdict_keys.identifiers
    signer = signer_from_environment()
    if accepted and (signer is None or signer.public_key.keyid not in accepted):
        raise UsageError(
            f"The verdict would not count: {VERIFYING_KEYS} asks for a signature, and {SIGNING_KEY} "
            f"{'is not set' if signer is None else 'holds none of these keys'}. Set it to the private key of one of them."
        )


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL_URI", help="A version of a registered model, as for 'run'.")],
    policy: PolicyOption = None,
    format_: OneFormatOption = OneFormat.TEXT,
    verbose: VerboseOption = False,
) -> int:
    """Fetch a version and compare it with its signed audit: signature, verdict, age, policy, and every byte of its files."""
    from audit_plugin.attestation import VERIFYING_KEYS
    from audit_plugin.requirements import load_requirements

    configure_logging(verbose)
    requirements = load_requirements(policy)
    if not requirements.verdict_keys.keys:
        raise UsageError(f"There is nothing to verify with: set {VERIFYING_KEYS} to the file of the public keys.")
    version, standing = _look_at(model, requirements)
    _print_standing(version, standing, format_)
    return _standing_code(standing)


def waive(
    model: Annotated[str, typer.Argument(metavar="MODEL_URI", help="A version of a registered model, as for 'run'.")],
    by: Annotated[str, typer.Option(help="Who answers for it.")],
    reason: Annotated[str, typer.Option(help="Why the audit is not waited for.")],
    days: Annotated[float, typer.Option(min=0.0, help="How long it holds; the policy limits it.")] = 1.0,
    revoke: Annotated[bool, typer.Option("--revoke", help="End a waiver that is in force.")] = False,
    policy: PolicyOption = None,
    verbose: VerboseOption = False,
) -> int:
    """In an emergency: sign that these very files may be promoted without an audit that counts, until a date."""
    from audit_plugin.attestation import SIGNING_KEY, signer_from_environment
    from audit_plugin.policy import load_policy
    from audit_plugin.registry import put_statement, statement_on

    configure_logging(verbose)
    signer = signer_from_environment()
    if signer is None:
        raise UsageError(f"A waiver must be signed: set {SIGNING_KEY} to the file of the private key.")
    if not by.strip() or not reason.strip():
        raise UsageError("A waiver says who answers for it and why: --by and --reason must not be empty.")
    if days <= 0 and not revoke:
        raise UsageError("--days must be positive.")
    if not revoke and days > (longest := load_policy(policy).gate.maximum_waiver_days):
        raise UsageError(
            f"--days {days:g} is more than the policy's maximum_waiver_days ({longest:g}), so the registry would not count it. "
            "Make a shorter waiver, or give the registry's --policy."
        )
    version, digest = _fetch(model)
    now = datetime.datetime.now(datetime.UTC)
    until = now if revoke else now + datetime.timedelta(days=days)
    text = f"{'revoked' if revoke else 'until'} {until.isoformat(timespec='minutes')} by {by}: {reason}"
    facts = {"by": by, "reason": reason, "until": until.isoformat()}
    put_statement(statement_on(version, "waiver", digest, {"audit.waived": text}, facts), signer)
    stdout.print(f"{version.uri}: waiver {text}", markup=False)
    return 0


def keygen(
    folder: Annotated[Path, typer.Argument(help="Where signing.pem and verifying.pem go.")],
) -> int:
    """Make a key pair: signing.pem for whoever audits, verifying.pem for the registry and those who deploy."""
    from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys

    signing, verifying = generate_keys(folder)
    stdout.print(f"{SIGNING_KEY}={signing.resolve()}\n{VERIFYING_KEYS}={verifying.resolve()}", markup=False)
    return 0


def _look_at(model: str, requirements: Requirements) -> tuple[VersionFacts, Standing]:
    """A registered version and its standing, its files compared."""
    from audit_plugin.gate import standing_of

    version, digest = _fetch(model)
    return version, standing_of(version, requirements, digest=digest)


def _fetch(model: str) -> tuple[VersionFacts, str]:
    """A registered version, and the digest of its files as they are now.

    Raises:
        UsageError: the URI names no version of a registered model.
    """
    with show_progress() as progress, tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        progress.stage("Fetching the model")
        from audit_plugin.registry import pin, version_facts

        reference = pin(model, Path(temporary)).reference
        if reference.name is None or reference.version is None:
            raise UsageError(f"'{model}' is no version of a registered model. Use models:/name/version or models:/name@alias.")
        return version_facts(reference.name, reference.version), reference.digest


def _standing_code(standing: Standing) -> int:
    """Whoever failed, was changed or forged fails; an audit that is missing or out of date is inconclusive."""
    if standing.allowed:
        return EXIT_CODES[Verdict.PASS]
    return EXIT_CODES[Verdict.FAIL if standing.is_refuted else Verdict.INCONCLUSIVE]


def _print_standing(version: VersionFacts, standing: Standing, format_: OneFormat) -> None:
    from audit_plugin.report.schema import dumps
    from audit_plugin.report.standing import render_standing, standing_document

    if format_ is OneFormat.JSON:
        sys.stdout.write(dumps(standing_document(version, standing)) + "\n")
    else:
        stdout.print(render_standing(version, standing), markup=False)


def _fetch_report(attestation: Statement, formats: Sequence[ReportFormat], output: Path | None) -> None:
    """The files that were asked for, of an audit that is not repeated."""
    from audit_plugin.registry import fetch_report_files
    from audit_plugin.report.write import file_names

    if output is not None:
        fetch_report_files(attestation, file_names(formats), output)
    if os.environ.get(_STEP_SUMMARY):
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            try:
                (summary,) = fetch_report_files(attestation, file_names(["markdown"]), Path(temporary))
            except RegistryError as error:  # nobody asked for it by an option
                _log.warning("The summary of the audit is left out: %s", error)
            else:
                _add_to_step_summary(summary.read_text(encoding="utf-8"))


def _add_to_step_summary(text: str) -> None:
    """GitHub shows what a step appends to this file."""
    if path := os.environ.get(_STEP_SUMMARY):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
