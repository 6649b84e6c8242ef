"""The real training images by class: loading, holding some out, drawing batches on the device."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32, PRNGKeyArray, UInt8

from lib import datasets
from lib.datasets import Dataset, Normalization
from lib.numerics import named_key
from xp_dataset_distillation.config import Method, PoolConfig

# What the literature of condensation normalizes with, so that its numbers compare. CIFAR-10's
# deviations are means of every image's own, and smaller than those over all pixels.
PUBLISHED = {
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion_mnist": Normalization((0.2861,), (0.3530,)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "svhn": Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


WITHOUT_FLIPS = ("digits", "mnist", "svhn", "usps", "kmnist")
"""A mirrored digit or letter is another one or none: data sets of these, in whatever size."""

Reader = Method | PoolConfig
"""Settings that say which training images are read."""
AnyReader = TypeVar("AnyReader", bound=Reader)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("images",),
    meta_fields=("counts", "class_names", "name", "mean", "std", "origin", "own_constants"),
)
@dataclasses.dataclass(frozen=True)
class RealData:
    """Images sorted by class: `counts[c]` of class c, from `starts[c]` on.

    A pytree of one leaf, the images; the rest is static, so that it goes through jit as an
    argument. `jax.device_put` moves it to the device once. `mean` and `std` are by channel, of
    values in [0, 1]; with `own_constants` those of these images, and of a part of them its own.
    `origin` is as in `lib.datasets.Dataset`.
    """

    images: UInt8[np.ndarray | Array, "n height width channels"]
    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str | None = None
    own_constants: bool = False

    @property
    def starts(self) -> Int[np.ndarray, " classes"]:
        return np.cumsum((0, *self.counts[:-1]))

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images.shape
        return height, width, channels


class Setting(NamedTuple):
    """What objective and classifiers must know of the images; hashable."""

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def normalized(self, images: Array) -> Array:
        """(images - mean) / std by channel, the last axis."""
        shape = (1,) * (images.ndim - 1) + (-1,)
        mean, std = (jnp.asarray(v, images.dtype).reshape(shape) for v in (self.mean, self.std))
        return (images - mean) / std


def setting_of(method: Reader, real: RealData) -> Setting:
    flips = getattr(method, "flips", None)
    if flips is None:
        flips = may_be_mirrored(real.origin, real.class_names)
    return Setting(real.num_classes, real.image_shape, real.mean, real.std, flips)


def may_be_mirrored(origin: str | None, class_names: tuple[str, ...]) -> bool:
    """Not digits and letters: `WITHOUT_FLIPS`, or images whose classes are all called by one."""
    characters = all(len(name) == 1 and name.isalnum() for name in class_names)
    return not (origin in WITHOUT_FLIPS or characters)


def known_by_content(method: AnyReader, data_root: Path | None) -> AnyReader:
    """The settings by which results are known: `lib.datasets.identity` in place of a path."""
    content = datasets.identity(method.dataset, data_root=data_root)
    return dataclasses.replace(method, dataset=content)


def training_images(
    method: Reader, data_root: Path | None
) -> tuple[RealData, tuple[np.ndarray | Array, np.ndarray] | None]:
    """The training images that a method may use, and, with their labels, those it holds out. Both
    draws are the same for all seeds."""
    real, out = load(method.dataset, data_root=data_root, size=method.size), None
    if method.held_out:
        key = named_key(jax.random.key(0), "held out")
        real, images, labels = held_out(key, real, method.held_out)
        out = images, labels
    if method.num_per_class is not None:
        real = subset(named_key(jax.random.key(0), "subset"), real, method.num_per_class)
    return real, out


def load(
    name: str | Path, *, data_root: str | Path | None = None, size: int | None = None
) -> RealData:
    """The training images of `lib.datasets.load`, resized to `size` x `size` if that is given.

    Images are normalized by the published constants for the data sets of `PUBLISHED` in their own
    size, else by their own (after `subset` and `held_out`, of those that are left).
    Raises as `lib.datasets.load` and `from_dataset`.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    dataset = datasets.load(name, split="train", data_root=data_root)
    if size is not None and dataset.image_shape[:2] != (size, size):
        dataset = datasets.resize(dataset, size)
    return from_dataset(dataset)


def from_dataset(dataset: Dataset) -> RealData:
    """The data set sorted by class, in its own order within a class; see `load`.

    Raises ValueError for labels outside of 0..C-1, for a class without images, and for another
    number of labels than images.
    """
    names, labels = dataset.class_names, np.asarray(dataset.labels)
    if len(labels) != len(dataset.images) or not len(labels):
        raise ValueError(f"{dataset.name} has {len(dataset.images)} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"labels of {dataset.name} lie in 0..{len(names) - 1}, not in "
            f"{labels.min()}..{labels.max()}"
        )
    counts = np.bincount(labels, minlength=len(names))
    for label in np.flatnonzero(counts == 0):
        raise ValueError(
            f"class {names[label]!r} of {dataset.name} has no image: no label is {label}"
        )
    published = PUBLISHED.get(dataset.name) if dataset.name == dataset.origin else None
    constants = published or _constants(dataset)
    return RealData(
        images=dataset.images[np.argsort(labels, kind="stable")],
        counts=tuple(counts.tolist()),
        class_names=tuple(names),
        name=dataset.name,
        mean=tuple(constants.mean),
        std=tuple(constants.std),
        origin=dataset.origin,
        own_constants=published is None,
    )


