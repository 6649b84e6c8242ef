"""Gaussian sources without what the data lack: some frequencies, or some directions.

Both are of Lee et al., Is There a Better Source Distribution than Gaussian? (arXiv 2512.18184).
Conventions as in `xp_gmm_source.sources`.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from lib.numerics import to_blocks, uniform_weights
from xp_gmm_source.sources import (
    Gaussian,
    Images,
    Points,
    check_images,
    check_points,
    chunks,
    gaussian,
)

# Bounds on |mean| and variance of coefficients of pixels in 0..255.
PUBLISHED_WEAK, PUBLISHED_STRONG = (0.1, 2.0), (0.1, 4.0)
PUBLISHED_AXIS_THRESHOLD = 0.01
PUBLISHED_THRESHOLD = 0.048  # at d = 3072
MAX_TRIES = 1000
# R, G, B to luminance and the two chrominances of ITU-R 601, scaled as in JPEG's Y, Cr, Cb.
_LUMINANCE = np.array([0.299, 0.587, 0.114])
YCRCB = np.stack(
    [_LUMINANCE, 0.713 * (np.eye(3)[0] - _LUMINANCE), 0.564 * (np.eye(3)[2] - _LUMINANCE)]
)

# Less than the highest precision would leave a GPU's rounding in masked frequencies.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Frequencies


class FrequencySource(NamedTuple):
    """White noise without some coefficients of its cosine transform, then of variance 1 per pixel.

    The coefficients are of images padded to [P, Q], a whole number of blocks. `rows` [P, H] and
    `columns` [Q, W] are the orthonormal DCT-II of every block, cut to the images; `color` [c, c]
    maps channels to luminance and chrominances, `inverse_color` back; `kept` [P, Q, c] is 1 or 0.
    """

    rows: Float[Array, "P H"]
    columns: Float[Array, "Q W"]
    color: Float[Array, "c c"]
    inverse_color: Float[Array, "c c"]
    kept: Float[Array, "P Q c"]
    std: Float[Array, "H W c"]

    def coefficients(self, key: Key[Array, ""], num: int) -> Float[Array, "num P Q c"]:
        """Those of the noise in luminance and chrominances, masked ones 0."""
        # An orthonormal transform of white noise is white noise: it is drawn transformed.
        noise = jax.random.normal(key, (num, *self.kept.shape), self.kept.dtype)
        return _einsum("ef,npqf->npqe", self.color, noise) * self.kept[None]

    def sample(self, key: Key[Array, ""], num: int) -> Points:
        shaped = _einsum("ce,npqe->npqc", self.inverse_color, self.coefficients(key, num))
        lines = _einsum("ph,npqc->nhqc", self.rows, shaped)
        images = _einsum("qw,nhqc->nhwc", self.columns, lines) / self.std[None]
        return images.reshape(num, -1)

    def couple(self, key: Key[Array, ""], x1: Points) -> Points:
        check_points(x1, self.std.size)
        return self.sample(key, len(x1))


def cosine_basis(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal DCT-II, a row per coefficient: c_k cos(pi k (2 i + 1) / (2 size))."""
    k, i = np.arange(size)[:, None], np.arange(size)[None, :]
    basis = np.sqrt(2 / size) * np.cos(np.pi * k * (2 * i + 1) / (2 * size))
    basis[0] /= np.sqrt(2)
    return basis


class FrequencyStatistics(NamedTuple):
    """Mean and variance [b, b', c] of the DCT coefficients at each place of a block, over all
    blocks of all images, padded by repeating their last row and column."""

    mean: Float[np.ndarray, "b b2 c"]
    variance: Float[np.ndarray, "b b2 c"]


def frequency_statistics(images: Images, *, block: int | None = 8) -> FrequencyStatistics:
    """Of images of 1 channel as they are, of 3 as luminance and chrominances (Y, Cr, Cb); in the
    images' units, float64. `block` as in `frequency_source`."""
    height, width, channels = check_images(images)
    block_height, block_width = _block(block, height, width)
    color = _color(channels)
    down, across = cosine_basis(block_height), cosine_basis(block_width)
    padding = (0, 0), (0, -height % block_height), (0, -width % block_width), (0, 0)
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for chunk in chunks(images):
        padded = np.pad(chunk, padding, mode="edge")
        n, padded_height, padded_width, _ = padded.shape
        num_blocks = padded_height // block_height, padded_width // block_width
        blocks = padded.reshape(
            n, num_blocks[0], block_height, num_blocks[1], block_width, channels
        )
        # [p, q, e, n, block row, block column]
        transformed = np.einsum(
            "pi,qj,ec,nrisjc->pqenrs",
            down,
            across,
            color,
            blocks,
            optimize=True,
        )
        count += n * math.prod(num_blocks)
        total = total + transformed.sum(axis=(3, 4, 5))
        squares = squares + np.square(transformed).sum(axis=(3, 4, 5))
    mean = total / count
    return FrequencyStatistics(mean, np.maximum(squares / count - np.square(mean), 0))


