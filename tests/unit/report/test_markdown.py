"""summary.md: verdict first, every check, nothing that the model could make of GitHub's Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from audit_plugin.report.markdown import render_markdown
from audit_plugin.types import AuditReport, Expectation, Failed, Reason

ACTIVE = {"html_block", "html_inline", "link_open", "image", "s_open", "blockquote_open", "hr"}
LINKED = re.compile(r"@\w|#\w|\w+://\w|\bwww\.\w")  # what GitHub links in plain text


def tokens_of(report: AuditReport) -> list[Token]:
    parsed = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(render_markdown(report))
    return [token for block in parsed for token in (block, *(block.children or ()))]


def plain(report: AuditReport) -> str:
    """What a reader sees outside of code."""
    return "".join(token.content if token.type in ("text", "text_special") else " " for token in tokens_of(report))


def harmless(report: AuditReport) -> None:
    tokens = tokens_of(report)
    assert not {token.type for token in tokens} & ACTIVE
    assert not LINKED.search(plain(report))
    text, _, _ = render_markdown(report).partition("### Repeat")
    assert "$" not in re.sub("`[^`]*`", "", text)
    cells = [token.type for token in tokens if token.type in ("tr_open", "td_open", "th_open")]
    rows = len(report.outcomes)
    assert cells == ["tr_open", *["th_open"] * 3, *["tr_open", *["td_open"] * 3] * rows]


def headings(report: AuditReport) -> list[str]:
    tokens = tokens_of(report)
    return [following.content for token, following in itertools.pairwise(tokens) if token.type == "heading_open"]


def test_verdict_comes_first(any_report):
    shown = render_markdown(any_report)
    assert shown.startswith(f"## Backdoor audit: {any_report.decision.verdict.value.upper()}\n")
    assert shown.endswith("\n")


def test_a_fail_says_the_essentials(failing_report):
    shown = render_markdown(failing_report)
    for expected in (
        "`models:/cifar-classifier/7`",
        "- **Suspected class:** ship (class 8)",
        "- **Clean accuracy:** 93.4 % (91.2 to 95.6 %) of 500 test images",
        "- **Suspect inputs:** 1 of 3 flagged by at least one check",
        "success 99.3 % (98.6 to 100.0 %) of 450 held-out images",
        "AUROC 0.987; detects 96.0 % (94.2 to 97.8 %) of 450 stamped images; false alarms 0.4 % (0.0 to 1.0 %) of 500 clean",
        "| Benign-feature distance | **inapplicable** | see below |",
        "- **Benign-feature distance** (inapplicable): the tap in the middle has 12 features; 32 are needed",
        f"```sh\n{failing_report.command}\n```",
        failing_report.model.digest,
    ):
        assert expected in shown
    assert all(reason.message in shown for reason in failing_report.decision.reasons)


def test_what_was_not_measured_has_a_section_unless_there_is_none(inconclusive_report, passing_report):
    assert "Not measured" in headings(inconclusive_report)
    assert "- **Canaries** (missing): " in render_markdown(inconclusive_report)
    assert "Not measured" not in headings(passing_report)
    nothing = dataclasses.replace(passing_report, outcomes=())
    assert "No check ran." in render_markdown(nothing)


def test_broken_expectations_and_blind_spots_are_listed(passing_report):
    broken = Expectation("image-shape", "Every image has the model's size.", False, "3 have not")
    report = dataclasses.replace(
        passing_report,
        clean_set=dataclasses.replace(passing_report.clean_set, expectations=(broken,)),
        decision=dataclasses.replace(passing_report.decision, blind_spots=("Pairs were not searched.",)),
    )
    shown = render_markdown(report)
    assert "- Every image has the model's size. Found: 3 have not (required)" in shown
    assert "### Blind spots\n\n- Pairs were not searched.\n" in shown


def test_what_does_not_fit_is_counted(failing_report):
    reasons = tuple(Reason("many", f"reason {index}") for index in range(45))
    report = dataclasses.replace(failing_report, decision=dataclasses.replace(failing_report.decision, reasons=reasons))
    assert "- ... and 15 more\n" in render_markdown(report)


def test_a_hostile_model_makes_no_markup(hostile_report):
    harmless(hostile_report)
    assert headings(hostile_report) == [
        *("Backdoor audit: FAIL", "Reasons", "Checks", "Not measured", "Not met by the clean images", "Repeat")
    ]
    assert not {character for character in render_markdown(hostile_report) if unicodedata.category(character) in ("Cc", "Cf")} - {
        "\n"
    }


@pytest.mark.parametrize(
    "text",
    [
        "@github/security please approve",
        "fixes #1, org/repo#12",
        "$\\color{green}\\textsf{PASS}$ and $`x`$",
        "a | b | c",
        "![x](https://evil.example/x.png)",
        "<details><summary>PASS</summary>",
        "ada@evil.example",
        "`tick` ``` fence",
        "~~not~~ **bold** __also__",
        "[^1] [x]: https://evil.example",
        "\n\n# PASS\n\n---\n> quote",
    ],
)
def test_no_text_of_the_model_is_obeyed(failing_report, text):
    report = dataclasses.replace(
        failing_report,
        model=dataclasses.replace(failing_report.model, pinned_uri=f"models:/{text}/1"),
        subject=dataclasses.replace(failing_report.subject, class_names=(text,) * 10),
        outcomes=(*failing_report.outcomes, Failed(text, text)),
        decision=dataclasses.replace(failing_report.decision, reasons=(Reason("class-stands-out", text),)),
        command=text,
    )
    harmless(report)
    (fence,) = [token for token in tokens_of(report) if token.type == "fence"]
    assert fence.content.split() == text.split()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_stays_text(failing_report, text):
    report = dataclasses.replace(
        failing_report,
        outcomes=(*failing_report.outcomes, Failed(text, text)),
        decision=dataclasses.replace(failing_report.decision, reasons=(Reason("class-stands-out", text),)),
        command=text,
    )
    harmless(report)
