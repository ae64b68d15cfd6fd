"""Three disjoint parts of the clean set: to learn from, to set thresholds with, to report figures on."""

from __future__ import annotations

import hashlib
import logging
import math

import numpy as np
from numpy.typing import NDArray

from audit_plugin.errors import CleanSetError, UsageError
from audit_plugin.types import CalibrateSplit, FitSplit, ImageArray, LabelArray, LabelledImages, Splits, TestSplit

log = logging.getLogger(__name__)

_SHOWN = 5


def split(
    data: LabelledImages,
    *,
    seed: int,
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3),
    minimum_per_class: int = 3,
) -> Splits:
    """Split by class into fit, calibrate and test, with no image in two of them.

    Identical images are kept once, so that a copy cannot carry what was learned into the test; images that occur under
    several labels are dropped altogether, because at least one of the labels is wrong. Each split is in random order.

    The result depends on the seed and on the set of images alone: not on their order, nor on how classes are numbered.
    A class of n images gives each split its share of n, and at least one image where n >= 3 (see ``allocate``).
    Classes without images are allowed here; the expectations on the clean set report them.

    Args:
        data: images uint8 (N, height, width, channels) and labels from 0.
        seed: of ``numpy.random.default_rng``.
        fractions: shares of fit, calibrate and test, each above 0, together 1.
        minimum_per_class: distinct images that a class needs; three is the least that reaches every split.

    Raises:
        CleanSetError: labels missing, a single class, or a class with too few distinct images.
        UsageError: fractions or minimum make no sense.
    """
    _check_request(fractions, minimum_per_class)
    _check_data(data)
    hashes = content_hashes(data.images)
    kept = _distinct(hashes, data.labels)
    _check_counts(data.labels, kept, minimum_per_class)
    if len(kept) < len(data):
        log.warning("%d of %d clean images are copies of others and were dropped.", len(data) - len(kept), len(data))

    # One random place for each content, whatever its label: this makes the split independent of order and numbering.
    by_content = kept[np.argsort(hashes[kept])]
    shuffled = np.random.default_rng(seed).permutation(by_content)
    part_of = np.full(len(data), -1)
    for label in np.unique(data.labels):
        members = shuffled[data.labels[shuffled] == label]
        part_of[members] = np.repeat(np.arange(3), allocate(len(members), fractions))
    fit, calibrate, test = (shuffled[part_of[shuffled] == part] for part in range(3))
    return Splits(
        fit=FitSplit(data.images[fit], data.labels[fit]),
        calibrate=CalibrateSplit(data.images[calibrate], data.labels[calibrate]),
        test=TestSplit(data.images[test], data.labels[test]),
    )


def allocate(count: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """How many of ``count`` images fit, calibrate and test get: the share rounded down or up, by largest remainder.

    From three images on each gets at least one, taken from the split that lies highest above its share.

    >>> allocate(10, (0.5, 0.2, 0.3))
    (5, 2, 3)
    >>> allocate(3, (0.8, 0.1, 0.1))
    (1, 1, 1)
    """
    # Without the tiny surplus 0.3 * 10 would be cut to 2 on a machine that computes 2.9999999999999996.
    shares = [fraction * count for fraction in fractions]
    counts = [math.floor(share + 1e-9) for share in shares]
    if count >= len(fractions):
        counts = [max(1, whole) for whole in counts]
    while sum(counts) != count:
        step = 1 if sum(counts) < count else -1
        places = [place for place in range(len(counts)) if step > 0 or counts[place] > 1]
        chosen = max(places, key=lambda place: step * round(shares[place] - counts[place], 9))
        counts[chosen] += step
    return counts[0], counts[1], counts[2]


def content_hashes(images: ImageArray) -> NDArray[np.str_]:
    """SHA-256 in hex of each image's bytes, (N,): equal exactly where images are equal."""
    return np.array([hashlib.sha256(np.ascontiguousarray(image).data).hexdigest() for image in images], dtype="<U64")


def _distinct(hashes: NDArray[np.str_], labels: LabelArray) -> NDArray[np.int64]:
    """Index of the first image of each content that has one label only, in order."""
    first: dict[str, int] = {}
    contradicted: set[str] = set()
    for index, content in enumerate(hashes.tolist()):
        earlier = first.setdefault(content, index)
        if labels[earlier] != labels[index]:
            contradicted.add(content)
    return np.array(sorted(index for content, index in first.items() if content not in contradicted), np.int64)


def _check_request(fractions: tuple[float, float, float], minimum_per_class: int) -> None:
    if len(fractions) != 3 or not all(fraction > 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(
            f"expected three fractions above 0 that sum to 1 (fit, calibrate, test), got {fractions};"
            " for example (0.5, 0.2, 0.3)."
        )
    if minimum_per_class < 1:
        raise UsageError(f"minimum_per_class must be at least 1, got {minimum_per_class}; three reach every split.")


def _check_data(data: LabelledImages) -> None:
    if len(data.images) != len(data.labels) or not len(data):
        raise CleanSetError(f"expected images with one label each, got {len(data.images)} images and {len(data.labels)} labels.")
    if data.labels.min() < 0:
        raise CleanSetError(
            f"{int((data.labels < 0).sum())} of {len(data)} clean images have no label; a clean set needs them all."
        )
    present = np.unique(data.labels)
    if len(present) < 2:
        raise CleanSetError(
            f"all {len(data)} clean images are of class {present[0]}. A backdoor shows between classes: add images of the others."
        )


def _check_counts(labels: LabelArray, kept: NDArray[np.int64], minimum: int) -> None:
    short = []
    for label in np.unique(labels):
        found, distinct = int((labels == label).sum()), int((labels[kept] == label).sum())
        if distinct < minimum:
            dropped = f" (of {found}; copies count once)" if distinct < found else ""
            short.append(f"class {label} has {distinct}{dropped}")
    if short:
        rest = f", and {len(short) - _SHOWN} more classes" if len(short) > _SHOWN else ""
        raise CleanSetError(
            f"too few distinct clean images to split: {', '.join(short[:_SHOWN])}{rest}; at least {minimum} are needed"
            " in each class that occurs. Add images, or leave these classes out."
        )
