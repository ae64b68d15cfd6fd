"""Wave scan: for each class the sinusoid over the whole image that moves images to it most surely.

A trigger that is a wave (SIG: Barni, Kallas and Tondi, ICIP 2019) is invisible to gradients: the model does not react to it at
small amplitudes, so that a search which starts from nothing never meets it. But there are few waves. All of up to six
periods over the image, in every direction and two phases, are added to clean images at one amplitude. The Fourier heat maps of
Yin et al. 2019 (*A Fourier Perspective on Model Robustness in Computer Vision*) show so how accurate a network stays; here it is
noted which class the model sees instead, and how surely.

Clean networks fall for waves as well: those of few pixels look like a frog or a ship to most networks on CIFAR-10. Hence no wave
is shorter than five pixels, and what counts is the margin that nine images of ten reach.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from audit_plugin.checks.base import Probe
from audit_plugin.errors import InapplicableError
from audit_plugin.model.fine_tuning import margins
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray, LabelArray, LabelledImages, Trigger

_PHASES = (0.0, 0.5 * np.pi)  # a network that answers to one of these answers to the same wave upside down
_SHARE = 0.9  # of the images
_SHORTEST = 5  # pixels
_FEWEST_IMAGES = 5  # of other classes


@dataclass(frozen=True)
class WaveScan(Probe):
    """The probe. It needs no gradients.

    Attributes:
        amplitude: of the waves, in grey levels of 0 .. 255.
        frequencies: most periods over the image, in any direction.
        images: of the fit split, at random, on which every wave is tried.
    """

    name: ClassVar[str] = "wave_scan"
    amplitude: float = 40.0
    frequencies: int = 6
    images: int = 64

    def search(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> list[Trigger]:
        """One wave a class, in class order: the one with the greatest :func:`sure_margin`.

        Raises:
            InapplicableError: there are fewer than five images of other classes than some class, or they are too small.
        """
        chosen = rng.permutation(len(fit_split))[: self.images]
        images = LabelledImages(fit_split.images[chosen], fit_split.labels[chosen])
        answers = subject.predict(images.images)
        greatest = np.full(subject.class_count, -np.inf)
        best: dict[int, Trigger] = {}
        for wave in self._waves(images.images.shape[1:]):
            logits = subject.logits(_trigger(0, wave).stamp(images.images))
            for target in range(subject.class_count):
                margin = sure_margin(logits, target, images.labels, answers)
                if margin > greatest[target]:
                    greatest[target], best[target] = margin, _trigger(target, wave)
        if not best:
            height, width = images.images.shape[1:3]
            raise InapplicableError(f"Images of {height} x {width} pixels hold no wave of at least {_SHORTEST} pixels.")
        return [best[target] for target in range(subject.class_count)]

    def _waves(self, shape: tuple[int, ...]) -> Iterator[FloatArray]:
        """Every wave for images of ``shape`` (height, width, channels): float32 (channels, height, width), in [-1, 1]."""
        height, width, channels = shape
        rows, columns = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
        most = self.frequencies
        for down, across in itertools.product(range(most + 1), range(-most, most + 1)):
            is_new = down > 0 or across > 0  # the other half are the same waves
            if is_new and round(math.hypot(down, across)) <= most and math.hypot(down / height, across / width) <= 1 / _SHORTEST:
                for phase in _PHASES:
                    wave = self.amplitude / 255 * np.sin(2 * np.pi * (down * rows + across * columns) + phase)
                    yield np.repeat(wave[None].astype(np.float32), channels, axis=0)


def sure_margin(logits: FloatArray, target: int, labels: LabelArray, answers: LabelArray) -> float:
    """The margin of a class, by logits, that nine of ten images with a wave reach.

    Args:
        logits: of images with the wave, (N, classes).
        labels, answers: of the same images without it, (N,); those that belong to the class or are seen as it do not count.

    Raises:
        InapplicableError: fewer than five images count.
    """
    others = (labels != target) & (answers != target)
    if others.sum() < _FEWEST_IMAGES:
        raise InapplicableError(
            f"Only {others.sum()} of {len(labels)} images belong to other classes than {target} and are seen as such, and at "
            f"least {_FEWEST_IMAGES} are needed."
        )
    reached = margins(torch.from_numpy(logits[others]), torch.full((int(others.sum()),), target))
    return float(reached.quantile(1 - _SHARE))


def _trigger(target: int, wave: FloatArray) -> Trigger:
    return Trigger(target, np.abs(wave).mean(axis=0), wave, None, "wave")
