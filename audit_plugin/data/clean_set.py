"""Clean and suspect images, from a folder or an ``.npz`` file, exactly as they were saved.

Nothing is resized, cropped or re-coloured: an audit of images that the model would never see measures nothing. What
does not fit the model's input is an error that names the file. EXIF orientation is ignored, as in torchvision.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from audit_plugin.errors import CleanSetError, nearest
from audit_plugin.types import ImageArray, InputSpec, LabelArray, LabelledImages

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
UNKNOWN_LABEL = -1
SIZE_LIMIT = 4 * 2**30
_LABELS_LIMIT = 2**27

_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_SHOWN = 5
_LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class LoadedImages:
    """Images as they were found.

    Attributes:
        data: images uint8 (N, height, width, channels) and labels int64 (N,), ``UNKNOWN_LABEL`` where there is none.
        sources: for each image its path relative to the folder (POSIX), or ``row <number>`` (from 0) of an npz file.
        digest: ``sha256:<hex>`` over shape, images and labels; file names do not enter.
        notes: what was assumed on the way, one sentence each, for the report.
    """

    data: LabelledImages
    sources: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


def load_images(path: Path, *, input_spec: InputSpec, class_names: Sequence[str], labels_required: bool = True) -> LoadedImages:
    """Read labelled images, or suspects whose labels may be missing.

    Args:
        path: a folder with one sub-folder a class (named after the class, or its index), its images sorted by name; or
            an ``.npz`` file with ``images`` uint8 (N, height, width, channels) or (N, height, width), and integer
            ``labels`` (N,).
        input_spec: the size and channels that the model expects. Grey images are repeated over three channels; RGB
            images whose channels are equal become grey; an opaque alpha channel or a palette is resolved. Nothing else
            changes.
        class_names: the model's classes, in the order of its outputs.
        labels_required: False for suspects: also a flat folder, sub-folders of any name, and an npz without ``labels``.

    Raises:
        CleanSetError: nothing there, or something that the model cannot take; the line names file and next step.
    """
    try:
        if path.is_dir():
            images, labels, sources, notes = _load_folder(path, input_spec, class_names, labels_required)
        elif path.is_file():
            images, labels, sources, notes = _load_npz(path, input_spec, labels_required)
        else:
            raise CleanSetError(_missing(path))
    except OSError as error:
        raise CleanSetError(f"'{path}' cannot be read: {error.strerror or _one_line(error)}") from error
    _check_labels(labels, len(class_names), labels_required, path)
    return LoadedImages(LabelledImages(images, labels), tuple(sources), _digest(images, labels), tuple(notes))


# ----------------------------------------------------------------------------------------------------- folders


def _load_folder(
    root: Path, spec: InputSpec, class_names: Sequence[str], labels_required: bool
) -> tuple[ImageArray, LabelArray, list[str], list[str]]:
    notes: list[str] = []
    folders, loose = _look_into(root, notes)
    if labels_required and loose:
        where = "beside its sub-folders" if folders else "and no sub-folders"
        raise CleanSetError(
            f"'{root}' holds {len(loose)} image(s) {where}, so that their class is unknown (first: {loose[0].name!r})."
            f" Move each into a sub-folder named after its class{_example(class_names)}."
        )
    labels_of = _classes_of_folders([folder.name for folder in folders], class_names, root, labels_required, notes)
    found = [(file, UNKNOWN_LABEL) for file in loose]
    for folder in folders:
        found += [(file, labels_of[folder.name]) for file in _images_in(folder, root)]
    if not found:
        raise CleanSetError(
            f"'{root}' holds no image ({', '.join(IMAGE_SUFFIXES)}). Put images there, in one sub-folder a class"
            f"{_example(class_names)}."
        )
    size = len(found) * spec.height * spec.width * spec.channels
    if size > SIZE_LIMIT:
        raise CleanSetError(
            f"'{root}' holds {len(found)} images, {_gibibytes(size)} when decoded; the limit is"
            f" {_gibibytes(SIZE_LIMIT)}."
            " A few hundred images a class are enough: use a sample."
        )
    images = np.empty((len(found), spec.height, spec.width, spec.channels), np.uint8)
    for row, (file, _) in enumerate(found):
        images[row] = _decode(file, file.relative_to(root).as_posix(), spec)
    labels = np.array([label for _, label in found], np.int64)
    return images, labels, [file.relative_to(root).as_posix() for file, _ in found], notes


def _look_into(root: Path, notes: list[str]) -> tuple[list[Path], list[Path]]:
    folders, loose, ignored = [], [], []
    for entry in sorted(root.iterdir()):
        if _is_clutter(entry.name):
            continue
        if entry.is_dir():
            _check_own(entry, root)
            folders.append(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            _check_own(entry, root)
            loose.append(entry)
        else:
            ignored.append(entry.name)
    if ignored:
        notes.append(f"Beside the images, ignored: {_listed(ignored)}.")
    return folders, loose


def _images_in(folder: Path, root: Path) -> list[Path]:
    files = [entry for entry in sorted(folder.iterdir()) if not _is_clutter(entry.name)]
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.is_dir():
            raise CleanSetError(f"{name!r} in '{root}' is no file. A class's folder holds images only, no further folders.")
        _check_own(file, root)
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            raise CleanSetError(f"{name!r} in '{root}' is none of {', '.join(IMAGE_SUFFIXES)}. Convert it, or move it elsewhere.")
    return files


def _check_own(entry: Path, root: Path) -> None:
    """Refuse what is no part of the folder, or would be waited for: links, pipes, devices, sockets."""
    name = entry.relative_to(root).as_posix()
    if entry.is_symlink():
        raise CleanSetError(f"{name!r} in '{root}' is a link, which may point anywhere. Copy the images themselves.")
    if not entry.is_dir() and not entry.is_file():
        raise CleanSetError(f"{name!r} in '{root}' is no file but a pipe, device or socket. Remove it.")


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def _classes_of_folders(
    folders: Sequence[str], class_names: Sequence[str], root: Path, labels_required: bool, notes: list[str]
) -> dict[str, int]:
    """Class index of each folder name, ``UNKNOWN_LABEL`` for suspects in folders that are no classes."""
    resolved = {folder: _class_of(folder, class_names) for folder in folders}
    unknown = [folder for folder, label in resolved.items() if label is None]
    if unknown and len(unknown) == len(folders):
        if not labels_required:
            notes.append(f"No folder is named after a class ({_listed(unknown)}); the images count as unlabelled.")
            return dict.fromkeys(folders, UNKNOWN_LABEL)
        unnamed = list(class_names) == [str(index) for index in range(len(class_names))]
        if unnamed and len(folders) == len(class_names):
            notes.append(
                f"The model names no classes; the {len(folders)} folders were taken in alphabetical order as classes"
                f" 0 to {len(folders) - 1}: {_listed(sorted(folders))}."
            )
            return {folder: index for index, folder in enumerate(sorted(folders))}
    if unknown:
        raise CleanSetError(
            f"folder {unknown[0]!r} in '{root}' is no class of the model, which has {len(class_names)}"
            f" ({_listed(class_names)}).{_did_you_mean(unknown[0], class_names)}"
            f" Name each folder after a class or its index, 0 to {len(class_names) - 1}."
        )
    labels = {folder: label for folder, label in resolved.items() if label is not None}
    for label, count in Counter(labels.values()).items():
        if count > 1:
            twice = [folder for folder in folders if labels[folder] == label]
            raise CleanSetError(
                f"folders {_listed(twice)} in '{root}' all mean class {label} ({class_names[label]!r}). Merge them."
            )
    return labels


def _class_of(folder: str, class_names: Sequence[str]) -> int | None:
    if folder in class_names:
        return list(class_names).index(folder)
    if not _is_number(folder):
        return None
    # Where classes are called by numbers ('5', '6', '7'), a folder '1' is no index: it could only mean a class '1'.
    numbered = {int(name): index for index, name in enumerate(class_names) if _is_number(name)}
    if numbered:
        return numbered.get(int(folder))
    return int(folder) if int(folder) < len(class_names) else None


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", name) is not None


def _decode(file: Path, name: str, spec: InputSpec) -> ImageArray:
    """One file as uint8 (height, width, channels)."""
    try:
        with Image.open(file, formats=_PILLOW_FORMATS) as image:
            if image.size != (spec.width, spec.height):
                raise CleanSetError(
                    f"{name!r} is {image.height} x {image.width} pixels, the model expects {spec.height} x {spec.width}"
                    " (height x width). Prepare the images as for training; nothing is resized here."
                )
            array = _plain_array(image, name)
    except Image.DecompressionBombError as error:
        raise CleanSetError(
            f"{name!r} declares more pixels than Pillow's limit against decompression bombs; the model expects"
            f" {spec.height} x {spec.width}. Remove the file."
        ) from error
    except CleanSetError:
        raise
    except Exception as error:  # on damaged files decoders raise nearly anything: SyntaxError, struct.error ...
        raise CleanSetError(f"{name!r} is not a readable image ({_one_line(error)}). Replace the file, or remove it.") from error
    fitted: ImageArray = _fit_channels(array[None], spec.channels, repr(name))[0]
    return fitted


def _plain_array(image: Image.Image, name: str) -> ImageArray:
    """A decoded image as uint8 (height, width, 1 or 3), from any mode that converts without loss."""
    if getattr(image, "n_frames", 1) > 1:
        raise CleanSetError(f"{name!r} is an animation. Save the frame that is meant as an image of its own.")
    # Pillow cuts 16-bit colour PNG to 8 bits without a word; only the raw mode of the undecoded tile tells.
    sixteen_bit = image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if sixteen_bit or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        depth = "16 bits a channel" if sixteen_bit else f"colour mode {image.mode}"
        raise CleanSetError(f"{name!r} has {depth}, expected 8-bit grey or RGB. Convert it as for training.")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    elif "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    array: ImageArray = np.asarray(image, dtype=np.uint8)
    if image.mode in ("LA", "RGBA"):
        if (array[..., -1] != 255).any():
            raise CleanSetError(f"{name!r} has transparent pixels. Put it on the background that was used in training.")
        array = array[..., :-1]
    return array if array.ndim == 3 else array[..., None]


# --------------------------------------------------------------------------------------------------------- npz


def _load_npz(path: Path, spec: InputSpec, labels_required: bool) -> tuple[ImageArray, LabelArray, list[str], list[str]]:
    if not zipfile.is_zipfile(path):
        raise CleanSetError(
            f"'{path}' is no .npz file. Give a folder with one sub-folder a class, or an archive written by"
            " numpy.savez_compressed(path, images=..., labels=...)."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            images = _read_array(archive, "images", path)
            has_labels = labels_required or "labels.npy" in archive.namelist()
            labels = _read_array(archive, "labels", path) if has_labels else None
    except CleanSetError:
        raise
    except Exception as error:  # on damaged files the parsers raise nearly anything: zlib.error, EOFError ...
        raise CleanSetError(f"'{path}' is damaged: {_one_line(error)}. Write it again with numpy.savez_compressed.") from error
    checked = _check_images(images, spec, path)
    if labels is None:
        labels = np.full(len(checked), UNKNOWN_LABEL)
    return checked, _label_array(labels, len(checked), path), [f"row {row}" for row in range(len(checked))], []


def _read_array(archive: zipfile.ZipFile, key: str, path: Path) -> NDArray[Any]:
    """One array of an npz file. Its header is judged first: nothing huge is allocated, and no pickle is opened."""
    keys = sorted(name.removesuffix(".npy") for name in archive.namelist())
    if f"{key}.npy" not in archive.namelist():
        raise CleanSetError(
            f"'{path}' holds no array '{key}'; found: {_listed(keys)}.{_did_you_mean(key, keys)}"
            " Save it with numpy.savez_compressed(path, images=..., labels=...)."
        )
    member = archive.getinfo(f"{key}.npy")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise CleanSetError(f"'{key}' in '{path}' has npy format {version}, expected a plain array of numbers.")
        header = stream.tell()
    if dtype.hasobject:
        raise CleanSetError(
            f"'{key}' in '{path}' is an array of Python objects, which can only be read by running a pickle; refused."
            " Save a plain array: images uint8, labels int64."
        )
    size = math.prod(shape) * dtype.itemsize
    limit = _LABELS_LIMIT if key == "labels" else SIZE_LIMIT
    if size > limit or min(shape, default=0) < 0:
        raise CleanSetError(
            f"'{key}' in '{path}' declares shape {shape} of {dtype}, {_gibibytes(size)}; the limit is"
            f" {_gibibytes(limit)}. A few hundred images a class are enough: use a sample."
        )
    if header + size != member.file_size:
        raise CleanSetError(
            f"'{key}' in '{path}' is damaged: its header declares {size} bytes, {member.file_size - header} are there."
            " Write it again with numpy.savez_compressed."
        )
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _check_images(images: NDArray[Any], spec: InputSpec, path: Path) -> ImageArray:
    if images.dtype != np.uint8:
        step = "If they lie in [0, 1], save (images * 255).round()" if images.dtype.kind == "f" else "Save images"
        raise CleanSetError(
            f"'images' in '{path}' is {images.dtype}, expected uint8 from 0 to 255, before any normalisation."
            f" {step}.astype('uint8')."
        )
    expected = f"(N, {spec.height}, {spec.width}, {spec.channels})"
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[1:3] != (spec.height, spec.width):
        channels_first = images.ndim == 4 and images.shape[2:] == (spec.height, spec.width)
        step = "Prepare them as for training; nothing is resized here."
        if channels_first:
            step = "Channels come last: save images.transpose(0, 2, 3, 1)."
        raise CleanSetError(f"'images' in '{path}' has shape {images.shape}, the model expects {expected}. {step}")
    if not len(images):
        raise CleanSetError(f"'images' in '{path}' is empty, shape {images.shape}. Save at least a few images a class.")
    return np.ascontiguousarray(_fit_channels(images, spec.channels, f"'images' in '{path}'"))


def _label_array(labels: NDArray[Any], count: int, path: Path) -> LabelArray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise CleanSetError(
            f"'labels' in '{path}' is {labels.dtype}, expected integers: the index of each image's class, from 0."
        )
    if labels.shape != (count,):
        step = ""
        if labels.ndim == 2 and len(labels) == count:
            step = " Save labels.ravel()." if labels.shape[1] == 1 else " For one-hot labels save labels.argmax(axis=1)."
        raise CleanSetError(f"'labels' in '{path}' has shape {labels.shape}, expected ({count},), one an image.{step}")
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise CleanSetError(f"'labels' in '{path}' go up to {labels.max()}, expected the index of a class.")
    return labels.astype(np.int64)


# ----------------------------------------------------------------------------------------------------- for both


def _fit_channels(images: ImageArray, channels: int, name: str) -> ImageArray:
    """(N, height, width, C) with the wanted number of channels, as long as that loses nothing."""
    found = images.shape[-1]
    if found == channels:
        return images
    if found == 1 and channels == 3:
        return np.repeat(images, 3, axis=-1)
    if found == 3 and channels == 1:
        if (images == images[..., :1]).all():
            return images[..., :1]
        raise CleanSetError(f"{name} is coloured, the model expects grey. Convert it to grey as for training.")
    raise CleanSetError(f"{name} has {found} channels, the model expects {channels}. Save the images as for training.")


def _check_labels(labels: LabelArray, class_count: int, labels_required: bool, path: Path) -> None:
    allowed = range(0 if labels_required else UNKNOWN_LABEL, class_count)
    outside = sorted({int(label) for label in np.unique(labels)} - set(allowed))
    if not outside:
        return
    step = "Use the labels of the training set."
    if outside == [class_count] and labels.min() >= 1:
        step = "They seem to start at 1: subtract 1."
    raise CleanSetError(
        f"'{path}' has labels outside the model's {class_count} classes (0 to {class_count - 1}): {_listed(outside)}. {step}"
    )


def _digest(images: ImageArray, labels: LabelArray) -> str:
    digest = hashlib.sha256(f"{images.shape}\n".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return f"sha256:{digest.hexdigest()}"


# ------------------------------------------------------------------------------------------------------ wording


def _missing(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        f"'{path}' does not exist.{_did_you_mean(path.name, siblings)}"
        " Give a folder with one sub-folder a class, or an .npz file with 'images' and 'labels'."
    )


def _did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(valid), n=1)
    return nearest(wrong, close) if close else ""


def _example(class_names: Sequence[str]) -> str:
    return f" (for example {class_names[0]!r})" if class_names else ""


def _listed(names: Iterable[object]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _one_line(error: BaseException) -> str:
    """What a parser says of a file, which may quote it: printable and short."""
    text = " ".join(str(error)[: 2 * _LONGEST_MESSAGE].split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)[:_LONGEST_MESSAGE]
