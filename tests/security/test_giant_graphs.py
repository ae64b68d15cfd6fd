"""Small files that ask for terabytes, for ever, or for a stack without end.

Depth in protobuf: CVE-2025-4565 (the pure-Python parser, which is not used here, recursed without end). Entities that grow in
YAML are the "billion laughs" of XML. Sizes that only a few nodes ask for have no number of their own. What a graph computes
from other values is not known before it runs: there the memory limit of the process that runs it holds.
"""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from audit_plugin.intake import inspect, onnx_graph

TENSOR = '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3, 8, 8]}}]'


@contextmanager
def within(seconds: float = 10, mebibytes: float = 300) -> Iterator[None]:
    """The block must end soon, without taking much memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
        taken, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < seconds
    assert peak < mebibytes * 2**20


def model(nodes: list[onnx.NodeProto], initialisers: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "classes"])],
        initialisers or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def stored(name: str, *values: float, kind: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


TRILLION = 10**12
ASKING: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = {
    "ConstantOfShape": (
        [helper.make_node("ConstantOfShape", ["s"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])],
        [stored("s", TRILLION, 4)],
    ),
    "Expand": ([helper.make_node("Expand", ["x", "s"], ["y"])], [stored("s", TRILLION, 1, 4)]),
    "Tile": ([helper.make_node("Tile", ["x", "s"], ["y"])], [stored("s", 10**6, 10**6)]),
    "Range": (
        [helper.make_node("Range", ["a", "b", "c"], ["y"])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in zip("abc", (0, TRILLION, 1), strict=True)],
    ),
    "Pad": ([helper.make_node("Pad", ["x", "s"], ["y"])], [stored("s", 0, TRILLION, 0, 0)]),
    "Resize": (
        [helper.make_node("Resize", ["x", "", "s"], ["y"])],
        [stored("s", 1e6, 1e6, kind=np.float32)],
    ),
    "RandomNormal": (
        [helper.make_node("RandomNormal", [], ["big"], shape=[TRILLION, 4]), helper.make_node("Add", ["x", "big"], ["y"])],
        [],
    ),
    "RandomUniform": (
        [helper.make_node("RandomUniform", [], ["big"], shape=[10**5] * 4), helper.make_node("Add", ["x", "big"], ["y"])],
        [],
    ),
}


@pytest.mark.parametrize("operator", ASKING)
@pytest.mark.parametrize("as_node", [False, True], ids=["initialiser", "constant"])
def test_a_node_that_asks_for_terabytes_is_refused(operator: str, as_node: bool, refused: Callable) -> None:
    nodes, initialisers = ASKING[operator]
    constants = [helper.make_node("Constant", [], [value.name], value=value) for value in initialisers] if as_node else []
    content = model([*constants, *nodes], [] if as_node else initialisers).SerializeToString()
    assert len(content) < 1_000
    with within():
        refused({"model.onnx": content}, rf"\({operator}\) that asks for [14]e\+[12]. numbers")


def test_a_declared_shape_of_terabytes_is_refused(refused: Callable) -> None:
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    content.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [TRILLION, TRILLION]))
    refused({"model.onnx": content.SerializeToString()}, "a value of a declared shape that asks for")


def test_a_sparse_tensor_of_terabytes_is_refused(refused: Callable) -> None:
    content = model([helper.make_node("MatMul", ["x", "w"], ["y"])])
    sparse = content.graph.sparse_initializer.add(dims=[4, TRILLION])
    sparse.values.CopyFrom(stored("w", 1.0, kind=np.float32))
    sparse.indices.CopyFrom(stored("", 1))
    refused({"model.onnx": content.SerializeToString()}, "the sparse tensor 'w' that asks for")


def test_a_tensor_larger_than_its_bytes_is_refused(refused: Callable) -> None:
    weight = stored("w", 1.0, kind=np.float32)
    weight.dims[:] = [TRILLION]
    with within():
        refused(
            {"model.onnx": model([helper.make_node("Add", ["x", "w"], ["y"])], [weight]).SerializeToString()}, "invalid graph"
        )


def test_a_cycle_is_refused(refused: Callable) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes.append(helper.make_node("Identity", ["b"], ["y"]))
    refused({"model.onnx": model(nodes).SerializeToString()}, "not output of any previous nodes|topologically sorted")


def test_a_node_that_reads_itself_is_refused(refused: Callable) -> None:
    refused(
        {"model.onnx": model([helper.make_node("Add", ["x", "y"], ["y"])]).SerializeToString()},
        "not output of any previous nodes|topologically sorted",
    )


def test_a_graph_of_too_many_parts_is_refused(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_MOST_MESSAGES", 1_000)
    names = ["x", *(f"v{index}" for index in range(999)), "y"]
    nodes = [helper.make_node("Relu", [one], [other]) for one, other in itertools.pairwise(names)]
    refused({"model.onnx": model(nodes).SerializeToString()}, "more than 1000 parts")


def test_a_long_chain_is_checked_in_time(tmp_path: Path) -> None:
    """Each node reads the last one twice: paths double with every node, and are not counted one by one."""
    names = ["x", *(f"v{index}" for index in range(20_000)), "y"]
    nodes = [helper.make_node("Add", [one, one], [other]) for one, other in itertools.pairwise(names)]
    (tmp_path / "model.onnx").write_bytes(model(nodes).SerializeToString())
    with within(seconds=60):
        assert inspect(tmp_path).findings == ()


def nested_branches(depth: int) -> onnx.ModelProto:
    """If within If within If."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    for _ in range(depth):
        node = helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner)
        del node.attribute[1]
        inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    return model(list(inner.node))


