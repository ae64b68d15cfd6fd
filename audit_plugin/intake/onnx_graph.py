"""An ONNX file: standard operators only, no code of its own, weights only from the model's own folder.

Every message of the file is visited, wherever it is nested, so a tensor cannot hide in a sub-graph, a sparse tensor or
an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from audit_plugin.errors import IntakeError
from audit_plugin.intake.refusal import printable, quoted, refusal
from audit_plugin.types import IntakeFinding

_LARGEST = 2**31 - 1  # protobuf's own limit
_STANDARD_DOMAINS = ("", "ai.onnx")
_BRANCHES = ("If", "Loop", "Scan")
_MEMORY_MARKER = "_ORT_MEM_ADDR_"
_ORT_FORMAT = b"ORTM"
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
_EXPORT_AGAIN = "Export the model again with torch.onnx.export(model, args, dynamo=True) and log it with mlflow.onnx.log_model."


def check_onnx(path: str, content: memoryview, folder: Path, sizes: Mapping[str, int]) -> tuple[IntakeFinding, ...]:
    """Check the ONNX file at ``path`` in ``folder``, whose files and their ``sizes`` were listed before.

    Returns:
        Branches and loops that depend on data: tolerated, but an architectural backdoor could be one.

    Raises:
        IntakeError: when it is no ONNX graph, larger than 2 GiB, uses operators of other domains, local functions or
        training graphs,
            reads weights from outside the folder or from memory, or fails onnx's own checker.
    """
    model = _parse(path, content)
    if model.functions or model.training_info:
        raise _refused(path, "local functions or training graphs", "a function can redefine a standard operator")
    findings = []
    for message in _messages(model):
        if len(UnknownFieldSet(message)):
            raise _refused(path, "fields that this version of onnx does not know", "the runtime could know them")
        if isinstance(message, onnx.NodeProto):
            findings += _check_node(path, message)
        elif isinstance(message, onnx.TensorProto):
            _check_tensor(path, message, sizes)
    try:
        onnx.checker.check_model(str(folder / path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise _refused(path, "an invalid graph", f"onnx's checker says: {reason[:300]}") from error
    return tuple(findings)


def _parse(path: str, content: memoryview) -> onnx.ModelProto:
    if len(content) > _LARGEST:
        raise _refused(path, f"{len(content)} bytes", "an ONNX file has at most 2 GiB; larger weights go into external data")
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
