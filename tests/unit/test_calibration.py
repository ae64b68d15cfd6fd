"""p-values among reference models: their validity, what they must not depend on, and when a pool must say nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from audit_plugin.calibration import (
    SETTINGS,
    TRAITS,
    Reference,
    ReferencePool,
    calibrate,
    conformal,
    find_pool,
    load_pool,
    statistics_of,
    traits_of,
)
from audit_plugin.errors import UsageError
from audit_plugin.maths.rates import rate
from audit_plugin.policy import Policy, load_policy
from audit_plugin.records import read_record, write_record
from audit_plugin.types import ClassMeasurement, InputScores, Measured, Threshold, Trigger, TriggerEvidence, TriggerSearch
from tests.unit.report.conftest import passing

SETTINGS_NOW = {name: section for name, section in Policy().document().items() if name in SETTINGS}
ALIKE = dict.fromkeys(TRAITS, 10.0)


def pool_of(table, traits=ALIKE, settings=SETTINGS_NOW, version="1.0"):
    references = tuple(
        Reference(f"sha256:{index:064x}", dict(traits), {f"statistic {place}": float(value) for place, value in enumerate(row)})
        for index, row in enumerate(table)
    )
    return ReferencePool("ours", {"about": "digits"}, settings, version, references)


def compared(row, pool, **changes):
    arguments = {
        "digest": "sha256:x",
        "traits": ALIKE,
        "values": {f"statistic {place}": float(value) for place, value in enumerate(row)},
        "settings": Policy().document(),
        "tool_version": "1.0",
        "pool": pool,
        "alpha": 0.05,
    }
    return calibrate(**(arguments | changes))


# ---------------------------------------------------------------------------------------------------------- p-values


def test_p_values_are_shares_counted_one_by_one():
    table = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 1.0], [2.0, 4.0]])
    each, combined = conformal(table)
    np.testing.assert_allclose(each, [3 / 4, 3 / 4])
    shares = [[sum(other[j] >= row[j] for other in table) / 4 for j in range(2)] for row in table]
    sums = [-2 * math.log(first) - 2 * math.log(second) for first, second in shares]
    assert combined == sum(value >= sums[-1] - 1e-9 for value in sums) / 4


def test_a_clean_model_is_unusual_at_rate_alpha_although_the_statistics_depend_on_each_other():
    """Over 4,000 draws the rate has a standard deviation of 0.0034; it may lie below alpha by 1 / (n + 1) at most."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        common = rng.normal(size=(25, 1))
        found.append(conformal(np.hstack([common + 0.3 * rng.normal(size=(25, 1)), np.exp(common), rng.normal(size=(25, 1))]))[1])
    for alpha in (0.05, 0.1, 0.25):
        share = np.mean(np.array(found) <= alpha)
        assert alpha - 1 / 25 - 0.015 <= share <= alpha + 0.015


def test_an_extreme_model_gets_the_floor():
    references = np.random.default_rng(1).normal(size=(24, 3))
    assert compared([9, 9, 9], pool_of(references)).p_value == pytest.approx(1 / 25)
    assert compared([-9, -9, -9], pool_of(references)).p_value == 1.0


def test_only_the_order_of_values_counts():
    table = np.random.default_rng(2).normal(size=(30, 3))
    shuffled = table.copy()
    shuffled[:-1] = np.random.default_rng(3).permutation(table[:-1])
    for other in (np.exp(table), table[:, ::-1] * 7 + 2, shuffled):
        each, combined = conformal(other)
        assert combined == conformal(table)[1]
        assert sorted(each) == sorted(conformal(table)[0])


def test_more_suspicious_never_raises_p():
    references = np.random.default_rng(4).normal(size=(19, 2))
    found = [compared([value, 0.5], pool_of(references)).p_value for value in np.linspace(-3, 3, 25)]
    assert found == sorted(found, reverse=True)


def test_equal_models_are_not_unusual():
    assert conformal(np.ones((20, 3)))[1] == 1.0


# --------------------------------------------------------------------------------------- when a pool must say nothing


TABLE = np.random.default_rng(5).normal(size=(24, 2))


