"""``report.json``: the audit as plain JSON, described by ``report.schema.json`` (JSON Schema, draft 2020-12).

Arrays are summarised (quantiles and a histogram for scores, a picture for triggers); attention maps are in the page only. JSON
has no NaN: what is not finite becomes ``null``. The schema itself says that a ``pass`` has at least one outcome and no failed
one, so that no consumer is shown the contrary.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import jsonschema
import numpy as np

from audit_plugin.errors import UsageError
from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.summaries import Moments, distribution_histogram, moments, quantiles, score_histogram, trigger_pictures
from audit_plugin.types import (
    AuditReport,
    Baseline,
    ClassMeasurement,
    CleanSetSummary,
    Distribution,
    Failed,
    FloatArray,
    Inapplicable,
    InputScores,
    Intake,
    Measurement,
    ModelRef,
    Outcome,
    PowerCheck,
    Profile,
    Rate,
    Runtime,
    SubjectSummary,
    Threshold,
    TriggerEvidence,
    TriggerSearch,
)

SCHEMA_VERSION = "1.0"
TOOL_NAME = "mlflow-backdoor-audit"
LARGEST_FILE = 64 * 1024 * 1024
_LARGEST_ARRAY = 256

# Picture paths in the order of the candidates of all outcomes, consumed while the outcomes are written.
_Pictures: TypeAlias = Iterator[str]


def to_document(report: AuditReport) -> dict[str, Any]:
    """The report as JSON values, valid under the schema."""
    names = report.subject.class_names
    decision = report.decision
    pictures = (path for path, _ in trigger_pictures(report))
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": TOOL_NAME, "version": report.tool_version},
        "created": report.created,
        "seed": report.seed,
        "command": report.command,
        "duration_seconds": _number(report.duration_seconds),
        "decision": {
            "verdict": decision.verdict.value,
            "suspected_class": _class(names, decision.suspected_class),
            "reasons": [{"code": reason.code, "message": reason.message} for reason in decision.reasons],
            "not_measured": list(decision.not_measured),
            "blind_spots": list(decision.blind_spots),
        },
        "model": _model(report.model),
        "intake": _intake(report.intake),
        "subject": _subject(report.subject),
        "clean_set": _clean_set(report.clean_set),
        "outcomes": [_outcome(outcome, names, pictures) for outcome in report.outcomes],
        "examples": None
        if report.examples is None
        else {
            "clean_predictions": [_class(names, index) for index in report.examples.clean_predictions],
            "stamped_predictions": [_class(names, index) for index in report.examples.stamped_predictions],
        },
        "suspects": [
            {
                "source": suspect.source,
                "predicted_class": _class(names, suspect.predicted_class),
                "scores": {check: _number(score) for check, score in suspect.scores.items()},
                "flagged": {check: bool(flag) for check, flag in suspect.flagged.items()},
            }
            for suspect in report.suspects
        ],
        "runtime": _runtime(report.runtime),
        "isolation": None if report.isolation is None else dataclasses.asdict(report.isolation),
        "canaries": None if report.canaries is None else _power_check(report.canaries, names),
        "calibration": None if report.calibration is None else plain_json(dataclasses.asdict(report.calibration)),
        "stages": [{"name": stage.name, "seconds": _number(stage.seconds)} for stage in report.stages],
        "policy": plain_json(report.policy),
        "policy_digest": report.policy_digest,
    }


def validate(document: object) -> None:
    """Raise ``UsageError`` that names the first place where ``document`` departs from the schema."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"Expected an audit report of schema version '{SCHEMA_VERSION}', got {clean_text(repr(version), 60)}. "
            "Read it with the version of the tool that wrote it, or audit again."
        )
    error = jsonschema.exceptions.best_match(_validator().iter_errors(document))
    if error is not None:
        raise UsageError(f"Not a valid audit report: {error.json_path}: {clean_text(error.message, 300)}")


def dumps(document: Mapping[str, Any]) -> str:
    """``document`` as indented ASCII JSON, so that no control character of a name reaches whoever prints the file."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def load(path: Path) -> dict[str, Any]:
    """Read and validate a ``report.json``; raises ``UsageError`` for anything else."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UsageError(f"'{clean_text(path)}' has {size:,} bytes; an audit report has at most {LARGEST_FILE:,}.")
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"Cannot read the audit report '{clean_text(path)}': {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"'{clean_text(path)}' is no audit report, because it is no JSON: {clean_text(error)}.") from error
    validate(document)
    result: dict[str, Any] = document
    return result


