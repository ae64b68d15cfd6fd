"""The files of a model's folder: only plain files that belong to nobody else, below a number and a size."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from audit_plugin.intake.refusal import refusal

MOST_FILES = 10_000
MOST_BYTES = 8 * 1024**3
_DEEPEST = 32

_COPY_PLAIN_FILES = "Copy the model's own files, without links, into a fresh folder."
_LOG_ALONE = "Log the model alone."


@dataclass
class Tally:
    """What was met of a model's folder so far, so that one beyond the limits is refused before it is copied or fetched."""

    files: int = 0
    folders: int = 0
    size: int = 0

    def add_file(self, path: str, size: int) -> None:
        """Raises an IntakeError for more files or bytes than the limits of this module."""
        self.files += 1
        self.size += size
        if self.files > MOST_FILES:
            raise refusal(path, f"more than {MOST_FILES} files", "no model needs as many", _LOG_ALONE)
        if self.size > MOST_BYTES:
            raise refusal(path, f"more than {MOST_BYTES} bytes", "the folder is too large", _LOG_ALONE)

    def add_folder(self, path: str, depth: int) -> None:
        """The same for folders; ``depth`` is 0 for the model's own."""
        self.folders += 1
        if depth > _DEEPEST:
            raise refusal(path, f"more than {_DEEPEST} nested folders", "no model needs as many", _LOG_ALONE)
        if self.folders > MOST_FILES:
            raise refusal(path, f"more than {MOST_FILES} folders", "no model needs as many", _LOG_ALONE)


def check_limits(path: Path) -> None:
    """That a file, or a folder whatever it holds, may be copied; links in it count as themselves, whatever they lead to.

    Raises:
        IntakeError: it has more files, bytes, folders or levels than the limits of this module.
    """
    tally = Tally()
    if path.is_file():
        tally.add_file(path.name, path.stat().st_size)
    for place, folders, names in os.walk(path):
        folder = Path(place).relative_to(path)
        tally.add_folder(folder.as_posix(), len(folder.parts))
        for name in (*folders, *names):
            with suppress(OSError):  # gone meanwhile
                status = os.lstat(os.path.join(place, name))
                if not stat.S_ISDIR(status.st_mode):
                    tally.add_file((folder / name).as_posix(), status.st_size)


def list_files(folder: Path) -> Mapping[str, int]:
    """Size in bytes of every file below ``folder``, by POSIX path relative to it, sorted.

    Raises:
        IntakeError: for a symbolic link, a file with a second hard link (its bytes could change after the check), a
        device,
            socket or pipe, an unusual name, or more files, bytes or levels than the limits of this module.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise refusal(str(folder), "no plain folder", "a folder of model files was expected", "Give its real path.")
    sizes: dict[str, int] = {}
    tally = Tally()
    for path, entry in _walk(folder, "", 0, tally):
        sizes[path] = _size_of_plain_file(path, entry.stat(follow_symlinks=False))
        tally.add_file(path, sizes[path])
    return dict(sorted(sizes.items()))


def _walk(folder: Path, prefix: str, depth: int, tally: Tally) -> Iterator[tuple[str, os.DirEntry[str]]]:
    tally.add_folder(prefix, depth)
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if not entry.name.isprintable() or "\\" in entry.name:
                raise refusal(path, "an unusual file name", "it may mean another file elsewhere", _COPY_PLAIN_FILES)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, path + "/", depth + 1, tally)
            else:
                yield path, entry


def _size_of_plain_file(path: str, status: os.stat_result) -> int:
    if stat.S_ISLNK(status.st_mode):
        raise refusal(path, "a symbolic link", "it can point outside the model's folder", _COPY_PLAIN_FILES)
    if not stat.S_ISREG(status.st_mode):
        raise refusal(path, "a device, pipe or socket", "only plain files can be checked", _COPY_PLAIN_FILES)
    if status.st_nlink > 1:
        raise refusal(
            path,
            f"a file with {status.st_nlink} hard links",
            "its bytes can be changed, or belong to a file, outside the model's folder",
            _COPY_PLAIN_FILES,
        )
    return status.st_size


@contextmanager
def opened(file: Path) -> Iterator[memoryview]:
    """The bytes of ``file``, read lazily, so that a large model is not copied into memory."""
    with file.open("rb") as stream:
        if file.stat().st_size == 0:
            yield memoryview(b"")
            return
        # Not closed by hand: views of it may outlive the block inside an exception, and the garbage collector frees it
        # then.
        yield memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
