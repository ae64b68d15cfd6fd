"""A report becomes a run, tags on the audited version, a note in its description; its files can be fetched again."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin.attestation import SIGNING_KEY, TAG_OF, Statement, sign, signer_from_environment
from audit_plugin.canonical import document_digest
from audit_plugin.errors import RegistryError
from audit_plugin.manifest import manifest_of
from audit_plugin.model.input_spec import input_tags
from audit_plugin.policy import verdict_digest_of
from audit_plugin.promotion import SEARCHES, Promotion
from audit_plugin.registry.connection import (
    check_server,
    ended_if_it_fails,
    experiment_of,
    log_finite_metrics,
    one_line,
    registry_of,
    run_page,
    teaching,
)
from audit_plugin.registry.versions import facts_of, registered_version, statement_on
from audit_plugin.report.text import render_markdown_block
from audit_plugin.types import AuditReport, ClassMeasurement, InputScores, Measured, TriggerSearch

log = logging.getLogger(__name__)

VERDICT_TAG = "audit.verdict"
ATTESTATION_FILE = "attestation.json"
_BLOCK = ("<!-- backdoor-audit -->", "<!-- /backdoor-audit -->")
_NOTE = re.compile(f"{re.escape(_BLOCK[0])}.*?{re.escape(_BLOCK[1])}", re.DOTALL)
_DESCRIPTION_LIMIT = 5000
_REFUSED = "PERMISSION_DENIED"


@dataclass(frozen=True)
class LoggedReport:
    """Where MLflow keeps a report: the run, and its page in the UI (None without an HTTP server).

    ``promotion`` is what the promotion suite made of it; ``signed`` says whether the version got a signed attestation.
    """

    run_id: str
    page: str | None
    promotion: Promotion
    signed: bool


def log_report(report: AuditReport, files: Path, promotion: Promotion) -> LoggedReport:
    """One run in the experiment ``backdoor-audits`` with all files of a report, linked to the audited model version.

    Writes headline metrics, ``audit.*`` tags and a short block in the version's description (replacing the one of an
    earlier audit). Where the environment holds a signing key, the version also gets a signed attestation of the verdict; where it
    does not and the registry takes signed audits alone, the run is all, and a warning says so.

    Raises:
        RegistryError: the tracking server does not answer or refuses.
        UsageError: the signing key cannot be read.
    """
    signer = signer_from_environment()
    with teaching(report.model.uri):
        check_server()
        client = MlflowClient()
        experiment_id = experiment_of(client)
        model = report.model
        title = f"{model.name} v{model.version}" if model.name else Path(model.pinned_uri).name
        run = client.create_run(experiment_id, run_name=f"{title}: {report.decision.verdict}", tags=_tags(report))
        run_id = run.info.run_id
        envelope: str | None = None
        with ended_if_it_fails(client, run_id):
            client.log_artifacts(run_id, str(files))
            log_finite_metrics(client, run_id, metrics_of(report))
            if model.model_id is not None:
                client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
            page = f"{address}/artifacts" if (address := run_page(experiment_id, run_id)) else None
            if signer is not None and (attestation := _attestation(client, report, files, promotion, run_id)) is not None:
                envelope = sign(attestation, signer)
                client.log_text(run_id, envelope, ATTESTATION_FILE)
            if model.name is not None and model.version is not None:
                _mark_version(client, report, model.name, model.version, run_id, page, envelope)
            client.set_terminated(run_id)
        return LoggedReport(run_id, page, promotion, envelope is not None)


def _mark_version(
    client: MlflowClient, report: AuditReport, name: str, version: str, run_id: str, page: str | None, envelope: str | None
) -> None:
    """Write on the audited version what the audit found, with the signed statement if there is one.

    Without one a registry with a gate takes nothing: whoever holds no key still has the report in MLflow.
    """
    registry = registry_of(client)
    before = registered_version(client, name, version).tags.get(TAG_OF["verdict"])
    try:
        if envelope is not None:  # first of the tags: a registry with a gate takes the others on its word
            registry.set_model_version_tag(name, version, TAG_OF["verdict"], envelope)
        _tag_version(client, name, version, {**_tags(report), "audit.run_id": run_id}, signed=envelope is not None)
        _describe_version(client, report, name, version, page)
        # The last of the tags: an audit that was logged by half shows no verdict, and a run that ended has one.
        registry.set_model_version_tag(name, version, VERDICT_TAG, str(report.decision.verdict))
    except MlflowException as error:
        if error.error_code != _REFUSED:
            raise
        if envelope is not None:
            if registered_version(client, name, version).tags.get(TAG_OF["verdict"]) in (before, envelope):
                raise
            log.warning(
                "Another audit of %s was published meanwhile, and its verdict stands there; the report of this one is run %s.",
                report.model.pinned_uri,
                run_id,
            )
            return
        log.warning(
            "The report is run %s, and nothing was written on %s, which takes signed audits alone. Set %s to sign: %s",
            run_id,
            report.model.pinned_uri,
            SIGNING_KEY,
            one_line(str(error)),
        )


def fetch_report_files(attestation: Statement, names: Collection[str], destination: Path) -> tuple[Path, ...]:
    """Files of the run that an attested audit logged, each compared with the hash that was signed.

    Raises:
        RegistryError: one is not there, is another than the one signed, or the server does not answer.
    """
    fetched = []
    with teaching(attestation.uri), tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        check_server()
        run_id, signed = str(attestation.facts["run_id"]), attestation.facts["files"]
        for name in names:
            if name not in signed:
                raise RegistryError(f"The audit of {attestation.uri} logged no {name}. Audit again with --again.")
            file = Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=temporary))
            if hashlib.sha256(file.read_bytes()).hexdigest() != signed[name]:
                raise RegistryError(f"{name} of run {run_id} was changed after the audit. Audit again with --again.")
            fetched.append(file)
        destination.mkdir(parents=True, exist_ok=True)
        return tuple(Path(shutil.copy(file, destination)) for file in fetched)


def metrics_of(report: AuditReport) -> dict[str, float]:
    """Headline figures by name: of the clean set, the triggers, each check on inputs. What was not measured has none."""
    metrics = {"clean_accuracy": report.clean_set.clean_accuracy.value, "seconds": report.duration_seconds}
    for outcome in report.outcomes:
        if not isinstance(outcome, Measured):
            continue
        if isinstance(outcome.measurement, TriggerSearch) and outcome.measurement.candidates:
            found = outcome.measurement.most_suspicious
            kind = SEARCHES.get(outcome.check, outcome.check)
            metrics[f"{kind}_outlier"] = found.outlier
            metrics[f"{kind}_size_pixels"] = found.trigger.size
            metrics[f"{kind}_attack_success_rate"] = found.success.value
        if isinstance(outcome.measurement, ClassMeasurement):
            metrics[f"{outcome.check}_ratio"] = max(outcome.measurement.ratios)
        if isinstance(outcome.measurement, InputScores):
            for threshold in outcome.measurement.thresholds[:1]:
                metrics[f"{outcome.check}_false_positive_rate"] = threshold.false_positive_rate.value
                if threshold.detection_rate is not None:
                    metrics[f"{outcome.check}_detection_rate"] = threshold.detection_rate.value
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _tags(report: AuditReport) -> dict[str, str]:
    tags = {
        VERDICT_TAG: str(report.decision.verdict),
        "audit.digest": report.model.digest,
        "audit.policy_digest": report.policy_digest,
        "audit.tool_version": report.tool_version,
        "audit.time": report.created,
        "audit.model": report.model.pinned_uri,
    }
    if report.decision.suspected_class is not None:
        tags["audit.suspected_class"] = report.subject.class_names[report.decision.suspected_class]
    return tags


def _attestation(client: MlflowClient, report: AuditReport, files: Path, promotion: Promotion, run_id: str) -> Statement | None:
    """What an audit can sign; None for a model that is no registered version."""
    model = report.model
    if model.name is None or model.version is None:
        return None
    suspected, logged = report.decision.suspected_class, manifest_of(files)
    facts = {
        "verdict": str(report.decision.verdict),
        "policy_digest": verdict_digest_of(report.policy),
        "promotion": {"allowed": promotion.allowed, "suite_digest": promotion.suite_digest},
        "clean_set": {"digest": report.clean_set.digest, "images": sum(report.clean_set.images_per_class)},
        "seed": report.seed,
        "input_tags": document_digest(input_tags(model.tags)),
        "suspected_class": None if suspected is None else {"index": suspected, "name": report.subject.class_names[suspected]},
        "reasons": [reason.code for reason in report.decision.reasons],
        "tool_version": report.tool_version,
        "run_id": run_id,
        "files": {entry.path: entry.sha256 for entry in logged if _is_fetched(entry.path, suspected)},
    }
    tags = {**_tags(report), "audit.run_id": run_id}
    version = facts_of(registered_version(client, model.name, model.version))
    return statement_on(version, "verdict", model.digest, tags, facts)


def _is_fetched(path: str, suspected: int | None) -> bool:
    """Whether a statement names the hash of a logged file. Pictures of a thousand classes would not fit into a tag."""
    return not path.startswith("triggers/") or bool(re.match(rf"triggers/class_{suspected}[._]", path))


def _tag_version(client: MlflowClient, name: str, version: str, tags: Mapping[str, str], *, signed: bool) -> None:
    """All tags of an audit but the verdict. What an earlier audit found is taken back, but for what was just signed again."""
    present = registered_version(client, name, version).tags
    for key in (VERDICT_TAG, "audit.suspected_class"):
        if key in present and not (signed and present[key] == tags.get(key)):
            registry_of(client).delete_model_version_tag(name, version, key)
    for key, value in tags.items():
        if key != VERDICT_TAG:
            registry_of(client).set_model_version_tag(name, version, key, value)


def _describe_version(client: MlflowClient, report: AuditReport, name: str, version: str, page: str | None) -> None:
    """The audit's summary in a version's description, in place of an earlier one."""
    description = registered_version(client, name, version).description or ""
    block = f"{_BLOCK[0]}\n{render_markdown_block(report, page)}\n{_BLOCK[1]}"
    written = _NOTE.sub(lambda _: block, description) if _NOTE.search(description) else f"{description}\n\n{block}".strip()
    if len(written) > _DESCRIPTION_LIMIT:
        log.warning("The description of %s version %s has no room for the audit's summary.", name, version)
        written = without_note(description)  # of an earlier audit
    if written != description:
        registry_of(client).update_model_version(name, version, written)


def without_note(description: str) -> str:
    """A version's description without an audit's summary."""
    return _NOTE.sub("", description).strip() if _NOTE.search(description) else description
