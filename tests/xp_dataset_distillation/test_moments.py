"""Differences of moments against scipy's."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from xp_dataset_distillation.moments import moment_differences


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_condensed", [3, 1])
def test_differences_are_those_of_scipys_moments(num_condensed):
    rng = np.random.default_rng(0)
    samples = [rng.gamma(2.0, size=(n, 5)) @ rng.normal(size=(5, 5)) for n in (60, num_condensed)]
    differences = moment_differences(*map(jnp.asarray, samples))
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
    differences = moment_differences(constant, jnp.full((2, 1), 0.6))
    np.testing.assert_allclose(differences.orders, [0.5, 0.25, 0.125, 0.0625], rtol=1e-6)


@pytest.mark.parametrize(
    ("condensed", "message"),
    [((3, 4), r"not \[3, 2\] and \[3, 4\]"), ((0, 2), "no moments of 3 real and 0 condensed rows")],
)
def test_other_shapes_are_refused(condensed, message):
    with pytest.raises(ValueError, match=message):
        moment_differences(jnp.zeros((3, 2)), jnp.zeros(condensed))
