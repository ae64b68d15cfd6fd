"""The main job on a real MLflow server: a registered model becomes a verdict, a report, a run, tags and a note."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from audit_plugin import cli as command_line
from audit_plugin.attestation import SIGNING_KEY, generate_keys, signer_from_environment
from audit_plugin.cli import auditing
from audit_plugin.intake import inspect
from audit_plugin.promotion import judge, load_suite
from audit_plugin.registry import (
    EXPERIMENT,
    LoggedReport,
    PinnedModel,
    fetch_images,
    log_report,
    pin,
    promote,
    put_statement,
    statement_on,
    version_facts,
)
from audit_plugin.report import load, validate, write_report
from audit_plugin.types import AuditReport, Decision, Reason, Verdict
from audit_plugin.zoo.architectures import SmallCnn
from pipelines.demo import ATTACK, Demo

OWN_WORDS = "Trained by **hand** on digits.\n\n<!-- a note of ours -->"


@pytest.fixture
def client(tracking: str) -> MlflowClient:
    return MlflowClient()


# ------------------------------------------------------------------------------------------- the backdoored model


def test_backdoored_model_fails_with_exit_code_1(backdoored_run: subprocess.CompletedProcess[str]) -> None:
    assert backdoored_run.returncode == 1, backdoored_run.stderr


def test_stdout_holds_the_report_as_json_and_nothing_else(
    backdoored_run: subprocess.CompletedProcess[str], backdoored_output: Path
) -> None:
    document = json.loads(backdoored_run.stdout)
    validate(document)
    assert document == load(backdoored_output / "report.json")


def test_stages_are_named_on_stderr_without_a_traceback(backdoored_run: subprocess.CompletedProcess[str]) -> None:
    for stage in ("Fetching the model", "Loading the model", "Searching for triggers", "Writing the report"):
        assert stage in backdoored_run.stderr
    assert "Traceback" not in backdoored_run.stderr
    assert "error:" not in backdoored_run.stderr


@pytest.fixture
def document(backdoored_run: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(backdoored_run.stdout)


def test_verdict_names_the_planted_class(document: dict) -> None:
    assert document["decision"]["verdict"] == "fail"
    assert document["decision"]["suspected_class"]["index"] == ATTACK.target_class


def test_report_says_how_to_repeat_the_audit(document: dict, demo: Demo) -> None:
    assert f"run {demo.model_uris[1]} --clean {demo.clean_images.name}" in document["command"]
    assert document["seed"] == 0
    assert document["policy_digest"].startswith("sha256:")


def test_recovered_trigger_lies_where_it_was_planted(
    backdoored_run: subprocess.CompletedProcess[str], backdoored_output: Path
) -> None:
    size = 16
    picture = Image.open(backdoored_output / f"triggers/class_{ATTACK.target_class}.png").convert("L")
    scale = picture.height // size
    mask = np.asarray(picture, dtype=float)[scale // 2 :: scale, scale // 2 :: scale][:, -size:]
    assert mask.sum() > 0
    assert mask[size // 2 :, size // 2 :].sum() > 0.9 * mask.sum()


def test_recovered_trigger_fires_on_held_out_images(document: dict) -> None:
    (search,) = [outcome for outcome in document["outcomes"] if outcome["check"] == "trigger_inversion"]
    found = max(search["measurement"]["candidates"], key=lambda candidate: candidate["outlier"])
    assert found["target_class"]["index"] == ATTACK.target_class
    assert found["success"]["value"] >= 0.8
    assert found["size"] < 10


def test_suspects_with_the_planted_trigger_are_flagged_and_clean_ones_are_not(document: dict) -> None:
    flagged = [suspect["flagged"]["layerwise"] for suspect in document["suspects"]]
    predicted = [suspect["predicted_class"]["index"] for suspect in document["suspects"]]
    assert len(flagged) == 40
    assert predicted[20:].count(ATTACK.target_class) >= 18
    assert sum(flagged[20:]) >= 16
    assert sum(flagged[:20]) <= 4


def test_report_is_one_html_file_beside_the_json(backdoored_output: Path) -> None:
    files = {path.relative_to(backdoored_output).as_posix() for path in backdoored_output.rglob("*") if path.is_file()}
    assert {"report.json", "report.html", "triggers/class_7.png"} <= files
    assert not [name for name in files if name.endswith(".part")]


def _audits_of(client: MlflowClient, uri: str) -> list[mlflow.entities.Run]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], f"tags.`audit.model` = '{uri}'")


def test_mlflow_run_holds_report_metrics_and_link(
    backdoored_run: subprocess.CompletedProcess[str], demo: Demo, client: MlflowClient
) -> None:
    (run,) = _audits_of(client, demo.model_uris[1])
    assert run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"report.json", "report.html", "triggers"}
    assert "triggers/class_7.png" in {item.path for item in client.list_artifacts(run.info.run_id, "triggers")}
    assert run.data.metrics["clean_accuracy"] > 0.9
    assert run.data.metrics["trigger_attack_success_rate"] >= 0.8
    assert run.data.metrics["layerwise_detection_rate"] > run.data.metrics["layerwise_false_positive_rate"]
    version = client.get_model_version("digits-backdoored", "1")
    linked = client.get_run(run.info.run_id).inputs.model_inputs
    assert [entry.model_id for entry in linked] == [version.source.removeprefix("models:/")]


def test_version_carries_tags_and_a_note_with_a_link(
    backdoored_run: subprocess.CompletedProcess[str], document: dict, demo: Demo, client: MlflowClient
) -> None:
    version = client.get_model_version("digits-backdoored", "1")
    (run,) = _audits_of(client, demo.model_uris[1])
    assert version.tags["audit.verdict"] == "fail"
    assert version.tags["audit.suspected_class"] == "7"
    assert version.tags["audit.digest"] == document["model"]["digest"]
    assert version.tags["audit.run_id"] == run.info.run_id
    assert "Backdoor audit: FAIL" in version.description
    assert f"/runs/{run.info.run_id}/artifacts" in version.description


# ------------------------------------------------------------------------------------------------ the clean model


SMALL_BUDGET = """
[scoring]
checks = ["layerwise", "activation_norm"]

