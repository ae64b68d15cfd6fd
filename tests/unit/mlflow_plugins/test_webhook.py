from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import logging
import sys
import time
from pathlib import Path

import pytest
from flask import Flask
from mlflow.webhooks.delivery import _generate_hmac_signature

from audit_plugin.errors import UsageError
from audit_plugin.policy import POLICY_VARIABLE
from mlflow_plugins import webhook
from mlflow_plugins.webhook import (
    MAXIMUM_BODY_BYTES,
    PATH,
    AuditJobs,
    Deliveries,
    Delivery,
    Hint,
    RefusedError,
    Submitted,
    create_app,
    secret_from_environment,
    start_jobs,
)

SECRET = "correct horse battery staple"
# Writes its arguments, one a line, at the end of the file that it gets first.
NOTE = "import sys; open(sys.argv[1], 'a').write(chr(10).join(sys.argv[2:]) + chr(10))"


def event(name="digits", version="3", **changes):
    data = {"name": name, "version": version, "source": "models:/m-1", "run_id": None, "tags": {}, "description": None}
    return {"entity": "model_version", "action": "created", "timestamp": "now", "data": data} | changes


def headers_for(body, identifier="d-1", age=0.0, secret=SECRET):
    timestamp = str(int(time.time() - age))
    digest = hmac.new(secret.encode(), f"{identifier}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": identifier,
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": "v1," + base64.b64encode(digest).decode(),
    }


def deliver(client, content=None, identifier="d-1", **how):
    body = content if isinstance(content, bytes) else json.dumps(content or event()).encode()
    return client.post(PATH, data=body, headers=headers_for(body, identifier, **how))


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def is_idle(jobs):
    return not jobs._pending


@pytest.fixture(autouse=True)
def visible_log(caplog):
    caplog.set_level(logging.INFO, logger="mlflow_plugins.webhook")


@pytest.fixture
def make_jobs():
    """``make_jobs(command_of, ...)``: jobs that are stopped after the test."""
    made = []

    def make(command_of, **settings):
        made.append(AuditJobs(command_of, **({"grace_seconds": 2.0} | settings)))
        return made[-1]

    yield make
    for jobs in made:
        jobs.stop()


@pytest.fixture
def notes(tmp_path):
    """Where the noting command writes which versions it was started for."""
    return tmp_path / "notes.txt"


@pytest.fixture
def jobs(make_jobs, notes):
    return make_jobs(lambda hint: [sys.executable, "-c", NOTE, str(notes), hint.uri])


@pytest.fixture
def client(jobs):
    return create_app(SECRET, jobs).test_client()


@pytest.fixture
def held(make_jobs, tmp_path):
    """Jobs that run until ``tmp_path / 'go'`` exists; one waits beside the one that runs."""
    script = "import os,sys,time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)"
    return make_jobs(lambda hint: [sys.executable, "-c", script, str(tmp_path / "go")], capacity=1)


# ------------------------------------------------------------------------------------------------------- deliveries


def test_a_signed_delivery_starts_one_job_for_exactly_that_version(client, jobs, notes):
    response = deliver(client, event("digits", "12"))
    assert (response.status_code, response.json) == (202, {"status": "queued"})
    wait_for(lambda: is_idle(jobs))
    assert notes.read_text() == "models:/digits/12\n"


def test_the_signature_is_mlflows_own():
    body = json.dumps(event()).encode()
    made = headers_for(body)
    assert made["X-MLflow-Signature"] == _generate_hmac_signature(SECRET, "d-1", made["X-MLflow-Timestamp"], body.decode())


def test_a_name_is_never_a_shells(client, jobs, notes):
    name = "$(touch pwned); `id` --clean 'x' \u202e\n"
    assert deliver(client, event(name)).status_code == 202
    wait_for(lambda: is_idle(jobs))
    assert notes.read_text() == f"models:/{name}/3\n"


