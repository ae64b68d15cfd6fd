"""The promotion gate inside a real MLflow server: what may be promoted, and every way around it that was thought of."""

from __future__ import annotations

import base64
import datetime
import json
import os
import re
import sqlite3
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin import registry
from audit_plugin.attestation import SIGNING_KEY, TAG_OF, VERIFYING_KEYS, Statement, generate_keys, sign, signer_from_environment
from audit_plugin.registry import pin, promote, put_statement
from audit_plugin.registry.registering import _new_version
from audit_plugin.requirements import load_requirements

pytestmark = pytest.mark.timeout(600)

POLICY = """
[gate]
protected_aliases = ["champion", "production"]
maximum_age_days = 30

[scoring]
checks = ["layerwise", "activation_norm"]

[source_specific]
steps = 60

[canaries]
families = []
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return generate_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "audit.toml"
    file.write_text(POLICY, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gated")


@pytest.fixture(scope="module")
def gated(start_server, keeping_state, folder, keys, policy):
    """The address of a server with the gate; MLflow in this process speaks to it, and has the signing key."""
    settings = {"BACKDOOR_AUDIT_POLICY": str(policy), VERIFYING_KEYS: str(keys[1])}
    with (
        start_server(folder, "--registry-store-uri", f"audited+sqlite:///{folder}/mlflow.db", **settings) as address,
        keeping_state(),
    ):
        mlflow.set_tracking_uri(address)
        os.environ |= {"MLFLOW_TRACKING_URI": address, SIGNING_KEY: str(keys[0]), VERIFYING_KEYS: str(keys[1])}
        yield address


@pytest.fixture(scope="module")
def client(gated):
    return MlflowClient()


@pytest.fixture
def signer(keys):
    return signer_from_environment({SIGNING_KEY: str(keys[0])})


@pytest.fixture
def make_version(client, tmp_path, request):
    """``make_version()``: a version of a registered model named after the test; to the gate any file will do."""
    name = re.sub(r"[^a-zA-Z0-9_]+", "-", request.node.name)

    def make(name=name, content=b"weights", files=None, **settings):
        if files is None:
            files = tmp_path / f"files-{len(list(tmp_path.iterdir()))}"
            files.mkdir()
            (files / "model.bin").write_bytes(content)
        experiment = client.get_experiment_by_name("models") or client.get_experiment(client.create_experiment("models"))
        logged = client.create_logged_model(experiment.experiment_id)
        client.log_model_artifacts(logged.model_id, str(files))
        client.finalize_logged_model(logged.model_id, "READY")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        return client.create_model_version(name, f"models:/{logged.model_id}", model_id=logged.model_id, **settings)

    return make


@pytest.fixture
def attest(policy, signer, tmp_path):
    """``attest(version)`` signs that a version passed its audit, and writes that on it."""
    required = load_requirements(policy)

    def make(version, write=True, digest=None, **facts):
        place = tmp_path / f"pinned-{len(list(tmp_path.iterdir()))}"
        digest = digest or pin(f"models:/{version.name}/{version.version}", place).reference.digest
        facts = {
            "verdict": "pass",
            "policy_digest": required.policy_digest,
            "promotion": {"allowed": True, "suite_digest": required.suite_digest},
            **facts,
        }
        tags = {"audit.verdict": facts["verdict"], "audit.digest": digest}
        on = registry.version_facts(version.name, str(version.version))
        statement = registry.statement_on(on, "verdict", digest, tags, facts)
        if write:
            put_statement(statement, signer)
        return sign(statement, signer)

    return make


def refused(call, *words):
    """The message of a refusal, which is HTTP 403 and holds these words."""
    with pytest.raises(MlflowException) as caught:
        call()
    assert caught.value.error_code == "PERMISSION_DENIED"
    for word in words:
        assert word in caught.value.message
    return caught.value.message


def alias_of(client, name, alias="champion"):
    return client.get_registered_model(name).aliases.get(alias)


# ------------------------------------------------------------------------------------------------------- the rule


def test_an_audited_version_gets_the_alias_and_the_stage(client, make_version, attest):
    version = make_version()
    attest(version)
    client.set_registered_model_alias(version.name, "champion", version.version)
    client.transition_model_version_stage(version.name, version.version, "Production")
    assert alias_of(client, version.name) == version.version
    assert client.get_model_version(version.name, version.version).current_stage == "Production"


def test_a_version_without_audit_gets_neither(client, make_version):
    version = make_version()
    message = refused(
        lambda: client.set_registered_model_alias(version.name, "champion", version.version),
        f"models:/{version.name}/1 may not get the alias 'champion'",
        "no signed audit",
        f"Run: backdoor-audit gate models:/{version.name}/1 --clean IMAGES",
    )
    assert "\n" not in message
    refused(lambda: client.transition_model_version_stage(version.name, version.version, "production"), "the stage 'production'")
    assert alias_of(client, version.name) is None
    assert client.get_model_version(version.name, version.version).current_stage == "None"


def test_other_aliases_and_stages_are_free(client, make_version):
    version = make_version()
    client.set_registered_model_alias(version.name, "challenger", version.version)
    client.transition_model_version_stage(version.name, version.version, "Staging")
    client.set_model_version_tag(version.name, version.version, "owner", "vision team")
    client.set_model_version_tag(version.name, version.version, "audit.input.mean", "0.5")
    client.update_model_version(version.name, version.version, "a description")
    client.delete_model_version_tag(version.name, version.version, "owner")
    assert alias_of(client, version.name, "challenger") == version.version


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"verdict": "fail"}, "Its audit says 'fail'"),
        ({"verdict": "inconclusive"}, "Its audit says 'inconclusive'"),
        ({"policy_digest": "sha256:old"}, "another policy"),
        ({"promotion": {"allowed": False}}, "promotion suite"),
    ],
)
def test_an_audit_that_does_not_do_is_refused(client, make_version, attest, facts, words):
    version = make_version()
    attest(version, **facts)
    refused(lambda: client.set_registered_model_alias(version.name, "champion", version.version), words)


def test_an_expired_audit_is_refused(client, make_version, attest, keys, folder, policy, start_server, tmp_path):
    """The same registry under a policy by which every audit is too old after a moment."""
    version = make_version()
    attest(version)
    strict = tmp_path / "audit.toml"
    strict.write_text(POLICY.replace("maximum_age_days = 30", "maximum_age_days = 1e-6"), encoding="utf-8")
    settings = {"BACKDOOR_AUDIT_POLICY": str(strict), VERIFYING_KEYS: str(keys[1])}
    with start_server(tmp_path, "--registry-store-uri", f"audited+sqlite:///{folder}/mlflow.db", **settings) as address:
        other = MlflowClient(tracking_uri=address, registry_uri=address)
        refused(lambda: other.set_registered_model_alias(version.name, "champion", version.version), "days old; at most 1e-06")
    client.set_registered_model_alias(version.name, "champion", version.version)


# --------------------------------------------------------------------------------------------------- ways around


@pytest.mark.parametrize("prefix", ["api", "ajax-api"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("registered-models/alias", {"alias": "champion", "version": "1"}),
        ("model-versions/transition-stage", {"version": "1", "stage": "Production", "archive_existing_versions": False}),
        ("model-versions/set-tag", {"version": "1", "key": "audit.verdict", "value": "pass"}),
    ],
)
def test_rest_and_the_paths_of_the_ui_answer_403(gated, make_version, prefix, path, body):
    version = make_version()
    answer = requests.post(f"{gated}/{prefix}/2.0/mlflow/{path}", json={"name": version.name, **body}, timeout=30)
    assert answer.status_code == 403
    assert answer.json()["error_code"] == "PERMISSION_DENIED"


@pytest.mark.parametrize("alias", ["Champion", "CHAMPION", "cHaMpIoN"])
def test_casing_does_not_help(client, make_version, alias):
    version = make_version()
    refused(lambda: client.set_registered_model_alias(version.name, alias, version.version), alias)


def test_tags_cannot_be_forged(client, make_version, attest, keys, tmp_path):
    version = make_version()
    foreign = signer_from_environment({SIGNING_KEY: str(generate_keys(tmp_path / "foreign")[0])})
    statement = Statement("verdict", version.name, "1", "sha256:00", datetime.datetime.now(datetime.UTC))
    good = attest(make_version(name=f"{version.name}-other"), write=False)
    document = json.loads(good)
    payload = json.loads(base64.b64decode(document["payload"]))
    payload["subject"][0]["name"], payload["predicate"]["model"]["name"] = f"models:/{version.name}/1", version.name
    document["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    for key, value in (
        ("audit.verdict", "pass"),
        ("Audit.Verdict", "pass"),
        ("audit.anything", "x"),
        (TAG_OF["verdict"], "pass"),
        (TAG_OF["verdict"], sign(statement, foreign)),
        (TAG_OF["verdict"], good),  # another version's
        (TAG_OF["verdict"], json.dumps(document)),  # another version's, readdressed
        (TAG_OF["waiver"], good),
    ):
        refused(lambda key=key, value=value: client.set_model_version_tag(version.name, "1", key, value), "backdoor-audit")
    refused(lambda: client.set_registered_model_tag(version.name, "audit.verdict", "pass"))
    assert client.get_model_version(version.name, "1").tags == {}
    assert client.get_registered_model(version.name).tags == {}


def test_tags_at_creation_are_left_out(client, make_version):
    version = make_version(tags={"audit.verdict": "pass", "audit.classes": '["a"]', "owner": "me"})
    assert client.get_model_version(version.name, version.version).tags == {"audit.classes": '["a"]', "owner": "me"}
    client.create_registered_model(f"{version.name}-2", tags={"audit.verdict": "pass", "owner": "me"})
    assert client.get_registered_model(f"{version.name}-2").tags == {"owner": "me"}


def test_a_copy_must_earn_its_own_verdict(client, make_version, attest):
    version = make_version()
    attest(version)
    note = "<!-- backdoor-audit -->\n### Backdoor audit: PASS\n<!-- /backdoor-audit -->"
    client.update_model_version(version.name, "1", f"Ours.\n\n{note}")
    copy = client.copy_model_version(f"models:/{version.name}/1", f"{version.name}-copy")
    assert client.get_model_version(copy.name, copy.version).description == "Ours."
    assert not any(key.startswith("audit.") for key in client.get_model_version(copy.name, copy.version).tags)
    refused(lambda: client.set_registered_model_alias(copy.name, "champion", copy.version), "no signed audit")
    refused(
        lambda: client.set_model_version_tag(
            copy.name, "1", TAG_OF["verdict"], client.get_model_version(version.name, "1").tags[TAG_OF["verdict"]]
        )
    )
    attest(copy)
    client.set_registered_model_alias(copy.name, "champion", copy.version)


def test_a_signed_verdict_can_be_neither_deleted_nor_turned_back(client, make_version, attest):
    version = make_version()
    older = attest(version, write=False)
    attest(version, verdict="fail")
    refused(lambda: client.delete_model_version_tag(version.name, "1", TAG_OF["verdict"]), "stays")
    refused(lambda: client.delete_model_version_tag(version.name, "1", "audit.verdict"), "stays")
    refused(lambda: client.set_model_version_tag(version.name, "1", TAG_OF["verdict"], older), "newer statement")
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "'fail'")


def test_deleting_and_making_anew_does_not_bring_an_old_verdict_back(client, make_version, attest):
    version = make_version()
    old = attest(version)
    client.set_registered_model_alias(version.name, "champion", "1")
    client.delete_registered_model(version.name)
    again = make_version()
    assert again.version == version.version
    assert alias_of(client, version.name) is None
    refused(lambda: client.set_model_version_tag(version.name, "1", TAG_OF["verdict"], old), "another version")
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "no signed audit")


def test_an_audited_or_promoted_model_keeps_its_name(gated, client, make_version, attest):
    version = make_version()
    attest(version)
    refused(lambda: client.rename_registered_model(version.name, f"{version.name}-2"), "audit.attestation")
    client.set_registered_model_alias(version.name, "champion", "1")
    # A prompt as the latest version hid the promoted one from an earlier gate.
    tags = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
    post(gated, "model-versions/create", name=version.name, source="dummy-source", tags=tags).raise_for_status()
    answer = requests.post(
        f"{gated}/api/2.0/mlflow/registered-models/rename",
        json={"name": version.name, "new_name": f"{version.name}-2"},
        timeout=30,
    )
    assert (answer.status_code, "champion" in answer.text) == (403, True)


def test_another_model_can_be_renamed_and_keeps_its_alias(client, make_version):
    version = make_version()
    client.set_registered_model_alias(version.name, "challenger", "1")
    client.set_model_version_tag(version.name, "1", "owner", "me")
    client.rename_registered_model(version.name, f"{version.name}-2")
    assert alias_of(client, f"{version.name}-2", "challenger") == "1"
    assert client.get_model_version(f"{version.name}-2", "1").tags == {"owner": "me"}


def test_the_name_of_a_promoted_model_cannot_be_taken_over(client, make_version, attest):
    good, bad = make_version(), make_version(name="take-over-bad")
    attest(good)
    client.set_registered_model_alias(good.name, "champion", "1")
    client.delete_registered_model(good.name)
    client.rename_registered_model(bad.name, good.name)
    assert alias_of(client, good.name) is None


def post(gated, path, **body):
    """A request by hand: MLflow's client refuses some of these itself."""
    return requests.post(f"{gated}/api/2.0/mlflow/{path}", json=body, timeout=30)


