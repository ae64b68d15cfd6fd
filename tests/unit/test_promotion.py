from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from audit_plugin.checks import INPUT_SCORERS, PROBES
from audit_plugin.errors import UsageError
from audit_plugin.promotion import (
    COLUMNS,
    SCORERS,
    SEARCHES,
    PromotionSuite,
    check_suite,
    default_suite_text,
    judge,
    judge_document,
    load_suite,
    outcome_table,
    range_words,
)
from audit_plugin.registry import metrics_of
from audit_plugin.report.schema import to_document
from audit_plugin.types import (
    AuditReport,
    CleanSetSummary,
    Decision,
    Failed,
    Inapplicable,
    InputScores,
    Measured,
    Outcome,
    TriggerSearch,
    Verdict,
)
from tests.unit.report.conftest import failing, hostile, inconclusive, passing

BETWEEN = "expect_column_values_to_be_between"
IN_SET = "expect_column_values_to_be_in_set"
NOT_IN_SET = "expect_column_values_to_not_be_in_set"
NOT_NULL = "expect_column_values_to_not_be_null"
REGEX = "expect_column_values_to_match_regex"
GREATER = "expect_column_pair_values_a_to_be_greater_than_b"

DOCS = (Path(__file__).parents[2] / "docs" / "promotion.md").read_text(encoding="utf-8")


