"""Two-sample, k-sample and independence tests against loops, closed forms and their level."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from scipy.spatial.distance import pdist, squareform
from scipy.stats import binom
from strategies import normal

from lib.drmmd import cutoff, showalter, tikhonov
from lib.kernels import bandwidth_grid, gaussian, imq, laplace, linear, polynomial, riesz
from lib.two_sample import (
    MMD,
    _permutations,
    default_kernels,
    independence_test,
    k_sample_test,
    mmd_squared_interval,
    permutations,
    two_sample_test,
    witness,
)
from lib.two_sample._permutations import _permutation_p_values


def test_permutations():
    draws = np.asarray(permutations(jax.random.key(0), 3000, 4))
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.tile(np.arange(4), (3000, 1)))
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - 125).max() < 4.5 * np.sqrt(125)


def aggregated(p):
    """Of p-values [tests, 1 + B]: the smallest, of equal ones that of the largest mean 1 / p."""
    order = [(round(column.min(), 9), -round(np.mean(1 / column), 6)) for column in p.T]
    return np.mean([pair <= order[0] for pair in order])


def test_p_values_agree_with_a_loop_over_the_same_permutations(x64):
    x, y = normal(0, 12, 2), 0.5 + normal(1, 9, 2)
    kernels = [gaussian(0.5), gaussian(2.0), imq(1.0)]
    relabellings = permutations(jax.random.key(0), 60, 21)
    test = jax.jit(
        lambda key, x, y, r: two_sample_test(key, x, y, kernels, lmbdas=MMD, relabellings=r)
    )
    result = test(jax.random.key(1), x, y, relabellings)

    squares = squareform(pdist(np.concatenate([x, y]))) ** 2
    grams = np.exp(-squares / (2 * 0.5**2)), np.exp(-squares / 8), 1 / np.sqrt(1 + squares)
    # The point at position i takes the label of position order[i].
    first = np.concatenate([np.arange(21)[None], relabellings]) < 12
    signs = first / 12 - ~first / 9
    values = np.array([np.einsum("bi,ij,bj->b", signs, gram, signs) for gram in grams])
    p = (values[:, None] >= values[:, :, None]).mean(axis=2)
    np.testing.assert_allclose(result.statistics[:, 0], values[:, 0], rtol=1e-10)
    np.testing.assert_allclose(result.p_values[:, 0], p[:, 0])
    assert 1 / 61 < p[:, 0].min() < 0.5
    np.testing.assert_allclose(result.p_value, aggregated(p))


KERNELS = [gaussian(1.0), laplace(0.5), riesz(), riesz(0.5), linear(), polynomial(3), imq(1.0)]


@jax.jit
def p_values_of_all_kernels(key, x, y):
    return two_sample_test(key, x, y, KERNELS, num_permutations=99)


@pytest.mark.parametrize(
    ("dtype", "n", "m", "d"),
    [
        (np.float32, 7, 3, 1),
        slow(np.float32, 20, 20, 3),
        slow(np.float64, 30, 40, 12),
    ],
)
def test_equal_statistics_are_ties_and_count_against_rejection(dtype, n, m, d):
    """Of samples with one value, and with one point that has another, every labelling is as far."""
    with jax.enable_x64(dtype == np.float64):
        for value in (0, 1, 0.37, 1000.3):
            x, y = np.full((n, d), value, dtype), np.full((m, d), value, dtype)
            p = p_values_of_all_kernels(jax.random.key(1), x, y)
            assert (p.p_values == 1).all()
            assert p.p_value == 1
            if n == m:
                x[-1] = 2.1
                p = p_values_of_all_kernels(jax.random.key(1), x, y)
                assert (p.p_values == 1).all()


def results_of(keys, draws, kernels, n, num_permutations, **options):
    """Of the first n points of each draw against the others."""

    def test(draw):
        key, points = draw
        samples = points[:n], points[n:]
        return two_sample_test(key, *samples, kernels, num_permutations=num_permutations, **options)

    return jax.jit(partial(jax.lax.map, test))((keys, draws))


@pytest.mark.slow
def test_the_level_holds_for_rare_features():
    """Of 30 against 40 points."""
    repeats = 300
    draws = (np.random.default_rng(0).random((repeats, 70, 1)) < 0.005).astype("f")
    keys = jax.random.split(jax.random.key(0), repeats)
    p = results_of(keys, draws, [gaussian(1.0), riesz()], 30, 99).p_value
    for level in (0.05, 0.01):
        share = np.mean([float(value) <= level for value in p])
        assert share <= level + 3 * np.sqrt(level * (1 - level) / repeats)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_p_values_keep_the_order_of_the_shares_that_they_round(dtype):
    """As Python numbers too: 5 / 100 <= .05, whatever the dtype holds of it."""
    with jax.enable_x64(dtype == np.float64):
        for size in (40, 100):
            p = np.asarray(jax.jit(_permutation_p_values)(np.arange(size, dtype=dtype), 0.0))
            shares = np.arange(size, 0, -1) / size
            assert p.dtype == dtype
            assert all(float(value) <= share for value, share in zip(p, shares))
            np.testing.assert_allclose(p, shares, rtol=2e-7)


@jax.jit
def p_values_with_a_factor(x, y, factor):
    kernels = [gaussian(1.0), lambda x, y: factor * riesz()(x, y)]
    return two_sample_test(jax.random.key(0), x, y, kernels)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_p_value(bad):
    x, y = normal(0, 8, 2).astype("f"), normal(1, 6, 2).astype("f")
    spoilt = x.copy()
    spoilt[3, 1] = bad
    result = p_values_with_a_factor(spoilt, y, 1.0)
    assert np.isnan([*result.p_values.ravel(), result.p_value]).all()
    result = p_values_with_a_factor(x, y, bad)
    np.testing.assert_array_equal(np.isnan(result.p_values).all(axis=1), [False, True])
    assert np.isnan(result.p_value)


def test_level():
    """Of 2,000 tests of equal laws a share of 0.05 rejects at 0.05, exactly up to ties."""
    repeats = 2000
    draws = jax.random.split(jax.random.key(0), repeats), normal(0, repeats, 14, 2).astype("f")
    kernels = [gaussian(bandwidth) for bandwidth in (0.2, 1.0, 5.0)]
    result = results_of(*draws, kernels, 8, 39, lmbdas=MMD)
    low, high = binom.ppf([1e-3, 1 - 1e-3], repeats, 0.05)
    assert (np.asarray(result.p_value) <= 0.05).sum() <= high
    assert low <= (np.asarray(result.p_values)[:, 1, 0] <= 0.05).sum() <= high
    # The smallest of the p-values, uncorrected, is what the bound above would catch.
    assert (np.asarray(result.p_values).min(axis=(1, 2)) <= 0.05).sum() > high


def test_power_and_the_grid_of_bandwidths():
    """A shift is found, and two clusters of the same mean and variance, by the narrow kernels."""

    @jax.jit
    def test(key, x, y):
        kernels = [gaussian(bandwidth) for bandwidth in bandwidth_grid(key, x, y)]
        return two_sample_test(key, x, y, kernels, num_permutations=199)

    x, y = normal(0, 100, 1).astype("f"), normal(1, 80, 1).astype("f")
    key = jax.random.key(0)
    assert test(key, x, y).p_value > 0.05
    assert test(key, x, y + np.float32(0.7)).p_value <= 0.01
    clusters = (np.sign(normal(2, 80, 1)) + 0.2 * y) / np.float32(np.sqrt(1.04))
    result = test(key, x, clusters.astype("f"))
    assert result.p_value <= 0.01 < 0.1 < result.p_values[-1, 0]


def test_one_kernel_needs_no_correction():
    x, y = jnp.asarray(normal(0, 20, 2), "f"), jnp.asarray(normal(1, 20, 2), "f")
    test = jax.jit(lambda key: two_sample_test(key, x, y, [laplace(1.0)], lmbdas=MMD))
    one, again, other = (test(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.p_value == one.p_values[0, 0] == again.p_value != other.p_value
    np.testing.assert_allclose(one.statistics, other.statistics, rtol=1e-5)
    with pytest.raises(ValueError, match="kernels is empty"):
        two_sample_test(jax.random.key(0), x, y, [])


def test_memory_of_the_test_is_that_of_its_permutations():
    points = jax.ShapeDtypeStruct((30_000, 16), jnp.float32)
    test = partial(
        two_sample_test, kernels=[gaussian(1.0), imq(1.0)], num_permutations=20, lmbdas=MMD
    )
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    memory = jax.jit(test).lower(key, points, points).compile().memory_analysis()
    gram = 60_000**2 * 4
    assert memory.temp_size_in_bytes < 8 * 60_000 * (20 + 16) * 4 + 6 * 1024**2 * 4 < gram / 100


# DrMMD

FILTERS = {
    tikhonov: lambda rho, lmbda: 1 / (rho + lmbda),
    showalter: lambda rho, lmbda: (1 - np.exp(-rho / lmbda)) / rho,
    cutoff: lambda rho, lmbda: (rho > lmbda) / rho,
}


def of_linear_kernel(x, y, lmbda, gain):
    """(1 + lambda) d' g(S) d with the difference of means and the pooled covariance."""
    difference = x.mean(axis=0) - y.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(np.concatenate([x, y]).T, bias=True))
    scale = 1 if math.isinf(lmbda) else (1 + lmbda) * gain(values, lmbda)
    return np.sum(scale * (vectors.T @ difference) ** 2)


