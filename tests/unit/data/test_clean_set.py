"""Reading clean and suspect images: what comes out is what was saved, and what does not fit is named."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit_plugin.data import clean_set
from audit_plugin.data.clean_set import UNKNOWN_LABEL, LoadedImages, load_images
from audit_plugin.errors import AuditError, CleanSetError
from audit_plugin.types import InputSpec

RGB = InputSpec(height=5, width=4, channels=3)
GREY = InputSpec(height=5, width=4, channels=1)
PETS = ("cat", "dog", "fish")


@pytest.fixture
def colours() -> np.ndarray:
    """Six different coloured images, uint8 (6, 5, 4, 3)."""
    return np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def pets_folder(root: Path, images: np.ndarray, names: tuple[str, ...] = PETS) -> Path:
    """Two images a class, in order."""
    for row, image in enumerate(images):
        save(root / names[row // 2] / f"{row}.png", image)
    return root


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def message(path: Path, spec: InputSpec = RGB, names: tuple[str, ...] = PETS, *, labels_required: bool = True) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(CleanSetError) as caught:
        load_images(path, input_spec=spec, class_names=names, labels_required=labels_required)
    line = str(caught.value)
    assert isinstance(caught.value, AuditError)
    assert "\n" not in line
    return line


# ----------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_back_the_pixels_that_were_saved_in_sorted_order(tmp_path: Path, colours: np.ndarray) -> None:
    loaded = load_images(pets_folder(tmp_path, colours), input_spec=RGB, class_names=PETS)
    assert isinstance(loaded, LoadedImages)
    np.testing.assert_array_equal(loaded.data.images, colours)
    assert loaded.data.images.dtype == np.uint8
    assert loaded.data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.data.labels.dtype == np.int64
    assert loaded.sources == ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "fish/4.png", "fish/5.png")
    assert loaded.notes == ()


def test_labels_follow_the_class_not_the_alphabet(tmp_path: Path, colours: np.ndarray) -> None:
    loaded = load_images(pets_folder(tmp_path, colours), input_spec=RGB, class_names=("fish", "cat", "dog"))
    assert loaded.data.labels.tolist() == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("folders", "class_names", "expected"),
    [
        (("0", "1", "2"), PETS, [0, 0, 1, 1, 2, 2]),
        (("00000", "00001", "00002"), PETS, [0, 0, 1, 1, 2, 2]),
        (("00000", "00001", "00002"), ("2", "1", "0"), [2, 2, 1, 1, 0, 0]),
        (("5", "6", "7"), ("7", "6", "5"), [2, 2, 1, 1, 0, 0]),
    ],
)
def test_folders_may_be_numbers(
    tmp_path: Path, colours: np.ndarray, folders: tuple[str, ...], class_names: tuple[str, ...], expected: list[int]
) -> None:
    loaded = load_images(pets_folder(tmp_path, colours, folders), input_spec=RGB, class_names=class_names)
    assert loaded.data.labels.tolist() == expected


def test_an_index_is_not_taken_where_classes_are_called_by_numbers(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(pets_folder(tmp_path, colours, ("1", "6", "7")), names=("5", "6", "7"))
    assert "folder '1'" in line
    assert "no class of the model" in line


def test_folders_of_a_model_without_class_names_are_taken_alphabetically_and_noted(tmp_path: Path, colours: np.ndarray) -> None:
    loaded = load_images(pets_folder(tmp_path, colours), input_spec=RGB, class_names=("0", "1", "2"))
    assert loaded.data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(loaded.notes) == 1
    assert "alphabetical" in loaded.notes[0]
    assert "'cat', 'dog', 'fish'" in loaded.notes[0]


def test_fewer_folders_than_unnamed_classes_are_not_guessed(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(pets_folder(tmp_path, colours), names=("0", "1", "2", "3"))
    assert "folder 'cat'" in line
    assert "0 to 3" in line


def test_an_unknown_folder_names_the_nearest_class(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(pets_folder(tmp_path, colours, ("cat", "dgo", "fish")))
    assert "folder 'dgo'" in line
    assert "Did you mean 'dog'?" in line


def test_two_folders_of_one_class_are_refused(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(pets_folder(tmp_path, colours, ("cat", "0", "fish")))
    assert "'0', 'cat'" in line
    assert "class 0 ('cat')" in line


def test_an_empty_class_is_allowed_and_clutter_is_ignored(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours[:4])
    (tmp_path / "fish").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "README.txt").write_text("hello")
    loaded = load_images(tmp_path, input_spec=RGB, class_names=PETS)
    assert loaded.data.labels.tolist() == [0, 0, 1, 1]
    assert "'README.txt'" in loaded.notes[0]


def test_a_missing_path_is_one_clear_line_with_the_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "cleanset").mkdir()
    line = message(tmp_path / "clean_set")
    assert "does not exist" in line
    assert "Did you mean 'cleanset'?" in line
    assert "does not exist" in message(tmp_path / "no" / "such" / "folder")


def test_folders_without_images(tmp_path: Path) -> None:
    assert "holds no image" in message(tmp_path)
    (tmp_path / "cat").mkdir()
    line = message(tmp_path)
    assert "holds no image" in line
    assert "one sub-folder a class (for example 'cat')" in line


def test_loose_images_have_no_class(tmp_path: Path, colours: np.ndarray) -> None:
    save(tmp_path / "loose.png", colours[0])
    line = message(tmp_path)
    assert "'loose.png'" in line
    assert "sub-folder named after its class" in line
    pets_folder(tmp_path, colours)
    assert "beside its sub-folders" in message(tmp_path)


def test_an_image_of_another_size_is_never_resized(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours)
    save(tmp_path / "dog" / "big.png", np.zeros((9, 7, 3), np.uint8))
    line = message(tmp_path)
    assert "'dog/big.png' is 9 x 7 pixels" in line
    assert "expects 5 x 4" in line
    assert "nothing is resized" in line


def test_height_and_width_are_not_exchanged(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", np.zeros((4, 5, 3), np.uint8))
    assert "is 4 x 5 pixels" in message(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\nbroken", b"GIF89a" + bytes(40)])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, colours: np.ndarray, content: bytes) -> None:
    pets_folder(tmp_path, colours)
    (tmp_path / "dog" / "bad.png").write_bytes(content)
    line = message(tmp_path)
    assert "'dog/bad.png' is not a readable image" in line


def test_a_truncated_image_is_named(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours)
    whole = (tmp_path / "dog" / "2.png").read_bytes()
    (tmp_path / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    assert "'dog/2.png' is not a readable image" in message(tmp_path)


def test_other_files_and_folders_inside_a_class_are_refused(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours)
    (tmp_path / "dog" / "labels.csv").write_text("a,b")
    assert re.search(r"'dog/labels\.csv'.*none of \.png", message(tmp_path))
    (tmp_path / "dog" / "labels.csv").unlink()
    (tmp_path / "dog" / "puppies").mkdir()
    assert "'dog/puppies'" in message(tmp_path)
    assert "no further folders" in message(tmp_path)


def test_a_format_is_told_by_content_so_that_no_other_decoder_runs(tmp_path: Path, colours: np.ndarray) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(colours[0]).save(tmp_path / "cat" / "a.tiff")
    (tmp_path / "cat" / "a.tiff").rename(tmp_path / "cat" / "a.png")
    assert "'cat/a.png' is not a readable image" in message(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save(tmp_path / "cat" / "bomb.png", np.zeros((50, 50, 3), np.uint8))
    line = message(tmp_path)
    assert "'cat/bomb.png'" in line
    assert "decompression bomb" in line


def test_a_folder_that_decodes_to_too_much_is_refused(
    tmp_path: Path, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_set, "SIZE_LIMIT", 6 * 5 * 4 * 3)
    pets_folder(tmp_path, colours)
    load_images(tmp_path, input_spec=RGB, class_names=PETS)
    save(tmp_path / "cat" / "more.png", colours[0])
    assert "holds 7 images" in message(tmp_path)


# ------------------------------------------------------------------------------------------------ colour modes


def one(tmp_path: Path, spec: InputSpec) -> np.ndarray:
    return load_images(tmp_path, input_spec=spec, class_names=PETS).data.images[0]


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_formats_give_the_same_pixels(tmp_path: Path, colours: np.ndarray, suffix: str) -> None:
    save(tmp_path / "cat" / f"a.{suffix.upper()}", colours[0], **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(one(tmp_path, RGB), colours[0])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpeg_is_read(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / "cat" / f"a.{suffix}", np.full((5, 4, 3), 128, np.uint8))
    np.testing.assert_allclose(one(tmp_path, RGB), 128, atol=1)


def test_grey_is_repeated_over_three_channels(tmp_path: Path, colours: np.ndarray) -> None:
    save(tmp_path / "cat" / "a.png", colours[0, :, :, 0])
    np.testing.assert_array_equal(one(tmp_path, RGB), np.stack([colours[0, :, :, 0]] * 3, axis=-1))
    np.testing.assert_array_equal(one(tmp_path, GREY), colours[0, :, :, :1])


def test_colour_becomes_grey_only_where_nothing_is_lost(tmp_path: Path, colours: np.ndarray) -> None:
    grey = np.repeat(colours[0, :, :, :1], 3, axis=-1)
    save(tmp_path / "cat" / "a.png", grey)
    np.testing.assert_array_equal(one(tmp_path, GREY), grey[..., :1])
    grey[2, 1, 2] ^= 1
    save(tmp_path / "cat" / "a.png", grey)
    line = message(tmp_path, GREY)
    assert "'cat/a.png' is coloured" in line
    assert "expects grey" in line


def test_alpha_is_dropped_only_where_opaque(tmp_path: Path, colours: np.ndarray) -> None:
    opaque = np.concatenate([colours[0], np.full((5, 4, 1), 255, np.uint8)], axis=-1)
    save(tmp_path / "cat" / "a.png", opaque)
    np.testing.assert_array_equal(one(tmp_path, RGB), colours[0])
    opaque[0, 0, 3] = 254
    save(tmp_path / "cat" / "a.png", opaque)
    assert "'cat/a.png' has transparent pixels" in message(tmp_path)


def test_palette_and_bilevel_images_are_resolved(tmp_path: Path) -> None:
    two_colours = np.zeros((5, 4, 3), np.uint8)
    two_colours[:, :2] = (10, 20, 30)
    save(tmp_path / "cat" / "a.png", two_colours, "P", optimize=True)
    assert Image.open(tmp_path / "cat" / "a.png").mode == "P"
    decoded = np.asarray(Image.open(tmp_path / "cat" / "a.png").convert("RGB"))
    np.testing.assert_array_equal(one(tmp_path, RGB), decoded)
    bilevel = np.zeros((5, 4), np.uint8)
    bilevel[1:3] = 255
    save(tmp_path / "cat" / "a.png", bilevel, "1")
    assert Image.open(tmp_path / "cat" / "a.png").mode == "1"
    np.testing.assert_array_equal(one(tmp_path, GREY)[..., 0], bilevel)


def test_a_transparent_palette_colour_is_seen(tmp_path: Path) -> None:
    image = Image.new("P", (4, 5), 0)
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putpixel((0, 0), 1)
    (tmp_path / "cat").mkdir()
    image.save(tmp_path / "cat" / "a.png", transparency=1)
    assert "transparent" in message(tmp_path)


@pytest.mark.parametrize(("mode", "seen", "unseen"), [("RGB", (1, 2, 3), (9, 9, 9)), ("L", 7, 9), ("1", 0, 1)])
def test_a_colour_declared_transparent_matters_only_where_it_occurs(
    tmp_path: Path, mode: str, seen: object, unseen: object
) -> None:
    (tmp_path / "cat").mkdir()
    image = Image.new(mode, (4, 5), seen)
    image.save(tmp_path / "cat" / "a.png", transparency=seen)
    assert "'cat/a.png' has transparent pixels" in message(tmp_path)
    image.save(tmp_path / "cat" / "a.png", transparency=unseen)
    np.testing.assert_array_equal(one(tmp_path, RGB), np.asarray(image.convert("RGB")))


def png_of_16_bits(path: Path) -> None:
    """Pillow cannot write 48-bit colour, so chunk by chunk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(4 * 3 * 2)) for _ in range(5))
    header = struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_deeper_colour_is_not_cut_silently(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    png_of_16_bits(tmp_path / "cat" / "a.png")
    assert Image.open(tmp_path / "cat" / "a.png").mode == "RGB"  # what makes the check necessary
    line = message(tmp_path)
    assert "'cat/a.png' has 16 bits a channel" in line
    assert "8-bit" in line
    save(tmp_path / "cat" / "a.png", np.zeros((5, 4), np.uint16))
    assert "16 bits" in message(tmp_path, GREY)


def test_cmyk_and_animations_are_refused(tmp_path: Path, colours: np.ndarray) -> None:
    save(tmp_path / "cat" / "a.jpg", colours[0], "CMYK")
    assert "colour mode CMYK" in message(tmp_path)
    (tmp_path / "cat" / "a.jpg").unlink()
    frames = [Image.fromarray(image) for image in colours[:2]]
    frames[0].save(tmp_path / "cat" / "a.png", save_all=True, append_images=frames[1:])
    assert "is an animation" in message(tmp_path)


# --------------------------------------------------------------------------------------------------------- npz


def test_npz_gives_back_what_was_saved(tmp_path: Path, colours: np.ndarray) -> None:
    path = npz(tmp_path / "a.npz", images=colours, labels=np.array([2, 1, 0, 0, 1, 2], np.uint8))
    loaded = load_images(path, input_spec=RGB, class_names=PETS)
    np.testing.assert_array_equal(loaded.data.images, colours)
    assert loaded.data.labels.tolist() == [2, 1, 0, 0, 1, 2]
    assert loaded.data.labels.dtype == np.int64
    assert loaded.sources[:2] == ("row 0", "row 1")
    assert len(loaded.sources) == 6


def test_npz_grey_without_channel_axis(tmp_path: Path, colours: np.ndarray) -> None:
    grey = colours[..., 0]
    path = npz(tmp_path / "a.npz", images=grey, labels=np.zeros(6, int))
    np.testing.assert_array_equal(load_images(path, input_spec=GREY, class_names=PETS).data.images, grey[..., None])
    np.testing.assert_array_equal(load_images(path, input_spec=RGB, class_names=PETS).data.images, np.stack([grey] * 3, axis=-1))


def test_npz_in_fortran_order(tmp_path: Path, colours: np.ndarray) -> None:
    path = npz(tmp_path / "a.npz", images=np.asfortranarray(colours), labels=np.zeros(6, int))
    np.testing.assert_array_equal(load_images(path, input_spec=RGB, class_names=PETS).data.images, colours)


def test_npz_missing_keys_name_what_is_there_and_the_nearest(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(npz(tmp_path / "a.npz", image=colours, label=np.zeros(6, int)))
    assert "no array 'images'" in line
    assert "found: 'image', 'label'" in line
    assert "Did you mean 'image'?" in line
    line = message(npz(tmp_path / "b.npz", images=colours, classes=np.zeros(6, int)))
    assert "no array 'labels'" in line
    assert "savez_compressed" in line
    assert "Did you mean" not in message(npz(tmp_path / "c.npz", x=colours, y=np.zeros(6, int)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int8, np.bool_])
def test_npz_of_another_dtype_says_uint8(tmp_path: Path, colours: np.ndarray, dtype: type) -> None:
    line = message(npz(tmp_path / "a.npz", images=colours.astype(dtype), labels=np.zeros(6, int)))
    assert f"is {np.dtype(dtype)}" in line
    assert "expected uint8" in line
    assert ("* 255" in line) == np.issubdtype(dtype, np.floating)


def test_npz_pickles_are_never_opened(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Exploit:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (trace,))

    path = tmp_path / "a.npz"
    np.savez(path, images=np.array([Exploit()], dtype=object), labels=np.zeros(1, int), allow_pickle=True)
    line = message(path)
    assert "Python objects" in line
    assert "refused" in line
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Exploit()))
    assert "no .npz file" in message(tmp_path / "b.npz")
    assert not trace.exists()


