"""Sliced-Wasserstein distances: directions, sorted projections, couplings on the line, SW_p.

SW_p^p(mu, nu) = mean over directions theta of W_p^p(<theta, mu>, <theta, nu>)  (Bonneel et al.,
2015), and on the line W_p^p is the integral over (0, 1) of |F^-1 - G^-1|^p, F^-1 and G^-1 the
quantile functions. For point clouds both are step functions, so the integral is a finite sum: exact
for any two sizes, with or without weights.

Arrays are `[n, d]` for points, `[L, d]` for directions and `[n, L]` for sorted projections; a
leading `C` means C measures at once. Nothing of shape [C, C, n, L] is ever made.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lib import devices
from lib.numerics import PRNGKey, as_sample, orthonormal_rows, product, safe_sqrt
from lib.sliced_wasserstein._sorting import sort_columns, sort_with_permutation

# Directions


def random_directions(
    key: PRNGKey, num_directions: int, dimension: int, *, dtype=jnp.float32
) -> Float[Array, "L d"]:
    """Independent directions, uniform on the unit sphere of R^d."""
    normal = jax.random.normal(key, (num_directions, dimension), dtype)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


def orthogonal_directions(
    key: PRNGKey, num_directions: int, dimension: int, *, dtype=jnp.float32
) -> Float[Array, "L d"]:
    """Directions in blocks of d orthonormal ones, each block uniform (Haar) and drawn on its own.

    Each direction by itself is uniform on the sphere, so averages over them stay unbiased; within a
    block they repel each other, which lowers the variance (Rowland et al., 2019).
    """
    blocks = -(-num_directions // dimension)
    normal = jax.random.normal(key, (blocks, dimension, dimension), dtype)
    return orthonormal_rows(normal)[:num_directions]


def basis_directions(
    key: PRNGKey, num_directions: int, dimension: int, *, dtype=jnp.float32
) -> Float[Array, "L d"]:
    """Directions in blocks of d orthonormal ones, as `orthogonal_directions`, without the O(d^3) of
    a QR decomposition: cosines (DCT-II), their rows in random groups of `GROUP`, each turned by one
    random rotation, their coordinates permuted and signed at random. O(d^2) a block.

    Means, second moments, and so the difference of two means, are exactly those of the sphere. Of
    fourth moments the expectation of a coordinate's is .92 of the sphere's: a bias for what is far
    from normal along most directions, such as sparse differences, small where d is large. Below
    d = 50, say, use the other two.
    """
    blocks = -(-num_directions // dimension)
    frequency = jnp.arange(dimension, dtype=jnp.int32)
    # Whole periods are taken off in integers: float32 keeps no digit of large angles.
    phase = frequency[:, None] * (2 * frequency + 1)[None] % (4 * dimension)
    cosines = jnp.cos(phase.astype(dtype) * (math.pi / (2 * dimension)))
    scale = jnp.where(frequency == 0, math.sqrt(1 / dimension), math.sqrt(2 / dimension))
    basis = scale.astype(dtype)[:, None] * cosines
    whole = dimension // GROUP * GROUP

    def one(key):
        keys = jax.random.split(key, 4)
        rows = basis[jax.random.permutation(keys[0], dimension)]
        rotation = orthonormal_rows(jax.random.normal(keys[1], (1, GROUP, GROUP), dtype))
        groups = rows[:whole].reshape(-1, GROUP, dimension)
        turned = jax.vmap(product, in_axes=(None, 0))(rotation, groups)
        rows = jnp.concatenate([turned.reshape(-1, dimension), rows[whole:]])
        columns = jax.random.permutation(keys[2], dimension)
        return rows[:, columns] * jax.random.rademacher(keys[3], (dimension,), dtype)[None]

    directions = jax.vmap(one)(jax.random.split(key, blocks))
    return directions.reshape(-1, dimension)[:num_directions]


GROUP = 16
"""Rows of `basis_directions` that are turned together."""


# Couplings on the line

NUM_PERCENTILES = 100
"""Of a projection in the published approximation, `percentile_coupling`."""


class Coupling(NamedTuple):
    """How the sorted points of two measures on the line meet: K pairs, the k-th of mass `mass[k]`.

    `source` and `target` take sorted projections [..., n, L] and [..., m, L] to [..., K, L]; both
    are linear. The masses sum to 1.
    """

    source: Callable[[Array], Array]
    target: Callable[[Array], Array]
    mass: Array


def _take(index: np.ndarray, size: int) -> Callable[[Array], Array]:
    if len(index) == size:
        return lambda sorted_points: sorted_points
    return lambda sorted_points: sorted_points.at[..., index, :].get(
        indices_are_sorted=True, mode="promise_in_bounds"
    )


def exact_coupling(n: int, m: int) -> Coupling:
    """The optimal coupling of n with m sorted points of equal weight: K = n + m - gcd(n, m) pairs.

    The levels i/n and j/m cut (0, 1) into intervals on which both quantile functions are constant.
    Worked out in integers, so it is exact; it depends only on n and m.
    """
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    starts = np.concatenate([[0], levels[:-1]])
    mass = jnp.asarray(np.diff(levels, prepend=0) / (n * m), jnp.result_type(float))
    return Coupling(_take(starts // m, n), _take(starts // n, m), mass)


def percentile_coupling(levels: Float[Array, "L K"]) -> Callable[[int, int], Coupling]:
    """The published approximation (Bonet et al., 2025): each projection is summed up by 100 equally
    spaced percentiles, and both quantile functions, interpolated linearly between these, are
    compared at given levels in [0, 1], K for every direction.

    The published code draws K = 100 uniform levels per direction anew at every step. Biased for
    small samples, as interpolation is not the quantile function of a point cloud, and noisier than
    `exact_coupling`; kept for comparison with published numbers. It belongs to all L directions
    together: no blocks.
    """
    num_directions, num_levels = levels.shape
    mass = jnp.full(num_levels, 1 / num_levels, levels.dtype)

    def quantiles(sorted_points: Array) -> Array:
        if sorted_points.shape[-1] != num_directions:
            raise ValueError(
                f"levels for {num_directions} directions, projections on {sorted_points.shape[-1]}"
            )
        n = sorted_points.shape[-2]
        rows = jnp.linspace(0, n - 1, NUM_PERCENTILES, dtype=levels.dtype)
        percentiles = _between_rows(sorted_points, rows[:, None])
        return _between_rows(percentiles, levels.T * (NUM_PERCENTILES - 1))

    return lambda n, m: Coupling(quantiles, quantiles, mass)


def _between_rows(values: Array, position: Float[Array, "K L"]) -> Array:
    """values[..., n, L] at fractional rows, [..., K, L]; one column of positions serves all L."""
    last = values.shape[-2] - 1
    below = jnp.clip(jnp.floor(position), 0, max(last - 1, 0)).astype(jnp.int32)
    above = jnp.minimum(below + 1, last)
    shape = (1,) * (values.ndim - 2) + position.shape
    fraction = (position - below).astype(values.dtype).reshape(shape)
    low, high = (jnp.take_along_axis(values, i.reshape(shape), axis=-2) for i in (below, above))
    return (1 - fraction) * low + fraction * high


def _levels(mass: Array) -> Array:
    """Cumulated masses, the last one 1. A point without mass has exactly its predecessor's level,
    rounding included, and so is never chosen."""
    levels = lax.cummax(jnp.where(mass > 0, jnp.cumsum(mass), 0))
    return levels / levels[-1]


def _weighted_coupling(x_mass: Array, y_mass: Array) -> tuple[Array, Array, Array]:
    """(source index, target index, mass), each [n + m - 1], of two sorted weighted point clouds."""
    x_levels, y_levels = _levels(x_mass), _levels(y_mass)
    inner = jnp.sort(jnp.concatenate([x_levels[:-1], y_levels[:-1]]))
    edges = jnp.concatenate([jnp.zeros(1, inner.dtype), inner, jnp.ones(1, inner.dtype)])
    edges = jnp.clip(edges, 0, 1)
    # The middle of an interval is inside one step of each quantile function, rounding aside.
    middle = (edges[1:] + edges[:-1]) / 2
    source = jnp.searchsorted(x_levels[:-1], middle, side="right")
    target = jnp.searchsorted(y_levels[:-1], middle, side="right")
    return source, target, jnp.diff(edges)


# Sums over pairs of measures

MAX_RUNNING_SUM = 2**26
"""Numbers that a running sum over pairs of measures holds, at most: 256 MiB in float32."""

MAX_FUSED_SUM = 2**13
"""Terms per sum: of more XLA keeps partial sums, some hundred for each number of the result."""


def _power(difference: Array, p: int) -> Array:
    # The maximum is |.| with slope 0 at 0, as `_power_slope` has it; that of jnp.abs is 1 there.
    return jnp.square(difference) if p == 2 else jnp.maximum(difference, -difference)


def _power_slope(difference: Array, p: int) -> Array:
    return 2 * difference if p == 2 else jnp.sign(difference)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def pairwise_cost(
    x: Float[Array, "A K L"], y: Float[Array, "B K L"], mass: Float[Array, " K"], p: int
) -> Float[Array, "A B"]:
    """sum_k mass_k sum_l |x[a, k, l] - y[b, k, l]|^p for all pairs (a, b); p is 1 or 2.

    Taken by differences: a Gram matrix loses every digit of a small distance. The gradient is in
    closed form, and `mass` a constant here: its gradient is zero. On a CPU one pass over k keeps a
    running sum [A, B, L], of at most `MAX_RUNNING_SUM` numbers at a time; elsewhere a thousand
    small steps would be a thousand launches, and XLA fuses the whole sum into one, which keeps
    nothing.
    """
    return lax.platform_dependent(
        x, y, mass, cpu=partial(_looped_cost, p=p), default=partial(_fused_cost, p=p)
    )


def _looped_cost(x: Array, y: Array, mass: Array, *, p: int) -> Array:
    def against_all(x):
        def add(k, total):
            return total + mass[k] * _power(x[:, None, k] - y[None, :, k], p)

        start = jnp.zeros((x.shape[0], y.shape[0], x.shape[2]), x.dtype)
        return lax.fori_loop(0, mass.shape[0], add, start).sum(axis=-1)

    return _in_rows(against_all, x, len(y) * x.shape[2])


def _fused_cost(x: Array, y: Array, mass: Array, *, p: int) -> Array:
    def against_all(x):
        powers = _power(x[:, None] - y[None], p)
        return (mass[None, None, :, None] * powers).sum(axis=(2, 3))

    # XLA sums long rows in two steps, and keeps what is between them: a number per k, or per l.
    return _in_rows(against_all, x, len(y) * max(x.shape[1:]))


def _in_rows(function: Callable[[Array], Array], x: Array, numbers: int) -> Array:
    """function(x), where a row of x takes `numbers` in between."""
    rows = max(1, MAX_RUNNING_SUM // numbers)
    if rows >= len(x):
        return function(x)
    return lax.map(lambda row: function(row[None])[0], x, batch_size=rows)


def _pairwise_slope(x: Array, y: Array, mass: Array, slope: Array, p: int) -> Array:
    """Gradient in x of sum_ab slope[a, b] pairwise_cost(x, y)[a, b]: [A, K, L]."""
    return lax.platform_dependent(
        x, y, mass, slope, cpu=partial(_looped_slope, p=p), default=partial(_fused_slope, p=p)
    )


# The mass is inside both sums: outside, fused with the sum over sides, it would be rounded in one
# of two opposite terms only, and identical measures would push each other by 1e-8.
def _looped_slope(x: Array, y: Array, mass: Array, slope: Array, *, p: int) -> Array:
    def add(b, total):
        weight = slope[:, b, None, None] * mass[None, :, None]
        return total + weight * _power_slope(x - y[b][None], p)

    return lax.fori_loop(0, y.shape[0], add, jnp.zeros_like(x))


def _fused_slope(x: Array, y: Array, mass: Array, slope: Array, *, p: int) -> Array:
    few = len(x) * len(y) * x.shape[1] <= MAX_RUNNING_SUM

    def against(y, slope):
        slope, masses = slope[:, :, None, None], mass[None, None, :, None]
        powers = _power_slope(x[:, None] - y[None], p)
        # XLA takes slope * mass, [A, B, K], out of a loop over blocks of directions and keeps it.
        return (slope * masses * powers if few else slope * (masses * powers)).sum(axis=1)

    starts = range(0, len(y), MAX_FUSED_SUM)
    return sum(against(y[b : b + MAX_FUSED_SUM], slope[:, b : b + MAX_FUSED_SUM]) for b in starts)


def _pairwise_cost_backward(p, residuals, slope):
    x, y, mass = residuals
    return (
        _pairwise_slope(x, y, mass, slope, p),
        _pairwise_slope(y, x, mass, slope.T, p),
        jnp.zeros_like(mass),
    )


pairwise_cost.defvjp(
    lambda x, y, mass, p: (pairwise_cost(x, y, mass, p), (x, y, mass)), _pairwise_cost_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def self_pairwise_cost(
    x: Float[Array, "A K L"], mass: Float[Array, " K"], p: int
) -> Float[Array, "A A"]:
    """`pairwise_cost(x, x, mass, p)`, with half the work in reverse mode: the slopes of (a, b) and
    (b, a) meet in one pass."""
    # Told that both sides are one array, XLA's CPU loop runs 10 times slower: hide it.
    return pairwise_cost(x, lax.optimization_barrier(x), mass, p)


def _self_pairwise_cost_backward(p, residuals, slope):
    x, mass = residuals
    return _pairwise_slope(x, x, mass, slope + slope.T, p), jnp.zeros_like(mass)


self_pairwise_cost.defvjp(
    lambda x, mass, p: (self_pairwise_cost(x, mass, p), (x, mass)), _self_pairwise_cost_backward
)


# Distances


def project(points: Float[Array, "*C n d"], directions: Float[Array, "L d"]) -> Array:
    """<x_i, theta_l>, [..., n, L]; full precision, since small differences decide what follows."""
    return product(points, directions.T)


def sum_over_directions(
    term,
    directions: Float[Array, "L d"],
    block_size: int | None,
    *,
    shared: tuple[Any, ...] = (),
    mesh: Mesh | None = None,
):
    """Sum of `term(*shared, directions[block])`, any pytree, by blocks of `block_size` directions.

    Holds one block's intermediates at a time, in reverse mode too, where each block is computed
    again. `None` takes all directions at once. With a mesh (`lib.devices`) its devices take equal
    shares of the directions; a share filled up with directions 0 must add nothing.
    """
    if mesh is not None:
        return _sum_over_devices(term, directions, block_size, shared, mesh)
    count = directions.shape[0]
    if block_size is None or block_size >= count:
        return term(*shared, directions)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    whole = count // block_size * block_size
    blocks = directions[:whole].reshape(-1, block_size, directions.shape[1])
    term = jax.checkpoint(term)

    def add(total, block):
        return jax.tree.map(jnp.add, total, term(*shared, block)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(term, *shared, blocks[0]))
    total, _ = lax.scan(add, zero, blocks)
    if whole == count:
        return total
    return jax.tree.map(jnp.add, total, term(*shared, directions[whole:]))


def _sum_over_devices(term, directions, block_size, shared, mesh):
    missing = -len(directions) % mesh.size
    directions = jnp.pad(directions, ((0, missing), (0, 0)))

    def of_one(*arguments):
        *shared, directions = arguments
        total = sum_over_directions(term, directions, block_size, shared=tuple(shared))
        return jax.tree.map(lambda leaf: leaf[None], total)

    totals = devices.over_devices(of_one, mesh, replicated=len(shared))(*shared, directions)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), totals)


def sliced_wasserstein_power(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    directions: Float[Array, "L d"],
    *,
    p: int = 2,
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    coupling: Callable[[int, int], Coupling] = exact_coupling,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """SW_p^p between two point clouds: mean over directions of W_p^p of the projections.

    Args:
      directions: unit vectors, e.g. `random_directions(key, 500, d)`.
      p: 1 or 2.
      x_weights, y_weights: non-negative, made to sum to 1. None means equal weights.
      coupling: `exact_coupling`, or `percentile_coupling(levels)` (equal weights only).
      block_size: directions at a time; memory is O((n + m) block_size). Never changes the result
        beyond rounding.

    Differentiable in x and y; at identical clouds the gradient is 0.

    Raises as `lib.numerics.as_sample`, and ValueError for p other than 1 or 2 and for clouds of
    different dimension.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    x, x_weights = as_sample("x", x, x_weights)
    y, y_weights = as_sample("y", y, y_weights)
    directions = jnp.asarray(directions)
    dimensions = x.shape[1], y.shape[1], directions.shape[1]
    if len(set(dimensions)) > 1:
        raise ValueError(
            f"x {x.shape}, y {y.shape} and directions {directions.shape} must share their last axis"
        )
    arguments = x, y, directions, x_weights, y_weights
    if coupling is exact_coupling:
        return _exact_power(*arguments, p=p, coupling=coupling, block_size=block_size)
    if x_weights is not None or y_weights is not None:
        raise ValueError("weights need exact_coupling")
    return _power_of_clouds(*arguments, p=p, coupling=coupling, block_size=block_size)


