"""One way to store weights: what a layer multiplies by is a parameter of its own, in the shape in which the layer reads it.

A file may keep the same weights as buffers, squeeze them out of other shapes or put them together from parts, and answer the
same. Whatever changes weights (fine-tuning, noise in the rows of each weight) would then find none of them, or other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

_LAYERS = ("conv", "linear", "addmm", "mm", "matmul", "bmm", "einsum", "batch_norm", "layer_norm", "group_norm", "instance_norm")
_TURNED = ("t", "transpose", "permute", "numpy_T")
_STATISTICS = ("running_mean", "running_var")


def store_weights_plainly(graph: fx.GraphModule) -> None:
    """Make parameters, in place, of the floating-point operands of layers that do not depend on the image.

    Left as they are: parameters that a layer reads directly or only turned round, and running statistics, which no gradient
    trained. Operands that a program computes from the image too stay what they are.
    """
    constant = _constants(graph.graph)
    layers = [node for node in graph.graph.nodes if node not in constant and any(layer in _operator(node) for layer in _LAYERS)]
    asked = {
        operand: operand.name
        for node in layers
        for operand in _operands(node)
        if operand in constant and not _is_parameter(graph, operand)
    }
    if not asked:
        return
    values = _values(graph, constant, asked)
    for operand, name in asked.items():
        value = values[operand]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        weight = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
        graph.register_parameter(f"stored_{name}", weight)
        with graph.graph.inserting_after(operand):
            plain = graph.graph.get_attr(f"stored_{name}")
        plain.meta.update(operand.meta)
        for node in layers:
            node.replace_input_with(operand, plain)
    for node in reversed([*constant]):
        if not node.users:
            graph.graph.erase_node(node)


def _constants(graph: fx.Graph) -> dict[fx.Node, None]:
    """Values that are the same for every image, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(read in found for read in node.all_input_nodes)):
            found[node] = None
    return found


def _values(graph: fx.GraphModule, constant: Iterable[fx.Node], asked: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """Those asked for and all that they are computed from."""
    needed = set(asked)
    for node in reversed([*constant]):
        if node in needed:
            needed.update(node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in constant:
            if node not in needed:
                continue
            if node.op == "get_attr":
                values[node] = _stored(graph, node)
            else:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # of a call_function
    return values


def _stored(graph: fx.GraphModule, node: fx.Node) -> Any:
    return functools.reduce(getattr, str(node.target).split("."), graph)


def _is_parameter(graph: fx.GraphModule, operand: fx.Node) -> bool:
    """Whether it is one as it is stored, or one turned round."""
    while operand.op == "call_function" and _operator(operand) in _TURNED:
        operand = operand.all_input_nodes[0]
    return operand.op == "get_attr" and isinstance(_stored(graph, operand), nn.Parameter)


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema else ""


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """What it reads beside running statistics."""
    schema = node.target._schema  # type: ignore[union-attr]  # only operators have a name, see _operator
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    for name, value in given.items():
        if name not in _STATISTICS:
            yield from (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, fx.Node))
