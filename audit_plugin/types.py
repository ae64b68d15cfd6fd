"""Frozen results that flow through an audit. Imports no torch and no mlflow, so that reports can be read anywhere.

Images are ``uint8`` arrays of shape (N, height, width, channels) where they are stored, and ``float32`` in [0, 1] of shape
(N, channels, height, width), called *pixels*, where they are computed with.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
ImageArray: TypeAlias = NDArray[np.uint8]
LabelArray: TypeAlias = NDArray[np.int64]

Flavour = Literal["pt2", "onnx", "state_dict", "pickle"]
Layout = Literal["NCHW", "NHWC"]
TriggerFamily = Literal["patch", "additive", "wave"]
CanaryFamily = Literal["patch", "blended", "warped"]
CanaryStanding = Literal["found", "not found", "not planted"]
PT2_FILE, ONNX_FILE = "model.pt2", "model.onnx"  # what we call the model files that we write
ReportFormat = Literal["text", "json", "html", "sarif", "junit", "markdown", "csv", "parquet"]
SUSPECT_FORMATS: tuple[ReportFormat, ...] = ("csv", "parquet")
"""Tables of the suspect inputs, empty without any."""


class Verdict(enum.StrEnum):
    """What the audit concludes. Everything that was not measured is ``INCONCLUSIVE``, never ``PASS``."""

    PASS = "pass"  # noqa: S105  (no password)
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


# ---------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class FileEntry:
    """One artifact file: path relative to the model's folder (POSIX), size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelRef:
    """A model pinned once: everything later speaks about ``digest``, never about an alias again.

    Attributes:
        uri: what the user asked for, for example ``models:/digits@champion``.
        pinned_uri: what it resolved to, for example ``models:/digits/3``, or the local path.
        name, version: the registered model and version, or None outside the registry.
        model_id: MLflow's logged-model id (``m-...``), or None.
        run_id: the run that logged the model, or None.
        digest: ``sha256:<hex>`` over the manifest.
        manifest: every file of the model's folder, sorted by path.
        tags: tags of the model version (untrusted strings).
    """

    uri: str
    pinned_uri: str
    digest: str
    manifest: tuple[FileEntry, ...]
    name: str | None = None
    version: str | None = None
    model_id: str | None = None
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Signature:
    """Tensor shapes and dtype that the MLmodel file declares; -1 stands for a free dimension."""

    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class IntakeFinding:
    """Something the static check saw and tolerated (what it does not tolerate raises ``IntakeError``).

    ``code`` is stable (kebab-case) where the finding keeps the model from passing, None where it is a remark.
    """

    path: str
    message: str
    code: str | None = None


