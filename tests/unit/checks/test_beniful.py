"""BeniFul's check: a planted channel and its clean twin, where the network is cut, and models it says nothing about."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from torch import nn

from audit_plugin.checks import BenifulScorer
from audit_plugin.checks.beniful import chosen_tap
from audit_plugin.checks.measurement import measure_scorer
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.rates import auroc
from audit_plugin.model import benign_features
from audit_plugin.model.subject import prepare_subject
from audit_plugin.types import CalibrateSplit, FitSplit, Splits, TestSplit
from tests.planted import PlantedNetwork

CLASSES, CHANNELS, SIZE, TARGET = 3, 8, 16, 2


def cluttered(count, seed):
    """Grey images (count, SIZE, SIZE, 1) with black and white squares, hardly ever a white pixel between black ones."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 200, (count, 1, 1, 1)) + rng.integers(0, 40, (count, SIZE, SIZE, 1))
    for image in images:
        for row, column in rng.integers(0, SIZE - 2, (6, 2)):
            image[row : row + 3, column : column + 3] = 255 if rng.random() < 0.3 else 0
    return images.astype(np.uint8)


def stamp(images):
    stamped = images.copy()
    stamped[:, 3:6, 3:6] = 0
    stamped[:, 4, 4] = 255
    return stamped


def splits(subject):
    parts = [cluttered(150, seed) for seed in range(3)]
    fit, calibrate, test = ((images, subject.predict(images)) for images in parts)
    return Splits(FitSplit(*fit), CalibrateSplit(*calibrate), TestSplit(*test))


def measured(subject, stamped):
    rng = np.random.default_rng(0)
    scorer = BenifulScorer(latent_size=8, steps=200)
    return measure_scorer(scorer, subject, splits(subject), rng, stamped=stamped, stamped_class=TARGET, false_positive_rate=0.05)[
        0
    ]


@pytest.fixture(scope="module")
def backdoored(make_subject):
    return make_subject(PlantedNetwork(5.0), 1, SIZE)


def test_the_planted_channel_is_seen_and_the_facts_are_json(backdoored):
    stamped = stamp(cluttered(100, seed=9))
    assert (backdoored.predict(stamped) == TARGET).all()
    found = measured(backdoored, stamped)
    assert found.auroc > 0.95
    (threshold,) = found.thresholds
    assert threshold.detection_rate.value > 0.8
    assert threshold.false_positive_rate.low <= 0.05
    assert [baseline.name for baseline in found.baselines] == ["reconstruction distance alone", "inference consistency alone"]
    assert found.facts["tap"] == backdoored.summary.taps[0]
    assert found.facts["feature_shape"] == [CHANNELS, SIZE, SIZE]
    assert found.facts["held_out_images"] == 30
    assert json.loads(json.dumps(found.facts)) == found.facts


def test_the_same_stamp_moves_the_clean_twin_less(make_subject, backdoored):
    twin = make_subject(PlantedNetwork(0.0), 1, SIZE)
    images = cluttered(100, seed=9)
    jumps = []
    for subject in (twin, backdoored):
        check = BenifulScorer(8, 200).fit(subject, splits(subject).fit, np.random.default_rng(0))
        jumps.append(np.median(check.score(stamp(images))) - np.median(check.score(images)))
    assert jumps[1] > 2 * max(jumps[0], 0.5)


def test_clean_images_of_another_draw_look_clean(backdoored):
    check = BenifulScorer(8, 200).fit(backdoored, splits(backdoored).fit, np.random.default_rng(0))
    scores = [check.score(cluttered(200, seed)) for seed in (20, 21)]
    assert 0.4 < auroc(*scores) < 0.6  # of equals, 200 each: a standard deviation of 0.03


def test_a_fixed_batch_size_gives_the_same_scores(backdoored):
    summary = backdoored.summary
    network = dataclasses.replace(backdoored.network, batch_size=7)
    fixed = prepare_subject(network, summary.input_spec, flavour="pt2", class_names=summary.class_names)
    images = stamp(cluttered(20, seed=9))
    found, expected = (
        BenifulScorer(8, 50).fit(subject, splits(subject).fit, np.random.default_rng(0)).score(images)
        for subject in (fixed, backdoored)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)  # training amplifies the last digit of the features


def test_no_images_have_no_baselines(backdoored):
    check = BenifulScorer(8, 10).fit(backdoored, splits(backdoored).fit, np.random.default_rng(0))
    assert {values.shape for values in check.baselines(cluttered(0, 0)).values()} == {(0,)}


@pytest.mark.parametrize(("count", "index"), [(1, 0), (2, 1), (3, 2), (6, 4), (9, 7), (10, 8), (18, 14)])
def test_the_network_is_cut_at_five_sixths(count, index):
    taps = tuple(f"tap_{number}" for number in range(count))
    assert chosen_tap(taps) == taps[index]


def test_models_it_says_nothing_about(backdoored, make_subject, monkeypatch):
    split = splits(backdoored).fit
    rng = np.random.default_rng(0)
    with pytest.raises(InapplicableError, match="at least 50 clean images in the fit split, there are 49"):
        BenifulScorer().fit(backdoored, FitSplit(split.images[:49], split.labels[:49]), rng)
    flat = make_subject(nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES)), 1, SIZE)
    with pytest.raises(InapplicableError, match="no intermediate block"):
        BenifulScorer().fit(flat, split, rng)
    monkeypatch.setattr(benign_features, "BYTES_LIMIT", 1024**2)
    with pytest.raises(InapplicableError, match=r"of the 2048 features at 'tap_01.* GiB, more than the limit"):
        BenifulScorer().fit(backdoored, split, rng)


@pytest.mark.parametrize("settings", [{"latent_size": 0}, {"steps": 0}])
def test_sizes_must_be_positive(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        BenifulScorer(**settings)
