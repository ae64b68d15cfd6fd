"""ONNX files: weights from elsewhere, native code, functions, hidden tensors, branches.

External data outside the folder: CVE-2022-25882, CVE-2024-27318 and CVE-2026-27489 of onnx, each around the fix of the last.
Keys of external data that onnx did not check: CVE-2026-34445 (GHSA-538c-55jv-c5g9). Memory addresses as locations: pull
requests 28709 and 29011 of ONNX Runtime, without a number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.errors import IntakeError
from audit_plugin.intake import inspect


def model(*, nodes: list[onnx.NodeProto] | None = None, initialisers: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "weight")
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        initialisers if initialisers is not None else [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def external(location: str, **further: str) -> onnx.TensorProto:
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **further}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_a_plain_model_and_external_data_in_the_folder_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(
        model(initialisers=[external("weights.bin", offset="4", length="48")]).SerializeToString()
    )
    (tmp_path / "weights.bin").write_bytes(bytes(52))
    assert inspect(tmp_path).flavour == "onnx"


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "sub/../../secret.bin",
        "./weights.bin",
        "{outside}/secret.bin",
        "..\\secret.bin",
        "C:secret.bin",
        "",
        "sub//weights.bin",
        "missing.bin",
    ],
)
def test_external_data_outside_the_folder_is_refused(location: str, refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    tensor = external(location.format(outside=tmp_path))
    refused(
        {"model.onnx": model(initialisers=[tensor]).SerializeToString(), "weights.bin": bytes(48)}, "model.onnx: found the tensor"
    )


def test_external_data_through_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "model.onnx").write_bytes(model(initialisers=[external("weights.bin")]).SerializeToString())
    with pytest.raises(IntakeError, match="symbolic link"):
        inspect(folder)


def test_a_memory_address_as_location_is_refused(refused: Callable) -> None:
    tensor = external("*/_ORT_MEM_ADDR_/*", offset="4096", length="48")
    refused({"model.onnx": model(initialisers=[tensor]).SerializeToString()}, "read the auditor's memory")


@pytest.mark.parametrize("further", [{"offset": "8"}, {"length": "1000"}, {"offset": "-8"}, {"basepath": "/"}])
def test_reading_beyond_the_file_is_refused(further: dict[str, str], refused: Callable) -> None:
    tensor = external("weights.bin", **further)
    refused({"model.onnx": model(initialisers=[tensor]).SerializeToString(), "weights.bin": bytes(48)}, "the tensor 'weight'")


def constant(tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    return [helper.make_node("Constant", [], ["weight"], value=tensor), helper.make_node("MatMul", ["x", "weight"], ["y"])]


def test_a_tensor_hidden_in_an_attribute_of_a_branch_is_found(refused: Callable) -> None:
    inner = helper.make_graph(
        constant(external("../secret.bin"))[:1], "inner", [], [helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 3])]
    )
    flag = helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True)))
    branch = helper.make_node("If", ["flag"], ["chosen"], then_branch=inner, else_branch=inner)
    nodes = [flag, branch, helper.make_node("MatMul", ["x", "chosen"], ["y"])]
    refused({"model.onnx": model(nodes=nodes, initialisers=[]).SerializeToString()}, "secret.bin")


def test_a_sparse_tensor_cannot_hide_one_either(refused: Callable) -> None:
    content = model()
    sparse = content.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(external("../secret.bin"))
    refused({"model.onnx": content.SerializeToString()}, "secret.bin")


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training", "planted"])
def test_operators_of_other_domains_are_refused(domain: str, refused: Callable) -> None:
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], domain=domain)
    refused({"model.onnx": model(nodes=[node]).SerializeToString()}, f"the operator '{domain}.MatMul'")


def test_local_functions_are_refused(refused: Callable) -> None:
    content = model()
    content.functions.add(name="MatMul", domain="")
    refused({"model.onnx": content.SerializeToString()}, "local functions")


def test_fields_unknown_to_the_checker_are_refused(refused: Callable) -> None:
    hidden = b"\xfa\x3e\x01a"  # field 1007, three bytes
    refused({"model.onnx": model().SerializeToString() + hidden}, "fields that this version of onnx does not know")


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a model", b"\0\0\0\0ORTM\0\0\0\0", b"{}"])
def test_other_files_named_onnx_are_refused(content: bytes, refused: Callable) -> None:
    refused({"model.onnx": content}, "model.onnx: found")


def test_a_branch_is_tolerated_and_named(tmp_path: Path) -> None:
    def inner(value: float) -> onnx.GraphProto:
        tensor = numpy_helper.from_array(np.full((4, 3), value, np.float32), "w")
        node = helper.make_node("Constant", [], ["w"], value=tensor)
        return helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3])])

    flag = helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True)))
    branch = helper.make_node("If", ["flag"], ["w"], name="gate", then_branch=inner(1), else_branch=inner(2))
    content = model(nodes=[flag, branch, helper.make_node("MatMul", ["x", "w"], ["y"])], initialisers=[])
    (tmp_path / "model.onnx").write_bytes(content.SerializeToString())
    (finding,) = inspect(tmp_path).findings
    assert "'gate' is If" in finding.message
    assert "architectural backdoor" in finding.message


def test_control_external_data_reads_another_file_when_nothing_checks(tmp_path: Path) -> None:
    """onnxruntime itself reads whatever file lies beside the model, so the folder's contents must be checked before."""
    (tmp_path / "model.onnx").write_bytes(model(initialisers=[external("weights.bin")]).SerializeToString())
    secret = np.arange(12, dtype=np.float32)
    (tmp_path / "weights.bin").write_bytes(secret.tobytes())
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (leaked,) = session.run(None, {"x": np.eye(4, dtype=np.float32)})
    np.testing.assert_array_equal(leaked, secret.reshape(4, 3))
