"""Convex quadratic programs over the simplex: the mixing problem and its certified solution.

    min_w  w' A w - 2 b' w  +  a penalty towards a prior,   w >= 0, sum w = 1, bounds

is solved to rounding error; the result says how far above the minimum it can be at most.
"""

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
