"""Suspect inputs as tables: complete, typed, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import dataclasses
import io
import subprocess
import sys

import pandas
import pytest

from audit_plugin.report import write_report
from audit_plugin.types import AuditReport, SuspectScore

COLUMNS = [
    *("source", "predicted_class", "predicted_class_name", "layerwise_score", "layerwise_flagged"),
    *("bad_expert_score", "bad_expert_flagged", "activation_norm_score", "activation_norm_flagged"),
]


def written(report, folder):
    """The CSV as rows of text, and the Parquet file as a frame."""
    comma, columns = write_report(report, folder, ("csv", "parquet"))
    assert (comma.name, columns.name) == ("suspects.csv", "suspects.parquet")
    return list(csv.reader(io.StringIO(comma.read_text(encoding="utf-8")))), pandas.read_parquet(columns)


def of_sources(report: AuditReport, *sources: str) -> AuditReport:
    return dataclasses.replace(report, suspects=tuple(SuspectScore(source, 8, {}, {}) for source in sources))


def test_both_files_hold_every_suspect(failing_report, tmp_path):
    rows, frame = written(failing_report, tmp_path)
    assert rows[0] == list(frame.columns) == COLUMNS
    assert rows[1] == ["inbox/0001.png", "8", "ship", "6.1", "True", "31.0", "True", "", ""]
    assert rows[2] == ["inbox/0002.png", "2", "bird", "-0.3", "False", "0.8", "False", "", ""]
    assert rows[3][3:7] == ["", "False", "", ""]  # its score is no number, and the second check has not seen it
    assert frame["source"].tolist() == [suspect.source for suspect in failing_report.suspects]
    assert frame["layerwise_score"].dtype.kind == "f"
    assert frame["bad_expert_flagged"].tolist()[:2] == [True, False]
    assert frame["bad_expert_flagged"].isna().tolist() == [False, False, True]


def test_no_suspects_give_column_names_alone(failing_report, passing_report, tmp_path):
    rows, frame = written(dataclasses.replace(failing_report, suspects=()), tmp_path / "a")
    assert rows == [COLUMNS]
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 0
    assert written(dataclasses.replace(passing_report, outcomes=()), tmp_path / "b")[0] == [COLUMNS[:3]]


def test_both_files_have_the_same_types_with_and_without_suspects(failing_report, tmp_path):
    _, filled = written(failing_report, tmp_path / "a")
    _, empty = written(dataclasses.replace(failing_report, suspects=()), tmp_path / "b")
    assert filled.dtypes.to_dict() == empty.dtypes.to_dict()


@pytest.mark.parametrize(
    ("source", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "' =1"),
        ("\r=1", "'\\x0d=1"),
        ("\n=1", "' =1"),
        ("  =1", "'  =1"),
        ("\uff1d1", "'\uff1d1"),
        ('=HYPERLINK("http://evil.example","x")', '\'=HYPERLINK("http://evil.example","x")'),
        ("a=1.png", "a=1.png"),
        ("\x1b[31mred.png", "\\x1b[31mred.png"),
        ("caf\u00e9.png", "caf\u00e9.png"),
        ("", ""),
    ],
)
def test_no_text_of_the_csv_is_a_formula(failing_report, tmp_path, source, cell):
    rows, frame = written(of_sources(failing_report, source), tmp_path)
    assert rows[1][0] == cell
    assert frame["source"].tolist() == [source]  # a typed file runs nothing, and names must lead back to the files


def test_class_names_and_column_names_are_no_formulas_either(failing_report, tmp_path):
    subject = dataclasses.replace(failing_report.subject, class_names=("=cmd|' /C calc'!A0",))
    suspects = (SuspectScore("a", 0, {"@check": 1.0}, {}), SuspectScore("b", 7, {}, {}))
    rows, frame = written(dataclasses.replace(failing_report, subject=subject, suspects=suspects, outcomes=()), tmp_path)
    assert rows[0][3] == "'@check_score"
    assert [row[2] for row in rows[1:]] == ["'=cmd|' /C calc'!A0", ""]
    assert frame["predicted_class_name"].isna().tolist() == [False, True]


def test_text_stays_one_cell_whatever_separates_the_columns(failing_report, tmp_path):
    (path,) = write_report(of_sources(failing_report, 'a;=1+1\t"b'), tmp_path, ["csv"])
    line = path.read_text(encoding="utf-8").splitlines()[1]
    for separator in (",", ";", "\t"):
        (cells,) = csv.reader([line], delimiter=separator)
        assert not any(cell.startswith("=") for cell in cells)


def test_names_that_are_no_text_are_escaped(failing_report, tmp_path):
    rows, frame = written(of_sources(failing_report, "a\udcff.png"), tmp_path)
    assert rows[1][0] == frame["source"][0] == "a\\udcff.png"


def test_hostile_suspects_can_be_written(hostile_report, tmp_path):
    rows, frame = written(hostile_report, tmp_path)
    assert len(rows) - 1 == len(frame) == len(hostile_report.suspects)
    text = (tmp_path / "suspects.csv").read_text(encoding="utf-8")
    assert not {character for character in text if ord(character) < 32} - {"\n"}


def test_pandas_is_imported_only_for_tables():
    code = "import sys, audit_plugin.report; assert not {'pandas', 'pyarrow', 'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
