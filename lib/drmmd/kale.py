"""KALE, the KL approximate lower-bound estimator (Glaser, Arbel and Gretton, NeurIPS 2021).

    KALE = (1 + lambda) max_h {1 + E_mu h - E_pi exp(h) - lambda |h|^2 / 2}

is solved in its dual, over weights a of the target points,

    min over a > 0 of sum_j a_j (log(a_j / w_j) - 1) + |m_mu - sum_j a_j k_xj|^2 / (2 lambda).

Newton's method: the Hessian is diag(1/a) + K / lambda = D^-1/2 (I + D^1/2 K D^1/2 / lambda) D^-1/2
for D = diag(a). Its factor is used for a step with a line search, then for more steps as long as
they bring the solution nearer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from lib.drmmd._witnesses import Statistics, Target, Witness, check_lambda
from lib.numerics import product

# The share of the target's eigenvalues that the first Newton steps are made with.
SHARE = 1 / 4


class _Dual(NamedTuple):
    """The dual problem: K, w, m_mu at the target points, v'K_yy v and lambda."""

    gram: Float[Array, "M M"]
    weights: Float[Array, " M"]
    particles: Float[Array, " M"]
    energy: Float[Array, ""]
    lmbda: ScalarLike

    def objective(self, a, quadratic):
        """`quadratic` is a'Ka - 2 a'm_mu."""
        entropy = jnp.sum(a * (jnp.log(a / self.weights) - 1))
        return entropy + (self.energy + quadratic) / (2 * self.lmbda)

    def gradient(self, a):
        """The gradient, and the part K a - m_mu of it."""
        difference = product(self.gram, a) - self.particles
        return jnp.log(a / self.weights) + difference / self.lmbda, difference


class _Iterate(NamedTuple):
    """After a number of factorizations; `residual` is sum_j a_j g_j^2, g the gradient."""

    a: Float[Array, " M"]
    residual: Float[Array, ""]
    improved: Bool[Array, ""]  # by a factor of 4 since the last factorization
    iteration: Int[Array, ""] | int


class _Repeated(NamedTuple):
    """Between the steps that one factor serves."""

    a: Float[Array, " M"]
    gradient: Float[Array, " M"]
    residual: Float[Array, ""]
    improved: Bool[Array, ""]  # by a factor of 4 in the last step


# The inverses of I + D^1/2 K D^1/2 / lambda, as functions of a vector.


def _whole_inverse(dual: _Dual, a):
    root = jnp.sqrt(a / dual.lmbda)
    matrix = jnp.eye(len(a), dtype=a.dtype) + root[:, None] * dual.gram * root[None, :]
    factor = jax.scipy.linalg.cho_factor(matrix)
    return lambda v: jax.scipy.linalg.cho_solve(factor, v)


def _leading_inverse(leading: Float[Array, "M r"], dual: _Dual, a):
    """With K = W^-1/2 B B' W^-1/2, B = `leading`, by Woodbury's identity."""
    g = jnp.sqrt(a / (dual.weights * dual.lmbda))[:, None] * leading
    matrix = jnp.eye(leading.shape[1], dtype=a.dtype) + product(g.T, g)
    factor = jax.scipy.linalg.cho_factor(matrix)
    return lambda v: v - product(g, jax.scipy.linalg.cho_solve(factor, product(v, g)))


def _step_length(dual: _Dual, a, step, gradient, difference):
    """Backtracking from the longest step that stays positive until the objective falls enough."""
    decrement = -product(gradient, step)
    limit = jnp.max(jnp.where(step < 0, -step / a, 0))
    longest = jnp.minimum(1, 0.9 / jnp.where(limit > 0, limit, 0.9))
    # The quadratic part of the objective along the step, from three numbers.
    quadratic = product(a, difference - dual.particles)
    slope = 2 * product(step, difference)
    curvature = product(step, product(dual.gram, step))
    here = dual.objective(a, quadratic)
    slack = 8 * jnp.finfo(a.dtype).eps * (1 + jnp.abs(here))

    def too_long(t):
        there = dual.objective(a + t * step, quadratic + t * slope + t**2 * curvature)
        return ~(there <= here - 1e-4 * t * decrement + slack) & (t > 1e-10)

    return lax.while_loop(too_long, lambda t: t / 2, longest)


