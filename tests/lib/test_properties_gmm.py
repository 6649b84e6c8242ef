"""Properties of mixtures and their factors, for any structure, scale and dtype, against NumPy.

Bounds: a sum of m terms, each a product of a few rounded factors, is off by at most about m eps
times the sum of the terms' absolute values. `magnitudes` are those sums, in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from gaussian_mixtures import dense, in_float64, restricted
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_triangular
from scipy.special import logsumexp
from strategies import DECADES, DTYPES, SEEDS, few

from lib import gmm
from lib.gmm import _linalg as linalg
from lib.gmm import covariances

# (structure, points, components, dimension): each is compiled once for a dtype.
CASES = (
    ("full", 9, 3, 3),
    ("full", 1, 1, 1),
    ("tied", 7, 2, 5),
    ("diagonal", 5, 3, 1),
    ("spherical", 8, 3, 2),
    ("low_rank", 6, 2, 4),
)
WIDE = CASES[0], CASES[3], CASES[5]
EVALUATED = *((case, np.float32) for case in CASES), *((case, np.float64) for case in WIDE)
EACH_ONCE = (*((case, np.float64 if case in WIDE else np.float32) for case in CASES),)
EXPANDED = ("tied", "spherical")


def triangles(rng, *shape):
    """Lower triangles with a diagonal in [0.5, 2]."""
    d = shape[-1]
    diagonal = np.exp(rng.uniform(-0.7, 0.7, shape[:-1]))
    return np.tril(rng.normal(size=shape), -1) / np.sqrt(d) + diagonal[..., None] * np.eye(d)


def random_mixture(rng, structure, num, d, scale, dtype):
    """A mixture whose factors are numbers of `dtype`; some weights 0, some components equal."""
    if structure in ("full", "tied"):
        shape = (num, d, d) if structure == "full" else (d, d)
        covariance = gmm.from_cholesky((scale * triangles(rng, *shape)).astype(dtype))
    elif structure == "diagonal":
        covariance = gmm.Diagonal((scale * rng.uniform(0.5, 2, (num, d))).astype(dtype))
    elif structure == "spherical":
        covariance = gmm.Spherical((scale * rng.uniform(0.5, 2, num)).astype(dtype), np.ones(d))
    else:
        loadings = (scale * rng.normal(size=(num, d, 2))).astype(dtype)
        scales = (scale * rng.uniform(0.5, 2, (num, d))).astype(dtype)
        loadings, scales = (array.astype(np.float64) for array in (loadings, scales))
        with jax.enable_x64(True):
            covariance = gmm.LowRank(
                loadings, scales, np.asarray(gmm.latent_projections(loadings, scales))
            )
    weights, means = rng.dirichlet(np.ones(num)), scale * (3 + 2 * rng.normal(size=(num, d)))
    if num > 2:
        weights[0], means[1] = 0, means[2]
        weights /= weights.sum()
    return gmm.Mixture(*(array.astype(dtype) for array in (weights, means)), covariance)


def random_points(rng, mixture, n):
    """Draws about the means, the last of them a mean itself, the last but one as the first."""
    means = np.asarray(mixture.means)
    points = means[rng.integers(len(means), size=n)]
    points = points + np.abs(means).mean() * rng.normal(size=points.shape)
    points[-2:-1], points[-1] = points[:1], means[-1]
    return points.astype(means.dtype)


def absolute_factor(mixture, k):
    """|A| [m, d] where the Mahalanobis distance is computed as |A x|^2."""
    structure, d = in_float64(mixture.covariance), mixture.means.shape[1]
    match structure:
        case gmm.Full():
            return np.abs(structure.inverse[k])
        case gmm.Tied():
            return np.abs(structure.inverse)
        case gmm.Diagonal() | gmm.Spherical():
            return np.diag(np.broadcast_to(1 / structure.scales[k], d))
    loadings, scales, projection = (np.abs(leaf[k]) for leaf in structure)
    return np.vstack([(np.eye(d) + loadings @ projection) / scales[:, None], projection])


def reference(mixture, points):
    """Joint log-densities [n, K] with their magnitudes, and the scores' terms [n, K, d] of each
    component with theirs."""
    points, means, weights = (in_float64(a) for a in (points, mixture.means, mixture.weights))
    center, (_, d) = means.mean(axis=0), means.shape
    joints, magnitudes, scores, sizes = [], [], [], []
    for k, covariance in enumerate(dense(mixture)):
        factor, absolute = np.linalg.cholesky(covariance), absolute_factor(mixture, k)
        z = solve_triangular(factor, (points - means[k]).T, lower=True)
        logs = np.log(np.diagonal(factor))
        weight = np.log(weights[k]) if weights[k] > 0 else -np.inf
        joints.append(weight - (z**2).sum(0) / 2 - logs.sum() - d / 2 * np.log(2 * np.pi))
        a = absolute @ (np.abs(points - center) + np.abs(means[k] - center)).T
        constants = 2 * np.abs(logs).sum() + d * np.log(2 * np.pi)
        magnitudes.append((a**2).sum(0) + constants + (0 if weight == -np.inf else abs(weight)))
        scores.append(-solve_triangular(factor.T, z).T)
        sizes.append((absolute.T @ a).T)
    stack = partial(np.stack, axis=1)
    return stack(joints), stack(magnitudes), stack(scores), stack(sizes)


@partial(jax.jit, static_argnames="block_size")
def evaluate(mixture, points, block_size):
    blocks = {"block_size": block_size}
    gradient = jax.grad(lambda points: jnp.sum(gmm.log_prob(mixture, points, **blocks)))
    prepared = gmm.prepare(mixture, points.dtype)
    return (
        gmm.component_log_prob(mixture, points, **blocks),
        gmm.log_prob(mixture, points, **blocks),
        gmm.responsibilities(mixture, points, **blocks),
        gradient(points),
        gmm.joint_log_densities(prepared, points)[0],
    )


@pytest.mark.parametrize("evaluated", [EACH_ONCE, slow(EVALUATED)], ids=["each once", "all"])
@few(20)
@given(st.data(), DECADES, SEEDS)
def test_densities_and_their_gradients(evaluated, data, exponent, seed):
    """Squares are off by 3 d + 2 roundings of their terms, logarithms and sums by fewer. An
    expanded square that is clipped at 0 is right to rounding, its gradient to the root of that."""
    case, dtype = data.draw(st.sampled_from(evaluated))
    (structure, n, num, d), rng = case, np.random.default_rng(seed)
    mixture = random_mixture(rng, structure, num, d, 10.0**exponent, dtype)
    points = random_points(rng, mixture, n)
    joint, magnitudes, scores, sizes = reference(mixture, points)
    density = logsumexp(joint, axis=1)
    eps = np.finfo(dtype).eps
    tolerance = (3 * d + 8) * eps * magnitudes
    worst = tolerance.max(axis=1) + 4 * num * eps
    with jax.enable_x64(True):
        mixture = gmm.cast(mixture, dtype)
        outputs = evaluate(mixture, jnp.asarray(points), 4)
    assert {leaf.dtype for leaf in (*jax.tree.leaves(mixture), *outputs)} == {np.dtype(dtype)}
    joints, densities, shares, gradient, block = map(np.asarray, outputs)
    possible = np.isfinite(joint)
    for result in (joints, block):
        assert np.all(result[~possible] == -np.inf)
        assert np.all(np.abs(result[possible] - joint[possible]) <= tolerance[possible])
    assert np.all(np.abs(densities - density) <= worst)
    expected = np.exp(joint - density[:, None])
    assert np.all(np.abs(shares - expected) <= np.expm1(2 * worst)[:, None])
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=4 * num * eps)
    score = np.einsum("nk,nkd->nd", expected, scores)
    slack = np.expm1(2 * worst) + (3 * d + 8) * eps
    slack = slack + np.sqrt(worst) * (structure in EXPANDED)
    assert np.isfinite(gradient).all()
    assert np.all(np.abs(gradient - score) <= slack[:, None] * sizes.max(axis=1))


@few(10)
@given(st.sampled_from(WIDE), SEEDS)
def test_the_order_of_coordinates_does_not_matter(case, seed):
    (structure, n, num, d), rng = case, np.random.default_rng(seed)
    mixture = random_mixture(rng, structure, num, d, 1.0, np.float64)
    points = random_points(rng, mixture, n)
    density, columns = logsumexp(reference(mixture, points)[0], axis=1), rng.permutation(d)
    with jax.enable_x64(True):
        moved = gmm.cast(gmm.permuted(mixture, columns), np.float64)
        permuted_density = np.asarray(evaluate(moved, jnp.asarray(points[:, columns]), 4)[1])
    np.testing.assert_allclose(permuted_density, density, rtol=1e-10, atol=1e-10)


# Covariance structures and their linear algebra


NAMES = "full", "tied", "diagonal", "spherical"


@partial(jax.jit, static_argnums=2)
def structures(key, variances, num):
    """Of each name the structure; one dimension has none of low rank."""
    makers = {name: getattr(covariances, name) for name in NAMES}
    if len(variances) > 1:
        makers["low_rank"] = covariances.low_rank(key, 1)
    return {name: make(num, variances) for name, make in makers.items()}


@few(15)
@given(
    st.sampled_from([(1, 1, np.float32), (3, 2, np.float64), (2, 5, np.float32)]), DECADES, SEEDS
)
def test_structures_of_variances(case, exponent, seed):
    """Every covariance is diag(variances), their mean, or half of it and random loadings."""
    (num, d, dtype), rng = case, np.random.default_rng(seed)
    variances = (10.0 ** (2 * exponent) * rng.uniform(0.5, 2, d)).astype(dtype)
    wide, eps = variances.astype(float), np.finfo(dtype).eps
    with jax.enable_x64(True):
        by_name = structures(jax.random.key(seed), jnp.asarray(variances), num)
    assert {leaf.dtype for leaf in jax.tree.leaves(by_name)} == {np.dtype(dtype)}
    low = by_name.pop("low_rank", None)
    for name, structure in by_name.items():
        expected = restricted(name, np.stack([np.diag(wide)] * num), np.full(num, 1 / num))
        np.testing.assert_allclose(structure.matrices(), expected, rtol=(d + 5) * eps)
    if low is None:
        return
    np.testing.assert_allclose(in_float64(low.scales) ** 2, [wide / 2] * num, rtol=5 * eps)
    for w, s, projection in zip(*in_float64(low)):
        # Sherman and Morrison's formula: of as many terms as there are dimensions, all positive.
        expected = (w.T / s**2) / (1 + np.sum(w[:, 0] ** 2 / s**2))
        np.testing.assert_allclose(projection, expected, rtol=(2 * d + 12) * eps)


@few(25)
@given(st.sampled_from([(1, 1), (3, 2), (2, 6)]), DECADES, st.booleans(), SEEDS)
def test_structures_of_matrices_and_triangles(case, exponent, isotropic, seed):
    """From Sigma to L, L^-1 and back; rounding makes no zero of a rotated matrix asymmetric."""
    (num, d), rng = case, np.random.default_rng(seed)
    scale = 10.0**exponent
    bases = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(num)]
    spectrum = np.full(d, 2.0) if isotropic else np.geomspace(1, 100, d)
    matrices = np.stack([np.linalg.inv((q / (scale**2 * spectrum)) @ q.T) for q in bases])
    for given_, kind in ((matrices, gmm.Full), (matrices[0], gmm.Tied)):
        structure = gmm.from_matrices(given_)
        assert type(structure) is kind
        cholesky, inverse = structure
        np.testing.assert_allclose(
            cholesky @ np.swapaxes(cholesky, -1, -2), given_, atol=1e-12 * 100 * scale**2
        )
        identity = np.broadcast_to(np.eye(d), given_.shape)
        np.testing.assert_allclose(inverse @ cholesky, identity, atol=1e-11)
        np.testing.assert_array_equal(covariances.invert_triangles(cholesky), inverse)
        np.testing.assert_array_equal(gmm.from_cholesky(cholesky).inverse, inverse)
    if d > 1:
        matrices[0, 0, 1] += 1e-4 * np.sqrt(matrices[0, 0, 0] * matrices[0, 1, 1])
        with pytest.raises(ValueError, match="not symmetric"):
            gmm.from_matrices(matrices)


jit_factorize = jax.jit(linalg.factorize)
jit_floor = jax.jit(linalg.floor_variances)


@few(20)
@given(st.sampled_from([1, 2, 5]), DTYPES, DECADES, st.integers(0, 5), SEEDS)
def test_factors_exist_whatever_the_rank(d, dtype, exponent, rank, seed):
    """L L' is the covariance and the ridge on its diagonal, and L^-1 its inverse. No pivot is
    within its rounding, d eps of the variance. The ridge is 0 where a matrix is well conditioned,
    and no more than two steps of ten beyond the first where it is singular."""
    rng, eps, rank = np.random.default_rng(seed), np.finfo(dtype).eps, min(rank, d)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0][:, :rank]
    covariance = 10.0 ** (2 * exponent) * (basis * rng.uniform(0.1, 1, rank)) @ basis.T
    covariance = covariance.astype(dtype)
    variances = np.diagonal(covariance)[None]
    with jax.enable_x64(True):
        factors = jit_factorize(jnp.asarray(covariance))
        floored = jit_floor(jnp.asarray(variances), jnp.zeros((), dtype))
    assert {leaf.dtype for leaf in (*factors, *floored)} == {np.dtype(dtype)}
    cholesky, inverse, ridge = in_float64(factors)
    assert ridge == 0 or rank < d
    pivots = np.square(np.diagonal(cholesky))
    assert np.all(pivots > 0.99 * d * eps * (np.diagonal(covariance) + ridge))
    largest = np.diagonal(covariance).astype(float).mean() if rank else 1.0
    assert ridge <= 1000 * d * eps * largest
    size = np.abs(cholesky) @ np.abs(cholesky).T
    error = np.abs(np.tril(cholesky @ cholesky.T - covariance - ridge * np.eye(d)))
    assert np.all(error <= (d + 4) * eps * size)
    residual = np.abs(inverse @ cholesky - np.eye(d))
    assert np.all(residual <= 4 * d * eps * (np.abs(inverse) @ np.abs(cholesky)))
    variances, extra = in_float64(floored)
    assert np.all(variances > 0)
    np.testing.assert_allclose(variances[0], np.diagonal(covariance) + extra[0], rtol=4 * eps)
    if rank == d:
        assert extra[0] == 0
