"""Kernel mean embeddings of samples by blocks of rows: what mixing weights are computed from.

Each sample's rows go into blocks at random, and sums are kept by block: as random Fourier features
(one pass over the rows), or as the Gaussian kernel's own sums between blocks (quadratic in the
rows). A bootstrap draw, or a fold left out, is then a count of each block, without another pass.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lib.rows import Rows, fill_up
from lib.rows.fourier_means import (
    ROW_MULTIPLE,
    OnRows,
    Readout,
    row_blocks,
    stream_mean_embeddings,
)
from lib.rows.kernel_means import exact_gram_of_means
from lib.runs import processes

# Means of resampled groups that are in memory at a time.
CHUNK_BYTES = 2**28


class BlockMoments(NamedTuple):
    """G groups of rows in at most B blocks each; host, float64. One of `sums`, `products` is None.

    sizes [G, B]            rows of each block, 0 where there is none
    sums [G, B, F]          of the rows' features
    products [G, B, G, B]   sums of the kernel over the rows of each two blocks
    squares [G, B]          sums of k(x, x) over the rows; None where it is 1
    """

    sizes: Int[np.ndarray, "G B"]
    sums: Float[np.ndarray, "G B F"] | None
    products: Float[np.ndarray, "G B G B"] | None
    squares: Float[np.ndarray, "G B"] | None = None

    @property
    def filled(self) -> np.ndarray:
        """Which blocks hold rows, [G, B]."""
        return self.sizes > 0

    def mean_squares(self, counts: Float[np.ndarray, "G B"]) -> Float[np.ndarray, " G"] | float:
        """Of the groups' rows, blocks counted so often, the mean of k(x, x)."""
        if self.squares is None:
            return 1.0
        return (counts * self.squares).sum(axis=1) / (counts * self.sizes).sum(axis=1)


class Selected:
    """The rows `indices` of a sample, in that order: an `x` of `lib.rows.Rows`."""

    def __init__(self, rows: Rows, indices: np.ndarray, on_rows: OnRows | None = None):
        self.rows, self.indices, self.on_rows = rows, indices, on_rows
        self.dtype, self.shape = rows.dtype, (len(indices), rows.shape[1])

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        indices = self.indices[which]
        if self.on_rows is not None:
            self.on_rows(len(indices))
        return self.rows.take(indices)


# Moments


