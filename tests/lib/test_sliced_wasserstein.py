"""Sliced-Wasserstein distances against POT, scipy and plain loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from cases import slow

from lib.sliced_wasserstein import _sorting as sorting
from lib.sliced_wasserstein import (
    exact_coupling,
    orthogonal_directions,
    pairwise_cost,
    percentile_coupling,
    put_rows,
    random_directions,
    sliced_wasserstein,
    sliced_wasserstein_power,
    sort_columns,
    sort_with_permutation,
    take_rows,
)


def on_device(function):
    """`function` of JAX arrays, for numpy ones."""
    compiled = jax.jit(function, static_argnames=("p", "block_size"))
    return lambda *arrays, **options: compiled(*map(jnp.asarray, arrays), **options)


power_and_grad = on_device(jax.value_and_grad(sliced_wasserstein_power, argnums=(0, 1)))
distance_and_grad = on_device(jax.value_and_grad(sliced_wasserstein, argnums=(0, 1)))

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


def by_pot(x, y, directions, p, a=None, b=None):
    """Mean of POT's W_p^p over the directions."""
    a, b = (None if weights is None else weights / weights.sum() for weights in (a, b))
    return np.mean([ot.wasserstein_1d(x @ t, y @ t, a, b, p=p) for t in directions])


def finite_differences(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


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
    np.testing.assert_allclose(np.linalg.norm(directions, axis=2), 1, rtol=1e-6)
    sigma = 1 / np.sqrt(blocks)
    assert np.abs(directions.mean(axis=0)).max() < 5 * sigma / np.sqrt(d)
    covariance = np.einsum("kla,klb->lab", directions, directions) / blocks
    assert np.abs(covariance - np.eye(d) / d).max() < 5 * sigma * np.sqrt(4 / 45)
    fourth = (directions**4).mean(axis=0)
    assert np.abs(fourth - 3 / (d * (d + 2))).max() < 5 * sigma * np.sqrt(1 / 9 - 1 / 25)
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            line = draw(jax.random.key(0), 5, 1, dtype=dtype)
            np.testing.assert_array_equal(np.abs(line), np.ones((5, 1), dtype), strict=True)


@pytest.mark.parametrize("n", [1, 4, 6, 12])
@pytest.mark.parametrize("m", [1, 5, 6, 9])
def test_exact_coupling_is_the_monotone_one(n, m):
    """As POT's: entry by entry, and no entry that is 0."""
    coupling = exact_coupling(n, m)
    i, j = (
        np.asarray(side(jnp.arange(float(size))[:, None]))[:, 0].astype(int)
        for side, size in ((coupling.source, n), (coupling.target, m))
    )
    assert len(i) == len(j) == len(coupling.mass) == n + m - np.gcd(n, m)
    plan = np.zeros((n, m))
    plan[i, j] = coupling.mass
    assert np.all(np.diff(i) + np.diff(j) > 0)
    expected = ot.emd_1d(np.arange(float(n)), np.arange(float(m)))
    np.testing.assert_allclose(plan, expected, rtol=1e-6, atol=1e-15)


def test_small_costs_keep_their_digits():
    """Two clouds 1e-3 apart, a thousand away from 0: a Gram matrix in float32 would say 0 or 60."""
    x = 1000 + np.float32(np.random.default_rng(0).standard_normal((1, 16, 4)))
    y = (x + np.float32(1e-3)).astype(np.float32)
    expected = np.mean((x.astype(np.float64) - y) ** 2) * 4
    x, y = jnp.asarray(x), jnp.asarray(y)
    cost, slope = jax.value_and_grad(lambda mass: pairwise_cost(x, y, mass, 2)[0, 0])(
        jnp.full(16, 1 / 16)
    )
    np.testing.assert_allclose(cost, expected, rtol=1e-5)
    assert np.all(np.asarray(slope) == 0)  # the mass is a constant, as documented


# Distances


@pytest.mark.parametrize("p", [slow(1), 2])
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


@pytest.mark.parametrize("p", [slow(1), 2])
def test_identical_clouds(p):
    x, _, directions = (jnp.float32(v) for v in clouds(6, 6))
    a = jnp.float32(mass(6))
    for function in (power_and_grad, distance_and_grad):
        for options in ({}, {"x_weights": a, "y_weights": a}):
            value, gradients = function(x, x, directions, p=p, **options)
            assert value == 0
            assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


# Beside 6 points: as many, a divisor, coprime, a common divisor, a single point.
@x64
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("n", "weighted"),
    [(6, False), slow(3, False), slow(5, False), (4, False), slow(1, False), (5, True)],
)
def test_values_and_gradients_against_finite_differences(p, n, weighted):
    x, y, directions = clouds(n, 6)
    a, b = (mass(n), mass(6, 1)) if weighted else (None, None)
    value, ours = power_and_grad(x, y, directions, p=p, x_weights=a, y_weights=b)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, by_pot(x, y, directions, p, a, b), rtol=1e-12)
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
@pytest.mark.parametrize("p", [slow(1), 2])
def test_percentile_form_against_numpy(p):
    x, y, directions = clouds(5, 6)
    levels, grid = np.random.default_rng(7).uniform(size=(8, 20)), np.linspace(0, 1, 100)

    def quantiles(points, t, row):
        return np.interp(row, grid, np.percentile(points @ t, 100 * grid))

    def by_numpy(x):
        pairs = zip(directions, levels)
        gaps = [quantiles(x, t, row) - quantiles(y, t, row) for t, row in pairs]
        return np.mean(np.abs(gaps) ** p)

    @jax.jit
    def value_and_grad(x, levels):
        options = {"p": p, "coupling": percentile_coupling(levels)}
        others = jnp.asarray(y), jnp.asarray(directions)
        return jax.value_and_grad(sliced_wasserstein_power)(x, *others, **options)

    value, gradient = value_and_grad(x, levels)
    np.testing.assert_allclose(value, by_numpy(x), rtol=1e-12)
    np.testing.assert_allclose(gradient, finite_differences(by_numpy, x), rtol=1e-6, atol=1e-9)


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


