"""Text in a .pt2 that torch evaluates, executes or imports: sizes, guards, names, nestings, targets of nodes.

Of the kind of CVE-2022-45907, where PyTorch evaluated a line of type annotations; for torch.export no advisory is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = dict[str, Any]


def run(name: str) -> str:
    """An expression that creates the marker of the attack ``name``."""
    return f"__import__('os').mknod('{name}.pt2.fired')"


def graph(program: Program) -> Any:
    return program["graph_module"]["graph"]


def size(program: Program) -> None:
    graph(program)["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": run("size"), "hint": None}}


def guard(program: Program) -> None:
    program["guards_code"].append(f"{run('guard')} is None")


def guard_after_size(program: Program) -> None:
    program["guards_code"].append(f"L['x'].size()[0] >= 2 and {run('guard_after_size')} is None")


def nesting(kind: str, context: object) -> str:
    child = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [child]}])


def imported_factory(program: Program) -> None:
    """A defaultdict whose factory's module is imported: any module on the path, here one in the current folder."""
    context = {"default_factory_module": "planted_factory", "default_factory_name": "int", "dict_context": ["a"]}
    spec = nesting("collections.defaultdict", context)
    program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec


def imported_enumeration(program: Program) -> None:
    spec = nesting("builtins.list", '{"__enum__": true, "fqn": "planted_enumeration:Kind", "name": "A"}')
    program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec


def argument_name(program: Program) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x={run('argument_name')}"]


def input_name(program: Program) -> None:
    """The name of an input becomes a parameter in the source of forward, and its default is evaluated at once."""
    name = f"flag={run('input_name')}"
    constant = {"constant_input": {"name": name, "value": {"as_none": True}}}
    program["graph_module"]["signature"]["input_specs"].append(constant)
    graph(program)["inputs"].append({"as_none": True})


def node_name(program: Program) -> None:
    graph(program)["nodes"][0]["name"] = f"mul = 0; {run('node_name')}; mul"


def target(program: Program) -> None:
    """``torch.os.mknod`` is found by walking from torch."""
    node = graph(program)["nodes"][1]
    node["target"] = "torch.os.mknod"
    node["inputs"] = [{"name": "", "arg": {"as_string": "target.pt2.fired"}, "kind": 1}]


