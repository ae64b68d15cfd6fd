"""Numbers that the report derives from an audit's results: quantiles, histograms, which trigger to show, picture names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit_plugin.types import (
    AuditReport,
    Distribution,
    FloatArray,
    InputScores,
    Measured,
    TriggerEvidence,
    TriggerFamily,
    TriggerSearch,
    trigger_search,
)

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
HISTOGRAM_BINS = 40
DISTRIBUTION_BINS = 30


def flagged_count(report: AuditReport) -> int:
    """How many suspect inputs at least one check flags."""
    return sum(any(suspect.flagged.values()) for suspect in report.suspects)


@dataclass(frozen=True)
class Histogram:
    """Counts of clean, stamped and suspect images over the same ``edges`` (bins + 1); what lies outside is counted in the end
    bins. ``suspects`` is empty where they were not counted."""

    edges: tuple[float, ...]
    clean: tuple[int, ...]
    stamped: tuple[int, ...]
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (of these images, not of a population behind them) of the finite values; None without one."""

    count: int
    not_finite: int
    mean: float | None
    standard_deviation: float | None


def quantiles(scores: FloatArray) -> dict[str, float] | None:
    """The quantiles of the finite scores by their probability written as text, or None when there is no finite score."""
    finite = _finite(scores)
    if finite.size == 0:
        return None
    values = np.quantile(finite, QUANTILES)
    return {f"{probability:g}": float(value) for probability, value in zip(QUANTILES, values, strict=True)}


def score_histogram(scores: InputScores, bins: int = HISTOGRAM_BINS) -> Histogram | None:
    """Clean and stamped scores over shared bins, or None when there is no finite score.

    The range covers the inner 99 % of each group: one enormous ratio must not squeeze everything else into a single bin.
    Thresholds that lie near this range are drawn into it.
    """
    limits = _inner_range(scores.clean, scores.stamped)
    if limits is None:
        return None
    low, high = limits
    span = high - low
    for threshold in scores.thresholds:
        if math.isfinite(threshold.value) and low - span <= threshold.value <= high + span:
            margin = 0.03 * span
            low, high = min(low, threshold.value - margin), max(high, threshold.value + margin)
    edges = _edges(low, high, bins)
    return Histogram(
        edges=tuple(float(edge) for edge in edges),
        clean=_counts(scores.clean, edges),
        stamped=_counts(scores.stamped, edges),
    )


def distribution_histogram(distribution: Distribution, bins: int = DISTRIBUTION_BINS) -> Histogram | None:
    """Clean, stamped and suspect values over shared bins, or None when there is no finite value.

    The range covers the inner 99 % of the clean and of the stamped images. Suspects, which anyone may have sent, widen it by
    at most its own width on either side.
    """
    limits = _inner_range(distribution.clean, distribution.stamped)
    suspects = _inner_range(distribution.suspects)
    if limits is None and suspects is None:
        return None
    if limits is None or suspects is None:
        low, high = limits or suspects or (0.0, 0.0)
    else:
        span = limits[1] - limits[0]
        low = min(limits[0], max(suspects[0], limits[0] - span))
        high = max(limits[1], min(suspects[1], limits[1] + span))
    edges = _edges(low, high, bins)
    return Histogram(
        edges=tuple(float(edge) for edge in edges),
        clean=_counts(distribution.clean, edges),
        stamped=_counts(distribution.stamped, edges),
        suspects=_counts(distribution.suspects, edges),
    )


def moments(values: FloatArray) -> Moments:
    """Count, mean and standard deviation; what is not finite is counted and left out."""
    finite = _finite(values)
    mean, deviation = (float(finite.mean()), float(finite.std())) if finite.size else (None, None)
    return Moments(int(values.size), int(values.size) - int(finite.size), mean, deviation)


