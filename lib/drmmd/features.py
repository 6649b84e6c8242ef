"""(De)-regularized MMD in the space of explicit features: kernels phi(x) . phi(y) of finite rank.

The primal form of `lib.drmmd`: with the target's mean feature phi_pi and its second moment S, the
witness is h(z) = phi(z) . 2 (1 + lambda) g(S) (phi_mu - phi_pi). A step costs O(N D + D^2) beside
the features themselves, and there is no small lambda to divide by. With `lib.rff` it approximates
the exact flow for samples too large for a Gram matrix; with a network's outputs on a batch as
features, it trains a network of particles.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, ScalarLike

from lib.drmmd._witnesses import SpectralFilter, as_target, check_lambda, tikhonov
from lib.numerics import map_blocks, normalized_weights, product, to_blocks

Features = Callable[[Float[Array, "n d"]], Float[Array, "n D"]]
"""A map of points to features whose products stand for the kernel."""


class FeatureTarget(NamedTuple):
    """Mean feature of the target, and the spectrum of S = sum_j w_j phi(x_j) phi(x_j)': all D
    eigenvalues, or as many as there are points where these are fewer, the others being 0."""

    mean: Float[Array, " D"]
    eigenvalues: Float[Array, " m"]
    eigenvectors: Float[Array, "D m"]


class FeatureWitness(NamedTuple):
    """h(z) = phi(z) . `direction`; `value` as in `Witness`."""

    direction: Float[Array, " D"]
    value: Float[Array, ""]


def feature_moments(
    features: Features,
    points: Float[Array, "n d"],
    weights: Float[Array, " n"] | None = None,
    *,
    block_size: int = 1024,
    second: bool = True,
) -> tuple[Float[Array, " D"], Float[Array, "D D"] | None]:
    """(sum_j w_j phi(x_j), sum_j w_j phi(x_j) phi(x_j)') in one pass; memory O(block_size D + D^2).

    Weights are normalized. Without `second` the other is None and costs nothing.
    """
    weights = normalized_weights(points, weights)
    size = jax.eval_shape(features, points[:1])
    zeros = jnp.zeros(size.shape[1], size.dtype)

    def add(total, block):
        block_features, block_weights = features(block[0]), block[1]
        weighted = block_weights[:, None] * block_features
        mean = total[0] + jnp.sum(weighted, axis=0)
        if not second:
            return (mean, None), None
        return (mean, total[1] + product(weighted.T, block_features)), None

    start = zeros, (jnp.zeros((len(zeros),) * 2, size.dtype) if second else None)
    blocks = to_blocks(points, weights, block_size)
    return lax.scan(add, start, blocks, unroll=len(blocks[0]) == 1)[0]


def prepare_target_features(
    features: Features,
    points: Float[Array, "M d"],
    weights: Float[Array, " M"] | None = None,
    *,
    block_size: int = 1024,
) -> FeatureTarget:
    """What does not change between steps, for the kernel k(x, y) = phi(x) . phi(y).

    With `lib.rff.random_fourier_features` this is the primal form of an approximate DrMMD: O(M D^2
    + D^3) once, and it has no small lambda to divide by.
    """
    points, weights = as_target(points, weights)
    if len(points) < jax.eval_shape(features, points[:1]).shape[1]:
        phi = features(points)
        _, singular, basis = jnp.linalg.svd(jnp.sqrt(weights)[:, None] * phi, full_matrices=False)
        return FeatureTarget(product(weights, phi), singular**2, basis.T)
    mean, covariance = feature_moments(features, points, weights, block_size=block_size)
    eigenvalues, eigenvectors = jnp.linalg.eigh(covariance)
    return FeatureTarget(mean, jnp.maximum(eigenvalues, 0), eigenvectors)


def feature_witness(
    target: FeatureTarget,
    particle_mean: Float[Array, " D"],
    lmbda: ScalarLike,
    *,
    spectral_filter: SpectralFilter = tikhonov,
) -> FeatureWitness:
    """The DrMMD witness 2 (1 + lambda) g(S) (phi_mu - phi_pi): O(D^2)."""
    lmbda = check_lambda(lmbda)
    difference = particle_mean - target.mean
    coordinates = product(difference, target.eigenvectors)
    inverse = spectral_filter(target.eigenvalues, lmbda).inverse
    at_zero = spectral_filter(jnp.zeros_like(lmbda, difference.dtype), lmbda).inverse
    if target.eigenvectors.shape[0] == target.eigenvectors.shape[1]:
        filtered = product(target.eigenvectors, inverse * coordinates)
    else:
        inside = product(target.eigenvectors, (inverse - at_zero) * coordinates)
        filtered = inside + at_zero * difference
    direction = filtered * (2 * (1 + lmbda))
    return FeatureWitness(direction, product(difference, direction) / 2)


def feature_velocity(
    features: Features,
    witness: FeatureWitness,
    points: Float[Array, "n d"],
    *,
    block_size: int = 1024,
) -> Float[Array, "n d"]:
    """grad h at the points: memory O(block_size D)."""

    def gradients(rows):
        _, transpose = jax.vjp(features, rows)
        shape = (len(rows), len(witness.direction))
        return transpose(jnp.broadcast_to(witness.direction[None, :], shape))[0]

    return map_blocks(gradients, points, block_size)
