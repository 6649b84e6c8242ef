"""Losses of condensation against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import sliced_wasserstein
from xp_dataset_distillation import losses

KEY = jax.random.key(0)


def samples(n=4, m=6, f=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, f)), 0.7 * rng.normal(size=(m, f)) + 0.5


def loop_mmd(kernel, x, y):
    def mean(a, b):
        return np.mean([[kernel(p, q) for q in b] for p in a])

    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


def loop_bandwidth(x, y):
    pooled = np.concatenate([x, y])
    total = sum(np.sum((p - q) ** 2) for p in pooled for q in pooled)
    return total / (len(pooled) ** 2 - len(pooled))


def published(scale, x, y):
    bandwidth = scale * loop_bandwidth(x, y)
    return lambda p, q: sum(
        np.exp(-np.sum((p - q) ** 2) / (bandwidth * 2.0**k)) for k in range(-2, 3)
    )


def kernel_of(name, x, y, scale=1.0):
    return {
        "gaussian": published(scale, x, y),
        "gaussian_fixed": lambda p, q: sum(
            np.exp(-gamma * np.sum((p - q) ** 2)) for gamma in (0.1, 1.0, 5.0)
        ),
        "linear": np.dot,
        "polynomial": lambda p, q: (p @ q + 1) ** 2,
        "energy": lambda p, q: -np.linalg.norm(p - q),
    }[name]


@pytest.mark.parametrize(
    ("name", "scale"),
    [("gaussian", 1.0), ("gaussian", 0.3), ("gaussian_fixed", 1.0), ("linear", 1.0),
     ("polynomial", 1.0), ("energy", 1.0)],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(4, 6, 5), (1, 7, 12)])
def test_class_losses_are_the_biased_mmd_of_their_kernels(name, scale, sizes):
    x, y = samples(*sizes)
    expected = loop_mmd(kernel_of(name, x, y, scale), x, y)
    with jax.enable_x64(True):
        loss = losses.class_loss(name, scale=scale)(KEY, jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(loss, expected, rtol=1e-10, atol=1e-13)


def test_the_gradient_is_that_of_finite_differences_at_a_constant_bandwidth():
    x, y = samples(3, 4, 3)
    kernel = published(1.0, x, y)

    expected = np.zeros_like(x)
    for where in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[where] = 1e-6
        expected[where] = (loop_mmd(kernel, x + step, y) - loop_mmd(kernel, x - step, y)) / 2e-6
    with jax.enable_x64(True):
        loss = losses.class_loss("gaussian")
        gradient = jax.grad(lambda x: loss(KEY, x, jnp.asarray(y)))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_random_features_are_unbiased_for_the_gaussian_loss(scale):
    x, y = samples()
    expected = loop_mmd(published(scale, x, y), x, y)
    loss = jax.jit(losses.class_loss("rff", scale=scale, num_features=200))
    draws = np.asarray(
        [loss(key, jnp.float32(x), jnp.float32(y)) for key in jax.random.split(KEY, 60)]
    )
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert abs(draws.mean() - expected) < 4 * error
    assert error < 0.05 * expected


def test_identical_points_everywhere_give_no_nan():
    x = jnp.ones((3, 4))
    loss = losses.class_loss("gaussian")
    value, gradient = jax.value_and_grad(lambda x: loss(KEY, x, jnp.ones((5, 4))))(x)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="no kernel 'sigmoid'"):
        losses.class_loss("sigmoid")


def test_the_loss_of_data_sets_is_that_of_a_loop_and_its_gradient_is_wasserstein():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4)) + 1
    with jax.enable_x64(True):
        directions = sliced_wasserstein.random_directions(KEY, 7, 4, dtype=jnp.float64)
        value, gradient = jax.value_and_grad(
            lambda x: losses.dataset_loss(KEY, x, jnp.asarray(y), num_directions=7)
        )(jnp.asarray(x))

    def distance(mu, nu):
        sorted_mu, sorted_nu = (np.sort(z @ np.asarray(directions).T, axis=0) for z in (mu, nu))
        return np.sqrt(np.mean((sorted_mu - sorted_nu) ** 2))

    def squared(x):
        def mean(a, b):
            return np.mean([[-distance(mu, nu) for nu in b] for mu in a])

        return mean(x, x) - 2 * mean(x, y) + mean(y, y)

    np.testing.assert_allclose(value, 6 * squared(x) / 2, rtol=1e-10)
    step = np.zeros_like(x)
    step[1, 2, 0] = 1e-6
    expected = 6 * (squared(x + step) - squared(x - step)) / 2 / 2e-6
    np.testing.assert_allclose(gradient[1, 2, 0], expected, rtol=1e-5)
