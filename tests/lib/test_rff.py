"""Random Fourier features against the kernels that they approximate, and their mean embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.stats import chi, kstest
from strategies import normal

from lib.numerics import cos_sin
from lib.rff import (
    gaussian_frequencies,
    mean_embedding,
    mmd_squared_rff,
    random_fourier_features,
    uniform_phases,
)


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


def test_phases_are_uniform():
    draw = np.asarray(uniform_phases(jax.random.key(0), 2000))
    assert draw.dtype == np.float32
    assert kstest(draw / (2 * np.pi), "uniform").pvalue > 0.01


def test_cos_and_sin_in_single_precision():
    """To 1e-7 up to 1e4; after that to the rounding of the angle, and never past 1."""
    near = np.linspace(-30, 30, 20_001)
    quarters = np.arange(-50, 51) * (np.pi / 4)
    far = np.concatenate([np.geomspace(1, 1e4, 20_001), -np.geomspace(1, 1e4, 20_001)])
    angles = np.concatenate([near, quarters, far]).astype("f")
    cos_and_sin = jax.jit(cos_sin)(angles)
    for values, exact in zip(
        cos_and_sin, (np.cos(angles.astype(float)), np.sin(angles.astype(float)))
    ):
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
    cos, sin = np.cos(angles), np.sin(angles)
    for which, expected in ((0, (-sin, -cos)), (1, (cos, -sin))):
        first = jax.grad(lambda angle, which=which: cos_sin(angle)[which])
        for derivative, values in zip((first, jax.grad(first)), expected):
            for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-14)):
                derivatives = jax.jit(jax.vmap(derivative))(angles.astype(dtype))
                np.testing.assert_allclose(derivatives, values, rtol=0, atol=tolerance)


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
