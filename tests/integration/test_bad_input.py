"""Whatever is wrong with a request is one clear line, the right exit code, and nothing written or logged."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from audit_plugin.attestation import SIGNING_KEY
from audit_plugin.errors import RegistryError
from audit_plugin.registry import EXPERIMENT, fetch_images
from audit_plugin.zoo.architectures import SmallCnn
from pipelines.demo import Demo

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

ERROR, USAGE = 2, 4
CLEAN_MODEL = "models:/digits-clean/1"


def _runs() -> dict[str, str]:
    """Status by id of every run in the experiment of the audits."""
    experiment = MlflowClient().get_experiment_by_name(EXPERIMENT)
    found = MlflowClient().search_runs([experiment.experiment_id]) if experiment else []
    return {run.info.run_id: run.info.status for run in found}


def _the_error(finished: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert finished.stderr.rstrip().endswith(line), "nothing comes after the error"
    return line


Refused = Callable[..., str]


@pytest.fixture
def refused(demo: Demo, tracking: str, cli: Cli, tmp_path: Path) -> Refused:
    """``refused(code, model, ...)`` runs an audit that must fail so, leave nothing behind, and gives its one line."""

    def run(code: int, model: str | Path, *options: str | Path, clean: str | Path = demo.clean_images) -> str:
        output = tmp_path / "report"
        asked = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(tracking)
        before = _runs()
        mlflow.set_tracking_uri(asked)
        finished = cli("run", model, "--clean", clean, "-o", output, "--format", "text,json,html", "--log", "always", *options)
        assert finished.returncode == code, finished.stderr
        assert not output.exists()
        mlflow.set_tracking_uri(tracking)
        assert _runs() == before
        return _the_error(finished)

    return run


def test_a_signing_key_that_cannot_be_read_is_told_before_the_audit(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIGNING_KEY, "/nowhere/signing.pem")
    assert SIGNING_KEY in refused(USAGE, CLEAN_MODEL)


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/digits-claen/1", "Did you mean 'digits-clean'?"),
        ("models:/digits-claen/latest", "Did you mean 'digits-clean'?"),
        ("models:/digits-clean/77", "77"),
        ("models:/digits-clean@nobody", "nobody"),
        ("models:/m-00000000000000000000000000000000", "m-00000000000000000000000000000000"),
        ("runs:/00000000000000000000000000000000/model", "00000000000000000000000000000000"),
        ("no/such/folder", "There is no model at 'no/such/folder'"),
        ("missing.pt2", "There is no model at 'missing.pt2'"),
    ],
)
def test_missing_model_is_named(refused: Refused, uri: str, words: str) -> None:
    assert words in refused(ERROR, uri)


def test_run_without_such_a_model_is_an_error(refused: Refused) -> None:
    run_id = MlflowClient().get_model_version("digits-clean", "1").run_id
    assert "nothing-here" in refused(ERROR, f"runs:/{run_id}/nothing-here")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/digits-clean", "models:/digits-clean/1"),
        ("models:/digits-clean/newest", "'newest' is no version number"),
        ("ftp://somewhere/model", "is no model URI"),
    ],
)
def test_address_of_no_known_form_is_a_usage_error(refused: Refused, uri: str, words: str) -> None:
    assert words in refused(USAGE, uri)


def _export(module: nn.Module, path: Path, channels: int = 1, size: int = 16) -> Path:
    example = torch.zeros(4, channels, size, size)
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, path)
    return path


def test_corrupt_exported_program_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = _export(SmallCnn(channels=1, classes=10, width=4), tmp_path / "model.pt2")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    assert "model.pt2" in refused(ERROR, path)


def test_flipped_bytes_in_the_graph_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = _export(SmallCnn(channels=1, classes=10, width=4), tmp_path / "model.pt2")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"graph_module"', b'"grabh_module"', 1))
    assert "model.pt2" in refused(ERROR, path)


def test_file_of_noise_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    assert "model.onnx" in refused(ERROR, path)


def test_empty_folder_is_refused(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "no model file" in refused(ERROR, folder)


def test_regression_model_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = _export(nn.Sequential(SmallCnn(channels=1, classes=1, width=4)), tmp_path / "model.pt2")
    assert "regression" in refused(ERROR, path)


def test_model_of_tables_is_refused(refused: Refused, tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(8, 3), (torch.zeros(4, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    assert "takes images" in refused(ERROR, tmp_path / "model.pt2")


def test_weights_that_are_nan_are_refused(refused: Refused, tmp_path: Path) -> None:
    module = SmallCnn(channels=1, classes=10, width=4)
    with torch.no_grad():
        module.classifier.weight[0, 0] = torch.nan
    assert "NaN" in refused(ERROR, _export(module, tmp_path / "model.pt2"))


# -------------------------------------------------------------------------------------------------- the clean images


def _npz(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture
def digits(demo: Demo) -> tuple[np.ndarray, np.ndarray]:
    with np.load(demo.clean_images) as content:
        return content["images"], content["labels"]


@pytest.mark.parametrize("name", ["no/such/folder", "missing.npz"])
def test_missing_clean_images_are_named(refused: Refused, name: str) -> None:
    assert name in refused(ERROR, CLEAN_MODEL, clean=name)


def test_missing_suspects_are_named(refused: Refused) -> None:
    assert "no/suspects" in refused(ERROR, CLEAN_MODEL, "--suspects", "no/suspects")


def test_folder_without_images_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "clean" / "0").mkdir(parents=True)
    assert "holds no image" in refused(ERROR, CLEAN_MODEL, clean=tmp_path / "clean")


@pytest.mark.parametrize("label", [10, -1])
def test_label_outside_the_models_classes_is_named(
    refused: Refused, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, label: int
) -> None:
    images, labels = digits
    labels[5] = label
    assert str(label) in refused(ERROR, CLEAN_MODEL, clean=_npz(tmp_path / "clean.npz", images, labels))


def test_images_of_another_size_are_refused(refused: Refused, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    images, labels = digits
    line = refused(ERROR, CLEAN_MODEL, clean=_npz(tmp_path / "clean.npz", images[:, ::2, ::2], labels))
    assert "8" in line
    assert "16" in line


def test_clean_set_of_one_class_is_refused(refused: Refused, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    images, labels = digits
    line = refused(ERROR, CLEAN_MODEL, clean=_npz(tmp_path / "clean.npz", images[labels == 3], labels[labels == 3]))
    assert "class" in line


def test_numpy_file_that_is_none_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "clean.npz").write_bytes(b"no archive")
    assert "clean.npz" in refused(ERROR, CLEAN_MODEL, clean=tmp_path / "clean.npz")


# ----------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(params=["nobody listens", "nobody answers"])
def unreachable(request: pytest.FixtureRequest, deaf_server: str) -> str:
    return "http://127.0.0.1:9" if request.param == "nobody listens" else deaf_server


def test_unreachable_tracking_server_is_said_within_seconds(refused: Refused, unreachable: str) -> None:
    mlflow.set_tracking_uri(unreachable)
    started = time.monotonic()
    line = refused(ERROR, CLEAN_MODEL)
    assert time.monotonic() - started < 10
    assert unreachable in line
    assert "MLFLOW_TRACKING_URI" in line


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a server is waited for was measured above."""
    monkeypatch.setattr("audit_plugin.registry.connection._SERVER_TIMEOUT_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_local_model_is_not_audited_for_a_server_that_cannot_take_the_report(
    refused: Refused, unreachable: str, tmp_path: Path
) -> None:
    path = _export(SmallCnn(channels=1, classes=10, width=4), tmp_path / "model.pt2")
    mlflow.set_tracking_uri(unreachable)
    started = time.monotonic()
    assert unreachable in refused(ERROR, path)
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("impatient")
def test_images_on_an_unreachable_server_are_said_within_seconds(tracking: str, unreachable: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(unreachable)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="does not answer"):
        fetch_images("runs:/00000000000000000000000000000000/clean", tmp_path)
    assert time.monotonic() - started < 10