# Sorting, against NumPy


def hard_columns(n, dtype=np.float32):
    """[2, n, 4]: random, ties, ascending, descending, -0.0 with 0.0, infinite, constant, spread."""
    rng = np.random.default_rng(n)
    columns = [
        rng.standard_normal(n),
        rng.integers(0, 3, n),
        np.arange(n),
        -np.arange(n),
        rng.choice([-0.0, 0.0], n),
        rng.choice([-np.inf, np.inf, 1.0, np.finfo(dtype).max], n),
        np.full(n, 2.5),
        rng.standard_normal(n) * 10.0 ** rng.integers(-30, 30, n),
    ]
    columns = np.stack(columns, axis=1).astype(dtype)
    return np.stack([columns[:, :4], columns[:, 4:]])


def check_sorted(x, values, permutation):
    values, permutation = np.asarray(values), np.asarray(permutation)
    assert (values.dtype, permutation.dtype) == (x.dtype, np.int32)
    np.testing.assert_array_equal(values, np.sort(x, axis=-2))
    rows = np.broadcast_to(np.arange(x.shape[-2])[:, None], x.shape)
    np.testing.assert_array_equal(np.sort(permutation, axis=-2), rows)
    np.testing.assert_array_equal(np.take_along_axis(x, permutation, axis=-2), values)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        *itertools.product((1, 3, 8, 100), (np.float32, np.float64)),
        (4097, np.float32),
        *itertools.starmap(slow, itertools.product((2, 7, 17), (np.float32, np.float64))),
        slow(4097, np.float64),
    ],
)
def test_network_sorts_every_kind_of_column(n, dtype):
    x = hard_columns(n, dtype)
    if dtype == np.float64:  # below float32's resolution
        x[0, :, 0] = 1 + 1e-15 * np.random.default_rng(0).permutation(n)
    check_sorted(x, *sort_with_permutation(x))
    np.testing.assert_array_equal(sort_columns(x), np.sort(x, axis=-2), strict=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_columns_are_sorted_as_integers(monkeypatch, dtype):
    monkeypatch.setattr(sorting, "_by_network", None)
    for name in ("LONGEST_NETWORK", "LONGEST_NETWORK_OF_DOUBLES"):
        monkeypatch.setattr(sorting, name, 34)
    monkeypatch.setattr(sorting, "SORTS_AT_A_TIME", 3)
    x = hard_columns(35, dtype)  # compiled nowhere else
    check_sorted(x, *sort_with_permutation(x))
    np.testing.assert_array_equal(sort_columns(x), np.sort(x, axis=-2))


@pytest.mark.parametrize("function", [take_rows, put_rows])
def test_more_than_an_index_counts_is_refused(function):
    shape = 2**20, 2**11
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32))
    with pytest.raises(ValueError, match=r"more than 2.31 projections .* give a block_size"):
        jax.eval_shape(function, *arrays)


