"""Damaged and invented files: whatever is in them, reading them ends in a result or in an AuditError of one line.

Each test takes seconds. ``BACKDOOR_AUDIT_FUZZ=20`` makes twenty times as many examples, at random instead of always the same.
"""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from audit_plugin.data.clean_set import load_images
from audit_plugin.errors import AuditError, IntakeError
from audit_plugin.intake import inspect
from audit_plugin.intake.onnx_flow import find_onnx_paths
from audit_plugin.policy import Policy, load_policy
from audit_plugin.types import InputSpec
from tests.security.conftest import read_member, repack

MLMODEL = b"""flavors:
  python_function: {loader_module: mlflow.pytorch, data: data}
  pytorch: {model_data: data, code: null}
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3, 8, 8]}}]'
"""

flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)
TIMES = int(os.environ.get("BACKDOOR_AUDIT_FUZZ", "1"))
bounded = settings(
    max_examples=120 * TIMES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=TIMES == 1, database=None
)


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


# --------------------------------------------------------------------- files that are well formed, and mean anything

words = st.sampled_from(
    [
        *("data", "code", "loader_module", "mlflow.pytorch", "mlflow.onnx", "model_data", "pytorch", "onnx", "python_function"),
        *(
            "flavors",
            "signature",
            "inputs",
            "outputs",
            "data/model.pt2",
            "..",
            "",
            "\x1b[2J",
            "a" * 500,
            "__class__",
            "as_tensor",
        ),
        *("torch.ops.aten.relu.default", "torch.ops.aten.add_.out", "torch.sym_ite", "as_int", "name", "s0", "L['x']", "tensor"),
    ]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), words, st.text(max_size=20))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12
)


def one_line(read: Callable[[], object]) -> None:
    """A result, or an error of one readable line."""
    message = None
    try:
        read()
    except AuditError as error:
        message = str(error)
    if message is not None:
        assert "\n" not in message
        assert "\x1b" not in message
        assert 0 < len(message) < 3_000


def judged(files: dict[str, bytes]) -> None:
    """Intake of a folder of these files."""
    with tempfile.TemporaryDirectory() as folder:
        for path, data in files.items():
            (Path(folder) / path).parent.mkdir(exist_ok=True, parents=True)
            (Path(folder) / path).write_bytes(data)
        one_line(lambda: inspect(Path(folder)))


@bounded
@given(document=st.dictionaries(words, values, max_size=5), flavours=st.dictionaries(words, values, max_size=4))
def test_invented_mlmodel(tiny_pt2: bytes, document: dict[str, object], flavours: dict[str, object]) -> None:
    text = yaml.safe_dump({**document, "flavors": flavours}, allow_unicode=True)
    judged({"MLmodel": text.encode("utf-8", "surrogatepass"), "data/model.pt2": tiny_pt2})


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, member in members for place in places(member, (*path, key)))]


@bounded
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), values), min_size=1, max_size=3))
def test_invented_values_in_a_pt2(tiny_pt2: bytes, changes: list[tuple[float, object]]) -> None:
    for name in ("models/model.json", "data/weights/model_weights_config.json"):
        document = json.loads(read_member(tiny_pt2, name))
        for position, value in changes:
            found = places(document)[1:]
            *path, last = found[int(position * len(found))]
            part = document
            for key in path:
                part = part[key]
            part[last] = copy.deepcopy(value)
        judged({"model.pt2": repack(tiny_pt2, {name: json.dumps(document).encode("utf-8", "surrogatepass")})})


Parts = list[tuple[str, list[str], list[str], dict[str, Any]]]

names = st.sampled_from(["x", "y", "w", "a", "b", "", "x\0", "\x1b"])
kinds = st.sampled_from(
    [
        *("MatMul", "Relu", "If", "Loop", "Scan", "Where", "Greater", "Constant", "ConstantOfShape", "Tile", "Range", "Cast"),
        *("MaxPool", "TopK", "Shape", "Expand", "Identity", "Nothing", ""),
    ]
)
integers = st.integers(-(2**63), 2**63 - 1)
attributes = st.dictionaries(
    st.sampled_from(["to", "value", "body", "then_branch", "shape", "axis", "value_ints"]),
    st.one_of(integers, st.lists(integers, min_size=1, max_size=3), st.text(min_size=1, max_size=5)),
    max_size=2,
)
nodes = st.tuples(kinds, st.lists(names, max_size=3), st.lists(names, max_size=3), attributes)


