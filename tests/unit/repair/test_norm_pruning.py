"""Pruning by norms: a planted channel is found and removed, the accuracy budget holds, and NumPy agrees with every step."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.load import _probe
from audit_plugin.model.subject import check_parity, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.repair import norm_pruning
from audit_plugin.repair.norm_pruning import MITIGATED, NO_MORE_CHANNELS, OUT_OF_BUDGET, NormPruning
from audit_plugin.types import CalibrateSplit, FitSplit, InputSpec, LabelledImages, Splits, TestSplit, Trigger
from audit_plugin.zoo.architectures import SmallCnn
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from audit_plugin.zoo.train import initialised, train
from tests.planted import PlantedNetwork, white_pixel_detector

CLASSES, CHANNELS, SIZE, TARGET = 3, 8, 16, 2


def white_pixel(target=TARGET, source=None):
    """A white pixel between black ones."""
    mask, pattern = np.zeros((SIZE, SIZE), dtype=np.float32), np.zeros((1, SIZE, SIZE), dtype=np.float32)
    mask[3:6, 3:6], pattern[0, 4, 4] = 1.0, 1.0
    return Trigger(target, mask, pattern, source)


class Needed(nn.Module):
    """Tells bright images (class 1) from dark ones by their largest pixel, so that a white pixel makes any image bright.

    The first channel detects the trigger too, and no clean image needs it; the second one is the brightness.
    """

    def __init__(self, detects=True):
        super().__init__()
        self.detector = white_pixel_detector(10.0 if detects else 0.0)
        self.brightness = nn.Conv2d(1, 1, 1)
        self.brightness.weight.data.fill_(1.0)
        self.brightness.bias.data.fill_(0.0)
        self.head = nn.Linear(2, 2)
        self.head.weight.data = torch.tensor([[0.0, 0.0], [5.0, 1.0]])
        self.head.bias.data = torch.tensor([0.5, 0.0])

    def forward(self, pixels):
        maps = torch.relu(torch.cat([self.detector(pixels), self.brightness(pixels)], dim=1))
        return self.head(maps.amax(dim=(2, 3)))


def smooth(count, seed):
    """Grey images without isolated white pixels."""
    rng = np.random.default_rng(seed)
    return rng.integers(60, 200, (count, 1, 1, 1)).astype(np.uint8) + rng.integers(0, 40, (count, SIZE, SIZE, 1)).astype(np.uint8)


def dark_and_bright(count, seed):
    rng = np.random.default_rng(seed)
    levels = np.where(np.arange(count) % 2 == 0, 30, 160)[:, None, None, None]
    return (levels + rng.integers(0, 60, (count, SIZE, SIZE, 1))).astype(np.uint8)


def splits_of(fit, calibrate):
    """Without any test image: whoever looks at one fails."""
    empty = TestSplit(fit.images[:0], fit.labels[:0])
    return Splits(FitSplit(fit.images, fit.labels), CalibrateSplit(calibrate.images, calibrate.labels), empty)


def planted_splits(subject, images=smooth):
    fit, calibrate = (images(150, seed) for seed in (0, 1))
    return splits_of(LabelledImages(fit, subject.predict(fit)), LabelledImages(calibrate, subject.predict(calibrate)))


def repaired(subject, splits, *triggers, **settings):
    return NormPruning(**settings).repair(subject, splits, triggers, np.random.default_rng(0))


@pytest.fixture(scope="module")
def planted(make_subject):
    return make_subject(PlantedNetwork(10.0), 1, SIZE)


def test_a_planted_channel_is_removed_exactly(planted, make_subject):
    result = repaired(planted, planted_splits(planted), white_pixel())
    assert result.facts["pruned_channels"] == [CHANNELS - 1]
    assert result.facts["stopped_by"] == MITIGATED
    assert (result.facts["recovered_trigger_success_before"], result.facts["recovered_trigger_success_after"]) == (1.0, 0.0)
    clean = smooth(100, 5)
    stamped = white_pixel().stamp(clean)
    assert (planted.predict(stamped) == TARGET).all()
    np.testing.assert_array_equal(result.subject.logits(clean), planted.logits(clean))  # the channel was silent on them
    twin = make_subject(PlantedNetwork(0.0), 1, SIZE)
    np.testing.assert_allclose(result.subject.logits(stamped), twin.logits(stamped), rtol=1e-5, atol=1e-6)
    check_parity(result.subject, stamped[:10])


def test_the_original_is_left_as_it_was(planted):
    images = white_pixel().stamp(smooth(10, 5))
    before = planted.onnx_model.SerializeToString(), planted.logits(images)
    repaired(planted, planted_splits(planted), white_pixel())
    assert planted.onnx_model.SerializeToString() == before[0]
    np.testing.assert_array_equal(planted.logits(images), before[1])


def test_the_repaired_model_can_be_repaired_no_further(planted):
    result = repaired(planted, planted_splits(planted), white_pixel())
    with pytest.raises(InapplicableError, match=r"succeed in only 0\.0%"):
        repaired(result.subject, planted_splits(planted), white_pixel())


def test_facts_are_json(planted):
    facts = repaired(planted, planted_splits(planted), white_pixel()).facts
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["layer"], facts["channels"]) == (planted.summary.taps[-1], CHANNELS)
    assert facts["calibrate_accuracy_before"] == facts["calibrate_accuracy_after"] == 1.0


def test_the_most_successful_trigger_decides(planted):
    """The first one changes nothing, so it never succeeds."""
    idle = Trigger(TARGET, np.zeros((SIZE, SIZE), dtype=np.float32), np.zeros((1, SIZE, SIZE), dtype=np.float32))
    facts = repaired(planted, planted_splits(planted), idle, white_pixel()).facts
    assert facts["recovered_trigger_success_before"] == 1.0
    assert facts["pruned_channels"] == [CHANNELS - 1]
    assert facts["recovered_trigger_success_after"] == 0.0


def test_a_source_specific_trigger_is_stamped_on_its_source(planted):
    splits = planted_splits(planted)
    source = int(splits.fit.labels[0])
    assert repaired(planted, splits, white_pixel(source=source)).facts["pruned_channels"] == [CHANNELS - 1]
    with pytest.raises(InapplicableError, match=f"no image that a trigger for class {TARGET} is to mislead"):
        repaired(planted, splits, white_pixel(source=TARGET))


# ------------------------------------------------------------------------------------------- the accuracy budget


def test_a_channel_that_clean_images_need_is_kept(make_subject):
    subject = make_subject(Needed(), 1, SIZE)
    splits = planted_splits(subject, dark_and_bright)
    result = repaired(subject, splits, white_pixel(target=1))
    assert result.facts["pruned_channels"] == [0]
    assert result.facts["rising_channels"] == 2
    assert result.facts["stopped_by"] == OUT_OF_BUDGET
    assert result.facts["calibrate_accuracy_after"] == 1.0
    assert result.facts["recovered_trigger_success_after"] == 1.0  # a mitigation that mitigates nothing says so


def test_nothing_within_the_budget_is_inapplicable(make_subject):
    subject = make_subject(Needed(detects=False), 1, SIZE)
    splits = planted_splits(subject, dark_and_bright)
    with pytest.raises(InapplicableError, match=r"without channel 1 .* falls from 100.0% to 50.0%, more than the budget of 2.0%"):
        repaired(subject, splits, white_pixel(target=1))


def test_a_large_budget_buys_it(make_subject):
    subject = make_subject(Needed(detects=False), 1, SIZE)
    facts = repaired(subject, planted_splits(subject, dark_and_bright), white_pixel(target=1), accuracy_budget=0.5).facts
    assert facts["pruned_channels"] == [1]
    assert facts["stopped_by"] == MITIGATED


@pytest.mark.parametrize("budget", [-0.1, 1.0])
def test_a_budget_is_a_share(budget):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        NormPruning(accuracy_budget=budget)


# ------------------------------------------------------------------------------------------- a trained network

ATTACK = BadNets(target_class=1)


@pytest.fixture(scope="module")
def backdoored():
    """A small network trained on digits, a tenth of them stamped."""
    data = digits(seed=0, size=SIZE)
    labels = data.train.labels.copy()
    images = data.train.images.copy()
    rows = np.random.default_rng(0).permutation(len(labels))[: len(labels) // 10]
    images[rows], labels[rows] = ATTACK.stamp(images[rows]), ATTACK.target_class
    module = train(initialised(lambda: SmallCnn(1, 10, width=8), 0), LabelledImages(images, labels), epochs=8, seed=0)
    parts = [LabelledImages(data.test.images[start:stop], data.test.labels[start:stop]) for start, stop in ((0, 300), (300, 500))]
    return module, splits_of(*parts), LabelledImages(data.test.images[500:], data.test.labels[500:])


@pytest.fixture(scope="module")
def trigger():
    """The true one, as the search would return it."""
    black = np.zeros((1, SIZE, SIZE, 1), dtype=np.uint8)
    white = np.full_like(black, 255)
    pattern = ATTACK.stamp(black)[0, ..., 0].astype(np.float32) / 255
    mask = ((ATTACK.stamp(white) != white) | (ATTACK.stamp(black) != black))[0, ..., 0].astype(np.float32)
    return Trigger(ATTACK.target_class, mask, pattern[None])


def test_the_trigger_is_the_true_one(backdoored, trigger):
    images = backdoored[2].images
    np.testing.assert_array_equal(trigger.stamp(images), ATTACK.stamp(images))


def figures(subject, data, trigger):
    """Accuracy, and attack success on images of other classes."""
    others = data.images[data.labels != trigger.target_class]
    return np.mean(subject.predict(data.images) == data.labels), np.mean(
        subject.predict(trigger.stamp(others)) == trigger.target_class
    )


@pytest.fixture(scope="module")
def result(backdoored, trigger, make_subject):
    module, splits, _ = backdoored
    subject = make_subject(module, 1, SIZE)
    return subject, repaired(subject, splits, trigger, accuracy_budget=0.05)


def test_badnets_is_mitigated_within_the_budget(backdoored, trigger, result):
    subject, outcome = result
    facts = outcome.facts
    assert facts["recovered_trigger_success_before"] > 0.9
    assert facts["recovered_trigger_success_after"] < facts["recovered_trigger_success_before"] - 0.3
    assert facts["calibrate_accuracy_after"] >= facts["calibrate_accuracy_before"] - 0.05
    assert 0 < len(facts["pruned_channels"]) <= facts["rising_channels"] <= facts["channels"]
    calibrate = backdoored[1].calibrate
    expected = facts["calibrate_accuracy_after"], facts["recovered_trigger_success_after"]
    np.testing.assert_allclose(figures(outcome.subject, calibrate, trigger), expected, atol=1e-12)
    _, before = figures(subject, backdoored[2], trigger)
    _, after = figures(outcome.subject, backdoored[2], trigger)
    assert after < before - 0.2


def by_hand(module, splits, trigger, budget):
    """The channels to prune, with the network's own layers and loops over channels in NumPy."""

    def maps(images):
        with torch.no_grad():
            return module.features(torch.from_numpy(to_pixels(images))).numpy()

    def predicted(values, pruned):
        values = values.copy()
        values[:, pruned] = 0
        with torch.no_grad():
            return module.classifier(torch.flatten(module.pool(torch.from_numpy(values)), 1)).argmax(dim=1).numpy()

    target = trigger.target_class
    others = splits.fit.images[splits.fit.labels != target]
    clean, stamped = (np.abs(maps(images)).max(axis=(2, 3)).astype(np.float64) for images in (others, trigger.stamp(others)))
    deviations = np.array([np.sqrt(np.mean((column - column.mean()) ** 2)) for column in clean.T])
    floor = 0.1 * np.sqrt(np.mean(deviations**2))
    jumps = [
        (stamped[:, channel].mean() - clean[:, channel].mean()) / max(deviations[channel], floor)
        for channel in range(clean.shape[1])
    ]
    order = [channel for channel in sorted(range(len(jumps)), key=lambda channel: -jumps[channel]) if jumps[channel] > 0]

    labels = splits.calibrate.labels
    values, attacked = maps(splits.calibrate.images), maps(trigger.stamp(splits.calibrate.images[labels != target]))
    original = np.mean(predicted(values, []) == labels)
    for count in range(1, len(order) + 1):
        if original - np.mean(predicted(values, order[:count]) == labels) > budget + 1e-9:
            return order[: count - 1], OUT_OF_BUDGET
        if np.mean(predicted(attacked, order[:count]) == target) < 0.05:
            return order[:count], MITIGATED
    return order, NO_MORE_CHANNELS


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.05, 0.3, 0.95])
def test_numpy_prunes_the_same_channels(backdoored, trigger, result, monkeypatch, budget):
    monkeypatch.setattr(norm_pruning, "_MASKS_PER_PASS", 3)  # several passes, the last one not full
    module, splits, _ = backdoored
    expected, stopped_by = by_hand(module, splits, trigger, budget)
    if expected:
        facts = repaired(result[0], splits, trigger, accuracy_budget=budget).facts
        assert (facts["pruned_channels"], facts["stopped_by"]) == (expected, stopped_by)
    else:
        with pytest.raises(InapplicableError, match="Nothing can be pruned"):
            repaired(result[0], splits, trigger, accuracy_budget=budget)