[trigger_inversion]
steps = 100

[source_specific]
steps = 60

[canaries]
count = 1
"""


class Audited(NamedTuple):
    """An audit that ran in this process."""

    code: int
    output: str
    report: AuditReport
    logged: LoggedReport


@pytest.fixture(scope="module")
def clean_audit(
    server: str,
    demo: Demo,
    keeping_state: Callable[[], AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Audited:
    """The audit of ``models:/digits-clean@candidate``, whose version has a description of its user's."""
    policy = tmp_path_factory.mktemp("policy") / "audit.toml"
    policy.write_text(SMALL_BUDGET, encoding="utf-8")
    results: list[tuple[AuditReport, LoggedReport]] = []
    original = auditing.audit_and_publish

    def recorded(*arguments: Any, **options: Any) -> tuple[AuditReport, LoggedReport]:
        results.append(original(*arguments, **options))
        return results[-1]

    with keeping_state(), pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        mlflow.set_tracking_uri(server)
        MlflowClient().set_registered_model_alias("digits-clean", "candidate", "1")
        MlflowClient().update_model_version("digits-clean", "1", OWN_WORDS)
        patch.setattr(auditing, "audit_and_publish", recorded)
        arguments = ["run", "models:/digits-clean@candidate", "--clean", str(demo.clean_images), "--policy", str(policy)]
        code = command_line._main(arguments)
    return Audited(code, stdout.getvalue(), *results[0])


def test_clean_model_passes_with_exit_code_0(clean_audit: Audited) -> None:
    assert clean_audit.report.decision.verdict is Verdict.PASS, clean_audit.output
    assert clean_audit.report.decision.suspected_class is None
    assert clean_audit.code == 0


def test_summary_leads_with_the_verdict_and_the_pinned_model(clean_audit: Audited, server: str) -> None:
    assert clean_audit.output.startswith("PASS  models:/digits-clean/1")
    assert clean_audit.report.model.pinned_uri == "models:/digits-clean/1"
    assert clean_audit.logged.page in clean_audit.output
    assert clean_audit.logged.page.startswith(server)


def test_the_shipped_promotion_suite_allows_what_passed(clean_audit: Audited) -> None:
    assert clean_audit.logged.promotion.allowed, clean_audit.logged.promotion.results
    assert not clean_audit.logged.signed, "no signing key is set"


def test_every_class_was_searched_on_disjoint_splits(clean_audit: Audited) -> None:
    summary = clean_audit.report.clean_set
    assert summary.fit_count + summary.calibrate_count + summary.test_count == sum(summary.images_per_class) == 719
    assert not clean_audit.report.decision.not_measured


def test_parity_was_measured_on_every_tap(clean_audit: Audited) -> None:
    runtime = clean_audit.report.runtime
    assert [entry.tap for entry in runtime.parity] == [*clean_audit.report.subject.taps, "logits"]
    assert all(entry.relative_difference <= runtime.parity_tolerance for entry in runtime.parity)


def _blocks(description: str) -> int:
    return description.count("Backdoor audit:")


def _log_again(report: AuditReport, folder: Path) -> LoggedReport:
    write_report(report, folder, ("json", "html"))
    return log_report(report, folder, judge(report, load_suite(None)))


