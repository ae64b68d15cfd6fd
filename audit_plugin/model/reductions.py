"""Nodes appended to an exported model, so that numbers of size (N, layers) leave the device instead of feature maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.maths.mahalanobis import ClassGaussians
from audit_plugin.model.export import LOGITS
from audit_plugin.model.feature_maps import FeatureMap
from audit_plugin.model.onnx_graph import opset_version, rename_in_node
from audit_plugin.types import FloatArray

COSINES = "layer_cosines"
L_INFINITY, L1, L2 = NORMS = ("l_infinity_norm", "l1_norm", "l2_norm")


@dataclass(frozen=True)
class GraphEditor:
    """Appends nodes to a copy of a model and keeps only the outputs that are asked for.

    What it adds is named ``audit_...``, apart from the ``outputs``, so that it does not meet the model's own names.
    """

    model: onnx.ModelProto
    outputs: frozenset[str]

    @classmethod
    def copy_of(cls, model: onnx.ModelProto, outputs: Iterable[str]) -> GraphEditor:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        return cls(copied, frozenset(outputs))

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        own = self._own_name(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), own))
        return own

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> str:
        own = self._own_name(output)
        self.model.graph.node.append(_node(operator, inputs, own, attributes))
        return own

    def copy_nodes(self, nodes: Sequence[onnx.NodeProto], source: str, replacement: str, prefix: str) -> Mapping[str, str]:
        """Append copies of ``nodes`` that read ``replacement`` instead of ``source``; returns the new name of each copied value.

        Weights and whatever else is not copied are shared with the original nodes.
        """
        renamed = {name: f"{prefix}{name}" for node in nodes for name in node.output if name} | {source: replacement}
        for node in nodes:
            copied = self.model.graph.node.add()
            copied.CopyFrom(node)
            copied.name = f"{prefix}{node.name}" if node.name else ""
            rename_in_node(copied, renamed)
        return renamed

    def _own_name(self, name: str) -> str:
        return name if name in self.outputs else f"audit_{name}"

    def keep_outputs(self, outputs: Mapping[str, tuple[str, ...]]) -> onnx.ModelProto:
        """Only these float outputs remain, by name, with the given dimensions after the batch."""
        known = {output.name: output for output in self.model.graph.output}
        batch = known[LOGITS].type.tensor_type.shape.dim[0]
        kept = [
            known.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, *dimensions])
            for name, dimensions in outputs.items()
        ]
        for value in kept:
            value.type.tensor_type.shape.dim[0].CopyFrom(batch)
        del self.model.graph.output[:]
        self.model.graph.output.extend(kept)
        return self.model


def _node(operator: str, inputs: Sequence[str], output: str, attributes: Mapping[str, int | Sequence[int]]) -> onnx.NodeProto:
    node = helper.make_node(operator, list(inputs), [output], name=output)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def append_layerwise_score(
    model: onnx.ModelProto,
    *,
    centroids: Mapping[str, FloatArray],
    weights: FloatArray,
    mean: FloatArray,
    deviation: FloatArray,
    score: str,
) -> onnx.ModelProto:
    """Add the layer-wise score of Jebreel et al. 2023 to a model with taps, in operators that every opset from 7 on has.

    With the predicted class t = argmax of the logits, c_l the centroid of t at layer l and w the layers of interest of t,
    the output ``score`` is (mean_t - sum_l w_tl cos(a_l, c_l)) / deviation_t, and ``layer_cosines`` are the cosines (0 of a layer
    that is 0 everywhere).

    Args:
        model: with an output for every layer named in ``centroids``, and ``logits``.
        centroids: by layer, in order, (classes, features); need not be of unit length.
        weights: (classes, layers), 1 for a layer that counts for the class.
        mean, deviation: (classes,), of the sum over clean images of the class.

    Returns:
        A new model whose outputs are ``logits`` (N, classes), ``score`` (N,) and ``layer_cosines`` (N, layers).
    """
    editor = GraphEditor.copy_of(model, (score, COSINES))
    predicted = editor.node("ArgMax", [LOGITS], "predicted_class", axis=1, keepdims=0)
    tiny = editor.constant("tiny_norm", np.array(1e-12, dtype=np.float32))
    columns = []
    for index, (layer, centroid) in enumerate(centroids.items()):
        norms = np.linalg.norm(centroid, axis=1, keepdims=True)
        unit = editor.constant(f"centroids_{index}", (centroid / np.maximum(norms, 1e-12)).astype(np.float32))
        flat = editor.node("Flatten", [layer], f"features_{index}", axis=1)
        own = editor.node("Gather", [unit, predicted], f"centroid_{index}", axis=0)
        ones = editor.constant(f"ones_{index}", np.ones((centroid.shape[1], 1), dtype=np.float32))
        product = editor.node("MatMul", [editor.node("Mul", [flat, own], f"products_{index}"), ones], f"product_{index}")
        square = editor.node("MatMul", [editor.node("Mul", [flat, flat], f"squares_{index}"), ones], f"square_{index}")
        norm = editor.node("Add", [editor.node("Sqrt", [square], f"norm_{index}"), tiny], f"safe_norm_{index}")
        columns.append(editor.node("Div", [product, norm], f"cosine_{index}"))
    cosines = editor.node("Concat", columns, COSINES, axis=1)

    class_weights = editor.node("Gather", [editor.constant("layer_weights", weights), predicted], "class_weights", axis=0)
    weighted = editor.node("Mul", [cosines, class_weights], "weighted_cosines")
    layer_ones = editor.constant("layer_ones", np.ones((len(columns), 1), dtype=np.float32))
    row = editor.constant("row_shape", np.array([-1], dtype=np.int64))
    total = editor.node("Reshape", [editor.node("MatMul", [weighted, layer_ones], "cosine_sums"), row], "cosine_sum")
    means, deviations = editor.constant("class_means", mean), editor.constant("class_deviations", deviation)
    class_mean = editor.node("Gather", [means, predicted], "class_mean", axis=0)
    class_deviation = editor.node("Gather", [deviations, predicted], "class_deviation", axis=0)
    below = editor.node("Sub", [class_mean, total], "below_mean")
    editor.node("Div", [below, class_deviation], score)
    return editor.keep_outputs({LOGITS: ("classes",), score: (), COSINES: ("layers",)})


def append_flag(model: onnx.ModelProto, *, score: str, threshold: float, flag: str) -> onnx.ModelProto:
    """Add an output ``flag``, bool (N,): whether the output ``score``, float32 (N,), lies above ``threshold`` or is NaN.

    Returns:
        A new model with the outputs of ``model``, then ``flag``.
    """
    editor = GraphEditor.copy_of(model, (flag,))
    # NaN is above nothing, and an input that cannot be judged must not count as harmless: so it is "not below the next number".
    next_number = np.array(np.nextafter(np.float32(threshold), np.float32(np.inf)))
    editor.node("Not", [editor.node("Less", [score, editor.constant("above_threshold", next_number)], "is_harmless")], flag)
    value = onnx.ValueInfoProto()
    value.CopyFrom(next(output for output in model.graph.output if output.name == score))
    value.name, value.type.tensor_type.elem_type = flag, TensorProto.BOOL
    editor.model.graph.output.append(value)
    return editor.model


def append_norms(model: onnx.ModelProto, feature_map: FeatureMap) -> onnx.ModelProto:
    """Add the norms of every channel A_k of a feature map, over its positions (Cheng et al. 2020, arXiv 2002.12162).

    Returns:
        A new model whose outputs are ``logits`` (N, classes), ``l_infinity_norm`` max |A_k|, ``l1_norm`` sum |A_k| and
        ``l2_norm`` sqrt(sum A_k^2), each (N, channels).
    """
    editor = GraphEditor.copy_of(model, NORMS)
    _add_norms(editor, feature_map)
    return editor.keep_outputs({LOGITS: ("classes",), **dict.fromkeys(NORMS, ("channels",))})


def append_norm_score(
    model: onnx.ModelProto, feature_map: FeatureMap, gaussians: Mapping[str, ClassGaussians], scores: Mapping[str, str]
) -> onnx.ModelProto:
    """Add a score for every norm: how far an input's vector of norms lies from the mean of its predicted class.

    With c the predicted class and n a norm's vector, a score is |(n - means[c]) @ whitening|^2.

    Args:
        gaussians: by norm.
        scores: name of the output, by norm.

    Returns:
        A new model whose outputs are ``logits`` (N, classes), the scores, each (N,), and the norms of :func:`append_norms`.
    """
    editor = GraphEditor.copy_of(model, (*NORMS, *scores.values()))
    _add_norms(editor, feature_map)
    predicted = editor.node("ArgMax", [LOGITS], "norm_predicted_class", axis=1, keepdims=0)
    row = editor.constant("norm_score_shape", np.array([-1], dtype=np.int64))
    total = editor.constant("norm_ones", np.ones((feature_map.channel_count, 1), dtype=np.float32))
    for norm, gaussian in gaussians.items():
        means = editor.constant(f"{norm}_means", gaussian.means.astype(np.float32))
        whitening = editor.constant(f"{norm}_whitening", gaussian.whitening.astype(np.float32))
        expected = editor.node("Gather", [means, predicted], f"{norm}_expected", axis=0)
        residual = editor.node("Sub", [norm, expected], f"{norm}_residual")
        whitened = editor.node("MatMul", [residual, whitening], f"{norm}_whitened")
        squares = editor.node("Mul", [whitened, whitened], f"{norm}_squares")
        column = editor.node("MatMul", [squares, total], f"{norm}_distance")
        editor.node("Reshape", [column, row], scores[norm])
    names = {LOGITS: ("classes",), **dict.fromkeys(scores.values(), ()), **dict.fromkeys(NORMS, ("channels",))}
    return editor.keep_outputs(names)


def _add_norms(editor: GraphEditor, feature_map: FeatureMap) -> None:
    """Sums are products with ones: the form of ONNX's own reductions differs between the opsets that a model may ask for."""
    positions, channels = feature_map.position_count, feature_map.channel_count
    sizes = [0, positions, channels] if feature_map.channels_last else [0, channels, positions]
    shape = editor.constant("norm_map_shape", np.array(sizes, dtype=np.int64))
    ones = editor.constant("norm_position_ones", np.ones((positions, 1), dtype=np.float32))
    values = editor.node("Reshape", [feature_map.layer, shape], "norm_map")
    if feature_map.channels_last:
        values = editor.node("Transpose", [values], "norm_map_channels_first", perm=[0, 2, 1])
    magnitudes = editor.node("Abs", [values], "norm_magnitudes")
    if opset_version(editor.model) < 18:
        editor.node("ReduceMax", [magnitudes], L_INFINITY, axes=[2], keepdims=0)
    else:
        axis = editor.constant("norm_position_axis", np.array([2], dtype=np.int64))
        editor.node("ReduceMax", [magnitudes, axis], L_INFINITY, keepdims=0)
    editor.node("Flatten", [editor.node("MatMul", [magnitudes, ones], "norm_sum")], L1, axis=1)
    squares = editor.node("Mul", [magnitudes, magnitudes], "norm_squared_magnitudes")
    lengths = editor.node("Sqrt", [editor.node("MatMul", [squares, ones], "norm_sum_of_squares")], "norm_lengths")
    editor.node("Flatten", [lengths], L2, axis=1)
