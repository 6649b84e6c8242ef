"""Which moments of the real features a condensed set matches: differences of order 1 to 4."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ORDERS = (1, 2, 3, 4)


class MomentDifferences(NamedTuple):
    """`orders` [4]: Euclidean norms over the f features, of the moments of order 1 to 4.
    `covariance`: Frobenius norm of the covariances' difference off the diagonal. Of one class; not
    divided by f."""

    orders: Float[Array, " 4"]
    covariance: Float[Array, ""]


def moment_differences(
    real: Float[Array, "m f"], condensed: Float[Array, "n f"]
) -> MomentDifferences:
    """How far the moments of condensed features of one class are from those of real ones.

    Features are standardized by the real ones: z = (x - mean) / std, features that are constant
    among the real ones only by the mean. Of order p: |E z_real^p - E z_condensed^p|_2, the p-th
    power of every feature, not centered again; orders 1 and 3 of the real ones are 0 and the
    skewness, order 2 is 1. Covariances are those of z, each about its own mean, biased (1/n), so
    that a single condensed image has covariance 0.

    Memory O((m + n) f + f^2). Raises ValueError for features of different numbers, or no row.
    """
    if real.ndim != 2 or condensed.ndim != 2 or real.shape[1] != condensed.shape[1]:
        raise ValueError(
            f"features are [m, f] and [n, f], not {list(real.shape)} and {list(condensed.shape)}"
        )
    if not len(real) or not len(condensed):
        raise ValueError(f"no moments of {len(real)} real and {len(condensed)} condensed rows")
    mean, std = jnp.mean(real, axis=0), jnp.std(real, axis=0)
    # Of equal numbers the mean can be off by rounding, and std is then no exact 0.
    constant = jnp.all(real == real[:1], axis=0)
    mean, scale = jnp.where(constant, real[0], mean), jnp.where(constant, 1, std)
    real, condensed = ((x - mean[None]) / scale[None] for x in (real, condensed))
    orders = [
        jnp.linalg.norm(jnp.mean(real**p, axis=0) - jnp.mean(condensed**p, axis=0)) for p in ORDERS
    ]
    difference = _covariance(real) - _covariance(condensed)
    off_diagonal = difference - jnp.diag(jnp.diag(difference))
    return MomentDifferences(jnp.stack(orders), jnp.linalg.norm(off_diagonal))


def _covariance(z: Float[Array, "n f"]) -> Float[Array, "f f"]:
    z = z - jnp.mean(z, axis=0, keepdims=True)
    return jnp.matmul(z.T, z, precision=lax.Precision.HIGHEST) / len(z)
