"""The digest of a version's files as they are now, with as few requests as possible: a scan asks for hundreds."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import requests
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request

from audit_plugin.errors import RegistryError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.registry import registry_of, remote_files
from audit_plugin.types import FileEntry

log = logging.getLogger(__name__)

_ROUTE = "/backdoor-audit/compare"
_MOST_REFUSALS = 3  # in a row; then the server is not asked again
_LONGEST_WAIT_SECONDS = 120


class Digests:
    """Hashes versions, as :func:`audit_plugin.registry.pin` would.

    Files that only the MLflow server can reach (``mlflow-artifacts:``) pass through it on any way, so a server that has the audit
    page is asked to hash them where they are; whatever else there is, and whatever it does not answer, is fetched and not kept.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._asking = threading.Lock()  # the page makes one comparison at a time
        self._refusals = 0

    def now(self, name: str, version: str, source: str) -> str:
        """``sha256:<hex>`` of a version's files.

        Args:
            source: of the version, as the registry names it. Where that is another model (``models:/m-...``), the registry is
                asked where its files are.

        Raises:
            RegistryError: there are no files.
            IntakeError: there are more than an audit would take.
            MlflowException, OSError: they cannot be read.
        """
        location = self._location(name, version) if urlparse(source).scheme == "models" else None
        passes_through_server = urlparse(location or source).scheme == "mlflow-artifacts"
        said = self._from_server(name, version) if passes_through_server else None
        return said or self._fetched(name, version, location or self._location(name, version))

    def _location(self, name: str, version: str) -> str:
        return str(registry_of(self._client).get_model_version_download_uri(name, version))

    def _from_server(self, name: str, version: str) -> str | None:
        """None where the server has no such page, or does not say."""
        address = self._client._registry_uri
        if urlparse(address).scheme not in ("http", "https"):
            return None
        with self._asking:
            if self._refusals >= _MOST_REFUSALS:
                return None
            try:
                answer = http_request(
                    get_default_host_creds(address),
                    _ROUTE,
                    "POST",
                    params={"name": name, "version": version},
                    extra_headers={"Accept": "application/json"},
                    timeout=_LONGEST_WAIT_SECONDS,
                    max_retries=0,
                    raise_on_status=False,
                )
                digest = answer.json()["digest"] if answer.status_code == requests.codes.ok else None
            except (MlflowException, requests.RequestException, ValueError, LookupError, TypeError) as error:
                log.debug("The server does not compare: %s", error)
                digest = None
            is_digest = isinstance(digest, str) and re.fullmatch("sha256:[0-9a-f]{64}", digest) is not None
            self._refusals = 0 if is_digest else self._refusals + 1
            return digest if is_digest else None

    def _fetched(self, name: str, version: str, location: str) -> str:
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
        for path in sorted(remote_files(repository), key=PurePosixPath):
            repository._download_file(path, str(folder / "file"))
            (entry,) = manifest_of(folder)
            entries.append(FileEntry(PurePosixPath(path).as_posix(), entry.size, entry.sha256))
    return tuple(entries)
