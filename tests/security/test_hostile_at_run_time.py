"""Models that pass the static check, or are pickles, and then fight back: they never end, eat memory, run code.

The sandbox's own tests are in tests/unit/test_sandbox.py. No advisory: torch and ONNX Runtime promise no limits, and torch's
documentation says that unpickling runs code.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from audit_plugin import confined
from audit_plugin.confined.jobs import AuditJob
from audit_plugin.errors import SandboxError
from audit_plugin.manifest import digest_of, manifest_of
from audit_plugin.policy import Policy, policy_from
from audit_plugin.types import ModelRef
from tests.policies import FAST

pytestmark = pytest.mark.usefixtures("real_sandbox")


def job_of(folder: Path, clean: Path, policy: Policy, **options: Any) -> AuditJob:
    manifest = manifest_of(folder)
    model = ModelRef(str(folder), str(folder), digest_of(manifest), manifest)
    return AuditJob(model, folder, clean, policy, 0, options.pop("allow_pickle", False), False, **options)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "clean.npz", images=rng.integers(0, 256, (60, 8, 8, 1), np.uint8), labels=np.arange(60) % 3)
    return tmp_path / "clean.npz"


def endless(folder: Path, iterations: int) -> Path:
    """An ONNX classifier that counts before it answers; nothing of it is forbidden."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still_going"]),
            helper.make_node("Add", ["sum", "one"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
            helper.make_node("Loop", ["count", "", "zero"], ["counted"], body=body),
            helper.make_node("Mul", ["counted", "zero"], ["nothing"]),
            helper.make_node("Add", ["scores", "nothing"], ["logits"]),
        ],
        "endless",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [
            helper.make_tensor("weights", TensorProto.FLOAT, [64, 3], np.ones(192, np.float32)),
            helper.make_tensor("count", TensorProto.INT64, [], [iterations]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
        ],
    )
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx")
    return folder


def test_a_model_that_never_answers_is_killed(tmp_path: Path, clean: Path) -> None:
    policy = policy_from({**FAST, "sandbox": {"time_limit_minutes": 0.25}})
    started = time.monotonic()
    with pytest.raises(SandboxError, match="longer than 15 seconds"):
        confined.audit(job_of(endless(tmp_path / "model", 2**62), clean, policy))
    assert time.monotonic() - started < 60


def hungry(folder: Path) -> Path:
    """A classifier with few weights, whose one hidden layer takes gigabytes an image."""

    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 3)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            wide = nn.functional.interpolate(pixels, scale_factor=2048.0)
            return self.head(nn.functional.adaptive_avg_pool2d(wide, 8).flatten(1))

    program = torch.export.export(Hungry().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    folder.mkdir()
    torch.export.save(program, folder / "model.pt2")
    return folder


def test_a_model_that_eats_memory_is_stopped(tmp_path: Path, clean: Path) -> None:
    policy = policy_from({**FAST, "sandbox": {"memory_gib": 2.0}})
    with pytest.raises(Exception, match=r"memory|alloc|killed by|bad_alloc") as caught:
        confined.audit(job_of(hungry(tmp_path / "model"), clean, policy))
    assert not isinstance(caught.value, MemoryError), "the caller's own memory was taken"


class Attack:
    """What a pickle runs: whatever its author likes."""

    def __init__(self, victim: Path, port: int, mark: str) -> None:
        self.code = (
            "import os, socket, subprocess, sys, time\n"
            "done = []\n"
            "def attempt(name, what):\n"
            "    try:\n"
            "        what()\n"
            "        done.append(name)\n"
            "    except OSError:\n"
            "        pass\n"
            f"attempt('read', lambda: open({str(victim / 'secret')!r}).read())\n"
            f"attempt('write', lambda: open({str(victim / 'written')!r}, 'w').write('x'))\n"
            f"attempt('connect', lambda: socket.create_connection(('127.0.0.1', {port}), 2))\n"
            f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])\n"
            "raise RuntimeError('it could: ' + (', '.join(done) or 'nothing') + ' with ' + os.environ.get('TOKEN', 'no token'))\n"
        )

    def __reduce__(self) -> tuple[object, tuple[str, dict[str, object]]]:
        return exec, (self.code, {})


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def test_a_pickle_that_attacks_reaches_nothing(
    tmp_path: Path, clean: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened with ``--allow-pickle``: its code runs, in a sandbox of its own within the audit's."""
    monkeypatch.setenv("TOKEN", "secret-token")
    victim, folder = tmp_path / "victim", tmp_path / "model"
    victim.mkdir()
    folder.mkdir()
    (victim / "secret").write_text("secret")
    torch.save({"weight": torch.zeros(1)}, folder / "model.pth")
    (folder / "model.pth").write_bytes(pickle.dumps(Attack(victim, listener.getsockname()[1], f"mark-{tmp_path}")))
    policy = policy_from({**FAST, "model": {"height": 8, "width": 8, "channels": 1}})
    with pytest.raises(SandboxError, match="it could: nothing with no token") as caught:
        confined.audit(job_of(folder, clean, policy, allow_pickle=True))
    assert "secret-token" not in str(caught.value)
    assert [path.name for path in victim.iterdir()] == ["secret"]
    with pytest.raises(TimeoutError):
        listener.accept()
