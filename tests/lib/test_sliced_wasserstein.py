"""Sliced-Wasserstein distances against POT, scipy and plain loops in float64."""

from fractions import Fraction
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import ot
import pytest
from scipy.stats import wasserstein_distance

from lib.sliced_wasserstein import (
    exact_coupling,
    orthogonal_directions,
    pairwise_cost,
    percentile_coupling,
    percentile_sliced_wasserstein_power,
    project,
    random_directions,
    self_pairwise_cost,
    sliced_wasserstein,
    sliced_wasserstein_power,
    sum_over_directions,
)


def on_device(function):
    """`function` of JAX arrays, for numpy ones. Compiled as a whole without weights; with weights
    operation by operation, which compiles less here."""
    compiled = jax.jit(function, static_argnames=("p", "block_size"))

    def call(*arrays, x_weights=None, y_weights=None, **options):
        arrays = map(jnp.asarray, arrays)
        if x_weights is None and y_weights is None:
            return compiled(*arrays, **options)
        weights = {"x_weights": x_weights, "y_weights": y_weights}
        weights = {k: v if v is None else jnp.asarray(v) for k, v in weights.items()}
        return function(*arrays, **weights, **options)

    return call


power = on_device(sliced_wasserstein_power)
distance = on_device(sliced_wasserstein)
power_and_grad = on_device(jax.value_and_grad(sliced_wasserstein_power, argnums=(0, 1)))
distance_and_grad = on_device(jax.value_and_grad(sliced_wasserstein, argnums=(0, 1)))

# Equal, one a multiple of the other, coprime, a common divisor, single points.
SIZES = [(6, 6), (6, 3), (5, 6), (6, 4), (1, 6), (1, 1)]
x64 = pytest.mark.usefixtures("x64")


def unit(rng, num_directions, d):
    directions = rng.standard_normal((num_directions, d))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def clouds(n, m, d=3, num_directions=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), 0.5 + 1.5 * rng.standard_normal((m, d))
    return x, y, unit(rng, num_directions, d)


def mass(n, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 1.0, n)


def normalised(weights):
    return None if weights is None else weights / weights.sum()


def by_pot(x, y, directions, p, a=None, b=None):
    """Mean of POT's W_p^p over the directions."""
    a, b = normalised(a), normalised(b)
    return np.mean([ot.wasserstein_1d(x @ t, y @ t, a, b, p=p) for t in directions])


def quantile(points, weights, level):
    """inf {z: F(z) >= level}, from the definition."""
    order = np.argsort(points)
    levels = np.cumsum(weights[order]) / weights.sum()
    return points[order][min(np.searchsorted(levels, level), len(points) - 1)]


def by_integration(x, y, directions, p, a=None, b=None):
    """The integral of |F^-1 - G^-1|^p, interval by interval between the jumps."""
    a = np.ones(len(x)) if a is None else a
    b = np.ones(len(y)) if b is None else b
    total = 0.0
    for t in directions:
        u, v = x @ t, y @ t
        jumps = [np.cumsum(w[np.argsort(z)]) / w.sum() for z, w in ((u, a), (v, b))]
        edges = np.unique(np.concatenate([[0.0], *jumps]))
        for low, high in pairwise(edges):
            middle = (low + high) / 2
            gap = abs(quantile(u, a, middle) - quantile(v, b, middle))
            total += (high - low) * gap**p
    return total / len(directions)


def finite_differences(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


# Directions


@pytest.mark.parametrize("draw", [random_directions, orthogonal_directions])
@pytest.mark.parametrize(("count", "d"), [(7, 3), (4, 1)])
def test_directions_have_unit_norm(draw, count, d):
    directions = draw(jax.random.key(0), count, d)
    assert directions.shape == (count, d)
    assert directions.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)


@x64
@pytest.mark.parametrize("draw", [random_directions, orthogonal_directions])
def test_directions_in_float64(draw):
    directions = draw(jax.random.key(0), 7, 3, dtype=jnp.float64)
    assert directions.dtype == jnp.float64
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-14)


def test_orthogonal_directions_are_orthonormal_in_blocks():
    blocks = np.asarray(orthogonal_directions(jax.random.key(1), 7, 3))
    for block in (blocks[:3], blocks[3:6], blocks[6:]):
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)
    assert np.abs(blocks[:3] @ blocks[3:6].T - np.eye(3)).max() > 0.1


