"""How far samples of images are from real ones, in pixels and in the features of a classifier.

The classifier is trained here, on the training split of the data set at hand, so its Frechet
distances compare only with each other: with nothing that was published for another network.

Points are rows [n, d] of images [n, H, W, channels] in [-1, 1], float32 on the device; moments are
float64 on the host.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lib import mmd
from lib.kernels import gaussian, median_bandwidth
from lib.networks import MLP, LeNet5, classification, optimizers
from lib.numerics import as_sample, map_blocks
from lib.sliced_wasserstein import random_directions, sliced_wasserstein
from xp_gmm_source.sources import Images, check_images

AnyArray = Array | np.ndarray
DIRECTION_BLOCK = 50  # projections sorted at a time; it divides the default number of them


# Frechet distance


class Moments(NamedTuple):
    """Mean [d] and covariance [d, d] (divided by n - 1) of a sample, float64."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Float[AnyArray, "n d"]) -> Moments:
    """Those of a sample. Raises ValueError unless it has two points or more, all finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise ValueError(f"features are [n, d] with n >= 2, got shape {features.shape}")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(f"features are not finite in row {int(np.argmin(finite))}")
    mean = features.mean(axis=0)
    centered = features - mean
    return Moments(mean, centered.T @ centered / (len(features) - 1))


def frechet_distance_of_moments(first: Moments, second: Moments) -> float:
    """W_2^2 between the Gaussians of these moments, squared (Dowson and Landau, 1982):

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)

    by two symmetric eigendecompositions in float64. Eigenvalues that rounding has made negative are
    set to 0, and so is the distance itself. Rounding is about 1e-15 tr S times the condition number
    of the covariances, and no more than about 1e-8 tr S where they are singular. Raises ValueError
    on unequal dimensions.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"moments of {first.mean.shape} and of {second.mean.shape} features")
    values, vectors = np.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = root @ second.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(np.sum(np.square(first.mean - second.mean)) + traces - 2 * cross, 0))


def frechet_distance(
    features: Float[AnyArray, "n d"], reference_features: Float[AnyArray, "m d"]
) -> float:
    """`frechet_distance_of_moments` of two samples. Biased upwards, by about d / n for features of
    variance 1: compare only equal numbers of points."""
    return frechet_distance_of_moments(moments(features), moments(reference_features))


# Features


class FeatureNetwork(NamedTuple):
    """A trained classifier, the shape (H, W, channels) of its images, and its accuracy on the test
    split, or None where it was given none."""

    network: nn.Module
    parameters: Any
    image_shape: tuple[int, int, int]
    accuracy: float | None


def default_network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """LeNet-5, of 84 features; an MLP of 128 and 64 units, its features, for smaller images than
    that takes."""
    if min(image_shape[:2]) < LeNet5.SMALLEST:
        return MLP(num_classes, hidden=(128, 64))
    return LeNet5(num_classes)


