"""A second copy of the end of a network, fed with the reconstruction of its features, inside the model's own graph.

With h the features at a tap and g the rest of the network, the graph holds g(h) and g(reconstruction of h). Only operators are
added whose form is the same in every version of ONNX's operator set that the audit reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, NodeProto
from torch import Tensor, nn

from audit_plugin.errors import InapplicableError
from audit_plugin.model.benign_features import BenignFeatures
from audit_plugin.model.export import LOGITS, PIXELS
from audit_plugin.model.onnx_graph import depending_on, nodes_between, reads
from audit_plugin.model.reductions import GraphEditor
from audit_plugin.types import FloatArray

LOG_DISTANCE, DISAGREEMENT = "log_reconstruction_distance", "inference_disagreement"
_SMALLEST_DISTANCE = 1e-12
_SIZES = frozenset({"Shape", "Size"})  # what they read of a value is no feature of the image


@dataclass(frozen=True)
class Term:
    """A quantity of clean images: its mean and its standard deviation, which is positive."""

    mean: float
    deviation: float


def append_reconstruction(model: onnx.ModelProto, tap: str, benign: BenignFeatures) -> onnx.ModelProto:
    """Add the two terms of BeniFul (Li, Zhang and Ma 2024) to a model.

    With c the predicted class, r the reconstruction of the features at ``tap`` given c:

    * ``log_reconstruction_distance``: natural logarithm of the mean squared standardised difference of features and r;
    * ``inference_disagreement``: half the L1 distance of softmax(logits) and softmax(g(r)), in [0, 1].

    Args:
        model: from ``pixels`` to ``logits``, with ``tap`` among its outputs.
        benign: fitted on the features of that tap.

    Returns:
        A new model whose outputs are ``logits`` (N, classes) and the two terms, each (N,).

    Raises:
        InapplicableError: the graph cannot be cut at the tap, with the reason.
    """
    editor = GraphEditor.copy_of(model, (LOG_DISTANCE, DISAGREEMENT))
    source = _value_read_by_the_rest(model.graph, tap)
    end = _nodes_after(model.graph, source, tap)

    predicted = editor.node("ArgMax", [LOGITS], "reconstruction_class", axis=1, keepdims=0)
    gap = _gap(editor, tap, benign, predicted)
    squares = editor.node("Mul", [gap, gap], "reconstruction_squares")
    distance = _weighted_row_sum(editor, squares, benign.windows.feature_count, 1.0 / benign.windows.feature_count, "distance")
    smallest = editor.constant("reconstruction_smallest", np.array(_SMALLEST_DISTANCE, dtype=np.float32))
    editor.node("Log", [editor.node("Add", [distance, smallest], "reconstruction_positive")], LOG_DISTANCE)

    logits = editor.copy_nodes(end, source, _moved(editor, tap, benign, gap), "audit_end_")[LOGITS]
    probabilities = [
        editor.node("Softmax", [value], f"reconstruction_probabilities_{index}", axis=1)
        for index, value in enumerate((LOGITS, logits))
    ]
    apart = editor.node("Abs", [editor.node("Sub", probabilities, "reconstruction_difference")], "reconstruction_apart")
    _weighted_row_sum(editor, apart, benign.class_count, 0.5, DISAGREEMENT)
    return editor.keep_outputs({LOGITS: ("classes",), LOG_DISTANCE: (), DISAGREEMENT: ()})


def append_bounded_sum(model: onnx.ModelProto, first: Term, second: Term, *, score: str) -> onnx.ModelProto:
    """Add ``score`` (N,): the log distance and the disagreement in clean deviations, the latter bounded to [0, 1].

    Args:
        model: from :func:`append_reconstruction`.
        first, second: of the log distance and of the disagreement.
    """
    editor = GraphEditor.copy_of(model, (score,))
    one = editor.constant("score_one", np.array(1.0, dtype=np.float32))
    values = []
    for name, term in ((LOG_DISTANCE, first), (DISAGREEMENT, second)):
        mean = editor.constant(f"score_mean_of_{name}", np.array(term.mean, dtype=np.float32))
        deviation = editor.constant(f"score_deviation_of_{name}", np.array(term.deviation, dtype=np.float32))
        centred = editor.node("Sub", [name, mean], f"{name}_centred")
        values.append(editor.node("Div", [centred, deviation], f"{name}_standardised"))
    positive = editor.node("Relu", [values[1]], "score_positive")
    excess = editor.node("Relu", [editor.node("Sub", [values[1], one], "score_above_one")], "score_excess")
    bounded = editor.node("Sub", [positive, excess], "score_bounded")
    editor.node("Add", [values[0], bounded], score)
    return editor.keep_outputs({LOGITS: ("classes",), score: (), LOG_DISTANCE: (), DISAGREEMENT: ()})


# --------------------------------------------------------------------------------------------- the auto-encoder


def _gap(editor: GraphEditor, tap: str, benign: BenignFeatures, predicted: str) -> str:
    """Reconstruction minus standardised features, (N, feature count)."""
    averaged = tap
    if benign.windows.size > 1:
        averaged = _between(editor, tap, benign.windows.averaging(), "reconstruction_averaged")
    flat = editor.node("Flatten", [averaged], "reconstruction_flat", axis=1)
    mean = editor.constant("reconstruction_mean", _array(benign.mean))
    deviation = editor.constant("reconstruction_deviation", _array(benign.deviation))
    centred = editor.node("Sub", [flat, mean], "reconstruction_centred")
    standardised = editor.node("Div", [centred, deviation], "reconstruction_standardised")
    hidden = _layer_told_the_class(editor, standardised, benign.encoder, benign.class_count, predicted, "encoder")
    code = _linear(editor, hidden, _array(benign.latent_mean.weight), benign.latent_mean.bias, "latent_mean")
    hidden = _layer_told_the_class(editor, code, benign.decoder, benign.class_count, predicted, "decoder")
    reconstruction = _linear(editor, hidden, _array(benign.output.weight), benign.output.bias, "reconstruction")
    return editor.node("Sub", [reconstruction, standardised], "reconstruction_gap")


def _layer_told_the_class(editor: GraphEditor, value: str, layer: nn.Linear, class_count: int, predicted: str, name: str) -> str:
    """A linear layer on (value, one-hot class) and ReLU; a one-hot class picks a column of the weights."""
    weight = _array(layer.weight)
    alone = _linear(editor, value, weight[:, :-class_count], layer.bias, name)
    table = editor.constant(f"{name}_classes", weight[:, -class_count:].T)
    told = editor.node("Gather", [table, predicted], f"{name}_of_class", axis=0)
    return editor.node("Relu", [editor.node("Add", [alone, told], f"{name}_told")], f"{name}_active")


def _linear(editor: GraphEditor, value: str, weight: FloatArray, bias: Tensor, name: str) -> str:
    product = editor.node("MatMul", [value, editor.constant(f"{name}_weight", weight.T)], f"{name}_product")
    return editor.node("Add", [product, editor.constant(f"{name}_bias", _array(bias))], name)


def _moved(editor: GraphEditor, tap: str, benign: BenignFeatures, gap: str) -> str:
    """The features moved to their reconstruction, as :meth:`BenignFeatures.reconstruct` does."""
    scale = editor.constant("reconstruction_scale", _array(benign.deviation))
    change = editor.node("Mul", [gap, scale], "reconstruction_change")
    shape = editor.constant("reconstruction_shape", np.array([-1, *benign.windows.averaged_shape], dtype=np.int64))
    change = editor.node("Reshape", [change, shape], "reconstruction_map")
    if benign.windows.size > 1:
        change = _between(editor, change, benign.windows.enlarging(), "reconstruction_enlarged")
    return editor.node("Add", [tap, change], "reconstruction_moved")


def _between(editor: GraphEditor, value: str, matrices: tuple[FloatArray, FloatArray], name: str) -> str:
    """Left matrix times value times right matrix, for every channel."""
    left, right = (editor.constant(f"{name}_{index}", matrix) for index, matrix in enumerate(matrices))
    return editor.node("MatMul", [editor.node("MatMul", [left, value], f"{name}_rows"), right], name)


def _weighted_row_sum(editor: GraphEditor, value: str, width: int, weight: float, output: str) -> str:
    """(N, width) -> (N,). A product: ReduceSum takes its axes as an attribute or as an input, depending on the version."""
    weights = editor.constant(f"{output}_weights", np.full((width, 1), weight, dtype=np.float32))
    column = editor.node("MatMul", [value, weights], f"{output}_column")
    return editor.node("Reshape", [column, editor.constant(f"{output}_shape", np.array([-1], dtype=np.int64))], output)


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().cpu().numpy()
    return array


# -------------------------------------------------------------------------------------------- the end of the graph


def _value_read_by_the_rest(graph: GraphProto, tap: str) -> str:
    """The value behind a tap: in a model of the ONNX flavour the tap itself is an Identity that nothing reads."""
    producers = {name: node for node in graph.node for name in node.output if name}
    value = tap
    while (node := producers.get(value)) is not None and node.op_type == "Identity":
        value = node.input[0]
    return value


def _nodes_after(graph: GraphProto, source: str, tap: str) -> list[NodeProto]:
    """The nodes between ``source`` and the logits, in the order of the graph.

    Raises:
        InapplicableError: the logits do not depend on it, or on the image by another path too.
    """
    end = nodes_between(graph.node, source, LOGITS)
    if not end:
        producer = next((node.op_type for node in graph.node if source in node.output), "input")
        raise InapplicableError(
            f"The rest of the network does not read the tap '{tap}' as float32 numbers (a {producer} node stands between), so a "
            "reconstruction of its features cannot be put in their place."
        )
    around = depending_on((node for node in graph.node if node.op_type not in _SIZES), PIXELS, without=source)
    if any(around.intersection(reads(node)) for node in end):
        raise InapplicableError(
            f"The logits depend on the image by a path around the tap '{tap}', so the graph cannot be cut there."
        )
    return end
