"""What the tests of Gaussian mixtures compare with: moments and covariances in float64 NumPy."""

import jax
import numpy as np

from lib import gmm


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def dense(mixture):
    """The covariances [K, d, d] from the factors."""
    (num, d), structure = mixture.means.shape, in_float64(mixture.covariance)
    match structure:
        case gmm.Full():
            return structure.cholesky @ np.swapaxes(structure.cholesky, 1, 2)
        case gmm.Tied():
            return np.stack([structure.cholesky @ structure.cholesky.T] * num)
        case gmm.Diagonal() | gmm.Spherical():
            scales = np.broadcast_to(structure.scales.reshape(num, -1), (num, d))
            return np.stack([np.diag(s**2) for s in scales])
    return np.stack([w @ w.T + np.diag(s**2) for w, s in zip(*structure[:2])])


def weighted_moments(x, shares):
    """Means [K, d] and covariances [K, d, d] of the rows, and the shares' sums [K]."""
    counts = shares.sum(axis=0)
    centered = x[:, None] - shares.T @ x / counts[:, None]
    scatter = np.einsum("nk,nki,nkj->kij", shares, centered, centered)
    return shares.T @ x / counts[:, None], scatter / counts[:, None, None], counts


def restricted(structure, covariances, weights):
    """What a structure keeps of covariances [K, d, d]; None of low rank, which is no projection."""
    name = structure.replace("diagonal", "diag")
    return {
        "full": covariances,
        "tied": np.einsum("k,kij->ij", weights, covariances),
        "diag": np.diagonal(covariances, axis1=1, axis2=2),
        "spherical": np.trace(covariances, axis1=1, axis2=2) / covariances.shape[1],
    }.get(name)


def moments(mixture, projection=None):
    """Mean [d] and covariance [d, d], by the law of total variance, mapped back to pixels."""
    weights, means = np.asarray(mixture.weights), np.asarray(mixture.means)
    mean = weights @ means
    centered = means - mean
    covariance = np.einsum("k,kij->ij", weights, dense(mixture))
    covariance += (weights * centered.T) @ centered
    if projection is None:
        return mean, covariance
    components, center = projection
    return mean @ components + center, components.T @ covariance @ components