@pytest.mark.parametrize("draw", [random_directions, orthogonal_directions])
def test_directions_are_uniform_on_the_sphere(draw):
    """At each place of a block: mean 0, covariance I/d, fourth moments of the sphere (5 sigma)."""
    blocks, d = 4000, 3
    directions = np.asarray(draw(jax.random.key(2), blocks * d, d)).reshape(blocks, d, d)
    sigma = 1 / np.sqrt(blocks)
    assert np.abs(directions.mean(axis=0)).max() < 5 * sigma / np.sqrt(d)
    covariance = np.einsum("kla,klb->lab", directions, directions) / blocks
    assert np.abs(covariance - np.eye(d) / d).max() < 5 * sigma * np.sqrt(4 / 45)
    fourth = (directions**4).mean(axis=0)
    assert np.abs(fourth - 3 / (d * (d + 2))).max() < 5 * sigma * np.sqrt(1 / 9 - 1 / 25)


@pytest.mark.parametrize("draw", [random_directions, orthogonal_directions])
def test_directions_depend_on_the_key_alone(draw):
    key = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(draw(key, 7, 3), draw(key, 7, 3))
    assert np.abs(draw(key, 7, 3) - draw(jax.random.PRNGKey(4), 7, 3)).max() > 0.1


def test_orthogonal_directions_have_lower_variance():
    """Two clouds that differ by a stretch along one axis; and a shift, which d orthogonal
    directions measure without any error."""
    x = jnp.float32(clouds(3, 3)[0])

    @jax.jit
    @jax.vmap
    def estimates(key):
        stretched, shifted = x * jnp.array([[3.0, 1, 1]]), x + jnp.array([[1.0, 2, -1]])
        random, orthogonal = random_directions(key, 3, 3), orthogonal_directions(key, 3, 3)
        return [
            sliced_wasserstein_power(x, y, directions)
            for y, directions in (
                (stretched, random),
                (stretched, orthogonal),
                (shifted, random),
                (shifted, orthogonal),
            )
        ]

    estimates = np.asarray(estimates(jax.random.split(jax.random.key(5), 400)))
    random, orthogonal = estimates[:2]
    standard_error = np.sqrt((random.var() + orthogonal.var()) / 400)
    assert abs(random.mean() - orthogonal.mean()) < 4 * standard_error
    assert orthogonal.var() < 0.5 * random.var()
    assert estimates[2].std() > 0.5
    np.testing.assert_allclose(estimates[3], 6 / 3, rtol=1e-5)


# Couplings on the line


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 12])
@pytest.mark.parametrize("m", [1, 2, 5, 6, 9])
def test_exact_coupling_is_the_monotone_one(n, m):
    coupling = exact_coupling(n, m)
    rows = [np.arange(float(k))[:, None] for k in (n, m)]
    i = np.asarray(coupling.source(jnp.asarray(rows[0])))[:, 0].astype(int)
    j = np.asarray(coupling.target(jnp.asarray(rows[1])))[:, 0].astype(int)
    masses = np.asarray(coupling.mass, np.float64)
    assert len(i) == len(j) == len(masses) == n + m - np.gcd(n, m)
    # The north-west corner rule, in fractions.
    a, b, expected = [Fraction(1, n)] * n, [Fraction(1, m)] * m, []
    s = t = 0
    while s < n and t < m:
        step = min(a[s], b[t])
        expected.append((s, t, step))
        a[s], b[t] = a[s] - step, b[t] - step
        s, t = s + (a[s] == 0), t + (b[t] == 0)
    np.testing.assert_array_equal(i, [e[0] for e in expected])
    np.testing.assert_array_equal(j, [e[1] for e in expected])
    np.testing.assert_allclose(masses, [float(e[2]) for e in expected], rtol=1e-6)


def by_percentiles(projection, levels, num_percentiles=100):
    """Quantiles read off equally spaced percentiles, [K]."""
    grid = np.linspace(0, 1, num_percentiles)
    return np.interp(levels, grid, np.percentile(projection, 100 * grid))


