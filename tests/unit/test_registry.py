"""What the registry says and asks for before any MLflow server is involved."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from audit_plugin.attestation import SIGNING_KEY, TAG_OF, generate_keys
from audit_plugin.errors import RegistryError, UsageError
from audit_plugin.registry import check_server, describe_tracking, fetch_images, pin, redacted, registering, reports, without_note
from audit_plugin.registry.connection import teaching
from audit_plugin.registry.pinning import _quoted, download
from audit_plugin.registry.reports import _is_fetched


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("https://token@host", "https://host"),
        ("http://user:se@cret@host", "http://host"),
        ("http://user:secret@[::1]:5000", "http://[::1]:5000"),
        ("postgresql+psycopg2://user:secret@host/mlflow", "postgresql+psycopg2://host/mlflow"),
        ("request to http://a:b@one/x failed, http://c:d@two/y too", "request to http://one/x failed, http://two/y too"),
        ("https://host/images@v2/clean.npz", "https://host/images@v2/clean.npz"),
        ("models:/digits@candidate", "models:/digits@candidate"),
        ("sqlite:///folder/mlflow.db", "sqlite:///folder/mlflow.db"),
    ],
)
def test_credentials_of_every_uri_in_a_text_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("ask", [check_server, describe_tracking], ids=["check_server", "describe_tracking"])
@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:9", "https://user:secret@127.0.0.1:9"])
@pytest.mark.usefixtures("tracking_kept")
def test_error_about_a_server_shows_no_credentials(ask: object, uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    with pytest.raises(RegistryError, match="does not answer") as caught:
        ask()  # type: ignore[operator]
    assert redacted(uri) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_error_about_a_models_address_shows_no_credentials(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no model URI") as caught:
        pin("ftp://user:secret@host/model", tmp_path)
    assert "secret" not in str(caught.value)


@pytest.fixture
def tracking_kept(keeping_state) -> Iterator[None]:
    with keeping_state():
        yield


@pytest.fixture
def tls_only() -> Iterator[str]:
    """An address at which somebody listens and speaks no HTTP, as behind a certificate that nobody here knows."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"https://user:secret@127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("tracking_kept")
def test_whom_to_trust_is_left_to_mlflow(tls_only: str) -> None:
    mlflow.set_tracking_uri(tls_only)
    check_server()


@pytest.mark.usefixtures("tracking_kept")
def test_server_behind_a_proxy_is_left_to_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    mlflow.set_tracking_uri("http://tracking.invalid:5000")
    check_server()


@pytest.mark.usefixtures("tracking_kept")
def test_database_may_be_given_with_options(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db?timeout=60")
    check_server()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/none.db?timeout=60")
    with pytest.raises(RegistryError, match="There is no MLflow database"):
        check_server()


@pytest.mark.parametrize("location", ["ftp://user:secret@127.0.0.1:9/store", "ftp://user:secret@store.invalid/store"])
def test_artifact_store_that_does_not_answer_is_no_unreadable_file(location: str, tmp_path: Path) -> None:
    with (
        pytest.raises(RegistryError, match=r"The server that keeps models:/digits/1 does not answer") as caught,
        teaching("models:/digits/1"),
    ):
        download(location, tmp_path / "model")
    assert "secret" not in str(caught.value)


def test_file_that_cannot_be_read_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should go", encoding="utf-8")
    with pytest.raises(RegistryError, match="cannot be read"):
        fetch_images("http://127.0.0.1:9/clean.npz", tmp_path / "blocked" / "images")


@pytest.mark.parametrize(
    ("path", "suspected", "named"),
    [
        ("report.html", None, True),
        ("triggers/class_7.png", 7, True),
        ("triggers/class_7_wave.png", 7, True),
        ("triggers/class_77.png", 7, False),
        ("triggers/class_8.png", 7, False),
        ("triggers/class_8.png", None, False),
    ],
)
def test_a_statement_names_few_files_however_many_classes_there_are(path: str, suspected: int | None, named: bool) -> None:
    assert _is_fetched(path, suspected) is named


def test_names_are_quoted_as_mlflow_reads_them() -> None:
    assert [_quoted("digits"), _quoted("it's"), _quoted('6" screens')] == ["'digits'", '"it\'s"', "'6\" screens'"]
    with pytest.raises(UsageError, match="quotes of both kinds"):
        _quoted("it's 6\"")


@pytest.mark.parametrize("key", ["", "/nowhere/signing.pem", "foreign"])
def test_an_origin_that_cannot_be_signed_is_a_warning_since_the_version_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    def put_statement(*arguments: object) -> None:
        raise RegistryError("MLflow: signed by none of the keys.")

    files = tmp_path / "files"
    files.mkdir()
    (files / "model.pt2").touch()
    monkeypatch.setattr(registering, "put_statement", put_statement)
    monkeypatch.setenv(SIGNING_KEY, str(generate_keys(tmp_path / "keys")[0]) if key == "foreign" else key)
    client = SimpleNamespace(get_model_version_download_uri=lambda *version: str(files))
    registered = SimpleNamespace(name="digits", version="2", tags={}, creation_timestamp=0)
    with caplog.at_level(logging.WARNING):
        registering._sign_tags(client, registered, {"audit.repaired_from": "models:/digits/1"})  # type: ignore[arg-type]
    assert "models:/digits/2 does not say where it came from." in caplog.text
    assert ("signed by none of the keys" if key == "foreign" else SIGNING_KEY) in caplog.text


class Versions:
    """A registry that takes one tag after the other until it refuses one, because another audit was published meanwhile."""

    def __init__(self, refused: int, other: str | None) -> None:
        self.tags: dict[str, str] = {}
        self.refused, self.other = refused, other

    def get_model_version(self, name: str, version: str) -> SimpleNamespace:
        return SimpleNamespace(tags=dict(self.tags), description="")

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.refused -= 1
        if self.refused < 0:
            if self.other is not None:
                self.tags[TAG_OF["verdict"]] = self.other
            raise MlflowException("No signed statement says so.", PERMISSION_DENIED)
        self.tags[key] = value


@pytest.mark.parametrize("refused", [0, 1, 3])
@pytest.mark.parametrize("meanwhile", [True, False])
def test_an_audit_that_another_overtook_is_published_and_a_refusal_is_told(
    refused: int, meanwhile: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    versions = Versions(refused, "another envelope" if meanwhile else None)
    report: Any = SimpleNamespace(decision=SimpleNamespace(verdict="pass"), model=SimpleNamespace(pinned_uri="models:/digits/1"))
    monkeypatch.setattr(reports, "registry_of", lambda client: versions)
    monkeypatch.setattr(reports, "_tags", lambda report: {"audit.digest": "sha256:1"})
    monkeypatch.setattr(reports, "_describe_version", lambda *arguments: None)
    monkeypatch.setattr(reports, "registered_version", lambda client, name, version: versions.get_model_version(name, version))
    arguments: Any = (None, report, "digits", "1", "run 7", None, "our envelope")
    if meanwhile:
        reports._mark_version(*arguments)
        assert "was published meanwhile" in caplog.text
        assert "run 7" in caplog.text
    else:
        with pytest.raises(MlflowException, match="No signed statement"):
            reports._mark_version(*arguments)


def test_only_an_audits_summary_is_taken_out_of_a_description() -> None:
    note = "<!-- backdoor-audit -->\n### Backdoor audit: PASS\n<!-- /backdoor-audit -->"
    assert without_note(f"Ours.\n\n{note}") == "Ours."
    assert without_note(note) == ""
    for untouched in (" Ours. ", "<!-- backdoor-audit --> no end", ""):
        assert without_note(untouched) == untouched
