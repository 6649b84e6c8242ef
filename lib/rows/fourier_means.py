"""Mean random Fourier features of a sample that is read in pieces, for several bandwidths at once.

One pass over samples of any size, each sum over more rows than those of a chunk kept in float64.
The result depends on the size of the chunks, and on the number of devices, only by rounding.

Cosines of large arguments lose digits: the features of x are off by about eps |W x| / sigma, where
W x grows with |x|. Kernels and MMDs do not depend on the origin. So where samples lie far from it
against their spread, give the same `offset` for all of them, such as a rough common mean.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, ArrayLike, Float, Int, Key

from lib.numerics import product
from lib.rff import features_of_projections, frequency_projections
from lib.rows._rows import as_rows, check_bandwidths, fill_up, one_behind, read_ahead

# Chunks are filled up to a multiple of so many rows: few shapes, so few compilations.
ROW_MULTIPLE = 256

Readout = Callable[[Any], Any]
"""A function of features [n, F] that gives [n, G], and a pytree of the arrays that it needs."""
OnRows = Callable[[int], None]
"""Told how many rows were read since the last call."""


class StreamedMeans(NamedTuple):
    """For S bandwidths and F features, or what was read out of them; host, float64."""

    means: Float[np.ndarray, "S F"]
    num_rows: int
    block_sums: Float[np.ndarray, "B S F"]  # sums of the features of each block's rows
    block_sizes: Float[np.ndarray, " B"]  # their numbers, or the sums of their weights


def row_blocks(
    key: Key[Array, ""], first_row: int | Int[Array, ""], num_rows: int, num_blocks: int
) -> Int[Array, " num_rows"]:
    """At random, a block 0, ..., B - 1 for each row from `first_row` on, B = `num_blocks`.

    The first B rows go to a block each; every other row to any block, independently of the rows
    beside it: in a sorted file blocks that take turns would be samples of all its strata, and vary
    less than the rows do. A row's block depends on key, row and B only.
    """
    rows = first_row + jnp.arange(num_rows)
    orders, draws = jax.random.split(key)
    first = jax.random.permutation(orders, num_blocks)

    def draw(row):  # in int32, whether float64 is on or not
        return jax.random.randint(jax.random.fold_in(draws, row), (), 0, num_blocks, jnp.int32)

    first = first[jnp.minimum(rows, num_blocks - 1)]
    return jnp.where(rows < num_blocks, first, jax.vmap(draw)(rows))


def stream_mean_embeddings(
    sample: Any,
    frequencies: Float[Array, "num_features d"],
    bandwidths: Sequence[ArrayLike] | ArrayLike,
    *,
    phases: Float[Array, " num_features"] | None = None,
    offset: ArrayLike | None = None,
    readout: Readout | None = None,
    num_blocks: int = 1,
    block_key: Key[Array, ""] | None = None,
    chunk_size: int = 1024,
    devices: Sequence[jax.Device] | None = None,
    on_rows: OnRows | None = None,
) -> StreamedMeans:
    """mu_s = sum_i w_i z_s(x_i - offset) / sum_i w_i for each bandwidth, from one pass over rows.

        stream_mean_embeddings(open_rows(path), frequencies, bandwidths)

    `sample` is `lib.rows.Rows` or what they are made of. z_s are the features of
    `lib.rff.random_fourier_features` with bandwidth s, pairs (F = 2 D) or with `phases` cosines
    (F = D), or the G numbers that a `readout` makes of them. All bandwidths share the product W x.
    Features are computed in the dtype of the rows, and sums over chunks are float64. Each chunk of
    `chunk_size` rows is divided over `devices`, by default all local ones; each holds its part of
    two chunks, of the D products and of one bandwidth's F features. A thread reads ahead meanwhile:
    up to five chunks lie on the host. `on_rows` is told how many rows were read since the last
    call.

    With `num_blocks` B > 1 rows are put into blocks at random by `block_key` (see `row_blocks`),
    and sums are kept by block. With weights w of the blocks, multinomial or Poisson,
    sum_b w_b block_sums_b / sum_b w_b block_sizes_b is then a bootstrap draw of the means without
    a second pass. Where n <= B a block is one row or none: that is the bootstrap over rows.

    Raises ValueError as `lib.rows.Rows`, on rows of another width than the frequencies and on
    bandwidths that are not positive; and after the last chunk on NaN and infinity, with the number
    of such rows and the first (a row too large to be multiplied counts).
    """
    sample = as_rows(sample, "the sample", allow_weights=True)
    bandwidths = check_bandwidths(bandwidths)
    if num_blocks < 1 or (num_blocks > 1 and block_key is None):
        raise ValueError(f"num_blocks must be 1, or more with a block_key: {num_blocks}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    n, width = sample.shape
    if width != frequencies.shape[1]:
        raise ValueError(
            f"{sample.name}: rows of {frequencies.shape[1]} columns are needed for frequencies of "
            f"shape {frequencies.shape}, got rows of {width}"
        )
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("rows",))
    multiple = int(np.lcm(ROW_MULTIPLE, mesh.size))
    size = -(-min(chunk_size, n) // multiple) * multiple
    by_rows, everywhere = NamedSharding(mesh, Spec("rows")), NamedSharding(mesh, Spec())
    frequencies, phases, block_key, readout = jax.device_put(
        (frequencies, phases, block_key, readout), everywhere
    )
    dtype, starts = sample.dtype, range(0, n, chunk_size)
    offset = None if offset is None else np.asarray(offset, dtype)
    shared = frequencies, bandwidths.astype(dtype), phases, offset, readout

    def sums():
        chunks = read_ahead(np.asarray(sample.x[i : i + chunk_size]) for i in starts)
        for first_row, chunk in zip(starts, chunks):
            weights = sample.weights[first_row : first_row + len(chunk)]
            with jax.enable_x64(dtype == np.float64):
                chunk_sums = _chunk_sums(
                    jax.device_put(fill_up(chunk, size), by_rows),
                    len(chunk),
                    first_row,
                    block_key,
                    shared,
                    fill_up(weights.astype(dtype), size) if sample.weighted else None,
                    mesh=mesh,
                    num_blocks=num_blocks,
                    transform=sample.transform,
                )
            if on_rows is not None:
                on_rows(len(chunk))
            # Outside the scope: a generator that stops inside would leave it to its caller.
            yield chunk_sums, first_row

    block_sums: Any = 0.0
    block_sizes = np.zeros(num_blocks)
    bad_rows = []
    for (chunk_sums, chunk_sizes, not_finite), first_row in one_behind(sums()):
        block_sums = block_sums + np.swapaxes(chunk_sums, 0, 1).astype(np.float64)
        block_sizes += chunk_sizes
        bad_rows.extend(first_row + np.flatnonzero(not_finite))
    if bad_rows:
        raise ValueError(
            f"{sample.name}: NaN or infinity in {len(bad_rows)} of {n} rows, the first is row "
            f"{bad_rows[0]}"
        )
    means = block_sums.sum(axis=0) / (block_sizes.sum() if sample.weighted else n)
    return StreamedMeans(means, n, block_sums, block_sizes)


@partial(jax.jit, static_argnames=("mesh", "num_blocks", "transform"))
def _chunk_sums(
    rows, num_rows, first_row, block_key, shared, weights, *, mesh, num_blocks, transform=None
):
    """Of the first `num_rows` rows: sums [S, B, F], sizes of the blocks, which are not finite.

    `shared` by all devices: frequencies, bandwidths, and phases, offset, readout, or None.
    """
    blocks = jnp.zeros(len(rows), int)
    if num_blocks > 1:
        blocks = row_blocks(block_key, first_row, len(rows), num_blocks)
    blocks = jnp.where(jnp.arange(len(rows)) < num_rows, blocks, -1)

    def on_one_device(rows, blocks, weights, shared):
        frequencies, bandwidths, phases, offset, readout = shared
        points = rows.astype(bandwidths.dtype)
        points = points if transform is None else transform(points)
        points = points.reshape(len(rows), -1)
        points = points if offset is None else points - offset[None, :]
        projections = frequency_projections(points, frequencies)
        # A product with the blocks' indicators sums in the same order always; a scatter may not.
        members = jax.nn.one_hot(blocks, num_blocks, axis=0, dtype=points.dtype)
        members = members if weights is None else members * weights[None, :]

        def sums(bandwidth):
            features = features_of_projections(projections, bandwidth, phases=phases)
            return product(members, features if readout is None else readout(features))

        sizes = jnp.sum(members, axis=1)
        # NaN and infinity leave no product finite, so that one of them tells.
        not_finite = ~jnp.isfinite(projections[:, 0]) & (blocks >= 0)
        return *lax.psum((lax.map(sums, bandwidths), sizes), "rows"), not_finite

    by_rows = Spec("rows")
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(by_rows, by_rows, by_rows, Spec()),
        out_specs=(Spec(), Spec(), by_rows),
    )(rows, blocks, weights, shared)
