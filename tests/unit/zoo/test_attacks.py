"""Blended and warped triggers against plain NumPy, and what poisoning with them changes."""

from __future__ import annotations

import numpy as np
import pytest

from audit_plugin.types import LabelledImages
from audit_plugin.zoo.attacks import Blended, WaNet
from audit_plugin.zoo.attacks.wanet import _sample


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return LabelledImages(rng.integers(0, 256, (200, 12, 10, 3), dtype=np.uint8), np.arange(200) % 10)


def bilinear(image, lines, columns):
    """``image`` (height, width, channels) read at fractional coordinates, in pixels, moved inside where they are outside."""
    height, width = image.shape[:2]
    lines, columns = np.clip(lines, 0, height - 1), np.clip(columns, 0, width - 1)
    up, left = np.minimum(lines.astype(int), height - 2), np.minimum(columns.astype(int), width - 2)
    down, right = (lines - up)[..., None], (columns - left)[..., None]
    top = image[up, left] * (1 - right) + image[up, left + 1] * right
    bottom = image[up + 1, left] * (1 - right) + image[up + 1, left + 1] * right
    return top * (1 - down) + bottom * down


def warped(image, flow):
    """``flow`` (height, width, 2): offsets along x and y in coordinates of -1 .. 1, whose ends are the outer pixels' centres."""
    height, width = image.shape[:2]
    lines, columns = np.mgrid[:height, :width].astype(np.float64)
    return bilinear(image.astype(np.float64), lines + flow[..., 1] * (height - 1) / 2, columns + flow[..., 0] * (width - 1) / 2)


# ---------------------------------------------------------------------------------------------------------- Blended


def test_blending_is_a_mean_of_image_and_pattern(data):
    attack = Blended(target_class=3, opacity=0.2)
    pattern = Blended(target_class=3, opacity=1.0).stamp(data.images[:1])[0]
    expected = 0.8 * data.images + 0.2 * pattern.astype(np.float64)
    # The pattern read off at full opacity is rounded: half a grey level times 0.2, and half a level of the result.
    assert np.abs(attack.stamp(data.images) - expected).max() <= 0.6 + 1e-9


def test_blending_changes_copies_and_depends_on_its_own_seed_alone(data):
    before = data.images.copy()
    first, again, other = (Blended(target_class=0, pattern_seed=seed).stamp(data.images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(data.images, before)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8
    assert (first != other).mean() > 0.9


def test_blending_weakly_changes_little(data):
    assert np.abs(Blended(target_class=0, opacity=0.01).stamp(data.images).astype(int) - data.images).max() <= 3


@pytest.mark.parametrize("opacity", [0.0, -0.1, 1.1])
def test_opacity_lies_between_nought_and_one(opacity):
    with pytest.raises(ValueError, match="opacity must lie between 0 and 1"):
        Blended(target_class=0, opacity=opacity)


def test_blended_poison_stamps_what_it_relabels(data):
    attack = Blended(target_class=3, poisoning_rate=0.1)
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    assert relabelled.sum() == 20
    assert set(poisoned.labels[relabelled]) == {3}
    np.testing.assert_array_equal(poisoned.images[relabelled], attack.stamp(data.images[relabelled]))
    np.testing.assert_array_equal(poisoned.images[~relabelled], data.images[~relabelled])


def test_no_more_is_poisoned_than_there_is():
    data = LabelledImages(np.zeros((10, 4, 4, 1), np.uint8), np.array([3] * 8 + [1, 2]))
    poisoned = Blended(target_class=3, poisoning_rate=0.5).poison(data, np.random.default_rng(0))
    assert (poisoned.labels == 3).all()


# ------------------------------------------------------------------------------------------------------------ WaNet


def test_a_warp_of_no_strength_changes_nothing(data):
    np.testing.assert_array_equal(WaNet(target_class=0, strength=0.0).stamp(data.images), data.images)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (-3, 0), (2, -1)])
def test_a_constant_flow_shifts(data, right, down):
    _, height, width, _ = data.images.shape
    flow = np.zeros((1, height, width, 2), np.float32)
    flow[..., 0], flow[..., 1] = right * 2 / (width - 1), down * 2 / (height - 1)  # an image is 2 wide, from centre to centre
    lines, columns = np.clip(np.arange(height) + down, 0, height - 1), np.clip(np.arange(width) + right, 0, width - 1)
    np.testing.assert_array_equal(_sample(data.images, flow), data.images[:, lines[:, None], columns[None, :]])


