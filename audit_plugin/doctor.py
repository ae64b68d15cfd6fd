"""What an installation can really do, found by trying."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from onnx import TensorProto, helper

from audit_plugin.errors import AuditError
from audit_plugin.model.runtime import CUDA, Session
from audit_plugin.sandbox import run_isolated

_REQUIRED = (
    "mlflow-backdoor-audit",
    "torch",
    "torchvision",
    "mlflow",
    "onnx",
    "onnxscript",
    "great-expectations",
    "numpy",
    "pandas",
)
_OPTIONAL = ("ray",)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``required`` ones decide whether an audit can run at all."""

    name: str
    works: bool
    detail: str
    required: bool = True


def diagnose() -> list[Finding]:
    """Python and package versions, the execution provider that a session really gets, and whether MLflow answers."""
    findings = [Finding("python", sys.version_info >= (3, 11), sys.version.split()[0])]
    findings += [_package(name, required=True) for name in _REQUIRED]
    findings += [_package(name, required=False) for name in _OPTIONAL]
    return [*findings, *_providers(), _sandbox(), _mlflow()]


def _package(name: str, *, required: bool) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name), required)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", required)


def _providers() -> list[Finding]:
    listed = ", ".join(onnxruntime.get_available_providers())
    try:
        provider = Session(_identity_model()).provider
    except AuditError as error:
        return [Finding("onnxruntime", False, str(error))]
    usable = provider == CUDA
    gpu = "a session really runs on it" if usable else f"not usable here, audits run on {provider} (listed: {listed})"
    return [Finding("onnxruntime", True, onnxruntime.__version__), Finding("GPU", usable, gpu, required=False)]


def _identity_model() -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "probe", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _sandbox() -> Finding:
    try:
        with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
            isolation = run_isolated("audit_plugin.errors", working_folder=Path(temporary))
    except AuditError as error:
        return Finding("sandbox", False, str(error))
    advice = "" if isolation.is_complete else " Install bubblewrap, or use a Linux kernel with Landlock."
    return Finding("sandbox", isolation.is_complete, f"{isolation.summary}, by {isolation.mechanism}.{advice}", required=False)


def _mlflow() -> Finding:
    from audit_plugin.registry import describe_tracking

    try:
        return Finding("mlflow tracking", True, describe_tracking(), required=False)
    except AuditError as error:
        return Finding("mlflow tracking", False, str(error), required=False)
