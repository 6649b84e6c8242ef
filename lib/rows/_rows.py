"""`Rows`: a sample of any size, wherever it lies; and the pipeline from there to a device.

The pipeline is a thread that reads ahead, rows filled up to one shape so that a program compiles
once, results fetched while the next ones are computed.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from lib.rows.files import RowFile

Transform = Callable[[Array], Array]
"""What a chunk of rows goes through before it is used, such as `lib.datasets.to_unit`."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A sample of n rows, and how to read it: what EM, k-means and mean embeddings take.

    Args:
      x: [n, ...], anything with a shape, a dtype and `x[rows]` for slices and increasing indices:
        arrays of NumPy (uint8 images, memory maps) or JAX, `lib.rows.files.open_rows(path)`.
      name: what messages call it; by default that of `x`, or "the data".
      weights: [n], >= 0; 1 by default.
      transform: such as `lambda images: images / 127.5 - 1`, of rows [b, ...] in `dtype`, traced
        into the programs that read them: hand the same function object to avoid compiling again.
        Points are flattened after it.
      dtype: float32 or float64, that of points and products, in which the data must be finite.
      block_size, chunk_size, devices: of `lib.rows.sums.sum_over_rows`. Rows are read `chunk_size`
        at a time and worked on `block_size` at a time: by default 512 on a CPU, whose caches they
        fit, elsewhere the whole chunk. Each chunk is divided over the devices, one by default.
        Where they are those of several processes, each hands over, and so reads of a memory map,
        its own rows only.

    Raises ValueError on no rows, other than numbers, and bad weights; and on NaN or infinity, with
    the number of such rows and the first: in arrays at once, in all else when they are read.
    """

    x: Any
    _: KW_ONLY
    name: str = ""
    weights: Any = None
    transform: Transform | None = None
    dtype: Any = np.float32
    block_size: Any = None
    chunk_size: int = 4096
    devices: Any = None

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or getattr(self.x, "name", "the data"))
        n, *row = self.x.shape or (0,)
        if not row or 0 in self.x.shape:
            raise ValueError(
                f"{self.name} must be rows [n, d] or [n, ...], none 0, got shape {self.x.shape}"
            )
        devices = tuple(self.devices) if self.devices else (jax.devices()[0],)
        if self.block_size is None:
            on_cpu = devices[0].platform == "cpu"
            object.__setattr__(self, "block_size", 512 if on_cpu else self.chunk_size)
        if self.block_size < 1 or self.chunk_size < 1:
            raise ValueError(
                f"block_size and chunk_size must be >= 1: {self.block_size}, {self.chunk_size}"
            )
        if np.dtype(self.dtype) not in (np.float32, np.float64):
            raise ValueError(f"dtype is float32 or float64, got {np.dtype(self.dtype)}")
        if not (jnp.issubdtype(self.x.dtype, jnp.floating) or np.dtype(self.x.dtype).kind in "iub"):
            raise ValueError(f"{self.name} must be numbers, got {self.x.dtype}")
        weights = np.broadcast_to(1.0, n)  # which takes no memory
        if self.weights is not None:
            weights = np.asarray(self.weights, np.float64)
            if weights.shape != (n,):
                raise ValueError(f"weights must be [{n}], got shape {weights.shape}")
            if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.any()):
                raise ValueError("weights must be finite and >= 0, not all 0")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "devices", devices)
        if isinstance(self.x, np.ndarray | jax.Array):
            self.check_finite()

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """[n, d] of the points that the rows become."""
        row_shape = self.x.shape[1:]
        if self.transform is not None:
            with jax.enable_x64(True):
                row = jax.ShapeDtypeStruct((1, *row_shape), self.dtype)
                row_shape = jax.eval_shape(self.transform, row).shape[1:]
        return self.x.shape[0], math.prod(row_shape)

    @property
    def weighted(self) -> bool:
        return self.weights.strides != (0,)

    def stored(self, rows: slice | np.ndarray) -> Shaped[Any, "b *shape"]:
        """`x[rows]`. Raises ValueError on NaN or infinity."""
        return self._checked(self.x[rows])

    def take(self, rows: slice | Sequence[int] | np.ndarray) -> Float[np.ndarray, "b d"]:
        """The points of a slice or of indices, in any order. Raises IndexError for a row that is
        not there, ValueError on NaN or infinity."""
        if isinstance(rows, slice):
            return self._points(rows)
        wanted, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.shape[0]:
            raise IndexError(
                f"{self.name} has {self.shape[0]} rows: no rows {wanted[0]} to {wanted[-1]}"
            )
        points = self._points(wanted)
        return points if np.array_equal(wanted, rows) else points[places]

    def chunks(self, size: int, *, start: int = 0) -> Iterator[Float[np.ndarray, "size d"]]:
        """The points from `start` on, `size` at a time. Raises ValueError on NaN or infinity."""
        if size < 1 or start < 0:
            raise ValueError(f"{self.name}: size >= 1 and start >= 0, not {size} and {start}")
        return (self.take(slice(i, i + size)) for i in range(start, self.shape[0], size))

    def check_finite(self) -> None:
        """Reads all rows. Raises ValueError on NaN or infinity."""
        if np.dtype(self.x.dtype).kind in "iub":
            return
        n, count, first = self.x.shape[0], 0, 0
        for begin in range(0, n, self.chunk_size):
            bad = self._not_finite(self.x[begin : begin + self.chunk_size])
            first = first if count or not bad.any() else begin + int(np.argmax(bad))
            count += int(bad.sum())
        if count:
            raise ValueError(
                f"{self.name}: NaN or infinity in {count} of {n} rows, the first is row {first}"
            )

    def _checked(self, values):
        if not isinstance(self.x, np.ndarray | jax.Array) and self._not_finite(values).any():
            self.check_finite()
        return values

    def _not_finite(self, stored):
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(stored).astype(self.dtype, copy=False))
        if finite.all():
            return np.zeros(len(finite), bool)
        return ~finite.all(axis=tuple(range(1, finite.ndim)))

    def _points(self, rows):
        with np.errstate(over="ignore"):
            values = np.asarray(self.x[rows]).astype(self.dtype, order="C", copy=False)
        points = self._checked(values)
        if self.transform is not None:
            with jax.enable_x64(True):
                points = np.asarray(self.transform(jnp.asarray(points)))
        return points.reshape(len(points), self.shape[1])


def as_rows(sample: Any, name: str, *, allow_weights: bool = False) -> Rows:
    """`sample` if it is `Rows`, else it as the `x` of `Rows` of its own name or of that one, in
    float64 where it is. Raises ValueError as `Rows`, and unless `allow_weights` on weights."""
    if not isinstance(sample, Rows):
        sample = sample if isinstance(sample, RowFile) else np.asarray(sample)
        dtype = np.float64 if sample.dtype == np.float64 else np.float32
        return Rows(sample, name=getattr(sample, "name", name), dtype=dtype)
    if sample.weighted and not allow_weights:
        raise ValueError(f"{sample.name} has weights, which are not used here")
    return sample


def check_same_width(samples: Sequence[Any]) -> None:
    """Raises ValueError, naming two samples, unless all have the same number of columns."""
    for rows in samples[1:]:
        if rows.shape[1] != samples[0].shape[1]:
            raise ValueError(
                f"rows differ in length: {samples[0].name} has shape {samples[0].shape}, "
                f"{rows.name} has shape {rows.shape}"
            )


class _Pooled:
    """The `x` of `pooled`."""

    def __init__(self, samples: Sequence[Rows]):
        self.samples, self.ends = samples, np.cumsum([rows.shape[0] for rows in samples])
        self.shape = (int(self.ends[-1]), samples[0].shape[1])
        self.dtype = np.result_type(*(rows.dtype for rows in samples))

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        parts = []
        for rows, end in zip(self.samples, self.ends):
            first = end - rows.shape[0]
            if isinstance(which, slice):
                start, stop, _ = which.indices(self.shape[0])
                start, stop = max(0, start - first), min(stop, end) - first
                if start < stop:
                    parts.append(rows.take(slice(start, stop)))
            elif len(part := which[(first <= which) & (which < end)]):
                parts.append(rows.take(part - first))
        return np.concatenate(parts, dtype=self.dtype)


def pooled(samples: Sequence[Rows]) -> Rows:
    """The rows of several samples of one width, one after the other, as one sample."""
    if len(samples) == 1:
        return samples[0]
    x = _Pooled(samples)
    return Rows(x, name=", ".join(rows.name for rows in samples), dtype=x.dtype)


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


def fill_up(rows: Shaped[np.ndarray, "n *shape"], size: int) -> Shaped[np.ndarray, "size *shape"]:
    """`rows` and then copies of the last one, which move no mean far; to be left out of sums."""
    missing = size - len(rows)
    padding = ((0, missing), *((0, 0),) * (rows.ndim - 1))
    return np.pad(rows, padding, mode="edge") if missing > 0 else rows


# Input validation


def check_bandwidths(bandwidths: Sequence[ArrayLike] | ArrayLike) -> Float[np.ndarray, " S"]:
    """`bandwidths` in float64. Raises ValueError unless they are a vector of positive numbers."""
    values = np.asarray(bandwidths, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bandwidths must be a vector, got shape {values.shape}")
    if not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f"bandwidths must be positive and finite, got {values}")
    return values
