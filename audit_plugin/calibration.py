"""How unusual an audited model is among clean models that were audited alike: conformal p-values, combined by Fisher's sum.

A pool of reference models says what clean models of a kind look like. With n references and the audited model, each statistic j
(higher is more suspicious) gives every one of the n + 1 models the p-value

    p_ij = #{k: T_kj >= T_ij} / (n + 1),                 k over all n + 1 models, i itself among them,

and the Fisher sum S_i = -2 sum_j log p_ij. The statistics depend on each other, so S has no chi-squared distribution; its own
rank does instead:

    p = #{i: S_i >= S_audited} / (n + 1)                 (full conformal prediction, Vovk, Gammerman and Shafer 2005).

If the audited model is clean and exchangeable with the references, p is at most alpha with probability at most alpha, whatever
the statistics. It cannot fall below 1 / (n + 1). Exchangeable means: trained, checked and exported like them. That cannot be
proven; what is measured of it (:data:`TRAITS`, and the settings of the audit) must agree, or the pool says nothing.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit_plugin.canonical import document_digest
from audit_plugin.errors import UsageError, nearest
from audit_plugin.types import (
    Calibration,
    CleanSetSummary,
    InputScores,
    Measured,
    Outcome,
    SubjectSummary,
    class_measurements,
    trigger_search,
)

TRAITS = (
    "classes",
    "channels",
    "height",
    "width",
    "clean_accuracy",
    "log_clean_images",
    "log_parameters",
    "log_patch_size",
    "log_additive_size",
)
"""What is measured of whether two models can be compared; the first four must be the same, the others near the pool's own."""

SETTINGS = (
    "clean_set",
    "scoring",
    "layerwise",
    "bad_expert",
    "beniful",
    "trigger_inversion",
    "source_specific",
    "maximum_margin",
    "neuron_noise",
    "wave_scan",
)
"""Sections of the policy that change what is measured; those of a pool and of an audit must be the same."""

FEWEST_REFERENCES = 9  # below, not even one in ten can be told

_FORMAT = "backdoor-audit reference pool, version 1"
_LARGEST_FILE = 4 * 1024**2
_LEEWAY = 0.5  # of the pool's own range, by which a trait may lie outside it
_LEAST_LEEWAY = {"log_clean_images": math.log(1.5)}  # one clean set often serves for a whole pool


@dataclass(frozen=True)
class Reference:
    """A clean model of a pool.

    Attributes:
        digest: of its files, so that nobody is compared with itself.
        traits: what must be alike, see :func:`traits_of`.
        statistics: see :func:`statistics_of`.
    """

    digest: str
    traits: Mapping[str, float]
    statistics: Mapping[str, float]


@dataclass(frozen=True)
class ReferencePool:
    """Clean models that were audited alike.

    Attributes:
        provenance: what they are and who measured them when, in words, by topic.
        settings: the sections :data:`SETTINGS` of the policy under which they were audited.
        tool_version: that audited them.
    """

    name: str
    provenance: Mapping[str, str]
    settings: Mapping[str, Any]
    tool_version: str
    references: tuple[Reference, ...]

    def document(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "format": _FORMAT,
            "name": self.name,
            "provenance": dict(self.provenance),
            "settings": dict(self.settings),
            "tool_version": self.tool_version,
            "references": [
                {"digest": entry.digest, "traits": dict(entry.traits), "statistics": dict(entry.statistics)}
                for entry in self.references
            ],
        }

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the document."""
        return document_digest(self.document())


def find_pool(name: str, folder: Path) -> ReferencePool:
    """The pool that a policy in ``folder`` names: a ``.json`` file, else one that is shipped.

    Raises:
        UsageError: there is none of that name, or the file is no pool.
    """
    if name.endswith(".json"):
        return load_pool(folder / name)
    with importlib.resources.as_file(importlib.resources.files(__package__) / "pools") as shipped:
        names = sorted(path.stem for path in shipped.glob("*.json"))
        if name not in names:
            raise UsageError(
                f"There is no shipped reference pool '{name}', and a file's name ends with .json.{nearest(name, names)}"
            )
        return load_pool(shipped / f"{name}.json")


def load_pool(path: Path) -> ReferencePool:
    """Read a pool.

    Raises:
        UsageError: the file is missing, is no pool, or two of its references are the same model.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"The reference pool '{path}' is larger than {_LARGEST_FILE // 1024**2} MiB.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no reference pool '{path}'. Make one with: python -m pipelines.calibrate") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"The reference pool '{path}' is no readable JSON file: {error}.") from error
    try:
        if document["format"] != _FORMAT:
            raise ValueError(f"its format is {str(document['format'])[:60]!r}, not {_FORMAT!r}")
        references = tuple(
            Reference(str(entry["digest"]), _numbers(entry["traits"]), _numbers(entry["statistics"]))
            for entry in document["references"]
        )
        pool = ReferencePool(
            name=str(document["name"]),
            provenance=dict(document["provenance"]),
            settings=dict(document["settings"]),
            tool_version=str(document["tool_version"]),
            references=references,
        )
        check_pool(pool)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"'{path}' is no reference pool: {error}. Make one with: python -m pipelines.calibrate") from error
    return pool


