"""Archives in which torch (miniz) and Python could see different contents, or that write outside, or explode.

GHSA-w8jq-xcqf-f792 (a flag bit) and GHSA-7q5r-7gvp-wc82 of picklescan: archives that PyTorch read and the scanner did not.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

import pytest


def with_member(archive: bytes, name: str, content: bytes = b"x", compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as target:
        target.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def plain(rewritten: Callable[..., bytes]) -> bytes:
    """The model as Python's zipfile writes it: accepted as it is."""
    return rewritten({})


@pytest.fixture(scope="module")
def root(plain: bytes) -> str:
    return zipfile.ZipFile(io.BytesIO(plain)).namelist()[0].split("/")[0]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "{root}/../evil", "{root}/a\\b", "evil", "{root}//evil", "other/evil"])
def test_names_outside_the_layout_are_refused(name: str, plain: bytes, root: str, refused: Callable) -> None:
    refused({"model.pt2": with_member(plain, name.format(root=root))}, "member name|root folders")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["models/model.json", "models/MODEL.json"])
def test_a_second_member_of_the_same_name_is_refused(name: str, plain: bytes, root: str, refused: Callable) -> None:
    """torch looks names up without regard to case and opens the first, Python the last."""
    refused({"model.pt2": with_member(plain, f"{root}/{name}")}, "two members called")


def test_a_bomb_is_refused_because_nothing_may_be_compressed(plain: bytes, root: str, refused: Callable) -> None:
    bomb = with_member(plain, f"{root}/data/weights/weight_9", bytes(10_000_000), zipfile.ZIP_DEFLATED)
    refused({"model.pt2": bomb}, "compressed or encrypted")


def test_an_encrypted_member_is_refused(plain: bytes, refused: Callable) -> None:
    content = bytearray(plain)
    position = content.rindex(b"PK\x01\x02")
    content[position + 8] |= 1
    refused({"model.pt2": bytes(content)}, "compressed or encrypted")


def test_bytes_around_the_archive_are_refused(plain: bytes, refused: Callable) -> None:
    refused({"model.pt2": plain + b"appended"}, "no ZIP end record")


def test_a_comment_is_refused(plain: bytes, refused: Callable) -> None:
    buffer = io.BytesIO(plain)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"a second archive could hide here"
    refused({"model.pt2": buffer.getvalue()}, "no ZIP end record")


def test_an_archive_behind_another_is_refused(plain: bytes, refused: Callable) -> None:
    """Python's zipfile tolerates a prefix by shifting all offsets."""
    prefix = b"PK\x03\x04" + bytes(60)
    assert zipfile.ZipFile(io.BytesIO(prefix + plain)).namelist()
    refused({"model.pt2": prefix + plain}, "central directory")


def test_a_local_header_with_another_name_is_refused(plain: bytes, refused: Callable) -> None:
    content = bytearray(plain)
    content[30:35] = b"trick"
    refused({"model.pt2": bytes(content)}, "contradicts the directory")


def test_a_local_header_with_another_size_is_refused(plain: bytes, refused: Callable) -> None:
    content = bytearray(plain)
    struct.pack_into("<I", content, 18, 1)
    refused({"model.pt2": bytes(content)}, "contradicts the directory")


def test_hidden_bytes_between_members_are_refused(plain: bytes, refused: Callable) -> None:
    content = bytearray(plain)
    (position,) = struct.unpack_from("<I", content, len(content) - 6)  # where the directory starts
    content[position:position] = b"hidden"
    struct.pack_into("<I", content, len(content) - 6, position + len(b"hidden"))
    refused({"model.pt2": bytes(content)}, "belong to no member")


def test_a_tensor_larger_than_its_record_is_refused(rewritten: Callable[..., bytes], refused: Callable) -> None:
    refused({"model.pt2": rewritten({"data/weights/weight_0": b"\0\0\0\0"})}, "larger than its record")
    refused({"model.pt2": rewritten({"data/weights/weight_0": None})}, "without its record")