def expectation(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": kind, "kwargs": kwargs}


def suite(*expectations: dict[str, Any]) -> PromotionSuite:
    return PromotionSuite(expectations)


def row_of(report: AuditReport) -> dict[str, Any]:
    frame = outcome_table(report)
    assert len(frame) == 1
    return dict(frame.iloc[0])


def with_outcomes(report: AuditReport, outcomes: Sequence[Outcome]) -> AuditReport:
    return dataclasses.replace(report, outcomes=tuple(outcomes))


def changed(report: AuditReport, check: str, **fields: Any) -> AuditReport:
    """The report with some fields of one check's measurement replaced."""
    outcomes: list[Outcome] = []
    for outcome in report.outcomes:
        if outcome.check == check:
            assert isinstance(outcome, Measured)
            outcome = dataclasses.replace(outcome, measurement=dataclasses.replace(outcome.measurement, **fields))
        outcomes.append(outcome)
    return with_outcomes(report, outcomes)


def scores_of(report: AuditReport, check: str) -> InputScores:
    (outcome,) = (outcome for outcome in report.outcomes if outcome.check == check)
    assert isinstance(outcome, Measured)
    assert isinstance(outcome.measurement, InputScores)
    return outcome.measurement


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "promotion.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_a_column_for_every_check() -> None:
    assert tuple(SEARCHES) == tuple(probe.name for probe in PROBES)
    assert tuple(scorer.name for scorer in INPUT_SCORERS) == SCORERS
    for check in (*SEARCHES, *SCORERS):
        assert f"{check}_status" in COLUMNS


@pytest.mark.parametrize("make", [failing, passing, inconclusive, hostile])
def test_every_audit_has_the_same_columns_with_values_in_range(make: Any) -> None:
    row = row_of(make())
    assert list(row) == list(COLUMNS)
    for name, column in COLUMNS.items():
        value = row[name]
        if column.kind == "text":
            assert isinstance(value, str), name
            assert not column.values or value in column.values, name
        else:
            assert math.isnan(value) or column.low <= value <= column.high, name


def test_values_are_those_of_the_report() -> None:
    report = failing()
    row = row_of(report)
    search = report.outcomes[0].measurement  # type: ignore[union-attr]
    assert isinstance(search, TriggerSearch)
    scores = scores_of(report, "layerwise")
    expected = {
        "verdict": "fail",
        "checks_measured": 7,
        "checks_failed": 0,
        "required_checks_not_measured": 0,
        "clean_accuracy": 467 / 500,
        "clean_accuracy_low": report.clean_set.clean_accuracy.low,
        "clean_images": 1500,
        "test_images": 500,
        "fewest_images_per_class": 150,
        "flagged_suspects": 1 / 3,
        "flavour": "pt2",
        "provider": "CPUExecutionProvider",
        "tool_version": "0.1.0",
        "seconds": pytest.approx(141.1),
        "maximum_margin_status": "measured",
        "maximum_margin_ratio": pytest.approx(90 / 29),
        "neuron_noise_status": "measured",
        "neuron_noise_ratio": pytest.approx(45 / 29),
        "wave_scan_status": "measured",
        "wave_outlier": -6.0,
        "wave_attack_success_rate": 0.0,
        "trigger_inversion_status": "measured",
        "source_specific_status": "not run",
        "beniful_status": "inapplicable",
        "trigger_outlier": search.most_suspicious.outlier,
        "trigger_attack_success_rate": 447 / 450,
        "trigger_size_pixels": pytest.approx(3.4, rel=1e-5),
        "layerwise_false_positive_rate": scores.thresholds[0].false_positive_rate.value,
        "layerwise_detection_rate": scores.thresholds[0].detection_rate.value,  # type: ignore[union-attr]
        "layerwise_auroc": 0.9987,
    }
    assert {name: row[name] for name in expected} == expected
    rates = [row[f"{check}_false_positive_rate"] for check in ("layerwise", "bad_expert", "activation_norm")]
    assert row["highest_false_positive_rate"] == max(rates)
    for name in ("pair_trigger_outlier", "beniful_false_positive_rate", "beniful_auroc"):
        assert math.isnan(row[name])


@pytest.mark.parametrize("make", [failing, passing, inconclusive])
def test_figures_are_called_as_the_metrics_of_the_run(make: Any) -> None:
    row, metrics = row_of(make()), metrics_of(make())
    assert {name: row[name] for name in metrics} == pytest.approx(metrics)


def test_what_was_not_measured_has_no_value() -> None:
    row = row_of(inconclusive())
    assert row["trigger_inversion_status"] == "failed"
    assert row["bad_expert_status"] == "inapplicable"
    assert row["activation_norm_status"] == "not run"
    assert (row["checks_measured"], row["checks_failed"], row["required_checks_not_measured"]) == (1, 1, 2)
    for name in ("trigger_outlier", "bad_expert_false_positive_rate", "layerwise_detection_rate", "flagged_suspects"):
        assert math.isnan(row[name])


def test_a_check_without_a_threshold_hides_in_no_maximum() -> None:
    assert math.isnan(row_of(changed(passing(), "bad_expert", thresholds=()))["highest_false_positive_rate"])
    assert math.isnan(row_of(with_outcomes(passing(), passing().outcomes[:1]))["highest_false_positive_rate"])


def test_an_outlier_that_is_no_number_is_not_measured() -> None:
    candidates = [dataclasses.replace(item, outlier=math.nan) for item in passing().outcomes[0].measurement.candidates]  # type: ignore[union-attr]
    assert math.isnan(row_of(changed(passing(), "trigger_inversion", candidates=tuple(candidates)))["trigger_outlier"])


def test_the_page_describes_every_column() -> None:
    table = DOCS.partition("\n## Columns\n")[2]
    described = {}
    for names, words, meaning in re.findall(r"^\| (`.*?`) \| (.*?) \| (.*) \|$", table, re.MULTILINE):
        described |= dict.fromkeys(re.findall(r"`(\w+)`", names), (words, meaning))
    assert described == {name: (range_words(column), column.meaning) for name, column in COLUMNS.items()}


# ----------------------------------------------------------------------------------------------------- the judgment


def test_the_shipped_suite_allows_a_good_audit_in_readable_words() -> None:
    shipped = load_suite(None)
    check_suite(shipped)
    promotion = judge(passing(), shipped)
    assert promotion.allowed
    assert promotion.suite_digest == shipped.digest
    assert [result.name for result in promotion.results] == [
        *("verdict", "required-checks", "clean-images", "clean-accuracy", "false-positive-rates")
    ]
    assert all(result.success and result.description.endswith(".") for result in promotion.results)
    assert promotion.results[2].observed == "clean_images is 1500"


def few_images(report: AuditReport) -> AuditReport:
    summary: CleanSetSummary = dataclasses.replace(report.clean_set, fit_count=100, calibrate_count=39, test_count=60)
    return dataclasses.replace(report, clean_set=summary)


def inaccurate(report: AuditReport) -> AuditReport:
    accuracy = dataclasses.replace(report.clean_set.clean_accuracy, value=0.49)
    return dataclasses.replace(report, clean_set=dataclasses.replace(report.clean_set, clean_accuracy=accuracy))


def crying_wolf(report: AuditReport) -> AuditReport:
    (threshold,) = scores_of(report, "bad_expert").thresholds
    rate = dataclasses.replace(threshold.false_positive_rate, value=0.21)
    return changed(report, "bad_expert", thresholds=(dataclasses.replace(threshold, false_positive_rate=rate),))


def without_thresholds(report: AuditReport) -> AuditReport:
    return changed(report, "bad_expert", thresholds=())


def one_check_missing(report: AuditReport) -> AuditReport:
    return dataclasses.replace(report, decision=dataclasses.replace(report.decision, not_measured=("beniful",)))


def undecided(report: AuditReport) -> AuditReport:
    return dataclasses.replace(report, decision=Decision(Verdict.INCONCLUSIVE, ()))


@pytest.mark.parametrize(
    ("change", "broken", "observed"),
    [
        (undecided, "verdict", "verdict is inconclusive"),
        (one_check_missing, "required-checks", "required_checks_not_measured is 1"),
        (few_images, "clean-images", "clean_images is 199"),
        (inaccurate, "clean-accuracy", "clean_accuracy is 0.49"),
        (crying_wolf, "false-positive-rates", "highest_false_positive_rate is 0.21"),
        (without_thresholds, "false-positive-rates", "highest_false_positive_rate was not measured"),
    ],
)
def test_the_shipped_suite_refuses_exactly_for_what_is_wrong(change: Any, broken: str, observed: str) -> None:
    promotion = judge(change(passing()), load_suite(None))
    assert not promotion.allowed
    assert [(result.name, result.observed) for result in promotion.results if not result.success] == [(broken, observed)]


@pytest.mark.parametrize("make", [failing, inconclusive, hostile])
def test_the_shipped_suite_refuses_the_others(make: Any) -> None:
    assert not judge(make(), load_suite(None)).allowed


MET_BY_PASSING = [
    expectation(BETWEEN, column="layerwise_false_positive_rate", max_value=0.05),
    expectation(BETWEEN, column="trigger_outlier", max_value=3.5, strict_max=True),
    expectation(NOT_NULL, column="bad_expert_false_positive_rate"),
    expectation(IN_SET, column="layerwise_status", value_set=["measured"]),
    expectation(NOT_IN_SET, column="flavour", value_set=["pickle"]),
    expectation(REGEX, column="tool_version", regex=r"^0\."),
    expectation(GREATER, column_A="clean_accuracy", column_B="clean_accuracy_low"),
]
BROKEN_BY_PASSING = [
    expectation(BETWEEN, column="test_images", min_value=500, strict_min=True),
    expectation(NOT_NULL, column="beniful_false_positive_rate"),
    expectation(IN_SET, column="beniful_status", value_set=["measured"]),
    expectation(NOT_IN_SET, column="flavour", value_set=["pt2", "pickle"]),
    expectation(REGEX, column="tool_version", regex=r"^1\."),
    expectation(GREATER, column_A="clean_accuracy_low", column_B="clean_accuracy"),
]
UNMEASURED_BY_PASSING = [
    expectation(BETWEEN, column="beniful_false_positive_rate", max_value=1),
    expectation(BETWEEN, column="pair_trigger_outlier", max_value=100),
    expectation(BETWEEN, column="flagged_suspects", min_value=0),
    expectation(GREATER, column_A="layerwise_detection_rate", column_B="layerwise_false_positive_rate"),
    expectation(GREATER, column_A="beniful_detection_rate", column_B="beniful_false_positive_rate", or_equal=True),
]


def test_every_type_is_judged_both_ways() -> None:
    # A mistake in one hides no other's result, so one suite tells of all.
    promotion = judge(passing(), suite(*MET_BY_PASSING, *BROKEN_BY_PASSING, *UNMEASURED_BY_PASSING))
    results = [result.success for result in promotion.results]
    assert results == [True] * len(MET_BY_PASSING) + [False] * (len(BROKEN_BY_PASSING) + len(UNMEASURED_BY_PASSING))
    assert judge(passing(), suite(*MET_BY_PASSING)).allowed


@pytest.mark.parametrize("spec", UNMEASURED_BY_PASSING, ids=lambda spec: str(spec["kwargs"]))
def test_what_was_not_measured_is_never_met(spec: dict[str, Any]) -> None:
    check_suite(suite(spec))
    promotion = judge(passing(), suite(spec))
    assert not promotion.allowed
    assert " was not measured" in promotion.results[0].observed


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Failed("layerwise", "broke"), "failed"), (Inapplicable("layerwise", "no taps"), "inapplicable"), (None, "not run")],
)
def test_the_reason_names_what_became_of_the_check(outcome: Outcome | None, status: str) -> None:
    others = [other for other in passing().outcomes if other.check != "layerwise"]
    report = with_outcomes(passing(), others if outcome is None else [*others, outcome])
    promotion = judge(report, suite(MET_BY_PASSING[0]))
    assert promotion.results[0].observed == f"layerwise_false_positive_rate was not measured (status of layerwise: {status})"
    assert not promotion.allowed


