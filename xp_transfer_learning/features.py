"""Features of a network that was trained on the source, and what they say of the target.

They tell which classes correspond (`class_costs` of the features instead of the images), and two
baselines need nothing else: logistic regression on the features of the k images, and on features
drawn around these (Distribution Calibration: Yang, Liu and Xu, "Free Lunch for Few-Shot Learning",
ICLR 2021).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from lib.networks import LeNet5

Parameters = Any
NEAREST, SPREAD = 2, 0.21  # The published settings.


def features(
    parameters: Parameters, images: Float[np.ndarray, "n height width channels"]
) -> Float[np.ndarray, "n 84"]:
    """What LeNet-5's last layer sees."""
    return np.asarray(_features(parameters, jnp.asarray(images)))


def of_classes(
    parameters: Parameters, x: Float[np.ndarray, "C n d"], image_shape: tuple[int, int, int]
) -> Float[np.ndarray, "C n 84"]:
    """`features` of images by class."""
    images = x.reshape(-1, *image_shape).astype(np.float32)
    return features(parameters, images).reshape(*x.shape[:2], -1)


@jax.jit
def _features(parameters, images):
    def of_one(image):
        return LeNet5(num_classes=None).apply(parameters, image[None])[0]

    return jax.lax.map(of_one, images, batch_size=min(1000, len(images)))


def match_p_value(costs: Float[np.ndarray, "C D"], num_shuffles: int = 999) -> float:
    """How often costs between classes that do not correspond have so cheap a matching.

    The statistic is the least sum over a one-to-one matching, after the means of rows and of
    columns are taken out (a class may be near to all). The null shuffles what is left, scaled to
    the variance of before. Conservative: of unrelated classes it is below .2 about one time in
    eight. Ties count, and the costs themselves.
    """

    def centered(costs):
        costs = costs - costs.mean(axis=1, keepdims=True)
        return costs - costs.mean(axis=0, keepdims=True)

    def least(costs):
        return costs[linear_sum_assignment(costs)].sum()

    num_rows, num_columns = costs.shape
    if min(costs.shape) == 1:
        return 1.0
    rng, residuals = np.random.default_rng(0), centered(costs)
    threshold = least(residuals) + 1e-9 * np.abs(costs).max()
    kept = (num_rows - 1) * (num_columns - 1) / (costs.size - 1)  # of the variance, in centering
    entries = residuals.ravel() / np.sqrt(kept)
    null = (centered(rng.permutation(entries).reshape(costs.shape)) for _ in range(num_shuffles))
    return (1 + sum(least(one) <= threshold for one in null)) / (1 + num_shuffles)


def calibrated(
    x: Float[np.ndarray, " p"],
    means: Float[np.ndarray, "C p"],
    covariances: Float[np.ndarray, "C p p"],
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, "p p"]]:
    """Mean and covariance of the normal that stands for the class of one target feature vector x:
    the mean of x and of its `NEAREST` source classes' means, and these classes' mean covariance
    plus `SPREAD` in every entry."""
    near = np.argsort(((means - x) ** 2).sum(axis=1), kind="stable")[:NEAREST]
    mean = (means[near].sum(axis=0) + x) / (len(near) + 1)
    return mean, covariances[near].mean(axis=0) + SPREAD


def calibrated_sample(
    seed: int,
    source: Float[np.ndarray, "C n p"],
    target: Float[np.ndarray, "D k p"],
    num_per_class: int = 750,
) -> tuple[Float[np.ndarray, "m p"], Int[np.ndarray, " m"]]:
    """Features, the target's first, and their labels: about `num_per_class` draws per class from
    the normals of its k vectors. All are square roots of features, to be less skewed."""
    source, target = np.sqrt(source), np.sqrt(target)
    means = source.mean(axis=1)
    covariances = np.stack([np.cov(rows, rowvar=False) for rows in source])
    rng, (num_classes, k, p) = np.random.default_rng(seed), target.shape
    drawn = [
        rng.multivariate_normal(*calibrated(x, means, covariances), num_per_class // k)
        for x in target.reshape(-1, p)
    ]
    labels = np.repeat(np.arange(num_classes), k)
    return (
        np.concatenate([target.reshape(-1, p), *drawn]),
        np.concatenate([labels, np.repeat(labels, num_per_class // k)]),
    )


def logistic_accuracy(x, labels, test, test_labels) -> float:
    """Of scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression

    return float(LogisticRegression(max_iter=1000).fit(x, labels).score(test, test_labels))
