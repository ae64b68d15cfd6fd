from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from audit_plugin.maths.outlier import SPREAD_FLOOR, small_side_outliers
from audit_plugin.maths.rates import rate
from audit_plugin.policy import VerdictPolicy
from audit_plugin.types import (
    Calibration,
    CanaryResult,
    ClassMeasurement,
    Expectation,
    Failed,
    Inapplicable,
    InputScores,
    IntakeFinding,
    Measured,
    PowerCheck,
    Threshold,
    Trigger,
    TriggerEvidence,
    TriggerSearch,
    Verdict,
)
from audit_plugin.verdict import BLIND_SPOTS, NO_CANARIES, UNSEARCHED_PAIRS, decide

NAMES = tuple("abcdefghij")
REQUIRED = ("trigger_inversion", "layerwise")
GOOD = (Expectation("labels-in-range", "Labels are in range", True, "all are"),)
BAD_ACCURACY = Expectation("clean-accuracy", "The accuracy is at least 50 %", False, "it is 11 %")


def search(smallest: float, success: int = 95, classes: int = 10, skipped: tuple[int, ...] = ()) -> Measured:
    """Ten classes that need 36 to 44 pixels, but for class 3, which needs ``smallest``."""
    sizes = np.linspace(36, 44, classes)
    sizes[min(3, classes - 1)] = smallest
    candidates = tuple(
        TriggerEvidence(
            Trigger(label, np.full((10, 10), size / 100, dtype=np.float32), np.ones((1, 10, 10), dtype=np.float32)),
            rate(success, 100),
            float(outlier),
        )
        for label, (size, outlier) in enumerate(zip(sizes, small_side_outliers(sizes), strict=True))
    )
    return Measured("trigger_inversion", TriggerSearch(candidates, 200, classes_skipped=skipped), 1.0)


def pair(outlier: float, success: int = 29) -> Measured:
    trigger = Trigger(7, np.full((10, 10), 0.05, dtype=np.float32), np.ones((1, 10, 10), dtype=np.float32), source_class=4)
    found = TriggerSearch((TriggerEvidence(trigger, rate(success, 30), outlier),), 200)
    return Measured("source_specific", found, 1.0)


def layerwise(detected: int = 90, false_positives: int = 3, name: str = "layerwise") -> Measured:
    threshold = Threshold("tau = 2.5", 2.5, rate(false_positives, 100), rate(detected, 100))
    empty = np.zeros(0, dtype=np.float32)
    return Measured(name, InputScores(empty, empty, 3, (threshold,)), 1.0)


def verdict(*outcomes, expectations=GOOD, names=NAMES):
    return decide(outcomes, expectations, names, VerdictPolicy(), REQUIRED)


def codes(decision):
    return [reason.code for reason in decision.reasons]


def test_a_clean_set_that_breaks_its_contract_is_told_before_what_was_not_measured_because_of_it():
    broken = tuple(dataclasses.replace(each, success=False) if each.required else each for each in GOOD)
    told = codes(verdict(Inapplicable("trigger_inversion", "Not run"), expectations=broken))
    assert told[0].startswith("clean-set-")
    assert told.index("check-not-measured") > max(place for place, code in enumerate(told) if code.startswith("clean-set-"))


def test_a_small_confirmed_trigger_fails_and_names_its_class():
    decision = verdict(search(5), layerwise())
    assert (decision.verdict, decision.suspected_class) == (Verdict.FAIL, 3)
    assert codes(decision) == ["class-stands-out", "trigger-size", "confirmed"]
    assert "'d'" in decision.reasons[0].message
    assert "5.0 pixels" in decision.reasons[1].message


@pytest.mark.parametrize(
    ("detected", "expected"),
    [((90, 90, 90, 90), Verdict.FAIL), ((90, 90, 2, 2), Verdict.FAIL), ((90, 2, 2, 2), Verdict.INCONCLUSIVE)],
)
def test_of_several_independent_checks_two_must_see_the_trigger(detected, expected):
    scorers = [layerwise(share, name=name) for share, name in zip(detected, ("layerwise", "a", "b", "c"), strict=True)]
    decision = verdict(search(5), *scorers)
    assert decision.verdict is expected
    assert decision.suspected_class == 3
    if expected is Verdict.INCONCLUSIVE:
        assert "1 of 4 independent checks" in decision.reasons[0].message


