"""What a child leaves in its working folder: how much that is, and how it is removed however deep it goes.

A child can nest folders deeper than Python's stack, than one path can be long, and than a process may open at a time; so nothing
here recurses, and folders are lifted to the top instead of followed down.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
import uuid
from contextlib import suppress
from pathlib import Path

MOST_ENTRIES = 20_000
DEEPEST = 64
_SECONDS = 60.0
_BLOCK_BYTES = 512  # of a file's status, on every file system


def excess_of(folder: Path, most_bytes: int) -> str:
    """Which limit the content of a folder exceeds, though it may change meanwhile; empty if none."""
    taken = entries = 0
    waiting = [(str(folder), 0)]
    while waiting:
        path, depth = waiting.pop()
        if depth > DEEPEST:
            return f"it nested folders more than {DEEPEST} deep"
        try:
            with os.scandir(path) as found:
                for entry in found:
                    entries += 1
                    with suppress(FileNotFoundError):  # removed meanwhile
                        taken += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                    if entries > MOST_ENTRIES:
                        return f"it made more than {MOST_ENTRIES} files and folders"
                    if taken > most_bytes:
                        return f"it wrote more than {most_bytes / 1024**3:.1f} GiB"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, depth + 1))
        except (FileNotFoundError, NotADirectoryError):  # as above
            continue
        except OSError as error:  # what cannot be counted could be anything
            return f"it made a folder that cannot be looked into ({error.strerror})"
    return ""


def empty(folder: Path) -> None:
    """Remove all that a folder holds, as far as that can be done in a minute: something may still be writing there."""
    deadline = time.monotonic() + _SECONDS
    prefix, numbers = uuid.uuid4().hex, itertools.count()
    with suppress(OSError):
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            folder.chmod(stat.S_IRWXU)
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            removed = True
            while removed and time.monotonic() < deadline:
                removed = False
                for name in os.listdir(top):
                    with suppress(OSError):
                        _remove(name, top, prefix, numbers)
                        removed = True
        finally:
            os.close(top)


def _remove(name: str, top: int, prefix: str, numbers: itertools.count[int]) -> None:
    """A file in the folder ``top``, or a folder, whose own folders move to ``top``, each under the prefix and another number."""
    if not _is_folder(name, top):
        os.unlink(name, dir_fd=top)
        return
    with suppress(OSError):
        os.rmdir(name, dir_fd=top)  # what is empty
        return
    folder = _opened(name, top)
    try:
        for inner in os.listdir(folder):
            if _is_folder(inner, folder):
                os.close(_opened(inner, folder))  # only what may be written can be moved
                os.rename(inner, f"{prefix}{next(numbers)}", src_dir_fd=folder, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _is_folder(name: str, within: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=within, follow_symlinks=False).st_mode)


def _opened(name: str, within: int) -> int:
    """A folder that may be read and written; allowed by its number, since its name could lead elsewhere meanwhile."""
    handle = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", 0), dir_fd=within)
    try:
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
    finally:
        os.close(handle)
