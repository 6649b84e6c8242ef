"""Solves for mixing weights: convex quadratic programs over the simplex, with a certificate.

    problem = make_problem(from_means(means, target_mean), ridge=1e-5)
    solution = solve(problem)

The engine is `_active_set`, in float64, which ends at rounding error.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int8

from lib.simplex_qp._active_set import AT_LOWER, DAMPING, Minimum, bound_states, minimize
from lib.simplex_qp._entropic import minimize_entropic
from lib.simplex_qp._problem import (
    Problem,
    domains_kept,
    frank_wolfe_gap,
    mmd_squared,
    nearest_weights,
    penalties,
)

# Above this condition number the active sets damp the matrix and correct for it.
WORST_CONDITION = 1e12


class Solution(NamedTuple):
    """What `solve` returns.

    weights [N]    never negative, exactly on the bounds that `active` says, of sum 1
    objective      the value there, with ridge, diagonal shift and penalties
    mmd_squared    only |sum_i w_i mu_i - mu_Q|^2; from a Gram matrix w'Gw, of any sign
    gap            the certificate: at most so much above the minimum
    condition      of the centered matrix with ridge, shift and L2 penalty on its diagonal
    active [N]     -1 at the lower bound, 0 free, 1 at the upper one
    diagonal_shift the multiple of the identity that convexity wanted, mostly 0
    iterations     linear systems that the active sets solved
    """

    weights: Float[np.ndarray, " n"]
    objective: float
    mmd_squared: float
    gap: float
    condition: float
    active: Int8[np.ndarray, " n"]
    diagonal_shift: float
    iterations: int


def solve(problem: Problem, *, start: ArrayLike | None = None) -> Solution:
    """The weights of least objective, with their certificate.

    `start` [N] are weights to begin at, such as the solution of a similar problem; only which of
    them lie off their bounds counts. Problems with kl_penalty begin at the prior.
    """
    if problem.kl_penalty:
        kept, penalty = domains_kept(problem)
        hessian = problem.hessian[np.ix_(kept, kept)]
        minimum = minimize_entropic(hessian, problem.linear[kept], *penalty)
        # The domains that can have no weight come back with a weight of 0.
        weights, state = np.zeros(problem.size), np.full(problem.size, AT_LOWER, np.int8)
        weights[kept], state[kept] = minimum.x, minimum.state
        return _solution(problem, minimum._replace(x=weights, state=state))
    if start is not None:
        start = np.asarray(start, np.float64)
        if start.shape != (problem.size,):
            raise ValueError(f"start must be [{problem.size}], got shape {start.shape}")
    damping = 0.0 if problem.condition < WORST_CONDITION else DAMPING * problem.scale
    return _solution(problem, minimize(problem.program, start=start, damping=damping))


def solve_batch(problems: Iterable[Problem]) -> list[Solution]:
    """`solve` for similar problems of the same N, such as bootstrap replicates: each begins at the
    solution of the one before. Problems of a generator are made one at a time. Raises ValueError
    where N differs."""
    solutions: list[Solution] = []
    for problem in problems:
        start = solutions[-1].weights if solutions else None
        if start is not None and len(start) != problem.size:
            sizes = f"{len(start)} and {problem.size}"
            raise ValueError(f"the problems of a batch must have one N, got {sizes}")
        solutions.append(solve(problem, start=start))
    return solutions


def _solution(problem, minimum):
    weights, active, gap, iterations = minimum
    distance = mmd_squared(problem, weights)
    value, shift = distance + penalties(problem, weights), problem.diagonal_shift
    return Solution(weights, value, distance, gap, problem.condition, active, shift, iterations)


# Another solver


class SolverError(ValueError):
    """Another solver failed; the message names it and what it said."""


def solve_with_cvxpy(problem: Problem, *, solver: str | None = None) -> Solution:
    """The same problem through cvxpy, by `solver` (a name of cvxpy's; its own choice by default).

    Its weights are made feasible (`nearest_weights`) and get the same certificate. Raises
    SolverError without cvxpy, and where it does not know the solver or its status is anything but
    optimal.
    """
    try:
        import cvxpy
    except ImportError as error:
        raise SolverError("other solvers need cvxpy: pip install cvxpy") from error
    if solver is not None and solver not in cvxpy.installed_solvers():
        known = ", ".join(cvxpy.installed_solvers())
        raise SolverError(f"cvxpy has no solver {solver!r} here; it has {known}")
    lower, upper = problem.bounds
    bounded = np.flatnonzero(np.isfinite(upper))
    w = cvxpy.Variable(problem.size)
    # In units of the scale, since solvers have absolute tolerances.
    value = cvxpy.quad_form(w, cvxpy.psd_wrap(problem.hessian / problem.scale))
    value -= 2 / problem.scale * (problem.linear @ w)
    if problem.kl_penalty:
        kept, (prior, *_) = domains_kept(problem)
        divergence = cvxpy.sum(cvxpy.kl_div(w[kept], prior))
        value += problem.kl_penalty / problem.scale * divergence
    constraints = [cvxpy.sum(w) == 1, w >= lower, w[bounded] <= upper[bounded]]
    program = cvxpy.Problem(cvxpy.Minimize(value), constraints)
    name = solver or "cvxpy's own choice"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
        try:
            program.solve(solver=solver)
        except cvxpy.error.SolverError as error:
            raise SolverError(f"{name} failed: {error}") from error
    if program.status != cvxpy.OPTIMAL:
        raise SolverError(f"{name} ended with the status {program.status}")
    assert w.value is not None  # it is optimal
    weights = nearest_weights(problem, w.value)
    state, gap = bound_states(weights, lower, upper), frank_wolfe_gap(problem, weights)
    return _solution(problem, Minimum(weights, state, gap, 0))
