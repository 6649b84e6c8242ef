"""The Gaussian kernel's means between samples that are read in pieces: the exact reference, in time
quadratic in the rows, for what `lib.rows.fourier_means` approximates in one pass; and the median
heuristic.

Samples are `lib.rows.Rows` without weights, or what they are made of: arrays, files.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key, Real

from lib.kernels import median_bandwidth, squared_distances
from lib.rows._rows import (
    as_rows,
    check_bandwidths,
    check_same_width,
    fill_up,
    one_behind,
    pooled,
    read_ahead,
)


class GramOfMeans(NamedTuple):
    """Inner products of the mean embeddings of N sets and a target, for S bandwidths; float64.

    MMD^2 between the mixture of the sets with weights w and the target is w' a w - 2 b' w + q.
    """

    a: Float[np.ndarray, "S N N"]
    b: Float[np.ndarray, "S N"]
    q: Float[np.ndarray, " S"]
    sizes: Int[np.ndarray, " N"]
    target_size: int


def exact_gram_of_means(
    sets: Sequence[Any],
    target: Any,
    bandwidths: Sequence[ArrayLike] | ArrayLike,
    *,
    block_size: int = 1024,
) -> GramOfMeans:
    """Means of the Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)) between sets, and to the target.

    A_ij is the mean of k(x, y) over x in set i and y in set j, b_i over set i and the target, q
    over the target twice: V-statistics, with the diagonals. A list as `target` is pooled. float32,
    or float64 where any sample is, and the sums in float64, within a local scope.

    The rows of all samples are taken as one matrix of T rows, in blocks: time O(T^2 d / 2) and, for
    S bandwidths, which share the distances, O(T^2 S) exponentials; memory some blocks of rows and a
    few [block_size, block_size] matrices. Files are read T / (2 block_size) times.

    Raises ValueError without a set or a target, on unequal widths, bandwidths that are not
    positive, and as `Rows` do, also where a sample has weights.
    """
    bandwidths = check_bandwidths(bandwidths)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    targets = list(target) if isinstance(target, list | tuple) else [target]
    if not sets or not targets:
        raise ValueError(f"{len(sets)} sets and {len(targets)} targets: one of each is needed")
    samples = [as_rows(rows, f"set {i}") for i, rows in enumerate(sets)]
    samples += [as_rows(rows, f"target {i}") for i, rows in enumerate(targets)]
    check_same_width(samples)
    sums = _kernel_sums(samples, bandwidths, block_size)

    num_sets = len(sets)
    sizes = np.array([rows.shape[0] for rows in samples[:num_sets]])
    target_size = sum(rows.shape[0] for rows in samples[num_sets:])
    return GramOfMeans(
        sums[:, :num_sets, :num_sets] / (sizes[:, None] * sizes[None, :]),
        sums[:, :num_sets, num_sets:].sum(axis=2) / (sizes * target_size),
        sums[:, num_sets:, num_sets:].sum(axis=(1, 2)) / target_size**2,
        sizes,
        target_size,
    )


def _kernel_sums(samples, bandwidths, block_size):
    """sum_{x in i} sum_{y in j} k(x, y) for every two samples i and j, [S, N, N]."""
    set_of = np.repeat(np.arange(len(samples)), [rows.shape[0] for rows in samples])
    size = min(block_size, len(set_of))
    starts = range(0, len(set_of), size)
    parts = [set_of[start : start + size] for start in starts]
    width = max(part[-1] - part[0] for part in parts) + 1  # the most sets that a block touches
    together = pooled(samples)
    dtype = together.dtype

    def blocks(first):
        """Rows from block `first` on, with each row's set, counted from the block's first set."""
        for rows, part in zip(
            read_ahead(together.chunks(size, start=starts[first])), parts[first:]
        ):
            labels = np.full(size, -1)
            labels[: len(part)] = part - part[0]
            yield jnp.asarray(fill_up(rows, size)), labels

    def sums_of_blocks():
        for row in range(len(parts)):
            x = None
            for column, y in enumerate(blocks(row), row):
                x = y if x is None else x
                yield _block_sums(*x, *y, bandwidths.astype(dtype), width=width), row, column

    # With room for a block that begins in the last set; what lies past that set stays 0.
    shape = len(samples) + width - 1
    sums = np.zeros((len(bandwidths), shape, shape))
    with jax.enable_x64(True):
        for block, row, column in one_behind(sums_of_blocks()):
            i, j = (slice(parts[k][0], parts[k][0] + width) for k in (row, column))
            block = block / 2 if row == column else block
            sums[:, i, j] += block
            sums[:, j, i] += np.swapaxes(block, 1, 2)
    return sums[:, : len(samples), : len(samples)]


@partial(jax.jit, static_argnames="width")
def _block_sums(x, x_sets, y, y_sets, bandwidths, *, width):
    """The kernel summed over the rows of each two sets, [S, width, width] float64."""
    distances = squared_distances(x, y)
    left, right = (jax.nn.one_hot(k, width, dtype=jnp.float64) for k in (x_sets, y_sets))

    def sums(bandwidth):
        return left.T @ (jnp.exp(-distances / (2 * bandwidth**2)) @ right)

    return lax.map(sums, bandwidths)


def noise_of_means(
    gram: Float[np.ndarray, "K K"],
    sizes: Real[np.ndarray, " K"] | Sequence[int],
    squares: Float[np.ndarray, " K"] | float = 1.0,
) -> Float[np.ndarray, " K"]:
    """(s_i - A_ii) / (n_i - 1): the unbiased estimate of E |mu_i - E mu_i|^2; 0 for a single row.

    A are means of a kernel between sets of `sizes` n_i independent rows, s_i = `squares` those of
    k(x, x), for the Gaussian kernel 1. Taken off the diagonal this leaves means over pairs of
    different rows: U-statistics in place of V-statistics. The MMD^2 made of them is unbiased and
    may be negative, and A need not be positive semidefinite.
    """
    return (squares - np.diag(gram)) / np.maximum(np.asarray(sizes) - 1, 1)


def streamed_median_bandwidth(
    key: Key[Array, ""], sets: Sequence[Any], *, num_points: int = 1000
) -> float:
    """sigma = the median distance between rows of a subsample of the sets.

    Of each of the N sets ceil(num_points / N) rows are drawn without replacement, or all where it
    has fewer: each set counts the same whatever its size, as it does in the Gram matrix of a
    mixture. Only these rows are read. The convention is that of `lib.kernels.median_bandwidth`;
    where sigma^2 = median(|x_i - x_j|^2) / 2 is wanted, divide by sqrt(2).

    Raises ValueError on unequal widths, on fewer than two rows in all, where all of them are equal,
    and as `Rows` do.
    """
    samples = [as_rows(rows, f"set {i}") for i, rows in enumerate(sets)]
    if not samples or num_points < 2:
        raise ValueError(f"no pair in {num_points} points of {len(samples)} sets")
    check_same_width(samples)
    share, drawn = -(-num_points // len(samples)), []
    *set_keys, median_key = jax.random.split(key, len(samples) + 1)
    for set_key, rows in zip(set_keys, samples):
        indices = np.arange(rows.shape[0])
        if rows.shape[0] > share:
            indices = jax.random.choice(set_key, rows.shape[0], (share,), replace=False)
        drawn.append(rows.take(np.sort(np.asarray(indices))))
    points = np.concatenate(drawn)
    if len(points) > 1 and (points == points[0]).all():
        names = ", ".join(rows.name for rows in samples[:5])
        more = f" and {len(samples) - 5} more" if len(samples) > 5 else ""
        raise ValueError(
            f"all rows of {names}{more} are equal, so no distance gives a bandwidth: give a number "
            "in place of auto"
        )
    most = max(2, len(points))
    with jax.enable_x64(points.dtype == np.float64):
        return float(median_bandwidth(median_key, jnp.asarray(points), max_points=most))
