"""Properties of EM, its starts and the sums over rows that both are made of, against NumPy.

A moment of n rows in d dimensions is a sum of n terms of d products: it is off by at most
m = 2 (n + 3 d + 8) roundings of the sum of the terms' absolute values, written out in each test.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from gaussian_mixtures import dense, restricted, weighted_moments
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from strategies import DECADES, DTYPES, SEEDS, few

from lib import gmm
from lib.gmm import covariances, em, starts
from lib.rows import Rows, sums

# (structure, points, components, dimension, dtype): each is compiled once, slowly.
CASES = (
    ("full", 21, 2, 3, np.float32),
    ("tied", 21, 3, 2, np.float64),
    ("diagonal", 9, 2, 1, np.float64),
    ("spherical", 14, 1, 3, np.float32),
    ("low_rank", 21, 2, 3, np.float32),
)


def structure_of(name):
    if name == "low_rank":
        return covariances.low_rank(jax.random.key(0), 1)
    return getattr(covariances, name)


def sample(rng, n, d, exponent, dtype):
    """Rows at a scale, the last of them equal."""
    x = 10.0**exponent * (1 + rng.normal(size=(n, d)))
    x[-3:] = x[-1]
    return x.astype(dtype)


@jax.jit
def steps(mixture, x, weights, given_):
    """The M-step from given responsibilities, and a step of EM."""
    moments = em.block_moments(em.prepare(mixture, x.dtype), x, weights, given_)
    maximized = em.maximization(mixture, moments, regularization=0.0)
    moved = em.em_step(mixture, x, weights, regularization=0.0, block_size=8)
    return maximized, moved


@pytest.mark.slow
@few(14)
@given(st.sampled_from(CASES), DECADES, SEEDS)
def test_steps(case, exponent, seed):
    """The M-step is the weighted moments of the rows; rows of weight 0, another order and a weight
    split between two equal rows change nothing; a step of EM does not go down."""
    (name, n, num, d, dtype), rng = case, np.random.default_rng(seed)
    scale, eps = 10.0**exponent, np.finfo(dtype).eps
    x, m = sample(rng, n, d, exponent, dtype), 2 * (n + 3 * d + 8)
    weights = rng.uniform(0.2, 1, n)
    weights[-3:-1] = 0
    given_ = rng.dirichlet(np.ones(num), n).astype(dtype)
    given_[-3:] = given_[-1]
    split = weights.copy()
    split[-3:] = weights[-1] * np.array([0.5, 0.25, 0.25])
    order = rng.permutation(n)
    variances = np.full(d, scale**2)
    with jax.enable_x64(True):
        start = gmm.Mixture(
            jnp.asarray(rng.dirichlet(np.full(num, 5.0))),
            jnp.asarray(x[:num]),
            structure_of(name)(num, jnp.asarray(variances)),
        )
        start = gmm.cast(start, dtype)
        inputs = (x, weights, given_), (x, split, given_), (x[order], split[order], given_[order])
        results = [steps(start, *(jnp.asarray(a, dtype) for a in one)) for one in inputs]
        again = steps(results[0][1][0], *(jnp.asarray(a, dtype) for a in inputs[0]))[1][1]
        results, again = jax.tree.map(np.asarray, (results, again))
    for leaf in jax.tree.leaves(results):
        assert leaf.dtype == dtype
        assert np.isfinite(leaf).all()
    wide, shares = x.astype(float), weights[:, None] * given_.astype(float)
    means, moments, counts = weighted_moments(wide, shares)
    # Moments are taken about the start's means, or about the middle of them.
    centers = np.asarray(start.means, float)
    sizes = np.abs(wide - centers.mean(axis=0)) + np.abs(centers - centers.mean(axis=0)).max(axis=0)
    size = sizes.max() + np.abs(centers).max()
    for (mixture, ridge), (moved, info) in results:
        assert isinstance(info, em.StepInfo)
        np.testing.assert_allclose(mixture.weights, counts / counts.sum(), rtol=m * eps)
        np.testing.assert_allclose(mixture.means, means, rtol=0, atol=m * eps * size)
        assert np.all(ridge == 0)
        np.testing.assert_allclose(moved.weights.sum(), 1, rtol=m * eps)
        expected = restricted(name, moments, counts / counts.sum())
        if expected is not None:
            matrices = mixture.covariance.matrices()
            np.testing.assert_allclose(matrices, expected, rtol=0, atol=m * eps * size**2)
        # Log-densities are off by 3 d + 8 roundings of the squares and logarithms in them.
        densities = np.square(sizes).sum(axis=1).max() / scale**2 + 2 * d * abs(np.log(scale)) + 5
        assert again.log_likelihood >= info.log_likelihood - 40 * m * eps * densities
        assert abs(info.log_likelihood - results[0][1][1].log_likelihood) <= m * eps * densities
        np.testing.assert_allclose(info.counts.sum(), weights.sum(), rtol=m * eps)


far_step = jax.jit(partial(em.em_step, regularization=0.0))
SLOW = [slow(name) for name in ("full", "low_rank")]


def numpy_step(mixture, x):
    """In float64: log-likelihood, then weights, means and dense covariances after a step of EM."""
    weights, means, structure = jax.tree.map(np.float64, mixture)
    d, before = means.shape[1], dense(mixture)
    logs = [multivariate_normal(*pair).logpdf(x) for pair in zip(means, before)]
    joint = np.log(weights) + np.stack(logs, axis=1)
    density = logsumexp(joint, axis=1)
    means, after, counts = weighted_moments(x, np.exp(joint - density[:, None]))
    weights = counts / len(x)
    match structure:
        case gmm.Tied():
            after = np.stack([np.einsum("k,kij->ij", weights, after)] * len(means))
        case gmm.Diagonal():
            after = np.eye(d) * after
        case gmm.Spherical():
            after = np.eye(d) * np.trace(after, axis1=1, axis2=2)[:, None, None] / d
        case gmm.LowRank():
            for k, (w, scatter) in enumerate(zip(structure.loadings, after)):
                b = w.T @ np.linalg.inv(before[k])
                new = scatter @ b.T @ np.linalg.inv(np.eye(w.shape[1]) - b @ w + b @ scatter @ b.T)
                after[k] = new @ new.T + np.diag(np.diag(scatter - new @ b @ scatter))
    return density.mean(), weights, means, after


@pytest.mark.parametrize("name", ["tied", "diagonal", "spherical", *SLOW])
@few(8)
@given(st.floats(0, 5), st.booleans(), st.booleans(), SEEDS)
def test_components_far_apart(name, exponent, beyond, astray, seed):
    """Of three components two overlap and one is up to 1e5 standard deviations away. All is float32
    and off by what it is to round the rows, in standard deviations. Where a mean is too far from
    its rows its ridge is infinite and its covariance stays, and the next step finds it."""
    rng, (n, num, d), far = np.random.default_rng(seed), (48, 3, 2), 10.0 ** (exponent, 5)[astray]
    centers = np.array([[0, 0], [2, 1], [far, -far]]) + far * beyond
    x = (centers[np.arange(n) % num] + rng.normal(size=(n, d))).astype(np.float32)
    means = centers + 0.3 * rng.normal(size=(num, d))
    means[2] += 1000 * astray
    covariance = structure_of(name)(num, jnp.ones(d, jnp.float32))
    mixture = gmm.cast(gmm.Mixture(np.full(num, 1 / num), means, covariance), np.float32)
    close = partial(
        np.testing.assert_allclose,
        rtol=0,
        atol=4 * np.finfo(np.float32).eps * (np.abs(x).max() + n),
    )
    for step in range(3):
        value, *expected = numpy_step(mixture, x.astype(float))
        before, (mixture, info) = mixture, far_step(mixture, jnp.asarray(x))
        parameters = (*jax.tree.map(np.float64, mixture[:2]), dense(mixture))
        kept = np.isinf(np.asarray(info.ridge))
        np.testing.assert_array_equal(
            kept, astray & (step == 0) & ((np.arange(num) == 2) | (name == "tied"))
        )
        if kept.any():
            expected[2][kept] = dense(before)[kept]
        else:
            close(np.float64(info.log_likelihood), value)
        for one, other in zip(parameters, expected):
            close(one, other)


jit_seeds = jax.jit(starts.kmeans_plus_plus, static_argnums=2)


@few(20)
@given(st.sampled_from([(1, 1, 1), (12, 1, 7)]), DTYPES, DECADES, SEEDS)
def test_seeds_are_points_of_positive_weight(shape, dtype, exponent, seed):
    """And distinct as long as there are distinct points left; a power of two changes no bit."""
    (n, d, num), rng = shape, np.random.default_rng(seed)
    x = (10.0**exponent * rng.integers(0, 3, (n, d))).astype(dtype)
    weights = (rng.integers(0, 2, n) * rng.uniform(0.5, 1, n)).astype(dtype)
    weights[rng.integers(n)] = 1
    with jax.enable_x64(True):
        points, given_ = jnp.asarray(x), jnp.asarray(weights)
        centers = jit_seeds(jax.random.key(seed), points, num, given_)
        doubled = jit_seeds(jax.random.key(seed), 4 * points, num, given_)
        centers, doubled = np.asarray(centers), np.asarray(doubled)
    assert (centers.dtype, centers.shape) == (dtype, (num, d))
    present = {tuple(row) for row in x[weights > 0]}
    chosen = {tuple(row) for row in centers}
    assert chosen <= present
    assert len(chosen) == min(num, len(present))
    np.testing.assert_array_equal(doubled, 4 * centers)


# Rows, columns, rows of a chunk and of a block, dtype.
LAYOUTS = (1, 1, 3, 4, "f8"), (15, 3, 100, 4, "f4"), (16, 3, 6, 17, "u1"), (15, 3, 3, 2, "f8")


def power_sums(power, points, weights):
    return {"sum": weights @ points**power, "weight": weights.sum()}


@few(12)
@given(st.sampled_from(LAYOUTS), SEEDS)
def test_sums_over_rows(layout, seed):
    """Of any blocks and chunks; products in the rows' dtype, sums over blocks in float64."""
    (n, d, chunk_size, block_size, dtype), rng = layout, np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, d)).astype(dtype)
    weights = rng.integers(0, 5, n).astype(float)
    weights[0] = 1
    computed = np.float32 if dtype == "f4" else np.float64
    data = Rows(x, weights=weights, dtype=computed, block_size=block_size, chunk_size=chunk_size)
    streamed = sums.sum_over_rows(power_sums, np.asarray(2, computed), data)
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (x, weights))
        options = {"dtype": computed, "total_dtype": computed, "block_size": block_size}
        in_blocks = sums.sum_over_blocks(power_sums, jnp.asarray(2, computed), *arrays, **options)
    wide = x.astype(float)
    eps = np.finfo(computed).eps
    for result, total in ((streamed, np.float64), (in_blocks, computed)):
        result = {name: np.asarray(value) for name, value in result.items()}
        assert {value.dtype for value in result.values()} == {np.dtype(total)}
        np.testing.assert_allclose(result["sum"], weights @ wide**2, rtol=(n + 3) * eps)
        assert result["weight"] == weights.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_finite_in_the_dtype_of_the_products(dtype):
    """What float64 holds is no infinity there, and is one in float32; neither warns."""
    check = partial(Rows, np.array([[0.0], [1e39]]), dtype=dtype)
    if dtype == np.float64:
        assert check().shape == (2, 1)
    else:
        with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 rows, the first is row 1"):
            check()
