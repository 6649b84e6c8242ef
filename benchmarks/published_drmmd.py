"""Steps of the (de)-regularized MMD flow as published, rebuilt from their description to compare.

Chen et al. (2025): the witness is evaluated, and differentiated, particle by particle,

    h(z) = 2 (1 + lambda) / lambda (f(z) - k(z, X) (K_xx + M lambda)^-1 f(X)),

with the inverse formed once for a fixed lambda, and multiplied from the left: k(z, X) times the
inverse, then times K_xy, then averaged. A step is O(N M^2 + N^2 M). The adaptive flow forms the
inverse twice per step: to evaluate DrMMD at the last lambda, and to move. KALE (Glaser et al.,
2021) solves its dual by Newton's method with the whole Hessian, from the weights 1 / M, at every
step.

The formulas are the published ones; the code is new. To compute, use `lib.drmmd`.
"""

import jax
import jax.numpy as jnp


def kernel(z, points, bandwidth):
    """k(z, points) of one point."""
    return jnp.exp(-jnp.sum((points - z[None, :]) ** 2, axis=1) / (2 * bandwidth**2))


def gram(x, y, bandwidth):
    return jax.vmap(lambda z: kernel(z, y, bandwidth))(x)


def inverse(x, lmbda, bandwidth):
    return jnp.linalg.inv(gram(x, x, bandwidth) + len(x) * lmbda * jnp.eye(len(x), dtype=x.dtype))


def mmd_velocity(y, x, bandwidth):
    """grad of m_mu - m_pi at every particle."""

    def witness(z):
        return jnp.mean(kernel(z, y, bandwidth)) - jnp.mean(kernel(z, x, bandwidth))

    return jax.vmap(jax.grad(witness))(y)


def _witness(z, y, x, regularized, k_xy, k_xx, lmbda, bandwidth):
    k_zx = kernel(z, x, bandwidth)
    rows = k_zx @ regularized
    f = jnp.mean(kernel(z, y, bandwidth)) - jnp.mean(k_zx)
    return 2 * (1 + lmbda) / lmbda * (f - jnp.mean(rows @ k_xy) + jnp.mean(rows @ k_xx))


def drmmd_velocity(y, x, regularized, lmbda, bandwidth):
    """grad h at every particle, given the inverse."""
    k_xy, k_xx = gram(x, y, bandwidth), gram(x, x, bandwidth)

    def witness(z):
        return _witness(z, y, x, regularized, k_xy, k_xx, lmbda, bandwidth)

    return jax.vmap(jax.grad(witness))(y)


def drmmd(y, x, regularized, lmbda, bandwidth):
    """The value: half the mean of h over the particles less that over the target."""
    k_xy, k_xx = gram(x, y, bandwidth), gram(x, x, bandwidth)
    h = jax.vmap(lambda z: _witness(z, y, x, regularized, k_xy, k_xx, lmbda, bandwidth))
    return (jnp.mean(h(y)) - jnp.mean(h(x))) / 2


def adaptive_step(y, x, lmbda, first_lambda, first_value, bandwidth):
    """(velocity, the next lambda) with lambda_n = lambda_0 sqrt(DrMMD_n / DrMMD_0)."""
    value = drmmd(y, x, inverse(x, lmbda, bandwidth), lmbda, bandwidth)
    following = first_lambda * jnp.sqrt(value / first_value)
    regularized = inverse(x, following, bandwidth)
    return drmmd_velocity(y, x, regularized, following, bandwidth), following


def kale_velocity(y, x, lmbda, bandwidth, iterations=20):
    """(1 + lambda) grad h at every particle."""
    k_xx, m = gram(x, x, bandwidth), len(x)
    target = jnp.mean(gram(x, y, bandwidth), axis=1)

    def newton(_, a):
        gradient = jnp.log(m * a) + (k_xx @ a - target) / lmbda
        hessian = jnp.diag(1 / a) + k_xx / lmbda
        step = jnp.linalg.solve(hessian, gradient)
        # Half way to the boundary at most.
        scale = jnp.minimum(1, 0.5 / jnp.max(jnp.maximum(step / a, 1e-12)))
        return a - scale * step

    a = jax.lax.fori_loop(0, iterations, newton, jnp.full(m, 1 / m, x.dtype))

    def witness(z):
        return jnp.mean(kernel(z, y, bandwidth)) - kernel(z, x, bandwidth) @ a

    return (1 + lmbda) / lmbda * jax.vmap(jax.grad(witness))(y)
