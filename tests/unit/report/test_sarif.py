"""report.sarif.json: valid under the standard's schema, one alert a finding, nothing of the model's making in it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_plugin import cli, verdict
from audit_plugin.audit import SCORES_HIDDEN
from audit_plugin.intake.data_flow import ANSWERS_BY_CHANCE, ARCHITECTURAL_PATH
from audit_plugin.intake.pt2 import CHANGES_STATE
from audit_plugin.model.input_spec import INPUT_FROM_TAGS
from audit_plugin.report import dumps
from audit_plugin.report.sarif import CLEAN_SET, EVIDENCE, RULES, to_sarif
from audit_plugin.types import AuditReport, Expectation, Failed, Inapplicable, Reason, Verdict

SCHEMA = Path(__file__).parents[2] / "schemas" / "sarif-schema-2.1.0.json"
RELATIVE_URI = re.compile(r"(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+(?:/(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+)*")


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def run_of(report: AuditReport) -> dict:
    """The log's only run, after the log was found valid."""
    log = json.loads(dumps(to_sarif(report)))
    validator().validate(log)
    (run,) = log["runs"]
    return run


def deciding(report: AuditReport, *reasons: Reason, **changes: object) -> AuditReport:
    return dataclasses.replace(report, decision=dataclasses.replace(report.decision, reasons=reasons, **changes))


def uri_of(report: AuditReport) -> str:
    (uri,) = {
        location["physicalLocation"]["artifactLocation"]["uri"]
        for result in run_of(report)["results"]
        for location in result["locations"]
    }
    assert RELATIVE_URI.fullmatch(uri)
    assert not {"", ".", ".."} & set(uri.split("/"))
    return uri


def fingerprints(report: AuditReport) -> list[str]:
    return [result["partialFingerprints"]["primaryLocationLineHash"] for result in run_of(report)["results"]]


