"""``backdoor-audit scan`` on a real MLflow server, with real audits of small digit classifiers."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from audit_plugin.attestation import TAG_OF, VERIFYING_KEYS, keys_from_environment, signer_from_environment, verify
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.registry import facts_of, put_statement
from pipelines.scan.listing import CLEAN_IMAGES_TAG
from tests.scanned_registry import ScannedRegistry

pytestmark = pytest.mark.timeout(600)

HOSTILE = "digits [red]<img src=x>\x1b[2J"
PASS, FAIL, ERROR, INCONCLUSIVE, USAGE = range(5)
HOLD_LOCK = """
import sys, threading
from mlflow import MlflowClient
from audit_plugin.errors import AuditError
from pipelines.scan.lock import scan_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with scan_lock(MlflowClient(), {}, threading.Event()):
        print("holds", flush=True)
        sys.stdin.readline()
except AuditError as error:
    print(f"refused {error}", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def registry(start_server, keeping_state, tmp_path_factory):
    """The server's registry, filled; MLflow in this process speaks to the server, and the keys are in the environment."""
    folder = tmp_path_factory.mktemp("scan")
    with start_server(folder) as address, keeping_state():
        mlflow.set_tracking_uri(address)
        filled = ScannedRegistry(folder, address)
        os.environ.update(filled.environment)
        filled.add("digits")
        filled.add(HOSTILE, hostile=True)
        filled.add("voices")
        filled.add("faces", model_tags={CLEAN_IMAGES_TAG: "spare"})
        filled.add("digits-evil", backdoored=True, aliases=("Champion",))
        mlflow.MlflowClient().register_prompt("greeting", "Hello {{ name }}")
        yield filled


@dataclass(frozen=True)
class Killed:
    """A scan that was killed after its first audit: its run, and what another one said that wanted to begin meanwhile."""

    run_id: str
    published: list[str]
    second: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def killed(registry):
    """The first scan of everything, killed."""
    process = registry.start("--format", "json")
    wait_for(lambda: runs_of_scans(registry, "RUNNING"), process)
    (run,) = runs_of_scans(registry, "RUNNING")
    second = registry.scan("--format", "json")
    wait_for(registry.audits, process)
    process.kill()
    process.communicate()
    return Killed(run.info.run_id, registry.audits(), second)


@pytest.fixture(scope="module")
def first(registry, killed, tmp_path_factory):
    """The scan that goes on from there: its process, summary, folder of files, and what a notified program got."""
    folder = tmp_path_factory.mktemp("first")
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"
    command = shlex.join([sys.executable, "-c", code, str(folder / "notified")])
    done = registry.scan("--format", "json", "-o", folder, "--notify-command", command)
    assert done.returncode == FAIL, done.stderr
    return done, json.loads(done.stdout), folder


@pytest.fixture
def scan(cli, registry):
    """``scan(...)`` in this process, with the policy of the registry."""
    return lambda *arguments: cli("scan", "--policy", registry.policy, *arguments)


def outcomes(summary):
    return {f"{row['name']}/{row['version']}": row["outcome"] for row in summary["versions"]}


def wait_for(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not happen: {process.communicate()}")
        time.sleep(0.05)


def runs_of_scans(registry, status):
    experiment = registry.client.get_experiment_by_name("backdoor-scans")
    return registry.client.search_runs([experiment.experiment_id], f"attributes.status = '{status}'") if experiment else []


# ------------------------------------------------------------------------------------------------------- one scan


def test_a_second_scan_does_not_begin(killed):
    assert killed.second.returncode == ERROR
    assert "Another scan of this registry is running: process" in killed.second.stderr
    assert killed.run_id in killed.second.stderr.replace("\n", "")


def test_a_killed_scan_goes_on_where_it_stopped(first, killed, registry):
    assert killed.published == ["models:/digits-evil/1"]  # the promoted one comes first
    assert registry.audits() == ["models:/digits-evil/1", "models:/digits/1", "models:/faces/1"]
    assert registry.client.get_run(killed.run_id).info.status == "KILLED"
    assert not runs_of_scans(registry, "RUNNING")


def test_every_version_gets_its_outcome(first):
    assert outcomes(first[1]) == {
        "digits-evil/1": "fail",
        "faces/1": "pass",
        "voices/1": "no clean images",
        f"{HOSTILE}/1": "error",
        "digits/1": "pass",
    }


def test_promoted_versions_come_first_then_the_newest(first):
    assert [row["name"] for row in first[1]["versions"]] == ["digits-evil", "faces", "voices", HOSTILE, "digits"]
    audited = [line for line in first[0].stderr.splitlines() if "earlier" not in line and " s)" in line]
    assert [line.split("models:/")[1].split("/")[0] for line in audited] == ["faces", "digits"]


def test_a_line_for_each_version_and_no_control_character(first):
    assert "\x1b" not in first[0].stderr
    assert "Traceback" not in first[0].stderr
    lines = [line for line in first[0].stderr.splitlines() if line[:1].isdigit()]
    assert [line.split(" ")[0] for line in lines] == [f"{number}/5" for number in range(1, 6)]


def test_verdicts_are_signed_on_their_versions(first, registry):
    keys = keys_from_environment(environment=registry.environment)
    for name, verdict in (("digits-evil", "fail"), ("faces", "pass")):
        tags = registry.client.get_model_version(name, "1").tags
        assert verify(tags[TAG_OF["verdict"]], keys).facts["verdict"] == tags["audit.verdict"] == verdict
    assert not registry.client.get_model_version("voices", "1").tags
    assert not registry.client.get_model_version(HOSTILE, "1").tags


def test_the_scan_is_a_run_with_figures_and_files(first, registry, tmp_path):
    _, summary, folder = first
    run = registry.client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    expected = {
        "found": 5,
        "audited": 2,
        "skipped": 1,
        "pass": 2,
        "fail": 1,
        "error": 1,
        "no_clean_images": 1,
        "newly_failing": 1,
    }
    assert expected.items() <= run.data.metrics.items()
    assert run.data.metrics["seconds"] > 0
    logged = mlflow.artifacts.download_artifacts(run_id=summary["run_id"], artifact_path="summary.json", dst_path=str(tmp_path))
    assert json.loads(Path(logged).read_text()) == json.loads((folder / "summary.json").read_text()) == summary
    page = (folder / "summary.html").read_text()
    assert "<img" not in page
    assert "<script" not in page
    assert f"/runs/{registry.client.get_model_version('digits-evil', '1').tags['audit.run_id']}" in page


def test_the_promoted_version_that_newly_fails_is_told_once(first):
    _, summary, folder = first
    told = json.loads((folder / "notified").read_text())
    assert [version["uri"] for version in told["versions"]] == ["models:/digits-evil/1"]
    assert told["versions"][0]["suspected_class"] == "7"
    assert told["scan_run_id"] == summary["run_id"]


# ------------------------------------------------------------------------------------------------------- later scans


def test_the_next_scan_audits_nothing_and_says_the_same(first, registry, scan, tmp_path):
    audits = registry.audits()
    assert audits == ["models:/digits-evil/1", "models:/digits/1", "models:/faces/1"]
    command = shlex.join([sys.executable, "-c", f"open({str(tmp_path / 'told')!r}, 'w')"])
    done = scan("--format", "json", "--notify-command", command)
    summary = json.loads(done.stdout)
    assert (done.returncode, outcomes(summary)) == (FAIL, outcomes(first[1]))
    assert (summary["metrics"]["audited"], summary["metrics"]["skipped"]) == (0, 3)
    assert not any(summary["drift"].values())
    assert registry.audits() == audits
    assert not (tmp_path / "told").exists()


def test_known_failures_do_not_fail_a_scan_that_fails_on_new_ones(first, scan):
    assert scan("--fail-on", "new").returncode == ERROR  # the version that cannot be audited
    assert scan("--fail-on", "new", "--promoted", "--dry-run").returncode == PASS


def test_what_changed_is_audited_again_and_nothing_else(first, registry, scan):
    note = registry.folder / "artifacts" / "models" / "4" / "README.md"
    note.write_text("A note")
    try:
        plan = json.loads(scan("--dry-run", "--format", "json").stdout)
        assert [name for name, outcome in outcomes(plan).items() if outcome == "pending"] == ["faces/1"]
        done = scan("--limit", "0", "--filter", "name = 'faces'")
        assert (done.returncode, "left for a later scan by --limit" in done.stdout) == (INCONCLUSIVE, True)
    finally:
        note.unlink()
    plan = json.loads(scan("--dry-run", "--format", "json").stdout)
    assert outcomes(plan)["faces/1"] == "pass"


def test_a_version_that_was_refused_is_tried_again_once_its_input_tags_change_and_after_all_others(first, registry, scan):
    assert outcomes(json.loads(scan("--dry-run", "--format", "json").stdout))[f"{HOSTILE}/1"] == "error"
    registry.client.set_model_version_tag(HOSTILE, "1", "audit.input.mean", "0.5")
    try:
        plan = json.loads(scan("--dry-run", "--format", "json").stdout)
        assert [name for name, outcome in outcomes(plan).items() if outcome == "pending"] == [f"{HOSTILE}/1"]
        plan = json.loads(scan("--dry-run", "--again", "--limit", "3", "--format", "json").stdout)
        assert [row["name"] for row in plan["versions"] if "--limit" in row["reason"]] == [HOSTILE]
    finally:
        registry.client.delete_model_version_tag(HOSTILE, "1", "audit.input.mean")


def test_an_inconclusive_version_is_audited_again_once_its_input_tags_change(first, registry, scan):
    def pending(tags):
        version = registry.client.get_model_version("digits", "1")
        held = verify(version.tags[TAG_OF["verdict"]], keys_from_environment(environment=registry.environment))
        facts = {**held.facts, "verdict": "inconclusive"}
        added = registry.add("digits-unsure", tags=tags)
        statement = dataclasses.replace(
            held,
            name="digits-unsure",
            version=str(added.version),
            digest=digest_of(manifest_of(registry.files_of(added))),
            version_created=facts_of(added).created,
            facts=facts,
            tags={**held.tags, "audit.verdict": "inconclusive"},
        )
        put_statement(statement, signer_from_environment())
        plan = json.loads(scan("--dry-run", "--format", "json", "--filter", "name = 'digits-unsure'").stdout)
        return outcomes(plan)[f"digits-unsure/{added.version}"] == "pending"

    assert not pending({})
    assert pending({"audit.input.mean": "0.5"})


def test_a_forged_verdict_is_not_believed(first, registry, scan):
    signed = registry.client.get_model_version("digits", "1").tags
    registry.add("digits-forged", tags={key: value for key, value in signed.items() if key.startswith("audit.")})
    plan = json.loads(scan("--dry-run", "--format", "json", "--filter", "name = 'digits-forged'").stdout)
    assert outcomes(plan) == {"digits-forged/1": "pending"}


def test_without_keys_nothing_is_believed(first, scan, monkeypatch):
    monkeypatch.delenv(VERIFYING_KEYS)
    done = scan("--dry-run", "--filter", "name LIKE 'digits%'")
    assert "pass" not in done.stdout
    assert "Without BACKDOOR_AUDIT_VERIFYING_KEYS no earlier audit can be believed" in done.stdout


def test_a_dry_run_writes_nothing(first, registry, scan):
    before = len(runs_of_scans(registry, "FINISHED")), len(registry.audits())
    assert scan("--dry-run", "--again").returncode == PASS
    assert (len(runs_of_scans(registry, "FINISHED")), len(registry.audits())) == before


def test_an_empty_scope_is_no_success(registry, scan):
    assert scan("--filter", "name = 'nobody'").returncode == INCONCLUSIVE
    assert scan("--since", "0m").returncode == PASS


@pytest.mark.parametrize(
    "wrong",
    [["--since", "soon"], ["--since", "2999-01-01"], ["--filter", "color = 1"], ["--notify-command", "'"], ["--fail-on", "x"]],
)
def test_a_wrong_option_is_one_line(registry, scan, wrong):
    done = scan(*wrong)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_a_server_that_does_not_answer_is_an_error(registry, scan):
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        done = scan()
    finally:
        mlflow.set_tracking_uri(registry.address)
    assert done.returncode == ERROR
    assert "does not answer" in done.stderr


# ----------------------------------------------------------------------------------------------------- stopped, locked


def test_sigterm_ends_a_scan_in_order(registry):
    registry.add("digits-stopped")
    before = len(runs_of_scans(registry, "KILLED"))
    process = registry.start("--filter", "name = 'digits-stopped'")
    wait_for(lambda: runs_of_scans(registry, "RUNNING"), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (ERROR, ""), err
    assert "Interrupted after 0 of 1 versions" in err
    assert "Traceback" not in err
    assert len(runs_of_scans(registry, "KILLED")) == before + 1
    assert "models:/digits-stopped/1" not in registry.audits()


@pytest.mark.slow
def test_of_scans_that_begin_at_the_same_moment_one_goes_on(registry):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK],
            env=os.environ | registry.environment | {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = sorted(process.stdout.readline() for process in processes)
        assert answers[0] == "holds\n"
        assert all(answer.startswith("refused Another scan") for answer in answers[1:])
        assert len(runs_of_scans(registry, "RUNNING")) == 1
    finally:
        for process in processes:
            process.communicate("end\n")
    assert not runs_of_scans(registry, "RUNNING")