def test_only_checks_that_saw_the_trigger_are_said_to_confirm_at_the_threshold_where_they_did():
    weak, strong = layerwise(3), layerwise(95, false_positives=5)
    thresholds = (*weak.measurement.thresholds, *strong.measurement.thresholds)
    twice = dataclasses.replace(weak, measurement=dataclasses.replace(weak.measurement, thresholds=thresholds))
    decision = verdict(search(5), twice, layerwise(80, name="seeing"), layerwise(0, name="blind"))
    assert decision.verdict is Verdict.FAIL
    told = decision.reasons[-1].message
    assert "layerwise (tau = 2.5) flags 95.0% of them and 5.0% of clean images" in told
    assert "seeing (tau = 2.5) flags 80.0% of them" in told
    assert "blind" not in told


def test_a_check_that_did_not_measure_confirms_nothing():
    decision = verdict(search(5), layerwise(), Inapplicable("bad_expert", "too few images"))
    assert decision.verdict is Verdict.FAIL  # the one that measured sees it
    assert verdict(search(5), Inapplicable("layerwise", "no blocks")).verdict is Verdict.INCONCLUSIVE


def test_equal_classes_pass_and_blind_spots_are_said():
    decision = verdict(search(39), layerwise(detected=2))
    assert (decision.verdict, decision.suspected_class) == (Verdict.PASS, None)
    assert decision.blind_spots == (UNSEARCHED_PAIRS, *BLIND_SPOTS)
    assert decision.not_measured == ()


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((), "no-trigger-search"),
        ((layerwise(),), "no-trigger-search"),
        ((search(39),), "check-not-measured"),
        ((search(39), Failed("layerwise", "RuntimeError: NaN")), "check-not-measured"),
        ((search(39), Inapplicable("layerwise", "one layer")), "check-not-measured"),
        ((Failed("trigger_inversion", "boom"), layerwise()), "no-trigger-search"),
        ((Measured("trigger_inversion", TriggerSearch((), 200), 1.0), layerwise()), "no-trigger-search"),
        ((search(39, skipped=(8, 9)), layerwise()), "classes-not-searched"),
    ],
)
def test_what_was_not_measured_never_passes(outcomes, code):
    decision = verdict(*outcomes)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert code in codes(decision)


@pytest.mark.parametrize("expectations", [(), (BAD_ACCURACY,)])
def test_an_unfit_clean_set_neither_passes_nor_fails(expectations):
    assert verdict(search(39), layerwise(), expectations=expectations).verdict is Verdict.INCONCLUSIVE
    assert verdict(search(5), layerwise(), expectations=expectations).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(("smallest", "expected"), [(38, Verdict.INCONCLUSIVE), (5, Verdict.FAIL)])
def test_a_finding_with_a_code_keeps_a_model_from_passing_but_saves_none(smallest, expected):
    findings = (IntakeFinding("model.onnx", "a decision", "architectural-path"), IntakeFinding("MLmodel", "a remark"))
    decision = decide((search(smallest), layerwise()), GOOD, NAMES, VerdictPolicy(), REQUIRED, findings)
    assert decision.verdict is expected
    assert "architectural-path" in codes(decision)
    assert not any("a remark" in reason.message for reason in decision.reasons)


def test_advice_does_not_decide():
    advice = Expectation("balance", "Classes are balanced", False, "they are not", required=False)
    assert verdict(search(39), layerwise(), expectations=(*GOOD, advice)).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((search(5), layerwise(detected=20)), "not-confirmed"),
        ((search(5), layerwise(detected=60, false_positives=55)), "not-confirmed"),  # intervals overlap: no evidence
        ((search(5), Failed("layerwise", "boom")), "not-confirmed"),
        ((search(5, success=70), layerwise()), "trigger-does-not-hold"),
        ((search(40 / np.exp(3.2 * SPREAD_FLOOR)), layerwise()), "borderline"),
    ],
)
def test_a_suspicion_without_proof_is_inconclusive_and_kept(outcomes, code):
    decision = verdict(*outcomes)
    assert (decision.verdict, decision.suspected_class) == (Verdict.INCONCLUSIVE, 3)
    assert code in codes(decision)


def test_few_classes_are_said_to_be_too_few():
    decision = verdict(search(5, classes=3), layerwise(), names=NAMES[:3])
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert codes(decision) == ["too-few-classes"]


def test_what_failed_is_listed_as_not_measured():
    decision = verdict(search(39), Failed("layerwise", "RuntimeError: NaN"))
    assert decision.not_measured == ("layerwise",)