def frequency_source(
    images: Images,
    *,
    masked_share: float | None = None,
    thresholds: tuple[float, float] | None = None,
    block: int | None = 8,
) -> FrequencySource:
    """White noise without the frequencies that the images hardly have.

    Args:
      masked_share: of the coefficients, in [0, 1): those of least mean square over the images
        (mean^2 + variance, so that both are low), such as .3 (weak) or .6 (strong).
      thresholds: the published rule instead, (mean, variance): masked is what has |mean| and
        variance below, for pixels in 0..255. `PUBLISHED_WEAK` and `PUBLISHED_STRONG` are meant for
        CIFAR-10. The mean of a block, whose level there is no small number, is never masked so.
      block: side of the blocks, 8 as in JPEG; None takes each image as one block. Images are
        padded to whole blocks; the noise that lies in the padding is cut off.

    The std of each pixel is that of the masked noise in closed form. Raises ValueError for bad
    images, images that are all the same number, and a rule that leaves a pixel without noise.
    """
    height, width, channels = check_images(images)
    if (masked_share is None) == (thresholds is None):
        raise ValueError("give either masked_share or thresholds")
    mean, variance = frequency_statistics(images, block=block)
    if variance.max() <= 1e-12 * np.square(mean).max():
        raise ValueError("the images are constant and all the same: they have no frequencies")
    if thresholds is None:
        assert masked_share is not None  # one of the two
        if not 0 <= masked_share < 1:
            raise ValueError(f"masked_share must be in [0, 1), got {masked_share}")
        energy = (np.square(mean) + variance).ravel()
        masked = np.zeros(energy.size, bool)
        masked[np.argsort(energy, kind="stable")[: round(masked_share * energy.size)]] = True
        masked = masked.reshape(mean.shape)
    else:
        level = 255 / 2  # the images' 1
        masked = (np.abs(level * mean) < thresholds[0]) & (level**2 * variance < thresholds[1])
        masked[0, 0] = False
    return _masked_noise(~masked, height, width, channels)


