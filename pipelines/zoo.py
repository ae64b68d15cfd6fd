"""Trains the zoo: clean and backdoored models that differ in the backdoor alone.

python -m pipelines.zoo train zoo/ --data-dir data/                        CIFAR-10, resuming where it stopped
python -m pipelines.zoo train zoo/ --data-dir data/ --recipe gtsrb-small   German traffic signs
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer

from audit_plugin.errors import nearest
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import ImageArray, LabelArray, LabelledImages
from audit_plugin.zoo.architectures import ARCHITECTURES
from audit_plugin.zoo.attacks import (
    SIG,
    AdapBlend,
    AllToAll,
    Attack,
    BadNets,
    Blended,
    InputAware,
    LabelConsistent,
    SampleSpecific,
    TaCT,
    TrojanSquare,
    TrojanWatermark,
    WaNet,
)
from audit_plugin.zoo.data import TrainAndTest, cifar10, gtsrb, imbalanced
from audit_plugin.zoo.train import initialised, train

app = typer.Typer(help="Train the zoo of clean and backdoored models.", no_args_is_help=True)
log = logging.getLogger("pipelines.zoo")

CARD, MODEL = "card.json", "model.pt2"
_ADVERSARIAL_SIZE = 4 / 255

Hardness = Literal["imbalanced", "long", "no_weight_decay", "adversarial"]
"""What makes a clean model hard to tell from a backdoored one: few images of some classes, three times as many epochs, no weight
decay, or adversarial training."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """``passes`` over it take as many steps as one pass over CIFAR-10."""

    load: Callable[[Path], TrainAndTest]
    classes: int
    mirror: bool = True
    passes: int = 1


DATA: Mapping[str, DataSet] = {"cifar10": DataSet(cifar10, 10), "gtsrb": DataSet(gtsrb, 43, mirror=False, passes=2)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model of the zoo; all models of an architecture and data set are trained alike, whatever the attack."""

    name: str
    attack: Attack | None
    seed: int
    architecture: str = "resnet18"
    hardness: Hardness | None = None
    data: str = "cifar10"


ATTACKS: Mapping[str, Callable[[int, int], Attack]] = {
    "badnets": lambda target, classes: BadNets(target_class=target, size=3),
    "blended": lambda target, classes: Blended(target_class=target),
    "trojan_square": lambda target, classes: TrojanSquare(target_class=target),
    "trojan_watermark": lambda target, classes: TrojanWatermark(target_class=target),
    "wanet": lambda target, classes: WaNet(target_class=target),
    "sample_specific": lambda target, classes: SampleSpecific(target_class=target),
    "input_aware": lambda target, classes: InputAware(target_class=target),
    "label_consistent": lambda target, classes: LabelConsistent(target_class=target),
    "sig": lambda target, classes: SIG(target_class=target),
    "adap_blend": lambda target, classes: AdapBlend(target_class=target, poisoning_rate=0.01, cover_rate=0.01),
    "low_rate": lambda target, classes: BadNets(target_class=target, size=3, poisoning_rate=0.003),
    "tact": lambda target, classes: TaCT(target_class=target, source_class=(target + 3) % classes),
    "all_to_all": lambda target, classes: AllToAll(classes=classes),
}
"""The attacks of the small recipes, by target class and number of classes."""

_ARCHITECTURES_SMALL = ("resnet18", "vgg", "mobilenet")
_HARDNESSES: tuple[Hardness, ...] = ("imbalanced", "long", "no_weight_decay", "adversarial")


def cifar10_five() -> tuple[Recipe, ...]:
    """Two clean models and three attacks, for the tables of the methods."""
    return (
        Recipe("badnets", BadNets(target_class=1, size=3), 1),
        Recipe("blended", Blended(target_class=1), 2),
        Recipe("clean_a", None, 3),
        Recipe("wanet", WaNet(target_class=0), 4),
        Recipe("clean_b", None, 5),
    )


def cifar10_small() -> tuple[Recipe, ...]:
    """13 attacks on two of three architectures each, eight clean models of each architecture, and eight hard clean models."""
    hard = [
        Recipe(f"cifar10_clean_{architecture}_{hardness}", None, 100 + index, architecture, hardness)
        for index, (hardness, architecture) in enumerate(itertools.product(_HARDNESSES, _ARCHITECTURES_SMALL[:2]))
    ]
    return (*_small("cifar10", architectures_of_attack=2, clean_per_architecture=8, first_seed=0), *hard)


def gtsrb_small() -> tuple[Recipe, ...]:
    """13 attacks on one of three architectures each, and four clean models of each architecture, on 43 traffic signs."""
    return tuple(_small("gtsrb", architectures_of_attack=1, clean_per_architecture=4, first_seed=200))


