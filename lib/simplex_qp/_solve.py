"""Solves for mixing weights: convex quadratic programs over the simplex, with a certificate.

    problem = make_problem(from_means(means, target_mean), ridge=1e-5)
    solution = solve(problem)

The engine is jaxopt's accelerated projected gradient with step 1/L, then active sets in float64,
which end at rounding error. Of the first it is only asked to be right
about most of the support. It costs a dispatch and, for each N, a compilation: below `FIRST_PHASE`
domains a single problem goes without. Bootstrap replicates share one vmap of it.
"""

import functools
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int8

from lib.simplex_qp._active_set import AT_LOWER, AT_UPPER, DAMPING, FREE, Minimum, minimize
from lib.simplex_qp._entropic import minimize_entropic
from lib.simplex_qp._problem import (
    Problem,
    domains_kept,
    frank_wolfe_gap,
    mmd_squared,
    nearest_weights,
    penalties,
)

# From this many domains on, a single problem starts with projected gradient steps.
FIRST_PHASE = 200
# More steps cost as much as the pivots they save, from N = 150 to 1000; they end before where the
# weights move by less.
GRADIENT_STEPS, SMALLEST_MOVE = 20, 1e-4
# Matrices of a batch that are on the device at a time.
BATCH_BYTES = 2**28
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
    them lie off their bounds counts. Without it, `FIRST_PHASE` or more domains begin with projected
    gradient steps. Problems with kl_penalty begin at the prior.
    """
    if problem.kl_penalty:
        return _solution(problem, _minimize_with_kl_penalty(problem))
    if start is None and problem.size >= FIRST_PHASE:
        start = projected_gradient([problem])[0]
    elif start is not None:
        start = np.asarray(start, np.float64)
        if start.shape != (problem.size,):
            raise ValueError(f"start must be [{problem.size}], got shape {start.shape}")
    damping = 0.0 if problem.condition < WORST_CONDITION else DAMPING * problem.scale
    return _solution(problem, minimize(problem.program, start=start, damping=damping))


def solve_batch(problems: Iterable[Problem]) -> list[Solution]:
    """`solve` for problems of the same N, with one vmap of the projected gradient over them.

    On the device lie `BATCH_BYTES` of matrices at a time, and problems from a generator are made no
    sooner. Those with kl_penalty are solved one by one. Raises ValueError where N differs.
    """
    problems, solutions = iter(problems), []
    for first in problems:
        size = max(1, BATCH_BYTES // first.quadratic.gram.nbytes)
        chunk = [first, *islice(problems, size - 1)]
        sizes = sorted({problem.size for problem in chunk})
        if len(sizes) > 1:
            raise ValueError(f"the problems of a batch must have one N, got {sizes}")
        if any(problem.kl_penalty for problem in chunk):
            solutions += [solve(problem) for problem in chunk]
            continue
        # The last chunk is filled up to the size of those before it, whose program serves again.
        filling = [first] * (size - len(chunk) if solutions else 0)
        for problem, start in zip(chunk, projected_gradient(chunk + filling)):
            solutions.append(solve(problem, start=start))
    return solutions


def _minimize_with_kl_penalty(problem):
    """Domains that can have no weight are left out, and come back with a weight of 0."""
    kept = domains_kept(problem)
    lower, upper = problem.bounds
    minimum = minimize_entropic(
        problem.hessian[np.ix_(kept, kept)],
        problem.linear[kept],
        problem.prior[kept],
        problem.kl_penalty,
        lower[kept],
        upper[kept],
    )
    weights, state = np.zeros(problem.size), np.full(problem.size, AT_LOWER, np.int8)
    weights[kept], state[kept] = minimum.x, minimum.state
    return minimum._replace(x=weights, state=state)


def _solution(problem, minimum):
    weights = minimum.x
    distance = mmd_squared(problem, weights)
    return Solution(
        weights,
        distance + penalties(problem, weights),
        distance,
        minimum.gap,
        problem.condition,
        minimum.state,
        problem.diagonal_shift,
        minimum.iterations,
    )


# Projected gradient


def projected_gradient(problems: Sequence[Problem]) -> Float[np.ndarray, "b n"]:
    """Weights [B, N] after jaxopt's accelerated projected gradient, one vmap over the problems.

    At most `GRADIENT_STEPS` steps of 1/L, L = 2 * 1.02 * largest eigenvalue of H, from equal
    weights; kl_penalty is left out. Not a solution, but a start whose support is nearly right.
    """
    n, factors = problems[0].size, [problem.quadratic.factor for problem in problems]
    narrow = [factor for factor in factors if factor is not None and 2 * factor.shape[1] < n]
    factored = len(narrow) == len(problems)
    # In units in which 1/L is 1: the step must be a constant of the compiled program.
    unit = 1 / (1.02 * np.array([problem.largest_eigenvalue or 1.0 for problem in problems]))
    if factored:
        form = np.stack(narrow) * np.sqrt(unit)[:, None, None]
        diagonal = unit * [problem.ridge + problem.l2_penalty for problem in problems]
    else:
        form = np.stack([problem.hessian for problem in problems]) * unit[:, None, None]
        diagonal = np.zeros(len(problems))
    linear = np.stack([problem.linear for problem in problems]) * unit[:, None]
    bounds = tuple(map(np.stack, zip(*[problem.bounds for problem in problems])))
    with jax.enable_x64(True):
        run = _gradient_engine(factored)
        return np.asarray(run(np.full_like(linear, 1 / n), bounds, form, diagonal, linear))


@functools.cache
def _gradient_engine(factored):
    """The compiled run on H - diagonal as it is [B, N, N] or by its factor [B, N, D]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        import jaxopt

    def value_and_gradient(w, form, diagonal, linear):
        product = form @ (w @ form) if factored else form @ w
        gradient = product + diagonal * w - linear
        return 0.5 * w @ (gradient - linear), gradient

    solver = jaxopt.ProjectedGradient(
        value_and_gradient,
        _project_onto_simplex,
        value_and_grad=True,
        stepsize=1.0,  # the line search stalls, and under vmap does not end
        maxiter=GRADIENT_STEPS,
        tol=SMALLEST_MOVE,
        implicit_diff=False,
        unroll=False,
    )
    return jax.jit(jax.vmap(lambda *arguments: solver.run(*arguments).params))