def train_feature_network(
    key: Key[Array, ""],
    images: Images,
    labels: Int[AnyArray, " n"],
    *,
    test: tuple[Images, Int[AnyArray, " m"]] | None = None,
    network: nn.Module | None = None,
    num_epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> FeatureNetwork:
    """A classifier of the training split, by Adam on the cross-entropy; the last epoch's.

    Args:
      labels: 0, ..., classes - 1.
      test: images and labels for `FeatureNetwork.accuracy`, which chooses nothing.
      network: anything that ends in a flax Dense layer; by default `default_network`.
    """
    shape = check_images(images)
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"labels must be {len(images)} integers >= 0, got {labels.dtype} {labels.shape}"
        )
    if test is not None and (check_images(test[0]) != shape or len(test[0]) != len(test[1])):
        raise ValueError(
            f"{len(test[1])} test labels of images {test[0].shape}, trained on {shape}"
        )
    network = default_network(shape, int(labels.max()) + 1) if network is None else network
    parameters, losses = classification.train(
        key,
        network,
        jnp.asarray(images, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        optimizer=optimizers.adam(learning_rate),
        num_epochs=num_epochs,
        batch_size=batch_size,
    )
    if not np.isfinite(losses).all():
        raise ValueError(f"training diverged at a step size of {learning_rate}")
    trained = FeatureNetwork(network, parameters, shape, None)
    if test is None:
        return trained
    predicted = outputs(trained, test[0]).predictions
    return trained._replace(accuracy=float(np.mean(predicted == np.asarray(test[1]))))


class Outputs(NamedTuple):
    """What a network says of n images: the input of its last layer, and its largest logit."""

    features: Float[Array, "n features"]
    predictions: Int[Array, " n"]


def outputs(
    feature_network: FeatureNetwork,
    points: Float[AnyArray, "n *shape"],
    *,
    block_size: int = 512,
) -> Outputs:
    """Of points [n, d] or images [n, H, W, channels], `block_size` at a time."""
    network, parameters, shape, _ = feature_network
    return _outputs(network, shape, parameters, as_points(points, shape), block_size)


@partial(jax.jit, static_argnames=("network", "shape", "block_size"))
def _outputs(network, shape, parameters, points, block_size):
    def of_block(block):
        inputs = []

        def keep(function, args, kwargs, context):
            if isinstance(context.module, nn.Dense):
                inputs.append(args[0])
            return function(*args, **kwargs)

        with nn.intercept_methods(keep):
            logits = network.apply(parameters, block.reshape(-1, *shape))
        if not inputs:
            raise ValueError(f"{type(network).__name__} has no Dense layer, so no features")
        return inputs[-1], jnp.argmax(logits, axis=1)

    return Outputs(*map_blocks(of_block, points, block_size))


def as_points(
    points: Float[AnyArray, "n *shape"], shape: tuple[int, int, int]
) -> Float[Array, "n d"]:
    """Points or images as float32 rows on the device. Raises ValueError unless they are finite and
    of images of this shape."""
    points = jnp.asarray(points)
    if points.ndim < 2 or points.shape[1:] not in (tuple(shape), (math.prod(shape),)):
        raise ValueError(f"shape {points.shape} is no sample of images {tuple(shape)}")
    return as_sample("points", points.reshape(len(points), -1))[0].astype(jnp.float32)


# Evaluation


class Reference(NamedTuple):
    """Real images that samples are compared with, and all that does not depend on the samples."""

    feature_network: FeatureNetwork
    points: Float[Array, "m d"]
    features: Float[Array, "m features"]
    moments: Moments
    class_shares: Float[np.ndarray, " classes"]
    bandwidth: Float[Array, ""]  # the median distance of points
    feature_bandwidth: Float[Array, ""]
    directions: Float[Array, "L d"]


def reference(
    key: Key[Array, ""],
    images: Float[AnyArray, "m *shape"],
    feature_network: FeatureNetwork,
    *,
    num_directions: int = 500,
) -> Reference:
    """Of held-out images, once for all samples, so that these meet the same random directions."""
    points = as_points(images, feature_network.image_shape)
    of_points, of_features, of_directions = jax.random.split(key, 3)
    features, predictions = outputs(feature_network, points)
    return Reference(
        feature_network,
        points,
        features,
        moments(features),
        _class_shares(feature_network, predictions),
        median_bandwidth(of_points, points),
        median_bandwidth(of_features, features),
        random_directions(of_directions, num_directions, points.shape[1]),
    )


def evaluate(samples: Float[AnyArray, "n *shape"], reference: Reference) -> dict[str, float]:
    """Distances of samples, [n, d] or [n, H, W, channels], to the reference; 0 is best in all.

    - frechet: `frechet_distance` of the classifier's features.
    - mmd2_pixels, mmd2_features: MMD^2, unbiased, so it may be negative; Gaussian kernel at the
      median distance within the reference.
    - sliced_wasserstein: SW_2 of pixels, not squared, by the reference's directions.
    - class_distance: total variation, half of sum |p_c - q_c|, between the shares of predicted
      classes; a class that is missing shows here.
    - class_entropy_gap: the entropy in nats of the reference's shares less that of the samples';
      positive where samples crowd in few classes.

    All but mmd2 are biased upwards by the number of samples and of reference images: compare equal
    numbers, and with `floor`. Raises ValueError on NaN and on other shapes. Memory O(n d) and
    blocks.
    """
    network = reference.feature_network
    points = as_points(samples, network.image_shape)
    if len(points) < 2:
        raise ValueError(f"two samples are needed, got {len(points)}")
    features, predictions = outputs(network, points)
    shares = _class_shares(network, predictions)
    return {
        "frechet": frechet_distance_of_moments(moments(features), reference.moments),
        "mmd2_pixels": float(_mmd_squared(points, reference.points, reference.bandwidth)),
        "mmd2_features": float(
            _mmd_squared(features, reference.features, reference.feature_bandwidth)
        ),
        "sliced_wasserstein": float(
            _sliced_wasserstein(points, reference.points, reference.directions)
        ),
        "class_distance": float(np.abs(shares - reference.class_shares).sum() / 2),
        "class_entropy_gap": _entropy(reference.class_shares) - _entropy(shares),
    }


def floor(
    key: Key[Array, ""],
    images: Float[AnyArray, "n *shape"],
    feature_network: FeatureNetwork,
    *,
    num_directions: int = 500,
) -> dict[str, float]:
    """`evaluate` of one random half of real images against the other: what a perfect sampler gets.

    Biases depend on numbers: for n samples against n reference images, give 2 n.
    """
    points = as_points(images, feature_network.image_shape)
    split_key, reference_key = jax.random.split(key)
    order = jax.random.permutation(split_key, len(points))
    half = len(points) // 2
    first, second = points[order[:half]], points[order[half : 2 * half]]
    return evaluate(
        first, reference(reference_key, second, feature_network, num_directions=num_directions)
    )


@jax.jit
def _mmd_squared(x, y, bandwidth):
    return mmd.mmd_squared_unbiased(gaussian(bandwidth), x, y)


@jax.jit
def _sliced_wasserstein(x, y, directions):
    return sliced_wasserstein(x, y, directions, block_size=min(DIRECTION_BLOCK, len(directions)))


def _class_shares(feature_network: FeatureNetwork, predictions: Int[Array, " n"]) -> np.ndarray:
    count = feature_network.network.num_classes
    return np.bincount(np.asarray(predictions), minlength=count) / len(predictions)


def _entropy(shares: Float[np.ndarray, " classes"]) -> float:
    present = shares[shares > 0]
    return float(-np.sum(present * np.log(present)))
