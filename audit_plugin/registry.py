"""The only module here that talks to MLflow: a URI becomes a pinned reference plus files; a report becomes a run, tags, a note.

MLflow's own loaders are never called. What is downloaded goes into a folder of our own, so that nobody can exchange a file
between the check and its use.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlparse
from urllib.request import getproxies, proxy_bypass

import mlflow
import requests
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking._model_registry.client import ModelRegistryClient
from mlflow.utils.file_utils import local_file_uri_to_path

from audit_plugin import confined
from audit_plugin.attestation import SIGNING_KEY, TAG_OF, Kind, Statement, sign, signer_from_environment
from audit_plugin.errors import RegistryError, UsageError, nearest
from audit_plugin.gate import VersionFacts
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.input_spec import is_input_tag
from audit_plugin.policy import verdict_digest_of
from audit_plugin.promotion import SEARCHES, Promotion
from audit_plugin.report.guards import guard_document
from audit_plugin.report.schema import plain_json
from audit_plugin.report.text import render_markdown_block
from audit_plugin.types import (
    AuditReport,
    ClassMeasurement,
    GuardReport,
    InputScores,
    Measured,
    ModelRef,
    RepairReport,
    SubjectSummary,
    TriggerSearch,
)

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

log = logging.getLogger(__name__)

EXPERIMENT = "backdoor-audits"
VERDICT_TAG = "audit.verdict"
ATTESTATION_FILE = "attestation.json"
GUARD_OF_TAG = "audit.guard_of"
REPAIRED_FROM_TAG = "audit.repaired_from"
_REMOTE = ("models:/", "runs:/")
_MODEL_FILES = (".pt2", ".onnx", ".pt", ".pth")
_BLOCK = ("<!-- backdoor-audit -->", "<!-- /backdoor-audit -->")
_DESCRIPTION_LIMIT = 5000
_SERVER_TIMEOUT_SECONDS = 5
_NETWORK_ERRORS = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


@dataclass(frozen=True)
class PinnedModel:
    """A reference and the private copy of the files it speaks about."""

    reference: ModelRef
    folder: Path

    @property
    def came_from_mlflow(self) -> bool:
        return self.reference.uri.startswith(_REMOTE)


@dataclass(frozen=True)
class LoggedReport:
    """Where MLflow keeps a report: the run, and its page in the UI (None without an HTTP server).

    ``promotion`` is what the promotion suite made of it; ``signed`` says whether the version got a signed attestation.
    """

    run_id: str
    page: str | None
    promotion: Promotion
    signed: bool


def pin(uri: str, destination: Path) -> PinnedModel:
    """Resolve ``uri`` once and copy its files under ``destination``.

    Accepts ``models:/name/version``, ``models:/name@alias``, ``models:/name/latest``, ``models:/m-<id>``,
    ``runs:/<run>/<name>``, a local folder, or a local model file.

    Raises:
        RegistryError: nothing is there, or the tracking server does not answer.
        UsageError: the URI has no form that is known.
    """
    folder = destination / "model"
    if uri.startswith(_REMOTE):
        with _teaching(uri):
            return _pin_remote(uri, folder)
    if re.match(r"^[a-z][a-z0-9+.-]+:/", uri):
        raise UsageError(
            f"'{redacted(uri)}' is no model URI. Use models:/name/version, models:/name@alias, runs:/run/name, or a path."
        )
    return _pin_local(Path(uri), uri, folder)


def fetch_images(source: str, destination: Path) -> Path:
    """A local path for clean or suspect images: itself, or an MLflow artifact URI downloaded under ``destination``."""
    if not re.match(r"^(runs|models|mlflow-artifacts|s3|gs|dbfs|https?|abfss?|wasbs?)(:/)", source):
        return Path(source)
    with _teaching(source):
        if not re.match(r"^(s3|gs|dbfs|https?|abfss?|wasbs?):/", source):
            check_server()
        destination.mkdir(parents=True, exist_ok=True)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(destination)))


def log_report(report: AuditReport, files: Path, promotion: Promotion) -> LoggedReport:
    """One run in the experiment ``backdoor-audits`` with all files of a report, linked to the audited model version.

    Writes headline metrics, ``audit.*`` tags and a short block in the version's description (replacing the one of an
    earlier audit). Where the environment holds a signing key, the version also gets a signed attestation of the verdict.

    Raises:
        RegistryError: the tracking server does not answer or refuses.
        UsageError: the signing key cannot be read.
    """
    signer = signer_from_environment()
    with _teaching(report.model.uri):
        check_server()
        client = MlflowClient()
        experiment_id = _experiment(client)
        model = report.model
        title = f"{model.name} v{model.version}" if model.name else Path(model.pinned_uri).name
        run = client.create_run(experiment_id, run_name=f"{title}: {report.decision.verdict}", tags=_tags(report))
        run_id = run.info.run_id
        envelope: str | None = None
        try:
            client.log_artifacts(run_id, str(files))
            for name, value in metrics_of(report).items():
                client.log_metric(run_id, name, value)
            if model.model_id is not None:
                client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
            page = f"{address}/artifacts" if (address := run_page(experiment_id, run_id)) else None
            if signer is not None and (attestation := _attestation(client, report, files, promotion, run_id)) is not None:
                envelope = sign(attestation, signer)
                client.log_text(run_id, envelope, ATTESTATION_FILE)
            if model.name is not None and model.version is not None:
                if envelope is not None:  # first of the tags: a registry with a gate takes the others on its word
                    registry_of(client).set_model_version_tag(model.name, model.version, TAG_OF["verdict"], envelope)
                tags = {**_tags(report), "audit.run_id": run_id}
                _tag_version(client, model.name, model.version, tags, signed=envelope is not None)
                _describe_version(client, report, model.name, model.version, page)
            if model.name is not None and model.version is not None:
                # The last of the tags: an audit that was logged by half shows no verdict, and a run that ended has one.
                registry_of(client).set_model_version_tag(model.name, model.version, VERDICT_TAG, str(report.decision.verdict))
            client.set_terminated(run_id)
        except BaseException:
            with suppress(RegistryError, MlflowException, OSError):  # the first error is the one to tell
                check_server()
                client.set_terminated(run_id, "KILLED")
            raise
        return LoggedReport(run_id, page, promotion, envelope is not None)


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


def version_facts(name: str, version: str) -> VersionFacts:
    """A registered version as the registry keeps it now.

    Raises:
        RegistryError: there is none, or the server does not answer.
    """
    with _teaching(f"models:/{name}/{version}"):
        return facts_of(registered_version(MlflowClient(), name, version))


def registered_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """A version as it is now, also one that a tag calls a prompt."""
    registered: ModelVersion = registry_of(client).get_model_version(name, version)
    return registered


def registry_of(client: MlflowClient) -> ModelRegistryClient:
    """What the client itself speaks through. Its own methods refuse whatever a tag, which anybody can set, calls a prompt."""
    inner: ModelRegistryClient = client._get_registry_client()
    return inner


def facts_of(registered: ModelVersion) -> VersionFacts:
    """A version of MLflow's in the gate's terms."""
    created = datetime.datetime.fromtimestamp(registered.creation_timestamp / 1000, datetime.UTC)
    return VersionFacts(registered.name, str(registered.version), created, dict(registered.tags))


def statement_on(
    version: VersionFacts, kind: Kind, digest: str, tags: Mapping[str, str], facts: Mapping[str, Any] | None = None
) -> Statement:
    """A statement, made now, on a version whose files have this digest."""
    now = datetime.datetime.now(datetime.UTC)
    return Statement(kind, version.name, version.version, digest, now, tags, facts or {}, version.created)


def put_statement(statement: Statement, signer: CryptoSigner) -> None:
    """Sign a statement and write it, with the tags that it vouches for, on its version.

    Raises:
        RegistryError: the registry does not answer or refuses.
    """
    with _teaching(statement.uri):
        check_server()
        versions = registry_of(MlflowClient())
        versions.set_model_version_tag(statement.name, statement.version, TAG_OF[statement.kind], sign(statement, signer))
        for key, value in statement.tags.items():
            versions.set_model_version_tag(statement.name, statement.version, key, value)


def promote(name: str, version: str, alias: str) -> None:
    """Give a version an alias.

    Raises:
        RegistryError: the registry does not answer or refuses.
    """
    with _teaching(f"models:/{name}/{version}"):
        check_server()
        registry_of(MlflowClient()).set_registered_model_alias(name, alias, version)


def fetch_report_files(attestation: Statement, names: Collection[str], destination: Path) -> tuple[Path, ...]:
    """Files of the run that an attested audit logged, each compared with the hash that was signed.

    Raises:
        RegistryError: one is not there, is another than the one signed, or the server does not answer.
    """
    fetched = []
    with _teaching(attestation.uri), tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
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


def register_repaired(original: ModelRef, file: Path, repair: RepairReport, subject: SubjectSummary) -> str:
    """Log a repaired model file as a model of its own and register it as the next version of the original's registered model.

    ``file`` is alone in its folder; ``subject`` describes the original. A torch graph is logged as ``.pt2``, an ONNX model in its
    own flavour, both on their own input scale. The version gets tags
    on its origin and the original's tags that say how images become input, so that it is audited alike; a verdict it must
    earn itself. The run, in the experiment ``backdoor-audits``, keeps what the repair measured.

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
    with _teaching(original.uri):
        check_server()
        client = MlflowClient()

        def log_into(experiment_id: str, run_id: str) -> str:
            client.log_dict(run_id, {"method": repair.method, **plain_json(repair.facts)}, "repair.json")
            for name, value in _repair_metrics(repair).items():
                client.log_metric(run_id, name, value)
            return _log_file(client, file, subject, experiment_id, run_id)

        input_tags = {key: value for key, value in original.tags.items() if is_input_tag(key)}
        title = f"{original.name} v{original.version}: repaired"
        return _new_version(client, original.name, title, origin, log_into, input_tags)


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
    with _teaching(model.uri):
        check_server()
        client = MlflowClient()

        def log_into(experiment_id: str, run_id: str) -> str:
            client.log_dict(run_id, guard_document(guard), "guard.json")
            for metric, value in _guard_metrics(guard).items():
                client.log_metric(run_id, metric, value)
            model_id = _log_file(client, file, guard.subject, experiment_id, run_id, is_guard=True)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return model_id

        input_tags = {key: value for key, value in model.tags.items() if is_input_tag(key)}
        return _new_version(client, name, f"{name}: guard of {model.pinned_uri}", origin, log_into, {**input_tags, **figures})


