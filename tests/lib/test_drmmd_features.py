"""DrMMD in feature space against its form in Gram matrices, which is tested on its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from lib.drmmd import (
    cutoff,
    drmmd_witness,
    particle_statistics,
    prepare_target,
    showalter,
    tikhonov,
)
from lib.drmmd.features import (
    feature_moments,
    feature_velocity,
    feature_witness,
    prepare_target_features,
)
from lib.kernels import polynomial

pytestmark = pytest.mark.usefixtures("x64")


def samples(n=9, m=7, seed=0):
    """(particles [n, 2], target points [m, 2], their weights)."""
    rng = np.random.default_rng(seed)
    y, x = rng.normal(size=(n, 2)), 0.5 + rng.normal(size=(m, 2))
    weights = rng.uniform(0.5, 2, size=m)
    return y, x, weights / weights.sum()


def polynomial_features(x):
    """Of the kernel (1 + x . y)^2 in two dimensions: it has rank 6."""
    a, b = x[:, 0], x[:, 1]
    root = np.sqrt(2)
    ones = jnp.ones_like(a)
    return jnp.stack([ones, root * a, root * b, a * a, b * b, root * a * b], axis=1)


@pytest.mark.parametrize(
    ("spectral_filter", "block_size", "m"),
    [(tikhonov, 3, 11), (showalter, 100, 11), (cutoff, 100, 4), (tikhonov, 100, 4)],
)
def test_features_of_a_kernel_give_what_its_gram_matrices_give(spectral_filter, block_size, m):
    kernel = polynomial(2)
    y, x, w = samples(n=12, m=m)
    y, x, w = map(jnp.asarray, (y, x, w))
    target = prepare_target(kernel, x, w)
    statistics, evaluate = particle_statistics(kernel, y, target)
    exact = drmmd_witness(target, statistics, 0.1, spectral_filter=spectral_filter)
    options = {"block_size": block_size}
    primal = prepare_target_features(polynomial_features, x, w, **options)
    mean, nothing = feature_moments(polynomial_features, y, second=False, **options)
    assert nothing is None
    witness = feature_witness(primal, mean, 0.1, spectral_filter=spectral_filter)
    np.testing.assert_allclose(witness.value, exact.value, rtol=1e-8)
    at_target = polynomial_features(x) @ witness.direction
    np.testing.assert_allclose(at_target, exact.at_target, rtol=1e-6, atol=1e-8)
    velocity = feature_velocity(polynomial_features, witness, y, **options)
    np.testing.assert_allclose(velocity, evaluate(exact)[1], rtol=1e-6, atol=1e-8)
