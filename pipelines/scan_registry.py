"""Scans a whole model registry: every version in scope gets an audit, unless a signed one of the same files still counts.

What is published on a version is the only state, so a scan that was killed goes on where it stopped. Names, tags and aliases
belong to whoever made the models: a tag is believed only if a signature backs it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, signer_from_environment
from audit_plugin.canonical import document_digest
from audit_plugin.errors import AuditError, RegistryError, UsageError
from audit_plugin.gate import LAST_WORD, Requirements, Standing, standing_of
from audit_plugin.model.input_spec import input_tags
from audit_plugin.policy import Policy, load_policy
from audit_plugin.promotion import PromotionSuite, load_suite
from audit_plugin.registry import EXPERIMENT as AUDITS
from audit_plugin.registry import VERDICT_TAG, check_server, redacted
from audit_plugin.report.sanitise import clean_text
from audit_plugin.requirements import load_requirements, resolved_source, suite_path
from audit_plugin.types import AuditReport, Verdict
from pipelines.scan.digest import Digests
from pipelines.scan.engine import Engine, Finished, Task, reason_of, with_retries
from pipelines.scan.listing import Found, Scope, clean_images_key, find_versions, inputs_of
from pipelines.scan.lock import EXPERIMENT, scan_lock
from pipelines.scan.notify import message_of, notify
from pipelines.scan.page import render_page, run_address
from pipelines.scan.summary import (
    PAGE_FILE,
    SIGNED_FILE,
    SUMMARY_FILE,
    Outcome,
    Row,
    Summary,
    compared,
    open_summary,
    sign_summary,
)

log = logging.getLogger(__name__)

SCOPE_TAG = "scan.scope"
_LOOKING_THREADS = 8
_EARLIER_SCANS = 50
# What an attestation may have against a version that another audit under the same conditions would only say again.
_LASTING = LAST_WORD | {"verdict-inconclusive"}


class Watcher(Protocol):
    """Told how a scan goes on; the command line draws it."""

    def found(self, total: int) -> None:
        """So many versions are in scope."""

    def ended(self, row: Row, done: int, total: int) -> None:
        """One more version is done with, by an audit or without one."""


@dataclass(frozen=True)
class Options:
    """What a scan is asked to do.

    Attributes:
        again: audit also what has an audit that counts.
        limit: most audits in this scan; the others stay pending.
        notify_command: program and arguments, told when a promoted version newly fails.
    """

    scope: Scope
    policy_file: Path | None = None
    seed: int = 0
    allow_pickle: bool = False
    require_gpu: bool = False
    again: bool = False
    limit: int | None = None
    notify_command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What holds for all versions of a scan."""

    options: Options
    policy: Policy
    requirements: Requirements
    suite: PromotionSuite
    conditions: Mapping[str, Any]

    @property
    def trusts(self) -> bool:
        """Whether there is a key to check earlier audits with."""
        return bool(self.requirements.verdict_keys.keys)


@dataclass(frozen=True)
class Plan:
    """What is known before anything is audited: a row of every version, and the tasks of those that need an audit, by URI."""

    rows: tuple[Row, ...]
    tasks: Mapping[str, Task]
    notes: tuple[str, ...]


def scan(options: Options, engine: Engine, watcher: Watcher, stop: threading.Event) -> Summary:
    """Audit what needs it, publish every verdict at once, and log the summary as an MLflow run in ``backdoor-scans``.

    Raises:
        UsageError: the policy, a key, the suite or the filter cannot be read.
        ScanRunningError: another scan of this registry is running.
        RegistryError: MLflow does not answer.
        AuditError: ``stop`` was set; what is published stays.
    """
    rules, client, started = _rules(options), MlflowClient(), datetime.datetime.now(datetime.UTC)
    with _teaching(), scan_lock(client, {SCOPE_TAG: options.scope.mark}, stop) as run_id:
        previous = _previous(client, rules)
        plan = _plan(client, rules, previous, stop)
        rows = {row.uri: row for row in plan.rows}
        watcher.found(len(rows))
        done = 0
        for row in plan.rows:
            if row.uri not in plan.tasks:
                done += 1
                watcher.ended(row, done, len(rows))
        tasks = list(plan.tasks.values())[: options.limit]
        with closing(engine.run(tasks, stop)) as results:
            for finished in results:
                uri = finished.task.uri
                rows[uri] = _ended(rows[uri], finished, rules, stop)
                done += 1
                watcher.ended(rows[uri], done, len(rows))
        if stop.is_set():
            raise AuditError(f"Interrupted after {done} of {len(rows)} versions; the next scan goes on from here.")
        seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
        summary = Summary(
            run_id, _text(started), seconds, asdict(options.scope), rules.conditions, tuple(rows.values()), notes=plan.notes
        )
        summary = compared(summary, previous)
        with_retries(lambda: _log(client, run_id, summary), stop)
        if summary.drift.alarming:
            notify(message_of(summary, scan_address(run_id)), options.notify_command)
    return summary