def graph_of(parts: Parts, inner: onnx.GraphProto | None) -> onnx.GraphProto:
    made = [helper.make_node(kind, reads, writes, **further) for kind, reads, writes, further in parts]
    if inner is not None:
        made.append(helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner))
    return helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )


@bounded
@given(
    outside=st.lists(nodes, max_size=5),
    inside=st.lists(nodes, max_size=4),
    dims=st.lists(st.integers(-(2**62), 2**62), max_size=3),
)
def test_invented_onnx(outside: Parts, inside: Parts, dims: list[int]) -> None:
    graph = graph_of(outside, graph_of(inside, None) if inside else None)
    graph.initializer.append(TensorProto(name="s", data_type=TensorProto.INT64, dims=dims, raw_data=b"\xff" * 16))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
    judged({"model.onnx": model})
    find_onnx_paths("model.onnx", graph)  # without the checker before it, which refuses most of these graphs


SPEC = InputSpec(height=8, width=8, channels=3)


def read_images(path: Path, *, labels_required: bool) -> None:
    one_line(lambda: load_images(path, input_spec=SPEC, class_names=("cat", "dog"), labels_required=labels_required))


dtypes = st.sampled_from(["'|u1'", "'<i8'", "'|O'", "'<U4'", "[('a', '<i4')]", "'<M8[s]'", "1", "'|V0'"])
shapes = st.sampled_from(
    ["(4, 8, 8, 3)", "(0,)", "(-1, 8)", "()", "(10**9,)", "(99999999999999999999, 2)", "[4]", "(True, 8, 8, 3)", "(4.0,)"]
)
headers = st.builds("{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format, dtypes, st.sampled_from(["True", "0"]), shapes)


@bounded
@given(
    header=headers | st.text(max_size=80),
    version=st.integers(0, 4),
    body=st.binary(max_size=900),
    key=st.sampled_from(["images", "labels"]),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
)
def test_invented_npz(header: str, version: int, body: bytes, key: str, compression: int) -> None:
    encoded = header.encode("utf-8", "replace")
    length = struct.pack("<H" if version < 2 else "<I", len(encoded))
    arrays = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.array([0, 1, 0, 1])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, array in arrays.items():
                stream = io.BytesIO()
                np.save(stream, array)
                invented = b"\x93NUMPY" + bytes([version, 0]) + length + encoded + body
                archive.writestr(f"{name}.npy", invented if name == key else stream.getvalue())
        read_images(path, labels_required=True)
        content = bytearray(path.read_bytes())
        if body:
            content[int.from_bytes(body[:2], "little") % len(content)] = body[-1]
        path.write_bytes(bytes(content))
        read_images(path, labels_required=False)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, bytes]]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    found = []
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        stream = io.BytesIO()
        image.save(stream, kind)
        found.append((f"a.{kind.lower()}", stream.getvalue()))
    return found


@bounded
@given(changes=flips, kept=kept, folder_name=st.sampled_from(["cat", "0", "1", "99", "cow", "..cat", "\x1b[2J", "=cmd", "c\nat"]))
def test_damaged_images(
    pictures: list[tuple[str, bytes]], changes: list[tuple[float, int]], kept: float, folder_name: str
) -> None:
    for name, original in pictures:
        content = bytearray(original)
        for position, value in changes:
            content[int(position * len(content))] = value
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / folder_name).mkdir()
            (Path(folder) / folder_name / name).write_bytes(bytes(content[: int(kept * len(content)) + 1]))
            read_images(Path(folder), labels_required=True)
            read_images(Path(folder), labels_required=False)


toml_values = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["true", "''", "'cat'", "[]", "[1, 'a']", "[0.1]", "{a = 1}", "1979-05-27", "nan", "inf", "[[[]]]", "[["]),
    st.text(max_size=10),
)
entries = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), toml_values), max_size=3)


@bounded
@given(sections=st.lists(st.tuples(st.sampled_from([*Policy().document(), "verdicts", "model.x", "\x1b"]), entries), max_size=4))
def test_invented_policy(sections: list[tuple[str, list[tuple[float, str]]]]) -> None:
    document = Policy().document()
    lines = []
    for section, content in sections:
        known = [*document.get(section, {}), "unknown"]
        lines.append(f"[{section}]")
        lines += [f"{known[int(position * len(known))]} = {value}" for position, value in content]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.toml"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        one_line(lambda: load_policy(path))


@bounded
@given(content=st.binary(max_size=200))
def test_noise_as_policy(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.toml"
        path.write_bytes(content)
        one_line(lambda: load_policy(path))
