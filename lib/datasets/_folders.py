"""Folders of images, and zips of them, as labelled arrays: `train/CLASS/FILE`, `test/CLASS/FILE`.

Used through `lib.datasets.load`. A zip is read in place.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

SPLITS = ("train", "test")

# Pillow's formats of pictures, in the order in which they are tried; its others are icons, videos,
# documents, projects of an editor. HEIF is among Pillow's where a plugin is registered.
_FORMATS = (
    "JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "HEIF", "JPEG2000", "TGA", "DDS",
    "DIB", "PCX", "QOI", "SGI", "XBM",
)  # fmt: skip
_PHONES = (".heic", ".heif", ".hif", ".avif")  # pictures that Pillow may not be able to read
_GRAY, _COLOR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes
_EXPECTED = (
    "expected train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE; images without labels go into "
    "one folder, as all/FILE"
)
_BLOCK = 1 << 20  # bytes


class _Tree(NamedTuple):
    """The entries of a folder or zip, where a folder ends with a slash; what opens a file; and its
    (bytes, CRC-32)."""

    entries: Iterable[str]
    open: Callable[[str], IO[bytes]]
    checksum: Callable[[str], tuple[int, int]]


class _Pictures(NamedTuple):
    """Where the images of both splits are: (split, class, ...) and entry, in order."""

    class_names: list[str]
    places: list[tuple[tuple[str, ...], str]]
    has_splits: bool


def read_image_folder(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(images uint8 [n, H, W, channels], labels int32 [n], class names) of one split, as
    `lib.datasets.load` says. A line on stderr counts the images with several frames, another the
    files that are ignored. Raises ValueError, which names the file."""
    with contextlib.ExitStack() as stack:
        tree = _open_tree(path, stack)
        class_names, files = _files_of(path, _find_pictures(path, tree.entries), split)
        progress = tqdm(files, desc=path.name, delay=2, leave=False, disable=None)
        images, animated = None, []
        for i, (entry, _) in enumerate(progress):
            try:
                # From memory: a read of the 4 GB that a damaged file promises takes none there.
                with tree.open(entry) as file:
                    content = io.BytesIO(file.read())
                with Image.open(content, formats=_formats()) as opened:
                    shape = (opened.height, opened.width, len(opened.getbands()))
                    # Nor are pixels made up for a size that is another one, however it is turned.
                    if images is None or sorted(shape[:2]) == sorted(images.shape[1:3]):
                        ImageOps.exif_transpose(opened, in_place=True)
                        image = _decode(opened)
                        shape = image.shape
                        # Asked for last, as the answer may need a look at the next frame. The
                        # second one of a phone's picture is a preview or a map of brightness.
                        if opened.format != "MPO" and getattr(opened, "is_animated", False):
                            animated.append(entry)
            except Exception as error:  # an image format raises whatever its parser meets
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"{path}: cannot read the image {entry}: {reason}") from error
            if images is None:
                images = np.empty((len(files), *image.shape), np.uint8)
            if shape != images.shape[1:]:
                raise ValueError(
                    f"{path}: images differ in size or in color: {entry} is {shape} as "
                    f"(height, width, channels), and {files[0][0]} is {images.shape[1:]}"
                )
            images[i] = image
    assert images is not None  # _files_of found at least one
    _say(path, "took the first frame of", animated, "animated or many-paged image")
    return images, np.array([c for _, c in files], np.int32), tuple(class_names)


