"""Losses of condensation against Gram matrices, differences of moments against scipy's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from kernel_oracles import mmd_squared
from scipy import stats
from scipy.spatial.distance import cdist, pdist

from lib import sliced_wasserstein
from xp_dataset_distillation import losses
from xp_dataset_distillation.moments import moment_differences

KEY = jax.random.key(0)


def samples(n=4, m=6, f=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, f)), 0.7 * rng.normal(size=(m, f)) + 0.5


def gaussians(widths, x, y):
    return sum(np.exp(-cdist(x, y, "sqeuclidean") / width) for width in widths)


def published(scale, x, y):
    """Of bandwidths around the mean squared distance of all points."""
    bandwidth = scale * np.mean(pdist(np.concatenate([x, y]), "sqeuclidean"))
    return partial(gaussians, bandwidth * 2.0 ** np.arange(-2, 3))


KERNELS = {
    "gaussian_fixed": partial(gaussians, (10, 1, 0.2)),
    "linear": lambda x, y: x @ y.T,
    "polynomial": lambda x, y: (x @ y.T + 1) ** 2,
    "energy": lambda x, y: -cdist(x, y),
}


@pytest.mark.parametrize(
    ("name", "scale"), [("gaussian", 1.0), ("gaussian", 0.3), *((name, 1.0) for name in KERNELS)]
)
@pytest.mark.parametrize("sizes", [(4, 6, 5), (1, 7, 12)])
def test_class_losses_are_the_biased_mmd_of_their_kernels(x64, name, scale, sizes):
    x, y = samples(*sizes)
    expected = mmd_squared(x, y, KERNELS.get(name) or published(scale, x, y))
    loss = jax.jit(losses.class_loss(name, scale=scale))(KEY, x, y)
    np.testing.assert_allclose(loss, expected, rtol=1e-10, atol=1e-13)


def test_the_gradient_is_that_of_finite_differences_at_a_constant_bandwidth(x64):
    x, y = samples(3, 4, 3)
    value = partial(mmd_squared, y=y, kernel=published(1.0, x, y))
    steps = 1e-6 * np.eye(x.size).reshape(-1, *x.shape)
    expected = [(value(x + step) - value(x - step)) / 2e-6 for step in steps]
    loss = losses.class_loss("gaussian")
    gradient = jax.jit(jax.grad(loss, argnums=1))(KEY, x, y)
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, slow(0.3)])
def test_random_features_are_unbiased_for_the_gaussian_loss(scale):
    x, y = samples()
    expected = mmd_squared(x, y, published(scale, x, y))
    loss = jax.jit(losses.class_loss("rff", scale=scale, num_features=200))
    draws = [loss(key, jnp.float32(x), jnp.float32(y)) for key in jax.random.split(KEY, 60)]
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - expected) < 4 * error
    assert error < 0.05 * expected


@pytest.mark.slow
def test_identical_points_everywhere_give_no_nan():
    loss = losses.class_loss("gaussian")
    value, gradient = jax.value_and_grad(loss, argnums=1)(KEY, jnp.ones((3, 4)), jnp.ones((5, 4)))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="no kernel 'sigmoid'"):
        losses.class_loss("sigmoid")


def test_the_loss_of_data_sets_is_that_of_a_loop_and_its_gradient_is_wasserstein(x64):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4)) + 1
    directions = np.asarray(sliced_wasserstein.random_directions(KEY, 7, 4, dtype=jnp.float64))
    loss = partial(losses.dataset_loss, num_directions=7)
    value, gradient = jax.jit(jax.value_and_grad(loss, argnums=1))(KEY, x, y)

    def kernel(a, b):
        a, b = (np.sort(z @ directions.T, axis=1) for z in (a, b))
        return -np.sqrt(np.square(a[:, None] - b).mean(axis=(2, 3)))

    np.testing.assert_allclose(value, 6 * mmd_squared(x, y, kernel) / 2, rtol=1e-10)
    step = np.zeros_like(x)
    step[1, 2, 0] = 1e-6
    rise = mmd_squared(x + step, y, kernel) - mmd_squared(x - step, y, kernel)
    np.testing.assert_allclose(gradient[1, 2, 0], 6 * rise / 2 / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_condensed", [3, 1])
def test_differences_of_moments_are_those_of_scipys_moments(x64, num_condensed):
    rng = np.random.default_rng(0)
    samples = [rng.gamma(2.0, size=(n, 5)) @ rng.normal(size=(5, 5)) for n in (60, num_condensed)]
    differences = jax.jit(moment_differences)(*samples)
    z = [(x - samples[0].mean(axis=0)) / samples[0].std(axis=0) for x in samples]
    orders = [
        np.linalg.norm(np.subtract(*(stats.moment(x, order=p, center=0) for x in z)))
        for p in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose(differences.orders, orders, rtol=1e-11)
    covariance = np.subtract(*(np.cov(x.T, bias=True) for x in z))
    off_diagonal = np.linalg.norm(covariance - np.diag(np.diag(covariance)))
    np.testing.assert_allclose(differences.covariance, off_diagonal, rtol=1e-11)


def test_constant_features_are_compared_in_their_own_units_in_float32():
    constant = jnp.full((7, 1), 0.1)  # whose mean in float32 is not it
    differences = jax.jit(moment_differences)(constant, jnp.full((2, 1), 0.6))
    np.testing.assert_allclose(differences.orders, [0.5, 0.25, 0.125, 0.0625], rtol=1e-6)


@pytest.mark.parametrize(
    ("condensed", "message"),
    [((3, 4), r"not \[3, 2\] and \[3, 4\]"), ((0, 2), "no moments of 3 real and 0 condensed rows")],
)
def test_moments_of_other_shapes_are_refused(condensed, message):
    with pytest.raises(ValueError, match=message):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros(condensed))
