"""The policy of an audit: ``audit.toml`` -> a frozen :class:`Policy`. An unknown key is an error that names the nearest
known one.

    [model]
    mean = [0.4914, 0.4822, 0.4465]
    std = [0.247, 0.2435, 0.2616]

    [verdict]
    minimum_outlier = 4.0

Every key has a default, so an empty file (or none) is a complete policy.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import sys
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from audit_plugin.calibration import ReferencePool, find_pool
from audit_plugin.canonical import document_digest
from audit_plugin.errors import UsageError, nearest
from audit_plugin.types import CanaryFamily

POLICY_VARIABLE = "BACKDOOR_AUDIT_POLICY"
"""Environment variable that names the policy file, for servers and auditors alike."""

SCORERS = ("layerwise", "bad_expert", "beniful", "activation_norm")
"""The checks that score inputs."""

REPAIRS = ("beniful", "prune")
"""The methods of repair."""

_MOST_DAYS = 36_500  # a century; much longer spans end after the last date that there is


@dataclass(frozen=True)
class ModelPolicy:
    """What the model's file does not say. Pixels become ``(low + pixel * (high - low) - mean) / std``.

    ``layout`` is 'NCHW' or 'NHWC'; ``classes`` are names in index order; ``architecture`` is a torchvision name, for bare
    state_dicts; ``clean_accuracy`` is the accuracy on record, for comparison. What is not set here tags of the version may say:
    with ``trust_tags`` as if it stood here, else no model whose input depends on them passes.
    """

    height: int | None = None
    width: int | None = None
    channels: int | None = None
    layout: str | None = None
    low: float | None = None
    high: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    architecture: str | None = None
    clean_accuracy: float | None = None
    trust_tags: bool = False


@dataclass(frozen=True)
class CleanSetPolicy:
    """What the clean images must satisfy.

    ``minimum_clean_accuracy`` guards against a wrong normalisation or other labels; with an accuracy on record the model
    must also come within ``accuracy_tolerance`` of it. The fractions are of the three splits, the test split takes the rest.
    """

    minimum_images_per_class: int = 2
    minimum_clean_accuracy: float = 0.5
    accuracy_tolerance: float = 0.1
    fit_fraction: float = 0.5
    calibrate_fraction: float = 0.2


@dataclass(frozen=True)
class ScoringPolicy:
    """Which checks score inputs, and the false-positive rate of the calibrated threshold of each.

    A check that is left out is not required for a ``pass``; the report lists what ran.
    """

    checks: tuple[str, ...] = SCORERS
    false_positive_rate: float = 0.05


@dataclass(frozen=True)
class LayerwisePolicy:
    """``tau`` of Jebreel et al. 2023: deviations below the clean mean at which an input is flagged."""

    tau: float = 2.5


@dataclass(frozen=True)
class BadExpertPolicy:
    """How far the copies of the model are fine-tuned; see :class:`audit_plugin.checks.bad_expert.BadExpertScorer`.

    ``k`` is the paper's constant of the combined score; without it, it follows from the architecture.
    """

    expert_accuracy: float = 0.25
    auxiliary_epochs: int = 5
    auxiliary_tolerance: float = 0.03
    k: float | None = None


@dataclass(frozen=True)
class BenifulPolicy:
    """The auto-encoder of benign features; see :class:`audit_plugin.checks.beniful.BenifulScorer`."""

    latent_size: int = 32
    steps: int = 600


@dataclass(frozen=True)
class TriggerInversionPolicy:
    """Budget of the search; see :class:`audit_plugin.checks.trigger_inversion.TriggerInversion`.

    A search whose greatest outlier lies between ``doubtful_from`` and ``doubtful_to`` is repeated, up to ``searches`` in all, and
    the sizes are averaged. Beyond ``maximum_classes`` classes are not searched, and the audit says so.
    """

    steps: int = 200
    images_per_step: int = 24
    flip_rate: float = 0.97
    maximum_classes: int = 100
    searches: int = 3
    doubtful_from: float = 2.0
    doubtful_to: float = 5.0


@dataclass(frozen=True)
class MaximumMarginPolicy:
    """Budget of the ascent; see :class:`audit_plugin.checks.maximum_margin.MaximumMargin`."""

    starts: int = 5
    steps: int = 300


@dataclass(frozen=True)
class NeuronNoisePolicy:
    """See :class:`audit_plugin.checks.neuron_noise.NeuronNoise`."""

    images: int = 100
    kept_accuracy: tuple[float, ...] = (0.9, 0.75)


@dataclass(frozen=True)
class WaveScanPolicy:
    """Which waves are tried; see :class:`audit_plugin.checks.wave_scan.WaveScan`."""

    amplitude: float = 40.0
    frequencies: int = 6
    images: int = 64


@dataclass(frozen=True)
class SourceSpecificPolicy:
    """Budget of the search over pairs of classes; with more than ``maximum_classes`` classes it is left out."""

    steps: int = 150
    images_per_step: int = 6
    maximum_classes: int = 12


@dataclass(frozen=True)
class CanariesPolicy:
    """Known backdoors to plant in copies of the model; see :mod:`audit_plugin.checks.canaries`.

    ``count`` of each of the ``families``; of those ``required``, nothing passes unless at least half were found. In a copy at
    most ``classes`` classes are searched. Without families none are planted.
    """

    families: tuple[str, ...] = ("patch",)
    required: tuple[str, ...] = ("patch",)
    count: int = 2
    classes: int = 6


@dataclass(frozen=True)
class VerdictPolicy:
    """When a class, or a pair of classes, stands out; see :mod:`audit_plugin.verdict`."""

    minimum_outlier: float = 3.5
    clear_outlier: float = 3.0
    doubtful_pair_outlier: float = 5.0
    minimum_attack_success: float = 0.8
    minimum_detection: float = 0.5
    minimum_confirmations: int = 2
    minimum_classes: int = 4


@dataclass(frozen=True)
class CalibrationPolicy:
    """Clean models to compare with; see :mod:`audit_plugin.calibration`.

    ``pool`` is a ``.json`` file that ``python -m pipelines.calibrate`` made, relative to the policy's own, or the name of one
    that is shipped. A model is unusual among them with a p-value of at most ``alpha``.
    """

    pool: str | None = None
    alpha: float = 0.05


@dataclass(frozen=True)
class RepairPolicy:
    """How a backdoored model is repaired; see :mod:`audit_plugin.repairing`.

    ``method`` is 'beniful' or 'prune'; ``accuracy_budget`` is the most clean accuracy, in [0, 1), that a repair may cost.
    """

    method: str = "beniful"
    accuracy_budget: float = 0.02


@dataclass(frozen=True)
class GatePolicy:
    """What the registry asks of a version before it may be promoted; see :mod:`audit_plugin.gate`.

    Aliases and stages are compared without regard to case. Ages are in days; ``suite`` is the promotion suite's file, relative to
    the policy's own.
    """

    protected_aliases: tuple[str, ...] = ("champion", "production")
    protected_stages: tuple[str, ...] = ("Production",)
    maximum_age_days: float = 30.0
    maximum_waiver_days: float = 7.0
    suite: str | None = None


@dataclass(frozen=True)
class SandboxPolicy:
    """The child process in which a model is opened; see :mod:`audit_plugin.sandbox`.

    ``required`` refuses to audit where network and files cannot be kept from it. A model that takes more than
    ``time_limit_minutes`` or ``memory_gib`` is not audited.
    """

    required: bool = False
    time_limit_minutes: float = 60.0
    memory_gib: float = 16.0


@dataclass(frozen=True)
class Policy:
    """A complete policy, one section a topic.

    ``clean_images`` says what to audit registered models with: a model's name, or a shell pattern, and a path or artifact URI.
    ``reference_pool`` is what [calibration] pool names, read.
    """

    model: ModelPolicy = field(default_factory=ModelPolicy)
    clean_set: CleanSetPolicy = field(default_factory=CleanSetPolicy)
    scoring: ScoringPolicy = field(default_factory=ScoringPolicy)
    layerwise: LayerwisePolicy = field(default_factory=LayerwisePolicy)
    bad_expert: BadExpertPolicy = field(default_factory=BadExpertPolicy)
    beniful: BenifulPolicy = field(default_factory=BenifulPolicy)
    trigger_inversion: TriggerInversionPolicy = field(default_factory=TriggerInversionPolicy)
    maximum_margin: MaximumMarginPolicy = field(default_factory=MaximumMarginPolicy)
    neuron_noise: NeuronNoisePolicy = field(default_factory=NeuronNoisePolicy)
    wave_scan: WaveScanPolicy = field(default_factory=WaveScanPolicy)
    source_specific: SourceSpecificPolicy = field(default_factory=SourceSpecificPolicy)
    canaries: CanariesPolicy = field(default_factory=CanariesPolicy)
    verdict: VerdictPolicy = field(default_factory=VerdictPolicy)
    calibration: CalibrationPolicy = field(default_factory=CalibrationPolicy)
    repair: RepairPolicy = field(default_factory=RepairPolicy)
    gate: GatePolicy = field(default_factory=GatePolicy)
    sandbox: SandboxPolicy = field(default_factory=SandboxPolicy)
    clean_images: Mapping[str, str] = field(default_factory=dict)
    reference_pool: ReferencePool | None = None

    def __post_init__(self) -> None:
        _check_ranges(self)

    def quick(self) -> Policy:
        """The same with one canary of each family and, unless a pool was measured with more, one search; another digest."""
        searches = self.trigger_inversion.searches if self.reference_pool else 1
        return dataclasses.replace(
            self,
            canaries=dataclasses.replace(self.canaries, count=1),
            trigger_inversion=dataclasses.replace(self.trigger_inversion, searches=searches),
        )

    def clean_images_for(self, name: str) -> str | None:
        """What [clean_images] says of a registered model: its own name wins, then the first pattern that matches.

        A relative path starts at the policy file's folder; see :func:`audit_plugin.requirements.clean_images_of`.
        """
        key = self.clean_images_key(name)
        return None if key is None else self.clean_images[key]

    def clean_images_key(self, name: str) -> str | None:
        """The key of [clean_images] that :meth:`clean_images_for` finds."""
        if name in self.clean_images:
            return name
        return next((pattern for pattern in self.clean_images if fnmatch.fnmatchcase(name, pattern)), None)

    def document(self) -> dict[str, Any]:
        """As plain JSON values; of the reference pool its digest, so that another pool makes another policy."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(self, reference_pool=None))))
        del plain["reference_pool"]
        plain["calibration"]["pool_digest"] = self.reference_pool.digest if self.reference_pool else None
        return plain

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the policy with all defaults filled in."""
        return document_digest(self.document())

    @property
    def verdict_digest(self) -> str:
        """See :func:`verdict_digest_of`."""
        return verdict_digest_of(self.document())


SECTIONS = tuple(entry.name for entry in dataclasses.fields(Policy) if entry.name != "reference_pool")
"""Of a policy file."""


def verdict_digest_of(document: Mapping[str, Any]) -> str:
    """As :attr:`Policy.digest`, of what decides verdicts whatever the model: not [model], [repair], [gate], [sandbox] and
    [clean_images]."""
    others = ("model", "repair", "gate", "sandbox", "clean_images")
    return document_digest({name: section for name, section in document.items() if name not in others})


def load_policy(path: Path | None) -> Policy:
    """Read ``audit.toml``; without a path the defaults.

    Raises:
        UsageError: the file is missing, is no TOML, or has an unknown key or a value of the wrong type or range; or its reference
            pool cannot be read.
    """
    if path is None:
        return Policy()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no policy file '{path}'.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"The policy '{path}' is no readable TOML file: {error}.") from error
    return policy_from(content, path.parent)


def policy_from(content: Mapping[str, Any], folder: Path | None = None) -> Policy:
    """A policy from nested mappings; its reference pool, if it names one, starts at ``folder``.

    Raises:
        UsageError: unknown section or key, a value of the wrong type or range, or a reference pool that cannot be read.
    """
    hints = get_type_hints(Policy)
    sections = {name: hints[name] for name in SECTIONS}
    values = {}
    for section, entries in content.items():
        if section not in sections:
            raise UsageError(f"The policy has no section [{section}].{nearest(section, sections)}")
        if not isinstance(entries, Mapping):
            raise UsageError(f"Expected a section [{section}] with keys, got the value {entries!r}.")
        values[section] = _section(section, sections[section], entries)
    if "calibration" in values and (pool := values["calibration"].pool) is not None:
        values["reference_pool"] = find_pool(pool, folder or Path())
    return Policy(**values)


def _section(section: str, kind: type[Any], entries: Mapping[str, Any]) -> Any:
    if not dataclasses.is_dataclass(kind):  # its keys are the user's own
        return {key: _value(f"[{section}] {key}", str, value) for key, value in entries.items()}
    hints = get_type_hints(kind)
    for key in entries:
        if key not in hints:
            raise UsageError(f"The policy section [{section}] has no key '{key}'.{nearest(key, hints)}")
    return kind(**{key: _value(f"[{section}] {key}", hints[key], value) for key, value in entries.items()})


def _value(place: str, hint: Any, value: Any) -> Any:
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    accepted = [option for option in options if option is not type(None)]
    for option in accepted:
        inner = get_args(option)
        if inner and isinstance(value, list):
            return tuple(_value(place, inner[0], entry) for entry in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # an infinity, a NaN (unequal to all), or a whole number without end
                raise UsageError(f"{place} in the policy must be a finite number, got {str(value)[:40]}.")
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    names = " or ".join("a list" if get_args(option) else option.__name__ for option in accepted)
    raise UsageError(f"{place} in the policy must be {names}, got {value!r}.")


def _check_ranges(policy: Policy) -> None:
    clean, layerwise, search, verdict = policy.clean_set, policy.layerwise, policy.trigger_inversion, policy.verdict
    model, canaries, plantable = policy.model, policy.canaries, get_args(CanaryFamily)
    repair, scoring = policy.repair, policy.scoring
    for key, given, known in (("[scoring] checks", scoring.checks, SCORERS), ("[repair] method", (repair.method,), REPAIRS)):
        for name in given:
            if name not in known:
                raise UsageError(f"{key} in the policy names '{name}', which there is not.{nearest(name, known)}")
    rules = {
        "[clean_set] fit_fraction and calibrate_fraction must be positive and leave a test split": (
            clean.fit_fraction > 0 and clean.calibrate_fraction > 0 and clean.fit_fraction + clean.calibrate_fraction < 1
        ),
        "[clean_set] minimum_clean_accuracy must lie in [0, 1]": 0 <= clean.minimum_clean_accuracy <= 1,
        "[clean_set] accuracy_tolerance must lie in [0, 1]": 0 <= clean.accuracy_tolerance <= 1,
        "[clean_set] minimum_images_per_class must be at least 1": clean.minimum_images_per_class >= 1,
        "[layerwise] tau must be positive": layerwise.tau > 0,
        "[scoring] false_positive_rate must lie between 0 and 1": 0 < policy.scoring.false_positive_rate < 1,
        "[scoring] checks must name at least one check": len(policy.scoring.checks) > 0,
        "[scoring] checks must name each check once": len(set(policy.scoring.checks)) == len(policy.scoring.checks),
        "[bad_expert] expert_accuracy must lie between 0 and 1": 0 < policy.bad_expert.expert_accuracy < 1,
        "[bad_expert] auxiliary_epochs must be at least 5": policy.bad_expert.auxiliary_epochs >= 5,
        "[bad_expert] auxiliary_tolerance must lie in [0, 1)": 0 <= policy.bad_expert.auxiliary_tolerance < 1,
        "[bad_expert] k must lie between 0 and 1": policy.bad_expert.k is None or 0 < policy.bad_expert.k < 1,
        "[beniful] latent_size must be at least 1": policy.beniful.latent_size >= 1,
        "[beniful] steps must be at least 1": policy.beniful.steps >= 1,
        "[trigger_inversion] steps must be at least 1": search.steps >= 1,
        "[trigger_inversion] images_per_step must lie between 1 and 512": 1 <= search.images_per_step <= 512,
        "[trigger_inversion] flip_rate must lie between 0.5 and 1": 0.5 <= search.flip_rate < 1,
        "[trigger_inversion] searches must be at least 1": search.searches >= 1,
        "[trigger_inversion] doubtful_from must not exceed doubtful_to": search.doubtful_from <= search.doubtful_to,
        "[trigger_inversion] maximum_classes must be at least 2": search.maximum_classes >= 2,
        "[maximum_margin] starts and steps must be at least 1": policy.maximum_margin.starts >= 1 <= policy.maximum_margin.steps,
        "[neuron_noise] images must be at least 20": policy.neuron_noise.images >= 20,
        "[neuron_noise] kept_accuracy must hold shares between 0 and 1, the largest first": (
            all(0 < share < 1 for share in policy.neuron_noise.kept_accuracy)
            and list(policy.neuron_noise.kept_accuracy) == sorted(set(policy.neuron_noise.kept_accuracy), reverse=True)
        ),
        "[wave_scan] amplitude must lie between 0 and 255": 0 < policy.wave_scan.amplitude <= 255,
        "[wave_scan] frequencies must be at least 1": policy.wave_scan.frequencies >= 1,
        "[wave_scan] images must be at least 20": policy.wave_scan.images >= 20,
        "[source_specific] steps must be at least 1": policy.source_specific.steps >= 1,
        "[source_specific] images_per_step must lie between 1 and 720": 1 <= policy.source_specific.images_per_step <= 720,
        "[source_specific] maximum_classes must not be negative": policy.source_specific.maximum_classes >= 0,
        f"[canaries] families must be among {', '.join(plantable)}": set(canaries.families) <= set(plantable),
        "[canaries] required must name families that are planted": (
            not canaries.families or set(canaries.required) <= set(canaries.families)
        ),
        "[canaries] count must be at least 1": canaries.count >= 1,
        "[canaries] classes must be at least 4": canaries.classes >= 4,
        "[verdict] doubtful_pair_outlier must be positive": verdict.doubtful_pair_outlier > 0,
        "[verdict] clear_outlier must not exceed minimum_outlier": 0 < verdict.clear_outlier <= verdict.minimum_outlier,
        "[verdict] minimum_attack_success must lie in [0, 1]": 0 <= verdict.minimum_attack_success <= 1,
        "[verdict] minimum_detection must lie in [0, 1]": 0 <= verdict.minimum_detection <= 1,
        "[verdict] minimum_confirmations must be at least 1": verdict.minimum_confirmations >= 1,
        "[verdict] minimum_classes must be at least 3": verdict.minimum_classes >= 3,
        "[calibration] alpha must lie between 0 and 0.5": 0 < policy.calibration.alpha < 0.5,
        "[repair] accuracy_budget must lie in [0, 1)": 0 <= policy.repair.accuracy_budget < 1,
        "[sandbox] time_limit_minutes and memory_gib must be positive": (
            policy.sandbox.time_limit_minutes > 0 and policy.sandbox.memory_gib > 0
        ),
        f"[gate] maximum_age_days and maximum_waiver_days must be positive and at most {_MOST_DAYS:,}": all(
            0 < days <= _MOST_DAYS for days in (policy.gate.maximum_age_days, policy.gate.maximum_waiver_days)
        ),
        "[clean_images] must name a file, a folder or an artifact URI for each model": all(
            source.strip() for source in policy.clean_images.values()
        ),
        "[clean_images] must not hold user names or passwords, for reports record it": not any(
            re.search(r"://[^\s/?#]*@", source) for source in policy.clean_images.values()
        ),
        "[model] layout must be 'NCHW' or 'NHWC'": model.layout in (None, "NCHW", "NHWC"),
        "[model] channels must be 1 or 3": model.channels in (None, 1, 3),
        "[model] height and width must be at least 4": all(size is None or size >= 4 for size in (model.height, model.width)),
        "[model] mean and std must hold one number, or one for each of three channels": all(
            values is None or len(values) in (1, 3) for values in (model.mean, model.std)
        ),
        "[model] std must be positive": model.std is None or (len(model.std) > 0 and min(model.std) > 0),
        "[model] clean_accuracy must lie in [0, 1]": model.clean_accuracy is None or 0 <= model.clean_accuracy <= 1,
        "[model] low must be below high": model.low is None or model.high is None or model.low < model.high,
    }
    for rule, holds in rules.items():
        if not holds:
            raise UsageError(f"The policy is inconsistent: {rule}.")
