"""Carries out the audits of a scan on a Ray cluster.

A worker fetches and audits; it writes nothing to MLflow, and the signing key stays with the scan, which publishes. What the
workers need to reach MLflow, the variables ``MLFLOW_*``, travels with the tasks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from typing import Any

import mlflow

from audit_plugin.attestation import SIGNING_KEY, SIGNING_KEY_PASSWORD
from audit_plugin.errors import RegistryError, UsageError
from pipelines.scan import notify
from pipelines.scan.engine import Finished, Task, attempt, reason_of

_RETRIES = 3
_NOT_FOR_WORKERS = (SIGNING_KEY, SIGNING_KEY_PASSWORD, notify.URL, notify.SECRET)


class RayEngine:
    """``jobs`` audits at a time, each taking ``cpus`` and ``gpus`` (which may be fractions) of the cluster at ``address``.

    An audit whose worker dies is made again, at most three times. Without an address Ray is started on this machine for the scan.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(self, address: str | None = None, *, jobs: int = 1, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed. Run: pip install 'mlflow-backdoor-audit[ray]'") from error
        self._ray: Any = ray
        self._address, self._jobs, self._cpus, self._gpus = address, jobs, cpus, gpus

    def run(self, tasks: Sequence[Task], stop: threading.Event) -> Generator[Finished]:
        if not tasks:
            return
        ray = self._ray
        try:
            ray.init(
                self._address,
                num_cpus=None if self._address else max(int(self._jobs * self._cpus), 1),
                include_dashboard=None if self._address else False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": _environment()},
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise RegistryError(f"The Ray cluster cannot be reached: {reason_of(error)}") from error
        remote = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=_RETRIES)(_attempt)
        running: dict[Any, Task] = {}
        waiting = iter(tasks)

        def fill() -> None:
            while len(running) < self._jobs and (task := next(waiting, None)) is not None:
                running[remote.remote(task)] = task

        try:
            fill()
            while running and not stop.is_set():
                ready, _ = ray.wait(list(running), timeout=0.5)
                for reference in ready:
                    task = running.pop(reference)
                    fill()  # before whoever asked publishes the result: no worker waits for that
                    yield self._result(reference, task)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            ray.shutdown()

    def _result(self, reference: Any, task: Task) -> Finished:
        try:
            result: Finished = self._ray.get(reference)
        except Exception as error:  # its worker died each time, or what it sent cannot be read
            return Finished(task, 0.0, error=f"Its audit did not survive on Ray: {reason_of(error)}")
        return result


def _attempt(task: Task) -> Finished:
    return attempt(task, threading.Event())


def _environment() -> dict[str, str]:
    """What a worker gets: the way to MLflow. Workers on this machine would inherit the keys, which are none of their business."""
    wanted = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    addresses = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri()}
    return wanted | addresses | dict.fromkeys(_NOT_FOR_WORKERS, "")