def test_nothing_expected_allows_nothing() -> None:
    promotion = judge(passing(), suite())
    assert not promotion.allowed
    assert promotion.results[0].observed == "it is empty"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (expectation(BETWEEN, column="false_positive_rate", max_value=0.1), "unknown column 'false_positive_rate'"),
        (expectation(REGEX, column="verdict", regex="("), "could not be evaluated: Invalid regular expression"),
        (expectation(REGEX, column="verdict", regex={"$PARAMETER": "x"}), "No value found for"),
        (expectation(BETWEEN, column="seconds"), "min_value and max_value cannot both be None"),
        (expectation(BETWEEN, column="seconds", min_value=2, max_value=1), "min_value cannot be greater than max_value"),
        (expectation(BETWEEN, column="clean_accuracy", max_value=0.1, mostly=0), "argument that cannot be used here: 'mostly'"),
        (expectation("expect_table_row_count_to_equal", value=1), "type that cannot be used here"),
        ({"type": BETWEEN}, 'must be an object with a text "type"'),
        ({}, 'must be an object with a text "type"'),
    ],
)
def test_what_cannot_be_evaluated_is_not_met_and_says_why(spec: dict[str, Any], words: str) -> None:
    promotion = judge(passing(), suite(MET_BY_PASSING[0], spec))
    assert not promotion.allowed
    good, bad = promotion.results
    assert good.success
    assert not bad.success
    assert words in bad.observed
    assert "\n" not in bad.observed
    with pytest.raises(UsageError, match="Expectation 2 of the promotion suite") as caught:
        check_suite(suite(MET_BY_PASSING[0], spec))
    assert words in str(caught.value)


