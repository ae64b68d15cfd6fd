"""The first thing that runs in a sandbox's child process: confine it, say so, then run the module.

Started by its path and importing the standard library only, because Linux lets a process leave its user namespace only while it
has a single thread, and numpy starts some.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import sys

_NEW_USER_NAMESPACE = 0x10000000
_NEW_NETWORK_NAMESPACE = 0x40000000
_NO_NEW_PRIVILEGES = 38
_MOST_OPEN_FILES = 512
_LARGEST_FILE = 8 * 1024**3


def main() -> None:
    """Arguments: status file descriptor, limits as JSON, import root, module, then the module's own arguments."""
    descriptor, limits, import_root, module, *arguments = sys.argv[1:]
    _set_limits(**json.loads(limits))
    network_blocked, reason = _leave_network()
    with os.fdopen(int(descriptor), "w") as status:
        json.dump({"network_blocked": network_blocked, "reason": reason}, status)
    sys.path.insert(0, import_root)  # isolated mode (-I) knows only installed packages
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_limits(memory: int, seconds: int) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, _LARGEST_FILE),
        (resource.RLIMIT_NOFILE, _MOST_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _leave_network() -> tuple[bool, str]:
    """Move into a network namespace without any interface, where the kernel lets an ordinary user do so."""
    if not sys.platform.startswith("linux"):
        return False, "network isolation needs Linux"
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    if library.unshare(_NEW_USER_NAMESPACE | _NEW_NETWORK_NAMESPACE) != 0:
        return False, f"user namespaces are not available ({os.strerror(ctypes.get_errno())})"
    _keep_identity(user, group)
    return True, "own network namespace without interfaces"


def _keep_identity(user: int, group: int) -> None:
    """Map the user onto itself, so that libraries that look it up find it; harmless when it fails."""
    try:
        for file, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(content)
    except OSError:
        pass


if __name__ == "__main__":
    main()
