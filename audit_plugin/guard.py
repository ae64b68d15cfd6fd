"""The guard as one function: the firewall of Jebreel et al. 2023, calibrated and measured, as one deployable ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from audit_plugin.audit import NoProgress, Progress, checks_of
from audit_plugin.checks import LayerwiseScorer
from audit_plugin.checks.measurement import measure_probe, victims
from audit_plugin.errors import CleanSetError, ExportError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import quantile_threshold, rate_of
from audit_plugin.model.guarded import IS_SUSPICIOUS, SUSPICION, guarded_model, to_model_input
from audit_plugin.model.subject import PARITY_TOLERANCE, Subject
from audit_plugin.policy import Policy
from audit_plugin.preparation import prepare
from audit_plugin.types import FloatArray, ImageArray, ModelRef, Rate, Splits

_PARITY_IMAGES = 16


@dataclass(frozen=True)
class Guard:
    """A guarded model and what it does on images that chose nothing.

    Attributes:
        model: from ``input`` to the model's own answer, ``suspicion`` and ``is_suspicious``.
        guarded: the model that it was made from.
        threshold: on ``suspicion``, chosen on the calibrate split for ``wanted_false_positive_rate``.
        false_positive_rate: on all clean images of the test split.
        detection_rate: on test images stamped with the most suspicious recovered trigger; None when none was searched for.
        example: one batch as the model takes it, float32.
    """

    model: onnx.ModelProto
    guarded: ModelRef
    threshold: float
    wanted_false_positive_rate: float
    false_positive_rate: Rate
    detection_rate: Rate | None
    example: FloatArray

    def document(self) -> dict[str, object]:
        """The figures as JSON values."""
        rates: Mapping[str, Rate | None] = {
            "false_positive_rate": self.false_positive_rate,
            "detection_rate": self.detection_rate,
        }
        return {
            "guard_of": self.guarded.pinned_uri,
            "guard_of_digest": self.guarded.digest,
            "threshold": self.threshold,
            "wanted_false_positive_rate": self.wanted_false_positive_rate,
            **{
                name: rate and {"value": rate.value, "low": rate.low, "high": rate.high, "trials": rate.trials}
                for name, rate in rates.items()
            },
        }


def build_guard(
    model: ModelRef,
    folder: Path,
    clean: Path,
    *,
    false_positive_rate: float = 0.01,
    search: bool = True,
    policy: Policy | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    progress: Progress | None = None,
) -> Guard:
    """Fit the layer-wise check, choose its threshold, put both into the model's graph, and measure the result.

    Args:
        model, folder, clean, policy, seed, allow_pickle, require_gpu, progress: as for :func:`audit_plugin.audit.audit`.
        false_positive_rate: share of clean inputs that may be called suspicious, in (0, 1).
        search: recover triggers, so that a detection rate can be measured; takes minutes.

    Raises:
        InapplicableError: the model has too few layers to compare, or gives no gradients for the search.
        CleanSetError: too few clean images for that rate, or the model does not know them.
        IntakeError, SubjectError, ExportError: the model cannot be used.
    """
    policy, progress = policy or Policy(), progress or NoProgress()
    prepared = prepare(model, folder, clean, policy, seed=seed, allow_pickle=allow_pickle, require_gpu=require_gpu)
    subject, splits = prepared.subject, prepared.splits
    _check_accuracy(subject, splits, policy)

    progress.stage("Fitting the guard")
    fitted = LayerwiseScorer(policy.layerwise.tau).fit(subject, splits.fit, np.random.default_rng(seed))
    try:
        threshold = quantile_threshold(fitted.score(splits.calibrate.images), false_positive_rate)
    except ValueError as error:
        raise CleanSetError(
            f"The guard's threshold cannot be set: {error}. Give more clean images, or a larger --fpr."
        ) from error
    guarded = guarded_model(subject.network, fitted.append_to, threshold)
    spec = subject.summary.input_spec
    size = subject.network.batch_size or _PARITY_IMAGES
    few = np.resize(splits.test.images, (size, *splits.test.images.shape[1:]))
    example = to_model_input(to_pixels(few), spec)
    _check_same(guarded, example, subject.logits(few), fitted.score(few), subject.network.gives_probabilities)

    detected = None
    if search:
        progress.stage("Searching for triggers")
        stamped = _stamped(subject, splits, policy, seed, progress)
        detected = rate_of(fitted.score(stamped) > threshold)
    progress.stage("Measuring the guard")
    flagged = rate_of(fitted.score(splits.test.images) > threshold)
    return Guard(guarded, model, threshold, false_positive_rate, flagged, detected, example)


def _check_accuracy(subject: Subject, splits: Splits, policy: Policy) -> None:
    accuracy = float((subject.predict(splits.test.images) == splits.test.labels).mean())
    if accuracy < policy.clean_set.minimum_clean_accuracy:
        raise CleanSetError(
            f"The model is right on {accuracy:.0%} of the clean images, "
            f"at least {policy.clean_set.minimum_clean_accuracy:.0%} are expected. "
            "Set [model] mean, std, low, high or classes in the policy to what it was trained with."
        )


def _stamped(subject: Subject, splits: Splits, policy: Policy, seed: int, progress: Progress) -> ImageArray:
    """Test images that the most suspicious recovered trigger sends to its class."""
    probe, _, _ = checks_of(policy, subject.class_count, progress.advance)
    trigger = measure_probe(probe, subject, splits, np.random.default_rng(seed)).most_suspicious.trigger
    moved = victims(trigger, splits.test.labels, subject.predict(splits.test.images))
    stamped = trigger.stamp(splits.test.images[moved])
    obeying: ImageArray = stamped[subject.predict(stamped) == trigger.target_class]
    return obeying


def _check_same(guarded: onnx.ModelProto, example: FloatArray, logits: FloatArray, scores: FloatArray, exponential: bool) -> None:
    """Run the file as a deployer would and compare it with what was measured.

    Raises:
        ExportError: they differ.
    """
    session = onnxruntime.InferenceSession(guarded.SerializeToString(), providers=["CPUExecutionProvider"])
    answer, suspicion, _ = session.run(None, {session.get_inputs()[0].name: example})
    expected = np.exp(logits) if exponential else logits
    for name, found, wanted in (("answer", answer, expected), (SUSPICION, suspicion, scores)):
        difference = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))
        if not difference <= PARITY_TOLERANCE:
            raise ExportError(
                f"The guarded model's {name} differs from the audited model's by {difference:.1e} of its largest value, at most "
                f"{PARITY_TOLERANCE:.0e} is accepted; no guard was made. Outputs: {answer.shape}, {IS_SUSPICIOUS}."
            )
