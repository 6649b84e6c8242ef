"""Nystrom features of a kernel: phi(x) . phi(y) = k(x, Z) K_ZZ^+ k(Z, y), for landmarks Z.

The projection of the kernel on the span of the landmarks' feature maps: exact where x or y is a
landmark (Williams and Seeger, Using the Nystrom method to speed up kernel machines, NIPS 2000).
Unlike random Fourier features they know where the data lie, and nothing of places far from Z.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lib.kernels import Kernel, gram_product


class NystromBasis(NamedTuple):
    """Landmarks Z, and K_ZZ^(-1/2) restricted to the eigenvalues above rounding."""

    landmarks: Float[Array, "r d"]
    inverse_root: Float[Array, "r r"]


def nystrom_basis(
    key: Key[Array, ""], kernel: Kernel, points: Float[Array, "n d"], rank: int
) -> NystromBasis:
    """`rank` of the points as landmarks, drawn without replacement; O(rank^3).

    Directions of K_ZZ below rounding are left out: their columns of features are 0. Raises
    ValueError where rank does not lie in [1, n].
    """
    if not 1 <= rank <= len(points):
        raise ValueError(f"rank must lie in [1, {len(points)}], the number of points, got {rank}")
    return landmark_basis(kernel, jax.random.choice(key, points, (rank,), replace=False))


def landmark_basis(kernel: Kernel, landmarks: Float[Array, "r d"]) -> NystromBasis:
    """As `nystrom_basis`, of landmarks that are chosen already."""
    rank = len(landmarks)
    values, vectors = jnp.linalg.eigh(kernel(landmarks, landmarks))
    kept = values > rank * jnp.finfo(values.dtype).eps * values[-1]
    inverse_root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return NystromBasis(landmarks, vectors * inverse_root[None, :])


def nystrom_features(
    kernel: Kernel, basis: NystromBasis, x: Float[Array, "n d"], *, block_size: int = 1024
) -> Float[Array, "n r"]:
    """phi(x); memory O(n r + block_size^2)."""
    return gram_product(kernel, x, basis.landmarks, basis.inverse_root, block_size=block_size)