@x64
@pytest.mark.parametrize("n", [1, 5, 200])
def test_percentile_coupling_against_numpy(n):
    """Levels differ from direction to direction."""
    levels = np.random.default_rng(0).uniform(size=(3, 12))
    levels[:, :3] = 0, 1, 0.5
    points = np.sort(np.random.default_rng(1).standard_normal((2, n, 3)), axis=1)
    for options in ({}, {"num_percentiles": 7}) if n == 5 else ({},):
        coupling = percentile_coupling(jnp.asarray(levels), **options)(n, 4)
        ours = np.asarray(coupling.source(jnp.asarray(points)))
        for c, direction in np.ndindex(2, 3):
            expected = by_percentiles(points[c, :, direction], levels[direction], **options)
            np.testing.assert_allclose(ours[c, :, direction], expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(coupling.mass, np.full(12, 1 / 12), rtol=1e-14)


# Sums over pairs of measures


@x64
@pytest.mark.parametrize("p", [1, 2])
def test_pairwise_costs_and_their_gradients(p):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 5, 4)), rng.standard_normal((2, 5, 4))
    weights, slope = mass(5), rng.standard_normal((3, 2))
    square = rng.standard_normal((3, 3))

    def naive(x, y, w):
        return jnp.einsum("abkl,k->ab", jnp.abs(x[:, None] - y[None]) ** p, w)

    def value_and_grads(between, within):
        """A slope that is not symmetric: the halves of the pairs (a, b) and (b, a) differ."""

        def both(x, y, w):
            return between(x, y, w), within(x, w)

        def scalar(x, y, w):
            a, b = both(x, y, w)
            return jnp.sum(slope * a) + jnp.sum((square * b)[~np.eye(3, dtype=bool)])

        return jax.jit(lambda *args: (both(*args), jax.grad(scalar, (0, 1, 2))(*args)))(
            x, y, weights
        )

    costs, gradients = value_and_grads(
        lambda x, y, w: pairwise_cost(x, y, w, p), lambda x, w: self_pairwise_cost(x, w, p)
    )
    naive_costs, naive_gradients = value_and_grads(naive, lambda x, w: naive(x, x, w))
    for a, b in zip(costs, naive_costs):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.all(np.diag(costs[1]) == 0)
    for a, b in zip(gradients[:2], naive_gradients[:2]):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    # The mass is a constant, as documented.
    assert np.all(np.asarray(gradients[2]) == 0)


def test_small_costs_keep_their_digits():
    """Two clouds 1e-3 apart, a thousand away from 0: a Gram matrix in float32 would say 0 or 60."""
    x = 1000 + np.float32(np.random.default_rng(0).standard_normal((1, 16, 4)))
    y = (x + np.float32(1e-3)).astype(np.float32)
    expected = np.mean((x.astype(np.float64) - y) ** 2) * 4
    cost = pairwise_cost(jnp.asarray(x), jnp.asarray(y), jnp.full(16, 1 / 16), 2)
    np.testing.assert_allclose(cost[0, 0], expected, rtol=1e-5)


def test_projection_has_full_precision():
    rng = np.random.default_rng(0)
    points, directions = rng.standard_normal((2, 5, 64)), unit(rng, 7, 64)
    ours = project(jnp.float32(points), jnp.float32(directions))
    np.testing.assert_allclose(ours, points @ directions.T, atol=3e-6)


@pytest.mark.parametrize("block_size", [None, 1, 3, 4, 7, 50])
def test_sums_over_blocks_of_directions(block_size):
    directions = np.random.default_rng(0).standard_normal((7, 2)).astype(np.float32)

    def term(block):
        return {"sum": block.sum(axis=0), "count": jnp.float32(len(block))}

    total = sum_over_directions(term, jnp.asarray(directions), block_size)
    np.testing.assert_allclose(total["sum"], directions.sum(axis=0), rtol=1e-5, atol=1e-6)
    assert total["count"] == 7


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        sum_over_directions(jnp.sum, jnp.ones((3, 2)), 0)


# Distances


@x64
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_exact_for_any_two_sizes(n, m):
    x, y, directions = clouds(n, m)
    for p in (1, 2):
        ours = power(x, y, directions, p=p)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, by_pot(x, y, directions, p), rtol=1e-12)
        np.testing.assert_allclose(ours, by_integration(x, y, directions, p), rtol=1e-12)
    scipy = np.mean([wasserstein_distance(x @ t, y @ t) for t in directions])
    np.testing.assert_allclose(power(x, y, directions, p=1), scipy, rtol=1e-12)


