"""Models that answer NaN, or not for each image alone: by its neighbours, by their number, by chance.

No advisory: such a model breaks no software, it breaks what a measurement takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from audit_plugin.audit import audit
from audit_plugin.errors import AuditError, SubjectError
from audit_plugin.intake import inspect
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.model.load import load_network
from audit_plugin.model.subject import Subject, check_answers, prepare_subject
from audit_plugin.policy import VerdictPolicy
from audit_plugin.types import Expectation, ImageArray, InputSpec, ModelRef, Verdict
from audit_plugin.verdict import decide

SPEC = InputSpec(8, 8, 1)
NAMES = tuple("abcde")


@pytest.fixture
def images() -> ImageArray:
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)


class Network(nn.Module):
    """Linear scores that a function of the batch changes."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 5)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.head(self.body(x)))


def subject_of(module: nn.Module, folder: Path) -> Subject:
    """What an audit works with, by way of a file and all its checks."""
    torch.manual_seed(0)
    program = torch.export.export(module.eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "model.pt2")
    network = load_network(folder / "model.pt2", inspect(folder))
    return prepare_subject(network, SPEC, flavour="pt2", class_names=NAMES)


def test_a_model_that_answers_for_each_image_alone_is_accepted(images: ImageArray, tmp_path: Path) -> None:
    check_answers(subject_of(Network(lambda x, scores: scores), tmp_path), images)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, scores: scores + 5 * torch.roll(x, 1, 0).mean((1, 2, 3))[:, None],
        lambda x, scores: scores + torch.flip(scores, [0]),
        lambda x, scores: scores - scores.mean(0),
        lambda x, scores: scores + x.shape[0],
        lambda x, scores: scores * torch.arange(x.shape[0])[:, None],
        lambda x, scores: torch.cumsum(scores, 0),
    ],
    ids=["next", "opposite", "mean", "size", "place", "sum-so-far"],
)
def test_an_answer_that_depends_on_the_batch_is_refused(
    change: Callable[[Tensor, Tensor], Tensor], images: ImageArray, tmp_path: Path
) -> None:
    subject = subject_of(Network(change), tmp_path)
    with pytest.raises(SubjectError, match=r"answers differently .*must answer for each image by itself") as caught:
        check_answers(subject, images)
    assert "\n" not in str(caught.value)


def test_the_audit_itself_refuses_it(images: ImageArray, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    subject_of(Network(lambda x, scores: scores - scores.mean(0)), folder)
    clean = tmp_path / "clean.npz"
    pictures = np.random.default_rng(1).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    np.savez(clean, images=pictures, labels=np.arange(50) % 5)
    manifest = manifest_of(folder)
    reference = ModelRef(str(folder), str(folder), digest_of(manifest), manifest)
    with pytest.raises(SubjectError, match="answers differently"):
        audit(reference, folder, clean)


def onnx_subject(nodes: list[onnx.NodeProto], folder: Path) -> Subject:
    """A linear ONNX classifier, whose ``scores`` the nodes turn into ``y``."""
    weight = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["scores"]), *nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    network = load_network(folder / "model.onnx", inspect(folder))
    return prepare_subject(network, SPEC, flavour="onnx", class_names=NAMES)


def test_answers_by_chance_are_refused(images: ImageArray, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["scores"], ["noise"], scale=1.0),
        helper.make_node("Add", ["scores", "noise"], ["y"]),
    ]
    with pytest.raises(AuditError, match=r"answers differently|part at"):
        check_answers(onnx_subject(nodes, tmp_path), images)


class Sleeper(nn.Module):
    """Wakes up after a hundred calls: nothing of it shows in an audit, nor does any decision hang on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.head(x.flatten(1)) + 9 * (self.calls > 100) * torch.eye(5)[0]


def test_a_model_that_counts_its_calls_does_not_pass(tmp_path: Path) -> None:
    program = torch.export.export(Sleeper().eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    (finding,) = inspect(tmp_path).findings
    assert "the model changes its own state when it runs (calls)" in finding.message
    good = (Expectation("labels-in-range", "Labels are in range", True, "all are"),)
    decision = decide([], good, NAMES, VerdictPolicy(), [], (finding,))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.reasons[0].code == "changes-own-state"


def nan_for_bright_corners(x: Tensor, scores: Tensor) -> Tensor:
    return scores + 0 * torch.log(0.9 - x[:, :1, 0, 0])


def test_nan_for_some_images_is_an_error_and_never_a_class(images: ImageArray, tmp_path: Path) -> None:
    """argmax of NaN is the first NaN: without the check the answer would be a class."""
    images[:, 0, 0, 0] = 0
    subject = subject_of(Network(nan_for_bright_corners), tmp_path)
    assert subject.predict(images).shape == (7,)
    images[2:4, 0, 0, 0] = 255
    for ask in (subject.predict, subject.logits, lambda some: check_answers(subject, some)):
        with pytest.raises(SubjectError, match="NaN or infinity for 2 of 7 images"):
            ask(images)


def test_a_model_of_nan_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="NaN or infinity for ordinary pixels"):
        subject_of(Network(lambda x, scores: scores + torch.log(-1 - x.amax((1, 2, 3)))[:, None]), tmp_path)
