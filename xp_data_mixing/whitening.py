"""Mixing weights by generalized least squares on mean embeddings.

With features z(x), source means mu_i and the target's mean mu_Q, the true weights meet
mu_Q = sum_i w_i mu_i up to sampling noise. MMD counts that noise alike in all directions.
Generalized least squares (Aitken, On least squares and linear combinations of observations, 1935)
divides by its covariance:

    min_w  (M'w - mu_Q)' (S + damping s I)^-1 (M'w - mu_Q)   over the simplex,

S the pooled covariance of z within the sources, s its largest eigenvalue. A large damping gives MMD
back, which a damping of inf stands for. It is MMD of another kernel,
z(x)' (S + damping s I)^-1 z(y), as in `lib.drmmd`, but with the covariance within sources:
directions in which rows of one source differ a lot tell little about weights.

The noise of mu_i adds tr(S_i (S + damping s I)^-1) / n_i to the i-th diagonal entry of the
quadratic form, S_i the covariance within source i. It is subtracted, as a U-statistic does for MMD.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lib.simplex_qp import from_gram, make_problem, solve


class Spectrum(NamedTuple):
    """N sources of features in the eigenvectors of S; float64.

    means [N, F], variances [N, F] within each source, its sizes [N], the eigenvalues [F] of S and
    its eigenvectors as the columns of basis [F, F]."""

    means: Float[np.ndarray, "N F"]
    variances: Float[np.ndarray, "N F"]
    sizes: Int[np.ndarray, " N"]
    eigenvalues: Float[np.ndarray, " F"]
    basis: Float[np.ndarray, "F F"]


def spectrum(sources: Sequence[Float[np.ndarray, "n F"]]) -> Spectrum:
    """Of feature rows of each source, in memory: O(n F^2 + F^3). Row products are in their dtype.

    Raises ValueError where a source has fewer than two rows.
    """
    sizes = np.array([len(rows) for rows in sources])
    if min(sizes) < 2:
        raise ValueError(f"two rows of each source are needed, got {sizes.tolist()}")
    means = [rows.mean(axis=0, dtype=np.float64) for rows in sources]
    centered = [rows - mean.astype(rows.dtype) for rows, mean in zip(sources, means)]
    scatter = sum((rows.T @ rows).astype(np.float64) for rows in centered)
    eigenvalues, basis = np.linalg.eigh(scatter / (sizes.sum() - len(sizes)))
    rotation = basis.astype(centered[0].dtype)
    variances = [
        np.square(rows @ rotation).sum(axis=0, dtype=np.float64) / (len(rows) - 1)
        for rows in centered
    ]
    means = np.stack(means) @ basis
    return Spectrum(means, np.stack(variances), sizes, np.maximum(eigenvalues, 0), basis)


def metric(eigenvalues: Float[np.ndarray, " F"], damping: float) -> Float[np.ndarray, " F"]:
    """Eigenvalues of S + damping s I, or 1 for a damping of inf. Raises ValueError unless it is
    positive; where all rows of each source are equal S is 0, and the answer 1 as well."""
    if not damping > 0:
        raise ValueError(f"the damping must be positive, got {damping}")
    largest = eigenvalues.max()
    if np.isinf(damping) or largest == 0:
        return np.ones(len(eigenvalues))
    return eigenvalues + damping * largest


def whitened_weights(
    sources: Spectrum,
    target_mean: Float[np.ndarray, " F"],
    damping: float,
) -> Float[np.ndarray, " N"]:
    """The weights of the sources in a target, given its mean in the eigenvectors of S.

    Raises ValueError unless damping > 0.
    """
    scales = metric(sources.eigenvalues, damping)
    noise = (sources.variances / scales).sum(axis=1) / sources.sizes
    means, target = sources.means / np.sqrt(scales), target_mean / np.sqrt(scales)
    gram = means @ means.T - np.diag(noise)
    return simplex_weights(gram, means @ target, float(target @ target))


def simplex_weights(
    gram: Float[np.ndarray, "N N"], cross: Float[np.ndarray, " N"], square: float
) -> Float[np.ndarray, " N"]:
    """The least w'Aw - 2b'w + square over the simplex, A = `gram` with its noise taken off.

    Near a perfect mixture that leaves w'Aw - 2b'w + square below 0 every other time, and the
    centered matrix indefinite: the solver would add a multiple of |w|^2, pulling towards equal
    weights. But only between weights of one sum need it be convex, and a constant added to the
    square is the same for all of those.
    """
    square = square + float(np.max(np.diag(gram) - 2 * cross + square))
    return solve(make_problem(from_gram(gram, cross, square))).weights
