"""Properties of sliced-Wasserstein distances, against POT in float64.

A projection is off by (d + 2) eps of the longest point, and sorting moves no value by more than the
worst of them: call it delta.
A cost |u - v|^p then moves by p D^(p-1) delta + delta^p, D the largest difference, and its sum over
K pairs and L directions has K + L roundings. Masses cumulated in the data's dtype move each of
n + m edges by n + m eps, and what lies between by at most D^p.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, EXPONENTS, SEEDS, assert_finite, assert_within, drawn_clouds

from lib.sliced_wasserstein import (
    _distances,
    pairwise_cost,
    percentile_coupling,
    project,
    self_pairwise_cost,
    sliced_wasserstein,
    sliced_wasserstein_power,
)

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
few = settings(max_examples=12, deadline=None)


def projection_rounding(x, y, directions, p, eps, pairs):
    """The bound for equal weights, and D^p."""
    u, v = x @ directions.T, y @ directions.T
    largest = np.abs(u[:, None] - v[None]).max()
    longest = max(np.linalg.norm(z, axis=1).max() for z in (x, y))
    delta = 2 * (x.shape[1] + 2) * eps * longest
    bound = p * largest ** (p - 1) * delta + delta**p
    return bound + (pairs + len(directions) + 6) * eps * largest**p, largest**p


def draw_directions(seed, num, d, dtype):
    normal = np.random.default_rng(seed).normal(size=(num, d))
    return (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(dtype)


def quantiles(line, levels):
    """Interpolated between 100 equally spaced percentiles."""
    return np.interp(levels * 99, np.arange(100), np.percentile(line, np.linspace(0, 100, 100)))


@partial(jax.jit, static_argnames=("p", "block_size"))
def powers(x, y, w, v, directions, key, p, block_size):
    options = {"p": p, "block_size": block_size}
    plain = partial(sliced_wasserstein_power, **options)
    root = partial(sliced_wasserstein, **options, x_weights=w, y_weights=v)
    results = {
        "equal": jax.value_and_grad(plain)(x, y, directions),
        # For p = 1 this is the power itself.
        "root": jax.value_and_grad(root)(x, y, directions) if p == 2 else root(x, y, directions),
    }
    if block_size is None:
        coupling = percentile_coupling(jax.random.uniform(key, (3, 3), x.dtype))
        results["percentile"] = plain(x, y, directions, coupling=coupling)
    return results


@drawn_clouds([(1, 4, 1), (5, 5, 3)])
@many
@given(st.data(), st.sampled_from([1, 2]))
def test_sliced_wasserstein(drawn, data, p):
    case = data.draw(drawn)
    p = 2 if len(case.x) == 1 else p  # a program less for each dtype
    x, y, w, v = case.in_float64()
    (n, d), m, eps, dtype = x.shape, len(y), case.eps, case.x.dtype
    num, block_size = (4, 2) if n == 1 else (3, None)
    directions, key = draw_directions(case.seed, num, d, dtype), jax.random.key(case.seed)
    results = powers(*case.on_device(), jnp.asarray(directions), key, p, block_size)
    directions = directions.astype(np.float64)
    lines = [(x @ direction, y @ direction) for direction in directions]
    bound, largest = projection_rounding(x, y, directions, p, eps, n + m)
    expected = np.mean([ot.wasserstein_1d(*line, p=p) for line in lines])
    assert_within(results["equal"][0], expected, bound + case.tiny, dtype)
    assert_finite(results, dtype)
    shares = w / w.sum(), v / v.sum()
    expected = np.mean([ot.wasserstein_1d(*line, *shares, p=p) for line in lines])
    bound += 4 * (n + m) ** 2 * eps * largest + case.tiny
    ends = [max(expected + sign * bound, 0) ** (1 / p) for sign in (-1, 1)]
    spread = max(abs(end - expected ** (1 / p)) for end in ends)
    root = results["root"][0] if p == 2 else results["root"]
    assert_within(root, expected ** (1 / p), spread + 4 * eps * ends[1], dtype)
    # The points as a whole do not move: the slopes of a translation, p D^(p-1) at most.
    gradient = np.asarray(results["equal"][1], np.float64)
    if p == 2:
        mean = 2 * np.mean([u.mean() - v.mean() for u, v in lines] * directions.T, axis=1)
        size = 2 * (math.sqrt(largest) + np.abs(x).max() + np.abs(y).max())
        assert_within(gradient.sum(axis=0), mean, (2 * d + n + m + 16) * eps * size + case.tiny)
    if "percentile" not in results:
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
    assert_within(results["percentile"], expected, bound + case.tiny, dtype)


@partial(jax.jit, static_argnames="p")
def pairwise(x, y, mass, slope, p):
    across, transpose = jax.vjp(lambda x, y: pairwise_cost(x, y, mass, p), x, y)
    itself, back = jax.vjp(lambda x: self_pairwise_cost(x, mass, p), x)
    return across, transpose(slope), itself, back(slope[:, :2])[0], project(x, y[0, :2])


@few
@given(SEEDS, DTYPES, EXPONENTS, st.sampled_from([1, 2]), st.booleans())
def test_pairwise_costs(seed, dtype, exponent, p, identical):
    rng, eps = np.random.default_rng(seed), np.finfo(dtype).eps
    x, y = ((10.0**exponent * rng.normal(size=(c, 4, 3))).astype(dtype) for c in (2, 3))
    if identical:
        y[:2] = x
    mass = rng.dirichlet(np.ones(4)).astype(dtype)
    slope = rng.normal(size=(2, 3)).astype(dtype)
    cost, gradients, itself, self_gradient, projected = pairwise(x, y, mass, slope, p)
    x, y, mass, slope = (array.astype(np.float64) for array in (x, y, mass, slope))
    difference = x[:, None] - y[None]
    expected = np.einsum("k,abkl->ab", mass, np.abs(difference) ** p)
    assert_within(cost, expected, 12 * eps * expected, dtype)
    among = np.einsum("k,abkl->ab", mass, np.abs(x[:, None] - x[None]) ** p)
    assert_within(itself, among, 12 * eps * among, dtype)
    # A slope that is not symmetric: the halves of the pairs (a, b) and (b, a) differ.
    apart, both = x[0] - x[1], slope[0, 1] + slope[1, 0]
    gradient = both * p * np.abs(apart) ** (p - 1) * np.sign(apart) * mass[:, None]
    size = (np.abs(slope[0, 1]) + np.abs(slope[1, 0])) * p * np.abs(apart) ** (p - 1)
    bound = 8 * eps * np.stack([size, size]) * mass[:, None]
    assert_within(self_gradient, np.stack([gradient, -gradient]), bound, dtype)
    slopes = p * np.abs(difference) ** (p - 1) * np.sign(difference) * mass[:, None]
    for gradient, axes in zip(gradients, ("ab,abkl->akl", "ab,abkl->bkl")):
        sign = 1 if axes.endswith("akl") else -1
        size = np.einsum(axes, np.abs(slope), np.abs(slopes))
        assert_within(gradient, sign * np.einsum(axes, slope, slopes), 8 * eps * size, dtype)
    size = np.abs(x) @ np.abs(y[0, :2]).T
    assert_within(projected, x @ y[0, :2].T, 6 * eps * size, dtype)


@pytest.mark.parametrize("p", [slow(1), 2])
def test_sums_of_accelerators_and_in_parts(monkeypatch, p):
    """Fused sums, and a few rows of classes at a time, against NumPy."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(c, 4, 3)) for c in (5, 3))
    mass, slope = rng.dirichlet(np.ones(4)), rng.normal(size=(5, 3))
    arrays, difference = tuple(map(jnp.asarray, (x, y, mass))), x[:, None] - y[None]
    expected = np.einsum("k,abkl->ab", mass, np.abs(difference) ** p)
    np.testing.assert_allclose(_distances._fused_cost(*arrays, p=p), expected, rtol=1e-14)
    monkeypatch.setattr(_distances, "MAX_RUNNING_SUM", 2 * 3 * 3)  # two rows of five
    monkeypatch.setattr(_distances, "MAX_FUSED_SUM", 2)  # of three classes
    for cost in (_distances._looped_cost, _distances._fused_cost):
        np.testing.assert_allclose(cost(*arrays, p=p), expected, rtol=1e-14)
    slopes = p * np.abs(difference) ** (p - 1) * np.sign(difference)
    expected = np.einsum("ab,k,abkl->akl", slope, mass, slopes)
    fused = _distances._fused_slope(*arrays, jnp.asarray(slope), p=p)
    np.testing.assert_allclose(fused, expected, rtol=1e-13, atol=1e-15)
