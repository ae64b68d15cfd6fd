"""Pruning by the norms of activation maps: Cheng, Xu, Liu, Chen, Zhao and Lin 2020 (arXiv 2002.12162).

A trigger makes a few channels of the last convolutional layer fire far more strongly than clean inputs do. With
n_k(x) = max |A_k|, the l-infinity norm of channel k over its positions, the paper sets to zero the channels whose norm under a
reverse-engineered trigger exceeds a threshold, and trains nothing. Its figures (GTSRB: attack success 81.6 % to 48.4 %) say what
to expect: a mitigation, not a removal.

What the paper leaves open, and what we chose:

* Layer: the one that the check ``activation_norm`` looks at (:func:`~audit_plugin.model.feature_maps.last_feature_map`).
* Order: channels are ranked by their jump, (mean n_k stamped - mean n_k clean) / deviation of n_k clean, rather than by n_k
  alone, which is large for channels that clean images need. Clean and stamped are the same images, of the classes that the
  trigger is to mislead, so that the target's own features are no jump; those of all triggers together. The deviation has a floor,
  a tenth of the usual one: a channel that is silent on clean images counts when it fires, numerical noise in it does not.
* Threshold: none. Channels are pruned in that order until the recovered triggers succeed in less than 5 % of the calibrate
  split's images (the most successful of them decides), while accuracy there stays within a budget of the original's, and
  while the jump is positive. A channel that breaks the budget ends it; later ones are not tried.

No test image and no true trigger takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from audit_plugin.errors import InapplicableError
from audit_plugin.maths.mahalanobis import floored_deviation
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import is_within
from audit_plugin.model.channel_mask import MASKED_LOGITS, append_masked_logits, with_channel_mask
from audit_plugin.model.feature_maps import FeatureMap, last_feature_map
from audit_plugin.model.reductions import L_INFINITY, append_norms
from audit_plugin.model.subject import Subject
from audit_plugin.repair.base import Repair, RepairedModel
from audit_plugin.types import CalibrateSplit, FitSplit, FloatArray, ImageArray, LabelArray, LabelledImages, Splits, Trigger

LOW_SUCCESS = 0.05
"""Attack success of the recovered triggers below which nothing more is pruned."""

_MASKS_PER_PASS = 16

MITIGATED = "the recovered triggers succeed in less than 5 %"
OUT_OF_BUDGET = "the next channel would break the accuracy budget"
NO_MORE_CHANNELS = "no other channel's norm rises under the recovered triggers"


@dataclass(frozen=True)
class NormPruning(Repair):
    """The repair.

    Attributes:
        accuracy_budget: share of the calibrate split's images that may be lost, in [0, 1).
    """

    name: ClassVar[str] = "prune"

    accuracy_budget: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 <= self.accuracy_budget < 1.0:
            raise ValueError(f"accuracy_budget must lie in [0, 1), got {self.accuracy_budget}")

    def repair(self, subject: Subject, splits: Splits, triggers: Sequence[Trigger], rng: np.random.Generator) -> RepairedModel:
        """Set channels of the last feature map to zero. Uses no randomness.

        Raises:
            InapplicableError: the network has no feature map, no channel's norm rises, the first one that does breaks the
                budget, the triggers already fail, or the splits hold no image of a class that they are to mislead.
            ValueError: no trigger, or triggers of several classes.
        """
        _check_triggers(triggers)
        feature_map = _last_map(subject, splits.fit)
        trial = _Trial.of(splits.calibrate, triggers)
        before = trial.figures(subject.predict(trial.images))
        if before.success < LOW_SUCCESS:
            raise InapplicableError(
                f"The recovered triggers succeed in only {before.success:.1%} of the calibrate split's images, so pruning has "
                "nothing to go by. Recover triggers with a larger budget."
            )
        order = _rising_channels(subject, feature_map, splits.fit, triggers)
        pruned, stopped_by = self._choose(subject, feature_map, order, trial, before)
        network = with_channel_mask(subject.network, feature_map.layer, _mask(feature_map, pruned))
        repaired = subject.with_network(network)
        after = trial.figures(repaired.predict(trial.images))
        return RepairedModel(
            repaired,
            {
                "layer": feature_map.layer,
                "channels": feature_map.channel_count,
                "rising_channels": len(order),
                "pruned_channels": [int(channel) for channel in pruned],
                "calibrate_accuracy_before": before.accuracy,
                "calibrate_accuracy_after": after.accuracy,
                "recovered_trigger_success_before": before.success,
                "recovered_trigger_success_after": after.success,
                "accuracy_budget": self.accuracy_budget,
                "stopped_by": stopped_by,
            },
        )

    def _choose(
        self, subject: Subject, feature_map: FeatureMap, order: NDArray[np.int64], trial: _Trial, before: _Figures
    ) -> tuple[NDArray[np.int64], str]:
        """The channels to prune, a beginning of ``order``, and what ended it."""
        for count, predicted in enumerate(_predictions(subject, feature_map, order, trial.images), start=1):
            figures = trial.figures(predicted)
            if not is_within(before.accuracy, figures.accuracy, self.accuracy_budget):
                if count == 1:
                    raise InapplicableError(
                        f"Nothing can be pruned: without channel {order[0]} of '{feature_map.layer}', whose norm rises most "
                        f"under the recovered triggers, accuracy on the calibrate split falls from {before.accuracy:.1%} to "
                        f"{figures.accuracy:.1%}, more than the budget of {self.accuracy_budget:.1%}. Use another repair."
                    )
                return order[: count - 1], OUT_OF_BUDGET
            if figures.success < LOW_SUCCESS:
                return order[:count], MITIGATED
        return order, NO_MORE_CHANNELS


@dataclass(frozen=True)
class _Figures:
    """On the calibrate split; ``success`` is that of the trigger that succeeds most."""

    accuracy: float
    success: float


@dataclass(frozen=True)
class _Trial:
    """The calibrate split, and behind it the images that each trigger is to mislead, stamped."""

    images: ImageArray
    labels: LabelArray
    stamped_counts: tuple[int, ...]
    target_class: int

    @classmethod
    def of(cls, calibrate: CalibrateSplit, triggers: Sequence[Trigger]) -> _Trial:
        stamped = [trigger.stamp(_misled(calibrate, trigger)) for trigger in triggers]
        counts = tuple(len(images) for images in stamped)
        return cls(np.concatenate([calibrate.images, *stamped]), calibrate.labels, counts, triggers[0].target_class)

    def figures(self, predicted: LabelArray) -> _Figures:
        """``predicted`` (N,), one for each of the images."""
        clean, stamped = np.split(predicted, [len(self.labels)])
        parts = np.split(stamped, np.cumsum(self.stamped_counts)[:-1])
        success = max(float(np.mean(part == self.target_class)) for part in parts)
        return _Figures(float(np.mean(clean == self.labels)), success)


def _misled(images: LabelledImages, trigger: Trigger) -> ImageArray:
    """The images of the classes that a trigger is to mislead."""
    rows = images.labels != trigger.target_class
    if trigger.source_class is not None:
        rows &= images.labels == trigger.source_class
    if not rows.any():
        raise InapplicableError(
            f"The {type(images).__name__} has no image that a trigger for class {trigger.target_class} is to mislead. "
            "Give more clean images."
        )
    misled: ImageArray = images.images[rows]
    return misled


def _last_map(subject: Subject, fit_split: FitSplit) -> FeatureMap:
    values = subject.session.run(to_pixels(fit_split.images[:1]), subject.summary.taps) if len(fit_split) else {}
    shapes = {layer: value.shape[1:] for layer, value in values.items() if value.shape[:1] == (1,)}
    feature_map = last_feature_map(shapes, fit_split.images.shape[1:3])
    if feature_map is None:
        found = ", ".join(f"{layer} {shape}" for layer, shape in shapes.items()) or "none"
        raise InapplicableError(
            f"Pruning by norms needs images to fit and a layer with channels at more than one position; the layers are: {found}."
        )
    return feature_map


def _rising_channels(
    subject: Subject, feature_map: FeatureMap, fit_split: FitSplit, triggers: Sequence[Trigger]
) -> NDArray[np.int64]:
    """Channels whose l-infinity norm rises under the triggers, the one that jumps most first."""
    session = subject.open_session(append_norms(subject.onnx_model, feature_map))

    def norms(images: ImageArray) -> FloatArray:
        return session.collect(images, L_INFINITY)

    misled = [_misled(fit_split, trigger) for trigger in triggers]
    clean = np.concatenate([norms(images) for images in misled]).astype(np.float64)
    stamped = np.concatenate([norms(trigger.stamp(images)) for trigger, images in zip(triggers, misled, strict=True)])
    deviation = floored_deviation(clean)
    if not deviation.max() > 0:  # nothing to measure a rise in, so they are compared as they are
        deviation = np.ones_like(deviation)
    rise = stamped.mean(axis=0, dtype=np.float64) - clean.mean(axis=0)
    if not (rise > 0).any():
        raise InapplicableError(
            f"Nothing can be pruned: no channel of '{feature_map.layer}' has a larger norm under the recovered triggers. "
            "Use another repair."
        )
    order = np.argsort(-rise / deviation, kind="stable")
    rising: NDArray[np.int64] = order[rise[order] > 0]
    return rising


def _predictions(subject: Subject, feature_map: FeatureMap, order: NDArray[np.int64], images: ImageArray) -> Iterator[LabelArray]:
    """Predicted classes of ``images`` without the first channel of ``order``, without the first two, and so on."""
    for start in range(0, len(order), _MASKS_PER_PASS):
        counts = range(start + 1, min(start + _MASKS_PER_PASS, len(order)) + 1)
        masks = [_mask(feature_map, order[:count]) for count in counts]
        session = subject.open_session(append_masked_logits(subject.onnx_model, feature_map.layer, masks))
        logits = session.collect(images, MASKED_LOGITS).reshape(len(images), len(masks), -1)
        yield from logits.argmax(axis=2).T


def _mask(feature_map: FeatureMap, pruned: NDArray[np.int64]) -> NDArray[np.bool_]:
    kept = np.ones(feature_map.channel_count, dtype=np.bool_)
    kept[pruned] = False
    return kept if feature_map.channels_last else kept.reshape(-1, *[1] * (len(feature_map.shape) - 1))


def _check_triggers(triggers: Sequence[Trigger]) -> None:
    targets = {trigger.target_class for trigger in triggers}
    if len(targets) != 1:
        raise ValueError(f"expected recovered triggers of one class, got {len(triggers)} of the classes {sorted(targets)}")
