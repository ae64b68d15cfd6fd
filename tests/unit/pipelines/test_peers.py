from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from audit_plugin.checks import MaximumMargin
from audit_plugin.errors import InapplicableError
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, ImageArray, LabelledImages
from pipelines.peers import INPUT_PEERS, MODEL_PEERS, MaximumMarginDetection, ModelPeer, NeuralCleanse, Strip
from pipelines.peers.mm_bd import p_value
from pipelines.peers.neural_cleanse import _Costs, anomaly_indices

CLASSES, SIZE, TARGET = 10, 16, 3
QUICK: dict[str, ModelPeer] = {"neural_cleanse": NeuralCleanse(rounds=50, batches=4), "mm_bd": MaximumMarginDetection(starts=10)}


class Regions(nn.Module):
    """Class k is how bright its own region is, of 13 + k pixels; a bright corner says ``TARGET`` by ``strength``.

    ``strength`` 0 is the clean twin. ``order`` says which class each output is.
    """

    def __init__(self, strength: float, order: NDArray[np.int64] | None = None) -> None:
        super().__init__()
        self.means, self.head = nn.Linear(SIZE * SIZE, CLASSES + 1), nn.Linear(CLASSES + 1, CLASSES)
        means, head = torch.zeros(CLASSES + 1, SIZE * SIZE), torch.zeros(CLASSES, CLASSES + 1)
        for label, (start, count) in enumerate(regions()):
            means[label, start : start + count] = 1 / count
            head[label, label] = 10 + 2 * ((7 * label) % CLASSES) / CLASSES
        corner = torch.zeros(SIZE, SIZE)
        corner[-2:, -2:] = 0.25 * (strength > 0)
        means[-1] = corner.flatten()
        head[TARGET, -1] = strength
        self.means.weight.data, self.means.bias.data = means, torch.zeros(CLASSES + 1)
        self.means.bias.data[-1] = -0.1
        self.head.weight.data, self.head.bias.data = head, torch.zeros(CLASSES)
        if order is not None:
            self.head.weight.data = head[torch.from_numpy(order)]

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.means(pixels.flatten(1))))
        return logits


def regions() -> list[tuple[int, int]]:
    """First pixel and number of pixels of each class's region, row after row."""
    counts = [13 + label for label in range(CLASSES)]
    return list(zip(np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True))


def images_of(count: int, seed: int) -> LabelledImages:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    pixels = np.zeros((count, SIZE * SIZE), np.uint8)
    for row, label in enumerate(labels):
        start, size = regions()[label]
        pixels[row, start : start + size] = rng.integers(128, 178, size)
    return LabelledImages(pixels.reshape(count, SIZE, SIZE, 1), labels)


def stamp(images: ImageArray) -> ImageArray:
    stamped = images.copy()
    stamped[:, -2:, -2:] = 255
    return stamped


@pytest.fixture(scope="module")
def subjects(make_subject: Callable[..., Subject]) -> dict[str, Subject]:
    return {name: make_subject(Regions(strength), 1, SIZE) for name, strength in (("planted", 60.0), ("clean", 0.0))}


CLEAN = images_of(200, seed=0)


def test_the_planted_network_knows_its_classes_and_obeys(subjects: dict[str, Subject]) -> None:
    for subject in subjects.values():
        assert (subject.predict(CLEAN.images) == CLEAN.labels).all()
    assert (subjects["planted"].predict(stamp(CLEAN.images)) == TARGET).all()
    assert (subjects["clean"].predict(stamp(CLEAN.images)) == CLEAN.labels).all()


@pytest.mark.parametrize("name", MODEL_PEERS)
def test_a_planted_backdoor_is_flagged_and_its_clean_twin_is_not(name: str, subjects: dict[str, Subject]) -> None:
    planted, clean = (QUICK[name].judge(subjects[kind], CLEAN, np.random.default_rng(0)) for kind in ("planted", "clean"))
    assert planted.flagged
    assert planted.suspected_class == TARGET
    assert not clean.flagged
    assert planted.score > clean.score
    assert len(planted.by_class) == CLASSES
    assert planted.seconds > 0


@pytest.mark.parametrize("name", MODEL_PEERS)
def test_the_same_seed_gives_the_same_judgement(name: str, subjects: dict[str, Subject]) -> None:
    first, second = (QUICK[name].judge(subjects["planted"], CLEAN, np.random.default_rng(1)) for _ in range(2))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
    assert next(subjects["planted"].torch_module().buffers(), torch.zeros(0)).device.type == "cpu"


