"""The audit as one function, stage after stage in the order of the data flow."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from audit_plugin.calibration import calibrate, statistics_of, traits_of
from audit_plugin.checks import (
    ActivationNormScorer,
    BadExpertScorer,
    BenifulScorer,
    ClassMeasure,
    InputScorer,
    LayerwiseScorer,
    MaximumMargin,
    NeuronNoise,
    Probe,
    SourceSpecificInversion,
    TriggerInversion,
    WaveScan,
)
from audit_plugin.checks.canaries import Standard, check_power
from audit_plugin.checks.measurement import measure_classes, measure_probe, measure_scorer, measure_waves, run_check, victims
from audit_plugin.data.clean_set import LoadedImages
from audit_plugin.data.expectations import check_clean_set
from audit_plugin.errors import first_line
from audit_plugin.maths.rates import rate_of
from audit_plugin.model.grad_cam import grad_cam
from audit_plugin.model.subject import PARITY_TOLERANCE, Subject
from audit_plugin.policy import Policy, VerdictPolicy
from audit_plugin.preparation import prepare
from audit_plugin.progress import NoProgress, Progress
from audit_plugin.types import (
    AuditReport,
    CleanSetSummary,
    ExampleImages,
    Expectation,
    FloatArray,
    ImageArray,
    Inapplicable,
    InputScores,
    IntakeFinding,
    Measured,
    ModelRef,
    Outcome,
    PowerCheck,
    Runtime,
    Splits,
    Stage,
    SuspectScore,
    TriggerEvidence,
    TriggerSearch,
    class_measurements,
    trigger_search,
)
from audit_plugin.verdict import decide

log = logging.getLogger(__name__)

SCORES_HIDDEN = "scores-hidden"
"""Code of a model whose probabilities are no softmax, see :attr:`Subject.may_hide_scores`."""

_EXAMPLES = 6
_PAIRS_KEPT = 10
_STAMPED_IMAGES_PER_STEP, _FEWEST_IMAGES_PER_STEP = 480, 8  # with many classes each sees fewer images a step
_PACKAGES = ("mlflow-backdoor-audit", "torch", "torchvision", "onnx", "onnxruntime-gpu", "onnxruntime", "mlflow", "numpy")


def audit(
    model: ModelRef,
    folder: Path,
    clean: Path,
    *,
    suspects: Path | None = None,
    policy: Policy | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    require_gpu: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> AuditReport:
    """Audit one pinned model.

    Args:
        model: what the report says was audited.
        folder: its artifact files, a private copy that nobody else writes to.
        clean: clean images: a folder a class, or a ``.npz`` with ``images`` (uint8 NHWC) and ``labels``.
        suspects: inputs to score one by one: a folder of images, or a ``.npz``; labels are not needed.
        policy: defaults when None.
        seed: of the splits and the search; two runs with the same seed on one CPU agree.
        allow_pickle: accept a whole-module pickle; it is converted in a child process.
        require_gpu: fail when ONNX Runtime cannot run on the GPU.
        command: how to repeat the audit, for the report.
        progress: told about stages.

    Returns:
        The report; the verdict is in ``report.decision``.

    Raises:
        IntakeError, SubjectError, ExportError, CleanSetError: the audit could not be made; each is one clear line.
    """
    policy = policy or Policy()
    clock = _Clock(progress or NoProgress())
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    prepared = prepare(
        model,
        folder,
        clean,
        policy,
        seed=seed,
        suspects=suspects,
        allow_pickle=allow_pickle,
        require_gpu=require_gpu,
        stage=clock.stage,
    )
    subject, splits = prepared.subject, prepared.splits

    with clock.stage("Measuring the clean accuracy"):
        clean_set = _measure_clean_set(subject, prepared.clean, splits, str(clean), policy)

    measures, waves, probe, pair_probe, scorers = checks_of(policy, subject.class_count, clock.advance)
    required = [*(measure.name for measure in measures), waves.name, probe.name, *(scorer.name for scorer in scorers)]
    examples: ExampleImages | None = None
    suspect_scores: tuple[SuspectScore, ...] = ()
    canaries: PowerCheck | None = None
    outcomes: list[Outcome] = []
    if accuracy_problem := _accuracy_problem(clean_set.expectations):
        outcomes = [Inapplicable(name, accuracy_problem) for name in (*required, pair_probe.name)]
    else:
        rng = np.random.default_rng(seed)
        with clock.stage("Searching for triggers"):
            outcomes += search_classes(measures, waves, probe, subject, splits, rng, policy)
        search = trigger_search(outcomes)
        stands_out = search is not None and search.most_suspicious.outlier >= policy.verdict.minimum_outlier
        if not stands_out:  # else pairs have nothing to add
            with clock.stage("Searching for triggers between pairs of classes"):
                outcomes.append(run_check(pair_probe.name, lambda: _search_pairs(pair_probe, subject, splits, rng, policy)))
        found = _most_suspicious(outcomes, policy.verdict)
        stamped, examples = _stamp(found, subject, splits)
        suspicious_inputs = prepared.suspects.data.images if prepared.suspects else None
        scores_of_suspects: dict[str, FloatArray] = {}
        for scorer in scorers:
            with clock.stage(f"Scoring inputs: {scorer.name}"):
                outcomes.append(
                    _run_scorer(scorer, subject, splits, rng, found, stamped, suspicious_inputs, policy, scores_of_suspects)
                )
        if prepared.suspects is not None:
            suspect_scores = _flag_suspects(subject, prepared.suspects, outcomes, scores_of_suspects)
        if policy.canaries.families and search and not stands_out:  # else nothing can make a pass
            with clock.stage("Planting canaries"):
                canaries = _check_power(probe, subject, splits, rng, policy, search)

    versions = _versions()
    calibration = calibrate(
        model.digest,
        traits_of(subject.summary, clean_set, outcomes),
        statistics_of(outcomes),
        policy.document(),
        versions["mlflow-backdoor-audit"],
        policy.reference_pool,
        policy.calibration.alpha,
    )
    decision = decide(
        outcomes,
        clean_set.expectations,
        subject.summary.class_names,
        policy.verdict,
        required=required,
        findings=(*prepared.intake.findings, *_hidden_scores(subject, prepared.intake.data_path)),
        canaries=canaries,
        required_canaries=policy.canaries.required if policy.canaries.families else (),
        calibration=calibration,
        alpha=policy.calibration.alpha,
    )
    return AuditReport(
        model=model,
        intake=prepared.intake,
        subject=subject.summary,
        clean_set=clean_set,
        runtime=Runtime(subject.session.provider, versions, prepared.parity, PARITY_TOLERANCE),
        outcomes=tuple(outcomes),
        decision=decision,
        policy=policy.document(),
        policy_digest=policy.digest,
        seed=seed,
        command=command,
        created=created,
        tool_version=versions["mlflow-backdoor-audit"],
        stages=tuple(clock.stages),
        examples=examples,
        suspects=suspect_scores,
        canaries=canaries,
        calibration=calibration,
    )


def checks_of(
    policy: Policy, class_count: int, advance: Callable[[float], None]
) -> tuple[list[ClassMeasure], WaveScan, TriggerInversion, Probe, list[InputScorer]]:
    """The checks that a policy asks for, configured."""
    search = policy.trigger_inversion
    measures: list[ClassMeasure] = [
        MaximumMargin(policy.maximum_margin.starts, policy.maximum_margin.steps),
        NeuronNoise(policy.neuron_noise.images, policy.neuron_noise.kept_accuracy),
    ]
    waves = WaveScan(policy.wave_scan.amplitude, policy.wave_scan.frequencies, policy.wave_scan.images)
    probe = TriggerInversion(
        steps=search.steps,
        images_per_step=min(search.images_per_step, max(_STAMPED_IMAGES_PER_STEP // class_count, _FEWEST_IMAGES_PER_STEP)),
        flip_rate=search.flip_rate,
        classes=range(min(class_count, search.maximum_classes)),
        progress=advance,
    )
    pairs = policy.source_specific
    pair_probe = SourceSpecificInversion(
        steps=pairs.steps,
        images_per_step=pairs.images_per_step,
        flip_rate=search.flip_rate,
        maximum_classes=pairs.maximum_classes,
        progress=advance,
    )
    return measures, waves, probe, pair_probe, scorers_of(policy)


def scorers_of(policy: Policy) -> list[InputScorer]:
    """The input scorers that a policy names, configured, in its order."""
    expert, beniful = policy.bad_expert, policy.beniful
    known: tuple[InputScorer, ...] = (
        LayerwiseScorer(tau=policy.layerwise.tau),
        BadExpertScorer(expert.expert_accuracy, expert.auxiliary_epochs, expert.auxiliary_tolerance, expert.k),
        BenifulScorer(beniful.latent_size, beniful.steps),
        ActivationNormScorer(),
    )
    by_name = {scorer.name: scorer for scorer in known}
    return [by_name[name] for name in policy.scoring.checks]


def search_classes(
    measures: Sequence[ClassMeasure],
    waves: WaveScan,
    probe: TriggerInversion,
    subject: Subject,
    splits: Splits,
    rng: np.random.Generator,
    policy: Policy,
) -> list[Outcome]:
    """How surely each class can be reached at all, and by a wave, by how little noise in the weights, by how small a trigger."""
    search = policy.trigger_inversion
    count = min(subject.class_count, search.maximum_classes)
    of_classes = [
        run_check(measure.name, functools.partial(measure_classes, measure, subject, splits.fit, count, rng))
        for measure in measures
    ]
    by_waves = run_check(waves.name, lambda: measure_waves(waves, subject, splits, rng))
    found = run_check(
        probe.name,
        lambda: measure_probe(
            probe,
            subject,
            splits,
            rng,
            searches=search.searches,
            doubtful=(search.doubtful_from, search.doubtful_to),
            measured=class_measurements(of_classes),
        ),
    )
    return [*of_classes, by_waves, found]


def _search_pairs(probe: Probe, subject: Subject, splits: Splits, rng: np.random.Generator, policy: Policy) -> TriggerSearch:
    """Of pairs of classes, keeping those that stand out most; a doubtful result is one near what the verdict asks for."""
    asked = policy.verdict.doubtful_pair_outlier
    found = measure_probe(
        probe, subject, splits, rng, searches=policy.trigger_inversion.searches, doubtful=(asked - 1.0, asked + 2.0)
    )
    ranked = sorted(found.candidates, key=lambda candidate: -candidate.outlier)
    return dataclasses.replace(found, candidates=tuple(ranked[:_PAIRS_KEPT]))


def _check_power(
    probe: TriggerInversion, subject: Subject, splits: Splits, rng: np.random.Generator, policy: Policy, own: TriggerSearch
) -> PowerCheck:
    """What one search like this audit's finds in copies that hide a known backdoor."""

    def search(planted: Subject, classes: Sequence[int]) -> TriggerSearch:
        return measure_probe(dataclasses.replace(probe, classes=classes), planted, splits, rng)

    return check_power(subject, splits, search, policy.canaries, Standard.of(own, policy.verdict), rng)


