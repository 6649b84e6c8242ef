"""Kernels, their Gram matrices in blocks, and bandwidths.

A kernel is a plain function of two samples, `kernel(x [n, d], y [m, d]) -> [n, m]`. A factory
closes over the hyperparameters: `gaussian(bandwidth)`. Every bandwidth is sigma, a length in the
units of the data: never sigma^2, never gamma. Hyperparameters may be traced, so that a kernel can
be differentiated or vmapped in them; those given as plain numbers are checked when the kernel is
made and raise ValueError.

What sums over a Gram matrix takes a `block_size` and holds one [block_size, block_size] block at a
time, forwards and backwards; no [n, m, d] array is ever made. The block size changes the result by
rounding only. Nothing here is jitted: jit at the caller. The dtype follows the input; half
precision is computed in float32.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, ScalarLike

from lib.numerics import (
    _zero_at_zero,
    as_sample,
    at_least_float32,
    map_blocks,
    map_leading,
    pairwise_sum,
    plain_number,
    product,
    safe_sqrt,
    to_blocks,
    uniform_weights,
)

Kernel = Callable[[Float[Array, "n d"], Float[Array, "m d"]], Float[Array, "n m"]]
"""A function of points [n, d] and [m, d] that gives the matrix k(x_i, y_j), [n, m]."""

# Up to this dimension distances are summed feature by feature, which costs no more than a matrix
# product (measured on CPU) and is exact for near points; above it they are expanded.
DIRECT_DIMENSION = 8
# |x|^2 + |y|^2 - 2 x.y is off by up to 12 eps (|x|^2 + |y|^2) on identical points, measured up to
# d = 8192 in float32: what is smaller is rounding, not distance.
ROUNDING_UNITS = 16


# Distances


@jax.custom_jvp
def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, [n, m].

    In up to `DIRECT_DIMENSION` dimensions the squared differences are summed one feature at a time.
    Above it both samples are centered and the square is expanded into one matrix product at the
    highest precision. Its rounding error is a few eps (|x|^2 + |y|^2), and whatever lies below that
    is set to 0: identical points are at distance exactly 0. The derivatives are those of the
    polynomial |x - y|^2 everywhere, clipped or not, so smooth kernels keep their derivatives of
    every order at identical points.
    """
    if x.shape[1] <= DIRECT_DIMENSION:
        # The product with I only makes XLA write the features out: read through the slice of a
        # block, they keep its CPU loops from vectorizing, at four times the cost.
        identity = jnp.eye(x.shape[1], dtype=x.dtype)
        x, y = _inner_products(identity, x), _inner_products(identity, y)
        return cast(Array, sum(jnp.square(a[:, None] - b[None, :]) for a, b in zip(x, y)))
    x, y = _center(x, y)
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    expanded = norms - 2 * _inner_products(x, y)
    return jnp.where(expanded <= ROUNDING_UNITS * jnp.finfo(norms.dtype).eps * norms, 0, expanded)


@squared_distances.defjvp
def _squared_distances_jvp(points, tangents):
    """2 (x - y) . (dx - dy) as two matrix products, so that its transpose is two as well."""
    x, y = _center(*points)

    def half(z, dz, other):
        inner = jnp.sum(z * dz, axis=1, keepdims=True)
        left = jnp.concatenate([inner, -dz], axis=1)
        right = jnp.concatenate([jnp.ones_like(other[:, :1]), other], axis=1)
        return 2 * _inner_products(left, right)

    dx, dy = tangents
    return squared_distances(*points), half(x, dx, y) + half(y, dy, x).T


def _center(x, y):
    """Both samples about the midpoint of their means, which no distance depends on."""
    x, y = at_least_float32(x), at_least_float32(y)
    center = (jnp.mean(x, axis=0, keepdims=True) + jnp.mean(y, axis=0, keepdims=True)) / 2
    return x - lax.stop_gradient(center), y - lax.stop_gradient(center)


def _inner_products(x, y):
    return product(at_least_float32(x), at_least_float32(y).T)


# Kernels


def _check_number(name, value, low, high, *, with_low=False):
    """`plain_number(value)`, which must lie in (low, high), or in [low, high) `with_low`."""
    if not isinstance(value, numbers.Real):
        return value
    if not (low < value < high or (with_low and value == low)):
        raise ValueError(
            f"{name} must lie in {'[' if with_low else '('}{low}, {high}), got {value}"
        )
    return plain_number(value)


