"""What people and machines read after an audit: ``report.json``, ``report.html``, a terminal summary, a Markdown block,
and suspect inputs as tables.

Pure functions of :class:`audit_plugin.types.AuditReport`. Nothing here measures or decides; whatever came from the model or its
registry entry is treated as hostile text.
"""

from __future__ import annotations

from audit_plugin.report.html import render
from audit_plugin.report.schema import SCHEMA_VERSION, dumps, load, to_document, validate
from audit_plugin.report.text import render_markdown_block, render_text
from audit_plugin.report.write import write_report
from audit_plugin.types import ReportFormat

__all__ = [
    "SCHEMA_VERSION",
    "ReportFormat",
    "dumps",
    "load",
    "render",
    "render_markdown_block",
    "render_text",
    "to_document",
    "validate",
    "write_report",
]
