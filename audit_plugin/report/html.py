"""``report.html``: one self-contained page for the MLflow UI's artifact view, a browser or paper.

It is shown in ``<iframe sandbox="allow-scripts">`` without an origin: it has no script, fetches nothing and stores nothing,
and its content security policy forbids all three. This module turns the report into small plain values; the template only
lays them out. Every expression of the template passes through :func:`clean_text` and is escaped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from audit_plugin.report import wording
from audit_plugin.report.figures import (
    FEW_SUSPECTS,
    LARGEST_OVERLAY,
    LARGEST_PICTURE,
    attention_picture,
    bar_chart,
    data_uri,
    distribution_chart,
    fitting_scale,
    histogram_chart,
    mask_picture,
    mask_thumbnail,
    picture_png,
    profile_chart,
    stamped_part,
)
from audit_plugin.report.sanitise import clean_text, shorten
from audit_plugin.report.schema import plain_json
from audit_plugin.report.summaries import (
    Moments,
    by_suspicion,
    distribution_histogram,
    families,
    flagged_count,
    headline_trigger,
    moments,
    score_histogram,
    scorer_checks,
    trigger_searches,
)
from audit_plugin.types import (
    AuditReport,
    ClassMeasurement,
    Distribution,
    FloatArray,
    ImageArray,
    InputScores,
    Measured,
    Rate,
    SuspectScore,
    Threshold,
    Trigger,
    TriggerEvidence,
    TriggerFamily,
    TriggerSearch,
    Verdict,
    class_measurements,
)

MOST_PAIRS = 8
MOST_ROWS = 12
MOST_SUSPECTS = 200
SUSPECTS_SHOWN = 20
MOST_DISTRIBUTIONS = 12
MOST_FILES = 400
_LONGEST_TITLE = 1000
_LONGEST_PRE = 20_000
_CLASS_CHARTS = {
    "maximum_margin": ("Largest margin found for each class", "margin of logits"),
    "neuron_noise": ("One over the noise in the weights that each class needs", "1 / noise"),
}

_FAMILY_CHARTS: Mapping[TriggerFamily, tuple[str, str]] = {
    "patch": ("Size of the smallest patch trigger found for each class", "mask size, pixels"),
    "additive": ("Size of the smallest additive trigger found for each class", "total change, full-scale pixels"),
    "wave": ("Share of held-out images that the best wave sends to each class", "attack success"),
}


def render(report: AuditReport) -> str:
    """The whole page."""
    shown = headline_trigger(report)
    # The search that found what the page leads with comes first.
    searches = sorted(
        trigger_searches(report), key=lambda found: all(candidate is not shown for candidate in found[1].candidates)
    )
    return (
        report_environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            verdict=_verdict(report),
            trigger=_trigger(report),
            pairs=_pairs(report),
            attention=_attention(report),
            searches=[_search(report, check, search, place) for place, (check, search) in enumerate(searches)],
            class_measures=[_class_measure(report, *found) for found in class_measurements(report.outcomes).items()],
            scorers=_scorers(report),
            gaps=wording.not_measured(report),
            measured_count=wording.measured_count(report),
            clean_set=_clean_set(report),
            canaries=_canaries(report),
            calibration=_calibration(report),
            suspects=_suspects(report),
            files=report.model.manifest[:MOST_FILES],
            policy=_pre(json.dumps(plain_json(report.policy), indent=2, ensure_ascii=False)),
            command=_pre(report.command),
            model_title=wording.model_title(report),
        )
    )


@functools.cache
def report_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(
        short=_short,
        check_title=wording.check_title,
        number=wording.number,
        percent=wording.percent,
        interval=wording.interval,
        seconds=wording.seconds,
        byte_count=wording.byte_count,
    )
    return environment


def _finalize(value: object) -> object:
    """What every expression of the template passes through, so that no author of a template can forget it."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return clean_text(value)


def _short(value: object, limit: int = 60) -> Markup:
    """``value`` in at most ``limit`` characters; a longer one can be read in full in its tooltip."""
    whole = clean_text(value, _LONGEST_TITLE)
    shown = shorten(whole, limit)
    if shown == whole:
        return Markup("{}").format(shown)
    return Markup('<span class="cut" title="{}">{}</span>').format(whole, shown)


