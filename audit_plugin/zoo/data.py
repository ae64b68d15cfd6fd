"""Images for the zoo. scikit-learn's handwritten digits are real images that come with a package, so they are always there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from audit_plugin.types import LabelledImages


class TrainAndTest(NamedTuple):
    """Two disjoint sets of images."""

    train: LabelledImages
    test: LabelledImages


def digits(*, seed: int, size: int = 16, train_fraction: float = 0.6) -> TrainAndTest:
    """1,797 grey digits of 8 x 8 pixels, enlarged to ``size`` x ``size`` (bilinear); uint8 (N, size, size, 1), 10 classes."""
    bunch = load_digits()
    small = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in small])
    images, labels = images[..., None], bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = round(train_fraction * len(labels))
    first, second = order[:cut], order[cut:]
    return TrainAndTest(LabelledImages(images[first], labels[first]), LabelledImages(images[second], labels[second]))
