"""The guard as one function: the firewall of Jebreel et al. 2023, calibrated and measured, as one deployable ONNX model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from audit_plugin.audit import checks_of, search_classes
from audit_plugin.checks import LayerwiseScorer
from audit_plugin.checks.layerwise import FittedLayerwise
from audit_plugin.checks.measurement import victims
from audit_plugin.errors import CleanSetError, ExportError, InapplicableError, UsageError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import quantile_threshold, rate_of
from audit_plugin.model.guarded import IS_SUSPICIOUS, SUSPICION, grey_input, guarded_model, to_model_input
from audit_plugin.model.load import runner
from audit_plugin.model.runtime import Session, serialised
from audit_plugin.model.subject import PARITY_TOLERANCE, Subject
from audit_plugin.policy import Policy
from audit_plugin.preparation import prepare
from audit_plugin.progress import NoProgress, Progress
from audit_plugin.types import (
    FloatArray,
    GuardReport,
    ImageArray,
    Inapplicable,
    Measured,
    ModelRef,
    Rate,
    Splits,
    Threshold,
    TriggerEvidence,
    trigger_search,
)

_PARITY_IMAGES = 16
_SUSPICION_TOLERANCE = 0.05  # standard deviations of a class: float32 cosines carry about 1e-6, deviations are 1e-4 and more
_SMALLEST_DEVIATION = 1e-5  # of a sum of three float32 cosines, below which it is rounding
_SMALLEST_SPREAD = 1e-3  # of scores in standard deviations, about 1 where the score means anything
_BATCH = 128
_NO_SEARCH = "no trigger was searched for"


@dataclass(frozen=True)
class Guard:
    """A guarded model and what it does.

    Attributes:
        report: what was measured.
        model: see :func:`audit_plugin.model.guarded.guarded_model`; its metadata name the guarded model's digest.
        example: a batch as the model takes it, uniformly grey: no image of the clean set leaves with the guard.
    """

    report: GuardReport
    model: onnx.ModelProto
    example: FloatArray


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
    """Fit the layer-wise check, choose its threshold, put both into the model's own graph, and measure the result.

    Args:
        model, folder, clean, policy, seed, allow_pickle, require_gpu, progress: as for :func:`audit_plugin.audit.audit`.
        false_positive_rate: share of clean inputs that may be called suspicious, in (0, 1).
        search: recover triggers, so that a detection rate can be measured; takes minutes.

    Raises:
        UsageError: the false-positive rate is out of range.
        InapplicableError: the model has too few layers to compare, or its clean images all score alike.
        CleanSetError: too few clean images for that rate, or the model does not know them.
        IntakeError, SubjectError, ExportError: the model cannot be used, or what was made of it answers otherwise.
    """
    if not 0.0 < false_positive_rate < 1.0:
        raise UsageError(
            f"The false-positive rate must lie between 0 and 1, got {false_positive_rate:g}; 0.01 is one in a hundred."
        )
    policy, progress = policy or Policy(), progress or NoProgress()
    progress.stage("Preparing the model")
    prepared = prepare(model, folder, clean, policy, seed=seed, allow_pickle=allow_pickle, require_gpu=require_gpu)
    subject, splits = prepared.subject, prepared.splits
    accuracy = _check_accuracy(subject, splits, policy)

    progress.stage("Fitting the guard")
    fitted = _fit(subject, splits, policy, seed)
    calibrated = fitted.score(splits.calibrate.images)
    cut = _threshold(calibrated, false_positive_rate, policy)
    _check_spread(fitted, calibrated)

    progress.stage("Putting it into the model")
    guarded = guarded_model(subject.network, fitted.append_to, cut)
    running = _Running(guarded, subject)
    running.check(fitted, splits.test.images[:_PARITY_IMAGES], cut)

    progress.stage("Searching for triggers")
    trigger, missing = _most_suspicious(subject, splits, policy, seed, progress) if search else (None, _NO_SEARCH)

    progress.stage("Measuring the guard")
    detected = None if trigger is None else rate_of(running.flags(_obeying(trigger, subject, splits)))
    if detected is not None and detected.trials == 0:
        detected, missing = None, "the recovered trigger moves no held-out image"
    threshold = Threshold(f"quantile at FPR {false_positive_rate:.1%}", cut, rate_of(running.flags(splits.test.images)), detected)
    report = GuardReport(model, subject.summary, threshold, false_positive_rate, len(calibrated), accuracy, trigger, missing)
    _describe(guarded, report)
    return Guard(report, guarded, grey_input(subject.summary.input_spec, subject.network.batch_size))


def _check_accuracy(subject: Subject, splits: Splits, policy: Policy) -> Rate:
    """Accuracy on the test split, which must be what an audit asks for: a model that is fed the wrong way cannot be guarded."""
    wanted = policy.clean_set.minimum_clean_accuracy
    if policy.model.clean_accuracy is not None:
        wanted = max(wanted, policy.model.clean_accuracy - policy.clean_set.accuracy_tolerance)
    accuracy = rate_of(subject.predict(splits.test.images) == splits.test.labels)
    if accuracy.value < wanted:
        raise CleanSetError(
            f"The model is right on {accuracy.value:.0%} of {accuracy.trials} clean test images, at least {wanted:.0%} are "
            "expected. Set [model] mean, std, low, high or classes in the policy to what it was trained with."
        )
    return accuracy


def _fit(subject: Subject, splits: Splits, policy: Policy, seed: int) -> FittedLayerwise:
    try:
        return LayerwiseScorer(policy.layerwise.tau).fit(subject, splits.fit, np.random.default_rng(seed))
    except InapplicableError as error:
        raise InapplicableError(f"This model cannot be guarded. {error}") from error


def _threshold(calibrated: FloatArray, false_positive_rate: float, policy: Policy) -> float:
    try:
        return quantile_threshold(calibrated, false_positive_rate)
    except ValueError as error:
        share = policy.clean_set.calibrate_fraction
        needed = math.ceil((math.ceil(1.0 / false_positive_rate) - 1) / share)
        raise CleanSetError(
            f"{error}, that is about {needed} clean images in all, of which {share:.0%} calibrate. "
            "Give more clean images, or a larger --fpr."
        ) from error


def _check_spread(fitted: FittedLayerwise, calibrated: FloatArray) -> None:
    """A score that is the same for all clean images has no threshold that means anything."""
    deviation, spread = float(np.median(fitted.deviations)), float(np.ptp(calibrated))
    if deviation <= _SMALLEST_DEVIATION or spread <= _SMALLEST_SPREAD:
        raise InapplicableError(
            "This model cannot be guarded. Its clean images hardly differ in how much they resemble their class, layer by layer "
            f"(standard deviation {deviation:.1e}, scores within {spread:.1e}), so the score is rounding noise."
        )


class _Running:
    """The guarded model as its deployer runs it: on the model's own input."""

    def __init__(self, guarded: onnx.ModelProto, subject: Subject) -> None:
        self._subject, network = subject, subject.network
        self._session = Session(serialised(guarded), batch_size=network.batch_size, require_gpu=subject.require_gpu)

    def flags(self, images: ImageArray) -> NDArray[np.bool_]:
        """Whether each image is suspicious, (N,)."""
        parts = [values[IS_SUSPICIOUS] for values in self._stream(images)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)

    def check(self, fitted: FittedLayerwise, images: ImageArray, threshold: float) -> None:
        """Compare answers with the network's, suspicion with the check's, decisions with the threshold.

        Raises:
            ExportError: they differ.
        """
        answer = runner(self._subject.network.program)
        size = self._subject.network.batch_size or len(images)
        images = np.resize(images, (size, *images.shape[1:]))  # as often as a fixed batch size takes
        (values,) = self._stream(images, batch=size)
        answers, suspicion, flags = values.values()
        expected = np.asarray(answer(self._inputs(images)), dtype=np.float32)
        difference = float(np.abs(answers - expected).max() / max(float(np.abs(expected).max()), 1e-6))
        if not difference <= PARITY_TOLERANCE:
            raise ExportError(
                f"The guarded model answers otherwise than the model: the relative difference is {difference:.1e}, at most "
                f"{PARITY_TOLERANCE:.0e} is accepted. No guard was made."
            )
        scores = fitted.score(images)
        if not np.allclose(suspicion, scores, rtol=PARITY_TOLERANCE, atol=_SUSPICION_TOLERANCE):
            raise ExportError(
                f"The guarded model's {SUSPICION} differs from the check's by {float(np.abs(suspicion - scores).max()):.1e} "
                f"standard deviations, at most {_SUSPICION_TOLERANCE} are accepted. No guard was made."
            )
        if not np.array_equal(flags, suspicion > np.float32(threshold)):
            raise ExportError(f"The guarded model's {IS_SUSPICIOUS} does not follow from its {SUSPICION}. No guard was made.")

    def _inputs(self, images: ImageArray) -> FloatArray:
        return to_model_input(to_pixels(images), self._subject.summary.input_spec)

    def _stream(self, images: ImageArray, batch: int = _BATCH) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(images), batch):
            yield self._session.run(self._inputs(images[start : start + batch]))


