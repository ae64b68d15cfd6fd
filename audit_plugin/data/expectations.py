"""The clean set's contract, as a great-expectations suite that is plain data.

A suite is a list of ``{"type", "kwargs", "meta"}`` dicts, as great-expectations itself writes them, so that it can be
kept in a file and edited. In ``meta``: ``name`` (kebab-case, stable), ``description`` (what is expected, for people),
``table`` (which table it looks at), ``required`` (default true; false for advice), ``quantity`` (what a mean or a
maximum is called in the report). What cannot be evaluated is an error, never a result: great-expectations alone would call an
empty column a success and a missing one a failure.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from audit_plugin.data.splits import content_hashes
from audit_plugin.data.stability import FOLDS, LEVEL, contradicted, excess_p_values, folds_of, most_contradicted
from audit_plugin.errors import AuditError, CleanSetError, UsageError, nearest
from audit_plugin.types import Expectation, FloatArray, InputSpec, LabelArray, LabelledImages

Suite: TypeAlias = Sequence[Mapping[str, Any]]

_SHOWN = 5
_ONE_CONTEXT = threading.Lock()


@dataclass(frozen=True)
class Table:
    """A pandas frame that expectations look at.

    Attributes:
        frame: the pandas DataFrame (typed loosely, because pandas is imported late and ships no types).
        rows: what its rows are called, in the plural: 'images'.
        identifier: the column that names a row to a person.
    """

    frame: Any
    rows: str
    identifier: str


def check_clean_set(
    data: LabelledImages,
    *,
    class_names: Sequence[str],
    predictions: LabelArray | None,
    input_spec: InputSpec,
    minimum_images_per_class: int,
    minimum_clean_accuracy: float,
    sources: Sequence[str] | None = None,
    margins: FloatArray | None = None,
) -> tuple[Expectation, ...]:
    """Validate the clean set against the default suite.

    Args:
        data: images uint8 (N, height, width, channels) and labels (N,).
        class_names: the model's classes.
        predictions: the class that the model gives each image, (N,); None leaves the expectations on accuracy out,
            and the result without them: they are not measured, neither met nor broken.
        input_spec: the size and channels that the model expects.
        minimum_images_per_class: of every class of the model, 1 or more.
        minimum_clean_accuracy: in [0, 1], over all images.
        sources: file or row of each image, (N,), to name it by; default ``row <number>``.
        margins: the model's highest score for each image less the second highest, (N,); None leaves the expectation on
            contradicted labels out.

    Returns:
        One result an expectation, in the suite's order.

    Raises:
        CleanSetError: the arrays do not fit each other, or there is nothing to look at.
        UsageError: a minimum makes no sense.
        AuditError: great-expectations could not evaluate something.
    """
    if minimum_images_per_class < 1:
        raise UsageError(f"minimum_images_per_class must be at least 1, got {minimum_images_per_class}.")
    if not 0 <= minimum_clean_accuracy <= 1:
        raise UsageError(f"minimum_clean_accuracy must lie in [0, 1], got {minimum_clean_accuracy}; 0.8 means 80 %.")
    maximum_contradicted = None
    if predictions is not None and margins is not None and len(data):
        maximum_contradicted = most_contradicted(len(data), float((predictions != data.labels).mean()))
    suite = clean_set_suite(
        class_count=len(class_names),
        input_spec=input_spec,
        minimum_images_per_class=minimum_images_per_class,
        minimum_clean_accuracy=minimum_clean_accuracy if predictions is not None else None,
        maximum_contradicted=maximum_contradicted,
    )
    tables = clean_set_tables(data, class_names=class_names, predictions=predictions, sources=sources, margins=margins)
    return run_suite(tables, suite)


def clean_set_suite(
    *,
    class_count: int,
    input_spec: InputSpec,
    minimum_images_per_class: int,
    minimum_clean_accuracy: float | None,
    maximum_contradicted: float | None = None,
) -> list[dict[str, Any]]:
    """The default suite over the tables of ``clean_set_tables``; without an accuracy, without the expectations on errors.

    ``maximum_contradicted`` is the largest share of images whose label the model may contradict, in [0, 1]; None leaves it out.
    """
    between = "expect_column_values_to_be_between"
    highest = "expect_column_max_to_be_between"
    shape = _shape_text(input_spec.height, input_spec.width, input_spec.channels)
    suite = [
        _expectation(
            "labels-in-range",
            f"Every label is one of the model's {class_count} classes (0 to {class_count - 1}).",
            between,
            {"column": "label", "min_value": 0, "max_value": class_count - 1},
        ),
        _expectation(
            "images-per-class",
            f"Every class of the model has at least {minimum_images_per_class} images.",
            between,
            {"column": "count", "min_value": minimum_images_per_class},
            table="classes",
        ),
        _expectation(
            "image-shape",
            f"Every image has the model's input size, {shape} (height x width x channels).",
            "expect_column_values_to_be_in_set",
            {"column": "shape", "value_set": [shape]},
        ),
        _expectation(
            "pixel-bounds",
            "Pixels are stored as 0 to 255, not as 0 and 1.",
            highest,
            {"column": "pixel_max", "min_value": 2, "max_value": 255},
            quantity="brightest pixel",
        ),
        _expectation(
            "pixel-range-used",
            "The brightest pixel is at least 128; less suggests another scale, such as 0 to 16.",
            highest,
            {"column": "pixel_max", "min_value": 128, "max_value": 255},
            quantity="brightest pixel",
            required=False,
        ),
        _expectation(
            "images-not-constant",
            "At most 5 % of the images are of a single flat value.",
            between,
            {"column": "pixel_std", "min_value": 0, "strict_min": True, "mostly": 0.95},
        ),
        _expectation(
            "images-unique",
            "At most 5 % of the images have an identical copy in the set; copies are used once.",
            "expect_column_values_to_be_unique",
            {"column": "sha256", "mostly": 0.95},
            required=False,
        ),
        _expectation(
            "labels-consistent",
            "No image occurs under two labels; those that do are not used.",
            between,
            {"column": "labels_of_content", "max_value": 1},
            required=False,
        ),
        _expectation(
            "classes-balanced",
            "The classes that occur have between a third of and three times their mean number of images.",
            between,
            {"column": "relative_count", "min_value": 1 / 3, "max_value": 3},
            table="classes",
            required=False,
        ),
    ]
    if minimum_clean_accuracy is None:
        return suite
    suite += [
        _expectation(
            "clean-accuracy",
            f"The model is right on at least {minimum_clean_accuracy:.1%} of the images; less means that preprocessing"
            " or labels do not match the model.",
            "expect_column_mean_to_be_between",
            {"column": "correct", "min_value": minimum_clean_accuracy, "max_value": 1},
            quantity="accuracy",
        ),
        _expectation(
            "accuracy-per-class",
            f"The model is right on at least {minimum_clean_accuracy / 2:.1%} of every class; less in a few suggests"
            " that their labels are exchanged.",
            between,
            {"column": "accuracy", "min_value": minimum_clean_accuracy / 2},
            table="classes",
            required=False,
        ),
        _expectation(
            "errors-even-over-classes",
            "No class has far more errors than the others let expect; one that has was exchanged, images or labels, or the model "
            "was never taught it.",
            between,
            {"column": "error_p_value", "min_value": LEVEL / class_count},
            table="classes",
        ),
        _expectation(
            "errors-even-over-folds",
            f"None of {FOLDS} folds of the images, cut in their own order, has far more errors than the others; one that has "
            "holds other images than the rest.",
            between,
            {"column": "error_p_value", "min_value": LEVEL / FOLDS},
            table="folds",
        ),
    ]
    if maximum_contradicted is not None:
        suite.append(
            _expectation(
                "labels-not-contradicted",
                f"At most {maximum_contradicted:.1%} of the labels are contradicted by an answer that is surer than the median "
                "right one; more suggests wrong labels, or a trigger in the images.",
                "expect_column_mean_to_be_between",
                {"column": "contradicted", "min_value": 0, "max_value": maximum_contradicted},
                quantity="contradicted share",
            )
        )
    return suite


def clean_set_tables(
    data: LabelledImages,
    *,
    class_names: Sequence[str],
    predictions: LabelArray | None,
    sources: Sequence[str] | None = None,
    margins: FloatArray | None = None,
) -> dict[str, Table]:
    """The tables that a suite on the clean set may look at.

    ``images``, one row an image: source, label, height, width, channels, shape ('32 x 32 x 3'), pixel_min, pixel_max,
    pixel_std (in units of 0 to 255), sha256, labels_of_content (number of labels under which this image occurs) and, with
    predictions, correct and, with margins too, contradicted (1.0 or 0.0). ``classes``, one row a class of the model: name,
    label, count, relative_count (count over the mean of the classes that occur; NaN where there is none), accuracy and
    error_p_value (NaN where there is none). With predictions also ``folds``, one row a fold: name, count and error_p_value. See
    :mod:`audit_plugin.data.stability`.

    Raises:
        CleanSetError: no images, or arrays whose lengths or dtype do not fit.
    """
    import pandas  # type: ignore[import-untyped, unused-ignore]  # late: with great-expectations it takes seconds

    _check_arrays(data, predictions, sources, margins)
    count = len(data)
    names = [f"row {row}" for row in range(count)] if sources is None else list(sources)
    flat = data.images.reshape(count, -1)
    height, width, channels = data.images.shape[1:]
    images = pandas.DataFrame(
        {
            "source": names,
            "label": data.labels,
            "height": height,
            "width": width,
            "channels": channels,
            "shape": _shape_text(height, width, channels),
            "pixel_min": flat.min(axis=1),
            "pixel_max": flat.max(axis=1),
            # One image at a time: a float copy of the whole set would be eight times its size.
            "pixel_std": [float(image.std()) for image in flat],
            "sha256": content_hashes(data.images).tolist(),
        }
    )
    images["labels_of_content"] = images.groupby("sha256")["label"].transform("nunique")

    inside = (data.labels >= 0) & (data.labels < len(class_names))
    counts = np.bincount(data.labels[inside], minlength=len(class_names))
    occurring = counts > 0
    relative = np.full(len(class_names), np.nan)
    relative[occurring] = counts[occurring] / counts[occurring].mean() if occurring.any() else np.nan
    classes = pandas.DataFrame(
        {"name": list(class_names), "label": np.arange(len(class_names)), "count": counts, "relative_count": relative}
    )
    if predictions is not None:
        correct = (predictions == data.labels).astype(np.float64)
        images["correct"] = correct
        right = np.bincount(data.labels[inside], weights=correct[inside], minlength=len(class_names))
        classes["accuracy"] = np.divide(right, counts, out=np.full(len(class_names), np.nan), where=occurring)
        classes["error_p_value"] = excess_p_values(counts - right.astype(np.int64), counts)
        if margins is not None:
            images["contradicted"] = contradicted(data.labels, predictions, margins).astype(np.float64)
    tables = {"images": Table(images, "images", "source"), "classes": Table(classes, "classes", "name")}
    if predictions is not None:
        folds = folds_of(data.labels)
        in_fold = np.bincount(folds, minlength=FOLDS)
        wrong = np.bincount(folds[predictions != data.labels], minlength=FOLDS)
        rows = {
            "name": [f"fold {fold + 1}" for fold in range(FOLDS)],
            "count": in_fold,
            "error_p_value": excess_p_values(wrong, in_fold),
        }
        tables["folds"] = Table(pandas.DataFrame(rows), "folds", "name")
    return tables


def run_suite(tables: Mapping[str, Table], suite: Suite) -> tuple[Expectation, ...]:
    """Evaluate a suite with great-expectations: one result an expectation, in the suite's order.

    Raises:
        UsageError: the suite is empty, or an expectation is malformed (no name, unknown table, type, column or argument).
        AuditError: an expectation could not be evaluated, or looked at no value at all.
    """
    import great_expectations

    _check_suite(tables, suite)
    results: dict[str, Any] = {}
    with ephemeral_context() as context:
        source = context.data_sources.add_pandas("tables")
        for name, table in tables.items():
            expectations = [
                build_expectation(spec, f"expectation '{spec['meta']['name']}'")
                for spec in suite
                if spec["meta"]["table"] == name
            ]
            if not expectations:
                continue
            definition = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all rows")
            validated = definition.get_batch({"dataframe": table.frame}).validate(
                great_expectations.ExpectationSuite(name=name, expectations=expectations),
                result_format={
                    "result_format": "SUMMARY",
                    "partial_unexpected_count": _SHOWN,
                    "unexpected_index_column_names": [table.identifier],
                },
            )
            results |= {result.expectation_config.meta["name"]: result for result in validated.results}
    return tuple(_judged(spec, results.get(spec["meta"]["name"]), tables[spec["meta"]["table"]]) for spec in suite)


# ----------------------------------------------------------------------------------------------- before the run


def _expectation(
    name: str,
    description: str,
    kind: str,
    kwargs: Mapping[str, Any],
    *,
    table: str = "images",
    required: bool = True,
    quantity: str | None = None,
) -> dict[str, Any]:
    meta = {"name": name, "description": description, "table": table, "required": required}
    if quantity is not None:
        meta["quantity"] = quantity
    return {"type": kind, "kwargs": dict(kwargs), "meta": meta}


def _check_arrays(
    data: LabelledImages, predictions: LabelArray | None, sources: Sequence[str] | None, margins: FloatArray | None
) -> None:
    images, labels = data.images, data.labels
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise CleanSetError(
            f"expected at least one image, uint8 (N, height, width, channels); got {images.dtype} of shape {images.shape}."
        )
    columns = {"labels": labels, "predictions": predictions}
    for name, column in columns.items():
        if column is not None and (column.shape != (len(images),) or column.dtype.kind not in "iu"):
            raise CleanSetError(
                f"expected integer {name} of shape ({len(images)},), one an image; got {column.dtype} of shape {column.shape}."
            )
    if margins is not None and margins.shape != (len(images),):
        raise CleanSetError(f"expected margins of shape ({len(images)},), one an image; got shape {margins.shape}.")
    if sources is not None and len(sources) != len(images):
        raise CleanSetError(f"expected {len(images)} sources, one an image; got {len(sources)}.")


def _check_suite(tables: Mapping[str, Table], suite: Suite) -> None:
    if not suite:
        raise UsageError("the expectation suite is empty and would let everything pass; give at least one expectation.")
    names: set[str] = set()
    for position, spec in enumerate(suite, start=1):
        meta = spec.get("meta", {})
        name = meta.get("name")
        if not isinstance(name, str) or not isinstance(spec.get("type"), str):
            raise UsageError(f"expectation number {position} of the suite lacks 'type' or meta 'name'.")
        if name in names:
            raise UsageError(f"the suite holds two expectations called '{name}'; give each its own name.")
        names.add(name)
        if meta.get("table") not in tables:
            table = str(meta.get("table"))
            raise UsageError(f"expectation '{name}' looks at the unknown table '{table}'.{nearest(table, tables)}")
        columns = [str(column) for column in tables[meta["table"]].frame.columns]
        column = spec.get("kwargs", {}).get("column")
        if column is not None and column not in columns:
            raise UsageError(
                f"expectation '{name}' looks at the unknown column '{column}' of table '{meta['table']}'."
                f"{nearest(str(column), columns)}"
            )


@contextmanager
def ephemeral_context() -> Iterator[Any]:
    """A context in memory, silent, for one thread at a time, because there is one current context a process; the caller's own is
    restored."""
    from great_expectations.data_context.data_context.context_factory import get_context, project_manager, set_context
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )
    from great_expectations.exceptions.exceptions import DataContextRequiredError

    config = DataContextConfig(
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
    )
    with _ONE_CONTEXT:
        try:
            before = project_manager.get_current_project()
        except DataContextRequiredError:
            before = None
        try:
            yield get_context(mode="ephemeral", project_config=config)
        finally:
            set_context(before)


def build_expectation(spec: Mapping[str, Any], called: str) -> Any:
    """The great-expectations object of ``spec``, which errors speak of as ``called``.

    Raises:
        UsageError: its type is unknown, or its arguments do not fit.
    """
    from great_expectations.exceptions.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    kind = spec["type"]
    # A suite that is given plain dicts drops an unknown type with a log line; building them here makes it an error.
    try:
        return ExpectationConfiguration(
            type=kind, kwargs=dict(spec.get("kwargs", {})), meta=dict(spec.get("meta", {}))
        ).to_domain_obj()
    except ExpectationNotFoundError as error:
        known = list_registered_expectation_implementations()
        raise UsageError(f"{called} is of the unknown type '{kind}'.{nearest(kind, known)}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{called} ({kind}) is malformed: {' '.join(str(error).split())}.") from error


# ------------------------------------------------------------------------------------------------ after the run


def _judged(spec: Mapping[str, Any], result: Any, table: Table) -> Expectation:
    meta = spec["meta"]
    if result is None:
        raise AuditError(f"expectation '{meta['name']}' came back without a result from great-expectations.")
    error = exception_message(result.exception_info)
    if error is not None:
        raise AuditError(f"expectation '{meta['name']}' could not be evaluated: {error}.")
    return Expectation(
        name=meta["name"],
        description=meta.get("description", spec["type"]),
        success=bool(result.success),
        observed=_observed(meta, spec.get("kwargs", {}).get("column"), result.result, table),
        required=bool(meta.get("required", True)),
    )


def exception_message(info: Mapping[str, Any] | None) -> str | None:
    """The first message that great-expectations caught: it keeps one flat record, or one for each metric that broke."""
    records = [info or {}, *(record for record in (info or {}).values() if isinstance(record, Mapping))]
    for record in records:
        if record.get("raised_exception"):
            return " ".join(str(record.get("exception_message")).split()).rstrip(".")
    return None


def _observed(meta: Mapping[str, Any], column: str | None, result: Mapping[str, Any], table: Table) -> str:
    """The result in words. Which values were off comes first by row, so that a person can find them."""
    if "element_count" in result:
        examined = int(result["element_count"]) - int(result.get("missing_count") or 0)
        if examined == 0:
            raise AuditError(f"expectation '{meta['name']}' looked at no value: column '{column}' is empty.")
        off = int(result["unexpected_count"])
        if off == 0:
            return f"all {examined} {table.rows}"
        found = result.get("partial_unexpected_index_list") or []
        examples = [_example(row, column, table.identifier) for row in found[:_SHOWN]]
        more = f" and {off - len(examples)} more" if examples and off > len(examples) else ""
        return f"{off} of {examined} {table.rows} are exceptions ({off / examined:.1%}): {', '.join(examples)}{more}"
    value = result.get("observed_value")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise AuditError(f"expectation '{meta['name']}' measured nothing: column '{column}' is empty.")
    return f"{meta.get('quantity', column or 'value')} {_value_text(value)}"


def _example(row: Mapping[str, Any], column: str | None, identifier: str) -> str:
    value = row.get(column) if column is not None else None
    # A long text, such as a hash, says nothing to a reader.
    if value is None or column == identifier or (isinstance(value, str) and len(value) > 20):
        return str(row[identifier])
    return f"{row[identifier]} ({_value_text(value)})"


def _value_text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _shape_text(height: int, width: int, channels: int) -> str:
    return f"{height} x {width} x {channels}"
