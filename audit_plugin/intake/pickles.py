"""What a torch pickle would build, found out without building it.

A pickle is a program for a stack machine whose instructions can call any function. The machine here knows the few
instructions that tensors, parameters and plain containers need, and four functions that it imitates instead of calling;
at anything else it stops. Following the program (instead of only listing its instructions) resolves names that are
assembled on the stack.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from audit_plugin.errors import IntakeError
from audit_plugin.intake.archive import Archive, read_archive
from audit_plugin.intake.refusal import LARGEST_VALUE, quoted, refusal

PICKLE_MAGIC = b"\x80"

_BYTES_BY_STORAGE = {
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.ShortStorage": 2,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.IntStorage": 4,
    "torch.FloatStorage": 4,
    "torch.LongStorage": 8,
    "torch.DoubleStorage": 8,
}
_CALLABLES = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_LARGEST_PROGRAM = 64 * 1024**2
_SAVE_PLAINLY = "Save plain tensors: torch.save(model.state_dict(), path), or log a .pt2 with mlflow.pytorch.log_model."


@dataclass(frozen=True)
class PickledStorage:
    """A buffer of ``count`` elements of ``item_bytes`` bytes in the archive member ``data/<key>``."""

    key: str
    count: int
    item_bytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor over a storage; nothing was allocated."""

    storage: PickledStorage
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Function:
    name: str


class _Mark:
    """Where a tuple, or a run of items, starts on the stack."""


class ForbiddenGlobalError(IntakeError):
    """The pickle names a function or class that tensors do not need: it is a whole module, or an attack."""


def read_torch_file(path: str, data: memoryview) -> object:
    """The inert contents of a file written by ``torch.save`` (its ZIP format).

    Returns:
        Nested dicts, lists, tuples, numbers, strings and ``PickledTensor``.

    Raises:
        ForbiddenGlobalError: when it names any function or class but those of plain tensors and ``OrderedDict``.
        IntakeError: when it is damaged, in the old format, TorchScript, or uses instructions that tensors do not need.
    """
    if bytes(data[:1]) == PICKLE_MAGIC:
        raise refusal(path, "a bare pickle (torch's format before 1.6)", "a pickle can run any code", _SAVE_PLAINLY)
    return read_torch_archive(path, read_archive(path, data))


def read_torch_archive(path: str, archive: Archive) -> object:
    """:func:`read_torch_file` for an archive that is already split into members."""
    for name in archive.members:
        plain = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
        if name not in plain and not name.removeprefix("data/").isdigit():
            # torch.load hands an archive with TorchScript members to torch.jit.load, whatever it was asked for.
            raise refusal(path, f"the member {quoted(name)}", "torch.save of tensors writes none like it", _SAVE_PLAINLY)
    if "data.pkl" not in archive.members:
        raise refusal(path, "an archive without data.pkl", "torch.save always writes one", _SAVE_PLAINLY)
    if bytes(archive.members.get("byteorder", b"little")) != b"little":
        raise refusal(path, "big-endian tensors", "they cannot be read here", "Save the model on a little-endian machine.")
    return _Machine(path, archive).run(bytes(archive.members["data.pkl"][:_LARGEST_PROGRAM]))


