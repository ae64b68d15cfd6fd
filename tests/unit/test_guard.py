"""The guarded model against the model and the check it was made from, run as a deployer would run it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from audit_plugin.checks import LayerwiseScorer
from audit_plugin.errors import CleanSetError, InapplicableError, UsageError
from audit_plugin.guard import Guard, build_guard
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import rate
from audit_plugin.model.guarded import INPUT, guarded_model, to_model_input
from audit_plugin.model.load import Network, _probe
from audit_plugin.model.onnx_graph import read_model
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.registry import pin
from audit_plugin.report.guards import guard_document, render_guard
from audit_plugin.types import FitSplit, InputSpec
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train(initialised(lambda: SmallCnn(1, 10, width=8), 0), digits(seed=0, size=8).train, epochs=4, seed=0)


@pytest.fixture(scope="module")
def images() -> FitSplit:
    test = digits(seed=0, size=8).test
    return FitSplit(test.images, test.labels)


def run(model: onnx.ModelProto, batch: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})


def names_of(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in (*model.graph.input, *model.graph.output)]


def fit(subject: Subject, images: FitSplit):
    return LayerwiseScorer().fit(subject, FitSplit(images.images[:400], images.labels[:400]), np.random.default_rng(0))


def exported(module: nn.Module, shape: tuple[int, ...], batch: int | None = None) -> Network:
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module.eval(), (torch.zeros(batch or 4, *shape),), dynamic_shapes=dynamic)
    return _probe(plain_graph(program), (batch or -1, *shape), batch or -1)


class Scaled(nn.Module):
    """A network that wants its input in [-1, 1], channels last, and answers probabilities, most of them tiny."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (self.inner((values.permute(0, 3, 1, 2) + 1.0) / 2.0) * 10.0).softmax(dim=1)


def test_it_scores_and_decides_as_the_check_does(make_subject, trained, images):
    subject = make_subject(trained, 1, 8)
    fitted = fit(subject, images)
    held_out = images.images[400:500]
    scores = fitted.score(held_out)
    threshold = float(np.median(scores))
    guarded = guarded_model(subject.network, fitted.append_to, threshold)
    logits, suspicion, is_suspicious = run(guarded, to_pixels(held_out))
    assert names_of(guarded) == [INPUT, "logits", "suspicion", "is_suspicious"]
    with torch.no_grad():
        expected = trained.cpu().eval()(torch.from_numpy(to_pixels(held_out))).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)  # torch and ONNX Runtime in float32
    np.testing.assert_allclose(suspicion, scores, rtol=1e-4, atol=1e-4)  # the same float32 graph, exported twice
    assert is_suspicious.dtype == np.bool_
    np.testing.assert_array_equal(is_suspicious, suspicion > np.float32(threshold))
    assert 0 < is_suspicious.sum() < len(held_out)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_cannot_be_judged_is_suspicious(make_subject, trained, images, value):
    subject = make_subject(trained, 1, 8)
    fitted = fit(subject, images)
    threshold = float(fitted.score(images.images[400:500]).max()) + 1.0
    batch = to_pixels(images.images[400:403])
    batch[1, 0, 3, 3] = value
    _, suspicion, is_suspicious = run(guarded_model(subject.network, fitted.append_to, threshold), batch)
    assert np.isfinite(suspicion).tolist() == [True, False, True]
    assert is_suspicious.tolist() == [False, True, False]


def test_suspicion_is_the_papers_sum_of_cosines(make_subject, trained, images):
    """Against NumPy on the features of the audited model: (mean - sum of the cosines at the layers of interest) / deviation."""
    subject = make_subject(trained, 1, 8)
    fitted = fit(subject, images)
    held_out = images.images[400:450]
    arguments = fitted.append_to.keywords
    features = subject.session.run(to_pixels(held_out))
    predicted = features["logits"].argmax(axis=1)
    total = np.zeros(len(held_out))
    for column, (layer, centroids) in enumerate(arguments["centroids"].items()):
        own, flat = centroids[predicted].astype(np.float64), features[layer].reshape(len(held_out), -1).astype(np.float64)
        cosines = (own * flat).sum(axis=1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(flat, axis=1))
        total += arguments["weights"][predicted, column] * cosines
    expected = (arguments["mean"][predicted] - total) / arguments["deviation"][predicted]
    _, suspicion, _ = run(guarded_model(subject.network, fitted.append_to, 2.5), to_pixels(held_out))
    # float32 cosines carry an error of about 1e-6; the deviations are 0.01 and more.
    np.testing.assert_allclose(suspicion, expected, rtol=1e-3, atol=1e-3)