def _small(data: str, *, architectures_of_attack: int, clean_per_architecture: int, first_seed: int) -> list[Recipe]:
    """Clean and backdoored models in turns, so that the part that is trained already is a balanced zoo; each has its own seed.

    Targets go round the classes by steps of seven, architectures from attack to attack.
    """
    classes, count = DATA[data].classes, len(_ARCHITECTURES_SMALL)
    backdoored = [
        (f"{data}_{name}_{architecture}", make, architecture)
        for index, (name, make) in enumerate(ATTACKS.items())
        for architecture in (_ARCHITECTURES_SMALL[(index + place) % count] for place in range(architectures_of_attack))
    ]
    clean = [
        (f"{data}_clean_{architecture}_{index}", architecture)
        for index in range(clean_per_architecture)
        for architecture in _ARCHITECTURES_SMALL
    ]
    recipes: list[Recipe] = []
    for place in range(max(len(backdoored), len(clean))):
        if place < len(backdoored):
            name, make, architecture = backdoored[place]
            attack = make(7 * place % classes, classes)
            recipes.append(Recipe(name, attack, first_seed + len(recipes), architecture, data=data))
        if place < len(clean):
            name, architecture = clean[place]
            recipes.append(Recipe(name, None, first_seed + len(recipes), architecture, data=data))
    return recipes


RECIPES: Mapping[str, Callable[[], tuple[Recipe, ...]]] = {
    "cifar10-five": cifar10_five,
    "cifar10-small": cifar10_small,
    "gtsrb-small": gtsrb_small,
}


@app.callback()
def _group() -> None:
    """One command a task."""


@app.command("train")
def train_zoo(
    folder: Annotated[Path, typer.Argument(help="Where the models go, one folder each.")],
    recipe: Annotated[str, typer.Option(help=f"Which models: {' or '.join(RECIPES)}.")] = "cifar10-small",
    data_dir: Annotated[Path, typer.Option(help="Images as .npz files, or where torchvision puts them.")] = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over CIFAR-10's training images; as many steps on other data.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="Channels of the network's first stage.")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="Train only the model of this name; may be repeated.")] = None,
) -> None:
    """Train every model that is not there yet; each is saved with a card: attack, seed, accuracy, attack success rate."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if recipe not in RECIPES:
        raise typer.BadParameter(f"no recipe is named {recipe}.{nearest(recipe, RECIPES)}", param_hint="--recipe")
    recipes = RECIPES[recipe]()
    names = [entry.name for entry in recipes]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"no model is named {', '.join(unknown)}; there are {', '.join(names)}", param_hint="--only")
    wanted = [entry for entry in recipes if entry.name in (only or names)]
    missing = [entry for entry in wanted if not (folder / entry.name / CARD).exists()]
    if not missing:
        log.info("Every model is there already.")
        return
    data = {name: DATA[name].load(data_dir) for name in {entry.data for entry in missing}}
    for count, entry in enumerate(missing, start=len(wanted) - len(missing) + 1):
        started = time.perf_counter()
        figures = _train_one(entry, data[entry.data], folder / entry.name, epochs, width)
        text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        log.info("%d of %d, %s: %s, %.0f s", count, len(wanted), entry.name, text, time.perf_counter() - started)


def _train_one(recipe: Recipe, data: TrainAndTest, folder: Path, epochs: int, width: int) -> dict[str, float]:
    network = _trained(recipe, data.train, epochs, width)
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(4, *to_pixels(data.test.images[:1]).shape[1:])
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)), folder / MODEL)
    figures = {"clean_accuracy": float((_predict(network, data.test.images) == data.test.labels).mean())}
    attack = recipe.attack
    if attack is not None:
        figures["attack_success_rate"] = attack.success_rate(lambda images: _predict(network, images), data.test)
    card = {
        "attack": type(attack).__name__ if attack else None,
        "settings": dataclasses.asdict(attack) if attack else {},
        "seed": recipe.seed,
        "data": recipe.data,
        "architecture": recipe.architecture,
        "hardness": recipe.hardness,
        "epochs": epochs,
        "width": width,
        "sha256": hashlib.sha256((folder / MODEL).read_bytes()).hexdigest(),
        **figures,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")  # last: a folder without one is trained anew
    return figures


def _trained(recipe: Recipe, clean: LabelledImages, epochs: int, width: int) -> torch.nn.Module:
    """A network in evaluation mode; beside the seed, all that differs between models is the attack, or a clean one's hardness."""
    data = recipe.attack.poison(clean, np.random.default_rng(recipe.seed)) if recipe.attack else clean
    if recipe.hardness == "imbalanced":
        data = imbalanced(data, seed=recipe.seed)
    build, source = ARCHITECTURES[recipe.architecture], DATA[recipe.data]
    network = initialised(lambda: build(source.classes, width).to(memory_format=torch.channels_last), recipe.seed)
    train(
        network,
        data,
        epochs=epochs * source.passes * (3 if recipe.hardness == "long" else 1),
        seed=recipe.seed,
        batch=128,
        weight_decay=0.0 if recipe.hardness == "no_weight_decay" else 5e-4,
        augment=True,
        mirror=source.mirror,
        adversarial=_ADVERSARIAL_SIZE if recipe.hardness == "adversarial" else 0.0,
    )
    return network.to(memory_format=torch.contiguous_format)


def _predict(network: torch.nn.Module, images: ImageArray) -> LabelArray:
    with torch.no_grad():
        parts = [network(torch.from_numpy(to_pixels(images[start : start + 500]))) for start in range(0, len(images), 500)]
    predicted: LabelArray = torch.cat(parts).argmax(dim=1).numpy()
    return predicted


if __name__ == "__main__":
    app()
