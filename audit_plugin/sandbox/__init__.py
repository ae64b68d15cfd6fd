"""Runs what must touch untrusted bytes in a child process: no network, no credentials, limits, a time-out.

The child gives nothing back but files in its working folder, and those are checked like any other download; no object travels
between the processes. What the sandbox does not do: it does not hide the files that this user may read, nor stop writing where
this user may write.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from audit_plugin.errors import SandboxError

DEFAULT_MEMORY_BYTES = 16 * 1024**3
"""Address space, not memory in use: importing torch's CUDA build maps 3 GiB of libraries before anything is computed."""

_CHILD = Path(__file__).with_name("child.py")
_IMPORT_ROOT = Path(__file__).parents[2]
_THREADS = 2
_KEPT_VARIABLES = ("LD_LIBRARY_PATH",)
_LAST_BYTES = 64 * 1024


@dataclass(frozen=True)
class Isolation:
    """Whether the child had no network; ``reason`` says why not, or how."""

    network_blocked: bool
    reason: str


def run_isolated(
    module: str,
    arguments: Sequence[str],
    *,
    working_folder: Path,
    timeout_seconds: float,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Isolation:
    """Run ``python -m module arguments...`` in a confined child process and wait for it.

    Args:
        module: a module with a ``__main__`` part, importable without the current folder or PYTHONPATH.
        arguments: its command line.
        working_folder: an existing folder; the child's current folder, HOME and place for temporary files.
        timeout_seconds: after it, the child and what it started are killed.
        memory_bytes: limit of the address space, see ``DEFAULT_MEMORY_BYTES``.

    Raises:
        SandboxError: when the child fails (with the last line that it wrote to stderr), is killed, or takes too long.
    """
    reader, writer = os.pipe()
    limits = {"memory": memory_bytes, "seconds": math.ceil(timeout_seconds * _THREADS) + 10}
    command = [sys.executable, "-I", str(_CHILD), str(writer), json.dumps(limits), str(_IMPORT_ROOT), module, *arguments]
    with os.fdopen(reader, "rb") as status, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                cwd=working_folder,
                env=_environment(working_folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        code = _wait(process, module, timeout_seconds)
        isolation = _read_status(status)
        if code != 0:
            raise SandboxError(f"{module} failed in the sandbox ({_meaning(code)}): {_last_line(errors)}")
    return isolation


def _environment(working_folder: Path) -> dict[str, str]:
    """Nothing of the caller's environment but the library path: tokens, tracking URIs and proxies stay here."""
    folder = str(working_folder.resolve())
    return {
        **{name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(_THREADS),
        "MKL_NUM_THREADS": str(_THREADS),
    }


def _wait(process: subprocess.Popen[bytes], module: str, timeout_seconds: float) -> int:
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(
            f"{module} took longer than {timeout_seconds:g} seconds in the sandbox and was killed. "
            "Allow more time only if you trust where the model came from."
        ) from error
    finally:
        # The whole group, also after a normal end: the child may have left processes behind.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_status(status: IO[bytes]) -> Isolation:
    """What the child wrote before it ran anything untrusted; it closed the pipe then."""
    os.set_blocking(status.fileno(), False)
    try:
        content = json.loads(status.read(_LAST_BYTES) or b"{}")
        return Isolation(content["network_blocked"] is True, str(content["reason"]))
    except (ValueError, KeyError, TypeError):
        return Isolation(False, "the child ended before it was confined")


def _meaning(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _LAST_BYTES))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing to stderr")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in last[:500])
