from __future__ import annotations

import numpy as np
import pytest

from audit_plugin.maths.mahalanobis import SMALLEST_DEVIATION, fit_class_gaussians, floored_deviation


def distances(gaussians, values, classes):
    return (((values - gaussians.means[classes]) @ gaussians.whitening) ** 2).sum(axis=1)


def correlated(count, features=6, classes=3, seed=0):
    """Normal vectors of one covariance around class means, and their classes."""
    mixing = np.random.default_rng(7).normal(size=(features, features))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return rng.normal(size=(count, features)) @ mixing + 5.0 * labels[:, None], labels


def test_with_many_vectors_it_is_the_plain_mahalanobis_distance():
    values, labels = correlated(20_000)
    gaussians = fit_class_gaussians(values, labels, 3)
    assert gaussians.shrinkage < 0.01
    residuals = values - np.stack([values[labels == label].mean(axis=0) for label in range(3)])[labels]
    expected = np.einsum("nf,nf->n", residuals @ np.linalg.inv(residuals.T @ residuals / len(values)), residuals) / 6
    np.testing.assert_allclose(distances(gaussians, values, labels), expected, rtol=0.1)


def test_new_vectors_of_their_class_are_at_distance_one_and_of_another_farther():
    gaussians = fit_class_gaussians(*correlated(3000), 3)
    values, labels = correlated(3000, seed=1)
    # The mean of chi-squared(6) / 6 over 3,000 vectors has the standard error 0.01.
    assert distances(gaussians, values, labels).mean() == pytest.approx(1.0, abs=0.05)
    assert distances(gaussians, values, (labels + 1) % 3).mean() > 1.5


def test_units_of_single_features_do_not_matter():
    values, labels = correlated(200)
    units = np.array([1.0, 2.0, 0.5, 1.5, 0.7, 1.2])  # within the floor, which compares features
    plain, scaled = fit_class_gaussians(values, labels, 3), fit_class_gaussians(values * units, labels, 3)
    np.testing.assert_allclose(distances(scaled, values * units, labels), distances(plain, values, labels), rtol=1e-8)


def test_a_silent_feature_adds_nothing_until_it_speaks():
    values, labels = correlated(200)
    with_silent = np.c_[values, np.zeros(200)]
    gaussians = fit_class_gaussians(with_silent, labels, 3)
    usual = distances(gaussians, with_silent, labels)
    speaking = with_silent.copy()
    speaking[:, -1] = values.std()
    assert np.isfinite(usual).all()
    assert (distances(gaussians, speaking, labels) > usual + 1).all()


def test_a_class_without_vectors_has_the_mean_of_all():
    values, labels = correlated(50)
    gaussians = fit_class_gaussians(values, labels, 5)
    np.testing.assert_allclose(gaussians.means[3:], np.tile(values.mean(axis=0), (2, 1)))


@pytest.mark.parametrize("values", [np.array([[1.0, 2.0], [-1.0, -2.0]]), np.random.default_rng(0).normal(size=(4, 50))])
def test_few_vectors_leave_it_finite(values):
    gaussians = fit_class_gaussians(values, np.zeros(len(values), dtype=np.int64), 1)
    assert np.isfinite(gaussians.whitening).all()
    assert np.isfinite(distances(gaussians, values + 10.0, np.zeros(len(values), dtype=np.int64))).all()


def test_floor_is_relative_to_the_other_features():
    values = np.array([[-1.0, -1e-9], [1.0, 1e-9]])
    np.testing.assert_allclose(floored_deviation(values), [1.0, SMALLEST_DEVIATION * np.sqrt(0.5)])
    np.testing.assert_allclose(floored_deviation(values * 1000), floored_deviation(values) * 1000)


def test_nothing_that_varies_is_an_error():
    with pytest.raises(ValueError, match="do not vary"):
        fit_class_gaussians(np.array([[1.0], [1.0], [2.0]]), np.array([0, 0, 1]), 2)
