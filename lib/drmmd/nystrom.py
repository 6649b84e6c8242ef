"""Nystrom features of a kernel: phi(x) . phi(y) = k(x, Z) K_ZZ^+ k(Z, y), for landmarks Z.

The projection of the kernel on the span of the landmarks' feature maps: exact where x or y is a
landmark (Williams and Seeger, Using the Nystrom method to speed up kernel machines, NIPS 2000).
Unlike random Fourier features they know where the data lie, and nothing of places far from Z.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lib.kernels import Kernel, gram_product


class NystromBasis(NamedTuple):
    """Landmarks Z, and K_ZZ^(-1/2) restricted to the eigenvalues above rounding."""

    landmarks: Float[Array, "r d"]
    inverse_root: Float[Array, "r r"]


def landmark_basis(kernel: Kernel, landmarks: Float[Array, "r d"]) -> NystromBasis:
    """The basis of these landmarks, such as some of the points; O(r^3).

    Directions of K_ZZ below rounding are left out: their columns of features are 0.
    """
    values, vectors = jnp.linalg.eigh(kernel(landmarks, landmarks))
    sound = values > len(landmarks) * jnp.finfo(values.dtype).eps * values[-1]
    inverse_root = jnp.where(sound, 1 / jnp.sqrt(jnp.where(sound, values, 1)), 0)
    return NystromBasis(landmarks, vectors * inverse_root[None, :])


def nystrom_features(
    kernel: Kernel, basis: NystromBasis, x: Float[Array, "n d"], *, block_size: int = 1024
) -> Float[Array, "n r"]:
    """phi(x); memory O(n r + block_size^2)."""
    return gram_product(kernel, x, basis.landmarks, basis.inverse_root, block_size=block_size)
