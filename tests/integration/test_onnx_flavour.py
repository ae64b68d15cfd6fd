"""A model in MLflow's ONNX flavour goes through the whole audit, gradients included, though no torch module is behind it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import infer_signature
from mlflow.tracking import MlflowClient

from audit_plugin.report import load
from pipelines.demo import ATTACK, Demo

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
NAME = "digits-onnx"


@pytest.fixture
def onnx_uri(demo: Demo, tracking: str, tmp_path: Path) -> str:
    """The demo's backdoored model, exported to ONNX and registered in that flavour."""
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=demo.model_uris[1], dst_path=str(tmp_path)))
    program = torch.export.load(folder / "data" / "model.pt2")
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    example = np.zeros((4, 1, 16, 16), np.float32)
    signature = infer_signature(example, np.zeros((4, 10), np.float32))
    mlflow.set_experiment("digits")
    with mlflow.start_run():
        mlflow.onnx.log_model(
            exported.model_proto,
            name="model",
            signature=signature,
            registered_model_name=NAME,
            pip_requirements=["onnxruntime"],
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    return f"models:/{NAME}/1"


@pytest.mark.slow
def test_backdoored_onnx_model_fails(demo: Demo, cli: Cli, onnx_uri: str, tmp_path: Path) -> None:
    output = tmp_path / "report"
    finished = cli("run", onnx_uri, "--clean", demo.clean_images, "-o", output, "--format", "text,json")
    assert finished.returncode == 1, finished.stderr + finished.stdout
    document = load(output / "report.json")
    assert document["intake"]["flavour"] == "onnx"
    assert document["decision"]["suspected_class"]["index"] == ATTACK.target_class
    assert document["decision"]["not_measured"] == []
    assert [entry["tap"] for entry in document["runtime"]["parity"]] == [*document["subject"]["taps"], "logits"]
    assert any("providers" in finding["message"] for finding in document["intake"]["findings"])
    assert MlflowClient().get_model_version(NAME, "1").tags["audit.verdict"] == "fail"
