"""Weights of most likely mixtures: EMQ and MixMin, which are one convex problem.

    min_w  -sum_j v_j log sum_i w_i p_ij    over the simplex

EMQ (Saerens, Latinne and Decaestecker, Neural Computation 14, 2002): p_ij are the posteriors of
source i at the target's row j over the sources' shares in training; w are the sources' shares in
the target. MixMin (Thudi et al., MixMin: finding data mixtures via convex minimization, ICML 2025):
p_ij is the probability that a model of source i gives the label of the target's example j; w is the
mixture whose best predictor has the least cross-entropy on the target.

EM solves it, slowly. Here each step is a quadratic program (Kim, Carbonetto, Stephens and Anitescu,
A fast algorithm for maximum likelihood estimation of mixture proportions, JCGS 29, 2020).
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from xp_data_mixing.whitening import simplex_weights

MAX_STEPS = 100
TOLERANCE = 1e-9
SMALL = 1e-7
"""Weights below it become 0 where that leaves the gap as small."""


class Likelihood(NamedTuple):
    """weights [N]; loss, the objective with sum_j v_j = 1; gap, by which the loss is at most above
    its minimum (Frank-Wolfe: max_i sum_j v_j p_ij / sum_k w_k p_kj - 1)."""

    weights: Float[np.ndarray, " N"]
    loss: float
    gap: float


def likelihood_weights(
    log_densities: ArrayLike, row_weights: ArrayLike | None = None
) -> Likelihood:
    """The weights of least -sum_j v_j log sum_i w_i exp(`log_densities`[j, i]); v uniform, or
    `row_weights` [m], divided by their sum.

    Raises ValueError on shapes that do not fit, NaN, +inf, a row that no source can give, and
    weights of rows that are negative or all 0.
    """
    logs = np.asarray(log_densities, np.float64)
    if logs.ndim != 2 or 0 in logs.shape:
        raise ValueError(f"log_densities must be [rows, sources], got shape {logs.shape}")
    if np.isnan(logs).any() or (logs == np.inf).any():
        raise ValueError("log_densities hold NaN or +inf")
    largest = logs.max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError(f"no source can give row {int(np.argmin(largest))}: all are -inf")
    v = np.ones(len(logs)) if row_weights is None else np.asarray(row_weights, np.float64)
    if v.shape != largest.shape or not (np.isfinite(v).all() and v.min() >= 0 and v.any()):
        raise ValueError(f"row_weights must be {len(logs)} numbers >= 0, not all 0")
    v, ratios = v / v.sum(), np.exp(logs - largest[:, None])

    def loss(w):
        with np.errstate(divide="ignore"):
            return -v @ (np.log(ratios @ w) + largest)

    def descent_of(w):
        """(Minus the gradient, whose product with w is 1; each row's densities over w's.)"""
        shares = ratios / (ratios @ w)[:, None]
        return v @ shares, shares

    n = logs.shape[1]
    weights = np.full(n, 1 / n)
    for _ in range(MAX_STEPS):
        descent, shares = descent_of(weights)
        if descent.max() - 1 <= TOLERANCE:
            break
        # Of second order at w, where H w = -gradient: u'Hu / 2 - 2 descent'u.
        target = simplex_weights(shares.T @ (v[:, None] * shares) / 2, descent, 2.0)
        step, value = target - weights, loss(weights)
        # No weight falls to less than a hundredth at once: a source that is needed, at 0, would
        # leave densities of 0, and slopes that nothing can be computed with.
        length = 0.99
        while length > 1e-10 and loss(weights + length * step) > value - 1e-4 * length * (
            descent @ step
        ):
            length /= 2
        weights = weights + length * step
        weights = weights / weights.sum()
    without = np.where(weights > SMALL, weights, 0.0)
    without = without / without.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        if descent_of(without)[0].max() - 1 <= 2 * TOLERANCE:
            weights = without
    return Likelihood(weights, float(loss(weights)), float(descent_of(weights)[0].max() - 1))
