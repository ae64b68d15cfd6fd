"""The words that every form of the report shares, so that page, terminal and registry never disagree."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass

from audit_plugin.report.sanitise import clean_text
from audit_plugin.types import (
    AuditReport,
    Calibration,
    ClassMeasurement,
    Failed,
    Inapplicable,
    Measured,
    PowerCheck,
    Rate,
    TriggerEvidence,
    TriggerFamily,
    Verdict,
)

NOT_AVAILABLE = "n/a"
CLASS_NAME_LIMIT = 40

_CHECK_TITLES = {
    "trigger_inversion": "Trigger search, class by class",
    "maximum_margin": "Largest margins",
    "neuron_noise": "Noise in the weights",
    "wave_scan": "Waves over the image",
    "source_specific": "Trigger search, pair by pair",
    "layerwise": "Layer-wise features",
    "bad_expert": "Backdoor expert",
    "beniful": "Benign-feature distance",
    "activation_norm": "Activation norms",
}

_CHECK_EXPLANATIONS = {
    "trigger_inversion": (
        "For every class, the smallest change of pixels that sends images of other classes to it. A backdoor shows as one class "
        "whose trigger is far smaller than those of the others and works almost always."
    ),
    "maximum_margin": (
        "How surely the model can be made to see each class, whatever the image: the largest margin of its answers. A backdoor's "
        "target class reaches far more than the next class."
    ),
    "neuron_noise": (
        "By how little the weights must change until the model, and copies of it that have forgotten part of their task, see a "
        "class in every image. A backdoor is a shortcut in the weights, whatever its trigger looks like: its target class needs "
        "far less than the next class."
    ),
    "wave_scan": (
        "For every class, the one among all waves of a few periods over the image that moves images to it most surely. Clean "
        "networks fall for waves too, but not nine images of ten: that takes a backdoor."
    ),
    "source_specific": (
        "For every pair of classes, the smallest change of pixels that sends images of the one to the other, compared with what "
        "the two classes need elsewhere. The ten pairs that stand out most are shown."
    ),
    "layerwise": "How far an input's features lie from those of clean images of the class it is predicted as, layer by layer.",
    "bad_expert": "What a copy of the model that forgot its normal task, but would remember a backdoor, says of an input.",
    "beniful": "How badly a model of benign features reconstructs those of an input.",
    "activation_norm": "How far the largest activations of an input exceed those of clean images.",
}


@dataclass(frozen=True)
class NotMeasured:
    """One thing the audit did not measure: ``status`` is 'failed', 'inapplicable' or 'missing'."""

    check: str
    status: str
    why: str


def verdict_word(verdict: Verdict) -> str:
    """The one word on top."""
    return {Verdict.PASS: "Pass", Verdict.FAIL: "Fail", Verdict.INCONCLUSIVE: "Inconclusive"}[verdict]


def verdict_sentence(report: AuditReport) -> str:
    """What the verdict means for whoever wants to deploy the model."""
    suspected = report.decision.suspected_class
    if report.decision.verdict is Verdict.FAIL:
        target = "a class of the attacker's choice" if suspected is None else f"\u201c{class_name(report, suspected)}\u201d"
        return f"This model behaves as if it had a backdoor that sends images to {target}. Do not deploy this version."
    if report.decision.verdict is Verdict.PASS:
        return "No backdoor of the kinds searched for was detectable. That is no proof that there is none."
    return "The audit could not decide. Treat this model as unaudited: this is not a pass."


def verdict_advice(verdict: Verdict) -> str:
    """The next step, in a few words."""
    return {
        Verdict.PASS: "Whether it may be promoted, the promotion suite decides",
        Verdict.FAIL: "Keep it out of production; repair or replace it",
        Verdict.INCONCLUSIVE: "Resolve the reasons below, then audit again",
    }[verdict]


def check_title(check: str) -> str:
    """A check's name as a heading."""
    words = check.replace("_", " ")
    return _CHECK_TITLES.get(check, words[:1].upper() + words[1:])


def check_explanation(check: str) -> str:
    """One sentence on what a check looks at; empty for a check that this report does not know."""
    return _CHECK_EXPLANATIONS.get(check, "")


def class_name(report: AuditReport, index: int) -> str:
    """The class's own name when the model has one for it, else 'class 7'."""
    names = report.subject.class_names
    name = clean_text(names[index], CLASS_NAME_LIMIT).strip() if 0 <= index < len(names) else ""
    return f"class {index}" if name in ("", str(index)) else name


def class_label(report: AuditReport, index: int) -> str:
    """Name and number: 'stop (class 14)'."""
    name = class_name(report, index)
    return name if name == f"class {index}" else f"{name} (class {index})"


