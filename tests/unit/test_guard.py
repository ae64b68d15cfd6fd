"""The guarded model against the check it was made from, run as a deployer would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from audit_plugin.checks import LayerwiseScorer
from audit_plugin.errors import CleanSetError
from audit_plugin.guard import build_guard
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.guarded import INPUT, guarded_model, to_model_input
from audit_plugin.model.subject import Subject
from audit_plugin.registry import pin
from audit_plugin.types import FitSplit, InputSpec
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train(initialised(lambda: SmallCnn(1, 10, width=8), 0), digits(seed=0, size=8).train, epochs=4, seed=0)


@pytest.fixture(scope="module")
def images() -> FitSplit:
    test = digits(seed=0, size=8).test
    return FitSplit(test.images, test.labels)


def run(model: onnx.ModelProto, batch: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {INPUT: batch})


def fit(subject: Subject, images: FitSplit):
    return LayerwiseScorer().fit(subject, FitSplit(images.images[:400], images.labels[:400]), np.random.default_rng(0))


class Scaled(nn.Module):
    """A network that wants its input in [-1, 1], channels last, and answers probabilities."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner((values.permute(0, 3, 1, 2) + 1.0) / 2.0).softmax(dim=1)


def test_it_scores_and_decides_as_the_check_does(make_subject, trained, images):
    subject = make_subject(trained, 1, 8)
    fitted = fit(subject, images)
    held_out = images.images[400:500]
    scores = fitted.score(held_out)
    threshold = float(np.median(scores))
    logits, suspicion, is_suspicious = run(guarded_model(subject.network, fitted.append_to, threshold), to_pixels(held_out))
    np.testing.assert_allclose(logits, subject.logits(held_out), rtol=1e-4, atol=1e-4)  # the same float32 graph, twice exported
    np.testing.assert_allclose(suspicion, scores, rtol=1e-4, atol=1e-4)
    assert is_suspicious.dtype == np.bool_
    np.testing.assert_array_equal(is_suspicious, suspicion > np.float32(threshold))
    assert 0 < is_suspicious.sum() < len(held_out)


def test_it_takes_the_models_own_scale_and_layout_and_gives_its_probabilities(make_subject, trained, images):
    from audit_plugin.model.load import _probe
    from audit_plugin.model.subject import prepare_subject
    from audit_plugin.model.torch_graph import plain_graph

    module = Scaled(trained).eval()
    exported = torch.export.export(module, (torch.zeros(4, 8, 8, 1),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    spec = InputSpec(8, 8, 1, layout="NHWC", low=-1.0, high=1.0)
    network = _probe(plain_graph(exported), (-1, 8, 8, 1), -1)
    assert network.gives_probabilities
    subject = prepare_subject(network, spec, flavour="pt2", class_names=tuple("0123456789"))
    fitted = fit(subject, images)
    held_out = images.images[400:450]
    own = to_model_input(to_pixels(held_out), spec)
    np.testing.assert_allclose(own, held_out / 255.0 * 2.0 - 1.0, atol=1e-6)
    answer, suspicion, _ = run(guarded_model(network, fitted.append_to, 2.5), own)
    with torch.no_grad():
        np.testing.assert_allclose(answer, module(torch.from_numpy(own)).numpy(), atol=1e-5)
    np.testing.assert_allclose(suspicion, fitted.score(held_out), rtol=1e-3, atol=1e-3)  # through two logarithms


@pytest.fixture(scope="module")
def model_file(trained, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("guard") / "model.pt2"
    program = torch.export.export(trained, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    return file


@pytest.fixture(scope="module")
def clean_file(images, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("clean") / "clean.npz"
    np.savez(file, images=images.images, labels=images.labels)
    return file


def test_a_built_guard_keeps_near_its_false_positive_rate_and_needs_nothing_of_ours(model_file, clean_file, tmp_path):
    pinned = pin(str(model_file), tmp_path / "pinned")
    guard = build_guard(pinned.reference, pinned.folder, clean_file, false_positive_rate=0.1, search=False)
    assert guard.detection_rate is None
    assert guard.document()["detection_rate"] is None
    assert guard.false_positive_rate.low <= 0.1 <= guard.false_positive_rate.high + 0.05  # 216 test and 144 calibration images
    assert guard.false_positive_rate.trials == 216

    onnx.save(guard.model, tmp_path / "guarded.onnx")
    np.save(tmp_path / "batch.npy", guard.example)
    program = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('guarded.onnx', providers=['CPUExecutionProvider'])\n"
        "answer, suspicion, flags = session.run(None, {'input': numpy.load('batch.npy')})\n"
        "assert answer.shape == (16, 10) and suspicion.shape == flags.shape == (16,) and flags.dtype == bool\n"
        "assert not {'audit_plugin', 'torch', 'mlflow', 'onnx'} & set(sys.modules)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_too_few_images_for_the_rate_are_refused_with_the_number_needed(model_file, clean_file, tmp_path):
    pinned = pin(str(model_file), tmp_path / "pinned")
    with pytest.raises(CleanSetError, match=r"at least 9999 are needed.*larger --fpr"):
        build_guard(pinned.reference, pinned.folder, clean_file, false_positive_rate=0.0001, search=False)


def test_a_model_that_does_not_know_the_images_gets_no_guard(model_file, images, tmp_path):
    file = tmp_path / "wrong.npz"
    np.savez(file, images=images.images, labels=(images.labels + 1) % 10)
    pinned = pin(str(model_file), tmp_path / "pinned")
    with pytest.raises(CleanSetError, match="at least 50% are expected"):
        build_guard(pinned.reference, pinned.folder, file, search=False)
