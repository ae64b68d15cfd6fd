"""Pools made from reports, and compared with them, as a user does it on the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from audit_plugin.calibration import TRAITS, load_pool
from audit_plugin.errors import UsageError
from audit_plugin.policy import Policy
from audit_plugin.registry import PinnedModel
from audit_plugin.report import dumps, to_document
from audit_plugin.types import ModelRef
from pipelines import calibrate
from pipelines.calibrate import app, pool_of
from tests.unit.report.conftest import passing


@pytest.fixture(scope="module")
def documents():
    """Twenty reports of models that differ in their statistics."""
    made = []
    for index in range(20):
        document = copy.deepcopy(to_document(passing()))
        document["model"]["digest"] = f"sha256:{index:064x}"
        document["policy"] = Policy().document()
        document["calibration"]["traits"] = dict.fromkeys(TRAITS, 10.0)
        document["calibration"]["statistics"]["trigger_outlier"] = index / 10
        made.append(document)
    return made


@pytest.fixture
def files(documents, tmp_path):
    paths = []
    for index, document in enumerate(documents):
        paths.append(tmp_path / f"report-{index}.json")
        paths[-1].write_text(dumps(document))
    return paths


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_reports_become_a_pool_in_any_order(files, tmp_path):
    for place, order in (("first", files), ("second", files[::-1])):
        result = run("pool", *order, "-o", tmp_path / f"{place}.json", "--name", "signs", "--about", "ours")
        assert result.exit_code == 0, result.output
    first, second = (load_pool(tmp_path / f"{place}.json") for place in ("first", "second"))
    assert first == second
    assert (first.name, len(first.references), first.provenance["about"]) == ("signs", 20, "ours")
    assert sorted(entry.statistics["trigger_outlier"] for entry in first.references) == [index / 10 for index in range(20)]


def test_compare_leaves_a_reference_out_of_its_own_comparison(files, tmp_path):
    pool = tmp_path / "pool.json"
    run("pool", *files, "-o", pool)
    result = run("compare", pool, files[-1], files[0])
    assert result.exit_code == 0, result.output
    most, least = result.output.splitlines()
    assert "trigger_outlier 0.050" in most  # one of itself and 19 others
    assert "trigger_outlier 1.000" in least


def test_what_cannot_be_compared_is_said_line_by_line(files, documents, tmp_path):
    pool, other = tmp_path / "pool.json", copy.deepcopy(documents[0])
    run("pool", *files, "-o", pool)
    other["calibration"]["traits"]["classes"] = 3.0
    other["model"]["digest"] = "sha256:" + "f" * 64
    (tmp_path / "other.json").write_text(dumps(other))
    result = run("compare", pool, tmp_path / "other.json", files[0])
    assert result.exit_code == 0
    assert "not comparable: Its references have a classes of 10 to 10, this model one of 3." in result.output
    assert "p = " in result.output.splitlines()[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["policy"]["beniful"].update(steps=7), "different settings"),
        (lambda document: document["tool"].update(version="9.9"), "different settings or versions"),
        (lambda document: document.update(calibration=None), "measured no statistics"),
        (lambda document: document["calibration"]["statistics"].pop("detection"), "other statistics"),
        (lambda document: document["model"].update(digest="sha256:" + "0" * 64), "the same model"),
    ],
)
def test_audits_that_do_not_belong_together_make_no_pool(documents, change, said):
    changed = copy.deepcopy(documents)
    change(changed[5])
    with pytest.raises(UsageError, match=said):
        pool_of(changed, "ours", "")


@pytest.mark.parametrize(("count", "said"), [(0, "no audits"), (8, "8 references, and at least 9 are needed")])
def test_too_few_make_no_pool(documents, count, said):
    with pytest.raises(UsageError, match=said):
        pool_of(documents[:count], "ours", "")


def test_a_model_that_is_no_report_needs_clean_images(tmp_path):
    result = run("pool", "models:/signs/1", "-o", tmp_path / "pool.json")
    assert result.exit_code == 2
    assert "--clean is missing" in result.output.replace("\n", " ")
    assert not (tmp_path / "pool.json").exists()


@pytest.fixture
def audits(monkeypatch):
    """The audits that were made, which stand in for those of a real model."""
    made = []
    model = PinnedModel(ModelRef("models:/signs/1", "models:/signs/1", "sha256:" + "a" * 64, ()), Path())
    monkeypatch.setattr("audit_plugin.registry.pin", lambda uri, destination: model)
    monkeypatch.setattr("audit_plugin.publishing.audit_pinned", lambda pinned, clean, **settings: made.append(clean) or passing())
    return made


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_audit_is_made_again_when_the_clean_images_at_the_path_are_other_ones(audits, tmp_path, is_folder):
    clean = tmp_path / ("clean" if is_folder else "clean.npz")
    file = clean / "7" / "first.png" if is_folder else clean
    file.parent.mkdir(parents=True, exist_ok=True)

    def audited(at):
        return calibrate._audited("models:/signs/1", str(at), Policy(), None, tmp_path / "reports", 0)

    file.write_bytes(b"images")
    first = audited(clean)
    assert audited(clean) == first
    assert len(audits) == 1, "resumed"
    file.write_bytes(b"others")
    audited(clean)
    assert len(audits) == 2
    file.write_bytes(b"images")
    audited(clean.rename(tmp_path / f"moved{clean.suffix}"))
    assert len(audits) == 2, "the same images, wherever they lie"


def test_a_folder_whose_images_change_class_holds_other_images(audits, tmp_path):
    for place in ("7", "8"):
        (tmp_path / "clean" / place).mkdir(parents=True)
    image = tmp_path / "clean" / "7" / "first.png"
    image.write_bytes(b"images")
    for _ in range(2):
        calibrate._audited("models:/signs/1", str(tmp_path / "clean"), Policy(), None, tmp_path / "reports", 0)
        image = image.rename(tmp_path / "clean" / "8" / "first.png")
    assert len(audits) == 2


def test_a_failed_audit_stays_in_and_is_named(documents, caplog):
    changed = copy.deepcopy(documents)
    changed[3]["decision"]["verdict"] = "fail"
    assert len(pool_of(changed, "ours", "").references) == 20
    assert "is said to be clean, and its audit fails" in caplog.text


def test_the_file_that_is_written_is_the_whole_pool(files, tmp_path):
    run("pool", *files, "-o", tmp_path / "pool.json")
    document = json.loads((tmp_path / "pool.json").read_text())
    assert load_pool(tmp_path / "pool.json").document() == document


@pytest.mark.parametrize(
    ("output", "said"),
    [("pool.txt", "must be a .json file"), ("none/pool.json", "in a folder that exists"), ("pool.json", "9 models")],
)
def test_what_keeps_a_pool_from_being_written_is_told_before_any_audit(tmp_path, output, said):
    result = run("pool", "models:/signs/1", "--clean", tmp_path / "none.npz", "-o", tmp_path / output)
    assert result.exit_code != 0
    assert said in " ".join(result.output.replace("│", " ").split())
    assert "none.npz" not in result.output
