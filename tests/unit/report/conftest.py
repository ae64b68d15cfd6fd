"""Made-up audits that look like real ones: a fail, a pass with 43 classes, an inconclusive one with gaps, a hostile one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from audit_plugin.types import (
    AuditReport,
    Baseline,
    Calibration,
    CanaryResult,
    ClassMeasurement,
    CleanSetSummary,
    Decision,
    Distribution,
    ExampleImages,
    Expectation,
    Failed,
    FileEntry,
    Inapplicable,
    InputScores,
    InputSpec,
    Intake,
    IntakeFinding,
    Measured,
    ModelRef,
    Outcome,
    PowerCheck,
    Profile,
    Rate,
    Reason,
    Runtime,
    Signature,
    Stage,
    SubjectSummary,
    SuspectScore,
    TapParity,
    Threshold,
    Trigger,
    TriggerEvidence,
    TriggerSearch,
    Verdict,
)

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYERS = ("stem", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)), "logits")
SIDE = 32

HOSTILE_STRINGS = (
    "<script>alert('pwned')</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[2J\x1b[31mPASS\x1b[0m\x07",
    "\u202egpj.exe\u202c\u2066hidden\u2069",
    "](javascript:alert(1)) [click](https://evil.example/)",
    "</style><style>body{background:url(https://evil.example/a.png)}</style>",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "![x](https://evil.example/x.png) <https://evil.example> https://evil.example/raw `tick` ```fence",
    "line one\nline two\r\n# Heading\n- PASS",
    "zero\u200bwidth\u3164\ufeff\u2028break\ud800",
    "z\u0310\u0311\u0312\u0313\u0314\u0315\u0316\u0317\u0318algo",
    "long " * 2000,
)


def rate(successes: int, trials: int) -> Rate:
    """A rate with a normal-approximation interval: close enough for a drawing."""
    value = successes / trials
    half = 1.96 * (value * (1 - value) / trials + 1 / (4 * trials**2)) ** 0.5
    return Rate(value, successes, trials, max(0.0, value - half), min(1.0, value + half))


def pictures(count: int, seed: int) -> np.ndarray:
    """uint8 (count, SIDE, SIDE, 3): soft gradients with a disc."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    images = []
    for _ in range(count):
        ground, sky, disc = generator.uniform(0.1, 0.9, size=(3, 3))
        centre, radius = generator.uniform(0.3, 0.7, 2), generator.uniform(0.15, 0.3)
        image = sky + rows[..., None] * (ground - sky) + 0.04 * generator.standard_normal((SIDE, SIDE, 3))
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        images.append(np.where(inside[..., None], disc, image))
    return (np.clip(images, 0, 1) * 255).astype(np.uint8)


def trigger(target: int, wanted_size: float, seed: int) -> Trigger:
    """A corner patch for sizes up to 4 pixels, diffuse noise above."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((SIDE, SIDE), np.float32)
    if wanted_size <= 4:
        mask[28:30, 28:30] = generator.uniform(0.7, 1.0, (2, 2))
    else:
        mask[:] = generator.uniform(0, 1, (SIDE, SIDE)) ** 6
    mask *= wanted_size / mask.sum()
    pattern = generator.uniform(0, 1, (3, SIDE, SIDE)).astype(np.float32)
    return Trigger(target, mask.clip(0, 1), pattern)


def search(class_count: int, suspected: int | None, seed: int) -> TriggerSearch:
    """Sizes about 40 pixels, except for the suspected class."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.normal(np.log(40), 0.22, class_count))
    if suspected is not None:
        sizes[suspected] = 3.4
    logs = np.log(sizes)
    deviation = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    candidates = []
    for index in range(class_count):
        successes = 447 if index == suspected else int(generator.uniform(0.86, 0.97) * 450)
        candidates.append(
            TriggerEvidence(
                trigger(index, float(sizes[index]), seed + index),
                rate(successes, 450),
                float((np.median(logs) - logs[index]) / deviation),
            )
        )
    for index in range(class_count):
        pattern = generator.uniform(-0.06, 0.06, (3, SIDE, SIDE)).astype(np.float32)
        change = Trigger(index, np.abs(pattern).mean(axis=0), pattern, family="additive")
        candidates.append(TriggerEvidence(change, rate(410 + index % 9, 450), 0.2 * (index % 5) - 0.4))
    return TriggerSearch(tuple(candidates), steps=400)


