"""The data sets of these experiments, brought to one image shape."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Array, PRNGKeyArray

from lib import datasets
from xp_transfer_learning.config import (
    INVERTED,
    NOISE,
    ROTATED,
    AdaptationConfig,
    ImageFlowConfig,
    TransferConfig,
)

MADE_HERE = (NOISE, ROTATED, INVERTED)
Config = TypeVar("Config", ImageFlowConfig, TransferConfig, AdaptationConfig)


def load(name: str, split: datasets.Split, data_root: Path | None) -> datasets.Dataset:
    """A data set by name or path, or one of the two made from the embedded digits."""
    if name == ROTATED:
        return datasets.rotate(datasets.load("digits", split=split), 1)
    if name == INVERTED:
        return datasets.invert(datasets.load("digits", split=split))
    return datasets.load(name, split=split, data_root=data_root)


def known_by_content(config: Config, data_root: Path | None) -> Config:
    """The settings by which results are known: `lib.datasets.identity` in place of paths."""

    def known_by(name: str) -> str:
        return name if name in MADE_HERE else datasets.identity(name, data_root=data_root)

    return replace(config, source=known_by(config.source), target=known_by(config.target))


def stored_shape(arrays: Mapping[str, Any]) -> tuple[int, int, int]:
    """`image_shape` of a run's arrays."""
    height, width, channels = map(int, arrays["image_shape"])
    return height, width, channels


def draw(key: PRNGKeyArray, dataset: datasets.Dataset, num: int, option: str) -> Array:
    """`lib.datasets.draw`; an error names the option of the command that `num` is from."""
    try:
        return datasets.draw(key, dataset, num)
    except ValueError as error:
        raise ValueError(f"{error} ({option})") from error


def shaped(dataset: datasets.Dataset, image_shape: tuple[int, int, int]) -> datasets.Dataset:
    """The data set resized, and made gray or color, to have images of `image_shape`; a line says
    so."""
    if dataset.image_shape == image_shape:
        return dataset
    before, after = map(_described, (dataset.image_shape, image_shape))
    _say_once(f"{dataset.name}: images of {before} are made {after}")
    height, width, channels = image_shape
    if dataset.image_shape[:2] != (height, width):
        dataset = datasets.resize(dataset, (height, width))
    return datasets.to_gray(dataset) if channels == 1 else datasets.to_rgb(dataset)


def _described(image_shape: tuple[int, int, int]) -> str:
    height, width, channels = image_shape
    return f"{height} x {width} in {'gray' if channels == 1 else 'color'}"


@cache
def _say_once(line: str) -> None:
    """For data sets that every try reads anew."""
    print(line, flush=True)


def resized(dataset: datasets.Dataset, size: int | None) -> datasets.Dataset:
    """The data set with images of `size` x `size`; None leaves it as it is."""
    return dataset if size is None else shaped(dataset, (size, size, dataset.image_shape[2]))


def stem(name: str) -> str:
    """A data set's name, or the last part of its path, fit for a file's name."""
    return Path(name).stem.replace(":", "_")


def pair_name(source: str, target: str) -> str:
    """Two data sets' names or paths, fit for a folder's name."""
    return f"{stem(source)}-{stem(target)}"


def summary_name(source: str, target: str, data_root: Path | None) -> str:
    """As `pair_name`, for a file that no hash of settings tells from others: with a part of the
    content of what is no named data set (`lib.datasets.file_stem`)."""
    stems = (
        name if name in MADE_HERE else datasets.file_stem(name, data_root=data_root)
        for name in (source, target)
    )
    return "-".join(stems).replace(":", "_")
