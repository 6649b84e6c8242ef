"""Mixing weights against closed forms, cvxpy and their own certificate."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import rel_entr
from scripts import REPOSITORY, benchmark
from strategies import SEEDS

from lib.simplex_qp import (
    SolverError,
    frank_wolfe_gap,
    from_gram,
    from_means,
    make_problem,
    objective,
    solve,
    solve_batch,
    solve_with_cvxpy,
)
from lib.simplex_qp import _active_set as active_set


def random_means(seed, n, dimension, *, noise=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimension)), noise * rng.normal(size=dimension), rng


def certified(problem, solution, tolerance=1e-14):
    """Asserts feasibility to the bit and a gap, the stored and a plain one, of rounding error."""
    w, (lower, upper) = solution.weights, problem.bounds
    assert w.dtype == np.float64
    assert not np.signbit(w).any()
    assert (w >= lower).all()
    assert (w <= upper).all()
    assert abs(math.fsum(w) - 1) <= 2.3e-16
    np.testing.assert_array_equal(w[solution.active == -1], lower[solution.active == -1])
    np.testing.assert_array_equal(w[solution.active == 1], upper[solution.active == 1])
    scale = max(problem.scale, problem.kl_penalty)
    assert 0 <= solution.gap <= tolerance * scale
    assert 0 <= frank_wolfe_gap(problem, w) <= 2 * tolerance * scale
    if problem.program.upper is None and not problem.kl_penalty:
        gradient = 2 * (problem.hessian @ w - problem.linear)
        assert gradient @ w - gradient.min() <= 2 * tolerance * scale
    return solution


@pytest.mark.parametrize(
    ("kind", "n"),
    [("mixture", 3), ("shifted", 10), ("domain", 50), ("mixture", 50), ("shifted", 200)],
)
def test_gap_is_rounding_error_on_the_reference_problems(kind, n):
    made = benchmark("mixing").make_domains(0, n, kind=kind, rows=400 if n <= 50 else 100)
    problem = make_problem(from_means(made.means, made.target_mean), ridge=1e-5)
    solution = certified(problem, solve(problem))
    assert solution.condition == pytest.approx(np.linalg.cond(problem.hessian), rel=1e-3)
    if n <= 50:
        other = solve_with_cvxpy(problem, solver="CLARABEL")
        assert -1e-13 * problem.scale <= other.objective - solution.objective <= other.gap
        assert other.gap < 1e-6 * problem.scale


def test_the_diagonal_of_an_indefinite_gram_matrix_is_shifted():
    """By what is missing after ridge and L2 penalty; MMD^2 stays that of the matrix."""
    means, target, rng = random_means(0, 8, 3)
    gram, cross = means @ means.T - np.diag(rng.uniform(0, 1, 8)), means @ target
    quadratic = from_gram(gram, cross, float(target @ target))
    centered = gram - cross[:, None] - cross + target @ target
    least = np.linalg.eigvalsh(centered)[0]
    assert least < -0.1
    penalties = {"ridge": 0.01, "l2_penalty": 0.02, "prior": np.full(8, 1 / 8)}
    for options, diagonal in (({}, 0), (penalties, 0.03)):
        problem = make_problem(quadratic, **options)
        solution = certified(problem, solve(problem))
        assert solution.diagonal_shift == problem.diagonal_shift
        assert problem.diagonal_shift == pytest.approx(-least - diagonal, rel=1e-12)
        w = solution.weights
        assert solution.mmd_squared == pytest.approx(w @ centered @ w, rel=1e-10)
        assert np.linalg.eigvalsh(problem.hessian)[0] >= -1e-14
        random = rng.dirichlet(np.ones(8), 100)
        assert min(objective(problem, v) for v in random) > solution.objective
    assert make_problem(quadratic, ridge=1.0).diagonal_shift == 0


def test_rounding_needs_no_shift():
    means, target, _ = random_means(0, 30, 3)
    problem = make_problem(from_gram(means @ means.T, means @ target, float(target @ target)))
    assert (problem.diagonal_shift, problem.condition) == (0, np.inf)
    certified(problem, solve(problem))


# Degenerate problems


@pytest.mark.parametrize("n", [2, 7, 60])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("kind", ["equal", "target", "duplicates", "ties", "wide", "scales"])
def test_degenerate_problems_without_ridge(n, bounded, kind):
    means, target, rng = random_means(1, n, 5)
    if kind == "equal":  # all domains are the target: everything is optimal
        means = np.repeat(target[None], n, axis=0)
    elif kind == "target":
        means[-1] = target
    elif kind == "duplicates":
        means = np.repeat(means[: (n + 1) // 2], 2, axis=0)[:n]
    elif kind == "ties":
        means, target = np.eye(n), np.zeros(n)
    elif kind == "wide":
        target = rng.dirichlet(np.ones(n)) @ means
    elif kind == "scales":
        means = means * 10.0 ** rng.uniform(-6, 3, size=(n, 1))
    problem = make_problem(from_means(means, target), upper=2 / n if bounded else None)
    solution = certified(problem, solve(problem))
    if kind == "ties":
        np.testing.assert_allclose(solution.weights, 1 / n, rtol=0, atol=1e-15)
    if kind in ("equal", "target", "wide") and not bounded:
        assert solution.mmd_squared < 1e-20
    if kind == "target" and not bounded and n <= 5:
        assert solution.weights[-1] == pytest.approx(1)


@pytest.mark.parametrize("total", ["lower", "upper"])
def test_bounds_that_leave_one_point(total):
    means, target, rng = random_means(0, 10, 4)
    point = rng.dirichlet(np.ones(10))
    for bound in (point, point.astype("f").astype(float)):
        problem = make_problem(from_means(means, target), **{total: bound})
        solution = certified(problem, solve(problem))
        np.testing.assert_allclose(solution.weights, point, rtol=1e-6)
    assert solve(make_problem(from_means(means, target), upper=0.1)).gap == 0
    many = make_problem(from_means(np.tile(means, (12, 1)), target), **{total: 1 / 120})
    assert math.fsum(solve(many).weights) == 1


def test_a_sum_is_mended_within_the_bounds():
    """Where all room left is less than the rounding error of the sum."""
    x = np.append(np.full(10, 0.1), 8e-17)
    mended = active_set.mend_sum(x, np.zeros(11), np.full(11, 0.1), 1.0)
    np.testing.assert_array_equal(mended, np.append(np.full(10, 0.1), 0))


@pytest.mark.parametrize("slack", [0.0, 1e-15, 1e-13, 1e-11, 1e-7])
def test_caps_that_hardly_leave_room(slack):
    """All or half of the domains at their upper: bounds are kept to the bit, whatever rounds."""
    for seed in range(15):
        n = [6, 25, 60][seed % 3]
        means, target, _ = random_means(
            seed, n, [1, 2, 40][seed // 3 % 3], noise=[0.0, 3.0][seed % 2]
        )
        for upper in (1 / n, 1 / (n // 2)):
            problem = make_problem(from_means(1e6 * means, 1e6 * target), upper=upper * (1 + slack))
            certified(problem, solve(problem))


def test_excluded_domains():
    """An upper bound of 0 leaves a domain out, as if it were not there."""
    means, target, rng = random_means(0, 9, 20)
    upper, prior = np.where(np.arange(9) == 4, 0.0, 1.0), rng.dirichlet(np.ones(9))
    for kl_penalty in (0.0, 0.3):
        options = {"ridge": 0.1, "kl_penalty": kl_penalty}
        problem = make_problem(from_means(means, target), prior=prior, upper=upper, **options)
        weights = certified(problem, solve(problem)).weights
        rest = np.delete(prior, 4) / (1 - prior[4])
        without = make_problem(from_means(np.delete(means, 4, 0), target), prior=rest, **options)
        assert weights[4] == 0
        assert kl_penalty or solve(problem).iterations <= solve(without).iterations + 1
        np.testing.assert_allclose(np.delete(weights, 4), solve(without).weights, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.sampled_from([2, 3, 5, 8, 20, 60]), st.sampled_from([1, 2, 5, 30]), st.booleans())
def test_wild_problems(seed, n, dimension, rounded):
    """Any scales, ties, bounds and conditioning end at rounding error."""
    means, target, rng = random_means(seed, n, dimension, noise=3.0)
    means = np.round(means) if rounded else means * 10.0 ** rng.uniform(-6, 3, size=(n, 1))
    lower = rng.dirichlet(np.ones(n)) * rng.choice([0, 0.3, 0.9]) * (rng.random(n) < 0.5)
    upper = np.maximum(lower, rng.dirichlet(np.ones(n)) * rng.choice([1.5, 4]))
    if upper.sum() < 1:
        upper = np.ones(n)
    ridge = float(rng.choice([0, 1e-12, 1e-5]))
    problem = make_problem(from_means(means, target), ridge=ridge, lower=lower, upper=upper)
    certified(problem, solve(problem))


@pytest.mark.parametrize("method", ["_follow_path", "_descend"])
def test_what_stands_behind_block_pivoting(monkeypatch, method):
    """With patience for a single failure, the path of dampings; with none, only the descent."""
    used = []
    function = getattr(active_set, method)
    monkeypatch.setattr(active_set, method, lambda *a: used.append(1) or function(*a))
    for seed in range(20):
        means, target, rng = random_means(seed, 25, 6)
        upper = np.maximum(0.08, rng.uniform(0, 0.3, 25)) if seed % 2 else None
        problem = make_problem(from_means(means, target), ridge=1e-4, upper=upper)
        with monkeypatch.context() as patch:
            patch.setattr(active_set, "PATIENCE", 1 if method == "_follow_path" else 0)
            weights = certified(problem, solve(problem)).weights
        np.testing.assert_allclose(weights, solve(problem).weights, atol=1e-9)
    assert used


def test_corrections_undo_the_damping():
    """Of a singular matrix: proximal point steps, without which the damping is in the gap."""
    means, _, rng = random_means(0, 30, 6)
    problem = make_problem(from_means(means, rng.dirichlet(np.ones(30)) @ means))
    damping = 1e-9 * problem.scale
    damped = active_set.minimize(problem.program, damping=damping, corrections=0)
    corrected = active_set.minimize(problem.program, damping=damping)
    assert damped.gap > 1e-12 * problem.scale
    assert corrected.gap < 1e-15 * problem.scale
    assert corrected.iterations > damped.iterations


@pytest.mark.parametrize("upper", [None, 0.5])
def test_rubbish_from_a_nearly_singular_system_is_made_feasible(upper):
    """Or its gap, which is that of feasible weights, would mean nothing."""
    problem = make_problem(from_means(np.eye(4), np.zeros(4)), upper=upper)
    y = np.array([3.0, -7.0, 2.0, 1e9, 1.0])
    weights = active_set._within(problem.program, y, np.zeros(5, np.int8))[:-1]
    assert math.fsum(weights) == 1
    assert frank_wolfe_gap(problem, weights) > 0.1
    assert weights.min() == 0


# Penalties towards a prior


@pytest.mark.parametrize("kl_penalty", [1e-8, 1e-3, 1.0, 100.0])
def test_kl_penalty_of_two_domains(kl_penalty):
    """Against the root of the derivative on the line, to a weight of any size."""
    means, target, prior = np.array([[0.0], [1.0]]), np.array([0.9]), np.array([0.7, 0.3])
    problem = make_problem(from_means(means, target), prior=prior, kl_penalty=kl_penalty)

    def derivative(log_odds):
        t = 1 / (1 + math.exp(-log_odds))
        return 2 * (t - 0.9) + kl_penalty * (log_odds - math.log(0.3 / 0.7))

    expected = 1 / (1 + math.exp(-brentq(derivative, -50, 50, xtol=1e-14)))
    solution = certified(problem, solve(problem))
    np.testing.assert_allclose(solution.weights, [1 - expected, expected], rtol=1e-9)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("kl_penalty", [1e-4, 0.1, 10.0])
def test_kl_penalty_agrees_with_cvxpy(kl_penalty, bounded):
    means, target, rng = random_means(0, 12, 30)
    prior = rng.dirichlet(np.ones(12))
    prior[3] = 0
    prior /= prior.sum()
    bounds = {"lower": 0.4 * prior, "upper": np.minimum(2 * prior, 1)} if bounded else {}
    problem = make_problem(
        from_means(means, target), prior=prior, kl_penalty=kl_penalty, l2_penalty=0.1, **bounds
    )
    solution = certified(problem, solve(problem))
    assert solution.weights[3] == 0
    other = solve_with_cvxpy(problem, solver="CLARABEL")
    assert 0 <= other.objective - solution.objective + 1e-12 <= other.gap + 1e-12
    assert other.gap < 1e-5 * max(problem.scale, kl_penalty)
    penalty = kl_penalty * rel_entr(solution.weights, prior).sum()
    penalty += 0.1 * np.square(solution.weights - prior).sum()
    assert solution.objective == pytest.approx(solution.mmd_squared + penalty, rel=1e-12)


def test_kl_penalty_alone_returns_the_prior():
    prior = np.random.default_rng(0).dirichlet(np.full(20, 0.1))
    problem = make_problem(from_means(np.zeros((20, 2)), np.zeros(2)), prior=prior, kl_penalty=1.0)
    np.testing.assert_allclose(solve(problem).weights, prior, rtol=1e-12, atol=1e-300)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([2, 5, 20]), st.floats(-9, 1), st.booleans())
def test_kl_penalties_of_any_strength(seed, n, exponent, bounded):
    """Priors down to 1e-20 and strengths at which weights underflow end at rounding error too."""
    means, target, rng = random_means(seed, n, 4)
    prior = rng.dirichlet(np.full(n, rng.choice([0.1, 1, 10])))
    bounds = {"lower": 0.3 * prior * (rng.random(n) < 0.5), "upper": 3 * prior} if bounded else {}
    problem = make_problem(
        from_means(means, target), prior=prior, kl_penalty=10.0**exponent, **bounds
    )
    certified(problem, solve(problem))


def test_batch_equals_single():
    """Of problems that differ in all but N, from a generator."""
    problems = []
    for seed in range(7):
        means, target, rng = random_means(seed, 12, 6)
        options = [{}, {"upper": 0.2}, {"prior": rng.dirichlet(np.ones(12)), "l2_penalty": 0.3}]
        problems.append(make_problem(from_means(means, target), ridge=1e-3, **options[seed % 3]))
    expected = [solve(problem).weights for problem in problems]
    solutions = solve_batch(problem for problem in problems)
    for problem, solution, weights in zip(problems, solutions, expected, strict=True):
        certified(problem, solution)
        np.testing.assert_allclose(solution.weights, weights, atol=1e-13)
    assert solve_batch([]) == []
    prior = np.full(12, 1 / 12)
    entropic = make_problem(problems[0].quadratic, prior=prior, kl_penalty=0.1)
    both = solve_batch([problems[0], entropic])
    np.testing.assert_array_equal(both[1].weights, solve(entropic).weights)
    with pytest.raises(ValueError, match="one N, got 12 and 1"):
        solve_batch([problems[0], make_problem(from_means(np.ones((1, 2)), np.ones(2)))])


def test_cvxpy_failures_are_errors(monkeypatch):
    import cvxpy

    problem = make_problem(from_means(np.eye(3), np.zeros(3)))
    with pytest.raises(SolverError, match=r"no solver 'NONE' here; it has .*CLARABEL"):
        solve_with_cvxpy(problem, solver="NONE")
    with monkeypatch.context() as patch:
        patch.setattr(cvxpy.Problem, "status", "optimal_inaccurate")
        with pytest.raises(SolverError, match="OSQP ended with the status optimal_inaccurate"):
            solve_with_cvxpy(problem, solver="OSQP")

    def fail(*arguments, **options):
        raise cvxpy.error.SolverError("it broke")

    with monkeypatch.context() as patch:
        patch.setattr(cvxpy.Problem, "solve", fail)
        with pytest.raises(SolverError, match="OSQP failed: it broke"):
            solve_with_cvxpy(problem, solver="OSQP")
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(SolverError, match="need cvxpy: pip install cvxpy"):
        solve_with_cvxpy(problem)


QUADRATIC = from_means(np.eye(3), np.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_means(np.ones((3, 2)), np.ones(3)), r"\[N, D\] .* \(3, 2\) and \(3,\)"),
        (lambda: from_means(np.ones((0, 2)), np.ones(2)), r"got \(0, 2\)"),
        (lambda: from_means(np.array([[0.0], [np.nan]]), np.ones(1)), r"means .* nan at \[1, 0\]"),
        (lambda: from_means(np.ones((2, 1)), np.array([np.inf])), r"target's mean .* inf at \[0\]"),
        (lambda: from_gram(np.ones((2, 3)), np.ones(2), 1.0), r"square, got shape \(2, 3\)"),
        (lambda: from_gram(np.eye(2), np.ones(3), 1.0), r"\[2\] .* got \(3,\)"),
        (lambda: from_gram(np.triu(np.ones((2, 2))), np.ones(2), 1.0), r"1.0 at \(0, 1\) but 0"),
        (lambda: from_gram(np.full((2, 2), np.nan), np.ones(2), 1.0), "Gram matrix must be finite"),
        (lambda: from_gram(np.eye(2), np.ones(2), math.nan), "target's square must be finite"),
        (lambda: make_problem(QUADRATIC, ridge=-1e-9), r"ridge must lie in \[0, inf\), got -1e-09"),
        (lambda: make_problem(QUADRATIC, ridge=math.nan), "ridge must lie"),
        (lambda: make_problem(QUADRATIC, l2_penalty=-1.0), "l2_penalty must lie"),
        (lambda: make_problem(QUADRATIC, kl_penalty=math.inf), "kl_penalty must lie"),
        (lambda: make_problem(QUADRATIC, kl_penalty=1.0), "need a prior"),
        (lambda: make_problem(QUADRATIC, lower=0.4), r"the lower bounds \(floors\) sum to 1.2"),
        (lambda: make_problem(QUADRATIC, upper=0.3), r"the upper bounds \(caps\) sum to 0.89"),
        (lambda: make_problem(QUADRATIC, lower=0.3, upper=np.array([1, 0.2, 1.0])),
         "lower bound of domain 1 is above its upper one: 0.3 > 0.2"),
        (lambda: make_problem(QUADRATIC, lower=-0.1), "lower bounds must not be .* got -0.1"),
        (lambda: make_problem(QUADRATIC, upper=np.array([1, np.nan, 1])), "upper .* got nan"),
        (lambda: from_gram(np.eye(2), np.zeros(2), 1.7e308), "distances .* overflow"),
        (lambda: make_problem(QUADRATIC, upper=np.ones(2)), r"must be a number or \[3\]"),
        (lambda: make_problem(QUADRATIC, prior=np.ones(3) / 2), "prior must sum to 1, got 1.5"),
        (lambda: make_problem(QUADRATIC, prior=np.array([1.5, -0.5, 0])), "1 is negative: -0.5"),
        (lambda: make_problem(QUADRATIC, prior=np.ones(2) / 2), r"prior must be \[3\]"),
        (lambda: make_problem(QUADRATIC, prior=np.array([0.5, 0.5, 0]), kl_penalty=1.0, lower=0.1),
         "domain 2 has a lower bound of 0.1 but, with kl_penalty, a prior of 0"),
        (lambda: solve(make_problem(QUADRATIC), start=np.ones(2)), r"start must be \[3\]"),
        (lambda: frank_wolfe_gap(make_problem(QUADRATIC), np.ones(3)), "miss their sum .* by 2"),
    ],
)  # fmt: skip
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_import_is_silent_and_switches_nothing():
    code = (
        "import lib.simplex_qp, jax, sys;"
        "assert not jax.config.jax_enable_x64 and 'cvxpy' not in sys.modules"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning:lib", "-c"]
    done = subprocess.run(
        [*command, code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