def _power_of_clouds(x, y, directions, x_weights, y_weights, *, p, coupling, block_size):
    def cost(block):
        if x_weights is None and y_weights is None:
            pair = coupling(len(x), len(y))
            u = pair.source(sort_columns(project(x, block)))
            v = pair.target(sort_columns(project(y, block)))
            return pairwise_cost(u[None], v[None], pair.mass.astype(u.dtype), p)[0, 0]
        u, u_mass = _sorted_with_mass(project(x, block), x_weights)
        v, v_mass = _sorted_with_mass(project(y, block), y_weights)
        source, target, mass = jax.vmap(_weighted_coupling, in_axes=1, out_axes=1)(u_mass, v_mass)
        u, v = jnp.take_along_axis(u, source, axis=0), jnp.take_along_axis(v, target, axis=0)
        return jnp.sum(mass * _power(u - v, p))

    return sum_over_directions(cost, directions, block_size) / directions.shape[0]


# Jitted here, since users call distances outside of jit, where each loop would be compiled anew.
_exact_power = jax.jit(_power_of_clouds, static_argnames=("p", "coupling", "block_size"))


def _sorted_with_mass(projections: Array, weights: Array | None) -> tuple[Array, Array]:
    if weights is None:
        weights = jnp.ones(len(projections), projections.dtype)
    ordered, permutation = sort_with_permutation(projections)
    return ordered, (weights / jnp.sum(weights))[permutation]


def sliced_wasserstein(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    directions: Float[Array, "L d"],
    *,
    p: int = 2,
    **options: Any,
) -> Float[Array, ""]:
    """SW_p, not raised to the power p; arguments and options as `sliced_wasserstein_power`.

    Its gradient at identical clouds, where the root has none, is set to 0.
    """
    power = sliced_wasserstein_power(x, y, directions, p=p, **options)
    return power if p == 1 else safe_sqrt(power)
