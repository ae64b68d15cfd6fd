"""``summary.md``: the audit on one screen, for the summary of a CI job or a comment on a pull request (GitHub's Markdown)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from audit_plugin.report.sanitise import clean_text, escape_markdown, markdown_code
from audit_plugin.report.summaries import by_suspicion, flagged_count
from audit_plugin.report.wording import (
    auroc,
    candidate_label,
    check_title,
    class_label,
    class_words,
    decimal,
    interval,
    moment,
    not_measured,
    percent,
    seconds,
    verdict_advice,
    verdict_sentence,
    verdict_word,
)
from audit_plugin.types import AuditReport, ClassMeasurement, InputScores, Measured, Outcome, Rate, TriggerSearch

_MOST_LINES = 30
_LONGEST_COMMAND = 4000


def render_markdown(report: AuditReport) -> str:
    """The summary: verdict and reasons, what each check measured, what was not measured, how to repeat it.

    Nothing that comes from the model can become a link, a picture, a mention, a formula or HTML.
    """
    decision = report.decision
    lines = [
        f"## Backdoor audit: {verdict_word(decision.verdict).upper()}",
        "",
        markdown_code(report.model.pinned_uri, 200),
        "",
        _escaped(f"{verdict_sentence(report)} {verdict_advice(decision.verdict)}."),
        "",
    ]
    if decision.suspected_class is not None:
        lines.append(f"- **Suspected class:** {_escaped(class_label(report, decision.suspected_class))}")
    lines.append(f"- **Clean accuracy:** {_rate(report.clean_set.clean_accuracy)} test images")
    if report.suspects:
        lines.append(f"- **Suspect inputs:** {flagged_count(report)} of {len(report.suspects)} flagged by at least one check")
    lines += _section("Reasons", [_escaped(reason.message) for reason in decision.reasons])
    lines += ["", "### Checks", "", "| Check | Status | Measured |", "|---|---|---|"]
    lines += [_row(report, outcome) for outcome in report.outcomes]
    gaps = [f"**{_escaped(check_title(gap.check))}** ({gap.status}): {_escaped(gap.why)}" for gap in not_measured(report)]
    broken = [
        f"{_escaped(item.description)} Found: {_escaped(item.observed)} ({'required' if item.required else 'advice'})"
        for item in report.clean_set.expectations
        if not item.success
    ]
    lines += _section("Not measured", gaps if report.outcomes else ["No check ran.", *gaps])
    lines += _section("Not met by the clean images", broken)
    lines += _section("Blind spots", [_escaped(spot) for spot in decision.blind_spots])
    command = clean_text(report.command, _LONGEST_COMMAND)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    lines += ["", "### Repeat", "", f"{fence}sh", command, fence, ""]
    lines.append(
        f"Files {markdown_code(report.model.digest, 80)}, policy {markdown_code(report.policy_digest, 80)}, "
        f"seed {report.seed}, version {markdown_code(report.tool_version, 20)}, {_escaped(moment(report.created))}, "
        f"{seconds(report.duration_seconds)}"
    )
    return "\n".join(lines) + "\n"


def _section(heading: str, items: Sequence[str]) -> list[str]:
    """A list under a heading; nothing without items. What does not fit is counted, not hidden."""
    if not items:
        return []
    shown = list(items[:_MOST_LINES])
    if len(items) > len(shown):
        shown.append(f"... and {len(items) - len(shown)} more")
    return ["", f"### {heading}", "", *(f"- {item}" for item in shown)]


def _row(report: AuditReport, outcome: Outcome) -> str:
    title = _escaped(check_title(outcome.check))
    if not isinstance(outcome, Measured):
        return f"| {title} | **{type(outcome).__name__.lower()}** | see below |"
    if isinstance(outcome.measurement, TriggerSearch):
        return f"| {title} | measured | {_search_words(report, outcome.measurement)} |"
    if isinstance(outcome.measurement, ClassMeasurement):
        return f"| {title} | measured | {_escaped(class_words(report, outcome.check, outcome.measurement))} |"
    return f"| {title} | measured | {_scorer_words(outcome.measurement)} |"


def _search_words(report: AuditReport, search: TriggerSearch) -> str:
    if not search.candidates:
        return "no trigger found"
    found = by_suspicion(search.candidates)[0]
    return (
        f"oddest trigger: {found.trigger.family}, {decimal(found.trigger.size)} pixels, to "
        f"{_escaped(candidate_label(report, found))}, outlier {decimal(found.outlier)}; success {_rate(found.success)} "
        "held-out images"
    )


def _scorer_words(scores: InputScores) -> str:
    area = [] if scores.auroc is None else [f"AUROC {auroc(scores.auroc)}"]
    if not scores.thresholds:
        return "; ".join([*area, "no threshold"])
    first = scores.thresholds[0]
    found = "no trigger to detect" if first.detection_rate is None else f"detects {_rate(first.detection_rate)} stamped images"
    alarms = f"false alarms {_rate(first.false_positive_rate)} clean images ({_escaped(first.rule, 60)})"
    return "; ".join([*area, found, alarms])


def _rate(rate: Rate) -> str:
    """'97.4 % (95.2 to 98.7 %) of 500'; what is counted follows."""
    return f"{percent(rate.value)} ({interval(rate)}) of {rate.trials}"


def _escaped(text: str, limit: int = 300) -> str:
    """``text`` as it is, on GitHub too: there a name after '@' is a mention, a number after '#' a link, '$' begins a formula."""
    shown = re.sub(r"([@#])(?=\w)", r"\1 ", clean_text(text, limit))
    return escape_markdown(shown, None).replace("$", "&#36;")