def test_other_names_for_the_classes_change_their_order_and_nothing_else(make_subject: Callable[..., Subject]) -> None:
    order = np.random.default_rng(3).permutation(CLASSES)
    as_it_was, renamed = (make_subject(Regions(60.0, names), 1, SIZE) for names in (None, order))
    assert (order[renamed.predict(CLEAN.images)] == CLEAN.labels).all()
    measure = MaximumMargin(starts=4, steps=60)
    unused = FitSplit(CLEAN.images[:0], CLEAN.labels[:0])
    margins = [measure.measure(subject, unused, range(CLASSES), np.random.default_rng(0)) for subject in (as_it_was, renamed)]
    np.testing.assert_allclose(margins[1], margins[0][order], rtol=1e-4)
    sizes = [
        NeuralCleanse(rounds=6, batches=2).mask_sizes(subject, CLEAN, np.random.default_rng(0))
        for subject in (as_it_was, renamed)
    ]
    np.testing.assert_allclose(sizes[1], sizes[0][order], rtol=1e-3)


@given(st.lists(st.floats(0.1, 1000), min_size=3, max_size=43))
def test_the_anomaly_index_is_that_of_scipy(values: list[float]) -> None:
    sizes = np.array(values)
    deviation = stats.median_abs_deviation(sizes, scale="normal")
    if deviation < 1e-6:
        return
    indices = anomaly_indices(sizes)
    np.testing.assert_allclose(np.abs(indices), np.abs(sizes - np.median(sizes)) / deviation, rtol=1e-3, atol=1e-9)
    assert ((indices > 0) == (sizes < np.median(sizes))).all()  # a large mask is never suspicious


def test_a_single_small_mask_among_equal_ones_is_anomalous_and_finite() -> None:
    indices = anomaly_indices(np.array([20.0] * 9 + [2.0]))
    assert indices[-1] > 2
    assert np.isfinite(indices).all()
    assert (indices[:-1] == 0).all()


def test_lambda_and_the_smallest_mask_follow_the_authors_code_class_by_class() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rounds = [
            (np.where(rng.random(4) < share, 1.0, 0.5), rng.uniform(1, 50, 4))
            for share in rng.choice([0.05, 0.95], size=12)
            for _ in range(10)
        ]
        together = _Costs(4)
        for flipped, size in rounds:
            together.update(flipped, size)
        for label in range(4):
            cost, smallest, stopped = _authors_loop([(flipped[label], size[label]) for flipped, size in rounds])
            assert together.smallest[label] == smallest
            assert together.stopped[label] == stopped
            if not stopped:  # theirs ends there, ours waits for the other classes
                assert together.cost[label] == pytest.approx(cost)


def _authors_loop(rounds: list[tuple[float, float]]) -> tuple[float, float, bool]:
    """The bookkeeping of the paper's code, one class, written from its description: (lambda, smallest mask, stopped early)."""
    cost, best, last_best, unchanged = 0.0, math.inf, math.inf, 0
    waiting = up = down = 0
    went_up = went_down = False
    for flipped, size in rounds:
        if flipped >= 0.99 and size < best:
            best = size
        if best < math.inf:
            unchanged = unchanged + 1 if best >= last_best else 0
        last_best = min(best, last_best)
        if went_up and went_down and unchanged >= 25:
            return cost, best, True
        if cost == 0 and flipped >= 0.99:
            waiting += 1
            if waiting >= 5:
                cost, up, down, went_up, went_down = 1e-3, 0, 0, False, False
        else:
            waiting = 0
        up, down = (up + 1, 0) if flipped >= 0.99 else (0, down + 1)
        if up >= 5:
            up, cost, went_up = 0, cost * 2, True
        elif down >= 5:
            down, cost, went_down = 0, cost / 2**1.5, True
    return cost, best, False


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(4, 43))
def test_the_p_value_is_that_of_scipy(seed: int, classes: int) -> None:
    margins = np.random.default_rng(seed).gamma(9.0, 2.0, classes)
    others = np.sort(margins)[:-1]
    found = p_value(margins)
    assert 0.0 <= found <= 1.0
    below = stats.gamma.cdf(margins.max(), *stats.gamma.fit(margins[margins != margins.max()]))
    if np.isfinite(below):
        assert found == pytest.approx(1 - below**classes, abs=1e-9)
    assert p_value(np.append(others, 1e6)) < 1e-3
    assert p_value(margins[::-1]) == pytest.approx(found, abs=0.02)  # scipy's search for the best fit ends where rounding lets it


