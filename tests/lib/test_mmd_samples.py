"""The MMD between samples against loops and closed forms; the two-sample test against its level."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial.distance import pdist, squareform
from scipy.stats import binom
from strategies import normal

from lib.kernels import bandwidth_grid, gaussian, imq, laplace, linear, polynomial, riesz
from lib.mmd import mmd_squared, mmd_squared_unbiased
from lib.two_sample import _permutation_p_values, permutations, two_sample_test


def test_gradients_agree_with_finite_differences(x64):
    x, y, w = normal(0, 5, 2), normal(1, 4, 2), np.arange(1.0, 6.0)

    def value(x, w):
        y_array = jnp.asarray(y)
        return mmd_squared_unbiased(laplace(1.0), x, y_array, x_weights=w, block_size=3)

    check_grads(jax.jit(value), (x, w), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("kernel", [laplace(1.0), riesz()], ids=["laplace", "riesz"])
def test_gradient_at_identical_samples_is_zero(kernel):
    x = jnp.asarray(normal(0, 6, 12), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, y: mmd_squared(kernel, x, y)))(x, x)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("mmd", [mmd_squared, mmd_squared_unbiased])
@pytest.mark.usefixtures("unannotated")
def test_bad_samples_raise(mmd):
    x, y = jnp.ones((3, 2)), jnp.ones((4, 2))
    for a, b, weights, message in (
        (x, y.at[1, 0].set(jnp.nan), None, "y is not finite in row 1"),
        (x[:0], y, None, r"x must be .* got shape \(0, 2\)"),
        (x, y, jnp.array([1.0, 1.0, -1.0, 1.0]), "y_weights must be >= 0"),
        (x, y[:, :1], None, r"shapes \(3, 2\) and \(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mmd(linear(), a, b, y_weights=weights)
    with pytest.raises(ValueError, match=r"two points .* got 1 and 4"):
        mmd_squared_unbiased(linear(), x[:1], y)


def test_permutations():
    draws = np.asarray(permutations(jax.random.key(0), 3000, 4))
    np.testing.assert_array_equal(np.sort(draws, axis=1), np.tile(np.arange(4), (3000, 1)))
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - 125).max() < 4.5 * np.sqrt(125)


def test_p_values_agree_with_a_loop_over_the_same_permutations(x64):
    x, y = normal(0, 12, 2), 0.5 + normal(1, 9, 2)
    kernels = [gaussian(0.5), gaussian(2.0), imq(1.0)]
    relabellings = permutations(jax.random.key(0), 60, 21)
    test = jax.jit(lambda key, x, y, r: two_sample_test(key, x, y, kernels, relabellings=r))
    result = test(jax.random.key(1), x, y, relabellings)

    squares = squareform(pdist(np.concatenate([x, y]))) ** 2
    grams = np.exp(-squares / (2 * 0.5**2)), np.exp(-squares / 8), 1 / np.sqrt(1 + squares)
    # The point at position i takes the label of position order[i].
    first = np.concatenate([np.arange(21)[None], relabellings]) < 12
    signs = first / 12 - ~first / 9
    values = np.array([np.einsum("bi,ij,bj->b", signs, gram, signs) for gram in grams])
    p = (values[:, None] >= values[:, :, None]).mean(axis=2)
    np.testing.assert_allclose(result.statistics, values[:, 0], rtol=1e-10)
    np.testing.assert_allclose(result.kernel_p_values, p[:, 0])
    assert 1 / 61 < p[:, 0].min() < 0.5
    np.testing.assert_allclose(result.p_value, (p.min(axis=0) <= p[:, 0].min()).mean())


KERNELS = [gaussian(1.0), laplace(0.5), riesz(), riesz(0.5), linear(), polynomial(3), imq(1.0)]


@jax.jit
def p_values_of_all_kernels(key, x, y):
    return two_sample_test(key, x, y, KERNELS, num_permutations=99)


@pytest.mark.parametrize(
    ("dtype", "n", "m", "d"),
    [(np.float32, 7, 3, 1), (np.float32, 20, 20, 3), (np.float64, 30, 40, 12)],
)
def test_equal_statistics_are_ties_and_count_against_rejection(dtype, n, m, d):
    """Of samples with one value, and with one point that has another, every labelling is as far."""
    with jax.enable_x64(dtype == np.float64):
        for value in (0, 1, 0.37, 1000.3):
            x, y = np.full((n, d), value, dtype), np.full((m, d), value, dtype)
            p = p_values_of_all_kernels(jax.random.key(1), x, y)
            assert (p.kernel_p_values == 1).all()
            assert p.p_value == 1
            if n == m:
                x[-1] = 2.1
                p = p_values_of_all_kernels(jax.random.key(1), x, y)
                assert (p.kernel_p_values == 1).all()


def results_of(keys, draws, kernels, n, num_permutations):
    """Of the first n points of each draw against the others."""

    def test(draw):
        key, points = draw
        samples = points[:n], points[n:]
        return two_sample_test(key, *samples, kernels, num_permutations=num_permutations)

    return jax.jit(partial(jax.lax.map, test))((keys, draws))


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
            p = _permutation_p_values(jnp.arange(size, dtype=dtype), 0.0)
            shares = np.arange(size, 0, -1) / size
            assert p.dtype == dtype
            assert all(float(found) <= share for found, share in zip(p, shares))
            np.testing.assert_allclose(p, shares, rtol=2e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_p_value(bad):
    x, y = normal(0, 8, 2).astype("f"), normal(1, 6, 2).astype("f")
    x[3, 1] = bad

    def test(x, y, kernel):
        kernels = [gaussian(1.0), kernel]
        return jax.jit(lambda x: two_sample_test(jax.random.key(0), x, y, kernels))(x)

    result = test(x, jnp.asarray(y), riesz())
    assert np.isnan([*result.kernel_p_values, result.p_value]).all()
    result = test(y, jnp.asarray(y), lambda x, y: bad * riesz()(x, y))
    np.testing.assert_array_equal(np.isnan(result.kernel_p_values), [False, True])
    assert np.isnan(result.p_value)


def test_level():
    """Of 2,000 tests of equal laws a share of 0.05 rejects at 0.05, exactly up to ties."""
    repeats = 2000
    draws = jax.random.split(jax.random.key(0), repeats), normal(0, repeats, 14, 2).astype("f")
    kernels = [gaussian(bandwidth) for bandwidth in (0.2, 1.0, 5.0)]
    result = results_of(*draws, kernels, 8, 39)
    low, high = binom.ppf([1e-3, 1 - 1e-3], repeats, 0.05)
    assert (np.asarray(result.p_value) <= 0.05).sum() <= high
    assert low <= (np.asarray(result.kernel_p_values)[:, 1] <= 0.05).sum() <= high
    # The smallest of the p-values, uncorrected, is what the bound above would catch.
    assert (np.asarray(result.kernel_p_values).min(axis=1) <= 0.05).sum() > high


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
    assert result.p_value <= 0.01 < 0.1 < result.kernel_p_values[-1]


def test_one_kernel_needs_no_correction():
    x, y = normal(0, 20, 2).astype("f"), normal(1, 20, 2).astype("f")
    test = jax.jit(lambda key: two_sample_test(key, jnp.asarray(x), jnp.asarray(y), [laplace(1.0)]))
    one, again, other = (test(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.p_value == one.kernel_p_values[0] == again.p_value != other.p_value
    np.testing.assert_allclose(one.statistics, other.statistics, rtol=1e-5)
    with pytest.raises(ValueError, match="kernels is empty"):
        two_sample_test(jax.random.key(0), jnp.asarray(x), jnp.asarray(y), [])


def test_memory_of_the_test_is_that_of_its_permutations():
    points = jax.ShapeDtypeStruct((30_000, 16), jnp.float32)
    test = partial(two_sample_test, kernels=[gaussian(1.0), imq(1.0)], num_permutations=20)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    memory = jax.jit(test).lower(key, points, points).compile().memory_analysis()
    gram = 60_000**2 * 4
    assert memory.temp_size_in_bytes < 8 * 60_000 * (20 + 16) * 4 + 6 * 1024**2 * 4 < gram / 100
