"""The promotion policy: an editable great-expectations suite over the outcomes of one audit, which decides beyond the verdict.

The table has one row, the audit, and a column for each figure (``layerwise_false_positive_rate``), the same in every audit. It is
drawn from the report as JSON, so that a ``report.json`` is judged as the audit itself was.

It fails closed, where great-expectations alone would not: what was not measured meets no expectation, and only types and
arguments are known that say something about a single row. ``mostly`` or a ``row_condition`` would let that row pass unseen.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from audit_plugin.canonical import document_digest
from audit_plugin.data.expectations import build_expectation, ephemeral_context, exception_message
from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.policy import SCORERS
from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.schema import to_document
from audit_plugin.types import AuditReport, Expectation, Verdict

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped, unused-ignore]

Kind = Literal["number", "text"]

SEARCHES: Mapping[str, str] = {"wave_scan": "wave", "trigger_inversion": "trigger", "source_specific": "pair_trigger"}
"""The checks that search for triggers, with what the columns of their triggers begin with."""
CLASS_MEASURES: Mapping[str, str] = {
    "maximum_margin": "The largest margin of a class over the next class's.",
    "neuron_noise": "The noise in the weights that the next class needs over the least.",
}
"""The checks that measure classes, with what their ratio is."""

_NOT_RUN = "not run"
_LARGEST_FILE = 1024 * 1024


# -------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Column:
    """One column of the table: what it means, and what it can hold.

    Attributes:
        kind: texts are always there, a number is NaN where it was not measured.
        values: the only texts that occur; empty where there may be others.
        low, high: the range of a number.
        check: the check that measures it, or None.
    """

    meaning: str
    kind: Kind = "number"
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = math.inf
    check: str | None = None


def _columns() -> dict[str, Column]:
    columns = {
        "verdict": Column("The audit's verdict.", "text", tuple(Verdict)),
        "checks_measured": Column("How many checks measured."),
        "checks_failed": Column("How many checks broke."),
        "required_checks_not_measured": Column("How many checks that the policy requires did not measure."),
        "clean_accuracy": Column("Accuracy on the clean test images.", high=1.0),
        "clean_accuracy_low": Column("Lower end of its 95 % interval.", high=1.0),
        "clean_images": Column("Clean images that were used, in all three splits."),
        "test_images": Column("Those of the test split, on which rates are measured."),
        "fewest_images_per_class": Column("Clean images of the class that has fewest."),
        "highest_false_positive_rate": Column(
            "Highest false-positive rate of the checks on inputs that measured; NaN if one of them has none.", high=1.0
        ),
        "flagged_suspects": Column("Share of the suspect inputs that a check flags; NaN without suspect inputs.", high=1.0),
        "flavour": Column("Form of the model's file.", "text", ("pt2", "onnx", "state_dict", "pickle")),
        "provider": Column("ONNX Runtime's execution provider, for example CPUExecutionProvider.", "text"),
        "tool_version": Column("Version of the tool that audited.", "text"),
        "seconds": Column("Duration of the audit, in seconds."),
    }
    for check in (*CLASS_MEASURES, *SEARCHES, *SCORERS):
        statuses = ("measured", "inapplicable", "failed", _NOT_RUN)
        columns[f"{check}_status"] = Column("What became of the check.", "text", statuses)
    for check, meaning in CLASS_MEASURES.items():
        columns[f"{check}_ratio"] = Column(meaning, high=100.0, check=check)
    for check, name in SEARCHES.items():
        columns |= {
            f"{name}_outlier": Column(
                "By how many deviations the class of the oddest trigger stands out.", low=-math.inf, check=check
            ),
            f"{name}_attack_success_rate": Column("Share of held-out images that it moves.", high=1.0, check=check),
            f"{name}_size_pixels": Column("Its size in pixels, the L1 norm of its mask.", check=check),
        }
    for check in SCORERS:
        columns |= {
            f"{check}_false_positive_rate": Column("Share of clean test images that it flags.", high=1.0, check=check),
            f"{check}_detection_rate": Column("Share of images with the oddest trigger that it flags.", high=1.0, check=check),
            f"{check}_auroc": Column(
                "Area under the ROC curve of images with the oddest trigger against clean ones.", high=1.0, check=check
            ),
        }
    return columns


COLUMNS: Mapping[str, Column] = _columns()
"""Every column of the table by name, in its order."""


def outcome_table(report: AuditReport) -> pandas.DataFrame:
    """The audit as a frame of one row, with the columns of ``COLUMNS``."""
    return _frame(_row(to_document(report)))


def _row(document: Mapping[str, Any]) -> dict[str, float | str]:
    """The values by column, from a report's JSON document."""
    outcomes, clean_set, suspects = document["outcomes"], document["clean_set"], document["suspects"]
    statuses = [outcome["status"] for outcome in outcomes]
    row: dict[str, float | str] = {name: _NOT_RUN if _NOT_RUN in column.values else math.nan for name, column in COLUMNS.items()}
    row |= {
        "verdict": document["decision"]["verdict"],
        "checks_measured": float(statuses.count("measured")),
        "checks_failed": float(statuses.count("failed")),
        "required_checks_not_measured": float(len(document["decision"]["not_measured"])),
        "clean_accuracy": _number(clean_set["clean_accuracy"]["value"]),
        "clean_accuracy_low": _number(clean_set["clean_accuracy"]["low"]),
        "clean_images": float(clean_set["fit_count"] + clean_set["calibrate_count"] + clean_set["test_count"]),
        "test_images": float(clean_set["test_count"]),
        "fewest_images_per_class": float(min(clean_set["images_per_class"], default=0)),
        "flavour": document["subject"]["flavour"],
        "provider": document["runtime"]["provider"],
        "tool_version": document["tool"]["version"],
        "seconds": _number(document["duration_seconds"]),
    }
    if suspects:
        row["flagged_suspects"] = sum(any(suspect["flagged"].values()) for suspect in suspects) / len(suspects)
    false_positive_rates = []
    for outcome in outcomes:
        check, measurement = outcome["check"], outcome.get("measurement")
        if f"{check}_status" in row:
            row[f"{check}_status"] = outcome["status"]
        if measurement is None:
            continue
        if measurement["kind"] == "input_scores":
            figures = _scorer_figures(measurement)
            false_positive_rates.append(figures["false_positive_rate"])
            prefix = check if check in SCORERS else None
        elif measurement["kind"] == "class_measurement":
            figures = {"ratio": max((entry["ratio"] for entry in measurement["classes"]), default=math.nan)}
            prefix = check if check in CLASS_MEASURES else None
        else:
            figures = _search_figures(measurement)
            prefix = SEARCHES.get(check)
        if prefix is not None:
            row |= {f"{prefix}_{name}": value for name, value in figures.items()}
    if false_positive_rates and not any(map(math.isnan, false_positive_rates)):
        row["highest_false_positive_rate"] = max(false_positive_rates)
    return row