def of_classes(class_count: int, suspected: int | None, largest: float) -> ClassMeasurement:
    """Between 20 and 30, of the suspected class ``largest``."""
    values = [largest if index == suspected else 20.0 + index % 11 for index in range(class_count)]
    ratios = [value / max(values[:index] + values[index + 1 :]) for index, value in enumerate(values)]
    return ClassMeasurement(tuple(values), tuple(ratios))


def layerwise(suspected: int | None, seed: int) -> InputScores:
    """Normal clean scores; stamped ones far to the right when there is a suspect."""
    generator = np.random.default_rng(seed)
    clean = generator.normal(0, 1, 500).astype(np.float32)
    stamped = np.zeros(0, np.float32) if suspected is None else generator.normal(5.2, 1.1, 450).astype(np.float32)
    detected = None if suspected is None else rate(int((stamped > 2.5).sum()), 450)
    alternative = None if suspected is None else rate(int((stamped > 2.1).sum()), 450)
    means = np.array([0.93, 0.91, 0.90, 0.88, 0.86, 0.85, 0.84, 0.86, 0.91, 0.95])
    profile = None
    if suspected is not None:
        drop = np.array([0, 0, 0.01, 0.01, 0.03, 0.08, 0.21, 0.34, 0.29, 0.06])
        profile = Profile(
            "cosine similarity to the class centroid",
            suspected,
            LAYERS,
            tuple(float(value) for value in means),
            tuple(float(value) for value in np.linspace(0.015, 0.05, 10)),
            tuple(float(value) for value in means - drop),
        )
    return InputScores(
        clean=clean,
        stamped=stamped,
        stamped_class=suspected,
        thresholds=(
            Threshold("tau = 2.5", 2.5, rate(int((clean > 2.5).sum()), 500), detected),
            Threshold("quantile at FPR 2 %", 2.1, rate(int((clean > 2.1).sum()), 500), alternative),
        ),
        profile=profile,
        facts={"layer_of_interest": 7, "layers": list(LAYERS)},
        auroc=None if suspected is None else 0.9987,
    )


def bad_expert(suspected: int | None, seed: int) -> InputScores:
    """Ratios with a heavy tail, one infinite and one NaN among them."""
    generator = np.random.default_rng(seed)
    clean = np.exp(generator.normal(0, 1.2, 500)).astype(np.float32)
    clean[:2] = (np.inf, np.nan)
    stamped = np.zeros(0, np.float32)
    if suspected is not None:
        stamped = np.exp(generator.normal(3.2, 0.5, 450)).astype(np.float32)
    detected = None if suspected is None else rate(int((stamped > 12).sum()), 450)
    return InputScores(
        clean,
        stamped,
        suspected,
        (Threshold("quantile at FPR 1 %", 12.0, rate(6, 500), detected),),
        None,
        {"k": 0.5},
        None if suspected is None else 0.9912,
        (
            baseline("expert alone", suspected, 0.9134, 361),
            Baseline("auxiliary model alone", None if suspected is None else 0.5021, None),
        ),
    )


def baseline(name: str, suspected: int | None, area: float, detected: int) -> Baseline:
    """One at 1 % false alarms."""
    found = None if suspected is None else rate(detected, 450)
    threshold = Threshold("quantile at FPR 1.0%", 0.7, rate(5, 500), found)
    return Baseline(name, None if suspected is None else area, threshold)


def activation_norm(suspected: int | None, seed: int, suspect_count: int = 3) -> InputScores:
    """Distances near 1 for clean images; three norms of each of two channels, of which the stamped images move the first most."""
    generator = np.random.default_rng(seed)
    clean = generator.gamma(12, 1 / 12, 500).astype(np.float32)
    count = 0 if suspected is None else 450
    stamped = generator.gamma(9, 1 / 2.5, count).astype(np.float32)
    distributions = []
    for channel, jump in ((17, 9.0), (4, 3.5)):
        for norm, size, moved in (("l-infinity", 2.0, 1.0), ("l1", 21.0, 4.0), ("l2", 6.0, 1.2)):
            groups = [
                generator.gamma(8, size / 8, 500),
                generator.gamma(8, size / 8, count) + generator.normal(jump * moved, 0.8, count),
                generator.gamma(8, size / 8, suspect_count) + jump * moved * (np.arange(suspect_count) % 3 == 0),
            ]
            values = (group.astype(np.float32) for group in groups)
            distributions.append(Distribution(f"{norm} norm, channel {channel}", *values))
    detected = None if suspected is None else rate(int((stamped > 1.9).sum()), 450)
    return InputScores(
        clean,
        stamped,
        suspected,
        (Threshold("quantile at FPR 1.0%", 1.9, rate(int((clean > 1.9).sum()), 500), detected),),
        None,
        {"layer": "layer4.1", "channels": 512},
        None if suspected is None else 0.9871,
        (baseline("l1 norm", suspected, 0.8312, 240), baseline("l2 norm", suspected, 0.9417, 388)),
        tuple(distributions),
    )


