"""Covariance structures of Gaussian mixtures: full, tied, diagonal, spherical, low-rank + diagonal.

A structure is a NamedTuple of factors, made once for each set of parameters; the methods of
`Covariance` are all that densities, EM and sampling need of it.

Moments are taken about each component's own mean, and distances from the nearest one, so that how
far the components lie apart costs no digits. What a mean moves by in a step is subtracted from the
second moments; where that leaves nothing but rounding (`is_lost`), only the mean moves, which does
not lower the likelihood, and the covariance stays as it is: its ridge is then infinite. The next
step computes it, about the new mean.

Full and tied moments are taken in the coordinates z = L^-1 (x - mu) of the covariance L L' that the
E-step has just used, where they are near the identity. That product is there anyway, a new mean is
mu + L E z, and a new covariance is L Cov(z) L': its error is relative in every direction, so that
float32 keeps eigenvalues that lie many orders below the largest.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from lib.gmm._linalg import (
    congruence,
    distances_from_nearest,
    draw_by_component,
    expanded_distances,
    factorize,
    first_moments_about,
    floor_variances,
    is_lost,
    over_responsible,
    pair_scatter,
    per_point,
    row_sums,
    symmetric,
    triangular_product,
    weighted_gram,
    where_components,
)
from lib.numerics import AnyArray, product

# Structures


@runtime_checkable
class Covariance(Protocol):
    """The covariances Sigma_k [d, d] of K components."""

    def mahalanobis(self, points: Array, means: AnyArray) -> tuple[Array, Any]:
        """(x_i - mu_k)' Sigma_k^-1 (x_i - mu_k) [b, K] of a block of points [b, d], and the
        residuals that `moments` sums up."""

    def moments(self, residuals: Any, responsibilities: Array) -> tuple[Array, Any]:
        """Sums over the rows of a block by their responsibilities [b, K]: first moments [K, d], and
        second ones in the structure's own form."""

    def m_step(
        self, means, counts, first, second, regularization, rounding
    ) -> tuple[Array, "Covariance", Array]:
        """The new means [K, d], covariances and ridges [K] from the old means, counts [K] and
        moments; the scalars `regularization` and `rounding` are those of `em.maximization`."""

    def sample_noise(self, key: Key[Array, ""], components: Int[Array, " B"]) -> Array:
        """Draws of N(0, Sigma_k), [B, d], k = `components[i]`."""

    def log_determinants(self) -> Array:
        """log|Sigma_k|, [K], or [1] where the covariance is tied."""

    def matrices(self) -> np.ndarray:
        """The covariances in scikit-learn's shapes."""


class Full(NamedTuple):
    """Sigma_k = L_k L_k': the factors L_k and their inverses, lower triangles [K, d, d]."""

    cholesky: Float[AnyArray, "K d d"]
    inverse: Float[AnyArray, "K d d"]

    def mahalanobis(self, points, means):
        def component(item):
            mean, inverse = item
            whitened = triangular_product(points - mean[None, :], inverse)
            return row_sums(jnp.square(whitened)), whitened

        squared, whitened = lax.map(component, (means, self.inverse))
        return squared.T, whitened

    def moments(self, whitened, responsibilities):
        def sums(z, weights):
            return product(weights, z), weighted_gram(z, weights)

        return lax.map(lambda item: over_responsible(sums, *item), (whitened, responsibilities.T))

    def m_step(self, means, counts, first, second, regularization, rounding):
        def component(item):
            mean, cholesky, inverse, count, shift, gram = item
            moment = symmetric(gram) / jnp.where(count > 0, count, 1)
            moment = moment - shift[:, None] * shift[None, :]
            covariance = congruence(cholesky, moment)
            new_cholesky, new_inverse, ridge = factorize(covariance, regularization)
            move = product(cholesky, shift)
            lost = is_lost(jnp.max(jnp.square(product(new_inverse, move))), rounding)
            updated = (count > 0) & ~lost
            return (
                jnp.where(count > 0, mean + move, mean),
                jnp.where(updated, new_cholesky, cholesky),
                jnp.where(updated, new_inverse, inverse),
                jnp.where(count > 0, jnp.where(lost, jnp.inf, ridge), 0),
            )

        shifts = per_point(first, counts)
        means, cholesky, inverse, ridge = lax.map(
            component, (means, self.cholesky, self.inverse, counts, shifts, second)
        )
        return means, Full(cholesky, inverse), ridge

    def sample_noise(self, key, components):
        num, d, _ = self.cholesky.shape
        noise = jax.random.normal(key, (len(components), d), self.cholesky.dtype)

        def draw(k, z):
            return triangular_product(z, self.cholesky[k])

        return draw_by_component(draw, noise, components, num)

    def log_determinants(self):
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.cholesky, axis1=1, axis2=2)), axis=1)

    def matrices(self):
        return np.stack([factor @ factor.T for factor in np.asarray(self.cholesky)])