def _guard_metrics(guard: GuardReport) -> dict[str, float]:
    metrics = {
        "threshold": guard.threshold.value,
        "false_positive_rate": guard.threshold.false_positive_rate.value,
        "clean_accuracy": guard.clean_accuracy.value,
    }
    if guard.threshold.detection_rate is not None:
        metrics["detection_rate"] = guard.threshold.detection_rate.value
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _new_version(
    client: MlflowClient,
    name: str,
    title: str,
    origin: Mapping[str, str],
    log_into: Callable[[str, str], str],
    tags: Mapping[str, str],
) -> str:
    """A run of ours, the model that ``log_into`` logs into it, and a version of the registered model ``name``; its URI."""
    experiment_id = _experiment(client)
    run_id = client.create_run(experiment_id, run_name=title, tags=dict(origin)).info.run_id
    try:
        model_id = log_into(experiment_id, run_id)
        registered = client.create_model_version(name, f"models:/{model_id}", run_id, {**tags, **origin}, model_id=model_id)
        _sign_tags(client, registered, {**tags, **origin})
    except BaseException:
        with suppress(RegistryError, MlflowException, OSError):  # the first error is the one to tell
            check_server()
            client.set_terminated(run_id, "KILLED")
        raise
    with suppress(MlflowException, *_NETWORK_ERRORS):  # the version exists; this is only the link to it from elsewhere
        client.set_terminated(run_id)
        link = json.dumps([{"name": name, "version": registered.version}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return f"models:/{name}/{registered.version}"


def _sign_tags(client: MlflowClient, registered: ModelVersion, wanted: Mapping[str, str]) -> None:
    """Sign the tags that a registry with a gate did not take on a new version's creation, so that it takes them now."""
    missing = {key: value for key, value in wanted.items() if registered.tags.get(key) != value}
    if not missing:
        return
    signer = signer_from_environment()
    if signer is None:
        log.warning(
            "This registry keeps audit tags only if they are signed, so models:/%s/%s does not say where it came from. "
            "Set %s to sign them.",
            registered.name,
            registered.version,
            SIGNING_KEY,
        )
        return
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        location = client.get_model_version_download_uri(registered.name, registered.version)
        digest = digest_of(manifest_of(_download(location, Path(temporary) / "model")))
    put_statement(statement_on(facts_of(registered), "origin", digest, missing), signer)


def redacted(text: str) -> str:
    """``text`` without the user name and password of any URI in it.

    >>> redacted("http://user:secret@tracking.example:5000/path")
    'http://tracking.example:5000/path'
    """
    return re.sub(r"(?<=://)[^\s/?#]*@", "", text)


def _pin_local(path: Path, uri: str, folder: Path) -> PinnedModel:
    if path.is_dir():
        shutil.copytree(path, folder, symlinks=True)
    elif path.is_file():
        if path.suffix.lower() not in _MODEL_FILES:
            raise UsageError(f"'{path}' is no model file; expected one of {', '.join(_MODEL_FILES)}, or an MLflow model folder.")
        folder.mkdir(parents=True)
        shutil.copy(path, folder / path.name)
    else:
        raise RegistryError(f"There is no model at '{path}'. Give a folder, a model file, or a URI such as models:/name/1.")
    manifest = manifest_of(folder)
    return PinnedModel(ModelRef(uri, str(path.resolve()), digest_of(manifest), manifest), folder)


def _pin_remote(uri: str, folder: Path) -> PinnedModel:
    if re.match(r"models:/(?!m-)", uri):
        _name_and_version(uri)  # a malformed URI is said to be one, before anybody is asked
    check_server()
    client = MlflowClient()
    name = version = model_id = run_id = None
    tags: dict[str, str] = {}
    if found := re.fullmatch(r"models:/(m-[0-9a-f]+)", uri):
        model_id = found[1]
        entry = client.get_logged_model(model_id)
        location, pinned, run_id = entry.artifact_location, uri, entry.source_run_id
    elif uri.startswith("models:/"):
        name, version = _resolve_version(client, uri)
        registered = registered_version(client, name, version)
        name, version = registered.name, str(registered.version)  # '01' is version 1
        location = registry_of(client).get_model_version_download_uri(name, version)
        pinned = f"models:/{name}/{version}"
        run_id, tags = registered.run_id or None, {key: str(value) for key, value in registered.tags.items()}
        source = re.fullmatch(r"models:/(m-[0-9a-f]+)", registered.source or "")
        model_id = source[1] if source else None
    else:
        location = pinned = uri
        run_id, _, logged_name = uri.removeprefix("runs:/").partition("/")
        if logged := _model_of_run(client, run_id, logged_name.rstrip("/")):
            # MLflow's own download of a runs:/ address adds a file of its own to the model's, which would change the digest.
            location, pinned, model_id = logged.artifact_location, f"models:/{logged.model_id}", logged.model_id
    local = _download(location, folder)
    if not any(local.rglob("*")):
        raise RegistryError(f"The artifacts of {pinned} are empty: nothing can be audited.")
    manifest = manifest_of(local)
    reference = ModelRef(uri, pinned, digest_of(manifest), manifest, name, version, model_id, run_id, tags)
    return PinnedModel(reference, local)


def _model_of_run(client: MlflowClient, run_id: str, name: str) -> LoggedModel | None:
    """The latest model that a run logged under ``name``; None for plain run artifacts, as MLflow 2 wrote them."""
    experiment = client.get_run(run_id).info.experiment_id
    if "'" in name:
        return None  # no logged model may be called so
    wanted = f"name = '{name}' AND source_run_id = '{run_id}'"
    models = client.search_logged_models(experiment_ids=[experiment], filter_string=wanted)
    return max(models, key=lambda model: int(model.creation_timestamp), default=None)


def _quoted(text: str) -> str:
    """A text in MLflow's language of filters, which has no escapes.

    Raises:
        UsageError: it has quotes of both kinds.
    """
    if "'" in text and '"' in text:
        raise UsageError(f"{text} has quotes of both kinds, and MLflow cannot search for it. Name a version by its number.")
    return f'"{text}"' if "'" in text else f"'{text}'"


def _resolve_version(client: MlflowClient, uri: str) -> tuple[str, str]:
    """The number behind ``models:/name/version``, ``models:/name/latest`` or ``models:/name@alias``."""
    name, version, alias = _name_and_version(uri)
    if alias:
        return name, str(registry_of(client).get_model_version_by_alias(name, alias).version)
    if version == "latest":
        versions = client.search_model_versions(f"name = {_quoted(name)}")
        if not versions:  # a prompt's tag on one version hides all from the search
            with suppress(MlflowException):
                versions = registry_of(client).get_latest_versions(name)
        if not versions:
            raise RegistryError(f"No registered model '{name}' has a version.{_known_models(client, name)}")
        return name, str(max(int(entry.version) for entry in versions))
    return name, version


def _name_and_version(uri: str) -> tuple[str, str, str]:
    """Name, version and alias of a ``models:/`` URI; one of the last two is empty."""
    rest = uri.removeprefix("models:/").lstrip("/")
    name, at, alias = rest.rpartition("@")
    if at and "/" not in alias:
        return name, "", alias
    name, _, version = rest.rpartition("/")
    if not name:
        raise UsageError(f"'{uri}' names no version. Use models:/{rest}/1, models:/{rest}/latest or models:/{rest}@alias.")
    if version != "latest" and not version.isdecimal():
        raise UsageError(
            f"'{version}' is no version number. Use models:/{name}/1, models:/{name}/latest or models:/{name}@alias."
        )
    return name, version, ""


def _download(location: str, folder: Path) -> Path:
    """A private copy of an artifact folder. MLflow follows links on a local disk; here they stay links, which intake refuses."""
    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        shutil.copytree(local_file_uri_to_path(location), folder, symlinks=True)
        return folder
    folder.mkdir(parents=True)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder)))


