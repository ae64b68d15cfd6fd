"""What the zoo holds: data sets, attacks with their settings, and recipes: lists of models that differ in the backdoor alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
from audit_plugin.zoo.data import TrainAndTest, cifar10, digits, gtsrb

Hardness = Literal["imbalanced", "long", "no_weight_decay", "adversarial"]
"""What makes a clean model hard to tell from a backdoored one: few images of some classes, three times as many epochs, no weight
decay, or adversarial training. A backdoored one may be trained long too, where its attack does not take otherwise."""


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

SMALL_ARCHITECTURES = ("resnet18", "vgg", "cnn")
_SEEDS_OF_A_ROUND = 1000  # more than any recipe's seed
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
        for index, (hardness, architecture) in enumerate(itertools.product(_HARDNESSES, ("cnn", "vgg")))
    ]
    return (*_in_turns("cifar10", architectures_of_attack=2, clean_per_architecture=8, first_seed=0), *hard)


def cifar10_long() -> tuple[Recipe, ...]:
    """The attacks that 12 epochs are too few for, on a VGG and a CNN, and a clean model of each, all trained thrice as long."""
    return tuple(
        Recipe(
            f"cifar10_long_{name}_{architecture}",
            ATTACKS[name](7 * place % 10, 10) if name in ATTACKS else None,
            540 + 2 * place + index,
            architecture,
            "long",
        )
        for place, name in enumerate(("wanet", "sample_specific", "clean"))
        for index, architecture in enumerate(("vgg", "cnn"))
    )


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


def repeated(recipes: Sequence[Recipe], round_: int) -> tuple[Recipe, ...]:
    """The same models with other seeds, names, triggers and targets in every ``round_`` from 1; in round 0 they are as they are.

    Triggers that are drawn under a seed are drawn anew; checkerboards, writing and waves are not drawn, and stay. Target and
    source classes move on by ``round_``, but where the data set says which class an attack must aim at.
    """
    if round_ == 0:
        return tuple(recipes)
    return tuple(
        dataclasses.replace(
            entry,
            name=f"{entry.name}_round{round_}",
            seed=entry.seed + round_ * _SEEDS_OF_A_ROUND,
            attack=_redrawn(entry.attack, DATA[entry.data], round_),
        )
        for entry in recipes
    )


def _redrawn(attack: Attack | None, source: DataSet, round_: int) -> Attack | None:
    """The attack with every seed of its own and, unless ``source`` sets its target, every class moved on by ``round_``."""
    if attack is None:
        return None
    given = (settings for name, settings in source.settings.items() if type(ATTACKS[name](0, source.classes)) is type(attack))
    classes_stay = any("target_class" in settings for settings in given)
    changed = {}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if field.name.endswith("_seed"):
            changed[field.name] = value + round_
        elif field.name.endswith("_class") and not classes_stay:
            changed[field.name] = (value + round_) % source.classes
    return dataclasses.replace(attack, **changed)


def poisoning_rates(data: str, first_seed: int) -> tuple[Recipe, ...]:
    """BadNets with four poisoning rates on a VGG and a CNN, and a clean model of each."""
    shares = (0.01, 0.03, 0.05, 0.1)
    wanted = [
        (f"{data}_rates_badnets_{round(100 * share)}", BadNets(target_class=1, size=3, poisoning_rate=share)) for share in shares
    ]
    return tuple(
        Recipe(f"{name}_{architecture}", attack, first_seed + place, architecture, data=data)
        for place, ((name, attack), architecture) in enumerate(
            itertools.product([*wanted, (f"{data}_rates_clean", None)], ("vgg", "cnn"))
        )
    )


def _in_turns(
    data: str,
    *,
    attacks: Sequence[str] = tuple(ATTACKS),
    architectures: Sequence[str] = SMALL_ARCHITECTURES,
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
    "cifar10-long": cifar10_long,
    "gtsrb-small": gtsrb_small,
    "cifar10-rates": lambda: poisoning_rates("cifar10", 500),
    "digits-rates": lambda: poisoning_rates("digits", 520),
    "digits": small_digits,
    "digits-references": digits_references,
}