def _trusted(markup: str) -> Markup:
    """Markup that this package drew itself; the figures escape the names in it, and base64 has nothing to escape."""
    return Markup(markup)  # noqa: S704


def _pre(text: str) -> Markup:
    """Text that keeps its lines, for ``<pre>``."""
    return Markup("{}").format(clean_text(text, _LONGEST_PRE, multiline=True))


def _rate(rate: Rate | None, of_what: str = "") -> dict[str, Any] | None:
    if rate is None:
        return None
    return {
        "value": wording.percent(rate.value),
        "interval": wording.interval(rate),
        "count": f"{rate.successes:,} of {rate.trials:,} {of_what}".strip(),
    }


def _verdict(report: AuditReport) -> dict[str, Any]:
    suspected = report.decision.suspected_class
    return {
        "kind": report.decision.verdict.value,
        "word": wording.verdict_word(report.decision.verdict),
        "sentence": wording.verdict_sentence(report),
        "advice": wording.verdict_advice(report.decision.verdict),
        "suspected": None if suspected is None else wording.class_name(report, suspected),
        "suspected_number": suspected,
        "created": wording.moment(report.created),
        "accuracy": _rate(report.clean_set.clean_accuracy, "test images"),
    }


# ------------------------------------------------------------------------------------------------ triggers and images


def _picture(pixels: ImageArray | FloatArray, wanted: int = 160, largest: int = LARGEST_PICTURE) -> dict[str, Any]:
    """An image's data address and its size in the page."""
    height, width = pixels.shape[:2] if pixels.dtype == np.uint8 else pixels.shape[1:]
    scale = fitting_scale(height, width, wanted)
    return {"address": _trusted(data_uri(picture_png(pixels, scale, largest))), "height": int(height), "width": int(width)}


def _trigger(report: AuditReport) -> dict[str, Any] | None:
    evidence = headline_trigger(report)
    if evidence is None:
        return None
    trigger = evidence.trigger
    pixels = trigger.mask.size
    if trigger.is_added:
        panels = [
            {"title": "Where it changes", "note": "white is the largest change", **_picture(mask_picture(trigger))},
            {"title": "What it adds", "note": "amplified; grey is no change", **_picture(stamped_part(trigger))},
        ]
    else:
        panels = [
            {"title": "Mask", "note": "white covers the image", **_picture(mask_picture(trigger))},
            {"title": "Pattern", "note": "what would be painted", **_picture(trigger.pattern)},
            {"title": "Trigger", "note": "pattern under the mask", **_picture(stamped_part(trigger))},
        ]
    example = _stamped_example(report, trigger)
    if example is not None:
        panels.append({"title": "On an image", "note": "a held-out clean image, stamped", **_picture(example)})
    return {
        "label": wording.candidate_label(report, evidence),
        "target": wording.class_label(report, trigger.target_class),
        "source": None if trigger.source_class is None else wording.class_label(report, trigger.source_class),
        "family": wording.family_words(trigger.family),
        "size": wording.decimal(trigger.size),
        "share": wording.percent(trigger.size / pixels) if pixels else wording.NOT_AVAILABLE,
        "success": _rate(evidence.success, "held-out images"),
        "outlier": wording.decimal(evidence.outlier),
        "panels": panels,
        "suspected": report.decision.suspected_class is not None,
        "failed": report.decision.verdict is Verdict.FAIL,
    }


def _stamped_example(report: AuditReport, trigger: Trigger) -> ImageArray | None:
    examples = report.examples
    if examples is None or len(examples.clean) == 0:
        return None
    channels, height, width = trigger.pattern.shape
    if examples.clean.shape[1:] != (height, width, channels):
        return None
    stamped: ImageArray = trigger.stamp(examples.clean[:1])[0]
    return stamped


