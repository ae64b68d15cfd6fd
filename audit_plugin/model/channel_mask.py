"""Channels of one tap set to zero: as a new network in the same form, and, to try many choices at once, inside one graph."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from audit_plugin.errors import InapplicableError
from audit_plugin.model.export import LOGITS
from audit_plugin.model.load import Network
from audit_plugin.model.onnx_graph import (
    FreshNames,
    choose_onnx_taps,
    element_types,
    nodes_between,
    reads,
    rename_in,
    value_names,
)
from audit_plugin.model.reductions import GraphEditor
from audit_plugin.model.taps import Tap
from audit_plugin.model.torch_graph import choose_graph_taps

MASKED_LOGITS = "masked_logits"

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
_PUBLISHING = ("Identity", "Cast", "DequantizeLinear")  # the node that gives a value of an ONNX model its name as an output
_KEPT_META = ("val", "tensor_meta", "nn_module_stack", "source_fn_stack", "from_node", "stack_trace")


def with_channel_mask(network: Network, tap: str, mask: NDArray[np.bool_]) -> Network:
    """A copy of ``network`` whose tap is multiplied by a mask, in front of everything that reads it.

    The taps of the copy are called as before, the masked one too. The mask is no weight: fine-tuning leaves it alone, in a torch
    graph (where it is a buffer) as in an ONNX model (where it is stored as integers).

    Args:
        tap: the name of a tap, as :func:`~audit_plugin.model.export.export` gives it.
        mask: False where the value is set to zero; broadcast against the tap's value without the batch, so (channels, 1, 1) or
            (channels,).

    Raises:
        InapplicableError: the tap of an ONNX model holds quantised values, whose zero is another number.
        ValueError: the network has no tap of that name, or the mask does not fit it.
    """
    if isinstance(network.program, onnx.ModelProto):
        return dataclasses.replace(network, program=_with_onnx_mask(network.program, tap, mask))
    return dataclasses.replace(network, program=_with_torch_mask(network.program, tap, mask))


def _with_torch_mask(program: fx.GraphModule, tap: str, mask: NDArray[np.bool_]) -> fx.GraphModule:
    masked = copy.deepcopy(program)
    wanted = _node_of(choose_graph_taps(masked), tap)
    node = next(node for node in masked.graph.nodes if node.name == wanted)
    value = node.meta["val"]
    _check_fit(mask, tap, tuple(size if isinstance(size, int) else -1 for size in value.shape))
    buffer = torch.from_numpy(mask).to(value.dtype)
    attribute = FreshNames([*(name for name, _ in masked.named_buffers()), *dir(masked)]).fresh("channel_mask")
    masked.register_buffer(attribute, buffer)
    with masked.graph.inserting_after(node):
        stored = masked.graph.get_attr(attribute)
    with masked.graph.inserting_after(stored):
        product = masked.graph.call_function(torch.ops.aten.mul.Tensor, (node, stored))
    node.replace_all_uses_with(product, delete_user_cb=lambda reader: reader is not product)
    stored.meta["val"] = value.fake_mode.from_tensor(buffer, static_shapes=True) if hasattr(value, "fake_mode") else buffer
    product.meta.update({key: node.meta[key] for key in _KEPT_META if key in node.meta})
    masked.graph.lint()
    masked.recompile()
    return masked


def _with_onnx_mask(program: onnx.ModelProto, tap: str, mask: NDArray[np.bool_]) -> onnx.ModelProto:
    value = _node_of(choose_onnx_taps(program), tap)
    masked = onnx.ModelProto()
    masked.CopyFrom(program)
    graph = masked.graph
    element = element_types(graph).get(value, TensorProto.FLOAT)
    _refuse_quantised(element, tap)
    names = FreshNames(value_names(graph))
    # The value keeps its name, which its tap may be called after; what read it reads the product instead.
    product, stored, factor = (names.fresh(f"{value}_{ending}") for ending in ("masked", "channel_mask", "channel_factor"))
    described = [value_info for value_info in graph.value_info if value_info.name == value]
    for value_info in described:
        sizes = value_info.type.tensor_type.shape.dim
        _check_fit(mask, tap, tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes))
    unmasked = [copy.deepcopy(value_info) for value_info in described]
    rename_in(graph, {value: product})
    graph.value_info.extend(unmasked)
    nodes = list(graph.node)
    place, producer = next((index, node) for index, node in enumerate(nodes) if product in node.output)
    producer.output[:] = [value if name == product else name for name in producer.output]
    graph.initializer.append(numpy_helper.from_array(mask.astype(np.int8), stored))
    cast = helper.make_node("Cast", [stored], [factor], name=factor, to=element)
    multiply = helper.make_node("Mul", [value, factor], [product], name=product)
    multiply.metadata_props.extend(producer.metadata_props)
    del graph.node[:]
    graph.node.extend([*nodes[: place + 1], cast, multiply, *nodes[place + 1 :]])
    masked.ir_version = max(masked.ir_version, 4)  # older ones want every initialiser listed as an input
    return masked


def append_masked_logits(model: onnx.ModelProto, tap: str, masks: Sequence[NDArray[np.bool_]]) -> onnx.ModelProto:
    """The logits under each of several masks of a tap, in one pass: only what follows the tap is computed once a mask.

    Args:
        model: with the tap and ``logits`` among its outputs, as :attr:`Subject.onnx_model` is.
        masks: one or more, each as in :func:`with_channel_mask`.

    Returns:
        A new model whose only outputs are ``logits`` (N, classes) and ``masked_logits`` (N, masks * classes), mask by mask.

    Raises:
        InapplicableError: see :func:`with_channel_mask`.
    """
    editor = GraphEditor.copy_of(model, (MASKED_LOGITS,))
    source = _value_of(model, tap)
    element = element_types(model.graph).get(source, TensorProto.FLOAT)
    _refuse_quantised(element, tap)
    end = nodes_between(model.graph.node, source, LOGITS)
    answers = []
    for index, mask in enumerate(masks):
        factor = editor.constant(f"mask_{index}", mask.astype(helper.tensor_dtype_to_np_dtype(element)))
        masked = editor.node("Mul", [source, factor], f"masked_{index}")
        answers.append(editor.copy_nodes(end, source, masked, f"audit_mask_{index}_")[LOGITS])
    editor.node("Concat", answers, MASKED_LOGITS, axis=1)
    return editor.keep_outputs({LOGITS: ("classes",), MASKED_LOGITS: ("masks_and_classes",)})


def _value_of(model: onnx.ModelProto, tap: str) -> str:
    """The value that the rest of the graph reads, where the tap's own name only publishes it."""
    producers = {name: node for node in model.graph.node for name in node.output if name}
    read = {name for node in model.graph.node for name in reads(node)}
    while tap not in read and (node := producers.get(tap)) is not None and node.op_type in _PUBLISHING:
        tap = node.input[0]
    return tap


def _node_of(taps: Sequence[Tap], name: str) -> str:
    found = {tap.name: tap.node for tap in taps}
    if name not in found:
        raise ValueError(f"expected the name of a tap, one of {', '.join(found) or 'none'}; got '{name}'")
    return found[name]


def _check_fit(mask: NDArray[np.bool_], tap: str, shape: tuple[int, ...]) -> None:
    """``shape`` with the batch, -1 for free sizes."""
    fits = mask.ndim < len(shape) and all(
        size in (1, wanted) or wanted < 1 for size, wanted in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"expected a mask that broadcasts against '{tap}' of shape {shape[1:]}, got one of shape {mask.shape}")


def _refuse_quantised(element: int, tap: str) -> None:
    if element not in _FLOATS:
        raise InapplicableError(
            f"The channels of '{tap}' cannot be set to zero: it holds quantised values. Prune the model it was quantised from."
        )
