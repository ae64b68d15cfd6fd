"""A registered version as it is now, and what is written on it afterwards: signed statements, an alias."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from audit_plugin.attestation import TAG_OF, Kind, Statement, sign
from audit_plugin.gate import VersionFacts
from audit_plugin.registry.connection import check_server, registry_of, teaching

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner


def version_facts(name: str, version: str) -> VersionFacts:
    """A registered version as the registry keeps it now.

    Raises:
        RegistryError: there is none, or the server does not answer.
    """
    with teaching(f"models:/{name}/{version}"):
        return facts_of(registered_version(MlflowClient(), name, version))


def registered_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """A version as it is now, also one that a tag calls a prompt."""
    registered: ModelVersion = registry_of(client).get_model_version(name, version)
    return registered


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
    with teaching(statement.uri):
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
    with teaching(f"models:/{name}/{version}"):
        check_server()
        registry_of(MlflowClient()).set_registered_model_alias(name, alias, version)