def test_graphs_within_graphs_are_refused(refused: Callable) -> None:
    with within():
        refused({"model.onnx": nested_branches(20).SerializeToString()}, "an invalid graph")


def test_messages_nested_without_end_are_refused(refused: Callable) -> None:
    """Graph in attribute in node in graph, written by hand: 10,000 levels."""
    content = b""
    for level in range(10_000):
        tag = (b"\x3a", b"\x0a", b"\x2a", b"\x32")[level % 4]  # model.graph, graph.node, node.attribute, attribute.g
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        content = tag + length + bytes([size]) + content
    with within():
        refused({"model.onnx": b"\x08\x0a" + content}, "model.onnx: found")


# ------------------------------------------------------------------------------------------------------------- pt2


def asking(target: str, *arguments: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = f"torch.ops.aten.{target}"
        node["inputs"] = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]

    return change


def declared(program: dict[str, Any]) -> None:
    sizes = program["graph_module"]["graph"]["tensor_values"]["relu"]["sizes"]
    sizes[1:] = [{"as_int": 10**6}, {"as_int": 10**6}, {"as_int": 10**6}]


SIZE = {"as_ints": [10**6, 10**7]}
TENSOR_X = {"as_tensor": {"name": "x"}}


@pytest.mark.parametrize(
    "change",
    [
        asking("zeros.default", SIZE),
        asking("full.default", SIZE, {"as_float": 1.0}),
        asking("rand.default", SIZE),
        asking("new_ones.default", TENSOR_X, SIZE),
        asking("new_full.default", TENSOR_X, SIZE, {"as_int": 1}),
        asking("randint.default", {"as_int": 2}, SIZE),
        asking("pad.default", TENSOR_X, {"as_ints": [10**13, 0]}, {"as_string": "constant"}),
        asking("expand.default", TENSOR_X, SIZE),
        asking("repeat.default", TENSOR_X, SIZE),
        asking("arange.default", {"as_int": 10**13}),
        asking("constant_pad_nd.default", TENSOR_X, {"as_ints": [10**13, 0]}),
        asking("upsample_nearest2d.default", TENSOR_X, SIZE),
        asking("zeros.default", {"as_sym_ints": [{"as_int": 10**6}, {"as_int": 10**7}]}),
        declared,
    ],
)
def test_a_program_that_asks_for_terabytes_is_refused(
    change: Callable[[dict[str, Any]], None], edited_graph: Callable, refused: Callable
) -> None:
    with within():
        refused({"model.pt2": edited_graph(change)}, r"a tensor of 1e\+1[38] numbers, more than the limit")


def test_text_nested_without_end_is_refused(rewritten: Callable, edited_graph: Callable, refused: Callable) -> None:
    deep = b"[" * 500_000 + b"]" * 500_000
    with within():
        refused({"model.pt2": rewritten({"models/model.json": deep})}, "no readable JSON")