def _most_suspicious(
    subject: Subject, splits: Splits, policy: Policy, seed: int, progress: Progress
) -> tuple[TriggerEvidence | None, str]:
    """The recovered class trigger that an audit with this seed would look at; else why there is none."""
    measures, waves, probe, _, _ = checks_of(policy, subject.class_count, progress.advance)
    outcomes = search_classes(measures, waves, probe, subject, splits, np.random.default_rng(seed), policy)
    search, outcome = trigger_search(outcomes), outcomes[-1]
    if search is not None:
        return search.most_suspicious, ""
    if isinstance(outcome, Measured):
        return None, "the search recovered no trigger"
    return None, outcome.reason if isinstance(outcome, Inapplicable) else f"the search failed: {outcome.error}"


def _obeying(found: TriggerEvidence, subject: Subject, splits: Splits) -> ImageArray:
    """Test images that the trigger sends to its class, stamped."""
    trigger, test = found.trigger, splits.test
    stamped = trigger.stamp(test.images[victims(trigger, test.labels, subject.predict(test.images))])
    obeying: ImageArray = stamped[subject.predict(stamped) == trigger.target_class]
    return obeying


def _describe(guarded: onnx.ModelProto, report: GuardReport) -> None:
    """What the file itself says of its origin, wherever it is copied to."""
    facts = {
        "audit.guard_of_digest": report.model.digest,
        "audit.guard_threshold": f"{report.threshold.value:.6g}",
        "audit.guard_wanted_false_positive_rate": f"{report.wanted_false_positive_rate:g}",
    }
    kept = [entry for entry in guarded.metadata_props if entry.key not in facts]
    del guarded.metadata_props[:]
    guarded.metadata_props.extend(kept)
    for key, value in facts.items():
        guarded.metadata_props.add(key=key, value=value)
