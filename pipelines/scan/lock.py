"""One scan of a registry at a time. The lock is the scan's own MLflow run, so that it works across machines.

A run that is RUNNING and alive holds the lock. Its owner writes the time into a tag twice a minute; on the same machine its
process is looked at instead, so that a scan that was killed is noticed at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit_plugin.errors import AuditError
from audit_plugin.report.sanitise import clean_text

log = logging.getLogger(__name__)

EXPERIMENT = "backdoor-scans"
OWNER_TAG, HEARTBEAT_TAG, STATE_TAG = "scan.owner", "scan.heartbeat", "scan.state"
HEARTBEAT_SECONDS, STALE_SECONDS = 30.0, 300.0
_SETTLE_SECONDS = 0.5
_ASKING, _HOLDING = "asking", "holding"


class ScanRunningError(AuditError):
    """Another scan of this registry is running."""


@contextmanager
def scan_lock(client: MlflowClient, tags: Mapping[str, str], stop: threading.Event) -> Iterator[str]:
    """The id of a run of ours that holds the lock; it ends FINISHED, or KILLED if the block raises.

    ``stop`` is set when somebody else took the lock over, because no sign of life came through for minutes.

    Raises:
        ScanRunningError: another scan holds it.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = str(experiment.experiment_id if experiment else _create(client))
    owner = json.dumps(_this_process())
    ours = {**tags, OWNER_TAG: owner, HEARTBEAT_TAG: f"{time.time():.0f}", STATE_TAG: _ASKING}
    run_id = client.create_run(experiment_id, run_name=time.strftime("scan %Y-%m-%d %H:%M"), tags=ours).info.run_id
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(client, run_id, ended, stop), name="heartbeat", daemon=True)
    status = "KILLED"
    try:
        beating.start()
        _acquire(client, experiment_id, run_id)
        yield run_id
        status = "FINISHED"
    finally:
        ended.set()
        with suppress(MlflowException, OSError):  # the first error is the one to tell; without it, nobody lives here soon
            client.set_terminated(run_id, status)


def _create(client: MlflowClient) -> str:
    try:
        return str(client.create_experiment(EXPERIMENT))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(EXPERIMENT)  # another scan was faster
        if found is None:
            raise
        return str(found.experiment_id)


def _acquire(client: MlflowClient, experiment_id: str, run_id: str) -> None:
    """Of those that ask at the same time the one that began first wins; whoever holds the lock keeps it.

    Each makes its run, waits until those that were made meanwhile can be seen, and looks. It looks again when it has taken the
    lock, and gives it back to one that began earlier and came into sight only now; that one waits for it.
    """
    time.sleep(_SETTLE_SECONDS)
    own = _key(client.get_run(run_id))
    others = _others(client, experiment_id, run_id)
    if any(_holds(other) and _key(other) > own for other in others):
        time.sleep(_SETTLE_SECONDS)
        others = _others(client, experiment_id, run_id)
    for other in others:
        if _holds(other) or _key(other) < own:
            raise _refusal(other)
    client.set_tag(run_id, STATE_TAG, _HOLDING)
    for other in _others(client, experiment_id, run_id):
        if _key(other) < own:
            raise _refusal(other)


def _holds(run: Run) -> bool:
    return bool(run.data.tags.get(STATE_TAG) == _HOLDING)


def _others(client: MlflowClient, experiment_id: str, run_id: str) -> list[Run]:
    """Other scans that are alive; those that are not are marked KILLED."""
    alive = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        if run.info.run_id == run_id or OWNER_TAG not in run.data.tags:
            continue
        if is_alive(run.data.tags):
            alive.append(run)
        else:
            log.warning("An earlier scan was killed; this one goes on where it stopped.")
            client.set_terminated(run.info.run_id, "KILLED")
    return alive


def is_alive(tags: Mapping[str, str], now: float | None = None) -> bool:
    """Whether the owner of a scan's run still works on it; ``now`` in Unix seconds."""
    here = _this_process()
    try:
        owner = json.loads(tags.get(OWNER_TAG, ""))
        if all(owner[part] == here[part] for part in ("host", "boot", "namespace")):
            return bool(_process_start(int(owner["pid"])) == owner["started"])
        return abs((time.time() if now is None else now) - float(tags[HEARTBEAT_TAG])) < STALE_SECONDS
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),  # a number means another process in another container
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
    }


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks since boot; None if there is none."""
    try:
        # The name, in parentheses, may hold anything; what follows it does not.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _beat(client: MlflowClient, run_id: str, ended: threading.Event, stop: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            if client.get_run(run_id).info.status != "RUNNING":
                if not ended.is_set():
                    log.error("Another scan took over, because this one gave no sign of life for minutes.")
                    stop.set()
                return
            client.set_tag(run_id, HEARTBEAT_TAG, f"{time.time():.0f}")
        except (MlflowException, OSError) as error:
            log.warning("The scan's sign of life did not get through: %s", clean_text(error))


def _key(run: Run) -> tuple[int, str]:
    return int(run.info.start_time), str(run.info.run_id)


def _refusal(other: Run) -> ScanRunningError:
    try:
        owner = json.loads(other.data.tags[OWNER_TAG])
        where = f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        where = "an unknown process"
    return ScanRunningError(
        f"Another scan of this registry is running: {clean_text(where, 100)}, MLflow run {other.info.run_id}. "
        "Wait until it has ended."
    )