def test_tags_and_source_of_the_payload_are_nobodys_business(client, jobs, notes):
    content = event()
    content["data"] |= {"tags": {"audit.verdict": "pass"}, "source": "models:/other/9", "clean": "/etc/passwd"}
    assert deliver(client, content).status_code == 202
    wait_for(lambda: is_idle(jobs))
    assert notes.read_text() == "models:/digits/3\n"


BODY = json.dumps(event()).encode()
GOOD = headers_for(BODY)


@pytest.mark.parametrize(
    ("body", "changes", "status", "words"),
    [
        (BODY, {"Content-Type": "text/plain"}, 415, "application/json"),
        (BODY, {"Content-Type": None}, 415, "application/json"),
        (b" " * (MAXIMUM_BODY_BYTES + 1), {}, 413, "at most 1048576 bytes"),
        (BODY, {"X-MLflow-Signature": None}, 401, "signature"),
        (BODY, {"X-MLflow-Signature": "v1,"}, 401, "signature"),
        (BODY, {"X-MLflow-Signature": GOOD["X-MLflow-Signature"].removeprefix("v1,")}, 401, "signature"),
        (BODY, {"X-MLflow-Signature": GOOD["X-MLflow-Signature"] + " "}, 401, "signature"),
        (BODY, {"X-MLflow-Signature": "v1,\xe4"}, 401, "signature"),
        (BODY, headers_for(BODY, secret="another secret of the same kind"), 401, "signature"),
        (BODY, headers_for(BODY, secret=""), 401, "signature"),
        (BODY.replace(b"digits", b"digitz"), GOOD, 401, "signature"),
        (BODY, {"X-MLflow-Delivery-Id": "d-2"}, 401, "signature"),
        (BODY, {"X-MLflow-Delivery-Id": None}, 401, "id or timestamp"),
        (BODY, {"X-MLflow-Delivery-Id": "x" * 65}, 401, "id or timestamp"),
        (BODY, {"X-MLflow-Timestamp": None}, 401, "id or timestamp"),
        (BODY, {"X-MLflow-Timestamp": "-1"}, 401, "id or timestamp"),
        (BODY, {"X-MLflow-Timestamp": "9" * 13}, 401, "id or timestamp"),
    ],
)
def test_a_request_that_is_not_mlflows_is_refused(client, jobs, notes, body, changes, status, words):
    headers = headers_for(body) | changes
    response = client.post(PATH, data=body, headers={name: value for name, value in headers.items() if value is not None})
    assert response.status_code == status
    assert list(response.json) == ["error"]
    assert words in response.json["error"]
    assert len(response.data) < 200
    assert SECRET not in response.text
    assert is_idle(jobs)
    assert not notes.exists()


@pytest.mark.parametrize(("age", "status"), [(310, 401), (-310, 401), (270, 202), (-270, 202)])
def test_a_delivery_is_taken_for_five_minutes(client, age, status):
    response = deliver(client, age=age)
    assert response.status_code == status
    assert status == 202 or response.json == {"error": "The timestamp is more than 300 seconds off."}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'"model_version"',
        event(data=None),
        event(data=[]),
        event(data={"name": "digits"}),
        event(version=3),
        event(version="latest"),
        event(version="0"),
        event(version="3 "),
        event(version="3/../4"),
        event(version="\u0663"),
        event(version="9" * 11),
        event(name=None),
        event(name=["digits"]),
        event(name=""),
        event(name="  "),
        event(name="a/b"),
        event(name="a:b"),
        event(name="a\0b"),
        event(name="\ud800"),
        event(name="x" * 257),
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_signed_event_without_a_version_is_refused(client, jobs, content):
    response = deliver(client, content)
    assert response.status_code == 400
    assert list(response.json) == ["error"]
    assert is_idle(jobs)