def feature_moments(
    block_key: Key[Array, ""],
    groups: Sequence[Rows],
    frequencies: Float[Array, "D d"],
    bandwidth: float,
    *,
    readout: Readout | None = None,
    corrections: Sequence[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n G"]]] = (),
    num_blocks: int,
    chunk_size: int = 1024,
    devices: Sequence[jax.Device] | None = None,
    on_rows: OnRows | None = None,
) -> BlockMoments:
    """Sums of the features [cos(W x / sigma), sin(W x / sigma)] / sqrt(D) (F = 2 D); or of what a
    `readout` makes of them, whose last column is the square of the others.

    `corrections` of the first groups are (rows, what is added to what is read out of them). One
    pass; memory as in `lib.rows.fourier_means`. Of several processes each reads groups of its own.
    """
    offset = origin(groups)
    if max(rows.shape[0] for rows in groups) <= 16 * chunk_size:
        chunk_size = min(chunk_size, ROW_MULTIPLE)  # one shape: compiling takes longer than these
    sizes_and_sums = []
    for i in processes.own_share(len(groups)):
        streamed = stream_mean_embeddings(
            groups[i],
            frequencies,
            [bandwidth],
            offset=offset,
            readout=readout,
            num_blocks=num_blocks,
            block_key=block_key,
            chunk_size=chunk_size,
            devices=devices,
            on_rows=on_rows,
        )
        sums = streamed.block_sums[:, 0]
        if i < len(corrections):
            indices, differences = corrections[i]
            np.add.at(sums, _blocks_of(block_key, indices, num_blocks), differences)
        sizes_and_sums.append((streamed.block_sizes.astype(int), sums))
    sizes, sums = (processes.gathered(part, len(groups)) for part in zip(*sizes_and_sums))
    if readout is None:
        return BlockMoments(sizes, sums, None)
    return BlockMoments(sizes, sums[..., :-1], None, sums[..., -1])


def _blocks_of(block_key, indices, num_blocks):
    """The blocks of some rows."""
    if num_blocks == 1:
        return np.zeros(len(indices), int)
    size = -(-len(indices) // ROW_MULTIPLE) * ROW_MULTIPLE  # few shapes, so few compilations
    filled = fill_up(indices, size).reshape(-1, ROW_MULTIPLE)
    of_chunks = [_blocks(block_key, rows, num_blocks=num_blocks) for rows in filled]
    return np.concatenate(of_chunks)[: len(indices)]


@partial(jax.jit, static_argnames="num_blocks")
def _blocks(block_key, rows, *, num_blocks):
    return jax.vmap(lambda row: row_blocks(block_key, row, 1, num_blocks)[0])(rows)


def origin(groups: Sequence[Rows]) -> Float[np.ndarray, " d"]:
    """Mean of the last group's first rows: kernels do not depend on the origin, rounding does."""
    return groups[-1].take(slice(0, ROW_MULTIPLE)).mean(axis=0, dtype=np.float64)


def split_features(moments: BlockMoments, first: int) -> tuple[BlockMoments, BlockMoments]:
    """The features of the `first` frequencies and those of the others, each with |z(x)| = 1."""
    assert moments.sums is not None  # they are of features
    cosines, sines = np.split(moments.sums, 2, axis=-1)
    total = cosines.shape[-1]

    def part(chosen):
        both = np.concatenate([cosines[..., chosen], sines[..., chosen]], axis=-1)
        return moments._replace(sums=both * np.sqrt(total) / np.sqrt(max(1, both.shape[-1] // 2)))

    return part(slice(0, first)), part(slice(first, None))


def exact_moments(
    block_key: Key[Array, ""],
    groups: Sequence[Rows],
    bandwidth: float,
    *,
    num_blocks: int,
    on_rows: OnRows | None = None,
) -> BlockMoments:
    """Sums of the Gaussian kernel itself between blocks; costs as in `lib.rows.kernel_means`.

    Rows are read by their number, in a random order.
    """
    num_blocks = min(num_blocks, max(rows.shape[0] for rows in groups))
    pieces, places = [], []
    for g, rows in enumerate(groups):
        order = np.asarray(jax.random.permutation(block_key, rows.shape[0]))
        parts = np.array_split(order, min(num_blocks, len(order)))
        pieces += [
            Rows(Selected(rows, part, on_rows), name=rows.name, dtype=rows.dtype) for part in parts
        ]
        places += [g * num_blocks + b for b in range(len(parts))]
    # The last block stands for the target there: here it is one of many.
    means = exact_gram_of_means(pieces[:-1], pieces[-1], [bandwidth])
    cross = means.b[0][:, None]
    counts = np.array([piece.shape[0] for piece in pieces], float)
    products = np.zeros((len(groups) * num_blocks,) * 2)
    products[np.ix_(places, places)] = np.block([[means.a[0], cross], [cross.T, means.q[0]]])
    sizes = np.zeros(len(products), int)
    sizes[places] = counts
    products *= sizes[:, None] * sizes[None, :]
    shape = (len(groups), num_blocks)
    return BlockMoments(sizes.reshape(shape), None, products.reshape(shape * 2))


def grams(moments: BlockMoments, counts: Float[np.ndarray, "R G B"]) -> Iterator[np.ndarray]:
    """Gram matrices [G, G] of the groups' means, for each row of `counts`: blocks counted so often.

    Every group must keep a row.
    """
    weights = counts / np.einsum("rgb,gb->rg", counts, moments.sizes.astype(float))[:, :, None]
    sums, num_groups = moments.sums, counts.shape[1]
    if sums is None:
        assert moments.products is not None  # one of the two
        flat = moments.products.reshape(*moments.sizes.shape, -1)
    row_bytes = 8 * num_groups * (flat.shape[-1] if sums is None else sums.shape[-1])
    size = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, len(weights), size):
        some = weights[first : first + size]
        by_group = np.swapaxes(some, 0, 1)
        if sums is not None:
            means = np.swapaxes(by_group @ sums, 0, 1)
            yield from means @ np.swapaxes(means, 1, 2)
        else:
            partial = (by_group @ flat).reshape(num_groups, len(some), *moments.sizes.shape)
            yield from np.einsum("grhb,rhb->rgh", partial, some)


def bootstrap_counts(
    rng: np.random.Generator, moments: BlockMoments, replicates: int
) -> Float[np.ndarray, "R G B"]:
    """How often each block is drawn, for every group, the target's too, by itself.

    Of K blocks K - 1 are drawn with replacement, so that the variance over draws is an unbiased
    estimate of the mean's (Rao and Wu, Resampling inference with complex survey data, 1988). A
    group of one block stays as it is: its noise is unknown.
    """
    counts = np.zeros((replicates, *moments.sizes.shape))
    for g, filled in enumerate(moments.filled):
        k = int(filled.sum())
        counts[:, g, filled] = rng.multinomial(max(1, k - 1), np.full(k, 1 / k), size=replicates)
    return counts
