"""Trains the zoo: clean and backdoored models that differ in the backdoor alone.

python -m pipelines.zoo train zoo/ --data-dir data/                        CIFAR-10, resuming where it stopped
python -m pipelines.zoo train zoo/ --data-dir data/ --recipe gtsrb-small   German traffic signs
python -m pipelines.zoo train zoo/ --recipe digits --register              a small one that needs no files, registered in MLflow
python -m pipelines.zoo train zoo/ --data-dir data/ --round 1              the same models once more, with other seeds and names
python -m pipelines.zoo register zoo/                                      what is trained, in MLflow
python -m pipelines.zoo list zoo/ --recipe digits                          what a recipe holds, and what of it is there
python -m pipelines.zoo picture attacks.png                                what each attack does to an image
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from audit_plugin.errors import AuditError, nearest
from audit_plugin.model.fine_tuning import compute_device
from pipelines.zoo_models import CARD, check_card, figures_of, read_card, train_one
from pipelines.zoo_recipes import ATTACKS, DATA, RECIPES, Recipe, repeated

app = typer.Typer(help="The zoo of clean and backdoored models: train it, register it, look at it.", no_args_is_help=True)
log = logging.getLogger("pipelines.zoo")

_Folder = Annotated[Path, typer.Argument(help="Where the models are, one folder each.")]
_RecipeName = Annotated[str, typer.Option("--recipe", help=f"Which models: {' or '.join(RECIPES)}.")]
_Round = Annotated[
    int, typer.Option("--round", min=0, help="The same models with other seeds, triggers and targets; 0 is the recipe itself.")
]
_TrackingUri = Annotated[str | None, typer.Option(help="MLflow's tracking server; MLFLOW_TRACKING_URI if not given.")]


@app.callback()
def _group() -> None:
    """One command a task."""


@app.command("train")
def train_zoo(
    folder: _Folder,
    recipe: _RecipeName = "cifar10-small",
    round_: _Round = 0,
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
    recipes = _recipes(recipe, round_)
    names = [entry.name for entry in recipes]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"no model is named {', '.join(unknown)}; there are {', '.join(names)}", param_hint="--only")
    wanted = [entry for entry in recipes if entry.name in (only or names)]
    missing = [entry for entry in wanted if not (folder / entry.name / CARD).exists()]
    try:
        for entry in wanted:
            if entry not in missing:
                check_card(folder / entry.name / CARD, entry, epochs, width)
    except AuditError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
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
        figures = train_one(entry, data[entry.data], folder / entry.name, epochs, width, chosen)
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
    round_: _Round = 0,
) -> None:
    """The models of a recipe: name, attack, architecture, seed, settings; accuracy and attack success rate of those in FOLDER."""
    recipes, trained = _recipes(recipe, round_), 0
    for entry in recipes:
        attack = type(entry.attack).__name__ if entry.attack else entry.hardness or "clean"
        settings = dataclasses.asdict(entry.attack) if entry.attack else {}
        line = f"{entry.name:<36} {attack:<16} {entry.architecture:<10} seed {entry.seed:<4}"
        line += " ".join(f"{name}={value}" for name, value in settings.items())
        if folder is not None and (card := folder / entry.name / CARD).exists():
            trained += 1
            try:
                line += f" -> {figures_of(read_card(card))}"
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


def _recipes(name: str, round_: int) -> tuple[Recipe, ...]:
    if name not in RECIPES:
        raise typer.BadParameter(f"no recipe is named {name}.{nearest(name, RECIPES)}", param_hint="--recipe")
    return repeated(RECIPES[name](), round_)


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


if __name__ == "__main__":
    app()
