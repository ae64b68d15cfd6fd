from __future__ import annotations

import numpy as np
import pytest

from audit_plugin.maths.cosine import leave_one_out_cosine


def test_against_recomputing_every_centroid():
    features = np.random.default_rng(0).normal(1.0, 1.0, (12, 50))
    total = features.sum(axis=0)
    expected = []
    for row in range(12):
        centroid = np.delete(features, row, axis=0).mean(axis=0)
        expected.append(features[row] @ centroid / np.linalg.norm(features[row]) / np.linalg.norm(centroid))
    found = leave_one_out_cosine(features @ total, (features**2).sum(axis=1), np.full(12, total @ total))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_inside_its_own_centroid_an_image_looks_more_alike():
    features = np.random.default_rng(1).normal(0.0, 1.0, (5, 200))
    total = features.sum(axis=0)
    with_itself = features @ total / np.linalg.norm(features, axis=1) / np.linalg.norm(total)
    assert (leave_one_out_cosine(features @ total, (features**2).sum(axis=1), np.full(5, total @ total)) < with_itself).all()


@pytest.mark.parametrize("features", [np.ones((1, 4)), np.zeros((3, 4))])
def test_nothing_to_compare_with_gives_zero(features):
    total = features.sum(axis=0)
    norms = (features**2).sum(axis=1)
    assert leave_one_out_cosine(features @ total, norms, np.full(len(features), total @ total)).tolist() == [0.0] * len(features)
