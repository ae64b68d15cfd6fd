"""Shared by all tests. The environment is set before torch or mlflow are imported anywhere."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes of a small CI machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side already
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["GX_ANALYTICS_ENABLED"] = "false"

import logging
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin import confined
from audit_plugin.model.load import Network, _probe
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import FitSplit, InputSpec, Isolation

if TYPE_CHECKING:
    from pipelines.demo import Demo

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so in a shell's background job, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing on a busy one
hypothesis.settings.load_profile("any machine")

SubjectFactory = Callable[..., Subject]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]

_REAL_SANDBOX = confined._run


def network_of(module: nn.Module, shape: tuple[int, int, int], batch: int | None = None) -> Network:
    """What loading ``module`` as a ``.pt2`` gives, without the file; a fixed batch size when ``batch`` is set."""
    example = torch.zeros(batch or 4, *shape)
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    graph = plain_graph(torch.export.export(module.eval(), (example,), dynamic_shapes=dynamic))
    return _probe(graph, (batch or -1, *shape), batch or -1)


@pytest.fixture(scope="session")
def make_subject() -> SubjectFactory:
    """Subjects of small modules: ``make_subject(module, channels, size)``."""

    def make(module: nn.Module, channels: int, size: int, **spec: object) -> Subject:
        network = network_of(module, (channels, size, size))
        names = tuple(str(index) for index in range(network.class_count))
        return prepare_subject(network, InputSpec(size, size, channels, **spec), flavour="pt2", class_names=names)  # type: ignore[arg-type]

    return make


@pytest.fixture
def random_images() -> Callable[..., FitSplit]:
    """``random_images(count, size, channels, classes, seed)``: uint8 noise whose brightness depends on the class."""

    def make(count: int, size: int, channels: int, classes: int, seed: int = 0) -> FitSplit:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % classes
        images = rng.integers(0, 128, (count, size, size, channels)) + (labels * 127 // max(classes - 1, 1))[:, None, None, None]
        return FitSplit(images.astype(np.uint8), labels.astype(np.int64))

    return make


# ------------------------------------------------------------- a real MLflow, for tests/integration and tests/e2e


SERVER_LOG = pytest.StashKey[Path]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the server wrote is shown below a failed test that used it."""
    report = yield
    if report.failed and "server" in getattr(item, "fixturenames", ()) and SERVER_LOG in item.config.stash:
        report.sections.append(("MLflow server's log", _tail(item.config.stash[SERVER_LOG])))
    return report


@contextmanager
def state_kept() -> Iterator[None]:
    """Puts back what a run of the command line changes in this process: MLflow's addresses and experiment, logging."""
    import mlflow
    from mlflow.tracking import fluent
    from mlflow.tracking._model_registry import utils as registry_addresses

    uri, registry_uri = mlflow.tracking._tracking_service.utils._tracking_uri, registry_addresses._registry_uri
    experiment = fluent._active_experiment_id
    environment = dict(os.environ)
    loggers = [
        logging.getLogger(name)
        for name in (None, "audit_plugin", "pipelines", "mlflow", "torch", "great_expectations", "alembic")
    ]
    levels, handlers = [logger.level for logger in loggers], loggers[0].handlers[:]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        mlflow.set_tracking_uri(uri)
        registry_addresses._registry_uri = registry_uri
        fluent._active_experiment_id = experiment
        os.environ.clear()
        os.environ.update(environment)
        loggers[0].handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def registry_address_kept() -> Iterator[None]:
    """MLflow's server code, run in this process, sets the registry's address for everybody after it."""
    variable = "MLFLOW_REGISTRY_URI"
    before = os.environ.get(variable)
    yield
    if before is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = before
    if addresses := sys.modules.get("mlflow.tracking._model_registry.utils"):
        addresses._registry_uri = before


@pytest.fixture(scope="session")
def keeping_state() -> Callable[[], AbstractContextManager[None]]:
    """:func:`state_kept`, for fixtures outside this file."""
    return state_kept


@contextmanager
def running_server(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """The address of an MLflow server on SQLite, in ``folder``, that keeps the artifacts itself; its log is ``server.log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "BACKDOOR_AUDIT_"))}
    inherited |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=inherited | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(address, process, log)
        yield address
    finally:
        with suppress(ProcessLookupError):  # it may have died by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[str]]:
    """:func:`running_server`, for fixtures outside this file."""
    return running_server


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server whose registry has no gate."""
    folder = tmp_path_factory.mktemp("server")
    request.config.stash[SERVER_LOG] = folder / "server.log"
    with running_server(folder) as address:
        yield address


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"The MLflow server did not start; its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="session")
def demo(server: str, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's two models, registered on the server."""
    from pipelines.demo import prepare_demo

    with state_kept():
        return prepare_demo(tmp_path_factory.mktemp("demo"), lambda message: None, tracking_uri=server)


@pytest.fixture
def tracking(server: str) -> Iterator[str]:
    """MLflow in this process speaks to the server."""
    import mlflow

    with state_kept():
        mlflow.set_tracking_uri(server)
        yield server


@pytest.fixture
def real_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what :func:`one_process` puts aside."""
    monkeypatch.setattr(confined, "_run", _REAL_SANDBOX)


@pytest.fixture(scope="session", autouse=True)
def one_process() -> Iterator[None]:
    """The command line in this process does a confined job in this process too: each child would take seconds to import torch.

    Jobs and results still travel as files. Whatever runs the command line as a process of its own gets the real sandbox.
    """
    from audit_plugin.confined import worker

    class Lines:
        def __init__(self, take: Callable[[str], None]) -> None:
            self.write, self.flush = take, lambda: None

    def run(kind: str, work: Path, readable: object, sandbox: object, relay: Any, stop: object) -> Isolation:
        worker.work(kind, work, worker.Teller(Lines(relay.take)))  # type: ignore[arg-type]
        return Isolation("none", False, False, "a test in one process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined, "_run", run)
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The command line in this process: ``cli("run", ...)`` gives exit code, stdout and stderr."""
    from audit_plugin.cli import _main

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        texts = [str(argument) for argument in arguments]
        capfd.readouterr()
        code = _main(texts)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(texts, code, out, err)

    with state_kept():
        yield call


@pytest.fixture(scope="session")
def suspects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits that no audit has seen, the last twenty with the planted trigger and none of its class."""
    from audit_plugin.zoo.data import digits
    from pipelines.demo import ATTACK

    unseen = digits(seed=0).train
    chosen = unseen.images[unseen.labels != ATTACK.target_class][:40]
    path = tmp_path_factory.mktemp("suspects") / "suspects.npz"
    np.savez(path, images=np.concatenate([chosen[:20], ATTACK.stamp(chosen[20:])]))
    return path


@pytest.fixture(scope="session")
def backdoored_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the audit of the backdoored model writes its report."""
    return tmp_path_factory.mktemp("backdoored") / "report"


@pytest.fixture(scope="session")
def backdoored_run(server: str, demo: Demo, suspects: Path, backdoored_output: Path) -> subprocess.CompletedProcess[str]:
    """The audit of the backdoored model, as a user runs it."""
    command = [sys.executable, "-m", "audit_plugin.cli", "run", demo.model_uris[1], "--clean", demo.clean_images.name]
    command += ["--suspects", str(suspects), "--format", "json,html", "-o", str(backdoored_output)]
    return subprocess.run(
        command,
        cwd=demo.clean_images.parent,
        env=os.environ | {"MLFLOW_TRACKING_URI": server},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