def test_a_pool_that_fits_says_something():
    found = compared([0, 0], pool_of(TABLE))
    assert found.was_compared
    assert (found.pool, found.reference_count, found.problems) == ("ours", 24, ())
    assert found.floor == 1 / 25


def test_without_a_pool_the_statistics_are_kept():
    found = compared([1, 2], None)
    assert found.statistics == {"statistic 0": 1.0, "statistic 1": 2.0}
    assert not found.was_compared
    assert (found.pool, found.problems) == ("", ())


def test_a_model_is_not_compared_with_itself():
    pool = pool_of(TABLE)
    found = compared([9, 9], pool, digest=pool.references[3].digest)
    assert found.reference_count == 23
    assert found.p_value == pytest.approx(1 / 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tool_version": "2.0"}, "audited by version 1.0, this model by 2.0"),
        ({"values": {"statistic 0": 1.0}}, "Not measured here: statistic 1"),
        ({"traits": ALIKE | {"classes": 11.0}}, "have a classes of 10 to 10, this model one of 11"),
        ({"traits": ALIKE | {"clean_accuracy": 12.0}}, "have a clean_accuracy of 10 to 10, this model one of 12"),
        ({"traits": dict.fromkeys(TRAITS[:-1], 10.0)}, "Not measured here: log_additive_size"),
        ({"alpha": 0.03}, "24 references; a p-value of 0.03 needs at least 33"),
        ({"settings": Policy().document() | {"layerwise": {"tau": 1.0}}}, "other settings in [layerwise]"),
        ({"settings": Policy().document() | {"source_specific": {"maximum_classes": 0}}}, "other settings in [source_specific]"),
    ],
)
def test_a_pool_that_does_not_fit_says_nothing_and_why(changes, said):
    found = compared([9, 9], pool_of(TABLE), **changes)
    assert not found.was_compared
    assert math.isnan(found.p_value)
    assert said in " ".join(found.problems)


def test_settings_that_change_no_measurement_may_differ():
    document = Policy().document() | {"gate": {"suite": "x"}, "verdict": {"minimum_outlier": 9.0}}
    assert compared([0, 0], pool_of(TABLE), settings=document).was_compared


def test_a_trait_may_lie_half_the_pools_range_outside_it():
    pool = pool_of(TABLE)
    spread = [
        dataclasses.replace(entry, traits=ALIKE | {"clean_accuracy": 8 + index / 23})
        for index, entry in enumerate(pool.references)
    ]
    pool = dataclasses.replace(pool, references=tuple(spread))
    accuracies = {7.45: False, 7.55: True, 8.5: True, 9.45: True, 9.55: False}
    for accuracy, fits in accuracies.items():
        assert compared([0, 0], pool, traits=ALIKE | {"clean_accuracy": accuracy}).was_compared is fits


def test_a_pool_audited_with_one_number_of_clean_images_judges_by_half_more_or_less():
    for factor, fits in {0.6: False, 0.7: True, 1.0: True, 1.4: True, 1.6: False}.items():
        traits = ALIKE | {"log_clean_images": 10.0 + math.log(factor)}
        assert compared([0, 0], pool_of(TABLE), traits=traits).was_compared is fits


# ------------------------------------------------------------------------------------------------- what is measured


def search(outliers, sizes, family="patch", source=None):
    return tuple(
        TriggerEvidence(
            Trigger(label, np.full((10, 10), size / 100, np.float32), np.ones((1, 10, 10), np.float32), source, family),
            rate(90, 100),
            outlier,
        )
        for label, (outlier, size) in enumerate(zip(outliers, sizes, strict=True))
    )


def scores(detected, false_positives):
    empty = np.zeros(0, np.float32)
    return InputScores(empty, empty, 3, (Threshold("a", 1.0, rate(false_positives, 100), rate(detected, 100)),))