def test_users_own_description_stays_above_the_note(clean_audit: Audited, client: MlflowClient) -> None:
    description = client.get_model_version("digits-clean", "1").description
    assert description.startswith(OWN_WORDS)
    assert _blocks(description) == 1


def test_second_audit_replaces_the_note_and_adds_a_run(clean_audit: Audited, client: MlflowClient, tmp_path: Path) -> None:
    before = _audits_of(client, "models:/digits-clean/1")
    again = _log_again(clean_audit.report, tmp_path)
    version = client.get_model_version("digits-clean", "1")
    assert version.description.startswith(OWN_WORDS)
    assert _blocks(version.description) == 1
    assert again.run_id in version.description
    assert version.tags["audit.run_id"] == again.run_id
    assert len(_audits_of(client, "models:/digits-clean/1")) == len(before) + 1


def test_words_added_below_the_note_stay(clean_audit: Audited, client: MlflowClient, tmp_path: Path) -> None:
    version = client.get_model_version("digits-clean", "1")
    client.update_model_version("digits-clean", "1", f"{version.description}\n\nApproved by *us*.")
    _log_again(clean_audit.report, tmp_path)
    description = client.get_model_version("digits-clean", "1").description
    assert description.startswith(OWN_WORDS)
    assert description.endswith("Approved by *us*.")
    assert _blocks(description) == 1


def test_a_version_that_a_tag_calls_a_prompt_is_found_as_any_other(demo: Demo, client: MlflowClient, tmp_path: Path) -> None:
    name = "it's digits"
    mlflow.register_model(client.get_model_version("digits-clean", "1").source, name)
    latest = pin(f"models:/{name}/latest", tmp_path / "before").reference
    client.set_model_version_tag(name, "1", "mlflow.prompt.is_prompt", "true")
    client.set_registered_model_tag(name, "mlflow.prompt.is_prompt", "true")
    promote(name, "1", "candidate")
    for uri in (f"models:/{name}/1", f"models:/{name}@candidate", f"models:/{name}/latest"):
        found = pin(uri, tmp_path / uri[-1]).reference
        assert (found.pinned_uri, found.digest) == (latest.pinned_uri, latest.digest)
    keys = generate_keys(tmp_path / "keys")
    signer = signer_from_environment({SIGNING_KEY: str(keys[0])})
    put_statement(statement_on(version_facts(name, "1"), "waiver", latest.digest, {"audit.waived": "by Ada"}), signer)
    assert version_facts(name, "1").tags["audit.waived"] == "by Ada"


def test_description_without_room_is_left_alone(clean_audit: Audited, client: MlflowClient, tmp_path: Path) -> None:
    full = client.get_model_version("digits-clean", "1").description
    client.update_model_version("digits-clean", "1", "x" * 4990)
    try:
        _log_again(clean_audit.report, tmp_path)
        assert client.get_model_version("digits-clean", "1").description == "x" * 4990
    finally:
        client.update_model_version("digits-clean", "1", full)


HOSTILE = (
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "<!-- /backdoor-audit -->",
    "![x](http://evil.example/x.png)",
    "\x1b[31mred\u202egpj",
    "| a | b |\n|---|---|",
)


def _accused(report: AuditReport, name: str) -> AuditReport:
    """The report as if the model had failed and called its classes something hostile."""
    names = (name, *report.subject.class_names[1:])
    subject = dataclasses.replace(report.subject, class_names=names)
    reasons = (Reason("class-stands-out", f"Class '{name}' behaves like the target of a backdoor."),)
    return dataclasses.replace(report, subject=subject, decision=Decision(Verdict.FAIL, reasons, suspected_class=0))


@pytest.mark.parametrize("name", [*HOSTILE[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE[2:])])
def test_hostile_class_name_stays_text_in_the_note(clean_audit: Audited, client: MlflowClient, tmp_path: Path, name: str) -> None:
    _log_again(_accused(clean_audit.report, name), tmp_path)
    description = client.get_model_version("digits-clean", "1").description
    note = description[description.rindex("### Backdoor audit") :]
    assert "<script" not in note
    assert "\x1b" not in note
    assert "\u202e" not in note
    assert note.count("<!--") == description.count("<!-- backdoor-audit -->") == 1
    assert not re.search(r"(?<!\\)\]\((?!http://127\.0\.0\.1)", note)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not any(raw in page for raw in ("<script>alert", "<!-- /backdoor-audit", "\x1b", "\u202e"))
    assert _blocks(description) == 1