# ------------------------------------------------------------------------------------------------------ the request


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--polcy", "audit.toml"], "--policy"),
        (["--format", "jsn"], "Did you mean 'json'?"),
        (["--format", ""], "at least one format"),
        (["--seed", "many"], "seed"),
        (["--log", "sometimes"], "log"),
        (["--policy", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_option_is_a_usage_error(refused: Refused, options: list[str], words: str) -> None:
    assert words in refused(USAGE, CLEAN_MODEL, *options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[layerwise]\ntaus = 2.5\n", "Did you mean 'tau'?"),
        ("[layrwise]\ntau = 2.5\n", "Did you mean 'layerwise'?"),
        ('[layerwise]\ntau = "large"\n', "tau"),
        ("[trigger_inversion]\nsteps = 0\n", "steps"),
        ("tau = [", "no readable TOML"),
    ],
)
def test_wrong_policy_is_a_usage_error(refused: Refused, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "audit.toml").write_text(content, encoding="utf-8")
    assert words in refused(USAGE, CLEAN_MODEL, "--policy", tmp_path / "audit.toml")


def test_normalisation_of_another_number_of_channels_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "audit.toml").write_text("[model]\nmean = [0.5, 0.5, 0.5]\n", encoding="utf-8")
    assert "mean" in refused(ERROR, CLEAN_MODEL, "--policy", tmp_path / "audit.toml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", CLEAN_MODEL],
        ["run", CLEAN_MODEL, "--clean", "x.npz", "--format", "html"],
        ["rnu"],
    ],
)
def test_incomplete_request_is_a_usage_error(cli: Cli, arguments: list[str]) -> None:
    finished = cli(*arguments)
    assert finished.returncode == USAGE
    assert _the_error(finished)