@pytest.mark.parametrize("rank", [None, 30])
def test_drmmd_of_a_linear_kernel_is_in_closed_form(rank, x64):
    x, y = normal(0, 17, 3), 0.4 + 2 * normal(1, 13, 3)
    lmbdas, drawn = (math.inf, 0.5, 0.01), np.asarray(permutations(jax.random.key(1), 40, 30))
    options = {"kernels": [linear()], "lmbdas": lmbdas, "rank": rank}
    test = partial(two_sample_test, jax.random.key(0), **options)

    @jax.jit
    def by_filters(x, y, drawn):
        return [test(x, y, spectral_filter=each, relabellings=drawn) for each in FILTERS]

    pooled = np.concatenate([x, y])
    for result, gain in zip(by_filters(x, y, drawn), FILTERS.values(), strict=True):
        values = []
        for row in [np.arange(30), *drawn]:
            parts = pooled[row < 17], pooled[row >= 17]
            values.append([of_linear_kernel(*parts, lmbda, gain) for lmbda in lmbdas])
        values = np.transpose(values)
        p = (values[:, None] >= values[:, :, None] - 1e-9).mean(axis=2)
        np.testing.assert_allclose(result.statistics[0], values[:, 0], rtol=1e-8)
        np.testing.assert_allclose(result.p_values[0], p[:, 0])
        np.testing.assert_allclose(result.p_value, aggregated(p))


