"""Samples that are read in pieces: what `lib.rows.files.RowFile` and arrays have in common.

And the pipeline between the reading and a device: a thread that reads ahead, rows filled up to one
shape so that a program compiles once, results fetched while the next ones are computed.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Shaped

# Samples


@runtime_checkable
class Rows(Protocol):
    """A sample [n, d] that is read in pieces, of float64 if `dtype` says so, else of float32."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> Any: ...

    def chunks(self, size: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """The rows from `start` on, in order, at most `size` at a time."""

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows `indices`."""


class ArrayRows:
    """An array [n, d] as `Rows`, half precision widened to float32.

    Raises ValueError unless it is floating point and finite with n, d >= 1.
    """

    def __init__(self, array: ArrayLike, name: str):
        array = np.asarray(array)
        check_floating(array, name)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name} must be [n, d] with n, d >= 1, got shape {array.shape}")
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32), copy=False)
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name}: NaN or infinity in {np.sum(~finite)} of {len(array)} rows, the first is "
                f"row {np.argmin(finite)}"
            )
        self.name, self.shape, self.dtype, self.array = name, array.shape, array.dtype, array

    def chunks(self, size: int, *, start: int = 0) -> Iterator[np.ndarray]:
        return (self.array[first : first + size] for first in range(start, self.shape[0], size))

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self.array[indices]


def as_rows(sample: Any, name: str) -> Rows:
    """`sample` itself if it is read in pieces, else `ArrayRows` of that name."""
    return sample if isinstance(sample, Rows) else ArrayRows(sample, name)


def check_same_width(samples: Sequence[Rows]) -> None:
    """Raises ValueError, naming two samples, unless all have the same number of columns."""
    for rows in samples[1:]:
        if rows.shape[1] != samples[0].shape[1]:
            raise ValueError(
                f"rows differ in length: {samples[0].name} has shape {samples[0].shape}, "
                f"{rows.name} has shape {rows.shape}"
            )


def joined(samples: Iterable[Rows], size: int, *, start: int = 0) -> Iterator[np.ndarray]:
    """The rows of all samples, one after the other, from row `start` of them all, `size` a time."""
    held: list[np.ndarray] = []
    count = 0
    for rows in samples:
        if start < rows.shape[0]:
            for chunk in rows.chunks(size, start=start):
                held, count = [*held, chunk], count + len(chunk)
                if count >= size:
                    whole = np.concatenate(held)
                    held, count = [whole[size:]], count - size
                    yield whole[:size]
        start = max(0, start - rows.shape[0])
    if count:
        yield np.concatenate(held)


# The pipeline


def read_ahead(items: Iterable[Any], *, depth: int = 2) -> Iterator[Any]:
    """The same items, taken from `items` by another thread, at most `depth` of them ahead."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as reader:
        pending = deque(reader.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(reader.submit(next, iterator, end))
            yield item


def one_behind(results: Iterable[Any]) -> Iterator[Any]:
    """Results on a device as NumPy arrays, each fetched only when the next one is on its way."""
    previous = None
    for result in results:
        if previous is not None:
            yield jax.device_get(previous)
        previous = result
    if previous is not None:
        yield jax.device_get(previous)


def fill_up(rows: Shaped[np.ndarray, "n d"], size: int) -> Shaped[np.ndarray, "size d"]:
    """`rows` and then copies of the last one, which move no mean far; to be left out of sums."""
    return np.pad(rows, ((0, size - len(rows)), (0, 0)), mode="edge") if len(rows) < size else rows


# At the door


def check_floating(array: Shaped[np.ndarray, "..."], name: str) -> None:
    """Raises ValueError unless the dtype is floating point, of half precision at least."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize not in (2, 4, 8):
        raise ValueError(f"{name} must be floating point, got {array.dtype}")


def check_bandwidths(bandwidths: Sequence[ArrayLike] | ArrayLike) -> Float[np.ndarray, " S"]:
    """`bandwidths` in float64. Raises ValueError unless they are a vector of positive numbers."""
    values = np.asarray(bandwidths, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bandwidths must be a vector, got shape {values.shape}")
    if not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f"bandwidths must be positive and finite, got {values}")
    return values
