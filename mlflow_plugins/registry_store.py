"""The gate inside MLflow's model registry: ``audited+sqlite:///...`` is MLflow's own SQL store that refuses what is not audited.

    mlflow server --backend-store-uri sqlite:///mlflow.db --registry-store-uri audited+sqlite:///mlflow.db

Every way into the registry (REST, the UI, the Python client) ends in the store, so this is where the rule holds. What it
refuses, it refuses with HTTP 403 and the command that helps. Reading is untouched, and so is whatever no rule speaks of.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlflow.entities.model_registry import ModelVersion, ModelVersionTag, RegisteredModel, RegisteredModelTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
from mlflow.utils.file_utils import local_file_uri_to_path

from audit_plugin.attestation import TAG_OF
from audit_plugin.errors import AttestationError, AuditError
from audit_plugin.gate import (
    Requirements,
    Standing,
    VersionFacts,
    check_sealed_tag,
    is_protected,
    is_sealed,
    must_stay,
    standing_of,
)
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.policy import POLICY_VARIABLE
from audit_plugin.registry import check_remote, facts_of, redacted, without_note
from audit_plugin.report.sanitise import clean_text
from audit_plugin.requirements import load_requirements
from mlflow_plugins.prompts import is_prompt

log = logging.getLogger(__name__)

_HASHING = threading.BoundedSemaphore(2)  # any client can ask for a hash, which takes the disk for seconds
_LONGEST_WAIT_SECONDS = 30
_LONGEST_REASON = 1000


@dataclass(frozen=True)
class _Seen:
    """A version as it was when its promotion was judged, and where its files were."""

    version: VersionFacts
    location: str


_CHECK: ContextVar[Callable[[Any], None] | None] = ContextVar("check", default=None)


@contextmanager
def _checking(check: Callable[[Any], None] | None) -> Iterator[None]:
    """The first transaction inside begins with this check, so that nobody can change what it sees before the transaction ends."""

    def once(session: Any) -> None:
        _CHECK.set(None)
        if check is not None:
            check(session)

    token = _CHECK.set(once)
    try:
        yield
    finally:
        _CHECK.reset(token)


class PromotionGate(SqlAlchemyStore):
    """MLflow's SQL store, in which a protected alias or stage needs a signed audit or a waiver, and ``audit.*`` tags a signature.

    The policy is read once, from the file that ``BACKDOOR_AUDIT_POLICY`` names; the keys come from
    ``BACKDOOR_AUDIT_VERIFYING_KEYS`` and ``BACKDOOR_AUDIT_WAIVER_KEYS``. Without keys every promotion is refused.
    """

    def __init__(self, db_uri: str, read_db_uri: str | None = None) -> None:
        path = os.environ.get(POLICY_VARIABLE)
        self._requirements: Requirements = load_requirements(Path(path) if path else None)
        if not self._requirements.verdict_keys.keys:
            log.warning("No verifying keys are set (BACKDOOR_AUDIT_VERIFYING_KEYS): every promotion will be refused.")
        super().__init__(db_uri, read_db_uri=read_db_uri)
        session_maker = self.ManagedSessionMaker

        @contextmanager
        def checked_session(*arguments: Any, **settings: Any) -> Iterator[Any]:
            with session_maker(*arguments, **settings) as session:
                if (check := _CHECK.get()) is not None:
                    check(session)
                    session.expire_all()
                yield session

        self.ManagedSessionMaker = checked_session

    # ------------------------------------------------------------------------------------------------- promotion

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        if not is_protected(alias, self._requirements.gate.protected_aliases):
            super().set_registered_model_alias(name, alias, version)
            return
        seen = self._check_promotion(name, version, f"the alias {alias!r}")
        with _checking(lambda session: self._check_unchanged(session, seen)):
            super().set_registered_model_alias(name, alias, version)

    def transition_model_version_stage(
        self, name: str, version: str, stage: str, archive_existing_versions: bool
    ) -> ModelVersion:
        if not is_protected(stage, self._requirements.gate.protected_stages):
            return super().transition_model_version_stage(name, version, stage, archive_existing_versions)
        seen = self._check_promotion(name, version, f"the stage {stage!r}")
        with _checking(lambda session: self._check_unchanged(session, seen)):
            return super().transition_model_version_stage(name, version, stage, archive_existing_versions)

    def rename_registered_model(self, name: str, new_name: str) -> RegisteredModel:
        """Aliases, stages and statements go along with a new name: what was audited or promoted keeps its own."""
        with _checking(lambda session: self._check_rename(session, name)):
            return super().rename_registered_model(name, new_name)

    def _check_promotion(self, name: str, version: str, place: str) -> _Seen:
        """Raises a 403 unless the version may be promoted; its files are hashed only if all else is in order."""
        registered = super().get_model_version(name, version)
        facts, location = facts_of(registered), self.get_model_version_download_uri(name, version)
        if is_prompt(registered):
            return _Seen(facts, location)
        standing = standing_of(facts, self._requirements, digest=None)
        if standing.allowed:
            with _reading_artifacts(facts.uri):
                digest = artifact_digest(location)
            standing = standing_of(facts, self._requirements, digest=digest)
        if not standing.allowed:
            raise _denied(refusal(facts, standing, place))
        if standing.reasons and standing.waiver is not None:
            by, until, reason = (clean_text(standing.waiver.facts.get(key)) for key in ("by", "until", "reason"))
            log.warning("%s gets %s by a waiver of %s until %s: %s", clean_text(facts.uri), place, by, until, reason)
        return _Seen(facts, location)

    def _check_unchanged(self, session: Any, seen: _Seen) -> None:
        """That a version is still the one whose files were hashed, which may have taken minutes."""
        row = self._locked_version(session, seen.version.name, seen.version.version)
        now = facts_of(row.to_mlflow_entity())
        statements = [[facts.tags.get(tag) for tag in TAG_OF.values()] for facts in (seen.version, now)]
        location = row.storage_location or row.source  # an MLflow that kept no location left it empty
        if now.created != seen.version.created or location != seen.location or statements[0] != statements[1]:
            raise _denied(f"{seen.version.uri} was changed while its files were compared with the audit. Try again.")

    def _check_rename(self, session: Any, name: str) -> None:
        gate = self._requirements.gate
        model = self._locked_model(session, name)
        held = {alias.alias for alias in model.registered_model_aliases if is_protected(alias.alias, gate.protected_aliases)}
        for version in model.model_versions:
            entity = version.to_mlflow_entity()
            if is_protected(entity.current_stage, gate.protected_stages):
                held.add(entity.current_stage)
            held |= {tag for tag in TAG_OF.values() if tag in entity.tags}
        if held and not all(is_prompt(version.to_mlflow_entity()) for version in model.model_versions):
            raise _denied(
                f"'{name}' may not be renamed, because a version has {', '.join(sorted(held))}: signed audits speak of its name. "
                "Copy the version to the new name (copy_model_version), and audit and promote it there."
            )

    def _locked_model(self, session: Any, name: str) -> Any:
        """The model's row, locked until the transaction ends: a write is what every database locks by."""
        self._get_query(session, SqlRegisteredModel).filter(SqlRegisteredModel.name == name).update(
            {SqlRegisteredModel.last_updated_time: SqlRegisteredModel.last_updated_time}, synchronize_session=False
        )
        return self._get_registered_model(session, name)

    def _locked_version(self, session: Any, name: str, version: str) -> Any:
        self._locked_model(session, name)
        return self._get_sql_model_version(session, name, version)

    # ------------------------------------------------------------------------------------------------------ tags

    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: list[ModelVersionTag] | None = None,
        run_link: str | None = None,
        description: str | None = None,
        *arguments: Any,
        **settings: Any,
    ) -> ModelVersion:
        """A version begins without any verdict: ``audit.*`` tags and summaries, which a copy brings along, are left out."""
        told = without_note(description) if description else description
        return super().create_model_version(name, source, run_id, _unsealed(tags, name), run_link, told, *arguments, **settings)

    def create_registered_model(
        self, name: str, tags: list[RegisteredModelTag] | None = None, *arguments: Any, **settings: Any
    ) -> RegisteredModel:
        return super().create_registered_model(name, _unsealed(tags, name), *arguments, **settings)

    def set_model_version_tag(self, name: str, version: str, tag: ModelVersionTag) -> None:
        def check(session: Any) -> None:
            with _denying():
                facts = facts_of(self._locked_version(session, name, version).to_mlflow_entity())
                check_sealed_tag(facts, tag.key, tag.value, self._requirements)

        with _checking(check if is_sealed(tag.key) else None):
            super().set_model_version_tag(name, version, tag)

    def delete_model_version_tag(self, name: str, version: str, key: str) -> None:
        def check(session: Any) -> None:
            facts = facts_of(self._locked_version(session, name, version).to_mlflow_entity())
            if must_stay(facts, key, self._requirements):
                raise _denied(
                    f"The tag {key!r} of {facts.uri} is not there, or is part of a signed statement, which stays until a newer "
                    "one is set."
                )

        with _checking(check if is_sealed(key) else None):
            super().delete_model_version_tag(name, version, key)

    def set_registered_model_tag(self, name: str, tag: RegisteredModelTag) -> None:
        if is_sealed(tag.key):
            raise _denied(
                f"The tag '{tag.key}' would look like an audit's; audits speak of versions, not of '{name}' as a whole."
            )
        super().set_registered_model_tag(name, tag)


