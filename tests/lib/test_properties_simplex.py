"""Properties of the mixing weights' problem and its solvers, over scales, copies and bounds.

Everything is float64; a value is off by as many eps as it has terms, of their magnitudes.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from strategies import EXPONENTS, SEEDS, assert_within

from lib import simplex_qp
from lib.simplex_qp import _active_set as active_set
from lib.simplex_qp import solve, solve_batch
from lib.simplex_qp._active_set import AT_LOWER, AT_UPPER
from lib.simplex_qp._entropic import entropic_minimum

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
def problems(draw):
    rng, n = np.random.default_rng(draw(SEEDS)), draw(SIZES)
    scale = 10.0 ** draw(EXPONENTS)
    quadratic = simplex_qp.from_means(
        *draw_quadratic(rng, draw(KINDS), n, draw(st.sampled_from([1, 3])), scale)
    )
    lower, upper = draw_bounds(rng, n, draw(st.booleans()))
    options = {"ridge": rng.choice([0.0, 1e-6, 1.0]) * scale**2, "lower": lower, "upper": upper}
    prior = rng.dirichlet(np.ones(n))
    if draw(st.booleans()):
        options |= {"prior": prior, "l2_penalty": 10.0 ** rng.uniform(-6, 1) * scale**2}
    if draw(st.booleans()):
        options |= {"prior": prior, "kl_penalty": 10.0 ** rng.uniform(-4, 1) * scale**2}
    return simplex_qp.make_problem(quadratic, **options), rng


def plain_objective(problem, w):
    """The objective, and the sum of the magnitudes of its terms."""
    factor, prior = problem.quadratic.factor, problem.prior
    shift = (problem.ridge + problem.diagonal_shift) * w**2
    terms, sizes = [(w @ factor) ** 2, shift], [(w @ np.abs(factor)) ** 2, shift]
    if prior is not None:
        terms.append(problem.l2_penalty * (w - prior) ** 2)
        sizes.append(problem.l2_penalty * (w + prior) ** 2)
    if problem.kl_penalty:
        entropy = rel_entr(w, prior)
        terms.append(problem.kl_penalty * entropy)
        sizes.append(problem.kl_penalty * (np.abs(entropy) + w))
    return math.fsum(np.concatenate(terms)), math.fsum(np.concatenate(sizes))


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
    made = simplex_qp.from_means(means, target)
    means, target = means.astype(np.float64), target.astype(np.float64)
    away = means - target
    gram, size = away @ away.T, (dimension + 2) * EPS * np.abs(away) @ np.abs(away).T
    assert_within(made.gram, gram, size, np.float64)
    inner, cross, square = means @ means.T, means @ target, target @ target
    other = simplex_qp.from_gram(inner, cross, square)
    longest = max(np.abs(inner).max(), np.abs(cross).max(), square)
    assert_within(other.gram, gram, 8 * (dimension + 4) * EPS * longest, np.float64)
    for quadratic in (made, other):
        spectrum = np.linalg.eigvalsh(quadratic.gram)
        extremes = np.maximum(spectrum[[0, -1]], 0 if quadratic is made else -np.inf)
        eigenvalues = quadratic.smallest_eigenvalue, quadratic.largest_eigenvalue
        assert_within(eigenvalues, extremes, 8 * n * EPS * np.abs(spectrum).max())


@many
@given(problems())
def test_values_and_certificates(drawn):
    problem, rng = drawn
    lower, upper = problem.bounds
    kept = np.flatnonzero((problem.prior > 0) & (upper > 0)) if problem.kl_penalty else None
    if problem.kl_penalty:
        np.testing.assert_array_equal(simplex_qp.domains_kept(problem)[0], kept)
    points = draw_feasible(rng, lower, upper, 6)
    values = [plain_objective(problem, w)[0] for w in points]
    for w, value in zip(points, values):
        _, size = plain_objective(problem, w)
        rounding = 16 * (problem.size + 4) * EPS * (size + problem.scale + problem.kl_penalty)
        assert_within(simplex_qp.objective(problem, w), value, rounding)
        assert simplex_qp.mmd_squared(problem, w) + simplex_qp.penalties(
            problem, w
        ) == simplex_qp.objective(problem, w)
        gap = simplex_qp.frank_wolfe_gap(problem, w)
        assert 0 <= gap < np.inf
        # A certificate: nothing feasible lies lower.
        assert min(values) >= value - gap - 2 * rounding
    near = simplex_qp.nearest_weights(problem, points[0] + 1e-9 * rng.normal(size=problem.size))
    assert_feasible(problem, near)
    again = simplex_qp.nearest_weights(problem, near)
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
    for solution in solutions:
        assert_feasible(problem, solution.weights)
        value, size = plain_objective(problem, solution.weights)
        scale = size + problem.scale + problem.kl_penalty
        rounding = 16 * (problem.size + 4) * EPS * scale
        assert_within(solution.objective, value, rounding)
        assert 0 <= solution.gap <= 1e-14 * max(problem.scale, problem.kl_penalty)
        assert value <= min(others) + solution.gap + 2 * rounding
        for state, bound in ((AT_LOWER, lower), (AT_UPPER, upper)):
            held = solution.active == state
            np.testing.assert_array_equal(solution.weights[held], bound[held])


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
        gap = active_set.linear_gap(x, slope, lower, upper)
        assert gap >= 0
        assert_within(gap, fill(x, slope, lower, upper), 8 * n * EPS * np.abs(slope).sum())
    y = 10.0**exponent * rng.normal(size=n)
    y[rng.random(n) < 0.2] *= 1e100
    projected = active_set.project_onto_simplex(y, lower, upper, 1.0)
    assert_within(projected, exact_projection(y, lower, upper), 4 * n * EPS)
    free, full = active_set.free_entries(y, lower, upper, lambda x: x.sum() - 1)
    assert not (free & full).any()
    assert (projected[full] == upper[full]).all()
    assert (projected[~free & ~full] == lower[~free & ~full]).all()
    moved = projected.copy()
    i = rng.integers(n)
    moved[i] = min(max(moved[i] + 1e-12, lower[i]), upper[i])
    mended = active_set.mend_sum(moved.copy(), lower, upper, 1.0)
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
