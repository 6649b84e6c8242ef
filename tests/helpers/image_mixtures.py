"""What the tests of Gaussian mixtures of images share: moments by dense covariances."""

import numpy as np


def dense(mixture):
    """The covariances [K, d, d] of any structure."""
    matrices, (num, d) = np.asarray(mixture.covariance.matrices()), mixture.means.shape
    if matrices.shape in ((d, d), (num, d, d)):
        return np.broadcast_to(matrices, (num, d, d))
    return np.broadcast_to(matrices.reshape(num, -1, 1), (num, d, d)) * np.eye(d)


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
