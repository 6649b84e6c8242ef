"""Pairs of samples that differ, and pairs that do not, on which two-sample tests are compared.

Each is a function of a numpy generator and the number of points, and a level: the larger, the
further apart. Images are rows of numbers in [0, 1].
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib import datasets

Samples = tuple[np.ndarray, np.ndarray]


class Pair(NamedTuple):
    """`draw(rng, n, level)` returns two samples [n, d] each, in float64."""

    title: str
    levels: tuple[float, ...]
    n: int
    draw: Callable[[np.random.Generator, int, float], Samples]
    varied: str
    """What the level is; "n" where it is the number of points itself."""


def blobs(rng: np.random.Generator, n: int, ratio: float = 4.0) -> Samples:
    """Nine normal distributions on a grid 10 apart; those of the second sample are stretched along
    the diagonal to `ratio` times the variance (after Gretton et al., NIPS 2012)."""

    def centers():
        return 10.0 * rng.integers(0, 3, (n, 2))

    turned = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    stretched = rng.normal(size=(n, 2)) * np.sqrt([ratio, 1])
    return centers() + rng.normal(size=(n, 2)), centers() + stretched @ turned.T


def perturbed_uniform(rng: np.random.Generator, n: int, level: float, *, d: int) -> Samples:
    """Uniform on [0, 1]^d, and a density with `level` smooth bumps up and down along each side, as
    high as a density can be (Schrab et al., JMLR 2023, section 5.3)."""
    count = int(level)
    heights = {1: 2.7, 2: 7.3}[d] * rng.choice([-1, 1], count**d)

    def bump(t):
        up, down = 1 - (4 * t + 3) ** 2, 1 - (4 * t + 1) ** 2
        rise = np.where(up > 0, np.exp(-1 / np.where(up > 0, up, 1)), 0)
        return rise - np.where(down > 0, np.exp(-1 / np.where(down > 0, down, 1)), 0)

    def density(x):
        places = itertools.product(range(1, count + 1), repeat=d)
        bumps = [np.prod(bump(count * x - np.array(place)), axis=1) for place in places]
        return 1 + heights @ np.array(bumps)

    drawn = np.empty((0, d))
    while len(drawn) < n:
        x = rng.random((4 * n, d))
        drawn = np.concatenate([drawn, x[2 * rng.random(len(x)) < density(x)]])
    return rng.random((n, d)), drawn[:n]


def shifted(rng: np.random.Generator, n: int, level: float, *, d: int, what: str) -> Samples:
    """Standard normals; of the second, the mean or the variance of every coordinate is shifted."""
    x, y = rng.normal(size=(2, n, d))
    return (x, y + level) if what == "mean" else (x, y * np.sqrt(1 + level))


@functools.cache
def _images(name: str, data_root: Path | None) -> tuple[np.ndarray, np.ndarray]:
    data = datasets.load(name, split="train", data_root=data_root)
    return data.images, data.labels


def _two_draws(rng, labels, n, *, without=(), shares=None):
    """Positions of two samples that share no image, the second by other rules."""
    first = rng.choice(len(labels), n, replace=False)
    allowed = ~np.isin(labels, without)
    allowed[first] = False
    weights = allowed * (1.0 if shares is None else shares[labels])
    return first, rng.choice(len(labels), n, replace=False, p=weights / weights.sum())


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def left_out(rng, n: int, level: float = 2, *, name: str, data_root: Path | None) -> Samples:
    """All digits, against all but 6 and 8 (of level 1: but 8)."""
    images, labels = _images(name, data_root)
    first, second = _two_draws(rng, labels, n, without=(8, 6)[: int(level)])
    return _rows(images[first]), _rows(images[second])


def altered(rng, n: int, level: float, *, name: str, what: str, data_root: Path | None) -> Samples:
    """Images, against others with noise of that standard deviation, rotated by so many degrees, or
    with half of the classes (1 + level) / (1 - level) times as frequent as the others.

    Of a rotation either sample has half, in opposite directions: so both are interpolated alike.
    """
    images, labels = _images(name, data_root)
    halves = np.where(np.arange(10) < 5, 1 + level, 1 - level)
    first, second = _two_draws(rng, labels, n, shares=halves if what == "labels" else None)
    x, y = images[first], images[second]
    if what == "rotation":
        x, y = _rotated(x, -level / 2), _rotated(y, level / 2)
    y = _rows(y)
    return _rows(x), y + level * rng.normal(size=y.shape) if what == "noise" else y


def _rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    gray = (Image.fromarray(image[..., 0]) for image in images)
    turned = [image.rotate(degrees, Image.Resampling.BILINEAR) for image in gray]
    return np.stack([np.asarray(image) for image in turned])


def pairs(data_root: Path | None = None) -> dict[str, Pair]:
    """All pairs by name."""
    sizes = (100, 150, 200)
    mnist = functools.partial(left_out, name="MNIST", data_root=data_root)
    fashion = functools.partial(altered, name="FashionMNIST", data_root=data_root)

    def of_size(draw):
        return lambda rng, n, level: draw(rng, int(level))

    made = {
        "blobs": Pair("blobs", sizes, 200, of_size(blobs), "n"),
        "mnist": Pair("MNIST, without 6 and 8", (100, 200, 300), 200, of_size(mnist), "n"),
        "uniform1": Pair(
            "perturbed uniform, d = 1", (4, 8), 200,
            functools.partial(perturbed_uniform, d=1), "bumps",
        ),
        "uniform2": Pair(
            "perturbed uniform, d = 2", (1, 2), 250,
            functools.partial(perturbed_uniform, d=2), "bumps a side",
        ),
    }  # fmt: skip
    alterations = {
        "noise": ((0.015, 0.03), "standard deviation"),
        "rotation": ((1.5, 3), "degrees"),
        "labels": ((0.3, 0.45), "shift"),
    }
    for what, (levels, varied) in alterations.items():
        draw = functools.partial(fashion, what=what)
        made[what] = Pair(f"Fashion-MNIST, {what}", levels, 200, draw, varied)
    shifts = {("mean", 10): (0.1, 0.15), ("variance", 10): (0.2, 0.3),
              ("mean", 100): (0.04, 0.06), ("variance", 100): (0.05, 0.08)}  # fmt: skip
    for (what, d), levels in shifts.items():
        draw = functools.partial(shifted, d=d, what=what)
        made[f"{what}{d}"] = Pair(f"normal, {what} shifted, d = {d}", levels, 200, draw, "shift")
    return made