def test_one_margin_far_above_nearly_equal_ones_is_significant() -> None:
    assert p_value(np.array([5.0, 5.1, 4.9, 5.2, 4.8, 50.0])) < 0.05
    assert p_value(np.array([5.0, 5.1, 4.9, 5.2, 4.8, 5.15])) > 0.05


def test_equal_margins_have_no_distribution() -> None:
    with pytest.raises(InapplicableError, match="No Gamma distribution fits"):
        p_value(np.array([5.0, 5.0, 5.0, 5.0, 50.0]))


def test_mm_bd_refuses_three_classes() -> None:
    with pytest.raises(InapplicableError, match="at least 4 classes, this model has 3"):
        p_value(np.array([1.0, 2.0, 3.0]))


# ------------------------------------------------------------------------------------------------ judges of inputs

INPUTS = images_of(240, seed=1)
TRIGGERED = stamp(images_of(24, seed=2).images[images_of(24, seed=2).labels != TARGET][:12])


@pytest.mark.parametrize("name", ["strip", "activation_defence"])
def test_triggered_inputs_are_flagged_where_they_work(name: str, subjects: dict[str, Subject]) -> None:
    if name != "strip":
        pytest.importorskip("art", reason="the extra 'benchmark' is not installed")
    inputs = np.concatenate([INPUTS.images, TRIGGERED])
    for kind, subject in subjects.items():
        found = INPUT_PEERS[name].judge_inputs(subject, CLEAN, inputs, np.random.default_rng(0))
        clean, triggered = found.flagged[:240], found.flagged[240:]
        assert found.flagged.shape == (252,)
        assert clean.mean() < 0.3
        assert triggered.mean() > 0.9 if kind == "planted" else triggered.mean() < 0.5


def test_the_scores_of_strip_are_mean_entropies(subjects: dict[str, Subject]) -> None:
    subject, clean = subjects["planted"], LabelledImages(CLEAN.images[:2], CLEAN.labels[:2])
    found = Strip(overlays=3).judge_inputs(subject, clean, INPUTS.images[:4], np.random.default_rng(0))
    rng = np.random.default_rng(0)
    rng.integers(1, 2, (2, 3))
    chosen = rng.integers(2, size=(4, 3))
    assert found.scores is not None
    for row, overlays in enumerate(chosen):
        summed = np.minimum(INPUTS.images[row].astype(int) + CLEAN.images[overlays].astype(int), 255).astype(np.uint8)
        logits = subject.logits(summed).astype(np.float64)
        entropies = stats.entropy(np.exp(logits - logits.max(axis=1, keepdims=True)), base=2, axis=1)
        assert -found.scores[row] == pytest.approx(entropies.mean(), abs=1e-3)


@pytest.mark.parametrize("name", ["strip_art", "activation_defence"])
def test_art_leaves_the_random_state_as_it_was_and_repeats_itself(name: str, subjects: dict[str, Subject]) -> None:
    pytest.importorskip("art", reason="the extra 'benchmark' is not installed")
    np.random.seed(5)
    expected = np.random.get_state()[1]
    inputs = np.concatenate([INPUTS.images, TRIGGERED])
    first, second = (
        INPUT_PEERS[name].judge_inputs(subjects["planted"], CLEAN, inputs, np.random.default_rng(0)) for _ in range(2)
    )
    assert (np.random.get_state()[1] == expected).all()
    assert (first.flagged == second.flagged).all()
    assert first.scores is None


def test_the_strip_of_art_misses_what_strip_finds(subjects: dict[str, Subject]) -> None:
    """Why both are measured: ART takes the entropy along the other axis. Should this fail, ART has mended it."""
    pytest.importorskip("art", reason="the extra 'benchmark' is not installed")
    inputs = np.concatenate([INPUTS.images, TRIGGERED])
    found, of_art = (
        INPUT_PEERS[name].judge_inputs(subjects["planted"], CLEAN, inputs, np.random.default_rng(0)).flagged[240:]
        for name in ("strip", "strip_art")
    )
    assert found.all()
    assert not of_art.any()


def test_activation_clustering_says_why_it_cannot(subjects: dict[str, Subject]) -> None:
    pytest.importorskip("art", reason="the extra 'benchmark' is not installed")
    with pytest.raises(InapplicableError, match="at least 20 inputs in each of 2 classes, 0 have as many"):
        INPUT_PEERS["activation_defence"].judge_inputs(subjects["clean"], CLEAN, INPUTS.images[:30], np.random.default_rng(0))
