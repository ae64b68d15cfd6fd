"""A guard becomes a version of its own on a real MLflow server, and answers from there in plain ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from torch import nn

from audit_plugin.intake import inspect
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.registry import EXPERIMENT, pin
from audit_plugin.zoo.data import digits
from pipelines.demo import ATTACK, Demo
from tests.policies import FAST, as_toml

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

OK, ERROR, USAGE = 0, 2, 4

pytestmark = pytest.mark.usefixtures("tracking")


def error_of(finished: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    return line


def guards_of(name: str) -> list[Any]:
    return list(MlflowClient().search_registered_models(f"name = '{name}'"))


def run(file: str | Path, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input"]
    assert [value.name for value in session.get_outputs()] == ["logits", "suspicion", "is_suspicious"]
    return session.run(None, {"input": pixels})


def test_guard_is_registered_with_its_rates_and_flags_triggered_inputs(cli: Cli, demo: Demo, tmp_path: Path) -> None:
    uri, file, policy = demo.model_uris[1], tmp_path / "guarded.onnx", tmp_path / "audit.toml"
    policy.write_text(as_toml({**FAST, "trigger_inversion": {"steps": 120, "searches": 1}}), encoding="utf-8")
    finished = cli(
        "guard", uri, "--clean", demo.clean_images, "--fpr", "0.05", "-o", file, "--format", "json", "--policy", policy
    )
    assert finished.returncode == OK, finished.stderr
    document = json.loads(finished.stdout)
    name, version = document["uri"].removeprefix("models:/").split("/")
    assert (name, version) == ("digits-backdoored-guard", "1")
    assert document["file"] == str(file)
    # The threshold is a quantile of other images, 144 of them: the rate it stands for is known to within 0.05 (three deviations).
    assert document["false_positive_rate"]["low"] <= 0.1
    assert document["false_positive_rate"]["high"] >= 0.01
    assert document["detection_rate"]["value"] > 0.5
    assert document["trigger"]["target_class"]["index"] == ATTACK.target_class
    assert document["guard_of_digest"] == pin(uri, tmp_path / "original").reference.digest

    client = MlflowClient()
    registered = client.get_model_version(name, version)
    assert registered.tags["audit.guard_of"] == document["guard_of"] == uri
    assert registered.tags["audit.guard_of_digest"] == document["guard_of_digest"]
    assert float(registered.tags["audit.guard_threshold"]) == pytest.approx(document["threshold"], rel=1e-5)
    assert float(registered.tags["audit.guard_wanted_false_positive_rate"]) == 0.05
    assert float(registered.tags["audit.guard_detection_rate"]) == pytest.approx(document["detection_rate"]["value"], abs=1e-4)
    logged = client.get_run(registered.run_id)
    assert (logged.info.status, client.get_experiment(logged.info.experiment_id).name) == ("FINISHED", EXPERIMENT)
    for metric in ("detection_rate", "false_positive_rate", "clean_accuracy"):
        assert logged.data.metrics[metric] == pytest.approx(document[metric]["value"])
    assert "audit.guard_of" not in client.get_model_version(*uri.removeprefix("models:/").split("/")).tags

    folder = Path(mlflow.artifacts.download_artifacts(document["uri"], dst_path=str(tmp_path / "download")))
    intake = inspect(folder)
    assert intake.flavour == "onnx"
    requirements = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("mlflow")]
    assert requirements == [f"onnxruntime>={onnxruntime.__version__}"]
    unseen = digits(seed=0).train
    others = unseen.images[unseen.labels != ATTACK.target_class][:100]
    first, second = (run(place, to_pixels(others)) for place in (file, folder / intake.data_path))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first[2], first[1] > np.float32(document["threshold"]))

    # The attacker's own trigger, which the guard has never seen.
    answers, _, flags = run(file, to_pixels(ATTACK.stamp(others)))
    obeying = answers.argmax(axis=1) == ATTACK.target_class
    assert obeying.mean() > 0.9
    assert flags[obeying].mean() > 0.5 > first[2].mean()


def test_whoever_serves_it_with_mlflow_sends_what_the_model_takes(cli: Cli, demo: Demo, tmp_path: Path) -> None:
    finished = cli("guard", demo.model_uris[0], "--clean", demo.clean_images, "--fpr", "0.1", "--no-search", "--name", "served")
    assert finished.returncode == OK, finished.stderr
    assert finished.stdout.startswith(f"GUARD of {demo.model_uris[0]}\n")
    assert "not measured: no trigger was searched for" in finished.stdout
    assert "models:/served/1" in finished.stdout
    tags = MlflowClient().get_model_version("served", "1").tags
    assert tags["audit.guard_detection_rate"] == "not measured"
    pixels = to_pixels(digits(seed=0).test.images[:7])
    served = mlflow.pyfunc.load_model("models:/served/1").predict(pixels)
    assert {name: (values.dtype, values.shape) for name, values in served.items()} == {
        "logits": (np.float32, (7, 10)),
        "suspicion": (np.float32, (7,)),
        "is_suspicious": (np.bool_, (7,)),
    }
    original = mlflow.pyfunc.load_model(demo.model_uris[0]).predict(pixels)
    np.testing.assert_allclose(served["logits"], original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--fpr", "0.0001"), ERROR, "at least 9999 are needed"),
        (("--fpr", "1.5"), USAGE, "between 0 and 1"),
        (("--fpr", "0"), USAGE, "between 0 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line_and_nothing_is_registered(
    cli: Cli, demo: Demo, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    file = tmp_path / "guard.onnx"
    finished = cli(
        "guard", demo.model_uris[0], "--clean", demo.clean_images, "--no-search", "-o", file, "--name", "none", *arguments
    )
    assert finished.returncode == code
    assert message in error_of(finished)
    assert not file.exists()
    assert not guards_of("none")


def test_registration_that_is_refused_says_where_the_guard_is(
    cli: Cli, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise MlflowException("no more versions")

    monkeypatch.setattr(MlflowClient, "create_model_version", refused)
    file = tmp_path / "guard.onnx"
    finished = cli("guard", demo.model_uris[0], "--clean", demo.clean_images, "--fpr", "0.1", "--no-search", "-o", file)
    assert finished.returncode == ERROR
    assert "registering it failed" in error_of(finished)
    assert "no more versions" in error_of(finished)
    assert str(file) in error_of(finished)
    assert file.is_file()


# --------------------------------------------------------------------------------------------- models outside of MLflow


@pytest.fixture
def local(demo: Demo, tmp_path: Path) -> Path:
    """The file of the demo's clean model."""
    folder = Path(mlflow.artifacts.download_artifacts(demo.model_uris[0], dst_path=str(tmp_path / "local")))
    return folder / "data" / "model.pt2"


