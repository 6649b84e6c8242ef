"""Properties of covariance structures and their linear algebra, for any scale and dtype, against
NumPy.

Bounds: a sum of m terms, each a product of a few rounded factors, is off by at most about m eps
times the sum of the terms' absolute values.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import gmm, numerics
from lib.gmm import _linalg as linalg
from lib.gmm import covariances

DTYPES = st.sampled_from([np.float32, np.float64])
EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)
NAMES = "full", "tied", "diagonal", "spherical"


def few(examples):
    return settings(max_examples=examples, deadline=None)


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# Structures


@partial(jax.jit, static_argnums=2)
def structures(key, variances, num):
    """Of each name the structure and its normalisers; `low_rank` has a diagonal beside it."""
    makers = {name: getattr(covariances, name) for name in NAMES}
    if len(variances) > 1:
        makers["low_rank"] = covariances.low_rank(key, 1)
    made = {name: make(num, variances) for name, make in makers.items()}
    d = len(variances)
    return made, {name: covariances.log_normalizers(made[name], d) for name in made}


@few(15)
@given(
    st.sampled_from([(1, 1, np.float32), (3, 2, np.float64), (2, 5, np.float32)]), EXPONENTS, SEEDS
)
def test_structures_of_variances(case, exponent, seed):
    """Every covariance is diag(variances), their mean, or half of it and random loadings, whose
    determinant is by the matrix determinant lemma a sum of positive terms."""
    (num, d, dtype), rng = case, np.random.default_rng(seed)
    scale = 10.0**exponent
    variances = (scale**2 * rng.uniform(0.5, 2, d)).astype(dtype)
    wide, eps = variances.astype(float), np.finfo(dtype).eps
    expected = {
        "full": np.stack([np.diag(wide)] * num),
        "tied": np.diag(wide),
        "diagonal": np.stack([wide] * num),
        "spherical": np.full(num, wide.mean()),
    }
    with jax.enable_x64(True):
        found, normalisers = structures(jax.random.key(seed), jnp.asarray(variances), num)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, normalisers))} == {np.dtype(dtype)}
    low = found.pop("low_rank", None)
    for name, structure in found.items():
        np.testing.assert_allclose(structure.matrices(), expected[name], rtol=(d + 5) * eps)
        logs = np.log(np.full(d, wide.mean()) if name == "spherical" else wide)
        value, size = -(d * np.log(2 * np.pi) + logs.sum()) / 2, np.abs(logs).sum() + 2 * d
        assert np.all(np.abs(np.asarray(normalisers[name]) - value) <= (2 * d + 8) * eps * size)
    if low is None:
        return
    np.testing.assert_allclose(in_float64(low.scales) ** 2, [wide / 2] * num, rtol=5 * eps)
    for w, s, projection, normaliser in zip(*in_float64((*low, normalisers["low_rank"]))):
        # Sherman and Morrison's formula: of as many terms as there are dimensions, all positive.
        inner = 1 + np.sum(w[:, 0] ** 2 / s**2)
        np.testing.assert_allclose(projection, (w.T / s**2) / inner, rtol=(2 * d + 12) * eps)
        log_determinant = np.log(inner) + 2 * np.log(s).sum()
        value = -(d * np.log(2 * np.pi) + log_determinant) / 2
        size = np.abs(np.log(s)).sum() + np.log(inner) + 2 * d
        assert np.abs(normaliser - value) <= (2 * d + 12) * eps * size


@few(25)
@given(st.sampled_from([(1, 1), (3, 2), (2, 6)]), EXPONENTS, st.booleans(), SEEDS)
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


# Factors


@jax.jit
def all_products(x, weights, triangle, matrix, counts):
    panels, centres = linalg.weighted_gram(x, weights), x[:2]
    nearest = jnp.argmin(jnp.sum(jnp.square(x[:, None] - centres[None]), axis=2), axis=1)
    from_nearest = x - centres[nearest], nearest, centres
    shares = jnp.stack([weights, 1 - weights], axis=1)[:, : len(centres)]
    pairs = numerics.product(shares.T, shares)
    return {
        "product": numerics.product(x, matrix),
        "row_sums": linalg.row_sums(x),
        "triangular_product": linalg.triangular_product(x, triangle),
        "congruence": jnp.tril(linalg.congruence(triangle, matrix)),
        "symmetric": linalg.symmetric(panels),
        "lower_half": jnp.tril(linalg.lower_half(panels)),
        "expanded_distances": linalg.expanded_distances(x, x[:2]),
        "distances_from_nearest": linalg.distances_from_nearest(*from_nearest),
        "first_moments_about": linalg.first_moments_about(*from_nearest, shares),
        "pair_scatter": linalg.pair_scatter(pairs, centres),
        "over_responsible": linalg.over_responsible(lambda x, w: w @ x, x, weights),
        "per_point": linalg.per_point(x, counts),
        "where_components": linalg.where_components(counts > 0, x, 2 * x),
        "regularized": linalg.regularized(matrix, 0.5),
    }


@few(12)
@given(
    st.sampled_from([(1, 1, np.float64), (9, 3, np.float64), (5, 66, np.float32)]),
    EXPONENTS,
    st.booleans(),
    SEEDS,
)
def test_products_of_factors(case, exponent, same, seed):
    """Each against NumPy, off by at most 4 (n + d) roundings of the same sum of absolute values."""
    (n, d, dtype), rng = case, np.random.default_rng(seed)
    x = 10.0**exponent * rng.normal(size=(n, d))
    x[1:] = x[0] if same else x[1:]
    weights = rng.uniform(size=n) * rng.integers(0, 2, n)
    matrix = rng.normal(size=(d, d))
    triangle, counts = np.tril(rng.normal(size=(d, d))), rng.integers(0, 3, n)
    given_ = x, weights, triangle, matrix + matrix.T, counts
    given_ = [array.astype(dtype) for array in given_]
    with jax.enable_x64(True):
        found = all_products(*map(jnp.asarray, given_))

    def plain(x, weights, triangle, matrix, counts, sign=-1):
        gram, nonzero = (x * weights[:, None]).T @ x, np.where(counts > 0, counts, 1)[:, None]
        norms = (x * x).sum(axis=1)
        shares = np.stack([weights, 1 - weights], axis=1)[:, : len(x[:2])]
        differences = x[:, None] + sign * x[:2]
        pairs = np.einsum("nk,nl->kl", shares, shares)
        return {
            "product": x @ matrix,
            "row_sums": x.sum(axis=1),
            "triangular_product": x @ triangle.T,
            "congruence": np.tril(triangle @ matrix @ triangle.T),
            "symmetric": gram,
            "lower_half": np.tril(gram),
            "expanded_distances": norms[:, None] + norms[None, :2] + sign * 2 * (x @ x[:2].T),
            "distances_from_nearest": np.square(differences).sum(axis=2),
            "first_moments_about": np.einsum("nk,nkd->kd", shares, differences),
            "pair_scatter": np.einsum(
                "kl,kli,klj->ij", pairs / 2, differences[:2], differences[:2]
            ),
            "over_responsible": weights @ x,
            "per_point": x / nonzero,
            "where_components": np.where(counts[:, None] > 0, x, 2 * x),
            "regularized": matrix + 0.5 * np.eye(d),
        }

    expected = plain(*in_float64(given_))
    sizes = plain(*map(np.abs, in_float64(given_)), sign=1)
    for name, value in found.items():
        assert value.dtype == dtype, name
        bound = 4 * (n + d) * np.finfo(dtype).eps * sizes[name]
        assert np.all(np.abs(np.asarray(value) - expected[name]) <= bound), name
    assert np.all(np.asarray(found["expanded_distances"]) >= 0)
    assert linalg.is_lost(jnp.array([9e3, 2e4]), 1e-7).tolist() == [False, True]


jit_factorize = jax.jit(linalg.factorize)
jit_floor = jax.jit(linalg.floor_variances)


@few(20)
@given(st.sampled_from([1, 2, 5]), DTYPES, EXPONENTS, st.integers(0, 5), SEEDS)
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
        found = jit_factorize(jnp.asarray(covariance))
        floored = jit_floor(jnp.asarray(variances), jnp.zeros((), dtype))
    assert {leaf.dtype for leaf in (*found, *floored)} == {np.dtype(dtype)}
    cholesky, inverse, ridge = in_float64(found)
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