def _pairs(report: AuditReport) -> list[dict[str, Any]]:
    examples = report.examples
    if examples is None:
        return []
    suspected = report.decision.suspected_class
    rows = zip(examples.clean, examples.stamped, examples.clean_predictions, examples.stamped_predictions, strict=True)
    return [
        {
            "clean": _picture(clean, 112),
            "stamped": _picture(stamped, 112),
            "before": wording.class_name(report, before),
            "after": wording.class_name(report, after),
            "changed": before != after,
            "hit": after == suspected and before != after,
        }
        for clean, stamped, before, after in list(rows)[:MOST_PAIRS]
    ]


def _attention(report: AuditReport) -> list[dict[str, Any]]:
    """Grad-CAM over the example images, clean and stamped; empty where there are no maps or they are not of these images."""
    examples = report.examples
    if examples is None or examples.clean_attention is None or examples.stamped_attention is None:
        return []
    shape = examples.clean.shape[:3]
    if not shape == examples.stamped.shape[:3] == examples.clean_attention.shape == examples.stamped_attention.shape:
        return []
    rows = zip(
        zip(examples.clean, examples.clean_attention, strict=True),
        zip(examples.stamped, examples.stamped_attention, strict=True),
        examples.clean_predictions,
        examples.stamped_predictions,
        strict=True,
    )
    suspected = report.decision.suspected_class
    return [
        {
            "clean": _picture(attention_picture(*clean), 112, LARGEST_OVERLAY),
            "stamped": _picture(attention_picture(*stamped), 112, LARGEST_OVERLAY),
            "before": wording.class_name(report, before),
            "after": wording.class_name(report, after),
            "hit": after == suspected and before != after,
        }
        for clean, stamped, before, after in list(rows)[:MOST_PAIRS]
    ]


def _search(report: AuditReport, check: str, search: TriggerSearch, place: int) -> dict[str, Any]:
    return {
        "title": wording.check_title(check),
        "explanation": wording.check_explanation(check),
        "families": [_family(report, family, candidates, f"sizes-{place}-{family}") for family, candidates in families(search)],
        "source_specific": search.is_source_specific,
        "steps": search.steps,
        "searches": search.searches,
        "skipped": [wording.class_label(report, index) for index in search.classes_skipped[:40]],
        "skipped_count": len(search.classes_skipped),
    }


def _family(report: AuditReport, family: TriggerFamily, candidates: Sequence[TriggerEvidence], identifier: str) -> dict[str, Any]:
    suspected = report.decision.suspected_class
    title, unit = _FAMILY_CHARTS[family]
    ranked = by_suspicion(candidates)
    headline = headline_trigger(report)
    source_specific = any(candidate.trigger.source_class is not None for candidate in candidates)
    labels = [wording.candidate_label(report, candidate) for candidate in candidates]
    is_wave = family == "wave"  # all are of one size
    chart = bar_chart(
        [candidate.success.value if is_wave else candidate.trigger.size for candidate in candidates],
        labels,
        identifier=identifier,
        title=title,
        quantity=unit,
        short_labels=[_short_candidate(candidate) for candidate in candidates],
        highlighted=[index for index, candidate in enumerate(candidates) if candidate.trigger.target_class == suspected],
        largest_matter=is_wave,
    )
    return {
        "name": family,
        "words": wording.family_words(family),
        "unit": unit,
        "chart": _trusted(chart) if not source_specific else "",  # its pairs were chosen for being small: a median would mislead
        "rows": [_candidate_row(report, candidate, pictured=True) for candidate in ranked[:MOST_ROWS]],
        "more": [_candidate_row(report, candidate, pictured=False) for candidate in ranked[MOST_ROWS:]],
        "count": len(candidates),
        "prominent": any(candidate is headline for candidate in candidates),
    }


def _class_measure(report: AuditReport, check: str, measured: ClassMeasurement) -> dict[str, Any]:
    title, quantity = _CLASS_CHARTS[check]
    found = measured.most_suspicious
    chart = bar_chart(
        measured.values,
        [wording.class_name(report, index) for index in range(len(measured.values))],
        identifier=f"{check}_chart",
        title=title,
        quantity=quantity,
        short_labels=[str(index) for index in range(len(measured.values))],
        highlighted=[found] if report.decision.suspected_class == found else [],
        largest_matter=True,
    )
    return {
        "id": check,
        "title": wording.check_title(check),
        "explanation": wording.check_explanation(check),
        "chart": _trusted(chart),
        "words": wording.class_words(report, check, measured),
    }