class WorkspacePromotionGate(PromotionGate, WorkspaceAwareSqlAlchemyStore):
    """The same for servers with workspaces."""


def refusal(version: VersionFacts, standing: Standing, place: str) -> str:
    """One line: what was refused, why, and which command helps."""
    reasons = " ".join(reason.message for reason in standing.reasons)
    uri = clean_text(version.uri)  # whoever named the model wrote a part of the command
    return f"{uri} may not get {place}. {reasons} Run: backdoor-audit gate {shlex.quote(uri)} --clean IMAGES"


def artifact_digest(location: str) -> str:
    """``sha256:<hex>`` of the files at an artifact location, as an audit would pin them.

    A server that keeps the artifacts itself reads them where they are, others are fetched into a folder that is deleted again.

    Raises:
        AuditError: links lie among the files, there are none, or too many, or this server hashes enough others just now.
        Exception: they cannot be read; artifact stores raise what they like.
    """
    location = behind_the_proxy(location)
    if not _HASHING.acquire(timeout=_LONGEST_WAIT_SECONDS):
        raise AttestationError("The server compares the files of other versions just now. Try again in a minute.")
    try:
        if urlparse(location).scheme in ("", "file"):
            return _digest_of_folder(Path(local_file_uri_to_path(location)))
        check_remote(location)
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            return _digest_of_folder(Path(get_artifact_repository(location).download_artifacts("", temporary)))
    finally:
        _HASHING.release()


