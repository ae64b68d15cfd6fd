"""A ``.pt2`` file (PT2 archive of torch.export): which members it may have, and that each is inert.

``torch.export.load`` unpickles weights and constants marked so, custom and opaque objects, sample inputs and two legacy
formats, and opens compiled libraries under ``data/aotinductor``. None of these is allowed; the sample inputs, always
pickled, may only hold tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from audit_plugin.errors import IntakeError
from audit_plugin.intake import program
from audit_plugin.intake.archive import Archive
from audit_plugin.intake.pickles import leaves, read_torch_file
from audit_plugin.intake.program_flow import find_changed_state, find_program_paths
from audit_plugin.intake.refusal import LOG_AGAIN, printable, quoted, refusal
from audit_plugin.intake.structure import MalformedError, Rule, identifier, parse_json
from audit_plugin.types import IntakeFinding

CHANGES_STATE = "changes-own-state"
"""Code of the finding, and of the reason that keeps a model from passing: it could wait for its thousandth call."""

_LARGEST_JSON = 64 * 1024**2
_PROGRAM = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_FIXED = {
    "archive_format": re.compile(rb"pt2"),
    "archive_version": re.compile(rb"0"),
    "byteorder": re.compile(rb"little"),
    ".data/version": re.compile(rb"[0-9]{1,3}\n?"),
    ".data/serialization_id": re.compile(rb"[0-9]{1,64}"),
    ".format_version": re.compile(rb"[0-9]{1,3}\n?"),
    ".storage_alignment": re.compile(rb"[0-9]{1,6}\n?"),
}
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,9}")


def is_pt2(archive: Archive) -> bool:
    """Whether the archive calls itself a PT2 archive (a state_dict is an archive too)."""
    return "archive_format" in archive.members or _PROGRAM in archive.members


def check_pt2(path: str, archive: Archive) -> tuple[IntakeFinding, ...]:
    """Check every member of the archive.

    Returns:
        What was tolerated: a graph that changes its own weights when it runs, and what
        :mod:`audit_plugin.intake.data_flow` finds.

    Raises:
        IntakeError: for any member, value or name that a graph of plain tensors does not need.
    """
    _check_members(path, archive)
    graph_program: Any = _parsed(path, archive, _PROGRAM, program.exported_program)
    for configuration in (_WEIGHTS, _CONSTANTS):
        _check_tensors(path, archive, configuration, _parsed(path, archive, configuration, program.payload_config))
    inner = f"{path}!{_SAMPLE_INPUTS}"
    if archive.members[_SAMPLE_INPUTS]:
        _check_sample_inputs(inner, read_torch_file(inner, archive.members[_SAMPLE_INPUTS]))
    changed = _changed_state(graph_program)
    return (*([state_finding(path, changed)] if changed else []), *find_program_paths(path, graph_program))


def _check_members(path: str, archive: Archive) -> None:
    for name, content in archive.members.items():
        if name in _FIXED:
            if not _FIXED[name].fullmatch(bytes(content[:100])) or len(content) > 100:
                raise _refused(path, f"unexpected contents in {quoted(name)}")
        elif name not in (_PROGRAM, _SAMPLE_INPUTS, _WEIGHTS, _CONSTANTS) and not _TENSOR.fullmatch(name):
            raise _refused(path, f"the member {quoted(name)}, where compiled code, pickles or another model could hide")
    for name in ("archive_format", "archive_version", _PROGRAM, _SAMPLE_INPUTS, _WEIGHTS, _CONSTANTS):
        if name not in archive.members:
            raise _refused(path, f"no member {quoted(name)} (an old or damaged file; torch then tries formats that unpickle)")


def _parsed(path: str, archive: Archive, name: str, rule: Rule) -> object:
    try:
        value = parse_json(bytes(archive.members[name][: _LARGEST_JSON + 1]), _LARGEST_JSON)
        rule(value)
    except MalformedError as error:
        raise _refused(f"{path}!{name}", str(error)) from error
    return value


def _check_tensors(path: str, archive: Archive, configuration: str, parsed: Any) -> None:
    """Every tensor lies inside its record; tensors that share a record agree about its type."""
    folder = configuration.rpartition("/")[0]
    dtypes: dict[str, int] = {}
    for name, entry in parsed["config"].items():
        record_name = f"{folder}/{entry['path_name']}"
        metadata = entry["tensor_meta"]
        if record_name not in archive.members:
            raise _refused(path, f"the tensor {quoted(name)} without its record {quoted(record_name)}")
        if dtypes.setdefault(record_name, metadata["dtype"]) != metadata["dtype"]:
            raise _refused(path, f"the tensor {quoted(name)}, which reads a record as another type than its neighbour")
        if not _fits(metadata, len(archive.members[record_name])):
            raise _refused(path, f"the tensor {quoted(name)}, larger than its record {quoted(record_name)}")


def _fits(metadata: Mapping[str, Any], available_bytes: int) -> bool:
    sizes: list[int] = [size["as_int"] for size in metadata["sizes"]]
    strides: list[int] = [stride["as_int"] for stride in metadata["strides"]]
    offset: int = metadata["storage_offset"]["as_int"]
    if len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
        return False
    available = available_bytes // program.DTYPE_BYTES[metadata["dtype"]]
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    return count == 0 or (last < available and count <= available)


def _check_sample_inputs(path: str, value: object) -> None:
    """((inputs, ...), {name: input}), where names are identifiers, because they become part of executed guards."""
    match value:
        case (tuple(), dict()):
            for leaf in leaves(value):
                if isinstance(leaf, str):
                    _check_identifier(path, leaf)
        case _:
            raise _refused(path, "sample inputs that are no pair of positional and named inputs")


def _check_identifier(path: str, name: str) -> None:
    try:
        identifier(name)
    except MalformedError as error:
        raise _refused(path, str(error)) from error


def state_finding(path: str, changed: Sequence[str]) -> IntakeFinding:
    """What is said of a model that changes ``changed``, the names of parameters, buffers or constants."""
    listed = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    cause = "it was exported in training mode, or it counts its calls"
    message = f"the model changes its own state when it runs ({listed}): {cause}; what it answers later was not audited"
    return IntakeFinding(path, printable(message), CHANGES_STATE)


def _changed_state(graph_program: Any) -> list[str]:
    declared = [
        spec[kind][f"{kind.removesuffix('_mutation')}_name"]
        for spec in graph_program["graph_module"]["signature"]["output_specs"]
        for kind in ("buffer_mutation", "parameter_mutation")
        if kind in spec
    ]
    return list(dict.fromkeys((*find_changed_state(graph_program), *declared)))


def _refused(path: str, found: str) -> IntakeError:
    return refusal(path, found, "torch.export.load could run code or read out of bounds", LOG_AGAIN)
