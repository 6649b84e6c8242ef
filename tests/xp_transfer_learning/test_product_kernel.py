"""The product kernel against Gram matrices in float64, and scikit-learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracles import kernel, mmd_squared
from sklearn.decomposition import PCA
from strategies import normal

from xp_transfer_learning.product_kernel import (
    MOMENTS,
    PUBLISHED,
    Bandwidths,
    product_kernel,
    product_value_and_grad,
    with_moments,
)

value_and_grad = jax.jit(product_value_and_grad, static_argnames=("bandwidths", "noise"))
KEY = jax.random.key(5)
OTHER = Bandwidths(2.0, 0.5, 3.0)


def scales(bandwidths, d=3):
    """Standard deviations of the coordinates: of points, means and covariances."""
    return np.sqrt(np.repeat(bandwidths, (d, 2, 4)))


def problem(bandwidths):
    """Labelled points, moments and all, on the scale of the bandwidths."""
    x, y = normal(0, 3, 4, 3 + MOMENTS), 1 + normal(1, 2, 5, 3 + MOMENTS)
    return scales(bandwidths) / 2 * x, scales(bandwidths) / 2 * y


def gram(bandwidths, x, y):
    return kernel(x / scales(bandwidths), y / scales(bandwidths), 1.0)


def flat(*samples):
    return [z.reshape(-1, z.shape[-1]) for z in samples]


def expected_value(x, y, bandwidths):
    return mmd_squared(*flat(x, y), partial(gram, bandwidths)) / 2


def expected_gradient(at, x, y, bandwidths):
    """Gradient, at every point of `at`, of x's kernel mean less that of y."""
    (points,), weights = flat(at), scales(bandwidths) ** -2

    def of_mean(z):
        k = gram(bandwidths, points, z)
        return (k @ z - k.sum(axis=1, keepdims=True) * points) * weights / len(z)

    x, y = flat(x, y)
    return (of_mean(x) - of_mean(y)).reshape(at.shape)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_moments_are_those_of_two_principal_components(x64, k):
    x, y = 3 * normal(0, 2, 6, 5) @ normal(1, 5, 5), 1 + normal(2, 4, k, 5)
    pca = PCA(2).fit(np.concatenate(flat(x, y)))
    extended = with_moments(jnp.asarray(x), jnp.asarray(y))
    projected = [
        pca.transform(z.reshape(-1, 5)).reshape(*z.shape[:2], 2)[..., ::-1] for z in (x, y)
    ]
    # Either sign of a component will do, the same in both sets.
    means = [np.concatenate([np.asarray(z[:, 0, 5:7]) for z in extended])]
    means.append(np.concatenate([z.mean(axis=1) for z in projected]))
    signs = np.sign(np.sum(means[0] * means[1], axis=0))
    np.testing.assert_allclose(means[0], signs * means[1], rtol=1e-9, atol=1e-10)
    for z, new, of_z in zip((x, y), extended, projected):
        assert new.shape == (*z.shape[:2], 5 + MOMENTS)
        np.testing.assert_array_equal(new[..., :5], z)
        np.testing.assert_array_equal(new[..., 5:], np.repeat(new[:, :1, 5:], z.shape[1], axis=1))
        for points, moments in zip(signs * of_z, new):
            second = np.cov(points.T, bias=True)
            np.testing.assert_allclose(moments[0, 7:], second.ravel(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bandwidths", [PUBLISHED, OTHER])
def test_kernel_value_and_gradient_are_those_of_gram_matrices(x64, bandwidths):
    x, y = problem(bandwidths)
    a, b = flat(x, y)
    value = product_kernel(jnp.asarray(a), jnp.asarray(b), bandwidths)
    np.testing.assert_allclose(value, gram(bandwidths, a, b), rtol=1e-12)
    np.testing.assert_array_equal(np.diagonal(product_kernel(jnp.asarray(a), jnp.asarray(a))), 1)
    options = {"bandwidths": bandwidths, "noise": 0.0}
    value, gradient = value_and_grad(jnp.asarray(x), jnp.asarray(y), KEY, **options)
    np.testing.assert_allclose(value, expected_value(x, y, bandwidths), rtol=1e-11)
    expected = expected_gradient(x, x, y, bandwidths)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)


def test_noise_moves_where_the_gradient_is_taken(x64):
    """x's own kernel mean stays where x is, and so does the value."""
    x, y = problem(OTHER)
    noisy = partial(value_and_grad, jnp.asarray(x), jnp.asarray(y), bandwidths=OTHER, noise=0.3)
    (value, gradient), (_, again), (other_value, other) = map(noisy, (KEY, KEY, jax.random.key(6)))
    drawn = jax.random.normal(KEY, (12, 9)).reshape(3, 4, 9)
    expected = expected_gradient(x + 0.3 * np.asarray(drawn), x, y, OTHER)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(again, gradient)
    assert np.abs(gradient - other).max() > 0.01
    np.testing.assert_allclose([value, other_value], expected_value(x, y, OTHER), rtol=1e-11)


def test_at_the_target_nothing_moves():
    x = jnp.asarray(normal(0, 2, 3, 10), jnp.float32)
    value, gradient = value_and_grad(x, x[::-1], KEY, bandwidths=Bandwidths(1, 1, 1), noise=0.0)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
