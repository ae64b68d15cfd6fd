"""An ONNX file: standard operators only, no code of its own, weights only from the model's own folder.

Every message of the file is visited, wherever it is nested, so a tensor cannot hide in a sub-graph, a sparse tensor or
an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
from numpy.typing import NDArray

from audit_plugin.errors import IntakeError
from audit_plugin.intake.onnx_flow import find_onnx_paths
from audit_plugin.intake.refusal import LARGEST_VALUE, printable, quoted, refusal
from audit_plugin.types import IntakeFinding

_LARGEST = 2**31 - 1  # protobuf's own limit
_MOST_MESSAGES = 2_000_000  # a node has about ten
_STANDARD_DOMAINS = ("", "ai.onnx")
_BRANCHES = ("If", "Loop", "Scan")
_MEMORY_MARKER = "_ORT_MEM_ADDR_"
_ORT_FORMAT = b"ORTM"
_NUMBERS = (
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT8,
)
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT16: 16,
    onnx.TensorProto.INT16: 16,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.UINT32: 32,
    onnx.TensorProto.UINT64: 64,
    onnx.TensorProto.BFLOAT16: 16,
}
# Operators that make a value as large as some of their operands say, which are listed by place, or their attributes: by the
# product of the numbers, or by the largest. The others hold values, such as what Pad fills with.
_SIZED_BY_PRODUCT: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Tile": (1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "RandomNormal": (),
    "RandomUniform": (),
}
_SIZED_BY_LARGEST: dict[str, tuple[int, ...]] = {
    "Range": (0, 1, 2),
    "Pad": (1,),
    "OneHot": (1,),
    "CenterCropPad": (1,),
    "HannWindow": (0,),
    "HammingWindow": (0,),
    "BlackmanWindow": (0,),
}
_SIZES = ("pads", "paddings", "scales", "shape")  # of attributes
_MOST_DIMENSIONS = 64
_EXPORT_AGAIN = "Export the model again with torch.onnx.export(model, args, dynamo=True) and log it with mlflow.onnx.log_model."


def check_onnx(path: str, content: memoryview, folder: Path, sizes: Mapping[str, int]) -> tuple[IntakeFinding, ...]:
    """Check the ONNX file at ``path`` in ``folder``, whose files and their ``sizes`` were listed before.

    Returns:
        Branches and loops, and what :mod:`audit_plugin.intake.data_flow` finds: tolerated, but possibly an architectural
        backdoor.

    Raises:
        IntakeError: when it is no ONNX graph, larger than 2 GiB, uses operators of other domains, local functions or
        training graphs,
            reads weights from outside the folder or from memory, or fails onnx's own checker.
    """
    model = _parse(path, content)
    if model.functions or model.training_info:
        raise _refused(path, "local functions or training graphs", "a function can redefine a standard operator")
    findings = []
    constants: dict[str, NDArray[Any]] = {}
    for count, message in enumerate(_messages(model), start=1):
        if count > _MOST_MESSAGES:
            raise _refused(path, f"more than {_MOST_MESSAGES} parts", "no image classifier needs as many")
        if len(UnknownFieldSet(message)):
            raise _refused(path, "fields that this version of onnx does not know", "the runtime could know them")
        if isinstance(message, onnx.NodeProto):
            findings += _check_node(path, message)
        elif isinstance(message, onnx.TensorProto):
            _check_tensor(path, message, sizes)
        elif isinstance(message, onnx.SparseTensorProto):
            _check_size(path, f"the sparse tensor {quoted(message.values.name)}", math.prod(message.dims))
        elif isinstance(message, onnx.TensorShapeProto):
            _check_size(path, "a value of a declared shape", math.prod(max(size.dim_value, 1) for size in message.dim))
    for message in _messages(model):
        if isinstance(message, onnx.GraphProto):
            constants |= _constants(message)
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            _check_asked(path, message, constants)
    try:
        onnx.checker.check_model(str(folder / path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise _refused(path, "an invalid graph", f"onnx's checker says: {reason[:300]}") from error
    return (*findings, *find_onnx_paths(path, model.graph))


def _parse(path: str, content: memoryview) -> onnx.ModelProto:
    if len(content) > _LARGEST:
        raise _refused(path, f"{len(content)} bytes", "an ONNX file has at most 2 GiB, and larger models cannot be audited")
    if bytes(content[4:8]) == _ORT_FORMAT:
        raise _refused(path, "ONNX Runtime's own format", "it cannot be checked")
    model = onnx.ModelProto()
    try:
        # Not onnx.load: it would choose the parser by the file's extension.
        model.ParseFromString(bytes(content))
    except (DecodeError, ValueError) as error:
        raise _refused(path, "no ONNX graph", "the file is damaged or something else") from error
    if not model.HasField("graph") or not model.graph.node:
        raise _refused(path, "no ONNX graph", "the file is damaged or something else")
    return model


def _messages(root: Message) -> Iterator[Message]:
    """``root`` and every message inside it."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if isinstance(value, Message) else value)