@pytest.mark.slow
def test_points_move_in_bins_and_those_left_over_stay(monkeypatch, x64):
    """Against a loop over the relabelled bins; 23 + 17 points, 4 in a bin."""
    monkeypatch.setattr(_permutations, "MAX_BINS", 10)
    monkeypatch.setattr(_permutations, "MIN_BINS", 4)
    owners = []
    bins = _permutations._bins
    monkeypatch.setattr(_permutations, "_bins", lambda *a: owners.append(bins(*a)) or owners[0])
    x, y, drawn = (
        jnp.asarray(normal(0, 23, 2)),
        0.5 + jnp.asarray(normal(1, 17, 2)),
        permutations(jax.random.key(1), 30, 9),
    )
    result = two_sample_test(
        jax.random.key(0), x, y, [linear()], lmbdas=(0.1,), rank=10, relabellings=drawn
    )
    owner, pooled = np.asarray(owners[0]), np.concatenate([x, y])
    assert sorted(np.bincount(owner)) == [4] * 10  # of nine bins, and 3 + 1 points left over
    values = []
    for row in [np.arange(9), *np.asarray(drawn)]:
        of_bins = np.append(row < 5, False)[owner]
        first = np.where(owner < 9, of_bins, np.arange(40) < 23)
        values.append(of_linear_kernel(pooled[first], pooled[~first], 0.1, FILTERS[tikhonov]))
    np.testing.assert_allclose(result.statistics[0, 0], values[0], rtol=1e-8)
    np.testing.assert_allclose(result.p_value, np.mean(np.array(values) >= values[0] - 1e-9))


