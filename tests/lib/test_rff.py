"""Random Fourier features against the kernels that they approximate, and their mean embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.stats import chi, kstest, t

from lib.kernels import gaussian, imq, laplace
from lib.mmd import mmd_squared, mmd_squared_unbiased
from lib.numerics import cos_sin
from lib.rff import (
    gaussian_frequencies,
    imq_frequencies,
    laplace_frequencies,
    mean_embedding,
    mmd_squared_rff,
    mmd_squared_rff_unbiased,
    random_fourier_features,
    uniform_phases,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# Frequencies


def test_gaussian_frequencies_depend_on_key_and_shape_alone():
    key = jax.random.key(0)
    draw = gaussian_frequencies(key, 500, 7)
    with jax.enable_x64(True):
        again = gaussian_frequencies(key, 500, 7)
    assert draw.dtype == again.dtype == jnp.float32
    np.testing.assert_array_equal(draw, again)
    assert kstest(np.ravel(draw), "norm").pvalue > 0.01
    with pytest.raises(ValueError, match="must be >= 1: 0, 7"):
        gaussian_frequencies(key, 0, 7)


@pytest.fixture(scope="module")
def orthogonal_draws():
    """2,000 draws of 7 orthogonal frequencies in dimension 4: a group of 4 and a group of 3."""
    draw = jax.jit(jax.vmap(lambda key: gaussian_frequencies(key, 7, 4, orthogonal=True)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), 2000)), float)


def test_orthogonal_frequencies(orthogonal_draws):
    """Rows orthogonal in groups; across draws, normal entries of independent lengths."""
    lengths = np.linalg.norm(orthogonal_draws, axis=2)
    cosines = np.einsum("bid,bjd->bij", orthogonal_draws, orthogonal_draws)
    cosines = np.abs(cosines / lengths[:, :, None] / lengths[:, None])
    group = np.arange(7) // 4
    same = (group[:, None] == group[None]) & ~np.eye(7, dtype=bool)
    assert np.all(cosines[:, same] < 1e-5)
    assert cosines[:, group[:, None] != group[None]].mean() > 0.1
    for row in range(7):
        for entry in range(4):
            assert kstest(orthogonal_draws[:, row, entry], "norm").pvalue > 1e-3
    assert kstest(lengths[:, 0], chi(4).cdf).pvalue > 0.01
    assert abs(np.corrcoef(lengths[:, 0], lengths[:, 1])[0, 1]) < 4 / np.sqrt(2000)


def test_fewer_orthogonal_frequencies_than_dimensions():
    draw = np.asarray(gaussian_frequencies(jax.random.key(0), 3, 6, orthogonal=True))
    gram = draw @ draw.T
    assert draw.shape == (3, 6)
    np.testing.assert_allclose(gram, np.diag(np.diagonal(gram)), atol=1e-5)


def test_phases_are_uniform():
    draw = np.asarray(uniform_phases(jax.random.key(0), 2000))
    assert draw.dtype == np.float32
    assert kstest(draw / (2 * np.pi), "uniform").pvalue > 0.01


def test_laplace_frequencies_are_cauchy():
    draw = np.asarray(laplace_frequencies(jax.random.key(0), 5000, 3))
    assert kstest(draw[:, 1], t(1).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("draw", "kernel"),
    [
        (gaussian_frequencies, gaussian(1.5)),
        (partial(gaussian_frequencies, orthogonal=True), gaussian(1.5)),
        (laplace_frequencies, laplace(1.5)),
        (partial(laplace_frequencies, orthogonal=True), laplace(1.5)),
        (imq_frequencies, imq(1.5)),
        (partial(imq_frequencies, exponent=1.3), imq(1.5, exponent=1.3)),
    ],
)
def test_features_approximate_the_kernel(draw, kernel):
    """Within five standard errors of 9,000 frequencies, each term at most 1, or 2 with phases."""
    x, num_features = jnp.asarray(normal(0, 12, 3), jnp.float32), 9000
    frequency_key, phase_key = jax.random.split(jax.random.key(1))
    frequencies, phases = draw(frequency_key, num_features, 3), uniform_phases(phase_key, 9000)
    for form, bound in ((None, 1), (phases, 2)):
        features = random_fourier_features(x, frequencies, 1.5, phases=form)
        error = np.abs(features @ features.T - kernel(x, x)).max()
        assert error < 5 * np.sqrt(bound / 2 / num_features)


# Features


def test_features_by_their_formula(x64):
    x, frequencies, phases = normal(0, 5, 3), normal(1, 4, 3), np.arange(4.0)
    angles = x @ frequencies.T / 0.6
    pairs = random_fourier_features(jnp.asarray(x), jnp.asarray(frequencies), 0.6)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / 2
    np.testing.assert_allclose(pairs, expected, rtol=1e-12)
    np.testing.assert_allclose(np.sum(np.square(pairs), axis=1), 1, rtol=1e-12)
    cosines = random_fourier_features(
        jnp.asarray(x), jnp.asarray(frequencies), 0.6, phases=jnp.asarray(phases)
    )
    np.testing.assert_allclose(cosines, np.sqrt(0.5) * np.cos(angles + phases), rtol=1e-12)


def test_dtype_follows_the_data():
    """In float64 with float32 frequencies, and from half precision in float32."""
    x, frequencies = normal(0, 5, 3), jnp.asarray(normal(1, 6, 3), jnp.float32)
    half = random_fourier_features(jnp.asarray(x, jnp.bfloat16), frequencies, 1.0)
    assert half.dtype == jnp.float32
    with jax.enable_x64(True):
        features = random_fourier_features(jnp.asarray(x), frequencies, 1.0)
        expected = np.cos(x @ np.asarray(frequencies, float).T) / np.sqrt(6)
        assert features.dtype == jnp.float64
        np.testing.assert_allclose(features[:, :6], expected, rtol=1e-12)


def test_cos_and_sin_in_single_precision():
    """To 1e-7 up to 1e4; after that to the rounding of the angle, and never past 1."""
    near = np.linspace(-30, 30, 20_001)
    quarters = np.arange(-50, 51) * (np.pi / 4)
    far = np.concatenate([np.geomspace(1, 1e4, 20_001), -np.geomspace(1, 1e4, 20_001)])
    angles = np.concatenate([near, quarters, far]).astype("f")
    found = jax.jit(cos_sin)(angles)
    for values, exact in zip(found, (np.cos(angles.astype(float)), np.sin(angles.astype(float)))):
        assert values.dtype == jnp.float32
        assert np.abs(values - exact).max() < 1.2e-7
    huge = np.geomspace(1e4, 3e38, 20_001).astype("f")
    cos, sin = jax.jit(cos_sin)(huge)
    np.testing.assert_allclose(np.square(cos) + np.square(sin), 1, atol=1e-5)
    known = huge < 1e6
    error = np.hypot(cos - np.cos(huge.astype(float)), sin - np.sin(huge.astype(float)))
    assert np.max(error[known] / np.spacing(huge[known])) < 1
    for value in jax.jit(cos_sin)(np.array([np.nan, np.inf, -np.inf], "f")):
        assert np.isnan(value).all()


def test_derivatives_of_cos_and_sin(x64):
    angles = np.linspace(-9, 9, 50)
    for order, (cos, sin) in ((1, (-np.sin(angles), np.cos(angles))),
                              (2, (-np.cos(angles), -np.sin(angles)))):  # fmt: skip
        for which, expected in ((0, cos), (1, sin)):
            derivative = lambda angle, which=which: cos_sin(angle)[which]  # noqa: E731
            for _ in range(order):
                derivative = jax.grad(derivative)
            for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-14)):
                found = jax.jit(jax.vmap(derivative))(angles.astype(dtype))
                np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("phased", [False, True])
def test_variance_of_the_features(phased):
    """Over 4,000 draws of D = 8: the formulas of the module, and less for pairs than for phases."""
    x = np.array([[0.0, 0.0], [0.5, 0.3]], "f")

    @jax.jit
    @jax.vmap
    def products(frequencies, phases):
        phases = phases if phased else None
        features = random_fourier_features(jnp.asarray(x), frequencies, 1.0, phases=phases)
        return features[0] @ features[1]

    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 8, 2)), rng.uniform(0, 2 * np.pi, size=(4000, 8))
    values = np.asarray(products(*(draw.astype("f") for draw in draws)))
    k = np.exp(-0.34 / 2)
    expected = (1 + k**4 / 2 - k**2) / 8 if phased else (1 - k**2) ** 2 / 16
    assert abs(values.mean() - k) < 4 * np.sqrt(expected / 4000)
    np.testing.assert_allclose(values.var(), expected, rtol=0.12)


def test_orthogonal_frequencies_lower_the_variance(orthogonal_draws):
    distance = np.full(4, 0.6)
    orthogonal = np.cos(orthogonal_draws[:, :4] @ distance).mean(axis=1)
    independent = np.cos(normal(0, 2000, 4, 4) @ distance).mean(axis=1)
    assert orthogonal.var() < 0.7 * independent.var()


# Mean embeddings


@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize(("n", "block_size"), [(1, 4), (11, 4), (11, 100)])
def test_mean_embedding_agrees_with_the_mean_of_features(x64, n, block_size, phased):
    x, frequencies, w = normal(0, n, 3), normal(1, 5, 3), np.arange(1.0, n + 1)
    phases = jnp.arange(5.0) if phased else None

    @jax.jit
    def embeddings(x, frequencies, w):
        embed = partial(mean_embedding, phases=phases, block_size=block_size)
        features = random_fourier_features(x, frequencies, 0.7, phases=phases)
        return embed(x, frequencies, 0.7), embed(x, frequencies, 0.7, weights=w), features

    uniform, weighted, features = embeddings(x, frequencies, w)
    np.testing.assert_allclose(uniform, np.mean(features, axis=0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(weighted, w @ features / w.sum(), rtol=1e-11, atol=1e-13)


def test_chunks_and_bandwidths_share_one_draw(x64):
    """A running sum over chunks is the embedding of the whole; a vmap serves all bandwidths."""
    x, frequencies = jnp.asarray(normal(0, 10, 3)), jnp.asarray(normal(1, 6, 3))
    embed = jax.jit(partial(mean_embedding, block_size=4))
    chunks = sum(len(chunk) * embed(chunk, frequencies, 2.0) for chunk in (x[:7], x[7:]))
    whole = embed(x, frequencies, 2.0)
    np.testing.assert_allclose(chunks / 10, whole, rtol=1e-12)
    bandwidths = jnp.array([0.5, 2.0])
    each = jax.jit(jax.vmap(embed, in_axes=(None, None, 0)))(x, frequencies, bandwidths)
    np.testing.assert_allclose(each[1], whole, rtol=1e-12)
    assert np.abs(each[0] - each[1]).max() > 0.1


def test_gradient_of_the_embedding(x64):
    x, y, frequencies = normal(0, 5, 2), normal(1, 4, 2), jnp.asarray(normal(2, 6, 2))

    def value(x, bandwidth):
        embed = partial(mean_embedding, frequencies=frequencies, bandwidth=bandwidth, block_size=2)
        return mmd_squared_rff(embed(x), embed(jnp.asarray(y)))

    check_grads(jax.jit(value), (x, 1.3), order=1, modes=("rev",), rtol=1e-6)


def test_memory_is_that_of_blocks():
    """All features of 10^6 points would be 7.6 GiB."""
    x = jax.ShapeDtypeStruct((1_000_000, 16), jnp.float32)
    frequencies = jax.ShapeDtypeStruct((1000, 16), jnp.float32)
    embed = jax.jit(mean_embedding).lower(x, frequencies, 1.0).compile()
    padded_copy = 1_000_000 * 17 * 4
    assert embed.memory_analysis().temp_size_in_bytes < 2 * padded_copy + 5 * 1024 * 2000 * 4


def test_bad_samples_raise():
    frequencies = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="x is not finite in row 2"):
        mean_embedding(jnp.ones((3, 2)).at[2, 1].set(jnp.nan), frequencies, 1.0)
    with pytest.raises(ValueError, match="x_weights must be >= 0"):
        mean_embedding(jnp.ones((2, 2)), frequencies, 1.0, weights=jnp.array([1.0, -1.0]))


# Maximum mean discrepancies


def test_mmds_of_one_draw(x64):
    """Biased and unbiased, with weights: those of the kernel z(x) . z(y), exactly."""
    x, y, w = normal(0, 9, 2), normal(1, 6, 2) + 0.4, np.arange(1.0, 10)
    frequencies = jnp.asarray(normal(2, 5, 2))

    def kernel(a, b):
        features = partial(random_fourier_features, frequencies=frequencies, bandwidth=0.8)
        return features(a) @ features(b).T

    @jax.jit
    def values(x, y, w):
        embed = partial(mean_embedding, frequencies=frequencies, bandwidth=0.8)
        mu, nu = embed(x, weights=w), embed(y)
        return (
            (mmd_squared_rff(mu, nu), mmd_squared(kernel, x, y, x_weights=w)),
            (
                mmd_squared_rff_unbiased(mu, nu, w.sum() ** 2 / (w @ w), 6),
                mmd_squared_unbiased(kernel, x, y, x_weights=w),
            ),
        )

    for value, expected in values(x, y, w):
        np.testing.assert_allclose(value, expected, rtol=1e-11)


def test_mmds_over_draws():
    """Over 2,000 draws their means are the MMDs of the Gaussian kernel."""
    x, y = normal(0, 9, 2).astype("f"), normal(1, 6, 2).astype("f")

    @jax.jit
    @jax.vmap
    def draws(frequencies):
        mu, nu = (mean_embedding(jnp.asarray(z), frequencies, 0.8) for z in (x, y))
        return mmd_squared_rff(mu, nu), mmd_squared_rff_unbiased(mu, nu, 9, 6)

    estimators = (mmd_squared, mmd_squared_unbiased)
    values = draws(normal(2, 2000, 10, 2).astype("f"))
    for value, estimator in zip(map(np.asarray, values), estimators):
        expected = jax.jit(partial(estimator, gaussian(0.8)))(x, y)
        assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(2000)
    assert values[1].min() < 0 < values[0].min()
