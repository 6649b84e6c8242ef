"""Properties of the mixing weights' problem and its solvers, over scales, copies and bounds.

Everything is float64. Programs of up to four unknowns are solved by enumeration and by drawing;
a value is off by as many eps as it has terms, of their magnitudes.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from strategies import EXPONENTS, SEEDS, assert_within

from lib.simplex_qp import (
    domains_kept,
    frank_wolfe_gap,
    from_gram,
    from_means,
    make_problem,
    mmd_squared,
    nearest_weights,
    objective,
    penalties,
    projected_gradient,
    solve,
    solve_batch,
    solve_with_cvxpy,
)
from lib.simplex_qp._active_set import (
    AT_LOWER,
    AT_UPPER,
    free_entries,
    linear_gap,
    make_program,
    mend_sum,
    minimize,
    project_onto_simplex,
)
from lib.simplex_qp._entropic import entropic_gap, entropic_minimum, minimize_entropic

EPS = float(np.finfo(np.float64).eps)
SIZES = st.sampled_from([1, 2, 4])
KINDS = st.sampled_from(["normal", "copies", "one point", "far"])
many = settings(max_examples=60, deadline=None)


def draw_bounds(rng, n, bounded):
    """Lower and upper bounds of [0, 1] with a feasible point; some of both are 0."""
    if not bounded:
        return np.zeros(n), np.full(n, np.inf)
    inside = rng.dirichlet(np.ones(n)) * (rng.random(n) < 0.8)
    inside = inside / inside.sum() if inside.any() else np.eye(n)[0]
    lower = inside * rng.choice([0.0, 0.5, 1.0], size=n)
    return lower, inside + (1 - inside) * rng.choice([0.0, 0.3, 1.0], size=n)


def draw_feasible(rng, lower, upper, count):
    """Feasible points, vertices among them: entries are filled in a random order."""
    points = []
    for _ in range(count):
        w, left = lower.copy(), max(1 - lower.sum(), 0)
        share = rng.choice([0.5, 1.0])
        for some in (share, 1.0):
            for i in rng.permutation(len(w)):
                step = min(some * min(upper[i] - w[i], 1), left)
                w[i], left = w[i] + step, left - step
        points.append(w)
    return points


def draw_quadratic(rng, kind, n, dimension, scale):
    """Means, target and their quadratic, of the given length."""
    means, target = rng.normal(size=(n, dimension)), rng.normal(size=dimension)
    if kind == "copies":
        means = means[rng.integers(max(1, n // 2), size=n)]
    elif kind == "one point":
        means = np.tile(target, (n, 1))
    elif kind == "far":
        means, target = means + 1e3, target + 1e3
    return scale * means, scale * target


@st.composite
def problems(draw, *, with_kl=True):
    rng, n = np.random.default_rng(draw(SEEDS)), draw(SIZES)
    scale = 10.0 ** draw(EXPONENTS)
    quadratic = from_means(
        *draw_quadratic(rng, draw(KINDS), n, draw(st.sampled_from([1, 3])), scale)
    )
    lower, upper = draw_bounds(rng, n, draw(st.booleans()))
    options = {"ridge": rng.choice([0.0, 1e-6, 1.0]) * scale**2, "lower": lower, "upper": upper}
    prior = rng.dirichlet(np.ones(n))
    if draw(st.booleans()):
        options |= {"prior": prior, "l2_penalty": 10.0 ** rng.uniform(-6, 1) * scale**2}
    if with_kl and draw(st.booleans()):
        options |= {"prior": prior, "kl_penalty": 10.0 ** rng.uniform(-4, 1) * scale**2}
    return make_problem(quadratic, **options), rng


def plain_objective(problem, w):
    """The objective by loops, and the sum of the magnitudes of its terms."""
    factor, terms = problem.quadratic.factor, []
    for column in factor.T:
        terms.append((sum(a * b for a, b in zip(w, column)) ** 2, (w @ np.abs(column)) ** 2))
    for i, weight in enumerate(w):
        terms.append(((problem.ridge + problem.diagonal_shift) * weight**2,) * 2)
        if problem.prior is not None:
            p = problem.prior[i]
            terms.append(
                (problem.l2_penalty * (weight - p) ** 2, problem.l2_penalty * (weight + p) ** 2)
            )
            entropy = float(rel_entr(weight, p)) if problem.kl_penalty else 0.0
            terms.append(
                (problem.kl_penalty * entropy, problem.kl_penalty * (abs(entropy) + weight))
            )
    return math.fsum(t for t, _ in terms), math.fsum(size for _, size in terms)


def assert_feasible(problem, w):
    lower, upper = problem.bounds
    assert np.isfinite(w).all()
    assert (w >= lower).all()
    assert (w <= upper).all()
    assert abs(math.fsum(w) - 1) <= 2 * EPS


@many
@given(SEEDS, SIZES, st.sampled_from([1, 3]), EXPONENTS, KINDS)
def test_quadratics(seed, n, dimension, exponent, kind):
    rng = np.random.default_rng(seed)
    means, target = draw_quadratic(rng, kind, n, dimension, 10.0**exponent)
    means, target = means.astype(np.float32), target.astype(np.float32)
    made = from_means(means, target)
    means, target = means.astype(np.float64), target.astype(np.float64)
    away = means - target
    gram = np.array([[sum(a * b for a, b in zip(p, q)) for q in away] for p in away])
    size = (dimension + 2) * EPS * np.abs(away) @ np.abs(away).T
    assert_within(made.gram, gram, size, np.float64)
    inner, cross, square = means @ means.T, means @ target, target @ target
    other = from_gram(inner, cross, square)
    longest = max(np.abs(inner).max(), np.abs(cross).max(), square)
    assert_within(other.gram, gram, 8 * (dimension + 4) * EPS * longest, np.float64)
    for quadratic in (made, other):
        extremes = np.linalg.eigvalsh(quadratic.gram)[[0, -1]]
        rounding = 8 * n * EPS * np.abs(np.linalg.eigvalsh(quadratic.gram)).max()
        found = quadratic.smallest_eigenvalue, quadratic.largest_eigenvalue
        extremes = np.maximum(extremes, 0) if quadratic is made else extremes
        assert_within(found, extremes, rounding)


@many
@given(problems())
def test_values_and_certificates(drawn):
    problem, rng = drawn
    lower, upper = problem.bounds
    kept = np.flatnonzero((problem.prior > 0) & (upper > 0)) if problem.kl_penalty else None
    if problem.kl_penalty:
        np.testing.assert_array_equal(domains_kept(problem), kept)
    points = draw_feasible(rng, lower, upper, 6)
    values = [plain_objective(problem, w)[0] for w in points]
    for w, value in zip(points, values):
        _, size = plain_objective(problem, w)
        rounding = 16 * (problem.size + 4) * EPS * (size + problem.scale + problem.kl_penalty)
        assert_within(objective(problem, w), value, rounding)
        assert mmd_squared(problem, w) + penalties(problem, w) == objective(problem, w)
        gap = frank_wolfe_gap(problem, w)
        assert 0 <= gap < np.inf
        # A certificate: nothing feasible lies lower.
        assert min(values) >= value - gap - 2 * rounding
    near = nearest_weights(problem, points[0] + 1e-9 * rng.normal(size=problem.size))
    assert_feasible(problem, near)
    again = nearest_weights(problem, near)
    assert_within(again, near, 4 * problem.size * EPS)


@many
@given(problems())
def test_solutions_are_the_lowest_of_all_that_is_feasible(drawn):
    problem, rng = drawn
    lower, upper = problem.bounds
    start = draw_feasible(rng, lower, upper, 1)[0]
    batch = solve_batch([problem, problem])
    solutions = [solve(problem), solve(problem, start=start), *batch]
    others = [plain_objective(problem, w)[0] for w in draw_feasible(rng, lower, upper, 20)]
    for found in solutions:
        assert_feasible(problem, found.weights)
        value, size = plain_objective(problem, found.weights)
        scale = size + problem.scale + problem.kl_penalty
        rounding = 16 * (problem.size + 4) * EPS * scale
        assert_within(found.objective, value, rounding)
        assert 0 <= found.gap <= 1e-14 * max(problem.scale, problem.kl_penalty)
        assert value <= min(others) + found.gap + 2 * rounding
        for state, bound in ((AT_LOWER, lower), (AT_UPPER, upper)):
            held = found.active == state
            np.testing.assert_array_equal(found.weights[held], bound[held])
    first = projected_gradient([problem])[0]
    assert (first >= lower - 4 * EPS).all()
    assert (first <= upper + 4 * EPS).all()
    # Newton's method on its shift ends where the sum is off by 1e-14.
    assert abs(first.sum() - 1) <= 1e-14 + 4 * EPS


@settings(max_examples=6, deadline=None)
@given(problems(with_kl=False))
def test_another_solver_is_no_better(drawn):
    problem, _ = drawn
    ours, theirs = solve(problem), solve_with_cvxpy(problem, solver="CLARABEL")
    assert_feasible(problem, theirs.weights)
    rounding = 64 * (problem.size + 4) * EPS * problem.scale
    assert ours.objective <= theirs.objective + ours.gap + rounding
    assert ours.objective >= theirs.objective - theirs.gap - rounding


@many
@given(SEEDS, SIZES, EXPONENTS, st.booleans(), st.booleans())
def test_programs(seed, n, exponent, bounded, flat):
    rng, scale = np.random.default_rng(seed), 10.0**exponent
    factor = rng.normal(size=(n, 1 if flat else n))
    hessian, linear = scale * factor @ factor.T, scale * rng.normal(size=n)
    lower, upper = draw_bounds(rng, n, bounded)
    program = make_program(hessian, linear, *((lower, upper) if bounded else ()))
    assert_within(program.total(), 1, EPS)
    found = minimize(program)
    x, sizes = found.x, np.abs(hessian).sum() + np.abs(linear).sum()
    assert (x >= lower).all()
    assert (x <= upper).all()
    assert abs(math.fsum(x) - 1) <= 2 * EPS

    def value(w):
        return w @ hessian @ w - 2 * linear @ w

    for w in draw_feasible(rng, lower, upper, 20):
        assert value(x) <= value(w) + found.gap + 8 * (n + 2) * EPS * sizes
    assert 0 <= found.gap <= 1e-13 * sizes


def fill(x, slope, lower, upper):
    """slope . x less the least slope . v of the same sum, by filling from the least slope on."""
    v, left = lower.copy(), max(x.sum() - lower.sum(), 0)
    for i in np.argsort(slope):
        step = min(upper[i] - lower[i], left)
        v[i], left = v[i] + step, left - step
    return math.fsum(slope * (x - v))


def exact_projection(y, lower, upper):
    """In rational numbers: between two shifts at which an entry meets a bound the sum is linear."""
    y, lower, upper = ([Fraction(v) for v in np.minimum(z, 1e300)] for z in (y, lower, upper))

    def shifted(shift):
        return [min(max(v + shift, low), high) for v, low, high in zip(y, lower, upper)]

    shifts = sorted({b - v for bounds in (lower, upper) for b, v in zip(bounds, y)})
    after = next((i for i, shift in enumerate(shifts) if sum(shifted(shift)) >= 1), -1)
    if after <= 0:  # the bounds leave one point, their sum 1 up to rounding
        return np.array(shifted(shifts[after]), float)
    below, above = (sum(shifted(shifts[i])) for i in (after - 1, after))
    share = (1 - below) / (above - below)
    shift = shifts[after - 1] + share * (shifts[after] - shifts[after - 1])
    return np.array(shifted(shift), float)


@settings(max_examples=300, deadline=None)
@given(SEEDS, SIZES, EXPONENTS, st.booleans())
def test_linear_gaps_and_projections(seed, n, exponent, bounded):
    rng = np.random.default_rng(seed)
    lower, upper = draw_bounds(rng, n, bounded)
    slope = 10.0**exponent * rng.integers(-3, 4, size=n).astype(float)
    for x in draw_feasible(rng, lower, upper, 3):
        gap = linear_gap(x, slope, lower, upper)
        assert gap >= 0
        assert_within(gap, fill(x, slope, lower, upper), 8 * n * EPS * np.abs(slope).sum())
    y = 10.0**exponent * rng.normal(size=n)
    y[rng.random(n) < 0.2] *= 1e100
    found = project_onto_simplex(y, lower, upper, 1.0)
    assert_within(found, exact_projection(y, lower, upper), 4 * n * EPS)
    free, full = free_entries(y, lower, upper, lambda x: x.sum() - 1)
    assert not (free & full).any()
    assert (found[full] == upper[full]).all()
    assert (found[~free & ~full] == lower[~free & ~full]).all()
    moved = found.copy()
    i = rng.integers(n)
    moved[i] = min(max(moved[i] + 1e-12, lower[i]), upper[i])
    mended = mend_sum(moved.copy(), lower, upper, 1.0)
    assert np.count_nonzero(mended != moved) <= 1
    assert (mended >= lower).all()
    assert (mended <= upper).all()
    assert abs(math.fsum(mended) - 1) <= abs(math.fsum(moved) - 1) + EPS


@pytest.mark.parametrize("far", [1e3, 1e17, 1e100])
def test_entropic_minima_of_slopes_far_apart(far):
    """The two that are better take all that they may, the third one what is left, and so on."""
    for slope, lower, upper, expected in (
        ([0, 0, far], [0, 0, 0], [0.4, 0.4, 0.4], [0.4, 0.4, 0.2]),
        ([0, 0, -far], [0.1, 0.3, 0], [1, 1, 1], [0.1, 0.3, 0.6]),
        ([0, far, 2 * far], [0, 0, 0], [0.5, 0.3, 0.9], [0.5, 0.3, 0.2]),
    ):
        lower, upper = np.array(lower, float), np.array(upper, float)
        v, t = entropic_minimum(np.array(slope, float), np.full(3, 1 / 3), 1.0, lower, upper)
        np.testing.assert_allclose(v, expected, rtol=1e-14)
        assert np.isfinite(t)


@many
@given(SEEDS, SIZES, EXPONENTS, EXPONENTS, st.booleans())
def test_entropic_minima(seed, n, exponent, strength, bounded):
    rng = np.random.default_rng(seed)
    slope, strength = 10.0**exponent * rng.normal(size=n), 10.0**strength
    prior = rng.dirichlet(np.full(n, 0.5)) + 1e-30
    lower, upper = draw_bounds(rng, n, bounded)
    upper = np.where(upper == 0, 0.01, upper)
    v, t = entropic_minimum(slope, prior, strength, lower, upper)
    assert np.isfinite(v).all()
    assert np.isfinite(t)
    size = (np.abs(np.log(prior)) + (np.abs(slope) + abs(t)) / strength).max()
    exponents = np.log(prior) + (t - slope) / strength
    expected = np.clip(np.exp(np.minimum(exponents, 1)), lower, np.minimum(upper, 1))
    assert_within(v, expected, np.expm1(8 * EPS * size) * np.maximum(v, expected))
    assert abs(v.sum() - 1) <= 8 * n * EPS * (1 + size)

    def value(w):
        return slope @ w + strength * rel_entr(w, prior).sum()

    terms = np.abs(slope).sum() + strength * (1 + np.abs(np.log(prior)).max())
    rounding = 16 * n * EPS * (1 + size) * terms
    others = draw_feasible(rng, lower, upper, 6)
    for w in others:
        assert value(v) <= value(w) + rounding
        gap = entropic_gap(w, slope, prior, strength, lower, upper)
        assert gap >= 0
        assert_within(gap, value(w) - value(v), rounding)
    factor = rng.normal(size=(n, n))
    hessian, linear = 10.0**exponent * factor @ factor.T, -slope / 2
    found = minimize_entropic(hessian, linear, prior, strength, lower, upper)
    assert (found.x >= lower).all()
    assert (found.x <= upper).all()
    assert abs(math.fsum(found.x) - 1) <= 2 * EPS
    lowest = value(found.x) + found.x @ hessian @ found.x
    rounding += 16 * n * EPS * np.abs(hessian).sum()
    for w in others:
        assert lowest <= value(w) + w @ hessian @ w + found.gap + rounding
