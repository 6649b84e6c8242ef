"""Where EM starts: from k-means with k-means++ seeds."""

import gc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from lib.gmm._linalg import distances_from_nearest, expanded_distances, row_sums
from lib.gmm._mixture import Mixture, cast
from lib.gmm.covariances import Covariance
from lib.gmm.em import block_moments, check_num_components, maximize_in_place, prepare_jit
from lib.numerics import AnyArray, product
from lib.rows import Rows
from lib.rows.sums import sum_over_rows

Structure = Callable[[int, Float[AnyArray, " d"]], Covariance]
"""Makes covariances of a number of components and the variances of the data, as `full` does."""

SEED_POINTS = 10_000
"""Points among which k-means++ looks for its seeds."""
CLOSE = 2.0**-10
"""Of a squared norm: a squared distance that is smaller is not taken from norms."""
START_ROUNDING = 1e-12
"""Above float64's: a start is right to about 1e-6 of its variances, however far apart they lie."""


def kmeans_start(
    key: Key[Array, ""],
    data: Rows,
    num_components: int,
    structure: Structure,
    *,
    regularization: float = 1e-6,
    max_passes: int = 30,
) -> Mixture:
    """The M-step from the clusters of `kmeans`, one component a cluster; float64 on the host.

    `structure` is one of `full`, `tied`, `diagonal`, `spherical` and `low_rank(key, rank)` of
    `lib.gmm.covariances`. One pass for the scale of the features and one for the moments, both in
    float64. Raises ValueError as `kmeans`.
    """
    centers, dtype = kmeans(key, data, num_components, max_passes=max_passes), np.dtype(np.float64)
    with jax.enable_x64(True):
        weight, first, second = sum_over_rows(_block_spread, (), data, dtype=dtype)
        mean = first / weight
        variances = jnp.maximum(second / weight - mean**2, 0)
        scale = jnp.mean(variances)
        # Coordinates to take the moments in: any do, near the data's they keep most digits.
        variances = jnp.maximum(variances, jnp.where(scale > 0, 1e-3 * scale, 1))
        means = jnp.broadcast_to(mean, (num_components, len(mean)))
        weights = jnp.full(num_components, 1 / num_components)
        start = cast(Mixture(weights, means, structure(num_components, variances)), jnp.float64)
        for _ in range(2):
            prepared = prepare_jit(start, dtype)
            moments = sum_over_rows(_cluster_moments, (prepared, centers), data, dtype=dtype)
            del prepared
            gc.collect()  # jaxlib lets go of what it borrowed from numpy as garbage is collected
            start, ridge = maximize_in_place(
                start, moments, regularization=regularization, rounding=START_ROUNDING
            )
            # Clusters very far from the mean of all: once more, about their own means.
            if not np.isinf(ridge).any():
                break
        return jax.tree.map(np.asarray, jax.device_get(start))


def _block_spread(_, points, weights):
    return jnp.sum(weights), product(weights, points), product(weights, jnp.square(points))


def _cluster_moments(parameters, points, weights):
    prepared, centers = parameters
    return block_moments(prepared, points, weights, _nearest(points, centers)[1])


def kmeans(
    key: Key[Array, ""], data: Rows, num_components: int, *, max_passes: int = 30
) -> Float[np.ndarray, "K d"]:
    """Centers [K, d], float64, after Lloyd's passes from k-means++ seeds.

    Seeds come from at most `SEED_POINTS` rows drawn by weight without replacement; passes are over
    all rows and end when the mean squared distance falls by less than 1e-4 of itself. A center that
    loses its points stays where it is. Raises ValueError with more components than points, or than
    distinct points among those drawn.
    """
    check_num_components(data, num_components)
    drawing_key, seeding_key = jax.random.split(key)
    present = np.flatnonzero(data.weights)
    if len(present) > SEED_POINTS:
        draw = jax.random.choice(drawing_key, len(present), (SEED_POINTS,), replace=False)
        present = present[np.sort(np.asarray(draw))]
    with jax.enable_x64(True):
        points = jnp.asarray(data.take(present))
        weights = jnp.asarray(data.weights[present], data.dtype)
        centers = jax.jit(kmeans_plus_plus, static_argnums=2)(
            seeding_key, points, num_components, weights
        )
        distinct = len(np.unique(np.asarray(centers), axis=0))
        if distinct < num_components:
            raise ValueError(
                f"{num_components} components, but {distinct} distinct points among the "
                f"{len(present)} looked at"
            )
        centers, before = centers.astype(jnp.float64), np.inf
        for _ in range(max_passes):
            inertia, counts, sums = sum_over_rows(_block_clusters, centers, data)
            moved = sums / jnp.where(counts > 0, counts, 1)[:, None]
            centers = jnp.where(counts[:, None] > 0, moved, centers)
            if not before - inertia > 1e-4 * inertia:
                break
            before = inertia
        return np.asarray(centers)


def kmeans_plus_plus(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    num_components: int,
    weights: Float[Array, " n"],
) -> Float[Array, "K d"]:
    """K of the points, each drawn with probability w_i D_i^2, D_i the distance to those before.

    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007). O(n K d).
    With fewer than K distinct points some repeat; none of weight 0 is drawn.
    """

    def draw(distances, key):
        shares = weights * distances
        shares = jnp.where(jnp.any(shares > 0), shares, weights)
        index = jax.random.categorical(key, jnp.log(shares))
        squared = row_sums(jnp.square(points - points[index][None, :]))
        return jnp.minimum(distances, squared), points[index]

    keys = jax.random.split(key, num_components)
    index = jax.random.categorical(keys[0], jnp.log(weights))
    squared = row_sums(jnp.square(points - points[index][None, :]))
    _, others = lax.scan(draw, squared, keys[1:])
    return jnp.concatenate([points[index][None, :], others])


def _nearest(points, centers):
    """Squared distances to the nearest center [b], and which it is, one-hot [b, K]."""
    middle = jnp.mean(centers, axis=0, keepdims=True)
    centered, shifted = points - middle, centers - middle
    distances = expanded_distances(centered, shifted)
    # A distance far below the norms is not what they leave: it is taken from the nearest center.
    close = jnp.min(distances, axis=1) < CLOSE * row_sums(jnp.square(centered))

    def refined():
        nearest = jnp.argmin(distances, axis=1)
        exact = distances_from_nearest(points - centers[nearest], nearest, shifted)
        return jnp.where(close[:, None], exact, distances)

    distances = lax.cond(jnp.any(close), refined, lambda: distances)
    nearest = jnp.argmin(distances, axis=1)
    return jnp.min(distances, axis=1), jax.nn.one_hot(nearest, len(centers), dtype=points.dtype)


def _block_clusters(centers, points, weights):
    squared, nearest = _nearest(points, centers.astype(points.dtype))
    shares = nearest * weights[:, None]
    return product(weights, squared), jnp.sum(shares, axis=0), product(shares.T, points)
