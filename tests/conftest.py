"""Shared by all tests. The environment is set before torch or mlflow are imported anywhere."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes of a small CI machine
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["GX_ANALYTICS_ENABLED"] = "false"

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.model.load import Network, _probe
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import FitSplit, InputSpec

if TYPE_CHECKING:
    from pipelines.demo import Demo

SubjectFactory = Callable[..., Subject]


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


@contextmanager
def mlflow_state_kept() -> Iterator[None]:
    """Puts MLflow's global tracking URI and experiment back, the environment variables included."""
    import mlflow
    from mlflow.tracking import fluent

    uri = mlflow.tracking._tracking_service.utils._tracking_uri
    experiment = fluent._active_experiment_id
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
    environment = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        mlflow.set_tracking_uri(uri)
        fluent._active_experiment_id = experiment
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server on SQLite that keeps the artifacts itself."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(address, process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"The MLflow server did not start; its log:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="session")
def demo(server: str, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's two models, registered on the server."""
    from pipelines.demo import prepare_demo

    with mlflow_state_kept():
        return prepare_demo(tmp_path_factory.mktemp("demo"), lambda message: None, tracking_uri=server)


@pytest.fixture
def tracking(server: str) -> Iterator[str]:
    """MLflow in this process speaks to the server."""
    import mlflow

    with mlflow_state_kept():
        mlflow.set_tracking_uri(server)
        yield server