def plain_json(value: Any) -> Any:
    """``value`` (facts, policies) as JSON values: tuples become lists, non-finite numbers null, large arrays their shape."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, enum.Enum):
        return plain_json(value.value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return _number(float(value))
    if isinstance(value, np.ndarray):
        if value.size > _LARGEST_ARRAY:
            return {"shape": list(value.shape), "dtype": str(value.dtype)}
        return plain_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_json(item) for item in value), key=str)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, PurePath):
        return value.as_posix()
    return str(value)


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    text = importlib.resources.files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _refuse_constant(name: str) -> float:
    raise UsageError(f"Not a valid audit report: it contains {name}, which JSON does not have.")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _class(names: Sequence[str], index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    return {"index": int(index), "name": names[index] if 0 <= index < len(names) else None}


def _power_check(power: PowerCheck, names: Sequence[str]) -> dict[str, Any]:
    return {
        "missing": power.missing,
        "results": [
            {
                "family": canary.family,
                "target_class": _class(names, canary.target_class),
                "standing": canary.standing,
                "attack_success": _rate(canary.attack_success),
                "accuracy_before": _rate(canary.accuracy_before),
                "accuracy_after": _rate(canary.accuracy_after),
                "outlier": _number(canary.outlier),
                "size_ratio": _number(canary.size_ratio),
                "seconds": _number(canary.seconds),
                "reason": canary.reason,
            }
            for canary in power.canaries
        ],
    }


def _rate(rate: Rate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    return {
        "value": _number(rate.value),
        "successes": int(rate.successes),
        "trials": int(rate.trials),
        "low": _number(rate.low),
        "high": _number(rate.high),
    }


def _model(model: ModelRef) -> dict[str, Any]:
    return {
        "uri": model.uri,
        "pinned_uri": model.pinned_uri,
        "digest": model.digest,
        "name": model.name,
        "version": model.version,
        "model_id": model.model_id,
        "run_id": model.run_id,
        "tags": {str(key): str(value) for key, value in model.tags.items()},
        "manifest": [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in model.manifest],
    }


def _intake(intake: Intake) -> dict[str, Any]:
    signature = intake.signature
    return {
        "flavour": intake.flavour,
        "data_path": intake.data_path,
        "signature": None
        if signature is None
        else {
            "input_shape": list(signature.input_shape),
            "input_dtype": signature.input_dtype,
            "output_shape": None if signature.output_shape is None else list(signature.output_shape),
        },
        "findings": [{"path": finding.path, "message": finding.message, "code": finding.code} for finding in intake.findings],
    }


def _subject(subject: SubjectSummary) -> dict[str, Any]:
    spec = subject.input_spec
    return {
        "flavour": subject.flavour,
        "input": {
            "height": spec.height,
            "width": spec.width,
            "channels": spec.channels,
            "layout": spec.layout,
            "low": _number(spec.low),
            "high": _number(spec.high),
            "mean": [_number(value) for value in spec.mean],
            "std": [_number(value) for value in spec.std],
        },
        "class_names": list(subject.class_names),
        "parameter_count": subject.parameter_count,
        "taps": list(subject.taps),
        "batch_size": subject.batch_size,
    }


def _clean_set(clean_set: CleanSetSummary) -> dict[str, Any]:
    return {
        "source": clean_set.source,
        "digest": clean_set.digest,
        "fit_count": clean_set.fit_count,
        "calibrate_count": clean_set.calibrate_count,
        "test_count": clean_set.test_count,
        "images_per_class": [int(count) for count in clean_set.images_per_class],
        "clean_accuracy": _rate(clean_set.clean_accuracy),
        "expectations": [
            {
                "name": item.name,
                "description": item.description,
                "success": item.success,
                "observed": item.observed,
                "required": item.required,
            }
            for item in clean_set.expectations
        ],
        "notes": list(clean_set.notes),
    }


def _runtime(runtime: Runtime) -> dict[str, Any]:
    return {
        "provider": runtime.provider,
        "versions": {str(package): str(version) for package, version in runtime.versions.items()},
        "parity": [{"tap": item.tap, "relative_difference": _number(item.relative_difference)} for item in runtime.parity],
        "parity_tolerance": _number(runtime.parity_tolerance),
    }


def _outcome(outcome: Outcome, names: Sequence[str], pictures: _Pictures) -> dict[str, Any]:
    if isinstance(outcome, Inapplicable):
        return {"check": outcome.check, "status": "inapplicable", "reason": outcome.reason}
    if isinstance(outcome, Failed):
        return {"check": outcome.check, "status": "failed", "error": outcome.error}
    measurement = outcome.measurement
    return {
        "check": outcome.check,
        "status": "measured",
        "seconds": _number(outcome.seconds),
        "measurement": _measurement(measurement, names, pictures),
    }


def _measurement(measurement: Measurement, names: Sequence[str], pictures: _Pictures) -> dict[str, Any]:
    if isinstance(measurement, TriggerSearch):
        return _trigger_search(measurement, names, pictures)
    if isinstance(measurement, ClassMeasurement):
        return {
            "kind": "class_measurement",
            "classes": [
                {"class": _class(names, index), "value": _number(value), "ratio": _number(ratio)}
                for index, (value, ratio) in enumerate(zip(measurement.values, measurement.ratios, strict=True))
            ],
        }
    return _input_scores(measurement, names)


def _trigger_search(search: TriggerSearch, names: Sequence[str], pictures: _Pictures) -> dict[str, Any]:
    return {
        "kind": "trigger_search",
        "steps": search.steps,
        "searches": search.searches,
        "classes_skipped": [int(index) for index in search.classes_skipped],
        "candidates": [_candidate(candidate, names, next(pictures)) for candidate in search.candidates],
    }


def _candidate(candidate: TriggerEvidence, names: Sequence[str], picture: str) -> dict[str, Any]:
    trigger = candidate.trigger
    return {
        "target_class": _class(names, trigger.target_class),
        "source_class": _class(names, trigger.source_class),
        "family": trigger.family,
        "size": _number(trigger.size),
        "success": _rate(candidate.success),
        "outlier": _number(candidate.outlier),
        "size_ratio": _number(candidate.size_ratio),
        "picture": picture,
    }


def _input_scores(scores: InputScores, names: Sequence[str]) -> dict[str, Any]:
    histogram = score_histogram(scores)
    return {
        "kind": "input_scores",
        "stamped_class": _class(names, scores.stamped_class),
        "auroc": None if scores.auroc is None else _number(scores.auroc),
        "clean": _score_quantiles(scores.clean),
        "stamped": _score_quantiles(scores.stamped),
        "histogram": None
        if histogram is None
        else {"edges": list(histogram.edges), "clean": list(histogram.clean), "stamped": list(histogram.stamped)},
        "thresholds": [_threshold(threshold) for threshold in scores.thresholds],
        "baselines": [_baseline(baseline) for baseline in scores.baselines],
        "profile": None if scores.profile is None else _profile(scores.profile, names),
        "distributions": [_distribution(distribution) for distribution in scores.distributions],
        "facts": plain_json(scores.facts),
    }


def _baseline(baseline: Baseline) -> dict[str, Any]:
    return {
        "name": baseline.name,
        "auroc": None if baseline.auroc is None else _number(baseline.auroc),
        "threshold": None if baseline.threshold is None else _threshold(baseline.threshold),
    }


def _distribution(distribution: Distribution) -> dict[str, Any]:
    histogram = distribution_histogram(distribution)
    return {
        "quantity": distribution.quantity,
        "clean": _moments(moments(distribution.clean)),
        "stamped": _moments(moments(distribution.stamped)),
        "suspects": _moments(moments(distribution.suspects)),
        "histogram": None
        if histogram is None
        else {
            "edges": list(histogram.edges),
            "clean": list(histogram.clean),
            "stamped": list(histogram.stamped),
            "suspects": list(histogram.suspects),
        },
    }


def _moments(values: Moments) -> dict[str, Any]:
    return {
        "count": values.count,
        "not_finite": values.not_finite,
        "mean": values.mean,
        "standard_deviation": values.standard_deviation,
    }


def _score_quantiles(scores: FloatArray) -> dict[str, Any]:
    finite = int(np.isfinite(scores).sum())
    return {"count": int(scores.size), "not_finite": int(scores.size) - finite, "quantiles": quantiles(scores)}


def _threshold(threshold: Threshold) -> dict[str, Any]:
    return {
        "rule": threshold.rule,
        "value": _number(threshold.value),
        "false_positive_rate": _rate(threshold.false_positive_rate),
        "detection_rate": _rate(threshold.detection_rate),
    }


def _profile(profile: Profile, names: Sequence[str]) -> dict[str, Any]:
    return {
        "quantity": profile.quantity,
        "class": _class(names, profile.class_index),
        "layers": list(profile.layers),
        "clean": [_number(value) for value in profile.clean],
        "clean_spread": [_number(value) for value in profile.clean_spread],
        "stamped": [_number(value) for value in profile.stamped],
    }
