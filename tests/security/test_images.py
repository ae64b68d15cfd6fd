"""Images that are bombs, links, or no images, in folders and ``.npz`` files; the sender of suspect inputs controls them.

Pickles in NumPy files: CVE-2019-6446. Decompression bombs: Pillow's own limit; bombs behind its less used decoders, such as
FITS in CVE-2026-40192 (GHSA-whj4-6x5x-4v2j), need those decoders to be open, and here four are.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit_plugin.data.clean_set import LoadedImages, load_images
from audit_plugin.errors import CleanSetError
from audit_plugin.types import InputSpec

SPEC = InputSpec(height=8, width=8, channels=3)
NAMES = ("cat", "dog")
MEBIBYTE = 2**20


def load(path: Path, *, labels_required: bool = True) -> LoadedImages:
    return load_images(path, input_spec=SPEC, class_names=NAMES, labels_required=labels_required)


@contextmanager
def refused(phrase: str, most_mebibytes: float = 32) -> Iterator[None]:
    """The block must end in one line that holds ``phrase``, without taking more memory than this."""
    tracemalloc.start()
    try:
        with pytest.raises(CleanSetError, match=phrase) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000
    assert peak < most_mebibytes * MEBIBYTE


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *further: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join([chunk(b"IHDR", header), *further, chunk(b"IDAT", zlib.compress(pixels, 9)), chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


FILES: dict[str, tuple[bytes, str]] = {
    "bomb.png": (png(8, 8, bytes(200 * MEBIBYTE)), ""),  # far more pixels than declared
    "wide.png": (png(60_000, 60_000, bytes(MEBIBYTE)), "more pixels than Pillow's limit"),
    "large.png": (png(8_000, 8_000, bytes(MEBIBYTE)), "8000 x 8000 pixels, the model expects 8 x 8"),
    "text.png": (png(8, 8, bytes(200), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300 * MEBIBYTE)))), "no.* readable image"),
    "cut.png": (encoded(picture())[:60], "not a readable image"),
    "empty.png": (b"", "not a readable image"),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "not a readable image"),
    "moving.png": (animation("GIF"), "not a readable image"),
    "frames.png": (animation("PNG"), "is an animation"),
    "frames.webp": (animation("WEBP"), "is an animation"),
    "script.jpg": (b"#!/bin/sh\ntouch fired\n", "not a readable image"),
    "fits.png": (b"SIMPLE  =                    T" + b" " * 2850, "not a readable image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a readable image"),
    "ink.jpg": (encoded(picture("CMYK"), "JPEG"), "colour mode CMYK"),
    "deep.png": (encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "16 bits a channel|colour mode I"),
    "glass.png": (encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4))), "transparent pixels"),
    "notes.txt": (b"hello", "is none of .png"),
    "picture.svg": (b"<svg/>", "is none of .png"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_plain_image_is_refused(name: str, tmp_path: Path) -> None:
    content, phrase = FILES[name]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(content)
    if phrase:
        with refused(phrase):
            load(tmp_path)
    else:  # read as far as the declared size goes
        assert load(tmp_path).data.images.shape == (1, 8, 8, 3)


def test_the_extension_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "really_a_png.jpg").write_bytes(encoded(picture()))
    assert (load(tmp_path).data.images[0] == np.asarray(picture())).all()


def test_a_rotation_in_the_metadata_is_not_obeyed(tmp_path: Path) -> None:
    """Two readers could see two images; here it is always the stored one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(encoded(picture(), exif=exif))
    assert (load(tmp_path).data.images[0] == np.asarray(picture())).all()


def linked_file(folder: Path, secret: Path) -> None:
    (folder / "cat" / "a.png").symlink_to(secret)


def linked_folder(folder: Path, secret: Path) -> None:
    (folder / "dog").symlink_to(secret.parent)


def pipe(folder: Path, secret: Path) -> None:
    os.mkfifo(folder / "cat" / "a.png")


def folder_in_folder(folder: Path, secret: Path) -> None:
    (folder / "cat" / "more").mkdir()


