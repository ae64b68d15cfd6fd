"""Running a check and measuring what it claims on images it never saw. Nobody reports their own success here."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from audit_plugin.checks.base import ClassMeasure, FittedScorer, InputScorer, Probe
from audit_plugin.checks.maximum_margin import MaximumMargin
from audit_plugin.checks.neuron_noise import NeuronNoise
from audit_plugin.checks.wave_scan import WaveScan, sure_margin
from audit_plugin.errors import AuditError, InapplicableError
from audit_plugin.maths.outlier import WAVE_RESPONSE, class_outliers, others_ratios, pair_outliers, size_ratios
from audit_plugin.maths.rates import auroc, quantile_threshold, rate_of
from audit_plugin.model.subject import Subject
from audit_plugin.types import (
    Baseline,
    ClassMeasurement,
    Failed,
    FitSplit,
    FloatArray,
    ImageArray,
    Inapplicable,
    InputScores,
    LabelArray,
    LabelledImages,
    Measured,
    Measurement,
    Outcome,
    Profile,
    Rate,
    Splits,
    Threshold,
    Trigger,
    TriggerEvidence,
    TriggerSearch,
)

log = logging.getLogger(__name__)

SMALLEST_SUCCESS = 0.5
"""A candidate that moves fewer held-out images than this is no trigger: its size is not compared with the others'."""

_LEAST_MARGIN = 1e-6  # of a model that answers alike for all classes
_WAVES_KEPT = 100

BREAKAGES = (AuditError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, MemoryError)
"""What measuring a hostile or odd model may raise."""


def run_check(name: str, measure: Callable[[], Measurement]) -> Outcome:
    """Every check ends as exactly one outcome, whatever it raises."""
    started = time.perf_counter()
    try:
        measurement = measure()
    except InapplicableError as error:
        return Inapplicable(name, str(error))
    except BREAKAGES as error:
        log.debug("The check %s failed.", name, exc_info=True)
        return Failed(name, f"{type(error).__name__}: {error}")
    return Measured(name, measurement, time.perf_counter() - started)


def measure_probe(
    probe: Probe,
    subject: Subject,
    splits: Splits,
    rng: np.random.Generator,
    *,
    searches: int = 1,
    doubtful: tuple[float, float] = (0.0, math.inf),
    measured: Mapping[str, ClassMeasurement] = MappingProxyType({}),
) -> TriggerSearch:
    """Search on the fit split, compare the candidates on the calibrate split, report their success rates on the test split.

    Only images count whose label and prediction are another class than the target.

    A search ends in a local minimum. A trigger that was planted is found every time; a lucky one of a clean class is not.
    So a search is repeated, up to ``searches`` in all, while its greatest outlier lies within ``doubtful``, and sizes are
    averaged (geometric mean).

    With what else was ``measured`` of classes, by check, a class stands out by that as well.
    """
    calibrate, test = (_Held(part, subject.predict(part.images)) for part in (splits.calibrate, splits.test))
    runs: list[list[_Candidate]] = []
    while True:
        found = probe.search(subject, splits.fit, rng)
        runs.append([_Candidate(trigger, calibrate.success(trigger, subject)) for trigger in found])
        candidates = _compare(runs, measured)
        greatest = max((candidate.outlier for candidate in candidates), default=0.0)
        if len(runs) >= searches or not doubtful[0] <= greatest <= doubtful[1]:
            break
        log.info("The greatest outlier is %.1f: searching again to make sure.", greatest)
    skipped = tuple(label for label in range(subject.class_count) if label not in _searched(candidates))
    candidates = [replace(candidate, success=test.success(candidate.trigger, subject)) for candidate in candidates]
    return TriggerSearch(tuple(candidates), int(getattr(probe, "steps", 0)), len(runs), skipped)


def _searched(candidates: Sequence[TriggerEvidence]) -> set[int]:
    """The classes with a candidate; of pairs, the sources for which at least every second candidate works."""
    works: dict[int, list[bool]] = {}
    for found in candidates:
        if (source := found.trigger.source_class) is not None:
            works.setdefault(source, []).append(found.is_compared)
    if not works:
        return {found.trigger.target_class for found in candidates}
    return {source for source, of_source in works.items() if 2 * sum(of_source) >= len(of_source)}


@dataclass(frozen=True)
class _Held:
    """Images that the search never saw, with the model's answers."""

    images: LabelledImages
    predictions: LabelArray

    def success(self, trigger: Trigger, subject: Subject) -> Rate:
        """Attack success rate of a trigger on the images that it should move."""
        stamped = trigger.stamp(self.images.images[victims(trigger, self.images.labels, self.predictions)])
        return rate_of(subject.predict(stamped) == trigger.target_class)


