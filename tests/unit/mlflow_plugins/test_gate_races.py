"""What happens to a version between the look and the write: the gate looks again in the transaction that writes."""

from __future__ import annotations

import dataclasses
import datetime
import sqlite3
import threading

import pytest
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.exceptions import MlflowException

from audit_plugin.attestation import SIGNING_KEY, TAG_OF, VERIFYING_KEYS, generate_keys, sign, signer_from_environment
from audit_plugin.registry import facts_of, statement_on
from audit_plugin.requirements import load_requirements
from mlflow_plugins import registry_store
from mlflow_plugins.entry import audited_store
from mlflow_plugins.registry_store import artifact_digest


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return generate_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An address of a registry; making its tables takes seconds."""
    return f"audited+sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def store(database, keys, monkeypatch):
    monkeypatch.setenv(VERIFYING_KEYS, str(keys[1]))
    return audited_store(database)


@pytest.fixture
def make(store, tmp_path, request):
    """``make(name)``: a version, numbered from 1, with files of its own."""

    def version(ending="", content=b"good"):
        files = tmp_path / f"files-{len(list(tmp_path.iterdir()))}"
        files.mkdir()
        (files / "model.bin").write_bytes(content)
        name = request.node.name + ending
        if not store.search_registered_models(f"name = '{name}'"):
            store.create_registered_model(name)
        return store.create_model_version(name, str(files))

    return version


@pytest.fixture
def audited(store, keys):
    """``audited(version, verdict)``: a signed envelope about a version, each later than the one before."""
    required, times = load_requirements(None), iter(range(1, 1000))

    def make(version, verdict="pass"):
        facts = {
            "verdict": verdict,
            "policy_digest": required.policy_digest,
            "promotion": {"allowed": True, "suite_digest": required.suite_digest},
        }
        digest = artifact_digest(store.get_model_version_download_uri(version.name, version.version))
        statement = statement_on(facts_of(version), "verdict", digest, {"audit.verdict": verdict}, facts)
        later = statement.created + datetime.timedelta(milliseconds=next(times))
        return sign(dataclasses.replace(statement, created=later), signer_from_environment({SIGNING_KEY: str(keys[0])}))

    return make


def attest(store, version, envelope):
    store.set_model_version_tag(version.name, version.version, ModelVersionTag(TAG_OF["verdict"], envelope))


def while_hashing(monkeypatch, change):
    """Makes ``change`` happen once, while the gate hashes files."""

    def slow(location):
        digest = artifact_digest(location)
        monkeypatch.setattr(registry_store, "artifact_digest", artifact_digest)
        change()
        return digest

    monkeypatch.setattr(registry_store, "artifact_digest", slow)


def test_nothing_changes_and_the_alias_is_set(store, make, audited, monkeypatch):
    version = make()
    attest(store, version, audited(version))
    while_hashing(monkeypatch, lambda: None)
    store.set_registered_model_alias(version.name, "champion", "1")
    assert store.get_registered_model(version.name).aliases == {"champion": 1}


def test_a_verdict_that_comes_while_files_are_hashed_counts(store, make, audited, monkeypatch):
    version = make()
    attest(store, version, audited(version))
    while_hashing(monkeypatch, lambda: attest(store, version, audited(version, "fail")))
    with pytest.raises(MlflowException, match="was changed while its files were compared"):
        store.set_registered_model_alias(version.name, "champion", "1")
    assert store.get_registered_model(version.name).aliases == {}


def test_a_model_that_is_exchanged_while_files_are_hashed_gets_nothing(store, make, audited, monkeypatch):
    version, other = make(), make("-other", b"evil")
    attest(store, version, audited(version))

    def exchange():
        store.delete_registered_model(version.name)
        store.rename_registered_model(other.name, version.name)

    for promote in (
        lambda: store.set_registered_model_alias(version.name, "champion", "1"),
        lambda: store.transition_model_version_stage(version.name, "1", "Production", False),
    ):
        while_hashing(monkeypatch, exchange)
        with pytest.raises(MlflowException) as caught:
            promote()
        assert caught.value.error_code == "PERMISSION_DENIED"
        exchange = lambda: None  # noqa: E731  (the second call finds the other model there already)
    now = store.get_model_version(version.name, "1")
    assert (now.aliases, now.current_stage) == ([], "None")


@pytest.fixture
def write(database):
    """``write(column, value, version)``: past the store, as another MLflow, or nobody honest, would."""

    def update(column, value, version):
        with sqlite3.connect(database.removeprefix("audited+sqlite:///")) as connection:
            connection.execute(f"UPDATE model_versions SET {column} = ? WHERE name = ?", (value, version.name))

    return update


def test_a_version_from_before_mlflow_kept_storage_locations_is_promoted(store, make, audited, write):
    version = make()
    attest(store, version, audited(version))
    write("storage_location", None, version)
    store.set_registered_model_alias(version.name, "champion", "1")
    store.transition_model_version_stage(version.name, "1", "Production", False)
    assert store.get_registered_model(version.name).aliases == {"champion": 1}


def test_a_source_that_changes_while_files_are_hashed_counts(store, make, audited, write, monkeypatch):
    version = make()
    attest(store, version, audited(version))
    write("storage_location", None, version)
    while_hashing(monkeypatch, lambda: write("source", "/elsewhere", version))
    with pytest.raises(MlflowException, match="was changed while its files were compared"):
        store.set_registered_model_alias(version.name, "champion", "1")


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'boto3'"), LookupError("Forbidden\n\x1b[2J")])
def test_whatever_a_store_raises_is_a_refusal_that_no_client_repeats(store, make, audited, monkeypatch, error):
    """MLflow's clients repeat a request that meets an unexpected error, and each would hash the files again."""
    version = make()
    attest(store, version, audited(version))

    def broken(location):
        raise error

    monkeypatch.setattr(registry_store, "artifact_digest", broken)
    with pytest.raises(MlflowException, match="its files cannot be compared with the audit") as caught:
        store.set_registered_model_alias(version.name, "champion", "1")
    assert caught.value.error_code == "PERMISSION_DENIED"
    assert f"{type(error).__name__}: {str(error).split()[0]}" in caught.value.message
    assert caught.value.message.isprintable()


def test_an_attested_model_cannot_be_renamed_away(store, make, audited):
    version = make()
    attest(store, version, audited(version))
    with pytest.raises(MlflowException, match="may not be renamed"):
        store.rename_registered_model(version.name, "elsewhere")


def test_writing_the_present_verdict_again_and_again_does_not_undo_a_newer_one(store, make, audited):
    """A client that keeps writing the old pass while the auditor writes a fail."""
    version = make()
    old = audited(version)
    attest(store, version, old)
    stop, refused, conflicts = threading.Event(), [], []

    def replay():
        while not stop.is_set():
            try:
                attest(store, version, old)
            except MlflowException as error:
                refused.append(error.error_code)

    clients = [threading.Thread(target=replay) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        failed = audited(version, "fail")
        for _ in range(200):
            try:
                attest(store, version, failed)
            except MlflowException as error:  # SQLite lets one write at a time
                conflicts.append(error.message)
            else:
                break
        assert all("locked" in message for message in conflicts)
        for _ in range(100):
            assert store.get_model_version(version.name, "1").tags[TAG_OF["verdict"]] == failed
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert "PERMISSION_DENIED" in refused
    with pytest.raises(MlflowException, match="Its audit says 'fail'"):
        store.set_registered_model_alias(version.name, "champion", "1")
