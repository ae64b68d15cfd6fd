"""Nodes appended to an exported model, so that numbers of size (N, layers) leave the device instead of feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from audit_plugin.model.export import LOGITS
from audit_plugin.types import FloatArray

COSINES = "layer_cosines"


@dataclass(frozen=True)
class GraphEditor:
    """Appends nodes to a copy of a model and keeps only the outputs that are asked for."""

    model: onnx.ModelProto

    @classmethod
    def copy_of(cls, model: onnx.ModelProto) -> GraphEditor:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        return cls(copied)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        self.model.graph.node.append(_node(operator, inputs, output, attributes))
        return output

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


def _node(operator: str, inputs: Sequence[str], output: str, attributes: Mapping[str, int]) -> onnx.NodeProto:
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
    """Add the layer-wise score of Jebreel et al. 2023 to a model with taps.

    With the predicted class t = argmax of the logits, c_l the centroid of t at layer l and w the layers of interest of t,
    the output ``score`` is (mean_t - sum_l w_tl cos(a_l, c_l)) / deviation_t, and ``layer_cosines`` are the cosines.

    Args:
        model: with an output for every layer named in ``centroids``, and ``logits``.
        centroids: by layer, in order, (classes, features); need not be of unit length.
        weights: (classes, layers), 1 for a layer that counts for the class.
        mean, deviation: (classes,), of the sum over clean images of the class.

    Returns:
        A new model whose outputs are ``logits`` (N, classes), ``score`` (N,) and ``layer_cosines`` (N, layers).
    """
    editor = GraphEditor.copy_of(model)
    predicted = editor.node("ArgMax", [LOGITS], "predicted_class", axis=1, keepdims=1)
    tiny = editor.constant("tiny_norm", np.array(1e-12, dtype=np.float32))
    axes = editor.constant("feature_axis", np.array([1], dtype=np.int64))
    columns = []
    for index, (layer, centroid) in enumerate(centroids.items()):
        norms = np.linalg.norm(centroid, axis=1, keepdims=True)
        unit = editor.constant(f"centroids_{index}", (centroid / np.maximum(norms, 1e-12)).T.astype(np.float32))
        flat = editor.node("Flatten", [layer], f"features_{index}", axis=1)
        products = editor.node("MatMul", [flat, unit], f"products_{index}")
        own = editor.node("GatherElements", [products, predicted], f"product_{index}", axis=1)
        squares = editor.node("ReduceSumSquare", [flat, axes], f"square_{index}", keepdims=1)
        norm = editor.node("Max", [editor.node("Sqrt", [squares], f"norm_{index}"), tiny], f"safe_norm_{index}")
        columns.append(editor.node("Div", [own, norm], f"cosine_{index}"))
    cosines = editor.node("Concat", columns, COSINES, axis=1)

    row = editor.node("Squeeze", [predicted, axes], "predicted_row")
    class_weights = editor.node("Gather", [editor.constant("layer_weights", weights), row], "class_weights", axis=0)
    weighted = editor.node("Mul", [cosines, class_weights], "weighted_cosines")
    total = editor.node("ReduceSum", [weighted, axes], "cosine_sum", keepdims=0)
    class_mean = editor.node("Gather", [editor.constant("class_means", mean), row], "class_mean", axis=0)
    class_deviation = editor.node("Gather", [editor.constant("class_deviations", deviation), row], "class_deviation", axis=0)
    below = editor.node("Sub", [class_mean, total], "below_mean")
    editor.node("Div", [below, class_deviation], score)
    return editor.keep_outputs({LOGITS: ("classes",), score: (), COSINES: ("layers",)})
