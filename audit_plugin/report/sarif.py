"""``report.sarif.json``: the audit as a SARIF 2.1.0 log, for code scanning and other dashboards of findings.

A result is something to act on: a reason why the audit did not pass, or a check that the verdict needed and did not get. The
first reason of a fail is an error, everything else a warning, and a pass has no result. Whatever was not measured is a
notification of the invocation as well, so that an empty list of results is never all that remains of a broken audit.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.wording import NotMeasured, class_name, not_measured, verdict_sentence, verdict_word
from audit_plugin.types import AuditReport, Expectation, ModelRef, Verdict

TOOL_NAME = "backdoor-audit"
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}
_LONGEST_MESSAGE = 2000
_LONGEST_SEGMENT = 255
_LONGEST_CODE = 100

# Code of a reason: what it says in general, and what to do about it.
RULES: Mapping[str, tuple[str, str]] = {
    "class-stands-out": (
        "A class behaves like the target of a backdoor",
        "One class needs a far smaller trigger than the others, the trigger works on held-out images, and independent checks see "
        "it too. Keep this version out of production; repair or replace it.",
    ),
    "pair-stands-out": (
        "Images of one class become another one too easily",
        "One pair of classes needs a far smaller trigger than the two classes let expect: a source-specific backdoor, or two "
        "classes that resemble each other. Audit again with suspect inputs.",
    ),
    "borderline": (
        "A class stands out, but less than a failure asks for",
        "Audit again with more clean images or more search steps, or compare with a model that is known to be clean.",
    ),
    "trigger-does-not-hold": (
        "The trigger of the class that stands out does not hold on other images",
        "It moves too few of the held-out images to call it a backdoor. Audit again with more clean images or more search steps.",
    ),
    "not-confirmed": (
        "No independent check confirms the class that stands out",
        "The checks on inputs do not tell images with the recovered trigger from clean ones. Look at the evidence in the report.",
    ),
    "no-trigger-search": (
        "No trigger search was measured",
        "Without it nothing can be said about backdoors. The notifications say why it was not measured.",
    ),
    "too-few-classes": (
        "The model has too few classes to compare",
        "The size of a class's trigger is judged against those of the other classes. This audit cannot judge such a model.",
    ),
    "classes-not-searched": (
        "Not every class was searched for a trigger",
        "Raise [trigger_inversion] maximum_classes in the policy and audit again.",
    ),
    "classes-not-reached": (
        "The search found no working trigger for some classes",
        "Nothing is known of these classes. Raise [trigger_inversion] steps in the policy and audit again. A model that hides "
        "its gradients ends here too.",
    ),
    "input-from-tags": (
        "How pixels become the model's input is read from tags that any client can set",
        "A trigger outside of the range that they name is never searched. Set [model] low, high, mean and std in the policy, or "
        "trust_tags where only people whom you trust can set tags, and audit again.",
    ),
    "scores-hidden": (
        "The model's scores are probabilities too small to search by",
        "Where a probability is nearly zero, no gradient leads to its class. Log the model without what turns its scores into "
        "probabilities, and audit again.",
    ),
    "search-did-not-converge": (
        "The search found working triggers for too few classes",
        "Raise [trigger_inversion] steps in the policy and audit again. A model that hides its gradients ends here too.",
    ),
    "canary-not-found": (
        "The audit does not find a known backdoor in a copy of this model",
        "It would miss one in the model itself too. Raise [trigger_inversion] steps in the policy, or give more clean images.",
    ),
    "canary-not-planted": (
        "No known backdoor could be planted in a copy of this model",
        "So it is not known if the audit would see one. Give more clean images, or change [canaries] required in the policy.",
    ),
    "unusual-among-clean-models": (
        "The model is unusual among clean models, though no class stands out",
        "Its trigger sizes and detections lie at the edge of what the clean reference models show. Audit again with more search "
        "steps or suspect inputs, and look at the evidence in the report.",
    ),
    "usual-among-clean-models": (
        "A class stands out, but clean models of the pool look like this too",
        "So this is no failure. Look at the evidence in the report, or add reference models that resemble this one more.",
    ),
    "not-comparable": (
        "The reference pool says nothing of this model",
        "The policy names a pool that does not fit the model or the settings. Make one with python -m pipelines.calibrate, or "
        "leave [calibration] pool out of the policy.",
    ),
    "architectural-path": (
        "The graph decides on the image's values, or leads around its layers",
        "A comparison, rounding, index or branch, or a path past the layers, leads from the image to the answer, as in an "
        "architectural backdoor. A search for triggers cannot look behind it, so the model never passes. Read the named nodes; "
        "export the model without them, or do not use it.",
    ),
    "changes-own-state": (
        "The model changes its own state when it runs",
        "It may answer otherwise later than in the audit, so it never passes. Export it in evaluation mode, without counters.",
    ),
    "answers-by-chance": (
        "Random numbers reach the model's answer",
        "A trigger that works for some images only, by chance, shows neither on clean images nor in the search, so the model "
        "never passes. Export it in evaluation mode, without random numbers.",
    ),
    "clean-set-unchecked": (
        "The clean images were not validated",
        "What is measured on images that were not validated cannot make a model pass. Audit again.",
    ),
    "check-failed": (
        "A check broke",
        "An audit with a broken check never passes. Remove the cause and audit again.",
    ),
    "check-not-measured": (
        "A required check was not measured",
        "Without it no model passes. Remove the cause, or leave the check out of the policy, and audit again.",
    ),
}

EVIDENCE = frozenset({"trigger-size", "confirmed", "no-class-stands-out"})
"""Codes of reasons that support another one: their sentences follow that one's, they are no finding of their own."""

