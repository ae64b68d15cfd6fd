"""Shared by all tests. The environment is set before torch or mlflow are imported anywhere."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes of a small CI machine
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["GX_ANALYTICS_ENABLED"] = "false"

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.model.load import Network, _probe
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.types import FitSplit, InputSpec

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
