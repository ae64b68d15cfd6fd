"""Whether a version may be promoted, in a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from audit_plugin.attestation import Statement
from audit_plugin.gate import Standing, VersionFacts
from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.schema import plain_json


def render_standing(version: VersionFacts, standing: Standing) -> str:
    """A few lines of plain text, without any control character but the line feed."""
    lines = [f"{_headline(standing)}  {clean_text(version.uri, 200)}"]
    if standing.waiver is not None:
        facts = standing.waiver.facts
        lines.append(f"  waiver of {clean_text(facts['by'])} until {clean_text(facts['until'])}: {clean_text(facts['reason'])}")
    lines += [f"  {clean_text(reason.message)}" for reason in standing.reasons]
    if standing.attestation is not None:
        lines.append(
            f"  audited {standing.attestation.created.isoformat(timespec='minutes')}, files {standing.attestation.digest}"
        )
    return "\n".join(lines)


def standing_document(version: VersionFacts, standing: Standing) -> dict[str, Any]:
    """The same as JSON values."""
    document: dict[str, Any] = plain_json(
        {
            "model": version.uri,
            "allowed": standing.allowed,
            "reasons": [{"code": reason.code, "message": reason.message} for reason in standing.reasons],
            "attestation": _document(standing.attestation),
            "waiver": _document(standing.waiver),
        }
    )
    return document


def _headline(standing: Standing) -> str:
    if standing.allowed:
        return "WAIVED" if standing.reasons else "PASS"
    return "FAIL" if standing.is_refuted else "NO AUDIT THAT COUNTS"


def _document(statement: Statement | None) -> dict[str, Any] | None:
    if statement is None:
        return None
    return {"digest": statement.digest, "created": statement.created.isoformat(), **statement.facts}
