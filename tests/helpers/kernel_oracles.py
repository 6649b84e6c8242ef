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


def gram_of_means(groups, bandwidth, *, unbiased=False):
    """Means of the kernel between groups; within one, if `unbiased`, over pairs of its rows."""
    gram = np.array([[kernel(x, y, bandwidth).mean() for y in groups] for x in groups])
    if unbiased:
        sizes = np.array([len(x) for x in groups])
        np.fill_diagonal(gram, 1 - (1 - gram.diagonal()) * sizes / (sizes - 1))
    return gram