def leaves(value: object) -> Iterator[object]:
    """Every number, string and tensor inside nested containers, keys included; shared parts once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list | tuple):
            if id(part) not in seen:
                seen.add(id(part))
                waiting.extend([*part.keys(), *part.values()] if isinstance(part, dict) else part)
        else:
            yield part


class _Machine:
    """Follows one pickle. ``path`` is only for messages."""

    def __init__(self, path: str, archive: Archive) -> None:
        self._path = path
        self._archive = archive
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._instructions: dict[str, Callable[[object], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda argument: None),
            **dict.fromkeys(
                ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
                self._stack.append,
            ),
            "NONE": lambda argument: self._stack.append(None),
            "NEWTRUE": lambda argument: self._stack.append(True),
            "NEWFALSE": lambda argument: self._stack.append(False),
            "EMPTY_TUPLE": lambda argument: self._stack.append(()),
            "EMPTY_LIST": lambda argument: self._stack.append([]),
            "EMPTY_DICT": lambda argument: self._stack.append({}),
            "MARK": lambda argument: self._stack.append(_Mark()),
            "TUPLE": lambda argument: self._stack.append(tuple(self._since_mark())),
            "TUPLE1": lambda argument: self._stack.append(self._pop(1)),
            "TUPLE2": lambda argument: self._stack.append(self._pop(2)),
            "TUPLE3": lambda argument: self._stack.append(self._pop(3)),
            "APPEND": lambda argument: self._extend(list(self._pop(1))),
            "APPENDS": lambda argument: self._extend(self._since_mark()),
            "SETITEM": lambda argument: self._set_items(list(self._pop(2))),
            "SETITEMS": lambda argument: self._set_items(self._since_mark()),
            "GLOBAL": lambda argument: self._name(str(argument).replace(" ", ".", 1)),
            "STACK_GLOBAL": lambda argument: self._name(".".join(self._text(part) for part in self._pop(2))),
            "BINPERSID": lambda argument: self._stack.append(self._storage(*self._pop(1))),
            "REDUCE": lambda argument: self._stack.append(self._call(*self._pop(2))),
            "BUILD": lambda argument: self._build(*self._pop(1)),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._remember),
            "MEMOIZE": lambda argument: self._remember(len(self._memo)),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._recall),
        }

    def run(self, program: bytes) -> object:
        try:
            for opcode, argument, position in pickletools.genops(program):
                if opcode.name == "STOP":
                    if position != len(program) - 1:
                        raise self._refuse("bytes after the end of the pickle")
                    break
                if opcode.name not in self._instructions:
                    raise self._refuse(f"the pickle instruction {opcode.name}")
                self._instructions[opcode.name](argument)
        except (ValueError, TypeError, KeyError, IndexError, UnicodeError) as error:
            raise self._refuse("a pickle that no torch.save wrote") from error
        (result,) = self._pop(1)
        if self._stack or not isinstance(result, dict | tuple | list | PickledTensor):
            raise self._refuse("a pickle that builds neither tensors nor a container of tensors")
        return result

    def _refuse(self, found: str) -> IntakeError:
        return refusal(self._path, found, "a pickle is accepted only when it holds nothing but plain tensors", _SAVE_PLAINLY)

    def _name(self, name: str) -> None:
        if name not in _CALLABLES and name not in _BYTES_BY_STORAGE:
            message = refusal(
                self._path,
                f"a pickle that calls or builds {quoted(name)}",
                "unpickling it could run any code",
                _SAVE_PLAINLY,
            )
            raise ForbiddenGlobalError(*message.args)
        self._stack.append(_Function(name))

    def _call(self, function: object, arguments: object) -> object:
        match function, arguments:
            case _Function("collections.OrderedDict"), ():
                return OrderedDict[object, object]()
            case _Function("torch._utils._rebuild_tensor_v2"), (
                PickledStorage() as storage,
                offset,
                shape,
                stride,
                bool(),
                hooks,
            ):
                self._check_hooks(hooks)
                return self._tensor(storage, self._count(offset), self._counts(shape), self._counts(stride))
            case _Function("torch._utils._rebuild_parameter"), (PickledTensor() as tensor, bool(), hooks):
                self._check_hooks(hooks)
                return tensor
        raise self._refuse("a pickle that calls a function with arguments that no torch.save writes")

    def _check_hooks(self, hooks: object) -> None:
        if not isinstance(hooks, OrderedDict) or hooks:
            raise self._refuse("a tensor with hooks")

    def _tensor(self, storage: PickledStorage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> PickledTensor:
        if len(shape) != len(stride):
            raise self._refuse("a tensor whose shape and strides differ in length")
        count = math.prod(shape)
        if count > LARGEST_VALUE:  # strides of zero make it out of a few bytes
            raise refusal(
                self._path, f"a tensor of more than {LARGEST_VALUE} numbers", "no image classifier needs as many", _SAVE_PLAINLY
            )
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if count and last >= storage.count:
            raise self._refuse(f"a tensor of shape {shape}, more than its storage holds")
        return PickledTensor(storage, shape)

    def _storage(self, reference: object) -> PickledStorage:
        match reference:
            case ("storage", _Function(name), str(key), str(device), count) if name in _BYTES_BY_STORAGE and key.isdigit():
                storage = PickledStorage(key, self._count(count), _BYTES_BY_STORAGE[name])
                kind, _, index = device.partition(":")
                record = self._archive.members.get(f"data/{key}", memoryview(b""))
                if kind in ("cpu", "cuda", "mps") and (index.isdigit() or not index):
                    if storage.count * storage.item_bytes <= len(record):
                        return storage
                    raise self._refuse(f"a storage of {storage.count} elements, more than the file holds")
        raise self._refuse("a reference to a storage that no torch.save writes")

    def _build(self, state: object) -> None:
        # A state_dict carries the versions of its modules as an attribute; on a plain OrderedDict this only fills
        # __dict__.
        if not isinstance(self._stack[-1], OrderedDict) or not isinstance(state, dict) or set(state) != {"_metadata"}:
            raise self._refuse("an object with a state of its own")

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise self._refuse("items added to something else than a list")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise self._refuse("items added to something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self._refuse(f"a dict key of type {type(key).__name__}")
            target[key] = value

    def _remember(self, index: object) -> None:
        self._memo[self._count(index)] = self._stack[-1]

    def _recall(self, index: object) -> None:
        self._stack.append(self._memo[self._count(index)])

    def _pop(self, count: int) -> tuple[object, ...]:
        if len(self._stack) < count or any(isinstance(value, _Mark) for value in self._stack[-count:]):
            raise self._refuse("a pickle that takes more values than it has")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _since_mark(self) -> list[object]:
        for position in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[position], _Mark):
                values = self._stack[position + 1 :]
                del self._stack[position:]
                return values
        raise self._refuse("a pickle that closes a tuple it never opened")

    def _counts(self, values: object) -> tuple[int, ...]:
        if not isinstance(values, tuple):
            raise self._refuse("a tensor whose shape is no tuple")
        return tuple(self._count(value) for value in values)

    def _count(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._refuse("something else where a pickle of tensors has a non-negative integer")
        return value

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            raise self._refuse("a name that is no text")
        return value