def test_it_takes_the_models_own_scale_and_layout_and_gives_its_probabilities(trained, images):
    module = Scaled(trained).eval()
    spec = InputSpec(8, 8, 1, layout="NHWC", low=-1.0, high=1.0)
    network = exported(module, (8, 8, 1))
    assert network.gives_probabilities
    subject = prepare_subject(network, spec, flavour="pt2", class_names=NAMES)
    fitted = fit(subject, images)
    held_out = images.images[400:450]
    own = to_model_input(to_pixels(held_out), spec)
    np.testing.assert_allclose(own, held_out / 255.0 * 2.0 - 1.0, atol=1e-6)
    guarded = guarded_model(network, fitted.append_to, 2.5)
    answer, suspicion, _ = run(guarded, own)
    assert names_of(guarded)[:2] == [INPUT, "probabilities"]
    assert guarded.graph.input[0].type.tensor_type.shape.dim[3].dim_value == 1
    with torch.no_grad():
        expected = module(torch.from_numpy(own)).numpy()
    assert expected.min() < 1e-13  # smaller than what the audit's logarithm keeps: the answer is none of its exponentials
    np.testing.assert_allclose(answer, expected, rtol=1e-2, atol=0)  # logits differ by 1e-4 at most, times ten
    np.testing.assert_allclose(suspicion, fitted.score(held_out), rtol=1e-3, atol=1e-3)


