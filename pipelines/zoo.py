"""Trains the zoo: clean and backdoored models that differ in the backdoor alone.

python -m pipelines.zoo train zoo/ --data-dir data/                        CIFAR-10, resuming where it stopped
python -m pipelines.zoo train zoo/ --data-dir data/ --recipe gtsrb-small   German traffic signs
python -m pipelines.zoo train zoo/ --recipe digits --register              a small one that needs no files, registered in MLflow
python -m pipelines.zoo register zoo/                                      what is trained, in MLflow
python -m pipelines.zoo list zoo/ --recipe digits                          what a recipe holds, and what of it is there
python -m pipelines.zoo picture attacks.png                                what each attack does to an image
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from audit_plugin.errors import AuditError, UsageError, nearest
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.model.fine_tuning import compute_device
from audit_plugin.types import ImageArray, LabelArray, LabelledImages
from audit_plugin.zoo.architectures import ARCHITECTURES, grey
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
from audit_plugin.zoo.data import TrainAndTest, cifar10, digits, gtsrb, imbalanced
from audit_plugin.zoo.train import initialised, train

app = typer.Typer(help="The zoo of clean and backdoored models: train it, register it, look at it.", no_args_is_help=True)
log = logging.getLogger("pipelines.zoo")

CARD, MODEL = "card.json", "model.pt2"
_ADVERSARIAL_SIZE = 4 / 255

Hardness = Literal["imbalanced", "long", "no_weight_decay", "adversarial"]
"""What makes a clean model hard to tell from a backdoored one: few images of some classes, three times as many epochs, no weight
decay, or adversarial training."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Images of ``size`` x ``size`` pixels and how to train on them.

    ``passes`` over them count as one epoch, about as many steps as one pass over CIFAR-10 where they are not far smaller.
    ``settings`` are those of attacks, by name, that these images need otherwise than others do.
    """

    load: Callable[[Path], TrainAndTest]
    classes: int
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    channels: int = 3
    size: int = 32
    augment: bool = True
    mirror: bool = True
    passes: int = 1


DATA: Mapping[str, DataSet] = {
    "cifar10": DataSet(cifar10, 10),
    "gtsrb": DataSet(
        gtsrb,
        43,
        mirror=False,
        passes=2,
        settings={  # class 2 is one of the few with images enough to poison half of it
            "sig": {"target_class": 2, "poisoning_rate": 0.03},
            "label_consistent": {"target_class": 2, "poisoning_rate": 0.03, "size": 7},
        },
    ),
    "digits": DataSet(lambda folder: digits(seed=0), 10, channels=1, size=16, augment=False, mirror=False, passes=2),
}


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
    "wanet": lambda target, classes: WaNet(target_class=target, strength=2.0, grid=8, noise_rate=0.1),
    "sample_specific": lambda target, classes: SampleSpecific(target_class=target),
    "input_aware": lambda target, classes: InputAware(target_class=target),
    "label_consistent": lambda target, classes: LabelConsistent(target_class=target),
    "sig": lambda target, classes: SIG(target_class=target),
    "adap_blend": lambda target, classes: AdapBlend(target_class=target, poisoning_rate=0.02, cover_rate=0.01),
    "low_rate": lambda target, classes: BadNets(target_class=target, size=5, margin=4, poisoning_rate=0.003),
    "tact": lambda target, classes: TaCT(target_class=target, source_class=(target + 3) % classes),
    "all_to_all": lambda target, classes: AllToAll(classes=classes),
}
"""The attacks of the small recipes, by target class and number of classes: docs/decisions/zoo-attack-settings.md says why so."""

_ARCHITECTURES_SMALL = ("resnet18", "vgg", "cnn")
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
    return (*_in_turns("cifar10", architectures_of_attack=2, clean_per_architecture=8, first_seed=0), *hard)


def gtsrb_small() -> tuple[Recipe, ...]:
    """13 attacks on one of three architectures each, and four clean models of each architecture, on 43 traffic signs."""
    return tuple(_in_turns("gtsrb", architectures_of_attack=1, clean_per_architecture=4, first_seed=200))


def small_digits() -> tuple[Recipe, ...]:
    """Six attacks on one of two architectures each, and three clean models of each architecture, on handwritten digits."""
    return tuple(
        _in_turns(
            "digits",
            attacks=("badnets", "blended", "trojan_square", "trojan_watermark", "tact", "all_to_all"),
            architectures=("cnn", "vgg"),
            architectures_of_attack=1,
            clean_per_architecture=3,
            first_seed=300,
        )
    )


def digits_references() -> tuple[Recipe, ...]:
    """Twelve more clean models of each architecture of :func:`small_digits`: what those may be compared with."""
    return tuple(
        Recipe(f"digits_reference_{architecture}_{index}", None, 400 + 2 * index + place, architecture, data="digits")
        for index in range(12)
        for place, architecture in enumerate(("cnn", "vgg"))
    )


def _in_turns(
    data: str,
    *,
    attacks: Sequence[str] = tuple(ATTACKS),
    architectures: Sequence[str] = _ARCHITECTURES_SMALL,
    architectures_of_attack: int,
    clean_per_architecture: int,
    first_seed: int,
) -> list[Recipe]:
    """Clean and backdoored models in turns, so that the part that is trained already is a balanced zoo; each has its own seed.

    Targets go round the classes by steps of seven, architectures from attack to attack.
    """
    source, count = DATA[data], len(architectures)
    backdoored = [
        (name, architecture)
        for index, name in enumerate(attacks)
        for architecture in (architectures[(index + place) % count] for place in range(architectures_of_attack))
    ]
    clean = [
        (f"{data}_clean_{architecture}_{index}", architecture)
        for index in range(clean_per_architecture)
        for architecture in architectures
    ]
    recipes: list[Recipe] = []
    for place in range(max(len(backdoored), len(clean))):
        if place < len(backdoored):
            name, architecture = backdoored[place]
            attack = ATTACKS[name](7 * place % source.classes, source.classes)
            attack = dataclasses.replace(attack, **source.settings.get(name, {}))
            recipes.append(Recipe(f"{data}_{name}_{architecture}", attack, first_seed + len(recipes), architecture, data=data))
        if place < len(clean):
            name, architecture = clean[place]
            recipes.append(Recipe(name, None, first_seed + len(recipes), architecture, data=data))
    return recipes


RECIPES: Mapping[str, Callable[[], tuple[Recipe, ...]]] = {
    "cifar10-five": cifar10_five,
    "cifar10-small": cifar10_small,
    "gtsrb-small": gtsrb_small,
    "digits": small_digits,
    "digits-references": digits_references,
}

_Folder = Annotated[Path, typer.Argument(help="Where the models are, one folder each.")]
_RecipeName = Annotated[str, typer.Option("--recipe", help=f"Which models: {' or '.join(RECIPES)}.")]
_TrackingUri = Annotated[str | None, typer.Option(help="MLflow's tracking server; MLFLOW_TRACKING_URI if not given.")]


@app.callback()
def _group() -> None:
    """One command a task."""


@app.command("train")
def train_zoo(
    folder: _Folder,
    recipe: _RecipeName = "cifar10-small",
    data_dir: Annotated[Path, typer.Option(help="Images as .npz files, or where torchvision puts them.")] = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over CIFAR-10's training images; as many steps on other data.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="Channels of the network's first stage.")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="Train only the model of this name; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if not given and torch has one.")] = None,
    register: Annotated[bool, typer.Option("--register", help="Register each model in MLflow too.")] = False,
    tracking_uri: _TrackingUri = None,
) -> None:
    """Train every model that is not there yet; each is saved with a card: attack, seed, accuracy, attack success rate."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipes = _recipes(recipe)
    names = [entry.name for entry in recipes]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"no model is named {', '.join(unknown)}; there are {', '.join(names)}", param_hint="--only")
    wanted = [entry for entry in recipes if entry.name in (only or names)]
    missing = [entry for entry in wanted if not (folder / entry.name / CARD).exists()]
    chosen = _device(device)
    try:
        data = {name: DATA[name].load(data_dir) for name in {entry.data for entry in missing}}
    except AuditError as error:
        raise typer.BadParameter(str(error), param_hint="--data-dir") from error
    if register:
        _register([], tracking_uri)  # a server that does not answer is known before the training
    if not missing:
        log.info("Every model is there already.")
    elif len(missing) < len(wanted):
        log.info("%d of %d models are there already.", len(wanted) - len(missing), len(wanted))
    started = time.perf_counter()
    for count, entry in enumerate(missing, start=1):
        place = len(wanted) - len(missing) + count
        log.info("%d of %d, %s: training on %s", place, len(wanted), entry.name, chosen.type)
        figures = _train_one(entry, data[entry.data], folder / entry.name, epochs, width, chosen)
        text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        spent = time.perf_counter() - started
        rest = f"; about {spent / count * (len(missing) - count) / 60:.1f} min to go" if count < len(missing) else ""
        log.info("%d of %d, %s: %s; %.0f s in all%s", place, len(wanted), entry.name, text, spent, rest)
    if register:
        _register([folder / entry.name for entry in wanted], tracking_uri)


