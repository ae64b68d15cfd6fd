"""What fine-tuning shares: batches, shifts, one bounded step, accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from audit_plugin.model.fine_tuning import (
    accuracy,
    batches,
    compute_device,
    fast_precision,
    fitting_steps,
    predicted,
    shifted,
    take_step,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "size", "largest"), [(1000, 64, 64), (100, 64, 12), (40, 64, 5), (3, 64, 1), (16, 2, 2)])
def test_every_row_once_in_eight_batches_or_more(count, size, largest):
    parts = list(batches(count, size, seeded()))
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert max(len(part) for part in parts) == largest
    assert len(parts) >= min(8, count)


def test_batches_repeat_themselves_for_a_seed():
    first, again, other = (torch.cat(list(batches(50, 8, seeded(seed)))).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_no_rows_no_steps():
    assert sum(len(part) for part in batches(0, 64, seeded())) == 0


@pytest.mark.parametrize(("height", "width", "most"), [(8, 8, 1), (32, 32, 2), (48, 33, 2), (64, 96, 4)])
def test_images_move_by_up_to_a_sixteenth_with_the_border_repeated(height, width, most):
    images = torch.rand(60, 2, height, width)
    found = shifted(images, seeded())
    assert found.shape == images.shape
    seen = set()
    for image, moved in zip(images, found, strict=True):
        matches = [
            (down, right)
            for down in range(-most, most + 1)
            for right in range(-most, most + 1)
            if torch.equal(moved, image[:, *index(height, down, width, right)])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {offset for offsets in seen for offset in offsets} == set(range(-most, most + 1))


def index(height, down, width, right):
    """Rows and columns read by a shift, those outside replaced with the nearest inside."""
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    return rows[:, None], (torch.arange(width) + right).clamp(0, width - 1)[None, :]


def test_a_flat_image_stays_as_it_is():
    flat = torch.full((3, 1, 8, 8), 0.3)
    assert torch.equal(shifted(flat, seeded()), flat)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_a_step_is_no_longer_than_the_learning_rate(scale):
    weight = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    direction = torch.tensor([1.0, -2.0, 3.0, 0.0, 1.0])
    take_step(optimizer, (scale * direction * weight).sum())
    norm = min(scale * float(direction.norm()), 1.0)
    torch.testing.assert_close(weight.detach(), -0.5 * norm * direction / direction.norm(), rtol=1e-4, atol=1e-7)


def test_gradients_do_not_add_up_over_steps():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(3):
        take_step(optimizer, 0.1 * weight.sum())
    assert float(weight.detach()) == pytest.approx(-0.3, abs=1e-6)


class Answers(nn.Module):
    """(tap, logits) of pixels, as a subject's module gives them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, pixels):
        features = pixels.flatten(1)
        return features, self.head(features)


def test_fitting_learns_the_labels_and_steps_once_a_batch():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = torch.rand(90, 1, 4, 4, generator=seeded()) * 0.2 + labels[:, None, None, None] * 0.4
    module = Answers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    generator = seeded()
    assert sum(1 for _ in fitting_steps(module, pixels, labels, optimizer, generator, 64)) == 9  # 90 rows by 11
    before = accuracy(module, pixels, labels)
    for _ in range(15):
        for _ in fitting_steps(module, pixels, labels, optimizer, generator, 64):
            pass
    assert accuracy(module, pixels, labels) > max(before, 0.9)


def test_a_pass_that_is_not_consumed_changes_nothing():
    module = Answers()
    before = module.head.weight.detach().clone()
    fitting_steps(
        module, torch.rand(30, 1, 4, 4), torch.zeros(30, dtype=torch.long), torch.optim.SGD(module.parameters()), seeded(), 8
    )
    assert torch.equal(module.head.weight, before)


def test_predictions_are_in_order_whatever_the_batch():
    module, pixels = Answers(), torch.rand(600, 1, 4, 4)
    with torch.no_grad():
        expected = module(pixels)[1].argmax(dim=1)
    assert torch.equal(predicted(module, pixels), expected)
    labels = expected.clone()
    labels[:150] = (labels[:150] + 1) % 3
    assert accuracy(module, pixels, labels) == pytest.approx(0.75)


def test_fast_precision_never_reaches_beyond_its_block():
    device = compute_device()
    layer, values = nn.Linear(4, 4).to(device), torch.rand(2, 4, device=device)
    with fast_precision(device):
        assert layer(values).dtype in (torch.bfloat16, torch.float32)
    assert layer(values).dtype == torch.float32
