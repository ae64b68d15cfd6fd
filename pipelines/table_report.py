"""The tables and plots of :mod:`pipelines.tables`: CSV, Markdown and SVG from the results, which it only reads."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from audit_plugin.maths.rates import auroc, rate
from audit_plugin.report.sanitise import escape_markdown
from audit_plugin.types import Rate
from pipelines.tables import BY_POLICY, MOST_STEPS, TOOL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("pipelines.tables")

Row = dict[str, Any]
_Place = TypeVar("_Place", str, tuple[str, float])
Truth = Literal["clean", "one target", "other", "did not take"]
"""'one target': triggered images of every class become one. 'other': all-to-all and source-specific. 'did not take': of
either kind, but the attack succeeds too seldom to be asked for."""

LEAST_SUCCESS = 0.9

PUBLISHED: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("layerwise", "tau = 2.5"): {
        "BadNets": "99.4% / 1.4%",
        "Blended": "100% / 1.6%",
        "LabelConsistent": "100% / 1.2%",
        "WaNet": "91.0% / 1.5%",
        "SampleSpecific": "99.0% / 1.2%",
        "InputAware": "99.1% / 1.3%",
    }
}
"""Detected / false positives of Jebreel et al. 2023 on CIFAR-10, ResNet-18, by check and rule and then attack."""

_OTHER = ("AllToAll", "TaCT")
_LOWEST = -math.inf  # score of a model that could not be measured
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart without colour vision
_MARKERS = "osD^"


def truth_of(record: Mapping[str, Any]) -> Truth:
    """What a model is, from its card; an attack of unknown success did not take."""
    truth = record["truth"]
    if truth["attack"] is None:
        return "clean"
    if not (truth.get("attack_success_rate") or 0.0) >= LEAST_SUCCESS:
        return "did not take"
    return "other" if truth["attack"] in _OTHER else "one target"


@dataclass(frozen=True)
class Judged:
    """What one detector said of one model, over all seeds; the lists leave out seeds that were not measured.

    ``flagged`` and ``right_class`` are of more than half of all seeds, so that what was not measured counts as not flagged.
    """

    model: str
    detector: str
    truth: Truth
    attack: str
    scores: tuple[float, ...]
    seeds: int
    flagged: bool
    right_class: bool

    @property
    def score(self) -> float | None:
        """The median over seeds."""
        return statistics.median(self.scores) if self.scores else None


def judged(records: Iterable[Row]) -> list[Judged]:
    """One entry a model and detector that judges models, in the order of the records."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for record in records:
        groups.setdefault((record["model"], record["detector"]), []).append(record)
    found = []
    for (model, detector), group in groups.items():
        judgements = [record["judgement"] for record in group if "judgement" in record]
        if not judgements and any(record["state"] == "measured" for record in group):
            continue  # it judges no models
        target = group[0]["truth"].get("target_class")
        flagged = [judgement["flagged"] for judgement in judgements]
        right = [judgement["flagged"] and judgement["suspected_class"] == target for judgement in judgements]
        found.append(
            Judged(
                model,
                detector,
                truth_of(group[0]),
                group[0]["truth"]["attack"] or "",
                tuple(judgement["score"] for judgement in judgements),
                len(group),
                2 * sum(flagged) > len(group),
                2 * sum(right) > len(group),
            )
        )
    return found


def detector_rows(records: Sequence[Row]) -> list[Row]:
    """One row a detector that judges models; None where there is nothing to compute a figure from.

    Rates count models, not seeds. ``auroc`` is the mean over seeds of the area for clean against one-target models,
    ``auroc_least`` and ``auroc_most`` its spread. A model that could not be measured with a seed has the lowest score in that
    seed's area, be it clean or backdoored, as it counts as not flagged; two of them tie, which counts one half.
    """
    entries, rows = judged(records), []
    for detector in dict.fromkeys(entry.detector for entry in entries if _judges_models(entry.detector, entries)):
        own = [entry for entry in entries if entry.detector == detector]
        made = [record for record in records if record["detector"] == detector]
        measured = [record for record in made if "judgement" in record]
        areas = [area for seed in sorted({record["seed"] for record in made}) if (area := _area(made, seed)) is not None]
        clean, one = (_of(own, truth) for truth in ("clean", "one target"))
        caught = [entry for entry in one if entry.flagged]
        rows.append(
            {
                "detector": detector,
                "seeds": max(entry.seeds for entry in own),
                "auroc": statistics.mean(areas) if areas else None,
                "auroc_least": min(areas, default=None),
                "auroc_most": max(areas, default=None),
                "false_alarms": _share(clean),
                "detected": _share(one),
                "right_class": rate(sum(entry.right_class for entry in caught), len(caught)),
                "not_measured": len(made) - len(measured),
                "seconds": statistics.median(record["seconds"] for record in measured) if measured else None,
                "peak_memory_mib": max((record["peak_memory_mib"] for record in measured), default=None),
            }
        )
    return rows


