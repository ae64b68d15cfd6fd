"""The three kinds of text in a ``.pt2`` that torch evaluates or resolves: sizes, guards and the nesting of inputs and
outputs.

Sizes go through ``sympy.sympify``, which is ``eval``; guards are pasted into a function and executed; a nesting may
name types that torch imports. Each is parsed here and compared, node by node, with the few forms that the exporter
writes.
"""

from __future__ import annotations

import ast
import json

from audit_plugin.intake.structure import MalformedError, Rule, array, identifier, parse_json, record, text

symbol_name = text(r"(s|u|zf|zuf)[0-9]{1,6}", longest=12)
"""``s0``, ``u3``, ``zuf1``: few digits, because torch counts up to the number of an unbacked symbol."""

_LONGEST_EXPRESSION = 2_000
_LARGEST_EXPONENT = 8
_SIZE_FUNCTIONS = (
    *("Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "Identity"),
    *("IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt", "FloorToInt", "CeilToInt", "And", "Or", "Not"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge"),
)
_ASSUMPTIONS = ("positive", "integer", "nonnegative", "real", "finite")


def size_expression(value: object) -> None:
    """What ``sympy.srepr`` writes, such as ``Mul(Integer(4), Symbol('s77', positive=True, integer=True))``."""
    _check_size(_parsed(value))


def _check_size(node: ast.expr) -> None:
    match node:
        case ast.Name("true" | "false"):
            return
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], keywords) if all(
            item.arg in _ASSUMPTIONS and isinstance(item.value, ast.Constant) and item.value.value is True for item in keywords
        ):
            symbol_name(name)
            return
        case ast.Call(ast.Name("Integer" | "Rational"), arguments, []) if arguments and all(map(_is_integer, arguments)):
            return
        case ast.Call(ast.Name("Float"), [ast.Constant(str(digits))], [ast.keyword("precision", ast.Constant(int()))]):
            text(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?")(digits)
            return
        # A power of a number could take for ever to compute, so only a symbol may have one.
        case ast.Call(ast.Name("Pow"), [ast.Call(ast.Name("Symbol")) as base, ast.Call(ast.Name("Integer"), [exponent], [])], []):
            if _is_integer(exponent) and abs(int(ast.literal_eval(exponent))) <= _LARGEST_EXPONENT:
                _check_size(base)
                return
        case ast.Call(ast.Name(name), arguments, []) if name in _SIZE_FUNCTIONS:
            for argument in arguments:
                _check_size(argument)
            return
    raise MalformedError(f"the size {_shown(node)}, which is more than arithmetic on symbols and integers,")


def guard(value: object) -> None:
    """A comparison of input sizes, for example ``L['x'].size()[0] >= 2``."""
    node = _parsed(value)
    if not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise MalformedError(f"the guard {_shown(node)}, which is no comparison,")
    _check_guard(node)


def _check_guard(node: ast.expr) -> None:
    match node:
        case ast.Constant(value) if type(value) in (int, bool, float):
            return
        case ast.Compare(left, _, others):
            parts = [left, *others]
        case ast.BoolOp(_, values):
            parts = values
        case ast.UnaryOp(_, operand):
            parts = [operand]
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Mod() | ast.Div(), right):
            parts = [left, right]
        case ast.Call(ast.Name("max" | "min" | "Max" | "Min" | "Mod" | "FloorDiv" | "PythonMod"), parts, []):
            pass
        case ast.Subscript(ast.Call(ast.Attribute(source, "size" | "stride"), [], []), ast.Constant(int())):
            _check_source(source)
            return
        case ast.Call(ast.Attribute(source, "storage_offset" | "dim"), [], []):
            _check_source(source)
            return
        case _:
            raise MalformedError(f"the guard {_shown(node)}, which is more than a comparison of input sizes,")
    for part in parts:
        _check_guard(part)


def _check_source(node: ast.expr) -> None:
    """``L['x']``, perhaps with further subscripts: an input of the model."""
    match node:
        case ast.Name("L"):
            return
        case ast.Subscript(value, ast.Constant(int())):
            _check_source(value)
        case ast.Subscript(value, ast.Constant(str(name))):
            identifier(name)
            _check_source(value)
        case _:
            raise MalformedError(f"the guard on {_shown(node)}, which is no input,")


def nesting(key: Rule) -> Rule:
    """The nesting (pytree specification) of inputs or outputs: tuples, lists and dicts whose keys match ``key``,
    nothing else.

    Other registered types import modules, or build enumerations, when they are read.
    """

    def check(value: object) -> None:
        match parse_json(_string(value).encode(), 1_000_000):
            case [1, node]:
                _check_nesting(node, key)
            case _:
                raise MalformedError("a nesting of an unknown version")

    return check


def _check_nesting(node: object, key: Rule) -> None:
    record(
        {
            "type": lambda value: None,
            "context": lambda value: None,
            "children_spec": array(lambda child: _check_nesting(child, key)),
        }
    )(node)
    match node:
        case {"type": None, "context": None, "children_spec": []}:
            return
        case {"type": "builtins.tuple" | "builtins.list", "context": "null"}:
            return
        case {"type": "builtins.dict" | "collections.OrderedDict", "context": context, "children_spec": list(children)}:
            keys = parse_json(_string(context).encode(), 1_000_000)
            array(key)(keys)
            if isinstance(keys, list) and len(keys) == len(children):
                return
    raise MalformedError("a nesting of other things than tuples, lists and dicts")


def output_key(value: object) -> None:
    """A key of a dict that the model returns; never pasted into code, so words joined by common signs are harmless."""
    if type(value) is not int:
        text(r"[A-Za-z0-9_][A-Za-z0-9_ .\-/]*", longest=100)(value)


def _parsed(value: object) -> ast.expr:
    source = _string(value)
    # A comment would swallow what torch writes behind the expression.
    if len(source) > _LONGEST_EXPRESSION or not source.isascii() or not source.isprintable() or "#" in source:
        raise MalformedError("an expression too long or with unusual characters")
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedError("an expression that is no Python") from error


def _is_integer(node: ast.expr) -> bool:
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))) | ast.Constant(int(value)):
            return not isinstance(value, bool) and abs(value) < 2**63
    return False


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise MalformedError("something else than text")
    return value


def _shown(node: ast.expr) -> str:
    return json.dumps(ast.unparse(node)[:120])
