"""Folders of images, and zips of them, as labelled arrays: `train/CLASS/FILE`, `test/CLASS/FILE`.

Used through `lib.datasets.load`. A zip is read in place.
"""

import contextlib
import io
import itertools
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "test")

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes


def read_image_folder(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(images uint8 [n, H, W, channels], labels int32 [n], class names) of one split.

    Raises ValueError naming the file: one that cannot be read, sizes or colours that differ, a
    class without an image, no class at all.
    """
    with contextlib.ExitStack() as stack:
        entries, opener = _open_folder(path, stack)
        class_names, files = _find_images(path, entries, split)
        progress = tqdm(files, desc=path.name, delay=2, leave=False, disable=None)
        images = None
        for i, (entry, _) in enumerate(progress):
            try:
                # From memory: a read of the 4 GB that a damaged file promises takes none there.
                with opener(entry) as file, Image.open(io.BytesIO(file.read())) as opened:
                    shape = (opened.height, opened.width, len(opened.getbands()))
                    # Nor are pixels made up for a height that is another one.
                    if images is None or shape[:2] == images.shape[1:3]:
                        image = _decode(opened)
                        shape = image.shape
            except Exception as error:  # an image format raises whatever its parser meets
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"{path}: cannot read the image {entry}: {reason}") from error
            if images is None:
                images = np.empty((len(files), *image.shape), np.uint8)
            if shape != images.shape[1:]:
                raise ValueError(
                    f"{path}: images differ in size or in colour: {entry} is {shape} as "
                    f"(height, width, channels), and {files[0][0]} is {images.shape[1:]}"
                )
            images[i] = image
    assert images is not None  # _find_images found at least one
    return images, np.array([c for _, c in files], np.int32), tuple(class_names)


def _open_folder(
    path: Path, stack: contextlib.ExitStack
) -> tuple[list[str], Callable[[str], IO[bytes]]]:
    """The entries of a folder or zip, where a folder ends with a slash, and what opens a file."""
    if path.is_dir():
        entries = []
        for parent, folders, files in os.walk(path, followlinks=True):
            relative = Path(parent).relative_to(path)
            entries += [f"{(relative / folder).as_posix()}/" for folder in folders]
            entries += [(relative / file).as_posix() for file in files]
        return entries, lambda entry: (path / entry).open("rb")
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, EOFError) as error:
        raise ValueError(f"{path} is no zip, or a truncated one: {error}") from error
    size = path.stat().st_size
    for entry in archive.infolist():  # a read takes what an entry promises
        if entry.compress_size > size:
            raise ValueError(f"{path}: {entry.filename} is said to be longer than the whole zip")
    return archive.namelist(), archive.open


def _find_images(
    where: Path, entries: Iterable[str], split: str
) -> tuple[list[str], list[tuple[str, int]]]:
    """The class names, and (entry, label) of the images of one split, by class and file name."""
    folders = {}  # of every entry, the folders that it is in; of a folder, itself too
    for entry in entries:
        parts = PurePosixPath(entry).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            folders[entry] = parts if entry.endswith("/") else parts[:-1]
    images = [entry for entry in folders if entry.lower().endswith(_SUFFIXES)]
    expected = "expected train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE"
    if not images:
        raise ValueError(f"{where} holds no class of images: {expected}")

    # A zip of a folder often holds the folder itself: step inside, to the splits or the classes.
    levels = zip(*(folders[entry] for entry in images))
    shared = itertools.takewhile(lambda at: len(set(at)) == 1 and at[0] not in SPLITS, levels)
    deepest = max(len(folders[entry]) for entry in images)
    top = tuple(at[0] for at in shared)[: max(deepest - 1, 0)]
    folders = {e: f[len(top) :] for e, f in folders.items() if f[: len(top)] == top}

    if any(len(folders[entry]) > 1 and folders[entry][0] in SPLITS for entry in images):
        folders = {entry: f for entry, f in folders.items() if f and f[0] in SPLITS}
    elif split == "train":
        folders = {entry: ("train", *f) for entry, f in folders.items()}
    else:
        raise ValueError(
            f"{where} has no train/ and test/ folders: all of it is split='train', "
            "and there is no split='test'"
        )

    # Classes of both splits, so that a label means the same in either.
    class_names = sorted({f[1] for f in folders.values() if len(f) > 1})
    files = sorted((folders[e], e) for e in images if e in folders and folders[e][0] == split)
    for place, entry in files:
        if len(place) != 2:
            raise ValueError(f"{where}: {entry} is out of place: {expected}")
    labels = {name: label for label, name in enumerate(class_names)}
    for name in sorted(labels.keys() - {name for (_, name), _ in files}):
        raise ValueError(f"{where}: class {name!r} has no image in the split {split!r}")
    return class_names, [(entry, labels[name]) for (_, name), entry in files]


def _decode(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"its pixels ({image.mode}) are not 8-bit grey or colour")
    mode = "L" if image.mode in _GREY else "RGB"
    if image.has_transparency_data:
        image = image.convert("LA" if mode == "L" else "RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ValueError("it is transparent in places; put it on a background first")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)
