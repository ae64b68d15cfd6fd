"""From a finished audit to its place in MLflow: a verdict that is found is not lost, and one that is half logged is not shown."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking._model_registry.client import ModelRegistryClient

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys
from audit_plugin.cli import auditing
from audit_plugin.cli.console import LogChoice
from audit_plugin.errors import RegistryError
from audit_plugin.promotion import judge, load_suite
from audit_plugin.registry import EXPERIMENT, describe_tracking, log_report
from audit_plugin.report import load, write_report
from audit_plugin.types import AuditReport
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
ERROR, INCONCLUSIVE = 2, 3

NO_BUDGET = """
[trigger_inversion]
steps = 1
searches = 1

[source_specific]
maximum_classes = 0

[canaries]
families = []
"""


@dataclasses.dataclass(frozen=True)
class Untrained:
    """A model that has learned nothing, which is audited within seconds."""

    model: Path
    clean: Path
    policy: Path

    def arguments(self, *more: str | Path) -> list[str | Path]:
        return ["run", self.model, "--clean", self.clean, "--policy", self.policy, "--log", "always", *more]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    module = SmallCnn(channels=1, classes=10, width=4).eval()
    program = torch.export.export(module, (torch.zeros(4, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    images = digits(seed=0).test
    np.savez(folder / "clean.npz", images=images.images[:200], labels=images.labels[:200])
    (folder / "audit.toml").write_text(NO_BUDGET, encoding="utf-8")
    return Untrained(folder / "model.pt2", folder / "clean.npz", folder / "audit.toml")


@pytest.fixture
def client(tracking: str) -> MlflowClient:
    return MlflowClient()


def _error(finished: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    return line


# --------------------------------------------------------------------------------------- a report that cannot be logged


@pytest.fixture
def closed_experiment(client: MlflowClient) -> Iterator[None]:
    """The experiment of the audits was deleted, so the server takes no run."""
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    client.delete_experiment(experiment)
    yield
    client.restore_experiment(experiment)


@pytest.mark.usefixtures("closed_experiment")
def test_report_that_cannot_be_logged_is_printed_and_written(untrained: Untrained, cli: Cli, tmp_path: Path) -> None:
    finished = cli(*untrained.arguments("-o", tmp_path / "report", "--format", "text,json"))
    assert finished.returncode == ERROR, finished.stderr
    assert finished.stdout.startswith("INCONCLUSIVE")
    assert load(tmp_path / "report" / "report.json")["decision"]["verdict"] == "inconclusive"
    line = _error(finished)
    assert "The report was not logged" in line
    assert str(tmp_path / "report") in line
    assert "MLflow:" in line


@pytest.mark.usefixtures("client")
def test_ctrl_c_while_logging_tells_what_exists(
    untrained: Untrained, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "log_artifacts", interrupted)
    finished = cli(*untrained.arguments("-o", tmp_path / "report", "--format", "text,json"))
    assert finished.returncode == ERROR
    assert finished.stdout.startswith("INCONCLUSIVE")
    line = _error(finished)
    assert "Interrupted" in line
    assert "nothing was written" not in line
    assert str(tmp_path / "report") in line
    assert (tmp_path / "report" / "report.json").is_file()


def test_report_that_cannot_be_written_is_printed(untrained: Untrained, cli: Cli, client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "report" / "report.json").mkdir(parents=True)  # a folder in the file's place
    finished = cli(*untrained.arguments("-o", tmp_path / "report", "--format", "text,json"))
    assert finished.returncode == ERROR
    assert finished.stdout.startswith("INCONCLUSIVE")
    assert "The report was not written" in _error(finished)


# ------------------------------------------------------------------------------------------------- what is said of sources


def test_report_names_the_clean_images_as_the_user_did(untrained: Untrained, cli: Cli, client: MlflowClient) -> None:
    run = client.create_run(client.create_experiment("sources")).info.run_id
    client.log_artifact(run, str(untrained.clean))
    source = f"runs:/{run}/clean.npz"
    arguments = dataclasses.replace(untrained, clean=source).arguments("--format", "json")  # type: ignore[arg-type]
    finished = cli(*arguments[:-4], "--log", "never", *arguments[-2:])
    assert finished.returncode == INCONCLUSIVE, finished.stderr
    assert json.loads(finished.stdout)["clean_set"]["source"] == source


@pytest.fixture(scope="module")
def report(untrained: Untrained, keeping_state: Callable[[], AbstractContextManager[None]]) -> AuditReport:
    with keeping_state():
        finished, _ = auditing.audit_and_publish(
            str(untrained.model),
            str(untrained.clean),
            policy_file=untrained.policy,
            log=LogChoice.NEVER,
            command="backdoor-audit run x --clean https://user:secret@host/clean.npz",
        )
    return finished


def test_command_shows_no_credentials(report: AuditReport) -> None:
    assert report.command == "backdoor-audit run x --clean https://host/clean.npz"


# ---------------------------------------------------------------------------------------------- a version that is marked


@pytest.fixture
def registered(report: AuditReport, client: MlflowClient, request: pytest.FixtureRequest, tmp_path: Path) -> AuditReport:
    """The report as one about a registered version of its own."""
    write_report(report, tmp_path, ("json",))
    return _report_on(report, _registered_version(client, report, request.node.name))


def _registered_version(client: MlflowClient, report: AuditReport, name: str) -> ModelVersion:
    run = client.create_run(client.create_experiment(name)).info.run_id
    client.log_artifact(run, str(report.model.pinned_uri), "model")
    client.create_registered_model(name)
    return client.create_model_version(name, f"runs:/{run}/model", run)


def _report_on(report: AuditReport, version: ModelVersion) -> AuditReport:
    uri = f"models:/{version.name}/{version.version}"
    return dataclasses.replace(
        report, model=dataclasses.replace(report.model, uri=uri, name=version.name, version=str(version.version))
    )


def _tags(client: MlflowClient, report: AuditReport) -> dict[str, str]:
    assert report.model.name is not None
    return client.get_model_version(report.model.name, str(report.model.version)).tags


def test_audit_that_is_half_logged_shows_no_verdict(
    registered: AuditReport, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_report(registered, tmp_path, judge(registered, load_suite(None)))
    assert _tags(client, registered)["audit.verdict"] == "inconclusive"

    def refused(*arguments: object, **options: object) -> None:
        raise MlflowException("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistryClient, "update_model_version", refused)
        with pytest.raises(RegistryError, match="no room"):
            log_report(registered, tmp_path, judge(registered, load_suite(None)))
    assert "audit.verdict" not in _tags(client, registered)
    log_report(registered, tmp_path, judge(registered, load_suite(None)))
    assert _tags(client, registered)["audit.verdict"] == "inconclusive"


def test_audit_without_a_key_is_a_run_where_only_signed_ones_are_written_on_versions(
    report: AuditReport,
    start_server: Callable[..., AbstractContextManager[str]],
    keeping_state: Callable[[], AbstractContextManager[None]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, verifying = generate_keys(tmp_path / "keys")
    store = f"audited+sqlite:///{tmp_path}/mlflow.db"
    with (
        start_server(tmp_path, "--registry-store-uri", store, **{VERIFYING_KEYS: str(verifying)}) as address,
        keeping_state(),
    ):
        mlflow.set_tracking_uri(address)
        client = MlflowClient()
        version = _registered_version(client, report, "unsigned")
        write_report(report, tmp_path / "report", ("json",))
        logged = log_report(_report_on(report, version), tmp_path / "report", judge(report, load_suite(None)))
        assert client.get_run(logged.run_id).info.status == "FINISHED"
        assert not logged.signed
        found = client.get_model_version(version.name, version.version)
    assert not [key for key in found.tags if key.startswith("audit.")]
    assert not found.description
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for words in (logged.run_id, report.model.pinned_uri, SIGNING_KEY, "No signed statement"):
        assert words in warning


def test_link_in_the_description_holds_no_credentials(
    registered: AuditReport, client: MlflowClient, tracking: str, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(tracking.replace("://", "://user:secret@"))
    logged = log_report(registered, tmp_path, judge(registered, load_suite(None)))
    assert logged.page is not None
    assert logged.page.startswith(tracking)
    assert registered.model.name is not None
    description = client.get_model_version(registered.model.name, str(registered.model.version)).description
    assert logged.run_id in description
    assert "secret" not in description
    assert describe_tracking() == tracking