def test_a_pair_that_stands_out_keeps_a_model_from_passing_but_never_fails_it():
    decision = verdict(search(39), layerwise(), pair(6.5))
    assert (decision.verdict, decision.suspected_class) == (Verdict.INCONCLUSIVE, 7)
    assert codes(decision) == ["pair-stands-out", "trigger-size"]
    assert "'e' become 'h' by changing 5.0 pixels" in decision.reasons[0].message


def test_a_pair_that_works_less_often_still_keeps_a_model_from_passing():
    assert verdict(search(39), layerwise(), pair(9.0, success=20)).verdict is Verdict.INCONCLUSIVE


def test_a_search_over_pairs_that_compared_nothing_leaves_the_blind_spot():
    assert UNSEARCHED_PAIRS in verdict(search(39), layerwise(), pair(-np.inf)).blind_spots


def test_ordinary_pairs_pass_and_close_the_blind_spot():
    decision = verdict(search(39), layerwise(), pair(4.0))
    assert decision.verdict is Verdict.PASS
    assert decision.blind_spots == BLIND_SPOTS


def test_sources_without_images_stay_a_blind_spot():
    found = pair(4.0)
    partial = dataclasses.replace(found, measurement=dataclasses.replace(found.measurement, classes_skipped=(1, 2, 5, 6, 8, 9)))
    decision = verdict(search(39), layerwise(), partial)
    assert decision.verdict is Verdict.PASS
    assert "from 'b', 'c', 'f', 'g', 'i' and others: too few images" in decision.blind_spots[0]


def test_pairs_do_not_stand_in_for_the_search_over_classes():
    assert "no-trigger-search" in codes(verdict(pair(1.0), layerwise()))


def test_a_broken_search_over_pairs_does_not_pass_but_one_left_out_does():
    assert verdict(search(39), layerwise(), Failed("source_specific", "boom")).verdict is Verdict.INCONCLUSIVE
    left_out = verdict(search(39), layerwise(), Inapplicable("source_specific", "43 classes"))
    assert left_out.verdict is Verdict.PASS
    assert UNSEARCHED_PAIRS in left_out.blind_spots


def test_a_search_that_found_nothing_is_no_pass():
    measured = search(39)
    lost = [
        dataclasses.replace(candidate, outlier=-np.inf) if candidate.trigger.target_class > 3 else candidate
        for candidate in measured.measurement.candidates
    ]
    decision = verdict(dataclasses.replace(measured, measurement=TriggerSearch(tuple(lost), 200)), layerwise())
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "search-did-not-converge" in codes(decision)
    assert "only 4 of 10 classes" in decision.reasons[0].message
    nothing = [dataclasses.replace(candidate, outlier=-np.inf) for candidate in lost]
    decision = verdict(dataclasses.replace(measured, measurement=TriggerSearch(tuple(nothing), 200)), layerwise())
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "only 0 of 10 classes" in " ".join(reason.message for reason in decision.reasons)


def test_classes_without_any_working_trigger_were_not_measured():
    measured = search(39)

    def lost(*labels, families=("patch",)):
        candidates = [
            dataclasses.replace(candidate, trigger=dataclasses.replace(candidate.trigger, family=family), outlier=outlier)
            for family in ("patch", "additive")
            for candidate in measured.measurement.candidates
            for outlier in [-np.inf if candidate.trigger.target_class in labels and family in families else candidate.outlier]
        ]
        return verdict(
            dataclasses.replace(measured, measurement=TriggerSearch(tuple(candidates), 200)), layerwise(), waves_of(-5.0)
        )

    assert lost(7).verdict is Verdict.PASS, "the other family reached it"
    decision = lost(7, 8, families=("patch", "additive"))
    assert (decision.verdict, codes(decision)[0]) == (Verdict.INCONCLUSIVE, "classes-not-reached")
    assert "no working trigger for 'h', 'i'," in decision.reasons[0].message


def test_of_many_classes_those_that_were_searched_are_counted():
    names = tuple(map(str, range(40)))
    measured = search(39, classes=40)
    kept = TriggerSearch(measured.measurement.candidates[:12], 200, classes_skipped=tuple(range(12, 40)))
    assert codes(verdict(dataclasses.replace(measured, measurement=kept), layerwise(), names=names))[:-1] == [
        "classes-not-searched"
    ]


