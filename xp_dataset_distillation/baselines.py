"""What a condensed set is measured against: random images, herded images, centres of k-means.

All are stored images [C, n, H, W, channels] in [0, 1], of every class by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from xp_dataset_distillation.real_data import RealData, check_images_per_class, draw_batch

Features = Callable[[Float[Array, "m height width channels"]], Float[Array, "m f"]]


def _pixels(images: Array | np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.asarray(images).astype(np.float32) / np.float32(255)


def _classes(real: RealData) -> list[np.ndarray]:
    """The images of every class, uint8."""
    return np.split(np.asarray(real.images), real.starts[1:])


def random_images(
    key: PRNGKeyArray, real: RealData, num: int
) -> Float32[np.ndarray, "classes num height width channels"]:
    """`num` images of every class, drawn without replacement.

    Raises ValueError naming a class that has fewer.
    """
    return _pixels(draw_batch(key, real, num))


def herding(features: Float[np.ndarray, "n f"], num: int) -> Int[np.ndarray, " num"]:
    """Greedy matching of the mean (Welling, Herding dynamical weights to learn, ICML 2009, as used
    by Rebuffi et al., iCaRL, CVPR 2017): one after the other the index i, not taken before, with
    the least |mean of all features - mean of those taken and feature i|; the first of equals.

    In float64, O(num n f). Raises ValueError for more than n, or features that are not finite.
    """
    features = np.asarray(features, np.float64)
    if not 1 <= num <= len(features):
        raise ValueError(f"cannot take {num} of {len(features)} rows of features")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    # With the mean at 0, |sum + z|^2 is |sum|^2 + 2 <sum, z> + |z|^2.
    centred = features - features.mean(axis=0)
    squares = np.einsum("nf,nf->n", centred, centred)
    taken: list[int] = []
    total = np.zeros(features.shape[1])
    for _ in range(num):
        costs = squares + 2 * centred @ total
        costs[taken] = np.inf
        taken.append(int(np.argmin(costs)))
        total += centred[taken[-1]]
    return np.array(taken)


def herded_images(
    real: RealData, num: int, features: Features, *, block_size: int = 1000
) -> Float32[np.ndarray, "classes num height width channels"]:
    """`num` images of every class, chosen by `herding` in the features that `features` gives.

    `features` takes images in [0, 1] and normalises them itself: that of a network trained on the
    whole training set, say. It is called with blocks of `block_size` images, the last one of a
    class filled up, so that it compiles once. Raises as `random_images` and `herding`.
    """
    check_images_per_class(real, num)
    block_size = min(block_size, max(real.counts))
    chosen = []
    for images in _classes(real):
        rows = []
        for start in range(0, len(images), block_size):
            block = images[start : start + block_size]
            filled = np.resize(block, (block_size, *block.shape[1:]))
            rows.append(np.asarray(features(jnp.asarray(_pixels(filled))))[: len(block)])
        chosen.append(images[herding(np.concatenate(rows), num)])
    return _pixels(np.stack(chosen))


def kmeans_centres(
    key: PRNGKeyArray, real: RealData, num: int
) -> Float32[np.ndarray, "classes num height width channels"]:
    """The centres of `num` clusters of every class's pixels (scikit-learn's k-means, one start by
    k-means++), the largest cluster first: blurred images that no class holds.

    Raises ValueError naming a class that has fewer images.
    """
    from sklearn.cluster import KMeans

    check_images_per_class(real, num)
    centres = []
    for label, images in enumerate(_classes(real)):
        seed = int(jax.random.bits(jax.random.fold_in(key, label), dtype=jnp.uint32))
        rows = _pixels(images).reshape(len(images), -1)
        found = KMeans(num, n_init=1, random_state=seed).fit(rows)
        sizes = np.bincount(found.labels_, minlength=num)
        order = np.argsort(-sizes, kind="stable")
        centres.append(found.cluster_centers_[order].reshape(num, *images.shape[1:]))
    return np.clip(np.stack(centres), 0, 1).astype(np.float32)