def test_rows_are_put_back_where_they_were_taken_from():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 3, 7, 4)).astype(np.float32)
    order = np.argsort(x, axis=-2).astype(np.int32)
    taken = take_rows(jnp.asarray(x), jnp.asarray(order))
    np.testing.assert_array_equal(taken, np.sort(x, axis=-2))
    np.testing.assert_array_equal(put_rows(taken, jnp.asarray(order)), x)
    twice = np.zeros_like(order)
    expected = np.broadcast_to(x[..., :1, :], x.shape)
    np.testing.assert_array_equal(take_rows(jnp.asarray(x), jnp.asarray(twice)), expected)


@pytest.mark.parametrize("most", [slow(1), 60, slow(100), 10**6])
def test_wide_matrices_are_cut_into_columns(monkeypatch, most):
    monkeypatch.setattr(sorting, "MOST_VALUES_A_PASS", most)
    x = np.concatenate([hard_columns(33), hard_columns(33)[::-1, :, :3]], axis=2)
    check_sorted(x, *sorting._by_network(jnp.asarray(x), True))
    np.testing.assert_array_equal(sorting._by_network(jnp.asarray(x), False)[0], np.sort(x, axis=1))


def test_nan_stays_in_its_column():
    x = hard_columns(16)
    x[0, 3, 1] = np.nan
    x[1, 5, 2] = -np.nan
    packed, permutation = map(np.asarray, sort_with_permutation(x))
    spoilt = np.isnan(x).any(axis=1)
    for values in (np.asarray(sort_columns(x)), packed):
        np.testing.assert_array_equal(np.isnan(values).any(axis=1), spoilt)
        for b, column in np.argwhere(~spoilt):
            expected = np.sort(x[b, :, column])
            np.testing.assert_array_equal(values[b, :, column], expected)
    np.testing.assert_array_equal(np.take_along_axis(x, permutation, axis=1), packed)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_nothing_to_sort_gives_nothing(shape):
    x = np.zeros(shape, np.float32)
    check_sorted(x, *sort_with_permutation(x))
    assert sort_columns(x).shape == shape


def test_vmap_over_any_axis():
    x = np.random.default_rng(1).standard_normal((5, 3, 4)).astype(np.float32)
    values, permutation = jax.vmap(sort_with_permutation, in_axes=1, out_axes=1)(x)
    check_sorted(x.swapaxes(0, 1), values.swapaxes(0, 1), permutation.swapaxes(0, 1))
    tangent = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    out = jax.vmap(lambda a, t: jax.jvp(sort_columns, (a,), (t,)), in_axes=1, out_axes=1)(
        x, tangent
    )
    order = np.argsort(x, axis=0)
    np.testing.assert_array_equal(out[0], np.take_along_axis(x, order, axis=0))
    np.testing.assert_array_equal(out[1], np.take_along_axis(tangent, order, axis=0))


@pytest.mark.parametrize("shape", [slow((5, 4)), (2, 5, 4), slow((2, 1, 5, 4))])
def test_derivatives_carry_tangents_with_the_values(shape):
    rng = np.random.default_rng(3)
    x, tangent, cotangent = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    order, back = np.argsort(x, axis=-2), np.zeros_like(x)
    np.put_along_axis(back, order, cotangent, axis=-2)
    for function in (sort_columns, lambda x: sort_with_permutation(x)[0]):
        values, moved = jax.jvp(function, (jnp.asarray(x),), (jnp.asarray(tangent),))
        np.testing.assert_array_equal(values, np.sort(x, axis=-2))
        np.testing.assert_array_equal(moved, np.take_along_axis(tangent, order, axis=-2))
        values, pull_back = jax.vjp(function, jnp.asarray(x))
        np.testing.assert_array_equal(values, np.sort(x, axis=-2))
        np.testing.assert_array_equal(pull_back(cotangent)[0], back)


def test_derivative_at_ties_is_that_of_a_permutation():
    x = np.zeros((2, 5, 4), np.float32)
    cotangent = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    back = np.asarray(jax.vjp(sort_columns, x)[1](cotangent)[0])
    np.testing.assert_array_equal(np.sort(back, axis=1), np.sort(cotangent, axis=1))
