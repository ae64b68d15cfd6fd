"""Runs what touches untrusted bytes in a child process: no network, no files but those it needs, no credentials, limits.

Three ways, the best that this machine allows:

1. `bubblewrap <https://github.com/containers/bubblewrap>`_: namespaces of its own; nothing is there but what is put there.
2. Landlock and seccomp (Linux 5.13 and later, also in containers that grant no namespaces): the files of others cannot be opened,
   sockets cannot be made.
3. Limits alone.

What held is not taken for granted: the child tries a file and a socket that it must not get, and :class:`Isolation` says what
came of it. Nothing travels back but lines of text and files in the working folder; no object does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from audit_plugin.errors import SandboxError, SandboxLimitError
from audit_plugin.sandbox import leftovers
from audit_plugin.sandbox.bubblewrap import SYSTEM_FOLDERS, bubblewrap_command, devices_of_gpus
from audit_plugin.types import Isolation

_CHILD = Path(__file__).with_name("child.py")
_IMPORT_ROOT = Path(__file__).parents[2]
_KEPT_VARIABLES = (
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
)
_TICK_SECONDS = 0.1
_WATCH_SECONDS = 0.25
_LAST_BYTES = 64 * 1024
_LONGEST_LINE = 64 * 1024
_MOST_PROCESSES = 64


@dataclass(frozen=True)
class Limits:
    """What a child may use; one that takes more is killed.

    Attributes:
        seconds: of wall-clock time; its processor time may be that much on every core.
        memory_bytes: of the child and all that it starts, together.
        disk_bytes: of one file, and of all in the working folder together.

    Numbers of processes, of files and folders, and of folders within folders have limits, too.
    """

    seconds: float = 3600.0
    memory_bytes: int = 16 * 1024**3
    disk_bytes: int = 8 * 1024**3


def run_isolated(
    module: str,
    arguments: Sequence[str] = (),
    *,
    working_folder: Path,
    readable: Sequence[Path] = (),
    limits: Limits | None = None,
    gpu: bool = False,
    required: bool = False,
    on_line: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Isolation:
    """Run ``python -m module arguments...`` in a confined child process and wait for it.

    Args:
        module: a module with a ``__main__`` part, importable without the current folder or PYTHONPATH.
        arguments: its command line.
        working_folder: an existing folder; the only place the child may write to, its current folder, HOME and TMPDIR. It is
            emptied if the child left more there than it may.
        readable: further files and folders that it may read, besides Python and the system's libraries.
        gpu: whether it sees the machine's GPUs.
        required: end the child, before it runs anything untrusted, if it is not kept from network and files.
        on_line: called with each line that the child prints to stdout (untrusted text, without the line's end).
        stop: when set, the child is killed.

    Returns:
        What the child was found to be kept from, before it ran anything untrusted.

    Raises:
        SandboxLimitError: the child was killed because it exceeded a limit.
        SandboxError: it failed (with the last line that it wrote to stderr), or was stopped.
    """
    limits = limits or Limits()
    folder = working_folder.resolve()
    shown = [*_code_of(module), *(path.resolve() for path in readable)]
    with tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile(prefix="backdoor-audit-outside-") as outside:
        bubblewrap = bubblewrap_command(folder, shown, gpu=gpu)
        confinement = {
            "memory": limits.memory_bytes,
            "seconds": int(limits.seconds + 1) * (os.cpu_count() or 1),
            "disk": limits.disk_bytes,
            "required": required,
            "mechanism": bubblewrap.name if bubblewrap else None,
            "outside": outside.name,
            "writable": [str(folder), *(devices_of_gpus() if gpu else ())],
            "readable": [str(path) for path in (*SYSTEM_FOLDERS, *shown)],
        }
        command = [sys.executable, "-I", str(_CHILD), json.dumps(confinement), str(_IMPORT_ROOT), module, *arguments]
        process = subprocess.Popen(
            [*(bubblewrap.command if bubblewrap else ()), *command],
            cwd=folder,
            env=_environment(folder, gpu),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        output = _Output(process, on_line)
        try:
            _wait(process, module, folder, limits, output, stop)
        finally:
            _kill(process)
            output.close()
            if excess := leftovers.excess_of(folder, limits.disk_bytes):
                leftovers.empty(folder)  # the caller's own ways to remove it could fail on its depth
        if excess:
            raise SandboxLimitError(f"{module} was refused in the sandbox: {excess}.")
        if process.returncode != 0:
            raise SandboxError(f"{module} failed in the sandbox ({_meaning(process.returncode)}): {_last_line(errors)}")
    return output.isolation


def _code_of(module: str) -> list[Path]:
    """Where Python, its packages and the module itself are."""
    own = {_IMPORT_ROOT / "audit_plugin", _IMPORT_ROOT / module.partition(".")[0]}
    python = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent}
    packages = {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return sorted(path for path in own | python | packages if path.exists())


def _environment(folder: Path, gpu: bool) -> dict[str, str]:
    """Nothing of the caller's environment but how to compute: tokens, tracking URIs and proxies stay here."""
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **{name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "PATH": os.defpath,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "USER": "sandbox",  # torch asks for a name, and there is no list of users
        "LANG": "C.UTF-8",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


class _Output:
    """What the child prints: first, by our own code, how it is confined; then lines for the caller."""

    def __init__(self, process: subprocess.Popen[bytes], on_line: Callable[[str], None] | None) -> None:
        self.isolation = Isolation("none", False, False, "the child ended before it was confined")
        self._stream: IO[bytes] | None = process.stdout
        self._on_line = on_line
        self._pending = b""
        self._confined = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

    def read(self, seconds: float) -> None:
        """Take what there is, waiting that long for it."""
        if self._stream is None:
            time.sleep(seconds)
            return
        if not self._selector.select(seconds):
            return
        content = os.read(self._stream.fileno(), _LONGEST_LINE)
        if not content:
            self.close()
        *lines, rest = (self._pending + content).split(b"\n")
        self._pending = rest[-_LONGEST_LINE:]
        for line in lines:
            self._take(line[:_LONGEST_LINE].decode("utf-8", "replace"))

    def close(self) -> None:
        if self._stream is not None:
            self._selector.close()
            self._stream.close()
            self._stream = None

    @property
    def is_open(self) -> bool:
        return self._stream is not None

    def _take(self, line: str) -> None:
        if not self._confined:
            self._confined = True
            with suppress(ValueError, TypeError, RecursionError):
                self.isolation = Isolation(**json.loads(line))
        elif self._on_line is not None:
            self._on_line(line)


def _wait(
    process: subprocess.Popen[bytes], module: str, folder: Path, limits: Limits, output: _Output, stop: threading.Event | None
) -> None:
    """Return when the child has ended.

    Raises:
        SandboxLimitError: it exceeds a limit.
        SandboxError: it is to be stopped.
    """
    started = watched = time.monotonic()
    while not has_ended(process):
        output.read(_TICK_SECONDS)
        now = time.monotonic()
        if stop is not None and stop.is_set():
            raise SandboxError(f"{module} was stopped before it came to its end.")
        if now - started > limits.seconds:
            raise SandboxLimitError(
                f"{module} took longer than {limits.seconds:g} seconds in the sandbox and was killed. "
                "Allow more time only if you trust where the model came from."
            )
        if now - watched > _WATCH_SECONDS:
            watched = now
            if excess := _excess(process.pid, folder, limits):
                raise SandboxLimitError(f"{module} was killed in the sandbox: {excess}.")
    deadline = time.monotonic() + 1.0  # something that it started may hold the pipe open
    while output.is_open and time.monotonic() < deadline:
        output.read(_TICK_SECONDS)


def _excess(pid: int, folder: Path, limits: Limits) -> str:
    """Which limit the child and all that it started exceed together; empty if none."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        if len(family) > _MOST_PROCESSES:
            return f"it started more than {_MOST_PROCESSES} processes"
        memory = 0
        for process in family:
            with suppress(psutil.Error):
                memory += process.memory_info().rss
        if memory > limits.memory_bytes:
            return f"it took more than {limits.memory_bytes / 1024**3:.1f} GiB of memory"
    return leftovers.excess_of(folder, limits.disk_bytes)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Leaves the process as a zombie: while it is one, its number, and with it that of its group, is given to nobody else."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started, also after a normal end.

    Under bubblewrap all of it lives in one process namespace, which ends with its first process; else a grandchild that left the
    process group is found only as long as its parents live.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    process.wait()


def _meaning(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _LAST_BYTES))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing to stderr")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in last[:500])