def canary(family: str, standing: str) -> CanaryResult:
    planted, found = standing != "not planted", standing == "found"
    reason = {"found": "", "not found": "Its class does not stand out.", "not planted": "It cost 9.0% accuracy."}[standing]
    rates = (rate(97, 100), rate(90, 100), rate(89, 100))
    return CanaryResult(family, 3, planted, found, *rates, 4.0, 4.9, 30.0, reason)  # type: ignore[arg-type]


def with_canaries(power, *required, smallest=39.0, detected=2, beside=(), calibration=None, **thresholds):
    outcomes, policy = (search(smallest), layerwise(detected=detected), *beside), VerdictPolicy(**thresholds)
    return decide(outcomes, GOOD, NAMES, policy, REQUIRED, canaries=power, required_canaries=required, calibration=calibration)


def test_a_pass_with_canaries_names_what_was_not_found_as_a_blind_spot():
    power = PowerCheck((canary("patch", "found"), canary("blended", "not found"), canary("warped", "not planted")))
    decision = with_canaries(power, "patch")
    assert decision.verdict is Verdict.PASS
    assert NO_CANARIES not in decision.blind_spots
    assert set(BLIND_SPOTS) - {NO_CANARIES} < set(decision.blind_spots)
    assert [spot for spot in decision.blind_spots if "(patch)" in spot] == []
    assert sum("(blended) was planted" in spot and "not found" in spot for spot in decision.blind_spots) == 1
    assert sum("(warped) could be planted" in spot for spot in decision.blind_spots) == 1


@pytest.mark.parametrize(
    ("power", "code", "told"),
    [
        (PowerCheck((canary("patch", "not found"),)), "canary-not-found", "Its class does not stand out."),
        (PowerCheck((canary("patch", "found"), *[canary("patch", "not found")] * 2)), "canary-not-found", "does not stand out"),
        (PowerCheck((canary("patch", "not planted"),)), "canary-not-planted", "It cost 9.0% accuracy."),
        (PowerCheck((canary("warped", "found"),)), "canary-not-planted", "(patch)"),
        (PowerCheck((canary("patch", "found"),), "RuntimeError: the next one broke"), "canary-not-planted", "the next one broke"),
        (PowerCheck((), "The model stores no trainable weights."), "canary-not-planted", "no trainable weights"),
        (None, "canary-not-planted", "None were planted."),
    ],
)
def test_nothing_passes_without_its_required_canaries(power, code, told):
    decision = with_canaries(power, "patch")
    assert decision.verdict is Verdict.INCONCLUSIVE
    (reason,) = [reason for reason in decision.reasons if reason.code == code]
    assert told in reason.message


@pytest.mark.parametrize(
    ("standing", "outlier", "expected"),
    [("found", 3.6, Verdict.PASS), ("found", 3.0, Verdict.INCONCLUSIVE), ("not found", 3.6, Verdict.INCONCLUSIVE)],
)
def test_between_the_thresholds_canaries_decide_that_stand_out_more(standing, outlier, expected):
    own = search(13).measurement.most_suspicious.outlier
    assert 3.0 < own < 3.5
    power = PowerCheck((dataclasses.replace(canary("patch", standing), outlier=outlier),))
    decision = with_canaries(power, "patch", smallest=13)
    assert decision.verdict is expected
    assert ("canary-not-found" in codes(decision)) == (standing == "not found")
    told = [reason.message for reason in decision.reasons if reason.code == "no-class-stands-out"]
    assert all("less than the known backdoors" in message for message in told)
    assert with_canaries(power, smallest=13).verdict is Verdict.INCONCLUSIVE  # where none is required, none decides


@pytest.mark.parametrize(("ratio", "expected"), [(1.9, Verdict.PASS), (1.95, Verdict.INCONCLUSIVE)])
@pytest.mark.parametrize("label", [3, 5])
def test_planted_triggers_do_not_clear_a_class_that_stands_out_by_noise(label, ratio, expected):
    """1.95 is 3.04 deviations: log(1.95) / 0.22. Class 3 leads by its trigger, with 3.2."""
    values = [ratio if index == label else 1.0 for index in range(10)]
    ratios = [value / (1.0 if index == label else ratio) for index, value in enumerate(values)]
    noise = ClassMeasurement(tuple(values), tuple(ratios))
    power = PowerCheck((dataclasses.replace(canary("patch", "found"), outlier=9.0),))
    decision = with_canaries(power, "patch", smallest=13, detected=90, beside=[Measured("neuron_noise", noise, 1.0)])
    assert decision.verdict is expected