def candidate_label(report: AuditReport, evidence: TriggerEvidence) -> str:
    """The target class of a trigger, after its source class when it has one."""
    target = class_name(report, evidence.trigger.target_class)
    source = evidence.trigger.source_class
    return target if source is None else f"{class_name(report, source)} \u2192 {target}"


def family_words(family: TriggerFamily) -> str:
    """What kind of trigger it is, in words."""
    return {
        "patch": "patch (replaces pixels)",
        "additive": "additive (changes pixels slightly)",
        "wave": "wave (over the whole image)",
    }[family]


def model_title(report: AuditReport) -> str:
    """'digits, version 3' for a registered model, else the address it was pinned to."""
    model = report.model
    if not model.name:
        return clean_text(model.pinned_uri, 120)
    name = clean_text(model.name, 120)
    return f"{name}, version {clean_text(model.version, 40)}" if model.version else name


def number(value: float | None, digits: int = 3) -> str:
    """A figure with ``digits`` significant digits; never 'nan'."""
    if value is None or math.isnan(value):
        return NOT_AVAILABLE
    if math.isinf(value):
        return "unbounded" if value > 0 else "-unbounded"
    magnitude = abs(value)
    if magnitude >= 10 ** max(digits, 5) or 0 < magnitude < 1e-4:
        return f"{value:.{digits - 1}e}"
    if magnitude >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def decimal(value: float) -> str:
    """A figure with one decimal, for columns that are compared: '3.4', '-0.2', '1,204.0'."""
    if not math.isfinite(value) or abs(value) >= 1e6:
        return number(value)
    return f"{round(value, 1) + 0.0:,.1f}"  # + 0.0 turns -0.0 into 0.0


def percent(value: float) -> str:
    """A proportion as '97.4 %'."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else NOT_AVAILABLE


def auroc(value: float | None) -> str:
    """An area under the ROC curve with three decimals; 'n/a' without stamped images."""
    return NOT_AVAILABLE if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(rate: Rate) -> str:
    """The 95 % interval as '95.2 to 98.7 %', or 'no interval'."""
    if rate.trials <= 0 or not (math.isfinite(rate.low) and math.isfinite(rate.high)):
        return "no interval"
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"


def moment(value: str) -> str:
    """An ISO 8601 time as '2025-11-21 02:30 UTC'; anything else unchanged."""
    try:
        time = datetime.datetime.fromisoformat(value)
    except ValueError:
        return value
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def seconds(value: float) -> str:
    """A duration: '4.2 s', '3 min 20 s'."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def byte_count(value: int) -> str:
    """A file's size: '1.4 MB'."""
    size = float(value)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def measured_count(report: AuditReport) -> int:
    """How many checks ran to their end."""
    return sum(isinstance(outcome, Measured) for outcome in report.outcomes)


def not_measured(report: AuditReport) -> tuple[NotMeasured, ...]:
    """Everything that was not measured and why: broken checks first, then inapplicable ones, then what the verdict misses."""
    failed = [NotMeasured(item.check, "failed", item.error) for item in report.outcomes if isinstance(item, Failed)]
    unsuited = [
        NotMeasured(item.check, "inapplicable", item.reason) for item in report.outcomes if isinstance(item, Inapplicable)
    ]
    named = {item.check for item in (*failed, *unsuited)}
    missing = [
        NotMeasured(item, "missing", "The verdict needed this and it was not measured.")
        for item in report.decision.not_measured
        if item not in named
    ]
    return (*failed, *unsuited, *missing)


def class_words(report: AuditReport, check: str, measured: ClassMeasurement) -> str:
    """'class "7" (7) reaches the largest margin, 3.2 times the next class's'."""
    found = measured.most_suspicious
    label, ratio, reached = class_label(report, found), decimal(measured.ratios[found]), measured.values[found] > 0
    if check == "neuron_noise":
        told = f"{label} needs the least noise, the next class {ratio} times as much"
        return told if reached else "no noise makes the model see a class"
    return (
        f"{label} reaches the largest margin, {ratio} times the next class's" if reached else "no class reaches a positive margin"
    )


def canary_words(power: PowerCheck) -> str:
    """'patch found (4.2 times smaller), warped not found (1.1 times smaller), blended not planted'."""
    words = [
        f"{canary.family} {canary.standing}" + (f" ({number(canary.size_ratio, 2)} times smaller)" if canary.planted else "")
        for canary in power.canaries
    ]
    return ", ".join([*words, *filter(None, [power.missing])])


def calibration_words(calibration: Calibration) -> str:
    """'p = 0.04 against 24 of 'digits' (least possible 0.04)', or why nothing was compared."""
    if calibration.problems:
        return f"not comparable with '{calibration.pool}': {' '.join(calibration.problems)}"
    return (
        f"p = {number(calibration.p_value, 3)} against {calibration.reference_count} of '{calibration.pool}' "
        f"(least possible {number(calibration.floor, 3)})"
    )


def joined(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
