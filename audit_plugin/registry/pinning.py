"""A URI becomes a pinned reference plus a private copy of its files; images are fetched."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import mlflow
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
from mlflow.tracking import MlflowClient
from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path
from mlflow.utils.file_utils import local_file_uri_to_path

from audit_plugin.errors import RegistryError, UsageError
from audit_plugin.intake.files import Tally, check_limits
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.registry.connection import check_server, known_models, redacted, registry_of, teaching
from audit_plugin.registry.versions import registered_version
from audit_plugin.types import ModelRef

_REMOTE = ("models:/", "runs:/")
_MODEL_FILES = (".pt2", ".onnx", ".pt", ".pth")


@dataclass(frozen=True)
class PinnedModel:
    """A reference and the private copy of the files it speaks about."""

    reference: ModelRef
    folder: Path

    @property
    def came_from_mlflow(self) -> bool:
        return self.reference.uri.startswith(_REMOTE)


def pin(uri: str, destination: Path) -> PinnedModel:
    """Resolve ``uri`` once and copy its files under ``destination``.

    Accepts ``models:/name/version``, ``models:/name@alias``, ``models:/name/latest``, ``models:/m-<id>``,
    ``runs:/<run>/<name>``, a local folder, or a local model file.

    Raises:
        RegistryError: nothing is there, or the tracking server does not answer.
        IntakeError: there is more than an audit would take; nothing was copied.
        UsageError: the URI has no form that is known.
    """
    folder = destination / "model"
    if uri.startswith(_REMOTE):
        with teaching(uri):
            return _pin_remote(uri, folder)
    if re.match(r"^[a-z][a-z0-9+.-]+:/", uri):
        raise UsageError(
            f"'{redacted(uri)}' is no model URI. Use models:/name/version, models:/name@alias, runs:/run/name, or a path."
        )
    return _pin_local(Path(uri), uri, folder)


def fetch_images(source: str, destination: Path) -> Path:
    """A local path for clean or suspect images: itself, or an MLflow artifact URI downloaded under ``destination``."""
    remote = re.match(r"(runs|models|mlflow-artifacts|s3|gs|dbfs|https?|abfss?|wasbs?):/", source)
    if remote is None:
        return Path(source)
    with teaching(source):
        if remote[1] in ("runs", "models", "mlflow-artifacts"):
            check_server()
        destination.mkdir(parents=True, exist_ok=True)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(destination)))


def _pin_local(path: Path, uri: str, folder: Path) -> PinnedModel:
    if path.is_dir():
        check_limits(path)
        shutil.copytree(path, folder, symlinks=True)
    elif path.is_file():
        if path.suffix.lower() not in _MODEL_FILES:
            raise UsageError(f"'{path}' is no model file; expected one of {', '.join(_MODEL_FILES)}, or an MLflow model folder.")
        check_limits(path)
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
    local = download(location, folder)
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
            raise RegistryError(f"No registered model '{name}' has a version.{known_models(client, name)}")
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


def download(location: str, folder: Path) -> Path:
    """A private copy of an artifact folder. MLflow follows links on a local disk; here they stay links, which intake refuses.

    Raises:
        IntakeError: there is more than an audit would take; nothing was copied.
    """
    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        source = Path(local_file_uri_to_path(location))
        check_limits(source)
        shutil.copytree(source, folder, symlinks=True)
        return folder
    check_remote(location)
    folder.mkdir(parents=True)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder)))


def check_remote(location: str) -> None:
    """That MLflow may fetch what an artifact store has at a location.

    Raises:
        IntakeError: it is more than an audit would take.
    """
    for place in _places_behind(location):
        root, path = _get_root_uri_and_artifact_path(place)  # as MLflow's own download reads it
        repository = get_artifact_repository(root)
        if not remote_files(repository, path):  # one file, or nothing
            for entry in repository.list_artifacts(None):
                if entry.path == path and not entry.is_dir:
                    Tally().add_file(path, entry.file_size or 0)


def _places_behind(location: str) -> list[str]:
    """Where MLflow fetches from. For a run it puts together the run's own artifacts and the model that the run logged so."""
    if not location.startswith("runs:/"):
        return [location]
    run_id, _, path = location.removeprefix("runs:/").partition("/")
    name, _, rest = path.partition("/")
    logged = _model_of_run(MlflowClient(), run_id, name) if name else None
    own = RunsArtifactRepository.get_underlying_uri(location)
    return [own] if logged is None else [own, f"{logged.artifact_location}/{rest}".rstrip("/")]


def remote_files(repository: ArtifactRepository, folder: str = "") -> dict[str, int]:
    """Size in bytes of every file below a folder of an artifact store, by its path there; 0 where the store does not tell.

    Raises:
        IntakeError: they are more, larger or deeper than an audit would take; then the rest is not asked for.
    """
    tally, sizes, waiting = Tally(), dict[str, int](), [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        tally.add_folder(place, depth)
        for entry in repository.list_artifacts(place or None):
            if entry.path in (".", place):  # some stores list a folder in itself
                continue
            if entry.is_dir:
                waiting.append((entry.path, depth + 1))
            else:
                sizes[entry.path] = entry.file_size or 0
                tally.add_file(entry.path, sizes[entry.path])
    return sizes