def test_a_source_that_two_readers_could_read_differently_is_refused(gated, client, make_version, attest, folder):
    """Behind '#' one reader of the address sees a part of it, another a folder's name."""
    version = make_version()
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    for ending in ("#x", "?x", ";x", "%23x", "/../x"):
        odd = make_version()
        with sqlite3.connect(folder / "mlflow.db") as connection:  # the server itself takes none of these today
            connection.execute(
                "UPDATE model_versions SET storage_location = ? WHERE name = ? AND version = ?",
                (location + ending, odd.name, int(odd.version)),
            )
        attest(odd, digest="sha256:00")
        refused(lambda odd=odd: client.set_registered_model_alias(odd.name, "champion", odd.version), "artifact location")


def test_calling_a_model_a_prompt_does_not_help(gated, client, make_version):
    """Tag, promotion, tag taken away again: this worked against a gate that believed the tag."""
    version = make_version()
    tag = {"name": version.name, "key": "mlflow.prompt.is_prompt", "value": "true"}
    post(gated, "registered-models/set-tag", **tag).raise_for_status()
    post(gated, "model-versions/set-tag", version="1", **tag).raise_for_status()
    answer = post(gated, "registered-models/alias", name=version.name, alias="champion", version="1")
    assert (answer.status_code, "no signed audit" in answer.text) == (403, True)