@x64
def test_distance_is_the_root_of_the_power():
    x, y, directions = clouds(5, 6)
    a, b = mass(5), mass(6, 1)
    for p in (1, 2):
        expected = ot.sliced_wasserstein_distance(x, y, projections=directions.T, p=p)
        np.testing.assert_allclose(distance(x, y, directions, p=p), expected, rtol=1e-12)
    expected = np.sqrt(by_pot(x, y, directions, 2, a, b))
    ours = distance(x, y, directions, x_weights=a, y_weights=b)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@x64
@pytest.mark.parametrize(("n", "m"), [(5, 6), pytest.param(1, 6, marks=pytest.mark.slow)])
def test_exact_with_weights(n, m):
    x, y, directions = clouds(n, m)
    for a, b in ((mass(n), mass(m, 1)), (mass(n), None), (None, 7 * mass(m, 1))):
        for p in (1, 2):
            ours = power(x, y, directions, p=p, x_weights=a, y_weights=b)
            np.testing.assert_allclose(ours, by_pot(x, y, directions, p, a, b), rtol=1e-12)
            np.testing.assert_allclose(ours, by_integration(x, y, directions, p, a, b), rtol=1e-12)


def test_float32_is_exact_to_rounding():
    x, y, directions = clouds(6, 6)
    single = [jnp.float32(v) for v in (x, y, directions)]
    a, b = mass(6), mass(6, 1)
    for p in (1, 2):
        ours = power(*single, p=p)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, by_pot(x, y, directions, p), rtol=3e-6)
        ours = power(*single, p=p, x_weights=jnp.float32(a), y_weights=jnp.float32(b))
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, by_pot(x, y, directions, p, a, b), rtol=3e-6)


@x64
def test_float32_stays_float32_where_float64_is_on():
    arrays = [jnp.float32(v) for v in clouds(5, 6)]
    weights = {"x_weights": jnp.float32(mass(5)), "y_weights": jnp.float32(mass(6))}
    for function in (sliced_wasserstein, sliced_wasserstein_power):
        for options in (
            {},
            weights,
            {"coupling": percentile_coupling(jnp.ones((8, 3), jnp.float32))},
        ):
            both = jax.value_and_grad(partial(function, **options), argnums=(0, 1))
            out = jax.tree.leaves(jax.eval_shape(both, *arrays))
            assert {leaf.dtype for leaf in out} == {jnp.dtype("float32")}


@x64
def test_weights_that_split_a_point_leave_the_value():
    x, y, directions = clouds(5, 6)
    a, b = mass(5), mass(6, 1)
    split, parts = np.concatenate([x[2:3], x]), np.concatenate([a[2:3] / 3, a])
    parts[3] = 2 * a[2] / 3
    for p in (1, 2):
        value = power(x, y, directions, p=p, x_weights=a, y_weights=b)
        ours = power(split, y, directions, p=p, x_weights=parts, y_weights=b)
        np.testing.assert_allclose(ours, value, rtol=1e-12)
    x, y, directions = clouds(6, 3)
    twice = power(x, np.repeat(y, 2, axis=0), directions)
    np.testing.assert_allclose(twice, power(x, y, directions), rtol=1e-12)


