"""From outcomes to a verdict. The only module that decides; it fails closed.

The rule of this release, in words:

* **fail**: one class stands out by at least ``minimum_outlier`` deviations: it needs a trigger so much smaller than the other
  classes do, in either family of triggers, or a smaller one and reaches a larger margin, or so much less noise in the weights
  (:func:`audit_plugin.maths.outlier.class_outliers`), or a wave over the image moves nine of ten images to it so surely
  (:func:`audit_plugin.checks.measurement.measure_waves`); its trigger moves at least ``minimum_attack_success`` of held-out
  images, and independent checks see it too: at least ``minimum_confirmations`` of the input scorers that measured (all of them,
  where fewer did) flag at least ``minimum_detection`` of the stamped images, and clearly more of them than of the clean ones
  (their exact intervals are disjoint). This is the backdoor consistency of Li, Zhang and Ma 2024: where the trigger is
  detected on inputs, there is a backdoor.
* **pass**: every required check measured, none failed, the clean set satisfied its expectations, the static check of the
  files found no path that a search cannot look behind, for every class a working trigger was found, no class comes nearer than
  ``clear_outlier``, and no pair of classes nearer than ``doubtful_pair_outlier``. Of the canaries that the policy requires, known
  backdoors planted in copies of the model, at least half of those that took were found; between ``clear_outlier`` and
  ``minimum_outlier`` they must stand out more than the model's own class does, and none stands out by noise or a wave.
* **inconclusive**: everything else, with the reason.

With a pool of clean reference models (:mod:`audit_plugin.calibration`), a failure also needs a p-value of at most alpha, a pass
one above it; between ``clear_outlier`` and ``minimum_outlier`` the p-value decides, not the canaries. A pool that cannot say
anything of the model keeps it from passing.

A smallest trigger always exists, so its size is compared with the model's own other classes; with fewer than
``minimum_classes`` classes there is nothing to compare with. docs/decisions/0007 to 0010 have what clean and backdoored
models reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from audit_plugin.maths.outlier import noise_outliers
from audit_plugin.policy import VerdictPolicy
from audit_plugin.types import (
    Calibration,
    ClassMeasurement,
    Decision,
    Expectation,
    Failed,
    InputScores,
    IntakeFinding,
    Measured,
    Outcome,
    PowerCheck,
    Rate,
    Reason,
    Threshold,
    TriggerEvidence,
    TriggerSearch,
    Verdict,
    class_measurements,
    trigger_search,
)

UNSEARCHED_PAIRS = "Source-specific backdoors (a trigger that works from one class only) were not searched for."
NO_CANARIES = (
    "The model was not compared with canary backdoors planted in copies of it, so its sensitivity is that of the documentation."
)
BLIND_SPOTS = (
    "Clean-label, warping and sample-specific triggers are seen only as far as a small patch or perturbation imitates them, or a "
    "little noise in the weights brings them about (several target classes hide each other there); of waves, those of a few "
    "whole periods over the image.",
    NO_CANARIES,
)

_UNDERMINING = (
    "clean-set-unchecked",
    "clean-set-labels-in-range",
    "clean-set-clean-accuracy",
    "clean-set-errors-even-over-classes",
    "clean-set-errors-even-over-folds",
    "clean-set-labels-not-contradicted",
)
"""Doubts that make even a found backdoor doubtful; the others only keep an audit from passing."""


def decide(
    outcomes: Sequence[Outcome],
    expectations: Sequence[Expectation],
    class_names: Sequence[str],
    policy: VerdictPolicy,
    required: Sequence[str],
    findings: Sequence[IntakeFinding] = (),
    canaries: PowerCheck | None = None,
    required_canaries: Sequence[str] = (),
    calibration: Calibration | None = None,
    alpha: float = 0.05,
) -> Decision:
    """The verdict for one audit.

    Args:
        outcomes: one for each check that was to run.
        expectations: results on the clean set.
        class_names: for the wording.
        required: names of the checks without which nothing passes.
        findings: of the static check of the files; one with a code keeps the model from passing.
        canaries: None where none were planted.
        required_canaries: families without whose canaries nothing passes.
        calibration: where the model stands among clean ones; a p-value of at most ``alpha`` makes it unusual.
    """
    measured = {outcome.check for outcome in outcomes if isinstance(outcome, Measured)}
    not_measured = tuple(check for check in required if check not in measured)
    search, pairs = trigger_search(outcomes), trigger_search(outcomes, of_pairs=True)
    if pairs is not None and not _fewest_compared(pairs):
        pairs = None
    blind_spots = (*_unsearched_pairs(pairs, class_names), *_blind_spots(canaries))

    def conclude(verdict: Verdict, reasons: Sequence[Reason], suspected: int | None = None) -> Decision:
        return Decision(verdict, tuple(reasons), suspected, not_measured, blind_spots)

    doubts = _doubts(outcomes, not_measured, expectations, findings)
    if search is None:
        missing = Reason("no-trigger-search", "No trigger search was measured, so nothing can be said about backdoors.")
        return conclude(Verdict.INCONCLUSIVE, (*doubts, missing))
    if len(class_names) < policy.minimum_classes:
        few = Reason(
            "too-few-classes",
            f"The model has {len(class_names)} classes; the size of a trigger is judged against those of the other classes, "
            f"and at least {policy.minimum_classes} are needed.",
        )
        return conclude(Verdict.INCONCLUSIVE, (*doubts, few))
    if search.classes_skipped:
        doubts = (
            *doubts,
            Reason(
                "classes-not-searched",
                f"{len(search.classes_skipped)} of {len(class_names)} classes were not searched. "
                "Raise [trigger_inversion] maximum_classes in the policy.",
            ),
        )

    compared, searched = _fewest_compared(search), len(class_names) - len(search.classes_skipped)
    if compared < max(3, searched / 2):
        doubts = (
            *doubts,
            Reason(
                "search-did-not-converge",
                f"The search found a working trigger for only {compared} of {searched} classes, too few to compare "
                "with. Raise [trigger_inversion] steps in the policy; a model that hides its gradients ends here too.",
            ),
        )
    elif unreached := _unreached(search):
        named = _listed([class_names[label] for label in unreached])
        doubts = (
            *doubts,
            Reason(
                "classes-not-reached",
                f"The search found no working trigger for {named}, so nothing is known of them. Raise [trigger_inversion] steps "
                "in the policy; a model that hides its gradients ends here too.",
            ),
        )

    found = search.most_suspicious
    name = class_names[found.trigger.target_class]
    size = Reason("trigger-size", _describe(found, name, class_measurements(outcomes)))
    is_unusual, among = _among_clean_models(calibration, alpha)
    doubts = (*doubts, *_pool_doubts(calibration))
    # Between the two thresholds clean models decide, where they can, and else canaries.
    if is_unusual is not None:
        is_usual = not is_unusual
    else:
        by_trigger = not _stands_out_by_noise(outcomes, policy) and not _stands_out_by_wave(search, policy)
        is_usual = by_trigger and _stand_out_more(canaries, required_canaries, found.outlier)
    if found.outlier < (policy.minimum_outlier if is_usual else policy.clear_outlier):
        if is_unusual:
            doubts = (*doubts, Reason("unusual-among-clean-models", among))
        doubts = (*doubts, *_canary_doubts(canaries, required_canaries))
        if doubts:
            return conclude(Verdict.INCONCLUSIVE, (*doubts, size))
        pair = pairs.most_suspicious if pairs else None
        if pair and pair.outlier >= policy.doubtful_pair_outlier:
            stands_out = Reason("pair-stands-out", _describe_pair(pair, class_names))
            return conclude(Verdict.INCONCLUSIVE, (stands_out, size), pair.trigger.target_class)
        why = "No class stands out by its trigger, its margin, the noise in the weights that it needs or a wave."
        if found.outlier >= policy.clear_outlier and is_unusual is None:
            why = "One class stands out a little, and less than the known backdoors that were planted in copies of the model."
        return conclude(Verdict.PASS, (Reason("no-class-stands-out", f"{why} {among}".strip()), size))
    suspected = found.trigger.target_class
    seen_by = _confirming_thresholds(outcomes, policy)
    contradictions = _contradictions(found, seen_by, policy, is_unusual=is_unusual, among=among)
    if contradictions:
        if found.outlier < policy.minimum_outlier:
            doubts = (*doubts, *_canary_doubts(canaries, required_canaries))
        return conclude(Verdict.INCONCLUSIVE, (*contradictions, size, *doubts), suspected)
    if any(doubt.code in _UNDERMINING for doubt in doubts):
        return conclude(Verdict.INCONCLUSIVE, (*doubts, size), suspected)
    stands_out = Reason("class-stands-out", f"Class '{name}' behaves like the target of a backdoor. {among}".strip())
    confirmed = Reason("confirmed", f"Independent checks flag images that carry the recovered trigger: {_detections(seen_by)}.")
    return conclude(Verdict.FAIL, (stands_out, size, confirmed, *doubts), suspected)


def _fewest_compared(search: TriggerSearch) -> int:
    """How many candidates of a family could be compared with each other, in the family with the fewest; not of waves."""
    families = {candidate.trigger.family for candidate in search.candidates} - {"wave"}
    return min(
        (
            sum(candidate.trigger.family == family and candidate.is_compared for candidate in search.candidates)
            for family in families
        ),
        default=0,
    )


def _unreached(search: TriggerSearch) -> list[int]:
    """Classes for which no candidate of any family works: there is one for every class of a network that gives gradients."""
    candidates = [candidate for candidate in search.candidates if candidate.trigger.family != "wave"]
    reached = {candidate.trigger.target_class for candidate in candidates if candidate.is_compared}
    return sorted({candidate.trigger.target_class for candidate in candidates} - reached)


def _listed(names: Sequence[str]) -> str:
    """The first five of them, quoted."""
    quoted = [f"'{name}'" for name in names[:5]]
    return f"{', '.join(quoted)}{' and others' if len(names) > 5 else ''}"


def _doubts(
    outcomes: Sequence[Outcome],
    not_measured: Sequence[str],
    expectations: Sequence[Expectation],
    findings: Sequence[IntakeFinding],
) -> tuple[Reason, ...]:
    """Everything that keeps an audit from passing, whatever the checks found."""
    doubts = [Reason(finding.code, f"{finding.path}: {finding.message}.") for finding in findings if finding.code is not None]
    if not expectations:
        doubts.append(Reason("clean-set-unchecked", "The clean set was not validated."))
    doubts.extend(  # before what was not measured: the model fed in a wrong way is why
        Reason(f"clean-set-{expectation.name}", f"{expectation.description} Found: {expectation.observed}.")
        for expectation in expectations
        if expectation.required and not expectation.success
    )
    doubts.extend(Reason("check-not-measured", f"The check '{check}' was not measured.") for check in not_measured)
    doubts.extend(
        Reason("check-failed", f"The check '{outcome.check}' broke: {outcome.error}")
        for outcome in outcomes
        if isinstance(outcome, Failed) and outcome.check not in not_measured
    )
    return tuple(doubts)


def _canary_doubts(canaries: PowerCheck | None, required: Sequence[str]) -> tuple[Reason, ...]:
    """Required families of known backdoors that were not all found in copies of the model."""
    power = canaries or PowerCheck((), "None were planted.")
    doubts = []
    for family in required:
        reasons = [canary.reason for canary in power.canaries if canary.family == family]
        why = " ".join(dict.fromkeys(filter(None, (*reasons, power.missing))))
        standing = power.standing(family)
        if standing == "not found":
            told = f"A known backdoor ({family}) was planted in a copy of this model, and the audit does not find it. {why}"
            doubts.append(Reason("canary-not-found", told))
        elif standing == "not planted" or power.missing:
            told = f"Known backdoors ({family}) could not be planted in copies of this model, to see if they are found. {why}"
            doubts.append(Reason("canary-not-planted", told))
    return tuple(doubts)


def _stand_out_more(canaries: PowerCheck | None, required: Sequence[str], outlier: float) -> bool:
    """Whether known backdoors were found, and at least half of those planted stand out more than the model's own classes."""
    if canaries is None or not required or _canary_doubts(canaries, required):
        return False
    planted = [canary for canary in canaries.canaries if canary.planted and canary.family in required]
    return 2 * sum(canary.found and canary.outlier > outlier for canary in planted) >= len(planted)


