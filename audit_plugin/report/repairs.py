"""What a repair did, in a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.schema import plain_json
from audit_plugin.report.wording import class_label, interval, percent
from audit_plugin.types import AuditReport, Rate, RepairReport


def render_repair(repair: RepairReport, audited: AuditReport, repaired_uri: str) -> str:
    """A terse plain-text summary, without any control character but the line feed.

    Args:
        audited: the audit of the original.
        repaired_uri: where the repaired model is now.
    """
    lines = [
        f"REPAIRED  {clean_text(audited.model.pinned_uri, 200)} -> {clean_text(repaired_uri, 200)}",
        _row("method", f"{repair.method}, with {repair.trigger_count} recovered triggers"),
        _row("target class", class_label(audited, repair.target_class)),
        _row("clean accuracy", _change(repair.accuracy_before, repair.accuracy_after, "test images")),
        _row("triggers succeed", _change(repair.flip_rate_before, repair.flip_rate_after, "test images of other classes")),
        *(_row("note", note) for note in _notes(audited)),
    ]
    return "\n".join(lines) + "\n"


def repair_document(repair: RepairReport, audited: AuditReport, repaired_uri: str) -> dict[str, Any]:
    """The same as JSON values; what is not finite becomes null."""
    index = repair.target_class
    document: dict[str, Any] = plain_json(
        {
            "original": audited.model.pinned_uri,
            "original_digest": audited.model.digest,
            "repaired": repaired_uri,
            "method": repair.method,
            "target_class": {"index": index, "name": audited.subject.class_names[index]},
            "trigger_count": repair.trigger_count,
            "accuracy_before": _rate(repair.accuracy_before),
            "accuracy_after": _rate(repair.accuracy_after),
            "flip_rate_before": _rate(repair.flip_rate_before),
            "flip_rate_after": _rate(repair.flip_rate_after),
            "facts": repair.facts,
            "notes": _notes(audited),
        }
    )
    return document


def _notes(audited: AuditReport) -> list[str]:
    flavour = audited.intake.flavour
    if flavour in ("state_dict", "pickle"):
        return [f"The original is a {flavour}; the repaired model is an exported program, a .pt2 file."]
    return []


def _rate(rate: Rate) -> dict[str, float | int]:
    return {"value": rate.value, "successes": rate.successes, "trials": rate.trials, "low": rate.low, "high": rate.high}


def _change(before: Rate, after: Rate, of_what: str) -> str:
    return f"{percent(before.value)} before, {percent(after.value)} ({interval(after)}) after, on {before.trials} {of_what}"


def _row(name: str, value: str) -> str:
    return f"  {name:<17} {value}"