def test_the_order_of_the_channels_is_no_matter(backdoored, trigger, result, make_subject):
    module, splits, rest = backdoored
    permutation = np.random.default_rng(4).permutation(16)
    permuted = copy.deepcopy(module)
    convolution, normalisation = permuted.features[-1][0], permuted.features[-1][1]
    for layer, names in ((convolution, ("weight", "bias")), (normalisation, ("weight", "bias", "running_mean", "running_var"))):
        for name in names:
            getattr(layer, name).data = getattr(layer, name).data[permutation]
    permuted.classifier.weight.data = permuted.classifier.weight.data.view(10, 16, 4)[:, permutation].reshape(10, 64)
    outcome = repaired(make_subject(permuted, 1, SIZE), splits, trigger, accuracy_budget=0.05)
    assert [permutation[channel] for channel in outcome.facts["pruned_channels"]] == result[1].facts["pruned_channels"]
    np.testing.assert_allclose(outcome.subject.logits(rest.images), result[1].subject.logits(rest.images), rtol=1e-3, atol=1e-3)


def subject_in(form, module):
    fixed = 7 if form == "fixed batch" else None
    dynamic = None if fixed else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module.eval(), (torch.zeros(fixed or 4, 1, SIZE, SIZE),), dynamic_shapes=dynamic)
    if form == "onnx":
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        network = _probe(exported.model_proto, (-1, 1, SIZE, SIZE), -1)
    else:
        network = _probe(plain_graph(program), (fixed or -1, 1, SIZE, SIZE), fixed or -1)
    names = tuple(str(index) for index in range(10))
    return prepare_subject(network, InputSpec(SIZE, SIZE, 1), flavour="onnx" if form == "onnx" else "pt2", class_names=names)


