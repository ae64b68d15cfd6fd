"""Damaged files: whatever is flipped or cut, the check ends in an Intake or an IntakeError, never in anything else."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.errors import IntakeError
from audit_plugin.intake import inspect

MLMODEL = b"""flavors:
  python_function: {loader_module: mlflow.pytorch, data: data}
  pytorch: {model_data: data, code: null}
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3, 8, 8]}}]'
"""

flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)
bounded = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def onnx_bytes() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def survives(name: str, original: bytes, changes: list[tuple[float, int]], kept: float, others: dict[str, bytes]) -> None:
    content = bytearray(original)
    for position, value in changes:
        content[int(position * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        for path, data in {**others, name: bytes(content[: int(kept * len(content)) + 1])}.items():
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_bytes(data)
        with suppress(IntakeError):
            inspect(Path(folder))


kept = st.one_of(st.just(1.0), st.floats(0.5, 1))


@bounded
@given(changes=flips, kept=kept)
def test_damaged_pt2(tiny_pt2: bytes, changes: list[tuple[float, int]], kept: float) -> None:
    survives("model.pt2", tiny_pt2, changes, kept, {})


@bounded
@given(changes=flips, kept=kept)
def test_damaged_onnx(onnx_bytes: bytes, changes: list[tuple[float, int]], kept: float) -> None:
    survives("model.onnx", onnx_bytes, changes, kept, {})


@bounded
@given(changes=flips, kept=kept)
def test_damaged_mlmodel(tiny_pt2: bytes, changes: list[tuple[float, int]], kept: float) -> None:
    survives("MLmodel", MLMODEL, changes, kept, {"data/model.pt2": tiny_pt2})
