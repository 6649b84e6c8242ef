"""What a condensed set is compared with: random images, herded images, centers of k-means.

All are stored images [C, n, H, W, channels] in [0, 1], of every class by itself.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from lib.networks import classification, convolution, network_by_name, optimizers
from lib.numerics import key_of_seed
from xp_dataset_distillation.config import BaselineConfig
from xp_dataset_distillation.real_data import (
    RealData,
    check_images_per_class,
    draw_batch,
    setting_of,
)

Features = Callable[[Float[Array, "m height width channels"]], Float[Array, "m f"]]


def _pixels(images: Array | np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.asarray(images).astype(np.float32) / np.float32(255)


def _classes(real: RealData) -> list[np.ndarray]:
    """The images of every class, uint8."""
    return np.split(np.asarray(real.images), real.starts[1:])


def images_of(
    config: BaselineConfig, real: RealData, *, seed: int
) -> Float32[np.ndarray, "classes num height width channels"]:
    """Of every kind except `whole`. The key is the seed's own, from which condensing derives its
    keys too; published numbers depend on it."""
    key, num = key_of_seed(seed), config.images_per_class
    match config.kind:
        case "random":
            return random_images(key, real, num)
        case "kmeans":
            return kmeans_centers(key, real, num)
        case "herding":
            return herded_images(real, num, trained_features(key, config, real))
    raise ValueError(f"no images per class of {config.kind!r}")


def random_images(
    key: PRNGKeyArray, real: RealData, num: int
) -> Float32[np.ndarray, "classes num height width channels"]:
    """`num` images of every class, drawn without replacement.

    Raises ValueError naming a class that has fewer.
    """
    return _pixels(draw_batch(key, real, num))


def herding(features: Float[np.ndarray, "n f"], num: int) -> Int[np.ndarray, " num"]:
    """Greedy matching of the mean (Welling, Herding dynamical weights to learn, ICML 2009, as used
    by Rebuffi et al., iCaRL, CVPR 2017): one after the other the index i, not chosen before, with
    the least |mean of all features - mean of the chosen and feature i|; the first of equals.

    In float64, O(num n f). Raises ValueError for more than n, or features that are not finite.
    """
    features = np.asarray(features, np.float64)
    if not 1 <= num <= len(features):
        raise ValueError(f"cannot choose {num} of {len(features)} rows of features")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    # With the mean at 0, |sum + z|^2 is |sum|^2 + 2 <sum, z> + |z|^2.
    centered = features - features.mean(axis=0)
    squares = np.einsum("nf,nf->n", centered, centered)
    chosen: list[int] = []
    total = np.zeros(features.shape[1])
    for _ in range(num):
        costs = squares + 2 * centered @ total
        costs[chosen] = np.inf
        chosen.append(int(np.argmin(costs)))
        total += centered[chosen[-1]]
    return np.array(chosen)


def herded_images(
    real: RealData, num: int, features: Features, *, block_size: int = 1000
) -> Float32[np.ndarray, "classes num height width channels"]:
    """`num` images of every class, chosen by `herding` in the features that `features` gives.

    `features` takes images in [0, 1] and normalizes them itself: that of a network trained on the
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


def kmeans_centers(
    key: PRNGKeyArray, real: RealData, num: int
) -> Float32[np.ndarray, "classes num height width channels"]:
    """The centers of `num` clusters of every class's pixels (scikit-learn's k-means, one start by
    k-means++), the largest cluster first: blurred images that no class holds.

    Raises ValueError naming a class that has fewer images.
    """
    from sklearn.cluster import KMeans

    check_images_per_class(real, num)
    centers = []
    for label, images in enumerate(_classes(real)):
        seed = int(jax.random.bits(jax.random.fold_in(key, label), dtype=jnp.uint32))
        rows = _pixels(images).reshape(len(images), -1)
        clusters = KMeans(num, n_init=1, random_state=seed).fit(rows)
        sizes = np.bincount(clusters.labels_, minlength=num)
        order = np.argsort(-sizes, kind="stable")
        centers.append(clusters.cluster_centers_[order].reshape(num, *images.shape[1:]))
    return np.clip(np.stack(centers), 0, 1).astype(np.float32)


def trained_features(key: PRNGKeyArray, config: BaselineConfig, real: RealData) -> Features:
    """images [n, H, W, c] in [0, 1] -> features [n, f] of a ConvNet trained on all images."""
    network = partial(
        network_by_name,
        "convnet",
        image_shape=real.image_shape,
        convolution=convolution.fastest(),
        width=config.feature_width,
        depth=config.feature_depth,
    )
    whole, headless = network(num_classes=real.num_classes), network(num_classes=None)
    normalized = setting_of(config, real).normalized
    parameters, _ = classification.train(
        key,
        whole,
        normalized(jnp.asarray(real.images, jnp.float32) / 255),
        jnp.asarray(real.labels),
        optimizer=optimizers.adam(1e-3),
        num_epochs=config.feature_epochs,
        batch_size=256,
    )
    return jax.jit(lambda images: headless.apply(parameters, normalized(images)))