@app.command("register")
def register_zoo(folder: _Folder, tracking_uri: _TrackingUri = None) -> None:
    """Register every trained model in MLflow under its name, with its card as tags and as an artifact of the run.

    What is registered already, by the digest of its file, is left alone.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trained = sorted(card.parent for card in folder.glob(f"*/{CARD}"))
    if not trained:
        hint = f"python -m pipelines.zoo train {folder} --recipe digits"
        raise typer.BadParameter(f"no model with a {CARD} is in '{folder}'. Train some first: {hint}", param_hint="FOLDER")
    _register(trained, tracking_uri)


@app.command("list")
def list_zoo(
    folder: Annotated[Path | None, typer.Argument(help="Where models are trained; shows which are there.")] = None,
    recipe: _RecipeName = "cifar10-small",
) -> None:
    """The models of a recipe: name, attack, architecture, seed, settings; accuracy and attack success rate of those in FOLDER."""
    recipes, trained = _recipes(recipe), 0
    for entry in recipes:
        attack = type(entry.attack).__name__ if entry.attack else entry.hardness or "clean"
        settings = dataclasses.asdict(entry.attack) if entry.attack else {}
        line = f"{entry.name:<36} {attack:<16} {entry.architecture:<10} seed {entry.seed:<4}"
        line += " ".join(f"{name}={value}" for name, value in settings.items())
        if folder is not None and (card := folder / entry.name / CARD).exists():
            trained += 1
            try:
                line += f" -> {_figures_of(read_card(card))}"
            except AuditError as error:
                raise typer.BadParameter(str(error), param_hint="FOLDER") from error
        typer.echo(line.rstrip())
    there = "" if folder is None else f", {trained} trained in {folder}"
    typer.echo(f"{len(recipes)} models{there}")


@app.command("picture")
def draw_attacks(file: Annotated[Path, typer.Argument(help="A .png file, made anew.")]) -> None:
    """Draw what each attack does to an image: the image, the image with the trigger, five times their difference."""
    from pipelines.zoo_picture import attacks_picture

    picture = attacks_picture({name: make(0, 10) for name, make in ATTACKS.items()})
    try:
        picture.save(file, "png", optimize=True)
    except OSError as error:
        raise typer.BadParameter(f"'{file}' cannot be written ({error.strerror}).", param_hint="FILE") from error


def read_card(file: Path) -> dict[str, Any]:
    """What a model's card says.

    Raises:
        UsageError: it is no card.
    """
    try:
        card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _figures_of(card)
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


def _recipes(name: str) -> tuple[Recipe, ...]:
    if name not in RECIPES:
        raise typer.BadParameter(f"no recipe is named {name}.{nearest(name, RECIPES)}", param_hint="--recipe")
    return RECIPES[name]()


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"expected cuda or cpu, got {name}", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch has no working GPU here. Use --device cpu.", param_hint="--device")
    return torch.device(name) if name else compute_device()


def _register(folders: Sequence[Path], tracking_uri: str | None) -> None:
    from pipelines.zoo_registry import connect, register_model  # MLflow, which a machine that trains may lack

    try:
        connect(tracking_uri)
        for count, folder in enumerate(folders, start=1):
            uri = register_model(folder)
            log.info("%d of %d, %s: %s", count, len(folders), folder.name, uri or "registered already")
    except AuditError as error:
        log.error("%s", error)  # one line, no traceback
        raise typer.Exit(2) from error


def _figures_of(card: Mapping[str, Any]) -> str:
    figures = [("accuracy", card["clean_accuracy"]), ("attack success", card.get("attack_success_rate"))]
    return ", ".join(f"{name} {value:.3f}" for name, value in figures if value is not None)


def _train_one(
    recipe: Recipe, data: TrainAndTest, folder: Path, epochs: int, width: int, device: torch.device
) -> dict[str, float]:
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
        "attack": type(attack).__name__ if attack else None,
        "settings": dataclasses.asdict(attack) if attack else {},
        "seed": recipe.seed,
        "data": recipe.data,
        "architecture": recipe.architecture,
        "hardness": recipe.hardness,
        "epochs": epochs,
        "width": width,
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


if __name__ == "__main__":
    app()
