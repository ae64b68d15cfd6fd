"""Activation clustering: Chen et al. 2018 (arXiv 1811.03728), as the Adversarial Robustness Toolbox (ART) has it.

Within each class the activations of the last block are reduced to ten principal components and split into two clusters; where one
holds less than 35 % of the class, its inputs are flagged.

Data-set level: it was made to clean a training set, and needs one with triggers in it. Here it is given inputs of unknown kind,
with the class that the model answers as their label; it sees no clean image, and gives no scores. The rule is the paper's
relative size, applied to ART's clusters: ART's own version of it breaks on a class where no cluster is small (ART 1.20, NumPy
2), and ART's default flags the smaller cluster of every class, however large. Classes with fewer than 20 inputs are left out,
and nothing of them is flagged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.subject import Subject
from audit_plugin.types import ImageArray, LabelledImages
from pipelines.peers.art_classifier import art_classifier, seeded
from pipelines.peers.base import InputResult

_DIMENSIONS = 10
_FEWEST_INPUTS = 2 * _DIMENSIONS
_FEWEST_CLASSES = 2  # ART reads the labels of a single one as indices
_SMALL_SHARE = 0.35


@dataclass(frozen=True)
class ActivationDefence:
    """The defence with ART's own settings."""

    name: ClassVar[str] = "activation_defence"
    compares_inputs: ClassVar[bool] = True

    def judge_inputs(self, subject: Subject, clean: LabelledImages, inputs: ImageArray, rng: np.random.Generator) -> InputResult:
        """See :class:`~pipelines.peers.base.InputPeer`."""
        from art.defences.detector.poison import ActivationDefence as Defence

        answers = subject.predict(inputs)
        kept = np.flatnonzero(np.bincount(answers, minlength=subject.class_count) >= _FEWEST_INPUTS)
        if len(kept) < _FEWEST_CLASSES:
            raise InapplicableError(
                f"Activation clustering needs at least {_FEWEST_INPUTS} inputs in each of {_FEWEST_CLASSES} classes, "
                f"{len(kept)} have as many."
            )
        rows = np.flatnonzero(np.isin(answers, kept))
        labels = np.searchsorted(kept, answers[rows])
        try:
            with seeded(rng):
                defence = Defence(art_classifier(subject, len(kept)), to_pixels(inputs[rows]), np.eye(len(kept))[labels])
                clusters_by_class, _ = defence.cluster_activations(nb_clusters=2, nb_dims=_DIMENSIONS, reduce="PCA")
        finally:
            subject.torch_module().to("cpu")
        flagged = np.zeros(len(inputs), dtype=np.bool_)
        for label, clusters in enumerate(clusters_by_class):
            shares = np.bincount(clusters) / len(clusters)
            flagged[rows[labels == label]] = shares[clusters] < _SMALL_SHARE
        return InputResult(flagged, None)
