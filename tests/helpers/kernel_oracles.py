"""The Gaussian kernel and MMD^2 of samples, by their Gram matrices in float64."""

import numpy as np
from scipy.spatial.distance import cdist


def kernel(x, y, bandwidth):
    return np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2))


def mmd_squared(x, y, kernel, *, unbiased=False):
    """The V-statistic, or the U-statistic, of a kernel of two samples."""

    def within(z):
        gram = kernel(z, z)
        return gram[~np.eye(len(z), dtype=bool)].mean() if unbiased else gram.mean()

    return within(x) + within(y) - 2 * kernel(x, y).mean()
