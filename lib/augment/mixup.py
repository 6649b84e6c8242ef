"""Mixup: every image and its targets mixed with those of another.

Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018).
"""

import math

import jax
from jaxtyping import Array, Float


def mixup(
    key: Array,
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    *,
    alpha: float = 0.2,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """lambda x[i] + (1 - lambda) x[pi(i)] of images and of targets alike.

    lambda ~ Beta(alpha, alpha), one for the batch, and pi a random permutation.

    Raises ValueError on an alpha that is not positive and finite.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    key_share, key_partner = jax.random.split(key)
    share = jax.random.beta(key_share, alpha, alpha).astype(images.dtype)
    partner = jax.random.permutation(key_partner, len(images))

    def mixed(x):
        return share * x + (1 - share) * x[partner]

    return mixed(images), mixed(targets)
