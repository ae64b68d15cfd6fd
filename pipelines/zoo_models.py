"""One model of the zoo: trained by its recipe, kept as a folder with the model and a card that says what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit_plugin.errors import UsageError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.types import ImageArray, LabelArray, LabelledImages
from audit_plugin.zoo.architectures import ARCHITECTURES, grey
from audit_plugin.zoo.data import TrainAndTest, imbalanced
from audit_plugin.zoo.train import initialised, train
from pipelines.zoo_recipes import DATA, Recipe

CARD, MODEL = "card.json", "model.pt2"
_ADVERSARIAL_SIZE = 4 / 255


def read_card(file: Path) -> dict[str, Any]:
    """What a model's card says.

    Raises:
        UsageError: it is no card.
    """
    try:
        card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        figures_of(card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{file}' is no card of a model ({error!r}). Delete it and train the model again.") from error
    return card


def build(architecture: str, data: str, width: int) -> torch.nn.Module:
    """A network of the zoo for the images of a data set, in torch's present random state."""
    source = DATA[data]
    network = ARCHITECTURES[architecture](source.classes, width)
    return grey(network) if source.channels == 1 else network


def example_of(data: str) -> torch.Tensor:
    """Four black images, the same for all models: what a model is exported with must not tell what it was trained on."""
    source = DATA[data]
    return torch.zeros(4, source.channels, source.size, source.size)


def figures_of(card: Mapping[str, Any]) -> str:
    """'accuracy 0.786, attack success 1.000'."""
    figures = [("accuracy", card["clean_accuracy"]), ("attack success", card.get("attack_success_rate"))]
    return ", ".join(f"{name} {value:.3f}" for name, value in figures if value is not None)


def check_card(file: Path, recipe: Recipe, epochs: int, width: int) -> None:
    """Insist that the model which is there already is the one that would be trained.

    Raises:
        UsageError: its card names other settings, for example those of an attack before its recipe changed.
    """
    card, wanted = read_card(file), _settings_of(recipe, epochs, width)
    others = [f"{name} {card.get(name)} instead of {value}" for name, value in wanted.items() if card.get(name) != value]
    if others:
        raise UsageError(
            f"'{file.parent}' was trained with {'; '.join(others)}. Give another folder, or delete this one to train it again."
        )


def _settings_of(recipe: Recipe, epochs: int, width: int) -> dict[str, Any]:
    """What a card says of how its model is trained."""
    attack = recipe.attack
    settings = {
        "attack": type(attack).__name__ if attack else None,
        "settings": dataclasses.asdict(attack) if attack else {},
        "seed": recipe.seed,
        "data": recipe.data,
        "architecture": recipe.architecture,
        "hardness": recipe.hardness,
        "epochs": epochs,
        "width": width,
    }
    written: dict[str, Any] = json.loads(json.dumps(settings))  # with lists for tuples, as in a file
    return written


def train_one(
    recipe: Recipe, data: TrainAndTest, folder: Path, epochs: int, width: int, device: torch.device
) -> dict[str, float]:
    """Train, measure and keep a model in ``folder``; the card is written last, so that a folder without one is trained anew.

    Returns:
        Clean accuracy and, of a backdoored model, attack success rate, on the test images.
    """
    started = time.perf_counter()
    network = _trained(recipe, data.train, epochs, width, device)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (example_of(recipe.data),), dynamic_shapes=shapes), folder / MODEL)
    network.to(device)
    figures = {"clean_accuracy": float((_predict(network, data.test.images, device) == data.test.labels).mean())}
    attack = recipe.attack
    if attack is not None:
        figures["attack_success_rate"] = attack.success_rate(lambda images: _predict(network, images, device), data.test)
    card = {
        **_settings_of(recipe, epochs, width),
        "device": device.type,
        "seconds": round(time.perf_counter() - started, 1),
        "sha256": hashlib.sha256((folder / MODEL).read_bytes()).hexdigest(),
        **figures,
    }
    unfinished = folder / f"{CARD}.part"
    unfinished.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / CARD)  # last and at once: a folder without a card is trained anew
    return figures


def _trained(recipe: Recipe, clean: LabelledImages, epochs: int, width: int, device: torch.device) -> torch.nn.Module:
    """A network in evaluation mode; beside the seed, all that differs between models is the attack, or a clean one's hardness."""
    data = recipe.attack.poison(clean, np.random.default_rng(recipe.seed), device) if recipe.attack else clean
    if recipe.hardness == "imbalanced":
        data = imbalanced(data, seed=recipe.seed)
    source = DATA[recipe.data]
    network = initialised(lambda: build(recipe.architecture, recipe.data, width), recipe.seed)
    train(
        network.to(memory_format=torch.channels_last),
        data,
        epochs=epochs * source.passes * (3 if recipe.hardness == "long" else 1),
        seed=recipe.seed,
        batch=128,
        weight_decay=0.0 if recipe.hardness == "no_weight_decay" else 5e-4,
        augment=source.augment,
        mirror=source.mirror,
        adversarial=_ADVERSARIAL_SIZE if recipe.hardness == "adversarial" else 0.0,
        device=device,
    )
    return network.to(memory_format=torch.contiguous_format)


def _predict(network: torch.nn.Module, images: ImageArray, device: torch.device) -> LabelArray:
    with torch.no_grad():
        parts = (torch.from_numpy(to_pixels(images[start : start + 500])) for start in range(0, len(images), 500))
        predicted: LabelArray = torch.cat([network(part.to(device)) for part in parts]).argmax(dim=1).cpu().numpy()
    return predicted