def test_suspected_class_of_an_earlier_audit_is_taken_back(clean_audit: Audited, client: MlflowClient, tmp_path: Path) -> None:
    _log_again(_accused(clean_audit.report, "cat"), tmp_path)
    assert client.get_model_version("digits-clean", "1").tags["audit.suspected_class"] == "cat"
    tags = client.get_model_version("digits-clean", "1").tags
    repeated = dataclasses.replace(clean_audit.report, model=dataclasses.replace(clean_audit.report.model, tags=tags))
    _log_again(repeated, tmp_path)
    version = client.get_model_version("digits-clean", "1")
    assert version.tags["audit.verdict"] == "pass"
    assert "audit.suspected_class" not in version.tags


def test_failed_logging_leaves_no_run_running(
    clean_audit: Audited, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "log_inputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _log_again(clean_audit.report, tmp_path)
    statuses = {run.info.status for run in _audits_of(client, "models:/digits-clean/1")}
    assert statuses == {"FINISHED", "KILLED"}


# -------------------------------------------------------------------------------------------------- what is pinned


@pytest.fixture
def by_version(demo: Demo, tracking: str, tmp_path: Path) -> PinnedModel:
    return pin(demo.model_uris[0], tmp_path / "by version")


@pytest.mark.parametrize("form", ["alias", "latest", "model id", "run", "folder", "folder with a slash"])
def test_every_form_of_a_models_address_pins_the_same_bytes(
    by_version: PinnedModel, client: MlflowClient, tmp_path: Path, form: str
) -> None:
    client.set_registered_model_alias("digits-clean", "candidate", "1")
    uri = {
        "alias": "models:/digits-clean@candidate",
        "latest": "models:/digits-clean/latest",
        "model id": f"models:/{by_version.reference.model_id}",
        "run": f"runs:/{by_version.reference.run_id}/model",
        "folder": str(by_version.folder),
        "folder with a slash": f"{by_version.folder}/",
    }[form]
    pinned = pin(uri, tmp_path / "again")
    assert pinned.reference.digest == by_version.reference.digest
    assert pinned.reference.manifest == by_version.reference.manifest
    assert pinned.reference.uri == uri


@pytest.mark.parametrize("uri", ["models:/digits-clean@candidate", "models:/digits-clean/latest"])
def test_moving_address_is_pinned_to_name_and_version(client: MlflowClient, demo: Demo, tmp_path: Path, uri: str) -> None:
    client.set_registered_model_alias("digits-clean", "candidate", "1")
    reference = pin(uri, tmp_path).reference
    assert (reference.pinned_uri, reference.name, reference.version) == ("models:/digits-clean/1", "digits-clean", "1")
    assert reference.model_id is not None
    assert reference.run_id is not None


def test_single_file_is_pinned_to_its_own_bytes(by_version: PinnedModel, tmp_path: Path) -> None:
    exported = by_version.folder / "data" / "model.pt2"
    moved = tmp_path / "elsewhere" / "model.pt2"
    moved.parent.mkdir()
    shutil.copy(exported, moved)
    one, other = pin(str(exported), tmp_path / "one").reference, pin(str(moved), tmp_path / "other").reference
    assert one.digest == other.digest
    (entry,) = [entry for entry in by_version.reference.manifest if entry.path == "data/model.pt2"]
    assert one.manifest == (dataclasses.replace(entry, path="model.pt2"),)


def test_changed_byte_changes_the_digest(by_version: PinnedModel, tmp_path: Path) -> None:
    with (by_version.folder / "data" / "model.pt2").open("ab") as stream:
        stream.write(b"x")
    assert pin(str(by_version.folder), tmp_path / "changed").reference.digest != by_version.reference.digest


def test_copy_is_private(by_version: PinnedModel, tmp_path: Path) -> None:
    copied = pin(str(by_version.folder), tmp_path / "copied")
    shutil.rmtree(by_version.folder)
    assert (copied.folder / copied.reference.manifest[0].path).is_file()


def test_clean_images_come_from_an_artifact_address(demo: Demo, client: MlflowClient, tmp_path: Path) -> None:
    run = client.create_run(client.create_experiment("images")).info.run_id
    client.log_artifact(run, str(demo.clean_images))
    client.set_terminated(run)
    fetched = fetch_images(f"runs:/{run}/clean.npz", tmp_path / "images")
    assert fetched.read_bytes() == demo.clean_images.read_bytes()


def test_logged_state_dict_is_found_among_the_runs_artifacts(client: MlflowClient, tmp_path: Path) -> None:
    run = client.create_run(client.create_experiment("weights")).info.run_id
    with mlflow.start_run(run_id=run):
        mlflow.pytorch.log_state_dict(SmallCnn(channels=1, classes=10, width=4).state_dict(), artifact_path="weights")
    pinned = pin(f"runs:/{run}/weights", tmp_path)
    assert [entry.path for entry in pinned.reference.manifest] == ["state_dict.pth"]
    assert pinned.reference.run_id == run
    assert pinned.reference.model_id is None
    assert inspect(pinned.folder).flavour == "state_dict"
