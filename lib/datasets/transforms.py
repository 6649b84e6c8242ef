"""One data set from another (sizes, channels, turns), and the scales of pixels."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from lib.datasets._datasets import Dataset


def _renamed(dataset: Dataset, images: np.ndarray, suffix: str) -> Dataset:
    return dataset._replace(
        name=f"{dataset.name}-{suffix}", images=np.ascontiguousarray(images, np.uint8)
    )


def _through_pillow(dataset: Dataset, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    images = dataset.images[..., 0] if dataset.image_shape[-1] == 1 else dataset.images
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
    return changed.reshape(*changed.shape[:3], -1)


def resize(dataset: Dataset, size: int | tuple[int, int]) -> Dataset:
    """Images of size `size` (a side, or (H, W)): bilinear, and antialiased where they shrink."""
    height, width = (size, size) if isinstance(size, int) else size
    bilinear = Image.Resampling.BILINEAR
    images = _through_pillow(dataset, lambda image: image.resize((width, height), bilinear))
    return _renamed(dataset, images, f"{height}x{width}")


def to_gray(dataset: Dataset) -> Dataset:
    """One channel, luma .299 R + .587 G + .114 B (ITU-R 601); a gray set is returned as it is."""
    if dataset.image_shape[-1] == 1:
        return dataset
    return _renamed(dataset, _through_pillow(dataset, lambda image: image.convert("L")), "gray")


def to_rgb(dataset: Dataset) -> Dataset:
    """Three equal channels; a color set is returned as it is."""
    if dataset.image_shape[-1] == 3:
        return dataset
    return _renamed(dataset, np.repeat(dataset.images, 3, axis=-1), "rgb")


def rotate(dataset: Dataset, quarter_turns: int) -> Dataset:
    """Images turned anticlockwise by `quarter_turns` * 90 degrees; H and W change places if odd."""
    turns = quarter_turns % 4
    if turns == 0:
        return dataset
    return _renamed(dataset, np.rot90(dataset.images, turns, axes=(1, 2)), f"rotated{90 * turns}")


def invert(dataset: Dataset) -> Dataset:
    """255 minus every value: dark on light becomes light on dark."""
    return _renamed(dataset, 255 - dataset.images, "inverted")


# ---- Pixels


def to_unit(images):
    """Pixels 0..255 in [-1, 1], in numpy or jax: float32, or the images' own floating dtype."""
    whole = jnp.issubdtype(images.dtype, jnp.integer)
    return (images.astype(jnp.float32) if whole else images) / 127.5 - 1


class Normalization(NamedTuple):
    """Mean and standard deviation of every channel, over all pixels of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalization_constants(dataset: Dataset) -> Normalization:
    """The constants of the images given (pass a training split), in float64."""
    # Counts of the 256 levels give exact moments without a float copy of the images.
    levels = np.arange(256) / 255
    blocks = np.array_split(dataset.images, -(-len(dataset.images) // 4096))
    means, deviations = [], []
    for channel in range(dataset.image_shape[-1]):
        counts = sum(np.bincount(block[..., channel].ravel(), minlength=256) for block in blocks)
        weights = counts / np.sum(counts)
        means.append(float(weights @ levels))
        deviations.append(float(np.sqrt(weights @ (levels - means[-1]) ** 2)))
    return Normalization(tuple(means), tuple(deviations))
