"""(De)-regularized MMD between particles and target samples: value, witness, velocity.

Chen, Mustafi, Glaser, Korba, Gretton and Sriperumbudur, (De)-regularized maximum mean discrepancy
gradient flow (JMLR 26(235), 2025). With the target's covariance S = sum_j w_j k_xj (x) k_xj
in the RKHS, f = m_mu - m_pi the difference of the kernel mean embeddings, and a filter g,

    DrMMD(mu || pi) = (1 + lambda) <f, g(S) f>,    g(rho) = 1 / (rho + lambda) (Tikhonov),

which is MMD^2 for lambda -> inf and chi^2(mu || pi) for lambda -> 0. Its witness is
h = 2 (1 + lambda) g(S) f, and the Wasserstein gradient flow moves particles along -grad h.

Every flow here has a witness of one form, a signed sum of kernels at the particles y_i (weights
v_i) and at the target points x_j,

    h(z) = s sum_i v_i k(z, y_i) - sum_j b_j k(z, x_j),

and differs in s and b only (`Witness`). A step is: `prepare_target`, once (an eigendecomposition
serves every lambda); `particle_statistics`, the Gram matrices of the step; one of `mmd_witness`,
`drmmd_witness` and `kale_witness`, O(M^2) or less (KALE: O(M^3)); then the `evaluate` that
`particle_statistics` returned.

Everything is computed in the dtype of the input. Use float64 (`jax.enable_x64`): small lambda
divide small differences, and float32 is off by percents below lambda = 1e-4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from lib.kernels import Kernel, gram_product
from lib.numerics import as_sample, normalized_weights, plain_number, product, uniform_weights

# The target


class Target(NamedTuple):
    """Target samples and the spectrum of W^1/2 K W^1/2, W = diag(weights), which is that of S.

    `embedding` is m_pi at the points, K w, `energy` is w'K w, and `gram` is K.
    """

    points: Float[Array, "M d"]
    weights: Float[Array, " M"]
    embedding: Float[Array, " M"]
    energy: Float[Array, ""]
    eigenvalues: Float[Array, " M"]
    eigenvectors: Float[Array, "M M"]
    gram: Float[Array, "M M"]


def as_target(points: Any, weights: Any = None) -> tuple[Float[Array, "M d"], Float[Array, " M"]]:
    """The target's points as a JAX array, and its weights, divided by their sum; 1/M by default.

    Raises as `lib.numerics.as_sample`, and ValueError for a weight of 0.
    """
    points, weights = as_sample("target", points, weights)
    if weights is None:
        return points, uniform_weights(points)
    if not isinstance(weights, jax.core.Tracer) and bool(jnp.any(weights == 0)):
        raise ValueError("target_weights must be positive: leave out points of weight 0")
    return points, weights / jnp.sum(weights)


def _check_spectrum(eigenvalues: Array) -> None:
    """Raises ValueError where the Gram matrix is not positive semi-definite up to rounding."""
    if isinstance(eigenvalues, jax.core.Tracer):
        return
    smallest, largest = float(jnp.min(eigenvalues)), float(jnp.max(eigenvalues))
    rounding = 10 * len(eigenvalues) * float(jnp.finfo(eigenvalues.dtype).eps)
    if not smallest >= -rounding * largest:
        raise ValueError(
            "the kernel's Gram matrix is not positive semi-definite: its eigenvalues (weighted by "
            f"the target) run from {smallest:.3g} to {largest:.3g}"
        )


def prepare_target(
    kernel: Kernel, points: Float[Array, "M d"], weights: Float[Array, " M"] | None = None
) -> Target:
    """What does not change between steps, for every lambda and filter: O(M^3) once, O(M^2) memory.

    Weights are normalized. Raises ValueError for an empty or non-finite sample, a weight that is
    not positive, and a kernel whose Gram matrix has a negative eigenvalue (Riesz has).
    """
    points, weights = as_target(points, weights)
    gram, root = kernel(points, points), jnp.sqrt(weights)
    eigenvalues, eigenvectors = jnp.linalg.eigh(root[:, None] * gram * root[None, :])
    _check_spectrum(eigenvalues)
    embedding = product(gram, weights)
    return Target(
        points,
        weights,
        embedding,
        product(weights, embedding),
        jnp.maximum(eigenvalues, 0),
        eigenvectors,
        gram,
    )


# The particles


class Statistics(NamedTuple):
    """What a witness needs to know of the particles: v'K_yy v, and m_mu at the target points."""

    energy: Float[Array, ""]
    at_target: Float[Array, " M"]


