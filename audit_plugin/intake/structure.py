"""A strict grammar for JSON: each value either matches a rule completely, unknown keys included, or is refused.

torch's own reader ignores unknown keys and does not check the types of numbers and strings; a rule here is the whole
truth.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping

_ATTRIBUTE = re.compile(r"(?!__)[A-Za-z0-9_\-]+")

Rule = Callable[[object], None]
"""Returns when the value matches, raises ``MalformedError`` when not."""


class MalformedError(ValueError):
    """A value breaks a rule; ``where`` grows on the way out, innermost step first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where: list[str] = []

    def __str__(self) -> str:
        return f"{self.problem} at {'.'.join(reversed(self.where)) or 'the top'}"


def parse_json(text: bytes, largest: int) -> object:
    """Parse strictly.

    Raises:
        MalformedError: for more than ``largest`` bytes, a duplicate key, NaN or Infinity, nesting too deep, or anything
            that is not JSON.
    """
    if len(text) > largest:
        raise MalformedError(f"{len(text)} bytes of JSON, more than {largest},")
    try:
        value: object = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError("no readable JSON") from error
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise MalformedError("a JSON object with a duplicate key")
    return unique


def _no_constant(name: str) -> object:
    raise MalformedError(f"the JSON constant {name}")


def record(required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """An object with all ``required`` keys, perhaps some ``optional`` ones, and no others."""
    rules = {**required, **(optional or {})}

    def check(value: object) -> None:
        members = _object(value)
        for name in required:
            if name not in members:
                raise MalformedError(f"no {name!r}")
        for name, member in members.items():
            if name not in rules:
                raise MalformedError(f"the key {name[:80]!r}, which is not allowed here,")
            _within(name, rules[name], member)

    return check


def union(cases: Mapping[str, Rule]) -> Rule:
    """An object with exactly one key, one of ``cases``."""

    def check(value: object) -> None:
        members = _object(value)
        if len(members) != 1:
            raise MalformedError(f"{len(members)} alternatives instead of one")
        ((name, member),) = members.items()
        if name not in cases:
            raise MalformedError(f"a value of the kind {name[:80]!r}, which is not allowed here,")
        _within(name, cases[name], member)

    return check


def array(item: Rule, longest: int = 1_000_000) -> Rule:
    """A list of at most ``longest`` values that all match ``item``."""

    def check(value: object) -> None:
        if not isinstance(value, list) or len(value) > longest:
            raise MalformedError(f"no list of at most {longest}")
        for index, member in enumerate(value):
            _within(str(index), item, member)

    return check


def mapping(key: Rule, item: Rule) -> Rule:
    """An object whose keys match ``key`` and whose values match ``item``."""

    def check(value: object) -> None:
        for name, member in _object(value).items():
            key(name)
            _within(name, item, member)

    return check


def optional(rule: Rule) -> Rule:
    """Null, or what ``rule`` accepts."""

    def check(value: object) -> None:
        if value is not None:
            rule(value)

    return check


def one_of(*values: str | int | bool) -> Rule:
    """One of these very values (``True`` is not 1)."""

    def check(value: object) -> None:
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            raise MalformedError(f"{_shown(value)}, which is not one of the allowed values,")

    return check


def text(pattern: str, longest: int = 1_000) -> Rule:
    """A string that ``pattern`` matches from beginning to end."""
    compiled = re.compile(pattern)

    def check(value: object) -> None:
        if not isinstance(value, str) or len(value) > longest or not compiled.fullmatch(value):
            raise MalformedError(f"{_shown(value)}, which is no allowed text,")

    return check


def integer(value: object) -> None:
    """An integer that fits into 64 bits."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise MalformedError(f"{_shown(value)} instead of an integer")


def boolean(value: object) -> None:
    if type(value) is not bool:
        raise MalformedError(f"{_shown(value)} instead of a boolean")


def number(value: object) -> None:
    """A number, or one of the three words that torch writes for those that JSON does not have."""
    if type(value) not in (int, float) and value not in ("Infinity", "-Infinity", "NaN"):
        raise MalformedError(f"{_shown(value)} instead of a number")


def identifier(value: object) -> None:
    """A plain Python name: torch pastes these into source code that it executes."""
    if not _is_identifier(value):
        raise MalformedError(f"the name {_shown(value)}, which is no plain identifier,")


def dotted_name(value: object) -> None:
    """Names joined by dots, such as ``features.0.weight``: torch walks along them with getattr and setattr.

    A hyphen is harmless there (torchvision's RegNet has ``block1-0``); a name with dunders could reach a class.
    """
    if not isinstance(value, str) or len(value) > 1_000 or not all(_is_attribute(part) for part in value.split(".")):
        raise MalformedError(f"the dotted name {_shown(value)}, which is no path to a parameter,")


def empty(value: object) -> None:
    """An object or list without members."""
    if value not in ({}, []):
        raise MalformedError("members where none are allowed")


def _is_identifier(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value) and _is_attribute(value)


def _is_attribute(value: str) -> bool:
    return len(value) <= 500 and _ATTRIBUTE.fullmatch(value) is not None


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedError(f"{_shown(value)} instead of an object")
    return value


def _within(name: str, rule: Rule, value: object) -> None:
    try:
        rule(value)
    except MalformedError as error:
        error.where.append(name[:80])
        raise


def _shown(value: object) -> str:
    return (
        repr(value[:120])
        if isinstance(value, str)
        else type(value).__name__
        if isinstance(value, list | dict)
        else repr(value)[:40]
    )
