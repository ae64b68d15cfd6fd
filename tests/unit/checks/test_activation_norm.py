"""The check on activation norms: a planted channel and its clean twin, and models it says nothing about."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import ActivationNormScorer, activation_norm
from audit_plugin.checks.measurement import measure_scorer
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.rates import auroc
from audit_plugin.types import CalibrateSplit, FitSplit, Splits, TestSplit
from tests.planted import PlantedNetwork

CLASSES, CHANNELS, SIZE, TARGET = 3, 8, 16, 2


def smooth(count, seed):
    """Grey images without isolated white pixels, (count, SIZE, SIZE, 1)."""
    rng = np.random.default_rng(seed)
    return rng.integers(60, 200, (count, 1, 1, 1)).astype(np.uint8) + rng.integers(0, 40, (count, SIZE, SIZE, 1)).astype(np.uint8)


def stamp(images):
    stamped = images.copy()
    stamped[:, 3:6, 3:6] = 0
    stamped[:, 4, 4] = 255
    return stamped


def splits(subject):
    parts = [smooth(150, seed) for seed in range(3)]
    fit, calibrate, test = ((images, subject.predict(images)) for images in parts)
    return Splits(FitSplit(*fit), CalibrateSplit(*calibrate), TestSplit(*test))


def measured(subject, stamped):
    rng = np.random.default_rng(0)
    return measure_scorer(
        ActivationNormScorer(), subject, splits(subject), rng, stamped=stamped, stamped_class=TARGET, false_positive_rate=0.05
    )[0]


@pytest.fixture(scope="module")
def planted(make_subject):
    return make_subject(PlantedNetwork(10.0), 1, SIZE)


@pytest.fixture(scope="module")
def twin(make_subject):
    return make_subject(PlantedNetwork(0.0), 1, SIZE)


def test_a_planted_channel_is_found_and_shown_first(planted):
    assert (planted.predict(stamp(smooth(100, 5))) == TARGET).all()
    scores = measured(planted, stamp(smooth(100, 5)))
    assert scores.facts["channels_silent_on_clean_images"] == 1
    assert scores.auroc == 1.0
    (threshold,) = scores.thresholds
    assert threshold.detection_rate.value == 1.0
    assert threshold.false_positive_rate.low <= 0.05 <= threshold.false_positive_rate.high
    assert [item.quantity for item in scores.distributions[:3]] == [
        f"{norm} norm, channel {CHANNELS - 1}" for norm in ("l-infinity", "l1", "l2")
    ]
    assert len(scores.distributions) == 3 * activation_norm.CHANNELS_SHOWN
    assert scores.distributions[0].clean.max() == 0 < scores.distributions[0].stamped.min()


def test_its_clean_twin_scores_the_same_stamp_far_lower(planted, twin):
    stamped = stamp(smooth(100, 5))
    assert np.median(measured(twin, stamped).stamped) * 10 < np.median(measured(planted, stamped).stamped)


def test_the_twin_sees_nothing_in_clean_images(twin):
    # 100 against 150 scores of one distribution: the area's standard error is 0.037.
    assert abs(measured(twin, smooth(100, 6)).auroc - 0.5) < 0.12


def test_l_infinity_sees_a_peak_that_l1_and_l2_miss(make_subject):
    """One pixel of one channel rises: the paper's claim, where it must hold."""

    class Peak(nn.Module):
        def __init__(self):
            super().__init__()
            self.copy = nn.Conv2d(1, 2, 1)
            self.copy.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
            self.copy.bias.data = torch.tensor([0.0, 1.0])

        def forward(self, pixels):
            return torch.relu(self.copy(pixels)).mean(dim=(2, 3))

    def noise(count, seed):
        """Flat images of any brightness, so that sums vary and peaks do not stand out from them."""
        rng = np.random.default_rng(seed)
        return (rng.integers(90, 110, (count, 1, 1, 1)) + rng.integers(0, 8, (count, SIZE, SIZE, 1))).astype(np.uint8)

    subject = make_subject(Peak(), 1, SIZE)
    images = noise(200, 0)
    fitted = ActivationNormScorer().fit(subject, FitSplit(images, subject.predict(images)), np.random.default_rng(0))
    clean, peaked = noise(100, 1), noise(100, 2)
    peaked[:, 8, 8] = 200
    area = {name: auroc(fitted.baselines(clean)[name], fitted.baselines(peaked)[name]) for name in ("l1 norm", "l2 norm")}
    assert auroc(fitted.score(clean), fitted.score(peaked)) > 0.99
    assert area["l1 norm"] < 0.7
    assert area["l2 norm"] < 0.95


