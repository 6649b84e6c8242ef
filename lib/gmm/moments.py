"""Sums over the rows of data of any size: in blocks, in chunks from the host, over devices.

Whatever is fitted by sums over rows (`lib.gmm.em`, `lib.gmm.starts`) reads its data here. Rows stay
where and as they are, uint8 images on the host say; a chunk at a time goes to the device, is scaled
there block by block, and only sums in float64 stay.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from lib.devices import device_put, gather
from lib.numerics import AnyArray, to_blocks

Transform = Callable[[Array], Array]

LANES = 2
MOST_BYTES_FOR_LANES = 64 * 2**20


def sum_over_blocks(
    function: Callable,
    parameters: PyTree,
    rows: tuple[Array, ...],
    *,
    transform: Transform | None = None,
    dtype: DTypeLike,
    total_dtype: DTypeLike,
    block_size: int,
) -> PyTree:
    """The sum of function(parameters, points [b, d], weights [b], *columns) over blocks of rows.

    `rows` are x [n, ...], weights [n] and any more columns [n, ...]. Points and weights come in
    `dtype`, sums are kept in `total_dtype`. A pure function, to be jitted.
    """
    x, weights, *columns = rows
    blocks = [*to_blocks(x.reshape(len(x), -1), weights, block_size)]
    blocks += [to_blocks(column, weights, block_size)[0] for column in columns]

    def one(block):
        values, weights, *columns = block
        points = values.reshape(-1, *x.shape[1:]).astype(dtype)
        points = points if transform is None else transform(points)
        points = points.reshape(len(values), -1)
        return function(parameters, points, weights.astype(dtype), *columns)

    shapes = jax.eval_shape(one, [array[0] for array in blocks])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, total_dtype), shapes)

    def add(total, block):
        return jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, one(block)), None

    return lax.scan(add, zeros, blocks)[0]


class Rows(NamedTuple):
    """Data on the host or a device, and how to read it; `rows` checks and makes it.

    `x` [n, ...]: anything with a shape, a dtype and slices of rows, such as uint8 images, a memory
    map or a jax array. `transform` maps a block of rows [b, ...] in the computing dtype to points.
    """

    x: Any
    weights: np.ndarray
    transform: Transform | None
    dtype: Any
    block_size: int
    chunk_size: int
    devices: tuple

    @property
    def num_rows(self) -> int:
        return self.x.shape[0]


def rows(
    x: Shaped[AnyArray, "n *shape"],
    *,
    weights: Float[AnyArray, " n"] | None = None,
    transform: Transform | None = None,
    dtype: DTypeLike = np.float32,
    block_size: int = 512,
    chunk_size: int = 4096,
    devices: Sequence[jax.Device] | None = None,
) -> Rows:
    """Rows for fits and starts, read `chunk_size` at a time, worked on `block_size` at a time.

    Args:
      x: see `Rows`.
      weights: of the rows, >= 0; 1 by default.
      transform: such as `lambda images: images / 127.5 - 1`, traced into the programs that read the
        rows: hand the same function object to avoid compiling again. Points are flattened after it.
      dtype: float32 or float64, that of the products, in which the data must be finite; sums and
        covariances are float64.
      devices: over which each chunk is divided; one by default. Where they are those of several
        processes, each hands over, and so reads of a memory map, its own rows alone.

    Raises ValueError on no rows, NaN or infinity, and bad weights, naming the row.
    """
    if len(x.shape) < 2 or 0 in x.shape:
        raise ValueError(f"data are rows [n, d] or [n, ...], none 0, got shape {x.shape}")
    if block_size < 1 or chunk_size < 1:
        raise ValueError(f"block_size and chunk_size must be >= 1: {block_size}, {chunk_size}")
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype is float32 or float64, got {np.dtype(dtype)}")
    n = x.shape[0]
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (n,):
        raise ValueError(f"weights must be [{n}], got shape {weights.shape}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.any()):
        raise ValueError("weights must be finite and >= 0, not all 0")
    kind = np.dtype(x.dtype).kind
    if kind not in "fiub" and x.dtype != jnp.bfloat16:
        raise ValueError(f"data must be numbers, got {x.dtype}")
    for begin in range(0, n, chunk_size) if kind not in "iub" else ():
        chunk = np.asarray(x[begin : begin + chunk_size])
        with np.errstate(over="ignore"):
            chunk = chunk.reshape(len(chunk), -1).astype(dtype, copy=False)
        bad = ~np.isfinite(chunk).all(axis=1)
        if bad.any():
            raise ValueError(f"row {begin + int(np.argmax(bad))} of the data is not finite")
    devices = tuple(devices) if devices else (jax.devices()[0],)
    return Rows(x, weights, transform, np.dtype(dtype), block_size, chunk_size, devices)


@lru_cache(maxsize=64)
def _chunk_adder(function, transform, dtype, block_size, devices, num_columns: int):
    """(zeros, add, mesh): zeros(parameters, chunk, weights, *columns) is a total of nothing, and
    add(total, parameters, chunk, weights, *columns) one with the chunk, in place, each device
    adding its rows to a total of its own, [devices, ...]."""
    mesh = Mesh(np.array(devices), ("rows",))
    split, whole = PartitionSpec("rows"), PartitionSpec()

    def local_sum(parameters, *arrays):
        total = sum_over_blocks(
            function,
            parameters,
            arrays,
            transform=transform,
            dtype=dtype,
            total_dtype=jnp.float64,
            block_size=block_size,
        )
        return jax.tree.map(lambda leaf: leaf[None], total)

    chunk_sum = jax.shard_map(
        local_sum,
        mesh=mesh,
        in_specs=(whole, *(split,) * (2 + num_columns)),
        out_specs=split,
        check_vma=False,
    )

    @partial(jax.jit, donate_argnums=0)
    def add(total, parameters, *arrays):
        return jax.tree.map(jnp.add, total, chunk_sum(parameters, *arrays))

    def zeros(parameters, *arrays):
        shapes = jax.eval_shape(chunk_sum, parameters, *arrays)
        sharding = NamedSharding(mesh, split)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), shapes)

    return zeros, add, mesh


def _chunks(
    data: Rows, columns: tuple, mesh: Mesh, start: int = 0, step: int = 1
) -> Iterator[tuple[Array, ...]]:
    """Chunks of one length, divided over the devices; rows past the last have weight 0. Of all
    chunks those from number `start` on, every `step`-th."""
    n, num_devices = data.num_rows, len(data.devices)
    size = -(-n // -(-n // data.chunk_size))
    size = -(-size // num_devices) * num_devices
    for begin in range(start * size, n, step * size):
        arrays = [array[begin : begin + size] for array in (data.x, data.weights, *columns)]
        missing = size - len(arrays[1])
        if missing:
            arrays = [np.asarray(array) for array in arrays]
            arrays = [
                np.concatenate([a, np.repeat(a[-1:] * (i != 1), missing, axis=0)])
                for i, a in enumerate(arrays)
            ]
        yield tuple(device_put(array, mesh, PartitionSpec("rows")) for array in arrays)


def sum_over_rows(function, parameters: PyTree, data: Rows, *columns: Any) -> PyTree:
    """The float64 sum over rows of function(parameters, points, weights, *columns), called block by
    block; it must be a module-level function. `columns` are further arrays with a row a point.

    On a CPU two threads add up every other chunk each, unless the sums are large: XLA's own threads
    leave half of two cores idle where matrices are small. The result does not depend on how many
    cores there are.
    """
    with jax.enable_x64(True):
        zeros, add, mesh = _chunk_adder(
            function, data.transform, data.dtype, data.block_size, data.devices, len(columns)
        )
        parameters = device_put(parameters, mesh)
        first = next(_chunks(data, columns, mesh))
        empty = zeros(parameters, *first)
        lanes = _num_lanes(data, empty)
        # The first chunk alone: one thread compiles for both.
        totals = [add(empty, parameters, *first)]
        totals += [zeros(parameters, *first) for _ in range(lanes - 1)]

    def add_up(lane):
        with jax.enable_x64(True):
            total = totals[lane]
            for arrays in _chunks(data, columns, mesh, lane or lanes, lanes):
                total = add(total, parameters, *arrays)
                if lanes > 1:
                    jax.block_until_ready(total)
            return total

    if lanes > 1:
        with ThreadPoolExecutor(lanes) as pool:
            totals = list(pool.map(add_up, range(lanes)))
    else:
        totals = [add_up(0)]
    with jax.enable_x64(True):
        total = jax.tree.map(lambda *leaves: sum(jnp.sum(leaf, axis=0) for leaf in leaves), *totals)
        return gather(total, mesh) if mesh.is_multi_process else total


def _num_lanes(data: Rows, total: PyTree) -> int:
    if len(data.devices) > 1 or data.devices[0].platform != "cpu":
        return 1
    large = sum(leaf.nbytes for leaf in jax.tree.leaves(total)) > MOST_BYTES_FOR_LANES
    return 1 if large or data.num_rows <= 2 * data.chunk_size else LANES


def dimension(data: Rows) -> int:
    """The d of the points that the rows become."""

    def points(x):
        x = x.astype(data.dtype)
        return (x if data.transform is None else data.transform(x)).reshape(len(x), -1)

    row = jax.ShapeDtypeStruct((2, *data.x.shape[1:]), data.x.dtype)
    with jax.enable_x64(True):
        return jax.eval_shape(points, row).shape[1]
