"""What a repair starts from: the class, its recovered triggers, the method; and the budget that ends it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from audit_plugin.errors import RepairError, UsageError
from audit_plugin.maths.rates import rate
from audit_plugin.policy import REPAIRS
from audit_plugin.repair import BenifulRepair
from audit_plugin.repair.norm_pruning import NormPruning
from audit_plugin.repairing import _check_budget, _target, class_index, recovered_triggers, repair_of
from audit_plugin.types import (
    Decision,
    Inapplicable,
    Measured,
    Reason,
    RepairReport,
    Trigger,
    TriggerEvidence,
    TriggerSearch,
    Verdict,
)

NAMES = ("cat", "dog", "cow", "7")


def evidence(target, outlier, family="patch", source=None):
    trigger = Trigger(target, np.ones((4, 4), np.float32), np.ones((1, 4, 4), np.float32), source, family)
    return TriggerEvidence(trigger, rate(9, 10), outlier)


def audited(*searches, suspected=None, code="class-stands-out"):
    """As much of a report as a repair reads."""
    decision = Decision(Verdict.FAIL if suspected is not None else Verdict.PASS, (Reason(code, "Because."),), suspected)
    outcomes = [Measured(f"search {number}", search, 1.0) for number, search in enumerate(searches)]
    return SimpleNamespace(
        outcomes=(Inapplicable("layerwise", "no layer"), *outcomes),
        decision=decision,
        subject=SimpleNamespace(class_names=NAMES),
        model=SimpleNamespace(pinned_uri="models:/pets/3"),
    )


OF_CLASSES = TriggerSearch((evidence(0, 0.1), evidence(1, 4.0), evidence(0, 0.2, "additive"), evidence(1, 1.0, "additive")), 100)
OF_PAIRS = TriggerSearch((evidence(1, 6.0, source=2), evidence(0, 5.5, source=3), evidence(1, 7.0, source=3)), 100)


def described(triggers):
    return [(trigger.target_class, trigger.family, trigger.source_class) for trigger in triggers]


def test_every_family_of_the_target_class_and_of_no_other():
    found = recovered_triggers(audited(OF_CLASSES, OF_PAIRS, suspected=1), 1)
    assert described(found) == [(1, "patch", None), (1, "additive", None)]


@pytest.mark.parametrize(("outlier", "brought"), [(9.0, True), (-2.0, False)])
def test_a_wave_counts_only_if_the_class_stands_out_by_it(outlier, brought):
    waves = TriggerSearch((evidence(1, outlier, "wave"), evidence(0, -3.0, "wave")), 0)
    found = described(recovered_triggers(audited(waves, OF_CLASSES, suspected=1), 1))
    assert found == [(1, "wave", None)] * brought + [(1, "patch", None), (1, "additive", None)]


def test_a_suspicion_that_rests_on_a_pair_brings_its_triggers_first():
    report = audited(OF_CLASSES, OF_PAIRS, suspected=1, code="pair-stands-out")
    assert described(recovered_triggers(report, 1)) == [
        (1, "patch", 3),
        (1, "patch", 2),
        (1, "patch", None),
        (1, "additive", None),
    ]
    assert described(recovered_triggers(report, 0)) == [(0, "additive", None), (0, "patch", None)]  # named by the user instead


def test_a_class_that_was_not_searched_cannot_be_repaired():
    with pytest.raises(RepairError, match=r"recovered no trigger for class 'cow'.*Because\."):
        recovered_triggers(audited(OF_CLASSES), 2)
    with pytest.raises(RepairError, match="recovered no trigger"):
        recovered_triggers(audited(), 1)


def test_without_a_target_class_there_is_nothing_to_repair():
    assert _target(audited(suspected=1), None) == 1
    assert _target(audited(suspected=0), None) == 0
    assert _target(audited(), 0) == 0
    with pytest.raises(RepairError, match=r"models:/pets/3 suspects no class \(verdict: pass\).*--target-class"):
        _target(audited(), None)


def test_the_class_that_was_named_wins_and_the_log_says_so(caplog):
    assert _target(audited(suspected=1), 1) == 1
    assert not caplog.messages
    assert _target(audited(suspected=1), 0) == 0
    assert caplog.messages == ["Repairing class 'cat'; the audit suspects 'dog'."]


@pytest.mark.parametrize(("wanted", "index"), [("dog", 1), ("0", 0), ("7", 3), ("3", 3)])
def test_a_class_is_named_by_name_or_by_index_and_the_name_wins(wanted, index):
    assert class_index(wanted, NAMES) == index


@pytest.mark.parametrize(
    ("wanted", "hint"), [("dgo", "Did you mean 'dog'"), ("4", "Valid names: 7, cat"), ("-1", "no class '-1'")]
)
def test_an_unknown_class_is_named_with_the_nearest(wanted, hint):
    with pytest.raises(UsageError, match=hint):
        class_index(wanted, NAMES)


def test_methods_get_the_budget():
    assert [repair_of(method, 0.05) for method in REPAIRS] == [BenifulRepair(accuracy_budget=0.05), NormPruning(0.05)]
    with pytest.raises(UsageError, match="Did you mean 'prune'"):
        repair_of("prunes", 0.05)
    for budget in (-0.01, 1.0, float("nan")):
        with pytest.raises(UsageError, match=r"must lie in \[0, 1\)"):
            repair_of("prune", budget)


def measured(before, after):
    rates = [rate(count, 100) for count in (before, after)]
    return RepairReport("beniful", 1, 2, *rates, *rates)


def test_the_budget_is_the_most_that_may_be_lost():
    model = SimpleNamespace(pinned_uri="models:/pets/3")
    for before, after in ((97, 95), (97, 97), (90, 100)):
        _check_budget(measured(before, after), 0.02, model)
    with pytest.raises(RepairError, match=r"from 97\.0% to 94\.0% on 100 test images, more than the budget of 2\.0%"):
        _check_budget(measured(97, 94), 0.02, model)