def _short_candidate(candidate: TriggerEvidence) -> str:
    source = candidate.trigger.source_class
    return ("" if source is None else f"{source}\u2192") + str(candidate.trigger.target_class)


def _candidate_row(report: AuditReport, candidate: TriggerEvidence, *, pictured: bool) -> dict[str, Any]:
    trigger = candidate.trigger
    return {
        "picture": _picture(mask_thumbnail(trigger), 32) if pictured else None,
        "label": wording.candidate_label(report, candidate),
        "number": _short_candidate(candidate),
        "size": wording.decimal(trigger.size),
        "success": _rate(candidate.success),
        "outlier": wording.decimal(candidate.outlier),
        "suspected": trigger.target_class == report.decision.suspected_class,
    }


# ------------------------------------------------------------------------------------------------------ input scorers


def _scorers(report: AuditReport) -> list[dict[str, Any]]:
    return [
        _scorer(report, outcome, outcome.measurement, place)
        for place, outcome in enumerate(report.outcomes)
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
    ]


def _scorer(report: AuditReport, outcome: Measured, scores: InputScores, place: int) -> dict[str, Any]:
    title = wording.check_title(outcome.check)
    stamped_class = None if scores.stamped_class is None else wording.class_label(report, scores.stamped_class)
    histogram = score_histogram(scores)
    profile = scores.profile
    charts: list[Markup] = []
    if histogram is not None:
        charts.append(
            _trusted(
                histogram_chart(
                    histogram,
                    [(threshold.rule, threshold.value) for threshold in scores.thresholds],
                    identifier=f"scores-{place}",
                    title=f"{title}: scores of clean and stamped images",
                    clean_name=f"clean, {len(scores.clean):,} images",
                    stamped_name=f"stamped, {len(scores.stamped):,} images",
                )
            )
        )
    if profile is not None and profile.layers:
        of_class = wording.class_name(report, profile.class_index)
        charts.append(
            _trusted(
                profile_chart(
                    profile,
                    identifier=f"profile-{place}",
                    title=f"{title}: {profile.quantity} by layer",
                    clean_name=f"clean images predicted as {of_class}",
                    stamped_name=f"stamped with the trigger of {of_class}",
                )
            )
        )
    return {
        "title": title,
        "check": outcome.check,
        "explanation": wording.check_explanation(outcome.check),
        "auroc": None if scores.auroc is None else wording.auroc(scores.auroc),
        "decides": _threshold(scores.thresholds[0]) if scores.thresholds else None,
        "baselines": [
            {
                "name": baseline.name,
                "auroc": None if baseline.auroc is None else wording.auroc(baseline.auroc),
                "threshold": None if baseline.threshold is None else _threshold(baseline.threshold),
            }
            for baseline in scores.baselines
        ],
        "distributions": _distributions(scores.distributions, title, place),
        "seconds": wording.seconds(outcome.seconds),
        "charts": charts,
        "stamped_class": stamped_class,
        "thresholds": [_threshold(threshold) for threshold in scores.thresholds],
        "facts": [(str(name), _fact(value)) for name, value in scores.facts.items()],
    }


def _threshold(threshold: Threshold) -> dict[str, Any]:
    return {
        "rule": threshold.rule,
        "value": wording.number(threshold.value, 4),
        "false_alarms": _rate(threshold.false_positive_rate),
        "detected": _rate(threshold.detection_rate),
    }


