"""report.json: valid for every audit, refused for everything that is none."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import json
import math

import jsonschema
import numpy as np
import pytest

from audit_plugin.errors import UsageError
from audit_plugin.report import dumps, load, to_document, validate
from audit_plugin.report.schema import plain_json
from audit_plugin.types import Baseline, Calibration, Distribution, Failed, Measured, Verdict


def test_schema_is_a_valid_schema_of_its_draft():
    text = importlib.resources.files("audit_plugin.report").joinpath("report.schema.json").read_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_every_report_is_valid_and_survives_a_round_trip(any_report, tmp_path):
    document = to_document(any_report)
    validate(document)
    path = tmp_path / "report.json"
    path.write_text(dumps(document))
    assert load(path) == document


def test_file_is_ascii_without_control_characters(hostile_report):
    text = dumps(to_document(hostile_report))
    assert text.isascii()
    assert not {character for character in text if ord(character) < 32} - {"\n"}


def test_outcomes_carry_what_was_measured(failing_report):
    document = to_document(failing_report)
    search, layerwise, expert, beniful, _, margins, _, waves = document["outcomes"]
    assert [item["status"] for item in document["outcomes"]] == [*["measured"] * 3, "inapplicable", *["measured"] * 4]
    assert beniful["reason"] == "the tap in the middle has 12 features; 32 are needed"
    ship = search["measurement"]["candidates"][8]
    assert ship["target_class"] == {"index": 8, "name": "ship"}
    assert ship["size"] == pytest.approx(3.4, abs=0.01)
    assert ship["success"]["successes"] == 447
    assert ship["picture"] == "triggers/class_8.png"
    assert search["measurement"]["candidates"][18]["picture"] == "triggers/class_8_additive.png"
    scores = layerwise["measurement"]
    clean = failing_report.outcomes[1].measurement.clean
    assert scores["clean"]["quantiles"]["0.5"] == pytest.approx(float(np.median(clean)))
    assert sum(scores["histogram"]["clean"]) == scores["clean"]["count"] == 500
    assert sum(scores["histogram"]["stamped"]) == 450
    assert scores["thresholds"][0]["value"] == 2.5
    assert expert["measurement"]["clean"]["not_finite"] == 2
    wave = waves["measurement"]["candidates"][8]
    assert (wave["family"], wave["size_ratio"], wave["picture"]) == ("wave", None, "triggers/class_8_wave.png")
    assert margins["measurement"]["kind"] == "class_measurement"
    assert margins["measurement"]["classes"][8] == {
        "class": ship["target_class"],
        "value": 90.0,
        "ratio": pytest.approx(90 / 29),
    }


def test_scorers_carry_auroc_baselines_and_summarised_distributions(failing_report):
    document = to_document(failing_report)
    scores, measurement = failing_report.outcomes[4].measurement, document["outcomes"][4]["measurement"]
    assert measurement["auroc"] == 0.9871
    assert [(item["name"], item["auroc"]) for item in measurement["baselines"]] == [("l1 norm", 0.8312), ("l2 norm", 0.9417)]
    assert measurement["baselines"][0]["threshold"]["detection_rate"]["successes"] == 240
    assert document["outcomes"][2]["measurement"]["baselines"][1]["threshold"] is None
    for distribution, written in zip(scores.distributions, measurement["distributions"], strict=True):
        assert written["quantity"] == distribution.quantity
        for kind in ("clean", "stamped", "suspects"):
            values = getattr(distribution, kind).astype(np.float64)
            assert written[kind]["count"] == sum(written["histogram"][kind]) == len(values)
            assert written[kind]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-12)
            squares = sum((values - written[kind]["mean"]) ** 2)
            assert written[kind]["standard_deviation"] == pytest.approx(math.sqrt(squares / len(values)), rel=1e-9)
        assert len(written["histogram"]["edges"]) == 31


def test_scorers_without_a_trigger_or_a_finite_value(failing_report):
    measured = failing_report.outcomes[4]
    values = np.array([np.nan, np.inf], np.float32)
    scores = dataclasses.replace(
        measured.measurement,
        auroc=math.nan,
        baselines=(Baseline("none", None, None), Baseline("broken", math.nan, None)),
        distributions=(Distribution("broken", values, values[:0], values[:1]),),
    )
    document = to_document(dataclasses.replace(failing_report, outcomes=(dataclasses.replace(measured, measurement=scores),)))
    validate(document)
    dumps(document)
    written = document["outcomes"][0]["measurement"]
    assert written["auroc"] is None
    assert [item["auroc"] for item in written["baselines"]] == [None, None]
    nothing = {"mean": None, "standard_deviation": None}
    assert written["distributions"] == [
        {
            "quantity": "broken",
            "clean": {"count": 2, "not_finite": 2, **nothing},
            "stamped": {"count": 0, "not_finite": 0, **nothing},
            "suspects": {"count": 1, "not_finite": 1, **nothing},
            "histogram": None,
        }
    ]


def test_attention_maps_are_not_in_the_document(failing_report):
    examples = dataclasses.replace(failing_report.examples, clean_attention=None, stamped_attention=None)
    assert to_document(failing_report) == to_document(dataclasses.replace(failing_report, examples=examples))


def test_no_array_is_written_whole(failing_report):
    def longest(value):
        if isinstance(value, dict):
            return max((longest(item) for item in value.values()), default=0)
        if isinstance(value, list):
            return max([len(value), *(longest(item) for item in value)])
        return 0

    assert longest(to_document(failing_report)) <= 41


def test_numbers_that_are_not_finite_become_null(failing_report):
    accuracy = dataclasses.replace(failing_report.clean_set.clean_accuracy, value=math.nan, low=-math.inf)
    clean_set = dataclasses.replace(failing_report.clean_set, clean_accuracy=accuracy)
    document = to_document(dataclasses.replace(failing_report, clean_set=clean_set, policy={"limit": math.inf}))
    validate(document)
    assert document["clean_set"]["clean_accuracy"]["value"] is None
    assert document["clean_set"]["clean_accuracy"]["low"] is None
    assert document["policy"] == {"limit": None}
    assert "NaN" not in dumps(document)
    assert "Infinity" not in dumps(document)


def test_plain_json_of_what_facts_may_hold():
    value = {
        1: (np.float32(0.5), np.int64(3), np.bool_(True)),
        "array": np.arange(3),
        "large": np.zeros((50, 50)),
        "verdict": Verdict.FAIL,
        "set": {"b", "a"},
    }
    assert plain_json(value) == {
        "1": [0.5, 3, True],
        "array": [0, 1, 2],
        "large": {"shape": [50, 50], "dtype": "float64"},
        "verdict": "fail",
        "set": ["a", "b"],
    }


def broken(document, change):
    result = copy.deepcopy(document)
    change(result)
    return result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(schema_version="2.0"), "schema version '1.0'"),
        (lambda it: it.pop("schema_version"), "schema version '1.0'"),
        (lambda it: it.update(surprise=1), "surprise"),
        (lambda it: it["decision"].update(verdict="maybe"), r"\$.decision.verdict"),
        (lambda it: it.pop("outcomes"), "outcomes"),
        (lambda it: it["outcomes"][3].update(status="passed"), r"\$.outcomes\[3\]"),
        (lambda it: it["outcomes"][4]["measurement"].update(auroc=1.5), r"\$.outcomes\[4\]"),
        (lambda it: it["model"].update(digest="md5:00"), r"\$.model.digest"),
        (lambda it: it["clean_set"]["clean_accuracy"].update(value=1.2), r"\$.clean_set.clean_accuracy.value"),
        (lambda it: it["outcomes"][0]["measurement"]["candidates"][0].update(picture="../../etc/passwd"), r"\$.outcomes\[0\]"),
    ],
)
def test_invalid_documents_are_refused_with_the_place(failing_report, change, message):
    with pytest.raises(UsageError, match=message):
        validate(broken(to_document(failing_report), change))


@pytest.mark.parametrize("outcomes", [(), (Failed("layerwise", "broke"),), "with a failed one"])
def test_a_pass_without_measurement_or_with_a_failure_is_no_valid_report(passing_report, outcomes):
    chosen = (*passing_report.outcomes, Failed("beniful", "broke")) if isinstance(outcomes, str) else outcomes
    report = dataclasses.replace(passing_report, outcomes=chosen)
    with pytest.raises(UsageError, match=r"\$.outcomes"):
        validate(to_document(report))
    assert all(isinstance(outcome, Measured) for outcome in passing_report.outcomes)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"schema_version": NaN}', "[" * 100_000, '{"schema_version": "1.0"}', "\ufeff{}"]
)
def test_load_refuses_other_files_with_one_line(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json"):
        load(tmp_path / "none.json")


def test_pairs_of_one_target_get_their_own_pictures(failing_report):
    measured = failing_report.outcomes[0]
    first = measured.measurement.candidates[0]
    pairs = tuple(
        dataclasses.replace(first, trigger=dataclasses.replace(first.trigger, source_class=source)) for source in (None, 3, 3)
    )
    outcome = dataclasses.replace(measured, measurement=dataclasses.replace(measured.measurement, candidates=pairs))
    document = to_document(dataclasses.replace(failing_report, outcomes=(outcome,)))
    validate(document)
    pictures = [item["picture"] for item in document["outcomes"][0]["measurement"]["candidates"]]
    assert pictures == ["triggers/class_0.png", "triggers/class_0_from_3.png", "triggers/class_0_from_3_2.png"]


def test_calibration_is_written_with_null_for_what_was_not_compared(passing_report, failing_report):
    document = to_document(passing_report)
    validate(document)
    assert document["calibration"]["p_values"]["trigger_outlier"] == 0.36
    alone = dataclasses.replace(passing_report, calibration=Calibration({"detection": 0.3}, {"classes": 43.0}))
    document = to_document(alone)
    validate(document)
    assert (document["calibration"]["p_value"], document["calibration"]["pool"]) == (None, "")
    assert to_document(failing_report)["calibration"] is None


def test_canaries_are_written_with_null_for_what_was_not_searched(passing_report, failing_report):
    document = to_document(passing_report)
    validate(document)
    found, missed, unplanted = document["canaries"]["results"]
    assert [entry["standing"] for entry in (found, missed, unplanted)] == ["found", "not found", "not planted"]
    assert (found["outlier"], found["target_class"]["index"], found["attack_success"]["value"]) == (6.2, 3, 0.97)
    assert (unplanted["outlier"], unplanted["size_ratio"]) == (None, None)
    assert to_document(failing_report)["canaries"] is None
