"""Sliced-Wasserstein distances against POT, scipy and plain loops in float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import ot
import pytest

from lib.sliced_wasserstein import (
    exact_coupling,
    orthogonal_directions,
    pairwise_cost,
    percentile_coupling,
    random_directions,
    self_pairwise_cost,
    sliced_wasserstein,
    sliced_wasserstein_power,
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


def finite_differences(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


# Directions


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


# Couplings on the line


@pytest.mark.parametrize("n", [1, 4, 6, 12])
@pytest.mark.parametrize("m", [1, 5, 6, 9])
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


# Distances


@x64
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_exact_for_any_two_sizes(n, m):
    x, y, directions = clouds(n, m)
    for p in (1, 2):
        ours = power(x, y, directions, p=p)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, by_pot(x, y, directions, p), rtol=1e-12)


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
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_block_size_changes_only_rounding(weighted):
    """3 does not divide the 8 directions."""
    x, y, directions = clouds(5, 6)
    options = {"x_weights": mass(5), "y_weights": mass(6, 1)} if weighted else {}
    value, gradients = power_and_grad(x, y, directions, p=2, **options)
    blocked, in_blocks = power_and_grad(x, y, directions, p=2, block_size=3, **options)
    np.testing.assert_allclose(blocked, value, rtol=1e-13)
    for a, b in zip(in_blocks, gradients):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@x64
@pytest.mark.parametrize("p", [1, 2])
def test_percentile_form_against_numpy(p):
    x, y, directions = clouds(5, 6)
    levels = np.random.default_rng(7).uniform(size=(8, 20))

    def by_numpy(x):
        gaps = [
            by_percentiles(x @ t, row) - by_percentiles(y @ t, row)
            for t, row in zip(directions, levels)
        ]
        return np.mean(np.abs(gaps) ** p)

    @jax.jit
    def value_and_grad(x, levels):
        coupling = percentile_coupling(levels)
        options = {"p": p, "coupling": coupling}
        others = jnp.asarray(y), jnp.asarray(directions)
        return jax.value_and_grad(sliced_wasserstein_power)(x, *others, **options)

    value, gradient = value_and_grad(x, levels)
    np.testing.assert_allclose(value, by_numpy(x), rtol=1e-12)
    np.testing.assert_allclose(gradient, finite_differences(by_numpy, x), rtol=1e-6, atol=1e-9)


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
