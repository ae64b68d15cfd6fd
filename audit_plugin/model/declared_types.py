"""Whether a loaded program makes values of the types that its file declares beside them.

Intake reads the graph without torch, so it believes the file which values are whole numbers: to make one of the image is a
decision. torch believes the file too, and would run such a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree

from audit_plugin.errors import IntakeError


def check_declared_types(program: torch.export.ExportedProgram) -> None:
    """Run the graph on tensors without contents, which costs little, and compare.

    They have plain sizes: to calculate with the program's own symbols would settle them, and with them its batch size.

    Raises:
        IntakeError: naming the first value of another type than the file says.
    """
    declared = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stored = {**program.state_dict, **program.constants}
    owners = [stored.get(spec.target or "") for spec in program.graph_signature.input_specs]
    given = [
        mode.from_tensor(owner, static_shapes=True) if isinstance(owner, torch.Tensor) else _example(value, mode)
        for owner, value in zip(owners, declared, strict=True)
    ]
    comparison = _Comparison(program.graph_module)
    with mode:
        comparison.run(*given)
    if comparison.found:
        raise IntakeError(f"the file declares {comparison.found}")


class _Comparison(fx.Interpreter):
    """Runs a graph and those inside it, and keeps the first difference."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: str | None = None

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        pairs = zip(_tensors(node.meta.get("val")), _tensors(value), strict=False)
        for declared, made in pairs if self.found is None and node.op != "output" else ():
            if declared.dtype != made.dtype:
                self.found = f"'{node.name}' as {declared.dtype}, and torch makes it {made.dtype}"
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inner = [_Comparison(argument) if isinstance(argument, fx.GraphModule) else None for argument in args]
        given: tuple[Any, ...] = tuple(part.run if part else argument for part, argument in zip(inner, args, strict=True))
        value = super().call_function(target, given, dict(kwargs))
        self.found = next((part.found for part in inner if part and part.found), self.found)
        return value


def _example(value: object, mode: FakeTensorMode) -> object:
    """A tensor of the size that the program was exported with."""
    if not isinstance(value, torch.Tensor):
        return value
    shape: tuple[Any, ...] = tuple(value.shape)
    sizes: list[Any] = [size.node.hint if isinstance(size, torch.SymInt) else size for size in shape]
    with mode:
        return torch.empty(sizes, dtype=value.dtype)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
