"""BaDExpert on a small digit network with a planted backdoor and on its clean twin, and where it says nothing."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from audit_plugin.checks import BadExpertScorer, bad_expert
from audit_plugin.checks.bad_expert import corner_of
from audit_plugin.checks.measurement import measure_scorer
from audit_plugin.errors import InapplicableError
from audit_plugin.model import fine_tuned_copies
from audit_plugin.model.subject import Subject
from audit_plugin.types import CalibrateSplit, FitSplit, Splits, TestSplit
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train

ATTACK = BadNets(target_class=0, poisoning_rate=0.2, size=3)


@pytest.fixture(scope="module")
def data():
    return digits(seed=0)


@pytest.fixture(scope="module")
def splits(data):
    images, labels = data.test.images, data.test.labels
    parts = ((images[rows], labels[rows]) for rows in (slice(300), slice(300, 500), slice(500, None)))
    return Splits(*(kind(*part) for kind, part in zip((FitSplit, CalibrateSplit, TestSplit), parts, strict=True)))


@pytest.fixture(scope="module")
def subject_of(data, make_subject):
    """One recipe, with the backdoor or without."""

    def make(images):
        model = train(initialised(lambda: SmallCnn(1, 10, width=8), 0), images, epochs=6, seed=0, learning_rate=0.02)
        return make_subject(model, 1, 16)

    return make


def measured(subject, splits, stamped, check=None):
    return measure_scorer(
        check or BadExpertScorer(),
        subject,
        splits,
        np.random.default_rng(0),
        stamped=stamped,
        stamped_class=ATTACK.target_class,
        false_positive_rate=0.05,
    )


@pytest.fixture(scope="module")
def planted(data, splits, subject_of):
    """The backdoored subject, triggered images that reach the target, and what the check measures."""
    subject = subject_of(ATTACK.poison(data.train, np.random.default_rng(0)))
    stamped = ATTACK.stamp(splits.test.images[splits.test.labels != ATTACK.target_class])
    assert (subject.predict(stamped) == ATTACK.target_class).mean() > 0.95
    stamped = stamped[subject.predict(stamped) == ATTACK.target_class]
    before = subject.onnx_model.SerializeToString(), [weight.clone() for weight in subject.torch_module().parameters()]
    scores, fitted = measured(subject, splits, stamped)
    return subject, stamped, before, scores, fitted


def test_the_expert_forgets_its_task_and_keeps_the_backdoor(planted, splits):
    subject, stamped, _, _, fitted = planted
    assert fitted.facts["held_out_accuracy"] > 0.9
    assert fitted.facts["expert_accuracy"] <= 0.25
    early, late = fitted.facts["early_expert_accuracies"]
    assert 0.25 < late <= 0.75 * fitted.facts["held_out_accuracy"]
    assert late < early <= 0.9 * fitted.facts["held_out_accuracy"]
    assert fitted.facts["auxiliary_accuracy"] >= fitted.facts["held_out_accuracy"] - 0.03
    assert fitted.facts["held_out_images"] == 60
    # Its probability of the model's own answer: a clean image's class is about as likely as any other, the trigger's far more.
    chance = 1 / subject.class_count
    assert np.median(fitted.baselines(splits.test.images)["expert alone"]) < 2 * chance
    assert np.median(fitted.baselines(stamped)["expert alone"]) > 3 * chance


def test_triggered_images_stand_out(planted):
    scores = planted[3]
    (threshold,) = scores.thresholds
    assert scores.auroc > 0.99
    assert threshold.detection_rate.value > 0.95
    assert threshold.false_positive_rate.low <= 0.05 <= threshold.false_positive_rate.high
    assert [baseline.name for baseline in scores.baselines] == [
        "triangle score of the paper",
        "expert alone",
        "auxiliary model alone",
        "model's own confidence",
    ]


def test_fitting_leaves_the_subject_alone(planted):
    subject, _, (graph, weights), _, _ = planted
    assert subject.onnx_model.SerializeToString() == graph
    assert all(torch.equal(one, other) for one, other in zip(weights, subject.torch_module().parameters(), strict=True))
    assert not any(weight.requires_grad for weight in subject.torch_module().parameters())


def test_the_clean_twin_raises_no_alarm(data, splits, subject_of):
    subject = subject_of(data.train)
    stamped = ATTACK.stamp(splits.test.images[splits.test.labels != ATTACK.target_class])
    scores, fitted = measured(subject, splits, stamped)
    (threshold,) = scores.thresholds
    # Split conformal: 5 % expected; 200 calibration and 219 test images spread it by 2.1 points.
    assert threshold.false_positive_rate.value <= 0.05 + 3 * 0.021
    assert threshold.detection_rate.value < 0.5  # of images with a patch that means nothing to this network
    assert fitted.facts["expert_accuracy"] <= 0.25


def test_one_seed_one_result_and_facts_are_json(planted, splits):
    subject, stamped, _, _, fitted = planted
    again = BadExpertScorer().fit(subject, splits.fit, np.random.default_rng(0))
    assert again.facts["expert_learning_rate"] == fitted.facts["expert_learning_rate"]
    np.testing.assert_allclose(again.score(stamped), fitted.score(stamped), atol=1e-4)
    assert json.loads(json.dumps(dict(again.facts))) == again.facts


def test_no_images_no_baselines(planted, splits):
    assert {len(values) for values in planted[4].baselines(splits.test.images[:0]).values()} == {0}


@pytest.mark.parametrize(("given", "k"), [(0.3, 0.3), (None, 0.4)])
def test_k_can_be_given(planted, splits, monkeypatch, given, k):
    monkeypatch.setattr(BadExpertScorer, "_experts", lambda self, tuning: [tuning.measured(tuning.copy(), 0.0)])
    monkeypatch.setattr(BadExpertScorer, "_auxiliary", lambda self, tuning: tuning.measured(tuning.copy(), 0.0))
    monkeypatch.setattr(Subject, "export", lambda self, module: self.onnx_model)
    fitted = BadExpertScorer(k=given).fit(planted[0], splits.fit, np.random.default_rng(0))
    assert fitted.facts["k"] == k
    images = splits.test.images[:20]
    confidence = fitted.baselines(images)["model's own confidence"]  # m = p = q: both copies are the model itself
    np.testing.assert_allclose(fitted.score(images), (2.0 - k) * confidence, atol=1e-6)


# ------------------------------------------------------------------------------------------------ inapplicable


def refused(check, subject, split, words):
    with pytest.raises(InapplicableError, match=words):
        check.fit(subject, split, np.random.default_rng(0))


def test_too_few_images(planted, splits):
    few = FitSplit(splits.fit.images[:49], splits.fit.labels[:49])
    refused(BadExpertScorer(), planted[0], few, r"needs at least 50 clean images in the fit split, there are 49\. Give more")


def test_an_old_opset(planted, splits):
    old = onnx.ModelProto()
    old.CopyFrom(planted[0].onnx_model)
    for opset in old.opset_import:
        opset.version = 9
    refused(
        BadExpertScorer(), dataclasses.replace(planted[0], onnx_model=old), splits.fit, "needs ONNX opset 11, the model has 9"
    )


def test_weights_in_half_precision(planted, splits, monkeypatch):
    module = Subject.torch_module
    monkeypatch.setattr(Subject, "torch_module", lambda self: copy.deepcopy(module(self)).half())
    refused(BadExpertScorer(), planted[0], splits.fit, "weights are float16")


def test_a_model_that_is_never_right(planted, splits):
    wrong = FitSplit(splits.fit.images, (splits.fit.labels + 5) % 10)
    refused(BadExpertScorer(), planted[0], wrong, r"right on \d% of the held-out .* Check labels and preprocessing")


def test_a_model_too_large_for_one_graph(planted, splits, monkeypatch):
    monkeypatch.setattr(bad_expert, "_LARGEST_GRAPH", planted[0].onnx_model.ByteSize() * 2)
    refused(BadExpertScorer(), planted[0], splits.fit, "4 fine-tuned copies would be larger than the 2 GiB")


def test_an_expert_that_does_not_forget(planted, splits, monkeypatch):
    monkeypatch.setattr(fine_tuned_copies, "LAST_RATE", fine_tuned_copies.FIRST_RATE)
    refused(BadExpertScorer(), planted[0], splits.fit, r"No learning rate up to 0.05 .* stayed above 25%")


def test_an_auxiliary_model_that_loses_its_accuracy(planted, splits, monkeypatch):
    monkeypatch.setattr(bad_expert, "_AUXILIARY_RATES", (30.0, 10.0))
    monkeypatch.setattr(BadExpertScorer, "_experts", lambda self, tuning: None)
    check = BadExpertScorer(auxiliary_epochs=5)
    refused(check, planted[0], splits.fit, r"cost more than 3% accuracy at every learning rate down to 10; more clean images")


@pytest.mark.parametrize("class_count", [2, 10])
def test_wrong_labels_are_all_others_alike_and_never_the_right_one(planted, splits, class_count):
    tuning = fine_tuned_copies.Tuning(planted[0], splits.fit, np.random.default_rng(0))
    tuning.labels, tuning.class_count = torch.zeros(9000, dtype=torch.int64), class_count
    tuning.copy()
    first, second = tuning.wrong_labels(), tuning.wrong_labels()
    counts = torch.bincount(first, minlength=class_count)
    assert counts[0] == 0
    # A class has 9000 / (classes - 1) of them, give or take a binomial deviation of 30 with ten classes.
    assert (counts[1:] - 9000 / (class_count - 1)).abs().max() < 5 * 30
    assert torch.equal(first, second) == (class_count == 2)
    tuning.copy()  # every copy is taught the same
    assert torch.equal(tuning.wrong_labels(), first)


def test_an_auxiliary_model_may_lose_exactly_the_tolerance(planted, splits, monkeypatch):
    """98 less 3 of 100 images is 95, but not in floating point."""
    tuning = fine_tuned_copies.Tuning(planted[0], splits.fit, np.random.default_rng(0))
    tuning.accuracy = float(np.float32(0.98))
    monkeypatch.setattr(tuning, "steps", lambda *arguments: ())
    monkeypatch.setattr(
        tuning, "measured", lambda module, rate: fine_tuned_copies.FineTuned(module, rate, float(np.float32(0.95)), 0.1)
    )
    assert BadExpertScorer(auxiliary_tolerance=0.03)._auxiliary(tuning).learning_rate == bad_expert._AUXILIARY_RATES[0]


def test_a_model_without_gradients_or_weights(make_subject, splits):
    class Fixed(nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1)[:, :10]

    refused(BadExpertScorer(), make_subject(Fixed(), 1, 16), splits.fit, "stores no trainable weights")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_accuracy": 0.0}, "expert_accuracy must lie between 0 and 1, got 0.0"),
        ({"expert_accuracy": 1.0}, "expert_accuracy"),
        ({"k": 1.0}, "k must lie between 0 and 1, got 1.0"),
        ({"k": 0.0}, "k must lie"),
        ({"auxiliary_epochs": 4}, "auxiliary_epochs must be at least 5, got 4"),
        ({"auxiliary_tolerance": -0.1}, "auxiliary_tolerance must lie"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        BadExpertScorer(**settings)


# ------------------------------------------------------------------------------------------------ the corner k


def narrow_vgg():
    module = torchvision.models.vgg11(num_classes=10)
    module.classifier = nn.Linear(512 * 7 * 7, 10)
    return module


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 0.5),
    "vgg11": (narrow_vgg, 0.4),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35), 0.2),
    "multilayer perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10)), 0.5),
}


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NETWORKS)[1:3]), "multilayer perceptron"]
)
def test_k_is_read_off_the_architecture(name):
    build, expected = NETWORKS[name]
    exported = torch.onnx.export(build().eval(), (torch.zeros(1, 3, 32, 32),), dynamo=True, verbose=False)
    assert corner_of(exported.model_proto) == expected


def test_normalisation_is_no_shortcut(make_subject):
    normalised = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}
    assert corner_of(make_subject(SmallCnn(3, 10, width=4), 3, 16, **normalised).onnx_model) == 0.4


def chain(weight_shape, group, constants):
    """Conv, plus a stored bias, with the stored values as initialisers or as Constant nodes."""
    stored = {"w": np.ones(weight_shape, np.float32), "b": np.ones((1, weight_shape[0], 1, 1), np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    nodes = [helper.make_node("Conv", ["pixels", "w"], ["c"], group=group), helper.make_node("Add", ["c", "b"], ["logits"])]
    if constants:
        nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors] + nodes
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("pixels", "logits"))
    source, sink = ends
    return helper.make_model(helper.make_graph(nodes, "chain", [source], [sink], [] if constants else tensors))


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize(("shape", "group", "expected"), [((8, 4, 3, 3), 1, 0.4), ((8, 4, 3, 3), 2, 0.4), ((8, 1, 3, 3), 8, 0.2)])
def test_k_of_graphs_that_keep_their_weights_in_constant_nodes(constants, shape, group, expected):
    assert corner_of(chain(shape, group, constants)) == expected