def attack_rows(records: Sequence[Row]) -> list[Row]:
    """One row an attack, with the share of its models that each detector flags; clean models first, attacks that did not take
    last, whatever they are."""
    entries = judged(records)
    detectors = [name for name in dict.fromkeys(entry.detector for entry in entries) if _judges_models(name, entries)]
    groups: dict[str, list[Judged]] = {
        "(clean)": [],
        **{attack: [] for attack in sorted({entry.attack for entry in entries} - {""})},
    }
    for entry in entries:
        name = {"clean": "(clean)", "did not take": "(did not take)"}.get(entry.truth, entry.attack)
        groups.setdefault(name, []).append(entry)
    return [
        {"attack": name} | {detector: _share([entry for entry in group if entry.detector == detector]) for detector in detectors}
        for name, group in groups.items()
        if group
    ]


def verdict_rows(records: Sequence[Row]) -> list[Row]:
    """How often the audit said what, by truth, over all seeds; what was not measured has a column of its own."""
    rows = []
    for truth in get_args(Truth):
        made = [record for record in records if record["detector"] == "audit" and truth_of(record) == truth]
        counts = Counter(record.get("judgement", {}).get("verdict", "not measured") for record in made)
        if made:
            rows.append(
                {"truth": truth} | {verdict: counts[verdict] for verdict in ("pass", "fail", "inconclusive", "not measured")}
            )
    return rows


def input_rows(records: Sequence[Row]) -> list[Row]:
    """One row a truth or attack, check and threshold: means over what was measured, with the least detection rate.

    ``measured`` and ``attempts`` count models and seeds, so that what a mean leaves out shows.
    """
    return [
        {
            "attack": attack,
            "check": check,
            "rule": rule,
            "models": len({row["model"] for row in rows}),
            "measured": len(rows),
            "attempts": attempts,
            "detection_rate": _mean(rows, "detection_rate"),
            "least_detection_rate": min(_values(rows, "detection_rate"), default=None),
            "false_positive_rate": _mean(rows, "false_positive_rate"),
            "auroc": _mean(rows, "auroc"),
            "auroc_all_triggered": _mean(rows, "auroc_all_triggered"),
            "triggered_share": _mean(rows, "triggered_share"),
        }
        for (attack, check, rule), (rows, attempts) in _by_check(records, _group_of).items()
    ]


def _by_check(records: Sequence[Row], place_of: Callable[[Row], _Place]) -> dict[tuple[_Place, str, str], tuple[list[Row], int]]:
    """The rows on inputs of each place, check and threshold, sorted, and of how many attempts they are what was measured.

    An attempt without figures is a check's note that it could not measure, and each check of a result that was not measured at
    all. A check without any figures in a place is there too, with every threshold that it has elsewhere.
    """
    rules: dict[str, set[str]] = {}
    checks: dict[str, set[str]] = {}
    for record in records:
        for row in record.get("inputs", ()):
            if "rule" in row or "note" in row:
                rules.setdefault(row["check"], set()).update([row["rule"]] if "rule" in row else [])
                checks.setdefault(record["detector"], set()).add(_without_baseline(row["check"]))
    found: dict[tuple[_Place, str, str], list[Row]] = {}
    missing: Counter[tuple[_Place, str]] = Counter()
    for record in records:
        place = place_of(record)
        for row in record.get("inputs", ()):
            if "rule" in row:
                found.setdefault((place, row["check"], row["rule"]), []).append(row | {"model": record["model"]})
            elif "note" in row:
                missing[place, row["check"]] += 1
        if record["state"] != "measured":
            missing.update((place, check) for check in checks.get(record["detector"], ()))
    for (place, missed), check in itertools.product(missing, rules):
        if _without_baseline(check) == missed:
            for rule in rules[check] or {""}:
                found.setdefault((place, check, rule), [])
    return {key: (rows, len(rows) + missing[key[0], _without_baseline(key[1])]) for key, rows in sorted(found.items())}


