"""Writes a report into a folder, each file complete or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import get_args

from audit_plugin.errors import UsageError, nearest
from audit_plugin.report.figures import trigger_png
from audit_plugin.report.html import render
from audit_plugin.report.sanitise import clean_text
from audit_plugin.report.schema import dumps, to_document, validate
from audit_plugin.report.summaries import trigger_pictures
from audit_plugin.report.tables import suspects_csv, suspects_parquet
from audit_plugin.report.text import render_text
from audit_plugin.types import AuditReport, ReportFormat

FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)


def write_report(report: AuditReport, folder: Path, formats: Collection[ReportFormat] = ("json", "html")) -> tuple[Path, ...]:
    """Write the report into ``folder``: what each format is called there is in the table below.

    ============  ==================================================================
    ``json``      ``report.json``, with ``triggers/class_<i>.png`` beside it
    ``html``      ``report.html``
    ``text``      ``report.txt``
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
        contents["report.json"] = dumps(document).encode("ascii")
    if "html" in formats:
        contents["report.html"] = render(report).encode("utf-8")
    if "text" in formats:
        contents["report.txt"] = render_text(report).encode("utf-8")
    if "csv" in formats:
        contents["suspects.csv"] = suspects_csv(report)
    if "parquet" in formats:
        contents["suspects.parquet"] = suspects_parquet(report)
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
