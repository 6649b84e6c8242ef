"""Nystrom features against the dense formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.drmmd.nystrom import nystrom_basis, nystrom_features
from lib.kernels import gaussian, laplace

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)


def points(n, seed, d=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)))


@pytest.mark.parametrize(
    ("kernel", "block_size"), [(gaussian(1.0), 1), (laplace(2.0), 3), (gaussian(1.0), 100)]
)
def test_products_are_the_projection_on_the_landmarks(kernel, block_size):
    x, y = points(8, 0), points(5, 1)
    basis = nystrom_basis(KEY, kernel, x, 4)
    z = basis.landmarks
    assert all(any(np.array_equal(row, other) for other in x) for row in np.asarray(z))
    assert len(np.unique(z, axis=0)) == 4
    expected = kernel(x, z) @ np.linalg.pinv(kernel(z, z)) @ kernel(z, y)
    phi_x, phi_y = (nystrom_features(kernel, basis, p, block_size=block_size) for p in (x, y))
    np.testing.assert_allclose(phi_x @ phi_y.T, expected, rtol=1e-9, atol=1e-12)


def test_with_every_point_a_landmark_it_is_the_kernel():
    x, y = points(8, 0), points(5, 1)
    basis = nystrom_basis(KEY, gaussian(1.0), x, 8)
    phi_x, phi_y = (nystrom_features(gaussian(1.0), basis, p) for p in (x, y))
    np.testing.assert_allclose(phi_x @ phi_y.T, gaussian(1.0)(x, y), rtol=1e-8)


def test_repeated_landmarks_lose_a_direction_and_nothing_else():
    x = jnp.concatenate([points(4, 0), points(4, 0)])
    basis = nystrom_basis(KEY, gaussian(1.0), x, 8)
    phi = nystrom_features(gaussian(1.0), basis, x)
    assert np.sum(np.abs(phi).max(axis=0) > 0) == 4
    np.testing.assert_allclose(phi @ phi.T, gaussian(1.0)(x, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 9])
def test_ranks_out_of_range_are_named(rank):
    with pytest.raises(ValueError, match=rf"rank must lie in \[1, 8\].* got {rank}"):
        nystrom_basis(KEY, gaussian(1.0), points(8, 0), rank)
