"""Gaussian mixtures p(x) = sum_k w_k N(x; mu_k, Sigma_k): densities, samples, conversions.

A `Mixture` is a pytree of arrays: weights, means and a covariance structure that holds its own
factors (`lib.gmm.covariances`), so nothing is factorized when a density is evaluated or a sample
drawn. Fitted mixtures come as float64 numpy arrays; jax takes them in the dtype it works in,
float32 unless `jax.enable_x64`. Nothing here is jitted. Under `jax.jit` pass the mixture as an
argument: closed over, its factors are constants that XLA folds slowly.

Fitting is in `lib.gmm.em`, starts in `lib.gmm.starts`, data of any size in `lib.rows`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from lib.gmm.covariances import (
    Covariance,
    Diagonal,
    Full,
    LowRank,
    Spherical,
    Tied,
    from_cholesky,
    from_matrices,
    invert_triangles,
)
from lib.numerics import AnyArray, at_least_float32, map_blocks


class Mixture(NamedTuple):
    """Weights [K], which sum to 1, means [K, d], and the covariances."""

    weights: Float[AnyArray, " K"]
    means: Float[AnyArray, "K d"]
    covariance: Covariance


def cast(mixture: Mixture, dtype: DTypeLike) -> Mixture:
    """The mixture with every array in `dtype`, on the device."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), mixture)


# Densities


class Prepared(NamedTuple):
    """A mixture for the evaluation of many blocks: what its products need in the points' dtype,
    and log w_k - (d log 2 pi + log|Sigma_k|) / 2, [K], in its own."""

    constants: Float[Array, " K"]
    means: Float[Array, "K d"]
    covariance: Covariance


def prepare(mixture: Mixture, dtype: DTypeLike) -> Prepared:
    """`mixture` for points in `dtype`: once, before a loop over blocks."""
    weights, means, covariance = jax.tree.map(jnp.asarray, mixture)
    normalizers = (means.shape[1] * math.log(2 * math.pi) + covariance.log_determinants()) / 2
    if isinstance(covariance, Full | Tied):
        # Densities and moments need only the inverse; the other factor is as large.
        covariance = covariance._replace(cholesky=None)  # type: ignore[arg-type]
    low = jax.tree.map(lambda leaf: leaf.astype(dtype), (means, covariance))
    return Prepared(jnp.log(weights) - normalizers, *low)


def joint_log_densities(
    prepared: Prepared, points: Float[Array, "b d"]
) -> tuple[Float[Array, "b K"], Any]:
    """log w_k + log N(x_i; mu_k, Sigma_k) for one block, and what its moments are made of."""
    squared, residuals = prepared.covariance.mahalanobis(points, prepared.means)
    constants = prepared.constants
    return constants[None, :] - squared.astype(constants.dtype) / 2, residuals


def _over_blocks(function, mixture: Mixture, x: Float[Array, "n d"], block_size: int) -> Array:
    if x.ndim != 2 or x.shape[1] != mixture.means.shape[1]:
        raise ValueError(f"points are [n, {mixture.means.shape[1]}], got shape {x.shape}")
    x = at_least_float32(x)
    prepared = prepare(mixture, x.dtype)
    return map_blocks(lambda rows: function(joint_log_densities(prepared, rows)[0]), x, block_size)


def component_log_prob(
    mixture: Mixture, x: Float[Array, "n d"], *, block_size: int = 512
) -> Float[Array, "n K"]:
    """log w_k + log N(x_i; mu_k, Sigma_k), [n, K], in nats.

    Beside input and output O(K block_size d), and O(K d^2) for a copy of the factors in x's dtype.
    """
    return _over_blocks(lambda joint: joint, mixture, x, block_size)


def log_prob(
    mixture: Mixture, x: Float[Array, "n d"], *, block_size: int = 512
) -> Float[Array, " n"]:
    """log p(x_i), [n], in nats; memory as `component_log_prob`."""
    return _over_blocks(lambda joint: jax.nn.logsumexp(joint, axis=1), mixture, x, block_size)


def responsibilities(
    mixture: Mixture, x: Float[Array, "n d"], *, block_size: int = 512
) -> Float[Array, "n K"]:
    """p(k | x_i), [n, K]; rows sum to 1; memory as `component_log_prob`."""
    return _over_blocks(lambda joint: jax.nn.softmax(joint, axis=1), mixture, x, block_size)


# Samples