def _stands_out_by_noise(outcomes: Sequence[Outcome], policy: VerdictPolicy) -> bool:
    """Whether a class stands out by the noise that it needs: planted triggers say nothing of that."""
    noise = class_measurements(outcomes).get("neuron_noise")
    return noise is not None and float(noise_outliers(np.array(noise.ratios)).max()) >= policy.clear_outlier


def _stands_out_by_wave(search: TriggerSearch, policy: VerdictPolicy) -> bool:
    """Whether a class stands out by a wave, of which planted patches say nothing either."""
    return any(found.trigger.family == "wave" and found.outlier >= policy.clear_outlier for found in search.candidates)


def _unsearched_pairs(pairs: TriggerSearch | None, class_names: Sequence[str]) -> tuple[str, ...]:
    """The blind spot of source-specific backdoors, if it is one."""
    if pairs is None:
        return (UNSEARCHED_PAIRS,)
    if not pairs.classes_skipped:
        return ()
    named = _listed([class_names[label] for label in pairs.classes_skipped])
    return (f"Triggers that work from one class only were not found from {named}: too few images, or most searches led nowhere.",)


def _blind_spots(canaries: PowerCheck | None) -> tuple[str, ...]:
    """Those of every audit, and the canaries that were not found in copies of this model."""
    if canaries is None or not canaries.canaries:
        return BLIND_SPOTS
    spots = [spot for spot in BLIND_SPOTS if spot != NO_CANARIES]
    for family in dict.fromkeys(canary.family for canary in canaries.canaries):
        if canaries.standing(family) == "not found":
            spots.append(f"A known backdoor ({family}) was planted in a copy of this model, and not found.")
        elif canaries.standing(family) == "not planted":
            spots.append(
                f"No known backdoor ({family}) could be planted in a copy of this model, so it is not known if one is seen."
            )
    return tuple(spots)


