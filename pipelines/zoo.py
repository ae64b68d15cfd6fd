"""Trains the zoo: clean and backdoored models that differ in the backdoor alone.

python -m pipelines.zoo train zoo/ --data-dir data/    CIFAR-10 on a narrow ResNet-18, resuming where it stopped
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import ImageArray, LabelArray
from audit_plugin.zoo.architectures import CifarResNet18
from audit_plugin.zoo.attacks import Attack, BadNets, Blended, WaNet
from audit_plugin.zoo.data import TrainAndTest, cifar10
from audit_plugin.zoo.train import initialised, train

app = typer.Typer(help="Train the zoo of clean and backdoored models.", no_args_is_help=True)
log = logging.getLogger("pipelines.zoo")

CARD, MODEL = "card.json", "model.pt2"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model of the zoo; every model is trained alike, whatever its attack."""

    name: str
    attack: Attack | None
    seed: int


def cifar10_small() -> tuple[Recipe, ...]:
    """The recipe ``cifar10-small``: two clean models and one for each attack."""
    return (
        Recipe("badnets", BadNets(target_class=1, poisoning_rate=0.05, size=3), 1),
        Recipe("blended", Blended(target_class=1, poisoning_rate=0.05), 2),
        Recipe("clean_a", None, 3),
        Recipe("wanet", WaNet(target_class=0, poisoning_rate=0.1), 4),
        Recipe("clean_b", None, 5),
    )


@app.callback()
def _group() -> None:
    """One command a task."""


@app.command("train")
def train_zoo(
    folder: Annotated[Path, typer.Argument(help="Where the models go, one folder each.")],
    data_dir: Annotated[Path, typer.Option(help="CIFAR-10 as .npz files, or where torchvision downloads it to.")] = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="Channels of the network's first stage.")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="Train only the model of this name; may be repeated.")] = None,
) -> None:
    """Train every model that is not there yet; each is saved with a card: attack, seed, accuracy, attack success rate."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipes = cifar10_small()
    names = [recipe.name for recipe in recipes]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"no model is named {', '.join(unknown)}; there are {', '.join(names)}", param_hint="--only")
    missing = [recipe for recipe in recipes if recipe.name in (only or names) and not (folder / recipe.name / CARD).exists()]
    if not missing:
        log.info("Every model is there already.")
        return
    data = cifar10(data_dir)
    for recipe in missing:
        started = time.perf_counter()
        card = _train_one(recipe, data, folder / recipe.name, epochs, width)
        log.info("%s: %s, %.0f s", recipe.name, card, time.perf_counter() - started)


def _train_one(recipe: Recipe, data: TrainAndTest, folder: Path, epochs: int, width: int) -> dict[str, float]:
    poisoned = recipe.attack.poison(data.train, np.random.default_rng(recipe.seed)) if recipe.attack else data.train
    network = initialised(lambda: CifarResNet18(width=width).to(memory_format=torch.channels_last), recipe.seed)
    train(network, poisoned, epochs=epochs, seed=recipe.seed, batch=128, augment=True)
    network = network.to(memory_format=torch.contiguous_format)
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
        "epochs": epochs,
        "width": width,
        **figures,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")  # last: a folder without one is trained anew
    return figures


def _predict(network: torch.nn.Module, images: ImageArray) -> LabelArray:
    with torch.no_grad():
        parts = [network(torch.from_numpy(to_pixels(images[start : start + 500]))) for start in range(0, len(images), 500)]
    predicted: LabelArray = torch.cat(parts).argmax(dim=1).numpy()
    return predicted


if __name__ == "__main__":
    app()