def test_equal_weights_are_no_weights():
    x, y, directions = (jnp.float32(v) for v in clouds(6, 6))
    weighted = power(x, y, directions, x_weights=jnp.full(6, 3.0))
    np.testing.assert_allclose(weighted, power(x, y, directions), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_points_of_weight_zero_count_for_nothing(p):
    """However far away, and wherever they sort."""
    x, y, directions = clouds(6, 6)
    x[:2] = [[1e3, 1e3, 1e3], [-1e3, -1e3, -1e3]]
    a, b = mass(6), mass(6, 1)
    a[:2] = 0
    single = [jnp.float32(v) for v in (x, y, directions)]
    value, (gradient, _) = power_and_grad(
        *single, p=p, x_weights=jnp.float32(a), y_weights=jnp.float32(b)
    )
    expected = by_pot(x[2:], y, directions, p, a[2:], b)
    np.testing.assert_allclose(value, expected, rtol=3e-6)
    assert np.all(np.asarray(gradient)[:2] == 0)


@x64
def test_invariances():
    x, y, directions = clouds(5, 6)
    a, b = mass(5), mass(6, 1)
    rng = np.random.default_rng(3)
    i, j = rng.permutation(5), rng.permutation(6)
    for p in (1, 2):
        value = power(x, y, directions, p=p)
        np.testing.assert_allclose(power(x[i], y[j], directions, p=p), value, rtol=1e-12)
        np.testing.assert_allclose(power(y, x, directions, p=p), value, rtol=1e-12)
        np.testing.assert_allclose(power(x + 2, y + 2, directions, p=p), value, rtol=1e-12)
        np.testing.assert_allclose(power(3 * x, 3 * y, directions, p=p), 3**p * value, rtol=1e-12)
        weighted = power(x, y, directions, p=p, x_weights=a, y_weights=b)
        permuted = power(x[i], y[j], directions, p=p, x_weights=a[i], y_weights=b[j])
        np.testing.assert_allclose(permuted, weighted, rtol=1e-12)
        swapped = power(y, x, directions, p=p, x_weights=b, y_weights=a)
        np.testing.assert_allclose(swapped, weighted, rtol=1e-12)


@x64
def test_translation_in_closed_form():
    x, _, directions = clouds(6, 6)
    shift = np.array([1.0, -2.0, 0.5])
    steps = directions @ shift
    np.testing.assert_allclose(power(x, x + shift, directions), np.mean(steps**2), rtol=1e-12)
    np.testing.assert_allclose(
        power(x, x + shift, directions, p=1), np.mean(np.abs(steps)), rtol=1e-12
    )
    _, (gradient, _) = power_and_grad(x, x + shift, directions)
    expected = -2 / (6 * 8) * (steps @ directions)
    np.testing.assert_allclose(gradient, np.broadcast_to(expected, (6, 3)), rtol=1e-12)


def test_mean_over_the_sphere_of_a_translation():
    """SW_2^2(x, x + t) = |t|^2 / d (5 sigma of 4000 directions)."""
    x = jnp.float32(clouds(2, 2)[0])
    directions = random_directions(jax.random.key(0), 4000, 3)
    value = power(x, x + jnp.array([[0.0, 3.0, 0.0]]), directions)
    sigma = 9 * np.sqrt(4 / 45 / 4000)
    assert abs(value - 3) < 5 * sigma


@pytest.mark.parametrize("p", [1, 2])
def test_identical_clouds(p):
    x, _, directions = (jnp.float32(v) for v in clouds(6, 6))
    a = jnp.float32(mass(6))
    for function in (power_and_grad, distance_and_grad):
        for options in ({}, {"x_weights": a, "y_weights": a}):
            value, gradients = function(x, x, directions, p=p, **options)
            assert value == 0
            for gradient in gradients:
                assert np.all(np.asarray(gradient) == 0)


# 3 does not divide the 8 directions, 4 does; 100 takes them at once.
@x64
@pytest.mark.parametrize(
    ("weighted", "block_size"),
    [
        (False, 3),
        pytest.param(False, 100, marks=pytest.mark.slow),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(False, 4, marks=pytest.mark.slow),
        pytest.param(True, 3, marks=pytest.mark.slow),
    ],
)
def test_block_size_changes_rounding_alone(weighted, block_size):
    x, y, directions = clouds(5, 6)
    options = {"x_weights": mass(5), "y_weights": mass(6, 1)} if weighted else {}
    value, gradients = power_and_grad(x, y, directions, p=2, **options)
    blocked, in_blocks = power_and_grad(x, y, directions, p=2, block_size=block_size, **options)
    np.testing.assert_allclose(blocked, value, rtol=1e-13)
    for a, b in zip(in_blocks, gradients):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@x64
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "weighted"), [(6, False), (5, False), (5, True)])
def test_gradients_against_finite_differences(p, n, weighted):
    x, y, directions = clouds(n, 6)
    a, b = (mass(n), mass(6, 1)) if weighted else (None, None)
    _, ours = power_and_grad(x, y, directions, p=p, x_weights=a, y_weights=b)
    theirs = [
        finite_differences(lambda x: by_pot(x, y, directions, p, a, b), x),
        finite_differences(lambda y: by_pot(x, y, directions, p, a, b), y),
    ]
    for gradient, expected in zip(ours, theirs):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@x64