def why_unreadable(error: Exception) -> str:
    """What :func:`artifact_digest` raised, in one harmless line; the kind of an error that no MLflow raises says the most."""
    known = isinstance(error, AuditError | OSError | MlflowException)
    return clean_text(redacted(str(error) if known else f"{type(error).__name__}: {error}"), _LONGEST_REASON)


def behind_the_proxy(location: str) -> str:
    """The place that this server serves as ``mlflow-artifacts:``; any other location as it is.

    Raises:
        AttestationError: the location is written so that others may read another place from it.
    """
    from mlflow.server.constants import ARTIFACTS_DESTINATION_ENV_VAR

    destination = os.environ.get(ARTIFACTS_DESTINATION_ENV_VAR)
    if destination is None or not location.startswith("mlflow-artifacts:"):
        return location
    parsed = urlparse(location)
    parts = parsed.path.strip("/").split("/")
    if parsed.netloc or set(location) & set("#?;%\\") or {".", "..", ""} & set(parts):
        raise AttestationError(f"Its artifact location is not of the form mlflow-artifacts:/folder/folder: {location[:200]!r}.")
    return "/".join([destination.rstrip("/"), *parts])


def _digest_of_folder(folder: Path) -> str:
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise AttestationError(f"A link lies among its files: '{links[0].relative_to(folder)}'.")
    manifest = manifest_of(folder)
    if not manifest:
        raise AttestationError("It has no files.")
    return digest_of(manifest)


def _unsealed(tags: list[Any] | None, name: str) -> list[Any]:
    kept = [tag for tag in tags or [] if not is_sealed(tag.key)]
    if left := len(tags or []) - len(kept):
        log.info("%d audit tags were left out of a new entry of '%s': it has to earn its own verdict.", left, clean_text(name))
    return kept


@contextmanager
def _denying() -> Iterator[None]:
    try:
        yield
    except AttestationError as error:
        raise _denied(f"{error} The tags audit.* are written by 'backdoor-audit' with a signing key.") from error


@contextmanager
def _reading_artifacts(uri: str) -> Iterator[None]:
    """Whatever keeps the files from being hashed keeps the version from being promoted."""
    try:
        yield
    except Exception as error:  # each artifact store has errors of its own
        log.debug("The files of %s could not be hashed.", clean_text(uri), exc_info=True)
        reason = why_unreadable(error)
        raise _denied(f"{uri} may not be promoted: its files cannot be compared with the audit. {reason}") from error


def _denied(message: str) -> MlflowException:
    """Names, tags and statements in the message belong to whoever wrote them."""
    return MlflowException(clean_text(message, None), error_code=PERMISSION_DENIED)