def npz_with_header(path: Path, shape: tuple[int, ...], body: bytes, dtype: str = "|u1") -> Path:
    """An npz whose header of 'images' says what it likes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", buffer.getvalue() + body)
    return path


def test_npz_that_declares_too_much_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    line = message(npz_with_header(tmp_path / "a.npz", (10**6, 1000, 1000, 3), b""))
    assert "(1000000, 1000, 1000, 3)" in line
    assert "the limit is 4 GiB" in line
    assert "sample" in line


def test_npz_at_the_limit(tmp_path: Path, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "a.npz", images=colours, labels=np.zeros(6, int))
    monkeypatch.setattr(clean_set, "SIZE_LIMIT", colours.nbytes)
    load_images(path, input_spec=RGB, class_names=PETS)
    monkeypatch.setattr(clean_set, "SIZE_LIMIT", colours.nbytes - 1)
    assert "the limit is" in message(path)


@pytest.mark.parametrize(("shape", "body"), [((6, 5, 4, 3), b"short"), ((1, 5, 4, 3), bytes(100))])
def test_npz_whose_header_contradicts_its_size(tmp_path: Path, shape: tuple[int, ...], body: bytes) -> None:
    assert "is damaged" in message(npz_with_header(tmp_path / "a.npz", shape, body))


def test_npz_with_any_byte_flipped_gives_the_same_images_or_one_clear_error(tmp_path: Path, colours: np.ndarray) -> None:
    path = npz(tmp_path / "a.npz", images=colours, labels=np.zeros(6, int))
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 0xFF
        path.write_bytes(content)
        try:
            loaded = load_images(path, input_spec=RGB, class_names=PETS)
        except CleanSetError:
            refused += 1
            continue
        np.testing.assert_array_equal(loaded.data.images, colours)  # a time stamp was hit, say
        assert loaded.data.labels.tolist() == [0] * 6
    assert refused > len(whole) / 2


def test_npz_with_an_unreadable_header(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n")
    assert "is damaged" in message(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"not an array")
    assert "is damaged" in message(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x03\x00\x10\x00{'descr': '|u1'}")
    assert "npy format (3, 0)" in message(path)


def test_npz_of_another_shape(tmp_path: Path, colours: np.ndarray) -> None:
    zeros = np.zeros(6, int)
    line = message(npz(tmp_path / "a.npz", images=colours.transpose(0, 3, 1, 2), labels=zeros))
    assert "(6, 3, 5, 4)" in line
    assert "expects (N, 5, 4, 3)" in line
    assert "transpose(0, 2, 3, 1)" in line
    line = message(npz(tmp_path / "b.npz", images=colours[:, :4], labels=zeros))
    assert "nothing is resized" in line
    assert "shape ()" in message(npz(tmp_path / "c.npz", images=np.uint8(3), labels=zeros))
    assert "is empty" in message(npz(tmp_path / "d.npz", images=colours[:0], labels=zeros[:0]))
    assert "is coloured" in message(npz(tmp_path / "e.npz", images=colours, labels=zeros), GREY)
    assert "has 2 channels, the model expects 3" in message(npz(tmp_path / "f.npz", images=colours[..., :2], labels=zeros))


def test_npz_labels_of_another_kind(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(npz(tmp_path / "a.npz", images=colours, labels=np.zeros(6)))
    assert "'labels'" in line
    assert "expected integers" in line
    line = message(npz(tmp_path / "b.npz", images=colours, labels=np.zeros(5, int)))
    assert "(5,), expected (6,)" in line
    line = message(npz(tmp_path / "c.npz", images=colours, labels=np.eye(6, 3, dtype=int)))
    assert "argmax(axis=1)" in line
    line = message(npz(tmp_path / "e.npz", images=colours, labels=np.arange(6)[:, None]))
    assert "(6, 1), expected (6,)" in line
    assert "ravel()" in line
    assert "argmax" not in line
    assert "go up to" in message(npz(tmp_path / "d.npz", images=colours, labels=np.full(6, 2**63, np.uint64)))


def test_labels_outside_the_model_are_named_with_its_class_count(tmp_path: Path, colours: np.ndarray) -> None:
    line = message(npz(tmp_path / "a.npz", images=colours, labels=np.array([0, 1, 2, 7, 5, -1])))
    assert "outside the model's 3 classes (0 to 2): -1, 5, 7" in line
    line = message(npz(tmp_path / "b.npz", images=colours, labels=np.array([1, 2, 3, 1, 2, 3])))
    assert "start at 1" in line
    assert "start at 1" not in message(npz(tmp_path / "c.npz", images=colours, labels=np.array([0, 2, 3, 1, 2, 3])))


def test_a_file_that_is_neither(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    line = message(tmp_path / "a.npy")
    assert "no .npz file" in line
    assert "folder with one sub-folder a class" in line


# ---------------------------------------------------------------------------------------------------- suspects


def test_suspects_need_no_labels(tmp_path: Path, colours: np.ndarray) -> None:
    path = npz(tmp_path / "a.npz", images=colours)
    assert "no array 'labels'" in message(path)
    loaded = load_images(path, input_spec=RGB, class_names=PETS, labels_required=False)
    assert loaded.data.labels.tolist() == [UNKNOWN_LABEL] * 6
    np.testing.assert_array_equal(loaded.data.images, colours)
    for row, image in enumerate(colours):
        save(tmp_path / "flat" / f"{row}.png", image)
    loaded = load_images(tmp_path / "flat", input_spec=RGB, class_names=PETS, labels_required=False)
    assert loaded.data.labels.tolist() == [UNKNOWN_LABEL] * 6
    assert loaded.sources == tuple(f"{row}.png" for row in range(6))


def test_labels_of_suspects_are_used_where_there_are_any(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours)
    save(tmp_path / "loose.png", colours[0])
    loaded = load_images(tmp_path, input_spec=RGB, class_names=PETS, labels_required=False)
    assert loaded.sources[0] == "loose.png"
    assert loaded.data.labels.tolist() == [UNKNOWN_LABEL, 0, 0, 1, 1, 2, 2]
    path = npz(tmp_path / "a.npz", images=colours, labels=np.array([0, 1, 2, 3, 0, 1]))
    assert "3 classes" in message(path, labels_required=False)


def test_suspects_in_folders_that_are_no_classes_stay_unlabelled(tmp_path: Path, colours: np.ndarray) -> None:
    pets_folder(tmp_path, colours, ("friday", "monday", "sunday"))
    for names in (PETS, ("0", "1", "2")):  # never guessed by the alphabet, as a clean set would be
        loaded = load_images(tmp_path, input_spec=RGB, class_names=names, labels_required=False)
        assert loaded.data.labels.tolist() == [UNKNOWN_LABEL] * 6
        assert "unlabelled" in loaded.notes[0]
    save(tmp_path / "cat" / "a.png", colours[0])
    assert "folder 'friday'" in message(tmp_path, labels_required=False)


# ------------------------------------------------------------------------------------------- digest and pixels


def test_the_digest_is_of_shape_images_and_labels(tmp_path: Path, colours: np.ndarray) -> None:
    folder = load_images(pets_folder(tmp_path / "a", colours), input_spec=RGB, class_names=PETS)
    labels = np.array([0, 0, 1, 1, 2, 2])
    saved = load_images(npz(tmp_path / "a.npz", images=colours, labels=labels), input_spec=RGB, class_names=PETS)
    expected = hashlib.sha256(b"(6, 5, 4, 3)\n" + colours.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert folder.digest == saved.digest == f"sha256:{expected}"
    other = load_images(npz(tmp_path / "b.npz", images=colours, labels=labels[::-1]), input_spec=RGB, class_names=PETS)
    changed = colours.copy()
    changed[3, 2, 1, 0] ^= 1
    touched = load_images(npz(tmp_path / "c.npz", images=changed, labels=labels), input_spec=RGB, class_names=PETS)
    assert len({folder.digest, other.digest, touched.digest}) == 3