def test_a_real_prompt_may_have_any_alias(gated):
    mlflow.genai.register_prompt("greeting", "Hello {{name}}")
    mlflow.genai.set_prompt_alias("greeting", alias="production", version=1)
    assert mlflow.genai.load_prompt("prompts:/greeting@production").version == 1


def test_what_is_let_through_as_a_prompt_has_no_files_that_anybody_could_load(gated):
    tags = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
    post(gated, "registered-models/create", name="empty", tags=tags).raise_for_status()
    post(gated, "model-versions/create", name="empty", source="dummy-source", tags=tags).raise_for_status()
    assert post(gated, "registered-models/alias", name="empty", alias="champion", version="1").status_code == 200
    with pytest.raises(MlflowException):
        mlflow.pyfunc.load_model("models:/empty@champion")


@pytest.mark.parametrize("change", ["overwritten", "added", "removed"])
def test_changed_artifacts_are_refused(gated, client, make_version, attest, change):
    version = make_version()
    attest(version)
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    path = f"{gated}/api/2.0/mlflow-artifacts/artifacts/{location.removeprefix('mlflow-artifacts:/')}"
    calls = {
        "overwritten": lambda: requests.put(f"{path}/model.bin", data=b"weightz", timeout=30),
        "added": lambda: requests.put(f"{path}/code/loader.py", data=b"print()", timeout=30),
        "removed": lambda: requests.delete(f"{path}/model.bin", timeout=30),
    }
    calls[change]().raise_for_status()
    words = "cannot be compared" if change == "removed" else "changed after the audit"
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), words)