@pytest.mark.parametrize(
    ("put", "phrase"),
    [
        (linked_file, "'cat/a.png'.* is a link"),
        (linked_folder, "'dog'.* is a link"),
        (pipe, "a pipe"),
        (folder_in_folder, "no file"),
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_file_of_the_folder_is_refused(put: Callable[[Path, Path], None], phrase: str, tmp_path: Path) -> None:
    secret = tmp_path / "private" / "secret.png"
    secret.parent.mkdir()
    secret.write_bytes(encoded(picture()))
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "b.png").write_bytes(encoded(picture()))
    put(folder, secret)
    with refused(phrase):
        load(folder)


@pytest.mark.timeout(20)
def test_suspects_are_no_exception(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    assert len(load(tmp_path, labels_required=False).data) == 1
    os.mkfifo(tmp_path / "b.png")
    with refused("'b.png'.* a pipe"):
        load(tmp_path, labels_required=False)


# ------------------------------------------------------------------------------------------------------------- npz


class Touch:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mknod, ("npz.fired",)


def npy(shape: str, kind: str, body: bytes = b"", order: str = "False") -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def plain(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


GOOD_IMAGES, GOOD_LABELS = plain(np.zeros((4, 8, 8, 3), np.uint8)), plain(np.array([0, 1, 0, 1]))
ARRAYS: dict[str, tuple[bytes, bytes, str]] = {
    "pickled images": (npy("(1,)", "'|O'", pickle.dumps([Touch()])), GOOD_LABELS, "array of Python objects"),
    "pickled labels": (GOOD_IMAGES, npy("(4,)", "'|O'", pickle.dumps(Touch())), "array of Python objects"),
    "object in a structure": (npy("(1,)", "[('a', '|O')]", pickle.dumps(Touch())), GOOD_LABELS, "array of Python objects"),
    "code in the header": (npy("__import__('os').mknod('npz.fired')", "'|u1'"), GOOD_LABELS, "is damaged"),
    "nested header": (npy("(" * 4_000 + ")" * 4_000, "'|u1'"), GOOD_LABELS, "is damaged"),
    "terabytes": (npy("(10000000, 512, 512, 3)", "'|u1'"), GOOD_LABELS, "the limit is 4 GiB"),
    "more than 64 bits": (npy("(10**9, )".replace("10**9", "9" * 40), "'|u1'"), GOOD_LABELS, "the limit is 4 GiB"),
    "negative": (npy("(-4, 8, 8, 3)", "'|u1'", bytes(768)), GOOD_LABELS, r"declares shape \(-4"),
    "labels of gigabytes": (GOOD_IMAGES, npy("(400000000,)", "'<i8'"), "the limit is 0.125 GiB"),
    "less than declared": (npy("(4, 8, 8, 3)", "'|u1'", bytes(100)), GOOD_LABELS, "its header declares 768 bytes, 100 are there"),
    "more than declared": (npy("(4, 8, 8, 3)", "'|u1'", bytes(900)), GOOD_LABELS, "is damaged"),
    "floats": (plain(np.full((4, 8, 8, 3), np.nan)), GOOD_LABELS, "float64, expected uint8"),
    "negative pixels": (plain(np.full((4, 8, 8, 3), -5, np.int16)), GOOD_LABELS, "int16, expected uint8"),
    "text": (plain(np.full((4, 8, 8, 3), "a")), GOOD_LABELS, "expected uint8"),
    "complex labels": (GOOD_IMAGES, plain(np.zeros(4, complex)), "complex128, expected integers"),
    "labels that are NaN": (GOOD_IMAGES, plain(np.full(4, np.nan)), "float64, expected integers"),
    "labels out of range": (GOOD_IMAGES, plain([0, 1, 2, 99]), r"labels outside the model's 2 classes \(0 to 1\): 2, 99"),
    "negative labels": (GOOD_IMAGES, plain([0, 1, -1, 0]), "labels outside the model's 2 classes"),
    "labels beyond 64 bits": (GOOD_IMAGES, plain(np.full(4, 2**64 - 1, np.uint64)), "expected the index of a class"),
    "too few labels": (GOOD_IMAGES, plain([0, 1]), r"expected \(4,\)"),
}


def archive(path: Path, images: bytes, labels: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as target:
        target.writestr("images.npy", images)
        target.writestr("labels.npy", labels)
    return path


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_no_set_of_images_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels, phrase = ARRAYS[name]
    with refused(phrase):
        load(archive(tmp_path / "set.npz", images, labels))
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.npz"]


def test_a_bomb_in_an_npz_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A kilobyte of file in which 64 MiB hide behind a header that declares none of them."""
    bomb = npy("(4, 8, 8, 3)", "'|u1'", bytes(64 * MEBIBYTE))
    path = archive(tmp_path / "set.npz", bomb, GOOD_LABELS)
    assert path.stat().st_size < MEBIBYTE
    with refused("its header declares 768 bytes, 67108864 are there", most_mebibytes=8):
        load(path)


def test_a_directory_that_declares_less_than_it_unpacks_to_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "set.npz", npy("(4, 8, 8, 3)", "'|u1'", bytes(64 * MEBIBYTE)), GOOD_LABELS)
    content = path.read_bytes().replace(struct.pack("<I", 64 * MEBIBYTE + 128), struct.pack("<I", 128 + 768))
    path.write_bytes(content)
    with refused("is damaged", most_mebibytes=8):
        load(path)


def test_an_encrypted_or_nested_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "set.npz", GOOD_IMAGES, GOOD_LABELS, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for start in (index for index in range(len(content)) if content[index : index + 4] == b"PK\x01\x02"):
        content[start + 8] |= 1
    path.write_bytes(bytes(content))
    with refused("is damaged: File .*images.npy.* is encrypted"):
        load(path)
    nested = archive(tmp_path / "nested.npz", path.read_bytes(), GOOD_LABELS)
    with refused("is damaged"):
        load(nested)
