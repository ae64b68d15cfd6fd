"""The child process: what it may not do, and that its failures are readable."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from audit_plugin.errors import IntakeError, SandboxError
from audit_plugin.intake import inspect
from audit_plugin.model.unpickle import convert_pickle
from audit_plugin.sandbox import Isolation, run_isolated

PROBE = "tests.unit.sandbox_probe"


class Touch:
    """Creates a file when unpickled, in the child's current folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mknod, ("touched",)


def probe(folder: Path, *arguments: str, timeout_seconds: float = 30, **options: int) -> Isolation:
    return run_isolated(PROBE, arguments, working_folder=folder, timeout_seconds=timeout_seconds, **options)


def test_the_environment_carries_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "HTTPS_PROXY", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    probe(tmp_path, "environment")
    seen = json.loads((tmp_path / "environment.json").read_text())
    assert "secret" not in seen.values()
    assert seen["HOME"] == str(tmp_path)


def test_there_is_no_network_where_the_kernel_allows_to_leave_it(tmp_path: Path) -> None:
    isolation = probe(tmp_path, "interfaces")
    interfaces = json.loads((tmp_path / "interfaces.json").read_text())
    assert isolation.reason
    if not isolation.network_blocked:
        pytest.skip(isolation.reason)
    assert interfaces == ["lo"]


def test_a_failure_shows_the_last_line_of_the_child(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"exit code 1.*ValueError: the reason"):
        probe(tmp_path, "fail")


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_hanging_child_and_what_it_started_are_killed(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SandboxError, match="longer than 2 seconds"):
        probe(tmp_path, "hang", timeout_seconds=2)
    assert time.monotonic() - started < 10
    grandchild = int((tmp_path / "grandchild").read_text())
    while is_running(grandchild):
        assert time.monotonic() - started < 10
        time.sleep(0.05)


def test_memory_is_limited(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="MemoryError"):
        probe(tmp_path, "memory", memory_bytes=512 * 1024**2)


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="No module named"):
        run_isolated("planted", [], working_folder=tmp_path, timeout_seconds=30)


def pickled(folder: Path, value: object) -> Path:
    folder.mkdir()
    torch.save(value, folder / "model.pth")
    return folder


def test_a_pickled_module_becomes_a_checked_pt2(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).eval()
    folder = pickled(tmp_path / "model", module)
    assert inspect(folder, allow_pickle=True).flavour == "pickle"
    converted, finding = convert_pickle(folder, "model.pth", (-1, 3, 8, 8), tmp_path / "work")
    assert "child process" in finding.message
    assert inspect(converted.parent).flavour == "pt2"
    pixels = torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(torch.export.load(converted).module()(pixels), module(pixels))
    with pytest.raises(SandboxError, match="exists already"):
        convert_pickle(folder, "model.pth", (-1, 3, 8, 8), tmp_path / "work")


def test_what_a_pickle_runs_stays_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Touch(), "model.pth")
    with pytest.raises(SandboxError, match=r"Expected a pickled torch\.nn\.Module, got NoneType"):
        convert_pickle(tmp_path, "model.pth", (-1, 3, 8, 8), tmp_path / "work")
    assert (tmp_path / "work" / "touched").exists()
    assert not (tmp_path / "touched").exists()


def test_what_the_child_leaves_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was taken over can write anything as its result."""

    def taken_over(module: str, arguments: list[str], **options: object) -> Isolation:
        torch.save(nn.Linear(1, 1), arguments[1])
        return Isolation(True, "")

    monkeypatch.setattr("audit_plugin.model.unpickle.run_isolated", taken_over)
    with pytest.raises(IntakeError, match=r"calls or builds 'torch\.nn\.modules\.linear\.Linear'"):
        convert_pickle(tmp_path, "model.pth", (-1, 3, 8, 8), tmp_path / "work")