def _project_onto_simplex(y, bounds):
    """`_active_set.project_onto_simplex` in JAX, with sum 1."""
    lower, upper = bounds
    low = jnp.min(lower - y)
    high = jnp.max(jnp.minimum(upper, lower + 1 - jnp.sum(lower)) - y)

    def unfinished(state):
        evaluations, _, _, _, converged = state
        return ~converged & (evaluations < 60)

    def newton(state):
        evaluations, shift, low, high, _ = state
        shifted = y + shift
        missing = 1 - jnp.sum(jnp.clip(shifted, lower, upper))
        inside = jnp.sum((lower < shifted) & (shifted < upper))
        converged = jnp.abs(missing) <= 1e-14
        low, high = jnp.where(missing > 0, shift, low), jnp.where(missing > 0, high, shift)
        new = shift + missing / jnp.maximum(inside, 1)
        # Strictly between the ends: Newton can go to and fro between two.
        new = jnp.where((inside > 0) & (low < new) & (new < high), new, (low + high) / 2)
        return evaluations + 1, jnp.where(converged, shift, new), low, high, converged

    center = jnp.clip((1 - jnp.sum(y)) / y.size, low, high)
    shift = lax.while_loop(unfinished, newton, (0, center, low, high, False))[1]
    return jnp.clip(y + shift, lower, upper)


# Another solver


class SolverError(ValueError):
    """Another solver failed; the message names it and what it said."""


def solve_with_cvxpy(problem: Problem, *, solver: str | None = None) -> Solution:
    """The same problem through cvxpy, by `solver` (a name of cvxpy's; its own choice by default).

    Its weights are made feasible (`nearest_weights`) and get the same certificate. Raises
    ImportError without cvxpy, and SolverError where cvxpy does not know the solver or its status is
    anything but optimal.
    """
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError("solve_with_cvxpy needs cvxpy: pip install cvxpy") from error
    if solver is not None and solver not in cvxpy.installed_solvers():
        raise SolverError(
            f"cvxpy has no solver {solver!r} here; it has {', '.join(cvxpy.installed_solvers())}"
        )
    lower, upper = problem.bounds
    bounded = np.flatnonzero(np.isfinite(upper))
    w = cvxpy.Variable(problem.size)
    # In units of the scale, since solvers have absolute tolerances.
    value = cvxpy.quad_form(w, cvxpy.psd_wrap(problem.hessian / problem.scale))
    value -= 2 / problem.scale * (problem.linear @ w)
    if problem.kl_penalty:
        assert problem.prior is not None  # `make_problem` refuses kl_penalty without
        kept = domains_kept(problem)
        divergence = cvxpy.sum(cvxpy.kl_div(w[kept], problem.prior[kept]))
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
    state = np.where(weights <= lower, AT_LOWER, np.where(weights >= upper, AT_UPPER, FREE))
    gap = frank_wolfe_gap(problem, weights)
    return _solution(problem, Minimum(weights, state.astype(np.int8), gap, 0))