def test_an_exception_inside_great_expectations_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr("great_expectations.datasource.fluent.interfaces.Batch.validate", broken)
    promotion = judge(passing(), suite(MET_BY_PASSING[0]))
    assert not promotion.allowed
    assert promotion.results[0].observed == "Expectation 1 of the promotion suite could not be evaluated: RuntimeError: no luck"


def test_a_report_file_is_judged_as_its_audit() -> None:
    document = json.loads(json.dumps(to_document(failing())))
    asked = suite(*MET_BY_PASSING, *BROKEN_BY_PASSING)
    assert judge_document(document, asked) == judge(failing(), asked)


def test_names_and_descriptions_are_those_of_the_suite_or_made_up() -> None:
    named = {**MET_BY_PASSING[0], "meta": {"name": "few-false-alarms"}, "description": "Few false alarms."}
    odd = {**MET_BY_PASSING[1], "meta": None, "description": 3, "severity": "info", "notes": "see the wiki", "id": None}
    results = judge(passing(), suite(named, odd)).results
    assert [(result.name, result.description) for result in results] == [
        ("few-false-alarms", "Few false alarms."),
        ("expectation-2", f"{BETWEEN}(column='trigger_outlier', max_value=3.5, strict_max=True)"),
    ]


def test_a_severity_makes_nothing_optional() -> None:
    assert not judge(passing(), suite({**BROKEN_BY_PASSING[0], "severity": "info", "meta": {"required": False}})).allowed


