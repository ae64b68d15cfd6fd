"""Norms of activation maps: Cheng, Xu, Liu, Chen, Zhao and Lin 2020 (arXiv 2002.12162).

A trigger makes a few channels of the last convolutional layer fire far more strongly than clean inputs do, at a few positions:
of the norms of a channel's map A_k over its positions,

* l-infinity: max |A_k|,
* l1: sum |A_k|,
* l2: sqrt(sum A_k^2),

the paper finds the first moved most, by far, and prunes the channels whose norm is large under a reverse-engineered trigger.

The paper removes channels; it scores no inputs. Our score is the squared Mahalanobis distance of an input's l-infinity norms from
their mean over clean images predicted as the same class, divided by the number of channels: about 1 for clean inputs. The same
distance of the l1 and of the l2 norms is reported as a baseline.

What the paper leaves open, and what we chose:

* Layer: the last tap with channels at more than one position, a transformer's tokens counted as positions
  (:func:`~audit_plugin.model.feature_maps.last_feature_map`).
* One covariance for all classes, shrunk as Ledoit and Wolf do, since there may be more channels than images of a class. Norms
  are divided by their deviation within the classes first, at least a tenth of the usual one: a channel that is silent on clean
  images, where a backdoor may sit, then counts when it fires, and its noise does not.
* Classes are the predicted ones, in fitting as in scoring: a misclassified clean image is compared with what it looks like.
* A class that no image of the fit split is predicted as has the mean of all images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from audit_plugin.checks.base import FittedScorer, InputScorer
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.mahalanobis import ClassGaussians, fit_class_gaussians, floored_deviation
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.export import LOGITS
from audit_plugin.model.feature_maps import FeatureMap, last_feature_map
from audit_plugin.model.reductions import L1, L2, L_INFINITY, NORMS, append_norm_score, append_norms
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import Subject
from audit_plugin.types import Distribution, FitSplit, FloatArray, ImageArray

CHANNELS_SHOWN = 3
SMALLEST_SURPLUS = 10
"""Images that the fit split must have beyond one for each predicted class: fewer say nothing about a covariance."""

MOST_CHANNELS = 8192
"""Their covariance fills 512 MiB."""

_TITLES = {L_INFINITY: "l-infinity norm", L1: "l1 norm", L2: "l2 norm"}


@dataclass(frozen=True)
class ActivationNormScorer(InputScorer):
    """The check."""

    name: ClassVar[str] = "activation_norm"

    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedScorer:
        """Find the usual norms of every class and how they vary together.

        Raises:
            InapplicableError: the network has no feature map or too wide a one, there are too few images, or the map does
                not depend on them.
        """
        if len(fit_split) <= SMALLEST_SURPLUS:  # before anything is run on them
            raise InapplicableError(_too_few(len(fit_split), 1))
        feature_map = _last_map(subject, fit_split.images[:1])
        norms = _collect(subject.open_session(append_norms(subject.onnx_model, feature_map)), fit_split.images, (*NORMS, LOGITS))
        predicted = norms[LOGITS].argmax(axis=1)
        counts = np.bincount(predicted, minlength=subject.class_count)
        if len(fit_split) - np.count_nonzero(counts) < SMALLEST_SURPLUS:
            raise InapplicableError(_too_few(len(fit_split), int(np.count_nonzero(counts))))
        try:
            gaussians = {
                norm: fit_class_gaussians(norms[norm].astype(np.float64), predicted, subject.class_count) for norm in NORMS
            }
        except ValueError as error:
            raise InapplicableError(
                f"The norms of '{feature_map.layer}' cannot be compared: {error}. Look at the images of the clean set and at the "
                "input range of the model."
            ) from error
        scores = {norm: self.name if norm == L_INFINITY else f"{norm}_score" for norm in NORMS}
        session = subject.open_session(append_norm_score(subject.onnx_model, feature_map, gaussians, scores))
        return _FittedActivationNorm(session, feature_map, gaussians, scores, norms, counts)


class _FittedActivationNorm(FittedScorer):
    def __init__(
        self,
        session: Session,
        feature_map: FeatureMap,
        gaussians: Mapping[str, ClassGaussians],
        scores: Mapping[str, str],
        norms: Mapping[str, FloatArray],
        counts: NDArray[np.int64],
    ) -> None:
        self._session = session
        self._scores = scores
        self._deviation = floored_deviation(norms[L_INFINITY].astype(np.float64))
        self.facts = {
            "layer": feature_map.layer,
            "channels": feature_map.channel_count,
            "positions": feature_map.position_count,
            "channels_silent_on_clean_images": int(np.count_nonzero(norms[L_INFINITY].max(axis=0) == 0)),
            "classes_never_predicted": [int(label) for label in np.flatnonzero(counts == 0)],
            "covariance_shrinkage": {_TITLES[norm]: gaussian.shrinkage for norm, gaussian in gaussians.items()},
        }

    def _score(self, images: ImageArray) -> FloatArray:
        return self._session.collect(images, self._scores[L_INFINITY])

    def baselines(self, images: ImageArray) -> Mapping[str, FloatArray]:
        """The same distance of the l1 and of the l2 norms."""
        if len(images) == 0:
            return {_TITLES[norm]: np.zeros(0, dtype=np.float32) for norm in (L1, L2)}
        values = _collect(self._session, images, [self._scores[norm] for norm in (L1, L2)])
        return {_TITLES[norm]: values[self._scores[norm]] for norm in (L1, L2)}

    def distributions(self, clean: ImageArray, stamped: ImageArray, suspects: ImageArray) -> tuple[Distribution, ...]:
        """All norms of the channels whose l-infinity norm jumps most: (mean stamped - mean clean) / clean deviation."""
        if len(clean) == 0 or len(stamped) == 0:
            return ()
        norms = _collect(self._session, np.concatenate([clean, stamped, suspects]), NORMS)
        parts = {norm: np.split(values, [len(clean), len(clean) + len(stamped)]) for norm, values in norms.items()}
        before, after = (part.mean(axis=0, dtype=np.float64) for part in parts[L_INFINITY][:2])
        jumping = np.argsort(-(after - before) / self._deviation, kind="stable")[:CHANNELS_SHOWN]
        return tuple(
            Distribution(f"{_TITLES[norm]}, channel {channel}", *(part[:, channel] for part in parts[norm]))
            for channel in jumping
            for norm in NORMS
        )


def _last_map(subject: Subject, image: ImageArray) -> FeatureMap:
    values = subject.session.run(to_pixels(image), subject.summary.taps)
    shapes = {layer: values[layer].shape[1:] for layer in subject.summary.taps if values[layer].shape[:1] == (1,)}
    feature_map = last_feature_map(shapes, image.shape[1:3])
    if feature_map is None:
        found = ", ".join(f"{layer} {shape}" for layer, shape in shapes.items()) or "none"
        raise InapplicableError(
            f"The norms of activation maps need a layer with channels at more than one position; the layers are: {found}."
        )
    if feature_map.channel_count > MOST_CHANNELS:
        raise InapplicableError(
            f"The last feature map, '{feature_map.layer}', has {feature_map.channel_count} channels; "
            f"the covariance of more than {MOST_CHANNELS} is not estimated."
        )
    return feature_map


def _collect(session: Session, images: ImageArray, outputs: Sequence[str]) -> dict[str, FloatArray]:
    """Small outputs for all images, of which there must be some, each (N, ...)."""
    parts = [values for _, values in session.stream(images, outputs)]
    return {name: np.concatenate([part[name] for part in parts]) for name in outputs}


def _too_few(images: int, classes: int) -> str:
    return (
        f"The fit split has {images} images, at least {classes + SMALLEST_SURPLUS} are needed to learn how norms vary "
        f"({classes} predicted classes and {SMALLEST_SURPLUS} more). Give more clean images."
    )