def _masked_noise(kept: np.ndarray, height: int, width: int, channels: int) -> FrequencySource:
    """The source that keeps these coefficients [b, b', c] of every block."""
    block_height, block_width, _ = kept.shape
    repeats = -(-height // block_height), -(-width // block_width)
    rows = np.kron(np.eye(repeats[0]), cosine_basis(block_height))[:, :height]
    columns = np.kron(np.eye(repeats[1]), cosine_basis(block_width))[:, :width]
    kept = np.tile(kept.astype(float), (*repeats, 1))
    color = _color(channels)
    inverse = np.linalg.inv(color)
    # Channel c of a coefficient is sum_f (inverse diag(kept) color)_cf z_f, z white.
    mixing = np.einsum("ce,pqe,ef->pqcf", inverse, kept, color)
    spectrum = np.square(mixing).sum(axis=3)
    variance = np.einsum("ph,qw,pqc->hwc", np.square(rows), np.square(columns), spectrum)
    if variance.min() < 1e-12:
        place = np.unravel_index(np.argmin(variance), variance.shape)
        raise ValueError(f"every frequency of pixel {tuple(map(int, place))} is masked: mask fewer")
    arrays = rows, columns, color, inverse, kept, np.sqrt(variance)
    return FrequencySource(*(jnp.asarray(array, jnp.float32) for array in arrays))


def _color(channels: int) -> np.ndarray:
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    return np.eye(1) if channels == 1 else YCRCB


def _block(block: int | None, height: int, width: int) -> tuple[int, int]:
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1 or None, got {block}")
    return (height, width) if block is None else (block, block)


# Directions


class PrunedSource(NamedTuple):
    """Draws of a Gaussian whose cosine with none of `axes` [a, d] exceeds `threshold`.

    For sampling; training stays with the Gaussian, from which `couple` draws. A draw still refused
    after `max_tries` rounds is a row of NaN, never one that breaks the rule: see `acceptance`.
    """

    gaussian: Gaussian
    axes: Float[Array, "a d"]
    threshold: Float[Array, ""]

    def accepts(self, x0: Points) -> Bool[Array, " B"]:
        """Whether each draw keeps to the rule."""
        cosines = jnp.matmul(x0, self.axes.T, precision=lax.Precision.HIGHEST)
        norms = jnp.linalg.norm(x0, axis=1)
        return jnp.max(cosines, axis=1, initial=-jnp.inf) <= self.threshold * norms

    def sample(self, key: Key[Array, ""], num: int, *, max_tries: int = MAX_TRIES) -> Points:
        """Each round draws `num` points and puts the accepted ones where there is room: about
        1 / acceptance rounds. Memory O(num (d + a))."""

        def unfinished(state):
            tries, filled, _ = state
            return (tries < max_tries) & (filled < num)

        def fill(state):
            tries, filled, points = state
            drawn = self.gaussian.sample(jax.random.fold_in(key, tries), num)
            accepted = self.accepts(drawn)
            # What is refused, or finds no room, goes to row `num`, which is dropped.
            places = jnp.where(accepted, filled + jnp.cumsum(accepted) - 1, num)
            points = points.at[places].set(drawn, mode="drop")
            return tries + 1, jnp.minimum(filled + jnp.sum(accepted), num), points

        empty = jnp.full((num, self.axes.shape[1]), jnp.nan, self.gaussian.scale.dtype)
        return lax.while_loop(unfinished, fill, (0, 0, empty))[2]

    def couple(self, key: Key[Array, ""], x1: Points) -> Points:
        return self.gaussian.couple(key, x1)


def acceptance(key: Key[Array, ""], source: PrunedSource, num: int) -> Float[Array, ""]:
    """The share of `num` draws of the Gaussian that the rule accepts: `sample` takes the inverse of
    it in rounds, and a share near 0 is a threshold too low for these axes."""
    return jnp.mean(source.accepts(source.gaussian.sample(key, num)))


def cosine_quantile(threshold: float, dimension: int) -> float:
    """P(cos <= threshold) of Gaussian noise with one fixed axis: (1 + cos) / 2 has the law
    Beta((d - 1) / 2, (d - 1) / 2). The published .048 at d = 3072 is the .9961 quantile."""
    from scipy.special import betainc

    half = (dimension - 1) / 2
    return float(betainc(half, half, (1 + threshold) / 2))


def cosine_threshold(quantile: float, dimension: int) -> float:
    """The inverse of `cosine_quantile`: a threshold for other dimensions than the published one,
    as cosines of noise shrink as 1 / sqrt(d)."""
    from scipy.special import betaincinv

    half = (dimension - 1) / 2
    return float(2 * betaincinv(half, half, quantile) - 1)


def pruned(
    images: Images,
    *,
    axis_threshold: float = PUBLISHED_AXIS_THRESHOLD,
    threshold: float,
    scale: float = 1.0,
) -> PrunedSource:
    """scale N(0, I) without draws towards directions near which there are no data.

    Candidate axes are + and - the principal components of the images divided by their norms; an
    axis is data-sparse where no image has a larger cosine with it than `axis_threshold`.
    Components in which the data do not vary are arbitrary, and no candidates.

    Args:
      threshold: largest cosine of a draw with a data-sparse axis. Published: .048 at d = 3072;
        elsewhere `cosine_threshold(cosine_quantile(.048, 3072), d)` refuses as much for each axis.
      scale: such as that of `norm_aligned`; the rule does not depend on it.

    How many axes are data-sparse depends on the data, and each takes its share of the draws: look
    at `acceptance`. Images that were compressed as JPEG lack high frequencies, so that thousands of
    axes are sparse and nothing passes; then lower `axis_threshold` or raise `threshold`.

    Components in float64 on the host, cosines in float32, blocks of images at a time: O(d^2)
    memory. Raises ValueError for bad images, one of norm 0, and images that are all the same.
    """
    dimension = math.prod(check_images(images))
    for name, value in (("axis_threshold", axis_threshold), ("threshold", threshold)):
        if not -1 <= value <= 1:
            raise ValueError(f"{name} is a cosine, got {value}")
    components = _principal_components(images, dimension)
    low, high = _extreme_cosines(images, components)
    axes = np.concatenate([components[high <= axis_threshold], -components[-low <= axis_threshold]])
    return PrunedSource(
        gaussian(dimension, scale=scale),
        jnp.asarray(axes, jnp.float32),
        jnp.asarray(threshold, jnp.float32),
    )


def _directions(images: Images):
    """Images divided by their norms [n, d], in chunks."""
    begin = 0
    for chunk in chunks(images):
        rows = chunk.reshape(len(chunk), -1)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            raise ValueError(f"image {begin + int(np.argmin(norms))} is 0: it has no direction")
        begin += len(chunk)
        yield rows / norms


def _principal_components(images: Images, dimension: int) -> Float[np.ndarray, "p d"]:
    mean = sum(rows.sum(axis=0) for rows in _directions(images)) / len(images)
    covariance = np.zeros((dimension, dimension))
    for rows in _directions(images):
        centered = rows - mean
        covariance += centered.T @ centered / len(images)
    variances, vectors = np.linalg.eigh(covariance)
    # A variance is off by rounding of the data's squared norms, which are 1.
    varying = variances > dimension * np.finfo(np.float64).eps
    if not varying.any():
        raise ValueError("the images all have one direction: there are no principal components")
    return vectors[:, varying].T


def _extreme_cosines(
    images: Images, components: Float[np.ndarray, "p d"], *, block_size: int = 512
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """The smallest and the largest cosine of any image with each component [p]."""
    axes = jnp.asarray(components, jnp.float32)

    @jax.jit
    def extremes(rows, axes):
        blocks, _ = to_blocks(rows, uniform_weights(rows), block_size)

        def one(block):
            cosines = jnp.matmul(block, axes.T, precision=lax.Precision.HIGHEST)
            return jnp.min(cosines, axis=0), jnp.max(cosines, axis=0)

        low, high = lax.map(one, blocks)
        return jnp.min(low, axis=0), jnp.max(high, axis=0)

    each = [extremes(jnp.asarray(rows, jnp.float32), axes) for rows in _directions(images)]
    lows, highs = (np.stack(parts) for parts in zip(*each))
    return lows.min(axis=0), highs.max(axis=0)