def _without_baseline(check: str) -> str:
    """'layerwise' of 'layerwise: triangle'."""
    return check.partition(": ")[0]


def sweep_rows(records: Sequence[Row]) -> list[Row]:
    """One row a truth or attack and value of a swept threshold: means over models and seeds."""
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for record in records:
        for row in record.get("inputs", ()):
            if "swept" in row:
                groups.setdefault((_group_of(record), row["check"], row["swept"], row["value"]), []).append(row)
    return [
        {"attack": attack, "check": check, "setting": setting, "value": value}
        | {rate: _mean(rows, rate) for rate in ("detection_rate", "false_positive_rate")}
        for (attack, check, setting, value), rows in sorted(groups.items())
    ]


def poisoning_rows(records: Sequence[Row]) -> list[Row]:
    """One row an attack that took with several poisoning rates, rate, check and rule: means over what was measured, counted as in
    :func:`input_rows`."""
    took = [
        record
        for record in records
        if truth_of(record) in ("one target", "other") and record["truth"].get("poisoning_rate") is not None
    ]
    groups = _by_check(took, lambda record: (str(record["truth"]["attack"]), float(record["truth"]["poisoning_rate"])))
    rates: dict[str, set[float]] = {}
    for (attack, share), *_ in groups:
        rates.setdefault(attack, set()).add(share)
    return [
        {"attack": attack, "poisoning_rate": share, "check": check, "rule": rule}
        | {"models": len({row["model"] for row in rows}), "measured": len(rows), "attempts": attempts}
        | {figure: _mean(rows, figure) for figure in ("detection_rate", "false_positive_rate", "auroc")}
        for ((attack, share), check, rule), (rows, attempts) in groups.items()
        if len(rates[attack]) > 1 and ": " not in check
    ]


def repair_rows(records: Sequence[Row]) -> list[Row]:
    """One row a model, repair and seed, as measured; a backdoor that never came back is told from one that was not there."""
    return [
        {"model": record["model"], "attack": record["truth"]["attack"] or "", "seed": record["seed"], **row}
        | ({"steps_to_return": f"more than {MOST_STEPS}"} if _never_returned(record, row) else {})
        for record in records
        for row in record.get("repairs", ())
    ]


def _never_returned(record: Row, row: Row) -> bool:
    return record["truth"]["attack"] is not None and "steps_to_return" in row and row["steps_to_return"] is None


def _group_of(record: Row) -> str:
    """The attack, or that there is none or it did not take."""
    name: str = {"clean": "(clean)", "did not take": "(did not take)"}.get(truth_of(record), record["truth"]["attack"])
    return name


def _judges_models(detector: str, entries: Sequence[Judged]) -> bool:
    return any(entry.scores for entry in entries if entry.detector == detector)


def _of(entries: Sequence[Judged], truth: str) -> list[Judged]:
    return [entry for entry in entries if entry.truth == truth]


def _share(entries: Sequence[Judged]) -> Rate:
    return rate(sum(entry.flagged for entry in entries), len(entries))


def _area(made: Sequence[Row], seed: int) -> float | None:
    scores: dict[str, list[float]] = {"clean": [], "one target": []}
    for record in made:
        if record["seed"] == seed and truth_of(record) in scores:
            scores[truth_of(record)].append(record["judgement"]["score"] if "judgement" in record else _LOWEST)
    clean, one = (np.array(values, np.float64) for values in scores.values())
    return auroc(clean, one) if _can_be_compared(clean, one) else None  # type: ignore[arg-type]  # float32 would do as well


def _can_be_compared(clean: NDArray[np.float64], one: NDArray[np.float64]) -> bool:
    """Whether there are models of both kinds, and any of them was measured."""
    return bool(len(clean) and len(one) and np.isfinite(np.concatenate([clean, one])).any())


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = _values(rows, key)
    return statistics.mean(values) if values else None


# ------------------------------------------------------------------------------------------------------------ files