def check_pool(pool: ReferencePool) -> None:
    """That the references can be compared.

    Raises:
        ValueError: there are too few, two are the same, or they have other statistics or traits than each other.
    """
    if len(pool.references) < FEWEST_REFERENCES:
        raise ValueError(f"it has {len(pool.references)} references, and at least {FEWEST_REFERENCES} are needed")
    if len({entry.digest for entry in pool.references}) < len(pool.references):
        raise ValueError("two of its references are the same model")
    for entry in pool.references:
        if set(entry.statistics) != set(pool.references[0].statistics) or not entry.statistics:
            raise ValueError("its references have other statistics than each other")
        if set(entry.traits) != set(TRAITS):
            raise ValueError(f"a reference lacks traits, or has unknown ones: {', '.join(set(entry.traits) ^ set(TRAITS))}")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Raises ValueError for what is not finite: an unknown value would rank anywhere."""
    numbers = {str(name): float(value) for name, value in values.items()}
    if not all(math.isfinite(value) for value in numbers.values()):
        raise ValueError("a statistic or trait is no finite number")
    return numbers


# -------------------------------------------------------------------------------------------- what is compared


def statistics_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Statistics of a whole model, higher is more suspicious; the maximum over its classes is taken inside each.

    * ``trigger_outlier``: by how much the most conspicuous class stands out, by trigger, margin or noise;
    * ``trigger_smallness``: minus the log of the smallest patch that works, over the log of the image's points;
    * ``margin``: log of the largest margin of a class over the next class's;
    * ``detection``: how much more often images with the recovered trigger are flagged than clean ones, averaged over the checks.

    Empty without a search; what is not finite is left out.
    """
    measurements = [outcome.measurement for outcome in outcomes if isinstance(outcome, Measured)]
    search = trigger_search(outcomes)
    if search is None:
        return {}
    patches = [found for found in search.candidates if found.trigger.family == "patch" and found.is_compared]
    detections = [
        threshold.detection_rate.value - threshold.false_positive_rate.value
        for scores in measurements
        if isinstance(scores, InputScores)
        for threshold in scores.thresholds[:1]  # the one that flags suspect inputs
        if threshold.detection_rate is not None
    ]
    found = {"trigger_outlier": max(candidate.outlier for candidate in search.candidates)}
    if patches:
        smallest = min(candidate.trigger.size for candidate in patches)
        found["trigger_smallness"] = -math.log(max(smallest, 1e-3)) / math.log(patches[0].trigger.mask.size)
    if (margins := class_measurements(outcomes).get("maximum_margin")) is not None:
        found["margin"] = math.log(max(*margins.ratios, 1.0))
    if detections:
        found["detection"] = statistics.fmean(detections)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def traits_of(subject: SubjectSummary, clean_set: CleanSetSummary, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What must be alike: form of input and output, accuracy, size, how large a trigger a usual class needs (robustness)."""
    spec = subject.input_spec
    traits = {
        "classes": float(len(subject.class_names)),
        "channels": float(spec.channels),
        "height": float(spec.height),
        "width": float(spec.width),
        "clean_accuracy": clean_set.clean_accuracy.value,
        "log_clean_images": math.log(max(sum(clean_set.images_per_class), 1)),
        "log_parameters": math.log(max(subject.parameter_count, 1)),
    }
    search = trigger_search(outcomes)
    for family in ("patch", "additive"):
        sizes = [found.trigger.size for found in search.candidates if found.trigger.family == family] if search else []
        if sizes and (median := statistics.median(sizes)) > 0:
            traits[f"log_{family}_size"] = math.log(median)
    return traits


# -------------------------------------------------------------------------------------------------- comparing


def calibrate(
    digest: str,
    traits: Mapping[str, float],
    values: Mapping[str, float],
    settings: Mapping[str, Any],
    tool_version: str,
    pool: ReferencePool | None,
    alpha: float,
) -> Calibration:
    """Where a model stands in a pool.

    Args:
        digest: of the model's files; a reference of the same digest is left out, for a model tells nothing about itself.
        settings: the policy's document.
        alpha: the p-value that is to be attainable.

    Returns:
        With ``problems`` and no p-values where the pool says nothing of this model; with neither where there is no pool.
    """
    if pool is None:
        return Calibration(dict(values), dict(traits))
    references = [entry for entry in pool.references if entry.digest != digest]
    found = Calibration(dict(values), dict(traits), pool.name, pool.digest, len(references))
    problems = _problems(references, pool, traits, values, settings, tool_version, alpha)
    if problems:
        return replace(found, problems=tuple(problems))
    names = sorted(references[0].statistics)
    table = np.array([[entry.statistics[name] for name in names] for entry in references] + [[values[name] for name in names]])
    p_values, p_value = conformal(table)
    return replace(found, p_values=dict(zip(names, map(float, p_values), strict=True)), p_value=p_value)


def conformal(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The p-values of the last row among all rows.

    Args:
        table: (models, statistics), higher is more suspicious.

    Returns:
        (statistics,) one p-value each, and the one of their Fisher sum.
    """
    at_least = (table[None, :, :] >= table[:, None, :]).sum(axis=1)  # (models, statistics), each model counts itself
    each = at_least / len(table)
    sums = -2 * np.log(each).sum(axis=1)
    # Equal sums must count as equal, in whatever order they were added up.
    return each[-1], float((sums >= sums[-1] - 1e-9).mean())


def _problems(
    references: Sequence[Reference],
    pool: ReferencePool,
    traits: Mapping[str, float],
    values: Mapping[str, float],
    settings: Mapping[str, Any],
    tool_version: str,
    alpha: float,
) -> list[str]:
    """Why the pool says nothing of this model, in sentences."""
    problems = []
    differing = [name for name in SETTINGS if settings.get(name) != pool.settings.get(name)]
    if differing:
        problems.append(f"Its references were audited with other settings in {', '.join(f'[{name}]' for name in differing)}.")
    if tool_version != pool.tool_version:
        problems.append(f"Its references were audited by version {pool.tool_version}, this model by {tool_version}.")
    if 1 / (len(references) + 1) > alpha:
        least = math.ceil(1 / alpha) - 1
        problems.append(f"It has {len(references)} references; a p-value of {alpha:g} needs at least {least}.")
    if missing := sorted(set(references[0].statistics) - set(values)) if references else []:
        problems.append(f"Not measured here: {', '.join(missing)}.")
    for name in TRAITS:
        here = traits.get(name)
        there = [entry.traits[name] for entry in references]
        low, high = min(there), max(there)
        leeway = 0.0 if name in TRAITS[:4] else max(_LEEWAY * (high - low), _LEAST_LEEWAY.get(name, 0.0))
        if here is None:
            problems.append(f"Not measured here: {name}.")
        elif not low - leeway <= here <= high + leeway:
            problems.append(f"Its references have a {name} of {low:.3g} to {high:.3g}, this model one of {here:.3g}.")
    return problems