def test_a_fixed_batch_size_stays(trained, images):
    """The flattening with a constant makes a graph that insists on its batch of five."""

    class Insisting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.inner(values.reshape(5, 1, 8, 8))

    network = exported(Insisting(trained), (1, 8, 8), batch=5)
    assert network.batch_size == 5
    subject = prepare_subject(network, InputSpec(8, 8, 1), flavour="pt2", class_names=NAMES)
    fitted = fit(subject, images)
    held_out = images.images[400:405]
    guarded = guarded_model(network, fitted.append_to, 2.5)
    sizes = [value.type.tensor_type.shape.dim[0].dim_value for value in (*guarded.graph.input, *guarded.graph.output)]
    assert sizes == [5, 5, 5, 5]
    logits, suspicion, _ = run(guarded, to_pixels(held_out))
    np.testing.assert_allclose(logits, subject.logits(held_out), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(suspicion, fitted.score(held_out), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ models that are ONNX


def onnx_file(folder: Path, names: dict[str, str]) -> Path:
    """Images in [0, 255] -> two ReLU layers -> scores, its values called by ``names``."""
    rng = np.random.default_rng(0)
    name = {key: names.get(key, key) for key in ("x", "scaled", "flat", "a", "hidden", "b", "second", "y")}
    weights = [
        numpy_helper.from_array(np.array(255.0, dtype=np.float32), "range"),
        numpy_helper.from_array(rng.normal(size=(64, 24)).astype(np.float32), "first_weight"),
        numpy_helper.from_array(rng.normal(size=(24, 16)).astype(np.float32), "second_weight"),
        numpy_helper.from_array(rng.normal(size=(16, 3)).astype(np.float32), "head"),
    ]
    nodes = [
        helper.make_node("Div", [name["x"], "range"], [name["scaled"]]),
        helper.make_node("Flatten", [name["scaled"]], [name["flat"]], axis=1),
        helper.make_node("MatMul", [name["flat"], "first_weight"], [name["a"]]),
        helper.make_node("Relu", [name["a"]], [name["hidden"]]),
        helper.make_node("MatMul", [name["hidden"], "second_weight"], [name["b"]]),
        helper.make_node("Relu", [name["b"]], [name["second"]]),
        helper.make_node("MatMul", [name["second"], "head"], [name["y"]]),
    ]
    source = helper.make_tensor_value_info(name["x"], TensorProto.FLOAT, ["batch", 1, 8, 8])
    target = helper.make_tensor_value_info(name["y"], TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "small", [source], [target], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("names", "outside"),
    [
        ({"x": "image", "y": "scores"}, ["image", "scores"]),
        ({"x": "logits", "y": "pixels", "a": "suspicion", "hidden": "is_suspicious"}, ["logits", "pixels"]),
        ({"x": "is_suspicious", "y": "suspicion"}, ["input", "logits"]),  # these names are the guard's own
    ],
    ids=["plain", "names of ours inside", "names of ours outside"],
)
def test_an_onnx_model_keeps_its_names(tmp_path, names, outside):
    program = read_model(onnx_file(tmp_path, names))
    network = _probe(program, (-1, 1, 8, 8), -1)
    spec = InputSpec(8, 8, 1, high=255.0)
    subject = prepare_subject(network, spec, flavour="onnx", class_names=("a", "b", "c"))
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
    fitted = LayerwiseScorer().fit(subject, FitSplit(pictures, subject.predict(pictures)), rng)
    guarded = guarded_model(network, fitted.append_to, 0.5)
    assert names_of(guarded) == [*outside, "suspicion", "is_suspicious"]
    own = to_model_input(to_pixels(pictures), spec)
    original = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = original.run(None, {original.get_inputs()[0].name: own})
    answer, suspicion, flags = run(guarded, own)
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(suspicion, fitted.score(pictures), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(flags, suspicion > np.float32(0.5))


# ------------------------------------------------------------------------------------------------------ building


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


@pytest.fixture(scope="module")
def built(model_file, clean_file, tmp_path_factory) -> Guard:
    pinned = pin(str(model_file), tmp_path_factory.mktemp("pinned"))
    return build_guard(pinned.reference, pinned.folder, clean_file, false_positive_rate=0.1, search=False)


ALONE = """
import sys, importlib.util
sys.path[:] = [place for place in sys.path if "site-packages" not in place] + ["packages"]
for missing in ("audit_plugin", "torch", "mlflow", "onnx"):
    assert importlib.util.find_spec(missing) is None, missing
import numpy, onnxruntime
session = onnxruntime.InferenceSession("guarded.onnx", providers=["CPUExecutionProvider"])
answer, suspicion, flags = session.run(None, {"input": numpy.load("batch.npy")})
numpy.savez("answers.npz", answer=answer, suspicion=suspicion, flags=flags)
"""


def test_the_file_needs_onnx_runtime_alone(built, trained, images, tmp_path):
    (tmp_path / "packages").mkdir()
    site = Path(np.__file__).parents[1]
    for package in ("numpy", "numpy.libs", "onnxruntime"):
        if (site / package).exists():
            (tmp_path / "packages" / package).symlink_to(site / package)
    onnx.save(built.model, tmp_path / "guarded.onnx")
    pixels = to_pixels(images.images[:30])
    np.save(tmp_path / "batch.npy", pixels)
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    answers = np.load(tmp_path / "answers.npz")
    with torch.no_grad():
        np.testing.assert_allclose(answers["answer"], trained(torch.from_numpy(pixels)).numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(answers["flags"], answers["suspicion"] > np.float32(built.report.threshold.value))
    assert answers["suspicion"].shape == (30,)


def test_the_rates_are_those_of_images_that_chose_nothing(built):
    threshold = built.report.threshold
    assert threshold.false_positive_rate.trials == 216  # 30 % of 719
    assert built.report.calibration_count == 144
    # The quantile of 144 scores promises at most 10 % on average; both samples are binomial, so two deviations are allowed.
    assert threshold.false_positive_rate.value <= 0.1 + 2 * np.sqrt(0.1 * 0.9 * (1 / 216 + 1 / 144))
    assert threshold.detection_rate is None
    assert built.report.detection_missing == "no trigger was searched for"


def test_the_file_says_what_it_guards(built):
    written = {entry.key: entry.value for entry in built.model.metadata_props}
    assert written["audit.guard_of_digest"] == built.report.model.digest
    assert float(written["audit.guard_threshold"]) == pytest.approx(built.report.threshold.value, rel=1e-5)


def test_no_clean_image_leaves_with_the_guard(built):
    np.testing.assert_array_equal(built.example, np.full((1, 1, 8, 8), 0.5, dtype=np.float32))


def test_what_is_told(built):
    text = render_guard(built.report, "guard.onnx", None)
    assert "not measured: no trigger was searched for" in text
    assert "10.0 % were asked for" in text
    document = guard_document(built.report, "guard.onnx")
    assert document["detection_rate"] is None
    assert document["false_positive_rate"]["trials"] == 216
    assert document["notes"] == []
    flagged = dataclasses.replace(built.report.threshold, false_positive_rate=rate(100, 216))
    batch = dataclasses.replace(built.report.subject, batch_size=4)
    (first, second) = guard_document(dataclasses.replace(built.report, threshold=flagged, subject=batch))["notes"]
    assert "more clean test images are called suspicious than were asked for" in first
    assert "batches of exactly 4 images" in second


# ------------------------------------------------------------------------------------------------ what is refused


def test_too_few_images_for_the_rate_are_refused_with_the_number_needed(model_file, clean_file, tmp_path):
    pinned = pin(str(model_file), tmp_path / "pinned")
    with pytest.raises(CleanSetError, match=r"at least 9999 are needed, that is about 49995 clean images .*larger --fpr"):
        build_guard(pinned.reference, pinned.folder, clean_file, false_positive_rate=0.0001, search=False)


def test_a_model_that_does_not_know_the_images_gets_no_guard(model_file, images, tmp_path):
    file = tmp_path / "wrong.npz"
    np.savez(file, images=images.images, labels=(images.labels + 1) % 10)
    pinned = pin(str(model_file), tmp_path / "pinned")
    with pytest.raises(CleanSetError, match="at least 50% are expected"):
        build_guard(pinned.reference, pinned.folder, file, search=False)


@pytest.mark.parametrize("false_positive_rate", [0.0, 1.0, -0.1, float("nan")])
def test_the_rate_must_lie_between_0_and_1(model_file, clean_file, tmp_path, false_positive_rate):
    pinned = pin(str(model_file), tmp_path / "pinned")
    with pytest.raises(UsageError, match="between 0 and 1"):
        build_guard(pinned.reference, pinned.folder, clean_file, false_positive_rate=false_positive_rate)


class Nearest(nn.Module):
    """A linear classifier, optionally behind a layer whose features hardly depend on the image."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.constant = constant
        self.head = nn.Linear(64, 2)
        nn.init.constant_(self.head.weight, 1.0)
        with torch.no_grad():
            self.head.weight[0].neg_()
            self.head.bias.copy_(torch.tensor([32.0, -32.0]))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scores = self.head(values.flatten(1))
        if not self.constant:
            return scores
        sure = (scores * 1e6).clamp(-1.0, 1.0)
        hidden = torch.relu(sure @ torch.eye(2))
        return hidden * 5.0


@pytest.mark.parametrize(("constant", "message"), [(True, "rounding noise"), (False, "no intermediate block")])
def test_a_model_whose_layers_say_nothing_cannot_be_guarded(tmp_path, constant, message):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    pictures = (rng.integers(0, 100, (200, 8, 8, 1)) + labels[:, None, None, None] * 150).astype(np.uint8)
    np.savez(tmp_path / "clean.npz", images=pictures, labels=labels)
    module = Nearest(constant).eval()
    program = torch.export.export(module, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    pinned = pin(str(tmp_path / "model.pt2"), tmp_path / "pinned")
    with pytest.raises(InapplicableError, match=f"This model cannot be guarded.*{message}"):
        build_guard(pinned.reference, pinned.folder, tmp_path / "clean.npz", false_positive_rate=0.1, search=False)
