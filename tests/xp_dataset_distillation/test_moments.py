"""Differences of moments against scipy's moments and loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from xp_dataset_distillation.moments import moment_differences

compiled = jax.jit(moment_differences)


def features(num, *, seed, f=5):
    """Skewed, correlated features, some way from 0."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=(num, f)) @ rng.normal(size=(f, f)) + 3 * rng.normal(size=f)


def expected(real, condensed):
    """(orders, covariance), one feature and one pair at a time."""
    orders = []
    for p in (1, 2, 3, 4):
        total = 0.0
        for j in range(real.shape[1]):
            mean, std = np.mean(real[:, j]), np.std(real[:, j])
            std = std if np.ptp(real[:, j]) > 0 else 1.0
            moments = [
                stats.moment((x[:, j] - mean) / std, order=p, center=0) for x in (real, condensed)
            ]
            total += (moments[0] - moments[1]) ** 2
        orders.append(np.sqrt(total))
    std = np.where(np.ptp(real, axis=0) > 0, np.std(real, axis=0), 1)
    difference = np.subtract(*(np.cov((x / std).T, bias=True) for x in (real, condensed)))
    return orders, np.linalg.norm(difference - np.diag(np.diag(difference)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num", [1, 3, 40])
def test_differences_are_those_of_scipys_moments(num):
    real, condensed = features(60, seed=0), features(num, seed=1)
    differences = compiled(jnp.asarray(real), jnp.asarray(condensed))
    orders, covariance = expected(real, condensed)
    np.testing.assert_allclose(differences.orders, orders, rtol=1e-11)
    np.testing.assert_allclose(differences.covariance, covariance, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_one_known_case_by_hand():
    # Real z is -1, 1: moments 0, 1, 0, 1. Condensed x = 4 is z = 3: moments 3, 9, 27, 81.
    differences = moment_differences(jnp.array([[0.0], [2.0]]), jnp.array([[4.0]]))
    np.testing.assert_allclose(differences.orders, [3, 8, 27, 80], rtol=1e-14)
    assert differences.covariance == 0


def test_dead_features_are_compared_in_their_own_units_in_float32():
    real, condensed = features(60, seed=0), features(9, seed=1)
    real[:, 1] = 0.1  # whose mean in float32 is not it
    condensed[:, 1] = 0.6
    real, condensed = (x.astype(np.float32) for x in (real, condensed))
    differences = compiled(jnp.asarray(real), jnp.asarray(condensed))
    orders, covariance = expected(real.astype(np.float64), condensed.astype(np.float64))
    np.testing.assert_allclose(differences.orders, orders, rtol=2e-5)
    np.testing.assert_allclose(differences.covariance, covariance, rtol=2e-5)
    only = moment_differences(jnp.full((7, 1), 0.1), jnp.full((2, 1), 0.6))
    np.testing.assert_allclose(only.orders, [0.5, 0.25, 0.125, 0.0625], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_same_set_differs_by_nothing_and_classes_are_a_vmap():
    real, condensed = (np.stack([features(12, seed=s + c) for c in (0, 1)]) for s in (0, 5))
    differences = jax.vmap(moment_differences)(jnp.asarray(real), jnp.asarray(condensed))
    for c in range(2):
        of_class = moment_differences(jnp.asarray(real[c]), jnp.asarray(condensed[c]))
        np.testing.assert_allclose(differences.orders[c], of_class.orders, rtol=1e-12)
        np.testing.assert_allclose(differences.covariance[c], of_class.covariance, rtol=1e-12)
    same = moment_differences(jnp.asarray(real[0]), jnp.asarray(np.repeat(real[0], 2, axis=0)))
    np.testing.assert_allclose(same.orders, np.zeros(4), atol=1e-12)
    np.testing.assert_allclose(same.covariance, 0, atol=1e-12)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not \[3, 2\] and \[3, 4\]"):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="no moments of 3 real and 0 condensed rows"):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros((0, 2)))
