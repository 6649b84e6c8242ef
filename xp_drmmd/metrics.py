"""How far particles are from the target: numbers, not pictures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lib import mmd
from lib.kernels import gaussian
from xp_drmmd.analytic import kl_of_quantiles

AnyArray = np.ndarray | Array
MAX_POINTS = 2_000


def wasserstein(
    x: Float[AnyArray, "n d"],
    y: Float[AnyArray, "m d"],
    p: int,
    y_weights: Float[AnyArray, " m"] | None = None,
) -> float:
    """W_p = (min E |x - y|^p)^(1/p), p in {1, 2}, exact (POT); equal weights unless given."""
    import ot

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    cost = ot.dist(x, y, metric="sqeuclidean" if p == 2 else "euclidean")
    # POT takes no weights for equal ones.
    weights = np.zeros(0) if y_weights is None else np.asarray(y_weights, np.float64)
    uniform = np.zeros(0) if y_weights is None else np.full(len(x), 1 / len(x))
    return float(ot.emd2(uniform, weights, cost, numItermax=1_000_000) ** (1 / p))


@partial(jax.jit, static_argnames="bandwidth")
def _mmd_squared(particles, target, weights, bandwidth):
    return mmd.mmd_squared(gaussian(bandwidth), particles, target, y_weights=weights)


def evaluate(
    particles: Float[AnyArray, "n d"],
    target: Float[AnyArray, "m d"],
    bandwidth: float,
    weights: Float[AnyArray, " m"] | None = None,
) -> dict[str, float]:
    """mmd2 (squared, biased, Gaussian kernel of that bandwidth), w1 and w2; on the line also kl,
    KL(mu || N(0, 1)) from the particles as quantiles. Of samples over `MAX_POINTS` every k-th point
    is evaluated: exact transport is cubic."""
    particles, target = (z[:: -(-len(z) // MAX_POINTS)] for z in (particles, target))
    if weights is not None and len(weights) != len(target):
        raise ValueError(f"a weighted target of more than {MAX_POINTS:,} points: {len(weights):,}")
    measured = {
        "mmd2": float(_mmd_squared(jnp.asarray(particles), target, weights, bandwidth)),
        "w1": wasserstein(particles, target, 1, weights),
        "w2": wasserstein(particles, target, 2, weights),
    }
    if particles.shape[1] == 1:
        measured["kl"] = kl_of_quantiles(particles[:, 0])
    return measured
