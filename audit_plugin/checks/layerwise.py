"""Layer-wise feature analysis: Jebreel, Domingo-Ferrer and Li, PAKDD 2023 (their algorithm 1 and section 4).

A triggered input ends in the target class, but on the way its features resemble that class less than clean members' do. For
each class t, with L layers numbered from 1, the last of them the logits:

* a_t^l, the centroid: mean of the flattened features of clean images labelled t at layer l;
* cs_i^l = cosine(a_i^l, a_t^l), cs_t^l its mean over the class;
* the layer of interest LOI_t = argmax over l in floor(L/2)+1 .. L of (cs_t^l - cs_t^(l-1));
* s_i = cs^(LOI-2) + cs^(LOI-1) + cs^LOI; mu_t and sigma_t over the clean images of the class;
* an input predicted as t is flagged when s < mu_t - tau * sigma_t, tau = 2.5.

The score is (mu_t - s) / sigma_t, so that the paper's rule reads ``score > tau``.

What we do differently, and why:

* cs_i is taken against the centroid of the *other* images of its class. With the image inside its own centroid, as in the
  authors' code, mu is too high and sigma too small, and clean inputs are flagged more often than promised.
* No weight a layer: one notebook of the authors has one, the paper has none.
* mu, sigma and the centroids come from the fit split, the quantile threshold from the calibrate split, every figure from the test
  split; the authors' calibration images stay in their test set.
* The logits are no layer of interest, where there is another: that a triggered input has its target's logits is what the
  attack is for, and the logits of misclassified clean images widen sigma. On networks that are right on 78 % of the images
  the logits were the layer of interest of most classes, and 1 % of a BadNets backdoor's inputs were found instead of 99 %.
* When LOI = floor(L/2)+1 the paper sums a layer it does not compute; we compute one layer more (from floor(L/2)-1). Layers
  before the first are left out of the sum.
* A class with fewer than three clean images borrows LOI, mu and sigma from the other classes; one without any has a zero
  centroid, so that whatever is predicted as it looks suspicious rather than clean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from audit_plugin.checks.base import FittedScorer, InputScorer
from audit_plugin.errors import InapplicableError
from audit_plugin.maths.cosine import leave_one_out_cosine
from audit_plugin.model.export import LOGITS
from audit_plugin.model.reductions import COSINES, append_layerwise_score
from audit_plugin.model.runtime import Session
from audit_plugin.model.subject import Subject
from audit_plugin.types import FitSplit, FloatArray, ImageArray

LAYERS_SUMMED = 3
SMALLEST_CLASS = 3
CENTROID_BYTES_LIMIT = 2 * 1024**3
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class LayerwiseScorer(InputScorer):
    """The check; ``tau`` is the paper's threshold in standard deviations."""

    name: ClassVar[str] = "layerwise"
    tau: float = 2.5

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def fit(self, subject: Subject, fit_split: FitSplit, rng: np.random.Generator) -> FittedLayerwise:
        """Find centroids, layers of interest and the clean statistics of every class.

        Raises:
            InapplicableError: the network has fewer than two layers to compare, no class has three clean images, or the
                centroids would not fit into memory.
        """
        layers = (*subject.summary.taps, LOGITS)
        if len(layers) < 2:
            raise InapplicableError("The network has no intermediate block, so there are no layers to compare.")
        first = max(len(layers) // 2 - 1, 1)  # numbered from 1, as in the paper
        used = layers[first - 1 :]
        counts = np.bincount(fit_split.labels, minlength=subject.class_count)
        if counts.max() < SMALLEST_CLASS:
            raise InapplicableError(
                f"No class has {SMALLEST_CLASS} clean images in the fit split ({len(fit_split)} images, "
                f"{subject.class_count} classes). Give more clean images."
            )
        sums = _class_sums(subject.session, fit_split, used, subject.class_count)
        cosines = _own_cosines(subject.session, fit_split, used, sums)
        statistics = class_statistics(cosines, fit_split.labels, subject.class_count, len(layers), first)
        needed: NDArray[np.bool_] = np.asarray(statistics.weights.any(axis=0))
        kept = [layer for layer, is_needed in zip(used, needed, strict=True) if is_needed]
        append_to = functools.partial(
            append_layerwise_score,
            centroids={layer: sums[layer] for layer in kept},
            weights=statistics.weights[:, needed],
            mean=statistics.mean,
            deviation=statistics.deviation,
        )
        session = subject.open_session(append_to(subject.onnx_model, score=self.name))
        return FittedLayerwise(self, session, append_to, tuple(kept), used, statistics, counts)


@dataclass(frozen=True)
class ClassStatistics:
    """What the fit learned, for every class.

    Attributes:
        layer_of_interest: (classes,), index into the used layers.
        weights: (classes, used layers), 1 for the layers that are summed.
        mean, deviation: (classes,), of the sum over clean images.
        mean_cosines: (classes, used layers), cs_t^l; NaN for a class without images.
    """

    layer_of_interest: NDArray[np.int64]
    weights: FloatArray
    mean: FloatArray
    deviation: FloatArray
    mean_cosines: NDArray[np.float64]


def class_statistics(
    cosines: NDArray[np.float64], labels: NDArray[np.int64], class_count: int, layer_count: int, first: int
) -> ClassStatistics:
    """The paper's layer of interest and clean statistics from leave-one-out cosines.

    Args:
        cosines: (N, used layers), the used layers being numbers ``first`` .. ``layer_count`` of the network.
        labels: (N,).
    """
    used = cosines.shape[1]
    mean_cosines = np.full((class_count, used), np.nan)
    for label in np.unique(labels):
        mean_cosines[label] = cosines[labels == label].mean(axis=0)
    covered = np.bincount(labels, minlength=class_count) >= SMALLEST_CLASS

    lowest = max(layer_count // 2 + 1 - first, 1)  # the first candidate, as an index into the used layers
    highest = max(used - 2, lowest)  # the last one: before the logits, if there is one
    gains = np.diff(mean_cosines, axis=1)
    interest = np.zeros(class_count, dtype=np.int64)
    interest[covered] = gains[covered, lowest - 1 : highest].argmax(axis=1) + lowest
    interest[~covered] = np.bincount(interest[covered]).argmax()

    columns = np.arange(used)
    weights = (columns <= interest[:, None]) & (columns > interest[:, None] - LAYERS_SUMMED)
    sums = (cosines * weights[labels]).sum(axis=1)
    mean, deviation = np.zeros(class_count), np.zeros(class_count)
    for label in np.flatnonzero(covered):
        mean[label], deviation[label] = sums[labels == label].mean(), sums[labels == label].std()
    mean[~covered], deviation[~covered] = mean[covered].mean(), deviation[covered].mean()
    return ClassStatistics(
        interest,
        weights.astype(np.float32),
        mean.astype(np.float32),
        np.maximum(deviation, _SMALLEST_DEVIATION).astype(np.float32),
        mean_cosines,
    )


class FittedLayerwise(FittedScorer):
    """The fitted check.

    ``append_to(model, score=name)`` adds the fitted score to any export of the network with the same taps; ``deviations``,
    (classes,), are those of the sum of cosines over clean images of the class.
    """

    profile_quantity = "cosine similarity to the centroid of the predicted class"

    def __init__(
        self,
        check: LayerwiseScorer,
        session: Session,
        append_to: Callable[..., onnx.ModelProto],
        kept: tuple[str, ...],
        used: tuple[str, ...],
        statistics: ClassStatistics,
        counts: NDArray[np.int64],
    ) -> None:
        self.session = session
        self.append_to = append_to
        self.deviations = statistics.deviation
        self.profile_layers = kept
        self.own_thresholds = {f"tau = {check.tau:g}": check.tau}
        self.facts = {
            "layers_compared": list(used),
            "layer_of_interest_by_class": [used[index] for index in statistics.layer_of_interest],
            "classes_with_too_few_images": [int(label) for label in np.flatnonzero(counts < SMALLEST_CLASS)],
        }

    def _score(self, images: ImageArray) -> FloatArray:
        return self.session.collect(images, LayerwiseScorer.name)

    def profile(self, images: ImageArray) -> FloatArray:
        return self.session.collect(images, COSINES)


def _class_sums(session: Session, split: FitSplit, layers: tuple[str, ...], class_count: int) -> dict[str, FloatArray]:
    """Sum of the flattened features of each class, (classes, features) by layer; images are streamed."""
    sums: dict[str, FloatArray] = {}
    for rows, values in session.stream(split.images, layers):
        members = (split.labels[rows] == np.arange(class_count)[:, None]).astype(np.float32)
        if not sums:
            _check_memory({layer: values[layer][0].size for layer in layers}, class_count)
        for layer in layers:
            part = members @ values[layer].reshape(len(values[layer]), -1)
            sums[layer] = sums[layer] + part if layer in sums else part
    return sums


def _own_cosines(session: Session, split: FitSplit, layers: tuple[str, ...], sums: dict[str, FloatArray]) -> NDArray[np.float64]:
    """Leave-one-out cosine of every image with its class, (N, layers)."""
    cosines = np.zeros((len(split), len(layers)))
    squared = {layer: np.einsum("cd,cd->c", sums[layer], sums[layer], dtype=np.float64) for layer in layers}
    for rows, values in session.stream(split.images, layers):
        labels = split.labels[rows]
        for column, layer in enumerate(layers):
            features = values[layer].reshape(len(labels), -1)
            dots = np.einsum("nd,nd->n", features, sums[layer][labels], dtype=np.float64)
            norms = np.einsum("nd,nd->n", features, features, dtype=np.float64)
            cosines[rows, column] = leave_one_out_cosine(dots, norms, squared[layer][labels])
    return cosines


def _check_memory(feature_counts: dict[str, int], class_count: int) -> None:
    needed = sum(feature_counts.values()) * class_count * 4
    if needed > CENTROID_BYTES_LIMIT:
        raise InapplicableError(
            f"The centroids of {class_count} classes would need {needed / 1024**3:.1f} GiB, "
            f"more than the limit of {CENTROID_BYTES_LIMIT / 1024**3:.0f} GiB."
        )
