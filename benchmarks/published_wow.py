"""The published way to compute WoW gradients, rebuilt from its description for comparison.

Bonet, Vauthier and Korba (Flowing Datasets with Wasserstein over Wasserstein Gradient Flows, ICML
2025): a projection is summed up by 100 equally spaced percentiles; SW_p^p between two point clouds
is the mean, over L fresh directions and for each its own 100 uniform levels (drawn with the
directions' own key), of |difference|^p of the two quantile functions interpolated between those
percentiles. |.| has derivative 0 where the whole difference is 0. Kernels are evaluated for all
pairs of classes by a vmap of a vmap; the gradient is automatic differentiation of F = MMD^2 / 2,
times C n. Interpolation is not the quantile function of a point cloud: the estimate is biased for
small n.

The formulas are the published ones; the code is new. To compute, use `lib.mmd`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MeasureKernel = Callable[[Array, Array, Array], Array]


def sliced_wasserstein_power(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    key: Array,
    *,
    p: int = 2,
    num_projections: int = 500,
    num_levels: int = 100,
) -> Float[Array, ""]:
    """SW_p^p by percentiles at random levels; `key` draws the directions and the levels."""
    directions = jax.random.normal(key, (num_projections, x.shape[-1]))
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    levels = jax.random.uniform(key, (num_projections, num_levels))
    grid = jnp.linspace(0, 1, num_levels)

    def quantiles(points):
        percentiles = jnp.percentile(directions @ points.T, 100 * grid, axis=1)
        return jax.vmap(jnp.interp, in_axes=(0, None, 1))(levels, grid, percentiles)

    return jnp.mean(_absolute(quantiles(x) - quantiles(y)) ** p)


@jax.custom_jvp
def _absolute(difference: Array) -> Array:
    return jnp.abs(difference)


@_absolute.defjvp
def _absolute_jvp(primals, tangents):
    (difference,), (tangent,) = primals, tangents
    nothing = jnp.all(difference == 0)
    return jnp.abs(difference), jnp.where(nothing, 0.0, jnp.sign(difference) * tangent)


def gaussian(h: float = 0.1, num_projections: int = 500) -> MeasureKernel:
    """exp(-SW_2^2 / (2 h))."""

    def kernel(x, y, key):
        power = sliced_wasserstein_power(x, y, key, num_projections=num_projections)
        return jnp.exp(-power / (2 * h))

    return kernel


def laplace(h: float = 0.5, num_projections: int = 500) -> MeasureKernel:
    """exp(-SW_1 / h)."""

    def kernel(x, y, key):
        power = sliced_wasserstein_power(x, y, key, p=1, num_projections=num_projections)
        return jnp.exp(-power / h)

    return kernel


def imq(h: float = 1.0, num_projections: int = 500) -> MeasureKernel:
    """(h + SW_2^2)^(-1/2)."""

    def kernel(x, y, key):
        power = sliced_wasserstein_power(x, y, key, num_projections=num_projections)
        return jax.lax.rsqrt(h + power)

    return kernel


def riesz(r: float = 1.0, num_projections: int = 500) -> MeasureKernel:
    """-SW_2^r, its infinite slope at equal measures set to 0."""

    def kernel(x, y, key):
        power = sliced_wasserstein_power(x, y, key, num_projections=num_projections)
        apart = power > 0
        return jnp.where(apart, -(jnp.where(apart, power, 1.0) ** (r / 2)), 0.0)

    return kernel


def mmd_squared(
    kernel: MeasureKernel, x: Float[Array, "C n d"], y: Float[Array, "D m d"], key: Array
) -> Float[Array, ""]:
    """MMD^2 between classes of equal weight (V-statistic); every pair of classes gets `key`."""

    def mean(a, b):
        row = jax.vmap(kernel, in_axes=(None, 0, None))
        return jnp.mean(jax.vmap(row, in_axes=(0, None, None))(a, b, key))

    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


def value_and_grad(
    kernel: MeasureKernel, x: Float[Array, "C n d"], y: Float[Array, "D m d"], key: Array
) -> tuple[Float[Array, ""], Float[Array, "C n d"]]:
    """F = MMD^2 / 2 and C n times its gradient."""
    value, gradient = jax.value_and_grad(lambda x: mmd_squared(kernel, x, y, key) / 2)(x)
    return value, x.shape[0] * x.shape[1] * gradient
