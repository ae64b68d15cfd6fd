"""The report in a terminal, and as a short block for the description of the model version."""

from __future__ import annotations

import re
from collections.abc import Sequence

from audit_plugin.report.sanitise import clean_text, escape_markdown, markdown_code, shorten
from audit_plugin.report.summaries import flagged_count, headline_trigger
from audit_plugin.report.wording import (
    auroc,
    calibration_words,
    canary_words,
    candidate_label,
    check_title,
    class_label,
    class_words,
    decimal,
    interval,
    joined,
    measured_count,
    moment,
    not_measured,
    percent,
    seconds,
    verdict_advice,
    verdict_sentence,
    verdict_word,
)
from audit_plugin.types import AuditReport, InputScores, Measured, Rate, TriggerEvidence, Verdict, class_measurements

MOST_LINES = 25
LINE_WIDTH = 420
LONGEST_COMMAND = 1000
_LONGEST_URI = 200
MARKDOWN_LIMIT = 1500
_MOST_REASONS = 5
_MOST_SCORERS = 5
_MOST_BASELINES = 3
_MOST_GAPS = 6
_SAFE_LINK = re.compile(r"(?:https?://|/(?!/)|#)[A-Za-z0-9._:/?#@!$&+,;=%-]*")


def render_text(report: AuditReport) -> str:
    """A terse plain-text summary of at most 25 lines, without any control character but the line feed."""
    decision = report.decision
    lines = [
        f"{verdict_word(decision.verdict).upper()}  {clean_text(report.model.pinned_uri, _LONGEST_URI)}",
        f"  {verdict_sentence(report)}",
    ]
    if decision.suspected_class is not None:
        lines.append(_row("suspected class", class_label(report, decision.suspected_class)))
    trigger = headline_trigger(report)
    if trigger is not None:
        name = "oddest trigger" if decision.suspected_class is None else "its trigger"
        lines.append(_row(name, _trigger_words(report, trigger)))
    lines += _listed("because", [clean_text(reason.message, LINE_WIDTH) for reason in decision.reasons], _MOST_REASONS)
    scorers = [
        f"{check_title(check)}: {_scorer_words(scores)}{_baseline_words(scores)}" for check, scores in _input_scores(report)
    ]
    measured = [
        clean_text(f"{check_title(check)}: {class_words(report, check, found)}", LINE_WIDTH)
        for check, found in class_measurements(report.outcomes).items()
    ]
    lines += _listed("classes", measured, _MOST_SCORERS)
    lines += _listed("input checks", scorers, _MOST_SCORERS)
    if report.suspects:
        lines.append(_row("suspect inputs", f"{flagged_count(report)} of {len(report.suspects)} flagged by at least one check"))
    if report.canaries is not None:
        lines.append(_row("canaries", canary_words(report.canaries)))
    if report.calibration is not None and report.calibration.pool:
        lines.append(_row("clean models", clean_text(calibration_words(report.calibration), LINE_WIDTH)))
    gaps = [f"{clean_text(gap.check, 60)} ({gap.status}): {clean_text(gap.why, 120)}" for gap in not_measured(report)]
    if not report.outcomes:
        gaps.insert(0, "no check ran")
    lines += _listed("NOT MEASURED", gaps, _MOST_GAPS)
    lines += _listed("blind spots", [clean_text(spot, LINE_WIDTH) for spot in decision.blind_spots], _MOST_GAPS)
    lines += [
        _row("clean accuracy", _rate_words(report.clean_set.clean_accuracy, "test images")),
        _row("audited", f"{clean_text(report.model.digest, 80)} in {seconds(report.duration_seconds)}, seed {report.seed}"),
        _row("sandbox", report.isolation.summary if report.isolation else "none: the model ran in the caller's own process"),
    ]
    lines = [shorten(clean_text(line, None), LINE_WIDTH) for line in lines[: MOST_LINES - 1]]
    # Only the command keeps its length: half a command cannot be repeated.
    lines.append(_row("repeat", clean_text(report.command, LONGEST_COMMAND)))
    return "\n".join(lines) + "\n"