def write_report(records: Sequence[Row], output: Path) -> None:
    """Write ``tables.md``, a CSV file a table, and the plots ``roc.svg`` and ``scores.svg``."""
    output.mkdir(parents=True, exist_ok=True)
    tables = {
        "models": _model_rows(records),
        "detectors": detector_rows(records),
        "attacks": attack_rows(records),
        "verdicts": verdict_rows(records),
        "inputs": input_rows(records),
        "thresholds": sweep_rows(records),
        "poisoning_rates": poisoning_rows(records),
        "repairs": repair_rows(records),
    }
    for name, rows in tables.items():
        _write_csv(output / f"{name}.csv", [_flat(row) for row in rows])
    (output / "tables.md").write_text(markdown(records), encoding="utf-8")
    try:
        _plot(judged(records), output)
    except ModuleNotFoundError as error:
        log.warning("There are no plots: %s. Install the extra 'benchmark'.", error)


def markdown(records: Sequence[Row]) -> str:
    """All tables but those of single models."""
    entries = {record["model"]: truth_of(record) for record in records}
    counts = Counter(entries.values())
    seeds = sorted({record["seed"] for record in records})
    lines = [
        "# Detectors on models whose backdoor is known",
        "",
        f"{counts['clean']} clean models; {counts['one target']} with a backdoor that moves every class to one, "
        f"{counts['other']} with another, and {counts['did not take']} whose attack did not take (it succeeds on less than "
        f"{LEAST_SUCCESS:.0%}; counted apart). Seeds: {', '.join(map(str, seeds)) or 'none'}. In brackets: 95 % Clopper-Pearson "
        "intervals over models; a model counts as flagged when more than half of its seeds flag it, and what was not measured "
        "counts as not flagged.",
        "",
        _machine(records),
        "",
        *_rules(records),
        "## Whole models",
        "",
        "AUROC and detection: clean against backdoors that move every class to one. In parentheses: least and most of the seeds. "
        "A model that could not be measured has the lowest score.",
        "",
    ]
    lines += _table(
        ("detector", "AUROC", "false alarms", "detected", "right class", "not measured", "seconds (median)", "peak memory, MiB"),
        [
            (
                row["detector"],
                _spread(row),
                _rate(row["false_alarms"]),
                _rate(row["detected"]),
                _rate(row["right_class"]),
                row["not_measured"],
                _number(row["seconds"], 1),
                _number(row["peak_memory_mib"], 0),
            )
            for row in detector_rows(records)
        ],
    )
    attacks = attack_rows(records)
    detectors = [name for name in (attacks[0] if attacks else {}) if name != "attack"]
    lines += ["", "## Models flagged, by attack", ""]
    lines += _table(("attack", *detectors), [(row["attack"], *(_rate(row[name]) for name in detectors)) for row in attacks])
    lines += ["", "## Verdicts of the audit", ""]
    verdicts = ("truth", "pass", "fail", "inconclusive", "not measured")
    lines += _table(verdicts, [tuple(row[name] for name in verdicts) for row in verdict_rows(records)])
    lines += [
        "",
        "## Inputs",
        "",
        "Means over what was measured, on images that the true trigger moves; least: of one model. Measured: 3/4 is three of "
        "four attempts, each on one model with one seed; the fourth is in no mean and no least, and is listed below with its "
        "reason. Published: detected / false positives of the layer-wise paper on CIFAR-10, ResNet-18. The other papers publish "
        "means: an AUROC of about 0.99 over 17 attacks (BaDExpert), at least 0.92 on five (BeniFul).",
        "",
    ]
    lines += _table(
        ("attack", "check", "threshold", "measured", "detected (least)", "false positives", "AUROC", "published"),
        [
            (
                row["attack"],
                row["check"],
                row["rule"],
                _measured(row),
                f"{_percent(row['detection_rate'])} ({_percent(row['least_detection_rate'])})"
                if row["detection_rate"] is not None
                else "",
                _percent(row["false_positive_rate"]),
                _number(row["auroc"], 3),
                PUBLISHED.get((row["check"], row["rule"]), {}).get(row["attack"], ""),
            )
            for row in input_rows(records)
            if ": " not in row["check"]  # baselines are in the CSV
        ],
    )
    if sweep := sweep_rows(records):
        values = sorted({row["value"] for row in sweep})
        cells = {(row["attack"], row["check"], row["setting"], row["value"]): _pair_of_rates(row) for row in sweep}
        lines += [
            "",
            "## Thresholds",
            "",
            "Detected / false positives; of clean models false positives alone. Means over what was measured.",
            "",
        ]
        lines += _table(
            ("attack", "check", *(f"{sweep[0]['setting']} = {value:g}" for value in values)),
            [
                (attack, check, *(cells.get((attack, check, setting, value), "") for value in values))
                for attack, check, setting in dict.fromkeys((row["attack"], row["check"], row["setting"]) for row in sweep)
            ],
        )
    if poisoned := poisoning_rows(records):
        lines += ["", "## Poisoning rates", "", "Of attacks that took. Means over what was measured.", ""]
        lines += _table(
            ("attack", "poisoning rate", "check", "threshold", "measured", "detected / false positives", "AUROC"),
            [
                (
                    row["attack"],
                    _percent(row["poisoning_rate"]),
                    row["check"],
                    row["rule"],
                    _measured(row),
                    _pair_of_rates(row),
                    _number(row["auroc"], 3),
                )
                for row in poisoned
            ],
        )

    def in_seed_column(cell: str) -> tuple[str, ...]:
        return (cell,) if len(seeds) > 1 else ()

    lines += ["", "## Repairs", ""]
    figures = ("clean accuracy", "attack success", "triggered right", "steps to return")
    lines += _table(
        ("model", *in_seed_column("seed"), "repair", *figures, "note"),
        [
            (
                row["model"],
                *in_seed_column(str(row["seed"])),
                row["repair"],
                *(_percent(row.get(key)) for key in ("clean_accuracy", "attack_success_rate", "triggered_accuracy")),
                "" if row.get("steps_to_return") is None else row["steps_to_return"],
                row.get("note", ""),
            )
            for row in repair_rows(records)
        ],
    )
    if notes := _notes(records):
        lines += ["", "## Not measured", ""]
        lines += _table(
            ("detector or check", "model", *in_seed_column("seed"), "why"),
            [(name, model, *in_seed_column(str(seed)), note) for name, model, seed, note in notes],
        )
    return "\n".join(lines) + "\n"


