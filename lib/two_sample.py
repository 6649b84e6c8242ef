"""The two-sample test: permutations of the pooled sample, several kernels at once."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lib.kernels import Kernel, kernel_mean_and_largest
from lib.mmd import _as_samples
from lib.numerics import named_key, uniform_weights


class TwoSampleTest(NamedTuple):
    """What `two_sample_test` finds for each kernel, and for all of them together."""

    statistics: Float[Array, " kernels"]  # the biased MMD^2
    kernel_p_values: Float[Array, " kernels"]  # not corrected for the number of kernels
    p_value: Float[Array, ""]  # aggregated, exact


def permutations(
    key: Key[Array, ""], num_permutations: int, size: int
) -> Int[Array, "num_permutations size"]:
    """Independent uniform permutations of 0, ..., size - 1."""
    keys = jax.random.split(key, num_permutations)
    return jax.vmap(lambda key: jax.random.permutation(key, size))(keys)


def two_sample_test(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    kernels: Sequence[Kernel],
    *,
    num_permutations: int = 500,
    relabellings: Int[Array, "b n_plus_m"] | None = None,
    block_size: int = 1024,
) -> TwoSampleTest:
    """Permutation test of P = Q by the MMD under several kernels at once.

    For each kernel, p = (1 + #{b : T_b >= T}) / (1 + B), where T is the biased MMD^2 and T_b the
    same after the pooled points have been relabelled by the b-th of B permutations. Over kernels,
    the smallest p is compared with the smallest p that each relabelling would itself have got among
    the same B + 1 (the minP procedure of Westfall and Young 1993; aggregation over bandwidths as in
    MMDAgg, Schrab et al., JMLR 2023). All p-values are exact: P(p <= alpha) <= alpha for each n and
    m if the pooled points are exchangeable and the kernels do not depend on which point is whose;
    bandwidths from `bandwidth_grid(key, x, y)` do not.

    Statistics that are equal up to rounding count as equal: T_b >= T stands for T_b >= T - 2 eps
    max|k| sum_ij |s_i s_j|, where the sum is 4; what equal statistics of float32 and float64 were
    seen to differ by is a fifth of it. In float32 it is 1e-6 max|k|: run in float64 what must
    resolve less. Rows are summed in an order drawn from `key`, the same for T and every T_b: so
    larger rounding, if there is any, cannot tell the samples' own labels from the drawn ones, and
    the p-values stay exact.

    T = s' K s with s = 1/n on x and -1/m on y, so that one pass over the blocks of each Gram matrix
    serves all the permutations, as columns of s; kernels must be symmetric. Memory
    O((n + m) B + block_size^2 + block_size B). A loop is compiled for each kernel, so jit what
    calls this more than once.

    `relabellings` are the rows of `permutations`, drawn from `key` unless given. A kernel whose
    values on the samples are not finite has no p-value: its own and the aggregated one are NaN.
    p-values that the dtype does not hold are rounded down: p <= .05 is true of 5 / 100. Raises as
    `mmd_squared` does, and without kernels.
    """
    x, y, *_ = _as_samples(x, y)
    if not kernels:
        raise ValueError("kernels is empty")
    pooled = jnp.concatenate([x, y])
    if relabellings is None:
        relabellings = permutations(key, num_permutations, len(pooled))
    weights = jnp.concatenate([uniform_weights(x), -uniform_weights(y)])
    columns = jnp.concatenate([weights[:, None], weights[relabellings.T]], axis=1)
    order = jax.random.permutation(named_key(key, "order of the rows"), len(pooled))
    pooled, columns = pooled[order], columns[order]

    statistics, p_values = [], []
    for kernel in kernels:
        values, largest = kernel_mean_and_largest(kernel, pooled, columns, block_size=block_size)
        tolerance = 2 * 4 * jnp.finfo(values.dtype).eps * largest
        statistics.append(values)
        p_values.append(_permutation_p_values(values, tolerance))
    stacked = jnp.stack(p_values)
    aggregated = _permutation_p_values(-stacked.min(axis=0), 0)
    return TwoSampleTest(jnp.stack(statistics)[:, 0], stacked[:, 0], aggregated[0])


def _permutation_p_values(statistics, tolerance):
    """For each entry, the share of entries that are at least as large, itself included; NaN where
    any entry is not finite."""
    smaller = jnp.searchsorted(jnp.sort(statistics), statistics - tolerance)
    exact = np.arange(len(statistics) + 1) / len(statistics)
    # Looked up, since XLA divides by multiplying with a rounded inverse, and rounded down, so that
    # 2 / 40 <= .05 holds in every dtype.
    shares = exact.astype(statistics.dtype)
    shares = np.where(shares > exact, np.nextafter(shares, -np.inf, dtype=shares.dtype), shares)
    p_values = jnp.asarray(shares)[len(statistics) - smaller]
    return jnp.where(jnp.isfinite(statistics).all(), p_values, jnp.nan)