def test_local_file_is_written_only(cli: Cli, demo: Demo, local: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "guard.onnx"
    finished = cli("guard", local, "--clean", demo.clean_images, "--fpr", "0.1", "--no-search", "-o", file, "--format", "json")
    assert finished.returncode == OK, finished.stderr
    document = json.loads(finished.stdout)
    assert (document["uri"], document["file"], document["detection_rate"]) == (None, str(file), None)
    assert len(run(file, to_pixels(digits(seed=0).test.images[:3]))[2]) == 3
    assert not guards_of("model-guard")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "give -o FILE"), (("-o", "guard.onnx", "--name", "named"), "no --name")],
    ids=["no place", "a name"],
)
def test_local_file_needs_a_file_and_no_name(
    cli: Cli, demo: Demo, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = cli("guard", local, "--clean", demo.clean_images, *arguments)
    assert finished.returncode == USAGE
    assert message in error_of(finished)
    assert not (tmp_path / "guard.onnx").exists()


def test_no_file_is_overwritten(cli: Cli, demo: Demo, local: Path, tmp_path: Path) -> None:
    (tmp_path / "guard.onnx").write_bytes(b"mine")
    finished = cli("guard", local, "--clean", demo.clean_images, "-o", tmp_path / "guard.onnx")
    assert finished.returncode == USAGE
    assert "no model file is overwritten" in error_of(finished)
    assert (tmp_path / "guard.onnx").read_bytes() == b"mine"


def test_logged_model_without_a_registered_name_needs_one(cli: Cli, demo: Demo) -> None:
    name, version = demo.model_uris[0].removeprefix("models:/").split("/")
    source = MlflowClient().get_model_version(name, version).source
    finished = cli("guard", source, "--clean", demo.clean_images)
    assert finished.returncode == USAGE
    assert "Add --name" in error_of(finished)


def test_model_with_too_few_layers_is_one_clear_line(cli: Cli, demo: Demo, tmp_path: Path) -> None:
    data = digits(seed=0).train
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    pixels, labels = torch.from_numpy(to_pixels(data.images)), torch.from_numpy(data.labels)
    optimiser = torch.optim.Adam(flat.parameters(), lr=0.01)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(flat(pixels), labels).backward()
        optimiser.step()
    program = torch.export.export(flat.eval(), (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "flat.pt2")
    finished = cli("guard", tmp_path / "flat.pt2", "--clean", demo.clean_images, "-o", tmp_path / "guard.onnx")
    assert finished.returncode == ERROR
    assert "This model cannot be guarded. The network has no intermediate block" in error_of(finished)
    assert not (tmp_path / "guard.onnx").exists()
