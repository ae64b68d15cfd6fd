"""The ``MLmodel`` file: which flavour and which data file, and that opening it takes no code of the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import yaml

from audit_plugin.errors import IntakeError
from audit_plugin.intake.refusal import LOG_AGAIN, quoted, refusal
from audit_plugin.intake.structure import MalformedError, array, integer, optional, parse_json, record, text
from audit_plugin.types import IntakeFinding, Signature

MLMODEL = "MLmodel"
PICKLE_MODULE = "mlflow.pytorch.pickle_module"

_LARGEST = 256 * 1024
_DEEPEST = 100
_LOADERS = {"pytorch": "mlflow.pytorch", "onnx": "mlflow.onnx"}
_DATA_KEYS = {"pytorch": "model_data", "onnx": "data"}
_CODE_KEYS = ("code", "code_paths", "model_code_path")
_IGNORED_OPTIONS = ("providers", "onnx_session_options")

_tensor_list = array(
    record(
        {
            "type": text("tensor"),
            "tensor-spec": record({"dtype": text(r"[a-z]+[0-9]*"), "shape": array(integer, 16)}),
        },
        {"name": optional(text(r"[^\x00-\x1f]*")), "required": lambda value: None},
    ),
    longest=1_000,
)


@dataclass(frozen=True)
class Declaration:
    """What an MLmodel declares: the flavour in MLflow's words, and where its data lies, relative to the folder."""

    flavour: Literal["pytorch", "onnx"]
    data: str
    signature: Signature | None
    findings: tuple[IntakeFinding, ...]


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML without what MLflow never writes: aliases (which can grow without bound) and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        built: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(built) != len(node.value):
            raise yaml.YAMLError("a duplicate key")
        return built


def read_mlmodel(content: bytes) -> Declaration:
    """Parse and check an MLmodel file.

    Raises:
        IntakeError: when it is no plain YAML, when its loader is not MLflow's own for its single flavour, when it
        brings code,
            when its two loaders would open different data, or when its signature is malformed.
    """
    document = _parse(content)
    flavours = document.get("flavors")
    if not isinstance(flavours, dict) or not all(isinstance(entry, dict) for entry in flavours.values()):
        raise _refused("no flavors", "nothing says which file holds the model")
    _check_no_code(document, flavours)
    flavour = _single_flavour(flavours)
    data = flavours[flavour].get(_DATA_KEYS[flavour])
    generic = flavours.get("python_function", {})
    if not isinstance(data, str) or (generic and generic.get("data") != data):
        raise _refused(
            f"the data {quoted(data)} for {flavour} and {quoted(generic.get('data'))} for python_function",
            "the audited file would not be the one that every loader opens",
        )
    findings = tuple(
        IntakeFinding(MLMODEL, f"{flavour} {option} are ignored: a model must not choose how it is run")
        for option in _IGNORED_OPTIONS
        if flavours[flavour].get(option)
    )
    signature, signature_findings = _read_signature(document.get("signature"))
    return Declaration(flavour, data, signature, findings + signature_findings)


def _parse(content: bytes) -> dict[str, Any]:
    if len(content) > _LARGEST:
        raise _refused(f"{len(content)} bytes", f"an MLmodel file has at most {_LARGEST}")
    if _deepest(content) > _DEEPEST:
        raise _refused(f"more than {_DEEPEST} nested brackets", "reading them would take for ever")
    try:
        document = yaml.load(content, Loader=_StrictLoader)  # noqa: S506 (it is a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise _refused("no plain YAML", "MLflow's reader may see something else in it") from error
    if not isinstance(document, dict):
        raise _refused("no mapping", "nothing says which file holds the model")
    return document


def _deepest(content: bytes) -> int:
    """How deep brackets are nested, those in quotation marks included: PyYAML's time grows with the square of it."""
    opened = np.frombuffer(content, np.uint8)
    steps = np.isin(opened, list(b"[{")).astype(np.int64) - np.isin(opened, list(b"]}"))
    return int(np.cumsum(steps).max(initial=0))


def _check_no_code(document: Mapping[str, Any], flavours: Mapping[str, Any]) -> None:
    for place in (document, *flavours.values()):
        for key in _CODE_KEYS:
            if place.get(key) is not None:
                raise refusal(
                    MLMODEL,
                    f"{key}: {quoted(place[key])}",
                    "MLflow imports such code when it loads the model",
                    "Log the model without code_paths; a .pt2 or ONNX model needs none.",
                )


def _single_flavour(flavours: Mapping[str, Any]) -> Literal["pytorch", "onnx"]:
    loader = flavours.get("python_function", {}).get("loader_module")
    if loader is not None and loader not in _LOADERS.values():
        raise refusal(
            MLMODEL,
            f"loader_module {quoted(loader)}",
            "MLflow imports and runs it; only mlflow.pytorch and mlflow.onnx can be audited",
            LOG_AGAIN,
        )
    match sorted(str(name) for name in flavours if name != "python_function"):
        case ["pytorch"] if loader in (None, _LOADERS["pytorch"]):
            return "pytorch"
        case ["onnx"] if loader in (None, _LOADERS["onnx"]):
            return "onnx"
        case found:
            raise refusal(
                MLMODEL,
                f"the flavours {', '.join(map(quoted, found)) or 'none'} with loader_module {quoted(loader)}",
                "exactly one of pytorch and onnx can be audited, with its own loader",
                LOG_AGAIN,
            )


def _read_signature(declared: object) -> tuple[Signature | None, tuple[IntakeFinding, ...]]:
    if declared is None:
        return None, ()
    if not isinstance(declared, dict):
        raise _refused("a signature that is no mapping", "the input shape cannot be trusted")
    inputs, outputs = (_read_tensors(declared.get(key)) for key in ("inputs", "outputs"))
    if inputs is None or len(inputs) != 1:
        return None, (IntakeFinding(MLMODEL, "the signature is not that of one tensor input, so it is ignored"),)
    input_shape, input_dtype = inputs[0]
    return Signature(input_shape, input_dtype, outputs[0][0] if outputs and len(outputs) == 1 else None), ()


def _read_tensors(specification: object) -> list[tuple[tuple[int, ...], str]] | None:
    """Shape and dtype of each tensor; None when there is no specification or when it describes columns."""
    if specification is None:
        return None
    try:
        parsed: Any = parse_json(specification.encode() if isinstance(specification, str) else b"", _LARGEST)
        if isinstance(parsed, list) and any(isinstance(entry, dict) and "tensor-spec" not in entry for entry in parsed):
            return None
        _tensor_list(parsed)
    except (MalformedError, UnicodeEncodeError) as error:
        raise _refused(f"a malformed signature ({error})", "the input shape cannot be trusted") from error
    return [(tuple(entry["tensor-spec"]["shape"]), entry["tensor-spec"]["dtype"]) for entry in parsed]


def _refused(found: str, reason: str) -> IntakeError:
    return refusal(MLMODEL, found, reason, LOG_AGAIN)