CLEAN_SET = "clean-set-"
"""Start of the codes that end with the name of an expectation on the clean set."""

_OF_CHECKS = frozenset({"check-failed", "check-not-measured"})  # their results come from the checks, which also say why
_UNEXPLAINED = "unexplained"  # a verdict other than pass that names no reason


def to_sarif(report: AuditReport) -> dict[str, Any]:
    """The report as one SARIF log with one run, valid under the OASIS schema of SARIF 2.1.0."""
    decision = report.decision
    results = _results(report)
    notifications = _notifications(report)
    # Every rule, found or not: a consumer then sees what was looked for.
    rules = list(dict.fromkeys([*RULES, *_expectation_codes(report), *(result["ruleId"] for result in results)]))
    for result in results:
        result["ruleIndex"] = rules.index(result["ruleId"])
    suspected = decision.suspected_class
    run = {
        "tool": {
            "driver": {
                "name": TOOL_NAME,
                "fullName": "mlflow-backdoor-audit",
                "version": clean_text(report.tool_version),
                "rules": [_rule(code, report.clean_set.expectations) for code in rules],
            }
        },
        # Two models audited in one job are two analyses: without it the second would close the alerts of the first.
        "automationDetails": {"id": f"{TOOL_NAME}/{'/'.join(_folder(report.model))}/"},
        "invocations": [
            {
                "commandLine": clean_text(report.command, None),
                "startTimeUtc": datetime.datetime.fromisoformat(report.created)
                .astimezone(datetime.UTC)
                .strftime("%Y-%m-%dT%H:%M:%SZ"),
                "exitCode": _EXIT_CODES[decision.verdict],
                "exitCodeDescription": verdict_word(decision.verdict),
                "executionSuccessful": all(notification["level"] != "error" for notification in notifications),
                "toolExecutionNotifications": notifications,
            }
        ],
        "results": results,
        "properties": {
            "verdict": str(decision.verdict),
            "suspectedClass": None if suspected is None else {"index": suspected, "name": class_name(report, suspected)},
            "model": {
                "uri": clean_text(report.model.uri, None),
                "pinnedUri": clean_text(report.model.pinned_uri, None),
                "digest": clean_text(report.model.digest),
            },
            "policyDigest": clean_text(report.policy_digest),
            "seed": report.seed,
            "blindSpots": [clean_text(spot, _LONGEST_MESSAGE) for spot in decision.blind_spots],
        },
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _results(report: AuditReport) -> list[dict[str, Any]]:
    decision = report.decision
    about = "" if decision.suspected_class is None else str(decision.suspected_class)
    # Of each its code, what it is about (a class or a check, for the fingerprint), and its message.
    found: list[tuple[str, str, str]] = []
    if decision.verdict is not Verdict.PASS:
        found += [
            (reason.code, about, reason.message)
            for reason in decision.reasons
            if reason.code not in EVIDENCE and reason.code not in _OF_CHECKS
        ]
    for gap in not_measured(report):
        if gap.check in decision.not_measured:
            found.append(("check-not-measured", gap.check, _gap_words(gap)))
        elif gap.status == "failed":
            found.append(("check-failed", gap.check, _gap_words(gap)))
    if not found and decision.verdict is not Verdict.PASS:
        found = [(_UNEXPLAINED, about, verdict_sentence(report))]
    evidence = " ".join(reason.message for reason in decision.reasons if reason.code in EVIDENCE)
    seen: collections.Counter[str] = collections.Counter()
    results = []
    for place, (code, subject, message) in enumerate(found):
        fingerprint = hashlib.sha256("\n".join((code, subject, report.model.digest)).encode("utf-8", "replace")).hexdigest()[:32]
        seen[fingerprint] += 1
        results.append(
            {
                "ruleId": _rule_id(code),
                "level": "error" if place == 0 and decision.verdict is Verdict.FAIL else "warning",
                "message": {"text": _plain(f"{message} {evidence}" if place == 0 else message)},
                "locations": [{"physicalLocation": {"artifactLocation": {"uri": _location(report)}, "region": {"startLine": 1}}}],
                # The only name that GitHub reads, in the form that it has there: hash and running number.
                "partialFingerprints": {"primaryLocationLineHash": f"{fingerprint}:{seen[fingerprint]}"},
                "properties": {
                    "modelUri": clean_text(report.model.pinned_uri, None),
                    "modelDigest": clean_text(report.model.digest),
                },
            }
        )
    return results


def _notifications(report: AuditReport) -> list[dict[str, Any]]:
    """What was not measured; an error where that kept the audit from being complete."""
    needed = report.decision.not_measured
    notifications: list[dict[str, Any]] = [
        {
            "descriptor": {"id": f"check-{gap.status}"},
            "level": "error" if gap.status == "failed" or gap.check in needed else "note",
            "message": {"text": _plain(_gap_words(gap))},
            "properties": {"check": clean_text(gap.check)},
        }
        for gap in not_measured(report)
    ]
    if not report.outcomes:
        notifications.append({"descriptor": {"id": "check-missing"}, "level": "error", "message": {"text": "No check ran."}})
    return notifications


def _gap_words(gap: NotMeasured) -> str:
    return f"The check '{gap.check}' was not measured ({gap.status}). {gap.why}"


def _expectation_codes(report: AuditReport) -> list[str]:
    return [_rule_id(f"{CLEAN_SET}{item.name}") for item in report.clean_set.expectations if item.required]


def _rule(code: str, expectations: tuple[Expectation, ...]) -> dict[str, Any]:
    title, help_text = RULES.get(code, (f"The verdict's reason is '{code}'", "The message of the result says more."))
    for item in expectations:
        if code == _rule_id(f"{CLEAN_SET}{item.name}"):
            title = f"The clean images do not meet the expectation '{code.removeprefix(CLEAN_SET)}'"
            help_text = f"{_plain(item.description, 500)} Without that no model passes. Mend the clean images and audit again."
    rule: dict[str, Any] = {
        "id": code,
        "shortDescription": {"text": _plain(title)},
        "fullDescription": {"text": help_text},
        "help": {"text": help_text},
        "defaultConfiguration": {"level": "error" if code == "class-stands-out" else "warning"},
        "properties": {"tags": ["security", "backdoor"]},
    }
    if code == "class-stands-out":
        rule["properties"]["security-severity"] = "8.0"
    return rule


def _rule_id(code: str) -> str:
    return clean_text(code, _LONGEST_CODE)


def _location(report: AuditReport) -> str:
    """The file that holds the model, as a relative URI that is the same in every audit of it."""
    folder = _folder(report.model)
    inside = [_segment(part) for part in report.intake.data_path.split("/") if part]
    return "/".join(folder if folder[-1:] == inside else [*folder, *inside])


def _folder(model: ModelRef) -> list[str]:
    """Where the model is: ``models/<name>/<version>``, or the path that was given when that is a relative one."""
    scheme, separator, rest = model.pinned_uri.partition(":/")
    given = PurePosixPath(model.uri)
    if model.name is not None:
        parts = ["models", model.name, model.version or ""]
    elif separator and scheme in ("models", "runs"):
        parts = [scheme, *rest.split("/")]
    elif given.is_absolute() or ".." in given.parts:
        parts = ["models", PurePosixPath(model.pinned_uri).name]
    else:
        parts = list(given.parts)  # a model that lies in the repository is shown where it lies
    return [_segment(part) for part in parts if part]


def _segment(text: str) -> str:
    """One segment of a path, escaped as RFC 3986 asks; never '.' or '..'."""
    shown = clean_text(text, _LONGEST_SEGMENT)
    return "_" * len(shown) if set(shown) <= {"."} else quote(shown, safe="")


def _plain(text: str, limit: int = _LONGEST_MESSAGE) -> str:
    """A plain text message in which nothing is a link or a placeholder (SARIF 3.11.5 and 3.11.6)."""
    shown = clean_text(text, limit).strip()
    return shown.replace("](", "] (").replace("://", ":// ").replace("{", "{{").replace("}", "}}")
