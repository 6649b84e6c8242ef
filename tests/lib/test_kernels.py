"""Kernels against scikit-learn, SciPy and numpy in float64; blocks against the whole matrix."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow
from jax.test_util import check_grads
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from strategies import normal

from lib.drmmd import prepare_target
from lib.kernels import (
    DIRECT_DIMENSION,
    bandwidth_grid,
    gaussian,
    gram_product,
    imq,
    kernel_mean,
    laplace,
    linear,
    median_bandwidth,
    mixture,
    polynomial,
    riesz,
    squared_distances,
)
from lib.mmd import mmd_squared
from lib.numerics import as_sample, pairwise_sum, safe_norm, safe_sqrt
from lib.sliced_wasserstein import sliced_wasserstein

# The others in `test_properties_kernels.py`.
FACTORIES = {
    "laplace, l1": (
        laplace(0.7, distance="l1"),
        lambda x, y: np.exp(-cdist(x, y, "cityblock") / 0.7),
    ),
    "riesz, exponent": (riesz(1.6), lambda x, y: -(cdist(x, y) ** 1.6)),
    "linear": (linear(), lambda x, y: x @ y.T),
    "polynomial": (
        polynomial(3, offset=0.5, scale=0.2),
        lambda x, y: polynomial_kernel(x, y, degree=3, gamma=0.2, coef0=0.5),
    ),
    "mixture": (
        mixture([gaussian(1.0), laplace(2.0)], [0.25, 3.0]),
        lambda x, y: 0.25 * rbf_kernel(x, y, gamma=0.5) + 3 * np.exp(-cdist(x, y) / 2),
    ),
}
# Distances are computed in one way up to DIRECT_DIMENSION, in another above it.
both_ways = pytest.mark.parametrize("dimension", [2, DIRECT_DIMENSION + 1])


EMPTY, POINTS = jnp.zeros((0, 2)), jnp.ones((3, 2))


# Distances


@both_ways
def test_squared_distances_of_half_precision_are_float32(dimension):
    x = jnp.asarray(normal(0, 6, dimension), jnp.bfloat16)
    total = jax.jit(jax.value_and_grad(lambda x: squared_distances(x, x[:3]).sum()))
    value, gradient = total(x)
    reference = cdist(np.asarray(x, float), np.asarray(x[:3], float), "sqeuclidean").sum()
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, reference, rtol=1e-6)


@both_ways
def test_nan_is_not_hidden(dimension):
    x = jnp.ones((3, dimension)).at[1, 0].set(jnp.nan)
    distances = squared_distances(x, jnp.zeros((2, dimension)))
    for values in (distances, laplace(1.0)(x, x[:2]), riesz(1.5)(x, x[:2])):
        assert np.isnan(values[1]).all()


def test_safe_sqrt_and_norm_have_zero_derivatives_at_zero():
    def derivatives(function):
        gradient = jax.grad(function)
        return jax.jit(lambda x: (gradient(x), jax.jacfwd(gradient)(x), jax.jacrev(gradient)(x)))

    np.testing.assert_array_equal(safe_sqrt(jnp.array([0.0, 4.0, -1e-9])), [0, 2, 0])
    root, norm = derivatives(safe_sqrt), derivatives(safe_norm)
    assert root(0.0) == (0, 0, 0)
    np.testing.assert_allclose(root(4.0), (1 / 4, -1 / 32, -1 / 32))

    origin, point = np.zeros(3, "f"), np.array([3, 0, 4], "f")
    for derivative in norm(origin):
        np.testing.assert_array_equal(derivative, np.zeros_like(derivative))
    gradient, *hessians = norm(point)
    np.testing.assert_allclose(gradient, point / 5)
    for hessian in hessians:
        expected = (np.eye(3) - np.outer(point, point) / 25) / 5
        np.testing.assert_allclose(hessian, expected, atol=1e-7)


# Kernels


@pytest.mark.parametrize(("kernel", "reference"), FACTORIES.values(), ids=FACTORIES)
def test_kernel_in_float64(x64, kernel, reference):
    x, y = normal(0, 7, 2), normal(1, 5, 2)
    gram = jax.jit(kernel)(x, y)
    assert gram.dtype == jnp.float64
    np.testing.assert_allclose(gram, reference(x, y), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factory", [gaussian, riesz])
def test_traced_hyperparameters(x64, factory):
    x, values = jnp.asarray(normal(0, 4, 2)), jnp.array([0.5, 1.7])

    def total(value):
        return factory(value)(x, x).sum()

    expected = jax.jit(factory(1.7))(x, x).sum()
    np.testing.assert_allclose(jax.jit(jax.vmap(total))(values)[1], expected, rtol=1e-12)
    check_grads(jax.jit(total), (1.7,), order=1, modes=("rev",), rtol=1e-6)


@both_ways
def test_gaussian_mixed_derivative_at_identical_points(dimension):
    """d^2 k / dx dy = I / sigma^2 at x = y: clipping the distance must not touch it."""
    point = jnp.asarray(normal(0, dimension) + 3, jnp.float32)

    def value(x, y):
        return gaussian(0.5)(x[None], y[None])[0, 0]

    mixed = jax.jit(jax.jacfwd(jax.grad(value), argnums=1))(point, point)
    np.testing.assert_allclose(mixed, 4 * np.eye(dimension), atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "dimension"), [(laplace(1.0), 20), (laplace(1.0, distance="l1"), 3), (riesz(0.5), 2)]
)
def test_no_nan_in_any_derivative_at_identical_points(kernel, dimension):
    x = jnp.asarray(normal(0, 2, dimension), jnp.float32)

    gradient = jax.jit(jax.grad(lambda x, y: kernel(x, y).sum()))
    derivatives = jax.jit(lambda x, y: (gradient(x, y), jax.jacfwd(gradient, argnums=(0, 1))(x, y)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives(x, x)))
    np.testing.assert_array_equal(gradient(x[:1], x[:1]), np.zeros((1, dimension)))


# Sums over Gram matrices


@pytest.mark.parametrize(("n", "m", "block_size"), [(1, 1, 4), (17, 8, 4), (13, 31, 100)])
def test_blocked_sums_with_several_columns_of_weights(x64, n, m, block_size):
    kernel, reference = FACTORIES["mixture"]
    x, y, w, v = normal(0, n, 3), normal(1, m, 3), normal(4, n, 2), normal(5, m, 2)

    @jax.jit
    def sums(x, y, w, v):
        mean = partial(kernel_mean, kernel, block_size=block_size)
        product = gram_product(kernel, x, y, v, block_size=block_size)
        return product, mean(x, y, x_weights=w, y_weights=v), mean(x)

    gram, square = reference(x, y), reference(x, x)
    expected = gram @ v, np.diagonal(w.T @ gram @ v), square.mean()
    for value, exact in zip(sums(x, y, w, v), expected):
        np.testing.assert_allclose(value, exact, rtol=1e-11, atol=1e-12)


def test_blocked_gradients_are_the_dense_ones(x64):
    kernel, arrays = laplace(2.0), (normal(0, 10, 3), normal(1, 7, 3), normal(2, 10), normal(3, 7))

    def dense(x, y, w, v):
        return 3 * w @ (kernel(x, y) @ v) + 5 * w @ (kernel(x, x) @ w)

    def blocked(x, y, w, v):
        mean = partial(kernel_mean, kernel, block_size=4)
        by_product = w @ gram_product(kernel, x, y, v, block_size=4)
        return by_product + 2 * mean(x, y, x_weights=w, y_weights=v) + 5 * mean(x, x_weights=w)

    gradients, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*arrays) for f in (blocked, dense))
    for gradient, reference in zip(gradients, expected):
        np.testing.assert_allclose(gradient, reference, rtol=1e-10, atol=1e-12)


def test_pairwise_sum_of_a_million_tenths():
    tenths = np.full(2**20, 0.1, np.float32)
    assert jax.jit(pairwise_sum)(tenths) == np.float32(0.1) * 2**20


def test_memory_is_that_of_blocks():
    """At 100,000 x 100,000 points a Gram matrix is 37 GiB; a sample is 24 MiB."""
    x = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    mean, product = partial(kernel_mean, gaussian(8.0)), partial(gram_product, gaussian(8.0))
    for function, arguments, samples in (
        (jax.grad(mean, argnums=(0, 1)), (x, x), 6),
        (product, (x, x, w), 3),
        (jax.grad(lambda *a: product(*a).sum(), argnums=(0, 1)), (x, x, w), 6),
    ):
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < samples * 25 * 2**20 + 6 * 1024**2 * 4


def test_float32_sums_keep_their_digits():
    """4e8 terms near 1: a running float32 sum would stop at 2^24. To eps sqrt(block_size)."""
    rtol = 500**0.5 * np.finfo("f").eps
    x = jnp.asarray(normal(0, 20_000, 1), jnp.float32)
    ones = jax.jit(lambda x: kernel_mean(gaussian(1e4), x, x, block_size=500))(x)
    np.testing.assert_allclose(ones, 1, rtol=rtol)
    value = jax.jit(lambda x: kernel_mean(gaussian(1.0), x, block_size=500))(x)
    with jax.enable_x64(True):
        reference = jax.jit(lambda x: kernel_mean(gaussian(1.0), x))(jnp.asarray(x, jnp.float64))
    np.testing.assert_allclose(value, reference, rtol=rtol)


def test_median_bandwidth_of_a_subsample():
    x = jnp.asarray(normal(0, 3000, 5), jnp.float32)
    median = jax.jit(partial(median_bandwidth, max_points=200))
    medians = [median(jax.random.key(seed), x) for seed in (0, 0, 1)]
    assert medians[0] == medians[1] != medians[2]
    np.testing.assert_allclose(medians, np.median(pdist(np.asarray(x, float))), rtol=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("d", [2, slow(20)])
def test_bandwidths_are_positive_where_most_pairs_coincide(scale, d):
    """The median over the pairs that do not, traced or not; 1 where none is left."""
    key, rare = jax.random.key(0), np.where(np.arange(40) % 10 == 0, 1, 0)[:, None]
    x = (scale * rare * normal(0, 40, d)).astype("f")
    distances = pdist(x.astype(float))
    expected = np.median(distances[distances > 0])
    for rule in (median_bandwidth, jax.jit(median_bandwidth)):
        np.testing.assert_allclose(rule(key, jnp.asarray(x)), expected, rtol=1e-5)
        assert rule(key, jnp.full((40, d), np.float32(scale))) == 1
    assert (bandwidth_grid(key, jnp.asarray(x)) > 0).all()
    assert np.isnan(jax.jit(median_bandwidth)(key, jnp.asarray(x).at[3, 0].set(jnp.nan)))


# Input validation


@pytest.mark.parametrize(
    ("points", "weights", "message"),
    [
        (np.ones(3, "f"), None, r"x must be \[n, d\] .* got shape \(3,\)"),
        (np.ones((0, 3), "f"), None, r"got shape \(0, 3\)"),
        (np.ones((2, 3), int), None, "x must be floating point, got int"),
        (np.array([[0.0], [1], [np.nan]], "f"), None, r"x is not finite in row 2: \[nan\]"),
        (np.array([[np.inf], [1.0]], "f"), None, r"x is not finite in row 0: \[inf\]"),
        (np.ones((2, 3), "f"), np.ones(3, "f"), r"x_weights must be \[2\], got shape \(3,\)"),
        (np.ones((2, 3), "f"), np.array([1.0, -0.5], "f"), "x_weights must be >= 0 .* -0.5"),
        (np.ones((2, 3), "f"), np.zeros(2, "f"), "with a positive sum"),
        (np.ones((2, 3), "f"), np.array([1.0, np.nan], "f"), "x_weights is not finite in row 1"),
    ],
)
def test_what_is_no_sample_raises(points, weights, message):
    weights = None if weights is None else jnp.asarray(weights)
    with pytest.raises(ValueError, match=message):
        as_sample("x", jnp.asarray(points), weights)


def test_values_are_checked_inside_jit_only_where_they_are_known():
    bad = jnp.array([[jnp.nan]])

    def checked(x):
        return as_sample("x", x)[0]

    assert np.isnan(jax.jit(checked)(bad)).all()
    with pytest.raises(ValueError, match="not finite"):
        jax.jit(lambda: checked(bad))()


@pytest.mark.parametrize("form", [np.ndarray.tolist, torch.tensor], ids=["lists", "torch"])
@pytest.mark.usefixtures("unannotated")
def test_whatever_numpy_can_read_is_a_sample(form):
    arrays = [np.abs(normal(3, *shape)).astype("f") for shape in ((6, 3), (5, 3), (6,))]
    for function in (
        lambda x, y, w: mmd_squared(gaussian(1.0), x, y, x_weights=w),
        lambda x, y, w: median_bandwidth(jax.random.key(0), x, y),
        lambda x, y, w: sliced_wasserstein(x, y, np.eye(3, dtype="f"), x_weights=w),
        lambda x, y, w: prepare_target(gaussian(1.0), x, w).energy,
    ):
        expected = function(*map(jnp.asarray, arrays))
        np.testing.assert_allclose(function(*map(form, arrays)), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="x must be floating point, got int"):
        mmd_squared(gaussian(1.0), [[1], [2]], [[1.0]])
    for bad in ([["a"]], [[1.0], [2.0, 3.0]], torch.ones((2, 2), requires_grad=True), None):
        with pytest.raises(TypeError, match="y is no array that NumPy can read"):
            mmd_squared(gaussian(1.0), [[1.0]], bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (partial(factory, value), f"bandwidth .*got {value}")
            for factory in (gaussian, laplace, imq)
            for value in (0.0, -1.5, math.nan, math.inf, np.float32(-2), 0)
        ),
        (lambda: laplace(1.0, distance="L1"), "distance must be l2 or l1, not 'L1'"),
        (lambda: riesz(2.0), r"exponent must lie in \(0, 2\), got 2.0"),
        (lambda: imq(1.0, exponent=0.0), "exponent .* got 0.0"),
        (lambda: polynomial(0), "degree must be at least 1, got 0"),
        (lambda: polynomial(2, offset=-1.0), "offset .* got -1.0"),
        (lambda: polynomial(2, scale=0.0), "scale .* got 0.0"),
        (lambda: mixture([]), "one weight for each kernel: 0 and 0"),
        (lambda: mixture([linear()], [1.0, 2.0]), "one weight for each kernel: 1 and 2"),
        (lambda: mixture([linear()], [-1.0]), "weight .* got -1.0"),
        (lambda: kernel_mean(linear(), POINTS, y_weights=jnp.ones(3)), "y_weights without y"),
        (lambda: kernel_mean(linear(), EMPTY, EMPTY), r"empty sample.*\(0, 2\)"),
        (lambda: kernel_mean(linear(), EMPTY, POINTS), r"empty sample.*\(0, 2\)"),
        (lambda: gram_product(linear(), EMPTY, EMPTY, jnp.ones(0)), r"empty sample.*\(0, 2\)"),
        (lambda: gram_product(linear(), EMPTY, POINTS, jnp.ones(3)), r"empty sample.*\(0, 2\)"),
        (lambda: median_bandwidth(jax.random.key(0), POINTS[:1]), "no pair in 1 points"),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_impossible_hyperparameters_and_samples(make, message):
    with pytest.raises(ValueError, match=message):
        make()
