"""junit.xml: valid under Jenkins' schema, red for everything that is no pass."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from audit_plugin.report.junit import to_junit
from audit_plugin.types import AuditReport, Expectation, Failed, Inapplicable, Reason

SCHEMA = Path(__file__).parents[2] / "schemas" / "junit-10.xsd"
RED = ("failure", "error")


@functools.cache
def schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(SCHEMA))


def suite_of(report: AuditReport) -> etree._Element:
    """The report's only suite, after the document was found valid and its counts right."""
    root = etree.fromstring(to_junit(report))
    schema().assertValid(root)
    (suite,) = root
    counted = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped")}
    assert {"failure": suite.get("failures"), "error": suite.get("errors"), "skipped": suite.get("skipped")} == {
        kind: str(count) for kind, count in counted.items()
    }
    assert suite.get("tests") == str(len(suite.findall("testcase")))
    return suite


def outcomes_of(report: AuditReport) -> dict[str, str | None]:
    """What became of each test case: 'failure', 'error', 'skipped' or None."""
    return {case.get("name"): case[0].tag if len(case) else None for case in suite_of(report).findall("testcase")}


def with_expectations(report: AuditReport, *expectations: Expectation) -> AuditReport:
    return dataclasses.replace(report, clean_set=dataclasses.replace(report.clean_set, expectations=expectations))


def test_the_schema_refuses_what_is_no_junit_report(failing_report):
    root = etree.fromstring(to_junit(failing_report))
    del root[0].attrib["errors"]
    assert not schema().validate(root)


def test_a_fail_is_one_failure_that_says_why(failing_report):
    assert outcomes_of(failing_report) == {
        "verdict": "failure",
        "check trigger_inversion": None,
        "check layerwise": None,
        "check bad_expert": None,
        "check activation_norm": None,
        "check maximum_margin": None,
        "check neuron_noise": None,
        "check wave_scan": None,
        "check beniful": "skipped",
        "clean set": None,
    }
    (failure,) = suite_of(failing_report).iter("failure")
    assert failure.get("type") == "class-stands-out"
    for reason in failing_report.decision.reasons:
        assert reason.message in failure.get("message") == failure.text


def test_a_pass_is_green(passing_report):
    assert set(outcomes_of(passing_report).values()) == {None}


def test_an_inconclusive_audit_is_an_error_and_so_is_every_check_it_lacked(inconclusive_report):
    assert outcomes_of(inconclusive_report) == {
        "verdict": "error",
        "check layerwise": None,
        "check trigger_inversion": "error",
        "check bad_expert": "skipped",
        "check canaries": "error",
        "clean set": None,
    }


def test_a_required_check_that_does_not_apply_is_an_error_not_skipped(inconclusive_report):
    decision = dataclasses.replace(inconclusive_report.decision, not_measured=("beniful",))
    report = dataclasses.replace(inconclusive_report, outcomes=(Inapplicable("beniful", "too narrow"),), decision=decision)
    assert outcomes_of(report)["check beniful"] == "error"


def test_a_broken_check_is_an_error_under_every_verdict(any_report):
    report = dataclasses.replace(any_report, outcomes=(*any_report.outcomes, Failed("new", "it broke")))
    assert outcomes_of(report)["check new"] == "error"


def test_no_check_at_all_is_an_error(passing_report):
    assert outcomes_of(dataclasses.replace(passing_report, outcomes=()))["check"] == "error"


def test_clean_images_that_do_not_fit_are_an_error_and_advice_is_none(passing_report):
    advice = Expectation("images-unique", "Images are unique.", False, "3 copies", required=False)
    required = Expectation("image-shape", "Every image has the model's size.", False, "3 have not")
    assert outcomes_of(with_expectations(passing_report, advice))["clean set"] is None
    assert outcomes_of(with_expectations(passing_report))["clean set"] == "error"
    (error,) = suite_of(with_expectations(passing_report, advice, required)).iter("error")
    assert error.get("message") == "Every image has the model's size. Found: 3 have not."


def test_the_stricter_form_of_apache_ant_holds_too(any_report):
    suite = suite_of(any_report)
    tags = [child.tag for child in suite]
    assert tags == ["properties", *["testcase"] * (len(tags) - 3), "system-out", "system-err"]
    assert {"name", "timestamp", "hostname", "package", "id", "time"} <= set(suite.attrib)
    for case in suite.findall("testcase"):
        assert set(case.attrib) == {"name", "classname", "time"}
        assert len(case) <= 1
        assert all(child.get("type") for child in case if child.tag in RED)


def test_time_is_in_seconds_and_of_the_audit_in_utc(failing_report):
    suite = suite_of(dataclasses.replace(failing_report, created="2025-11-21T04:30:00+02:00"))
    assert suite.get("timestamp") == "2025-11-21T02:30:00"
    assert suite.get("time") == "141.100"
    assert suite.find("testcase[@name='check layerwise']").get("time") == "3.200"


def test_hostile_text_is_shown_not_obeyed(hostile_report):
    document = to_junit(hostile_report)
    assert b"<script" not in document
    assert b"\x1b" not in document
    suite = suite_of(hostile_report)
    assert r"\x1b[2J" in suite.find("testcase/failure").text
    assert suite.get("name") == r"\x1b[2J\x1b[31mPASS\x1b[0m\x07"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=5, max_size=5))
def test_any_text_gives_valid_xml(failing_report, texts):
    report = dataclasses.replace(
        failing_report,
        model=dataclasses.replace(failing_report.model, uri=texts[0], pinned_uri=texts[1]),
        outcomes=(Failed(texts[2], texts[3]), Inapplicable(texts[4], texts[0])),
        command=texts[3],
        decision=dataclasses.replace(failing_report.decision, reasons=(Reason("class-stands-out", texts[4]),)),
        subject=dataclasses.replace(failing_report.subject, class_names=tuple(texts) * 2),
    )
    assert suite_of(report).get("errors") == "1"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, 12345.6789])
def test_any_duration_is_a_time(failing_report, seconds):
    measured = dataclasses.replace(failing_report.outcomes[1], seconds=seconds)
    case = suite_of(dataclasses.replace(failing_report, outcomes=(measured,))).find("testcase[@name='check layerwise']")
    assert case.get("time") == ("12345.679" if seconds > 1 and seconds < 1e9 else "0.000")
