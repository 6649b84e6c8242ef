"""Optimal transport dataset distance, and its gradient in the particles: a baseline.

Alvarez-Melis and Fusi (Geometric dataset distances via optimal transport, NeurIPS 2020; Dataset
dynamics via gradient flows in probability space, ICML 2021). A labelled point is (x, c); the cost
between two is |x - x'|^2 + W_2^2(alpha_c, beta_c'), alpha_c the points of class c, and the distance
is the optimal transport cost between all points of one set and all of the other.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.solvers import linear

from lib import devices
from lib.kernels import squared_distances


class Plans(NamedTuple):
    """`points` [C, n, D, k] couples all points (sums to 1); `classes` [C, D, n, k] couples class c
    with class c' only (each [n, k] sums to 1)."""

    points: Array
    classes: Array


def _plan(cost: Float[Array, "a b"], epsilon: float, max_iterations: int) -> Array:
    """Entropic plan between uniform weights, the regularization `epsilon` times the mean cost."""
    mean = jnp.mean(cost)
    # All points at one place, as where a class has arrived at its only target point, cost nothing.
    problem = geometry.Geometry(cost / jnp.where(mean > 0, mean, 1), epsilon=epsilon)
    return linear.solve(problem, max_iterations=max_iterations, threshold=1e-3).matrix


def otdd_plans(
    x: Float[Array, "C n d"],
    y: Float[Array, "D k d"],
    *,
    epsilon: float = 0.01,
    max_iterations: int = 500,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "C n D k"], Plans]:
    """(cost of every pair of labelled points, the plans that are optimal for it), by Sinkhorn.

    `epsilon` is relative to the mean cost, in the distances between classes and between points.
    Sinkhorn ends after `max_iterations` whether or not the marginals are met: `marginal_errors`
    says how far off they are. Memory O(C n D k), of which each device of `mesh` has its share: of
    the pairs of classes, and of the rows of the plan between points where they can be shared
    equally.
    """
    (num_x, n, _), (num_y, k, _) = x.shape, y.shape
    squared = squared_distances(x.reshape(num_x * n, -1), y.reshape(num_y * k, -1))
    squared = squared.reshape(num_x, n, num_y, k)
    pairs = jnp.swapaxes(squared, 1, 2).reshape(num_x * num_y, n, k)
    plan = partial(_plan, epsilon=epsilon, max_iterations=max_iterations)
    classes = devices.over_devices(jax.vmap(plan), mesh)(pairs)
    between = jnp.sum(classes * pairs, axis=(1, 2)).reshape(num_x, 1, num_y, 1)
    cost = squared + between
    matrix = cost.reshape(num_x * n, num_y * k)
    points = plan(devices.constrain(matrix, mesh, devices.partition_spec(matrix.shape, (0,), mesh)))
    return cost, Plans(points.reshape(cost.shape), classes.reshape(num_x, num_y, n, k))


def marginal_errors(plans: Plans) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mass by which the marginals miss the uniform weights (total variation): of the plan
    between points, and of the worst plan between two classes."""

    def error(plan):
        rows, columns = plan.sum(axis=1), plan.sum(axis=0)
        off = (jnp.abs(z - 1 / len(z)).sum() / 2 for z in (rows, columns))
        return jnp.maximum(*off)

    num_x, n, num_y, k = plans.points.shape
    points = error(plans.points.reshape(num_x * n, num_y * k))
    return points, jnp.max(jax.vmap(error)(plans.classes.reshape(num_x * num_y, n, k)))


def otdd_value_and_grad(
    x: Float[Array, "C n d"],
    y: Float[Array, "D k d"],
    key: Array | None = None,
    *,
    epsilon: float = 0.01,
    max_iterations: int = 500,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, "C n d"]]:
    """OTDD^2 between two labelled sets, and C n times its gradient in x: the plans held fixed, as
    the envelope theorem allows, both the points' own cost and that of their class move them.

    `key` is not used; it is there because flows hand one to what they minimize.
    """
    cost, plans = lax.stop_gradient(
        otdd_plans(x, y, epsilon=epsilon, max_iterations=max_iterations, mesh=mesh)
    )
    num_x, n = x.shape[:2]
    # Mass that class c sends to class c'; each of its plans moves x with that much of it.
    sent = jnp.sum(plans.points, axis=(1, 3))
    coupling = plans.points + jnp.swapaxes(sent[:, :, None, None] * plans.classes, 1, 2)
    mass = jnp.sum(coupling, axis=(2, 3))
    pulled = jnp.einsum("cndk,dkp->cnp", coupling, y, precision=lax.Precision.HIGHEST)
    gradient = 2 * (mass[:, :, None] * x - pulled)
    return jnp.sum(plans.points * cost), num_x * n * gradient