def particle_statistics(
    kernel: Kernel,
    particles: Float[Array, "N d"],
    target: Target,
    weights: Float[Array, " N"] | None = None,
    *,
    block_size: int | None = None,
) -> tuple[Statistics, Callable[["Witness"], tuple[Array, Array]]]:
    """(statistics, evaluate): `evaluate(witness)` is (h [N], grad h [N, d]) at the particles.

    By default the Gram matrices [N, N] and [N, M] are computed once and shared by both; with a
    `block_size` memory is O(block_size^2) and they are computed again.
    """
    y, x = particles, target.points
    v = normalized_weights(y, weights)
    if block_size is None:
        (gram_y, gram_x), transpose = jax.vjp(lambda z: (kernel(z, y), kernel(z, x)), y)

        def evaluate(witness):
            s, b = witness.particle_scale, witness.target_weights
            values = s * product(gram_y, v) - product(gram_x, b)
            cotangents = (
                jnp.broadcast_to(s * v[None, :], gram_y.shape),
                jnp.broadcast_to(-b[None, :], gram_x.shape),
            )
            return values, transpose(cotangents)[0]

        energy = product(v, product(gram_y, v))
        return Statistics(energy, product(v, gram_x)), evaluate

    def embedding(points, weights):
        return lambda z: gram_product(kernel, z, points, weights, block_size=block_size)

    def evaluate_by_blocks(witness):
        def h(z):
            s, b = witness.particle_scale, witness.target_weights
            return s * embedding(y, v)(z) - embedding(x, b)(z)

        values, transpose = jax.vjp(h, y)
        return values, transpose(jnp.ones_like(values))[0]

    energy = product(v, embedding(y, v)(y))
    return Statistics(energy, embedding(y, v)(x)), evaluate_by_blocks


# Witnesses


class Witness(NamedTuple):
    """h = `particle_scale` sum_i v_i k(., y_i) - sum_j `target_weights`_j k(., x_j).

    `at_target` is h at the target points, and `value` the functional whose Wasserstein gradient is
    grad h: moving particle i by dy changes it by v_i grad h(y_i) . dy.
    """

    particle_scale: Float[Array, ""]
    target_weights: Float[Array, " M"]
    at_target: Float[Array, " M"]
    value: Float[Array, ""]


def mmd_witness(target: Target, particles: Statistics) -> Witness:
    """h = m_mu - m_pi; the value is MMD^2 / 2."""
    difference = particles.at_target - target.embedding
    cross = product(target.weights, particles.at_target)
    value = (particles.energy - 2 * cross + target.energy) / 2
    return Witness(jnp.ones_like(value), target.weights, difference, value)


class Filtered(NamedTuple):
    """A filter at eigenvalues rho: g(rho), and its divided difference (g(rho) - g(0)) / rho."""

    inverse: Array
    slope: Array


SpectralFilter = Callable[[Array, ScalarLike], Filtered]
"""Of the eigenvalues of the target's covariance, and of lambda."""


def tikhonov(eigenvalues: Array, lmbda: ScalarLike) -> Filtered:
    """g(rho) = 1 / (rho + lambda)"""
    lmbda = plain_number(lmbda)
    inverse = 1 / (eigenvalues + lmbda)
    return Filtered(inverse, -inverse / lmbda)


def showalter(eigenvalues: Array, lmbda: ScalarLike) -> Filtered:
    """g(rho) = (1 - exp(-rho / lambda)) / rho, 1 / lambda at 0: gradient flow stopped at a time."""
    lmbda = plain_number(lmbda)
    t = eigenvalues / lmbda
    small = t < 0.1
    safe = jnp.where(small, 1, t)
    # (1 - exp(-t)) / t = 1 + t (-1/2 + t/6 - t^2/24 + ...), which does not cancel for small t.
    series = sum((-1) ** k * t**k / float(math.factorial(k + 1)) for k in range(1, 13))
    ratio = jnp.where(small, 1 + series, -jnp.expm1(-safe) / safe)
    tail = sum((-1) ** k * t ** (k - 1) / float(math.factorial(k + 1)) for k in range(1, 13))
    slope = jnp.where(small, tail, (ratio - 1) / safe)
    return Filtered(ratio / lmbda, slope / lmbda**2)


