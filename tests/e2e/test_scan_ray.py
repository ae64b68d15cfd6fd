"""A scan on a real Ray: a worker that dies in the middle of an audit loses no version and repeats none."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.scanned_registry import ScannedRegistry

pytest.importorskip("ray", reason="Ray is missing (pip install '.[ray]')")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def _workers(driver: int) -> list[int]:
    """Processes of Ray that audit, below a scan."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::_attempt") and driver in _ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _ancestors(pid: int) -> set[int]:
    seen: set[int] = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        seen.add(pid)
    return seen


def test_a_killed_worker_loses_no_version_and_repeats_none(start_server, tmp_path):
    with start_server(tmp_path) as address:
        registry = ScannedRegistry(tmp_path, address)
        for _ in range(3):
            registry.add("digits")
        registry.add("digits-hostile", hostile=True)
        process = registry.start("--engine", "ray", "--jobs", "2", "--format", "json")
        deadline = time.monotonic() + 300
        while not (workers := _workers(process.pid)):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no worker began: {process.communicate()}")
            time.sleep(0.2)
        time.sleep(2)
        # What a worker was given, as far as another process of this user can see.
        environment = Path(f"/proc/{workers[0]}/environ").read_bytes()
        os.kill(workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=900)
        summary = json.loads(out)
        assert process.returncode == 2, err  # the hostile version cannot be audited
        assert {f"{row['name']}/{row['version']}": row["outcome"] for row in summary["versions"]} == {
            "digits/1": "pass",
            "digits/2": "pass",
            "digits/3": "pass",
            "digits-hostile/1": "error",
        }
        assert registry.audits() == ["models:/digits/1", "models:/digits/2", "models:/digits/3"]
        assert registry.environment["BACKDOOR_AUDIT_SIGNING_KEY"].encode() not in environment
        assert not _workers(process.pid)
