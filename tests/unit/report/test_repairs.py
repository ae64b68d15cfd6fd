"""What a repair did, in words and as JSON: the figures, no control character, no NaN."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from audit_plugin.report.repairs import render_repair, repair_document
from audit_plugin.report.schema import dumps
from audit_plugin.types import Rate, RepairReport

REPAIR = RepairReport(
    method="beniful",
    target_class=1,
    trigger_count=2,
    accuracy_before=Rate(0.93, 279, 300, 0.895, 0.956),
    accuracy_after=Rate(0.92, 276, 300, 0.883, 0.948),
    flip_rate_before=Rate(0.99, 267, 270, 0.97, 1.0),
    flip_rate_after=Rate(0.02, 5, 270, 0.006, 0.043),
    facts={"rounds": [{"calibrate_accuracy": 0.925}]},
)


def test_text_has_both_addresses_and_all_figures(failing_report):
    text = render_repair(REPAIR, failing_report, "models:/digits/4")
    first, *rest = text.splitlines()
    assert first == f"REPAIRED  {failing_report.model.pinned_uri} -> models:/digits/4"
    body = "\n".join(rest)
    for figure in (
        "beniful",
        "2 recovered triggers",
        "automobile (class 1)",
        "93.0 %",
        "92.0 %",
        "99.0 %",
        "2.0 %",
        "of other classes",
    ):
        assert figure in body
    assert "note" not in body


@pytest.mark.parametrize("flavour", ["state_dict", "pickle"])
def test_a_changed_form_is_said(failing_report, flavour):
    changed = dataclasses.replace(failing_report, intake=dataclasses.replace(failing_report.intake, flavour=flavour))
    assert f"The original is a {flavour}" in render_repair(REPAIR, changed, "models:/digits/4")
    assert flavour in repair_document(REPAIR, changed, "models:/digits/4")["notes"][0]


def test_document_is_json_without_nan(failing_report):
    unmeasured = dataclasses.replace(REPAIR, flip_rate_after=Rate(math.nan, 0, 0, 0.0, 1.0))
    document = json.loads(dumps(repair_document(unmeasured, failing_report, "models:/digits/4")))
    assert document["original_digest"] == failing_report.model.digest
    assert document["target_class"] == {"index": 1, "name": "automobile"}
    assert document["accuracy_after"] == {"value": 0.92, "successes": 276, "trials": 300, "low": 0.883, "high": 0.948}
    assert document["flip_rate_after"]["value"] is None
    assert document["facts"] == REPAIR.facts


def test_hostile_names_stay_text(failing_report):
    names = ("a", "\x1b[31mred\u202egpj\nPASS  models:/digits/4")
    hostile = dataclasses.replace(failing_report, subject=dataclasses.replace(failing_report.subject, class_names=names))
    text = render_repair(REPAIR, hostile, "models:/digits/4")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not [line for line in text.splitlines() if line.startswith("PASS")]
