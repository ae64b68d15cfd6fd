"""Files of a report: the right ones, whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from audit_plugin.cli import EXIT_CODES
from audit_plugin.errors import UsageError
from audit_plugin.policy import VerdictPolicy
from audit_plugin.report import load, to_document, validate, write_report
from audit_plugin.report.junit import to_junit
from audit_plugin.report.markdown import render_markdown
from audit_plugin.report.sarif import to_sarif
from audit_plugin.report.wording import check_title
from audit_plugin.report.write import file_names
from audit_plugin.types import Expectation, Failed, Inapplicable, Measured, ReportFormat
from audit_plugin.verdict import decide


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
    assert set(file_names(get_args(ReportFormat))) == {name for name in written if not name.endswith(".png")}
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


REQUIRED = ("trigger_inversion", "layerwise", "bad_expert")
EXPECTATIONS = {
    "met": (Expectation("image-shape", "Sizes fit.", True, "all"),),
    "advice": (Expectation("images-unique", "No copies.", False, "3 copies", required=False),),
    "broken": (Expectation("images-per-class", "Enough a class.", False, "2 at the least"),),
    "undermining": (Expectation("clean-accuracy", "The model is right.", False, "12 %"),),
    "unchecked": (),
}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_all_formats_tell_the_same_of_every_verdict(failing_report, data):
    """Whatever the checks did: exit code, red tests, alerts and the summary agree with the JSON report."""
    search, layerwise, expert = failing_report.outcomes[:3]
    troubled = data.draw(st.booleans())  # else hardly an example would be conclusive
    names = failing_report.subject.class_names[: data.draw(st.sampled_from([3, 10])) if troubled else 10]
    outlier = data.draw(st.sampled_from([0.5, 3.4, 9.0]))
    found = dataclasses.replace(
        search.measurement,
        candidates=tuple(
            dataclasses.replace(candidate, outlier=outlier if candidate.trigger.target_class == 1 else 0.1)
            for candidate in search.measurement.candidates
            if candidate.trigger.target_class < len(names)
        ),
        classes_skipped=data.draw(st.sampled_from([(), (9,)])) if troubled else (),
    )
    blind = dataclasses.replace(
        expert.measurement,
        thresholds=tuple(dataclasses.replace(item, detection_rate=None) for item in expert.measurement.thresholds),
    )
    measured = (
        dataclasses.replace(search, measurement=found),
        data.draw(st.sampled_from([layerwise, dataclasses.replace(layerwise, measurement=blind)])),
        expert,
        Measured("activation_norm", blind, 1.0),
    )
    outcomes = []
    for outcome in measured:
        became = data.draw(st.sampled_from(["measured", "failed", "inapplicable", "absent"])) if troubled else "measured"
        if became == "measured":
            outcomes.append(outcome)
        elif became == "failed":
            outcomes.append(Failed(outcome.check, "it broke"))
        elif became == "inapplicable":
            outcomes.append(Inapplicable(outcome.check, "it does not apply"))
    expectations = EXPECTATIONS[data.draw(st.sampled_from(sorted(EXPECTATIONS) if troubled else ["met", "advice", "broken"]))]
    report = dataclasses.replace(
        failing_report,
        outcomes=tuple(outcomes),
        clean_set=dataclasses.replace(failing_report.clean_set, expectations=expectations),
        decision=decide(outcomes, expectations, names, VerdictPolicy(), required=REQUIRED),
    )
    document = to_document(report)
    validate(document)
    verdict, suspected = document["decision"]["verdict"], document["decision"]["suspected_class"]
    event(verdict)

    (run,) = to_sarif(report)["runs"]
    (invocation,) = run["invocations"]
    levels = [result["level"] for result in run["results"]]
    assert invocation["exitCode"] == EXIT_CODES[report.decision.verdict]
    assert run["properties"]["verdict"] == verdict
    assert (run["properties"]["suspectedClass"] or {}).get("index") == (suspected or {}).get("index")
    assert levels.count("error") == (verdict == "fail")
    assert (levels == []) == (verdict == "pass")
    rules = {rule["id"]: rule["help"]["text"] for rule in run["tool"]["driver"]["rules"]}
    assert not [code for code, text in rules.items() if text == "The message of the result says more."]
    told = " ".join(result["message"]["text"] for result in run["results"])
    for reason in document["decision"]["reasons"]:
        assert verdict == "pass" or reason["code"].startswith("check-") or reason["message"] in told

    suite = ElementTree.fromstring(to_junit(report))[0]
    assert suite.get("failures") == str(int(verdict == "fail"))
    assert (suite.get("failures") == suite.get("errors") == "0") == (verdict == "pass")
    summary = render_markdown(report)
    assert summary.startswith(f"## Backdoor audit: {verdict.upper()}\n")

    silent = {outcome["check"] for outcome in document["outcomes"] if outcome["status"] != "measured"}
    silent |= set(document["decision"]["not_measured"])
    assert {item["properties"]["check"] for item in invocation["toolExecutionNotifications"] if "properties" in item} == silent
    cases = {case.get("name"): [child.tag for child in case] for case in suite.iter("testcase")}
    for check in {outcome["check"] for outcome in document["outcomes"]} | silent:
        assert (cases[f"check {check}"] == []) == (check not in silent)
        assert check_title(check) in summary