def render_markdown_block(report: AuditReport, link: str | None = None) -> str:
    """A Markdown block of at most 1,500 characters for the model version's description.

    ``link`` leads to the whole report; it must be an http(s) address or a path on the same server, anything else is left out.
    """
    decision = report.decision
    heading = f"### Backdoor audit: {verdict_word(decision.verdict).upper()}"
    closing = [
        f"- **Audited:** {markdown_code(report.model.digest[:19])} on {escape_markdown(moment(report.created), 40)}, "
        f"policy {markdown_code(report.policy_digest[:19])}, version {markdown_code(report.tool_version, 20)}"
    ]
    if link is not None and len(link) <= 400 and _SAFE_LINK.fullmatch(link):
        closing.append(f"\n[Open the report]({link})")
    lines: list[str] = []
    if decision.suspected_class is not None:
        lines.append(f"- **Suspected class:** {escape_markdown(class_label(report, decision.suspected_class), 80)}")
    trigger = headline_trigger(report)
    if trigger is not None and decision.verdict is Verdict.FAIL:
        lines.append(f"- **Recovered trigger:** {escape_markdown(_trigger_words(report, trigger), 220)}")
    gaps = not_measured(report)
    if gaps or not report.outcomes:
        named = [f"{gap.check} ({gap.status})" for gap in gaps[:_MOST_GAPS]]
        rest = [f"{len(gaps) - _MOST_GAPS} more"] if len(gaps) > _MOST_GAPS else []
        words = joined([*named, *rest]) if gaps else "no check ran"
        lines.append(f"- **Not measured:** {escape_markdown(words, 220)}")
    lines.append(
        f"- **Checks measured:** {measured_count(report)} of {len(report.outcomes)}; "
        f"**clean accuracy** {_rate_words(report.clean_set.clean_accuracy, 'images')}"
    )
    reasons = [f"- {escape_markdown(reason.message, 200)}" for reason in decision.reasons[:3]]
    scorers = [
        f"- **{escape_markdown(check_title(check), 60)}:** {escape_markdown(_scorer_words(scores), 120)}"
        for check, scores in _input_scores(report)[:_MOST_SCORERS]
    ]

    def assembled(body: Sequence[str]) -> str:
        return "\n".join([heading, "", _sentence(report), "", *body, *closing]) + "\n"

    # Escapes can double a hostile string's length: checks on inputs go first, then reasons and lines, the verdict never.
    body = [*lines, *reasons, *scorers]
    while len(assembled(body)) > MARKDOWN_LIMIT and body:
        body.pop()
    return assembled(body)


def _sentence(report: AuditReport) -> str:
    return escape_markdown(f"{verdict_sentence(report)} {verdict_advice(report.decision.verdict)}.")


def _row(name: str, value: str) -> str:
    return f"  {name:<17} {value}"


def _listed(name: str, items: Sequence[str], most: int) -> list[str]:
    """One row an item, the first one under ``name``; what does not fit is counted, not hidden."""
    shown = list(items) if len(items) <= most else [*items[: most - 1], f"... and {len(items) - most + 1} more"]
    return [_row(name if place == 0 else "", item) for place, item in enumerate(shown)]


def _rate_words(rate: Rate, of_what: str) -> str:
    return f"{percent(rate.value)} ({interval(rate)}; {rate.successes} of {rate.trials} {of_what})"


def _trigger_words(report: AuditReport, evidence: TriggerEvidence) -> str:
    return (
        f"{evidence.trigger.family}, {decimal(evidence.trigger.size)} pixels, to {candidate_label(report, evidence)}, "
        f"success {_rate_words(evidence.success, 'held-out images')}, outlier {decimal(evidence.outlier)}"
    )


def _input_scores(report: AuditReport) -> list[tuple[str, InputScores]]:
    return [
        (outcome.check, outcome.measurement)
        for outcome in report.outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
    ]


def _scorer_words(scores: InputScores) -> str:
    area = [] if scores.auroc is None else [f"AUROC {auroc(scores.auroc)}"]
    if not scores.thresholds:
        return ", ".join([*area, "no threshold"])
    first = scores.thresholds[0]
    found = "no trigger to detect" if first.detection_rate is None else f"detects {percent(first.detection_rate.value)}"
    return ", ".join([*area, found, f"false alarms {percent(first.false_positive_rate.value)} ({clean_text(first.rule, 60)})"])


def _baseline_words(scores: InputScores) -> str:
    """'; AUROC of baselines: l1 norm 0.913, l2 norm 0.871'; nothing where none was measured."""
    measured = [baseline for baseline in scores.baselines if baseline.auroc is not None]
    shown = [f"{clean_text(baseline.name, 30)} {auroc(baseline.auroc)}" for baseline in measured[:_MOST_BASELINES]]
    if len(measured) > _MOST_BASELINES:
        shown.append(f"{len(measured) - _MOST_BASELINES} more")
    return f"; AUROC of baselines: {', '.join(shown)}" if shown else ""