def cutoff(eigenvalues: Array, lmbda: ScalarLike) -> Filtered:
    """g(rho) = 1 / rho where rho > lambda, else 0."""
    above = eigenvalues > plain_number(lmbda)
    inverse = jnp.where(above, 1 / jnp.where(above, eigenvalues, 1), 0)
    return Filtered(inverse, jnp.where(above, inverse**2, 0))


def drmmd_witness(
    target: Target,
    particles: Statistics,
    lmbda: ScalarLike,
    *,
    spectral_filter: SpectralFilter = tikhonov,
) -> Witness:
    """h = 2 (1 + lambda) g(S) f; the value is DrMMD. O(M^2).

    1 + h / (2 (1 + lambda)) estimates the density ratio dmu / dpi: see `density_ratio`.
    """
    lmbda = check_lambda(lmbda)
    root = jnp.sqrt(target.weights)
    scaled = root * (particles.at_target - target.embedding)
    coordinates = product(scaled, target.eigenvectors)
    inverse, slope = spectral_filter(target.eigenvalues, lmbda)
    at_zero = spectral_filter(jnp.zeros_like(target.energy), lmbda).inverse
    factor = 2 * (1 + lmbda)
    scale = at_zero * factor
    filtered = product(target.eigenvectors, slope * coordinates)
    weights = scale * target.weights - root * factor * filtered
    at_target = factor * product(target.eigenvectors, inverse * coordinates)
    # <f, h> / 2, the mean of h over the particles less that over the target.
    mean_particles = scale * particles.energy - product(weights, particles.at_target)
    value = (mean_particles - product(root, at_target)) / 2
    return Witness(scale, weights, at_target / root, value)


def density_ratio(witness: Witness, lmbda: ScalarLike) -> Float[Array, " M"]:
    """Estimate of dmu / dpi at the target points, of a witness of `drmmd_witness`."""
    return 1 + witness.at_target / (2 * (1 + plain_number(lmbda)))


def check_lambda(lmbda: ScalarLike) -> Any:
    """`lib.numerics.plain_number` of it; raises ValueError unless it is positive and finite."""
    if not isinstance(lmbda, jax.core.Tracer) and not (
        0 < float(lmbda) < math.inf  # type: ignore[arg-type]  # complex raises
    ):
        raise ValueError(f"lambda must be positive and finite, got {lmbda}")
    return plain_number(lmbda)


def witness_function(
    kernel: Kernel,
    witness: Witness,
    target: Target,
    particles: Float[Array, "N d"],
    points: Float[Array, "n d"],
    weights: Float[Array, " N"] | None = None,
    *,
    block_size: int = 1024,
) -> Float[Array, " n"]:
    """h at any points."""
    v = normalized_weights(particles, weights)
    towards = gram_product(kernel, points, particles, v, block_size=block_size)
    away = gram_product(
        kernel, points, target.points, witness.target_weights, block_size=block_size
    )
    return witness.particle_scale * towards - away


# Regularization and step size along a flow


def adaptive_lambda(
    value: ScalarLike,
    first_value: ScalarLike,
    first_lambda: ScalarLike,
    *,
    regularity: float = 1.0,
    largest: float = 1.0,
) -> Array:
    """lambda_n = first_lambda (DrMMD_n / DrMMD_0)^(1 / (r + 1)), at most `largest`.

    The rule of section 5.2 with regularity r of the density ratio, its constant chosen so that the
    flow starts at `first_lambda`. The published code has r = 1 and no bound (`largest` = inf).
    Values that rounding made negative count as 0, of which lambda is 0.
    """
    value, first_value, first_lambda, regularity, largest = map(
        plain_number, (value, first_value, first_lambda, regularity, largest)
    )
    # A flow that starts at the target has a first value of 0.
    share = jnp.maximum(value, 0) / jnp.maximum(first_value, 1e-30)
    return jnp.minimum(largest, first_lambda * share ** (1 / (regularity + 1)))
