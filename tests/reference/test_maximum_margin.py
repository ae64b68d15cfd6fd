"""The maximum margin against its closed form, and against gradient ascent written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from audit_plugin.checks import MaximumMargin
from audit_plugin.errors import InapplicableError
from audit_plugin.types import FitSplit

SIZE, CLASSES = 4, 5
UNUSED = FitSplit(np.zeros((0, SIZE, SIZE, 1), np.uint8), np.zeros(0, np.int64))


class Linear(nn.Module):
    """Logits that are linear in the pixels: the largest margin has a closed form."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.keep = nn.Conv2d(1, 1, 1, bias=False)  # an audited network has something to tap
        nn.init.ones_(self.keep.weight)
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32))

    def forward(self, pixels):
        return self.keep(pixels).flatten(1) @ self.weights.T


def ascend(weights: np.ndarray, target: int, start: np.ndarray, steps: int) -> float:
    """The largest margin at the end, step by step: x <- x + 0.01 * gradient of f_t - max of the others at clip(x)."""
    largest, images, last = -np.inf, start.copy(), np.inf
    for _ in range(steps):
        inside = np.clip(images, 0, 1)
        logits = inside @ weights.T
        others = np.where(np.arange(CLASSES) == target, -np.inf, logits)
        rival = others.argmax(axis=1)
        margins = logits[:, target] - others.max(axis=1)
        largest = margins.max()
        if abs(margins.sum() - last) < 1e-5 * abs(last):
            break
        last = margins.sum()
        images = images + 0.01 * (weights[target] - weights[rival]) * ((images >= 0) & (images <= 1))
    return float(largest)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(CLASSES, SIZE * SIZE))


def test_as_written_out_in_numpy(weights, make_subject):
    found = MaximumMargin(starts=3, steps=40).measure(
        make_subject(Linear(weights), 1, SIZE), UNUSED, range(CLASSES), np.random.default_rng(5)
    )
    seed = int(np.random.default_rng(5).integers(2**62))
    start = torch.rand((3, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).numpy().reshape(3, -1)
    expected = [ascend(weights, target, start.astype(np.float64), 40) for target in range(CLASSES)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 against float64 over 40 steps


def test_opposite_classes_reach_their_closed_form(make_subject):
    # Beside two classes with opposite weights a third never wins: the best image is white where the weights favour the class.
    rows = np.random.default_rng(1).normal(size=SIZE * SIZE)
    weights = np.stack([rows, -rows, np.zeros(SIZE * SIZE)])
    measure = MaximumMargin(starts=2, steps=3000)
    found = measure._ascend(
        make_subject(Linear(weights), 1, SIZE).torch_module(), torch.rand(2, 1, SIZE, SIZE), torch.tensor([0, 1])
    )
    expected = [rows.clip(min=0).sum(), (-rows).clip(min=0).sum()]
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_classes_renumbered_have_their_margins_renumbered(weights, make_subject):
    order = np.random.default_rng(4).permutation(CLASSES)
    before, after = (
        MaximumMargin().measure(make_subject(Linear(table), 1, SIZE), UNUSED, range(CLASSES), np.random.default_rng(2))
        for table in (weights, weights[order])
    )
    np.testing.assert_allclose(after, before[order], rtol=1e-5)


def test_a_planted_class_reaches_far_more_than_its_clean_twin(weights, make_subject):
    planted = weights.copy()
    planted[3, 5] += 60.0  # one white pixel says class 3
    margins = [
        MaximumMargin().measure(make_subject(Linear(table), 1, SIZE), UNUSED, range(CLASSES), np.random.default_rng(0))
        for table in (weights, planted)
    ]
    assert margins[1].argmax() == 3
    assert margins[1][3] > 4 * np.delete(margins[1], 3).max()
    assert margins[0][3] < 2 * np.delete(margins[0], 3).max()


@pytest.mark.parametrize("factor", [0.0, 1e-6])
def test_where_the_ascent_leads_nowhere_nothing_is_measured(weights, make_subject, factor):
    with pytest.raises(InapplicableError, match=r"images of only [01] of 5 classes"):
        MaximumMargin(steps=30).measure(
            make_subject(Tiny(weights, factor), 1, SIZE), UNUSED, range(CLASSES), np.random.default_rng(0)
        )


def test_a_model_that_takes_whole_numbers_has_no_gradient_to_climb(weights, make_subject):
    with pytest.raises(InapplicableError, match="No gradient reaches the pixels"):
        MaximumMargin(steps=30).measure(make_subject(Whole(weights), 1, SIZE), UNUSED, range(CLASSES), np.random.default_rng(0))


class Whole(Linear):
    """Sees the pixels as integers."""

    def forward(self, pixels):
        return super().forward((pixels * 255).to(torch.int32).to(torch.float32) / 255)


class Tiny(Linear):
    """Answers with class 0 whatever it sees, but for what ``factor`` lets through."""

    def __init__(self, weights: np.ndarray, factor: float) -> None:
        super().__init__(weights * factor)

    def forward(self, pixels):
        return super().forward(pixels) + nn.functional.one_hot(torch.tensor(0), CLASSES)
