"""Differences of moments by hand (`tests/lib/test_properties_features.py`: against float64)."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from xp_dataset_distillation.moments import moment_differences


@pytest.mark.usefixtures("x64")
def test_one_known_case_by_hand():
    # Real z is -1, 1: moments 0, 1, 0, 1. Condensed x = 4 is z = 3: moments 3, 9, 27, 81.
    differences = moment_differences(jnp.array([[0.0], [2.0]]), jnp.array([[4.0]]))
    np.testing.assert_allclose(differences.orders, [3, 8, 27, 80], rtol=1e-14)
    assert differences.covariance == 0


@pytest.mark.usefixtures("x64")
def test_differences_are_those_of_scipys_moments():
    rng = np.random.default_rng(0)
    real, condensed = (rng.gamma(2.0, size=(n, 5)) @ rng.normal(size=(5, 5)) for n in (60, 3))
    differences = moment_differences(jnp.asarray(real), jnp.asarray(condensed))
    z = [(x - real.mean(axis=0)) / real.std(axis=0) for x in (real, condensed)]
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
    differences = moment_differences(constant, jnp.full((2, 1), 0.6))
    np.testing.assert_allclose(differences.orders, [0.5, 0.25, 0.125, 0.0625], rtol=1e-6)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not \[3, 2\] and \[3, 4\]"):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="no moments of 3 real and 0 condensed rows"):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros((0, 2)))