def test_large_counts_are_shown_in_full() -> None:
    report = dataclasses.replace(passing(), clean_set=dataclasses.replace(passing().clean_set, fit_count=123_456))
    assert judge(report, load_suite(None)).results[2].observed == "clean_images is 124456"


def test_control_characters_of_a_report_do_not_come_through() -> None:
    report = dataclasses.replace(passing(), tool_version="\x1b[2J1.0")
    observed = judge(report, suite(expectation(REGEX, column="tool_version", regex="^0"))).results[0].observed
    assert observed == r"tool_version is \x1b[2J1.0"


def test_threads_disturb_neither_each_other_nor_their_host() -> None:
    import great_expectations
    from great_expectations.data_context.data_context.context_factory import project_manager

    mine = great_expectations.get_context(mode="ephemeral")
    asked = [suite(MET_BY_PASSING[0]), suite(BROKEN_BY_PASSING[0])] * 6
    report = passing()
    with ThreadPoolExecutor(6) as pool:
        promotions = list(pool.map(lambda each: judge(report, each), asked))
    assert [promotion.allowed for promotion in promotions] == [True, False] * 6
    assert promotions[1].results[0].observed == "test_images is 500"
    assert project_manager.get_current_project() is mine


# ----------------------------------------------------------------------------------------------------- the suite's file


def test_a_suite_is_a_list_or_what_great_expectations_writes(tmp_path: Path) -> None:
    import great_expectations

    written = great_expectations.ExpectationSuite(name="ours", expectations=copy.deepcopy(MET_BY_PASSING)).to_json_dict()
    assert written["expectations"][0]["severity"] == "critical"
    from_object = load_suite(write(tmp_path, written))
    from_list = load_suite(write(tmp_path, written["expectations"]))
    assert from_object == from_list
    assert judge(passing(), from_object).allowed
    assert {spec["type"] for spec in from_object.expectations} == {spec["type"] for spec in MET_BY_PASSING}