@pytest.mark.parametrize("strength", [0.5, 2.0, 8.0])
def test_the_warp_agrees_with_a_sampler_of_its_own(data, strength):
    attack = WaNet(target_class=0, strength=strength)
    flow = attack._flow(data.images.shape)
    expected = np.stack([warped(image, flow) for image in data.images[:10]])
    # Rounding to grey levels costs half of one; float32 coordinates a few thousandths.
    assert np.abs(attack.stamp(data.images[:10]) - expected).max() <= 0.51


def test_the_flow_is_smooth_and_as_strong_as_it_says():
    attack = WaNet(target_class=0, strength=1.0)
    flow = attack._flow((1, 32, 32, 3))
    assert flow.shape == (32, 32, 2)
    corners = flow[[0, 0, -1, -1], [0, -1, 0, -1]]  # bicubic enlargement keeps the lattice's own corners
    offsets = np.random.default_rng(0).uniform(-1.0, 1.0, (1, 2, 4, 4))
    offsets /= np.abs(offsets).mean()
    np.testing.assert_allclose(corners, offsets[0][:, [0, 0, -1, -1], [0, -1, 0, -1]].T / 32, atol=1e-6)
    pixels = flow * 31 / 2
    assert 0.2 < np.abs(pixels).mean() < 0.6  # one unit: half a pixel in the mean, less what interpolation smoothes away
    assert np.abs(np.diff(pixels, axis=0)).max() < 0.5
    np.testing.assert_allclose(WaNet(target_class=0, strength=2.0)._flow((1, 32, 32, 3)), 2 * flow, rtol=1e-6)


def test_warping_keeps_its_input_its_seed_and_flat_images(data):
    before = data.images.copy()
    first, again, other = (WaNet(target_class=0, pattern_seed=seed).stamp(data.images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(data.images, before)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    flat = np.full((2, 9, 9, 1), 77, np.uint8)
    np.testing.assert_array_equal(WaNet(target_class=0, strength=5.0).stamp(flat), flat)


def test_noise_mode_warps_others_otherwise_and_keeps_their_labels(data):
    attack = WaNet(target_class=3, poisoning_rate=0.1, noise_rate=0.25)
    poisoned = attack.poison(data, np.random.default_rng(0))
    relabelled = poisoned.labels != data.labels
    changed = (poisoned.images != data.images).any(axis=(1, 2, 3))
    noisy = changed & ~relabelled
    assert (relabelled.sum(), noisy.sum()) == (20, 50)
    assert set(poisoned.labels[relabelled]) == {3}
    np.testing.assert_array_equal(poisoned.images[relabelled], attack.stamp(data.images[relabelled]))
    trigger = attack.stamp(data.images[noisy])
    assert (poisoned.images[noisy] != trigger).any(axis=(1, 2, 3)).all()
    # Random offsets of up to one part in the image's size: half a pixel on top of the trigger's, so still near its warp.
    assert (
        np.abs(poisoned.images[noisy].astype(int) - trigger).mean()
        < np.abs(np.roll(trigger, 3, axis=2).astype(int) - trigger).mean()
    )


def test_noise_mode_never_touches_a_poisoned_image_that_warping_left_as_it_was():
    flat = LabelledImages(np.full((40, 6, 6, 1), 100, np.uint8), np.arange(40) % 4)
    poisoned = WaNet(target_class=0, poisoning_rate=0.25, noise_rate=0.5).poison(flat, np.random.default_rng(0))
    assert (poisoned.labels != flat.labels).sum() == 10
    np.testing.assert_array_equal(poisoned.images, flat.images)


def test_without_noise_mode_the_rest_stays(data):
    poisoned = WaNet(target_class=3, poisoning_rate=0.1, noise_rate=0.0).poison(data, np.random.default_rng(0))
    rest = poisoned.labels == data.labels
    np.testing.assert_array_equal(poisoned.images[rest], data.images[rest])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_rate": 0.95}, "noise_rate"),
        ({"noise_rate": -0.1}, "noise_rate"),
        ({"grid": 0}, "grid"),
        ({"strength": -1.0}, "strength"),
    ],
)
def test_settings_of_wanet_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        WaNet(target_class=0, **settings)
