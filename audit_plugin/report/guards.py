"""What a guard does, in a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.schema import plain_json
from audit_plugin.report.wording import interval, percent
from audit_plugin.types import GuardReport, Rate


def render_guard(guard: GuardReport, file: str | None, uri: str | None) -> str:
    """A terse plain-text summary, without any control character but the line feed.

    Args:
        file, uri: where the guard was written and registered.
    """
    lines = [
        f"GUARD of {clean_text(guard.model.pinned_uri, 200)}",
        _row("threshold", f"{guard.threshold.value:.3f} on suspicion, chosen on {guard.calibration_count} clean images"),
        _row(
            "false positives",
            f"{_measured(guard.threshold.false_positive_rate)} clean test images; "
            f"{percent(guard.wanted_false_positive_rate)} were asked for",
        ),
        _row("detected", _detected(guard)),
        *(_row("note", note) for note in notes(guard)),
        *(_row(name, clean_text(place, 500)) for name, place in (("file", file), ("model", uri)) if place is not None),
    ]
    return "\n".join(lines) + "\n"


def guard_document(guard: GuardReport, file: str | None = None, uri: str | None = None) -> dict[str, Any]:
    """The same as JSON values; what is not finite becomes null."""
    trigger = guard.trigger
    detected = guard.threshold.detection_rate
    document: dict[str, Any] = plain_json(
        {
            "guard_of": guard.model.pinned_uri,
            "guard_of_digest": guard.model.digest,
            "file": file,
            "uri": uri,
            "threshold": guard.threshold.value,
            "calibration_count": guard.calibration_count,
            "wanted_false_positive_rate": guard.wanted_false_positive_rate,
            "false_positive_rate": _rate(guard.threshold.false_positive_rate),
            "detection_rate": None if detected is None else _rate(detected),
            "detection_missing": guard.detection_missing or None,
            "trigger": None
            if trigger is None
            else {
                "target_class": {
                    "index": trigger.trigger.target_class,
                    "name": guard.subject.class_names[trigger.trigger.target_class],
                },
                "outlier": trigger.outlier,
                "success": _rate(trigger.success),
            },
            "clean_accuracy": _rate(guard.clean_accuracy),
            "batch_size": guard.subject.batch_size,
            "notes": notes(guard),
        }
    )
    return document


def notes(guard: GuardReport) -> list[str]:
    """What whoever deploys the guard should know."""
    found = []
    if guard.threshold.false_positive_rate.low > guard.wanted_false_positive_rate:
        found.append("more clean test images are called suspicious than were asked for: give more clean images.")
    if guard.subject.batch_size is not None:
        found.append(f"like the model, the guard takes batches of exactly {guard.subject.batch_size} images.")
    return found


def _detected(guard: GuardReport) -> str:
    rate, found = guard.threshold.detection_rate, guard.trigger
    if rate is None or found is None:
        return f"not measured: {clean_text(guard.detection_missing, 300)}"
    name = clean_text(guard.subject.class_names[found.trigger.target_class], 40)
    return f"{_measured(rate)} test images with the trigger recovered for class '{name}'"


def _measured(rate: Rate) -> str:
    return f"{percent(rate.value)} ({interval(rate)}) of {rate.trials}"


def _rate(rate: Rate) -> dict[str, float | int]:
    return {"value": rate.value, "successes": rate.successes, "trials": rate.trials, "low": rate.low, "high": rate.high}


def _row(name: str, value: str) -> str:
    return f"  {name:<17} {value}"