def test_the_digest_is_of_what_decides(tmp_path: Path) -> None:
    shipped = load_suite(None)
    assert re.fullmatch("sha256:[0-9a-f]{64}", shipped.digest)
    content = json.loads(default_suite_text())
    content["name"], content["expectations"][0]["description"] = "other", "Other words."
    assert load_suite(write(tmp_path, content)).digest == shipped.digest
    content["expectations"][2]["kwargs"] = {"min_value": 200, "column": "clean_images"}
    assert load_suite(write(tmp_path, content)).digest == shipped.digest
    content["expectations"][2]["kwargs"]["min_value"] = 201
    assert load_suite(write(tmp_path, content)).digest != shipped.digest
    del content["expectations"][2]
    assert load_suite(write(tmp_path, content)).digest != shipped.digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "no readable JSON"),
        ("[" * 100_000, "no readable JSON"),
        ('[{"type": NaN}]', "contains NaN, which JSON does not have"),
        ("3", "Expected a promotion suite: a list of expectations"),
        ({"name": "x", "expectation": []}, "or an object that holds it as 'expectations'"),
        ([], "empty and would let everything pass"),
        ({"expectations": []}, "empty and would let everything pass"),
        (["x"], 'Expectation 1 of the promotion suite must be an object with a text "type"'),
        (
            [{"expectation_type": BETWEEN, "kwargs": {}}],
            'Expectation 1 of the promotion suite must be an object with a text "type"',
        ),
        (
            [MET_BY_PASSING[0], expectation("expect_column_values_to_be_betwen", column="seconds")],
            "Expectation 2 of the promotion suite is of a type that cannot be used here: 'expect_column_values_to_be_betwen'. "
            f"Did you mean '{BETWEEN}'?",
        ),
        ([expectation(BETWEEN, column="seconds", max_valeu=3)], "cannot be used here: 'max_valeu'. Did you mean 'max_value'?"),
        ([expectation(BETWEEN, max_value=3)], "lacks the argument 'column'"),
        ([expectation(GREATER, column_A="seconds")], "lacks the argument 'column_B'"),
        (
            [expectation(BETWEEN, column="layerwise_fpr", max_value=3)],
            "unknown column 'layerwise_fpr'. Did you mean 'layerwise_",
        ),
        ([expectation(BETWEEN, column=["seconds"], max_value=3)], "unknown column ['seconds']"),
        ([expectation(BETWEEN, column="verdict", max_value=3)], f"column 'verdict', a text. Use one of {IN_SET}, "),
        ([expectation(IN_SET, column="seconds", value_set=["1"])], f"column 'seconds', a number. Use one of {BETWEEN}, "),
        ([expectation(NOT_NULL, column="layerwise_status")], "column 'layerwise_status', a text. Use one of"),
        (
            [expectation(BETWEEN, column="layerwise_false_positive_rate", max_value=20)],
            "has the max_value 20, which lies outside of the column's range, 0 to 1. 0.2 means 20 %.",
        ),
        ([expectation(BETWEEN, column="clean_images", min_value=-1)], "outside of the column's range, 0 or more."),
        ([expectation(BETWEEN, column="seconds", max_value="60")], "must have a number as max_value, got '60'"),
        ([expectation(BETWEEN, column="seconds", min_value=True)], "must have a number as min_value, got True"),
        ([expectation(IN_SET, column="verdict", value_set="pass")], "must have a list of texts as value_set"),
        ([expectation(NOT_IN_SET, column="verdict", value_set=[])], "must have a list of texts as value_set, at least one"),
        (
            [expectation(NOT_IN_SET, column="verdict", value_set=["fail", "inconclusiv"])],
            "the column never holds: 'inconclusiv'. Did you mean 'inconclusive'?",
        ),
        (
            [expectation(BETWEEN, column="seconds", max_value=1, row_condition="verdict=='fail'", condition_parser="pandas")],
            "cannot be used here: 'row_condition'",
        ),
    ],
)
def test_mistakes_in_the_file_are_named(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_suite(write(tmp_path, content))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_huge_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no promotion suite"):
        load_suite(tmp_path / "none.json")
    with pytest.raises(UsageError, match="no readable JSON"):
        load_suite(tmp_path)
    with pytest.raises(UsageError, match="larger than 1024 kB"):
        load_suite(write(tmp_path, " " * 1024 * 1024 + "[]"))


def test_an_empty_suite_is_refused_by_the_check() -> None:
    with pytest.raises(UsageError, match="empty"):
        check_suite(suite())


def test_the_example_of_the_page_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```json\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
    check_suite(load_suite(write(tmp_path, example)))


def test_the_page_names_every_type_and_argument() -> None:
    described = {
        kind: set(re.findall(r"`(\w+)`", arguments)) - {"column_A", "column_B"}
        for kind, arguments in re.findall(r"^\| `(expect_\w+)` \| \w+ \| ?(.*?) ?\|$", DOCS, re.MULTILINE)
    }
    from audit_plugin.promotion import _TYPES

    assert described == {kind: set(known.options) for kind, known in _TYPES.items()}


def test_loading_and_digesting_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom audit_plugin.promotion import load_suite\nload_suite(None).digest\n"
        "print([name for name in ('great_expectations', 'pandas', 'torch', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
