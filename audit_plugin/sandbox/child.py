"""The first thing that runs in a sandbox's child process: confine it, say what came of that, then run the module.

Started by its path and importing the standard library only, because Linux lets a process leave its user namespace only while it
has a single thread, and numpy starts some.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import runpy
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable

_NEW_USER_NAMESPACE, _NEW_NETWORK_NAMESPACE = 0x10000000, 0x40000000
_PARENT_DEATH_SIGNAL, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38  # of prctl
_MOST_OPEN_FILES = 512
_PSEUDO_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def main() -> None:
    """Arguments: what to do as JSON, import root, module, then the module's own arguments."""
    confinement, import_root, module, *arguments = sys.argv[1:]
    wanted = json.loads(confinement)
    _set_limits(wanted["memory"], wanted["seconds"], wanted["disk"])
    mechanism, problems = wanted["mechanism"], ""
    if mechanism is None:
        mechanism, problems = _confine(wanted["writable"], wanted["readable"], import_root)
    isolation = {
        "mechanism": mechanism,
        "network_blocked": _has_no_network(),
        "files_confined": _cannot_open(wanted["outside"]),
        "reason": problems,
    }
    sys.stdout.write(json.dumps(isolation) + "\n")
    sys.stdout.flush()
    if wanted["required"] and not (isolation["network_blocked"] and isolation["files_confined"]):
        sys.exit(f"the policy requires a sandbox, and this machine offers: {mechanism}. {problems}")
    sys.path.insert(0, import_root)  # isolated mode (-I) knows only installed packages
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_limits(memory: int, seconds: int, disk: int) -> None:
    """Data, not address space: importing torch's CUDA build maps gigabytes of libraries before anything is computed."""
    for limit, value in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NOFILE, _MOST_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


# -------------------------------------------------------------------------------------------------- what came of it


def _has_no_network() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except OSError:
        return True
    return {name for _, name in socket.if_nameindex()} <= {"lo"}


def _cannot_open(path: str) -> bool:
    """Whether a file of the caller's, which is there, is out of reach."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return True
    return False


# ---------------------------------------------------------------------------------------------- without bubblewrap


def _confine(writable: Iterable[str], readable: Iterable[str], import_root: str) -> tuple[str, str]:
    """What was put in place, by name, and what could not be."""
    if not sys.platform.startswith("linux"):
        return "none", "isolation needs Linux"
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    held, problems = [], []
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("network namespace", lambda: _leave_network(library)),
        ("Landlock", lambda: _restrict_files(library, writable, readable, import_root)),
        ("seccomp", lambda: _forbid_system_calls(library)),
    )
    for name, step in steps:
        try:
            step()
            held.append(name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return ", ".join(held) or "none", "; ".join(problems)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _leave_network(library: ctypes.CDLL) -> None:
    """Move into a network namespace without any interface, where the kernel lets an ordinary user do so."""
    user, group = os.getuid(), os.getgid()
    _check(library.unshare(_NEW_USER_NAMESPACE | _NEW_NETWORK_NAMESPACE))
    try:  # map the user onto itself, so that libraries that look it up find it; harmless when it fails
        for file, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(content)
    except OSError:
        pass


_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIRECTORY, _TRUNCATE, _DEVICE_CONTROL = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _DEVICE_CONTROL
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version


def _restrict_files(library: ctypes.CDLL, writable: Iterable[str], readable: Iterable[str], import_root: str) -> None:
    """Landlock: from here on, only files below these paths can be opened, by this process and all that it starts.

    Below the import root, names can be listed, which is how Python finds packages.
    """
    version = _check(library.syscall(_CREATE_RULESET, None, 0, 1))
    rights = _ALL_RIGHTS[min(version, max(_ALL_RIGHTS))]
    attributes = struct.pack("=Q", rights)
    rules = _check(library.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    reading = _EXECUTE | _READ_FILE | _READ_DIRECTORY
    for paths, allowed in (
        ([import_root], _READ_DIRECTORY),
        ([*readable, "/proc"], reading),
        (_PSEUDO_FILES, reading | _WRITE_FILE),
        (writable, rights),
    ):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # what is not there needs no permission
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            rule = struct.pack("=Qi", (allowed if is_folder else allowed & _OF_FILES) & rights, descriptor)
            _check(library.syscall(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0))
            os.close(descriptor)
    _check(library.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


# Numbers of socket, ptrace, process_vm_readv, process_vm_writev, pidfd_getfd, io_uring_setup, add_key, request_key, keyctl,
# bpf, perf_event_open, userfaultfd; and what the kernel calls the processor.
_FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 101, 310, 311, 438, 425, 248, 249, 250, 321, 298, 323)),
    "aarch64": (0xC00000B7, (198, 117, 270, 271, 438, 425, 217, 218, 219, 280, 241, 282)),
}
_OTHER_ABI = 0x40000000  # x86_64's 32-bit pointers have numbers of their own for the same calls
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # denied calls fail with EPERM


def _forbid_system_calls(library: ctypes.CDLL) -> None:
    """seccomp: no sockets, no reaching into other processes, nothing of the kernel that models have no use for."""
    if platform.machine() not in _FORBIDDEN:
        raise OSError(0, f"not known for {platform.machine()}")
    processor, numbers = _FORBIDDEN[platform.machine()]
    checks = [(_AT_LEAST, _OTHER_ABI), *((_EQUAL, number) for number in numbers)]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, processor), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for index, (comparison, number) in enumerate(checks):
        program.append((comparison, len(checks) - index, 0, number))
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter_ = struct.pack("HL", len(program), ctypes.addressof(code))
    _check(library.prctl(_SECCOMP, 2, filter_, 0, 0))


if __name__ == "__main__":
    main()
