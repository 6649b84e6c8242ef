"""What flows where: target points, the start of the particles, the target's density if known."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lib import datasets
from lib.datasets import synthetic
from lib.numerics import key_of_seed
from lib.rows.files import open_rows
from xp_drmmd.analytic import START_VARIANCE
from xp_drmmd.config import IMAGES, FlowConfig

RING_CENTERS = ((0.0, 0.0), (0.0, -0.75), (0.0, -1.5))
FOUR_MEANS = np.array([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
FOUR_VARIANCE = 0.3
STUDENT_BOUND = 10.0


class Basis(NamedTuple):
    """Principal components of images: an image is `center` + coordinates @ `components`."""

    center: np.ndarray
    components: np.ndarray
    image_shape: tuple[int, int, int]


class Problem(NamedTuple):
    """`start` [N, d], `target` [M, d] with `weights` [M] or equal ones; `log_density` of the target
    or None; `basis` of images or None."""

    start: Float[Array, "N d"]
    target: Float[Array, "M d"]
    weights: Float[Array, " M"] | None = None
    log_density: Callable[[Array], Array] | None = None
    basis: Basis | None = None


def problem(config: FlowConfig, seed: int, data_root: Path | None = None) -> Problem:
    """The draw of one seed."""
    key_start, key_target = jax.random.split(key_of_seed(seed))
    n, m = config.source_particle_num, config.target_particle_num

    def normal(scale, center):
        return synthetic.gaussians(key_start, np.array([center]), n, scale=scale)[0]

    if config.dataset == "ThreeRing":  # equispaced: only the start is random
        if m % 3:
            raise ValueError(f"three rings need a multiple of 3 target points, got {m}")
        rings = synthetic.rings_even(m // 3, centers=RING_CENTERS)
        return Problem(normal(0.01, (0.0, -0.3)), rings.reshape(-1, 2))
    if config.dataset == "FourGaussian":
        scales = jnp.full(4, FOUR_VARIANCE**0.5)
        target = synthetic.gaussian_mixture(key_target, jnp.full(4, 0.25), FOUR_MEANS, scales, m)

        def log_density(z):
            squared = jnp.sum((z[None, :] - jnp.asarray(FOUR_MEANS)) ** 2, axis=1)
            return jax.nn.logsumexp(-squared / (2 * FOUR_VARIANCE))

        return Problem(normal(0.1, (0.0, 0.0)), target, log_density=log_density)
    if config.dataset in ("Gaussian1D", "Gaussian1DExact"):
        # Particles at the quantiles, so that gaps between neighbors are a density.
        levels = (jnp.arange(n) + 0.5) / n
        start = START_VARIANCE**0.5 * jax.scipy.stats.norm.ppf(levels)[:, None]
        if config.dataset == "Gaussian1D":
            target, weights = jax.random.normal(key_target, (m, 1), float), None
        else:  # the whole of N(0, 1), by Gauss-Hermite quadrature
            nodes, weights = np.polynomial.hermite_e.hermegauss(m)
            target, weights = jnp.asarray(nodes)[:, None], jnp.asarray(weights / weights.sum())
        return Problem(start, target, weights, lambda z: -jnp.sum(z**2) / 2)
    if config.dataset == "Gaussian1d":
        return Problem(normal(0.01, (0.0,)), jax.random.truncated_normal(key_target, -1, 1, (m, 1)))
    if config.dataset == "Gaussian2d":
        scale = config.target_scale
        target = scale * jax.random.normal(key_target, (m, 2), float)
        return Problem(
            normal(1.0, (1.0, 1.0)),
            target,
            log_density=lambda z: -jnp.sum(z**2) / (2 * scale**2),
        )
    if config.dataset == "Student":
        return Problem(normal(1.0, (2.5, 2.5)), _student(key_target, m))
    if config.dataset in IMAGES:
        return _images(config, normal, key_target, data_root)
    if config.target is not None:
        target = read_points(config.target)
        if config.source is None:
            return Problem(normal(np.sqrt(target.var(axis=0).mean()), target.mean(axis=0)), target)
        start = read_points(config.source)
        if start.shape[1] != target.shape[1]:
            raise ValueError(
                f"{config.source} has {start.shape[1]} columns and {config.target} "
                f"{target.shape[1]}: particles and target need equally many"
            )
        return Problem(start, target)
    raise ValueError(f"no data set {config.dataset!r}")


def read_points(path: str) -> Float[Array, "n d"]:
    """All rows of a file, in float64 where that is on. Raises ValueError on NaN and infinity."""
    points = np.asarray(open_rows(path)[:], np.float64)
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path}: {bad.sum()} rows hold NaN or infinity, the first is row {np.argmax(bad)}; "
            "leave them out"
        )
    return jnp.asarray(points)


def known_by_content(config: FlowConfig) -> FlowConfig:
    """The settings by which results are known: what files hold in place of their paths."""
    names = {"target": config.target, "source": config.source}
    held: dict[str, Any] = {
        name: open_rows(path).fingerprint()[:16] for name, path in names.items() if path is not None
    }
    return replace(config, **held)


def _student(key, num: int) -> Array:
    """Two independent Student variables of two degrees of freedom, turned by 45 degrees, given that
    both coordinates lie in [-10, 10]. (The published code draws `num` and drops those outside.)"""
    turn = np.sqrt(0.5) * np.array([[1.0, -1.0], [1.0, 1.0]])
    # One in fifty lies outside.
    drawn = jax.random.t(key, 2.0, (2 * num + 100, 2), float)
    points = jnp.matmul(drawn, turn, precision=jax.lax.Precision.HIGHEST)
    return points[jnp.all(jnp.abs(points) <= STUDENT_BOUND, axis=1)][:num]


def _images(config, normal, key_target, data_root) -> Problem:
    """Images in their first principal components, from N(0, I) of the same mean variance."""
    dataset = datasets.load(config.dataset, split="train", data_root=data_root)
    images = np.asarray(datasets.flat(dataset), np.float64)
    chosen = jax.random.choice(
        key_target, len(images), (config.target_particle_num,), replace=False
    )
    from sklearn.decomposition import PCA

    pca = PCA(config.components, svd_solver="full").fit(images[chosen])
    target = pca.transform(images[chosen])
    start = normal(np.sqrt(target.var(axis=0).mean()), (0.0,) * config.components)
    basis = Basis(pca.mean_, pca.components_, dataset.image_shape)
    return Problem(start, jnp.asarray(target, start.dtype), basis=basis)
