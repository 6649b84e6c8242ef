"""Losses between the features of condensed and of real images.

A class loss is a function of (key, x [n, f], y [m, f]): x the features of a class's condensed
images, y those of its real ones. All are squared MMDs, the biased estimate (diagonals in, no
square root), of M3D (Zhang et al., AAAI 2024), which calls them ECHO, or of DM (Zhao and Bilen,
2023). `dataset_loss` compares all classes at once (Bonet et al., ICML 2025).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from lib import kernels, mmd, rff
from lib.sliced_wasserstein import random_directions

ClassLoss = Callable[
    [Key[Array, ""], Float[Array, "n features"], Float[Array, "m features"]], Float[Array, ""]
]

OCTAVES = (-2, -1, 0, 1, 2)
FIXED_GAMMAS = (0.1, 1.0, 5.0)


def mean_squared_distance(
    x: Float[Array, "n features"], y: Float[Array, "m features"]
) -> Float[Array, ""]:
    """The mean of |z_i - z_j|^2 over ordered pairs i != j of the N = n + m pooled points.

    It is 2 / (N - 1) sum_i |z_i - mean|^2: no distance matrix is needed. Not differentiated: a
    bandwidth is a constant of its step. Identical points give 1e-30 in place of 0.
    """
    pooled = jnp.concatenate([x, y])
    squares = jnp.sum(jnp.square(pooled - jnp.mean(pooled, axis=0, keepdims=True)))
    mean = 2 * squares / (len(pooled) - 1)
    return lax.stop_gradient(jnp.maximum(mean, 1e-30))


def linear(key, x, y):
    """|mean x - mean y|^2: the loss of DM, the MMD of the kernel x . y."""
    return jnp.sum(jnp.square(jnp.mean(x, axis=0) - jnp.mean(y, axis=0)))


def of_kernel(kernel: kernels.Kernel) -> ClassLoss:
    """The biased squared MMD of a fixed kernel."""
    return lambda key, x, y: mmd.mmd_squared(kernel, x, y)


def _sigmas(x, y, scale):
    """Of exp(-D / (scale bw 2^k)) for every octave k, with bw the mean squared distance."""
    bandwidth = mean_squared_distance(x, y)
    return [jnp.sqrt(scale * bandwidth * 2.0**k / 2) for k in OCTAVES]


def gaussian(scale: float = 1.0) -> ClassLoss:
    """MMD^2 of the sum over k = -2 .. 2 of exp(-D / (scale bw 2^k)), D the squared distance and bw
    its mean (`mean_squared_distance`): the loss of ECHO at scale = 1."""

    def loss(key, x, y):
        parts = [kernels.gaussian(sigma) for sigma in _sigmas(x, y, scale)]
        return mmd.mmd_squared(kernels.mixture(parts), x, y)

    return loss


def random_features(num_features: int, scale: float = 1.0) -> ClassLoss:
    """`gaussian` by `num_features` random Fourier frequencies, drawn anew by each key and shared by
    the bandwidths: unbiased for it, in O((n + m) num_features) memory."""

    def loss(key, x, y):
        frequencies = rff.gaussian_frequencies(key, num_features, x.shape[1])
        # The features' origin counts only for their rounding.
        center = lax.stop_gradient(jnp.mean(y, axis=0, keepdims=True))
        projected = [rff.frequency_projections(points - center, frequencies) for points in (x, y)]
        total = jnp.zeros((), x.dtype)
        for sigma in _sigmas(x, y, scale):
            means = [
                jnp.mean(rff.features_of_projections(points, sigma), axis=0) for points in projected
            ]
            total += rff.mmd_squared_rff(*means)
        return total

    return loss


def class_loss(name: str, *, scale: float = 1.0, num_features: int = 500) -> ClassLoss:
    """The loss of a kernel's name in `config.KernelName`. Raises ValueError on another."""
    match name:
        case "gaussian":
            return gaussian(scale)
        case "gaussian_fixed":
            parts = [kernels.gaussian((2 * gamma) ** -0.5) for gamma in FIXED_GAMMAS]
            return of_kernel(kernels.mixture(parts))
        case "linear":
            return linear
        case "polynomial":
            return of_kernel(kernels.polynomial(2))
        case "energy":
            return of_kernel(kernels.riesz(1.0))
        case "rff":
            return random_features(num_features, scale)
    raise ValueError(f"no kernel {name!r}")


def dataset_loss(
    key: Key[Array, ""],
    x: Float[Array, "classes n features"],
    y: Float[Array, "classes m features"],
    *,
    num_directions: int,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """MMD^2 / 2 between the two sets of classes, with the kernel -SW_2 on classes.

    Multiplied by classes x n, so that its gradient in x is the Wasserstein-over-Wasserstein
    gradient (`lib.mmd`). The devices of a mesh share the directions.
    """
    directions = random_directions(key, num_directions, x.shape[2], dtype=x.dtype)
    value = mmd.mmd_squared_measures(mmd.sliced_riesz(1.0), x, y, directions, mesh=mesh)
    return 0.5 * x.shape[0] * x.shape[1] * value
