"""A ZIP archive exactly as torch writes it, read so that no other reader can see anything else in it.

Torch reads with miniz, Python with ``zipfile``; they disagree about prefixes, comments, duplicate names, letter case
and local headers. This reader accepts none of what they could disagree about: members lie one after the other from byte
0, each is stored (not compressed, so there are no bombs), its local header says the same as the central directory, and
nothing follows the end record.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from audit_plugin.errors import IntakeError
from audit_plugin.intake.refusal import FETCH_AGAIN, quoted, refusal

ZIP_MAGIC = b"PK\x03\x04"

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_SIZES_FOLLOW = 0x0008  # the local header leaves sizes to a descriptor after the data
_UTF8_NAMES = 0x0800
_STORED = 0
_MOST_MEMBERS = 20_000
_LARGEST_ARCHIVE = 2**32 - 2  # above, ZIP64 sizes appear in extra fields, which readers treat differently
# The root is the stem of the file's first name, so nearly anything printable; the rest is torch's own.
_NAME = re.compile(r"(?=.{1,500}\Z)[ -.0-\[\]-~]+(/(?!\.+(/|\Z))[A-Za-z0-9_.\-]+)+")


@dataclass(frozen=True)
class Archive:
    """``members`` by name, without the ``root`` folder that torch puts in front of every name."""

    root: str
    members: Mapping[str, memoryview]


@dataclass(frozen=True)
class _Entry:
    name: str
    flags: int
    checksum: int
    size: int
    start: int


def read_archive(path: str, data: memoryview) -> Archive:
    """Split the archive ``data`` (found at ``path``, for messages) into its members.

    Raises:
        IntakeError: when it is damaged, or anything that torch does not write and readers could interpret in two ways:
        bytes
            before, between or after the members, duplicate names (in any letter case), absolute names or '..',
            compression, encryption, comments, contradicting headers, several root folders.
    """
    try:
        entries = _central_directory(path, data)
        views = _members(path, data, entries)
    except struct.error as error:
        raise _damaged(path, "an archive that ends too early") from error
    roots = {name.split("/", 1)[0] for name in views}
    if len(roots) != 1:
        raise _damaged(path, f"{len(roots)} root folders in the archive")
    (root,) = roots
    return Archive(root, {name.removeprefix(root + "/"): view for name, view in views.items()})


def _central_directory(path: str, data: memoryview) -> list[_Entry]:
    """The entries in order of their position, all plain; the last one ends where the directory starts."""
    if len(data) > _LARGEST_ARCHIVE:
        raise refusal(path, f"an archive of {len(data)} bytes", "the limit is 4 GiB", "Audit a smaller model.")
    count, size, start, end = _end_record(path, data)
    if count > _MOST_MEMBERS or start + size != end:
        raise _damaged(path, "a central directory that does not fill the space before the end record")
    entries, position, seen = [], start, set[str]()
    for _ in range(count):
        magic, _, _, flags, method, _, _, checksum, packed, unpacked, *rest = _CENTRAL.unpack_from(data, position)
        name_size, extra_size, comment_size, disk, _, _, offset = rest
        position += _CENTRAL.size
        name = bytes(data[position : position + name_size]).decode("ascii", "backslashreplace")
        position += name_size
        if magic != b"PK\x01\x02" or extra_size or comment_size or disk:
            raise _damaged(path, f"an unusual directory entry for {quoted(name)}")
        if not _NAME.fullmatch(name) or ".." in name:
            raise _damaged(path, f"the member name {quoted(name)}, which torch never writes")
        if name.casefold() in seen:
            raise _damaged(path, f"two members called {quoted(name)}, of which readers open different ones")
        if "/code/__torch__" in name:
            raise refusal(path, "TorchScript", "it holds code of its own", "Log the model as .pt2 (torch.export) instead.")
        if method != _STORED or packed != unpacked or flags & ~(_SIZES_FOLLOW | _UTF8_NAMES):
            raise _damaged(path, f"the compressed or encrypted member {quoted(name)}")
        seen.add(name.casefold())
        entries.append(_Entry(name, flags, checksum, unpacked, offset))
    if position != end:
        raise _damaged(path, "a central directory of another size than announced")
    return [*sorted(entries, key=lambda entry: entry.start), _Entry("", 0, 0, 0, start)]


def _end_record(path: str, data: memoryview) -> tuple[int, int, int, int]:
    """Number of members, size and start of the directory, and where it has to end."""
    position = len(data) - _END.size
    magic, disk, first_disk, here, count, size, start, comment_size = _END.unpack_from(data, max(position, 0))
    if magic != b"PK\x05\x06" or disk or first_disk or here != count or comment_size:
        raise _damaged(path, "no ZIP end record in the last 22 bytes (bytes appended, a comment, or several disks)")
    position -= _LOCATOR64.size
    if position < 0 or bytes(data[position : position + 4]) != b"PK\x06\x07":
        return count, size, start, position + _LOCATOR64.size
    _, locator_disk, position_64, disks = _LOCATOR64.unpack_from(data, position)
    if position_64 != position - _END64.size or locator_disk or disks != 1:
        raise _damaged(path, "a ZIP64 locator that points elsewhere")
    magic, record_size, _, _, disk, first_disk, here_64, count_64, size_64, start_64 = _END64.unpack_from(data, position_64)
    if magic != b"PK\x06\x06" or record_size != _END64.size - 12 or disk or first_disk:
        raise _damaged(path, "an unusual ZIP64 end record")
    if (here_64, count_64, size_64, start_64) != (count, count, size, start):
        raise _damaged(path, "two end records that contradict each other")
    return count, size, start, position_64


def _members(path: str, data: memoryview, entries: list[_Entry]) -> dict[str, memoryview]:
    """Every member's bytes, after proof that local headers agree and no byte belongs to nobody."""
    members: dict[str, memoryview] = {}
    expected = 0
    for entry, following in itertools.pairwise(entries):
        magic, _, flags, method, _, _, checksum, packed, unpacked, name_size, extra_size = _LOCAL.unpack_from(data, entry.start)
        name_end = entry.start + _LOCAL.size + name_size
        start = name_end + extra_size
        deferred = bool(flags & _SIZES_FOLLOW)
        announced = (checksum, packed, unpacked)
        if (
            entry.start != expected
            or (magic, flags, method) != (ZIP_MAGIC, entry.flags, _STORED)
            or bytes(data[entry.start + _LOCAL.size : name_end]) != entry.name.encode("ascii")
            or (announced != (entry.checksum, entry.size, entry.size) and not (deferred and announced == (0, 0, 0)))
        ):
            raise _damaged(path, f"a local header that contradicts the directory about {quoted(entry.name)}")
        end = start + entry.size
        _check_descriptor(path, bytes(data[end : following.start]), entry, deferred)
        members[entry.name] = data[start:end]
        expected = following.start
    if not members or expected != entries[-1].start:
        raise _damaged(path, "no members in the archive")
    return members


def _check_descriptor(path: str, found: bytes, entry: _Entry, deferred: bool) -> None:
    allowed = [b""]
    if deferred:
        sizes = (entry.size, entry.size)
        allowed = [struct.pack(layout, _DESCRIPTOR_MAGIC, entry.checksum, *sizes) for layout in ("<4sIII", "<4sIQQ")]
    if found not in allowed:
        raise _damaged(path, f"bytes that belong to no member after {quoted(entry.name)}")


def _damaged(path: str, found: str) -> IntakeError:
    return refusal(path, found, "readers could see different contents in such an archive", FETCH_AGAIN)