def dry_run(options: Options, stop: threading.Event) -> Summary:
    """What :func:`scan` would do: rows of what it would audit are pending. Takes no lock and writes nothing."""
    rules, client, started = _rules(options), MlflowClient(), datetime.datetime.now(datetime.UTC)
    with _teaching():
        plan = _plan(client, rules, _previous(client, rules), stop)
    if stop.is_set():
        raise AuditError("Interrupted.")
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    return Summary(None, _text(started), seconds, asdict(options.scope), rules.conditions, plan.rows, notes=plan.notes)


def write_summary(summary: Summary, folder: Path, client: MlflowClient | None = None) -> None:
    """``summary.json``, ``summary.html`` and, where there is a signing key, ``summary.dsse.json``.

    Raises:
        UsageError: the signing key cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiment = (client or MlflowClient()).get_experiment_by_name(AUDITS)
    page = render_page(summary, str(experiment.experiment_id) if experiment else None)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary.document(), indent=2) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    if (signer := signer_from_environment()) is not None:
        (folder / SIGNED_FILE).write_text(sign_summary(summary, signer), encoding="utf-8")


def scan_address(run_id: str | None) -> str | None:
    """The page of a scan's run; None without an HTTP server."""
    experiment = MlflowClient().get_experiment_by_name(EXPERIMENT) if run_id else None
    return run_address(str(experiment.experiment_id), run_id) if experiment else None


# --------------------------------------------------------------------------------------------------------- the plan


def _rules(options: Options) -> Rules:
    policy = load_policy(options.policy_file)
    conditions = {
        "policy_digest": policy.digest,
        "tool_version": importlib.metadata.version("mlflow-backdoor-audit"),
        "seed": options.seed,
        "allow_pickle": options.allow_pickle,
    }
    requirements = load_requirements(options.policy_file)
    check_server()
    return Rules(options, policy, requirements, load_suite(suite_path(policy.gate, options.policy_file)), conditions)


def _plan(client: MlflowClient, rules: Rules, previous: Summary | None, stop: threading.Event) -> Plan:
    """List the versions in scope and look at each, several at a time."""
    found = find_versions(client, rules.options.scope, rules.policy.gate)
    refused = {
        (*row.key, row.inputs): row
        for row in (previous.rows if previous and rules.trusts and not rules.options.again else ())
        if row.refused and previous and previous.conditions == rules.conditions
    }

    digests = Digests(client)

    def look(entry: Found) -> Row | Task:
        return _look(digests, entry, rules, refused, stop)

    with ThreadPoolExecutor(_LOOKING_THREADS, thread_name_prefix="look") as pool:
        looks = [pool.submit(look, entry) for entry in found]
        try:
            results = [looked.result() for looked in looks]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # Those that the last scan tried in vain come last, lest they use up every scan's limit.
    broken = {row.uri for row in previous.of("error")} if previous else set()
    tasks = {
        task.uri: task
        for task in sorted((task for task in results if isinstance(task, Task)), key=lambda task: task.uri in broken)
    }
    waiting = set(list(tasks)[rules.options.limit :]) if rules.options.limit is not None else set()
    rows = []
    for entry, result in zip(found, results, strict=True):
        if isinstance(result, Task):
            left = "left for a later scan by --limit" if result.uri in waiting else f"to be audited with {redacted(result.clean)}"
            result = _row(entry, "pending", reason=left)
        rows.append(result)
    return Plan(tuple(rows), tasks, tuple(_notes(rules, found)))


