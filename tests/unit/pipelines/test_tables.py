from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from audit_plugin.errors import UsageError
from audit_plugin.maths.rates import rate
from audit_plugin.model.subject import Subject
from audit_plugin.policy import Policy, VerdictPolicy
from audit_plugin.types import ImageArray, LabelledImages
from audit_plugin.zoo import attacks
from pipelines import benchmark, tables, zoo, zoo_models
from pipelines.peers import InputResult
from pipelines.table_report import (
    attack_rows,
    detector_rows,
    input_rows,
    judged,
    markdown,
    poisoning_rows,
    repair_rows,
    roc_curve,
    sweep_rows,
    truth_of,
    verdict_rows,
    write_report,
)
from pipelines.tables import CARD, DETECTORS, Job, Known, measure, plan, read_records

BACKDOORED, CLEAN = "digits_badnets_cnn", "digits_clean_cnn_0"


# ---------------------------------------------------------------------------------------------- made-up results


def result(model: str, detector: str = "audit", *, attack: str | None = None, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A result as the benchmark writes it; ``score``, ``flagged``, ``suspected`` and ``success`` in one line."""
    success = more.pop("success", 1.0)
    record: dict[str, Any] = {
        "model": model,
        "detector": detector,
        "seed": seed,
        "state": "measured",
        "note": "",
        "settings": {"clean_images": 1000, "test_images": 2000},
        "truth": {
            "attack": attack,
            "data": "cifar10",
            "architecture": "vgg",
            "hardness": None,
            "clean_accuracy": 0.9,
            "attack_success_rate": success if attack else None,
            "target_class": 3 if attack else None,
        },
        "machine": {"processor": "x86_64", "cores": 2},
        "device": "cpu",
        "versions": {"torch": "2"},
        "seconds": more.pop("seconds", 10.0),
        "peak_memory_mib": 500,
        "peak_gpu_memory_mib": None,
    }
    if "score" in more:
        flagged = more.pop("flagged", False)
        record["judgement"] = {
            "score": more.pop("score"),
            "flagged": flagged,
            "suspected_class": more.pop("suspected", 3),
            "verdict": more.pop("verdict", "fail" if flagged else "pass"),
        }
    return record | more


MADE_UP = [
    result("clean_1", score=1.0),
    result("clean_2", score=2.0, flagged=True),
    result("clean_3", score=0.5, verdict="inconclusive"),
    result("patch_1", attack="BadNets", score=9.0, flagged=True),
    result("patch_2", attack="BadNets", score=8.0, flagged=True, suspected=7),
    result("blend_1", attack="Blended", score=1.5),
    result("blend_2", attack="Blended", state="failed", note="MemoryError: no | room"),
    result("blend_3", attack="Blended", success=0.6, score=9.0, flagged=True),
    result("all", attack="AllToAll", score=1.0),
]


def test_detection_and_false_alarms_are_counted_over_models() -> None:
    (row,) = detector_rows(MADE_UP)
    assert row["detector"] == "audit"
    assert row["false_alarms"] == rate(1, 3)
    assert row["detected"] == rate(2, 4)  # what failed counts as missed; all-to-all and what did not take are elsewhere
    assert row["right_class"] == rate(1, 2)
    assert row["not_measured"] == 1
    assert row["auroc"] == pytest.approx(8 / 12)  # the wrong way round are (2.0, 1.5) and what failed against all three


def test_a_model_that_could_not_be_measured_has_the_lowest_score_whatever_it_is() -> None:
    clean, bad = result("clean", score=-100.0), result("bad", attack="BadNets", score=-99.0, flagged=True)
    clean_missing, bad_missing = result("clean_2", state="failed"), result("bad_2", attack="BadNets", state="failed")

    def area(*records: dict[str, Any]) -> float | None:
        (row,) = detector_rows(records)
        return row["auroc"]

    assert area(clean, bad) == 1.0
    assert area(clean, bad, bad_missing) == 0.5
    assert area(clean, bad, clean_missing) == 1.0
    assert area(clean, bad, clean_missing, bad_missing) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert area(clean, bad_missing) == 0.0
    assert area(clean, bad, clean_missing | {"seed": 1}, bad_missing | {"seed": 1}) == 1.0, (
        "a seed without any figure has no area"
    )
    curve = roc_curve(judged([clean, bad, clean_missing, bad_missing]))
    assert curve == ([0, 0, 0.5, 1], [0, 0.5, 0.5, 1])


def test_attacks_that_did_not_take_are_counted_apart() -> None:
    rows = {row["attack"]: row["audit"] for row in attack_rows(MADE_UP)}
    assert list(rows) == ["(clean)", "AllToAll", "BadNets", "Blended", "(did not take)"]
    assert rows["Blended"] == rate(0, 2)
    assert rows["(did not take)"] == rate(1, 1)
    assert "1 whose attack did not take" in markdown(MADE_UP)


@pytest.mark.parametrize(("success", "truth"), [(0.9, "one target"), (0.89, "did not take"), (None, "did not take")])
def test_an_attack_must_succeed_nine_times_in_ten(success: float | None, truth: str) -> None:
    assert truth_of(result("model", attack="BadNets", success=success)) == truth


def test_verdicts_are_counted_by_truth_and_a_failed_audit_is_no_pass() -> None:
    rows = {row["truth"]: row for row in verdict_rows(MADE_UP)}
    assert rows["clean"] == {"truth": "clean", "pass": 1, "fail": 1, "inconclusive": 1, "not measured": 0}
    assert rows["one target"] == {"truth": "one target", "pass": 1, "fail": 2, "inconclusive": 0, "not measured": 1}


def test_without_clean_models_there_is_no_area_and_no_rate_of_false_alarms(tmp_path: Path) -> None:
    records = [record for record in MADE_UP if record["truth"]["attack"]]
    (row,) = detector_rows(records)
    assert row["auroc"] is None
    assert row["false_alarms"].trials == 0
    assert roc_curve(judged(records)) is None
    write_report(records, tmp_path)
    assert "| audit | none | none | 2/4" in (tmp_path / "tables.md").read_text("utf-8")
    assert ElementTree.parse(tmp_path / "roc.svg").getroot().tag.endswith("svg")
    with (tmp_path / "detectors.csv").open() as stream:
        (written,) = csv.DictReader(stream)
    assert written["auroc"] == written["false_alarms_value"] == ""
    assert written["detected_successes"] == "2"


def test_no_results_at_all_give_tables_that_say_so(tmp_path: Path) -> None:
    write_report([], tmp_path)
    assert (tmp_path / "tables.md").read_text("utf-8").count("Nothing was measured.") == 5
    assert not (tmp_path / "roc.svg").exists()


def test_several_seeds_show_their_spread_and_the_majority_decides() -> None:
    records = [
        result(model, attack=attack, seed=seed, score=score, flagged=score > 5)
        for seed, scores in enumerate([(1, 2, 9, 9), (1, 6, 9, 4), (1, 6, 3, 4)])
        for (model, attack), score in zip(
            [("clean_1", None), ("clean_2", None), ("bad_1", "BadNets"), ("bad_2", "BadNets")], scores, strict=True
        )
    ]
    (row,) = detector_rows(records)
    assert row["seeds"] == 3
    assert (row["auroc_least"], row["auroc_most"]) == (0.5, 1.0)
    assert row["auroc"] == pytest.approx((1.0 + 0.75 + 0.5) / 3)
    assert row["false_alarms"] == rate(1, 2)
    assert row["detected"] == rate(1, 2)
    assert next(entry for entry in judged(records) if entry.model == "bad_2").score == 4


def test_a_seed_that_was_not_measured_counts_as_not_flagged() -> None:
    records = [
        result("bad", attack="BadNets", score=9.0, flagged=True),
        result("bad", attack="BadNets", seed=1, state="failed", note="broke"),
    ]
    assert not judged(records)[0].flagged


def test_figures_on_inputs_are_means_over_models_and_leave_out_what_has_none() -> None:
    def row(detected: float | None, **more: Any) -> dict[str, Any]:
        return {"check": "layerwise", "rule": "tau = 2.5", "false_positive_rate": 0.02, "detection_rate": detected} | more

    records = [
        result("a", "checks", attack="BadNets", inputs=[row(1.0, auroc=1.0), {"check": "beniful", "note": "too few"}]),
        result("b", "checks", attack="BadNets", inputs=[row(0.5, auroc=0.9)]),
        result("c", "checks", inputs=[row(None)]),
        result("d", "checks", attack="WaNet", success=0.2, inputs=[row(0.0, auroc=0.1)]),
    ]
    clean, failed, missing, badnets = input_rows(records)
    assert (missing["check"], missing["rule"], missing["measured"], missing["attempts"]) == ("beniful", "", 0, 1)
    assert (clean["attack"], clean["detection_rate"], clean["false_positive_rate"]) == ("(clean)", None, 0.02)
    assert failed["attack"] == "(did not take)"
    assert (badnets["models"], badnets["detection_rate"], badnets["least_detection_rate"]) == (2, 0.75, 0.5)
    assert badnets["auroc"] == pytest.approx(0.95)
    assert detector_rows(records) == []  # it judges no models


def test_a_check_that_could_not_measure_is_counted_and_listed() -> None:
    row = {"check": "bad_expert", "rule": "1% quantile", "false_positive_rate": 0.0, "detection_rate": 1.0, "auroc": 1.0}
    baseline = row | {"check": "bad_expert: expert alone"}
    note = {"check": "bad_expert", "note": "Fine-tuning cost more than 3%"}
    records = [
        result("a", "checks", attack="BadNets", inputs=[row, baseline]),
        result("b", "checks", attack="BadNets", inputs=[note]),
        result("c", "checks", attack="BadNets", state="failed", note="MemoryError: no room"),
        result("d", "checks", attack="WaNet", inputs=[note]),
        result("e", "mm_bd", attack="WaNet", state="failed", note="has nothing to do with inputs"),
    ]
    counted = {(row["attack"], row["check"]): (row["measured"], row["attempts"]) for row in input_rows(records)}
    assert counted == {
        ("BadNets", "bad_expert"): (1, 3),
        ("BadNets", "bad_expert: expert alone"): (1, 3),
        ("WaNet", "bad_expert"): (0, 1),
        ("WaNet", "bad_expert: expert alone"): (0, 1),
    }
    text = markdown(records).replace("\\", "")
    assert "| BadNets | bad_expert | 1% quantile | 1/3 | 100.0% (100.0%) | 0.0% | 1.000 |  |" in text
    assert "| WaNet | bad_expert | 1% quantile | 0/1 |  |  |  |  |" in text
    assert "the fourth is in no mean" in text
    listed = text[text.index("## Not measured") :]
    assert "| bad_expert | b | Fine-tuning cost more than 3% |" in listed
    assert "| bad_expert | d | Fine-tuning cost more than 3% |" in listed
    assert "| checks | c | MemoryError: no room |" in listed


def test_poisoning_rates_count_what_could_not_be_measured_too() -> None:
    records = [
        of_inputs("a", "BadNets", {2.5: (0.5, 0.02)}, share=0.01),
        of_inputs("b", "BadNets", {2.5: (0.9, 0.04)}, share=0.05),
        result("c", "checks", attack="BadNets", inputs=[{"check": "layerwise", "note": "too few"}]),
    ]
    records[2]["truth"]["poisoning_rate"] = 0.05
    assert [(row["poisoning_rate"], row["measured"], row["attempts"]) for row in poisoning_rows(records)] == [
        (0.01, 1, 1),
        (0.05, 1, 2),
    ]
    assert "| 5.0% | layerwise | tau = 2.5 | 1/2 | 90.0% / 4.0% |" in markdown(records).replace("\\", "")


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_backdoor_that_never_returned_is_told_from_one_that_was_not_there(seeds: int) -> None:
    figures = {"clean_accuracy": 0.9}
    rows = [
        {"repair": "none", **figures},
        {"repair": "beniful", **figures, "steps_to_return": None},
        {"repair": "norm_pruning", **figures, "steps_to_return": 0},
    ]
    records = [
        result(model, "repairs", attack=attack, seed=seed, repairs=rows)
        for model, attack in (("bad", "BadNets"), ("clean", None))
        for seed in range(seeds)
    ]
    text = markdown(records).replace("\\", "")
    lines = text[text.index("## Repairs") :].splitlines()
    seed = [f"| {number} " if seeds > 1 else "" for number in range(seeds)]
    assert lines[2].startswith("| model | seed | repair |" if seeds > 1 else "| model | repair |")
    for column in seed:
        assert f"| bad {column}| none | 90.0% |  |  |  |  |" in lines
        assert f"| bad {column}| beniful | 90.0% |  |  | more than {tables.MOST_STEPS} |  |" in lines
        assert f"| bad {column}| norm_pruning | 90.0% |  |  | 0 |  |" in lines
        assert f"| clean {column}| beniful | 90.0% |  |  |  |  |" in lines
    assert [row["steps_to_return"] for row in repair_rows(records) if row["repair"] == "beniful"] == (
        [f"more than {tables.MOST_STEPS}"] * seeds + [None] * seeds
    )


def made_with(detector: str, policy: str | None, tool: str, model: str = "a") -> dict[str, Any]:
    settings = {"clean_images": 1000, "test_images": 2000} | ({"policy": policy} if policy else {})
    return result(model, detector, score=1.0, settings=settings, versions={tables.TOOL: tool, "torch": "2"})


def test_the_policy_and_the_version_stand_where_the_machine_stands() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    text = markdown([made_with("audit", digest, "0.1.0"), made_with("mm_bd", None, "0.1.0")]).replace("\\", "")
    head = text[: text.index("## Whole models")]
    assert f"{tables.TOOL} 0.1.0, torch 2" in head
    assert "Policy sha256:0123456789ab." in head
    assert "0123456789abc" not in head
    assert "side by side" not in head


def test_results_of_several_policies_or_versions_are_said_to_be_mixed() -> None:
    records = [made_with("audit", "sha256:" + "a" * 64, "0.1.0"), made_with("checks", "sha256:" + "b" * 64, "0.2.0")]
    head = markdown([*records, made_with("repairs", None, "0.2.0")]).replace("\\", "")
    assert "not recorded (results: 1), sha256:aaaaaaaaaaaa (results: 1), sha256:bbbbbbbbbbbb (results: 1)" in head
    assert f"several versions of {tables.TOOL} stand here side by side" in head
    assert "0.1.0 (results: 1), 0.2.0 (results: 2)" in head


def of_inputs(
    model: str, attack: str | None, rates: dict[float, tuple[float, float]], share: float | None = None
) -> dict[str, Any]:
    """A result of the checks: both rates at each value of tau, those at 2.5 by its own rule too."""
    rows = [
        {"check": "layerwise", "false_positive_rate": alarms, "detection_rate": detected if attack else None} | place
        for value, (detected, alarms) in rates.items()
        for place in ({"swept": "tau", "value": value}, *([{"rule": "tau = 2.5", "auroc": 0.9}] if value == 2.5 else []))
    ]
    found = result(model, "checks", attack=attack, inputs=rows)
    found["truth"]["poisoning_rate"] = share
    return found


def test_a_swept_threshold_has_a_table_of_its_own() -> None:
    records = [
        of_inputs("a", "BadNets", {1.0: (1.0, 0.2), 2.5: (0.8, 0.02)}),
        of_inputs("b", "BadNets", {1.0: (0.9, 0.1), 2.5: (0.6, 0.04)}),
        of_inputs("c", None, {1.0: (0.0, 0.3), 2.5: (0.0, 0.01)}),
    ]
    clean, _, low, high = sweep_rows(records)
    assert (clean["attack"], clean["detection_rate"], clean["false_positive_rate"]) == ("(clean)", None, 0.3)
    assert (low["attack"], low["value"], low["detection_rate"]) == ("BadNets", 1.0, pytest.approx(0.95))
    assert (high["value"], high["detection_rate"], high["false_positive_rate"]) == (2.5, pytest.approx(0.7), pytest.approx(0.03))
    assert [row["models"] for row in input_rows(records)] == [1, 2]  # what is swept is no rule
    text = markdown(records).replace("\\", "")  # some dots are escaped
    assert "| BadNets | layerwise | 95.0% / 15.0% | 70.0% / 3.0% |" in text
    assert "| (clean) | layerwise | 30.0% | 1.0% |" in text
    assert "## Poisoning rates" not in text


def test_an_attack_of_several_poisoning_rates_is_told_by_rate() -> None:
    records = [
        of_inputs("a", "BadNets", {2.5: (0.5, 0.02)}, share=0.01),
        of_inputs("b", "BadNets", {2.5: (0.9, 0.04)}, share=0.05),
        of_inputs("c", "BadNets", {2.5: (0.8, 0.02)}, share=0.05),
        of_inputs("d", "Blended", {2.5: (0.7, 0.02)}, share=0.05),
        of_inputs("e", None, {2.5: (0.0, 0.02)}),
    ]
    rare, common = poisoning_rows(records)
    assert (rare["attack"], rare["poisoning_rate"], rare["models"], rare["detection_rate"]) == ("BadNets", 0.01, 1, 0.5)
    assert (common["models"], common["detection_rate"]) == (2, pytest.approx(0.85))
    assert "## Poisoning rates" in markdown(records)


def test_the_published_figure_stands_beside_the_measured_one() -> None:
    text = markdown([of_inputs("a", "WaNet", {2.5: (0.5, 0.02)}), of_inputs("b", "SIG", {2.5: (0.5, 0.02)})])
    (wanet,) = [line for line in text.splitlines() if line.startswith("| WaNet | layerwise | tau")]
    (sig,) = [line for line in text.splitlines() if line.startswith("| SIG | layerwise | tau")]
    assert wanet.replace("\\", "").endswith("| 91.0% / 1.5% |")
    assert sig.endswith("|  |")


def test_names_and_notes_cannot_break_the_tables(tmp_path: Path) -> None:
    hostile = "x | <img src=x onerror=alert(1)>\n# heading"
    records = [result(hostile, "repairs", repairs=[{"repair": "none", "clean_accuracy": 0.9, "note": "a | b"}])]
    records.append(result(hostile, state="failed", note=hostile))
    text = markdown(records)
    assert "<img" not in text
    assert "\n# heading" not in text
    widths = {line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("| x ")}
    assert widths == {8}
    write_report(records, tmp_path)
    with (tmp_path / "repairs.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["model"] == hostile


def test_the_curve_goes_from_nothing_to_everything() -> None:
    curve = roc_curve(judged(MADE_UP))
    assert curve is not None
    false_alarms, detected = curve
    assert (false_alarms[0], detected[0], false_alarms[-1], detected[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_alarms) >= 0).all()
    assert (np.diff(detected) >= 0).all()


# --------------------------------------------------------------------------------------------------- the plan


def fake_zoo(folder: Path, *names: str) -> Path:
    for name in names:
        attack = "BadNets" if "bad" in name else None
        (folder / name).mkdir(parents=True)
        card = {"attack": attack, "settings": {"target_class": 0} if attack else {}, "data": "digits", "architecture": "cnn"}
        card |= {"clean_accuracy": 0.9, "attack_success_rate": 1.0, "sha256": "0"}
        (folder / name / CARD).write_text(json.dumps(card), "utf-8")
    return folder


def test_clean_and_backdoored_models_come_in_turns(tmp_path: Path) -> None:
    folder = fake_zoo(tmp_path, "bad_1", "bad_2", "clean_1", "clean_2", "clean_3")
    jobs = plan(folder, tmp_path / "out", tmp_path, detectors=["mm_bd"])
    assert [job.model.name for job in jobs] == ["clean_1", "bad_1", "clean_2", "bad_2", "clean_3"]
    assert {job.clean_model for job in jobs} == {folder / "clean_1"}
    few = plan(folder, tmp_path / "out", tmp_path, detectors=["mm_bd", "strip"], limit=2, seeds=3)
    assert len(few) == 2 * 2 * 3
    assert len({job.file for job in few}) == len(few)


def test_an_unknown_detector_and_an_empty_zoo_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No detector is named 'neural_clean'\. Did you mean 'neural_cleanse'\?"):
        plan(fake_zoo(tmp_path / "zoo", "clean"), tmp_path, tmp_path, detectors=["neural_clean"])
    told = CliRunner().invoke(benchmark.app, ["tables", str(tmp_path / "none"), "-o", str(tmp_path)])
    assert told.exit_code == 2
    assert "Train some first" in told.output
    assert "Traceback" not in told.output


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="cpu"):
        tables.run([], device=device)


def test_every_detector_has_a_measurement() -> None:
    assert set(tables._DETECT) == set(DETECTORS)


def test_a_result_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "results" / "model").mkdir(parents=True)
    (tmp_path / "results" / "model" / "audit-0.json").write_text("{", "utf-8")
    with pytest.raises(UsageError, match=r"audit-0.json' is no result"):
        read_records(tmp_path)


# ------------------------------------------------------------------------------------------- on real models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    options = ["--recipe", "digits", "--epochs", "8", "--width", "8", "--device", "cpu", "--only", BACKDOORED, "--only", CLEAN]
    result = CliRunner().invoke(zoo.app, ["train", str(folder), *options])
    assert result.exit_code == 0, result.output
    return folder


def job_of(trained: Path, output: Path, model: str, detector: str) -> Job:
    return Job(trained / model, detector, 0, output, trained, 200, 150, trained / CLEAN)


def measured(job: Job) -> dict[str, Any]:
    measure(job)
    record: dict[str, Any] = json.loads(job.file.read_text("utf-8"))
    return record


@pytest.mark.slow
def test_the_checks_are_measured_at_both_thresholds_on_true_triggers(trained: Path, tmp_path: Path) -> None:
    record = measured(job_of(trained, tmp_path, BACKDOORED, "checks"))
    assert record["state"] == "measured", record["note"]
    rows = {(row["check"], row["rule"]): row for row in record["inputs"]}
    assert {("layerwise", "tau = 2.5"), ("layerwise", "1% quantile"), ("bad_expert", "1% quantile")} <= set(rows)
    assert ("beniful", "1% quantile") in rows
    assert rows["layerwise", "tau = 2.5"]["auroc"] > 0.9
    assert rows["layerwise", "tau = 2.5"]["clean_images"] == 150
    assert 100 < rows["layerwise", "tau = 2.5"]["triggered_images"] < 150  # images of the target class are no victims
    assert record["peak_memory_mib"] > 100


def test_a_peer_on_inputs_gets_one_triggered_input_to_twenty(trained: Path, tmp_path: Path) -> None:
    (row,) = measured(job_of(trained, tmp_path, BACKDOORED, "strip"))["inputs"]
    assert (row["clean_images"], row["triggered_images"]) == (150, 8)
    assert row["triggered_share"] > 0.2  # of the target class, which does not matter to what judges each input alone
    (row,) = measured(job_of(trained, tmp_path, CLEAN, "strip"))["inputs"]
    assert (row["triggered_images"], row["detection_rate"], row["auroc"]) == (0, None, None)
    assert row["triggered_share"] is None


class Clusters:
    """A peer that tells triggered inputs perfectly, and flags them by activation clustering's rule: under 35 % of their class."""

    name, compares_inputs = "activation_defence", True

    def __init__(self, clean_inputs: int) -> None:
        self.triggered_share, self._clean_inputs = 0.0, clean_inputs

    def judge_inputs(self, subject: Subject, clean: LabelledImages, inputs: ImageArray, rng: np.random.Generator) -> InputResult:
        answers, triggered = subject.predict(inputs), np.arange(len(inputs)) >= self._clean_inputs
        flagged = np.zeros(len(inputs), dtype=np.bool_)
        for label in np.unique(answers[triggered]):
            share = float(triggered[answers == label].mean())
            self.triggered_share = max(share, self.triggered_share)
            for cluster, size in ((triggered, share), (~triggered, 1 - share)):
                flagged |= (answers == label) & cluster & (size < 0.35)
        return InputResult(flagged, None)


def test_a_peer_that_compares_inputs_can_succeed_in_every_class(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Clusters(clean_inputs=150)
    monkeypatch.setattr(tables, "INPUT_PEERS", {peer.name: peer})
    (row,) = measured(job_of(trained, tmp_path, BACKDOORED, peer.name))["inputs"]
    assert 0.0 < peer.triggered_share <= 0.15
    assert (row["detection_rate"], row["false_positive_rate"]) == (1.0, 0.0)
    assert row["triggered_share"] == pytest.approx(peer.triggered_share)
    (row,) = measured(job_of(trained, tmp_path, CLEAN, peer.name))["inputs"]
    assert (row["triggered_images"], row["triggered_share"]) == (0, None)


@pytest.mark.parametrize(("classes", "expected"), [(2, 100), (10, 35), (43, 8), (1000, 1)])
def test_triggered_inputs_are_few_among_those_of_the_class_that_they_are_answered_with(classes: int, expected: int) -> None:
    clean = np.arange(2000) % classes
    mixed = tables.mixed_in(clean, np.full(1900, 1), True, np.random.default_rng(0))
    assert len(mixed) == len(set(mixed)) == expected  # of two classes one in twenty is the smaller bound
    assert len(tables.mixed_in(clean, np.full(1900, 1), False, np.random.default_rng(0))) == 100
    everywhere = (clean + 1) % classes  # all-to-all
    chosen = everywhere[tables.mixed_in(clean, everywhere, True, np.random.default_rng(0))]
    assert 0 < len(chosen) <= 100
    shares = np.bincount(chosen, minlength=classes) / (np.bincount(chosen, minlength=classes) + np.bincount(clean))
    assert shares.max() <= (0.15 if classes < 1000 else 1 / 3)  # one beside two clean ones is the least there can be


def test_only_the_images_that_an_attack_moves_are_triggered(trained: Path, tmp_path: Path) -> None:
    known = tables.load_known(trained / BACKDOORED, job_of(trained, tmp_path, BACKDOORED, "checks"))
    stamped, moved = known.triggered()
    assert len(stamped) == (known.splits.test.labels != known.target_class).sum()
    assert moved.mean() > 0.9
    one_class = Known("t", known.subject, known.splits, attacks.TaCT(target_class=1, source_class=2))
    assert len(one_class.triggered()[0]) == (known.splits.test.labels == 2).sum()
    assert len(Known("t", known.subject, known.splits, None).triggered()[0]) == 0


def test_what_goes_wrong_is_a_failed_result_and_made_again(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "zoo" / CLEAN
    broken.mkdir(parents=True)
    (broken / CARD).write_bytes((trained / CLEAN / CARD).read_bytes())
    (broken / zoo_models.MODEL).write_bytes(b"no model")
    job = job_of(tmp_path / "zoo", tmp_path / "out", CLEAN, "mm_bd")
    record = measured(job)
    assert record["state"] == "failed"
    assert record["note"].startswith("IntakeError: ")
    assert "judgement" not in record
    assert not tables._is_measured(job)


def test_another_model_or_other_settings_are_measured_anew(trained: Path, tmp_path: Path) -> None:
    job = job_of(trained, tmp_path, CLEAN, "strip")
    assert not tables._is_measured(job)
    record = measured(job)
    assert tables._is_measured(job)
    assert not tables._is_measured(Job(**(vars(job) | {"clean_images": 300})))
    job.file.write_text(json.dumps(record | {"sha256": "of another model"}), "utf-8")
    assert not tables._is_measured(job)


def test_what_the_policy_decides_is_measured_anew_under_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, digest = fake_zoo(tmp_path, "clean"), Policy().digest
    jobs = {job.detector: job for job in plan(folder, tmp_path, tmp_path)}
    for job in jobs.values():
        tables._write(job, {"state": "measured", "note": "", "seconds": 1.0})
    assert all(tables._is_measured(job) for job in jobs.values())
    record = json.loads(jobs["audit"].file.read_text("utf-8"))
    assert record["settings"]["policy"] == digest
    assert record["versions"][tables.TOOL] == importlib.metadata.version(tables.TOOL)
    other = dataclasses.replace(Policy(), verdict=VerdictPolicy(minimum_outlier=99.0))
    monkeypatch.setattr(tables, "Policy", lambda: other)
    assert {name for name, job in jobs.items() if not tables._is_measured(job)} == {"audit", "checks", "repairs"}


def test_a_peer_that_was_measured_with_the_former_mix_is_measured_anew(tmp_path: Path) -> None:
    (job,) = plan(fake_zoo(tmp_path, "clean"), tmp_path, tmp_path, detectors=["activation_defence"])
    tables._write(job, {"state": "measured", "note": "", "seconds": 1.0})
    record = json.loads(job.file.read_text("utf-8"))
    assert tables._is_measured(job)
    job.file.write_text(json.dumps(record | {"settings": {"clean_images": 1000, "test_images": 2000}}), "utf-8")
    assert not tables._is_measured(job)


def test_repairs_are_of_attacks_that_move_every_class_to_one(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zoo" / "tact"
    folder.mkdir(parents=True)
    card = json.loads((trained / BACKDOORED / CARD).read_text("utf-8"))
    card |= {"attack": "TaCT", "settings": {"target_class": 0, "source_class": 1}}
    (folder / CARD).write_text(json.dumps(card), "utf-8")
    (folder / zoo_models.MODEL).write_bytes((trained / BACKDOORED / zoo_models.MODEL).read_bytes())
    record = measured(job_of(tmp_path / "zoo", tmp_path / "out", "tact", "repairs"))
    assert record["state"] == "inapplicable"
    assert "every class to one" in record["note"]


@pytest.mark.slow
def test_a_killed_run_resumes_and_measures_nothing_twice(trained: Path, tmp_path: Path) -> None:
    script = "import runpy, sys; sys.modules['mlflow'] = None; runpy.run_module('pipelines.benchmark', run_name='__main__')"
    command = [sys.executable, "-c", script, "tables", str(trained), "-o", str(tmp_path), "--device", "cpu"]
    command += ["--only", "strip", "--seeds", "2", "--clean-images", "200", "--test-images", "150"]
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("results/*/*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("results/*/*.json")}
    assert 1 <= len(kept) < 4, (tmp_path / "first.log").read_text("utf-8")

    second = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    assert f"{len(kept)} of 4 measurements are there already." in second.stderr
    assert "4 of 4, " in second.stderr
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    records = read_records(tmp_path)
    assert [(record["model"], record["seed"]) for record in records] == [
        (model, seed) for model in (BACKDOORED, CLEAN) for seed in (0, 1)
    ]
    assert {record["state"] for record in records} == {"measured"}, records
    assert not list(tmp_path.glob("results/*/*.part"))
    assert "| BadNets | strip | its own | 1 | " in (tmp_path / "tables.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("model", [BACKDOORED, CLEAN])
def test_the_audit_and_the_repairs_are_measured(model: str, trained: Path, tmp_path: Path) -> None:
    record = measured(job_of(trained, tmp_path, model, "audit"))
    assert record["state"] == "measured", record["note"]
    assert record["judgement"]["verdict"] in ("pass", "fail", "inconclusive")
    assert record["judgement"]["flagged"] == (record["judgement"]["verdict"] == "fail")
    of_classes, triggers = record["judgement"]["of_classes"], record["judgement"]["triggers"]
    assert {check: len(values) for check, values in of_classes.items()} == {"maximum_margin": 10, "neuron_noise": 10}
    assert Counter(found["family"] for found in triggers) == {"patch": 10, "additive": 10}
    assert set(record["judgement"]["detection"]) == {"layerwise", "bad_expert", "beniful", "activation_norm"}
    record = measured(job_of(trained, tmp_path, model, "repairs"))
    assert record["state"] == "measured", record["note"]
    names = [row["repair"] for row in record["repairs"]]
    assert names[0] == "none"
    assert ("never backdoored" in names) == (model == BACKDOORED)