class _Clock:
    """Names the stages to whoever watches and records how long each took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._progress.stage(name)
        started = time.perf_counter()
        yield
        self.stages.append(Stage(name, time.perf_counter() - started))

    def advance(self, share: float) -> None:
        self._progress.advance(share)


def _measure_clean_set(subject: Subject, loaded: LoadedImages, splits: Splits, source: str, policy: Policy) -> CleanSetSummary:
    """Accuracy on the test split and the expectations on the whole set."""
    wanted = policy.clean_set.minimum_clean_accuracy
    if policy.model.clean_accuracy is not None:
        wanted = max(wanted, policy.model.clean_accuracy - policy.clean_set.accuracy_tolerance)
    counts = np.bincount(loaded.data.labels, minlength=subject.class_count)
    scores = np.sort(logits := subject.logits(loaded.data.images), axis=1)
    return CleanSetSummary(
        source=source,
        digest=loaded.digest,
        fit_count=len(splits.fit),
        calibrate_count=len(splits.calibrate),
        test_count=len(splits.test),
        images_per_class=tuple(int(count) for count in counts),
        clean_accuracy=rate_of(subject.predict(splits.test.images) == splits.test.labels),
        expectations=check_clean_set(
            loaded.data,
            class_names=subject.summary.class_names,
            predictions=logits.argmax(axis=1),
            input_spec=subject.summary.input_spec,
            minimum_images_per_class=policy.clean_set.minimum_images_per_class,
            minimum_clean_accuracy=wanted,
            sources=loaded.sources,
            margins=scores[:, -1] - scores[:, -2],
        ),
        notes=loaded.notes,
    )


def _hidden_scores(subject: Subject, path: str) -> tuple[IntakeFinding, ...]:
    """What no search can look behind, although every node of the graph is harmless."""
    if not subject.may_hide_scores:
        return ()
    why = "it answers with probabilities that no softmax gives, and where one is nearly zero no gradient leads to its class"
    return (IntakeFinding(path, f"{why}; log the model with logits for an answer", SCORES_HIDDEN),)


def _accuracy_problem(expectations: tuple[Expectation, ...]) -> str | None:
    """Why measuring would be pointless: a model that does not know its own images is fed the wrong way."""
    for expectation in expectations:
        if expectation.name == "clean-accuracy" and not expectation.success:
            return (
                f"Not run: {expectation.description} But {expectation.observed}. "
                "Set [model] mean, std, low, high or classes in the policy to what the model was trained with."
            )
    return None


def _most_suspicious(outcomes: list[Outcome], policy: VerdictPolicy) -> TriggerEvidence | None:
    """The trigger to look at more closely: a class's, unless only a pair of classes stands out."""
    classes, pairs = trigger_search(outcomes), trigger_search(outcomes, of_pairs=True)
    of_class, of_pair = (search.most_suspicious if search else None for search in (classes, pairs))
    if of_class and of_pair and of_class.outlier < policy.clear_outlier and of_pair.outlier >= policy.doubtful_pair_outlier:
        return of_pair
    return of_class