def _look(
    digests: Digests, entry: Found, rules: Rules, refused: Mapping[tuple[str, str, str, str], Row], stop: threading.Event
) -> Row | Task:
    """What is known of a version without an audit, or the task of auditing it."""
    facts = entry.facts
    try:
        row = _row(entry, "error")
        known = refused.get((*row.key, row.inputs))
        standing = standing_of(facts, rules.requirements, digest=None)
        trusted = rules.trusts and not rules.options.again and _is_current(standing, entry, rules)
        if (trusted or known is not None) and not stop.is_set():
            digest = with_retries(lambda: digests.now(facts.name, facts.version, entry.source), stop)
            if trusted and _is_current(standing_of(facts, rules.requirements, digest=digest), entry, rules):
                return _earlier(entry, standing)
            if known is not None and known.digest == digest:
                return _row(entry, "error", digest=digest, refused=True, reason=known.reason)
    except Exception as error:  # whoever cannot be looked at is audited, which says what is wrong
        log.debug("%s could not be compared with its audit: %s", clean_text(facts.uri), reason_of(error))
    options = rules.options
    try:
        key = clean_images_key(entry, rules.policy)
    except UsageError as error:
        return _row(entry, "no clean images", reason=reason_of(error))
    # A worker of Ray may be in another folder.
    clean = resolved_source(rules.policy.clean_images[key], options.policy_file.absolute() if options.policy_file else None)
    command = ["backdoor-audit", "run", facts.uri, "--clean", clean, "--seed", str(options.seed)]
    command += ["--policy", str(options.policy_file)] if options.policy_file else []
    command += ["--allow-pickle"] if options.allow_pickle else []
    return Task(facts.uri, clean, rules.policy, options.seed, options.allow_pickle, options.require_gpu, shlex.join(command))


def _is_current(standing: Standing, entry: Found, rules: Rules) -> bool:
    """Whether another audit, under what holds now, could only say what the signed one says."""
    attestation = standing.attestation
    if attestation is None or not {reason.code for reason in standing.reasons} <= _LASTING:
        return False
    verdict = attestation.facts.get("verdict")
    return (
        verdict in tuple(Verdict)
        and attestation.facts.get("tool_version") == rules.conditions["tool_version"]
        # The last that an audit writes: without it the audit was killed before it was logged as a whole.
        and entry.facts.tags.get(VERDICT_TAG) == verdict
        # A setting of the model's input, or other clean images, may be all that was missing.
        and (
            verdict != Verdict.INCONCLUSIVE
            or (
                attestation.tags.get("audit.policy_digest") == rules.policy.digest
                and attestation.facts.get("input_tags") == document_digest(input_tags(entry.facts.tags))
            )
        )
    )


def _notes(rules: Rules, found: Sequence[Found]) -> list[str]:
    notes = []
    signer = signer_from_environment()
    keys = rules.requirements.verdict_keys
    if not rules.trusts:
        notes.append(
            f"Without {VERIFYING_KEYS} no earlier audit can be believed, so nothing is skipped. "
            "'backdoor-audit keygen FOLDER' makes a pair of keys."
            + (" With --limit every scan audits the same ones." if rules.options.limit is not None else "")
        )
    elif signer is None or signer.public_key.keyid not in keys.identifiers:
        notes.append(
            f"The verdicts of this scan are not signed by a key of {VERIFYING_KEYS}, so that the next scan repeats it. "
            f"Set {SIGNING_KEY}."
        )
    hidden = [entry.facts.uri for entry in found if entry.poses_as_prompt]
    if hidden:
        notes.append(
            f"{len(hidden)} versions have the tag mlflow.prompt.is_prompt, which hides their models from MLflow's search, "
            f"although they have files: {clean_text(', '.join(hidden[:5]))}."
        )
    return notes


# --------------------------------------------------------------------------------------------------------- the rows


