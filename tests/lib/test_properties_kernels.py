"""Properties of kernels, their sums and MMDs, over dtypes, scales, repeated points and weights.

Bounds follow the arithmetic. In up to 8 dimensions a squared distance is a sum of d squares, off by
(d + 2) eps of itself; above, by `ROUNDING_UNITS` + d + 6 eps of the centered squared norms. A value
of a kernel moves as its profile f does over that interval, and has a few roundings of its own; a
sum over n m of them is off by as many eps of its terms' magnitudes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, EXPONENTS, SEEDS, assert_finite, assert_within, drawn_clouds

from lib import kernels, numerics
from lib.mmd import mmd_squared, mmd_squared_unbiased

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
few = settings(max_examples=12, deadline=None)

KERNELS = {
    "gaussian": kernels.gaussian,
    "laplace": kernels.laplace,
    "imq": kernels.imq,
    "imq, exponent": lambda b: kernels.imq(b, exponent=1.7),
    "riesz": lambda b: kernels.riesz(),
    "riesz, small": lambda b: kernels.riesz(0.4),
    "mixture": lambda b: kernels.mixture([kernels.gaussian(b), kernels.laplace(b)], [0.5, 2.0]),
}


def terms(name, s, b):
    """[(f, f'/f, roundings in f, F)] at squared distances s, of which the kernel is the sum. A
    power is an exponential of a logarithm, whose size counts. F adds up what the chain rule still
    multiplies by after each number that may underflow, the last of which is f' itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.sqrt(s)
        if name == "gaussian":
            return [(np.exp(-s / (2 * b * b)), -1 / (2 * b * b) + 0 * s, 4, 1 / (2 * b * b) + 1)]
        if name == "laplace":
            return [(np.exp(-r / b), -1 / (2 * r * b), 4, (1 / b + 1) / (2 * r) + 1)]
        if name.startswith("imq"):
            base, exponent = 1 + s / b**2, 1.7 if name.endswith("exponent") else 0.5
            slope = -exponent / base / b**2
            return [(base**-exponent, slope, 6 + 3 * np.log(base), (exponent + 1) / b**2 + 1)]
        if name.startswith("riesz"):
            half = 0.2 if name.endswith("small") else 0.5
            size = np.where(s > 0, np.abs(np.log(s)), 0)
            return [(-(s**half), half / s, 6 + 2 * size, 1)]
        (f, df, c, size), (g, dg, e, other) = *terms("gaussian", s, b), *terms("laplace", s, b)
        return [(0.5 * f, df, c + 2, size), (2 * g, dg, e + 2, other)]


def reference(case, name, x, y):
    """Gram matrix and d k / d s by loops, each with its bound, and what may underflow in the second
    beside it; and what the distances are."""
    n, m, d = len(x), len(y), x.shape[1]
    eps = case.eps
    squares = np.array([[sum((a - b) ** 2 for a, b in zip(p, q)) for q in y] for p in x])
    center = (x.mean(axis=0) + y.mean(axis=0)) / 2
    off = (n + m) * eps * max(np.abs(x).max(), np.abs(y).max())
    lengths = [np.linalg.norm(z - center, axis=1) + off for z in (x, y)]
    reach = lengths[0][:, None] ** 2 + lengths[1][None, :] ** 2
    away = (
        (d + 2) * squares
        if d <= kernels.DIRECT_DIMENSION
        else (kernels.ROUNDING_UNITS + d + 6) * reach
    )
    away = np.where(squares == 0, 0, eps * (away + 4 * squares))
    values, slopes, value_error, slope_error, flushed = (np.zeros((n, m)) for _ in range(5))
    ends = squares + away, np.maximum(squares - away, 0)
    around = [terms(name, s, case.bandwidth) for s in (squares, *ends)]
    for (f, df, c, size), *others in zip(*around):
        with np.errstate(invalid="ignore"):
            slope = np.where((squares == 0) & ~np.isfinite(df), 0, f * df)
            change = [np.where(away == 0, 0, np.abs(g * dg - slope)) for g, dg, *_ in others]
            flushed += np.where(slope == 0, 0, case.tiny * size)
        values, slopes = values + f, slopes + slope
        value_error += np.max([np.abs(g - f) for g, *_ in others], axis=0)
        value_error += c * eps * np.abs(f) + case.tiny
        # Without a number where 0 is within reach of the distance, and f' is infinite there.
        slope_error += np.nan_to_num(np.max(change, axis=0), nan=np.inf, posinf=np.inf)
        slope_error += (c + 6) * eps * np.abs(slope)
    return squares, away, values, value_error, slopes, slope_error, flushed, lengths


@jax.jit
def gram_of_all(x, y, cotangent, bandwidth):
    by_kernel = {}
    for name, make in KERNELS.items():
        gram, transpose = jax.vjp(lambda x, y, b: make(b)(x, y), x, y, bandwidth)  # noqa: B023
        by_kernel[name] = (gram, *transpose(cotangent.astype(gram.dtype)))
    return kernels.squared_distances(x, y), by_kernel


@drawn_clouds()
@many
@given(st.data())
def test_kernels_and_their_gradients(drawn, data):
    case = data.draw(drawn)
    x, y, *_ = case.in_float64()
    c = np.random.default_rng(case.seed).normal(size=(len(x), len(y))).astype(case.x.dtype)
    distances, by_kernel = gram_of_all(case.x, case.y, jnp.asarray(c), case.bandwidth)
    c = c.astype(np.float64)
    for name, (gram, x_gradient, y_gradient, slope) in by_kernel.items():
        squares, away, f, f_error, df, df_error, flushed, lengths = reference(case, name, x, y)
        assert_within(distances, squares, away + case.tiny, case.x.dtype)
        assert_within(gram, f, f_error, case.x.dtype)
        # 2 (x - y) is made of matrix products, whose terms are the centered points.
        # Their center may be computed once for each, and is off by its own rounding.
        length = lengths[0][:, None] + lengths[1][None, :]
        size = (len(x) + len(y) + 6) * length
        size += 4 * max(np.abs(x).max(), np.abs(y).max())
        with np.errstate(invalid="ignore"):
            # What is multiplied by c may underflow before or after.
            slope_error = np.abs(c) * df_error + np.maximum(1, np.abs(c)) * flushed
            error = 2 * np.where(squares == 0, 0, slope_error * np.sqrt(squares))
            error += 2 * case.eps * np.abs(c * df) * size + 2 * case.tiny * (1 + length)
        gradient = 2 * (c * df)[:, :, None] * (x[:, None] - y[None])
        assert_within(x_gradient, gradient.sum(1), error.sum(1)[:, None], case.x.dtype)
        assert_within(y_gradient, -gradient.sum(0), error.sum(0)[:, None], case.x.dtype)
        assert np.isfinite(float(slope)), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [1, 1.0, np.float64(1), np.float32(1)])
def test_plain_numbers_do_not_promote(dtype, number):
    x = jnp.zeros((2, 3), dtype)
    for kernel in (
        kernels.gaussian(number),
        kernels.laplace(number),
        kernels.imq(number, exponent=number),
        kernels.riesz(number),
        kernels.polynomial(2, offset=number, scale=number),
        kernels.mixture([kernels.gaussian(number)], [number]),
    ):
        assert jax.eval_shape(kernel, x, x).dtype == dtype
    assert type(numerics.plain_number(number)) is float
    assert numerics.plain_number(number) == 1
    assert numerics.plain_number(x) is x


# One kernel serves for the sums, and one block size for each shape: every program is compiled.
BLOCK_SIZES = {(1, 4, 1): 1024, (5, 7, 9): 3}


@partial(jax.jit, static_argnames="block_size")
def sums(x, y, w, v, bandwidth, block_size):
    kernel, options = kernels.laplace(bandwidth), {"block_size": block_size}
    weights = {"x_weights": w, "y_weights": v}
    return {
        "product": kernels.gram_product(kernel, x, y, v, **options),
        "mean": kernels.kernel_mean(kernel, x, y, **weights, **options),
        "within": kernels.kernel_mean(kernel, x, x_weights=w, **options),
        "largest": kernels.kernel_mean_and_largest(kernel, x, w, **options),
        "diagonal": kernels.kernel_diagonal(kernel, x),
        "mmd": jax.value_and_grad(partial(mmd_squared, kernel, **weights, **options))(x, y),
        "equal": mmd_squared(kernel, x, y, **options),
        "unbiased": mmd_squared_unbiased(kernel, x, y, **weights, **options)
        if min(len(x), len(y)) > 1
        else None,
    }


@drawn_clouds(BLOCK_SIZES)
@many
@given(st.data())
def test_sums_over_gram_matrices(drawn, data):
    case = data.draw(drawn)
    x, y, w, v = case.in_float64()
    dtype, eps = case.x.dtype, case.eps
    block_size = BLOCK_SIZES[len(x), *y.shape]
    results = sums(*case.on_device(), case.bandwidth, block_size)
    rounding = (2 * len(x) + 2 * len(y) + 8) * eps
    grams = []
    for a, b in ((x, y), (x, x), (y, y)):
        _, _, gram, error, *_ = reference(case, "laplace", a, b)
        grams.append((gram, error + rounding * np.abs(gram)))
    (xy, xy_error), (xx, xx_error), (yy, yy_error) = grams
    assert_within(results["product"], xy @ v, xy_error @ v, dtype)
    assert_within(results["mean"], w @ xy @ v, w @ xy_error @ v, dtype)
    assert_within(results["within"], w @ xx @ w, w @ xx_error @ w, dtype)
    assert results["largest"][0] == results["within"]
    assert_within(results["largest"][1], np.abs(xx).max(), xx_error.max(), dtype)
    assert_within(results["diagonal"], np.diag(xx), np.diag(xx_error), dtype)
    shares = (w / w.sum(), v / v.sum()), (np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)))
    for (p, q), value in zip(shares, (results["mmd"][0], results["equal"])):
        error = p @ xx_error @ p + 2 * p @ xy_error @ q + q @ yy_error @ q
        assert_within(value, p @ xx @ p - 2 * p @ xy @ q + q @ yy @ q, error, dtype)
    assert_finite(results["mmd"][1], dtype)
    (p, q), error = shares[0], 4 * max(xx_error.max(), xy_error.max(), yy_error.max())
    share = min(1 - p @ p, 1 - q @ q)
    # Where one point has all the weight there is no pair to average over.
    if results["unbiased"] is not None and share > 100 * rounding:
        expected = (p @ xx @ p - p**2 @ np.diag(xx)) / (1 - p @ p) - 2 * p @ xy @ q
        expected += (q @ yy @ q - q**2 @ np.diag(yy)) / (1 - q @ q)
        # Both sides of the quotients are off by the error, and the values are at most 1.
        assert_within(results["unbiased"], expected, error / share + 2 * rounding / share**2, dtype)


