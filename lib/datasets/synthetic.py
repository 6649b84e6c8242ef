"""Made-up labelled sets of points, [C, n, d]: rings, Gaussians and mixtures."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

Centers = Sequence[Sequence[float]] | Real[Array | np.ndarray, "classes 2"]
"""The center of each class in the plane."""
THREE_CENTERS = ((0.0, 0.0), (-0.75, 0.0), (-1.5, 0.0))


def rings(
    key: PRNGKeyArray, num_points: int, *, centers: Centers = THREE_CENTERS, radius: float = 0.3
) -> Float[Array, "classes n 2"]:
    """Circles, one per class: c + r (cos t, sin t) with t uniform in [0, 2 pi) by `key`, [C, n, 2].

    The default is three circles side by side, of radius .3 and .75 apart.
    """
    shape = (len(centers), num_points)
    return _on_circles(jax.random.uniform(key, shape, maxval=2 * math.pi), centers, radius)


def rings_even(
    num_points: int, *, centers: Centers = THREE_CENTERS, radius: float = 0.3
) -> Float[Array, "classes n 2"]:
    """The circles of `rings` with equally spaced angles t = 2 pi i / n, i = 0..n-1: [C, n, 2]."""
    angles = jnp.arange(num_points) * (2 * math.pi / num_points)
    return _on_circles(jnp.tile(angles, (len(centers), 1)), centers, radius)


def _on_circles(
    angles: Float[Array, "classes n"], centers: Centers, radius: float
) -> Float[Array, "classes n 2"]:
    directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.asarray(centers, directions.dtype)[:, None, :] + radius * directions


def gaussians(
    key: PRNGKeyArray,
    means: Real[ArrayLike, "classes d"],
    num_points: int,
    *,
    scale: Real[ArrayLike, "..."],
) -> Float[Array, "classes n d"]:
    """Normal samples, one distribution per class: [C, n, d]. `scale` is a standard deviation for
    all classes, or [C] of them."""
    means = jnp.asarray(means, float)
    num_classes, d = means.shape
    noise = jax.random.normal(key, (num_classes, num_points, d))
    noise = noise * jnp.broadcast_to(jnp.asarray(scale, float), (num_classes,))[:, None, None]
    return means[:, None, :] + noise


def gaussian_mixture(
    key: PRNGKeyArray,
    weights: Real[ArrayLike, "k"],
    means: Real[ArrayLike, "k d"],
    scales: Real[ArrayLike, "k"],
    num_points: int,
) -> Float[Array, "n d"]:
    """Samples [n, d] of sum_k weights_k N(means_k, scales_k^2 I); scales are standard deviations.

    Weights are nonnegative, and are divided by their sum.
    """
    component_key, noise_key = jax.random.split(key)
    means, scales = jnp.asarray(means, float), jnp.asarray(scales, float)
    component = jax.random.choice(
        component_key, len(means), (num_points,), p=jnp.asarray(weights, float)
    )
    noise = jax.random.normal(noise_key, (num_points, means.shape[1]))
    return means[component] + scales[component][:, None] * noise
