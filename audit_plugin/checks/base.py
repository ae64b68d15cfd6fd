"""The contracts of a check. A check measures; it knows no threshold that decides and no verdict.

* :class:`InputScorer`: says of single inputs how suspicious they are. ``fit`` returns a :class:`FittedScorer`.
* :class:`Probe`: looks for triggers in the model itself.
* :class:`ClassMeasure`: one number for each class.

Authors write ``fit`` and ``_score``; the public ``score`` is final and validates, so that shape and direction hold for
every check.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np

from audit_plugin.model.subject import Subject
from audit_plugin.types import Distribution, FitSplit, FloatArray, ImageArray, Trigger


class FittedScorer(abc.ABC):
    """A scorer that has seen its clean images."""

    own_thresholds: Mapping[str, float] = {}
    """Cuts that the method itself prescribes, by rule; without one, only the calibrated quantile is used."""

    facts: Mapping[str, Any] = {}
    """What the fit found, for the report; JSON values."""

    profile_layers: tuple[str, ...] = ()
    """Names of the columns of :meth:`profile`; empty when the check has no per-layer picture."""

    profile_quantity: str = ""

    @final
    def score(self, images: ImageArray) -> FloatArray:
        """Suspicion of each image, higher is more suspicious, always.

        Args:
            images: uint8 (N, height, width, channels).

        Returns:
            float32 (N,), finite.

        Raises:
            RuntimeError: the check broke its contract (wrong shape, NaN).
        """
        if len(images) == 0:
            return np.zeros(0, dtype=np.float32)
        scores = np.asarray(self._score(images), dtype=np.float32)
        if scores.shape != (len(images),):
            raise RuntimeError(f"{type(self).__name__} returned scores of shape {scores.shape} for {len(images)} images")
        if not np.isfinite(scores).all():
            raise RuntimeError(f"{type(self).__name__} returned NaN or infinite scores")
        return scores

    def profile(self, images: ImageArray) -> FloatArray:
        """Per-layer values behind the score, (N, len(profile_layers)); only called when there are such layers."""
        return np.zeros((len(images), 0), dtype=np.float32)

    def baselines(self, images: ImageArray) -> Mapping[str, FloatArray]:
        """Simpler scores of each image by name, each (N,), higher is more suspicious; reported beside the check's own."""
        return {}

    def distributions(self, clean: ImageArray, stamped: ImageArray, suspects: ImageArray) -> tuple[Distribution, ...]:
        """Quantities behind the score that are worth a histogram; any of the three may hold no image."""
        return ()

    @abc.abstractmethod
    def _score(self, images: ImageArray) -> FloatArray: ...


class InputScorer(abc.ABC):
    """A method that learns what clean inputs look like inside the model and scores new ones."""

    name: ClassVar[str]

    @abc.abstractmethod
    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedScorer:
        """Learn from clean images.

        Raises:
            InapplicableError: the method cannot measure this model, with the reason.
        """


class Probe(abc.ABC):
    """A method that looks for triggers hidden in the model."""

    name: ClassVar[str]

    @abc.abstractmethod
    def search(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> list[Trigger]:
        """One or more candidate triggers a class.

        Raises:
            InapplicableError: the method cannot measure this model, with the reason.
        """


FEWEST_CLASSES_REACHED = 3
"""With fewer classes that a measure reached there is nothing to compare, and it is inapplicable."""


class ClassMeasure(abc.ABC):
    """What of the model itself is different for the target class of a backdoor, whatever its trigger."""

    name: ClassVar[str]

    @abc.abstractmethod
    def measure(self, subject: Subject, fit_split: FitSplit, classes: Sequence[int], rng: np.random.Generator) -> FloatArray:
        """One number for each of ``classes``, (classes,), higher is more suspicious.

        Raises:
            InapplicableError: the method cannot measure this model, with the reason.
        """