def test_statistics_are_of_the_most_suspicious_class_and_the_mean_of_the_checks():
    candidates = search([1.0, 4.0, -math.inf], [10, 4, 50]) + search([0.5, 5.0, 0.1], [20, 9, 30], "additive")
    outcomes = [
        Measured("trigger_inversion", TriggerSearch(candidates, 200), 1.0),
        Measured("source_specific", TriggerSearch(search([9.0], [1], source=2), 200), 1.0),
        Measured("layerwise", scores(90, 10), 1.0),
        Measured("beniful", scores(40, 0), 1.0),
    ]
    margins = Measured("maximum_margin", ClassMeasurement((10.0, 25.0), (0.4, 2.5)), 1.0)
    assert statistics_of([*outcomes, margins])["margin"] == pytest.approx(math.log(2.5))
    found = statistics_of(outcomes)
    assert found == pytest.approx({"trigger_outlier": 5.0, "trigger_smallness": -math.log(4) / math.log(100), "detection": 0.6})
    report = passing()
    traits = traits_of(report.subject, report.clean_set, outcomes)
    assert traits["log_patch_size"] == pytest.approx(math.log(10))
    assert traits["log_additive_size"] == pytest.approx(math.log(20))
    assert traits["classes"] == len(report.subject.class_names)


@pytest.mark.parametrize("outcomes", [[], [Measured("layerwise", scores(1, 1), 1.0)]])
def test_without_a_search_there_are_no_statistics(outcomes):
    assert statistics_of(outcomes) == {}


# ----------------------------------------------------------------------------------------------------- files of pools


def test_a_pool_survives_its_file(tmp_path):
    pool = pool_of(TABLE)
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(pool.document()))
    assert load_pool(path) == pool
    assert load_pool(path).digest == pool.digest


def broken(**changes):
    document = pool_of(TABLE).document()
    document.update(changes)
    return document


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "no reference pool"),
        (broken(format="other"), "its format is 'other'"),
        (broken(references=[]), "0 references, and at least 9"),
        (broken(references=broken()["references"][:8]), "8 references"),
        (broken(references=[broken()["references"][0]] * 9), "the same model"),
        (broken(references=[{**entry, "statistics": {"a": 1e999}} for entry in broken()["references"]]), "no finite number"),
        (broken(references=[{**entry, "statistics": {}} for entry in broken()["references"]]), "other statistics"),
        (broken(references=[{**entry, "traits": {}} for entry in broken()["references"]]), "lacks traits"),
        (broken(references=[{**entry, "statistics": {"a": "x"}} for entry in broken()["references"]]), "no reference pool"),
    ],
)
def test_what_is_no_pool_is_refused_in_one_line(document, said, tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=said) as refused:
        load_pool(path)
    assert "\n" not in str(refused.value)


def test_a_missing_or_unreadable_file_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"no reference pool .*nowhere\.json"):
        load_pool(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UsageError, match="no readable JSON"):
        load_pool(tmp_path / "text.json")


def test_a_policy_reads_its_pool_beside_it_and_its_digest_tells_pools_apart(tmp_path):
    policy_file, pool_file = tmp_path / "audit.toml", tmp_path / "pool.json"
    policy_file.write_text('[calibration]\npool = "pool.json"\n')
    with pytest.raises(UsageError, match="no reference pool"):
        load_policy(policy_file)
    pool_file.write_text(json.dumps(pool_of(TABLE).document()))
    first = load_policy(policy_file)
    assert first.reference_pool == pool_of(TABLE)
    assert first.document()["calibration"] == {"pool": "pool.json", "alpha": 0.05, "pool_digest": pool_of(TABLE).digest}
    assert "reference_pool" not in first.document()
    pool_file.write_text(json.dumps(pool_of(TABLE[:-1]).document()))
    second = load_policy(policy_file)
    assert second.digest != first.digest
    assert second.verdict_digest != first.verdict_digest


def test_a_pool_goes_along_into_the_sandbox(tmp_path):
    policy = Policy(reference_pool=pool_of(TABLE))
    write_record(policy, tmp_path / "policy")
    assert read_record(Policy, tmp_path / "policy") == policy


def test_a_shipped_pool_is_found_by_name_and_a_slip_is_told(tmp_path):
    pool = find_pool("digits", tmp_path)
    assert pool.name == "digits"
    assert len(pool.references) >= 19
    assert {name: section for name, section in Policy().document().items() if name in SETTINGS} == pool.settings
    with pytest.raises(UsageError, match=r"no shipped reference pool 'digitz'.*'digits'"):
        find_pool("digitz", tmp_path)
