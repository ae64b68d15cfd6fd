"""A real MLflow server that delivers its webhook to a real receiver, which starts real audits.

The files of the versions here are no model, so that each audit ends as soon as it has looked at them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import requests
from cryptography.fernet import Fernet
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.timeout(300)

SECRET = "correct horse battery staple"
POLICY = '[clean_images]\n"digits*" = "clean.npz"\n'
ROUTE = "/backdoor-audit/webhook"


@pytest.fixture(scope="module")
def address(start_server, keeping_state, tmp_path_factory):
    """An MLflow server that may deliver to loopback; MLflow in this process speaks to it."""
    settings = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
    }
    with start_server(tmp_path_factory.mktemp("webhooks"), **settings) as server, keeping_state():
        mlflow.set_tracking_uri(server)
        os.environ["MLFLOW_TRACKING_URI"] = server
        yield server


@pytest.fixture(scope="module")
def client(address):
    return MlflowClient()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "audit.toml"
    file.write_text(POLICY, encoding="utf-8")
    return file


class Receiver:
    """``backdoor-audit webhook serve``; ``log`` is what it wrote."""

    def __init__(self, folder: Path, policy: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{ROUTE}"
        self._file = folder / "receiver.log"
        command = [sys.executable, "-m", "audit_plugin.cli", "webhook", "serve", "--port", str(port), "--policy", str(policy)]
        with self._file.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=os.environ | {"BACKDOOR_AUDIT_WEBHOOK_SECRET": SECRET}, stdout=stream, stderr=stream
            )
        try:
            self.wait_for("Listening on")
        except BaseException:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str, seconds: float = 150) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.log:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"'{words}' is not in the receiver's log:\n{self.log}")
            time.sleep(0.1)
        return next(line for line in self.log.splitlines() if words in line)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


@pytest.fixture(scope="module")
def receiver(address, policy, tmp_path_factory):
    started = Receiver(tmp_path_factory.mktemp("receiver"), policy)
    yield started
    try:
        assert started.stop() == 0
    finally:
        started.process.kill()


@pytest.fixture
def hook(client, receiver):
    """``hook(name, secret=...)``: a webhook that delivers to the receiver; deleted after the test."""
    made = []

    def make(name, secret=SECRET, url=receiver.url):
        made.append(client.create_webhook(name, url, ["model_version.created"], secret=secret))
        return made[-1]

    yield make
    for entry in made:
        client.delete_webhook(entry.webhook_id)


@pytest.fixture
def register(client, tmp_path):
    """``register(name)``: the next version of a registered model whose files are no model."""

    def make(name):
        files = tmp_path / "files"
        files.mkdir(exist_ok=True)
        (files / "model.bin").write_bytes(b"weights")
        experiment = client.get_experiment_by_name("models") or client.get_experiment(client.create_experiment("models"))
        logged = client.create_logged_model(experiment.experiment_id)
        client.log_model_artifacts(logged.model_id, str(files))
        client.finalize_logged_model(logged.model_id, "READY")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        return client.create_model_version(name, f"models:/{logged.model_id}", model_id=logged.model_id)

    return make


def test_a_new_version_is_audited_once_although_two_hooks_report_it(client, receiver, hook, register):
    hook("first")
    hook("second")
    version = register("digits")
    assert version.version == "1"
    ended = receiver.wait_for("models:/digits/1: the audit ended with exit code 2: error: ")
    assert "MLmodel" in ended
    assert receiver.log.count("models:/digits/1: the audit begins") == 1
    assert "refused" not in receiver.log
    assert requests.get(f"{receiver.url}/health", timeout=10).json() == {"queue_length": 0}


def test_a_model_that_no_pattern_matches_is_not_audited_and_that_is_logged(receiver, hook, register, policy):
    hook("only")
    register("voices")
    line = receiver.wait_for("models:/voices/1 is not audited")
    assert f"No name or pattern in [clean_images] of '{policy}' matches 'voices'" in line


def test_a_hook_with_another_secret_starts_nothing(receiver, hook, register):
    hook("foreign", secret="a secret that the receiver lacks")
    register("digits-foreign")
    receiver.wait_for("refused with status 401: The signature is missing or wrong.")
    assert "digits-foreign" not in receiver.log


def test_mlflows_own_test_of_a_hook_succeeds_and_its_invented_version_is_not_audited(client, receiver, hook):
    result = client.test_webhook(hook("tried").webhook_id)
    assert (result.success, result.response_status) == (True, 202)
    receiver.wait_for("models:/example_model/1 is not audited: MLflow:")


def test_a_request_that_is_far_too_large_is_refused(receiver):
    response = requests.post(receiver.url, data=b" " * 3_000_000, headers={"Content-Type": "application/json"}, timeout=30)
    assert response.status_code == 413


def test_sigterm_ends_a_running_audit_and_names_what_waited(address, policy, hook, register, tmp_path):
    second = Receiver(tmp_path, policy)
    hook("stopped", url=second.url)
    register("digits-stopped")
    second.wait_for("models:/digits-stopped/1: the audit begins")
    register("digits-stopped")
    deadline = time.monotonic() + 30
    while requests.get(f"{second.url}/health", timeout=10).json() != {"queue_length": 1}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert second.stop() == 0
    assert "models:/digits-stopped/1 is not audited: the receiver was stopped" in second.log
    assert "models:/digits-stopped/2 is not audited: the receiver was stopped" in second.log
    assert "Traceback" not in second.log


def test_the_gate_takes_clean_images_from_the_policy(cli, address, register, policy):
    register("digits-gated")
    done = cli("gate", "models:/digits-gated/1", "--policy", policy)
    assert (done.returncode, "MLmodel" in done.stderr) == (2, True)
    register("voices-gated")
    done = cli("gate", "models:/voices-gated/1", "--policy", policy)
    assert (done.returncode, "[clean_images] names none" in done.stderr) == (4, True)
