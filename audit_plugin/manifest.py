"""Which bytes a model is made of: a list of its files, and one digest over it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from audit_plugin.types import FileEntry

_CHUNK = 1024 * 1024


def manifest_of(folder: Path) -> tuple[FileEntry, ...]:
    """Every regular file below ``folder``, sorted by path; links are left to intake, which refuses them."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
            entries.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, digest.hexdigest()))
    return tuple(entries)


def digest_of(manifest: tuple[FileEntry, ...]) -> str:
    """``sha256:<hex>`` over the lines 'sha256 size path' of a manifest, each path as a JSON string so that no name can pose as
    two lines."""
    lines = "".join(f"{entry.sha256} {entry.size} {json.dumps(entry.path)}\n" for entry in manifest)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
