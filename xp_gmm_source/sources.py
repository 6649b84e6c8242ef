"""Sources of flow matching: where its paths start.

Data are images [n, H, W, channels] in [-1, 1], and a point is a row of d = H W channels numbers in
that order. A source is a NamedTuple of arrays, so it can be an argument of a jitted function:

    sample(key, num)   num draws [num, d]
    couple(key, x1)    a draw x0 [B, d] for each row of the data x1 [B, d]; only
                       `ModeCoupledSource` looks at x1, the others draw as many points

Here are Gaussians and mixtures; `xp_gmm_source.shaped_sources` has Gaussians without some of the
data's frequencies or directions. The Gaussian of the data's norm is "norm alignment" of Lee et al.,
Is There a Better Source Distribution than Gaussian? (arXiv 2512.18184).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from lib import gmm

AnyArray = Array | np.ndarray
Images = Float[AnyArray, "n height width channels"]
Points = Float[Array, "B d"]

SMALLEST_DEVIATION = 1e-4  # of a pixel, in root mean squares of all pixels' deviations
CHUNK = 4096  # images at a time


# Input validation


def check_images(images: Images) -> tuple[int, int, int]:
    """(H, W, channels) of images that are floating point, finite and at least one; else raises."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images are [n, height, width, channels], got shape {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are floating point in [-1, 1], got {images.dtype}")
    for begin in range(0, len(images), CHUNK):
        chunk = np.asarray(images[begin : begin + CHUNK]).reshape(-1, math.prod(images.shape[1:]))
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise ValueError(f"image {begin + int(np.argmin(finite))} is not finite")
    _, height, width, channels = images.shape
    return height, width, channels


def check_points(x1: Points, dimension: int) -> None:
    if x1.ndim != 2 or x1.shape[1] != dimension:
        raise ValueError(f"points are [B, {dimension}], got shape {x1.shape}")


def chunks(images: Images):
    """Images in float64 on the host, `CHUNK` at a time."""
    for begin in range(0, len(images), CHUNK):
        yield np.asarray(images[begin : begin + CHUNK], np.float64)


# Gaussians


class Gaussian(NamedTuple):
    """N(0, diag(scale^2)) with scale [d], the same number d times in `gaussian`."""

    scale: Float[Array, " d"]

    def sample(self, key: Key[Array, ""], num: int) -> Points:
        noise = jax.random.normal(key, (num, len(self.scale)), self.scale.dtype)
        return self.scale[None, :] * noise

    def couple(self, key: Key[Array, ""], x1: Points) -> Points:
        check_points(x1, len(self.scale))
        return self.sample(key, len(x1))


def gaussian(dimension: int, *, scale: float = 1.0) -> Gaussian:
    """scale N(0, I) in `dimension` dimensions. Raises ValueError unless both are positive."""
    if dimension < 1 or not 0 < scale < math.inf:
        raise ValueError(f"a Gaussian needs d >= 1 and 0 < scale < inf, got {dimension}, {scale}")
    return Gaussian(jnp.full(dimension, scale, jnp.float32))


def mean_norm(dimension: int) -> float:
    """E|z| of z ~ N(0, I_d): sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2)."""
    return math.sqrt(2) * math.exp(math.lgamma((dimension + 1) / 2) - math.lgamma(dimension / 2))


def norm_aligned(images: Images) -> Gaussian:
    """The Gaussian whose mean Euclidean norm is that of the images ("norm alignment").

    Raises ValueError for images that are no images, not finite or all 0.
    """
    dimension = math.prod(check_images(images))
    norms = [np.linalg.norm(chunk.reshape(-1, dimension), axis=1) for chunk in chunks(images)]
    return gaussian(dimension, scale=float(np.concatenate(norms).mean()) / mean_norm(dimension))


# Mixtures


class Projection(NamedTuple):
    """A mixture's coordinates: x = center + coordinates @ components, orthonormal rows [p, d]."""

    components: Float[AnyArray, "p d"]
    center: Float[AnyArray, " d"]


class GMMSource(NamedTuple):
    """x0 = (draw - mean) / std of a mixture [K, p]; p = d, or draws are mapped back to pixels."""

    mixture: gmm.Mixture
    mean: Float[Array, " d"]
    std: Float[Array, " d"]
    projection: Projection | None = None

    def sample(self, key: Key[Array, ""], num: int) -> Points:
        return self.standardize(gmm.sample(key, self.mixture, num)[0])

    def couple(self, key: Key[Array, ""], x1: Points) -> Points:
        check_points(x1, len(self.mean))
        return self.sample(key, len(x1))

    def coordinates(self, x1: Points) -> Float[Array, "B p"]:
        """Where points of the data are in the mixture's coordinates."""
        check_points(x1, len(self.mean))
        if self.projection is None:
            return x1
        centered = x1 - self.projection.center[None, :]
        return jnp.matmul(centered, self.projection.components.T, precision=lax.Precision.HIGHEST)

    def standardize(self, draws: Float[Array, "B p"]) -> Points:
        """Draws of the mixture as points of the source."""
        if self.projection is not None:
            components, center = self.projection
            draws = jnp.matmul(draws, components, precision=lax.Precision.HIGHEST) + center[None, :]
        return (draws - self.mean[None, :]) / self.std[None, :]


