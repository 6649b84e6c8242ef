"""The product kernel against loops in float64, autodiff of the whole MMD, and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

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


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def problem(bandwidths, classes=(3, 2), points=(4, 5), d=3):
    """Labelled points, moments and all, on the scale of the bandwidths."""
    scale = np.sqrt(np.repeat(bandwidths, (d, 2, 4))) / 2
    return (
        scale * (i + normal(i, c, n, d + MOMENTS)) for i, (c, n) in enumerate(zip(classes, points))
    )


def loop_kernel(a, b, bandwidths):
    d = len(a) - MOMENTS
    squares = np.square(a - b)
    parts = squares[:d].sum(), squares[d : d + 2].sum(), squares[d + 2 :].sum()
    return np.prod([np.exp(-part / (2 * h)) for part, h in zip(parts, bandwidths)])


def loop_mean(x, y, bandwidths):
    return np.mean([loop_kernel(a, b, bandwidths) for a in x for b in y])


def loop_value(x, y, bandwidths):
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    within = loop_mean(x, x, bandwidths) + loop_mean(y, y, bandwidths)
    return within / 2 - loop_mean(x, y, bandwidths)


def loop_gradient(at, x, y, bandwidths):
    """Gradient, at every point of `at`, of x's kernel mean less that of y."""
    d = at.shape[-1] - MOMENTS
    inverse = 1 / np.repeat(bandwidths, (d, 2, 4))
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))

    def of_mean(a, z):
        return np.mean([loop_kernel(a, b, bandwidths) * (b - a) * inverse for b in z], axis=0)

    return np.array([[of_mean(a, x) - of_mean(a, y) for a in points] for points in at])


# Moments


@pytest.mark.parametrize("k", [1, 2, 7])
def test_moments_are_those_of_two_principal_components(x64, k):
    x, y = 3 * normal(0, 2, 6, 5) @ normal(1, 5, 5), 1 + normal(2, 4, k, 5)
    pooled = np.concatenate([x.reshape(-1, 5), y.reshape(-1, 5)])
    pca = PCA(2).fit(pooled)
    extended = with_moments(jnp.asarray(x), jnp.asarray(y))
    means = [np.asarray(z[:, 0, 5:7]) for z in extended]
    expected = [
        np.stack([pca.transform(points).mean(axis=0) for points in z])[:, ::-1] for z in (x, y)
    ]
    # Either sign of a component will do, the same in both sets.
    signs = np.sign(np.sum(np.concatenate(means) * np.concatenate(expected), axis=0))
    for z, new, mean, reference in zip((x, y), extended, means, expected):
        assert new.shape == (*z.shape[:2], 5 + MOMENTS)
        np.testing.assert_array_equal(new[..., :5], z)
        np.testing.assert_array_equal(new[..., 5:], np.repeat(new[:, :1, 5:], z.shape[1], axis=1))
        np.testing.assert_allclose(mean, signs * reference, rtol=1e-9, atol=1e-10)
        for points, moments in zip(z, new):
            projected = signs * pca.transform(points)[:, ::-1]
            second = np.cov(projected.T, bias=True)
            np.testing.assert_allclose(moments[0, 7:], second.ravel(), rtol=1e-9, atol=1e-10)


# Kernel and gradient


@pytest.mark.parametrize("bandwidths", [PUBLISHED, Bandwidths(2.0, 0.5, 3.0)])
def test_kernel_value_and_gradient_are_those_of_a_loop(x64, bandwidths):
    x, y = problem(bandwidths)
    a, b = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    gram = product_kernel(jnp.asarray(a), jnp.asarray(b), bandwidths)
    expected = [[loop_kernel(p, q, bandwidths) for q in b] for p in a]
    np.testing.assert_allclose(gram, expected, rtol=1e-12)
    np.testing.assert_array_equal(np.diagonal(product_kernel(jnp.asarray(a), jnp.asarray(a))), 1)
    value, gradient = value_and_grad(
        jnp.asarray(x), jnp.asarray(y), KEY, bandwidths=bandwidths, noise=0.0
    )
    np.testing.assert_allclose(value, loop_value(x, y, bandwidths), rtol=1e-11)
    np.testing.assert_allclose(gradient, loop_gradient(x, x, y, bandwidths), rtol=1e-9, atol=1e-14)


def test_noise_moves_where_the_gradient_is_taken(x64):
    """x's own kernel mean stays where x is, and so does the value."""
    bandwidths = Bandwidths(2.0, 0.5, 3.0)
    x, y = problem(bandwidths)
    arguments = jnp.asarray(x), jnp.asarray(y)
    noisy = [
        value_and_grad(*arguments, key, bandwidths=bandwidths, noise=0.3)
        for key in (KEY, KEY, jax.random.key(6))
    ]
    drawn = jax.random.normal(KEY, (12, 9)).reshape(3, 4, 9)
    expected = loop_gradient(x + 0.3 * np.asarray(drawn), x, y, bandwidths)
    (value, gradient), (_, again), (other_value, other) = noisy
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(again, gradient)
    assert np.abs(gradient - other).max() > 0.01
    np.testing.assert_allclose([value, other_value], loop_value(x, y, bandwidths), rtol=1e-11)


def test_at_the_target_nothing_moves():
    x = jnp.asarray(normal(0, 2, 3, 10), jnp.float32)
    value, gradient = value_and_grad(x, x[::-1], KEY, bandwidths=Bandwidths(1, 1, 1), noise=0.0)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
