"""Many clients at once against the gate, on SQLite and, where one is named, on PostgreSQL."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, generate_keys, signer_from_environment
from audit_plugin.registry import pin, put_statement, statement_on, version_facts
from audit_plugin.requirements import load_requirements

POSTGRESQL = "BACKDOOR_AUDIT_TEST_POSTGRESQL"
_WITHOUT_POSTGRESQL = (
    f"needs a database of its own: {POSTGRESQL}=postgresql://postgres:audit@localhost/postgres, for example after "
    "docker run -d -e POSTGRES_PASSWORD=audit -p 5432:5432 postgres; and pip install 'psycopg[binary]'"
)


@pytest.fixture(
    scope="module",
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.skipif(not os.environ.get(POSTGRESQL), reason=_WITHOUT_POSTGRESQL)),
    ],
)
def gated(request, start_server, keeping_state, tmp_path_factory):
    """The address of a server with the gate; MLflow in this process speaks to it and has both keys."""
    folder = tmp_path_factory.mktemp("loaded")
    signing, verifying = generate_keys(folder / "keys")
    database = f"sqlite:///{folder}/mlflow.db" if request.param == "sqlite" else os.environ[POSTGRESQL]
    options = ["--backend-store-uri", database, "--registry-store-uri", f"audited+{database}"]
    with start_server(folder, *options, **{VERIFYING_KEYS: str(verifying)}) as address, keeping_state():
        mlflow.set_tracking_uri(address)
        os.environ |= {"MLFLOW_TRACKING_URI": address, SIGNING_KEY: str(signing), VERIFYING_KEYS: str(verifying)}
        yield address


def make_versions(client, name, folder):
    """A model whose version 1 passed its audit and whose version 2 was never audited."""
    experiment = client.get_experiment_by_name("models") or client.get_experiment(client.create_experiment("models"))
    client.create_registered_model(name)
    for content in ("audited", "not audited"):
        files = folder / f"{name}-{content}"
        files.mkdir()
        (files / "model.bin").write_text(content, encoding="utf-8")
        logged = client.create_logged_model(experiment.experiment_id)
        client.log_model_artifacts(logged.model_id, str(files))
        client.create_model_version(name, f"models:/{logged.model_id}", model_id=logged.model_id)
    digest = pin(f"models:/{name}/1", folder / f"pinned-{name}").reference.digest
    required = load_requirements(None)
    facts = {
        "verdict": "pass",
        "policy_digest": required.policy_digest,
        "promotion": {"allowed": True, "suite_digest": required.suite_digest},
    }
    statement = statement_on(version_facts(name, "1"), "verdict", digest, {"audit.verdict": "pass"}, facts)
    put_statement(statement, signer_from_environment())


@contextmanager
def conflicts_allowed():
    """MLflow looks and then writes: of two clients that set one alias at once, one can be told of a conflict, gate or no gate."""
    try:
        yield
    except MlflowException as error:
        if not any(
            word in error.message for word in ("UniqueViolation", "UNIQUE constraint", "StaleDataError", "database is locked")
        ):
            raise


@pytest.mark.parametrize(
    ("clients", "seconds"), [(8, 4.0), pytest.param(50, 60.0, marks=pytest.mark.slow)], ids=["a few", "fifty for a minute"]
)
@pytest.mark.timeout(600)
def test_many_clients_at_once_promote_nothing_wrong_and_lose_no_tag(gated, tmp_path, clients, seconds):
    names = [f"loaded-{clients}-{index}-{time.time_ns()}" for index in range(3)]
    for name in names:
        make_versions(MlflowClient(), name, tmp_path)
    ends, wrong, written, done = time.monotonic() + seconds, [], {}, [0] * clients
    barrier = threading.Barrier(clients)

    def one_client(number):
        client, rng = MlflowClient(), random.Random(number)
        barrier.wait()
        while time.monotonic() < ends:
            name = rng.choice(names)
            move = rng.randrange(5)
            if move == 0:
                with conflicts_allowed():
                    client.set_registered_model_alias(name, "champion", "1")
            elif move == 1:
                try:
                    client.set_registered_model_alias(name, "champion", "2")
                    wrong.append("version 2 got the alias")
                except MlflowException as error:
                    if error.error_code != "PERMISSION_DENIED":
                        raise
            elif move == 2:
                with conflicts_allowed():
                    client.delete_registered_model_alias(name, "champion")
            elif move == 3:
                key, value = (name, f"client-{number}"), str(done[number])
                client.set_model_version_tag(name, "1", key[1], value)
                written[key] = value
            elif (held := client.get_registered_model(name).aliases.get("champion")) not in (None, "1"):
                wrong.append(f"version {held} holds the alias")
            done[number] += 1

    with ThreadPoolExecutor(clients) as pool:
        for outcome in [pool.submit(one_client, number) for number in range(clients)]:
            outcome.result(timeout=seconds + 300)
    assert wrong == []
    assert min(done) > 0, "every client came through"
    client = MlflowClient()
    for name in names:
        tags = client.get_model_version(name, "1").tags
        assert {key: tags.get(key) for model, key in written if model == name} == {
            key: value for (model, key), value in written.items() if model == name
        }
        assert tags["audit.verdict"] == "pass"
