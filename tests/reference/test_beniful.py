"""The two terms of BeniFul, which live inside the ONNX graph, against torch and against plain NumPy on the same features."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from audit_plugin.checks import BenifulScorer
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.benign_features import Windows, fit_benign_features
from audit_plugin.model.load import Network
from audit_plugin.model.reconstruction import DISAGREEMENT, LOG_DISTANCE, append_reconstruction
from audit_plugin.model.subject import prepare_subject
from audit_plugin.types import FitSplit, InputSpec
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.train import initialised, train

_spec = importlib.util.spec_from_file_location("beniful_reference", Path(__file__).parent / "beniful_reference.py")
reference_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_module)

CLASSES, SIZE, COUNT = 4, 10, 80  # 10 pixels: maps of 5 x 5, which windows of 2 do not divide


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    images = rng.integers(0, 120, (COUNT, SIZE, SIZE, 3))
    images[np.arange(COUNT), :, labels * 2] += 120  # a bright column tells the class
    split = FitSplit(images.astype(np.uint8), labels.astype(np.int64))
    return train(initialised(lambda: SmallCnn(3, CLASSES, width=8), 0), split, epochs=8, seed=0, batch=20).eval(), split


def onnx_subject(model, opset):
    buffer = io.BytesIO()
    torch.onnx.export(
        model, (torch.zeros(2, 3, SIZE, SIZE),), buffer, dynamo=False, opset_version=opset, dynamic_axes={"x": {0: "batch"}},
        input_names=["x"],
    )  # fmt: skip
    network = Network(onnx.load_from_string(buffer.getvalue()), (-1, 3, SIZE, SIZE), CLASSES, None, False)
    return prepare_subject(network, InputSpec(SIZE, SIZE, 3), flavour="onnx", class_names=tuple("abcd"))


@pytest.fixture(scope="module", params=["torch", "onnx 17", "onnx 9"])
def subject(request, trained, make_subject):
    if request.param == "torch":
        return make_subject(SamePooling(trained[0]), 3, SIZE)
    return onnx_subject(SamePooling(trained[0]).eval(), int(request.param.split()[1]))


class SamePooling(torch.nn.Module):
    """The network with an average over everything instead of over quarters, which older exporters cannot write."""

    def __init__(self, inner):
        super().__init__()
        self.features, self.head = inner.features, torch.nn.Linear(inner.classifier.in_features // 4, CLASSES)
        weight = inner.classifier.weight.data.view(CLASSES, -1, 4).sum(dim=2)
        self.head.weight.data, self.head.bias.data = weight, inner.classifier.bias.data.clone()

    def forward(self, pixels):
        return self.head(self.features(pixels).mean(dim=(2, 3)))

    def rest(self, features):
        return self.head(features.mean(dim=(2, 3)))


def features_of(subject, images):
    return subject.session.run(to_pixels(images))[subject.summary.taps[-1]]


def fitted_to(subject, split, most, rng):
    features = features_of(subject, split.images)
    windows = Windows.of(features.shape[1:], split.images.shape[1:3], most)
    classes = subject.predict(split.images)
    return fit_benign_features(windows.average(features), classes, windows, CLASSES, rng, latent_size=4, steps=50)


def reference_of(module, trained):
    head = SamePooling(trained[0]).head
    weight, bias = (value.detach().numpy().astype(np.float64) for value in (head.weight, head.bias))
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    return reference_module.BenifulReference(
        weights, module.windows.size, CLASSES, lambda features: weight @ features.mean(axis=(1, 2)) + bias
    )


# Sums of some hundred float32 products, each exact to about 1e-7, and a logarithm: 1e-4 leaves a factor of ten.
TOLERANCE = 1e-4


@pytest.mark.parametrize("most", [8192, 200], ids=["whole map", "windows of 2"])
def test_terms_agree_with_numpy_and_with_torch(subject, trained, most):
    fitted = fitted_to(subject, trained[1], most, np.random.default_rng(1))
    assert fitted.module.windows.size == (1 if most > 400 else 2)
    scored = subject.open_session(append_reconstruction(subject.onnx_model, subject.summary.taps[-1], fitted.module))
    images = np.random.default_rng(2).integers(0, 256, (30, SIZE, SIZE, 3)).astype(np.uint8)
    found = scored.run(to_pixels(images))
    features = features_of(subject, images)

    reference = reference_of(fitted.module, trained)
    expected = np.array([reference.terms(value.astype(np.float64)) for value in features])
    assert expected[:, 1].max() > 0.05  # the reconstruction changes some answers, so that the second term is put to the test
    np.testing.assert_allclose(found[LOG_DISTANCE], expected[:, 0], atol=TOLERANCE)
    np.testing.assert_allclose(found[DISAGREEMENT], expected[:, 1], atol=TOLERANCE)

    values = torch.from_numpy(features)
    classes = torch.from_numpy(subject.predict(images))
    with torch.no_grad():
        rest = SamePooling(trained[0]).rest
        answers = [torch.softmax(rest(part), dim=1) for part in (values, fitted.module.reconstruct(values, classes))]
    np.testing.assert_allclose(found[LOG_DISTANCE], fitted.module.distance(values, classes).log().numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found[DISAGREEMENT], 0.5 * (answers[0] - answers[1]).abs().sum(dim=1).numpy(), atol=TOLERANCE)


def test_scores_agree_with_numpy(subject, trained):
    # The score divides by deviations of 0.05 to 0.5, so that the terms' 1e-4 become at most some 1e-3.
    split = trained[1]
    check = BenifulScorer(latent_size=4, steps=50).fit(subject, split, np.random.default_rng(3))
    assert check.facts["tap"] == subject.summary.taps[-1]
    fitted = fitted_to(subject, split, 8192, np.random.default_rng(3))
    assert check.facts["kept_step"] == fitted.kept_step
    reference = reference_of(fitted.module, trained)

    def terms(images):
        return np.array([reference.terms(value.astype(np.float64)) for value in features_of(subject, images)])

    images = np.random.default_rng(4).integers(0, 256, (30, SIZE, SIZE, 3)).astype(np.uint8)
    expected = reference_module.score(terms(images), terms(split.images[fitted.held_out]))
    np.testing.assert_allclose(check.score(images), expected, rtol=2e-3, atol=5e-3)
    baselines = check.baselines(images)
    np.testing.assert_allclose(baselines["reconstruction distance alone"], terms(images)[:, 0], atol=TOLERANCE)
    np.testing.assert_allclose(baselines["inference consistency alone"], terms(images)[:, 1], atol=TOLERANCE)


def test_the_order_of_images_and_of_batches_does_not_matter(subject, trained):
    split = trained[1]
    check = BenifulScorer(latent_size=4, steps=50).fit(subject, split, np.random.default_rng(3))
    scores = check.score(split.images)
    order = np.random.default_rng(2).permutation(len(split))
    np.testing.assert_allclose(check.score(split.images[order]), scores[order], atol=1e-3)
    np.testing.assert_allclose(np.concatenate([check.score(split.images[i : i + 1]) for i in range(5)]), scores[:5], atol=1e-3)
