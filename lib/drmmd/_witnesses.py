"""(De)-regularised MMD between particles and target samples: value, witness, velocity.

Chen, Mustafi, Glaser, Korba, Gretton and Sriperumbudur, (De)-regularized maximum mean discrepancy
gradient flow (JMLR 26(235), 2025). With the target's covariance S = sum_j w_j k_xj (x) k_xj
in the RKHS, f = m_mu - m_pi the difference of the kernel mean embeddings, and a filter g,

    DrMMD(mu || pi) = (1 + lambda) <f, g(S) f>,    g(rho) = 1 / (rho + lambda) (Tikhonov),

which is MMD^2 for lambda -> inf and chi^2(mu || pi) for lambda -> 0. Its witness is
h = 2 (1 + lambda) g(S) f, and the Wasserstein gradient flow moves particles along -grad h.

Every flow here has a witness of one form, a signed sum of kernels at the particles y_i (weights
v_i) and at the target points x_j,

    h(z) = s sum_i v_i k(z, y_i) - sum_j b_j k(z, x_j),

and differs in s and b alone (`Witness`). A step is: `prepare_target`, once (an eigendecomposition
serves every lambda); `particle_statistics`, the Gram matrices of the step; one of `mmd_witness`,
`drmmd_witness` and `kale_witness`, O(M^2) or less (KALE: O(M^3)); then `witness_and_velocity`.

Everything is computed in the dtype of the input. Use float64 (`jax.enable_x64`): small lambda
divide small differences, and float32 is off by percents below lambda = 1e-4.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, ScalarLike

from lib.drmmd.nystrom import nystrom_basis, nystrom_features
from lib.kernels import Kernel, gram_product
from lib.numerics import as_sample, plain_number, product, uniform_weights

# The target


class Target(NamedTuple):
    """Target samples and the spectrum of W^1/2 K W^1/2, W = diag(weights), which is that of S.

    `eigenvectors` [M, m] have m = M columns, or fewer for a low-rank approximation whose other
    eigenvalues are 0. `embedding` is m_pi at the points, K w, and `energy` is w'K w. `gram` is K,
    or None for a low-rank target.
    """

    points: Float[Array, "M d"]
    weights: Float[Array, " M"]
    embedding: Float[Array, " M"]
    energy: Float[Array, ""]
    eigenvalues: Float[Array, " m"]
    eigenvectors: Float[Array, "M m"]
    gram: Float[Array, "M M"] | None


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

    Weights are normalised. Raises ValueError for an empty or non-finite sample, a weight that is
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


def prepare_target_nystrom(
    key: Key[Array, ""],
    kernel: Kernel,
    points: Float[Array, "M d"],
    rank: int,
    weights: Float[Array, " M"] | None = None,
    *,
    block_size: int = 1024,
) -> Target:
    """As `prepare_target`, with K replaced by its Nystrom approximation K_xz K_zz^+ K_zx.

    z: `rank` of the points (`lib.drmmd.nystrom`). Only the operator S is approximated; the sums of
    kernels stay exact. O(M rank^2 + M^2 d) once, memory O(M rank).
    """
    points, weights = as_target(points, weights)
    basis = nystrom_basis(key, kernel, points, rank)
    _check_spectrum(jnp.linalg.eigvalsh(kernel(basis.landmarks, basis.landmarks)))
    factor = nystrom_features(kernel, basis, points, block_size=block_size)
    factor = jnp.sqrt(weights)[:, None] * factor
    eigenvectors, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
    embedding = gram_product(kernel, points, points, weights, block_size=block_size)
    energy = product(weights, embedding)
    return Target(points, weights, embedding, energy, singular**2, eigenvectors, None)


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
    """(statistics, pull): `pull(witness)` is (h [N], grad h [N, d]) at the particles.

    By default the Gram matrices [N, N] and [N, M] are computed once and shared by both; with a
    `block_size` memory is O(block_size^2) and they are computed again.
    """
    y, x = particles, target.points
    v = uniform_weights(y) if weights is None else weights / jnp.sum(weights)
    if block_size is None:
        (gram_y, gram_x), transpose = jax.vjp(lambda z: (kernel(z, y), kernel(z, x)), y)

        def pull(witness):
            s, b = witness.particle_scale, witness.target_weights
            values = s * product(gram_y, v) - product(gram_x, b)
            cotangents = (
                jnp.broadcast_to(s * v[None, :], gram_y.shape),
                jnp.broadcast_to(-b[None, :], gram_x.shape),
            )
            return values, transpose(cotangents)[0]

        energy = product(v, product(gram_y, v))
        return Statistics(energy, product(v, gram_x)), pull

    def embedding(points, weights):
        return lambda z: gram_product(kernel, z, points, weights, block_size=block_size)

    def pull_by_blocks(witness):
        def h(z):
            s, b = witness.particle_scale, witness.target_weights
            return s * embedding(y, v)(z) - embedding(x, b)(z)

        values, transpose = jax.vjp(h, y)
        return values, transpose(jnp.ones_like(values))[0]

    energy = product(v, embedding(y, v)(y))
    return Statistics(energy, embedding(y, v)(x)), pull_by_blocks


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
    series = sum((-1) ** k * t**k / math.factorial(k + 1) for k in range(1, 13))
    ratio = jnp.where(small, 1 + series, -jnp.expm1(-safe) / safe)
    tail = sum((-1) ** k * t ** (k - 1) / math.factorial(k + 1) for k in range(1, 13))
    slope = jnp.where(small, tail, (ratio - 1) / safe)
    return Filtered(ratio / lmbda, slope / lmbda**2)


def cutoff(eigenvalues: Array, lmbda: ScalarLike) -> Filtered:
    """g(rho) = 1 / rho where rho > lambda, else 0."""
    kept = eigenvalues > plain_number(lmbda)
    inverse = jnp.where(kept, 1 / jnp.where(kept, eigenvalues, 1), 0)
    return Filtered(inverse, jnp.where(kept, inverse**2, 0))


def drmmd_witness(
    target: Target,
    particles: Statistics,
    lmbda: ScalarLike,
    *,
    spectral_filter: SpectralFilter = tikhonov,
) -> Witness:
    """h = 2 (1 + lambda) g(S) f; the value is DrMMD. O(M m), for an m-dimensional spectrum.

    1 + h / (2 (1 + lambda)) estimates the density ratio dmu / dpi: see `density_ratio`.
    """
    lmbda = check_lambda(lmbda)
    root = jnp.sqrt(target.weights)
    scaled = root * (particles.at_target - target.embedding)
    coordinates = product(scaled, target.eigenvectors)
    full = target.eigenvectors.shape[0] == target.eigenvectors.shape[1]

    def function_of_gram(values, at_zero):
        """values(W^1/2 K W^1/2) W^1/2 f: `at_zero` acts on what a low rank leaves out."""
        if full:
            return product(target.eigenvectors, values * coordinates)
        inside = product(target.eigenvectors, (values - at_zero) * coordinates)
        return inside + at_zero * scaled

    inverse, slope = spectral_filter(target.eigenvalues, lmbda)
    inverse_at_zero, slope_at_zero = spectral_filter(jnp.zeros_like(target.energy), lmbda)
    factor = 2 * (1 + lmbda)
    scale = inverse_at_zero * factor
    weights = scale * target.weights - root * factor * function_of_gram(slope, slope_at_zero)
    at_target = factor * function_of_gram(inverse, inverse_at_zero)
    # <f, h> / 2, the mean of h over the particles less that over the target.
    mean_particles = scale * particles.energy - product(weights, particles.at_target)
    value = (mean_particles - product(root, at_target)) / 2
    return Witness(scale, weights, at_target / root, value)


def density_ratio(witness: Witness, lmbda: ScalarLike) -> Float[Array, " M"]:
    """Estimate of dmu / dpi at the target points, of a witness of `drmmd_witness`."""
    return 1 + witness.at_target / (2 * (1 + plain_number(lmbda)))


def check_lambda(lmbda: ScalarLike) -> Any:
    """`lib.kernels.plain_number` of it; raises ValueError unless it is positive and finite."""
    if not isinstance(lmbda, jax.core.Tracer) and not (
        0 < float(lmbda) < math.inf  # type: ignore[arg-type]  # complex raises
    ):
        raise ValueError(f"lambda must be positive and finite, got {lmbda}")
    return plain_number(lmbda)


# Of the target's eigenvalues, which KALE's Newton steps are made with first.
SHARE = 1 / 4


def kale_witness(
    target: Target,
    particles: Statistics,
    lmbda: ScalarLike,
    log_ratio: Float[Array, " M"],
    *,
    tolerance: float = 1e-16,
    max_iterations: int = 50,
) -> tuple[Witness, Float[Array, " M"]]:
    """KL approximate lower-bound estimator (Glaser, Arbel and Gretton, NeurIPS 2021).

    KALE = (1 + lambda) max_h {1 + E_mu h - E_pi exp(h) - lambda |h|^2 / 2}, solved in its dual,

        min over a > 0 of sum_j a_j (log(a_j / w_j) - 1) + |m_mu - sum_j a_j k_xj|^2 / (2 lambda),

    by Newton's method with a line search, started from a = w exp(`log_ratio`). Returns the witness
    (1 + lambda) h and log(a / w), h at the target points, which starts the next step's solution.

    A Hessian is factorised once for several steps, as long as they bring the solution nearer: at
    first with the largest `SHARE` of the target's spectrum alone, O(M^3 `SHARE`^2), and then, where
    these do not lead to the end, the whole one, O(M^3), at most `max_iterations` times each. Ends
    when sum_j a_j g_j^2, g the gradient, is below `tolerance` (or what rounding makes of it): no
    smaller than the Newton decrement, as the Hessian is at least diag(1 / a).
    """
    lmbda = check_lambda(lmbda)
    if target.gram is None:
        raise ValueError("KALE needs the whole Gram matrix: a target of prepare_target")
    gram, w, p = target.gram, target.weights, particles.at_target
    tolerance = jnp.maximum(tolerance, (16 * jnp.finfo(w.dtype).eps / lmbda) ** 2)

    def objective(a, quadratic):
        """`quadratic` is a'Ka - 2 p'a."""
        return jnp.sum(a * (jnp.log(a / w) - 1)) + (particles.energy + quadratic) / (2 * lmbda)

    def gradient_at(a):
        away = product(gram, a) - p
        return jnp.log(a / w) + away / lmbda, away

    # The Hessian is diag(1/a) + K / lambda = D^-1/2 (I + D^1/2 K D^1/2 / lambda) D^-1/2 for
    # D = diag(a).

    def inverse(a):
        """v -> (I + D^1/2 K D^1/2 / lambda)^-1 v"""
        root = jnp.sqrt(a / lmbda)
        inner = jnp.eye(len(a), dtype=a.dtype) + root[:, None] * gram * root[None, :]
        factor = jax.scipy.linalg.cho_factor(inner)
        return lambda v: jax.scipy.linalg.cho_solve(factor, v)

    rank = math.ceil(SHARE * len(w))
    leading = target.eigenvectors[:, -rank:] * jnp.sqrt(target.eigenvalues[None, -rank:])

    def inverse_of_leading(a):
        """The same with the leading eigenvalues of W^1/2 K W^1/2, by Woodbury's identity."""
        g = jnp.sqrt(a / (w * lmbda))[:, None] * leading
        factor = jax.scipy.linalg.cho_factor(jnp.eye(rank, dtype=a.dtype) + product(g.T, g))
        return lambda v: v - product(g, jax.scipy.linalg.cho_solve(factor, product(v, g)))

    def newton(inverse, carry):
        a, error, _, iteration = carry
        root, solve = jnp.sqrt(a), inverse(a)
        gradient, away = gradient_at(a)
        step = -root * solve(root * gradient)
        decrement = -product(gradient, step)
        # Stay positive, then halve until the objective falls.
        limit = jnp.max(jnp.where(step < 0, -step / a, 0))
        t = jnp.minimum(1, 0.9 / jnp.where(limit > 0, limit, 0.9))
        quadratic = product(a, away - p)
        slope = 2 * product(step, away)
        curvature = product(step, product(gram, step))
        here = objective(a, quadratic)
        slack = 8 * jnp.finfo(a.dtype).eps * (1 + jnp.abs(here))

        def too_long(t):
            there = objective(a + t * step, quadratic + t * slope + t**2 * curvature)
            return ~(there <= here - 1e-4 * t * decrement + slack) & (t > 1e-10)

        a = a + lax.while_loop(too_long, lambda t: t / 2, t) * step

        def again(state):
            """One more step by the same factor, undone where it does not help."""
            a, gradient, error, _ = state
            step = -root * solve(root * gradient)
            moved = jnp.maximum(a + step, a / 10)
            following, _ = gradient_at(moved)
            left = jnp.sum(moved * following**2)
            better = jnp.all(moved == a + step) & (left < error / 4)
            pick = partial(jnp.where, better)
            return pick(moved, a), pick(following, gradient), pick(left, error), better

        def worthwhile(state):
            return (state[2] > tolerance) & state[3]

        gradient, _ = gradient_at(a)
        state = a, gradient, jnp.sum(a * gradient**2), jnp.array(True)
        a, _, left, _ = lax.while_loop(worthwhile, again, state)
        return a, left, left < error / 4, iteration + 1

    def unfinished(carry):
        _, error, _, iteration = carry
        return (error > tolerance) & (iteration < max_iterations)

    carry = w * jnp.exp(log_ratio), jnp.asarray(jnp.inf, w.dtype), jnp.array(True), 0
    carry = lax.while_loop(
        lambda carry: unfinished(carry) & carry[2], partial(newton, inverse_of_leading), carry
    )
    carry = lax.while_loop(unfinished, partial(newton, inverse), (*carry[:3], 0))
    a = carry[0]
    scale = jnp.asarray((1 + lmbda) / lmbda, w.dtype)
    embedding = product(gram, a)
    value = (1 + lmbda) * (1 + objective(a, product(a, embedding - 2 * p)))
    return Witness(scale, scale * a, scale * (p - embedding), value), jnp.log(a / w)


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
    v = uniform_weights(particles) if weights is None else weights / jnp.sum(weights)
    towards = gram_product(kernel, points, particles, v, block_size=block_size)
    away = gram_product(
        kernel, points, target.points, witness.target_weights, block_size=block_size
    )
    return witness.particle_scale * towards - away


# Regularisation and step size along a flow


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