def gaussian(bandwidth: ScalarLike) -> Kernel:
    """k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = `bandwidth`."""
    bandwidth = _check_number("bandwidth", bandwidth, 0, math.inf)
    return lambda x, y: jnp.exp(-squared_distances(x, y) / (2 * bandwidth**2))


def laplace(bandwidth: ScalarLike, *, distance: Literal["l2", "l1"] = "l2") -> Kernel:
    """k(x, y) = exp(-|x - y| / sigma), with sigma = `bandwidth` and |.| the Euclidean norm (l2) or
    the sum of absolute differences (l1, the product of Laplace kernels in each coordinate).

    The gradient is 0 where there is none: at x = y, for l1 in each coordinate that is equal.
    """
    bandwidth = _check_number("bandwidth", bandwidth, 0, math.inf)
    if distance not in ("l2", "l1"):
        raise ValueError(f"distance must be l2 or l1, not {distance!r}")
    if distance == "l1":
        return lambda x, y: jnp.exp(-_l1_distances(x, y) / bandwidth)
    return lambda x, y: jnp.exp(-safe_sqrt(squared_distances(x, y)) / bandwidth)


def _l1_distances(x, y):
    """sum_k |x_ik - y_jk|, [n, m], one feature at a time, forwards and backwards."""

    @jax.checkpoint
    def of_feature(a, b):
        difference = a[:, None] - b[None, :]
        return difference * jnp.sign(difference)  # the derivative of JAX's abs at 0 is 1

    def add(total, columns):
        return total + of_feature(*columns), None

    columns = at_least_float32(x).T, at_least_float32(y).T
    start = jnp.zeros((len(x), len(y)), jnp.result_type(*columns))
    return lax.scan(add, start, columns, unroll=min(x.shape[1], DIRECT_DIMENSION))[0]


def imq(bandwidth: ScalarLike, *, exponent: ScalarLike = 0.5) -> Kernel:
    """Inverse multiquadric, k(x, y) = (1 + |x - y|^2 / sigma^2)^(-exponent), exponent > 0."""
    bandwidth = _check_number("bandwidth", bandwidth, 0, math.inf)
    exponent = _check_number("exponent", exponent, 0, math.inf)
    return lambda x, y: (1 + squared_distances(x, y) / bandwidth**2) ** -exponent


def riesz(exponent: ScalarLike = 1.0) -> Kernel:
    """k(x, y) = -|x - y|^r, r = `exponent` in (0, 2); r = 1 is the energy distance kernel.

    Only conditionally positive definite: sum_ij c_i c_j k(x_i, x_j) >= 0 where sum_i c_i = 0. So it
    serves an MMD, whose square is the generalized energy distance of Szekely and Rizzo (2013), but
    its own Gram matrix is not positive. The gradient at x = y is 0.
    """
    exponent = _check_number("exponent", exponent, 0, 2)
    if isinstance(exponent, float) and exponent == 1:
        return lambda x, y: -safe_sqrt(squared_distances(x, y))
    return lambda x, y: -_zero_at_zero(lambda s: s ** (exponent / 2), squared_distances(x, y))


def linear() -> Kernel:
    """k(x, y) = x . y"""
    return _inner_products


def polynomial(degree: int, *, offset: ScalarLike = 1.0, scale: ScalarLike = 1.0) -> Kernel:
    """k(x, y) = (scale x . y + offset)^degree, with degree >= 1, scale > 0 and offset >= 0."""
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    offset = _check_number("offset", offset, 0, math.inf, with_low=True)
    scale = _check_number("scale", scale, 0, math.inf)
    return lambda x, y: (scale * _inner_products(x, y) + offset) ** degree


def mixture(kernels: Sequence[Kernel], weights: Sequence[ScalarLike] | None = None) -> Kernel:
    """k(x, y) = sum_i w_i k_i(x, y), each w_i = 1 unless given; plain numbers must be positive."""
    kernels = tuple(kernels)
    weights = (1.0,) * len(kernels) if weights is None else tuple(weights)
    if not kernels or len(weights) != len(kernels):
        raise ValueError(f"one weight for each kernel: {len(kernels)} and {len(weights)}")
    weights = [_check_number("weight", weight, 0, math.inf) for weight in weights]
    terms = tuple(zip(weights, kernels))
    return lambda x, y: cast(Array, sum(weight * kernel(x, y) for weight, kernel in terms))


# Sums over Gram matrices