def _scorer_figures(measurement: Mapping[str, Any]) -> dict[str, float]:
    """At the first threshold, which flags suspect inputs."""
    first: Mapping[str, Any] = next(iter(measurement["thresholds"]), {})
    return {
        "false_positive_rate": _rate(first.get("false_positive_rate")),
        "detection_rate": _rate(first.get("detection_rate")),
        "auroc": _number(measurement["auroc"]),
    }


def _search_figures(measurement: Mapping[str, Any]) -> dict[str, float]:
    compared = [candidate for candidate in measurement["candidates"] if candidate["outlier"] is not None]
    if not compared:
        return {}
    oddest = max(compared, key=_suspicion)
    return {
        "outlier": float(oddest["outlier"]),
        "attack_success_rate": _rate(oddest["success"]),
        "size_pixels": _number(oddest["size"]),
    }


def _suspicion(candidate: Mapping[str, Any]) -> tuple[float, float]:
    """As :attr:`audit_plugin.types.TriggerEvidence.suspicion`, of one in a document."""
    ratio = candidate["size_ratio"]
    return candidate["outlier"], -candidate["size"] if ratio is None else ratio


def _rate(rate: Mapping[str, Any] | None) -> float:
    return _number(None if rate is None else rate["value"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _frame(row: Mapping[str, float | str]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([row], columns=list(COLUMNS))


# -------------------------------------------------------------------------------------------------------- the suite


@dataclass(frozen=True)
class PromotionSuite:
    """Expectations as great-expectations writes them, ``{"type", "kwargs", "meta", "description"}``; all must be met.

    In ``meta``, ``name`` is the short name for reports. A ``severity`` is not looked at.
    """

    expectations: tuple[Mapping[str, Any], ...]

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of what decides: types and arguments, in their order. To reword a description changes nothing."""
        decisive = [{"type": spec.get("type"), "kwargs": spec.get("kwargs")} for spec in self.expectations]
        return document_digest(decisive)


@dataclass(frozen=True)
class _Type:
    """A type of expectation that may be used: the kind of its columns, its arguments, and those of them that name columns."""

    kind: Kind
    options: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("column",)


_TYPES: Mapping[str, _Type] = {
    "expect_column_values_to_be_between": _Type("number", ("min_value", "max_value", "strict_min", "strict_max")),
    "expect_column_values_to_not_be_null": _Type("number"),
    "expect_column_pair_values_a_to_be_greater_than_b": _Type("number", ("or_equal",), ("column_A", "column_B")),
    "expect_column_values_to_be_in_set": _Type("text", ("value_set",)),
    "expect_column_values_to_not_be_in_set": _Type("text", ("value_set",)),
    "expect_column_values_to_match_regex": _Type("text", ("regex",)),
}


def default_suite_text() -> str:
    """The shipped suite, as JSON text."""
    return importlib.resources.files("audit_plugin.data").joinpath("promotion.json").read_text(encoding="utf-8")


def load_suite(path: Path | None) -> PromotionSuite:
    """Read a suite, a list of expectations or an object with ``expectations``; without a path the shipped one.

    Does not import great-expectations; what only that can find out, :func:`check_suite` does.

    Raises:
        UsageError: the file is missing, is no JSON or no suite, or holds no expectation, or one of an unknown type or with an
            unknown argument, column or value.
    """
    if path is None:
        return _suite(json.loads(default_suite_text()))
    shown = clean_text(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"The promotion suite '{shown}' is larger than {_LARGEST_FILE // 1024} kB.")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no promotion suite '{shown}'. 'backdoor-audit policy init' writes one to begin with."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"The promotion suite '{shown}' is no readable JSON file: {clean_text(error)}.") from error
    return _suite(content)


def check_suite(suite: PromotionSuite) -> None:
    """Let great-expectations build every expectation and evaluate it once on made-up values. Imports it, which takes seconds.

    Raises:
        UsageError: there is none, or one cannot be evaluated; the message names it by its place in the suite.
    """
    if not suite.expectations:
        raise UsageError(_EMPTY)
    specimen: dict[str, float | str] = {
        name: 0.5 if column.kind == "number" else next(iter(column.values), "text") for name, column in COLUMNS.items()
    }
    for place, spec in enumerate(suite.expectations, start=1):
        try:
            _check_expectation(place, spec)
            _holds(place, spec, _frame(specimen))
        except AuditError as error:
            raise UsageError(str(error)) from error


_EMPTY = "The promotion suite is empty and would let everything pass; give at least one expectation."


def _suite(content: Any) -> PromotionSuite:
    expectations = content.get("expectations") if isinstance(content, Mapping) else content
    if not isinstance(expectations, list):
        raise UsageError("Expected a promotion suite: a list of expectations, or an object that holds it as 'expectations'.")
    if not expectations:
        raise UsageError(_EMPTY)
    for place, spec in enumerate(expectations, start=1):
        _check_expectation(place, spec)
    return PromotionSuite(tuple(expectations))


def _check_expectation(place: int, spec: Any) -> None:
    """Raise UsageError for whatever is wrong with it that can be said without great-expectations."""
    problem = _problem(spec)
    if problem is not None:
        raise UsageError(f"{_called(place)} {problem}")


def _problem(spec: Any) -> str | None:
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    kwargs = spec.get("kwargs") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str) or not isinstance(kwargs, Mapping):
        return 'must be an object with a text "type" and an object "kwargs".'
    if kind not in _TYPES:
        return f"is of a type that cannot be used here: {_quoted(kind)}.{nearest(kind, _TYPES)}"
    known = _TYPES[kind]
    arguments = (*known.columns, *known.options)
    for argument in kwargs:
        if argument not in arguments:
            return f"({kind}) has an argument that cannot be used here: {_quoted(argument)}.{nearest(argument, arguments)}"
    for argument in known.columns:
        if argument not in kwargs:
            return f"({kind}) lacks the argument '{argument}', which names a column."
        name = kwargs[argument]
        if not isinstance(name, str) or name not in COLUMNS:
            return f"({kind}) names the unknown column {_quoted(name)}.{nearest(str(name), COLUMNS)}"
        if COLUMNS[name].kind != known.kind:
            fitting = ", ".join(other for other in _TYPES if _TYPES[other].kind == COLUMNS[name].kind)
            return f"({kind}) does not fit the column '{name}', a {COLUMNS[name].kind}. Use one of {fitting}."
    column = COLUMNS[kwargs[known.columns[0]]]
    if "value_set" in known.options:
        return _value_set_problem(kwargs.get("value_set"), column)
    problems = (_bound_problem(bound, kwargs.get(bound), column) for bound in ("min_value", "max_value"))
    return next((problem for problem in problems if problem is not None), None)


def _bound_problem(name: str, value: Any, column: Column) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must have a number as {name}, got {_quoted(value)}."
    if not column.low <= value <= column.high:
        hint = " 0.2 means 20 %." if column.high == 1 else ""
        return f"has the {name} {_quoted(value)}, which lies outside of the column's range, {range_words(column)}.{hint}"
    return None


def _value_set_problem(values: Any, column: Column) -> str | None:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return f"must have a list of texts as value_set, at least one; got {_quoted(values)}."
    for value in values:
        if column.values and value not in column.values:  # in a list of what is forbidden, a typing error would forbid nothing
            return f"has a value in its value_set that the column never holds: {_quoted(value)}.{nearest(value, column.values)}"
    return None


def range_words(column: Column) -> str:
    """What a column can hold: '0 to 1', '0 or more', 'any number', or its texts."""
    if column.kind == "text":
        return ", ".join(column.values) or "any text"
    if math.isinf(column.low):
        return "any number"
    return f"{column.low:g} or more" if math.isinf(column.high) else f"{column.low:g} to {column.high:g}"


def _called(place: int) -> str:
    return f"Expectation {place} of the promotion suite"


def _quoted(value: object) -> str:
    return clean_text(repr(value), 80)


def _refuse_constant(name: str) -> float:
    raise UsageError(f"The promotion suite contains {name}, which JSON does not have.")


# -------------------------------------------------------------------------------------------------------- the judgment


@dataclass(frozen=True)
class Promotion:
    """What a suite makes of an audit.

    ``allowed`` is true only if every expectation was evaluated and met; ``results`` are in the suite's order.
    """

    allowed: bool
    suite_digest: str
    results: tuple[Expectation, ...]


def judge(report: AuditReport, suite: PromotionSuite) -> Promotion:
    """Evaluate the suite on an audit. Imports great-expectations, which takes seconds.

    Never raises because of the suite: what cannot be evaluated is not met, and says why.
    """
    return judge_document(to_document(report), suite)


def judge_document(document: Mapping[str, Any], suite: PromotionSuite) -> Promotion:
    """As :func:`judge`, of a report's valid JSON document."""
    row = _row(document)
    results = tuple(_result(place, spec, row) for place, spec in enumerate(suite.expectations, start=1))
    if not results:
        results = (Expectation("suite", "The promotion suite holds an expectation.", success=False, observed="it is empty"),)
    return Promotion(all(result.success for result in results), suite.digest, results)


def _result(place: int, spec: Mapping[str, Any], row: Mapping[str, float | str]) -> Expectation:
    try:
        _check_expectation(place, spec)
        names = [spec["kwargs"][argument] for argument in _TYPES[spec["type"]].columns]
        met = all(_is_measured(row[name]) for name in names) and _holds(place, spec, _frame(row))
        observed = ", ".join(_observed(name, row) for name in names)
    except AuditError as error:
        met, observed = False, str(error)
    meta, description = spec.get("meta"), spec.get("description")
    name = meta.get("name") if isinstance(meta, Mapping) else None
    return Expectation(
        name=name if isinstance(name, str) else f"expectation-{place}",
        description=description if isinstance(description, str) and description else _signature(spec),
        success=met,
        observed=observed,
    )


def _holds(place: int, spec: Mapping[str, Any], frame: pandas.DataFrame) -> bool:
    """Whether great-expectations finds the expectation met.

    Raises:
        AuditError: it could not evaluate it.
    """
    called = _called(place)
    try:
        expectation = build_expectation({"type": spec["type"], "kwargs": spec["kwargs"]}, called)
        with ephemeral_context() as context:
            asset = context.data_sources.add_pandas("audits").add_dataframe_asset("audit")
            batch = asset.add_batch_definition_whole_dataframe("all rows").get_batch({"dataframe": frame})
            result = batch.validate(expectation)
    except UsageError:
        raise
    except Exception as error:  # whatever broke, it must not count as met
        raise AuditError(f"{called} could not be evaluated: {type(error).__name__}: {clean_text(error)}") from error
    message = exception_message(result.exception_info)
    if message is not None:
        raise AuditError(f"{called} could not be evaluated: {clean_text(message)}.")
    return bool(result.success)


def _is_measured(value: float | str) -> bool:
    return isinstance(value, str) or math.isfinite(value)


def _observed(name: str, row: Mapping[str, float | str]) -> str:
    value, check = row[name], COLUMNS[name].check
    if isinstance(value, str):
        return f"{name} is {clean_text(value, 100)}"
    if _is_measured(value):
        return f"{name} is {value:.0f}" if value.is_integer() else f"{name} is {value:.4g}"
    status = f" (status of {check}: {row[f'{check}_status']})" if check else ""
    return f"{name} was not measured{status}"


def _signature(spec: Mapping[str, Any]) -> str:
    arguments = spec.get("kwargs")
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) if isinstance(arguments, Mapping) else ""
    return clean_text(f"{spec.get('type')}({words})")