def scorer_checks(report: AuditReport) -> tuple[str, ...]:
    """Every check that scores inputs: the measured ones in the order of the outcomes, then whatever else scored a suspect."""
    measured = [
        outcome.check
        for outcome in report.outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
    ]
    others = [check for suspect in report.suspects for check in (*suspect.scores, *suspect.flagged)]
    return tuple(dict.fromkeys((*measured, *sorted(others))))


def trigger_searches(report: AuditReport) -> tuple[tuple[str, TriggerSearch], ...]:
    """The measured trigger searches with the name of their check, in the order of the outcomes."""
    return tuple(
        (outcome.check, outcome.measurement)
        for outcome in report.outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, TriggerSearch)
    )


def headline_trigger(report: AuditReport) -> TriggerEvidence | None:
    """The trigger that illustrates the verdict: the most outlying one, of the suspected class where there is one.

    A trigger between two classes illustrates it only where such a pair decided: outliers of pairs and of classes do not compare.
    """
    suspected = report.decision.suspected_class
    by_pair = any(reason.code == "pair-stands-out" for reason in report.decision.reasons)
    search = trigger_search(report.outcomes, of_pairs=by_pair)
    candidates = [
        candidate
        for candidate in (search.candidates if search else ())
        if suspected is None or candidate.trigger.target_class == suspected
    ]
    return max(candidates, key=lambda candidate: candidate.suspicion, default=None)


def families(search: TriggerSearch) -> tuple[tuple[TriggerFamily, tuple[TriggerEvidence, ...]], ...]:
    """The candidates by family, because sizes of different families cannot be compared."""
    grouped: dict[TriggerFamily, list[TriggerEvidence]] = {}
    for candidate in search.candidates:
        grouped.setdefault(candidate.trigger.family, []).append(candidate)
    return tuple((family, tuple(candidates)) for family, candidates in grouped.items())


def by_suspicion(candidates: Sequence[TriggerEvidence]) -> tuple[TriggerEvidence, ...]:
    """The candidates, most outlying first; ones whose outlier is no number come last."""
    return tuple(sorted(candidates, key=lambda candidate: candidate.suspicion, reverse=True))


def trigger_pictures(report: AuditReport) -> tuple[tuple[str, TriggerEvidence], ...]:
    """Relative POSIX path of the picture of every candidate, in the order of outcomes and candidates.

    ``triggers/class_<target>.png``; a source class, a family other than ``patch`` and, for a second search of the same kind, a
    number are appended.
    """
    taken: set[str] = set()
    named: list[tuple[str, TriggerEvidence]] = []
    for _, search in trigger_searches(report):
        for candidate in search.candidates:
            trigger = candidate.trigger
            stem = f"class_{trigger.target_class}"
            stem += "" if trigger.source_class is None else f"_from_{trigger.source_class}"
            stem += "" if trigger.family == "patch" else f"_{trigger.family}"
            unique, repeat = stem, 1
            while unique in taken:
                repeat += 1
                unique = f"{stem}_{repeat}"
            taken.add(unique)
            named.append((f"triggers/{unique}.png", candidate))
    return tuple(named)


def _finite(scores: FloatArray) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64).ravel()
    finite: NDArray[np.float64] = values[np.isfinite(values)]
    return finite


def _inner_range(*groups: FloatArray) -> tuple[float, float] | None:
    """What covers the inner 99 % of every group, or None when no group has a finite value."""
    finite = [values for values in map(_finite, groups) if values.size]
    if not finite:
        return None
    low = min(float(np.quantile(values, 0.005)) for values in finite)
    return low, max(float(np.quantile(values, 0.995)) for values in finite)


def _edges(low: float, high: float, bins: int) -> NDArray[np.float64]:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        margin = max(abs(low), 1.0) * 0.5
        low, high = low - margin, high + margin
    edges: NDArray[np.float64] = np.linspace(low, high, bins + 1)
    return edges


def _counts(scores: FloatArray, edges: NDArray[np.float64]) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(_finite(scores), edges[0], edges[-1]), bins=edges)
    return tuple(int(count) for count in counts)
