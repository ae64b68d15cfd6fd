"""Averaging over windows, and the auto-encoder that learns benign features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audit_plugin.model import benign_features
from audit_plugin.model.benign_features import Windows, fit_benign_features, training_bytes

CLASSES, FEATURES = 3, 24
FLAT = Windows((FEATURES,), 1)


@pytest.mark.parametrize(
    ("shape", "size", "averaged"),
    [
        ((512,), 1, (512,)),
        ((128, 8, 8), 1, (128, 8, 8)),
        ((256, 14, 14), 4, (256, 4, 4)),
        ((64, 33, 20), 4, (64, 9, 5)),
        ((20_000, 3, 3), 4, (20_000, 1, 1)),
        ((197, 768), 1, (197, 768)),
        ((14, 14, 384), 1, (14, 14, 384)),  # channels last
    ],
)
def test_windows_of_a_shape(shape, size, averaged):
    windows = Windows.of(shape, (64, 64))
    assert (windows.size, windows.averaged_shape) == (size, averaged)
    assert windows.feature_count == np.prod(averaged)


def test_averages_count_no_position_twice_and_none_beyond_the_border():
    features = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    windows = Windows((3, 5, 7), 2)
    found = windows.average(features).reshape(2, 3, 3, 4)
    np.testing.assert_allclose(found[:, :, 1, 2], features[:, :, 2:4, 4:6].mean(axis=(2, 3)), atol=1e-6)
    np.testing.assert_allclose(found[:, :, 2, 3], features[:, :, 4, 6], atol=1e-6)
    np.testing.assert_allclose(windows.average(np.ones_like(features)), 1.0, atol=1e-6)


def test_enlarging_repeats_each_average():
    windows = Windows((1, 5, 7), 2)
    small = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    left, right = windows.enlarging()
    np.testing.assert_array_equal((left @ small @ right)[0, 0], np.kron(small[0, 0], np.ones((2, 2)))[:5, :7])


def benign(count, seed=0):
    """Features on a plane of two dimensions that depends on the class, and a little noise."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % CLASSES
    directions = np.random.default_rng(99).normal(size=(CLASSES, 2, FEATURES))
    centres = np.random.default_rng(98).normal(size=(CLASSES, FEATURES)) * 3
    values = centres[classes] + np.einsum("nk,nkd->nd", rng.normal(size=(count, 2)), directions[classes])
    return (values + 0.05 * rng.normal(size=values.shape)).astype(np.float32), classes


def fit(values, classes, windows=FLAT, seed=0, steps=400):
    return fit_benign_features(values, classes, windows, CLASSES, np.random.default_rng(seed), latent_size=4, steps=steps)


@pytest.fixture(scope="module")
def fitted():
    return fit(*benign(300))


def distances(fitted, values, classes):
    return fitted.module.distance(torch.from_numpy(values), torch.from_numpy(classes)).numpy()


def test_unseen_benign_features_are_reconstructed_and_others_are_not(fitted):
    assert 0 < fitted.kept_step <= 400
    values, classes = benign(200, seed=1)
    clean = distances(fitted, values, classes)
    assert np.median(clean) < 0.2  # the features themselves have unit variance
    elsewhere = values + np.random.default_rng(2).normal(size=values.shape).astype(np.float32) * 2
    assert np.median(distances(fitted, elsewhere, classes)) > 5 * np.median(clean)
    another_class = distances(fitted, values, (classes + 1) % CLASSES)
    assert np.median(another_class) > 2 * np.median(clean)


def test_held_out_rows_are_a_fifth_and_their_error_is_the_one_that_is_reported(fitted):
    values, classes = benign(300)
    assert len(set(fitted.held_out.tolist())) == 60
    found = distances(fitted, values[fitted.held_out], classes[fitted.held_out]).mean()
    assert found == pytest.approx(fitted.held_out_error, rel=1e-4)


def test_one_seed_gives_one_auto_encoder_and_leaves_the_global_generator_alone():
    values, classes = benign(60)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (fit(values, classes, seed=seed, steps=30).module.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.weight"], other["encoder.weight"])


def test_the_scale_of_the_features_does_not_matter():
    # A power of two changes no digit of a float32, so that the two trainings are the same.
    values, classes = benign(60)
    plain, scaled = fit(values, classes, steps=50), fit(values * 4, classes, steps=50)
    assert scaled.held_out_error == plain.held_out_error
    probe, told = benign(20, seed=3)
    np.testing.assert_array_equal(distances(scaled, probe * 4, told), distances(plain, probe, told))


def test_a_silent_feature_counts_when_it_fires_and_numerical_noise_in_it_does_not():
    values, classes = benign(100)
    values[:, 0] = 0.0
    fitted = fit(values, classes, steps=100)
    before = distances(fitted, values, classes)
    noise, fires = values.copy(), values.copy()
    noise[:, 0], fires[:, 0] = 1e-6, 3.0
    np.testing.assert_allclose(distances(fitted, noise, classes), before, atol=1e-3)
    assert (distances(fitted, fires, classes) > before + 1).all()


def test_constant_features_give_finite_distances():
    fitted = fit(np.ones((20, FEATURES), dtype=np.float32), np.zeros(20, dtype=np.int64), steps=30)
    assert np.isfinite(distances(fitted, np.ones((2, FEATURES), dtype=np.float32), np.zeros(2, dtype=np.int64))).all()


def test_a_reconstructed_map_has_the_reconstruction_as_averages_and_keeps_the_differences_inside_a_window():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3, 5, 5)).astype(np.float32)
    windows = Windows((3, 5, 5), 2)
    classes = np.arange(40) % CLASSES
    module = fit(windows.average(features), classes, windows, steps=30).module
    values, told = torch.from_numpy(features), torch.from_numpy(classes)
    moved = module.reconstruct(values, told)
    expected = module(module.standardised(values), told)
    np.testing.assert_allclose(module.standardised(moved).numpy(), expected.numpy(), atol=1e-5)
    inside = (moved - values)[:, :, :2, :2]
    np.testing.assert_allclose(inside.numpy(), np.broadcast_to(inside.numpy()[:, :, :1, :1], inside.shape), atol=1e-5)


def test_training_ends_when_nothing_improves(monkeypatch):
    rng = np.random.default_rng(0)
    noise, classes = rng.normal(size=(60, FEATURES)).astype(np.float32), np.arange(60) % CLASSES
    taken = []
    loss = benign_features._loss
    monkeypatch.setattr(benign_features, "_loss", lambda *arguments: taken.append(1) or loss(*arguments))
    fitted = fit(noise, classes, steps=5000)
    assert len(taken) == fitted.kept_step + 200 < 5000


@pytest.mark.parametrize("shape", [(9, FEATURES), (20, FEATURES + 1), (20, 2, FEATURES)])
def test_rows_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=f"at least 10 rows of {FEATURES} features"):
        fit(np.zeros(shape, dtype=np.float32), np.zeros(shape[0], dtype=np.int64))


def test_memory_grows_with_rows_and_features():
    assert training_bytes(1000, 8192, 10, 32) < 128 * 1024**2
    assert training_bytes(1000, 1_000_000, 10, 32) > 8 * 1000 * 1_000_000
