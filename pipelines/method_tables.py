"""Measures the checks and the repairs on models whose backdoor is known. The true trigger measures and never chooses.

python -m pipelines.method_tables zoo/ --data-dir data/ -o tables/
"""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional

from audit_plugin.audit import scorers_of
from audit_plugin.checks.inversion import Budget, Goal, Patches, Perturbations, invert
from audit_plugin.errors import AuditError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.maths.rates import auroc, quantile_threshold
from audit_plugin.model.fine_tuning import predicted, take_step
from audit_plugin.model.input_spec import resolve_class_names, resolve_input_spec
from audit_plugin.model.load import load_network
from audit_plugin.model.subject import Subject, prepare_subject
from audit_plugin.policy import Policy
from audit_plugin.repair import REPAIRS
from audit_plugin.types import (
    CalibrateSplit,
    FitSplit,
    FloatArray,
    ImageArray,
    Intake,
    LabelledImages,
    Splits,
    TestSplit,
    Trigger,
)
from audit_plugin.zoo import attacks
from audit_plugin.zoo.data import cifar10
from pipelines.zoo import CARD, MODEL

app = typer.Typer(help="Tables of the checks and repairs on the zoo.", no_args_is_help=True)
log = logging.getLogger("pipelines.method_tables")

_FALSE_POSITIVE_RATE = 0.01
_NOT_TO_ONE = (attacks.AllToAll, attacks.TaCT)
_SEARCH = Budget(steps=100, images_per_step=24, images_per_batch=512, flip_rate=0.9)
_POISONED_IMAGES, _CLEAN_IMAGES, _MOST_STEPS, _STEPS_BETWEEN_LOOKS = 10, 54, 60, 2
_RETURN_IMAGES = 500


@dataclass(frozen=True)
class Known:
    """A model whose truth is known.

    ``stamp`` applies the true trigger, None for a clean model; ``splits.test`` holds all images that are neither fitted nor
    calibrated on.
    """

    name: str
    subject: Subject
    splits: Splits
    target_class: int
    stamp: Callable[[ImageArray], ImageArray] | None