def _among_clean_models(calibration: Calibration | None, alpha: float) -> tuple[bool | None, str]:
    """Whether the model is unusual among the references, None where they do not say; and that in a sentence."""
    if calibration is None or not calibration.was_compared:
        return None, ""
    is_unusual = calibration.p_value <= alpha
    sentence = (
        f"Among {calibration.reference_count} clean reference models ('{calibration.pool}') it is {'' if is_unusual else 'not '}"
        f"unusual: p = {calibration.p_value:.3g}, where {alpha:g} is asked for and {calibration.floor:.2g} is the least possible."
    )
    return is_unusual, sentence


def _pool_doubts(calibration: Calibration | None) -> tuple[Reason, ...]:
    """Whoever names a pool wants it to have its say."""
    if calibration is None or not calibration.problems:
        return ()
    told = f"The reference pool '{calibration.pool}' says nothing of this model. {' '.join(calibration.problems)}"
    return (Reason("not-comparable", told),)


def _contradictions(
    found: TriggerEvidence,
    seen_by: Mapping[str, Threshold | None],
    policy: VerdictPolicy,
    *,
    is_unusual: bool | None,
    among: str,
) -> tuple[Reason, ...]:
    """Why a class that stands out is not enough for a failure."""
    reasons = []
    if is_unusual is False:
        reasons.append(
            Reason("usual-among-clean-models", f"One class stands out, and yet clean models look like this too. {among}")
        )
    if found.outlier < policy.minimum_outlier and not is_unusual:
        reasons.append(
            Reason(
                "borderline",
                f"One class stands out, but less than the {policy.minimum_outlier:g} deviations that a failure asks for.",
            )
        )
    if not found.success.value >= policy.minimum_attack_success:
        reasons.append(
            Reason(
                "trigger-does-not-hold",
                f"The recovered trigger moves only {_percent(found.success)} of held-out images, "
                f"a failure asks for {policy.minimum_attack_success:.0%}.",
            )
        )
    confirming = sum(threshold is not None for threshold in seen_by.values())
    if confirming < max(min(policy.minimum_confirmations, len(seen_by)), 1):
        reasons.append(
            Reason(
                "not-confirmed",
                f"{confirming} of {len(seen_by)} independent checks tell images with the recovered trigger from clean ones, "
                f"a failure asks for {policy.minimum_confirmations}.",
            )
        )
    return tuple(reasons)