def test_a_number_without_end_is_refused(rewritten: Callable, refused: Callable) -> None:
    with within():
        refused(
            {"model.pt2": rewritten({"models/model.json": b'{"a": ' + b"9" * 1_000_000 + b"}"})}, "no readable JSON|not allowed"
        )


# ------------------------------------------------------------------------------------------------------------ yaml


@pytest.mark.parametrize(
    "content",
    [
        b"flavors: " + b"[" * 60_000,
        b"flavors: " + b"{a: " * 40_000,
        b"\n".join(b" " * depth + b"a:" for depth in range(700)),
        b"a: &a [x, x]\n" + b"\n".join(b"%c: &%c [*%c, *%c]" % (c + 1, c + 1, c, c) for c in range(97, 121)),
        b"flavors: " + b"9" * 200_000,
        b"flavors: 190:20:30:" + b"59:" * 60_000 + b"1",
        b"? " * 100_000,
    ],
    ids=["lists", "mappings", "indentation", "aliases", "number", "sexagesimal", "keys"],
)
def test_an_mlmodel_that_grows_or_nests_is_refused(content: bytes, tiny_pt2: bytes, refused: Callable) -> None:
    with within(seconds=60):
        refused({"MLmodel": content, "data/model.pt2": tiny_pt2}, "MLmodel|cannot read")


def test_a_signature_that_nests_is_refused(tiny_pt2: bytes, refused: Callable) -> None:
    document = {
        "flavors": {
            "python_function": {"loader_module": "mlflow.pytorch", "data": "data"},
            "pytorch": {"model_data": "data", "code": None},
        },
        "signature": {"inputs": "[" * 100_000},
    }
    with within():
        refused({"MLmodel": json.dumps(document).encode(), "data/model.pt2": tiny_pt2}, "more than 100 nested brackets")


@pytest.mark.parametrize("value", [-np.inf, np.inf, -1e30, 1e12])
@pytest.mark.parametrize("as_node", [False, True], ids=["initialiser", "constant"])
def test_what_an_onnx_node_fills_with_is_no_size(tmp_path: Path, value: float, as_node: bool) -> None:
    nodes = [
        helper.make_node("Pad", ["x", "p", "fill"], ["a"]),
        helper.make_node("ArgMax", ["a"], ["b"], axis=1, keepdims=0),
        helper.make_node("OneHot", ["b", "depth", "values"], ["y"]),
    ]
    stored_values = [
        stored("p", 0, 1, 0, 1),
        numpy_helper.from_array(np.float32(value), "fill"),
        stored("depth", 6),
        stored("values", 0.0, value, kind=np.float32),
    ]
    constants = [helper.make_node("Constant", [], [each.name], value=each) for each in stored_values] if as_node else []
    (tmp_path / "model.onnx").write_bytes(model([*constants, *nodes], [] if as_node else stored_values).SerializeToString())
    assert inspect(tmp_path).flavour == "onnx"


def test_what_a_program_fills_with_is_no_size(tmp_path: Path) -> None:
    class Filling(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            padded = nn.functional.pad(images, (0, 1, 0, 1), value=-1e30).amax(dim=(2, 3))
            whole = torch.full((3,), -(10**10)) + images.new_full((3,), -(2**40)) + torch.randint(-(10**10), 10**10, (3,))
            return padded + whole

    torch.export.save(torch.export.export(Filling(), (torch.rand(4, 3, 8, 8),)), tmp_path / "model.pt2")
    assert inspect(tmp_path).flavour == "pt2"


def test_an_ordinary_size_is_no_terabyte(tmp_path: Path) -> None:
    """The control: what exporters write passes."""
    nodes = [
        helper.make_node("Expand", ["x", "s"], ["a"]),
        helper.make_node("Pad", ["a", "p"], ["b"]),
        helper.make_node("Slice", ["b", "start", "end"], ["y"]),
    ]
    sizes = [stored("s", 1, 1, 4), stored("p", 0, 224, 224, 0, 224, 224), stored("start", 0), stored("end", 2**63 - 1)]
    (tmp_path / "model.onnx").write_bytes(model(nodes, sizes).SerializeToString())
    assert inspect(tmp_path).findings == ()
