"""The model, its backdoor experts and its auxiliary model as one ONNX graph that scores an input in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import compose

from audit_plugin.model.export import LOGITS, PIXELS
from audit_plugin.model.reductions import GraphEditor

OWN, EXPERT, AUXILIARY, TRIANGLE = "own_probability", "expert_probability", "auxiliary_probability", "triangle_score"
_SMALLEST = 1e-7  # what float32 can tell from 0 or from 1


def append_expert_score(
    model: onnx.ModelProto, experts: Sequence[onnx.ModelProto], auxiliary: onnx.ModelProto, *, k: float, score: str
) -> onnx.ModelProto:
    """Add the scores of BaDExpert (Xie et al. 2024) to a model.

    With c the predicted class of the model, m, p and q the probabilities of c by the model, by the last of the experts and by
    the auxiliary model, and P the mean of the experts' probabilities, the output ``score`` is m + P - k q, and
    ``triangle_score`` is -log S with the paper's S = min(q / (k p), (1 - p) / max(k - q, 0)) (their equation 4). S is bounded to
    1e-7 .. 1e7, and so are p, q, 1 - p and k - q from below; the second quotient counts as infinite where q >= k, also where
    p = 1 makes the paper's 0 / 0 of it.

    Args:
        model, experts, auxiliary: each from ``pixels`` to ``logits``; at least one expert.
        k: the corner of the triangle, in (0, 1).

    Returns:
        A model whose outputs are ``logits`` (N, classes), ``score``, ``triangle_score``, ``own_probability`` m,
        ``expert_probability`` p (the last's) and ``auxiliary_probability`` q, each (N,).
    """
    editor = GraphEditor.copy_of(model, (score, TRIANGLE, OWN, EXPERT, AUXILIARY))
    predicted = editor.node("ArgMax", [LOGITS], "expert_predicted_class", axis=1, keepdims=1)
    row = editor.constant("expert_row_shape", np.array([-1], dtype=np.int64))

    def probability(logits: str, name: str) -> str:
        softmax = editor.node("Softmax", [logits], f"{name}_by_class", axis=1)
        return editor.node("Reshape", [editor.node("GatherElements", [softmax, predicted], f"{name}_column", axis=1), row], name)

    probability(LOGITS, OWN)
    probability(_include(editor, auxiliary, f"{AUXILIARY}_"), AUXILIARY)
    names = [*(f"expert_probability_{stage}" for stage in range(len(experts) - 1)), EXPERT]
    known = [probability(_include(editor, expert, f"{name}_"), name) for name, expert in zip(names, experts, strict=True)]
    corner = editor.constant("expert_k", np.array(k, dtype=np.float32))
    sure = editor.node("Add", [OWN, editor.node("Mean", known, "expert_mean")], "expert_sure")
    editor.node("Sub", [sure, editor.node("Mul", [corner, AUXILIARY], "expert_k_q")], score)
    _append_triangle(editor, corner)
    return editor.keep_outputs({LOGITS: ("classes",), score: (), TRIANGLE: (), OWN: (), EXPERT: (), AUXILIARY: ()})


def _append_triangle(editor: GraphEditor, corner: str) -> None:
    smallest, largest = (
        editor.constant(f"triangle_{value:g}", np.array(value, dtype=np.float32)) for value in (_SMALLEST, 1.0 / _SMALLEST)
    )
    one = editor.constant("triangle_one", np.array(1.0, dtype=np.float32))

    def bounded(value: str, name: str) -> str:
        return editor.node("Max", [value, smallest], f"triangle_{name}")

    k_p = editor.node("Mul", [corner, bounded(EXPERT, "p")], "triangle_k_p")
    left = editor.node("Div", [bounded(AUXILIARY, "q"), k_p], "triangle_left")
    above = bounded(editor.node("Sub", [one, EXPERT], "triangle_not_p"), "above")
    below = bounded(editor.node("Sub", [corner, AUXILIARY], "triangle_k_less_q"), "below")
    quotient = editor.node("Div", [above, below], "triangle_quotient")
    bounds = editor.node("Less", [AUXILIARY, corner], "triangle_q_below_k")
    right = editor.node("Where", [bounds, quotient, largest], "triangle_right")
    least = bounded(editor.node("Min", [left, right, largest], "triangle_least"), "s")
    editor.node("Neg", [editor.node("Log", [least], "triangle_log")], TRIANGLE)


def _include(editor: GraphEditor, model: onnx.ModelProto, prefix: str) -> str:
    """Copy the nodes of ``model`` under ``prefix``, reading the same pixels; returns the name of its logits."""
    own_pixels = editor.node("Identity", [PIXELS], f"{prefix}{PIXELS}")
    prefix = own_pixels.removesuffix(PIXELS)
    prefixed = compose.add_prefix(model, prefix)
    editor.model.graph.node.extend(prefixed.graph.node)
    editor.model.graph.initializer.extend(prefixed.graph.initializer)
    editor.model.functions.extend(prefixed.functions)
    return f"{prefix}{LOGITS}"
