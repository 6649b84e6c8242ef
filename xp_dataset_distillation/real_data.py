"""The real training images by class: loading, holding some out, drawing batches on the device."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32, PRNGKeyArray, UInt8

from lib import datasets
from lib.datasets import Dataset, Normalization

# What the literature of condensation normalises with, so that its numbers compare. CIFAR-10's
# deviations are means of every image's own, and smaller than those over all pixels.
PUBLISHED = {
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion_mnist": Normalization((0.2861,), (0.3530,)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "svhn": Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


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


def load(
    name: str | Path,
    *,
    data_root: str | Path | None = None,
    size: int | None = None,
    normalisation: Normalization | None = None,
) -> RealData:
    """The training images of `lib.datasets.load`, resized to `size` x `size` if that is given.

    Normalization is the published one for the data sets of `PUBLISHED` in their own size, else
    that of the images (after `subset` and `held_out`, of those that are left); or the one given.
    Raises as `lib.datasets.load` and `from_dataset`.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    dataset = datasets.load(name, split="train", data_root=data_root)
    if size is not None and dataset.image_shape[:2] != (size, size):
        dataset = datasets.resize(dataset, size)
    return from_dataset(dataset, normalisation=normalisation)


def from_dataset(dataset: Dataset, *, normalisation: Normalization | None = None) -> RealData:
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
    if normalisation is None and dataset.name == dataset.origin:
        normalisation = PUBLISHED.get(dataset.name)
    constants = normalisation or _constants(dataset)
    return RealData(
        images=dataset.images[np.argsort(labels, kind="stable")],
        counts=tuple(counts.tolist()),
        class_names=tuple(names),
        name=dataset.name,
        mean=tuple(constants.mean),
        std=tuple(constants.std),
        origin=dataset.origin,
        own_constants=normalisation is None,
    )


def _constants(dataset: Dataset) -> Normalization:
    found = datasets.normalization_constants(dataset)
    for channel in np.flatnonzero(np.array(found.std) == 0):
        raise ValueError(
            f"channel {channel} of {dataset.name} is the same in every pixel of every image"
        )
    return found


def check_images_per_class(real: RealData, num: int) -> None:
    """Raises ValueError unless every class has `num` images, at least 1."""
    if num < 1:
        raise ValueError(f"at least 1 image of every class, not {num}")
    for name, count in zip(real.class_names, real.counts):
        if num > count:
            raise ValueError(
                f"class {name!r} of {real.name} has {count} images, fewer than the {num} asked for"
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
    check_images_per_class(real, num_per_class)
    return _chosen(real, [places[:num_per_class] for places in _shuffled_places(key, real)])


def held_out(
    key: PRNGKeyArray,
    real: RealData,
    *,
    num_per_class: int | None = None,
    share: float | None = None,
) -> tuple[RealData, UInt8[np.ndarray | Array, "m height width channels"], Int32[np.ndarray, " m"]]:
    """(the rest, held-out images, their labels): to tune on training images alone.

    Held out of every class are `num_per_class` images, or `share` of its images, rounded down but
    at least one. Raises ValueError unless one of the two is given, and where nothing of a class
    would be left, naming it.
    """
    if num_per_class is not None and share is None:
        check_images_per_class(real, num_per_class)
        nums = [num_per_class] * real.num_classes
    elif share is not None and num_per_class is None:
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        nums = [max(1, int(share * count)) for count in real.counts]
    else:
        raise ValueError("hold out either num_per_class images or a share, one of the two")
    for name, count, num in zip(real.class_names, real.counts, nums):
        if num >= count:
            raise ValueError(f"holding out {num} of the {count} images of {name!r} leaves none")
    shuffled = _shuffled_places(key, real)
    out = np.concatenate([np.sort(places[:num]) for places, num in zip(shuffled, nums)])
    rest = _chosen(real, [places[num:] for places, num in zip(shuffled, nums)])
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
