"""The gate as a store: how MLflow finds it, what it loads, workspaces, and where the artifacts are."""

from __future__ import annotations

import configparser
import logging
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.exceptions import MlflowException
from mlflow.server.constants import ARTIFACTS_DESTINATION_ENV_VAR
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
from mlflow.tracking._model_registry.utils import _get_store_registry

from audit_plugin.errors import AttestationError, IntakeError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.registry import pinning
from audit_plugin.report.sanitise import clean_text
from mlflow_plugins import registry_store
from mlflow_plugins.entry import audited_store
from mlflow_plugins.registry_store import PromotionGate, WorkspacePromotionGate, artifact_digest

ROOT = Path(__file__).parents[3]


def test_every_address_that_is_declared_leads_to_the_gate():
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    schemes = {
        line.split("=")[0].strip() for line in declared["options.entry_points"]["mlflow.model_registry_store"].split("\n") if line
    }
    found = {point.name: point.load() for point in entry_points(group="mlflow.model_registry_store")}
    assert schemes >= {"audited+sqlite", "audited+postgresql", "audited+mysql", "audited+mssql+pyodbc"}
    assert all(found[scheme] is audited_store for scheme in schemes)
    for scheme in schemes:
        assert _get_store_registry().get_store_builder(f"{scheme}://host/db") is audited_store


def test_the_prefix_is_taken_off_the_address(tmp_path):
    store = audited_store(f"audited+sqlite:///{tmp_path}/mlflow.db")
    assert isinstance(store, PromotionGate)
    assert store.db_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert not isinstance(store, WorkspaceAwareSqlAlchemyStore)


def test_a_server_with_workspaces_has_a_gate_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    from mlflow.utils.workspace_context import WorkspaceContext

    store = audited_store(f"audited+sqlite:///{tmp_path}/mlflow.db")
    assert isinstance(store, WorkspacePromotionGate)
    assert isinstance(store, WorkspaceAwareSqlAlchemyStore)
    for workspace in ("vision", "speech"):
        with WorkspaceContext(workspace):
            store.create_registered_model("digits")
            store.create_model_version("digits", "/nowhere", tags=[ModelVersionTag("audit.verdict", "pass")])
            assert store.get_model_version("digits", "1").tags == {}
            with pytest.raises(MlflowException, match="may not get the alias 'champion'"):
                store.set_registered_model_alias("digits", "champion", "1")
            store.set_registered_model_alias("digits", workspace, "1")
            assert store.get_registered_model("digits").aliases == {workspace: 1}


def test_what_mlflow_writes_without_the_gate_can_be_read_with_it(tmp_path):
    database = f"sqlite:///{tmp_path}/mlflow.db"
    plain = SqlAlchemyStore(database)
    plain.create_registered_model("digits")
    plain.create_model_version("digits", "/nowhere")
    plain.set_registered_model_alias("digits", "champion", "1")
    gated = audited_store(f"audited+{database}")
    assert gated.get_model_version_by_alias("digits", "champion").version == 1
    with pytest.raises(MlflowException, match="no signed audit"):
        gated.set_registered_model_alias("digits", "champion", "1")


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A store; making its tables takes seconds."""
    return audited_store(f"audited+sqlite:///{tmp_path_factory.mktemp('gated')}/mlflow.db")


@pytest.mark.parametrize("name", ["a; rm -rf ~", "$(rm -rf ~)", "it's `this`", "a\n\x1b[2Jb\u202e", "'" * 200])
def test_the_command_in_a_refusal_can_be_copied_whatever_the_model_is_called(gated, name):
    gated.create_registered_model(name)
    gated.create_model_version(name, "/nowhere")
    with pytest.raises(MlflowException) as caught:
        gated.set_registered_model_alias(name, "champion", "1")
    message = caught.value.message
    assert message.isprintable()
    *command, uri, option, value = shlex.split(message.rpartition("Run: ")[2])
    assert (command, option, value) == (["backdoor-audit", "gate"], "--clean", "IMAGES")
    assert uri == f"models:/{clean_text(name)}/1"


def test_no_refusal_and_no_log_line_carries_control_characters(gated, caplog):
    name = "c\n\x1b[2Jd"
    with caplog.at_level(logging.INFO):
        gated.create_registered_model(name, [RegisteredModelTag("audit.verdict", "pass")])
        gated.create_model_version(name, "/nowhere", tags=[ModelVersionTag("audit.verdict", "pass")])
    assert len(caplog.messages) >= 2
    assert all(line.isprintable() for line in caplog.messages)
    for refused in (
        lambda: gated.set_registered_model_tag(name, RegisteredModelTag("audit.\n\x1b", "pass")),
        lambda: gated.set_model_version_tag(name, "1", ModelVersionTag("audit.verdict", "\x1b\n")),
        lambda: gated.delete_model_version_tag(name, "1", "audit.verdict"),
    ):
        with pytest.raises(MlflowException) as caught:
            refused()
        assert caught.value.error_code == "PERMISSION_DENIED"
        assert caught.value.message.isprintable()


def test_the_server_need_not_load_what_audits_need():
    heavy = ("torch", "onnxruntime", "great_expectations")
    code = f"import sys, mlflow_plugins.registry_store; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_a_client_need_not_load_a_database():
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    code = "import sys, mlflow; mlflow.MlflowClient()._get_registry_client(); print('sqlalchemy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert answer.stdout.strip() == "False"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "artifacts" / "1" / "models" / "m-1" / "artifacts"
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"weights")
    return folder


def test_artifacts_are_hashed_wherever_the_server_keeps_them(files, tmp_path, monkeypatch):
    expected = digest_of(manifest_of(files))
    assert artifact_digest(str(files)) == artifact_digest(files.as_uri()) == expected
    for destination in (str(tmp_path / "artifacts"), (tmp_path / "artifacts").as_uri() + "/"):
        monkeypatch.setenv(ARTIFACTS_DESTINATION_ENV_VAR, destination)
        assert artifact_digest("mlflow-artifacts:/1/models/m-1/artifacts") == expected


def test_what_no_audit_would_take_is_not_fetched(monkeypatch):
    huge = SimpleNamespace(path="model/weights", file_size=2**60, is_dir=False)
    monkeypatch.setattr(pinning, "get_artifact_repository", lambda place: SimpleNamespace(list_artifacts=lambda path: [huge]))
    monkeypatch.setattr(registry_store, "get_artifact_repository", lambda place: pytest.fail("fetched"))
    with pytest.raises(IntakeError, match="weights: found more than 8589934592 bytes"):
        artifact_digest("s3://bucket/model")


def test_files_that_cannot_be_compared_are_an_error(files, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = tmp_path / "artifacts#x"
    odd.mkdir()
    (odd / "model.bin").write_bytes(b"other")
    assert artifact_digest(str(odd)) == digest_of(manifest_of(odd)), "as MLflow reads it, not the folder 'artifacts'"
    for folder in (empty, tmp_path / "missing"):
        with pytest.raises(AttestationError, match="no files"):
            artifact_digest(str(folder))
    (files / "code").symlink_to(tmp_path)
    with pytest.raises(AttestationError, match="A link lies among its files: 'code'"):
        artifact_digest(str(files))
