"""A network with a score and a decision beside its answer, as one ONNX model for plain ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx

from audit_plugin.errors import ExportError
from audit_plugin.model.export import (
    LOGITS,
    PIXELS,
    PROBABILITIES,
    append_logarithm,
    append_softmax,
    export,
    logits_network,
)
from audit_plugin.model.load import Network
from audit_plugin.model.onnx_graph import input_and_output, input_element, rename_values
from audit_plugin.model.reductions import append_flag
from audit_plugin.types import FloatArray, InputSpec

INPUT, SUSPICION, IS_SUSPICIOUS = "input", "suspicion", "is_suspicious"
_SUSPICION, _IS_SUSPICIOUS = "audit_suspicion", "audit_is_suspicious"  # until the model has its last names


def guarded_model(network: Network, append_to: Callable[..., onnx.ModelProto], threshold: float) -> onnx.ModelProto:
    """A drop-in replacement for a network that also says how suspicious each input is.

    Its input is the network's: scale and layout, a fixed batch size where there is one, and for an ONNX model the name;
    a torch graph has none to keep, so that its input is called ``input``.

    Args:
        append_to: adds the fitted score to an export, see :class:`audit_plugin.checks.layerwise.FittedLayerwise`.
        threshold: an input whose suspicion lies above it, or is NaN, is suspicious.

    Returns:
        A model with three outputs: the network's own answer (N, classes), under the name that it has in an ONNX
        model, else ``logits`` or ``probabilities``; ``suspicion``, float32 (N,); ``is_suspicious``, bool (N,).

    Raises:
        ExportError, SubjectError: see :func:`audit_plugin.model.export.export`.
        ExportError: the network takes something else than float32.
    """
    if isinstance(network.program, onnx.ModelProto) and (element := input_element(network.program)) != np.float32:
        raise ExportError(f"A guard takes float32, and this model takes {element}, so a guard could not stand in for it.")
    plain = logits_network(network)
    # Without the clamp and the logarithm that an audit may need: the answer stays what it was.
    exported = export(dataclasses.replace(plain, gives_probabilities=False), _own_scale(network.input_shape)).onnx_model
    answer = onnx.ValueInfoProto()
    answer.CopyFrom(next(output for output in exported.graph.output if output.name == LOGITS))
    if network.gives_probabilities:
        (append_logarithm if plain.gives_probabilities else append_softmax)(exported)
        answer.name = PROBABILITIES
    scored = append_to(exported, score=_SUSPICION)
    guarded = append_flag(scored, score=_SUSPICION, threshold=threshold, flag=_IS_SUSPICIOUS)
    by_name = {output.name: output for output in guarded.graph.output}
    outputs = [answer, by_name[_SUSPICION], by_name[_IS_SUSPICIOUS]]
    del guarded.graph.output[:]
    guarded.graph.output.extend(outputs)
    input_name, answer_name = _names(network)
    rename_values(
        guarded,
        {PIXELS: input_name, answer.name: answer_name, _SUSPICION: SUSPICION, _IS_SUSPICIOUS: IS_SUSPICIOUS},
    )
    return guarded


def to_model_input(pixels: FloatArray, spec: InputSpec) -> FloatArray:
    """Pixels (N, channels, height, width) in [0, 1] on the scale and in the layout that the model itself takes."""
    mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (spec.mean, spec.std))
    scaled = (np.float32(spec.low) + pixels * np.float32(spec.high - spec.low) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else scaled, dtype=np.float32)


def grey_input(spec: InputSpec, batch_size: int | None) -> FloatArray:
    """One batch as the model takes it, uniformly grey: an example without any image's content."""
    pixels = np.full((batch_size or 1, spec.channels, spec.height, spec.width), 0.5, dtype=np.float32)
    return to_model_input(pixels, spec)


def _own_scale(shape: tuple[int, ...]) -> InputSpec:
    """The identity for inputs of this shape (N, ., ., .), whichever of the axes holds the channels."""
    first, second, third = shape[1:]
    return InputSpec(second, third, first, mean=(0.0,) * first, std=(1.0,) * first)


def _names(network: Network) -> tuple[str, str]:
    """What a deployer calls the input and the answer."""
    answer = "probabilities" if network.gives_probabilities else LOGITS
    if not isinstance(network.program, onnx.ModelProto):
        return INPUT, answer
    own_input, own_answer = input_and_output(network.program)
    taken = (SUSPICION, IS_SUSPICIOUS)
    return (INPUT if own_input in taken else own_input), (answer if own_answer in taken else own_answer)
