"""The zoo's pipeline on a few images: every model with its card, and nothing trained twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from typer.testing import CliRunner

from audit_plugin.errors import UsageError
from audit_plugin.maths.pixels import to_pixels
from audit_plugin.zoo.attacks import ATTACKS, AllToAll, BadNets, CleanLabel, TaCT, WaNet
from pipelines import zoo, zoo_models, zoo_recipes
from pipelines.zoo_picture import attacks_picture

NAMES = {"badnets", "blended", "wanet", "clean_a", "clean_b"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("cifar10_train_1", 200), ("cifar10_train_2", 100), ("cifar10_test", 100)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 32, 32, 3)) + labels[:, None, None, None] * 20
        np.savez(folder / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    return folder


def run(folder, data_dir, *more, recipe="cifar10-five"):
    settings = ["--recipe", recipe, "--data-dir", str(data_dir), "--epochs", "1", "--width", "4"]
    return CliRunner().invoke(zoo.app, ["train", str(folder), *settings, *more])


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    result = run(folder, data_dir)
    assert result.exit_code == 0, result.output
    return folder


def card_of(folder, name):
    return json.loads((folder / name / zoo_models.CARD).read_text(encoding="utf-8"))


def test_every_model_is_there_with_its_card(trained):
    assert {path.name for path in trained.iterdir()} == NAMES
    attacks = {name: card_of(trained, name)["attack"] for name in NAMES}
    assert attacks == {"badnets": "BadNets", "blended": "Blended", "wanet": "WaNet", "clean_a": None, "clean_b": None}
    for name, attack in attacks.items():
        card = card_of(trained, name)
        assert (card["epochs"], card["width"], card["architecture"], card["hardness"]) == (1, 4, "resnet18", None)
        assert card["sha256"] == hashlib.sha256((trained / name / zoo_models.MODEL).read_bytes()).hexdigest()
        assert 0.0 <= card["clean_accuracy"] <= 1.0
        assert ("attack_success_rate" in card) == (attack is not None)
    assert len({card_of(trained, name)["seed"] for name in NAMES}) == len(NAMES)


def test_a_card_describes_its_attack_and_its_model(trained, data_dir):
    card = card_of(trained, "wanet")
    attack = WaNet(**card["settings"])
    with np.load(data_dir / "cifar10_test.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    model = torch.export.load(str(trained / "wanet" / zoo_models.MODEL)).module()
    with torch.no_grad():
        answers, stamped = (
            model(torch.from_numpy(to_pixels(part))).argmax(dim=1).numpy() for part in (images, attack.stamp(images))
        )
    assert card["clean_accuracy"] == pytest.approx((answers == labels).mean(), abs=0.011)  # one image of 100 on the edge
    victims = labels != attack.target_class
    assert card["attack_success_rate"] == pytest.approx((stamped[victims] == attack.target_class).mean(), abs=0.012)


def test_a_second_call_trains_nothing(trained, data_dir, monkeypatch):
    monkeypatch.setattr(zoo_models, "train", lambda *arguments, **settings: pytest.fail("trained again"))
    assert run(trained, data_dir / "nowhere").exit_code == 0  # and reads no images


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--epochs", "2"], "trained with epochs 1 instead of 2"),
        (["--width", "8", "--only", "wanet"], "trained with width 4 instead of 8"),
    ],
)
def test_a_model_of_other_settings_is_not_taken_for_the_one_that_is_wanted(trained, data_dir, more, words):
    result = run(trained, data_dir, *more)
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert words in told
    assert "Give another folder, or delete this one" in told


def test_a_model_whose_attack_has_changed_since_is_not_taken_for_it(trained, data_dir, monkeypatch):
    (recipe,) = (entry for entry in zoo_recipes.RECIPES["cifar10-five"]() if entry.name == "badnets")
    changed = dataclasses.replace(recipe, attack=dataclasses.replace(recipe.attack, target_class=5))
    with pytest.raises(UsageError, match=r"settings \{.*'target_class': .* instead of \{.*'target_class': 5"):
        zoo_models.check_card(trained / "badnets" / zoo_models.CARD, changed, epochs=1, width=4)
    zoo_models.check_card(trained / "badnets" / zoo_models.CARD, recipe, epochs=1, width=4)


def seeds_of(attack):
    return {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack) if field.name.endswith("_seed")}


def test_another_round_is_the_same_models_with_other_seeds_names_triggers_and_targets():
    for make in zoo_recipes.RECIPES.values():
        recipes = make()
        assert zoo_recipes.repeated(recipes, 0) == recipes
        rounds = [recipes, *(zoo_recipes.repeated(recipes, number) for number in (1, 2))]
        everything = [entry for entries in rounds for entry in entries]
        assert len({entry.name for entry in everything}) == len({entry.seed for entry in everything}) == 3 * len(recipes)
        for number in (1, 2):
            for first, again in zip(recipes, rounds[number], strict=True):
                assert dataclasses.replace(again, name=first.name, seed=first.seed, attack=first.attack) == first
                if first.attack is None:
                    assert again.attack is None
                    continue
                assert seeds_of(again.attack) == {name: seed + number for name, seed in seeds_of(first.attack).items()}
                moved = {name: value for name, value in vars(again.attack).items() if value != getattr(first.attack, name)}
                classes = {name for name in ("target_class", "source_class") if hasattr(first.attack, name)}
                stays = first.data == "gtsrb" and isinstance(first.attack, CleanLabel)
                assert set(moved) == set(seeds_of(first.attack)) | (set() if stays else classes)
                for name in classes - (classes if stays else set()):
                    count = zoo_recipes.DATA[first.data].classes
                    assert moved[name] == (getattr(first.attack, name) + number) % count < count


def test_a_round_aims_at_another_class_and_keeps_source_and_target_apart():
    """Over as many rounds as there are classes every class is aimed at once, and the source is never the target."""
    recipes = zoo_recipes.cifar10_small()
    rounds = [zoo_recipes.repeated(recipes, number) for number in range(10)]
    for attacks in zip(*([entry.attack for entry in entries] for entries in rounds), strict=True):
        if hasattr(attacks[0], "target_class"):
            assert {attack.target_class for attack in attacks} == set(range(10))
        if isinstance(attacks[0], TaCT):
            assert {(attack.source_class - attack.target_class) % 10 for attack in attacks} == {3}


@pytest.mark.parametrize("name", ["blended", "adap_blend", "trojan_square", "wanet"])
def test_a_trigger_that_is_drawn_is_another_one_in_another_round(name):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    (recipe, *_) = (entry for entry in zoo_recipes.cifar10_small() if entry.name.startswith(f"cifar10_{name}"))
    (again,) = zoo_recipes.repeated([recipe], 1)
    assert (again.attack.stamp(images) != recipe.attack.stamp(images)).any()


def test_a_backdoored_model_and_its_clean_twin_are_trained_equally_long(data_dir, tmp_path, monkeypatch):
    trainings = []
    monkeypatch.setattr(zoo_models, "train", lambda network, images, **settings: trainings.append(settings["epochs"]))
    names = ("cifar10_long_wanet_cnn", "cifar10_long_clean_cnn")
    result = run(tmp_path, data_dir, *(word for name in names for word in ("--only", name)), recipe="cifar10-long")
    assert result.exit_code == 0, result.output
    assert trainings == [3, 3]
    assert {entry.hardness for entry in zoo_recipes.cifar10_long()} == {"long"}


def test_a_round_is_trained_beside_the_first(trained, data_dir, tmp_path):
    assert run(tmp_path, data_dir, "--only", "clean_a_round1", "--round", "1").exit_code == 0
    assert card_of(tmp_path, "clean_a_round1")["seed"] == card_of(trained, "clean_a")["seed"] + 1000
    assert (tmp_path / "clean_a_round1" / zoo_models.MODEL).read_bytes() != (trained / "clean_a" / zoo_models.MODEL).read_bytes()
    assert run(tmp_path, data_dir, "--only", "clean_a", "--round", "1").exit_code == 2


def test_a_model_without_card_is_trained_anew(data_dir, tmp_path, monkeypatch):
    (tmp_path / "clean_a").mkdir()
    (tmp_path / "clean_a" / zoo_models.MODEL).write_bytes(b"half")
    assert run(tmp_path, data_dir, "--only", "clean_a").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"clean_a"}
    torch.export.load(str(tmp_path / "clean_a" / zoo_models.MODEL))
    monkeypatch.setattr(zoo_models, "train", lambda *arguments, **settings: pytest.fail("trained again"))
    assert run(tmp_path, data_dir, "--only", "clean_a").exit_code == 0


def test_an_unknown_model_is_an_error_that_names_the_known_ones(data_dir, tmp_path):
    result = run(tmp_path, data_dir, "--only", "badnet", "--only", "wanet")
    assert result.exit_code == 2
    assert "no model is named badnet" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_names_the_nearest(data_dir, tmp_path):
    result = run(tmp_path, data_dir, recipe="cifar10-smal")
    assert result.exit_code == 2
    assert "cifar10-small" in result.output


@pytest.mark.slow
def test_other_architectures_and_hard_models_train_and_export(data_dir, tmp_path):
    names = [
        "cifar10_clean_vgg_0",
        "cifar10_low_rate_cnn",
        "cifar10_clean_cnn_imbalanced",
        "cifar10_clean_vgg_adversarial",
    ]
    result = run(tmp_path, data_dir, *(word for name in names for word in ("--only", name)), recipe="cifar10-small")
    assert result.exit_code == 0, result.output
    for name in names:
        card = card_of(tmp_path, name)
        assert card["architecture"] in name
        assert card["hardness"] is None or name.endswith(card["hardness"])
        model = torch.export.load(str(tmp_path / name / zoo_models.MODEL)).module()
        assert model(torch.zeros(7, 3, 32, 32)).shape == (7, 10)


@pytest.mark.parametrize(
    ("recipe", "clean", "hard", "attacked", "classes"), [("cifar10-small", 32, 8, 26, 10), ("gtsrb-small", 12, 0, 13, 43)]
)
def test_a_small_recipe_is_a_balanced_zoo(recipe, clean, hard, attacked, classes):
    recipes = zoo_recipes.RECIPES[recipe]()
    assert len({entry.name for entry in recipes}) == len({entry.seed for entry in recipes}) == len(recipes)
    kinds = Counter((entry.attack is not None, entry.hardness is not None) for entry in recipes)
    assert kinds == Counter({(False, False): clean - hard, (True, False): attacked} | ({(False, True): hard} if hard else {}))
    attacks = [entry for entry in recipes if entry.attack is not None]
    assert {type(entry.attack) for entry in attacks} == set(ATTACKS)
    assert (
        {entry.architecture for entry in attacks}
        == {entry.architecture for entry in recipes}
        == set(zoo_recipes.SMALL_ARCHITECTURES)
    )
    targets = Counter(entry.attack.target_class for entry in attacks if hasattr(entry.attack, "target_class"))
    assert max(targets.values()) <= 3
    assert max(targets) < classes
    assert [entry.attack.classes for entry in attacks if isinstance(entry.attack, AllToAll)] == [classes] * (attacked // 13)
    first = recipes[: len(recipes) // 2]
    assert 0.4 < sum(entry.attack is None for entry in first) / len(first) < 0.6, "half-trained it is balanced too"


def test_no_two_small_recipes_share_a_name_or_seed():
    both = [*zoo_recipes.cifar10_small(), *zoo_recipes.gtsrb_small()]
    assert len({entry.name for entry in both}) == len({entry.seed for entry in both}) == len(both)


def test_signs_are_trained_on_their_own_images_and_never_mirrored(data_dir, tmp_path, monkeypatch):
    for name, count in (("gtsrb_train_1", 86), ("gtsrb_test", 43)):
        labels = np.arange(count) % 43
        np.savez(tmp_path / f"{name}.npz", images=np.full((count, 32, 32, 3), 90, np.uint8), labels=labels)
    seen = []
    monkeypatch.setattr(zoo_models, "train", lambda model, data, **settings: seen.append((len(data), settings)) or model.eval())
    result = run(tmp_path / "zoo", tmp_path, "--only", "gtsrb_clean_vgg_0", recipe="gtsrb-small")
    assert result.exit_code == 0, result.output
    ((count, settings),) = seen
    assert count == 86
    assert (settings["augment"], settings["mirror"]) == (True, False)
    assert settings["epochs"] == 2, "as many steps as one pass over CIFAR-10"
    card = card_of(tmp_path / "zoo", "gtsrb_clean_vgg_0")
    assert card["data"] == "gtsrb"
    model = torch.export.load(str(tmp_path / "zoo" / "gtsrb_clean_vgg_0" / zoo_models.MODEL)).module()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 43)


def test_clean_label_attacks_on_signs_aim_at_a_class_with_enough_images():
    """The commonest of the 43 has 5.7 % of the images: half of it is poisoned, so that the class can be learnt clean too."""
    chosen = [entry.attack for entry in zoo_recipes.gtsrb_small() if isinstance(entry.attack, CleanLabel)]
    assert {(attack.target_class, attack.poisoning_rate) for attack in chosen} == {(2, 0.03)}
    assert len(chosen) == 2
    others = [entry.attack for entry in zoo_recipes.cifar10_small() if isinstance(entry.attack, CleanLabel)]
    assert len({attack.target_class for attack in others}) == 4


def test_digits_are_a_balanced_zoo_of_two_architectures():
    recipes = zoo_recipes.small_digits()
    assert Counter((entry.architecture, entry.attack is None) for entry in recipes) == Counter(
        {(architecture, clean): 3 for architecture in ("cnn", "vgg") for clean in (True, False)}
    )
    assert len({type(entry.attack) for entry in recipes if entry.attack}) == 6


def test_a_list_shows_every_model_and_what_is_trained(trained):
    result = CliRunner().invoke(zoo.app, ["list", "--recipe", "cifar10-five", str(trained)])
    assert result.exit_code == 0, result.output
    *lines, last = result.output.splitlines()
    assert {line.split()[0] for line in lines} == NAMES
    assert last == f"5 models, 5 trained in {trained}"
    (wanet,) = (line for line in lines if line.startswith("wanet"))
    assert "WaNet" in wanet
    assert "seed 4" in wanet
    assert f"attack success {card_of(trained, 'wanet')['attack_success_rate']:.3f}" in wanet
    without = CliRunner().invoke(zoo.app, ["list", "--recipe", "cifar10-small"]).output
    assert without.splitlines()[-1] == "58 models"
    assert "accuracy" not in without


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "badnets").mkdir()
    (tmp_path / "badnets" / zoo_models.CARD).write_text('{"attack": "Bad', encoding="utf-8")
    with pytest.raises(UsageError, match=r"badnets.*is no card of a model"):
        zoo_models.read_card(tmp_path / "badnets" / zoo_models.CARD)
    result = CliRunner().invoke(zoo.app, ["list", "--recipe", "cifar10-five", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no card of a model" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_an_error(data_dir, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(tmp_path, data_dir, "--device", device)
    assert result.exit_code == 2
    assert "--device" in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_images_are_a_usage_error_that_teaches(tmp_path, monkeypatch):
    def offline(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    result = run(tmp_path / "zoo", tmp_path)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "could not be downloaded" in said
    assert "digits need no files" in said


def test_nothing_to_register_says_how_to_begin(tmp_path):
    result = CliRunner().invoke(zoo.app, ["register", str(tmp_path)])
    assert result.exit_code == 2
    assert "--recipe digits" in " ".join(result.output.replace("│", " ").split())


def test_the_picture_shows_an_attack_in_its_column():
    picture = np.asarray(attacks_picture({"first": BadNets(target_class=0, size=3), "second": BadNets(target_class=0, size=8)}))
    differences = picture[-110:-10]
    columns = [differences[:, left : left + 96].sum() for left in (110, 214)]
    whites = [(differences[:, left : left + 96] != 0).all(axis=2).mean() for left in (110, 214)]
    assert columns[0] < columns[1]
    assert whites[0] < whites[1] < 0.2