def fingerprint(path: Path) -> str:
    """SHA-256, in hex, of what decides the arrays of both splits: in their order, the class, the
    size and the CRC-32 of every image's file.

    So it is of the content: where the folder lies, what it and its files are called (except their
    order) and when they were written do not count, nor whether it is zipped. Files are read, and
    not decoded; of a zip only its directory is read. Another image has the same CRC-32 once in
    2^32. Raises ValueError as `read_image_folder`, where the layout is none.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        tree = _open_tree(path, stack)
        for place, entry in _find_pictures(path, tree.entries).places:
            try:
                size, crc = tree.checksum(entry)
            except OSError as error:
                raise ValueError(f"{path}: cannot read the image {entry}: {error}") from error
            line = f"{'/'.join(place)}\0{size}\0{crc}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---- Where the files are


def _open_tree(path: Path, stack: contextlib.ExitStack) -> _Tree:
    if path.is_dir():

        def opened(entry: str) -> IO[bytes]:
            if not (path / entry).is_file():  # to open a pipe is to wait for its writer
                raise OSError("it is no file: a pipe, a device, or a link to nothing")
            return (path / entry).open("rb")

        return _Tree(_walk(path), opened, lambda entry: _size_and_crc(opened(entry)))
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file")
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError) as error:
        raise ValueError(f"{path} is no zip, or a truncated one: {error}") from error
    size = path.stat().st_size
    entries = {}
    for info in archive.infolist():
        if info.compress_size > size:  # a read takes what an entry promises
            raise ValueError(f"{path}: {info.filename} is said to be longer than the whole zip")
        name = info.filename.replace("\\", "/")  # as some programs for Windows write it
        if ".." in _parts(name):
            raise ValueError(f"{path}: {info.filename} leads out of the zip: pack it anew")
        entries[name] = info
    return _Tree(
        entries,
        lambda entry: archive.open(entries[entry]),
        lambda entry: (entries[entry].file_size, entries[entry].CRC),
    )


def _walk(path: Path) -> list[str]:
    """The entries below a folder, through links, but not into hidden folders."""
    root, entries = path.resolve(), []
    above = {str(path): frozenset(map(_inode, (root, *root.parents)))}  # of every folder

    def stop(error: OSError) -> None:
        where = os.path.relpath(error.filename, path)
        raise ValueError(f"{path}: cannot read the folder {where}/: {error.strerror}") from error

    for folder, names, files in os.walk(path, onerror=stop, followlinks=True):
        prefix = "" if folder == str(path) else f"{os.path.relpath(folder, path)}/"
        entries += [prefix + file for file in files]
        names[:] = [name for name in names if not _hidden(name)]
        for name in names:
            inode = _inode(path / prefix / name)
            if inode in above[folder]:
                raise ValueError(
                    f"{path}: {prefix}{name} is a link to a folder that it lies in, so its files "
                    "have no end: delete the link"
                )
            entries.append(f"{prefix}{name}/")
            above[os.path.join(folder, name)] = above[folder] | {inode}
    return entries


def _inode(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _size_and_crc(file: IO[bytes]) -> tuple[int, int]:
    size = crc = 0
    with file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _parts(entry: str) -> tuple[str, ...]:
    return tuple(part for part in entry.split("/") if part not in ("", "."))


def _composed(text: str) -> str:
    """One form of the accents that some systems write apart from their letters (Unicode's NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _print(line: str) -> None:
    """Once per process: both splits, and several passes, find the same."""
    print(line, file=sys.stderr, flush=True)


def _say(where: Path, what: str, entries: Sequence[str], noun: str, tail: str = "") -> None:
    if entries:
        named = ", ".join(sorted(entries)[:3]) + (", ..." if len(entries) > 3 else "")
        plural = "s" if len(entries) > 1 else ""
        _print(f"{where}: {what} {len(entries)} {noun}{plural}{tail}: {named}")


def _find_pictures(where: Path, entries: Iterable[str]) -> _Pictures:
    """The images of both splits. Says which files are not among them."""
    folders = {}  # of every entry, the folders that it is in; of a folder, itself too
    for entry in entries:
        parts = _parts(_composed(entry))
        if not any(map(_hidden, parts)):
            folders[entry] = parts if entry.endswith("/") else parts[:-1]
    readable = (*_formats(), "MPO")  # JPEG's reader knows it
    suffixes = tuple(s for s, name in Image.registered_extensions().items() if name in readable)
    images = [entry for entry in folders if entry.lower().endswith(suffixes)]
    others = sorted({entry for entry in folders if not entry.endswith("/")} - set(images))
    for entry in others:
        if entry.lower().endswith(_PHONES):
            raise ValueError(
                f"{where}: {entry} is in a format that Pillow cannot read here: convert it to PNG "
                "or JPEG, or move it away"
            )
    _say(where, "ignored", others, "file", " not named as an image")
    if not images:
        raise ValueError(f"{where} holds no class of images: {_EXPECTED}")

    # A zip of a folder often holds the folder itself: step inside, to the splits or the classes.
    levels = zip(*(folders[entry] for entry in images))
    shared = itertools.takewhile(lambda at: len(set(at)) == 1 and at[0] not in SPLITS, levels)
    deepest = max(len(folders[entry]) for entry in images)
    top = tuple(at[0] for at in shared)[: max(deepest - 1, 0)]
    folders = {e: f[len(top) :] for e, f in folders.items() if f[: len(top)] == top}

    has_splits = any(len(folders[entry]) > 1 and folders[entry][0] in SPLITS for entry in images)
    if has_splits:
        folders = {entry: f for entry, f in folders.items() if f and f[0] in SPLITS}
        outside = [entry for entry in images if entry not in folders]
        _say(where, "ignored", outside, "image", " outside of train/ and test/")
    else:
        folders = {entry: ("train", *f) for entry, f in folders.items()}

    # Classes of both splits, so that a label means the same in either.
    class_names = sorted({f[1] for f in folders.values() if len(f) > 1})
    places = [(folders[entry], entry) for entry in images if entry in folders]
    places.sort(key=lambda pair: (pair[0], _composed(pair[1]), pair[1]))
    return _Pictures(class_names, places, has_splits)


def _files_of(
    where: Path, pictures: _Pictures, split: str
) -> tuple[list[str], list[tuple[str, int]]]:
    """The class names, and (entry, label) of the images of one split, by class and file name."""
    if split == "test" and not pictures.has_splits:
        raise ValueError(
            f"{where} has no train/ and test/ folders: all of it is split='train', and there is no "
            "split='test'; move the classes into train/, and some images of each into test/CLASS/"
        )
    files = [(place, entry) for place, entry in pictures.places if place[0] == split]
    for place, entry in files:
        if len(place) != 2:
            raise ValueError(f"{where}: {entry} is out of place: {_EXPECTED}")
    labels = {name: label for label, name in enumerate(pictures.class_names)}
    for name in sorted(labels.keys() - {name for (_, name), _ in files}):
        raise ValueError(f"{where}: class {name!r} has no image in the split {split!r}")
    return pictures.class_names, [(entry, labels[name]) for (_, name), entry in files]


def _decode(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    if image.mode not in _GRAY + _COLOR:
        raise ValueError(f"its pixels ({image.mode}) are not 8-bit gray or color")
    mode = "L" if image.mode in _GRAY else "RGB"
    if image.has_transparency_data:
        image = image.convert("LA" if mode == "L" else "RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ValueError("it is transparent in places; put it on a background first")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)