@dataclass(frozen=True)
class _Candidate:
    """A trigger of one search with its attack success rate on held-out images."""

    trigger: Trigger
    success: Rate

    @property
    def log_size(self) -> float:
        return math.log(self.trigger.size) if self.success.value >= SMALLEST_SUCCESS else math.inf


def _compare(runs: Sequence[Sequence[_Candidate]], measured: Mapping[str, ClassMeasurement]) -> list[TriggerEvidence]:
    """The smallest candidate of each class over all searches, and how far its mean size lies from its family's others."""
    evidence: list[TriggerEvidence] = []
    places = list(zip(*runs, strict=True))
    for family in dict.fromkeys(place[0].trigger.family for place in places):
        members = [place for place in places if place[0].trigger.family == family]
        triggers = [place[0].trigger for place in members]
        sizes = np.exp([_mean_log_size(place) for place in members])
        if triggers[0].source_class is None:
            targets = [trigger.target_class for trigger in triggers]
            margins, noise = (
                np.array(measured[name].ratios)[targets] if name in measured else None
                for name in (MaximumMargin.name, NeuronNoise.name)
            )
            tried = np.array([max(found.trigger.size for found in place) for place in members])
            outliers, ratios = class_outliers(sizes, margins, noise, tried), size_ratios(sizes, tried)
        else:
            outliers, ratios = _pair_outliers(triggers, sizes), np.full(len(sizes), math.nan)
        for place, outlier, ratio in zip(members, outliers, ratios, strict=True):
            smallest = min(place, key=lambda found: found.log_size)
            evidence.append(TriggerEvidence(smallest.trigger, smallest.success, float(outlier), float(ratio)))
    return evidence


def _mean_log_size(place: Sequence[_Candidate]) -> float:
    """Over the searches whose trigger held: one that failed must not erase what another found."""
    held = [found.log_size for found in place if math.isfinite(found.log_size)]
    return float(np.mean(held)) if held else math.inf