def _check_node(path: str, node: onnx.NodeProto) -> list[IntakeFinding]:
    if node.domain not in _STANDARD_DOMAINS:
        operator = quoted(f"{node.domain}.{node.op_type}")
        raise _refused(path, f"the operator {operator}", "only standard ONNX operators can be checked; others are native code")
    if node.op_type not in _BRANCHES:
        return []
    message = f"node {quoted(node.name)} is {node.op_type}: a data-dependent branch, possibly an architectural backdoor"
    return [IntakeFinding(path, printable(message))]


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """The short constants of a graph, by name: among them are the sizes of what its nodes make."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t") and node.output:
                stored[node.output[0]] = attribute.t
            elif node.op_type == "Constant" and node.output:
                value = attribute.ints or attribute.floats or [attribute.i, attribute.f]
                stored[node.output[0]] = onnx.numpy_helper.from_array(np.array(value[:_MOST_DIMENSIONS], np.float64))
    return {
        name: onnx.numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if math.prod(tensor.dims) <= _MOST_DIMENSIONS and tensor.data_type in _NUMBERS and not tensor.external_data
    }


def _check_asked(path: str, node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a node that makes a giant value out of a few bytes; what it computes from other values is not known here."""
    places = (_SIZED_BY_PRODUCT | _SIZED_BY_LARGEST).get(node.op_type)
    if places is None:
        return
    operands = (name for place, name in enumerate(node.input) if place in places)
    asked = [constants[name].reshape(-1).tolist() for name in operands if name in constants]
    asked += [list(attribute.ints) or list(attribute.floats) for attribute in node.attribute if attribute.name in _SIZES]
    for values in asked:
        counts = [abs(value) for value in values if abs(value) > 1]
        size = math.prod(counts) if node.op_type in _SIZED_BY_PRODUCT else max(counts, default=0)
        _check_size(path, f"the node {quoted(node.name)} ({node.op_type})", size)


def _check_size(path: str, what: str, size: float) -> None:
    if not size <= LARGEST_VALUE:
        raise _refused(path, f"{what} that asks for {size:.3g} numbers", f"the limit is {LARGEST_VALUE}")


def _check_tensor(path: str, tensor: onnx.TensorProto, sizes: Mapping[str, int]) -> None:
    name = quoted(tensor.name)
    if any(dimension < 0 for dimension in tensor.dims):
        raise _refused(path, f"the tensor {name} with a negative size", "its bounds cannot be checked")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.external_data:
            raise _refused(path, f"the tensor {name}, stored twice", "readers could choose different contents")
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not entries.keys() <= _EXTERNAL_KEYS:
        raise _refused(path, f"the tensor {name} with unusual external data keys", "readers could choose different ones")
    _check_location(path, name, entries, tensor, sizes)


def _check_location(path: str, name: str, entries: Mapping[str, str], tensor: onnx.TensorProto, sizes: Mapping[str, int]) -> None:
    location = entries.get("location", "")
    if _MEMORY_MARKER in location:
        raise _refused(path, f"the tensor {name} at the memory address {quoted(location)}", "it would read the auditor's memory")
    parts = PurePosixPath(location).parts
    if not location or location != "/".join(parts) or ".." in parts or location.startswith("/") or set(location) & set("\\:\0"):
        raise _refused(path, f"the tensor {name} in {quoted(location)}", "external data must lie in the model's own folder")
    file = str(PurePosixPath(path).parent / location)
    if file not in sizes:
        raise _refused(path, f"the tensor {name} in {quoted(location)}", "the model's folder holds no such file")
    needed = math.ceil(math.prod(tensor.dims) * _bits(path, tensor) / 8)
    offset, length = (_count(path, name, entries.get(key, "")) for key in ("offset", "length"))
    if length is not None and length != needed:
        raise _refused(path, f"the tensor {name} of {needed} bytes stored in {length}", "it would be read out of bounds")
    if (offset or 0) + needed > sizes[file]:
        raise _refused(path, f"the tensor {name} beyond the end of {quoted(file)}", "it would be read out of bounds")


def _bits(path: str, tensor: onnx.TensorProto) -> int:
    if tensor.data_type not in _BITS:
        raise _refused(path, f"external data of type {tensor.data_type}", "its size cannot be checked")
    return _BITS[tensor.data_type]


def _count(path: str, name: str, digits: str) -> int | None:
    if not digits:
        return None
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise _refused(path, f"the tensor {name} at {quoted(digits)}", "offset and length are plain numbers")
    return int(digits)


def _refused(path: str, found: str, reason: str) -> IntakeError:
    return refusal(path, found, reason, _EXPORT_AGAIN)
