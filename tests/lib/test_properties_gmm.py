"""Properties of mixtures and their factors, for any structure, scale and dtype, against NumPy.

Bounds: a sum of m terms, each a product of a few rounded factors, is off by at most about m eps
times the sum of the terms' absolute values. `magnitudes` are those sums, in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_triangular
from scipy.special import logsumexp

from lib import gmm
from lib.gmm import _linalg as linalg

# (structure, points, components, dimension): each is compiled once for a dtype.
CASES = (
    ("full", 9, 3, 3),
    ("full", 1, 1, 1),
    ("tied", 7, 2, 5),
    ("diagonal", 5, 3, 1),
    ("spherical", 8, 3, 2),
    ("low_rank", 6, 2, 4),
)
DRAWN = (*zip(CASES[::2], (np.float32, np.float64, np.float32)), (CASES[5], np.float64))
WIDE = CASES[0], CASES[3], CASES[5]
EVALUATED = *((case, np.float32) for case in CASES), *((case, np.float64) for case in WIDE)
EXPANDED = ("tied", "spherical")
EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)


def few(examples):
    return settings(max_examples=examples, deadline=None)


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


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def dense(mixture):
    """The covariances [K, d, d] from the factors."""
    (num, d), structure = mixture.means.shape, in_float64(mixture.covariance)
    match structure:
        case gmm.Full():
            return structure.cholesky @ np.swapaxes(structure.cholesky, 1, 2)
        case gmm.Tied():
            return np.stack([structure.cholesky @ structure.cholesky.T] * num)
        case gmm.Diagonal() | gmm.Spherical():
            scales = np.broadcast_to(structure.scales.reshape(num, -1), (num, d))
            return np.stack([np.diag(s**2) for s in scales])
    return np.stack([w @ w.T + np.diag(s**2) for w, s in zip(*structure[:2])])


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
    centre, (_, d) = means.mean(axis=0), means.shape
    joints, magnitudes, scores, sizes = [], [], [], []
    for k, covariance in enumerate(dense(mixture)):
        factor, absolute = np.linalg.cholesky(covariance), absolute_factor(mixture, k)
        z = solve_triangular(factor, (points - means[k]).T, lower=True)
        logs = np.log(np.diagonal(factor))
        weight = np.log(weights[k]) if weights[k] > 0 else -np.inf
        joints.append(weight - (z**2).sum(0) / 2 - logs.sum() - d / 2 * np.log(2 * np.pi))
        a = absolute @ (np.abs(points - centre) + np.abs(means[k] - centre)).T
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


@few(20)
@given(st.sampled_from(EVALUATED), EXPONENTS, SEEDS)
def test_densities_and_their_gradients(case_and_dtype, exponent, seed):
    """Squares are off by 3 d + 2 roundings of their terms, logarithms and sums by fewer. An
    expanded square that is clipped at 0 is right to rounding, its gradient to the root of that."""
    case, dtype = case_and_dtype
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
        found = evaluate(mixture, jnp.asarray(points), 4)
    assert {leaf.dtype for leaf in (*jax.tree.leaves(mixture), *found)} == {np.dtype(dtype)}
    joints, densities, shares, gradient, block = map(np.asarray, found)
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
def test_order_of_rows_components_and_coordinates(case, seed):
    """Each only permutes the densities; nor do they change by way of scikit-learn."""
    (structure, n, num, d), rng = case, np.random.default_rng(seed)
    mixture = random_mixture(rng, structure, num, d, 1.0, np.float64)
    points = random_points(rng, mixture, n)
    density = logsumexp(reference(mixture, points)[0], axis=1)
    rows, components, columns = (rng.permutation(size) for size in (n, num, d))
    covariance = jax.tree.map(lambda leaf: leaf[components], mixture.covariance)
    other = gmm.Mixture(mixture.weights[components], mixture.means[components], covariance)
    with jax.enable_x64(True):
        for moved, x in (
            (mixture, points[rows]),
            (other, points[rows]),
            (gmm.permuted(mixture, columns), points[rows][:, columns]),
        ):
            found = np.asarray(evaluate(gmm.cast(moved, np.float64), jnp.asarray(x), 4)[1])
            np.testing.assert_allclose(found, density[rows], rtol=1e-10, atol=1e-10)
    model = gmm.to_sklearn(mixture)
    positive = mixture.weights > 0
    if positive.all():  # scikit-learn warns of the logarithm of 0
        np.testing.assert_allclose(model.score_samples(points), density, rtol=1e-9, atol=1e-9)
    back = gmm.from_sklearn(model)
    np.testing.assert_array_equal(back.weights, mixture.weights)
    np.testing.assert_array_equal(back.means, mixture.means)
    np.testing.assert_allclose(dense(back), dense(mixture), rtol=1e-9, atol=1e-12)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float64)}


# Draws


@jax.jit
def draws(key, mixture, components, points):
    return (
        gmm.sample_components(key, mixture, components),
        gmm.sample(key, mixture, len(points)),
        gmm.sample_coupled(key, mixture, points),
    )


@few(10)
@given(st.sampled_from(DRAWN), EXPONENTS, SEEDS)
def test_draws_are_the_components_factors_times_one_noise(case_and_dtype, exponent, seed):
    """The noise is what the same key draws of a standard normal: L z + mu, row by row."""
    case, dtype = case_and_dtype
    (structure, n, num, d), rng = case, np.random.default_rng(seed)
    mixture = random_mixture(rng, structure, num, d, 10.0**exponent, dtype)
    points = random_points(rng, mixture, n)
    key, asked = jax.random.key(seed), rng.integers(num, size=n)
    plain = mixture.covariance
    match plain:
        case gmm.Full() | gmm.Tied():
            plain = jax.tree.map(lambda leaf: np.zeros_like(leaf) + np.eye(d), plain)
        case gmm.Diagonal() | gmm.Spherical():
            plain = plain._replace(scales=np.ones_like(plain.scales))
        case gmm.LowRank():
            plain = None
    with jax.enable_x64(True):
        mixture = gmm.cast(mixture, dtype)
        found = draws(key, mixture, jnp.asarray(asked), jnp.asarray(points))
        drawn, *pairs = jax.tree.map(np.asarray, found)
        if plain is not None:
            standard = gmm.cast(gmm.Mixture(*mixture[:2], plain), dtype)
            standard = standard._replace(means=0 * mixture.means)
            noise = in_float64(draws(key, standard, jnp.asarray(asked), jnp.asarray(points))[0])
            factors = np.linalg.cholesky(dense(mixture))
    assert drawn.dtype == dtype
    assert drawn.shape == (n, d)
    for x, components in pairs:
        assert (x.dtype, x.shape, components.shape) == (dtype, (n, d), (n,))
        assert np.isfinite(x).all()
        assert np.all(np.asarray(mixture.weights)[components] > 0)
    if plain is None:
        assert np.isfinite(drawn).all()
        return
    means = in_float64(mixture.means)[asked]
    expected = means + np.einsum("nij,nj->ni", factors[asked], noise)
    size = np.abs(means) + np.einsum("nij,nj->ni", np.abs(factors[asked]), np.abs(noise))
    assert np.all(np.abs(drawn - expected) <= 2 * (d + 3) * np.finfo(dtype).eps * size)


@few(12)
@given(st.sampled_from([(1, 1, 1), (300, 2, 2), (40, 7, 3)]), st.booleans(), SEEDS)
def test_draws_by_component_meet_their_own_factor(case, one, seed):
    """Whatever the sizes of the groups, also where one component asks for all rows; noise comes in
    the order of the sorted rows."""
    (n, num, d), rng = case, np.random.default_rng(seed)
    factors, noise = rng.normal(size=(num, d, d)), rng.normal(size=(n, d))
    components = np.full(n, num - 1) if one else rng.integers(num, size=n)
    with jax.enable_x64(True):
        drawn = by_component(jnp.asarray(factors), jnp.asarray(noise), jnp.asarray(components))
    order = np.argsort(components, kind="stable")
    expected = np.einsum("nij,nj->ni", factors[components[order]], noise)
    np.testing.assert_allclose(drawn[order], expected, rtol=1e-12, atol=1e-12)


@jax.jit
def by_component(factors, noise, components):
    def draw(k, z):
        return z @ factors[k].T

    return linalg.draw_by_component(draw, (noise,), components, len(factors))
