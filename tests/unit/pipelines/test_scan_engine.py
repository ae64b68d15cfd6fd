"""Who carries out the audits of a scan: every task comes back once, whatever its model does."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from mlflow.exceptions import MlflowException

from audit_plugin.errors import (
    AuditError,
    CleanSetError,
    IntakeError,
    RegistryError,
    SandboxError,
    SandboxLimitError,
    SubjectError,
)
from audit_plugin.policy import Policy
from pipelines.scan import engine
from pipelines.scan.engine import Finished, LocalEngine, Task, attempt, is_transient, with_retries


def task(number):
    return Task(f"models:/digits/{number}", "clean.npz", Policy())


@pytest.fixture
def stop():
    return threading.Event()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(engine, "BACK_OFF_SECONDS", (0.0, 0.0))


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        chained(RegistryError("x"), ConnectionResetError()),
        chained(RegistryError("x"), requests.Timeout()),
        chained(RegistryError("x"), chained(MlflowException("x"), requests.ConnectionError())),
        chained(RegistryError("x"), MlflowException("x", error_code=2)),  # TEMPORARILY_UNAVAILABLE
        TimeoutError(),
    ],
)
def test_trouble_with_a_connection_is_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        RegistryError("There is none."),
        chained(RegistryError("x"), MlflowException("no such version")),
        chained(RegistryError("x"), FileNotFoundError()),
        chained(IntakeError("refused"), ConnectionResetError()),
        chained(SandboxError("too long"), TimeoutError()),
        RecursionError(),
    ],
)
def test_nothing_else_is(error):
    assert not is_transient(error)


def test_transient_trouble_is_tried_three_times_in_all(stop):
    calls = []

    def call():
        calls.append(1)
        raise chained(RegistryError("no answer"), ConnectionRefusedError())

    with pytest.raises(RegistryError, match="no answer"):
        with_retries(call, stop)
    assert len(calls) == 3


def test_it_may_get_better(stop):
    results = iter([ConnectionResetError(), None])

    def call():
        if (error := next(results)) is not None:
            raise error
        return "done"

    assert with_retries(call, stop) == "done"


def test_a_lasting_error_is_not_repeated(stop):
    calls = []

    def call():
        calls.append(1)
        raise RegistryError("There is no such version.")

    with pytest.raises(RegistryError):
        with_retries(call, stop)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [ValueError("\x1b[31mboo"), RecursionError(), MemoryError(), SystemExit(3), AuditError("no")])
def test_an_attempt_ends_whatever_is_raised(monkeypatch, stop, error):
    def examine(wanted, halt):
        raise error

    monkeypatch.setattr(engine, "examine", examine)
    finished = attempt(task(1), stop)
    assert finished.report is None
    assert finished.error
    assert "\x1b" not in finished.error
    assert finished.refused_digest is None


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (IntakeError("a pickle"), True),
        (SubjectError("a regression model"), True),
        (SandboxLimitError("longer than 60 seconds"), True),
        (SandboxError("no sandbox on this machine"), False),
        (CleanSetError("no images"), False),
    ],
)
def test_only_a_reason_that_lies_in_the_files_is_remembered(monkeypatch, stop, error, lasting):
    pinned = SimpleNamespace(reference=SimpleNamespace(digest="sha256:0"))

    def audit_pinned(*arguments, **options):
        raise error

    monkeypatch.setattr(engine, "pin", lambda uri, folder: pinned)
    monkeypatch.setattr("audit_plugin.publishing.audit_pinned", audit_pinned)
    finished = attempt(task(1), stop)
    assert finished.error == str(error)
    assert finished.refused_digest == ("sha256:0" if lasting else None)


def test_a_reason_shows_no_password(monkeypatch, stop):
    def examine(wanted, halt):
        raise RegistryError("http://user:secret@host does not answer")

    monkeypatch.setattr(engine, "examine", examine)
    assert attempt(task(1), stop).error == "http://host does not answer"


def test_an_audit_without_a_server_is_an_error(monkeypatch, stop):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: f"http://127.0.0.1:{port}")
    monkeypatch.setattr("mlflow.get_registry_uri", lambda: f"http://127.0.0.1:{port}")
    finished = attempt(task(1), stop)
    assert "does not answer" in finished.error


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_task_comes_back_once(monkeypatch, stop, jobs):
    lock, running, most = threading.Lock(), 0, 0

    def slow(wanted, halt):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return Finished(wanted, 0.0, error="none")

    monkeypatch.setattr(engine, "attempt", slow)
    tasks = [task(number) for number in range(20)]
    uris = [finished.task.uri for finished in LocalEngine(jobs).run(tasks, stop)]
    assert sorted(uris) == sorted(wanted.uri for wanted in tasks)
    assert most == jobs
    if jobs == 1:
        assert uris == [wanted.uri for wanted in tasks]


def test_after_stop_nothing_new_begins(monkeypatch, stop):
    begun = []

    def first(wanted, halt):
        begun.append(wanted.uri)
        halt.wait(10)
        return Finished(wanted, 0.0, error="stopped")

    monkeypatch.setattr(engine, "attempt", first)
    threading.Timer(0.3, stop.set).start()
    assert list(LocalEngine(1).run([task(1), task(2)], stop)) == []
    assert begun == ["models:/digits/1"]


def test_no_task_is_no_work(stop):
    assert list(LocalEngine(2).run([], stop)) == []