def test_html_without_a_folder_says_what_to_add(cli: Cli) -> None:
    assert "-o" in _the_error(cli("run", CLEAN_MODEL, "--clean", "x.npz", "--format", "html"))


@pytest.mark.parametrize("blocked", ["a file in its place", "a file above it"])
def test_output_that_cannot_be_written_is_said_before_the_audit(
    demo: Demo, tracking: str, cli: Cli, tmp_path: Path, blocked: str
) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    output = tmp_path / "taken" / ("" if blocked == "a file in its place" else "report")
    before = _runs()
    started = time.monotonic()
    finished = cli("run", CLEAN_MODEL, "--clean", demo.clean_images, "-o", output)
    assert finished.returncode in (ERROR, USAGE)
    assert "taken" in _the_error(finished)
    assert time.monotonic() - started < 10
    assert _runs() == before


# ---------------------------------------------------------------------------------------------- Ctrl-C and SIGTERM


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_signal_during_the_search_leaves_nothing_behind(
    demo: Demo, tracking: str, tmp_path: Path, sent: signal.Signals
) -> None:
    before = _runs()
    output, temporary = tmp_path / "report", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "audit_plugin.cli", "run", CLEAN_MODEL, "--clean", str(demo.clean_images), "-o", str(output)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking, "TMPDIR": str(temporary)}
    with (
        (tmp_path / "stderr").open("w+") as stderr,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        deadline = time.monotonic() + 120
        while "Searching for triggers" not in (tmp_path / "stderr").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(sent)
        stdout, _ = process.communicate(timeout=20)
    finished = subprocess.CompletedProcess(command, process.returncode, stdout, (tmp_path / "stderr").read_text())
    assert finished.returncode == ERROR
    assert "Interrupted" in _the_error(finished)
    assert not output.exists()
    assert not list(temporary.glob("backdoor-audit-*"))
    assert _runs() == before