def test_a_link_among_the_files_is_refused(client, make_version, attest, folder):
    version = make_version()
    attest(version)
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    files = folder / "artifacts" / location.removeprefix("mlflow-artifacts:/")
    (files / "code").symlink_to("/etc")
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "A link lies among its files: 'code'")


def test_an_alias_set_elsewhere_does_not_move_by_itself(client, make_version, attest):
    first = make_version()
    attest(first)
    client.set_registered_model_alias(first.name, "champion", "1")
    second = make_version(content=b"evil")
    refused(lambda: client.set_registered_model_alias(first.name, "champion", second.version), "no signed audit")
    assert alias_of(client, first.name) == "1"
    client.delete_model_version(first.name, "1")
    assert alias_of(client, first.name) is None


# ------------------------------------------------------------------------------------------------ the command line


def test_a_waiver_works_shows_and_can_be_revoked(cli, client, make_version, policy):
    version = make_version()
    uri = f"models:/{version.name}/1"
    waived = cli("waive", uri, "--by", "Ada Lovelace", "--reason", "Outage 4711", "--days", "2")
    assert waived.returncode == 0, waived.stderr
    client.set_registered_model_alias(version.name, "champion", "1")
    assert "Ada Lovelace: Outage 4711" in client.get_model_version(version.name, "1").tags["audit.waived"]
    found = cli("verify", uri, "--policy", policy)
    assert found.returncode == 0
    assert found.stdout.startswith(f"WAIVED  {uri}\n  waiver of Ada Lovelace until 2")
    assert "no signed audit" in found.stdout
    client.delete_registered_model_alias(version.name, "champion")
    assert cli("waive", uri, "--by", "Ada", "--reason", "over", "--revoke", "--policy", "gone.toml").returncode == 0
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "no signed audit")
    assert client.get_model_version(version.name, "1").tags["audit.waived"].startswith("revoked")


