"""STRIP as the Adversarial Robustness Toolbox (ART) has it, beside :mod:`pipelines.peers.strip`.

ART 1.20 takes the entropy of each class over the overlays, where the paper takes that of each answer over the classes: answers
that do not depend on the overlay have the highest entropy then, not the lowest. It takes means of two images rather than sums,
and does not give the entropies away, so there are flags and no scores. We leave all of it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.subject import Subject
from audit_plugin.types import ImageArray, LabelledImages
from pipelines.peers.art_classifier import art_classifier, seeded
from pipelines.peers.base import InputResult


@dataclass(frozen=True)
class ArtStrip:
    """``overlays`` clean images an input, ``false_positive_rate`` that the threshold is meant to have."""

    name: ClassVar[str] = "strip_art"
    compares_inputs: ClassVar[bool] = False
    overlays: int = 20
    false_positive_rate: float = 0.01

    def judge_inputs(self, subject: Subject, clean: LabelledImages, inputs: ImageArray, rng: np.random.Generator) -> InputResult:
        """See :class:`~pipelines.peers.base.InputPeer`."""
        from art.defences.transformer.poisoning import STRIP

        classifier = art_classifier(subject)
        try:
            with seeded(rng):
                defence = STRIP(classifier)(num_samples=self.overlays, false_acceptance_rate=self.false_positive_rate)
                defence.mitigate(to_pixels(clean.images))
                answers = defence.predict(to_pixels(inputs))
        finally:
            subject.torch_module().to("cpu")
        return InputResult((answers == 0).all(axis=1), None)  # how ART abstains