@jax.jit
def roots_and_sums(x):
    roots = jax.vmap(jax.value_and_grad(numerics.safe_sqrt))(x.reshape(-1))
    gradient = jax.grad(lambda x: numerics.safe_norm(x).sum())(x)
    return roots, numerics.safe_norm(x), gradient, numerics.pairwise_sum(x)


@few
@given(SEEDS, DTYPES, EXPONENTS, st.sampled_from([(1, 1), (11, 2)]))
def test_roots_sums_and_blocks(seed, dtype, exponent, shape):
    rng, eps = np.random.default_rng(seed), np.finfo(dtype).eps
    values = (10.0**exponent * rng.normal(size=shape)).astype(dtype)
    values[rng.random(shape) < 0.3] = 0
    x = jnp.asarray(values)
    (roots, slopes), norms_found, gradient, total_found = roots_and_sums(x)
    positive = np.maximum(values.reshape(-1), 0).astype(float)
    assert_within(roots, np.sqrt(positive), 2 * eps * np.sqrt(positive), dtype)
    expected = np.divide(0.5, np.sqrt(positive), where=positive > 0, out=np.zeros_like(positive))
    assert_within(slopes, expected, 4 * eps * expected, dtype)
    norms = np.sqrt(np.square(values.astype(float)).sum(axis=1))
    assert_within(norms_found, norms, (shape[1] + 2) * eps * norms, dtype)
    assert_finite(gradient, dtype)
    total = values.astype(float).sum(axis=0)
    size = np.abs(values.astype(float)).sum(axis=0)
    # log2 n additions touch every term.
    assert_within(total_found, total, (np.log2(shape[0]) + 2) * eps * size, dtype)
    block_size = int(rng.integers(1, shape[0] + 3))
    weights = jnp.abs(x[:, 0])
    blocks, block_weights = numerics.to_blocks(x, weights, block_size)
    assert blocks.shape[:2] == block_weights.shape
    assert blocks.shape[1] <= block_size
    assert blocks.dtype == block_weights.dtype == dtype
    rows = blocks.reshape(-1, shape[1])
    np.testing.assert_array_equal(rows[: shape[0]], values)
    assert (np.asarray(rows[shape[0] :]) == values[-1]).all()
    np.testing.assert_array_equal(block_weights.reshape(-1)[: shape[0]], weights)
    assert not block_weights.reshape(-1)[shape[0] :].any()
    rows, doubled = numerics.map_blocks(lambda rows: (rows, 2 * rows[:, 0]), x, block_size)
    np.testing.assert_array_equal(rows, values)
    np.testing.assert_array_equal(doubled, 2 * values[:, 0])
    assert numerics.at_least_float32(x).dtype == dtype
    assert numerics.at_least_float32(x.astype(jnp.float16)).dtype == np.float32
    assert_within(numerics.uniform_weights(x), np.full(shape[0], 1 / shape[0]), eps, dtype)


