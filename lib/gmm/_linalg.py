"""Linear algebra of covariance factors: triangles in panels, ridges, draws grouped by component.

Products with a triangle and symmetric ones are taken in panels of columns and skip most of the half
that is known: 3/8 of the arithmetic with four panels, 1/4 with two.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, ScalarLike

from lib.numerics import AnyArray, product

PANEL = 192  # columns: narrower panels skip more of a triangle, in slower products
SPLIT = 64  # columns from which two panels pay
MOST_PANELS = 8  # more skip little, and each is a launch on a GPU
GROUP = 128  # rows: draws of one component are made together, as many at a time
ACTIVE_EIGHTHS = (0, 1, 2, 4, 6)  # sizes, in parts of a block, to which rows without weight are cut
LOST = 1e-3  # of a variance: rounding errors above it make it none
RIDGE_FACTOR = 10.0
RIDGE_STEPS = 20


def row_sums(x: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Sums over the last axis, as a product: on a CPU several times as fast as a reduction."""
    return product(x, jnp.ones(x.shape[1], x.dtype))


def _panels(dimension: int, most: int = MOST_PANELS) -> list[tuple[int, int]]:
    count = min(max(1 if dimension < SPLIT else 2, round(dimension / PANEL)), most)
    edges = np.linspace(0, dimension, count + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def triangular_product(
    x: Float[Array, "b d"], triangle: Float[AnyArray, "d d"], *, most: int = MOST_PANELS
) -> Float[Array, "b d"]:
    """x T' for a lower triangular T, in no more than `most` panels."""
    panels = _panels(x.shape[1], most)
    return jnp.concatenate([product(x[:, :j], triangle[i:j, :j].T) for i, j in panels], axis=1)


def congruence(
    triangle: Float[AnyArray, "d d"], matrix: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """The lower half of T M T' for a lower triangular T and a symmetric M; 0 above it, or nearly so
    near the diagonal. Not mirrored: factors need no more, and every d^2 numbers count."""
    most = 4  # Each panel copies its share of the matrix: many take many times its memory.
    half = triangular_product(matrix, triangle, most=most)
    panels = _panels(len(matrix), most)
    return _lower_half(tuple(product(triangle[i:j, :j], half[:j, :j]) for i, j in panels))


def weighted_gram(
    x: Float[Array, "b d"], weights: Float[Array, " b"]
) -> tuple[Float[Array, "..."], ...]:
    """sum_i w_i x_i x_i', its lower triangle in panels: rows i to j, columns 0 to j."""
    weighted = x * weights[:, None]
    return tuple(product(weighted[:, i:j].T, x[:, :j]) for i, j in _panels(x.shape[1]))


def over_responsible(sums: Callable, x: Float[Array, "b d"], weights: Float[Array, " b"]) -> PyTree:
    """`sums(x, weights)`, which adds up rows by their weights, over the rows that have weight.

    There are often few: in many dimensions most responsibilities are 0. On a CPU rows without
    weight are cut off down to one of a few sizes, known beforehand; elsewhere to choose one would
    take longer than to add them up.
    """
    return lax.platform_dependent(x, weights, cpu=partial(_sums_of_few, sums), default=sums)


def _sums_of_few(sums, x, weights):
    sizes = sorted({len(x) * eighths // 8 for eighths in ACTIVE_EIGHTHS})
    rows, places = jnp.arange(len(x)), jnp.cumsum(weights > 0)
    active = places[-1]
    # Row i with weight comes to its place among those with weight; a sort would cost more.
    order = jnp.zeros_like(rows).at[jnp.where(weights > 0, places - 1, len(x))].set(rows)

    def sums_of(size):
        kept = order[:size]
        return sums(x[kept], jnp.where(rows[:size] < active, weights[kept], 0))

    index = jnp.searchsorted(jnp.asarray(sizes), active)
    branches = [partial(sums_of, size) for size in sizes]
    return lax.switch(index, [*branches, partial(sums, x, weights)])


def _lower_half(panels):
    """Panels as a matrix that is right on and below the diagonal."""
    d = panels[-1].shape[1]
    return jnp.concatenate([jnp.pad(p, ((0, 0), (0, d - p.shape[1]))) for p in panels])


def symmetric(panels: tuple[Float[Array, "..."], ...]) -> Float[Array, "d d"]:
    """The matrix that `weighted_gram` left in panels."""
    lower = _lower_half(panels)
    return jnp.tril(lower) + jnp.tril(lower, -1).T


# Cholesky factors, and ridges where there are none


def _first_ridge(diagonal: Float[Array, " d"]) -> Float[Array, ""]:
    """Ten times the rounding of a pivot: d eps times the mean variance, or times 1 if that is 0."""
    scale = jnp.mean(diagonal)
    eps = jnp.finfo(diagonal.dtype).eps
    return 10 * eps * len(diagonal) * jnp.where(scale > 0, scale, 1)


def factorize(
    covariance: Float[Array, "d d"], regularization: ScalarLike = 0.0
) -> tuple[Float[Array, "d d"], Float[Array, "d d"], Float[Array, ""]]:
    """(L, L^-1, ridge) with L L' = covariance + (regularization + ridge) I; of the covariance the
    lower half is read.

    The ridge is 0 unless the factorization fails or a pivot is no larger than its rounding error,
    d eps of the variance; then it rises tenfold from there until neither is so. NaN stays NaN.
    """
    d = len(covariance)
    identity = jnp.eye(d, dtype=covariance.dtype)
    covariance = covariance + regularization * identity
    diagonal = jnp.diagonal(covariance)

    def attempt(ridge):
        return jnp.linalg.cholesky(covariance + ridge * identity, symmetrize_input=False)

    def failed(state):
        step, ridge, cholesky = state
        floor = d * jnp.finfo(covariance.dtype).eps * (diagonal + ridge)
        sound = jnp.all(jnp.square(jnp.diagonal(cholesky)) > floor)
        return ~sound & (step < RIDGE_STEPS)

    def escalate(state):
        step, ridge, _ = state
        ridge = jnp.where(step == 0, _first_ridge(diagonal), RIDGE_FACTOR * ridge)
        return step + 1, ridge, attempt(ridge)

    none = jnp.zeros((), covariance.dtype)
    _, ridge, cholesky = lax.while_loop(failed, escalate, (0, none, attempt(none)))
    inverse = lax.linalg.triangular_solve(cholesky, identity, left_side=True, lower=True)
    return cholesky, inverse, ridge


def floor_variances(
    variances: Float[Array, "K d"], regularization: ScalarLike
) -> tuple[Float[Array, "K d"], Float[Array, " K"]]:
    """Variances + regularization, and + a ridge [K] where one of a component's is still 0."""
    variances = jnp.maximum(variances, 0) + regularization
    smallest = jax.vmap(_first_ridge)(variances)
    ridge = jnp.where(jnp.min(variances, axis=1) > smallest / 10, 0, smallest)
    return variances + ridge[:, None], ridge


def where_components(kept: Array, old: AnyArray, new: Array) -> Array:
    """`old` for the components that are kept, `new` for the others; axis 0 counts components."""
    return jnp.where(kept.reshape(-1, *(1,) * (new.ndim - 1)), old, new)


def per_point(sums: Float[Array, "K *m"], counts: Float[Array, " K"]) -> Float[Array, "K *m"]:
    return sums / jnp.where(counts > 0, counts, 1).reshape(-1, *(1,) * (sums.ndim - 1))


def expanded_distances(points, centers):
    """|x_i - c_k|^2 [n, K], expanded: for points whose distances are not far below their norms."""
    norms = row_sums(jnp.square(points))[:, None] + row_sums(jnp.square(centers))[None, :]
    return jnp.maximum(norms - 2 * product(points, centers.T), 0)


# Distances and moments of components however far apart


def distances_from_nearest(
    residuals: Float[Array, "n d"], nearest: Int[Array, " n"], centers: Float[Array, "K d"]
) -> Float[Array, "n K"]:
    """|x_i - c_k|^2 from residuals r_i = x_i - c_j, j = `nearest[i]`.

    |r|^2 - 2 <r, c_k - c_j> + |c_k - c_j|^2, of which no term is far above the result where c_j is
    about the nearest. Centers may have any origin, best their middle.
    """
    norms = row_sums(jnp.square(residuals))[:, None]
    own = jax.nn.one_hot(nearest, len(centers), dtype=centers.dtype)
    gaps = jnp.sum(jnp.square(centers[:, None] - centers[None]), axis=2)
    cross = product(residuals, centers.T)
    cross = cross - jnp.sum(cross * own, axis=1, keepdims=True)
    return jnp.where(own > 0, norms, jnp.maximum(norms - 2 * cross + gaps[nearest], 0))


def first_moments_about(
    residuals: Float[Array, "n d"],
    nearest: Int[Array, " n"],
    centers: Float[Array, "K d"],
    responsibilities: Float[Array, "n K"],
) -> Float[Array, "K d"]:
    """sum_i r_ik (x_i - c_k), from residuals as in `distances_from_nearest`."""
    # Sums over pairs of centers are fused: nothing of size K K d is kept.
    own = jax.nn.one_hot(nearest, len(centers), dtype=centers.dtype)
    counts = product(own.T, responsibilities)
    carried = jnp.sum(counts[:, :, None] * (centers[:, None] - centers[None]), axis=0)
    return product(responsibilities.T, residuals) + carried


def pair_scatter(weights: Float[Array, "K K"], centers: Float[Array, "K d"]) -> Float[Array, "d d"]:
    """sum_{k<l} w_kl (c_k - c_l)(c_k - c_l)' for symmetric weights; O(K d (K + d)) operations."""
    differences = centers[:, None] - centers[None]
    scatter = product(centers.T, jnp.sum(weights[:, :, None] * differences, axis=1))
    return (scatter + scatter.T) / 2


def is_lost(squared_moves: AnyArray, rounding: ScalarLike) -> AnyArray:
    """Whether a variance about a moved mean is lost in rounding, `rounding` the eps of the products
    that its second moment about the old mean was summed from.

    What was subtracted is the move, here squared in standard deviations about the new mean, a
    coordinate at a time: rounding errors of d coordinates average out in a direction.
    """
    return ~(rounding * squared_moves <= LOST)  # NaN, where there is no factor, is lost too


# Draws, a group of one component's at a time


def draw_by_component(
    draw: Callable, noise: Float[Array, "B r"], components: Int[Array, " B"], num: int
) -> Float[Array, "B d"]:
    """`draw(component, rows of noise)` for every row, in groups that share a component.

    Rows are sorted by component and each component's padded to whole groups: O(B) rows of work, and
    one component's factor at a time instead of B of them. Noise is handed out in the sorted order:
    row i of it goes to the i-th of the sorted rows, which changes nothing for independent rows.
    """
    size = len(components)
    group = min(GROUP, -(-size // num))
    order = jnp.argsort(components)
    counts = jnp.bincount(components, length=num)
    ends = jnp.cumsum(-(-counts // group))
    begins = group * (ends - -(-counts // group)) - (jnp.cumsum(counts) - counts)
    places = begins[components[order]] + jnp.arange(size)
    groups = (size + num * (group - 1)) // group
    owners = jnp.minimum(jnp.searchsorted(ends, jnp.arange(groups), side="right"), num - 1)
    blocks = jnp.zeros((groups * group, noise.shape[1]), noise.dtype).at[places].set(noise)
    blocks = blocks.reshape(groups, group, -1)
    shape = jax.eval_shape(draw, owners[0], blocks[0])

    def draw_group(item):
        index, owner, rows = item
        # Groups past the last hold no draw.
        nothing = partial(jnp.zeros, shape.shape, shape.dtype)
        return lax.cond(index < ends[-1], lambda: draw(owner, rows), nothing)

    drawn = lax.map(draw_group, (jnp.arange(groups), owners, blocks)).reshape(-1, shape.shape[1])
    # Row `order[i]` asked for what lies at `places[i]`.
    return drawn[jnp.zeros_like(places).at[order].set(places)]