class Tied(NamedTuple):
    """Sigma_k = L L' for every k: the factor and its inverse, lower triangles [d, d]."""

    cholesky: Float[AnyArray, "d d"]
    inverse: Float[AnyArray, "d d"]

    def mahalanobis(self, points, means):
        middle = jnp.mean(means, axis=0, keepdims=True)
        centers = product(means - middle, self.inverse.T)
        # The nearest mean by the linear discriminants: no second product of d^2 per point.
        scores = product(points - middle, product(centers, self.inverse).T)
        nearest = jnp.argmax(scores - row_sums(jnp.square(centers))[None, :] / 2, axis=1)
        whitened = triangular_product(points - means[nearest], self.inverse)
        residuals = whitened, nearest, centers
        return distances_from_nearest(*residuals), residuals

    def moments(self, residuals, responsibilities):
        whitened, nearest, centers = residuals
        # With m the mean of the mu_k by their shares r_k in a point of weight w:
        # sum_k r_k (x - mu_k)(x - mu_k)' = w (x - m)(x - m)' + sum_{k<l} r_k r_l / w D_kl D_kl',
        # D_kl = mu_k - mu_l. One Gram matrix, and of the pairs only their weights.
        weights = jnp.sum(responsibilities, axis=1)
        shares = responsibilities / jnp.where(weights > 0, weights, 1)[:, None]
        others = jnp.where(jnp.arange(len(centers))[None, :] == nearest[:, None], 0, shares)
        moved = product(others, centers) - row_sums(others)[:, None] * centers[nearest]
        gram = weighted_gram(whitened - moved, weights)
        first = first_moments_about(whitened, nearest, centers, responsibilities)
        return first, (gram, product(responsibilities.T, shares))

    def m_step(self, means, counts, first, second, regularization, rounding):
        (gram, pairs), shifts = second, per_point(first, counts)
        total = jnp.sum(counts)
        centers = product(means - jnp.mean(means, axis=0, keepdims=True), self.inverse.T)
        moved = product((counts[:, None] * shifts).T, shifts)
        moment = (symmetric(gram) + pair_scatter(pairs, centers) - moved) / total
        covariance = congruence(self.cholesky, moment)
        cholesky, inverse, ridge = factorize(covariance, regularization)
        moves = product(shifts, self.cholesky.T)
        squared = product(counts / total, jnp.square(product(moves, inverse.T)))
        lost = is_lost(jnp.max(squared), rounding)
        means = where_components(counts <= 0, means, means + moves)
        new = jax.tree.map(partial(jnp.where, lost), self, Tied(cholesky, inverse))
        return means, new, jnp.broadcast_to(jnp.where(lost, jnp.inf, ridge), counts.shape)

    def sample_noise(self, key, components):
        noise = jax.random.normal(key, (len(components), len(self.cholesky)), self.cholesky.dtype)
        return triangular_product(noise, self.cholesky)

    def log_determinants(self):
        return 2 * jnp.sum(jnp.log(jnp.diagonal(self.cholesky)))[None]

    def matrices(self):
        factor = np.asarray(self.cholesky)
        return factor @ factor.T


