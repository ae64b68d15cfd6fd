"""Files of a report: the right ones, whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from audit_plugin.errors import UsageError
from audit_plugin.report import load, write_report
from audit_plugin.types import Failed, ReportFormat


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_all_formats(failing_report, tmp_path):
    folder = tmp_path / "deep" / "report"
    paths = write_report(failing_report, folder, get_args(ReportFormat))
    assert sorted(path.relative_to(folder).as_posix() for path in paths) == names(folder)
    document = load(folder / "report.json")
    pictures = [item["picture"] for item in document["outcomes"][0]["measurement"]["candidates"]]
    assert len(pictures) == 20
    for picture in pictures:
        assert Image.open(io.BytesIO((folder / picture).read_bytes())).format == "PNG"
    written = [path.name for path in paths]
    assert written.index("report.json") > max(written.index(Path(picture).name) for picture in pictures)


def test_only_what_was_asked_for(failing_report, tmp_path):
    assert [path.name for path in write_report(failing_report, tmp_path, ["html"])] == ["report.html"]
    assert names(tmp_path) == ["report.html"]


def test_unknown_format_names_the_nearest(failing_report, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'html'"):
        write_report(failing_report, tmp_path, ["htlm"])
    assert names(tmp_path) == []


def test_an_invalid_report_writes_nothing(passing_report, tmp_path):
    report = dataclasses.replace(passing_report, outcomes=(Failed("layerwise", "broke"),))
    with pytest.raises(UsageError):
        write_report(report, tmp_path, ("html", "json"))
    assert names(tmp_path) == []


def test_a_broken_write_keeps_the_earlier_file_and_leaves_no_fragment(failing_report, tmp_path, monkeypatch):
    write_report(failing_report, tmp_path, ["json"])
    before, files = (tmp_path / "report.json").read_bytes(), names(tmp_path)
    replace = Path.replace

    def full_disk(self, target):
        if Path(target).name == "report.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(dataclasses.replace(failing_report, seed=18), tmp_path, ["json"])
    assert (tmp_path / "report.json").read_bytes() == before
    assert names(tmp_path) == files
    monkeypatch.undo()
    write_report(dataclasses.replace(failing_report, seed=18), tmp_path, ["json"])
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 18


def test_two_writings_are_equal(failing_report, tmp_path):
    for folder in ("a", "b"):
        write_report(failing_report, tmp_path / folder, get_args(ReportFormat))
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
