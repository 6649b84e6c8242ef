"""Convex quadratic programs over the simplex: the mixing problem and its certified solution."""

from lib.simplex_qp._problem import (
    Problem,
    Quadratic,
    domains_kept,
    frank_wolfe_gap,
    from_gram,
    from_means,
    make_problem,
    mmd_squared,
    nearest_weights,
    objective,
    penalties,
)
from lib.simplex_qp._solve import Solution, SolverError, solve, solve_batch, solve_with_cvxpy
