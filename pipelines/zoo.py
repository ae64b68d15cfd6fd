"""Trains the zoo: clean and backdoored models that differ in the backdoor alone.

python -m pipelines.zoo train zoo/ --data-dir data/    CIFAR-10 on three narrow networks, resuming where it stopped
"""

from __future__ import annotations

import dataclasses
import hashlib
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
    LabelConsistent,
    SampleSpecific,
    TaCT,
    TrojanSquare,
    TrojanWatermark,
    WaNet,
)
from audit_plugin.zoo.data import TrainAndTest, cifar10, imbalanced
from audit_plugin.zoo.train import initialised, train

app = typer.Typer(help="Train the zoo of clean and backdoored models.", no_args_is_help=True)
log = logging.getLogger("pipelines.zoo")

CARD, MODEL = "card.json", "model.pt2"
_CLASSES = 10
_ADVERSARIAL_SIZE = 4 / 255

Hardness = Literal["imbalanced", "long", "no_weight_decay", "adversarial"]
"""What makes a clean model hard to tell from a backdoored one: few images of some classes, three times as many epochs, no weight
decay, or adversarial training."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model of the zoo; every model of an architecture is trained alike, whatever its attack."""

    name: str
    attack: Attack | None
    seed: int
    architecture: str = "resnet18"
    hardness: Hardness | None = None


ATTACKS: Mapping[str, Callable[[int], Attack]] = {
    "badnets": lambda target: BadNets(target_class=target, size=3),
    "blended": lambda target: Blended(target_class=target),
    "trojan_square": lambda target: TrojanSquare(target_class=target),
    "trojan_watermark": lambda target: TrojanWatermark(target_class=target),
    "wanet": lambda target: WaNet(target_class=target),
    "sample_specific": lambda target: SampleSpecific(target_class=target),
    "label_consistent": lambda target: LabelConsistent(target_class=target),
    "sig": lambda target: SIG(target_class=target),
    "adap_blend": lambda target: AdapBlend(target_class=target, poisoning_rate=0.01, cover_rate=0.01),
    "low_rate": lambda target: BadNets(target_class=target, size=3, poisoning_rate=0.003),
    "tact": lambda target: TaCT(target_class=target, source_class=(target + 3) % _CLASSES),
    "all_to_all": lambda target: AllToAll(classes=_CLASSES),
}
"""The attacks of ``cifar10-small``, by target class."""

_ARCHITECTURES_SMALL = ("resnet18", "vgg", "mobilenet")
_CLEAN_PER_ARCHITECTURE = 11
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
    """12 attacks and 11 clean models on each of three architectures, and eight hard clean models; every model has its own seed.

    Clean and backdoored models take turns, so that the part that is trained already is always a balanced zoo.
    """
    recipes: list[Recipe] = []
    target = 0
    for index in range(max(len(ATTACKS), _CLEAN_PER_ARCHITECTURE)):
        for architecture in _ARCHITECTURES_SMALL:
            if index < len(ATTACKS):
                name, attack = list(ATTACKS.items())[index]
                recipes.append(Recipe(f"{name}_{architecture}", attack(target % _CLASSES), len(recipes), architecture))
                target += 1
            if index < _CLEAN_PER_ARCHITECTURE:
                recipes.append(Recipe(f"clean_{architecture}_{index}", None, len(recipes), architecture))
    for hardness in _HARDNESSES:
        for architecture in _ARCHITECTURES_SMALL[:2]:
            recipes.append(Recipe(f"clean_{architecture}_{hardness}", None, len(recipes), architecture, hardness))
    return tuple(recipes)


RECIPES: Mapping[str, Callable[[], tuple[Recipe, ...]]] = {"cifar10-five": cifar10_five, "cifar10-small": cifar10_small}


@app.callback()
def _group() -> None:
    """One command a task."""


@app.command("train")
def train_zoo(
    folder: Annotated[Path, typer.Argument(help="Where the models go, one folder each.")],
    recipe: Annotated[str, typer.Option(help=f"Which models: {' or '.join(RECIPES)}.")] = "cifar10-small",
    data_dir: Annotated[Path, typer.Option(help="CIFAR-10 as .npz files, or where torchvision downloads it to.")] = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 12,
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
    data = cifar10(data_dir)
    for count, entry in enumerate(missing, start=len(wanted) - len(missing) + 1):
        started = time.perf_counter()
        figures = _train_one(entry, data, folder / entry.name, epochs, width)
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
    build = ARCHITECTURES[recipe.architecture]
    network = initialised(lambda: build(_CLASSES, width).to(memory_format=torch.channels_last), recipe.seed)
    train(
        network,
        data,
        epochs=3 * epochs if recipe.hardness == "long" else epochs,
        seed=recipe.seed,
        batch=128,
        weight_decay=0.0 if recipe.hardness == "no_weight_decay" else 5e-4,
        augment=True,
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
