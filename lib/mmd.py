"""Maximum mean discrepancies, between samples and between measures on measures.

MMD^2(P, Q) = E k(X, X') - 2 E k(X, Y) + E k(Y, Y') (Gretton et al., A kernel two-sample test, JMLR
2012, Lemma 6). Every function here returns the square, by an estimator it names, and never clamps
it: an unbiased estimate is negative about half of the time where P = Q, and a biased one may be
negative by rounding. In float32 rounding is about 1e-7 of the kernel's size: run in float64 what
must resolve less. Memory: one [block_size, block_size] Gram block at a time.

A labelled data set is P = sum_c a_c delta_{mu_c}, each class mu_c an empirical measure: an array
[C, n, d]. With a kernel K on measures built from a sliced-Wasserstein distance, the
Wasserstein-over-Wasserstein (WoW) flow of F(P) = MMD_K^2(P, Q) / 2 carries one data set to another
(Bonet, Vauthier, Korba: Flowing Datasets with Wasserstein over Wasserstein Gradient Flows, ICML
2025).
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

from lib.kernels import Kernel, kernel_diagonal, kernel_mean
from lib.numerics import PRNGKey, as_sample, normalized_weights, plain_number, product
from lib.sliced_wasserstein import (
    Coupling,
    exact_coupling,
    pairwise_cost,
    percentile_coupling,
    project,
    put_rows,
    random_directions,
    self_pairwise_cost,
    sort_columns,
    sort_with_permutation,
    sum_over_directions,
    take_rows,
)

TargetValueAndGrad = Callable[[Array, Array, PRNGKey], tuple[Array, Array]]
"""A function of particles [C, n, d], a target [D, m, d] and a key that gives the value of a flow's
functional and its Wasserstein gradient, [C, n, d]."""


def _as_samples(x, y, x_weights=None, y_weights=None):
    x, x_weights = as_sample("x", x, x_weights)
    y, y_weights = as_sample("y", y, y_weights)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension, got shapes {x.shape} and {y.shape}")
    return x, y, x_weights, y_weights


def _num_weighted(points, weights):
    """Points of positive weight; all of them where weights are traced."""
    if weights is None or isinstance(weights, jax.core.Tracer):
        return len(points)
    with jax.ensure_compile_time_eval():
        return int(jnp.count_nonzero(weights))


def mmd_squared(
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    block_size: int = 1024,
) -> Float[Array, ""]:
    """MMD^2 between the weighted empirical measures; biased upwards for what they are drawn from.

    The V-statistic sum_ij w_i w_j k(x_i, x_j) - 2 sum_ij w_i v_j k(x_i, y_j) + sum_ij v_i v_j
    k(y_i, y_j) (Gretton et al. 2012, eq. 5), with the diagonals. Weights are divided by their sum
    first; they are 1/n and 1/m by default. Raises ValueError on empty samples, unequal dimensions,
    NaN, infinity and negative weights.
    """
    x, y, x_weights, y_weights = _as_samples(x, y, x_weights, y_weights)
    w, v = normalized_weights(x, x_weights), normalized_weights(y, y_weights)
    within_x = kernel_mean(kernel, x, x_weights=w, block_size=block_size)
    between = kernel_mean(kernel, x, y, x_weights=w, y_weights=v, block_size=block_size)
    within_y = kernel_mean(kernel, y, x_weights=v, block_size=block_size)
    return within_x - 2 * between + within_y


def mmd_squared_unbiased(
    kernel: Kernel,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    x_weights: Float[Array, " n"] | None = None,
    y_weights: Float[Array, " m"] | None = None,
    block_size: int = 1024,
) -> Float[Array, ""]:
    """MMD^2 between the measures that the samples are drawn from, unbiased; may be negative.

    The U-statistic: as `mmd_squared`, with sum_{i != j} w_i w_j k(x_i, x_j) / (1 - sum_i w_i^2)
    within each sample, w normalized, which for w = 1/n is Gretton et al. (2012), eq. 3. Unbiased
    for independent draws and weights that do not depend on them. Raises as `mmd_squared` does, and
    where a sample has a single point, or weight on a single point.
    """
    x, y, x_weights, y_weights = _as_samples(x, y, x_weights, y_weights)
    sizes = _num_weighted(x, x_weights), _num_weighted(y, y_weights)
    if min(sizes) < 2:
        raise ValueError(f"two points of each sample are needed, got {sizes[0]} and {sizes[1]}")
    w, v = normalized_weights(x, x_weights), normalized_weights(y, y_weights)

    def within(points, weights):
        mean = kernel_mean(kernel, points, x_weights=weights, block_size=block_size)
        squares = jnp.square(weights)
        return (mean - jnp.vdot(squares, kernel_diagonal(kernel, points))) / (1 - jnp.sum(squares))

    between = kernel_mean(kernel, x, y, x_weights=w, y_weights=v, block_size=block_size)
    return within(x, w) - 2 * between + within(y, v)


# The energy kernel, by sorting


def sliced_energy_value_and_grad(
    x: Float[Array, "*C n d"],
    y: Float[Array, "*C m d"],
    directions: Float[Array, "L d"],
    *,
    x_weights: Float[Array, "*C n"] | None = None,
    y_weights: Float[Array, "*C m"] | None = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "*C"], Float[Array, "*C n d"]]:
    """F = MMD^2 / 2 of the kernel -|x - y| (half the energy distance) and its Wasserstein gradient
    at every particle, from one sort per direction: O((n + m) log(n + m) L), no pair is seen.

    On the line F is the integral of (P - Q)^2, P and Q the two distribution functions, and its
    Wasserstein gradient at x_i is 2 (Q(x_i) - P(x_i)), each the mean of its limits from both sides:
    differences of ranks, equal values counting half. In R^d |x - y| is the mean of |<x - y, t>|
    over the sphere, divided by that of |t_1|, so both are means over directions (Hertrich et al.,
    Generative sliced MMD flows with Riesz kernels, ICLR 2024): unbiased for directions uniform on
    the sphere, drawn independently or not, exact on the line.

    Leading axes are problems of their own, such as classes, that share the directions. Memory is
    O((n + m) (d + block_size)).

    Args:
      directions: unit vectors, e.g. `random_directions(key, 500, d)`; a new batch per step makes a
        stochastic gradient.
      x_weights, y_weights: non-negative, made to sum to 1; None means equal weights. The gradient
        at a particle is defined where its weight is 0 too.
      block_size: directions at a time; None takes all.
      mesh: devices (`lib.devices`) that take equal shares of the directions.

    Raises ValueError for shapes that do not fit, NaN, infinity and negative weights.
    """
    x, x_weights = _as_problems("x", x, x_weights)
    y, y_weights = _as_problems("y", y, y_weights)
    if x.shape[:-2] != y.shape[:-2] or not x.shape[-1] == y.shape[-1] == directions.shape[-1]:
        raise ValueError(
            f"x {x.shape} and y {y.shape} must share their leading axes, and with directions "
            f"{directions.shape} their last"
        )
    masses = None
    if x_weights is not None or y_weights is not None:
        w, v = (
            jnp.ones(points.shape[:-1], points.dtype) if weights is None else weights
            for points, weights in ((x, x_weights), (y, y_weights))
        )
        w, v = (weights / jnp.sum(weights, axis=-1, keepdims=True) for weights in (w, v))
        masses = jnp.concatenate([w, -v], axis=-1)
    return _mean_over_directions(x, y, masses, directions, block_size=block_size, mesh=mesh)


@partial(jax.jit, static_argnames=("block_size", "mesh"))  # called outside of jit too
def _mean_over_directions(x, y, masses, directions, *, block_size, mesh):
    value, gradient = sum_over_directions(
        _sliced_energy, directions, block_size, shared=(x, y, masses), mesh=mesh
    )
    d = x.shape[-1]
    mean = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)  # |t_1|
    scale = 1 / (mean * directions.shape[0])
    return scale * value, scale * gradient


def _as_problems(name, points, weights):
    """As `lib.numerics.as_sample`, with leading axes."""
    points = jnp.asarray(points)
    if points.ndim < 2 or 0 in points.shape:
        raise ValueError(f"{name} must be [..., points, dimension], none 0: {points.shape}")
    if weights is None:
        as_sample(name, points.reshape(-1, points.shape[-1]))
        return points, None
    weights = jnp.asarray(weights)
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"{name}_weights {weights.shape} must hold one weight per point of {points.shape}"
        )
    flat = points.reshape(-1, *points.shape[-2:])
    for one, its_weights in zip(flat, weights.reshape(len(flat), -1)):
        as_sample(name, one, its_weights)
    return points, weights


def _sliced_energy(x, y, masses, block):
    """Sums over directions of the value [*C], and of the gradient on the line times the direction
    [*C, n, d]."""
    n, m = x.shape[-2], y.shape[-2]
    projections = jnp.concatenate([project(x, block), project(y, block)], axis=-2)
    ordered, origin = sort_with_permutation(projections)
    place = lax.broadcasted_iota(jnp.int32, ordered.shape, ordered.ndim - 2)
    # P - Q just after each point, and just before it; of counts exact, if they fit into integers.
    if masses is None:
        common = math.gcd(n, m)
        whole = n * m // common < 2**31

        def difference(count, place):
            other = place - count
            if whole:
                both = count * (m // common) - other * (n // common)
                return both.astype(x.dtype) * (common / (n * m))
            return count.astype(x.dtype) / n - other.astype(x.dtype) / m

        own = origin < n
        count = jnp.cumsum(own, axis=-2, dtype=jnp.int32)
        after, before = difference(count, place + 1), difference(count - own, place)
    else:
        mass = take_rows(jnp.broadcast_to(masses[..., None], ordered.shape), origin, unique=True)
        after = jnp.cumsum(mass, axis=-2)
        before = after - mass
    gaps = jnp.diff(ordered, axis=-2)
    value = jnp.sum(gaps * jnp.square(after[..., :-1, :]), axis=(-2, -1))
    # Equal values share the limits at the first and the last of them.
    last = n + m - 1
    apart = jnp.pad(gaps != 0, [(0, 0)] * (x.ndim - 2) + [(1, 1), (0, 0)], constant_values=True)
    first = lax.cummax(jnp.where(apart[..., :-1, :], place, 0), axis=x.ndim - 2)
    final = lax.cummin(jnp.where(apart[..., 1:, :], place, last), axis=x.ndim - 2, reverse=True)
    slope = -(take_rows(before, first) + take_rows(after, final))
    return value, product(put_rows(slope, origin)[..., :n, :], block)


def target_value_and_grad_sliced_energy(
    *,
    num_directions: int = 500,
    draw_directions: Callable[..., Array] = random_directions,
    **options: Any,
) -> TargetValueAndGrad:
    """The function of (x [C, n, d], y [C, m, d], key) that `lib.gd` follows: the mean over classes
    of F, each class with its own target class, and the gradient [C, n, d], over directions drawn
    anew by the key; see `sliced_energy_value_and_grad`, whose `options` block_size and mesh are."""

    def value_and_grad(x, y, key):
        directions = draw_directions(key, num_directions, x.shape[-1], dtype=x.dtype)
        values, gradient = sliced_energy_value_and_grad(x, y, directions, **options)
        return jnp.mean(values), gradient

    return value_and_grad


# Kernels between measures


class SlicedKernel(NamedTuple):
    """K(mu, nu) = profile(SW_p^p(mu, nu)), `profile` elementwise and differentiable, also at 0."""

    profile: Callable[[Array], Array]
    p: int


def _check_one_number(name: str, value) -> None:
    if np.ndim(value):
        raise ValueError(
            f"{name} must be one number, got shape {np.shape(value)}; weights of classes are "
            "x_weights and y_weights"
        )


def _positive(name: str, value):
    _check_one_number(name, value)
    if not isinstance(value, jax.core.Tracer) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return plain_number(value)


def sliced_gaussian(h=0.1) -> SlicedKernel:
    """exp(-SW_2^2 / (2 h)); h is a squared length, as published."""
    h = _positive("h", h)
    return SlicedKernel(lambda cost: jnp.exp(-cost / (2 * h)), p=2)


def sliced_laplace(h=0.5) -> SlicedKernel:
    """exp(-SW_1 / h); h is a length."""
    h = _positive("h", h)
    return SlicedKernel(lambda cost: jnp.exp(-cost / h), p=1)


def sliced_imq(h=1.0) -> SlicedKernel:
    """(h + SW_2^2)^(-1/2); h is a squared length."""
    h = _positive("h", h)
    return SlicedKernel(lambda cost: lax.rsqrt(h + cost), p=2)


def sliced_riesz(r=1.0) -> SlicedKernel:
    """-SW_2^r, r in (0, 2): conditionally positive definite, so its MMD is a distance.

    Its slope in SW_2^2, infinite at 0, is set to 0 there: equal measures do not push each other,
    unless their projections are rounded differently, as those of points in another order may be.
    """
    _check_one_number("r", r)
    if not isinstance(r, jax.core.Tracer) and not 0 < r < 2:
        raise ValueError(f"r must lie in (0, 2), got {r}")
    r = plain_number(r)

    def profile(cost):
        apart = cost > 0
        return jnp.where(apart, -(jnp.where(apart, cost, 1.0) ** (r / 2)), 0.0)

    return SlicedKernel(profile, p=2)


SLICED_KERNELS = {
    "gaussian": sliced_gaussian,
    "laplace": sliced_laplace,
    "imq": sliced_imq,
    "riesz": sliced_riesz,
}

# MMD between measures on measures


def mmd_squared_measures(
    kernel: SlicedKernel,
    x: Float[Array, "C n d"],
    y: Float[Array, "D m d"],
    directions: Float[Array, "L d"],
    *,
    x_weights: Float[Array, " C"] | None = None,
    y_weights: Float[Array, " D"] | None = None,
    coupling: Callable[[int, int], Coupling] = exact_coupling,
    block_size: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """MMD^2(P, Q) between P = sum_i a_i delta_{x_i} and Q = sum_j b_j delta_{y_j}:

    sum_ij a_i a_j K(x_i, x_j) - 2 sum_ij a_i b_j K(x_i, y_j) + sum_ij b_i b_j K(y_i, y_j),

    every class x_i, y_j being the empirical measure of its points (Bonet et al., 2025). The
    V-statistic: a class counts with itself too; never clamped.

    C and D, n and m may differ. All pairs share the directions. Differentiable in x, y and the
    weights: a class is its sorted projections, whose distances have a closed-form gradient, so
    nothing of shape [C, D, n, L] is made. Memory is O((C n + D m + C D) block_size).

    Args:
      directions: unit vectors, e.g. `random_directions(key, 500, d)`.
      x_weights, y_weights: class weights a and b, used as given (the published ones sum to 1); None
        means 1/C and 1/D.
      coupling: `exact_coupling`, or `percentile_coupling(levels)` for the published approximation.
      block_size: directions at a time; None takes all. Blocks are computed twice when
        differentiated.
      mesh: devices (`lib.devices`) that take equal shares of the directions, and so of work and
        memory; for `exact_coupling` only.
    """
    _check_measures(x, y, directions, x_weights, y_weights)
    if mesh is not None and coupling is not exact_coupling:
        raise ValueError("devices share the directions of exact_coupling only")
    (num_x, n), (num_y, m) = x.shape[:2], y.shape[:2]
    a = jnp.full(num_x, 1 / num_x, x.dtype) if x_weights is None else x_weights
    b = jnp.full(num_y, 1 / num_y, y.dtype) if y_weights is None else y_weights
    couple = {pair: coupling(*pair) for pair in ((n, n), (n, m), (m, m))}

    def costs(x, y, block):
        xs, ys = sort_columns(project(x, block)), sort_columns(project(y, block))
        xx, xy, yy = couple[n, n], couple[n, m], couple[m, m]
        mass = [c.mass.astype(x.dtype) for c in (xx, xy, yy)]
        return (
            self_pairwise_cost(xx.source(xs), mass[0], kernel.p),
            pairwise_cost(xy.source(xs), xy.target(ys), mass[1], kernel.p),
            self_pairwise_cost(yy.source(ys), mass[2], kernel.p),
        )

    total = sum_over_directions(costs, directions, block_size, shared=(x, y), mesh=mesh)
    k_xx, k_xy, k_yy = (kernel.profile(cost / directions.shape[0]) for cost in total)

    def bilinear(u, k, v):
        return product(product(u, k), v)

    return bilinear(a, k_xx, a) - 2 * bilinear(a, k_xy, b) + bilinear(b, k_yy, b)


def _check_measures(x, y, directions, x_weights, y_weights) -> None:
    for name, points in (("x", x), ("y", y)):
        if points.ndim != 3 or 0 in points.shape:
            raise ValueError(f"{name} must be [classes, points, dimension], none 0: {points.shape}")
    if not x.shape[2] == y.shape[2] == directions.shape[1]:
        raise ValueError(
            f"x {x.shape}, y {y.shape} and directions {directions.shape} must share their last axis"
        )
    for name, weights, points in (("x_weights", x_weights, x), ("y_weights", y_weights, y)):
        if weights is not None and np.shape(weights) != points.shape[:1]:
            raise ValueError(
                f"{name} {np.shape(weights)} must hold one weight per class of {points.shape}"
            )


def wow_value_and_grad(
    kernel: SlicedKernel,
    x: Float[Array, "C n d"],
    y: Float[Array, "D m d"],
    directions: Float[Array, "L d"],
    *,
    x_weights: Float[Array, " C"] | None = None,
    **options: Any,
) -> tuple[Float[Array, ""], Float[Array, "C n d"]]:
    """F = MMD^2 / 2 and its Wasserstein-over-Wasserstein gradient at every particle, [C, n, d].

    The WoW gradient at the i-th of n points of a class of weight a_c is (n / a_c) dF/dx_ci: C n
    times the Euclidean gradient for equal weights (Bonet et al., 2025). Where a weight is 0 the
    gradient is set to 0. Arguments and `options` as `mmd_squared_measures`.
    """

    def objective(x):
        return 0.5 * mmd_squared_measures(kernel, x, y, directions, x_weights=x_weights, **options)

    value, gradient = jax.value_and_grad(objective)(x)
    num_classes, n, _ = x.shape
    if x_weights is None:
        return value, num_classes * n * gradient
    empty = x_weights == 0
    scale = jnp.where(empty, 0, n / jnp.where(empty, 1, x_weights))
    return value, scale[:, None, None] * gradient


def subsample_classes(
    key: PRNGKey, y: Float[Array, "D m d"], num_points: int
) -> Float[Array, "D {num_points} d"]:
    """`num_points` points of every class, drawn without replacement, each class by its own key.

    What is not linear in a class, such as SW, has another mean over such draws than of the class.
    """
    if not 1 <= num_points <= y.shape[1]:
        raise ValueError(f"num_points must lie in 1..{y.shape[1]}, got {num_points}")
    keys = jax.random.split(key, y.shape[0])
    return jax.vmap(lambda k, points: jax.random.choice(k, points, (num_points,), replace=False))(
        keys, y
    )


def target_value_and_grad(
    kernel: SlicedKernel,
    *,
    num_directions: int = 500,
    num_target_points: int | None = None,
    draw_directions: Callable[..., Array] = random_directions,
    num_levels: int | None = None,
    **options: Any,
) -> TargetValueAndGrad:
    """The function of (x [C, n, d], y [D, m, d], key) that `lib.gd` follows: F and its WoW gradient
    [C, n, d] over fresh directions, drawn by the key; see `wow_value_and_grad`.

    Args:
      num_target_points: as published, m points drawn from every target class at each call; None
        takes all. Biased: SW between x and a draw is larger than between x and the target, and the
        mean gradient leads to a target with narrower tails, so that the target itself is no fixed
        point. The bias falls with 1/m (measured on 200 points of 2-d normals, Gaussian kernel, in
        units of the gradient at a distance: .32, .19, .10, .06, .02 for m = 10, 20, 40, 80, 160).
        To bound memory, `block_size` changes nothing but rounding.
      draw_directions: `random_directions`, `orthogonal_directions` or any function like them.
      num_levels: None for the exact distance; 100 is the published percentile approximation.
      options: x_weights, y_weights, block_size and mesh of `mmd_squared_measures`.
    """

    def value_and_grad(x, y, key):
        key_directions, key_batch, key_levels = jax.random.split(key, 3)
        if num_target_points is not None:
            y = subsample_classes(key_batch, y, num_target_points)
        coupling = exact_coupling
        if num_levels is not None:
            levels = jax.random.uniform(key_levels, (num_directions, num_levels), x.dtype)
            coupling = percentile_coupling(levels)
        directions = draw_directions(key_directions, num_directions, x.shape[-1], dtype=x.dtype)
        return wow_value_and_grad(kernel, x, y, directions, coupling=coupling, **options)

    return value_and_grad


# The published functions: their names, signatures and scaling.


def target_value_and_grad_gaussian(
    x, y, rng, x_weights=None, h=0.1, n_projs=500, n_sample_batch=None
):
    """`target_value_and_grad` of `sliced_gaussian(h)`, K = exp(-SW_2^2 / (2 h))."""
    return _published(sliced_gaussian(h), n_projs, n_sample_batch, x_weights)(x, y, rng)


def target_value_and_grad_gaussian_by_hand(x, y, rng, h=0.1, n_projs=500):
    """As `target_value_and_grad_gaussian`. The published function of this name writes the gradient
    out; here every gradient is in closed form, and none goes through a sort."""
    return _published(sliced_gaussian(h), n_projs)(x, y, rng)


def target_value_and_grad_laplace(x, y, rng, h=0.5, n_projs=500, n_sample_batch=None):
    """`target_value_and_grad` of `sliced_laplace(h)`, K = exp(-SW_1 / h)."""
    return _published(sliced_laplace(h), n_projs, n_sample_batch)(x, y, rng)


def target_value_and_grad_imq(x, y, rng, h=1.0, n_projs=500, n_sample_batch=None):
    """`target_value_and_grad` of `sliced_imq(h)`, K = (h + SW_2^2)^(-1/2)."""
    return _published(sliced_imq(h), n_projs, n_sample_batch)(x, y, rng)


def target_value_and_grad_riesz(x, y, rng, x_weights=None, r=1.0, n_projs=500, n_sample_batch=None):
    """`target_value_and_grad` of `sliced_riesz(r)`, K = -SW_2^r."""
    return _published(sliced_riesz(r), n_projs, n_sample_batch, x_weights)(x, y, rng)


def _published(kernel, n_projs, n_sample_batch=None, x_weights=None):
    return target_value_and_grad(
        kernel,
        num_directions=n_projs,
        num_target_points=n_sample_batch,
        x_weights=x_weights,
    )
