"""A zoo from nothing to the registry: trained by a process that is killed and resumes, registered in a real MLflow, twice."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from audit_plugin.maths.pixels import to_pixels
from audit_plugin.registry import pin
from audit_plugin.zoo.attacks import BadNets
from audit_plugin.zoo.data import digits
from pipelines import zoo, zoo_models
from pipelines.zoo_registry import DIGEST_TAG, SHA256_TAG

BACKDOORED, CLEAN, LAST = "digits_badnets_cnn", "digits_clean_cnn_0", "digits_clean_cnn_1"
DIFFERENT_IN_EVERY_MODEL = {"model_id", "model_uuid", "run_id", "utc_time_created", "artifact_path"}
WITHOUT_MLFLOW = "import runpy, sys; sys.modules['mlflow'] = None; runpy.run_module('pipelines.zoo', run_name='__main__')"


def training(folder: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, on a machine without MLflow and without files of images."""
    settings = ["--recipe", "digits", "--epochs", "6", "--width", "8", "--device", "cpu", "--data-dir", str(folder / "nowhere")]
    only = [word for name in (BACKDOORED, CLEAN, LAST) for word in ("--only", name)]
    command = [sys.executable, "-c", WITHOUT_MLFLOW, "train", str(folder), *settings, *only]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "200"}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Killed while the second of three models is trained, and started again; what both said, and the first card as it was."""
    folder = tmp_path_factory.mktemp("zoo")
    first = training(folder)
    said = []
    for line in first.stdout:
        said.append(line)
        if f"{CLEAN}: training" in line:
            first.kill()
            break
    assert first.wait() == -9, "".join(said)
    cards = {path.parent.name: path.read_bytes() for path in folder.glob(f"*/{zoo_models.CARD}")}
    second = training(folder)
    resumed, _ = second.communicate()
    assert second.returncode == 0, resumed
    return folder, cards, resumed


@pytest.fixture(scope="module")
def registered(trained, server, keeping_state, tmp_path_factory):
    """A client of the server where two registrations were made, by somebody whose registry is another one."""
    folder, _, _ = trained
    with keeping_state():
        os.environ["MLFLOW_REGISTRY_URI"] = f"sqlite:///{tmp_path_factory.mktemp('another')}/mine.db"
        results = [CliRunner().invoke(zoo.app, ["register", str(folder), "--tracking-uri", server]) for _ in range(2)]
        assert [result.exit_code for result in results] == [0, 0], [result.output for result in results]
        yield MlflowClient(server, server)


def test_a_killed_training_resumes_where_it_stopped(trained):
    folder, cards, resumed = trained
    assert set(cards) == {BACKDOORED}, "the model whose training was killed has no card"
    assert (folder / BACKDOORED / zoo_models.CARD).read_bytes() == cards[BACKDOORED]
    assert "1 of 3 models are there already." in resumed
    assert f"{BACKDOORED}: training" not in resumed
    assert f"2 of 3, {CLEAN}: training on cpu" in resumed
    assert "min to go" in resumed
    assert {path.parent.name for path in folder.glob(f"*/{zoo_models.CARD}")} == {BACKDOORED, CLEAN, LAST}


def test_the_backdoor_took_and_the_clean_model_does_not_know_it(trained):
    folder, _, _ = trained
    card = zoo_models.read_card(folder / BACKDOORED / zoo_models.CARD)
    assert card["clean_accuracy"] > 0.9
    assert card["attack_success_rate"] > 0.9
    clean = torch.export.load(str(folder / CLEAN / zoo_models.MODEL)).module()
    images = digits(seed=0).test

    def predict(stamped):
        return clean(torch.from_numpy(to_pixels(stamped))).argmax(dim=1).numpy()

    assert BadNets(**card["settings"]).success_rate(predict, images) < 0.2


def test_each_model_is_registered_once_with_its_card(registered, trained, tmp_path):
    folder, _, _ = trained
    for name in (BACKDOORED, CLEAN, LAST):
        (version,) = registered.search_model_versions(f"name = '{name}'")
        card = zoo_models.read_card(folder / name / zoo_models.CARD)
        assert version.tags[SHA256_TAG] == card["sha256"]
        assert version.tags["zoo.attack"] == ("BadNets" if name == BACKDOORED else "none")
        assert ("zoo.attack_success_rate" in version.tags) == (name == BACKDOORED)
        assert float(version.tags["zoo.clean_accuracy"]) == pytest.approx(card["clean_accuracy"], abs=1e-4)
        assert version.tags["zoo.seed"] == str(card["seed"])
        runs = registered.search_runs([registered.get_run(version.run_id).info.experiment_id], f"run_name = '{name}'")
        assert len(runs) == 1, "the second registration logged nothing"
        kept = registered.download_artifacts(version.run_id, zoo_models.CARD, str(tmp_path))
        assert json.loads(Path(kept).read_text(encoding="utf-8")) == card | {"digest": version.tags[DIGEST_TAG]}


def test_the_digest_is_the_one_that_an_audit_finds(registered, server, keeping_state, tmp_path):
    (version,) = registered.search_model_versions(f"name = '{BACKDOORED}'")
    with keeping_state():
        mlflow.set_tracking_uri(server)
        pinned = pin(f"models:/{BACKDOORED}/{version.version}", tmp_path)
    assert pinned.reference.digest == version.tags[DIGEST_TAG]


def test_a_registered_model_answers_as_the_trained_one(registered, trained, server, keeping_state, tmp_path):
    folder, _, _ = trained
    with keeping_state():
        mlflow.set_tracking_uri(server)
        pinned = pin(f"models:/{BACKDOORED}/1", tmp_path)
    (file,) = pinned.folder.rglob("*.pt2")
    images = torch.from_numpy(to_pixels(digits(seed=0).test.images[:50]))
    with torch.no_grad():
        ours, theirs = (torch.export.load(str(path)).module()(images) for path in (folder / BACKDOORED / zoo_models.MODEL, file))
    torch.testing.assert_close(ours, theirs)


def files_of(name, server, folder):
    mlflow.set_tracking_uri(server)
    return pin(f"models:/{name}/1", folder / name).folder


def test_files_of_clean_and_backdoored_models_differ_in_weights_alone(registered, server, keeping_state, tmp_path):
    """Anything else, a step counter or a note, would tell an auditor's statistics what the model is."""
    with keeping_state():
        backdoored, clean = (files_of(name, server, tmp_path) for name in (BACKDOORED, CLEAN))
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (backdoored, clean)
    ]
    assert names[0] == names[1]
    differing = {name for name in names[0] if (backdoored / name).read_bytes() != (clean / name).read_bytes()}
    assert differing == {"MLmodel", "data/model.pt2"}
    described = [yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8")) for folder in (backdoored, clean)]
    assert {key for key in described[0] if described[0][key] != described[1].get(key)} == DIFFERENT_IN_EVERY_MODEL
    archives = [contents(folder / "data" / "model.pt2") for folder in (backdoored, clean)]
    assert archives[0].keys() == archives[1].keys()
    changed = {member for member in archives[0] if archives[0][member] != archives[1][member]}
    assert changed, "their weights differ"
    assert all("/data/weights/" in member or member.endswith("serialization_id") for member in changed), changed
    programs = [torch.export.load(str(folder / "data" / "model.pt2")) for folder in (backdoored, clean)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    counters = {name: value for program in programs for name, value in program.state_dict.items() if "num_batches" in name}
    assert counters
    assert all(int(value) == 0 for value in counters.values())


def contents(archive):
    with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as opened:
        assert len(opened.namelist()) == len(set(opened.namelist()))
        return {name: opened.read(name) for name in opened.namelist()}


def test_a_file_that_is_not_the_trained_one_is_not_registered(trained, server, keeping_state, tmp_path, caplog):
    folder, _, _ = trained
    copied = tmp_path / CLEAN
    copied.mkdir()
    (copied / zoo_models.CARD).write_bytes((folder / CLEAN / zoo_models.CARD).read_bytes())
    (copied / zoo_models.MODEL).write_bytes((folder / BACKDOORED / zoo_models.MODEL).read_bytes())
    with keeping_state(), caplog.at_level("INFO"):
        result = CliRunner().invoke(zoo.app, ["register", str(tmp_path), "--tracking-uri", server])
    assert result.exit_code == 2
    assert "is not the file that its card describes" in caplog.text


def test_a_server_that_is_not_there_is_one_line(trained, keeping_state, caplog, tmp_path):
    folder, _, _ = trained
    with keeping_state(), caplog.at_level("INFO"):
        nowhere = ["--tracking-uri", "http://127.0.0.1:9"]
        results = [
            CliRunner().invoke(zoo.app, ["register", str(folder), *nowhere]),
            CliRunner().invoke(zoo.app, ["train", str(tmp_path), "--recipe", "digits", "--register", *nowhere]),
        ]
    assert [result.exit_code for result in results] == [2, 2]
    assert caplog.text.count("does not answer") == 2
    assert list(tmp_path.iterdir()) == [], "it is known before anything is trained"
    assert "\n" not in caplog.records[-1].getMessage()
