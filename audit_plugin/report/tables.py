"""Suspect inputs as a table, ``suspects.csv`` and ``suspects.parquet``, for whoever works through them with other tools.

One row an input, in the order of the audit; columns ``source``, ``predicted_class``, ``predicted_class_name``, and for each check
that scores inputs ``<check>_score`` and ``<check>_flagged``. What a check did not score or judge is missing, not false.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.summaries import scorer_checks
from audit_plugin.types import AuditReport

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped, unused-ignore]

# OWASP, 'CSV Injection', with the full-width forms that East Asian versions of spreadsheets read alike.
_STARTS_A_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_STARTS_A_CELL = ("\t", "\r", "\n")


def suspects_csv(report: AuditReport) -> bytes:
    """The table as UTF-8; text that a spreadsheet would run begins with an apostrophe, control characters are visible.

    All text is quoted, since a spreadsheet may split at semicolons or tabs instead of commas.
    """
    frame = _frame(report)
    for column in frame.columns[frame.dtypes == "string"]:
        frame[column] = frame[column].map(_cell, na_action="ignore")
    frame.columns = [_cell(str(column)) for column in frame.columns]
    text: str = frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return text.encode("utf-8")


def suspects_parquet(report: AuditReport) -> bytes:
    """The table with its types and the names as they came; only what UTF-8 cannot hold is escaped."""
    stream = io.BytesIO()
    _frame(report).to_parquet(stream, engine="pyarrow", index=False)
    return stream.getvalue()


def _frame(report: AuditReport) -> pandas.DataFrame:
    import pandas  # late: it takes half a second, and most reports need no table

    suspects, names = report.suspects, report.subject.class_names
    columns = {
        "source": pandas.array([_encodable(suspect.source) for suspect in suspects], dtype="string"),
        "predicted_class": pandas.array([int(suspect.predicted_class) for suspect in suspects], dtype="int64"),
        "predicted_class_name": pandas.array([_name(names, suspect.predicted_class) for suspect in suspects], dtype="string"),
    }
    for check in scorer_checks(report):
        scores = [suspect.scores.get(check) for suspect in suspects]
        flags = [suspect.flagged.get(check) for suspect in suspects]
        columns[_encodable(f"{check}_score")] = pandas.array(scores, dtype="Float64")
        columns[_encodable(f"{check}_flagged")] = pandas.array(flags, dtype="boolean")
    return pandas.DataFrame(columns)


def _name(names: tuple[str, ...], index: int) -> str | None:
    return _encodable(names[index]) if 0 <= index < len(names) else None


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which file names that are no UTF-8 bring."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _cell(text: str) -> str:
    shown = clean_text(text, None)
    harmful = text.startswith(_STARTS_A_CELL) or shown.lstrip().startswith(_STARTS_A_FORMULA)
    return f"'{shown}" if harmful else shown
