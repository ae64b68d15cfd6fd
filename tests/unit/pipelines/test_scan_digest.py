"""Hashing versions for a scan: what the server is asked, and what of its answers is believed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import requests
from mlflow import MlflowClient

from pipelines.scan import digest
from pipelines.scan.digest import Digests

SAID, FETCHED = "sha256:" + "a" * 64, "sha256:" + "b" * 64
BEHIND_SERVER = "mlflow-artifacts:/models/1"


class Server:
    """Stands in for the MLflow server: gives ``answers`` one after the other, and counts."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, *arguments, **settings):
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return SimpleNamespace(status_code=answer)
        return SimpleNamespace(status_code=200, json=lambda: answer)


class Registry:
    """Stands in for the model registry: says where the files are, and counts."""

    def __init__(self, location: str) -> None:
        self.location, self.asked = location, 0

    def get_model_version_download_uri(self, *version):
        self.asked += 1
        return self.location


@pytest.fixture
def digests_of(monkeypatch):
    """``digests_of(server)``: what is fetched instead has its own digest."""

    def make(server, address="http://127.0.0.1:9", registry=None):
        monkeypatch.setattr(digest, "http_request", server)
        monkeypatch.setattr(digest, "registry_of", lambda client: registry or Registry("s3://bucket"))
        monkeypatch.setattr(Digests, "_fetched", lambda *_: FETCHED)
        return Digests(MlflowClient(address, address))

    return make


def test_a_server_with_the_page_is_asked_for_every_version(digests_of):
    server = Server({"digest": SAID})
    digests = digests_of(server)
    assert [digests.now("digits", version, BEHIND_SERVER) for version in "12345"] == [SAID] * 5
    assert server.asked == 5


@pytest.mark.parametrize(
    "answer",
    [404, 403, 503, 302, {"digest": None}, {"digest": "sha256:x"}, {"digest": [SAID]}, {}, [SAID], "text", requests.Timeout()],
)
def test_whatever_is_no_digest_is_fetched_and_the_server_soon_left_alone(digests_of, answer):
    server = Server(answer)
    digests = digests_of(server)
    assert [digests.now("digits", version, BEHIND_SERVER) for version in "12345"] == [FETCHED] * 5
    assert server.asked == 3


def test_a_busy_server_is_asked_again(digests_of):
    server = Server(503, 503, {"digest": SAID}, 503, 503, {"digest": SAID})
    digests = digests_of(server)
    assert [digests.now("digits", version, BEHIND_SERVER) for version in "123456"] == [FETCHED, FETCHED, SAID] * 2


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("http://127.0.0.1:9", "s3://bucket/models/1"),
        ("http://127.0.0.1:9", "/srv/models/1"),
        ("http://127.0.0.1:9", ""),
        ("sqlite:///mlflow.db", BEHIND_SERVER),
    ],
)
def test_files_that_do_not_pass_through_the_server_are_hashed_here(digests_of, address, source):
    server = Server({"digest": SAID})
    assert digests_of(server, address).now("digits", "1", source) == FETCHED
    assert server.asked == 0


@pytest.mark.parametrize("source", ["models:/m-0123456789abcdef0123456789abcdef", "models:/other/1"])
@pytest.mark.parametrize(
    ("location", "result", "asked"),
    [(BEHIND_SERVER, SAID, 1), ("s3://bucket/models/1", FETCHED, 0), ("/srv/models/1", FETCHED, 0)],
)
def test_of_a_version_made_of_another_model_the_place_of_the_files_decides(digests_of, source, location, result, asked):
    """So MLflow 3 registers models: ``models:/m-...`` says nothing of where their files are."""
    server, registry = Server({"digest": SAID}), Registry(location)
    assert digests_of(server, registry=registry).now("digits", "1", source) == result
    assert (server.asked, registry.asked) == (asked, 1)


def test_who_says_where_the_files_are_costs_no_further_request(digests_of):
    registry = Registry(BEHIND_SERVER)
    assert digests_of(Server({"digest": SAID}), registry=registry).now("digits", "1", BEHIND_SERVER) == SAID
    assert registry.asked == 0


def test_a_link_among_files_that_are_reached_directly_changes_the_digest(tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_bytes(b"audited")
    monkeypatch.setattr(digest, "registry_of", lambda client: Registry(str(tmp_path)))
    digests = Digests(MlflowClient("http://127.0.0.1:9", "http://127.0.0.1:9"))
    before = digests.now("digits", "1", str(tmp_path))
    (tmp_path / "model.pth").symlink_to("/etc/hostname")
    assert digests.now("digits", "1", str(tmp_path)) != before