def _known_models(client: MlflowClient, name: str) -> str:
    return nearest(name, (model.name for model in client.search_registered_models(max_results=1000)))


def check_server() -> None:
    """Find out whether anybody listens at a remote tracking server, instead of MLflow's minutes of retries.

    Who may come in, and by which certificate, is MLflow's to find out.

    Raises:
        RegistryError: it does not answer within seconds.
    """
    for uri in dict.fromkeys((mlflow.get_tracking_uri(), mlflow.get_registry_uri())):
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            # MLflow would create an empty one in the current folder.
            raise RegistryError(
                f"There is no MLflow database at {redacted(uri)}. Set MLFLOW_TRACKING_URI to your tracking server."
            )
        if not uri.startswith(("http://", "https://")):
            continue
        try:
            _knock(uri)
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"The tracking server {redacted(uri)} does not answer ({error}). "
                "Check MLFLOW_TRACKING_URI, or start it with 'mlflow server'."
            ) from error


def _knock(uri: str) -> None:
    parsed = urlparse(uri)
    host, port = parsed.hostname or "", parsed.port or (443 if parsed.scheme == "https" else 80)
    if {parsed.scheme, "all"} & getproxies().keys() and not proxy_bypass(f"{host}:{port}"):
        return  # only the proxy can reach it
    with socket.create_connection((host, port), timeout=_SERVER_TIMEOUT_SECONDS) as connection:
        if parsed.scheme == "http":
            # The far end of a tunnel, or a server that hangs, takes connections too.
            connection.sendall(b"HEAD /health HTTP/1.0\r\n\r\n")
            if not connection.recv(1):
                raise ConnectionError("it closed the connection")