def _stamp(found: TriggerEvidence | None, subject: Subject, splits: Splits) -> tuple[ImageArray, ExampleImages | None]:
    """Held-out images that the most suspicious trigger sends to its class, and a few of them for the report."""
    test = splits.test
    if found is None:
        return test.images[:0], None
    trigger = found.trigger
    predictions = subject.predict(test.images)
    moved = victims(trigger, test.labels, predictions)
    stamped = trigger.stamp(test.images[moved])
    answers = subject.predict(stamped)
    shown = slice(_EXAMPLES)
    clean_shown, stamped_shown = test.images[moved][shown], stamped[shown]
    clean_attention = stamped_attention = None
    try:
        clean_attention = grad_cam(subject, clean_shown, predictions[moved][shown])
        stamped_attention = grad_cam(subject, stamped_shown, answers[shown])
    except Exception as error:  # a decoration, for which no audit ends that has come this far
        log.info("The report is without attention maps: %s", first_line(error))
    examples = ExampleImages(
        clean=clean_shown,
        stamped=stamped_shown,
        clean_predictions=tuple(predictions[moved][shown].tolist()),
        stamped_predictions=tuple(answers[shown].tolist()),
        clean_attention=clean_attention,
        stamped_attention=stamped_attention,
    )
    return stamped[answers == trigger.target_class], examples


