"""DrMMD in feature space against its form in Gram matrices, which is tested on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import rff
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
from lib.kernels import gaussian, polynomial

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
    statistics, pull = particle_statistics(kernel, y, target)
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
    np.testing.assert_allclose(velocity, pull(exact)[1], rtol=1e-6, atol=1e-8)


def test_moments_of_features_are_sums():
    _, x, w = samples(m=11)
    phi = np.asarray(polynomial_features(jnp.asarray(x)))
    mean, second = feature_moments(polynomial_features, jnp.asarray(x), jnp.asarray(7 * w))
    np.testing.assert_allclose(mean, w @ phi, rtol=1e-12)
    np.testing.assert_allclose(second, phi.T @ np.diag(w) @ phi, rtol=1e-12)


@pytest.mark.slow
def test_random_features_approach_the_exact_flow():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(200, 2))), jnp.asarray(0.5 + rng.normal(size=(150, 2)))
    target = prepare_target(gaussian(1.0), x)
    statistics, pull = particle_statistics(gaussian(1.0), y, target)
    exact = pull(drmmd_witness(target, statistics, 0.1))[1]
    errors = []
    for count in (20, 1000):
        frequencies = rff.gaussian_frequencies(jax.random.key(1), count, 2)

        def features(z, frequencies=frequencies):
            return rff.random_fourier_features(z, frequencies, 1.0)

        primal = prepare_target_features(features, x)
        witness = feature_witness(primal, feature_moments(features, y)[0], 0.1)
        found = feature_velocity(features, witness, y)
        errors.append(float(jnp.abs(found - exact).max() / jnp.abs(exact).max()))
    # Errors fall as 1 / sqrt(count).
    assert errors[1] < 0.1
    assert errors[0] > 3 * errors[1]