def kernel_diagonal(kernel: Kernel, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """k(x_i, x_i), [n], without a Gram matrix."""
    return jax.vmap(lambda point: kernel(point[None], point[None])[0, 0])(x)


def gram_product(
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    weights: Float[Array, "m *columns"],
    *,
    block_size: int = 1024,
) -> Float[Array, "n *columns"]:
    """K w, or (K w)_i = sum_j k(x_i, y_j) w_j: the kernel embedding of sum_j w_j delta_{y_j} at x.

    `weights` is a vector [m] or has columns [m, p]; the result has the same columns. Beside
    input and output, and a padded copy of the input, it holds O(block_size^2 + block_size p), and
    as much again for each derivative.
    """
    y_blocks, weight_blocks = to_blocks(y, weights, block_size)
    dtype = jnp.result_type(x, weights, jnp.float32)

    @jax.checkpoint
    def product_of_rows(x_block):
        @jax.checkpoint
        def add_columns(total, block):
            y_block, weight_block = block
            gram = kernel(x_block, y_block)
            return total + product(gram, weight_block).astype(dtype), None

        start = jnp.zeros((x_block.shape[0], *weights.shape[1:]), dtype)
        blocks = y_blocks, weight_blocks
        return lax.scan(add_columns, start, blocks, unroll=len(y_blocks) == 1)[0]

    return map_blocks(product_of_rows, x, block_size)


def kernel_mean(
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    x_weights: Float[Array, "n *columns"] | None = None,
    y_weights: Float[Array, "m *columns"] | None = None,
    block_size: int = 1024,
) -> Float[Array, "*columns"]:
    """sum_ij w_i v_j k(x_i, y_j), the mean of k under the two weighted samples.

    Weights are 1/n and 1/m by default and are used as they are: not normalized, of any sign. Given
    as columns [n, p] and [m, p], they yield [p] such sums from one pass over the Gram matrix.
    Without `y` it is sum_ij w_i w_j k(x_i, x_j), diagonal included; the kernel must be symmetric,
    and half of the blocks are computed.

    Each block is summed by a product with its weights, then the block sums are summed pairwise: the
    error is about eps sqrt(block_size) times sum_ij |w_i v_j k|, whatever n. Beside the input and a
    padded copy of it, this holds O(block_size^2 + block_size p) and one sum for each block; so does
    the reverse mode, which computes each block again.
    """
    if y is None and y_weights is not None:
        raise ValueError("y_weights without y")
    w = uniform_weights(x) if x_weights is None else x_weights
    z, v = x, w
    if y is not None:
        z, v = y, uniform_weights(y) if y_weights is None else y_weights
    if 0 < len(x) <= block_size >= len(z) > 0:
        return jnp.sum(w * product(kernel(x, z), v), axis=0)
    blocks = to_blocks(x, w, block_size)
    if y is None:
        return pairwise_sum(lax.map(_sum_of_block(kernel, blocks), _upper_blocks(blocks)))
    others = to_blocks(z, v, block_size)
    rows, columns = np.indices((len(blocks[0]), len(others[0]))).reshape(2, -1)
    pairs = rows, columns, np.ones_like(rows)
    return pairwise_sum(lax.map(_sum_of_block(kernel, blocks, others), pairs))


def kernel_mean_and_largest(
    kernel: Kernel,
    x: Float[Array, "n d"],
    x_weights: Float[Array, "n *columns"],
    *,
    block_size: int = 1024,
) -> tuple[Float[Array, "*columns"], Float[Array, ""]]:
    """`kernel_mean(kernel, x, x_weights=x_weights)` and max_ij |k(x_i, x_j)|, in one pass.

    The second bounds the rounding of the first: it is of the order of eps max |k| (sum_i |w_i|)^2.
    """
    blocks = to_blocks(x, x_weights, block_size)
    sum_of_block = _sum_of_block(kernel, blocks, with_largest=True)
    sums, largest = map_leading(sum_of_block, _upper_blocks(blocks))
    return pairwise_sum(sums), jnp.max(largest)


def _upper_blocks(blocks):
    """(row, column, multiplicity) of the blocks of a symmetric matrix that are computed."""
    rows, columns = np.triu_indices(len(blocks[0]))
    return rows, columns, np.where(rows == columns, 1, 2)


def _sum_of_block(kernel, x_blocks, y_blocks=None, *, with_largest=False):
    """(row, column, multiplicity) -> the weighted sum of a Gram block, and its largest |k|."""
    (x, x_weights), (y, y_weights) = x_blocks, x_blocks if y_blocks is None else y_blocks

    @jax.checkpoint
    def sum_of_block(block):
        row, column, multiplicity = block
        gram = kernel(x[row], y[column])
        weighted = product(gram, y_weights[column])
        total = multiplicity * jnp.sum(x_weights[row] * weighted, axis=0)
        return (total, jnp.max(jnp.abs(gram))) if with_largest else total

    return sum_of_block


# Bandwidths


def median_bandwidth(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    max_points: int = 1000,
) -> Float[Array, ""]:
    """The median of |x_i - x_j| over pairs i < j of `x`, or of `x` and `y` pooled.

    Where more than half of the pairs coincide that median is 0 and no bandwidth: the median over
    the pairs that do not coincide takes its place, and 1 where all points are equal. So it is
    positive, traced or not, unless the sample holds NaN.

    Of more than `max_points` rows a uniform subsample without replacement is taken; `key` is used
    for nothing else. Memory O(max_points^2). Some authors take sigma^2 = median(|x_i - x_j|^2) / 2
    instead: divide by sqrt(2) for theirs. Raises as `as_sample`, and for a single point.
    """
    unit, distances = _pair_distances(key, x, y, max_points)
    median = jnp.median(distances)
    of_distinct = jnp.nanmedian(jnp.where(distances > 0, distances, jnp.nan))
    of_distinct = jnp.where(jnp.isnan(of_distinct), 1, of_distinct)
    return unit * jnp.where(median == 0, of_distinct, median)


def quantile_bandwidths(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    num_bandwidths: int = 5,
    distance: Literal["l2", "l1"] = "l2",
    max_points: int = 1000,
) -> Float[Array, " num_bandwidths"]:
    """Bandwidths in geometric progression from half the 5% quantile to twice the 95% quantile of
    the distances between points of `x`, or of `x` and `y` pooled, that do not coincide; 1/2 to 2
    where all do (the range of MMDAgg, Schrab et al., JMLR 2023). Otherwise as `median_bandwidth`.
    """
    unit, distances = _pair_distances(key, x, y, max_points, distance)
    ends = jnp.nanquantile(
        jnp.where(distances > 0, distances, jnp.nan), jnp.array([0.05, 0.95], distances.dtype)
    )
    low, high = jnp.where(jnp.isnan(ends), 1 / unit, ends) * jnp.array([0.5, 2], distances.dtype)
    return unit * low * (high / low) ** jnp.linspace(0, 1, num_bandwidths, dtype=distances.dtype)


def _pair_distances(key, x, y, max_points, distance="l2"):
    """(unit, distances / unit) of pairs i < j, of no more than `max_points` rows."""
    pooled = jnp.concatenate(
        [as_sample(name, points)[0] for name, points in (("x", x), ("y", y)) if points is not None]
    )
    if pooled.shape[0] < 2 or max_points < 2:
        raise ValueError(f"no pair in {pooled.shape[0]} points, at most {max_points} of them used")
    if pooled.shape[0] > max_points:
        pooled = jax.random.choice(key, pooled, (max_points,), replace=False)
    pooled = at_least_float32(pooled)
    # A power of two: dividing by it rounds nothing, and squares neither vanish nor overflow.
    exponent = jnp.frexp(jnp.max(jnp.abs(pooled - pooled[:1])))[1]
    unit = jnp.ldexp(jnp.ones((), pooled.dtype), exponent)
    # Each pair once: a row with those after it, halfway around; just opposite ones, met twice, come
    # extra. As constants of the program the indices of 1000 points would be 4 MB.
    n = pooled.shape[0]
    i, after = jnp.arange(n)[None, :], jnp.arange(1, (n + 1) // 2)[:, None]
    opposite = jnp.arange(n // 2 if n % 2 == 0 else 0)
    between = squared_distances if distance == "l2" else _l1_distances
    matrix = between(pooled / unit, pooled / unit)
    beside, across = matrix[i, (i + after) % n], matrix[opposite, opposite + n // 2]
    distances = jnp.concatenate([beside.ravel(), across])
    return unit, safe_sqrt(distances) if distance == "l2" else distances


def bandwidth_grid(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    num_bandwidths: int = 5,
    ratio: float = 2.0,
    max_points: int = 1000,
) -> Float[Array, " num_bandwidths"]:
    """Bandwidths in geometric progression about `median_bandwidth`: a quarter to four times it."""
    steps = np.arange(num_bandwidths) - (num_bandwidths - 1) / 2
    return median_bandwidth(key, x, y, max_points=max_points) * jnp.asarray(
        ratio**steps, jnp.promote_types(x.dtype, jnp.float32)
    )