def _row(entry: Found, outcome: Outcome, **more: Any) -> Row:
    facts = entry.facts
    created, inputs = _text(facts.created), inputs_of(entry)
    return Row(facts.name, facts.version, created, entry.aliases, entry.is_promoted, outcome, inputs=inputs, **more)


def _earlier(entry: Found, standing: Standing) -> Row:
    """The row of a version whose signed audit still counts."""
    attestation = standing.attestation
    if attestation is None:
        raise ValueError("no attestation")
    facts, suspected = attestation.facts, attestation.facts.get("suspected_class")
    reasons, promotion = facts.get("reasons"), facts.get("promotion")
    refused = facts["verdict"] == Verdict.PASS and isinstance(promotion, Mapping) and promotion.get("allowed") is False
    told = clean_text(", ".join(map(str, reasons))) if isinstance(reasons, list) else ""
    return _row(
        entry,
        Verdict.FAIL.value if refused else facts["verdict"],
        digest=attestation.digest,
        reason="The audit passed, and the promotion suite does not allow it." if refused else told,
        suspected=str(suspected.get("name")) if isinstance(suspected, Mapping) else None,
        run_id=str(facts.get("run_id")),
    )


def _ended(row: Row, finished: Finished, rules: Rules, stop: threading.Event) -> Row:
    """Publish the report of an audit; the row of a version that has none, or whose report MLflow does not take, is an error."""
    from audit_plugin.publishing import publish

    seconds, report = round(finished.seconds, 1), finished.report
    if report is None:
        refused = finished.refused_digest
        return replace(row, outcome="error", digest=refused, refused=refused is not None, reason=finished.error, seconds=seconds)
    try:
        logged = with_retries(lambda: publish(report, rules.suite), stop)
    except Exception as error:  # the other versions must be audited all the same
        reason = f"Its audit says '{report.decision.verdict}', but was not logged: {reason_of(error)}"
        return replace(row, outcome="error", reason=reason, seconds=seconds)
    suspected = report.decision.suspected_class
    outcome, reason = report.decision.verdict, _first_reason(report)
    if outcome is Verdict.PASS and not logged.promotion.allowed:  # as 'gate' and 'verify' have it
        unmet = next((result.description for result in logged.promotion.results if not result.success), "")
        outcome, reason = Verdict.FAIL, clean_text(f"The audit passed, and the promotion suite does not allow it: {unmet}")
    return replace(
        row,
        outcome=outcome.value,
        audited=True,
        digest=report.model.digest,
        reason=reason,
        suspected=None if suspected is None else report.subject.class_names[suspected],
        run_id=logged.run_id,
        seconds=seconds,
    )


def _first_reason(report: AuditReport) -> str:
    return clean_text(report.decision.reasons[0].message) if report.decision.reasons else ""


# ------------------------------------------------------------------------------------------------------ the scan's run


def _previous(client: MlflowClient, rules: Rules) -> Summary | None:
    """What the last finished scan of the same scope found, as far as it can be believed."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    text = f"attributes.status = 'FINISHED' AND tags.`{SCOPE_TAG}` = '{rules.options.scope.mark}'"
    runs = client.search_runs(
        [experiment.experiment_id], text, max_results=_EARLIER_SCANS, order_by=["attributes.start_time DESC"]
    )
    for run in runs:
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            name = SIGNED_FILE if rules.trusts else SUMMARY_FILE
            try:
                file = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name, dst_path=temporary))
                found = open_summary(file.read_text(encoding="utf-8"), run.info.run_id, rules.requirements.verdict_keys)
            except (MlflowException, OSError, UnicodeDecodeError):
                continue
        if found is not None:
            return found
    return None


def _log(client: MlflowClient, run_id: str, summary: Summary) -> None:
    now = int(time.time() * 1000)
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        write_summary(summary, Path(temporary), client)
        client.log_artifacts(run_id, temporary)
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in summary.metrics.items()])


def _text(time_: datetime.datetime) -> str:
    return time_.astimezone(datetime.UTC).isoformat(timespec="milliseconds")


@contextmanager
def _teaching() -> Iterator[None]:
    """MLflow's exceptions as one clear line."""
    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"MLflow: {reason_of(error)}") from error