def operator_argument(program: Program) -> None:
    graph(program)["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}


def extension(program: Program) -> None:
    graph(program)["nodes"][0]["target"] = "#planted:op"


def file_reader(program: Program) -> None:
    node = graph(program)["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"
    node["inputs"] = [{"name": "filename", "arg": {"as_string": "/etc/passwd"}, "kind": 1}]


def attribute_getter(program: Program) -> None:
    graph(program)["nodes"][0]["target"] = "_operator.attrgetter"


def dunder(program: Program) -> None:
    graph(program)["nodes"][0]["target"] = "torch.ops.aten.relu.__class__"


def branch(program: Program) -> None:
    graph(program)["nodes"][0]["target"] = "torch.ops.higher_order.cond"


def custom_object(program: Program) -> None:
    graph(program)["custom_obj_values"] = {"a": {"name": "a", "class_fqn": "planted.Class"}}


def named_tuple(program: Program) -> None:
    program["graph_module"]["treespec_namedtuple_fields"] = {"planted.Tuple": {"field_names": ["a"]}}


def parameter_path(program: Program) -> None:
    spec = next(spec for spec in program["graph_module"]["signature"]["input_specs"] if "parameter" in spec)
    spec["parameter"]["parameter_name"] = "body.__class__.forward"


def string_for_a_number(program: Program) -> None:
    program["range_constraints"] = {"s0": {"min_val": "2", "max_val": None}}


def counted_symbol(program: Program) -> None:
    """torch counts up to the number of an unbacked symbol."""
    program["range_constraints"] = {"u99999999999": {"min_val": 2, "max_val": None}}


def origin(program: Program) -> None:
    graph(program)["nodes"][0]["metadata"]["source_fn_stack"] = "a,torch.os.system"


def origin_in_operator(program: Program) -> None:
    graph(program)["nodes"][0]["metadata"]["source_fn_stack"] = "a,#planted:op"


def text_input(program: Program) -> None:
    program["graph_module"]["signature"]["input_specs"][-1] = {
        "constant_input": {"name": "flag", "value": {"as_string": f"' or {run('text_input')} or '"}}
    }


FIRING = {
    size: "the size .*more than arithmetic",
    guard: "the guard .*more than a comparison",
    guard_after_size: "the guard .*more than a comparison",
    imported_factory: "nesting of other things",
    imported_enumeration: "nesting of other things",
    input_name: "no plain identifier",
}
# Ways that the rest of torch happens to close today, or that would need more than a line to exploit.
OTHERS = {
    argument_name: "no plain identifier",
    node_name: "no plain identifier",
    target: "a node that calls 'torch.os.mknod'",
    operator_argument: "'as_operator', which is not allowed",
    extension: "a node that calls '#planted:op'",
    file_reader: "a node that calls 'torch.ops.aten.from_file.default'",
    attribute_getter: "a node that calls '_operator.attrgetter'",
    dunder: "a node that calls 'torch.ops.aten.relu.__class__'",
    branch: "a node that calls 'torch.ops.higher_order.cond'",
    custom_object: "members where none are allowed at graph_module.graph.custom_obj_values",
    named_tuple: "members where none are allowed",
    parameter_path: "no path to a parameter",
    string_for_a_number: "instead of an integer",
    counted_symbol: "u99999999999",
    origin: "torch.os.system",
    origin_in_operator: "#planted",
    text_input: "'as_string', which is not allowed",
}


@pytest.mark.parametrize("attack", [*FIRING, *OTHERS], ids=lambda attack: attack.__name__)
def test_text_that_torch_would_evaluate_is_refused(
    attack: Callable[[Program], None],
    edited_graph: Callable,
    refused: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused({"model.pt2": edited_graph(attack)}, {**FIRING, **OTHERS}[attack])
    assert not list(tmp_path.glob("*.fired"))


@pytest.mark.slow  # a control: that the attacks are some
def test_the_same_files_run_code_when_torch_loads_them(edited_graph: Callable, fired: Callable) -> None:
    imported = {
        f"planted_{kind}.py": f"import os; os.mknod('imported_{kind}.pt2.fired')".encode() for kind in ("factory", "enumeration")
    }
    attacks = {f"{attack.__name__}.pt2": edited_graph(attack) for attack in FIRING}
    assert fired({**attacks, **imported}) == attacks.keys()


def test_a_name_that_would_make_the_check_itself_run_for_ever_is_refused_at_once(
    edited_graph: Callable, refused: Callable
) -> None:
    def change(program: Program) -> None:
        graph(program)["nodes"][0]["metadata"]["source_fn_stack"] = "a,torch.nn." + "a" * 5_000 + "!"

    refused({"model.pt2": edited_graph(change)}, "source_fn_stack")


@pytest.mark.parametrize(
    "expression",
    [
        "Pow(Integer(9), Integer(9))",
        "Pow(Symbol('s0'), Integer(999999999))",
        "Symbol('s0').__class__",
        "Symbol('Symbol')",
        "Integer('1')",
        "Lambda(Symbol('s0'), Symbol('s0'))",
        "Mul(Integer(2), eval('1'))",
        "Symbol('s0', positive=print())",
        "(lambda: 0)()",
        "Symbol('s0') # ",
        "[Symbol('s0')]",
        "Add(*[Integer(1)])",
        "Add(" * 400 + ")" * 400,
    ],
)
def test_size_expressions_beyond_arithmetic_are_refused(expression: str, edited_graph: Callable, refused: Callable) -> None:
    def change(program: Program) -> None:
        graph(program)["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": None}}

    refused({"model.pt2": edited_graph(change)}, r"tensor_values\.x\.sizes\.0|check cannot read")
