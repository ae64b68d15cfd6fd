"""A backdoored version becomes a repaired next version on a real MLflow server, which says where it comes from and is audited."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient
from torch import nn

from audit_plugin import cli as command_line
from audit_plugin import confined, repairing
from audit_plugin.confined.jobs import RepairResult
from audit_plugin.errors import RegistryError
from audit_plugin.intake import inspect
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.load import load_network
from audit_plugin.registry import EXPERIMENT, pin
from audit_plugin.repair import BenifulRepair, RepairedModel
from audit_plugin.report import validate
from audit_plugin.types import AuditReport
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.policies import FAST, as_toml

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

ATTACK = BadNets(target_class=7, poisoning_rate=0.1)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MEAN, DEVIATION = 0.25, 0.5
PASS, ERROR, INCONCLUSIVE, USAGE = 0, 2, 3, 4

POLICY = as_toml({**FAST, "model": {"trust_tags": True}, "trigger_inversion": {"steps": 120, "searches": 1}})


class Normalised(nn.Module):
    """A network that expects normalised pixels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.inner(values * DEVIATION + MEAN)
        return answers


class Small(NamedTuple):
    """A backdoored and a clean network, and what an audit needs beside them."""

    backdoored: nn.Module
    clean_file: Path
    images: Path
    policy: Path
    folder: Path

    def arguments(self, model: str | Path, *more: str | Path) -> list[str]:
        return [str(text) for text in ("repair", model, "--clean", self.images, "--policy", self.policy, *more)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("repair")
    data = digits(seed=0)
    poisoned = ATTACK.poison(data.train, np.random.default_rng(0))
    backdoored, clean = (
        train(initialised(lambda: SmallCnn(1, 10, width=12), 0), images, epochs=20, seed=0) for images in (poisoned, data.train)
    )
    program = torch.export.export(clean, (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "clean.pt2")
    np.savez(folder / "clean.npz", images=data.test.images[:540], labels=data.test.labels[:540])
    (folder / "audit.toml").write_text(POLICY, encoding="utf-8")
    return Small(backdoored, folder / "clean.pt2", folder / "clean.npz", folder / "audit.toml", folder)


@pytest.fixture
def client(tracking: str) -> MlflowClient:
    return MlflowClient()


def _signature(example: np.ndarray) -> Any:
    return infer_signature(example, np.zeros((len(example), 10), np.float32))


def _in_process(server: str, arguments: list[str], keeping_state: Callable[[], AbstractContextManager[None]]) -> tuple[int, str]:
    with keeping_state(), redirect_stdout(io.StringIO()) as stdout:
        mlflow.set_tracking_uri(server)
        code = command_line._main(arguments)
    return code, stdout.getvalue()


# ------------------------------------------------------------------------------------- a version in MLflow's default form


class Finished(NamedTuple):
    """A finished ``repair``, and the digest that the original had before."""

    name: str
    digest: str
    code: int
    output: str
    repaired: RepairResult
    file: Path

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.output)
        return document

    @property
    def original(self) -> str:
        return f"models:/{self.name}/1"


@pytest.fixture(scope="module")
def finished(
    small: Small,
    server: str,
    keeping_state: Callable[[], AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """The repair of a version that takes normalised pixels, has named classes, tags of its own and a verdict."""
    name = "digits-to-repair"
    example = to_pixels(digits(seed=0).test.images[:4])
    with keeping_state():
        mlflow.set_tracking_uri(server)
        mlflow.set_experiment("digits")
        with mlflow.start_run():
            mlflow.pytorch.log_model(
                Normalised(small.backdoored).eval(),
                name="model",
                input_example=(example - MEAN) / DEVIATION,
                signature=_signature(example),
                registered_model_name=name,
                pip_requirements=["torch"],
            )
        tags = {"audit.input.mean": str(MEAN), "audit.input.std": str(DEVIATION), "audit.classes": ",".join(NAMES)}
        for key, value in (tags | {"audit.verdict": "fail", "audit.digest": "sha256:0", "owner": "us"}).items():
            MlflowClient().set_model_version_tag(name, "1", key, value)
        digest = pin(f"models:/{name}/1", tmp_path_factory.mktemp("before")).reference.digest
    kept: list[tuple[RepairResult, Path]] = []
    original = confined.repair

    def recorded(*arguments: Any, **options: Any) -> tuple[RepairResult, Path]:
        repaired, file = original(*arguments, **options)
        kept.append((repaired, Path(shutil.copy(file, tmp_path_factory.mktemp("repaired")))))
        return repaired, file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined, "repair", recorded)
        code, output = _in_process(server, small.arguments(f"models:/{name}/1", "--format", "json"), keeping_state)
    return Finished(name, digest, code, output, *kept[0])


def test_repaired_version_passes_and_its_verdict_is_the_exit_code(finished: Finished) -> None:
    report = finished.document["report"]
    validate(report)
    assert report["decision"]["verdict"] == "pass"
    assert report["model"]["pinned_uri"] == f"models:/{finished.name}/2"
    assert finished.code == PASS


def test_repair_rests_on_the_audit_of_the_original(finished: Finished) -> None:
    repair = finished.document["repair"]
    assert repair["original"] == finished.original
    assert repair["original_digest"] == finished.digest
    assert repair["target_class"] == {"index": ATTACK.target_class, "name": "seven"}
    assert repair["method"] == "beniful"
    assert repair["trigger_count"] == 2  # a patch and a perturbation


def test_measured_on_the_test_split_alone(finished: Finished) -> None:
    repair, summary = finished.document["repair"], finished.repaired.audited.clean_set
    assert repair["accuracy_before"]["trials"] == repair["accuracy_after"]["trials"] == summary.test_count
    assert repair["accuracy_before"]["value"] == summary.clean_accuracy.value
    assert repair["accuracy_before"]["value"] - repair["accuracy_after"]["value"] <= 0.02
    assert repair["flip_rate_before"]["value"] > 0.8
    assert repair["flip_rate_after"]["value"] < 0.2


def _answers(uri: str, folder: Path, images: np.ndarray) -> np.ndarray:
    """Predicted classes, by the registered file."""
    pinned = pin(uri, folder)
    intake = inspect(pinned.folder)
    network = load_network(pinned.folder / intake.data_path, intake)
    values = torch.from_numpy((to_pixels(images) - MEAN) / DEVIATION)
    with torch.no_grad():
        return network.program(values).argmax(dim=1).numpy()  # type: ignore[operator, union-attr]


@pytest.mark.usefixtures("tracking")
def test_the_true_trigger_no_longer_works_and_accuracy_stays(finished: Finished, tmp_path: Path) -> None:
    unseen = digits(seed=0).train
    others = unseen.images[unseen.labels != ATTACK.target_class]
    before, after = (f"models:/{finished.name}/{version}" for version in (1, 2))
    assert np.mean(_answers(before, tmp_path / "1", ATTACK.stamp(others)) == ATTACK.target_class) > 0.9
    assert np.mean(_answers(after, tmp_path / "2", ATTACK.stamp(others)) == ATTACK.target_class) < 0.1
    assert np.mean(_answers(after, tmp_path / "3", unseen.images) == unseen.labels) > 0.95


def test_tags_say_where_it_comes_from_and_how_to_read_images(finished: Finished, client: MlflowClient) -> None:
    version = client.get_model_version(finished.name, "2")
    assert version.tags["audit.repaired_from"] == finished.original
    assert version.tags["audit.repaired_from_digest"] == finished.digest
    assert version.tags["audit.repair_method"] == "beniful"
    assert version.tags["audit.classes"] == ",".join(NAMES)
    assert (version.tags["audit.input.mean"], version.tags["audit.input.std"]) == (str(MEAN), str(DEVIATION))
    assert "owner" not in version.tags


def test_verdict_and_digest_are_its_own(finished: Finished, client: MlflowClient) -> None:
    tags = client.get_model_version(finished.name, "2").tags
    report = finished.document["report"]
    assert tags["audit.verdict"] == "pass"
    assert tags["audit.digest"] == report["model"]["digest"] != finished.digest
    assert "Backdoor audit: PASS" in client.get_model_version(finished.name, "2").description


def test_original_is_untouched(finished: Finished, client: MlflowClient, tmp_path: Path) -> None:
    assert pin(finished.original, tmp_path).reference.digest == finished.digest
    version = client.get_model_version(finished.name, "1")
    assert version.tags["audit.verdict"] == "fail"
    assert not [tag for tag in version.tags if tag.startswith("audit.repair")]
    assert not version.description


def test_run_holds_the_metrics_and_is_linked(finished: Finished, client: MlflowClient) -> None:
    version = client.get_model_version(finished.name, "2")
    run = client.get_run(version.run_id)
    repair = finished.document["repair"]
    assert run.info.status == "FINISHED"
    for name in ("accuracy_before", "accuracy_after", "flip_rate_before", "flip_rate_after"):
        assert run.data.metrics[name] == repair[name]["value"]
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT
    model_id = version.source.removeprefix("models:/")
    assert json.loads(client.get_logged_model(model_id).tags["mlflow.modelVersions"])[0]["name"] == finished.name


@pytest.mark.usefixtures("tracking")
def test_form_is_the_originals(finished: Finished, tmp_path: Path) -> None:
    folder = pin(f"models:/{finished.name}/2", tmp_path).folder
    intake = inspect(folder)
    assert intake.flavour == "pt2"
    assert not intake.findings
    assert intake.signature is not None
    assert intake.signature.input_shape == (-1, 1, 16, 16)
    assert load_network(folder / intake.data_path, intake).batch_size is None
    assert (folder / "input_example.json").is_file() or (folder / "serving_input_example.json").is_file()
    assert "torch==" in (folder / "requirements.txt").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def same_audit(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> AuditReport:
    """The audit of the original is not made once more."""
    monkeypatch.setattr(repairing, "audit", lambda *arguments, **options: finished.repaired.audited)
    return finished.repaired.audited


def _error(finished: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    return line


def _versions(client: MlflowClient, name: str) -> list[str]:
    return sorted(str(version.version) for version in client.search_model_versions(f"name = '{name}'"))


def _spoiled(repair: BenifulRepair, subject: Any, splits: Any, triggers: Any, rng: Any) -> RepairedModel:
    """A repair that forgets everything."""
    module = subject.trainable_copy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return RepairedModel(subject.retrained(module))


@pytest.mark.usefixtures("same_audit")
def test_repair_beyond_the_budget_registers_nothing(
    small: Small, finished: Finished, cli: Cli, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _versions(client, finished.name)
    monkeypatch.setattr(BenifulRepair, "repair", _spoiled)
    call = cli(*small.arguments(finished.original))
    assert call.returncode == ERROR
    line = _error(call)
    assert "accuracy falls from" in line
    assert "more than the budget of 2.0%" in line
    assert "more clean images" in line
    assert "--accuracy-budget" in line
    assert call.stdout == ""
    assert _versions(client, finished.name) == before


@pytest.mark.usefixtures("same_audit")
def test_server_that_refuses_the_version_leaves_the_original(
    small: Small, finished: Finished, cli: Cli, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise MlflowException("no more versions")

    before = _versions(client, finished.name)
    monkeypatch.setattr(confined, "repair", lambda *arguments, **options: (finished.repaired, finished.file))
    monkeypatch.setattr(MlflowClient, "create_model_version", refused)
    call = cli(*small.arguments(finished.original))
    assert call.returncode == ERROR
    assert "registering it did not come to its end" in _error(call)
    assert f"{finished.original} is as it was" in _error(call)
    assert "no more versions" in _error(call)
    assert _versions(client, finished.name) == before


def test_audit_that_breaks_after_registering_says_what_exists(
    small: Small, finished: Finished, cli: Cli, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RegistryError("The tracking server is gone.")

    monkeypatch.setattr(confined, "repair", lambda *arguments, **options: (finished.repaired, finished.file))
    monkeypatch.setattr(command_line.repairing, "audit_and_publish", broken)
    before = _versions(client, finished.name)
    call = cli(*small.arguments(finished.original))
    (new,) = set(_versions(client, finished.name)) - set(before)
    assert call.returncode == ERROR
    line = _error(call)
    assert f"models:/{finished.name}/{new}" in line
    assert "no verdict" in line
    assert "The tracking server is gone." in line
    assert call.stdout.startswith(f"REPAIRED  {finished.original} -> models:/{finished.name}/{new}")
    assert "audit.verdict" not in client.get_model_version(finished.name, new).tags


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-class", "sevn"), "no class 'sevn'. Did you mean 'seven'?"),
        (("--target-class", "10"), "no class '10'"),
        (("--method", "benifull"), "no repair method 'benifull'. Did you mean 'beniful'?"),
        (("--accuracy-budget", "2"), "must lie in [0, 1)"),
        (("-o", "repaired"), "-o is for models that are not registered"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_request_ends_before_the_audit(
    small: Small, finished: Finished, cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("audited")

    monkeypatch.setattr(repairing, "audit", never)
    call = cli(*small.arguments(finished.original, *arguments))
    assert call.returncode == USAGE, call.stderr
    assert message in _error(call)


# -------------------------------------------------------------------------------------------------- files, and other forms


def test_clean_model_without_a_class_is_refused(small: Small, cli: Cli, tmp_path: Path) -> None:
    call = cli(*small.arguments(small.clean_file, "-o", tmp_path / "repaired"))
    assert call.returncode == ERROR, call.stdout
    line = _error(call)
    assert "suspects no class (verdict: pass)" in line
    assert "--target-class" in line
    assert not (tmp_path / "repaired").exists()


def test_file_needs_a_folder_for_the_repaired_one(small: Small, cli: Cli) -> None:
    call = cli(*small.arguments(small.clean_file))
    assert call.returncode == USAGE
    assert "Add -o FOLDER" in _error(call)


def test_no_model_file_is_overwritten(small: Small, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"mine")
    call = cli(*small.arguments(small.clean_file, "-o", tmp_path))
    assert call.returncode == USAGE
    assert "no model file is overwritten" in _error(call)
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


@pytest.mark.slow
def test_pruned_file_of_a_named_class_is_written_and_audited(small: Small, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "repaired"
    call = cli(
        *small.arguments(small.clean_file, "-o", output, "--method", "prune", "--target-class", "3", "--accuracy-budget", ".2")
    )
    # So large a budget costs two classes nearly all their images, and such a model does not pass.
    assert call.returncode == INCONCLUSIVE, call.stderr + call.stdout
    assert call.stdout.startswith(f"REPAIRED  {small.clean_file} -> {output / 'model.pt2'}")
    assert f"INCONCLUSIVE  {output / 'model.pt2'}" in call.stdout
    assert "far more errors than the others" in call.stdout
    assert [path.name for path in output.iterdir()] == ["model.pt2"]
    assert "MLflow run" not in call.stdout


@pytest.fixture
def onnx_uri(small: Small, tracking: str) -> Iterator[str]:
    """The backdoored network in MLflow's ONNX flavour."""
    example = torch.zeros(4, 1, 16, 16)
    program = torch.export.export(small.backdoored, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    mlflow.set_experiment("digits")
    with mlflow.start_run():
        mlflow.onnx.log_model(
            exported.model_proto,
            name="model",
            signature=_signature(example.numpy()),
            registered_model_name="digits-onnx-to-repair",
            pip_requirements=["onnxruntime"],
        )
    yield "models:/digits-onnx-to-repair/1"
    MlflowClient().delete_registered_model("digits-onnx-to-repair")


@pytest.mark.slow
def test_onnx_stays_onnx(small: Small, cli: Cli, onnx_uri: str, tmp_path: Path) -> None:
    call = cli(*small.arguments(onnx_uri))
    assert call.returncode == PASS, call.stderr + call.stdout
    assert call.stdout.startswith(f"REPAIRED  {onnx_uri} -> models:/digits-onnx-to-repair/2")
    assert "PASS  models:/digits-onnx-to-repair/2" in call.stdout
    folder = pin("models:/digits-onnx-to-repair/2", tmp_path).folder
    intake = inspect(folder)
    network = load_network(folder / intake.data_path, intake)
    assert intake.flavour == "onnx"
    assert isinstance(network.program, onnx.ModelProto)
    assert network.batch_size is None
    tags = MlflowClient().get_model_version("digits-onnx-to-repair", "2").tags
    assert tags["audit.repaired_from"] == onnx_uri
    assert tags["audit.verdict"] == "pass"
