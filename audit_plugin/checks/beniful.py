"""BeniFul, the detection: Li, Zhang and Ma 2024 (arXiv 2410.14723).

The paper judges an input by how far its features in the middle of the network lie from their reconstruction by a variational
auto-encoder that knows benign features only, together with the inference result. It publishes neither code nor layer, sizes,
weights or thresholds, so what follows is our design. M = g(h(x)) is cut at one tap; c is the predicted class; r is the
reconstruction of h(x) given c, from the latent mean:

* distance: mean squared difference of h(x) and r, both standardised with the deviations of clean features;
* disagreement: half the L1 distance of softmax(M(x)) and softmax(g(r)), in [0, 1].

The score is (log distance - its mean) / its deviation + the same of the disagreement, bounded to [0, 1]; means and deviations
are those of the held-out fifth of the fit split.

Decisions, measured on backdoored models with their true triggers (see the check's page):

* The tap at five sixths of the depth, rounded up. At two thirds the distance found a fifth of a blended trigger at 1 % false
  positives, at every later tap all of it.
* The disagreement is bounded. Of a warping trigger it sees what the distance overlooks (areas under the ROC curve 0.80 and 0.80
  alone, 0.87 together), but near the logits it is often *smaller* for triggered inputs than for clean ones, because a
  reconstruction that is told the target class is one of the target class. So a small one never speaks for an input, and a large
  one adds one deviation at most; bounds of two or three help the warping trigger and harm others.
* Whether the predicted class changes is the disagreement in one bit, and is not used beside it.
* The class is the predicted one in fitting too: no labels are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from audit_plugin.checks.base import FittedScorer, InputScorer
from audit_plugin.errors import InapplicableError
from audit_plugin.model.benign_features import FEWEST_ROWS, averaged_features, fit_benign_features
from audit_plugin.model.reconstruction import DISAGREEMENT, LOG_DISTANCE, Term, append_bounded_sum, append_reconstruction
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray, ImageArray

FEWEST_IMAGES = 5 * FEWEST_ROWS
_SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True)
class BenifulScorer(InputScorer):
    """The check.

    Attributes:
        latent_size: numbers in the auto-encoder's code.
        steps: most training steps of the auto-encoder.
    """

    name: ClassVar[str] = "beniful"
    latent_size: int = 32
    steps: int = 600

    def __post_init__(self) -> None:
        if self.latent_size < 1 or self.steps < 1:
            raise ValueError(f"latent_size and steps must be at least 1, got {self.latent_size} and {self.steps}")

    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedScorer:
        """Learn the benign features at one tap and the clean statistics of both terms.

        Raises:
            InapplicableError: the network has no tap, there are fewer than 50 images, the auto-encoder would not fit into
                memory, or the graph cannot be cut at the tap.
        """
        if len(fit_split) < FEWEST_IMAGES:
            raise InapplicableError(
                f"An auto-encoder needs at least {FEWEST_IMAGES} clean images in the fit split, there are {len(fit_split)}. "
                "Give more clean images."
            )
        tap = chosen_tap(subject.summary.taps)
        windows, averaged = averaged_features(subject.session, fit_split.images, tap, self.latent_size, subject.class_count)
        fitted = fit_benign_features(
            averaged,
            subject.predict(fit_split.images),
            windows,
            subject.class_count,
            rng,
            latent_size=self.latent_size,
            steps=self.steps,
        )
        terms = append_reconstruction(subject.onnx_model, tap, fitted.module)
        session = subject.open_session(terms)
        held_out = fit_split.images[fitted.held_out]
        distance, disagreement = (_term(session.collect(held_out, name)) for name in (LOG_DISTANCE, DISAGREEMENT))
        scored = append_bounded_sum(terms, distance, disagreement, score=self.name)
        facts = {
            "tap": tap,
            "feature_shape": list(windows.shape),
            "window_size": windows.size,
            "feature_count": windows.feature_count,
            "latent_size": self.latent_size,
            "held_out_images": len(held_out),
            "held_out_error": fitted.held_out_error,
            "kept_step": fitted.kept_step,
            "held_out_disagreement": disagreement.mean,
        }
        return _FittedBeniful(subject.open_session(scored), facts)


def chosen_tap(taps: tuple[str, ...]) -> str:
    """The tap at five sixths of the depth, rounded up.

    Raises:
        InapplicableError: there is none.
    """
    if not taps:
        raise InapplicableError("The network has no intermediate block whose features could be reconstructed.")
    return taps[-(-5 * len(taps) // 6) - 1]


def _term(values: FloatArray) -> Term:
    return Term(float(values.mean()), max(float(values.std()), _SMALLEST_DEVIATION))


class _FittedBeniful(FittedScorer):
    def __init__(self, session: Session, facts: Mapping[str, Any]) -> None:
        self._session = session
        self.facts = facts

    def _score(self, images: ImageArray) -> FloatArray:
        return self._session.collect(images, BenifulScorer.name)

    def baselines(self, images: ImageArray) -> Mapping[str, FloatArray]:
        """Either term alone."""
        if len(images) == 0:
            return {name: np.zeros(0, dtype=np.float32) for name in _TERMS}
        return {name: self._session.collect(images, output) for name, output in _TERMS.items()}


_TERMS = {"reconstruction distance alone": LOG_DISTANCE, "inference consistency alone": DISAGREEMENT}