def _pair_outliers(triggers: Sequence[Trigger], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    pairs = [(trigger.source_class, trigger.target_class) for trigger in triggers if trigger.source_class is not None]
    count = max(max(pair) for pair in pairs) + 1
    matrix = np.full((count, count), np.nan)
    rows, columns = zip(*pairs, strict=True)
    matrix[rows, columns] = sizes
    outliers: NDArray[np.float64] = pair_outliers(matrix)[rows, columns]
    return outliers


def measure_classes(
    measure: ClassMeasure, subject: Subject, fit_split: FitSplit, count: int, rng: np.random.Generator
) -> ClassMeasurement:
    """What a measure finds for each of the first ``count`` classes, and each over the largest of the others.

    Raises:
        RuntimeError: the measure broke its contract (wrong shape, NaN).
    """
    found = np.asarray(measure.measure(subject, fit_split, range(count), rng), dtype=np.float64)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise RuntimeError(f"{type(measure).__name__} returned no finite number for each of {count} classes")
    return ClassMeasurement(tuple(found.tolist()), tuple(others_ratios(found).tolist()))


def measure_waves(scan: WaveScan, subject: Subject, splits: Splits, rng: np.random.Generator) -> TriggerSearch:
    """Scan on the fit split, measure each class's response on the calibrate split, report success rates on the test split.

    A class stands out by its response over :data:`audit_plugin.maths.outlier.WAVE_RESPONSE`, whatever the others do: a second
    class that obeys a wave must not hide the first. Of very many classes only those that stand out most are kept.

    Raises:
        InapplicableError: see :meth:`WaveScan.search`; the calibrate split must have as many images of other classes.
    """
    triggers = scan.search(subject, splits.fit, rng)
    calibrate, test = splits.calibrate, splits.test
    ordered = np.sort(logits := subject.logits(calibrate.images), axis=1)
    usual = max(float(np.median(ordered[:, -1] - ordered[:, -2])), _LEAST_MARGIN)
    answers, test_answers = logits.argmax(axis=1), subject.predict(test.images)
    responses, successes = np.zeros(len(triggers)), [rate_of(np.zeros(0, dtype=np.bool_))] * len(triggers)
    same_wave: dict[bytes, list[int]] = {}
    for place, trigger in enumerate(triggers):
        same_wave.setdefault(trigger.pattern.tobytes(), []).append(place)
    for places in same_wave.values():
        wave = triggers[places[0]]
        calibrated, moved = subject.logits(wave.stamp(calibrate.images)), subject.predict(wave.stamp(test.images))
        for place in places:
            target = triggers[place].target_class
            responses[place] = sure_margin(calibrated, target, calibrate.labels, answers) / usual
            successes[place] = rate_of(moved[victims(triggers[place], test.labels, test_answers)] == target)
    outliers = responses / WAVE_RESPONSE
    kept = np.sort(np.argsort(-outliers, kind="stable")[:_WAVES_KEPT])
    return TriggerSearch(
        tuple(TriggerEvidence(triggers[place], successes[place], float(outliers[place])) for place in kept), steps=0
    )


def measure_scorer(
    scorer: InputScorer,
    subject: Subject,
    splits: Splits,
    rng: np.random.Generator,
    *,
    stamped: ImageArray,
    stamped_class: int | None,
    false_positive_rate: float,
    suspects: ImageArray | None = None,
) -> tuple[InputScores, FittedScorer]:
    """Fit on the fit split, choose the quantile threshold on the calibrate split, report on the test split.

    Args:
        stamped: held-out images that carry the most suspicious recovered trigger and are predicted as ``stamped_class``, uint8
            (M, height, width, channels); empty without one.
        false_positive_rate: of the quantile threshold.
        suspects: the user's suspect inputs, for the histograms only.

    Returns:
        The measurement, and the fitted scorer for use on suspect inputs.

    Raises:
        InapplicableError: there is no threshold: the scorer has none of its own, and there are too few images to calibrate one.
    """
    fitted = scorer.fit(subject, splits.fit, rng)
    test = splits.test.images
    clean, attacked = fitted.score(test), fitted.score(stamped)
    facts = dict(fitted.facts)
    thresholds = [_threshold(rule, cut, clean, attacked) for rule, cut in fitted.own_thresholds.items()]
    try:
        calibrated = fitted.score(splits.calibrate.images)
        thresholds.append(_quantile(calibrated, clean, attacked, false_positive_rate))
    except ValueError as error:
        if not thresholds:
            raise InapplicableError(f"Nothing says above which score an input is suspicious: {error}.") from error
        facts["quantile_threshold_missing"] = str(error)
    scores = InputScores(
        clean,
        attacked,
        stamped_class,
        tuple(thresholds),
        _profile(fitted, subject, splits, stamped, stamped_class),
        facts,
        auroc(clean, attacked) if len(attacked) else None,
        _baselines(fitted, splits, stamped, false_positive_rate),
        fitted.distributions(test, stamped, test[:0] if suspects is None else suspects),
    )
    return scores, fitted


def _threshold(rule: str, cut: float, clean: FloatArray, stamped: FloatArray) -> Threshold:
    return Threshold(rule, float(cut), rate_of(clean > cut), rate_of(stamped > cut) if len(stamped) else None)


def _quantile(calibrated: FloatArray, clean: FloatArray, stamped: FloatArray, false_positive_rate: float) -> Threshold:
    """The calibrated threshold; ValueError when there are too few calibration scores for the rate."""
    cut = quantile_threshold(calibrated, false_positive_rate)
    return _threshold(f"quantile at FPR {false_positive_rate:.1%}", cut, clean, stamped)


def _baselines(fitted: FittedScorer, splits: Splits, stamped: ImageArray, false_positive_rate: float) -> tuple[Baseline, ...]:
    clean = fitted.baselines(splits.test.images)
    if not clean:
        return ()
    calibrated = fitted.baselines(splits.calibrate.images)
    attacked = fitted.baselines(stamped) if len(stamped) else {name: values[:0] for name, values in clean.items()}
    measured = []
    for name, values in clean.items():
        threshold = None
        with contextlib.suppress(ValueError):  # too few calibration images, which the check's own threshold says already
            threshold = _quantile(calibrated[name], values, attacked[name], false_positive_rate)
        measured.append(Baseline(name, auroc(values, attacked[name]) if len(attacked[name]) else None, threshold))
    return tuple(measured)


def victims(trigger: Trigger, labels: LabelArray, predictions: LabelArray) -> NDArray[np.bool_]:
    """Which images (N,) a trigger should move: of its source class, if it has one, and of another than its target class."""
    others: NDArray[np.bool_] = (labels != trigger.target_class) & (predictions != trigger.target_class)
    return others if trigger.source_class is None else others & (labels == trigger.source_class)


def _profile(
    fitted: FittedScorer, subject: Subject, splits: Splits, stamped: ImageArray, stamped_class: int | None
) -> Profile | None:
    if not fitted.profile_layers or stamped_class is None or len(stamped) == 0:
        return None
    members = splits.test.images[subject.predict(splits.test.images) == stamped_class]
    if len(members) == 0:
        return None
    clean = fitted.profile(members)
    return Profile(
        quantity=fitted.profile_quantity,
        class_index=stamped_class,
        layers=fitted.profile_layers,
        clean=tuple(clean.mean(axis=0).tolist()),
        clean_spread=tuple(clean.std(axis=0).tolist()),
        stamped=tuple(fitted.profile(stamped).mean(axis=0).tolist()),
    )