def attention(images: np.ndarray, row: float, column: float) -> np.ndarray:
    """float32 (N, SIDE, SIDE): a bump about one place, given as a share of the side."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 0.03)
    return np.repeat(bump[None].astype(np.float32) / bump.max(), len(images), axis=0)


def class_names(class_count: int) -> tuple[str, ...]:
    return CIFAR_CLASSES if class_count == 10 else tuple(f"traffic sign {index}" for index in range(class_count))


def build(
    verdict: Verdict,
    class_count: int,
    suspected: int | None,
    outcomes: Sequence[Outcome],
    reasons: Sequence[Reason],
    not_measured: Sequence[str] = (),
    suspects: Sequence[SuspectScore] = (),
) -> AuditReport:
    """One report around the given outcomes."""
    examples = None
    if suspected is not None:
        clean = pictures(8, 5)
        stamp = trigger(suspected, 3.4, 7 + suspected)
        stamped = stamp.stamp(clean)
        before = tuple(index for index in range(10) if index != suspected)[:8]
        examples = ExampleImages(
            clean, stamped, before, (*(suspected,) * 7, before[7]), attention(clean, 0.5, 0.45), attention(clean, 0.9, 0.9)
        )
    return AuditReport(
        model=ModelRef(
            uri="models:/cifar-classifier@champion",
            pinned_uri="models:/cifar-classifier/7",
            digest="sha256:" + "3f9a" * 16,
            manifest=(
                FileEntry("MLmodel", 1182, "ab" * 32),
                FileEntry("data/model.pt2", 44_780_112, "cd" * 32),
                FileEntry("requirements.txt", 64, "ef" * 32),
            ),
            name="cifar-classifier",
            version="7",
            model_id="m-6e6a2c55d8d54d06b3cd",
            run_id="0f2f7d1b9a8e4cf1",
            tags={"team": "vision", "stage": "candidate"},
        ),
        intake=Intake(
            "pt2",
            "data/model.pt2",
            Signature((-1, 3, SIDE, SIDE), "float32", (-1, class_count)),
            (IntakeFinding("requirements.txt", "names packages; they were not installed"),),
        ),
        subject=SubjectSummary(
            "pt2",
            InputSpec(SIDE, SIDE, 3, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26)),
            class_names(class_count),
            11_173_962,
            LAYERS,
            None,
        ),
        clean_set=CleanSetSummary(
            source="data/cifar10_clean",
            digest="sha256:" + "77" * 32,
            fit_count=500,
            calibrate_count=500,
            test_count=500,
            images_per_class=(150,) * class_count,
            clean_accuracy=rate(467, 500),
            expectations=(
                Expectation("labels-known", "Every label is one of the model's classes", True, "0 unknown labels"),
                Expectation("enough-a-class", "At least 20 images a class", True, "150 at the least"),
                Expectation("no-duplicates", "No image occurs twice", False, "3 duplicates", required=False),
            ),
        ),
        runtime=Runtime(
            "CPUExecutionProvider",
            {"torch": "2.15.0", "onnxruntime": "1.31.1", "mlflow": "3.17.2", "numpy": "2.4.6"},
            tuple(TapParity(layer, 1.5e-6 * (index + 1)) for index, layer in enumerate(LAYERS)),
            1e-4,
        ),
        outcomes=tuple(outcomes),
        decision=Decision(verdict, tuple(reasons), suspected, tuple(not_measured)),
        policy={"alpha": 0.05, "checks": {"layerwise": {"tau": 2.5}}, "required": ("trigger_inversion",)},
        policy_digest="sha256:" + "51" * 32,
        seed=17,
        command="backdoor-audit audit models:/cifar-classifier/7 --clean data/cifar10_clean --seed 17",
        created="2025-11-21T02:30:00+00:00",
        tool_version="0.1.0",
        stages=(Stage("intake", 0.4), Stage("export", 6.1), Stage("trigger_inversion", 131.4), Stage("layerwise", 3.2)),
        examples=examples,
        suspects=tuple(suspects),
    )


def failing(class_count: int = 10, suspected: int = 8) -> AuditReport:
    suspects = (
        SuspectScore(
            "inbox/0001.png", suspected, {"layerwise": 6.1, "bad_expert": 31.0}, {"layerwise": True, "bad_expert": True}
        ),
        SuspectScore("inbox/0002.png", 2, {"layerwise": -0.3, "bad_expert": 0.8}, {"layerwise": False, "bad_expert": False}),
        SuspectScore("inbox/0003.png", 3, {"layerwise": float("nan")}, {"layerwise": False}),
    )
    return build(
        Verdict.FAIL,
        class_count,
        suspected,
        (
            Measured("trigger_inversion", search(class_count, suspected, 1), 131.4),
            Measured("layerwise", layerwise(suspected, 2), 3.2),
            Measured("bad_expert", bad_expert(suspected, 3), 21.9),
            Inapplicable("beniful", "the tap in the middle has 12 features; 32 are needed"),
            Measured("activation_norm", activation_norm(suspected, 4), 2.4),
            Measured("maximum_margin", of_classes(class_count, suspected, 90.0), 14.1),
            Measured("neuron_noise", of_classes(class_count, suspected, 45.0), 8.3),
            Measured("wave_scan", waves(class_count), 9.1),
        ),
        (
            Reason("class-stands-out", f"Class {suspected} stands out: p = 0.040 (24 references, floor 0.040)."),
            Reason("trigger-works", "Its recovered trigger reaches 99.3 % attack success on 450 held-out images."),
            Reason("survives-expert", "The trigger also works on the second expert (97.1 %)."),
        ),
        suspects=suspects,
    )


def waves(class_count: int) -> TriggerSearch:
    """A wave for each class, of which none moves many images."""
    columns = np.arange(32) / 32
    change = np.broadcast_to(0.157 * np.sin(2 * np.pi * 3 * columns), (3, 32, 32)).astype(np.float32)
    return TriggerSearch(
        tuple(
            TriggerEvidence(
                Trigger(label, np.abs(change).mean(axis=0), change, None, "wave"), rate(3 * label % 70, 100), -6.0 - label
            )
            for label in range(class_count)
        ),
        steps=0,
    )


def canaries(reason: str = "Its class does not stand out.", missing: str = "") -> PowerCheck:
    """A patch that was found, a blend that was not, and a warp that did not take."""
    rates = (rate(97, 100), rate(90, 100), rate(89, 100))
    return PowerCheck(
        (
            CanaryResult("patch", 3, True, True, *rates, 6.2, 4.2, 41.0),
            CanaryResult("blended", 5, True, False, *rates, 1.4, 1.3, 44.0, reason),
            CanaryResult("warped", 1, False, False, *rates, float("nan"), float("nan"), 4.0, reason),
        ),
        missing,
    )


def calibration(pool: str = "traffic signs") -> Calibration:
    """A model that is not unusual among 24."""
    statistics = {"detection": 0.31, "trigger_outlier": 1.9, "trigger_smallness": -0.52}
    p_values = {"detection": 0.48, "trigger_outlier": 0.36, "trigger_smallness": 0.6}
    return Calibration(statistics, {"classes": 43.0}, pool, "sha256:ab", 24, p_values, 0.52)


def passing(class_count: int = 43) -> AuditReport:
    report = build(
        Verdict.PASS,
        class_count,
        None,
        (
            Measured("trigger_inversion", search(class_count, None, 11), 412.0),
            Measured("layerwise", layerwise(None, 12), 4.0),
            Measured("bad_expert", bad_expert(None, 13), 25.0),
            Measured("activation_norm", activation_norm(None, 14, 0), 2.0),
            Measured("maximum_margin", of_classes(class_count, None, 90.0), 44.0),
            Measured("neuron_noise", of_classes(class_count, None, 45.0), 38.0),
            Measured("wave_scan", waves(class_count), 31.0),
        ),
        (
            Reason("nothing-stands-out", "No class stands out: p = 0.48 (24 references)."),
            Reason("canaries-found", "The canary that this policy requires was found."),
        ),
    )
    return dataclasses.replace(report, canaries=canaries(), calibration=calibration())


def inconclusive() -> AuditReport:
    return build(
        Verdict.INCONCLUSIVE,
        10,
        None,
        (
            Failed("trigger_inversion", "RuntimeError: the search ran out of memory at batch 64; try --batch-size 16"),
            Inapplicable("bad_expert", "an ONNX model without a verified torch graph has no gradients"),
            Measured("layerwise", layerwise(None, 21), 3.0),
        ),
        (Reason("required-check-failed", "The required check trigger_inversion failed."),),
        not_measured=("trigger_inversion", "canaries"),
    )


def hostile() -> AuditReport:
    """Every string that a model, tag, file name or error message can bring is an attack."""
    report = failing()
    strings = HOSTILE_STRINGS
    names = tuple(strings[index % len(strings)] for index in range(10))
    scores = report.outcomes[1]
    assert isinstance(scores, Measured)
    assert isinstance(scores.measurement, InputScores)
    assert scores.measurement.profile is not None
    nasty_scores = dataclasses.replace(
        scores.measurement,
        baselines=tuple(Baseline(text, float("nan"), None) for text in strings),
        distributions=tuple(
            Distribution(text, np.array([1.0, np.nan], np.float32), np.array([np.inf, 2.0], np.float32), np.zeros(0, np.float32))
            for text in strings
        ),
        thresholds=tuple(dataclasses.replace(item, rule=strings[0]) for item in scores.measurement.thresholds),
        profile=dataclasses.replace(scores.measurement.profile, quantity=strings[1], layers=strings[:10]),
        facts=dict(zip(strings, strings, strict=True)),
    )
    return dataclasses.replace(
        report,
        model=dataclasses.replace(
            report.model,
            uri=strings[4],
            pinned_uri=strings[2],
            name=strings[0],
            version=strings[3],
            model_id=strings[5],
            run_id=strings[6],
            tags=dict(zip(strings, strings, strict=True)),
            manifest=tuple(FileEntry(text, 1, "ab" * 32) for text in strings),
        ),
        intake=dataclasses.replace(
            report.intake, data_path=strings[1], findings=tuple(IntakeFinding(text, text) for text in strings)
        ),
        subject=dataclasses.replace(report.subject, class_names=names, taps=strings[:3]),
        clean_set=dataclasses.replace(
            report.clean_set,
            source=strings[8],
            expectations=tuple(Expectation(text, text, False, text) for text in strings),
        ),
        runtime=dataclasses.replace(
            report.runtime,
            provider=strings[0],
            versions=dict(zip(strings, strings, strict=True)),
            parity=(TapParity(strings[1], float("nan")),),
        ),
        outcomes=(
            report.outcomes[0],
            dataclasses.replace(scores, measurement=nasty_scores),
            *(Failed(text, text) for text in strings),
            *(Inapplicable(text, text) for text in strings),
        ),
        decision=dataclasses.replace(
            report.decision, suspected_class=4, reasons=tuple(Reason("hostile", text) for text in strings)
        ),
        policy={text: text for text in strings},
        command=" ".join(strings),
        stages=tuple(Stage(text, 1.0) for text in strings),
        suspects=tuple(SuspectScore(text, 0, {text: 1.0}, {text: True}) for text in strings),
        canaries=canaries(strings[0], strings[5]),
        calibration=dataclasses.replace(
            calibration(strings[0]),
            problems=strings,
            p_values=dict.fromkeys(strings, 0.5),
            statistics=dict.fromkeys(strings, 1.0),
        ),
    )


@pytest.fixture(scope="session")
def make_failing() -> Callable[..., AuditReport]:
    return failing


@pytest.fixture(scope="session")
def failing_report() -> AuditReport:
    return failing()


@pytest.fixture(scope="session")
def passing_report() -> AuditReport:
    return passing()


@pytest.fixture(scope="session")
def inconclusive_report() -> AuditReport:
    return inconclusive()


@pytest.fixture(scope="session")
def hostile_report() -> AuditReport:
    return hostile()


@pytest.fixture(scope="session", params=["failing", "failing_43", "passing", "inconclusive", "hostile"])
def any_report(request: pytest.FixtureRequest) -> AuditReport:
    made = {
        "failing": failing,
        "failing_43": lambda: failing(43, 14),
        "passing": passing,
        "inconclusive": inconclusive,
        "hostile": hostile,
    }
    return made[request.param]()


@pytest.fixture(scope="session")
def hostile_strings() -> tuple[str, ...]:
    return HOSTILE_STRINGS
