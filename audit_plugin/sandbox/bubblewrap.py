"""The command line of bubblewrap, where it is installed and the kernel lets it work."""

from __future__ import annotations

import functools
import glob
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM_FOLDERS = tuple(
    Path(path)
    for path in (
        "/usr",
        "/bin",
        "/lib",
        "/lib32",
        "/lib64",
        "/etc/ld.so.cache",
        "/etc/alternatives",
        "/etc/localtime",
        "/sys/devices/system",
    )
)
"""What programs need of any Linux: libraries, and how many processors there are."""

_BASE = ("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev")
_SHARED_MEMORY = ("--size", str(64 * 1024**2), "--tmpfs")
_GPU_DEVICES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd")
_GPU_FACTS = tuple(Path(path) for path in ("/sys/bus/pci", "/sys/devices", "/sys/module/nvidia"))


@dataclass(frozen=True)
class Bubblewrap:
    """``command`` goes before the program's own; ``name`` says which bubblewrap it is."""

    command: tuple[str, ...]
    name: str


def bubblewrap_command(writable: Path, readable: Sequence[Path], *, gpu: bool) -> Bubblewrap | None:
    """A world of the system's libraries, ``readable`` and ``writable``, each where it is outside; None where none can be made."""
    name = _working_bubblewrap()
    if name is None:
        return None
    gpus = devices_of_gpus() if gpu else []
    command = [*_BASE, *_SHARED_MEMORY, "/tmp", *_SHARED_MEMORY, "/dev/shm"]  # noqa: S108 - the child's own
    for device in gpus:
        command += ["--dev-bind", device, device]
    command += _shown((*SYSTEM_FOLDERS, *(_GPU_FACTS if gpus else ()), *sorted(readable)))
    command += ["--bind", str(writable), str(writable), "--chdir", str(writable), "--"]
    return Bubblewrap(tuple(command), name)


def devices_of_gpus() -> list[str]:
    """Device files through which programs reach GPUs."""
    return sorted(path for pattern in _GPU_DEVICES for path in glob.glob(pattern))


@functools.cache
def _working_bubblewrap() -> str | None:
    """Its name and version, after it really started something; many containers do not let it."""
    if shutil.which("bwrap") is None:
        return None
    trial = [*_BASE, *_SHARED_MEMORY, "/dev/shm", *_shown(SYSTEM_FOLDERS), "--", "true"]  # noqa: S108 - the child's own
    try:
        subprocess.run(trial, check=True, capture_output=True, timeout=20)
        version = subprocess.run(["bwrap", "--version"], check=True, capture_output=True, timeout=20, text=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    return version.strip()


def _shown(paths: Iterable[Path]) -> list[str]:
    return [argument for path in paths for argument in ("--ro-bind-try", str(path), str(path))]