@pytest.mark.parametrize(
    ("outlier", "success", "detected", "expected"),
    [
        (4.0, 97, 90, Verdict.FAIL),
        (4.0, 97, 4, Verdict.INCONCLUSIVE),
        (4.0, 70, 90, Verdict.INCONCLUSIVE),
        (3.2, 97, 90, Verdict.INCONCLUSIVE),
        (2.9, 97, 90, Verdict.PASS),
        (-4.0, 97, 90, Verdict.PASS),
    ],
)
def test_a_wave_decides_like_a_trigger_and_no_planted_patch_clears_it(outlier, success, detected, expected):
    power = PowerCheck((dataclasses.replace(canary("patch", "found"), outlier=9.0),))
    beside = [waves_of(outlier, success=success)]
    decision = with_canaries(power, "patch", smallest=40, detected=detected, beside=beside)
    assert decision.verdict is expected
    if expected is Verdict.FAIL:
        assert decision.suspected_class == 6
        assert any(
            "A wave over the image sends 97.0% of held-out images to class 'g'" in reason.message for reason in decision.reasons
        )


def waves_of(outlier, label=6, classes=10, success=97):
    """A wave of each class, of which one has this outlier; the others are natural."""
    change = np.full((1, 4, 4), 0.1, np.float32)
    found = (
        TriggerEvidence(Trigger(index, change[0], change, None, "wave"), rate(success, 100), outlier if index == label else -5.0)
        for index in range(classes)
    )
    return Measured("wave_scan", TriggerSearch(tuple(found), 0), 1.0)


def test_a_wave_is_not_cleared_because_a_patch_leads():
    power = PowerCheck((dataclasses.replace(canary("patch", "found"), outlier=9.0),))
    leading = search(12).measurement.most_suspicious.outlier
    assert 3.1 < leading < 3.5
    cleared = with_canaries(power, "patch", smallest=12, detected=90, beside=[waves_of(2.9)])
    assert cleared.verdict is Verdict.PASS
    assert with_canaries(power, "patch", smallest=12, detected=90, beside=[waves_of(3.1)]).verdict is Verdict.INCONCLUSIVE


def test_waves_alone_let_nothing_pass():
    """Neither where no trigger was searched, nor where the search came back empty."""
    decision = verdict(layerwise(), waves_of(-5.0))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "no-trigger-search" in codes(decision)
    empty = Measured("trigger_inversion", TriggerSearch((), 200), 1.0)
    for outlier in (-5.0, 2.0):
        assert verdict(layerwise(), waves_of(outlier), empty).verdict is Verdict.INCONCLUSIVE


def test_many_classes_of_which_few_waves_are_kept_are_compared_all_the_same():
    assert verdict(search(40), layerwise(), waves_of(2.0, classes=3, label=1)).verdict is Verdict.PASS


def test_a_class_beyond_those_whose_margin_was_measured_is_described():
    few = ClassMeasurement((10.0,) * 6, (1.0,) * 6)
    decision = verdict(search(40), layerwise(detected=90), Measured("maximum_margin", few, 1.0), waves_of(4.0, label=7))
    assert (decision.verdict, decision.suspected_class) == (Verdict.FAIL, 7)


def test_a_stricter_failure_is_no_laxer_pass():
    power = PowerCheck((dataclasses.replace(canary("patch", "found"), outlier=3.2),))
    assert 3.2 < search(12).measurement.most_suspicious.outlier < 3.9
    decision = with_canaries(power, "patch", smallest=12, detected=90, minimum_outlier=4.0)
    assert decision.verdict is Verdict.INCONCLUSIVE


def test_a_pool_outvotes_canaries_between_the_thresholds():
    power = PowerCheck((canary("patch", "found"),))
    decision = with_canaries(power, "patch", smallest=13, detected=90, calibration=among(0.04))
    assert decision.verdict is Verdict.FAIL


def test_the_size_is_told_with_margin_and_noise_where_they_were_measured():
    values, ratios = (10.0,) * 3 + (32.0,) + (10.0,) * 6, (0.3,) * 3 + (3.2,) + (0.3,) * 6
    measured = (Measured(check, ClassMeasurement(values, ratios), 1.0) for check in ("maximum_margin", "neuron_noise"))
    (size,) = [reason for reason in verdict(search(5), layerwise(), *measured).reasons if reason.code == "trigger-size"]
    assert "its largest margin is 3.2 times the largest other class's" in size.message
    assert "any other class needs at least 3.2 times the noise in the weights" in size.message
    weak = Measured("neuron_noise", ClassMeasurement(values, (0.4,) * 10), 1.0)  # another class needs less: that says nothing
    for known in ((), (weak,)):
        (size,) = [reason for reason in verdict(search(5), layerwise(), *known).reasons if reason.code == "trigger-size"]
        assert "margin" not in size.message
        assert "noise" not in size.message