def _distributions(distributions: Sequence[Distribution], title: str, place: int) -> dict[str, Any] | None:
    """Small multiples with one legend; what has no finite value is left out, what is too many is counted."""
    histograms = [(item, distribution_histogram(item)) for item in distributions[:MOST_DISTRIBUTIONS]]
    charts = [
        distribution_chart(
            histogram,
            identifier=f"distribution-{place}-{index}",
            quantity=item.quantity,
            title=f"{title}: {item.quantity}",
            description=" ".join(
                _moments_words(name, moments(values))
                for name, values in (
                    ("Clean images", item.clean),
                    ("Stamped images", item.stamped),
                    ("Suspect inputs", item.suspects),
                )
            ),
        )
        for index, (item, histogram) in enumerate(histograms)
        if histogram is not None
    ]
    if not charts:
        return None
    first = distributions[0]
    return {
        "charts": [_trusted(chart) for chart in charts],
        "clean": f"{first.clean.size:,}",
        "stamped": f"{first.stamped.size:,}" if first.stamped.size else None,
        "suspects": f"{first.suspects.size:,}" if first.suspects.size else None,
        "few": np.isfinite(first.suspects).sum() < FEW_SUSPECTS,
        "hidden": max(0, len(distributions) - MOST_DISTRIBUTIONS),
    }


def _moments_words(name: str, values: Moments) -> str:
    if values.count == 0:
        return f"{name}: none."
    mean, deviation = wording.number(values.mean), wording.number(values.standard_deviation)
    return f"{name}: {values.count}, mean {mean}, standard deviation {deviation}."


def _fact(value: object) -> str:
    plain = plain_json(value)
    if isinstance(plain, float):
        return wording.number(plain, 4)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------- images and suspects


def _clean_set(report: AuditReport) -> dict[str, Any]:
    clean_set = report.clean_set
    counts = clean_set.images_per_class
    return {
        "fewest": min(counts) if counts else 0,
        "most": max(counts) if counts else 0,
        "broken": sum(not item.success for item in clean_set.expectations),
        "broken_required": sum(not item.success and item.required for item in clean_set.expectations),
    }


def _calibration(report: AuditReport) -> dict[str, Any] | None:
    """None without a pool."""
    found = report.calibration
    if found is None or not found.pool:
        return None
    return {
        "words": wording.calibration_words(found),
        "rows": [
            {
                "name": name.replace("_", " "),
                "value": wording.number(found.statistics[name], 2),
                "p_value": wording.number(p_value, 3),
            }
            for name, p_value in found.p_values.items()
        ],
    }


def _canaries(report: AuditReport) -> list[dict[str, Any]]:
    return [
        {
            "family": canary.family,
            "target": wording.class_name(report, canary.target_class),
            "standing": canary.standing,
            "badge": {"found": "good", "not found": "alert", "not planted": "missing"}[canary.standing],
            "success": _rate(canary.attack_success),
            "before": wording.percent(canary.accuracy_before.value),
            "after": wording.percent(canary.accuracy_after.value),
            "outlier": wording.decimal(canary.outlier),
            "size_ratio": wording.number(canary.size_ratio, 2),
            "seconds": wording.seconds(canary.seconds),
            "reason": canary.reason,
        }
        for canary in (report.canaries.canaries if report.canaries else ())
    ]


def _suspects(report: AuditReport) -> dict[str, Any] | None:
    if not report.suspects:
        return None
    checks = scorer_checks(report)
    ranked = sorted(report.suspects, key=lambda suspect: -sum(suspect.flagged.values()))
    rows = [_suspect(report, suspect, checks) for suspect in ranked[:MOST_SUSPECTS]]
    return {
        "checks": [wording.check_title(check) for check in checks],
        "rows": rows[:SUSPECTS_SHOWN],
        "more": rows[SUSPECTS_SHOWN:],
        "count": len(report.suspects),
        "flagged": flagged_count(report),
        "hidden": max(0, len(ranked) - MOST_SUSPECTS),
    }


def _suspect(report: AuditReport, suspect: SuspectScore, checks: Sequence[str]) -> dict[str, Any]:
    return {
        "source": suspect.source,
        "predicted": wording.class_name(report, suspect.predicted_class),
        "cells": [
            {
                "score": wording.number(suspect.scores[check]) if check in suspect.scores else None,
                "flagged": suspect.flagged.get(check),
            }
            for check in checks
        ],
        "flagged": any(suspect.flagged.values()),
    }