@app.command()
def tables(
    zoo: Annotated[Path, typer.Argument(help="Folder that 'python -m pipelines.zoo train' filled.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the CSV and Markdown tables.")],
    data_dir: Annotated[Path, typer.Option(help="CIFAR-10, as for 'pipelines.zoo train'.")] = Path("data"),
    clean_images: Annotated[int, typer.Option(min=100, help="Clean images that an audit would be given.")] = 2000,
    test_images: Annotated[int, typer.Option(min=100, help="Further images on which everything is measured.")] = 3000,
    seed: Annotated[int, typer.Option(min=0, help="Of the splits, the checks and the repairs.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Measure only this model; may be repeated.")] = None,
    skip_checks: Annotated[bool, typer.Option("--skip-checks", help="Measure the repairs alone.")] = False,
    skip_repairs: Annotated[bool, typer.Option("--skip-repairs", help="Measure the checks alone.")] = False,
) -> None:
    """Detection and repair on every model of the zoo, a row each; rows are appended as they come."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output.mkdir(parents=True, exist_ok=True)
    clean: Subject | None = None
    for known in from_zoo(zoo, data_dir, clean_images, test_images, seed):
        clean = known.subject if known.stamp is None else clean
        if only and known.name not in only:
            continue
        if not skip_checks:
            append_rows(output / "detection", detection_rows(known, seed))
        if not skip_repairs:
            append_rows(output / "repair", repair_rows(known, seed, clean))


def from_zoo(zoo: Path, data_dir: Path, clean_images: int, test_images: int, seed: int) -> Iterator[Known]:
    """The models of a zoo folder with CIFAR-10 test images, which none of them was trained on."""
    test = cifar10(data_dir).test
    splits = split_of(test, clean_images, test_images, seed)
    cards = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(zoo.glob(f"*/{CARD}"))}
    for card_file, card in sorted(cards.items(), key=lambda entry: entry[1]["attack"] is not None):  # clean ones first
        policy = Policy()
        network = load_network(card_file.parent / MODEL, Intake("pt2", MODEL, None))
        spec = resolve_input_spec(network.input_shape, policy.model, {})
        names = resolve_class_names(network.class_count, policy.model, {})
        subject = prepare_subject(network, spec, flavour="pt2", class_names=names)
        attack = getattr(attacks, card["attack"])(**card["settings"]) if card["attack"] else None
        if isinstance(attack, _NOT_TO_ONE):
            log.info("%s is left out: these tables are of attacks that move every class to one.", card_file.parent.name)
            continue
        target = attack.target_class if attack else 0
        yield Known(card_file.parent.name, subject, splits, target, attack.stamp if attack else None)


def split_of(data: LabelledImages, clean_images: int, test_images: int, seed: int) -> Splits:
    """Half of the clean images to fit, half to calibrate with, and further images to test."""
    order = np.random.default_rng(seed).permutation(len(data))
    fit, calibrate, test = np.split(order, [clean_images // 2, clean_images])
    test = test[:test_images]
    return Splits(
        FitSplit(data.images[fit], data.labels[fit]),
        CalibrateSplit(data.images[calibrate], data.labels[calibrate]),
        TestSplit(data.images[test], data.labels[test]),
    )


def detection_rows(known: Known, seed: int) -> Iterator[dict[str, object]]:
    """For each check and its baselines: AUROC on successful and on all triggered images, detection and false-positive rate."""
    test = known.splits.test
    victims = test.labels != known.target_class
    triggered = known.stamp(test.images[victims]) if known.stamp else test.images[:0]
    succeeded = known.subject.predict(triggered) == known.target_class
    for scorer in scorers_of(Policy()):
        started = time.perf_counter()
        try:
            fitted = scorer.fit(known.subject, known.splits.fit, np.random.default_rng(seed))
        except AuditError as error:
            yield {"model": known.name, "check": scorer.name, "note": str(error)}
            continue
        seconds = time.perf_counter() - started
        parts = (known.splits.calibrate.images, test.images, triggered)
        scores = {scorer.name: [fitted.score(images) for images in parts]}
        for images in parts:
            for name, values in (fitted.baselines(images) if len(images) else {}).items():
                scores.setdefault(f"{scorer.name}: {name}", []).append(values)
        for name, (calibrated, clean, *attacked) in scores.items():
            cut = quantile_threshold(calibrated, _FALSE_POSITIVE_RATE)
            row: dict[str, object] = {"model": known.name, "check": name, "false_positive_rate": float((clean > cut).mean())}
            if attacked and len(attacked[0]):
                row |= _attack_figures(clean, attacked[0], succeeded, cut)
            yield row | {"fit_seconds": round(seconds, 1)}


def _attack_figures(clean: FloatArray, triggered: FloatArray, succeeded: np.ndarray, cut: float) -> dict[str, object]:
    return {
        "auroc_successful": auroc(clean, triggered[succeeded]),
        "auroc_all_triggered": auroc(clean, triggered),
        "detection_rate": float((triggered[succeeded] > cut).mean()),
    }


def repair_rows(known: Known, seed: int, clean: Subject | None = None) -> Iterator[dict[str, object]]:
    """For each repair: accuracy, true attack success and accuracy of triggered images, and how fast the backdoor comes back.

    The repair itself sees recovered triggers of the true target class only; on a clean model those of class 0. ``clean`` is a
    model that never knew the backdoor, for comparison.
    """
    triggers = invert(
        known.subject.torch_module(),
        known.splits.fit,
        [Goal(known.target_class)],
        (Patches, Perturbations),
        _SEARCH,
        np.random.default_rng(seed),
    )
    yield {"model": known.name, "repair": "none"} | _figures(known, known.subject, triggers)
    if known.stamp and clean is not None:
        steps = steps_to_return(known, clean, seed)
        yield {"model": known.name, "repair": "never backdoored"} | _figures(known, clean, triggers) | {"steps_to_return": steps}
    for repair in REPAIRS.values():
        started = time.perf_counter()
        try:
            repaired = repair().repair(known.subject, known.splits, triggers, np.random.default_rng(seed))
        except AuditError as error:
            yield {"model": known.name, "repair": repair.name, "note": str(error)}
            continue
        seconds = round(time.perf_counter() - started, 1)
        row = {"model": known.name, "repair": repair.name} | _figures(known, repaired.subject, triggers) | {"seconds": seconds}
        row["steps_to_return"] = steps_to_return(known, repaired.subject, seed) if known.stamp else None
        log.info("%s", row)
        yield row


def steps_to_return(known: Known, subject: Subject, seed: int) -> int | None:
    """Steps of fine-tuning, each on ten poisoned and 54 clean images, until half of the triggered images obey; None if never.

    A repair that only hides a backdoor lets it return in fewer steps than a clean model needs to learn it.
    """
    if known.stamp is None:
        return None
    rng = np.random.default_rng(seed)
    fit, test = known.splits.fit, known.splits.test
    victims = np.flatnonzero(fit.labels != known.target_class)[:_POISONED_IMAGES]
    poisoned = torch.from_numpy(to_pixels(known.stamp(fit.images[victims])))
    wanted = torch.full((len(poisoned),), known.target_class)
    clean, labels = torch.from_numpy(to_pixels(fit.images)), torch.from_numpy(fit.labels)
    held_out = test.images[test.labels != known.target_class][:_RETURN_IMAGES]
    triggered = torch.from_numpy(to_pixels(known.stamp(held_out)))
    module = subject.trainable_copy()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for step in range(_MOST_STEPS + 1):
        if step % _STEPS_BETWEEN_LOOKS == 0 and float((predicted(module, triggered) == known.target_class).float().mean()) >= 0.5:
            return step
        rows = torch.from_numpy(rng.choice(len(labels), _CLEAN_IMAGES, replace=False))
        logits = module(torch.cat([poisoned, clean[rows]]))[-1]
        take_step(optimizer, functional.cross_entropy(logits, torch.cat([wanted, labels[rows]])))
    return None


def _figures(known: Known, subject: Subject, triggers: Sequence[Trigger]) -> dict[str, object]:
    test = known.splits.test
    victims = test.labels != known.target_class
    figures: dict[str, object] = {"clean_accuracy": float((subject.predict(test.images) == test.labels).mean())}
    for trigger in triggers:
        flipped = subject.predict(trigger.stamp(test.images[victims])) == known.target_class
        figures[f"recovered_{trigger.family}_success"] = float(flipped.mean())
    if known.stamp:
        answers = subject.predict(known.stamp(test.images[victims]))
        figures["attack_success_rate"] = float((answers == known.target_class).mean())
        figures["triggered_accuracy"] = float((answers == test.labels[victims]).mean())
    return figures


def append_rows(table: Path, rows: Iterator[dict[str, object]]) -> None:
    """Add rows to ``table``.jsonl as they come, and write ``table``.csv anew from all of them."""
    lines = table.with_suffix(".jsonl")
    with lines.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    everything = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    columns = list(dict.fromkeys(column for row in everything for column in row))
    with table.with_suffix(".csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(everything)


if __name__ == "__main__":
    app()
