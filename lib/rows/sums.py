"""Sums over the rows of a sample of any size: in blocks, in chunks from the host, over devices.

What is fitted by sums over rows (`lib.gmm.em`, `lib.gmm.starts`) reads its data here. Rows stay
where and as they are, such as uint8 images on the host. One chunk at a time goes to the device, is
transformed there block by block, and only sums in float64 stay.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from lib.devices import device_put, gather
from lib.numerics import to_blocks
from lib.rows._rows import Rows, Transform, fill_up

CPU_THREADS = 2
MOST_BYTES_FOR_THREADS = 64 * 2**20


def sum_over_blocks(
    function: Callable,
    parameters: PyTree,
    x: Shaped[Array, "n ..."],
    weights: Float[Array, " n"],
    *,
    transform: Transform | None = None,
    dtype: DTypeLike,
    total_dtype: DTypeLike,
    block_size: int,
) -> PyTree:
    """The sum of function(parameters, points [b, d], weights [b]) over blocks of rows.

    Points and weights come in `dtype`, sums are kept in `total_dtype`. Pure, to be jitted.
    """
    blocks = to_blocks(x.reshape(len(x), -1), weights, block_size)

    def block_sum(block):
        values, weights = block
        points = values.reshape(-1, *x.shape[1:]).astype(dtype)
        points = points if transform is None else transform(points)
        return function(parameters, points.reshape(len(values), -1), weights.astype(dtype))

    shapes = jax.eval_shape(block_sum, jax.tree.map(lambda leaf: leaf[0], blocks))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, total_dtype), shapes)

    def add(total, block):
        return jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, block_sum(block)), None

    return lax.scan(add, zeros, blocks)[0]


@lru_cache(maxsize=64)
def _chunk_adder(function, transform, dtype, block_size, devices):
    """(zeros, add, mesh): zeros(parameters, x, weights) is a total of nothing, and
    add(total, parameters, x, weights) one with the chunk, in place. Each device adds its rows to a
    total of its own, [devices, ...]."""
    mesh = Mesh(np.array(devices), ("rows",))
    by_rows, replicated = PartitionSpec("rows"), PartitionSpec()

    def sum_on_device(parameters, *chunk):
        total = sum_over_blocks(
            function,
            parameters,
            *chunk,
            transform=transform,
            dtype=dtype,
            total_dtype=jnp.float64,
            block_size=block_size,
        )
        return jax.tree.map(lambda leaf: leaf[None], total)

    chunk_sum = jax.shard_map(
        sum_on_device,
        mesh=mesh,
        in_specs=(replicated, by_rows, by_rows),
        out_specs=by_rows,
        check_vma=False,
    )

    @partial(jax.jit, donate_argnums=0)
    def add(total, parameters, *chunk):
        return jax.tree.map(jnp.add, total, chunk_sum(parameters, *chunk))

    def zeros(parameters, *chunk):
        shapes = jax.eval_shape(chunk_sum, parameters, *chunk)
        sharding = NamedSharding(mesh, by_rows)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), shapes)

    return zeros, add, mesh


def _chunks(data: Rows, mesh: Mesh, first: int = 0, step: int = 1) -> Iterator[tuple[Array, ...]]:
    """Chunks (x, weights) number `first`, `first` + `step`, ... of one length, divided over the
    devices; rows past the last have weight 0."""
    n, num_devices = data.shape[0], len(data.devices)
    size = -(-n // -(-n // data.chunk_size))
    size = -(-size // num_devices) * num_devices
    for begin in range(first * size, n, step * size):
        rows = slice(begin, begin + size)
        x, weights = data.stored(rows), data.weights[rows]
        if missing := size - len(weights):
            x, weights = fill_up(np.asarray(x), size), np.pad(weights, (0, missing))
        yield device_put((x, weights), mesh, PartitionSpec("rows"))


def sum_over_rows(
    function: Callable, parameters: PyTree, data: Rows, *, dtype: DTypeLike | None = None
) -> PyTree:
    """The float64 sum over rows of function(parameters, points, weights), called block by block; it
    must be a module-level function. Points and weights come in `dtype`, that of `data` by default.

    On a CPU two threads add up every other chunk each, unless the sums are large: XLA's own threads
    leave half of two cores idle where matrices are small. The result does not depend on how many
    cores there are.
    """
    dtype = data.dtype if dtype is None else np.dtype(dtype)
    zeros, add, mesh = _chunk_adder(function, data.transform, dtype, data.block_size, data.devices)
    with jax.enable_x64(True):
        parameters = device_put(parameters, mesh)
        first = next(_chunks(data, mesh))
        total = zeros(parameters, *first)
        num_threads = _num_threads(data, total)
        # The first chunk by itself: one thread compiles for both.
        totals = [add(total, parameters, *first)]
        totals += [zeros(parameters, *first) for _ in range(num_threads - 1)]

    def add_chunks(thread):
        with jax.enable_x64(True):
            total = totals[thread]
            for chunk in _chunks(data, mesh, thread or num_threads, num_threads):
                total = add(total, parameters, *chunk)
                if num_threads > 1:
                    jax.block_until_ready(total)
            return total

    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            totals = list(pool.map(add_chunks, range(num_threads)))
    else:
        totals = [add_chunks(0)]
    with jax.enable_x64(True):
        total = jax.tree.map(lambda *leaves: sum(jnp.sum(leaf, axis=0) for leaf in leaves), *totals)
        return gather(total, mesh) if mesh.is_multi_process else total


def _num_threads(data: Rows, total: PyTree) -> int:
    if len(data.devices) > 1 or data.devices[0].platform != "cpu":
        return 1
    large = sum(leaf.nbytes for leaf in jax.tree.leaves(total)) > MOST_BYTES_FOR_THREADS
    return 1 if large or data.shape[0] <= 2 * data.chunk_size else CPU_THREADS
