"""The acceptance of the scan: 200 versions, 10 of them backdoored, 5 of them hostile. Takes most of an hour on two cores;
``BACKDOOR_AUDIT_TEST_VERSIONS`` makes it smaller."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from tests.scanned_registry import ScannedRegistry

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 3600)]

VERSIONS = int(os.environ.get("BACKDOOR_AUDIT_TEST_VERSIONS", "200"))
BACKDOORED = set(range(0, VERSIONS, 20))
HOSTILE = set(range(7, VERSIONS, 40))


def _peak_bytes(pid: int) -> int:
    """Peak memory of one process, without its children."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def test_a_large_registry(start_server, tmp_path, capsys):
    with start_server(tmp_path, "--app-name", "backdoor-audit") as address:
        registry = ScannedRegistry(tmp_path, address)
        for number in range(VERSIONS):
            registry.add(
                f"digits-{number:03}",
                backdoored=number in BACKDOORED,
                hostile=number in HOSTILE,
                aliases=("champion",) if number % 50 == 0 else (),
            )
        expected = {
            f"digits-{number:03}": "error" if number in HOSTILE else "fail" if number in BACKDOORED else "pass"
            for number in range(VERSIONS)
        }
        process = registry.start("--jobs", "2", "--format", "json")
        while len(registry.audits()) < VERSIONS * 3 // 20:
            assert process.poll() is None, process.communicate()
            time.sleep(1)
        early = _peak_bytes(process.pid)
        while len(registry.audits()) < VERSIONS * 9 // 20:
            assert process.poll() is None, process.communicate()
            time.sleep(1)
        late = _peak_bytes(process.pid)
        process.kill()
        process.communicate()
        begun = time.monotonic()
        done = registry.scan("--jobs", "2", "--format", "json")
        rest = time.monotonic() - begun
        summary = json.loads(done.stdout)
        assert done.returncode == 1, done.stderr
        assert {row["name"]: row["outcome"] for row in summary["versions"]} == expected
        audits = registry.audits()
        assert len(audits) == len(set(audits)) == VERSIONS - len(HOSTILE)
        begun, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        again = registry.scan("--format", "json")
        seconds = time.monotonic() - begun
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
        assert json.loads(again.stdout)["metrics"]["audited"] == 0
        assert registry.audits() == audits
        with capsys.disabled():
            sys.stdout.write(
                f"\nthe last {summary['metrics']['audited']} audits: {rest:.0f} s; second scan: {seconds:.1f} s, "
                f"CPU {spent:.1f} s; peak memory after {VERSIONS * 3 // 20} audits {early / 2**20:.0f} MiB, after "
                f"{VERSIONS * 9 // 20} {late / 2**20:.0f} MiB\n"
            )
        assert late < 1.1 * early
        assert seconds < 10
