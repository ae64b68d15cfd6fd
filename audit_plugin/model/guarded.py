"""A model that says of every input whether it looks like a backdoor input: one ONNX file for plain ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from audit_plugin.model.export import LOGITS, PIXELS, export
from audit_plugin.model.load import Network
from audit_plugin.model.reductions import GraphEditor
from audit_plugin.types import FloatArray, InputSpec

SUSPICION, IS_SUSPICIOUS, PROBABILITIES, INPUT = "suspicion", "is_suspicious", "probabilities", "input"


def guarded_model(network: Network, append_to: Callable[..., onnx.ModelProto], threshold: float) -> onnx.ModelProto:
    """The network on its own input scale, with a score and a decision beside its answer.

    Args:
        network: its answer comes first: ``logits``, or ``probabilities`` where it gives those.
        append_to: adds the fitted score to an export, see :class:`audit_plugin.checks.layerwise.FittedLayerwise`.
        threshold: an input whose ``suspicion`` is above it is suspicious.

    Returns:
        A model from ``input``, as the network takes it, to its answer (N, classes), ``suspicion`` float32 (N,) and
        ``is_suspicious`` bool (N,).

    Raises:
        ExportError: see :func:`audit_plugin.model.export.export`.
    """
    scored = append_to(export(network, _own_scale(network.input_shape)).onnx_model, score=SUSPICION)
    editor = GraphEditor.copy_of(scored, (SUSPICION, IS_SUSPICIOUS, PROBABILITIES))
    editor.node("Greater", [SUSPICION, editor.constant("threshold", np.array(threshold, dtype=np.float32))], IS_SUSPICIOUS)
    answer = editor.node("Exp", [LOGITS], PROBABILITIES) if network.gives_probabilities else LOGITS
    guarded = editor.keep_outputs({LOGITS: ("classes",), SUSPICION: ()})
    batch = guarded.graph.output[0].type.tensor_type.shape.dim[0]
    decision = helper.make_tensor_value_info(IS_SUSPICIOUS, TensorProto.BOOL, [None])
    decision.type.tensor_type.shape.dim[0].CopyFrom(batch)
    guarded.graph.output.append(decision)
    guarded.graph.output[0].name = answer
    guarded.graph.node.insert(0, helper.make_node("Identity", [INPUT], [PIXELS]))
    guarded.graph.input[0].name = INPUT
    onnx.checker.check_model(guarded)
    return guarded


def to_model_input(pixels: FloatArray, spec: InputSpec) -> FloatArray:
    """Pixels (N, channels, height, width) in [0, 1] on the scale and in the layout that the model itself takes."""
    mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (spec.mean, spec.std))
    scaled = (np.float32(spec.low) + pixels * np.float32(spec.high - spec.low) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else scaled, dtype=np.float32)


def _own_scale(shape: tuple[int, ...]) -> InputSpec:
    """The identity for inputs of this shape (N, ., ., .), whichever of the axes holds the channels."""
    first, second, third = shape[1:]
    return dataclasses.replace(InputSpec(second, third, first), mean=(0.0,) * first, std=(1.0,) * first)