@contextmanager
def _teaching(uri: str) -> Iterator[None]:
    """MLflow's exceptions as one clear line."""
    try:
        yield
    except MlflowException as error:
        hint = ""
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            if name := re.match(r"models:/([^/@]+)", uri):
                hint = _known_models(MlflowClient(), name[1])
            hint += f" Looked in {redacted(mlflow.get_registry_uri())}; set MLFLOW_TRACKING_URI for another server."
        raise RegistryError(f"MLflow: {_one_line(str(error)).rstrip('.')}.{hint}") from error
    except _NETWORK_ERRORS as error:
        raise RegistryError(f"The server that keeps {redacted(uri)} does not answer: {_one_line(str(error))}") from error
    except OSError as error:
        raise RegistryError(f"The files of {redacted(uri)} cannot be read: {_one_line(str(error))}") from error


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
    return {name: value for name, value in metrics.items() if value == value and abs(value) != float("inf")}


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
    pattern = re.compile(f"{re.escape(_BLOCK[0])}.*?{re.escape(_BLOCK[1])}", re.DOTALL)
    written = pattern.sub(lambda _: block, description) if pattern.search(description) else f"{description}\n\n{block}".strip()
    if len(written) > _DESCRIPTION_LIMIT:
        log.warning("The description of %s version %s has no room for the audit's summary; it was left as it is.", name, version)
        return
    registry_of(client).update_model_version(name, version, written)


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


def _repair_metrics(repair: RepairReport) -> dict[str, float]:
    metrics = {
        "accuracy_before": repair.accuracy_before.value,
        "accuracy_after": repair.accuracy_after.value,
        "flip_rate_before": repair.flip_rate_before.value,
        "flip_rate_after": repair.flip_rate_after.value,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _experiment(client: MlflowClient) -> str:
    """Id of the experiment ``backdoor-audits``, which is made if missing."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return str(experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT))


def run_page(experiment_id: str, run_id: str) -> str | None:
    """The address of a run in MLflow's UI; None without an HTTP server."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{redacted(uri).rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def _one_line(text: str) -> str:
    return redacted(" ".join(text.split()))[:400]


def describe_tracking() -> str:
    """The tracking URI, without credentials, after it answered.

    Raises:
        RegistryError: it does not answer.
    """
    check_server()
    uri: str = mlflow.get_tracking_uri()
    with _teaching(uri):
        MlflowClient().search_experiments(max_results=1)
    return redacted(uri)
