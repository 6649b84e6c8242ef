"""Condensed sets on disk: for our own code, for numpy only, and as a folder of images.

    FOLDER/condensed.npz         images in [0, 1], labels, metadata; `condensed_numpy` reads it
    FOLDER/metadata.json         the same metadata, to be read by eye
    FOLDER/images/CLASS/000.png  the stored images in 8 bits; `lib.datasets.load` reads the folder

All are of stored images: with a factor above 1 each holds factor^2 training images (`factor`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from lib import runs
from lib.datasets import SPLITS
from lib.runs import processes
from lib.runs.files import make_folder, named_errors, save_arrays, write_json
from xp_dataset_distillation import condensed_numpy

# What some file system, or the reader of folders, would not take as the name of a class.
_UNSAFE = re.compile(r'[\x00-\x1f/\\:*?"<>|]')


class Condensed(NamedTuple):
    """A condensed set: n stored images of every class, and what is needed to train on them.

    `images` are in [0, 1]; networks see (decoded image - mean) / std, by channel. `about` (the
    settings, the commit) is of what JSON knows.
    """

    images: Float[np.ndarray, "classes n height width channels"]
    class_names: tuple[str, ...]
    factor: int
    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]
    dataset: str
    about: dict[str, Any]


def checked(condensed: Condensed, *, name: str = "condensed images") -> Condensed:
    """The same with numpy arrays in float32.

    Raises ValueError, which begins with `name`: images that are not [C, n, H, W, channels] of 1 or
    3 channels, hold NaN or leave [0, 1]; another number of class names, or one twice; a factor that
    leaves no pixels; mean and std that are not one number per channel, or std not positive.
    """
    images = np.asarray(condensed.images, np.float32)
    if images.ndim != 5 or len(images) != len(condensed.class_names):
        raise ValueError(
            f"{name}: images are [{len(condensed.class_names)} classes, n, H, W, channels], not "
            f"{list(images.shape)}"
        )
    mean, std = (np.asarray(values, np.float32) for values in (condensed.mean, condensed.std))
    condensed = condensed._replace(
        images=images, class_names=tuple(condensed.class_names), mean=mean, std=std
    )
    flat = images.reshape(-1, *images.shape[2:])
    condensed_numpy.check(flat, _labels(images), _metadata(condensed), name=name)
    return condensed


def _labels(images: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(images), dtype=np.int32), images.shape[1])


def _metadata(condensed: Condensed) -> dict[str, Any]:
    images = condensed.images
    # By way of the shortest text: .1307 in float32 is to be .1307, not .13070000708.
    mean, std = (
        [float(str(value)) for value in np.atleast_1d(values)]
        for values in (condensed.mean, condensed.std)
    )
    return {
        "format": condensed_numpy.FORMAT,
        "dataset": condensed.dataset,
        "class_names": list(condensed.class_names),
        "images_per_class": images.shape[1],
        "image_shape": list(images.shape[2:]),
        "factor": condensed.factor,
        "mean": mean,
        "std": std,
        "decode": condensed_numpy.DECODE,
        "folders": list(folder_names(condensed.class_names)),
        "about": condensed.about,
    }


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """A folder's name for every class, such that sorted folders have the classes' labels.

    The class names themselves where all are fit for that, else all like "0_T-shirt-top".
    """
    fit = all(
        _tidy(name) == name == name.strip()
        and not name.startswith(".")
        and name not in ("", *SPLITS, "__MACOSX")
        for name in class_names
    )
    different = len({name.lower() for name in class_names}) == len(class_names)
    if fit and different and list(class_names) == sorted(class_names):
        return tuple(class_names)
    digits = len(str(len(class_names) - 1))
    return tuple(_tidy(f"{label:0{digits}d}_{name}") for label, name in enumerate(class_names))


def _tidy(name: str) -> str:
    return re.sub(r"[.\s]+$", "", _UNSAFE.sub("-", name))


def save(folder: str | os.PathLike, condensed: Condensed, *, eight_bits: bool = False) -> None:
    """Writes the files above; the folder appears with all of them or not at all. With `eight_bits`
    the archive takes a quarter of the size: its images are those of the PNG files.

    Another export in its place is replaced. `about` gets the commit of this checkout unless it
    names one. Raises ValueError as `checked`, and where the folder holds something else; TypeError
    if `about` has what JSON does not know.
    """
    folder = Path(folder)
    condensed = checked(condensed)
    if "commit" not in condensed.about:
        environment = runs.environment()
        commit = {name: environment[name] for name in ("commit", "dirty")}
        condensed = condensed._replace(about={**condensed.about, **commit})
    if folder.exists() and not (folder.is_dir() and _may_be_replaced(folder)):
        raise ValueError(f"{folder} holds something other than condensed images: name another")
    with processes.first_alone(f"writing {folder}") as first:
        if first:
            _replace(folder, condensed, eight_bits)


def _replace(folder: Path, condensed: Condensed, eight_bits: bool) -> None:
    make_folder(folder.parent)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary, old = (
        folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp") for _ in range(2)
    )
    try:
        with named_errors(folder):
            temporary.mkdir()
            _write(temporary, condensed, eight_bits)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _may_be_replaced(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names <= {"condensed.npz", "metadata.json", "images"}


def _write(folder: Path, condensed: Condensed, eight_bits: bool) -> None:
    images, pixels = condensed.images, np.rint(255 * condensed.images).astype(np.uint8)
    write_json(folder / "metadata.json", _metadata(condensed))
    save_arrays(
        folder / "condensed.npz",
        images=(pixels if eight_bits else images).reshape(-1, *images.shape[2:]),
        labels=_labels(images),
        metadata=np.asarray((folder / "metadata.json").read_text()),
    )
    digits = max(3, len(str(images.shape[1] - 1)))
    for name, of_class in zip(folder_names(condensed.class_names), pixels):
        (folder / "images" / name).mkdir(parents=True)
        for k, image in enumerate(of_class):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(folder / "images" / name / f"{k:0{digits}d}.png")


def load(path: str | os.PathLike) -> Condensed:
    """What `save` wrote, bit for bit unless in eight bits, of the folder or its condensed.npz;
    lists in `about` are lists. Raises FileNotFoundError, or ValueError naming the file and what is
    wrong with it."""
    images, _, metadata = condensed_numpy.read(path)
    class_names = tuple(metadata["class_names"])
    condensed = Condensed(
        images=images.reshape(len(class_names), -1, *images.shape[1:]),
        class_names=class_names,
        factor=metadata["factor"],
        mean=metadata["mean"],
        std=metadata["std"],
        dataset=metadata["dataset"],
        about=metadata.get("about", {}),
    )
    return checked(condensed, name=str(path))
