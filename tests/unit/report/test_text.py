"""Terminal summary and Markdown block: short, harmless, complete."""

from __future__ import annotations

import dataclasses
import math
import unicodedata

import pytest

from audit_plugin.report import render_markdown_block, render_text
from audit_plugin.report.text import LINE_WIDTH
from audit_plugin.types import Failed, Reason

LINK = "https://mlflow.example/#/experiments/3/runs/0f2f/artifacts/report.html"


def test_text_is_short_and_without_control_characters(any_report):
    text = render_text(any_report)
    lines = text.splitlines()
    assert len(lines) <= 25
    assert all(len(line) <= LINE_WIDTH for line in lines[:-1])
    assert len(lines[-1]) <= 1100
    assert {unicodedata.category(character) for character in text.replace("\n", "")} <= {
        *("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "Zs", "Mn", "Mc", "Me"),
        *("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So"),
    }


def test_text_says_the_essentials(failing_report):
    text = render_text(failing_report)
    assert text.startswith("FAIL  models:/cifar-classifier/7\n")
    for expected in (
        "ship (class 8)",
        "447 of 450",
        "3.4 pixels",
        "NOT MEASURED",
        "beniful (inapplicable)",
        "93.4 %",
        "--seed 17",
    ):
        assert expected in text


def test_text_has_one_line_for_each_check_on_inputs(failing_report, passing_report):
    lines = render_text(failing_report).splitlines()
    (expert,) = [line for line in lines if "Backdoor expert:" in line]
    for expected in ("AUROC 0.991", "detects 92.0 %", "false alarms 1.2 %", "expert alone 0.913", "auxiliary model alone 0.502"):
        assert expected in expert
    (norms,) = [line for line in lines if "Activation norms:" in line]
    assert norms.endswith("AUROC of baselines: l1 norm 0.831, l2 norm 0.942")
    assert "  suspect inputs    1 of 3 flagged by at least one check" in lines
    without_trigger = render_text(passing_report)
    assert "Activation norms: no trigger to detect, false alarms" in without_trigger
    assert "AUROC" not in without_trigger
    assert "suspect inputs" not in without_trigger


def test_text_says_which_canaries_were_found(passing_report, failing_report):
    expected = "canaries          patch found (4.2 times smaller), blended not found (1.3 times smaller), warped not planted"
    assert expected in render_text(passing_report)
    assert "canaries " not in render_text(failing_report)


def test_text_says_which_class_stands_out_by_its_margin_and_its_noise(failing_report, inconclusive_report):
    text = render_text(failing_report)
    assert "Largest margins: ship (class 8) reaches the largest margin, 3.1 times the next class's" in text
    assert "Noise in the weights: ship (class 8) needs the least noise, the next class 1.6 times as much" in text
    assert "least noise" not in render_text(inconclusive_report)


def test_text_says_where_the_model_stands_among_clean_ones(passing_report, failing_report):
    assert "clean models      p = 0.52 against 24 of 'traffic signs' (least possible 0.04)" in render_text(passing_report)
    assert "clean models " not in render_text(failing_report)
    few = dataclasses.replace(passing_report.calibration, p_values={}, p_value=math.nan, problems=("It has 4 references.",))
    text = render_text(dataclasses.replace(passing_report, calibration=few))
    assert "clean models      not comparable with 'traffic signs': It has 4 references." in text


def test_markdown_has_the_checks_on_inputs_unless_there_is_no_room(failing_report):
    block = render_markdown_block(failing_report, LINK)
    assert "- **Activation norms:** AUROC 0.987, detects 96.0 %, false alarms 0.4 %" in block
    assert "l1 norm" not in block
    reasons = tuple(Reason("long", "a reason that takes room " * 9) for _ in range(3))
    crowded = dataclasses.replace(failing_report, decision=dataclasses.replace(failing_report.decision, reasons=reasons))
    block = render_markdown_block(crowded, "https://mlflow.example/" + "a" * 300)
    assert block.count("a reason that takes room") > 3
    assert "Activation norms" not in block


def test_text_of_an_inconclusive_audit(inconclusive_report):
    text = render_text(inconclusive_report)
    assert text.startswith("INCONCLUSIVE")
    assert "trigger_inversion (failed)" in text
    assert "bad_expert (inapplicable)" in text
    assert "canaries (missing)" in text


def test_text_counts_what_it_leaves_out(failing_report):
    reasons = tuple(Reason("many", f"reason {index}") for index in range(30))
    outcomes = tuple(Failed(f"check_{index}", "broke") for index in range(30))
    report = dataclasses.replace(
        failing_report, outcomes=outcomes, decision=dataclasses.replace(failing_report.decision, reasons=reasons)
    )
    text = render_text(report)
    assert "... and 26 more" in text
    assert "... and 25 more" in text
    assert text.splitlines()[-1].startswith("  repeat")


def test_no_outcome_is_said(inconclusive_report):
    assert "no check ran" in render_text(dataclasses.replace(inconclusive_report, outcomes=()))
    assert "no check ran" in render_markdown_block(
        dataclasses.replace(
            inconclusive_report, outcomes=(), decision=dataclasses.replace(inconclusive_report.decision, not_measured=())
        ),
        None,
    )


def test_markdown_is_within_its_limit_and_names_the_verdict(any_report):
    block = render_markdown_block(any_report, LINK)
    assert len(block) <= 1500
    assert block.startswith(f"### Backdoor audit: {any_report.decision.verdict.value.upper()}\n")
    assert block.count("](") - block.count("\\](") == 1
    assert f"[Open the report]({LINK})" in block


def test_markdown_of_a_hostile_model_has_no_html_and_no_second_link(hostile_report):
    block = render_markdown_block(hostile_report, None)
    assert "<" not in block
    assert "://e" not in block
    assert "](" not in block.replace("\\](", "")
    assert block.count("\n#") == 0
    assert not {character for character in block if unicodedata.category(character) in ("Cc", "Cf")} - {"\n"}


@pytest.mark.parametrize("escaped", ["*", "_", "`", "&", "<", "["])
def test_markdown_limit_holds_when_every_character_needs_an_escape(failing_report, escaped):
    names = (escaped * 4000,) * 10
    reasons = tuple(Reason("long", escaped * 4000) for _ in range(9))
    report = dataclasses.replace(
        failing_report,
        subject=dataclasses.replace(failing_report.subject, class_names=names),
        decision=dataclasses.replace(failing_report.decision, reasons=reasons),
    )
    block = render_markdown_block(report, "https://mlflow.example/" + "a" * 370)
    assert len(block) <= 1500
    assert "FAIL" in block


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "//evil.example", "https://x/) [a](b", "data:text/html,x", "https://x/ y", "a" * 9]
)
def test_markdown_leaves_out_odd_links(failing_report, link):
    assert "Open the report" not in render_markdown_block(failing_report, link)


def test_markdown_takes_a_path_on_the_same_server(failing_report):
    assert "[Open the report](/audit/x/7)" in render_markdown_block(failing_report, "/audit/x/7")