def test_gradient_of_the_root():
    x, y, directions = clouds(5, 6)
    _, (gradient, _) = distance_and_grad(x, y, directions)
    expected = finite_differences(lambda x: np.sqrt(by_pot(x, y, directions, 2)), x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@x64
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_against_autodiff_of_a_plain_sort(p):
    x, y, directions = clouds(6, 6)

    def naive(x, y):
        gap = jnp.sort(x @ directions.T, axis=0) - jnp.sort(y @ directions.T, axis=0)
        return jnp.mean(jnp.abs(gap) ** p)

    value, gradients = jax.value_and_grad(naive, (0, 1))(x, y)
    ours, our_gradients = power_and_grad(x, y, directions, p=p)
    np.testing.assert_allclose(ours, value, rtol=1e-12)
    for a, b in zip(our_gradients, gradients):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@x64
def test_vmap_over_clouds_and_directions():
    many = [clouds(5, 6, seed=s) for s in range(3)]
    stacked = [np.stack(arrays) for arrays in zip(*many)]
    values = jax.jit(jax.vmap(sliced_wasserstein_power))(*stacked)
    expected = [by_pot(x, y, directions, 2) for x, y, directions in many]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


# The published percentile form


def percentile_power(x, y, directions, p, levels):
    gaps = [
        by_percentiles(x @ t, row) - by_percentiles(y @ t, row)
        for t, row in zip(directions, levels)
    ]
    return np.mean(np.abs(gaps) ** p)


@x64
@pytest.mark.parametrize(("p", "num_levels"), [(1, 20), (2, None)])
def test_percentile_form_against_numpy(p, num_levels):
    """None leaves the published 100 levels."""
    x, y, directions = clouds(5, 6)
    key = jax.random.key(7)
    levels = np.asarray(jax.random.uniform(key, (8, num_levels or 100), jnp.float64))
    options = {} if num_levels is None else {"num_levels": num_levels}
    function = partial(percentile_sliced_wasserstein_power, key, p=p, **options)
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(x, y, directions)
    np.testing.assert_allclose(value, percentile_power(x, y, directions, p, levels), rtol=1e-12)
    expected = [
        finite_differences(lambda x: percentile_power(x, y, directions, p, levels), x),
        finite_differences(lambda y: percentile_power(x, y, directions, p, levels), y),
    ]
    for a, b in zip(gradients, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_percentile_form_of_identical_clouds(p):
    x, _, directions = clouds(5, 5)
    function = partial(percentile_sliced_wasserstein_power, jax.random.key(0), p=p, num_levels=20)
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(x, x, directions)
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


@pytest.mark.slow
def test_bias_of_the_percentile_form_for_two_points():
    """For x, y of two points, with a and b the gaps of the sorted projections, the exact value is
    (a^2 + b^2)/2, the interpolated one (a^2 + ab + b^2)/3. For standard normals E a^2 = E b^2 =
    2(1 - 1/pi) and E ab = 2/pi, so the ratio of means is 0.822."""

    def both(key):
        keys = jax.random.split(key, 4)
        x, y = (jax.random.normal(k, (2, 2)) for k in keys[:2])
        directions = random_directions(keys[2], 8, 2)
        exact = sliced_wasserstein_power(x, y, directions)
        return exact, percentile_sliced_wasserstein_power(keys[3], x, y, directions)

    exact, percentile = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), 2000))
    ratio = float(np.mean(percentile) / np.mean(exact))
    expected = (2 * (1 - 1 / np.pi) + 1 / np.pi) / 3 / (1 - 1 / np.pi)
    residual = np.asarray(percentile - expected * exact)
    assert abs(residual.mean()) < 4 * residual.std() / np.sqrt(2000)
    assert ratio < 0.9


# What raises


@pytest.fixture
def unannotated(monkeypatch):
    """Without the shape checks of these tests, as a user meets the functions."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("function", [sliced_wasserstein, sliced_wasserstein_power])
@pytest.mark.usefixtures("unannotated")
def test_errors(function):
    x, y, directions = (jnp.float32(v) for v in clouds(5, 6))
    for p in (0, 3, 1.5):
        with pytest.raises(ValueError, match=f"p must be 1 or 2, got {p}"):
            function(x, y, directions, p=p)
    for arrays in ((x, y[:, :2], directions), (x, y, directions[:, :2])):
        with pytest.raises(ValueError, match="must share their last axis"):
            function(*arrays)
    coupling = percentile_coupling(jnp.full((8, 5), 0.5))
    for weights in ({"x_weights": jnp.ones(5)}, {"y_weights": jnp.ones(6)}):
        with pytest.raises(ValueError, match="weights need exact_coupling"):
            function(x, y, directions, coupling=coupling, **weights)
    with pytest.raises(ValueError, match="levels for 8 directions, projections on 4"):
        function(x, y, directions, coupling=coupling, block_size=4)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        function(x, y, directions, block_size=0)