class FixedBatch(nn.Module):
    """A network that insists on seven images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        return self.inner(pixels).view(7, 10)


@pytest.mark.parametrize("form", ["onnx", pytest.param("fixed batch", marks=pytest.mark.slow)])
def test_other_forms_of_the_model_are_repaired_alike(backdoored, trigger, result, form):
    module, splits, rest = backdoored
    subject = subject_in(form, FixedBatch(module) if form == "fixed batch" else module)
    assert subject.summary.batch_size == (7 if form == "fixed batch" else None)
    outcome = repaired(subject, splits, trigger, accuracy_budget=0.05)
    assert outcome.facts["pruned_channels"] == result[1].facts["pruned_channels"]
    assert outcome.subject.summary.flavour == subject.summary.flavour
    assert isinstance(outcome.subject.network.program, onnx.ModelProto) == (form == "onnx")
    assert outcome.subject.summary.taps == subject.summary.taps
    np.testing.assert_allclose(outcome.subject.logits(rest.images), result[1].subject.logits(rest.images), rtol=1e-3, atol=1e-3)
    check_parity(outcome.subject, rest.images[:8])


# ------------------------------------------------------------------------------------------------ inapplicable


def test_a_network_without_feature_map(make_subject):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    subject = make_subject(flat, 1, SIZE)
    with pytest.raises(InapplicableError, match=r"more than one position; the layers are: tap_01.*\(8,\)"):
        repaired(subject, planted_splits(subject), white_pixel())


def test_a_trigger_under_which_no_norm_rises(make_subject):
    """It darkens the image, and dark images are of the target class."""
    subject = make_subject(Needed(detects=False), 1, SIZE)
    black = Trigger(0, np.ones((SIZE, SIZE), dtype=np.float32), np.zeros((1, SIZE, SIZE), dtype=np.float32))
    with pytest.raises(InapplicableError, match=r"no channel of 'tap_01.* has a larger norm"):
        repaired(subject, planted_splits(subject, dark_and_bright), black)


def test_no_trigger_and_triggers_of_two_classes(planted):
    splits = planted_splits(planted)
    with pytest.raises(ValueError, match=r"of one class, got 0"):
        repaired(planted, splits)
    with pytest.raises(ValueError, match=r"got 2 of the classes \[1, 2\]"):
        repaired(planted, splits, white_pixel(), white_pixel(target=1))