def test_a_body_of_no_declared_length_is_not_read_to_its_end(client):
    endless = io.BytesIO(b" " * (MAXIMUM_BODY_BYTES + 100_000))
    response = client.open(
        PATH,
        method="POST",
        input_stream=endless,
        headers=headers_for(BODY),
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert response.status_code == 413
    assert endless.tell() <= MAXIMUM_BODY_BYTES + 65_536


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_only_post_is_allowed(client, method):
    response = client.open(PATH, method=method)
    assert (response.status_code, response.json) == (405, {"error": "Method Not Allowed"})
    assert "POST" in response.headers["Allow"]


def test_there_is_nothing_else(client):
    assert client.get("/").json == {"error": "Not Found"}


@pytest.mark.parametrize(
    ("entity", "action"),
    [("model_version_tag", "set"), ("model_version_alias", "created"), ("registered_model", "created"), (None, ["created"])],
)
def test_other_events_start_nothing(client, jobs, entity, action):
    response = deliver(client, event(entity=entity, action=action))
    assert (response.status_code, response.json) == (200, {"status": "ignored"})
    assert is_idle(jobs)


def test_another_workspace_starts_nothing(client, jobs, caplog, monkeypatch):
    assert deliver(client, event(workspace="team\x1b[2J")).json == {"status": "ignored"}
    assert r"workspace team\x1b[2J is not audited" in caplog.text
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team")
    assert deliver(client, event(workspace="team")).status_code == 202
    assert deliver(client, event(), identifier="d-2").json == {"status": "ignored"}


def test_a_replay_starts_nothing(client, jobs, notes):
    body = json.dumps(event()).encode()
    headers = headers_for(body)
    assert client.post(PATH, data=body, headers=headers).status_code == 202
    wait_for(lambda: is_idle(jobs))
    again = client.post(PATH, data=body, headers=headers)
    assert (again.status_code, again.json) == (200, {"status": "ignored"})
    assert is_idle(jobs)
    assert notes.read_text().count("models:") == 1


def test_a_delivery_is_remembered_while_its_timestamp_would_let_it_in():
    deliveries, early = Deliveries(), Delivery("a", 1300, b"")  # a clock that is 300 seconds ahead
    assert deliveries.take(early, now=1000)
    assert not deliveries.take(early, now=1000)
    assert not deliveries.take(early, now=1600)
    assert deliveries.take(early, now=1601)


def test_the_memory_of_deliveries_is_bounded_and_forgets_nothing_too_early():
    deliveries = Deliveries(capacity=2)
    assert deliveries.take(Delivery("a", 1000, b""), now=1000)
    assert deliveries.take(Delivery("b", 1200, b""), now=1000)
    with pytest.raises(RefusedError) as caught:
        deliveries.take(Delivery("c", 1000, b""), now=1000)
    assert caught.value.status == 503
    assert not deliveries.take(Delivery("a", 1000, b""), now=1000)
    assert deliveries.take(Delivery("c", 1400, b""), now=1400)


# ------------------------------------------------------------------------------------------------------------- jobs


def test_a_full_queue_is_503_and_the_same_delivery_may_come_again(held, tmp_path):
    client = create_app(SECRET, held).test_client()
    assert deliver(client, event(version="1"), "d-1").status_code == 202
    wait_for(lambda: held.queue_length == 0)  # it runs
    assert deliver(client, event(version="2"), "d-2").status_code == 202
    assert client.get(f"{PATH}/health").json == {"queue_length": 1}
    full = deliver(client, event(version="3"), "d-3")
    assert (full.status_code, full.headers["Retry-After"]) == (503, "30")
    assert list(full.json) == ["error"]
    (tmp_path / "go").touch()
    wait_for(lambda: is_idle(held))
    assert client.get(f"{PATH}/health").json == {"queue_length": 0}
    assert deliver(client, event(version="3"), "d-3").status_code == 202


def test_a_version_is_queued_once_while_it_waits_or_runs(held, tmp_path):
    client = create_app(SECRET, held).test_client()
    deliver(client, identifier="d-1")
    wait_for(lambda: held.queue_length == 0)
    running = deliver(client, identifier="d-2")
    assert (running.status_code, running.json) == (202, {"status": "pending"})
    deliver(client, event(version="4"), identifier="d-3")
    assert deliver(client, event(version="4"), identifier="d-4").json == {"status": "pending"}
    assert held.queue_length == 1
    (tmp_path / "go").touch()
    wait_for(lambda: is_idle(held))
    assert deliver(client, identifier="d-5").json == {"status": "queued"}


def test_so_many_run_at_a_time(make_jobs, tmp_path):
    script = "import pathlib,sys,time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    jobs = make_jobs(lambda hint: [sys.executable, "-c", script, str(tmp_path / hint.version)], workers=2)
    for version in "123":
        assert jobs.submit(Hint("digits", version)) is Submitted.QUEUED
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    assert jobs.queue_length == 1


def test_exit_code_and_last_line_are_logged_and_harmless(make_jobs, caplog):
    script = "import sys; sys.stderr.write('first\\nclass \\x1b[2J\\u202egpj\\n\\n'); sys.exit(3)"
    jobs = make_jobs(lambda hint: [sys.executable, "-c", script])
    jobs.submit(Hint("digits\x1b[31m", "3"))
    wait_for(lambda: is_idle(jobs))
    assert r"models:/digits\x1b[31m/3: the audit ended with exit code 3: class \x1b[2J\u202egpj" in caplog.text
    assert "\x1b" not in caplog.text
    assert "first" not in caplog.text


def test_the_secret_does_not_reach_the_audit(make_jobs, notes, monkeypatch):
    monkeypatch.setenv(webhook.SECRET, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    script = "import os,sys; open(sys.argv[1], 'w').write(repr(dict(os.environ)))"
    jobs = make_jobs(lambda hint: [sys.executable, "-c", script, str(notes)])
    jobs.submit(Hint("digits", "3"))
    wait_for(lambda: is_idle(jobs))
    assert "http://tracking" in notes.read_text()
    assert SECRET not in notes.read_text()


def test_what_cannot_be_audited_is_logged_and_the_next_version_is(make_jobs, notes, caplog):
    def command_of(hint):
        if hint.version == "1":
            raise UsageError("No pattern matches.")
        if hint.version == "2":
            raise RuntimeError("a mistake of ours")
        return [str(notes / "missing")] if hint.version == "3" else [sys.executable, "-c", NOTE, str(notes), hint.uri]

    jobs = make_jobs(command_of)
    for version in "1234":
        jobs.submit(Hint("digits", version))
    wait_for(lambda: is_idle(jobs))
    assert "models:/digits/1 is not audited: No pattern matches." in caplog.text
    assert "models:/digits/2 is not audited: RuntimeError: a mistake of ours" in caplog.text
    assert "models:/digits/3 is not audited: FileNotFoundError" in caplog.text
    assert notes.read_text() == "models:/digits/4\n"


def _is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# Ignores the interruption, and so does its own child; both pids go to the file.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid} ")
time.sleep(300)
"""

# Cleans up when interrupted.
POLITE = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).write_text("begun")
    time.sleep(300)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text("cleaned")
    print("error: Interrupted", file=sys.stderr)
    sys.exit(2)
"""


def test_a_job_that_takes_too_long_is_killed_with_all_its_processes(make_jobs, notes, caplog):
    jobs = make_jobs(lambda hint: [sys.executable, "-c", STUBBORN, str(notes)], time_limit_seconds=4, grace_seconds=0.3)
    jobs.submit(Hint("digits", "3"))
    pids = wait_for(lambda: notes.exists() and notes.read_text().split())
    wait_for(lambda: is_idle(jobs))
    assert len(pids) == 2
    wait_for(lambda: all(_is_gone(int(pid)) for pid in pids))
    assert "models:/digits/3 is not audited: it took longer than 4 seconds" in caplog.text


def test_a_job_is_asked_to_end_before_it_is_killed(make_jobs, notes, caplog):
    jobs = make_jobs(lambda hint: [sys.executable, "-c", POLITE, str(notes)], time_limit_seconds=4, grace_seconds=20)
    started = time.monotonic()
    jobs.submit(Hint("digits", "3"))
    wait_for(lambda: is_idle(jobs))
    assert notes.read_text() == "cleaned"
    assert time.monotonic() - started < 15
    assert "It said last: error: Interrupted" in caplog.text


def test_what_a_job_leaves_behind_is_killed_too(make_jobs, notes):
    script = "import subprocess,sys; open(sys.argv[1], 'w').write(str(subprocess.Popen(['sleep', '300']).pid))"
    jobs = make_jobs(lambda hint: [sys.executable, "-c", script, str(notes)])
    jobs.submit(Hint("digits", "3"))
    wait_for(lambda: is_idle(jobs))
    wait_for(lambda: _is_gone(int(notes.read_text())))


def test_stopping_ends_what_runs_and_names_what_waited(make_jobs, notes, caplog):
    jobs = make_jobs(lambda hint: [sys.executable, "-c", POLITE, str(notes)])
    for version in "123":
        jobs.submit(Hint("digits", version))
    wait_for(lambda: notes.exists() and notes.read_text() == "begun")
    jobs.stop()
    assert notes.read_text() == "cleaned"
    assert "models:/digits/1 is not audited: the receiver was stopped. It said last: error: Interrupted" in caplog.text
    assert "models:/digits/2 is not audited: the receiver was stopped." in caplog.text
    assert "models:/digits/3 is not audited: the receiver was stopped." in caplog.text
    assert jobs.submit(Hint("digits", "4")) is Submitted.FULL


# --------------------------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize(("secret", "words"), [(None, "is not set"), ("", "is not set"), ("short", "fewer than 16")])
def test_without_a_secret_nothing_starts(cli, monkeypatch, secret, words):
    monkeypatch.delenv(webhook.SECRET, raising=False)
    if secret is not None:
        monkeypatch.setenv(webhook.SECRET, secret)
    with pytest.raises(UsageError, match=words):
        secret_from_environment()
    done = cli("webhook", "serve")
    assert done.returncode == 4
    assert "BACKDOOR_AUDIT_WEBHOOK_SECRET" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [None, "", "[clean_images]\n"])
def test_without_clean_images_nothing_starts(cli, monkeypatch, tmp_path, content):
    monkeypatch.setenv(webhook.SECRET, SECRET)
    monkeypatch.delenv(POLICY_VARIABLE, raising=False)
    arguments = []
    if content is not None:
        (tmp_path / "audit.toml").write_text(content)
        arguments = ["--policy", tmp_path / "audit.toml"]
    done = cli("webhook", "serve", *arguments)
    assert done.returncode == 4
    assert '[clean_images] "digits" = "clean.npz"' in done.stderr
    assert SECRET not in done.stderr


def test_a_policy_that_cannot_be_read_is_told_at_the_start(tmp_path):
    (tmp_path / "audit.toml").write_text("[clean_image]\n")
    with pytest.raises(UsageError, match="Did you mean 'clean_images'"):
        start_jobs(tmp_path / "audit.toml")


def test_another_app_gets_the_routes_from_the_environment(monkeypatch, tmp_path):
    app = Flask("other")
    (tmp_path / "audit.toml").write_text('[clean_images]\n"*" = "clean.npz"\n')
    monkeypatch.setenv(POLICY_VARIABLE, str(tmp_path / "audit.toml"))
    monkeypatch.delenv(webhook.SECRET, raising=False)
    with pytest.raises(UsageError, match="is not set"):
        webhook.register(app)
    monkeypatch.setenv(webhook.SECRET, SECRET)
    webhook.register(app)
    client = app.test_client()
    assert client.get(f"{PATH}/health").json == {"queue_length": 0}
    assert deliver(client, secret="another secret of the same kind").status_code == 401
    assert deliver(client, event(entity="registered_model")).json == {"status": "ignored"}