@pytest.mark.parametrize("every", [slow(1), 5])
def test_features_at_all_points_are_exact(every, x64):
    """With all ten kernels, or one of each kind."""
    x, y = jnp.asarray(normal(0, 20, 2)), 1 + jnp.asarray(normal(1, 15, 2))

    @partial(jax.jit, static_argnums=0)
    def test(rank):
        kernels = default_kernels(jax.random.key(2), jnp.concatenate([x, y]))[::every]
        return two_sample_test(jax.random.key(0), x, y, kernels, num_permutations=50, rank=rank)

    exact, features = test(None), test(35)
    np.testing.assert_allclose(features.statistics, exact.statistics, rtol=1e-6)
    np.testing.assert_allclose(features.p_values, exact.p_values)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 5])
def test_level_of_the_default(rank, monkeypatch):
    """Of 1,000 tests of counts, with many ties; in features labels move in bins of two."""
    monkeypatch.setattr(_permutations, "MAX_BINS", 12)
    monkeypatch.setattr(_permutations, "MIN_BINS", 2)
    repeats = 1000
    counts = np.random.default_rng(0).poisson(1.0, (repeats, 22, 2)).astype("f")
    keys = jax.random.split(jax.random.key(0), repeats)
    p = results_of(keys, counts, None, 12, 59, rank=rank).p_value
    assert np.sum(np.asarray(p) <= 0.05) <= binom.ppf(1 - 1e-3, repeats, 0.05)


@pytest.mark.slow
def test_memory_in_features():
    """100,000 + 100,000 points in 64 dimensions: below a GB."""
    points = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    memory = jax.jit(two_sample_test).lower(key, points, points).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e9


# k samples, independence


def test_k_samples_against_a_loop(x64):
    samples = [normal(0, 9, 2), 0.5 + normal(1, 7, 2), 2 * normal(2, 6, 2)]
    options = {"kernels": [gaussian(1.0)], "lmbdas": (0.1,), "num_permutations": 99}
    test = jax.jit(partial(k_sample_test, jax.random.key(0), **options))
    pooled = np.concatenate(samples)
    gram = np.exp(-(squareform(pdist(pooled)) ** 2) / 2)
    middle = np.eye(22) - 1 / 22
    inverse = np.linalg.inv(middle @ gram @ middle / 22 + 0.1 * np.eye(22))
    value, first = 0, 0
    for sample in samples:
        own = np.isin(np.arange(22), np.arange(first, first := first + len(sample)))
        s = own / len(sample) - 1 / 22
        value += len(sample) / 22 * 1.1 * s @ middle @ gram @ middle @ inverse @ s
    np.testing.assert_allclose(test(samples).statistics[0, 0], value, rtol=1e-9)
    assert test([samples[0] + 2, samples[1] - 2, samples[2]]).p_value <= 0.02
    x, y = map(jnp.asarray, samples[:2])
    with pytest.raises(ValueError, match="two or more, got 1"):
        k_sample_test(jax.random.key(0), [x])
    with pytest.raises(ValueError, match="one dimension"):
        k_sample_test(jax.random.key(0), [x, y[:, :1]])


@pytest.mark.slow
def test_k_samples_by_default_and_two_of_them_against_the_test_of_two(x64):
    x, y, z = normal(0, 9, 2), 0.5 + normal(1, 7, 2), 2 * normal(2, 6, 2)
    test = partial(k_sample_test, jax.random.key(0), num_permutations=99)
    assert jax.jit(lambda *far: test(far).p_value)(x + 2, y - 2, z) <= 0.02
    kernels = [gaussian(1.0), laplace(0.5, distance="l1")]
    options = {"kernels": kernels, "num_permutations": 99}
    two = jax.jit(partial(two_sample_test, jax.random.key(0), **options))(x, y)
    of_two = jax.jit(partial(test, kernels=kernels))([x, y])
    np.testing.assert_allclose(of_two.statistics, two.statistics * 9 * 7 / 16**2, rtol=1e-8)
    np.testing.assert_allclose(of_two.p_value, two.p_value)


