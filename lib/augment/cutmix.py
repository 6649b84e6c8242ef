"""CutMix: a box of each image is that of another image, and the labels are mixed by area.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features"
(2019): one box and one permutation for a batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cutmix(
    key: Array,
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    *,
    probability: float = 0.5,
    alpha: float = 1.0,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """With this probability a whole batch is mixed, or else comes back as it is.

    The box has 2 floor(height s / 2) rows and 2 floor(width s / 2) columns, s = sqrt(1 - lambda),
    lambda ~ Beta(alpha, alpha), around a pixel drawn uniformly, and is clipped at the edges. Inside
    it image i is image pi(i), pi a random permutation. Its targets (one-hot, or any weights of
    classes) become (1 - area) targets[i] + area targets[pi(i)], area the box's exact share of the
    pixels.

    Raises ValueError on a probability outside [0, 1], an alpha that is not positive and finite, and
    on images and targets that differ in number.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability must lie in [0, 1], got {probability}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images and {len(targets)} rows of targets")
    key_mixed, key_lambda, key_row, key_column, key_partner = jax.random.split(key, 5)
    side = jnp.sqrt(1 - jax.random.beta(key_lambda, alpha, alpha))

    def within(key, size):
        center, half = jax.random.randint(key, (), 0, size), jnp.floor(size * side) // 2
        indices = jnp.arange(size)
        return (indices >= center - half) & (indices < center + half)

    _, height, width, _ = images.shape
    rows, columns = within(key_row, height), within(key_column, width)
    # Without a box, rather than by a branch: both sides of one would run under vmap.
    rows &= jax.random.uniform(key_mixed) < probability
    area = (jnp.sum(rows) * jnp.sum(columns) / (height * width)).astype(targets.dtype)
    partner = jax.random.permutation(key_partner, len(images))
    box = rows[None, :, None, None] & columns[None, None, :, None]
    mixed = jnp.where(box, images[partner], images)
    return mixed, (1 - area) * targets + area * targets[partner]
