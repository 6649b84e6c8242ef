"""Where two samples differ, and by how much: witness functions, and intervals of MMD^2."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lib.drmmd import SpectralFilter, tikhonov
from lib.drmmd.features import feature_moments
from lib.drmmd.nystrom import landmark_basis, nystrom_features
from lib.kernels import Kernel, gram_product, kernel_diagonal, kernel_mean
from lib.mmd import _as_samples, mmd_squared_unbiased
from lib.numerics import named_key, product, uniform_weights
from lib.two_sample._permutations import MAX_EXACT, RANK, centered


class Interval(NamedTuple):
    estimate: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]


def mmd_squared_interval(
    key: Key[Array, ""],
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    level: float = 0.95,
    num_resamples: int = 999,
    block_size: int = 1024,
) -> Interval:
    """The unbiased estimate of MMD^2(P, Q) and a bootstrap interval of it.

    Rows are drawn anew with replacement, in each sample for itself; pairs of a row with itself do
    not count. The interval is the basic one, [2 U - q_high, 2 U - q_low] with the quantiles of the
    resamples. It says how large a difference is; whether there is one says `two_sample_test`: where
    P = Q the statistic is degenerate and the interval is too wide. Memory O((n + m) num_resamples).
    """
    x, y, *_ = _as_samples(x, y)

    def counts(name, n):
        drawn = jax.random.randint(named_key(key, name), (num_resamples, n), 0, n)
        return jax.vmap(lambda row: jnp.bincount(row, length=n))(drawn).T.astype(x.dtype)

    def within(points, counts):
        n, squares = len(points), jnp.square(counts)
        diagonal = product(kernel_diagonal(kernel, points), squares)
        total = kernel_mean(kernel, points, x_weights=counts, block_size=block_size)
        return (total - diagonal) / (n**2 - jnp.sum(squares, axis=0))

    a, b = counts("x", len(x)), counts("y", len(y))
    options = {"x_weights": a / len(x), "y_weights": b / len(y), "block_size": block_size}
    values = within(x, a) + within(y, b) - 2 * kernel_mean(kernel, x, y, **options)
    estimate = mmd_squared_unbiased(kernel, x, y, block_size=block_size)
    low, high = jnp.quantile(values, jnp.array([(1 - level) / 2, (1 + level) / 2]))
    return Interval(estimate, 2 * estimate - high, 2 * estimate - low)


def witness(
    key: Key[Array, ""],
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    lmbda: float = math.inf,
    spectral_filter: SpectralFilter = tikhonov,
    rank: int | None = None,
    block_size: int = 1024,
) -> Callable[[Float[Array, "p d"]], Float[Array, " p"]]:
    """h = (1 + lambda) g(S) f as a function of points [p, d]; f for lambda = inf.

    It is large where x has more than its share of the points and small where y has, and its mean
    over x less that over y is the statistic of `two_sample_test`. Up to a constant; S, Nystrom
    features and `rank` as there.
    """
    x, y, *_ = _as_samples(x, y)
    pooled = jnp.concatenate([x, y])
    contrast = jnp.concatenate([uniform_weights(x), -uniform_weights(y)])
    if math.isinf(lmbda):
        weights = contrast
    elif rank is None and len(pooled) <= MAX_EXACT:
        # g(S) sum_i s_i phi(z_i) = sum_i c_i phi(z_i) with c = g(H K H / N) s.
        values, vectors = jnp.linalg.eigh(centered(kernel(pooled, pooled)))
        gains = spectral_filter(jnp.maximum(values, 0) / len(pooled), lmbda).inverse
        weights = product(vectors, gains * product(contrast, vectors))
        weights = (1 + lmbda) * (weights - jnp.mean(weights))
    else:
        order = jax.random.permutation(named_key(key, "order of the rows"), len(pooled))
        basis = landmark_basis(kernel, pooled[order][: rank or RANK])
        features = partial(nystrom_features, kernel, basis, block_size=block_size)
        mean, second = feature_moments(features, pooled, block_size=block_size)
        assert second is not None
        f = product(features(x).T, uniform_weights(x)) - product(features(y).T, uniform_weights(y))
        values, vectors = jnp.linalg.eigh(second - mean[:, None] * mean[None, :])
        gains = spectral_filter(jnp.maximum(values, 0), lmbda).inverse
        direction = (1 + lmbda) * product(vectors, gains * product(f, vectors))
        return lambda points: product(features(points), direction)
    return lambda points: gram_product(kernel, points, pooled, weights, block_size=block_size)
