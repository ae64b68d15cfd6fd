"""The real child process: what it finds is what this process finds, and what it makes MLflow can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin import confined
from audit_plugin.audit import audit
from audit_plugin.confined.jobs import AuditJob, GuardJob
from audit_plugin.policy import policy_from
from audit_plugin.registry import pin
from audit_plugin.report.schema import to_document
from audit_plugin.types import AuditReport, InputSpec, SubjectSummary
from tests.policies import FAST

if TYPE_CHECKING:
    from pipelines.demo import Demo

pytestmark = pytest.mark.usefixtures("real_sandbox")


def assert_alike(first: object, second: object, place: str = "") -> None:
    """Equal, but for the rounding of sums that another number of threads adds up in another order."""
    if isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_alike(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list) and isinstance(second, list):
        assert len(first) == len(second), place
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_alike(one, other, f"{place}[{index}]")
    elif isinstance(first, float) and isinstance(second, float):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-3), place
    else:
        assert first == second, place


def findings(report: AuditReport) -> dict[str, Any]:
    """A report without what differs from run to run."""
    document = to_document(report)
    for key in ("created", "duration_seconds", "stages", "isolation"):
        del document[key]
    for outcome in document["outcomes"]:
        outcome.pop("seconds", None)
    return document


@pytest.mark.usefixtures("tracking")
def test_a_confined_audit_finds_what_one_in_this_process_finds(demo: Demo, tmp_path: Path) -> None:
    pinned = pin(demo.model_uris[1], tmp_path)
    job = AuditJob(pinned.reference, pinned.folder, Path(demo.clean_images), policy_from(FAST), 0, False, False)
    stages: list[str] = []

    class Watcher:
        stage = staticmethod(stages.append)

        def advance(self, share: float) -> None:
            assert 0.0 <= share <= 1.0

    report = confined.audit(job, progress=Watcher())
    assert stages == [stage.name for stage in report.stages]
    assert report.isolation is not None
    assert report.isolation.mechanism != "none"
    here = audit(job.model, job.folder, job.clean, policy=job.policy, seed=0)
    assert_alike(findings(report), findings(here))


@pytest.mark.slow
@pytest.mark.usefixtures("tracking")
def test_a_confined_guard_is_packaged_for_mlflow(demo: Demo, tmp_path: Path) -> None:
    pinned = pin(demo.model_uris[0], tmp_path)
    job = AuditJob(pinned.reference, pinned.folder, Path(demo.clean_images), policy_from(FAST), 0, False, False)
    guard, file = confined.guard(GuardJob(job, 0.05, search=False), tmp_path / "guard")
    confined.package(file, {"model_id": "m-0", "model_uuid": "m-0"}, guard.subject, tmp_path / "packaged", is_guard=True)
    spec = guard.subject.input_spec
    answers = mlflow.pyfunc.load_model(str(tmp_path / "packaged")).predict(
        np.zeros((3, spec.channels, spec.height, spec.width), np.float32)
    )
    assert {name: value.shape for name, value in answers.items()} == {
        "logits": (3, guard.subject.class_count),
        "suspicion": (3,),
        "is_suspicious": (3,),
    }


def test_a_repaired_file_is_packaged_for_mlflow(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    program = torch.export.export(network, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    (tmp_path / "repaired").mkdir()
    torch.export.save(program, tmp_path / "repaired" / "model.pt2")
    subject = SubjectSummary("pt2", InputSpec(8, 8, 1), tuple("abcde"), 1, (), None)
    confined.package(tmp_path / "repaired" / "model.pt2", {"model_id": "m-0"}, subject, tmp_path / "packaged")
    pixels = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    loaded = mlflow.pytorch.load_model(str(tmp_path / "packaged"))
    np.testing.assert_allclose(loaded(torch.from_numpy(pixels)).detach(), network(torch.from_numpy(pixels)).detach(), rtol=1e-6)
