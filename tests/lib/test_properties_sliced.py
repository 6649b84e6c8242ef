"""Properties of sorting and of sliced-Wasserstein distances.

The oracle walks along two sorted clouds by plain loops in float64. A projection is off by (d + 2)
eps of the longest point, and sorting moves no value by more than the worst of them: call it delta.
A cost |u - v|^p then moves by p D^(p-1) delta + delta^p, D the largest difference, and its sum over
K pairs and L directions has K + L roundings. Masses cumulated in the data's dtype move each of
n + m edges by n + m eps, and what lies between by at most D^p.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    EXPONENTS,
    SEEDS,
    assert_finite,
    assert_within,
    clouds,
    draw_directions,
    equal,
    projection_rounding,
    walk,
)

from lib.sliced_wasserstein import (
    orthogonal_directions,
    pairwise_cost,
    percentile_coupling,
    project,
    random_directions,
    self_pairwise_cost,
    sliced_wasserstein,
    sliced_wasserstein_power,
    sort_columns,
    sort_with_permutation,
    sum_over_directions,
)

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
few = settings(max_examples=12, deadline=None)


# Sorting


@jax.jit
def sort_and_transpose(x, cotangent):
    values, transpose = jax.vjp(sort_columns, x)
    return values, sort_with_permutation(x), transpose(cotangent)[0]


@many
@given(SEEDS, DTYPES, st.sampled_from([(1, 1), (2, 9, 3)]))
def test_columns_are_sorted_whatever_is_in_them(seed, dtype, shape):
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], size=shape) * 10.0 ** rng.uniform(-30, 30, size=shape)
    special = rng.choice([0.0, -0.0, np.inf, -np.inf, 1.0], size=shape)
    x = np.where(rng.random(shape) < 0.4, special, x).astype(dtype)
    cotangent = rng.normal(size=shape).astype(dtype)
    values, (again, permutation), gradient = sort_and_transpose(x, cotangent)
    np.testing.assert_array_equal(values, np.sort(x, axis=-2))
    np.testing.assert_array_equal(again, values)
    assert values.dtype == again.dtype == gradient.dtype == dtype
    assert (np.sort(permutation, axis=-2) == np.arange(shape[-2])[:, None]).all()
    np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(permutation), -2), values)
    # The gradient brings each cotangent back to the row that its value came from.
    back = np.take_along_axis(np.asarray(gradient), np.asarray(permutation), -2)
    np.testing.assert_array_equal(back, cotangent)


# Distances


def quantiles(line, levels):
    """Interpolated between 100 equally spaced percentiles."""
    return np.interp(levels * 99, np.arange(100), np.percentile(line, np.linspace(0, 100, 100)))


@partial(jax.jit, static_argnames=("p", "block_size"))
def powers(x, y, w, v, directions, key, p, block_size):
    options = {"p": p, "block_size": block_size}
    plain = partial(sliced_wasserstein_power, **options)
    root = partial(sliced_wasserstein, **options, x_weights=w, y_weights=v)
    found = {
        "equal": jax.value_and_grad(plain)(x, y, directions),
        # For p = 1 this is the power itself.
        "root": jax.value_and_grad(root)(x, y, directions) if p == 2 else root(x, y, directions),
    }
    if block_size is None:
        coupling = percentile_coupling(jax.random.uniform(key, (3, 3), x.dtype))
        found["percentile"] = plain(x, y, directions, coupling=coupling)
    return found


@many
@given(clouds(shapes=[(1, 4, 1), (5, 5, 3)]), st.sampled_from([1, 2]))
def test_sliced_wasserstein(case, p):
    p = 2 if len(case.x) == 1 else p  # a program less for each dtype
    x, y, w, v = case.in_float64()
    (n, d), m, eps, dtype = x.shape, len(y), case.eps, case.x.dtype
    num, block_size = (4, 2) if n == 1 else (3, None)
    directions, key = draw_directions(case.seed, num, d, dtype), jax.random.key(case.seed)
    found = powers(*case.on_device(), jnp.asarray(directions), key, p, block_size)
    directions = directions.astype(np.float64)
    lines = [(x @ direction, y @ direction) for direction in directions]
    bound, largest = projection_rounding(x, y, directions, p, eps, n + m)
    expected = np.mean([walk(*line, equal(n), equal(m), p)[0] for line in lines])
    assert_within(found["equal"][0], expected, bound + case.tiny, dtype)
    assert_finite(found, dtype)
    expected = np.mean([walk(*line, w / w.sum(), v / v.sum(), p)[0] for line in lines])
    bound += 4 * (n + m) ** 2 * eps * largest + case.tiny
    ends = [max(expected + sign * bound, 0) ** (1 / p) for sign in (-1, 1)]
    spread = max(abs(end - expected ** (1 / p)) for end in ends)
    root = found["root"][0] if p == 2 else found["root"]
    assert_within(root, expected ** (1 / p), spread + 4 * eps * ends[1], dtype)
    # The points as a whole do not move: the slopes of a translation, p D^(p-1) at most.
    gradient = np.asarray(found["equal"][1], np.float64)
    if p == 2:
        mean = 2 * np.mean([u.mean() - v.mean() for u, v in lines] * directions.T, axis=1)
        size = 2 * (math.sqrt(largest) + np.abs(x).max() + np.abs(y).max())
        assert_within(gradient.sum(axis=0), mean, (2 * d + n + m + 16) * eps * size + case.tiny)
    if "percentile" not in found:
        return
    levels = np.asarray(jax.random.uniform(key, (3, 3), dtype), np.float64)
    expected, width = 0.0, max(np.ptp(line) for pair in lines for line in pair)
    for (u, v), at in zip(lines, levels):
        expected += np.mean(np.abs(quantiles(u, at) - quantiles(v, at)) ** p) / len(lines)
    # A position among 100 percentiles is off by 100 eps, and those among n points by n eps.
    shift = (
        4 * (100 + n + m) * eps * width + projection_rounding(x, y, directions, 1, eps, n + m)[0]
    )
    bound = p * (largest ** (1 / p)) ** (p - 1) * shift + shift**p + 16 * eps * largest
    assert_within(found["percentile"], expected, bound + case.tiny, dtype)


@jax.jit
def through_percentiles(values, levels):
    pair = percentile_coupling(levels)(len(values), len(values))
    return pair.source(values), pair.mass


@few
@given(SEEDS, DTYPES, EXPONENTS, st.sampled_from([1, 5]))
def test_percentiles(seed, dtype, exponent, n):
    rng, eps = np.random.default_rng(seed), np.finfo(dtype).eps
    values = np.sort(10.0**exponent * rng.normal(size=(n, 2)), axis=0).astype(dtype)
    levels = rng.random((2, 3)).astype(dtype)
    found, mass = through_percentiles(values, levels)
    values = values.astype(np.float64)
    expected = np.stack([quantiles(*pair) for pair in zip(values.T, levels.astype(float))], axis=1)
    bound = 4 * (100 + n) * eps * np.ptp(values) + 4 * eps * np.abs(values).max()
    assert_within(found, expected, bound, dtype)
    assert_within(mass, equal(3), eps, dtype)


@partial(jax.jit, static_argnames="p")
def pairwise(x, y, mass, slope, p):
    across, transpose = jax.vjp(lambda x, y: pairwise_cost(x, y, mass, p), x, y)
    return across, transpose(slope), self_pairwise_cost(x, mass, p), project(x, y[0, :2])


@few
@given(SEEDS, DTYPES, EXPONENTS, st.sampled_from([1, 2]), st.booleans())
def test_pairwise_costs(seed, dtype, exponent, p, identical):
    rng, eps = np.random.default_rng(seed), np.finfo(dtype).eps
    x, y = ((10.0**exponent * rng.normal(size=(c, 4, 3))).astype(dtype) for c in (2, 3))
    if identical:
        y[:2] = x
    mass = rng.dirichlet(np.ones(4)).astype(dtype)
    slope = rng.normal(size=(2, 3)).astype(dtype)
    cost, gradients, itself, projected = pairwise(x, y, mass, slope, p)
    x, y, mass, slope = (array.astype(np.float64) for array in (x, y, mass, slope))
    difference = x[:, None] - y[None]
    expected = np.einsum("k,abkl->ab", mass, np.abs(difference) ** p)
    assert_within(cost, expected, 12 * eps * expected, dtype)
    among = np.einsum("k,abkl->ab", mass, np.abs(x[:, None] - x[None]) ** p)
    assert_within(itself, among, 12 * eps * among, dtype)
    slopes = p * np.abs(difference) ** (p - 1) * np.sign(difference) * mass[:, None]
    for gradient, axes in zip(gradients, ("ab,abkl->akl", "ab,abkl->bkl")):
        sign = 1 if axes.endswith("akl") else -1
        size = np.einsum(axes, np.abs(slope), np.abs(slopes))
        assert_within(gradient, sign * np.einsum(axes, slope, slopes), 8 * eps * size, dtype)
    size = np.abs(x) @ np.abs(y[0, :2]).T
    assert_within(projected, x @ y[0, :2].T, 6 * eps * size, dtype)


@partial(jax.jit, static_argnames="dtype")
def draw_both(key, dtype):
    line = random_directions(key, 5, 1, dtype=dtype)
    return line, orthogonal_directions(key, 5, 3, dtype=dtype)


@partial(jax.jit, static_argnames="block_size")
def block_sums(directions, block_size):
    def term(block):
        return {"sum": block.sum(axis=0), "squares": jnp.sum(block**2)}

    return sum_over_directions(term, directions, block_size)


@few
@given(SEEDS, DTYPES, st.sampled_from([None, 2]))
def test_directions_and_sums_over_them(seed, dtype, block_size):
    key, eps = jax.random.key(seed), np.finfo(dtype).eps
    for directions in draw_both(key, dtype):
        count, d = directions.shape
        directions = np.asarray(directions)
        assert directions.dtype == dtype
        # Of d products or Householder reflections.
        assert_within(np.linalg.norm(directions, axis=1), np.ones(count), 8 * (d + 2) * eps)
    gram = directions[:3].astype(float) @ directions[:3].T
    assert_within(gram, np.eye(3), 64 * eps)
    found = block_sums(jnp.asarray(directions), block_size)
    directions = directions.astype(float)
    assert_within(found["sum"], directions.sum(axis=0), 5 * 5 * eps, dtype)
    assert_within(found["squares"], np.square(directions).sum(), 30 * eps, dtype)
