"""Models of our own making become registered versions: repaired ones, guards."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin import confined
from audit_plugin.attestation import SIGNING_KEY, signer_from_environment
from audit_plugin.errors import AuditError, RegistryError, UsageError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.input_spec import input_tags
from audit_plugin.registry.connection import (
    NETWORK_ERRORS,
    check_server,
    ended_if_it_fails,
    experiment_of,
    log_finite_metrics,
    teaching,
)
from audit_plugin.registry.pinning import download
from audit_plugin.registry.versions import facts_of, put_statement, statement_on
from audit_plugin.report.guards import guard_document
from audit_plugin.report.schema import plain_json
from audit_plugin.types import GuardReport, ModelRef, RepairReport, SubjectSummary

log = logging.getLogger(__name__)

GUARD_OF_TAG = "audit.guard_of"
REPAIRED_FROM_TAG = "audit.repaired_from"


def register_repaired(original: ModelRef, file: Path, repair: RepairReport, subject: SubjectSummary) -> str:
    """Log a repaired model file as a model of its own and register it as the next version of the original's registered model.

    ``file`` is alone in its folder; ``subject`` describes the original. A torch graph is logged as ``.pt2``, an ONNX model in its
    own flavour, both on their own input scale. The version gets tags on its origin and the original's tags that say how images
    become input, so that it is audited alike; a verdict it must earn itself. The run, in the experiment ``backdoor-audits``,
    keeps what the repair measured.

    Returns:
        ``models:/name/version``.

    Raises:
        RegistryError: the original is no version of a registered model, or the tracking server does not answer or refuses.
        IntakeError: what MLflow wrote would be refused by an audit.
    """
    if original.name is None or original.version is None:
        raise RegistryError(f"{original.pinned_uri} is no version of a registered model, so its repair cannot be one.")
    origin = {
        REPAIRED_FROM_TAG: original.pinned_uri,
        "audit.repaired_from_digest": original.digest,
        "audit.repair_method": repair.method,
    }
    with teaching(original.uri):
        check_server()
        client = MlflowClient()

        def log_into(experiment_id: str, run_id: str) -> str:
            client.log_dict(run_id, {"method": repair.method, **plain_json(repair.facts)}, "repair.json")
            log_finite_metrics(client, run_id, _repair_metrics(repair))
            return _log_file(client, file, subject, experiment_id, run_id)

        title = f"{original.name} v{original.version}: repaired"
        return _new_version(client, original.name, title, origin, log_into, input_tags(original.tags))


def register_guard(guard: GuardReport, file: Path, name: str) -> str:
    """Log a guarded model in MLflow's ONNX flavour and register it under ``name``, which is made if missing.

    ``file`` is alone in its folder.

    The version gets tags on what it guards, on its threshold and its measured rates, and the original's tags that say how images
    become input. The run, in the experiment ``backdoor-audits``, keeps the figures as metrics and ``guard.json``. To load it
    takes MLflow and ONNX Runtime alone.

    Returns:
        ``models:/name/version``.

    Raises:
        RegistryError: the tracking server does not answer or refuses.
        IntakeError: what MLflow wrote would be refused by an audit.
    """
    model, threshold = guard.model, guard.threshold
    detected = threshold.detection_rate
    origin = {GUARD_OF_TAG: model.pinned_uri, "audit.guard_of_digest": model.digest}
    figures = {
        "audit.guard_threshold": f"{threshold.value:.6g}",
        "audit.guard_wanted_false_positive_rate": f"{guard.wanted_false_positive_rate:g}",
        "audit.guard_false_positive_rate": f"{threshold.false_positive_rate.value:.4f}",
        "audit.guard_detection_rate": "not measured" if detected is None else f"{detected.value:.4f}",
    }
    with teaching(model.uri):
        check_server()
        client = MlflowClient()

        def log_into(experiment_id: str, run_id: str) -> str:
            client.log_dict(run_id, guard_document(guard), "guard.json")
            log_finite_metrics(client, run_id, _guard_metrics(guard))
            model_id = _log_file(client, file, guard.subject, experiment_id, run_id, is_guard=True)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return model_id

        return _new_version(
            client, name, f"{name}: guard of {model.pinned_uri}", origin, log_into, {**input_tags(model.tags), **figures}
        )


def _repair_metrics(repair: RepairReport) -> dict[str, float]:
    return {
        "accuracy_before": repair.accuracy_before.value,
        "accuracy_after": repair.accuracy_after.value,
        "flip_rate_before": repair.flip_rate_before.value,
        "flip_rate_after": repair.flip_rate_after.value,
    }


def _guard_metrics(guard: GuardReport) -> dict[str, float]:
    metrics = {
        "threshold": guard.threshold.value,
        "false_positive_rate": guard.threshold.false_positive_rate.value,
        "clean_accuracy": guard.clean_accuracy.value,
    }
    if guard.threshold.detection_rate is not None:
        metrics["detection_rate"] = guard.threshold.detection_rate.value
    return metrics


def _new_version(
    client: MlflowClient,
    name: str,
    title: str,
    origin: Mapping[str, str],
    log_into: Callable[[str, str], str],
    tags: Mapping[str, str],
) -> str:
    """A run of ours, the model that ``log_into`` logs into it, and a version of the registered model ``name``; its URI."""
    experiment_id = experiment_of(client)
    run_id = client.create_run(experiment_id, run_name=title, tags=dict(origin)).info.run_id
    with ended_if_it_fails(client, run_id):
        model_id = log_into(experiment_id, run_id)
        registered = client.create_model_version(name, f"models:/{model_id}", run_id, {**tags, **origin}, model_id=model_id)
        _sign_tags(client, registered, {**tags, **origin})
    with suppress(MlflowException, *NETWORK_ERRORS):  # the version exists; this is only the link to it from elsewhere
        client.set_terminated(run_id)
        link = json.dumps([{"name": name, "version": registered.version}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return f"models:/{name}/{registered.version}"


def _sign_tags(client: MlflowClient, registered: ModelVersion, wanted: Mapping[str, str]) -> None:
    """Sign the tags that a registry with a gate did not take on a new version's creation, so that it takes them now."""
    missing = {key: value for key, value in wanted.items() if registered.tags.get(key) != value}
    if not missing:
        return
    uri = f"models:/{registered.name}/{registered.version}"
    try:
        signer = signer_from_environment()
        if signer is None:
            raise UsageError(f"This registry keeps audit tags only if they are signed. Set {SIGNING_KEY} to sign them.")
        with teaching(uri), tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            location = client.get_model_version_download_uri(registered.name, registered.version)
            digest = digest_of(manifest_of(download(location, Path(temporary) / "model")))
        put_statement(statement_on(facts_of(registered), "origin", digest, missing), signer)
    except AuditError as error:  # the version exists all the same, and whoever made it must hear of it
        log.warning("%s does not say where it came from. %s", uri, error)


def _log_file(
    client: MlflowClient, file: Path, subject: SubjectSummary, experiment_id: str, run_id: str, *, is_guard: bool = False
) -> str:
    """Log a model file as a model of a run; its id.

    ``log_model`` would load it to try it out, and change the active experiment.
    """
    logged = client.create_logged_model(experiment_id, "model", run_id)
    described = {
        "artifact_path": logged.artifact_location,
        "model_uuid": logged.model_id,
        "run_id": run_id,
        "model_id": logged.model_id,
    }
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        folder = Path(temporary) / "model"
        confined.package(file, described, subject, folder, is_guard=is_guard)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)
