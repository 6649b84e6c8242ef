"""What the tests of mixing weights hold results to: weights by cvxpy."""

import cvxpy


def cvxpy_weights(quadratic, linear, *, constraints=lambda w: (), extra=lambda w: 0):
    """argmin w'Aw - 2 b'w + extra over the simplex, by Clarabel to 1e-12."""
    w = cvxpy.Variable(len(linear))
    value = cvxpy.quad_form(w, cvxpy.psd_wrap(quadratic)) - 2 * linear @ w + extra(w)
    program = cvxpy.Problem(cvxpy.Minimize(value), [cvxpy.sum(w) == 1, w >= 0, *constraints(w)])
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    program.solve(solver=cvxpy.CLARABEL, **tight)
    assert program.status == cvxpy.OPTIMAL
    return w.value
