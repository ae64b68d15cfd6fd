"""Audits of many versions: what one task is, and who carries them out."""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import requests
from mlflow.exceptions import MlflowException

from audit_plugin.errors import AuditError, IntakeError, RegistryError, SandboxLimitError, SubjectError
from audit_plugin.policy import Policy
from audit_plugin.registry import pin, redacted
from audit_plugin.report.sanitise import clean_text
from audit_plugin.types import AuditReport

BACK_OFF_SECONDS = (2.0, 10.0)
_GRACE_SECONDS = 15.0
_LONGEST_REASON = 400
_IN_THE_FILES = (IntakeError, SubjectError, SandboxLimitError)  # another try would end alike
_PASSING = ("TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One version to audit, as plain data that can travel to another machine.

    ``uri`` is ``models:/name/version``; ``clean`` a path or artifact URI that whoever audits can read.
    """

    uri: str
    clean: str
    policy: Policy
    seed: int = 0
    allow_pickle: bool = False
    require_gpu: bool = False
    command: str = ""


@dataclass(frozen=True)
class Finished:
    """How a task ended: with a report, or with the reason why there is none.

    ``refused_digest`` is that of files which cannot be audited, for a reason that lies in them.
    """

    task: Task
    seconds: float
    report: AuditReport | None = None
    error: str = ""
    refused_digest: str | None = None


class Engine(Protocol):
    """Carries out tasks, and gives each back exactly once, in the order in which they end."""

    def run(self, tasks: Sequence[Task], stop: threading.Event) -> Generator[Finished]:
        """After ``stop`` nothing new begins, and what has not ended is given up."""


class _RefusedBytesError(AuditError):
    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


def examine(task: Task, stop: threading.Event) -> AuditReport:
    """Fetch and audit one version; whatever happens to it, nothing is written to MLflow.

    Raises:
        AuditError: it could not be audited.
    """
    from audit_plugin.publishing import audit_pinned

    with tempfile.TemporaryDirectory(prefix="backdoor-audit-") as temporary:
        pinned = pin(task.uri, Path(temporary))
        try:
            return audit_pinned(
                pinned,
                task.clean,
                policy=task.policy,
                seed=task.seed,
                allow_pickle=task.allow_pickle,
                require_gpu=task.require_gpu,
                command=task.command,
                stop=stop,
            )
        except _IN_THE_FILES as error:
            raise _RefusedBytesError(str(error), pinned.reference.digest) from error


def attempt(task: Task, stop: threading.Event) -> Finished:
    """:func:`examine`, which ends well or badly but always ends: a model can make it raise anything."""
    started = time.monotonic()
    try:
        report = with_retries(lambda: examine(task, stop), stop)
    except (Exception, SystemExit) as error:
        digest = error.digest if isinstance(error, _RefusedBytesError) else None
        return Finished(task, time.monotonic() - started, error=reason_of(error), refused_digest=digest)
    return Finished(task, time.monotonic() - started, report)


def with_retries(call: Callable[[], Result], stop: threading.Event) -> Result:
    """``call()``, again at most twice while the connection to MLflow or its store is what fails."""
    for pause in BACK_OFF_SECONDS:
        try:
            return call()
        except (RegistryError, MlflowException, OSError) as error:
            if not is_transient(error) or stop.wait(pause):
                raise
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether a connection failed or timed out, or a server said that it is busy: another try may help."""
    seen: BaseException | None = error if isinstance(error, RegistryError | MlflowException | OSError) else None
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError | requests.ConnectionError | requests.Timeout):
            return True
        if isinstance(seen, requests.exceptions.ChunkedEncodingError):
            return True
        if isinstance(seen, MlflowException) and seen.error_code in _PASSING:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def reason_of(error: BaseException) -> str:
    """One harmless line."""
    text = str(error) if isinstance(error, AuditError | OSError) else f"{type(error).__name__}: {error}"
    return clean_text(redacted(text), _LONGEST_REASON)


class LocalEngine:
    """Audits on this machine, ``jobs`` at a time."""

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs

    def run(self, tasks: Sequence[Task], stop: threading.Event) -> Generator[Finished]:
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        finished: queue.Queue[Finished] = queue.Queue(maxsize=self._jobs)  # reports are large: no more of them than audits

        def work() -> None:
            while not stop.is_set():
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                result = attempt(task, stop)
                while not stop.is_set():
                    with suppress(queue.Full):
                        finished.put(result, timeout=0.2)
                        break

        # Daemons: an audit that does not heed `stop` must not keep the process alive.
        workers = [threading.Thread(target=work, name=f"audit-{index}", daemon=True) for index in range(self._jobs)]
        for worker in workers:
            worker.start()
        for _ in tasks:
            result = _next(finished, stop)
            if result is None:
                break
            yield result
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in workers:
            worker.join(max(deadline - time.monotonic(), 0.0) if stop.is_set() else None)


def _next(finished: queue.Queue[Finished], stop: threading.Event) -> Finished | None:
    while not stop.is_set():
        try:
            return finished.get(timeout=0.2)
        except queue.Empty:
            continue
    return None
