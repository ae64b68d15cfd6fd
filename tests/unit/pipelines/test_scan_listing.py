"""Which versions are in scope, and with which clean images: a tag may choose among what the policy offers, and no more."""

from __future__ import annotations

import datetime

import pytest
from mlflow import MlflowClient

from audit_plugin.errors import UsageError
from audit_plugin.gate import VersionFacts
from audit_plugin.policy import GatePolicy, policy_from
from pipelines.scan import listing
from pipelines.scan.listing import CLEAN_IMAGES_TAG, Found, Scope, clean_images_key, find_versions

NOW = datetime.datetime(2026, 6, 15, 12, tzinfo=datetime.UTC)
POLICY = policy_from({"clean_images": {"digits": "digits.npz", "cifar-*": "cifar.npz"}})
HIDING = "mlflow.prompt.is_prompt"


def found(name="digits", tags=None, model_tags=None):
    return Found(VersionFacts(name, "1", NOW, tags or {}), (), False, model_tags or {}, False, "mlflow-artifacts:/x")


@pytest.mark.parametrize(
    ("since", "begin"),
    [
        ("90m", NOW - datetime.timedelta(minutes=90)),
        ("7d", NOW - datetime.timedelta(days=7)),
        ("2w", NOW - datetime.timedelta(weeks=2)),
        ("2026-01-31", datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)),
        ("2026-01-31T10:00:00+02:00", datetime.datetime(2026, 1, 31, 8, tzinfo=datetime.UTC)),
    ],
)
def test_since(since, begin):
    assert Scope(since=since).begin(NOW) == begin


@pytest.mark.parametrize("since", ["", "7", "d", "-1d", "999999w", "yesterday", "2026-13-01"])
def test_since_that_is_no_time(since):
    with pytest.raises(UsageError, match="no time to scan from"):
        Scope(since=since)


def test_since_a_time_to_come_is_a_mistake():
    """Nothing would be in scope, and the scan would succeed."""
    with pytest.raises(UsageError, match="'2999-01-31' is yet to come"):
        Scope(since="2999-01-31")
    noon = datetime.datetime(2020, 6, 15, 12, tzinfo=datetime.UTC)
    assert Scope(since="2020-06-15T14:00:00+02:00").begin(noon) == noon
    for later in ("2020-06-16", "2020-06-15T12:00:01", "2020-06-15T12:00:00-01:00"):
        with pytest.raises(UsageError, match="is yet to come"):
            Scope(since=later).begin(noon)


def test_the_name_chooses_the_clean_images():
    assert clean_images_key(found("cifar-small"), POLICY) == "cifar-*"


def test_a_tag_wins_over_the_name_and_the_versions_over_the_models():
    assert clean_images_key(found("voices", model_tags={CLEAN_IMAGES_TAG: "digits"}), POLICY) == "digits"
    both = found("digits", {CLEAN_IMAGES_TAG: "cifar-*"}, {CLEAN_IMAGES_TAG: "digits"})
    assert clean_images_key(both, POLICY) == "cifar-*"


@pytest.mark.parametrize("value", ["/etc/passwd", "http://evil.example/clean.npz", "digits.npz", "cifar-small", ""])
def test_a_tag_names_a_key_and_never_a_place(value):
    with pytest.raises(UsageError, match="no key of the policy's"):
        clean_images_key(found(tags={CLEAN_IMAGES_TAG: value}), POLICY)


def test_a_model_that_nothing_matches_has_none():
    with pytest.raises(UsageError, match="matches 'voices'"):
        clean_images_key(found("voices"), POLICY)


# --------------------------------------------------------------------------------------------------- a real registry


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Models a, b with aliases and stages, a prompt, and models that pose as prompts."""
    database = f"sqlite:///{tmp_path_factory.mktemp('listing')}/mlflow.db"
    client = MlflowClient(database, database)
    for name, count in (("a", 3), ("b", 2)):
        client.create_registered_model(name)
        for _ in range(count):
            client.create_model_version(name, "mlflow-artifacts:/x")
    client.set_registered_model_alias("a", "champion", "1")
    client.set_registered_model_alias("a", "candidate", "2")
    client.transition_model_version_stage("b", "1", "Production")
    client.register_prompt("greeting", "Hello {{ name }}")
    client.create_registered_model("hidden")
    for _ in range(3):
        client.create_model_version("hidden", "mlflow-artifacts:/x")
    client.set_model_version_tag("hidden", "2", HIDING, "true")
    client.set_registered_model_tag("hidden", HIDING, "true")
    return client


def uris(client, **scope):
    return [entry.facts.uri.removeprefix("models:/") for entry in find_versions(client, Scope(**scope), GatePolicy())]


def test_promoted_versions_come_first_then_the_newest(client, monkeypatch):
    monkeypatch.setattr(listing, "_VERSIONS_A_PAGE", 2)
    monkeypatch.setattr(listing, "_MODELS_A_PAGE", 1)
    everything = uris(client)
    assert sorted(everything[:2]) == ["a/1", "b/1"]
    assert sorted(everything) == ["a/1", "a/2", "a/3", "b/1", "b/2", "hidden/1", "hidden/2", "hidden/3"]
    created = [entry.facts.created for entry in find_versions(client, Scope(), GatePolicy())[2:]]
    assert created == sorted(created, reverse=True)


def test_a_model_cannot_hide_as_a_prompt(client):
    posing = [entry.facts.uri for entry in find_versions(client, Scope(), GatePolicy()) if entry.poses_as_prompt]
    assert posing == ["models:/hidden/2"]


def test_scope(client):
    assert sorted(uris(client, promoted=True)) == ["a/1", "b/1"]
    assert uris(client, aliases=("candidate", "nobody")) == ["a/2"]
    assert uris(client, aliases=("candidate",), promoted=True) == []
    assert sorted(uris(client, filter="name = 'b'")) == ["b/1", "b/2"]
    assert uris(client, since="0m") == []
    assert len(uris(client, since="1h")) == 8


def test_a_filter_that_mlflow_does_not_understand_is_usage(client):
    with pytest.raises(UsageError, match="MLflow does not understand the filter"):
        uris(client, filter="color = 'red'")