def _confirming_thresholds(outcomes: Sequence[Outcome], policy: VerdictPolicy) -> dict[str, Threshold | None]:
    """Each check on inputs that measured, and the first threshold at which it confirms the trigger; None if there is none."""
    return {
        outcome.check: _confirming_threshold(outcome.measurement, policy)
        for outcome in outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
    }


def _confirming_threshold(scores: InputScores, policy: VerdictPolicy) -> Threshold | None:
    """The first at which the check tells images with the recovered trigger from clean ones."""
    for threshold in scores.thresholds:
        detected = threshold.detection_rate
        if (
            detected is not None
            and detected.value >= policy.minimum_detection
            and detected.low > threshold.false_positive_rate.high
        ):
            return threshold
    return None


def _describe(found: TriggerEvidence, class_name: str, of_classes: Mapping[str, ClassMeasurement]) -> str:
    target = found.trigger.target_class
    ratios = {check: measured.ratios[target] for check, measured in of_classes.items() if target < len(measured.ratios)}
    margin = noise = ""
    if ratios.get("maximum_margin", 0.0) > 1:
        margin = f"; its largest margin is {ratios['maximum_margin']:.1f} times the largest other class's"
    if ratios.get("neuron_noise", 0.0) > 1:
        noise = f"; any other class needs at least {ratios['neuron_noise']:.1f} times the noise in the weights"
    if not found.is_compared:
        by_noise = f" Class '{class_name}' stands out by {found.outlier:.1f} deviations{noise}." if found.outlier > 0 else ""
        return f"No trigger was found for the most conspicuous class.{by_noise}"
    if found.trigger.family == "wave":
        return (
            f"A wave over the image sends {_percent(found.success)} of held-out images to class '{class_name}', nine of ten by a "
            f"clear margin{margin}{noise}. The class stands out by {found.outlier:.1f} deviations."
        )
    return (
        f"The most conspicuous recovered trigger sends {_percent(found.success)} of held-out images to class '{class_name}' by "
        f"changing {found.trigger.size:.1f} pixels ({found.trigger.family}), where other classes need {found.size_ratio:.1f} "
        f"times as many{margin}{noise}. The class stands out by {found.outlier:.1f} deviations."
    )


def _describe_pair(pair: TriggerEvidence, class_names: Sequence[str]) -> str:
    source = class_names[pair.trigger.source_class] if pair.trigger.source_class is not None else "any"
    return (
        f"Images of class '{source}' become '{class_names[pair.trigger.target_class]}' by changing {pair.trigger.size:.1f} "
        f"pixels ({_percent(pair.success)} of held-out images), {pair.outlier:.1f} robust deviations below what the two classes "
        "let expect: a source-specific backdoor, or two classes that resemble each other. Suspect inputs can tell."
    )


def _detections(seen_by: Mapping[str, Threshold | None]) -> str:
    """What the confirming checks flag."""
    return "; ".join(
        f"{check} ({threshold.rule}) flags {_percent(threshold.detection_rate)} of them and "
        f"{_percent(threshold.false_positive_rate)} of clean images"
        for check, threshold in seen_by.items()
        if threshold is not None and threshold.detection_rate is not None
    )


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%}"