def test_facts_are_json_and_name_the_layer(planted):
    facts = measured(planted, smooth(5, 5)).facts
    assert json.loads(json.dumps(dict(facts))) == facts
    assert facts["layer"] == planted.summary.taps[-1]
    assert (facts["channels"], facts["positions"]) == (CHANNELS, SIZE * SIZE)


def test_nothing_stamped_shows_nothing(planted):
    images = smooth(20, 5)
    fitted = ActivationNormScorer().fit(planted, splits(planted).fit, np.random.default_rng(0))
    assert fitted.distributions(images, images[:0], images) == ()
    assert {len(values) for values in fitted.baselines(images[:0]).values()} == {0}


def test_a_class_that_was_never_predicted_is_compared_with_all_images(planted):
    split = splits(planted).fit
    fitted = ActivationNormScorer().fit(planted, split, np.random.default_rng(0))
    missing = fitted.facts["classes_never_predicted"]
    assert missing == sorted(set(range(CLASSES)) - set(split.labels.tolist()))
    assert missing  # the target class, which only the trigger leads to, is among them
    assert np.isfinite(fitted.score(stamp(smooth(5, 5)))).all()


class Tokens(nn.Module):
    """Patches, two residual layers on (N, tokens, channels), mean over tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, 6, 4, stride=4)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, CLASSES)

    def forward(self, pixels):
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + torch.relu(layer(tokens))
        return self.head(tokens.mean(dim=1))


def test_tokens_are_positions(make_subject):
    subject = make_subject(Tokens(), 1, SIZE)
    images = smooth(60, 0)
    fitted = ActivationNormScorer().fit(subject, FitSplit(images, subject.predict(images)), np.random.default_rng(0))
    assert (fitted.facts["channels"], fitted.facts["positions"]) == (6, 16)
    value = subject.session.run(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)[fitted.facts["layer"]]
    shown = fitted.distributions(images, images, images)[0]
    channel = int(shown.quantity.rpartition(" ")[2])
    np.testing.assert_allclose(shown.clean, np.abs(value[:, :, channel]).max(axis=1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ inapplicable


def refused(subject, images, words):
    split = FitSplit(images, np.zeros(len(images), dtype=np.int64))
    with pytest.raises(InapplicableError, match=words):
        ActivationNormScorer().fit(subject, split, np.random.default_rng(0))


def test_too_few_images(planted):
    refused(planted, smooth(0, 0), "has 0 images, at least 11 are needed")
    refused(planted, smooth(10, 0), "has 10 images, at least 11 are needed")


def test_a_network_without_feature_map(make_subject):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    refused(make_subject(flat, 1, SIZE), smooth(30, 0), r"more than one position; the layers are: tap_01.*\(8,\)")


def test_a_map_that_does_not_depend_on_the_image(make_subject):
    silent = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    silent[0].bias.data.fill_(-100.0)
    refused(make_subject(silent, 1, SIZE), smooth(30, 0), "do not vary within the classes")


def test_too_many_channels(planted, monkeypatch):
    monkeypatch.setattr(activation_norm, "MOST_CHANNELS", CHANNELS - 1)
    refused(planted, smooth(30, 0), "has 8 channels")


def test_without_enough_images_to_calibrate_it_measures_nothing(planted):
    few = splits(planted)
    few = dataclasses.replace(few, calibrate=CalibrateSplit(few.calibrate.images[:18], few.calibrate.labels[:18]))
    with pytest.raises(InapplicableError, match=r"Nothing says above which score an input is suspicious: .*19"):
        measure_scorer(
            ActivationNormScorer(),
            planted,
            few,
            np.random.default_rng(0),
            stamped=stamp(smooth(100, 5)),
            stamped_class=TARGET,
            false_positive_rate=0.05,
        )
