"""Which bytes a model is made of: a list of its files, and one digest over it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

from audit_plugin.types import FileEntry

_CHUNK = 1024 * 1024


def manifest_of(folder: Path) -> tuple[FileEntry, ...]:
    """Everything below ``folder`` but the folders, sorted by path.

    A link, pipe or device, which intake refuses, is not followed. It is an entry all the same, as one more file would be, since a
    loader of models may follow it. Its size is 0 and its hash that of its kind and target, which no empty file has.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        mode, digest, size = path.lstat().st_mode, hashlib.sha256(), 0
        if stat.S_ISDIR(mode):
            continue
        if stat.S_ISREG(mode):
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
            size = path.stat().st_size
        else:
            target = os.fsencode(path.readlink()) if stat.S_ISLNK(mode) else b""
            digest.update(stat.filemode(mode)[:1].encode() + target)
        entries.append(FileEntry(path.relative_to(folder).as_posix(), size, digest.hexdigest()))
    return tuple(entries)


def digest_of(manifest: tuple[FileEntry, ...]) -> str:
    """``sha256:<hex>`` over the lines 'sha256 size path' of a manifest, each path as a JSON string so that no name can pose as
    two lines."""
    lines = "".join(f"{entry.sha256} {entry.size} {json.dumps(entry.path)}\n" for entry in manifest)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
