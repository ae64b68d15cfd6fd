"""Names, tags, class labels and file names with markup, terminal control, reversed text, formulas and paths, in every report.

Descends from the cross-site scripting of MLflow by untrusted recipes and data sets (CVE-2024-27132, CVE-2024-27133); formulas
are CWE-1236.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from lxml import etree, html

from audit_plugin.report.text import render_markdown_block
from audit_plugin.report.write import FORMATS, file_names, write_report
from audit_plugin.types import AuditReport, ModelRef, Reason, SuspectScore
from tests.unit.report.conftest import failing

NAMES = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": "\"' onmouseover=alert(1) x='",
    "entity": "&lt;script&gt;&#60;b&#62;",
    "cdata": "]]><script>alert(1)</script><![CDATA[",
    "escape": "\x1b[2J\x1b]0;title\x07\x1b[31mPASS\x1b[0m",
    "line": "a\nPASS\r\n::set-output name=verdict::pass\n# PASS",
    "bidi": "safe\u202egnp.exe\u2066\u200b",
    "link": "[click](javascript:alert(1)) ![x](https://evil.example/p.png) <https://evil.example>",
    "formula": "=cmd|' /C calc'!A0",
    "plus": "+1+cmd|'/C calc'!A0",
    "at": "@SUM(1+1)*cmd|'/C calc'!A0",
    "tab": "\t=1+1",
    "path": "../../../../tmp/escaped",
    "absolute": "/tmp/escaped\0.png",
    "template": "{{ 7 * 7 }}{% include '/etc/passwd' %}${7*7}",
    "surrogate": "\ud800",
    "long": "A" * 20_000,
}


def named(name: str) -> AuditReport:
    """A failed audit in which everything that others chose is called ``name``."""
    report = failing()
    classes = tuple(f"{name}{index}" for index in range(10))
    return dataclasses.replace(
        report,
        model=ModelRef(name, name, report.model.digest, report.model.manifest, name, name, name, name, {name: name}),
        intake=dataclasses.replace(
            report.intake,
            data_path=name,
            findings=(dataclasses.replace(report.intake.findings[0], path=name, message=name, code="architectural-path"),),
        ),
        subject=dataclasses.replace(report.subject, class_names=classes, taps=(name,)),
        clean_set=dataclasses.replace(report.clean_set, source=name, notes=(name,)),
        decision=dataclasses.replace(
            report.decision, reasons=(*report.decision.reasons, Reason("architectural-path", f"{name}: {name}."))
        ),
        command=f"backdoor-audit run {name}",
        suspects=(SuspectScore(name, 8, {"layerwise": 6.1}, {"layerwise": True}),),
    )


def nothing_invisible(text: str) -> None:
    """No character that moves a cursor, reverses text, or cannot be seen."""
    odd = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co") and letter not in "\n\t"}
    assert not odd


def in_json(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    nothing_invisible(content)
    json.loads(content)


def in_html(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    nothing_invisible(content)
    page = html.fromstring(content)
    assert all(not attribute.startswith("on") for element in page.iter() for attribute in element.attrib)
    assert not page.xpath("//script[contains(., 'alert')] | //base | //iframe | //object | //embed")
    for address in page.xpath("//@src | //@href | //@action"):
        assert re.match(r"(data:image/|#|$)", address), address
    assert page.xpath("count(//img[starts-with(@src, 'x')])") == 0
    assert "49" not in page.xpath("string(//h1)")


def in_xml(path: Path) -> None:
    content = path.read_bytes()
    nothing_invisible(content.decode())
    root = etree.fromstring(content, etree.XMLParser(resolve_entities=False))
    assert {element.tag for element in root.iter()} <= {
        *(
            "testsuites",
            "testsuite",
            "testcase",
            "failure",
            "error",
            "skipped",
            "properties",
            "property",
            "system-out",
            "system-err",
        )
    }


def in_lines(path: Path) -> None:
    """No line can pose as one of ours: as a verdict, or as a command to the CI system that shows it."""
    content = path.read_text(encoding="utf-8")
    nothing_invisible(content)
    lines = [line.strip() for line in content.splitlines()]
    assert not [line for line in lines if line.startswith("::") or re.fullmatch(r"#* ?PASS", line)]


def in_markdown(path: Path) -> None:
    in_lines(path)
    harmless_markdown(path.read_text(encoding="utf-8"))


def harmless_markdown(text: str) -> None:
    from markdown_it import MarkdownIt

    rendered = html.fromstring(f"<div>{MarkdownIt('gfm-like', {'linkify': False, 'html': True}).render(text)}</div>")
    assert not rendered.xpath("//script | //img | //iframe | //a[not(starts-with(@href, 'http://server'))]")


def in_csv(path: Path) -> None:
    nothing_invisible(path.read_text(encoding="utf-8-sig"))
    with path.open(encoding="utf-8-sig", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell.lstrip("\t\r ")[:1] in "=+-@" and cell.strip() and not is_number(cell)]


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def in_parquet(path: Path) -> None:
    for column in pandas.read_parquet(path).select_dtypes(include=["object", "string"]):
        nothing_invisible(str(column))


CHECKS: dict[str, Callable[[Path], None]] = {
    "text": in_lines,
    "json": in_json,
    "html": in_html,
    "sarif": in_json,
    "junit": in_xml,
    "markdown": in_markdown,
    "csv": in_csv,
    "parquet": in_parquet,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_report_stays_what_it_is(name: str, tmp_path: Path) -> None:
    assert CHECKS.keys() == set(FORMATS)
    folder = tmp_path / "deep" / "down" / "report"
    written = write_report(named(NAMES[name]), folder, FORMATS)
    assert all(path.resolve().is_relative_to(folder) for path in written)
    assert {entry.name for entry in tmp_path.iterdir()} == {"deep"}
    pictures = {f"class_{index}.png" for index in range(10)}
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= {*file_names(FORMATS), *pictures} | {
        path.name for path in folder.glob("triggers/*") if re.fullmatch(r"[a-z0-9_]+\.png", path.name)
    }
    for form, check in CHECKS.items():
        check(folder / file_names([form])[0])
    assert sum(path.stat().st_size for path in written) < 20 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_the_note_in_mlflow_stays_a_note(name: str) -> None:
    note = render_markdown_block(named(NAMES[name]), "http://server/#/experiments/1/runs/a")
    assert len(note) <= 5_000
    nothing_invisible(note)
    harmless_markdown(note)
    assert not [line for line in note.splitlines() if line.startswith(("::", "# "))]