def _constants(dataset: Dataset) -> Normalization:
    constants = datasets.normalization_constants(dataset)
    for channel in np.flatnonzero(np.array(constants.std) == 0):
        raise ValueError(
            f"channel {channel} of {dataset.name} is the same in every pixel of every image"
        )
    return constants


def check_images_per_class(real: RealData, num: int, option: str = "--images_per_class") -> None:
    """Raises ValueError, which names the option, unless every class has `num` images, at least
    1."""
    if num < 1:
        raise ValueError(f"at least 1 image of every class, not {num}")
    for name, count in zip(real.class_names, real.counts):
        if num > count:
            raise ValueError(
                f"class {name!r} of {real.name} has {count} images, fewer than the {num} asked for "
                f"({option})"
            )


def _as_dataset(real: RealData) -> Dataset:
    images = np.asarray(real.images)
    return Dataset(real.name, images, real.labels, real.class_names, real.origin)


def _shuffled_places(key: PRNGKeyArray, real: RealData) -> list[Int[np.ndarray, " count"]]:
    """Of every class, where its images are, shuffled; keyed by its label."""
    dataset = _as_dataset(real)
    return [
        datasets.draw_indices(key, dataset, count, classes=[label])[0]
        for label, count in enumerate(real.counts)
    ]


def _chosen(real: RealData, places: list[np.ndarray]) -> RealData:
    """The images at these places of every class, in the order of before."""
    places = [np.sort(of_class) for of_class in places]
    part = dataclasses.replace(
        real,
        images=np.asarray(real.images)[np.concatenate(places)],
        counts=tuple(len(of_class) for of_class in places),
    )
    if not real.own_constants:
        return part
    constants = _constants(_as_dataset(part))
    return dataclasses.replace(part, mean=constants.mean, std=constants.std)


def subset(key: PRNGKeyArray, real: RealData, num_per_class: int) -> RealData:
    """`num_per_class` images of every class without replacement; with the same key a larger subset
    holds a smaller one. Raises ValueError naming a class that is smaller."""
    check_images_per_class(real, num_per_class, "--num_per_class")
    return _chosen(real, [places[:num_per_class] for places in _shuffled_places(key, real)])


def held_out(
    key: PRNGKeyArray, real: RealData, num: int
) -> tuple[RealData, UInt8[np.ndarray | Array, "m height width channels"], Int32[np.ndarray, " m"]]:
    """(the rest, `num` held-out images of every class, their labels): to tune on training images
    only. Raises ValueError naming a class of which nothing would be left."""
    check_images_per_class(real, num, "--held_out")
    for name, count in zip(real.class_names, real.counts):
        if num >= count:
            raise ValueError(f"holding out {num} of the {count} images of {name!r} leaves none")
    shuffled = _shuffled_places(key, real)
    out = np.concatenate([np.sort(places[:num]) for places in shuffled])
    rest = _chosen(real, [places[num:] for places in shuffled])
    return rest, np.asarray(real.images)[out], real.labels[out]


def draw_indices(key: PRNGKeyArray, counts: tuple[int, ...], num: int) -> Int[Array, "classes num"]:
    """`num` different numbers below `counts[c]` for every class c, uniformly and in random order.

    The places of the largest of random words, in a table [C, largest count] where what is beyond
    a class comes last. Under jit `counts` and `num` are static.
    """
    shape = len(counts), max(counts)
    # Positive floats are ordered as their bits, and XLA's CPU finds the largest floats 8 times
    # faster than the largest integers. 2^23 and 30 random bits make normal floats below 4.
    words = lax.shift_right_logical(jax.random.bits(key, shape, jnp.uint32), jnp.uint32(2))
    values = lax.bitcast_convert_type(words + jnp.uint32(1 << 23), jnp.float32)
    present = np.arange(shape[1]) < np.array(counts)[:, None]
    return lax.top_k(jnp.where(present, values, -1), num)[1]


def draw_batch(
    key: PRNGKeyArray, real: RealData, num: int
) -> UInt8[Array, "classes num height width channels"]:
    """`num` images of every class, without replacement within the batch.

    For jit with static `num`; hand `real` over as an argument, or its images become a constant of
    the program. Raises ValueError naming a class that has fewer images.
    """
    check_images_per_class(real, num)
    return real.images[real.starts[:, None] + draw_indices(key, real.counts, num)]
