"""``junit.xml``: the audit as a JUnit report, which every CI system shows.

One suite, the audited model; one test case for the verdict, one for each check, one for the clean set. CI systems take a skipped
test for a fine one, so whatever keeps an audit from passing is an error; a check is only skipped where the verdict does not need
it. The form is the one that both Jenkins (``junit-10.xsd``) and Apache Ant define.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.text import render_text
from audit_plugin.report.wording import class_label, not_measured, verdict_sentence
from audit_plugin.types import AuditReport, Measured, Verdict

_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class _Case:
    """One test case; ``outcome`` is None when it passed, ``kind`` says what sort of failure or error it is."""

    name: str
    seconds: float = 0.0
    outcome: Literal["failure", "error", "skipped"] | None = None
    kind: str = ""
    message: str = ""


def to_junit(report: AuditReport) -> bytes:
    """The report as UTF-8 XML. Characters that XML 1.0 does not have are written as escape sequences."""
    cases = [_verdict(report), *_checks(report), _clean_set(report)]
    counts = {kind: str(sum(case.outcome == kind for case in cases)) for kind in ("failure", "error", "skipped")}
    name = _shown(report.model.pinned_uri) or "model"
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": name,
            "package": "backdoor-audit",
            "id": "0",
            "timestamp": f"{datetime.datetime.fromisoformat(report.created).astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%S}",
            "hostname": "localhost",
            "tests": str(len(cases)),
            "failures": counts["failure"],
            "errors": counts["error"],
            "skipped": counts["skipped"],
            "time": _seconds(report.duration_seconds),
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", {"name": key, "value": _shown(value)})
    for case in cases:
        attributes = {"name": _shown(case.name), "classname": f"backdoor-audit.{name}", "time": _seconds(case.seconds)}
        element = ElementTree.SubElement(suite, "testcase", attributes)
        if case.outcome is not None:
            message = _shown(case.message)
            found = ElementTree.SubElement(element, case.outcome, {"type": _shown(case.kind), "message": message})
            found.text = message  # some systems show the one, some the other
    ElementTree.SubElement(suite, "system-out").text = render_text(report)
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def _verdict(report: AuditReport) -> _Case:
    decision = report.decision
    if decision.verdict is Verdict.PASS:
        return _Case("verdict")
    sentences = [verdict_sentence(report), *(reason.message for reason in decision.reasons)]
    code = decision.reasons[0].code if decision.reasons else str(decision.verdict)
    return _Case("verdict", 0.0, "failure" if decision.verdict is Verdict.FAIL else "error", code, " ".join(sentences))


def _checks(report: AuditReport) -> Iterator[_Case]:
    for outcome in report.outcomes:
        if isinstance(outcome, Measured):
            yield _Case(f"check {outcome.check}", outcome.seconds)
    for gap in not_measured(report):
        needed = gap.status == "failed" or gap.check in report.decision.not_measured
        yield _Case(f"check {gap.check}", 0.0, "error" if needed else "skipped", f"check-{gap.status}", gap.why)
    if not report.outcomes:
        yield _Case("check", 0.0, "error", "check-missing", "No check ran.")


def _clean_set(report: AuditReport) -> _Case:
    expectations = report.clean_set.expectations
    if not expectations:
        return _Case("clean set", 0.0, "error", "clean-set-unchecked", "The clean images were not validated.")
    broken = [f"{item.description} Found: {item.observed}." for item in expectations if item.required and not item.success]
    return _Case("clean set", 0.0, "error", "clean-set", " ".join(broken)) if broken else _Case("clean set")


def _properties(report: AuditReport) -> dict[str, str]:
    suspected = report.decision.suspected_class
    return {
        "verdict": str(report.decision.verdict),
        "suspected_class": "none" if suspected is None else class_label(report, suspected),
        "model": report.model.uri,
        "digest": report.model.digest,
        "policy_digest": report.policy_digest,
        "seed": str(report.seed),
        "tool_version": report.tool_version,
        "command": report.command,
    }


def _shown(text: str) -> str:
    return clean_text(text, _LONGEST_MESSAGE).strip()


def _seconds(value: float) -> str:
    return f"{value if math.isfinite(value) else 0.0:.3f}"