class Diagonal(NamedTuple):
    """Sigma_k = diag(scales_k^2): standard deviations [K, d]."""

    scales: Float[AnyArray, "K d"]

    def mahalanobis(self, points, means):
        def component(parameters):
            mean, scales = parameters
            # Differences, not an expanded square: a pixel may be constant in only one component.
            return row_sums(jnp.square((points - mean[None, :]) * (1 / scales)[None, :]))

        return lax.map(component, (means, self.scales)).T, (points, means)

    def moments(self, residuals, responsibilities):
        points, means = residuals

        def component(item):
            mean, weights = item

            def sums(points, weights):
                centered = points - mean[None, :]
                return product(weights, centered), product(weights, jnp.square(centered))

            return over_responsible(sums, points, weights)

        return lax.map(component, (means, responsibilities.T))

    def m_step(self, means, counts, first, second, regularization, rounding):
        shifts = per_point(first, counts)
        variances = per_point(second, counts) - jnp.square(shifts)
        variances, ridge = floor_variances(variances, regularization)
        lost = is_lost(jnp.square(shifts) / variances, rounding)
        empty, ridge = counts <= 0, jnp.where(jnp.any(lost, axis=1), jnp.inf, ridge)
        scales = jnp.where(empty[:, None] | lost, self.scales, jnp.sqrt(variances))
        means = where_components(empty, means, means + shifts)
        return means, Diagonal(scales), jnp.where(empty, 0, ridge)

    def sample_noise(self, key, components):
        shape = len(components), self.scales.shape[1]
        return self.scales[components] * jax.random.normal(key, shape, self.scales.dtype)

    def log_determinants(self):
        return 2 * jnp.sum(jnp.log(self.scales), axis=1)

    def matrices(self):
        return np.square(np.asarray(self.scales))


class Spherical(NamedTuple):
    """Sigma_k = scales_k^2 I: standard deviations [K], in d = `unit.size` dimensions.

    `unit` is a row of ones, which carries the dimension through `jax.jit`.
    """

    scales: Float[AnyArray, " K"]
    unit: Float[AnyArray, " d"]

    def mahalanobis(self, points, means):
        middle = jnp.mean(means, axis=0, keepdims=True)
        centers = means - middle
        nearest = jnp.argmin(expanded_distances(points - middle, centers), axis=1)
        residuals = points - means[nearest], nearest, centers
        squared = distances_from_nearest(*residuals)
        return squared / jnp.square(self.scales)[None, :], (residuals, squared)

    def moments(self, residuals, responsibilities):
        (differences, nearest, centers), squared = residuals
        first = first_moments_about(differences, nearest, centers, responsibilities)
        return first, jnp.sum(responsibilities * squared, axis=0)

    def m_step(self, means, counts, first, second, regularization, rounding):
        shifts = per_point(first, counts)
        moved = jnp.sum(jnp.square(shifts), axis=1)
        variances = (per_point(second, counts) - moved) / means.shape[1]
        variances, ridge = floor_variances(variances[:, None], regularization)
        lost = is_lost(moved / (means.shape[1] * variances[:, 0]), rounding)
        empty = counts <= 0
        scales = jnp.where(empty | lost, self.scales, jnp.sqrt(variances[:, 0]))
        means = where_components(empty, means, means + shifts)
        ridge = jnp.where(empty, 0, jnp.where(lost, jnp.inf, ridge))
        return means, Spherical(scales, self.unit), ridge

    def sample_noise(self, key, components):
        shape = len(components), len(self.unit)
        return self.scales[components][:, None] * jax.random.normal(key, shape, self.scales.dtype)

    def log_determinants(self):
        return 2 * len(self.unit) * jnp.log(self.scales)

    def matrices(self):
        return np.square(np.asarray(self.scales))


