"""The data sets of these experiments, brought to one image shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib import datasets
from xp_transfer_learning.config import INVERTED, ROTATED


def load(name: str, split: datasets.Split, data_root: Path | None) -> datasets.Dataset:
    """A data set by name or path, or one of the two made from the embedded digits."""
    if name == ROTATED:
        return datasets.rotate(datasets.load("digits", split=split), 1)
    if name == INVERTED:
        return datasets.invert(datasets.load("digits", split=split))
    return datasets.load(name, split=split, data_root=data_root)


def stored_shape(arrays: Mapping[str, Any]) -> tuple[int, int, int]:
    """`image_shape` of a run's arrays."""
    height, width, channels = map(int, arrays["image_shape"])
    return height, width, channels


def shaped(dataset: datasets.Dataset, image_shape: tuple[int, int, int]) -> datasets.Dataset:
    """The data set resized, and made grey or colour, to have images of `image_shape`."""
    height, width, channels = image_shape
    if dataset.image_shape[:2] != (height, width):
        dataset = datasets.resize(dataset, (height, width))
    return datasets.to_gray(dataset) if channels == 1 else datasets.to_rgb(dataset)


def resized(dataset: datasets.Dataset, size: int | None) -> datasets.Dataset:
    """The data set with images of `size` x `size`; None leaves it as it is."""
    return dataset if size is None else shaped(dataset, (size, size, dataset.image_shape[2]))


def stem(name: str) -> str:
    """A data set's name, or the last part of its path, fit for a file's name."""
    return Path(name).stem.replace(":", "_")


def pair_name(source: str, target: str) -> str:
    """Two data sets' names or paths, fit for a folder's name."""
    return f"{stem(source)}-{stem(target)}"
