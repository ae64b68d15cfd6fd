"""The digest of a version's files as they are now, with as few requests as possible: a scan asks for hundreds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from audit_plugin.errors import RegistryError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.types import FileEntry

_DEEPEST = 32


def digest_now(client: MlflowClient, name: str, version: str) -> str:
    """``sha256:<hex>``, as :func:`audit_plugin.registry.pin` would find it, without keeping the files.

    Raises:
        RegistryError: there are no files.
        MlflowException, OSError: they cannot be read.
    """
    # The client's own method asks twice, and refuses what poses as a prompt.
    location = client._get_registry_client().get_model_version_download_uri(name, version)
    if urlparse(location).scheme in ("", "file"):
        manifest = manifest_of(Path(local_file_uri_to_path(location)))
    else:
        manifest = _remote_manifest(get_artifact_repository(location))
    if not manifest:
        raise RegistryError(f"The artifacts of models:/{name}/{version} are empty.")
    return digest_of(manifest)


def _remote_manifest(repository: ArtifactRepository) -> tuple[FileEntry, ...]:
    entries = []
    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        folder = Path(temporary)
        # Each file under a name of ours: theirs come from whoever made the model.
        for path in sorted(_files(repository), key=PurePosixPath):
            repository._download_file(path, str(folder / "file"))
            (entry,) = manifest_of(folder)
            entries.append(FileEntry(PurePosixPath(path).as_posix(), entry.size, entry.sha256))
    return tuple(entries)


def _files(repository: ArtifactRepository, folder: str | None = None, depth: int = 0) -> Iterator[str]:
    if depth > _DEEPEST:
        raise RegistryError(f"Its folders lie more than {_DEEPEST} deep.")
    for entry in repository.list_artifacts(folder):
        if entry.is_dir:
            yield from _files(repository, entry.path, depth + 1)
        else:
            yield entry.path
