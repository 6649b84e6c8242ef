"""Convex quadratics with a Kullback-Leibler penalty, over a box cut by a sum.

    min_w  w'Hw - 2c'w + strength sum_i w_i log(w_i / p_i)
    over   {w : lower <= w <= upper, sum w = 1},  p > 0

by proximal Newton steps: each minimizes the quadratic model of the whole under the same
constraints with the active sets of `lib.simplex_qp`, and is shortened until the value falls.

The certificate linearizes only the quadratic and keeps the penalty: with g its gradient at w, by
convexity no feasible v has a lower value than

    q(w) + min_v g . (v - w) + strength sum_i v_i log(v_i / p_i),

and this minimum has a closed form, v_i = p_i exp((t - g_i) / strength) clipped to the bounds, with
t such that the sum is 1. It is the gap of generalized conditional gradients (Bredies, Lorenz and
Maass, A generalized conditional gradient method and its connection to an iterative shrinkage
method, Computational Optimization and Applications 42, 2009): finite where a weight has
underflowed, at most the Frank-Wolfe gap, and 0 only at the minimum.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import kl_div, rel_entr

from lib.simplex_qp._active_set import (
    ROUNDING,
    Minimum,
    Vector,
    bound_states,
    free_entries,
    make_program,
    mend_sum,
    minimize,
)

MAX_STEPS = 100
# A step takes no weight below this share of itself: at 0 the penalty has no quadratic model.
SMALLEST_SHARE = 1e-2
TINY = 1e-200


def entropic_minimum(
    slope: Vector, prior: Vector, strength: float, lower: Vector, upper: Vector
) -> tuple[Vector, float]:
    """argmin_v slope . v + strength sum_i v_i log(v_i / p_i) and the t of the module's formula."""
    upper = np.minimum(upper, 1)
    exponents = np.log(prior) - slope / strength
    with np.errstate(divide="ignore"):
        bounds = np.log(lower), np.log(upper)
    free, full = free_entries(exponents, *bounds, lambda x: np.exp(x).sum() - 1)
    v = np.where(full, upper, lower)
    if not free.any():
        return v, 0.0
    # What the others leave is shared in proportion to exp(exponents), in units of `strength`.
    left, highest = max(1 - v[~free].sum(), TINY), exponents[free].max()
    shares = np.exp(exponents[free] - highest)
    v[free] = np.clip(left * shares / shares.sum(), lower[free], upper[free])
    return v, strength * float(np.log(left / shares.sum()) - highest)


def entropic_gap(
    w: Vector, slope: Vector, prior: Vector, strength: float, lower: Vector, upper: Vector
) -> float:
    """The certificate of the module for feasible `w`, of which `slope` is the quadratic's gradient.

    Summed over entries none of which is negative, whatever t: by duality any t gives a bound.
    """
    v, t = entropic_minimum(slope, prior, strength, lower, upper)
    inside = (lower < v) & (v < upper)
    # strength (w log(w / v) - w + v), with log v as it is before it underflows
    free = rel_entr(w, prior) + w * (slope - t) / strength - w + v
    held = (slope - t) / strength * (w - v) + v - w + rel_entr(w, prior) - rel_entr(v, prior)
    return float(strength * np.where(inside, free, held).clip(0).sum())


def minimize_entropic(
    hessian: Float[np.ndarray, "n n"],
    linear: Vector,
    prior: Vector,
    strength: float,
    lower: Vector,
    upper: Vector,
) -> Minimum:
    """Solves the program of the module: H positive semidefinite, `prior` and `strength` positive,
    the feasible set not empty. Ends where the gap is rounding error or no longer falls.
    """
    scale = max(float(hessian.diagonal().max()), strength)

    def certified(w):
        slope = 2 * (hessian.dot(w) - linear)
        return w, slope, entropic_gap(w, slope, prior, strength, lower, upper)

    start, _ = entropic_minimum(np.zeros_like(linear), prior, 1.0, lower, upper)
    w, slope, gap = certified(np.maximum(start, TINY))
    iterations = 0
    for _ in range(MAX_STEPS):
        settled = gap <= ROUNDING * scale
        logarithm = np.log(w / prior)
        model = hessian.copy()
        model.flat[:: len(w) + 1] += strength / (2 * w)
        bounds = np.maximum(lower, SMALLEST_SHARE * w), upper
        program = make_program(model, linear - 0.5 * strength * logarithm, bounds, scale=scale)
        model_minimum = minimize(program, corrections=1)
        iterations += model_minimum.iterations
        if settled:
            # A gap of eps leaves weights to sqrt(eps), which one step more squares.
            last = certified(model_minimum.x)
            if last[2] <= ROUNDING * scale:
                w, slope, gap = last
            break
        step = model_minimum.x - w
        # Less its mean, as the step sums to 0 up to rounding.
        gradient = slope + strength * logarithm
        fall = (gradient - gradient.dot(w)).dot(step)
        bend = step.dot(hessian.dot(step))
        for length in 0.5 ** np.arange(30):
            new = certified(np.clip(model_minimum.x - (1 - length) * step, lower, upper))
            change = length * fall + length**2 * bend + strength * kl_div(new[0], w).sum()
            # Where values differ only by rounding error the gap still tells progress.
            if new[2] < 0.5 * gap or change < 1e-4 * length * fall < 0:
                w, slope, gap = new
                break
        else:
            break
    w = mend_sum(w, lower, upper, 1.0)
    # A weight that underflows to 0 is free.
    state = bound_states(w, np.where(lower > 0, lower, -np.inf), upper)
    return Minimum(w, state, gap, iterations)