class LowRank(NamedTuple):
    """Sigma_k = W_k W_k' + diag(scales_k^2), a mixture of factor analyzers.

    `loadings` W [K, d, r], `scales` [K, d]. A point of component k is mu_k + W_k u + noise with
    u ~ N(0, I_r); `projections` B = W' Sigma^-1 [K, r, d] gives the mean of u at a point. The
    M-step is that of Ghahramani and Hinton, The EM algorithm for mixtures of factor analyzers
    (1996), after the means have moved: it does not lower the likelihood, and needs O(K d r) memory.
    """

    loadings: Float[AnyArray, "K d r"]
    scales: Float[AnyArray, "K d"]
    projections: Float[AnyArray, "K r d"]

    def mahalanobis(self, points, means):
        def component(parameters):
            mean, loadings, scales, projections = parameters
            centered = points - mean[None, :]
            latent = product(centered, projections.T)
            # x' Sigma^-1 x = |x - W u|^2 / scales^2 + |u|^2: Woodbury's formula without its minus.
            rest = (centered - product(latent, loadings.T)) * (1 / scales)[None, :]
            return row_sums(jnp.square(rest)) + row_sums(jnp.square(latent)), latent

        squared, latent = lax.map(component, (means, *self))
        return squared.T, (latent, points, means)

    def moments(self, residuals, responsibilities):
        latent, points, means = residuals

        def component(item):
            u, mean, weights = item
            centered = points - mean[None, :]
            cross = product((u * weights[:, None]).T, centered)
            return product(weights, centered), (product(weights, jnp.square(centered)), cross)

        return lax.map(component, (latent, means, responsibilities.T))

    def m_step(self, means, counts, first, second, regularization, rounding):
        shifts = per_point(first, counts)
        squares, cross = (per_point(sums, counts) for sums in second)

        def component(item):
            shift, cross, loadings, projections = item
            # With S the covariance about the new mean: `cross` becomes B S, [r, d].
            cross = cross - product(projections, shift)[:, None] * shift[None, :]
            latent = product(cross, projections.T) - product(projections, loadings)
            latent = (latent + latent.T) / 2 + jnp.eye(len(latent), dtype=latent.dtype)
            factor = jax.scipy.linalg.cho_factor(latent, lower=True)
            new = jax.scipy.linalg.cho_solve(factor, cross)
            return new.T, jnp.sum(new * cross, axis=0)

        loadings, explained = lax.map(component, (shifts, cross, self.loadings, self.projections))
        variances = squares - jnp.square(shifts) - explained
        variances, ridge = floor_variances(variances, regularization)
        scales = jnp.sqrt(variances)
        new = LowRank(loadings, scales, latent_projections(loadings, scales))
        lost = is_lost(jnp.max(jnp.square(shifts) / variances, axis=1), rounding)
        empty = counts <= 0
        return (
            where_components(empty, means, means + shifts),
            jax.tree.map(partial(where_components, empty | lost), self, new),
            jnp.where(empty, 0, jnp.where(lost, jnp.inf, ridge)),
        )

    def sample_noise(self, key, components):
        num, d, rank = self.loadings.shape
        latent_key, rest_key = jax.random.split(key)
        latent = jax.random.normal(latent_key, (len(components), rank), self.loadings.dtype)
        rest = jax.random.normal(rest_key, (len(components), d), self.loadings.dtype)

        def draw(k, u):
            return product(u, self.loadings[k].T)

        return draw_by_component(draw, latent, components, num) + self.scales[components] * rest

    def log_determinants(self):
        inner = _inner_matrices(self.loadings, self.scales)[0]
        triangle = jnp.diagonal(jnp.linalg.cholesky(inner), axis1=1, axis2=2)
        return 2 * jnp.sum(jnp.log(triangle), axis=1) + 2 * jnp.sum(jnp.log(self.scales), axis=1)

    def matrices(self):
        pairs = zip(np.asarray(self.loadings), np.asarray(self.scales))
        return np.stack([w @ w.T + np.diag(s**2) for w, s in pairs])


def _inner_matrices(loadings, scales):
    """I + W' D^-1 W [K, r, r] and D^-1 W [K, d, r], D = diag(scales^2)."""
    scaled = loadings / jnp.square(scales)[:, :, None]
    inner = product(jnp.swapaxes(loadings, 1, 2), scaled)
    return inner + jnp.eye(inner.shape[1], dtype=inner.dtype)[None], scaled


def latent_projections(
    loadings: Float[AnyArray, "K d r"], scales: Float[AnyArray, "K d"]
) -> Float[Array, "K r d"]:
    """B_k = W_k' Sigma_k^-1 = (I + W' D^-1 W)^-1 W' D^-1, D = diag(scales_k^2)."""
    inner, scaled = _inner_matrices(jnp.asarray(loadings), jnp.asarray(scales))
    factor = jnp.linalg.cholesky(inner)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.swapaxes(scaled, 1, 2))