class ModeCoupledSource(NamedTuple):
    """As `GMMSource`, coupled: x0 is of the component responsible for x1 (elsewhere MM-FM).

    Component k is drawn with probability p(k | x1), x0 from N(mu_k, Sigma_k), then standardized.
    """

    source: GMMSource

    def sample(self, key: Key[Array, ""], num: int) -> Points:
        return self.source.sample(key, num)

    def couple(self, key: Key[Array, ""], x1: Points) -> Points:
        coordinates = self.source.coordinates(x1)
        return self.source.standardize(gmm.sample_coupled(key, self.source.mixture, coordinates)[0])


def moments_of(
    mixture: gmm.Mixture, pca: Projection | None = None
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """(mean, std) [d] of the mixture's draws in pixels, float64, by the law of total variance:
    sum_k w_k (Var_k + (mu_k - mean)^2).

    One component at a time: O(d p) memory with a projection, never d^2 more than the factors.
    """
    weights, means = (np.asarray(array, np.float64) for array in mixture[:2])
    pca = None if pca is None else Projection(*(np.asarray(part, np.float64) for part in pca))
    if pca is not None:
        means = pca.center + means @ pca.components
    variances = [_pixel_variances(mixture.covariance, k, pca) for k in range(len(weights))]
    mean = weights @ means
    return mean, np.sqrt(weights @ (np.stack(variances) + np.square(means - mean)))


def _pixel_variances(covariance: gmm.Covariance, k: int, pca: Projection | None) -> np.ndarray:
    """The diagonal of Sigma_k = A A' + diag(v), or of its image C' Sigma_k C in pixels."""
    factor, variances = None, None
    if isinstance(covariance, gmm.Full | gmm.Tied):
        cholesky = covariance.cholesky
        factor = cholesky if isinstance(covariance, gmm.Tied) else cholesky[k]
    elif isinstance(covariance, gmm.Diagonal):
        variances = np.square(np.asarray(covariance.scales[k], np.float64))
    elif isinstance(covariance, gmm.Spherical):
        unit = np.asarray(covariance.unit, np.float64)
        variances = np.square(np.float64(covariance.scales[k])) * unit
    else:
        assert isinstance(covariance, gmm.LowRank)
        factor = covariance.loadings[k]
        variances = np.square(np.asarray(covariance.scales[k], np.float64))
    total = np.zeros(())
    if factor is not None:
        factor = np.asarray(factor, np.float64)
        factor = factor if pca is None else pca.components.T @ factor
        total = np.sum(np.square(factor), axis=1)
    if variances is not None:
        total = total + (variances if pca is None else variances @ np.square(pca.components))
    return total


def mixture_source(
    mixture: gmm.Mixture,
    *,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
    pca: Projection | None = None,
) -> GMMSource:
    """The source of a fitted mixture, in float32.

    Args:
      mixture: of points in pixels [K, d], or in the coordinates [K, p] of `pca`.
      mean, std: [d], one number per channel or a single one; by default those of
        `moments_of`, with which every pixel of a draw has mean 0 and variance 1. A pixel whose
        std is below `SMALLEST_DEVIATION` times the root mean square of all is divided by 1
        instead, so that it stays at 0: noise of rounding errors is not blown up.

    Raises ValueError where shapes do not fit, or anything is not finite, or nothing varies.
    """
    if pca is not None:
        pca = Projection(*(jnp.asarray(part, jnp.float32) for part in pca))
        p, d = pca.components.shape
        if mixture.means.shape[1] != p or pca.center.shape != (d,):
            raise ValueError(
                f"components [{p}, {d}] and a center {pca.center.shape} fit no mixture "
                f"of means {mixture.means.shape}"
            )
    d = mixture.means.shape[1] if pca is None else pca.components.shape[1]
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is None:
        mean, std = moments_of(mixture, pca)
    mean, std = (np.asarray(part, np.float64) for part in (mean, std))
    for name, part in (("mean", mean), ("std", std)):
        if part.ndim > 1 or part.size not in (1, 3, d) or d % part.size:
            raise ValueError(f"{name} must be a number, [3 channels] or [{d}], got {part.shape}")
    # The channel is the last axis of a flat point, so statistics of channels repeat.
    mean, std = (np.tile(part.ravel(), d // part.size) for part in (mean, std))
    typical = np.sqrt(np.mean(np.square(std)))
    if not (np.isfinite(mean).all() and np.isfinite(typical) and np.min(std) >= 0 and typical > 0):
        raise ValueError("mean and std must be finite, std >= 0 and not 0 everywhere")
    std = np.where(std < SMALLEST_DEVIATION * typical, 1.0, std)
    mean, std = (jnp.asarray(part, jnp.float32) for part in (mean, std))
    return GMMSource(gmm.cast(mixture, jnp.float32), mean, std, pca)


def mode_coupled_source(
    mixture: gmm.Mixture,
    *,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
    pca: Projection | None = None,
) -> ModeCoupledSource:
    """`mixture_source`, coupled with the data through the components."""
    return ModeCoupledSource(mixture_source(mixture, mean=mean, std=std, pca=pca))
