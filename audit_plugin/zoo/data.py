"""Images for the zoo. scikit-learn's handwritten digits are real images that come with a package, so they are always there;
CIFAR-10 and GTSRB come from torchvision or from files of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from audit_plugin.errors import UsageError
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


def imbalanced(data: LabelledImages, *, seed: int, least: float = 0.1) -> LabelledImages:
    """A subset whose classes shrink geometrically, in random order, from all images of a class to the share ``least`` of one."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(data.labels))
    shares = np.geomspace(1.0, least, len(classes))
    kept = [
        rng.choice(members, size=max(round(share * len(members)), 1), replace=False)
        for share, members in (
            (share, np.flatnonzero(data.labels == label)) for share, label in zip(shares, classes, strict=True)
        )
    ]
    rows = np.sort(np.concatenate(kept))
    return LabelledImages(data.images[rows], data.labels[rows])


def cifar10(folder: Path) -> TrainAndTest:
    """CIFAR-10, uint8 (N, 32, 32, 3), 10 classes.

    Reads ``cifar10_train*.npz`` and ``cifar10_test.npz`` (``images``, ``labels``) where ``folder`` holds them; otherwise
    torchvision downloads the data set into ``folder``.

    Raises:
        UsageError: the files cannot be read, or there are none and they cannot be downloaded.
    """
    if stored := _stored_sets(folder, "cifar10"):
        return stored
    from torchvision.datasets import CIFAR10

    with _downloading("CIFAR-10", "cifar10", folder):
        train, test = (CIFAR10(folder, train=train, download=True) for train in (True, False))
    return TrainAndTest(*(LabelledImages(part.data, np.asarray(part.targets, dtype=np.int64)) for part in (train, test)))


def gtsrb(folder: Path) -> TrainAndTest:
    """German traffic signs (GTSRB), resized to uint8 (N, 32, 32, 3), 43 classes; files and download as for :func:`cifar10`."""
    if stored := _stored_sets(folder, "gtsrb"):
        return stored
    from torchvision.datasets import GTSRB

    with _downloading("GTSRB", "gtsrb", folder):
        return TrainAndTest(*(_resized(GTSRB(folder, split=split, download=True)) for split in ("train", "test")))


def _resized(signs: Iterable[tuple[Image.Image, int]], size: int = 32) -> LabelledImages:
    images, labels = zip(*((sign.resize((size, size), Image.Resampling.BILINEAR), label) for sign, label in signs), strict=True)
    return LabelledImages(np.stack([np.asarray(image) for image in images]), np.asarray(labels, dtype=np.int64))


@contextmanager
def _downloading(title: str, name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # no network; a damaged download
        raise UsageError(
            f"{title} is not in '{folder}' and could not be downloaded there ({' '.join(str(error).split())}). Put "
            f"{name}_train.npz and {name}_test.npz (images, labels) there or name their folder; digits need no files."
        ) from error


def _stored_sets(folder: Path, name: str) -> TrainAndTest | None:
    parts = sorted(folder.glob(f"{name}_train*.npz"))
    if not parts:
        return None
    try:
        return TrainAndTest(_stored(*parts), _stored(folder / f"{name}_test.npz"))
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise UsageError(
            f"The files {name}_train*.npz and {name}_test.npz in '{folder}' cannot be read ({error}). Each must hold arrays "
            "'images' (uint8, N x 32 x 32 x 3) and 'labels' (N)."
        ) from error


def _stored(*files: Path) -> LabelledImages:
    images, labels = [], []
    for file in files:
        with np.load(file) as stored:
            images.append(stored["images"])
            labels.append(stored["labels"])
    return LabelledImages(np.concatenate(images), np.concatenate(labels).astype(np.int64))