def _run_scorer(
    scorer: InputScorer,
    subject: Subject,
    splits: Splits,
    rng: np.random.Generator,
    found: TriggerEvidence | None,
    stamped: ImageArray,
    suspects: ImageArray | None,
    policy: Policy,
    scores_of_suspects: dict[str, FloatArray],
) -> Outcome:
    def measure() -> InputScores:
        scores, fitted = measure_scorer(
            scorer,
            subject,
            splits,
            rng,
            stamped=stamped,
            stamped_class=found.trigger.target_class if found else None,
            false_positive_rate=policy.scoring.false_positive_rate,
            suspects=suspects,
        )
        if suspects is not None:
            scores_of_suspects[scorer.name] = fitted.score(suspects)
        return scores

    return run_check(scorer.name, measure)


def _flag_suspects(
    subject: Subject, suspects: LoadedImages, outcomes: list[Outcome], scores: Mapping[str, FloatArray]
) -> tuple[SuspectScore, ...]:
    """Each suspect input's score and flag by every scorer that measured, at that scorer's first threshold."""
    predictions = subject.predict(suspects.data.images)
    flags = {
        outcome.check: scores[outcome.check] > outcome.measurement.thresholds[0].value
        for outcome in outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, InputScores)
    }
    return tuple(
        SuspectScore(
            source,
            int(predictions[row]),
            {check: float(values[row]) for check, values in scores.items()},
            {check: bool(values[row]) for check, values in flags.items()},
        )
        for row, source in enumerate(suspects.sources)
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
