"""Frozen results as plain data: JSON, with the arrays beside it in an ``.npz``. Never a pickle, so that what an untrusted process
wrote can be read.

Reading builds nothing but the dataclass that was asked for, field by field, each of its declared type.
"""

from __future__ import annotations

import enum
import json
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import cattrs
import numpy as np
from cattrs.errors import CattrsError
from cattrs.strategies import configure_tagged_union

from audit_plugin.types import Measurement, Outcome

RECORD_FILE, ARRAYS_FILE = "record.json", "arrays.npz"
LARGEST_RECORD_BYTES = 256 * 1024**2
LARGEST_ARRAYS_BYTES = 1024**3

_Record = TypeVar("_Record")


class RecordError(ValueError):
    """What was read is no record of the wanted type."""


def write_record(value: object, folder: Path) -> None:
    """Write a dataclass into ``folder``, which is made if missing: ``record.json`` and ``arrays.npz``."""
    arrays: dict[str, np.ndarray] = {}

    def keep(array: np.ndarray) -> str:
        name = f"array{len(arrays)}"
        arrays[name] = array
        return name

    content = json.dumps(_converter(keep, _array).unstructure(value), default=_plain)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / ARRAYS_FILE, allow_pickle=False, **arrays)
    (folder / RECORD_FILE).write_text(content, encoding="utf-8")


def read_record(kind: type[_Record], folder: Path) -> _Record:
    """The dataclass ``kind`` that :func:`write_record` wrote into ``folder``.

    Raises:
        RecordError: it is missing, too large, or something else; the message quotes nothing of it.
    """
    try:
        with _open_arrays(folder / ARRAYS_FILE) as arrays:
            converter = _converter(str, lambda name, declared: _array(name, declared, arrays))
            if (folder / RECORD_FILE).stat().st_size > LARGEST_RECORD_BYTES:
                raise RecordError(f"{RECORD_FILE} is larger than {LARGEST_RECORD_BYTES} bytes")
            return converter.structure(json.loads((folder / RECORD_FILE).read_bytes()), kind)
    except RecordError:
        raise
    except (
        AttributeError,
        KeyError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        CattrsError,
    ) as error:
        raise RecordError(f"no {kind.__name__} could be read ({type(error).__name__})") from error


def _converter(keep: Callable[[np.ndarray], str], find: Callable[[Any, Any], np.ndarray]) -> cattrs.Converter:
    """``keep`` puts an array aside and names it; ``find`` gives it back by name and declared type."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
    converter.register_unstructure_hook_func(_is_array, keep)
    converter.register_structure_hook_func(_is_array, find)
    for primitive in (bool, int, float, str):
        converter.register_structure_hook(primitive, _exactly)
    converter.register_structure_hook(Path, lambda value, _: Path(_exactly(value, str)))
    converter.register_unstructure_hook(Path, str)
    for union in (Measurement, Outcome):
        configure_tagged_union(union, converter)
    return converter


def _exactly(value: Any, kind: type) -> Any:
    """cattrs would convert; what is no number must not become one."""
    if issubclass(kind, enum.StrEnum):
        return kind(_exactly(value, str))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _is_array(declared: Any) -> bool:
    return declared is np.ndarray or get_origin(declared) is np.ndarray


def _array(name: Any, declared: Any, arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})) -> np.ndarray:
    array: np.ndarray = arrays[_exactly(name, str)]
    wanted = get_args(get_args(declared)[1])[0] if get_args(declared) else None
    if wanted is not None and array.dtype.kind != np.dtype(wanted).kind:
        raise TypeError(f"expected an array of {np.dtype(wanted)}")
    return array


def _open_arrays(file: Path) -> Any:
    """The arrays of an ``.npz``, as numpy writes them: nothing compressed, so that nothing is larger than the file."""
    if file.stat().st_size > LARGEST_ARRAYS_BYTES:
        raise RecordError(f"{ARRAYS_FILE} is larger than {LARGEST_ARRAYS_BYTES} bytes")
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise RecordError(f"{ARRAYS_FILE} is compressed")
    return np.load(file, allow_pickle=False)


def _plain(value: object) -> object:
    """numpy's numbers among the facts of a measurement."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no plain value")