# Structures made from variances or matrices


def full(num_components: int, variances: Float[AnyArray, " d"]) -> Full:
    """Every component with the covariance diag(variances): where EM starts."""
    scales = jnp.sqrt(jnp.asarray(variances))
    factors = jnp.diag(scales), jnp.diag(1 / scales)
    return Full(*(jnp.broadcast_to(f, (num_components, *f.shape)) for f in factors))


def tied(num_components: int, variances: Float[AnyArray, " d"]) -> Tied:
    """As `full`, with one covariance for all components."""
    return Tied(*(factor[0] for factor in full(1, variances)))


def diagonal(num_components: int, variances: Float[AnyArray, " d"]) -> Diagonal:
    """As `full`, kept diagonal."""
    return Diagonal(jnp.broadcast_to(jnp.sqrt(variances), (num_components, len(variances))))


def spherical(num_components: int, variances: Float[AnyArray, " d"]) -> Spherical:
    """As `full`, with the mean variance for all features."""
    variances = jnp.asarray(variances)
    scale = jnp.sqrt(jnp.mean(variances))
    return Spherical(jnp.broadcast_to(scale, (num_components,)), jnp.ones_like(variances))


def low_rank(key: Key[Array, ""], rank: int):
    """The structure of rank `rank` + diagonal: a function as `full`.

    Half of the variance lies in random loadings, drawn from `key`: loadings 0 would stay 0.
    Raises ValueError unless 1 <= rank < d.
    """

    def structure(num_components: int, variances: Float[AnyArray, " d"]) -> LowRank:
        variances = jnp.asarray(variances)
        d = len(variances)
        if not 1 <= rank < d:
            raise ValueError(f"the rank must be at least 1 and below d = {d}, got {rank}")
        normal = jax.random.normal(key, (num_components, d, rank), jnp.float32)
        loadings = normal.astype(variances.dtype) * jnp.sqrt(variances / (2 * rank))[None, :, None]
        scales = jnp.broadcast_to(jnp.sqrt(variances / 2), (num_components, d))
        return LowRank(loadings, scales, latent_projections(loadings, scales))

    return structure


def from_matrices(matrices: Float[AnyArray, "*K d d"]) -> Full | Tied:
    """`Full` of covariances [K, d, d], `Tied` of one [d, d], in float64 on the host.

    Raises ValueError where one is not positive definite, or not symmetric to 1e-6 of the standard
    deviations' products: what is 0 up to rounding may differ from its mirror image.
    """
    matrices = np.asarray(matrices, np.float64)
    if matrices.ndim not in (2, 3) or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"covariances are [K, d, d] or [d, d], got shape {matrices.shape}")
    scales = np.sqrt(np.abs(np.diagonal(matrices, axis1=-2, axis2=-1)))
    largest = 1e-6 * scales[..., :, None] * scales[..., None, :]
    if not np.all(np.abs(matrices - np.swapaxes(matrices, -1, -2)) <= largest):
        raise ValueError("a covariance is not symmetric")
    try:
        cholesky = np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError as error:
        raise ValueError("a covariance is not positive definite") from error
    return from_cholesky(cholesky)


def from_cholesky(cholesky: Float[AnyArray, "*K d d"]) -> Full | Tied:
    """`Full` or `Tied` of lower triangular factors L, in float64 on the host."""
    inverse = invert_triangles(cholesky)
    return (Full if inverse.ndim == 3 else Tied)(np.asarray(cholesky, np.float64), inverse)


def invert_triangles(triangles: Float[AnyArray, "*K d d"]) -> Float[np.ndarray, "*K d d"]:
    """The inverses of lower triangles, in float64 on the host."""
    from scipy.linalg import solve_triangular

    triangles = np.asarray(triangles, np.float64)
    identity = np.eye(triangles.shape[-1])
    flat = triangles.reshape(-1, *identity.shape)
    inverses = [solve_triangular(triangle, identity, lower=True) for triangle in flat]
    return np.reshape(inverses, triangles.shape)