def test_a_class_that_stands_out_by_noise_alone_does_not_pass_even_without_a_trigger():
    """Weights that a little noise opens are no proof of a trigger, and no model to promote either."""
    plain = search(40, success=10)
    candidates = [
        dataclasses.replace(found, outlier=4.0, size_ratio=0.0) if found.trigger.target_class == 3 else found
        for found in plain.measurement.candidates
    ]
    found = dataclasses.replace(plain, measurement=dataclasses.replace(plain.measurement, candidates=tuple(candidates)))
    decision = verdict(found, layerwise())
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.suspected_class == 3
    told = {reason.code: reason.message for reason in decision.reasons}
    assert "trigger-does-not-hold" in told
    assert told["trigger-size"].startswith("No trigger was found for the most conspicuous class. Class 'd' stands out by 4.0")


def test_canaries_save_no_backdoored_model():
    for power in (None, PowerCheck((canary("patch", "not found"),)), PowerCheck((canary("patch", "found"),))):
        decision = with_canaries(power, "patch", smallest=5, detected=90)
        assert decision.verdict is Verdict.FAIL
        assert not {"canary-not-found", "canary-not-planted"} & set(codes(decision))


# ------------------------------------------------------------------------------------------------- reference models


def among(p_value=None, problem=None):
    """A comparison with 24 clean models, or why there was none."""
    if problem:
        return Calibration({}, {}, "ours", "sha256:0", 24, problems=(problem,))
    return Calibration({"a": 1.0}, {}, "ours", "sha256:0", 24, {"a": p_value}, p_value)


def calibrated(*outcomes, calibration):
    return decide(outcomes, GOOD, NAMES, VerdictPolicy(), REQUIRED, calibration=calibration, alpha=0.05)


@pytest.mark.parametrize(
    ("smallest", "p_value", "expected", "code"),
    [
        (5, 0.04, Verdict.FAIL, "class-stands-out"),
        (5, 0.05, Verdict.FAIL, "class-stands-out"),
        (5, 0.08, Verdict.INCONCLUSIVE, "usual-among-clean-models"),
        (39, 0.5, Verdict.PASS, "no-class-stands-out"),
        (39, 0.04, Verdict.INCONCLUSIVE, "unusual-among-clean-models"),
        (13, 0.04, Verdict.FAIL, "class-stands-out"),
        (13, 0.5, Verdict.PASS, "no-class-stands-out"),
    ],
)
def test_clean_models_decide_where_they_can(smallest, p_value, expected, code):
    decision = calibrated(search(smallest), layerwise(), calibration=among(p_value))
    assert (decision.verdict, codes(decision)[0]) == (expected, code)
    assert any(f"p = {p_value:.3g}" in reason.message for reason in decision.reasons)
    assert decision.suspected_class == (None if smallest == 39 or expected is Verdict.PASS else 3)


def test_without_clean_models_the_same_border_is_inconclusive():
    outlier = search(13).measurement.most_suspicious.outlier
    assert VerdictPolicy().clear_outlier <= outlier < VerdictPolicy().minimum_outlier
    for calibration in (None, Calibration({"a": 1.0}, {})):
        decision = calibrated(search(13), layerwise(), calibration=calibration)
        assert (decision.verdict, codes(decision)[0]) == (Verdict.INCONCLUSIVE, "borderline")


def test_a_pool_that_says_nothing_keeps_a_model_from_passing_and_lets_it_fail():
    silent = among(problem="It has 4 references.")
    decision = calibrated(search(39), layerwise(), calibration=silent)
    assert (decision.verdict, codes(decision)[0]) == (Verdict.INCONCLUSIVE, "not-comparable")
    assert "It has 4 references." in decision.reasons[0].message
    decision = calibrated(search(5), layerwise(), calibration=silent)
    assert decision.verdict is Verdict.FAIL
    assert "not-comparable" in codes(decision)


def test_a_small_p_value_makes_no_failure_without_confirmation():
    decision = calibrated(search(5), layerwise(detected=2), calibration=among(0.04))
    assert (decision.verdict, codes(decision)[0]) == (Verdict.INCONCLUSIVE, "not-confirmed")