def _notes(records: Sequence[Row]) -> list[tuple[str, str, int, str]]:
    """What could not be measured, and why: detectors, and checks on inputs of a result that has figures of others."""
    found = []
    for record in records:
        place = (record["model"], record["seed"])
        if record["state"] != "measured":
            found.append((record["detector"], *place, record["note"]))
        found += [(row["check"], *place, row["note"]) for row in record.get("inputs", ()) if "note" in row]
    return sorted(found)


def _model_rows(records: Sequence[Row]) -> list[Row]:
    """One row a result."""
    shown = ("score", "flagged", "verdict", "suspected_class", "pair_score")
    return [
        {
            "model": record["model"],
            "truth": truth_of(record),
            **record["truth"],
            **{key: record.get(key) for key in ("detector", "seed", "state", "note", "seconds", "peak_memory_mib", "device")},
            **{key: record.get("judgement", {}).get(key) for key in shown},
        }
        for record in records
    ]


def _machine(records: Sequence[Row]) -> str:
    """Where and with what it was measured; one sentence for each kind of machine."""
    sentences = set()
    for record in records:
        if machine := record.get("machine"):
            versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
            place = record["device"] if record["device"] != "cpu" else machine["processor"]
            sentences.add(f"On {place} ({machine['cores']} cores) with {versions}.")
    return escape_markdown(" ".join(sorted(sentences)), 1000)


def _rules(records: Sequence[Row]) -> list[str]:
    """The policies that the results were made with, and a warning where they, or the versions of the tool, are several."""
    by_policy = [record for record in records if record["detector"] in BY_POLICY]
    policies = Counter(record.get("settings", {}).get("policy", "not recorded") for record in by_policy)
    tools = Counter(record.get("versions", {}).get(TOOL, "not recorded") for record in records)
    lines = [f"Policy {_short(digest)}." for digest in policies] if len(policies) == 1 else []
    for kind, counts in (("policies", policies), (f"versions of {TOOL}", tools)):
        if len(counts) > 1:
            told = ", ".join(f"{_short(name)} (results: {count})" for name, count in sorted(counts.items()))
            lines.append(
                f"Results of several {kind} stand here side by side, and the figures mix them: {told}. Delete the files of the "
                "older ones and run the command again."
            )
    return [line for text in lines for line in (escape_markdown(text, 1000), "")]


