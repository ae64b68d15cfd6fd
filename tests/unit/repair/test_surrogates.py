"""Stand-ins for a trigger: what they change, by how much, and that the recovered one among them is the recovered one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.repair import surrogates
from audit_plugin.repair.surrogates import Surrogates, random_blend, random_patch, random_warp
from audit_plugin.types import Trigger

SHAPES = [(40, 1, 16, 16), (24, 3, 32, 32), (12, 3, 20, 40)]
KINDS = {"patch": random_patch, "blend": random_blend, "warp": random_warp}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels_of(shape, seed=0):
    return torch.rand(shape, generator=generator(seed))


def recovered(family, shape, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape[2:]).astype(np.float32)
    low = -1.0 if family == "additive" else 0.0
    return Trigger(1, mask, rng.uniform(low, 1.0, shape[1:]).astype(np.float32), family=family)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_range_stay(kind, shape):
    pixels = pixels_of(shape)
    kept = pixels.clone()
    for seed in range(5):
        stamped = KINDS[kind](pixels, generator(seed))
        assert stamped.shape == pixels.shape
        assert stamped.dtype == torch.float32
        assert 0.0 <= float(stamped.min()) <= float(stamped.max()) <= 1.0
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_same_generator_same_stamps(kind):
    pixels = pixels_of(SHAPES[0])
    first, again, other = (KINDS[kind](pixels, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_patches_are_rectangles_of_at_most_a_fifth_of_each_side(shape):
    pixels = torch.full(shape, 0.5)  # neither black nor white, and noise hits 0.5 with probability zero
    changed = (random_patch(pixels, generator()) != pixels).any(dim=1)
    heights, widths = set(), set()
    for picture in changed:
        rows, columns = picture.any(dim=1).nonzero().flatten(), picture.any(dim=0).nonzero().flatten()
        height, width = int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)
        assert picture.sum() == height * width  # one filled rectangle
        heights.add(height)
        widths.add(width)
    assert max(heights) <= shape[2] / 5
    assert max(widths) <= shape[3] / 5
    assert len(heights) > 1
    assert len(widths) > 1


def test_patches_reach_every_pixel():
    changed = (random_patch(torch.full((4000, 1, 16, 16), 0.5), generator()) != 0.5).any(dim=1)
    assert changed.any(dim=0).all()


def test_blends_keep_their_opacity_bounds():
    """On black images a blend is opacity times noise below one; on white ones it takes away at most the opacity."""
    low, high = surrogates._OPACITIES
    opacities = []
    for seed in range(4):
        black = random_blend(torch.zeros(200, 3, 32, 32), generator(seed))
        white = random_blend(torch.ones(200, 3, 32, 32), generator(seed))
        opacity = (1.0 - (white - black)).mean(dim=(1, 2, 3))  # (1 - a) + a n - a n
        assert float(black.max()) <= high
        assert float(white.min()) >= 1.0 - high - 1e-6
        opacities.append(opacity)
    drawn = torch.cat(opacities)
    assert low - 1e-5 <= float(drawn.min()) <= low + 0.01
    assert high - 0.01 <= float(drawn.max()) <= high + 1e-5


def test_warps_leave_constant_images_alone():
    constant = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    torch.testing.assert_close(random_warp(constant, generator()), constant, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 1, 16, 16), (64, 3, 32, 32)], ids=str)
def test_warps_move_pixels_by_about_one(shape):
    """A ramp of one grey level a pixel shows the displacement; its mean is the drawn strength in half pixels, at most."""
    size = shape[3]
    for axis in (2, 3):
        ramp = torch.arange(size, dtype=torch.float32).view([size if place == axis else 1 for place in range(4)]).expand(shape)
        inner = (random_warp(ramp / (size - 1), generator()) * (size - 1) - ramp).abs()
        assert 0.02 < float(inner.mean()) < surrogates._WARPS[1]
        assert float(inner.max()) < 6.0


@pytest.mark.parametrize("family", ["patch", "additive"])
def test_recovered_trigger_is_stamped_as_the_trigger_stamps(family):
    """Up to the rounding of a file: half a grey level each, of the stamped image."""
    images = np.random.default_rng(1).integers(0, 256, (30, 16, 20, 3), dtype=np.uint8)
    trigger = recovered(family, (30, 3, 16, 20))
    stamp = surrogates._recovered(trigger, torch.device("cpu"))
    stamped = stamp(torch.from_numpy(to_pixels(images)))
    np.testing.assert_allclose(stamped.numpy(), to_pixels(trigger.stamp(images)), rtol=0.0, atol=1 / 255)


def test_each_image_gets_one_stand_in_and_the_recovered_one_gets_its_share():
    """The mask covers everything and leaves one grey value, so that its images can be counted."""
    whole = Trigger(0, np.ones((16, 16), np.float32), np.full((1, 16, 16), 0.125, np.float32))
    stamps = Surrogates([whole], generator(), torch.device("cpu"))
    pixels = pixels_of((2000, 1, 16, 16), 7)
    kept = pixels.clone()
    stamped = stamps.stamp(pixels)
    assert torch.equal(pixels, kept)
    covered = (stamped == 0.125).all(dim=(1, 2, 3)).float().mean()
    # three fifths; four binomial deviations of 2,000 draws
    assert abs(float(covered) - 0.6) < 4 * (0.4 * 0.6 / 2000) ** 0.5


def test_without_a_recovered_trigger_the_random_ones_share_all_images():
    pixels = pixels_of((600, 1, 16, 16), 7)
    stamped = Surrogates([], generator(), torch.device("cpu")).stamp(pixels)
    assert float((stamped != pixels).any(dim=(1, 2, 3)).float().mean()) > 0.99  # a warp leaves few images as they are


def test_seed_decides_everything():
    shape = (50, 3, 16, 16)
    triggers = [recovered("patch", shape), recovered("additive", shape)]
    first, again, other = (
        Surrogates(triggers, generator(seed), torch.device("cpu")).stamp(pixels_of(shape)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.0 <= float(first.min()) <= float(first.max()) <= 1.0