def test_independence_against_a_loop(x64):
    x = normal(0, 20, 2)
    y = np.abs(x[:, :1]) + 0.3 * normal(1, 20, 1)
    kernels = [gaussian(1.0)], [laplace(1.0), riesz()]
    test = jax.jit(lambda *a: independence_test(*a, *kernels, num_permutations=199))
    result = test(jax.random.key(0), x, y)
    middle = np.eye(20) - 1 / 20
    k = middle @ np.exp(-(squareform(pdist(x)) ** 2) / 2) @ middle
    distances = squareform(pdist(y))
    for i, other in enumerate([np.exp(-distances), -distances]):
        np.testing.assert_allclose(result.statistics[0, i], np.sum(k * other) / 400, rtol=1e-9)
        rng = np.random.default_rng(0)
        drawn = [rng.permutation(20) for _ in range(4000)]
        values = [np.sum(k * other[p][:, p]) / 400 for p in drawn]
        share = np.mean(values >= np.asarray(result.statistics[0, i]))
        assert abs(result.p_values[0, i] - share) < 4 * np.sqrt((share + 0.01) / 200)
    assert result.p_value <= 0.05
    with pytest.raises(ValueError, match=r"got shapes \(20, 2\) and \(5, 1\)"):
        independence_test(jax.random.key(0), jnp.asarray(x), jnp.asarray(y[:5]))


@pytest.mark.slow
def test_level_of_independence():
    repeats = 1000
    x, y = normal(0, repeats, 15, 1).astype("f"), normal(1, repeats, 15, 2).astype("f")
    kernels = [gaussian(0.5), gaussian(2.0), laplace(1.0)]

    def test(draw):
        return independence_test(*draw, kernels, kernels, num_permutations=59).p_value

    draws = jax.random.split(jax.random.key(0), repeats), x, y
    p = jax.jit(partial(jax.lax.map, test))(draws)
    assert np.sum(np.asarray(p) <= 0.05) <= binom.ppf(1 - 1e-3, repeats, 0.05)


# Where, and how much


@pytest.mark.parametrize(("lmbda", "rank"), [(math.inf, None), (0.01, None), (0.01, 30)])
def test_witness_of_the_linear_kernel_and_its_mean_difference(lmbda, rank, x64):
    x, y = normal(0, 17, 3), 0.4 + normal(1, 13, 3)
    key, gain = jax.random.key(0), FILTERS[tikhonov]

    @jax.jit
    def evaluated(x, y):
        """By kernels: the witness at both samples, and the statistic of the test."""
        results = []
        for kernel in (linear(), gaussian(1.0)):
            h = witness(key, kernel, x, y, lmbda=lmbda, rank=rank)
            test = two_sample_test(key, x, y, [kernel], lmbdas=(lmbda,), num_permutations=1)
            results.append((h(x), h(y), test.statistics[0, 0]))
        return results

    results = evaluated(x, y)
    for at_x, at_y, statistic in results:
        np.testing.assert_allclose(at_x.mean() - at_y.mean(), statistic, rtol=1e-6)
    covariance = np.cov(np.concatenate([x, y]).T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    scale = 1 if math.isinf(lmbda) else (1 + lmbda) * gain(values, lmbda)
    slope = vectors @ (scale * (vectors.T @ (x.mean(axis=0) - y.mean(axis=0))))
    at_x, at_y, _ = results[0]
    np.testing.assert_allclose(at_x - at_y[:1], (x - y[:1]) @ slope, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_intervals_cover_the_squared_mmd():
    """Of normals a unit apart, in closed form: about 95 in 100 times."""
    repeats, n = 300, 60
    x, y = normal(0, repeats, n, 1).astype("f"), 1 + normal(1, repeats, n, 1).astype("f")
    kernel = gaussian(1.0)
    find = jax.jit(
        lambda *a: jax.lax.map(lambda d: mmd_squared_interval(*d[:1], kernel, *d[1:]), a)
    )
    intervals = find(jax.random.split(jax.random.key(0), repeats), x, y)
    # The mean of exp(-z^2 / 2) for z of variance 2 and mean 0 or 1.
    truth = 2 / np.sqrt(3) * (1 - np.exp(-1 / 6))
    covered = np.sum((intervals.low <= truth) & (truth <= intervals.high))
    low, high = binom.ppf([1e-3, 1 - 1e-3], repeats, 0.95)
    assert low - 0.03 * repeats <= covered <= high + 0.02 * repeats
    deviation = np.std(intervals.estimate) / np.sqrt(repeats)
    assert abs(np.mean(intervals.estimate) - truth) < 4 * deviation