def _short(digest: str) -> str:
    """A digest as far as its first twelve characters; anything else as it is."""
    kind, colon, value = digest.partition(":")
    return kind + colon + value[:12]


def _measured(row: Row) -> str:
    return f"{row['measured']}/{row['attempts']}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return ["Nothing was measured."]
    body = [[escape_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (list(columns), ["---"] * len(columns), *body)]


def _rate(value: Rate) -> str:
    return f"{value.successes}/{value.trials} [{value.low:.0%}, {value.high:.0%}]" if value.trials else "none"


def _spread(row: Row) -> str:
    if row["auroc"] is None:
        return "none"
    return f"{row['auroc']:.3f} ({row['auroc_least']:.3f} to {row['auroc_most']:.3f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _pair_of_rates(row: Row) -> str:
    rates = (row["detection_rate"], row["false_positive_rate"])
    return " / ".join(_percent(value) for value in rates if value is not None)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _flat(row: Row) -> Row:
    """A rate becomes five columns."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Rate):
            value = value if value.trials else None
            for part in ("value", "successes", "trials", "low", "high"):
                flat[f"{name}_{part}"] = getattr(value, part) if value else None
        else:
            flat[name] = value
    return flat


def _write_csv(file: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _plot(entries: Sequence[Judged], output: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # late: slow to import, and for this alone
    from matplotlib.figure import Figure

    detectors = [name for name in dict.fromkeys(entry.detector for entry in entries) if _judges_models(name, entries)]
    if not detectors:
        return
    roc = Figure(figsize=(5, 5), layout="constrained")
    axes = roc.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    for index, detector in enumerate(detectors):
        curve = roc_curve([entry for entry in entries if entry.detector == detector])
        if curve is not None:
            axes.plot(*curve, color=_COLOURS[index % 4], marker=_MARKERS[index % 4], markersize=4, label=detector)
    axes.set(xlabel="false alarms on clean models", ylabel="detected (every class to one)", aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    scores = Figure(figsize=(3.2 * len(detectors) + 1.5, 4.5), layout="constrained")
    for place, detector in zip(scores.subplots(1, len(detectors), squeeze=False)[0], detectors, strict=True):
        _dots(place, detector, [entry for entry in entries if entry.detector == detector])
    for figure, name in ((roc, "roc.svg"), (scores, "scores.svg")):
        FigureCanvasSVG(figure).print_svg(output / name, metadata={"Date": None})  # type: ignore[no-untyped-call, unused-ignore]


def roc_curve(entries: Sequence[Judged]) -> tuple[list[float], list[float]] | None:
    """False alarms and detections at every cut on the scores of clean and one-target models; None without either kind.

    A model that could not be measured has the lowest score, as in :func:`detector_rows`.
    """
    clean, one = (
        np.array([_LOWEST if entry.score is None else entry.score for entry in _of(entries, truth)])
        for truth in ("clean", "one target")
    )
    if not _can_be_compared(clean, one):
        return None
    cuts = [np.inf, *np.unique(np.concatenate([clean, one]))[::-1]]
    return [float((clean >= cut).mean()) for cut in cuts], [float((one >= cut).mean()) for cut in cuts]


def _dots(axes: Axes, detector: str, entries: Sequence[Judged]) -> None:
    """One dot a model: filled where it is flagged."""
    names = sorted({_label(entry) for entry in entries}, key=lambda name: (not name.startswith("(clean"), name))
    for entry in entries:
        if entry.score is not None:
            colour = _COLOURS[0] if entry.truth == "clean" else _COLOURS[1]
            face = colour if entry.flagged else "none"
            axes.scatter(entry.score, names.index(_label(entry)), s=36, facecolors=face, edgecolors=colour)
    axes.set(title=detector, xlabel="score (filled: flagged)", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()


def _label(entry: Judged) -> str:
    return {"clean": "(clean)", "did not take": f"{entry.attack} (did not take)"}.get(entry.truth, entry.attack)