def test_a_waiver_that_is_too_long_is_refused_and_does_not_work(cli, client, make_version, tmp_path):
    version = make_version()
    waive = ["waive", f"models:/{version.name}/1", "--by", "Ada", "--reason", "x", "--days", "8"]
    told = cli(*waive)
    assert told.returncode == 4
    assert "maximum_waiver_days (7)" in told.stderr
    assert "audit.waived" not in client.get_model_version(version.name, "1").tags
    lax = tmp_path / "lax.toml"
    lax.write_text("[gate]\nmaximum_waiver_days = 9", encoding="utf-8")
    assert cli(*waive, "--policy", lax).returncode == 0  # the registry's policy decides
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "no signed audit")


def test_a_waiver_is_of_these_files_alone(gated, cli, client, make_version):
    version = make_version()
    assert cli("waive", f"models:/{version.name}/1", "--by", "Ada", "--reason", "x").returncode == 0
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    path = f"{gated}/api/2.0/mlflow-artifacts/artifacts/{location.removeprefix('mlflow-artifacts:/')}"
    requests.put(f"{path}/model.bin", data=b"other", timeout=30).raise_for_status()
    refused(lambda: client.set_registered_model_alias(version.name, "champion", "1"), "no signed audit")


def test_verify_tells_apart_what_happened(gated, cli, client, make_version, attest, policy):
    version = make_version()
    uri = f"models:/{version.name}/1"
    assert cli("verify", uri, "--policy", policy).returncode == 3, "not audited"
    attest(version)
    passed = cli("verify", uri, "--policy", policy, "--format", "json")
    assert passed.returncode == 0
    assert json.loads(passed.stdout)["allowed"] is True
    assert cli("verify", uri, "--policy", policy).stdout.startswith(f"PASS  {uri}")
    other = Path(policy).with_name("other.toml")
    other.write_text(POLICY + "[verdict]\nminimum_outlier = 3.75\n", encoding="utf-8")
    assert cli("verify", uri, "--policy", other).returncode == 3, "another policy"
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    path = f"{gated}/api/2.0/mlflow-artifacts/artifacts/{location.removeprefix('mlflow-artifacts:/')}"
    requests.put(f"{path}/model.bin", data=b"other", timeout=30).raise_for_status()
    changed = cli("verify", uri, "--policy", policy)
    assert (changed.returncode, changed.stdout.split()[0]) == (1, "FAIL")
    assert "changed after the audit" in changed.stdout


def test_usage_errors_teach(cli, gated, make_version, monkeypatch, tmp_path):
    version = make_version()
    uri = f"models:/{version.name}/1"
    missing = cli("gate", uri)
    assert (missing.returncode, "--clean is missing" in missing.stderr) == (4, True)
    local = tmp_path / "model.onnx"
    local.write_bytes(b"x")
    for call in (["gate", local], ["verify", local], ["waive", local, "--by", "a", "--reason", "b"]):
        answer = cli(*call)
        assert (answer.returncode, "no version of a registered model" in answer.stderr) == (4, True)
    assert cli("waive", uri, "--by", " ", "--reason", "b").returncode == 4
    monkeypatch.delenv(SIGNING_KEY)
    unsigned = cli("waive", uri, "--by", "a", "--reason", "b")
    assert (unsigned.returncode, SIGNING_KEY in unsigned.stderr) == (4, True)
    monkeypatch.delenv(VERIFYING_KEYS)
    assert VERIFYING_KEYS in cli("verify", uri).stderr