def sample(
    key: Key[Array, ""], mixture: Mixture, num_samples: int
) -> tuple[Float[Array, "B d"], Int[Array, " B"]]:
    """Draws of the mixture [B, d], and the components [B] that they come from."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    component_key, noise_key = jax.random.split(key)
    logits = jnp.log(jnp.asarray(mixture.weights))
    components = jax.random.categorical(component_key, logits, shape=(num_samples,))
    return sample_components(noise_key, mixture, components), components


def sample_components(
    key: Key[Array, ""], mixture: Mixture, components: Int[Array, " B"]
) -> Float[Array, "B d"]:
    """Row i is a draw of N(mu_k, Sigma_k), k = `components[i]`, in the mixture's dtype.

    O(B d^2) operations at most (O(B d r) for low rank, O(B d) for diagonal ones) and O(B d) memory:
    draws that share a component are multiplied by its factor together. For all of one component
    pass `jnp.full(B, k)`.
    """
    mixture = jax.tree.map(jnp.asarray, mixture)
    return mixture.means[components] + mixture.covariance.sample_noise(key, components)


def sample_coupled(
    key: Key[Array, ""], mixture: Mixture, x1: Float[Array, "B d"], *, block_size: int = 512
) -> tuple[Float[Array, "B d"], Int[Array, " B"]]:
    """x0 [B, d] of the components responsible for x1, and these components [B].

    Component k is drawn with probability p(k | x1_i), then x0_i from N(mu_k, Sigma_k). By itself x0
    has the law of the mixture wherever x1's mean responsibilities are the weights, which they are
    for the data that an EM fit has converged on.
    """
    component_key, noise_key = jax.random.split(key)
    logits = component_log_prob(mixture, x1, block_size=block_size)
    components = jax.random.categorical(component_key, logits, axis=1)
    return sample_components(noise_key, mixture, components), components


# Coordinates in another order


def permuted(mixture: Mixture, order: Int[np.ndarray, " d"]) -> Mixture:
    """The mixture of x[order], in float64 on the host; 4/3 d^3 operations a triangle.

    Raises ValueError unless `order` holds every coordinate once.
    """
    mixture = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mixture)
    if not np.array_equal(np.sort(order), np.arange(mixture.means.shape[1])):
        raise ValueError(f"order must be a permutation of 0 to {mixture.means.shape[1] - 1}")

    def triangle(cholesky):
        # L[order] = R' Q' of its transpose's QR: its rows' products, in a triangle again.
        upper = np.linalg.qr(cholesky[order].T, mode="r")
        return (np.sign(np.diagonal(upper))[:, None] * upper).T

    structure = mixture.covariance
    match structure:
        case Full():
            structure = from_cholesky(np.stack([triangle(factor) for factor in structure.cholesky]))
        case Tied():
            structure = from_cholesky(triangle(structure.cholesky))
        case Diagonal():
            structure = Diagonal(structure.scales[:, order])
        case LowRank():
            loadings, scales, projections = structure
            structure = LowRank(loadings[:, order], scales[:, order], projections[:, :, order])
    return Mixture(mixture.weights, mixture.means[:, order], structure)


# Components


def without_empty(mixture: Mixture) -> Mixture:
    """The mixture without its components of weight 0, which have lost all their points in a fit.
    Its density is the same, and costs less. On the host."""
    mixture = jax.tree.map(np.asarray, mixture)
    kept = mixture.weights > 0
    structure = mixture.covariance
    match structure:
        case Spherical():
            structure = structure._replace(scales=structure.scales[kept])
        case Full() | Diagonal() | LowRank():
            structure = jax.tree.map(lambda leaf: leaf[kept], structure)
    return Mixture(mixture.weights[kept], mixture.means[kept], structure)


# scikit-learn


def _normalized(weights: Float[AnyArray, " K"]) -> Float[np.ndarray, " K"]:
    """The weights in float64 with sum 1, to which NumPy's multinomial holds them: float32 leaves
    1e-7. What sums to 1 up to rounding in float64 keeps its bits."""
    weights = np.asarray(weights, np.float64)
    total = weights.sum()
    if not (weights.min() >= 0 and abs(total - 1) < 1e-3):
        raise ValueError(f"weights are >= 0 and sum to 1, got {weights}, sum {total}")
    exact = abs(total - 1) <= len(weights) * np.finfo(np.float64).eps
    return weights if exact else weights / total


def from_sklearn(model: Any) -> Mixture:
    """The mixture of a `sklearn.mixture.GaussianMixture`, fitted or started, in float64.

    Reads weights_, means_, precisions_cholesky_ and covariance_type. Raises ValueError where they
    are missing, not finite, or weights that do not sum to 1.
    """
    try:
        weights, means = (np.asarray(model.weights_, float), np.asarray(model.means_, float))
        precisions = np.asarray(model.precisions_cholesky_, float)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has not been fitted: {error}") from error
    if not all(np.isfinite(array).all() for array in (weights, means, precisions)):
        raise ValueError(f"{type(model).__name__} holds NaN or infinity")
    kind = model.covariance_type
    if kind in ("full", "tied"):
        # Sigma^-1 = U U' with an upper triangle U, so that L^-1 = U'.
        inverse = np.ascontiguousarray(np.swapaxes(precisions, -1, -2))
        covariance = (Full if kind == "full" else Tied)(invert_triangles(inverse), inverse)
    elif kind == "diag":
        covariance = Diagonal(1 / precisions)
    else:
        covariance = Spherical(1 / precisions, np.ones(means.shape[1]))
    return Mixture(_normalized(weights), means, covariance)


def to_sklearn(mixture: Mixture, *, regularization: float = 1e-6) -> Any:
    """A fitted `sklearn.mixture.GaussianMixture` with these parameters, in float64.

    Its fit attributes say so little as is known: no iteration, converged. Low rank + diagonal is
    written out as full covariances. Raises ValueError unless the weights sum to 1.
    """
    from sklearn.mixture import GaussianMixture

    weights, means = _normalized(mixture.weights), np.asarray(mixture.means, np.float64)
    structure: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mixture.covariance)
    if isinstance(structure, LowRank):
        structure = from_matrices(structure.matrices())
    kind = {Full: "full", Tied: "tied", Diagonal: "diag", Spherical: "spherical"}[type(structure)]
    model = GaussianMixture(len(weights), covariance_type=kind, reg_covar=regularization)
    model.weights_, model.means_, model.covariances_ = weights, means, structure.matrices()
    if kind in ("full", "tied"):
        model.precisions_cholesky_ = np.swapaxes(structure.inverse, -1, -2).copy()
        model.precisions_ = model.precisions_cholesky_ @ structure.inverse
    else:
        model.precisions_cholesky_ = 1 / structure.scales
        model.precisions_ = model.precisions_cholesky_**2
    model.converged_, model.n_iter_ = True, 0
    model.lower_bound_, model.lower_bounds_ = -np.inf, []
    model.n_features_in_ = means.shape[1]
    return model