def _newton(invert: Callable, dual: _Dual, tolerance, iterate: _Iterate) -> _Iterate:
    """One factorization: a step with a line search, then full steps while each helps."""
    a = iterate.a
    root, solve = jnp.sqrt(a), invert(dual, a)
    gradient, difference = dual.gradient(a)
    step = -root * solve(root * gradient)
    a = a + _step_length(dual, a, step, gradient, difference) * step

    def helps(state: _Repeated):
        return (state.residual > tolerance) & state.improved

    def repeat(state: _Repeated):
        step = -root * solve(root * state.gradient)
        moved = jnp.maximum(state.a + step, state.a / 10)
        gradient, _ = dual.gradient(moved)
        residual = jnp.sum(moved * gradient**2)
        improved = jnp.all(moved == state.a + step) & (residual < state.residual / 4)
        # A step that does not help is undone.
        following = _Repeated(moved, gradient, residual, improved)
        kept = jax.tree.map(partial(jnp.where, improved), following, state)
        return kept._replace(improved=improved)

    gradient, _ = dual.gradient(a)
    start = _Repeated(a, gradient, jnp.sum(a * gradient**2), jnp.array(True))
    a, _, residual, _ = lax.while_loop(helps, repeat, start)
    return _Iterate(a, residual, residual < iterate.residual / 4, iterate.iteration + 1)


def kale_witness(
    target: Target,
    particles: Statistics,
    lmbda: ScalarLike,
    log_ratio: Float[Array, " M"],
    *,
    tolerance: float = 1e-16,
    max_iterations: int = 50,
) -> tuple[Witness, Float[Array, " M"]]:
    """The witness (1 + lambda) h of KALE, and log(a / w), which is h at the target points.

    Newton starts at a = w exp(`log_ratio`): that of a flow's last step. The Hessian is factorized
    first with the largest `SHARE` of the target's spectrum only, O(M^3 `SHARE`^2), and then, where
    these steps do not reach the end, whole, O(M^3); at most `max_iterations` times each. Ends when
    sum_j a_j g_j^2, g the gradient, is below `tolerance` (or what rounding makes of it): no smaller
    than the Newton decrement, as the Hessian is at least diag(1 / a).
    """
    lmbda = check_lambda(lmbda)
    gram, w = target.gram, target.weights
    dual = _Dual(gram, w, particles.at_target, particles.energy, lmbda)
    tolerance = jnp.maximum(tolerance, (16 * jnp.finfo(w.dtype).eps / lmbda) ** 2)

    def unfinished(iterate: _Iterate):
        return (iterate.residual > tolerance) & (iterate.iteration < max_iterations)

    rank = math.ceil(SHARE * len(w))
    leading = target.eigenvectors[:, -rank:] * jnp.sqrt(target.eigenvalues[None, -rank:])
    start = w * jnp.exp(log_ratio), jnp.asarray(jnp.inf, w.dtype), jnp.array(True)
    iterate = lax.while_loop(
        lambda iterate: unfinished(iterate) & iterate.improved,
        partial(_newton, partial(_leading_inverse, leading), dual, tolerance),
        _Iterate(*start, 0),
    )
    iterate = lax.while_loop(
        unfinished,
        partial(_newton, _whole_inverse, dual, tolerance),
        iterate._replace(iteration=0),
    )
    a = iterate.a
    scale = jnp.asarray((1 + lmbda) / lmbda, w.dtype)
    embedding = product(gram, a)
    quadratic = product(a, embedding - 2 * dual.particles)
    value = (1 + lmbda) * (1 + dual.objective(a, quadratic))
    return Witness(scale, scale * a, scale * (dual.particles - embedding), value), jnp.log(a / w)