@jax.jit
def bandwidths(key, x, y):
    some = kernels.median_bandwidth(key, x, y, max_points=3)
    return kernels.median_bandwidth(key, x, y), some, kernels.bandwidth_grid(key, x, y)


@drawn_clouds(BLOCK_SIZES)
@few
@given(st.data())
def test_median_bandwidth(drawn, data):
    case = data.draw(drawn)
    x, y, *_ = case.in_float64()
    key = jax.random.key(case.seed)
    median, some, grid = bandwidths(key, case.x, case.y)
    pooled = np.concatenate([x, y])
    pairs = np.triu_indices(len(pooled), k=1)
    squares, away, *_ = reference(case, "gaussian", pooled, pooled)
    lengths = np.sqrt(squares[pairs])
    expected = np.median(lengths) or (np.median(lengths[lengths > 0]) if lengths.any() else 1)
    # A median moves by no more than the entry that moves the most.
    ends = np.sqrt(squares + away), np.sqrt(np.maximum(squares - away, 0))
    bound = max(np.abs(end - np.sqrt(squares)).max() for end in ends) + 2 * case.eps * expected
    assert_within(median, expected, bound, case.x.dtype)
    powers = 2.0 ** np.arange(-2, 3)
    assert_within(grid, powers * float(median), 2 * case.eps * powers * expected, case.x.dtype)
    assert some == 1 or lengths.min() - bound <= some <= lengths.max() + bound


def test_unbiased_needs_two_points_of_positive_weight():
    x, w = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1.0, 2.0, 0.0])
    for weights in ({"x_weights": w.at[0].set(0)}, {"y_weights": w.at[1].set(0)}):
        with pytest.raises(ValueError, match="two points of each sample"):
            mmd_squared_unbiased(kernels.gaussian(1.0), x, x, **weights)
