"""Writes a report into a folder, each file complete or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import get_args

from audit_plugin.errors import UsageError, nearest
from audit_plugin.report.figures import trigger_png
from audit_plugin.report.html import render
from audit_plugin.report.junit import to_junit
from audit_plugin.report.markdown import render_markdown
from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.sarif import to_sarif
from audit_plugin.report.schema import dumps, to_document, validate
from audit_plugin.report.summaries import trigger_pictures
from audit_plugin.report.tables import suspects_csv, suspects_parquet
from audit_plugin.report.text import render_text
from audit_plugin.types import AuditReport, ReportFormat

FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)
_FILES: Mapping[ReportFormat, str] = {
    "text": "report.txt",
    "json": "report.json",
    "html": "report.html",
    "sarif": "report.sarif.json",  # MLflow's UI shows what ends with .json, and code scanning takes any name
    "junit": "junit.xml",
    "markdown": "summary.md",
    "csv": "suspects.csv",
    "parquet": "suspects.parquet",
}


def file_names(formats: Collection[ReportFormat]) -> tuple[str, ...]:
    """What the formats are called in a report's folder, without the pictures."""
    return tuple(_FILES[name] for name in formats)


def write_report(report: AuditReport, folder: Path, formats: Collection[ReportFormat] = ("json", "html")) -> tuple[Path, ...]:
    """Write the report into ``folder``: what each format is called there is in the table below.

    ============  ==================================================================
    ``text``      ``report.txt``
    ``json``      ``report.json``, with ``triggers/class_<i>.png`` beside it
    ``html``      ``report.html``
    ``sarif``     ``report.sarif.json``, for code scanning
    ``junit``     ``junit.xml``, for the test view of a CI system
    ``markdown``  ``summary.md``, for the summary of a CI job
    ``csv``       ``suspects.csv``: suspect inputs alone; without any, column names
    ``parquet``   ``suspects.parquet``: the same
    ============  ==================================================================

    Everything is drawn and validated before the first byte is written, and each file appears under its name only when it is
    complete; ``report.json`` comes after the pictures that it names. The folder is made if need be; files of an earlier
    report are replaced.

    Returns the paths in the order of writing.
    """
    for wanted in formats:
        if wanted not in FORMATS:
            raise UsageError(f"Unknown report format '{clean_text(wanted, 40)}'.{nearest(str(wanted), FORMATS)}")
    contents: dict[str, bytes] = {}
    if "json" in formats:
        document = to_document(report)
        validate(document)
        contents.update((name, trigger_png(evidence.trigger)) for name, evidence in trigger_pictures(report))
        contents[_FILES["json"]] = dumps(document).encode("ascii")
    drawn: Mapping[ReportFormat, Callable[[], bytes]] = {
        "html": lambda: render(report).encode("utf-8"),
        "text": lambda: render_text(report).encode("utf-8"),
        "sarif": lambda: dumps(to_sarif(report)).encode("ascii"),
        "junit": lambda: to_junit(report),
        "markdown": lambda: render_markdown(report).encode("utf-8"),
        "csv": lambda: suspects_csv(report),
        "parquet": lambda: suspects_parquet(report),
    }
    contents.update((_FILES[name], draw()) for name, draw in drawn.items() if name in formats)
    return tuple(_write_whole(folder / name, content) for name, content in contents.items())


def _write_whole(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path