def test_a_repaired_version_says_where_it_came_from_if_that_is_signed(client, make_version, monkeypatch):
    """What 'repair' and 'guard' write on the versions that they make, in a registry that takes no unsigned tags."""
    original = make_version()
    origin = {"audit.repaired_from": f"models:/{original.name}/1"}

    def repaired():
        logged = original.source.removeprefix("models:/")
        uri = _new_version(client, original.name, "repaired", origin, lambda *ids: logged, {"audit.classes": '["a"]'})
        return client.get_model_version(original.name, uri.rsplit("/", 1)[1]).tags

    tags = repaired()
    assert TAG_OF["origin"] in tags
    assert {key: value for key, value in tags.items() if key != TAG_OF["origin"]} == {**origin, "audit.classes": '["a"]'}
    monkeypatch.delenv(SIGNING_KEY)
    assert repaired() == {"audit.classes": '["a"]'}


def test_without_keys_or_with_a_broken_policy_nothing_is_promoted(make_version, attest, folder, start_server, tmp_path):
    version = make_version()
    attest(version)
    with start_server(tmp_path, "--registry-store-uri", f"audited+sqlite:///{folder}/mlflow.db") as address:
        other = MlflowClient(tracking_uri=address, registry_uri=address)
        refused(lambda: other.set_registered_model_alias(version.name, "champion", "1"), "No verifying keys")
    broken = tmp_path / "audit.toml"
    broken.write_text("[gates]\n", encoding="utf-8")
    from mlflow_plugins.entry import audited_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKDOOR_AUDIT_POLICY", str(broken))
        with pytest.raises(MlflowException, match=r"The promotion gate cannot start: .*Did you mean 'gate'"):
            audited_store("audited+sqlite:///nowhere.db")


@pytest.mark.slow
def test_promotion_is_refused_and_allowed_as_the_demo_shows(gated, server, client, demo, make_version, cli, policy, tmp_path):
    """From registration to promotion: the whole of what a CI pipeline does."""
    uris = []
    for name, source in zip(("gate-clean", "gate-backdoored"), demo.model_uris, strict=True):
        mlflow.set_tracking_uri(server)
        files = pin(source, tmp_path / name).folder
        mlflow.set_tracking_uri(gated)
        uris.append(f"models:/{name}/{make_version(name=name, files=files).version}")
    options = ["--clean", demo.clean_images, "--policy", policy, "--promote", "champion"]
    passed, failed = (cli("gate", uri, *options) for uri in uris)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "PASS" in passed.stdout
    assert alias_of(client, "gate-clean") == "1"
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert alias_of(client, "gate-backdoored") is None
    refused(lambda: client.set_registered_model_alias("gate-backdoored", "champion", "1"), "Its audit says 'fail'")
    assert client.get_model_version("gate-backdoored", "1").tags["audit.suspected_class"] == "7"
    tags = client.get_model_version("gate-clean", "1").tags
    assert tags["audit.verdict"] == "pass"
    assert client.get_run(tags["audit.run_id"]).info.status == "FINISHED"
    # No second audit, no images needed, and the reports are those that were signed.
    report = tmp_path / "report"
    again = [
        cli("gate", uri, "--policy", policy, "-o", report / str(index), "--format", "text,sarif,junit")
        for index, uri in enumerate(uris)
    ]
    assert [answer.returncode for answer in again] == [0, 1]
    assert {file.name for file in (report / "1").iterdir()} == {"report.txt", "report.sarif.json", "junit.xml"}
    client.log_text(tags["audit.run_id"], "<testsuites/>", "junit.xml")
    forged = cli("gate", uris[0], "--policy", policy, "-o", report / "forged", "--format", "text,junit")
    assert (forged.returncode, "junit.xml" in forged.stderr) == (2, True)
    assert not (report / "forged").exists()
    promote("gate-clean", "1", "production")