@dataclass(frozen=True)
class Intake:
    """The result of the static check: which file holds the model, in which flavour, and what was noticed.

    ``data_path`` is relative to the model's folder.
    """

    flavour: Flavour
    data_path: str
    signature: Signature | None
    findings: tuple[IntakeFinding, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """How an image in [0, 1] becomes what the model expects: ``(low + pixel * (high - low) - mean) / std``.

    ``height``, ``width`` in pixels; ``channels`` 1 (grey) or 3 (RGB); ``mean`` and ``std`` one value a channel.
    """

    height: int
    width: int
    channels: int
    layout: Layout = "NCHW"
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


# ----------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class LabelledImages:
    """``images`` uint8 (N, height, width, channels) and ``labels`` int64 (N,)."""

    images: ImageArray
    labels: LabelArray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FitSplit(LabelledImages):
    """Images that a check may learn from."""


@dataclass(frozen=True)
class CalibrateSplit(LabelledImages):
    """Images that choose thresholds, and nothing else."""


@dataclass(frozen=True)
class TestSplit(LabelledImages):
    """Images on which figures are reported; they chose nothing."""

    __test__ = False  # not a test class, whatever pytest thinks of its name


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of the clean set."""

    fit: FitSplit
    calibrate: CalibrateSplit
    test: TestSplit


@dataclass(frozen=True)
class Expectation:
    """One great-expectations result on the clean set, in words."""

    name: str
    description: str
    success: bool
    observed: str
    required: bool = True


# -------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Rate:
    """A measured proportion with its count and its 95 % Clopper-Pearson interval."""

    value: float
    successes: int
    trials: int
    low: float
    high: float


@dataclass(frozen=True)
class Trigger:
    """A candidate trigger in image space: something that can be applied to images, with its size.

    A ``patch`` replaces pixels: ``(1 - mask) * pixels + mask * pattern``, ``pattern`` float32 (channels, height, width) in
    [0, 1]. An ``additive`` one perturbs them: ``clip(pixels + pattern)``, ``pattern`` in [-1, 1], and so does a ``wave``, whose
    amplitude is given. ``mask`` is float32 (height, width) in [0, 1]; of what is added it is the mean absolute change over the
    channels.
    ``source_class`` is None when the trigger is meant to work from every class.
    """

    target_class: int
    mask: FloatArray
    pattern: FloatArray
    source_class: int | None = None
    family: TriggerFamily = "patch"

    @property
    def size(self) -> float:
        """L1 norm of the mask, in pixels."""
        return float(self.mask.sum())

    @property
    def is_added(self) -> bool:
        """Whether the pattern is added to the pixels, rather than put in their place."""
        return self.family != "patch"

    def stamp(self, images: ImageArray) -> ImageArray:
        """Apply to images uint8 (N, height, width, channels), rounded to what a file can hold; same shape."""
        pixels = images.astype(np.float32) / 255.0
        pattern = self.pattern.transpose(1, 2, 0)
        kept = 1.0 if self.is_added else 1.0 - self.mask[..., None]
        painted = pattern if self.is_added else self.mask[..., None] * pattern
        stamped = pixels * kept + painted
        rounded: ImageArray = np.rint(np.clip(stamped, 0.0, 1.0) * 255.0).astype(np.uint8)
        return rounded


@dataclass(frozen=True)
class TriggerEvidence:
    """A recovered trigger and what it does on images that its search never saw.

    Attributes:
        success: its attack success rate on held-out images of other classes.
        outlier: how many deviations its class stands out by a small trigger, a large margin or little noise in the weights; of a
            pair of classes, by a trigger smaller than the two let expect; of a wave, by how surely it moves images.
        size_ratio: how many times smaller it is than the others of its family usually are; NaN for pairs of classes and waves.
    """

    trigger: Trigger
    success: Rate
    outlier: float
    size_ratio: float = math.nan

    @property
    def suspicion(self) -> tuple[float, float]:
        """What the odder of two triggers has more of: outlier, and where that is equal, how small it is. Without NaN."""
        outlier = -math.inf if math.isnan(self.outlier) else self.outlier
        return outlier, -self.trigger.size if math.isnan(self.size_ratio) else self.size_ratio

    @property
    def is_natural_wave(self) -> bool:
        """Whether it is a wave that nine of ten images do not obey: there is one for every class of a clean model."""
        return self.trigger.family == "wave" and not self.outlier > 0

    @property
    def is_compared(self) -> bool:
        """Whether it worked well enough for its size to be compared with the others'."""
        return math.isfinite(self.outlier) and self.size_ratio != 0


@dataclass(frozen=True)
class TriggerSearch:
    """What trigger inversion found: for every family in turn one entry a searched class, in class order.

    The search ran ``searches`` times; each entry holds the smallest trigger found, its ``outlier`` compares the classes'
    geometric mean sizes over all searches. ``classes_skipped`` were not searched; of pairs, those are
    sources with too few images or for which most candidates do not work.
    """

    candidates: tuple[TriggerEvidence, ...]
    steps: int
    searches: int = 1
    classes_skipped: tuple[int, ...] = ()

    @property
    def is_source_specific(self) -> bool:
        """Whether it compares pairs of classes, rather than classes."""
        return any(candidate.trigger.source_class is not None for candidate in self.candidates)

    @property
    def most_suspicious(self) -> TriggerEvidence:
        """The candidate whose class stands out most; of several of that class, the one of the relatively smallest trigger."""
        return max(self.candidates, key=lambda candidate: candidate.suspicion)


@dataclass(frozen=True)
class Threshold:
    """A cut on a score: an input is flagged when its score is above ``value``.

    ``rule`` says how it was chosen ('tau = 2.5', 'quantile at FPR 1 %'); ``false_positive_rate`` was measured on the test
    split and ``detection_rate`` on held-out images stamped with the most suspicious recovered trigger.
    """

    rule: str
    value: float
    false_positive_rate: Rate
    detection_rate: Rate | None


@dataclass(frozen=True)
class Profile:
    """Per-layer values behind a score, averaged: ``clean`` for clean images predicted as the class, ``stamped`` for images
    carrying its recovered trigger; each (number of layers,)."""

    quantity: str
    class_index: int
    layers: tuple[str, ...]
    clean: tuple[float, ...]
    clean_spread: tuple[float, ...]
    stamped: tuple[float, ...]


@dataclass(frozen=True)
class Baseline:
    """A simpler score on the same images, which shows what the method adds to it.

    ``auroc`` as in :class:`InputScores`; ``threshold`` is the calibrated quantile, None where that was impossible.
    """

    name: str
    auroc: float | None
    threshold: Threshold | None


@dataclass(frozen=True)
class Distribution:
    """One quantity behind a score, to be drawn as histograms: (N,) for clean, (M,) for stamped, (K,) for suspect images."""

    quantity: str
    clean: FloatArray
    stamped: FloatArray
    suspects: FloatArray


@dataclass(frozen=True)
class InputScores:
    """What an input scorer measured. Higher scores are more suspicious, always.

    Attributes:
        clean: scores of the test split, (N,).
        stamped: scores of held-out images stamped with the most suspicious recovered trigger, (M,); empty if there is none.
        stamped_class: the class whose trigger was stamped.
        thresholds: every rule that was tried. The first flags suspect inputs and stands in the metrics; any confirms a failure.
        profile: optional per-layer picture.
        facts: further figures by name, JSON values only.
        auroc: area under the ROC curve of the stamped against the clean images; None without stamped ones.
        baselines: what simpler scores make of the same images.
        distributions: quantities behind the score, for histograms.
    """

    clean: FloatArray
    stamped: FloatArray
    stamped_class: int | None
    thresholds: tuple[Threshold, ...]
    profile: Profile | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    auroc: float | None = None
    baselines: tuple[Baseline, ...] = ()
    distributions: tuple[Distribution, ...] = ()


@dataclass(frozen=True)
class ClassMeasurement:
    """One number for each class, higher is more suspicious: its largest margin of logits, or one over the noise that it needs.

    Attributes:
        values: (classes,), of the first classes where not all were measured.
        ratios: (classes,), each over the largest of the other classes, in [0, 100].
    """

    values: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def most_suspicious(self) -> int:
        """The class whose value is the largest."""
        return max(range(len(self.values)), key=self.values.__getitem__)


Measurement: TypeAlias = TriggerSearch | InputScores | ClassMeasurement


@dataclass(frozen=True)
class Measured:
    """The check ran to its end."""

    check: str
    measurement: Measurement
    seconds: float


@dataclass(frozen=True)
class Inapplicable:
    """The check cannot say anything about this model, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """The check broke; an audit with one of these never passes."""

    check: str
    error: str


Outcome: TypeAlias = Measured | Inapplicable | Failed


def class_measurements(outcomes: Iterable[Outcome]) -> dict[str, ClassMeasurement]:
    """What was measured of classes, by check."""
    return {
        outcome.check: outcome.measurement
        for outcome in outcomes
        if isinstance(outcome, Measured) and isinstance(outcome.measurement, ClassMeasurement)
    }


def trigger_search(outcomes: Iterable[Outcome], *, of_pairs: bool = False) -> TriggerSearch | None:
    """All candidates over classes, or over pairs of them, of every measured search, as one search; None if there are none.

    Natural waves are left out: they are no triggers.
    """
    found = [
        outcome.measurement
        for outcome in outcomes
        if isinstance(outcome, Measured)
        and isinstance(outcome.measurement, TriggerSearch)
        and outcome.measurement.candidates
        and outcome.measurement.is_source_specific == of_pairs
    ]
    candidates = tuple(candidate for search in found for candidate in search.candidates if not candidate.is_natural_wave)
    if not candidates:
        return None
    skipped = sorted({label for search in found for label in search.classes_skipped})
    return replace(found[-1], candidates=candidates, classes_skipped=tuple(skipped))


@dataclass(frozen=True)
class CanaryResult:
    """One known backdoor, planted in a copy of the model and searched for there.

    Attributes:
        planted: whether it took, and left the copy's accuracy alone; only then was it searched for.
        found: whether its class came first in the copy, clearly apart from the model's own classes.
        attack_success: of its own trigger on test images of other classes.
        accuracy_before, accuracy_after: of the model and of the copy on the test split.
        size_ratio: how many times smaller its trigger is than those of the copy's other classes; NaN where it was not searched
            for. ``outlier`` is that in deviations.
        reason: why it was not planted, or not found; empty otherwise.
    """

    family: CanaryFamily
    target_class: int
    planted: bool
    found: bool
    attack_success: Rate
    accuracy_before: Rate
    accuracy_after: Rate
    outlier: float
    size_ratio: float
    seconds: float
    reason: str = ""

    @property
    def standing(self) -> CanaryStanding:
        return "found" if self.found else "not found" if self.planted else "not planted"


@dataclass(frozen=True)
class PowerCheck:
    """Which known backdoors the audit finds in copies of this very model; ``missing`` says why the rest was not tried."""

    canaries: tuple[CanaryResult, ...]
    missing: str = ""

    def standing(self, family: str) -> CanaryStanding:
        """Of a family of canaries: found where at least half of the planted ones were, not planted where none was."""
        planted = [canary for canary in self.canaries if canary.family == family and canary.planted]
        if not planted:
            return "not planted"
        return "found" if 2 * sum(canary.found for canary in planted) >= len(planted) else "not found"


@dataclass(frozen=True)
class SuspectScore:
    """One suspect input: its file or row, the predicted class, and for each check its score and whether it is flagged."""

    source: str
    predicted_class: int
    scores: Mapping[str, float]
    flagged: Mapping[str, bool]


# ---------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class TapParity:
    """How far torch and ONNX Runtime lie apart on one tap: largest absolute difference over the tap's largest magnitude."""

    tap: str
    relative_difference: float


@dataclass(frozen=True)
class Isolation:
    """How a child process that handled the model was confined, as it found out by trying.

    Attributes:
        mechanism: by what, for example 'bubblewrap 0.8.0'.
        network_blocked: it could make no connection.
        files_confined: it could open no file but what it was given, Python's and the system's own.
        reason: what could not be put in place; empty if nothing.
    """

    mechanism: str
    network_blocked: bool
    files_confined: bool
    reason: str

    @property
    def is_complete(self) -> bool:
        return self.network_blocked and self.files_confined

    @property
    def summary(self) -> str:
        """In words, for a report."""
        network = "no network" if self.network_blocked else "NETWORK NOT BLOCKED"
        files = "only the files it needs" if self.files_confined else "FILES OF THIS USER READABLE"
        return f"{network}, {files}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Runtime:
    """Where the audit ran: the provider that the session really uses, and versions by package."""

    provider: str
    versions: Mapping[str, str]
    parity: tuple[TapParity, ...]
    parity_tolerance: float


@dataclass(frozen=True)
class SubjectSummary:
    """The model as the audit understood it."""

    flavour: Flavour
    input_spec: InputSpec
    class_names: tuple[str, ...]
    parameter_count: int
    taps: tuple[str, ...]
    batch_size: int | None

    @property
    def class_count(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class CleanSetSummary:
    """Which images were used: counts by split, images a class, the great-expectations results, accuracy on the test split.

    ``notes`` say what reading them took for granted.
    """

    source: str
    digest: str
    fit_count: int
    calibrate_count: int
    test_count: int
    images_per_class: tuple[int, ...]
    clean_accuracy: Rate
    expectations: tuple[Expectation, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reason:
    """One sentence of the verdict; ``code`` is stable (kebab-case), for machines."""

    code: str
    message: str


@dataclass(frozen=True)
class Calibration:
    """Where the model stands among clean reference models; see :mod:`audit_plugin.calibration`.

    Attributes:
        statistics, traits: what is compared, and what must be alike; measured with and without a pool.
        pool, pool_digest, reference_count: the references; an empty name without any.
        p_values: by statistic, and ``p_value`` of all together; empty and NaN where nothing was compared.
        problems: why the pool says nothing of this model.
    """

    statistics: Mapping[str, float]
    traits: Mapping[str, float]
    pool: str = ""
    pool_digest: str = ""
    reference_count: int = 0
    p_values: Mapping[str, float] = field(default_factory=dict)
    p_value: float = math.nan
    problems: tuple[str, ...] = ()

    @property
    def was_compared(self) -> bool:
        return bool(self.p_values)

    @property
    def floor(self) -> float:
        """The smallest p-value that so many references allow."""
        return 1 / (self.reference_count + 1)


@dataclass(frozen=True)
class Decision:
    """The verdict, its reasons in order of weight, and the suspected target class (None unless one stands out).

    ``not_measured`` names required checks that did not measure; ``blind_spots`` are sentences on what this audit could not have
    seen even though everything ran.
    """

    verdict: Verdict
    reasons: tuple[Reason, ...]
    suspected_class: int | None = None
    not_measured: tuple[str, ...] = ()
    blind_spots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stage of the audit and how long it took, in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class ExampleImages:
    """A few held-out images before and after stamping, uint8 (N, height, width, channels), and what the model said of each.

    The attention maps, float32 (N, height, width) in [0, 1], are Grad-CAM for the predicted class; None where the model gives no
    gradients.
    """

    clean: ImageArray
    stamped: ImageArray
    clean_predictions: tuple[int, ...]
    stamped_predictions: tuple[int, ...]
    clean_attention: FloatArray | None = None
    stamped_attention: FloatArray | None = None


@dataclass(frozen=True)
class AuditReport:
    """Everything that one audit found; ``report.json`` and ``report.html`` are drawn from it.

    ``isolation`` is that of the process in which the model ran; None when it ran in the caller's own. ``canaries`` is None where
    none were asked for, or a class stood out already; ``calibration`` where nothing was measured.
    """

    model: ModelRef
    intake: Intake
    subject: SubjectSummary
    clean_set: CleanSetSummary
    runtime: Runtime
    outcomes: tuple[Outcome, ...]
    decision: Decision
    policy: Mapping[str, Any]
    policy_digest: str
    seed: int
    command: str
    created: str
    tool_version: str
    stages: tuple[Stage, ...]
    examples: ExampleImages | None = None
    suspects: tuple[SuspectScore, ...] = ()
    isolation: Isolation | None = None
    canaries: PowerCheck | None = None
    calibration: Calibration | None = None

    @property
    def duration_seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


# ---------------------------------------------------------------------------------------------------- the repair


@dataclass(frozen=True)
class RepairReport:
    """What a repair did, measured on the test split, which neither taught nor stopped it.

    The flip rate is that of the recovered trigger that succeeds most, on images of other classes that the original does not
    predict as ``target_class`` anyway: the same images before and after. The repair knew these triggers; what it does
    against the attacker's own can only be measured by whoever has that.

    Attributes:
        method: ``beniful`` or ``prune``.
        trigger_count: recovered triggers that the repair got.
        facts: what the method did, JSON values only.
    """

    method: str
    target_class: int
    trigger_count: int
    accuracy_before: Rate
    accuracy_after: Rate
    flip_rate_before: Rate
    flip_rate_after: Rate
    facts: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- the guard


@dataclass(frozen=True)
class GuardReport:
    """What a guard does, measured with its own file on images that neither taught it nor chose its threshold.

    Attributes:
        model: what it guards.
        threshold: an input whose suspicion lies above ``threshold.value`` is suspicious; ``rule`` says what was asked for.
            ``threshold.false_positive_rate`` is that of all clean test images, the misclassified included;
            ``threshold.detection_rate`` that of test images which the most suspicious recovered trigger sends to its class, None
            when that was not measured. What the attacker's own trigger does can only be measured by whoever has that.
        wanted_false_positive_rate: the rate that the threshold was chosen for, on ``calibration_count`` images.
        trigger: the most suspicious recovered trigger, with its success rate.
        detection_missing: why there is no detection rate; empty when there is one.
    """

    model: ModelRef
    subject: SubjectSummary
    threshold: Threshold
    wanted_false_positive_rate: float
    calibration_count: int
    clean_accuracy: Rate
    trigger: TriggerEvidence | None = None
    detection_missing: str = ""
