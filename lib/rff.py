"""Random Fourier features, and the mean embeddings and MMDs made of them.

A translation-invariant kernel is the Fourier transform of a probability measure on frequencies
(Bochner), so that k(x, y) = E cos(omega . (x - y) / sigma) (Rahimi and Recht, Random features for
large-scale kernel machines, NIPS 2007). Frequencies are drawn for sigma = 1 and divided by the
bandwidth only where features are computed: several bandwidths share one draw. They depend on the
key, their number D and the dimension d only, and are drawn in float32 whatever the data's dtype.

The features are the pairs cos, sin (2 D numbers): z(x) . z(y) is unbiased for k(x, y),
z(x) . z(x) = 1 exactly, and the variance is [1 + k(2 delta) - 2 k(delta)^2] / (2 D), for the
Gaussian kernel (1 - k^2)^2 / (2 D); that is less than cos(omega . x + b) has with 2 D random phases
b (Sutherland and Schneider, On the error of random Fourier features, UAI 2015). `phases` chooses
that form all the same: it is the one of Rahimi and Recht's Algorithm 1 and much published code.

Cosines of large arguments lose digits, and unlike the kernel the features move with the origin:
center data that lie far from 0, every sample by the same vector.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, ScalarLike

from lib.numerics import (
    as_sample,
    at_least_float32,
    cos_sin,
    map_leading,
    normalized_weights,
    orthonormal_rows,
    pairwise_sum,
    plain_number,
    product,
    to_blocks,
)

# Frequencies


def gaussian_frequencies(
    key: Key[Array, ""], num_features: int, dimension: int, *, orthogonal: bool = False
) -> Float[Array, "num_features dimension"]:
    """Frequencies of exp(-|x - y|^2 / 2): rows N(0, I), [D, d] float32.

    Independent rows, or with `orthogonal` rows that are orthogonal in groups of d, their directions
    uniform and their lengths independent, each row N(0, I) still (Yu et al., Orthogonal random
    features, NIPS 2016). This lowers the variance, most for distances within a few bandwidths.
    """
    if num_features < 1 or dimension < 1:
        raise ValueError(f"num_features and dimension must be >= 1: {num_features}, {dimension}")
    if not orthogonal:
        return jax.random.normal(key, (num_features, dimension), jnp.float32)
    direction_key, length_key = jax.random.split(key)
    group = min(num_features, dimension)
    groups = -(-num_features // group)
    normal = jax.random.normal(direction_key, (groups, dimension, group), jnp.float32)
    lengths = jax.random.normal(length_key, (num_features, dimension), jnp.float32)
    return orthonormal_rows(normal)[:num_features] * jnp.linalg.norm(lengths, axis=1, keepdims=True)


def uniform_phases(key: Key[Array, ""], num_features: int) -> Float[Array, " num_features"]:
    """Phases uniform on [0, 2 pi), [D] float32."""
    return jax.random.uniform(key, (num_features,), jnp.float32, maxval=2 * math.pi)


# Features


def random_fourier_features(
    x: Float[Array, "n d"],
    frequencies: Float[Array, "num_features d"],
    bandwidth: ScalarLike,
    *,
    phases: Float[Array, " num_features"] | None = None,
) -> Float[Array, "n features"]:
    """z(x) with E z(x) . z(y) = k(x, y), sigma = `bandwidth` in the units of the data.

    [cos(W x / sigma), sin(W x / sigma)] / sqrt(D), [n, 2 D]: the D cosines, then the D sines. With
    `phases` b, sqrt(2 / D) cos(W x / sigma + b), [n, D], where z(x) . z(x) is 1 on average only.
    """
    return features_of_projections(frequency_projections(x, frequencies), bandwidth, phases=phases)


def frequency_projections(
    x: Float[Array, "n d"], frequencies: Float[Array, "num_features d"]
) -> Float[Array, "n num_features"]:
    """W x for every row: what the features of all bandwidths have in common."""
    x = at_least_float32(x)
    return product(x, frequencies.astype(x.dtype).T)


def features_of_projections(
    projections: Float[Array, "n num_features"],
    bandwidth: ScalarLike,
    *,
    phases: Float[Array, " num_features"] | None = None,
) -> Float[Array, "n features"]:
    """`random_fourier_features` from the products W x of `frequency_projections`."""
    angles, num_features = projections / plain_number(bandwidth), projections.shape[1]
    if phases is not None:
        angles = angles + phases.astype(angles.dtype)[None, :]
        return math.sqrt(2 / num_features) * cos_sin(angles)[0]
    return jnp.concatenate(cos_sin(angles), axis=1) / math.sqrt(num_features)


def mean_embedding(
    x: Float[Array, "n d"],
    frequencies: Float[Array, "num_features d"],
    bandwidth: ScalarLike,
    *,
    weights: Float[Array, " n"] | None = None,
    phases: Float[Array, " num_features"] | None = None,
    block_size: int = 1024,
) -> Float[Array, " features"]:
    """mu = sum_i w_i z(x_i), [2 D] or with `phases` [D]; w is normalized first, 1/n by default.

    The embedding of a union is the average of the embeddings, weighted by the sizes (or by the sums
    of the weights), so data in several chunks need one running sum. Beside the input it holds
    O((block_size + n / block_size) D). Raises ValueError as `lib.numerics.as_sample` does.
    """
    x, weights = as_sample("x", x, weights)
    weights = normalized_weights(x, weights)

    @jax.checkpoint
    def block_sum(block):
        points, point_weights = block
        features = random_fourier_features(points, frequencies, bandwidth, phases=phases)
        return product(point_weights, features)

    return pairwise_sum(map_leading(block_sum, to_blocks(x, weights, block_size)))


# Maximum mean discrepancy


def mmd_squared_rff(
    x_embedding: Float[Array, " features"], y_embedding: Float[Array, " features"]
) -> Float[Array, ""]:
    """|mu_x - mu_y|^2: the biased MMD^2 of the approximate kernel z . z, from mean embeddings.

    Its mean over the frequencies is `lib.mmd.mmd_squared` of the same samples (Sutherland and
    Schneider 2015, section 3.3). Never negative.
    """
    return jnp.sum(jnp.square(x_embedding - y_embedding))