def test_the_schema_refuses_what_is_no_sarif(failing_report):
    log = to_sarif(failing_report)
    log["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(log)


def test_every_reason_of_the_verdict_has_a_rule_and_every_rule_a_reason():
    written = [
        call.args[0]
        for call in ast.walk(ast.parse(inspect.getsource(verdict)))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Reason"
    ]
    composed = [code.values[0] for code in written if isinstance(code, ast.JoinedStr)]
    assert [part.value for part in composed] == [CLEAN_SET]
    own = {code.value for code in written if isinstance(code, ast.Constant)}
    of_models = {ANSWERS_BY_CHANCE, ARCHITECTURAL_PATH, CHANGES_STATE, INPUT_FROM_TAGS, SCORES_HIDDEN}
    assert own | of_models == set(RULES) | EVIDENCE
    assert not set(RULES) & EVIDENCE


def test_exit_codes_are_those_of_the_command_line(failing_report, passing_report, inconclusive_report):
    for report in (failing_report, passing_report, inconclusive_report):
        (invocation,) = run_of(report)["invocations"]
        assert invocation["exitCode"] == cli.EXIT_CODES[report.decision.verdict]


def test_every_report_is_valid_and_its_results_name_their_rules(any_report):
    run = run_of(any_report)
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    assert set(RULES) <= set(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
    assert len(set(fingerprints(any_report))) == len(run["results"])
    # What GitHub asks of a rule.
    for rule in run["tool"]["driver"]["rules"]:
        for text in (rule["shortDescription"]["text"], rule["fullDescription"]["text"], rule["help"]["text"]):
            assert 0 < len(text) <= 1024


def test_a_fail_is_one_error_with_the_evidence_and_warnings(failing_report):
    report = deciding(
        failing_report,
        Reason("class-stands-out", "Class 'ship' behaves like the target of a backdoor."),
        Reason("trigger-size", "The trigger is small."),
        Reason("confirmed", "Two checks see it."),
        Reason("clean-set-images-per-class", "Too few images."),
    )
    run = run_of(report)
    assert [(result["ruleId"], result["level"]) for result in run["results"]] == [
        ("class-stands-out", "error"),
        ("clean-set-images-per-class", "warning"),
    ]
    assert run["results"][0]["message"]["text"] == (
        "Class 'ship' behaves like the target of a backdoor. The trigger is small. Two checks see it."
    )
    assert run["properties"]["suspectedClass"] == {"index": 8, "name": "ship"}
    rule = run["tool"]["driver"]["rules"][run["results"][0]["ruleIndex"]]
    assert rule["properties"]["security-severity"] == "8.0"


def test_a_pass_has_no_result_and_says_so(passing_report):
    run = run_of(passing_report)
    assert run["results"] == []
    assert run["properties"]["verdict"] == "pass"
    assert run["properties"]["model"]["digest"] == passing_report.model.digest
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is True
    assert invocation["toolExecutionNotifications"] == []


def test_what_was_not_measured_is_a_notification_and_where_it_was_needed_a_result(inconclusive_report):
    run = run_of(inconclusive_report)
    (invocation,) = run["invocations"]
    told = {item["properties"]["check"]: item for item in invocation["toolExecutionNotifications"]}
    assert {check: item["level"] for check, item in told.items()} == {
        "trigger_inversion": "error",
        "bad_expert": "note",
        "canaries": "error",
    }
    assert "out of memory" in told["trigger_inversion"]["message"]["text"]
    assert invocation["executionSuccessful"] is False
    warned = [result["message"]["text"] for result in run["results"] if result["ruleId"] == "check-not-measured"]
    assert [next(check for check in told if check in text) for text in warned] == ["trigger_inversion", "canaries"]
    assert {result["level"] for result in run["results"]} == {"warning"}


def test_a_check_that_was_not_needed_and_broke_is_a_warning_too(inconclusive_report):
    report = dataclasses.replace(inconclusive_report, outcomes=(*inconclusive_report.outcomes, Failed("beniful", "broke")))
    assert [result["ruleId"] for result in run_of(report)["results"]].count("check-failed") == 1


def test_an_audit_without_any_check_did_not_succeed(inconclusive_report):
    decision = dataclasses.replace(inconclusive_report.decision, reasons=(), not_measured=())
    run = run_of(dataclasses.replace(inconclusive_report, outcomes=(), decision=decision))
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    assert invocation["toolExecutionNotifications"][0]["message"]["text"] == "No check ran."
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("unexplained", "warning")


@pytest.mark.parametrize("reasons", [(), (Reason("a-new-code", "Something new."),), (Reason("trigger-size", "Small."),)])
def test_a_fail_is_an_error_whatever_its_reasons(failing_report, reasons):
    (result,) = run_of(deciding(failing_report, *reasons))["results"]
    assert result["level"] == "error"
    assert all(reason.message in result["message"]["text"] for reason in reasons)


def test_a_broken_expectation_has_a_rule_of_its_own(inconclusive_report):
    broken = (
        Expectation("image-shape", "Every image has the model's input size.", False, "3 images have not"),
        Expectation("classes-balanced", "Classes are balanced.", False, "they are not", required=False),
    )
    report = deciding(inconclusive_report, Reason("clean-set-image-shape", "Every image has ... Found: 3 images have not."))
    run = run_of(dataclasses.replace(report, clean_set=dataclasses.replace(report.clean_set, expectations=broken)))
    rules = {rule["id"]: rule for rule in run["tool"]["driver"]["rules"]}
    assert rules["clean-set-image-shape"]["help"]["text"].startswith("Every image has the model's input size.")
    assert "clean-set-classes-balanced" not in rules
    assert run["results"][0]["ruleId"] == "clean-set-image-shape"


@pytest.mark.parametrize(
    ("model", "location"),
    [
        ({}, "models/cifar-classifier/7/data/model.pt2"),
        ({"name": "signs / ü #1?"}, "models/signs%20%2F%20%C3%BC%20%231%3F/7/data/model.pt2"),
        ({"name": ".."}, "models/__/7/data/model.pt2"),
        ({"name": None, "version": None, "pinned_uri": "models:/m-0123"}, "models/m-0123/data/model.pt2"),
        ({"name": None, "version": None, "pinned_uri": "runs:/0123/model"}, "runs/0123/model/data/model.pt2"),
        ({"name": None, "version": None, "uri": "nets/signs", "pinned_uri": "/home/ada/nets/signs"}, "nets/signs/data/model.pt2"),
        ({"name": None, "version": None, "uri": "../signs", "pinned_uri": "/home/ada/signs"}, "models/signs/data/model.pt2"),
        (
            {"name": None, "version": None, "uri": "/home/ada/signs", "pinned_uri": "/home/ada/signs"},
            "models/signs/data/model.pt2",
        ),
    ],
)
def test_a_location_is_relative_and_escaped(failing_report, model, location):
    assert uri_of(dataclasses.replace(failing_report, model=dataclasses.replace(failing_report.model, **model))) == location


def test_a_model_file_in_the_repository_is_shown_where_it_lies(failing_report):
    model = dataclasses.replace(
        failing_report.model, name=None, version=None, uri="./nets/a b.onnx", pinned_uri="/w/nets/a b.onnx"
    )
    intake = dataclasses.replace(failing_report.intake, data_path="a b.onnx")
    assert uri_of(dataclasses.replace(failing_report, model=model, intake=intake)) == "nets/a%20b.onnx"


def test_each_model_version_is_an_analysis_of_its_own(failing_report):
    other = dataclasses.replace(failing_report, model=dataclasses.replace(failing_report.model, version="8"))
    assert run_of(failing_report)["automationDetails"]["id"] == "backdoor-audit/models/cifar-classifier/7/"
    assert run_of(other)["automationDetails"]["id"] == "backdoor-audit/models/cifar-classifier/8/"


def test_a_fingerprint_is_that_of_the_finding_not_of_the_run(failing_report):
    found = Reason("class-stands-out", "Class 'ship' behaves like the target of a backdoor.")
    report = deciding(failing_report, found, Reason("trigger-size", "3.4 pixels."))
    again = dataclasses.replace(
        deciding(report, found, Reason("trigger-size", "3.9 pixels.")),
        seed=99,
        created="2026-01-01T00:00:00+00:00",
        command="other",
        tool_version="0.2.0",
    )
    assert fingerprints(again) == fingerprints(report)
    assert fingerprints(deciding(report, found, suspected_class=3)) != fingerprints(report)
    changed = dataclasses.replace(report, model=dataclasses.replace(report.model, digest="sha256:" + "00" * 32))
    assert fingerprints(changed) != fingerprints(report)


def test_fingerprints_of_checks_do_not_depend_on_each_other_or_on_the_error(inconclusive_report):
    def warned(*outcomes: object) -> list[str]:
        missing = tuple(outcome.check for outcome in outcomes)
        return fingerprints(dataclasses.replace(deciding(inconclusive_report, not_measured=missing), outcomes=outcomes))

    both = warned(Failed("a", "at 0x7f01"), Inapplicable("b", "no gradients"))
    assert len(set(both)) == 2
    assert warned(Inapplicable("b", "no gradients")) == both[1:]
    assert warned(Failed("a", "at 0x7f02")) == both[:1]


def test_text_of_the_model_becomes_no_link_placeholder_or_control_character(hostile_report):
    run = run_of(hostile_report)
    shown = [*run["results"], *run["invocations"][0]["toolExecutionNotifications"]]
    assert len(shown) > 20
    for text in (item["message"]["text"] for item in shown):
        assert not re.search(r"\]\(|://\S|[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b]", text)
        assert not re.search(r"(?<!\{)\{(?:\{\{)*\d", text.replace("{{", ""))
    assert dumps(to_sarif(hostile_report)).isascii()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), min_size=8, max_size=8))
def test_any_text_gives_a_valid_log(failing_report, texts):
    report = dataclasses.replace(
        deciding(failing_report, Reason("class-stands-out", texts[0]), Reason(texts[1], texts[2])),
        model=dataclasses.replace(failing_report.model, name=texts[3], version=texts[4], uri=texts[5]),
        intake=dataclasses.replace(failing_report.intake, data_path=texts[6] or "x"),
        outcomes=(Failed(texts[7], texts[0]),),
        command=texts[1],
    )
    assert report.decision.verdict is Verdict.FAIL
    assert uri_of(report).startswith("models/")
