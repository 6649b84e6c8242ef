"""Properties of random Fourier and Nystrom features, and of the moments that features differ in.

An angle w . x / sigma is off by (d + 2) eps of its terms' magnitudes, and its cosine by no more,
nor by more than 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, EXPONENTS, SEEDS, assert_finite, assert_within, clouds

from lib.drmmd.nystrom import landmark_basis, nystrom_basis, nystrom_features
from lib.kernels import gaussian
from lib.numerics import cos_sin
from lib.rff import (
    features_of_projections,
    gaussian_frequencies,
    imq_frequencies,
    laplace_frequencies,
    mean_embedding,
    mmd_squared_rff,
    mmd_squared_rff_unbiased,
    project,
    random_fourier_features,
    uniform_phases,
)
from xp_dataset_distillation.moments import moment_differences

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
few = settings(max_examples=12, deadline=None)
NUM = 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2)])
def test_plain_numbers_do_not_promote(dtype, number):
    x, frequencies = jnp.ones((3, 2), dtype), jnp.ones((5, 2), np.float32)
    for phases in (None, jnp.ones(5, np.float32)):
        for features in (random_fourier_features, mean_embedding):
            assert features(x, frequencies, number, phases=phases).dtype == dtype
    embedding = jnp.ones(10, dtype)
    assert mmd_squared_rff_unbiased(embedding, embedding, number, number).dtype == dtype


@jax.jit
def cos_sin_and_slopes(angles):
    return jax.jvp(cos_sin, (angles,), (jnp.ones_like(angles),))


@many
@given(SEEDS, DTYPES, st.floats(-6, 30))
def test_cosines(seed, dtype, exponent):
    eps = np.finfo(dtype).eps
    angles = (10.0**exponent * np.random.default_rng(seed).normal(size=64)).astype(dtype)
    (cos, sin), (cos_slope, sin_slope) = cos_sin_and_slopes(angles)
    angles = angles.astype(np.float64)
    # As the docstring says: to 1e-7, past 1e4 to the rounding of the angle.
    bound = np.minimum(2, eps + 2 * eps * np.where(np.abs(angles) > 1e4, np.abs(angles), 0))
    for found, expected in ((cos, np.cos), (sin_slope, np.cos), (sin, np.sin)):
        assert_within(found, expected(angles), bound, dtype)
    assert_within(cos_slope, -np.sin(angles), bound, dtype)
    assert max(np.abs(cos).max(), np.abs(sin).max()) <= 1 + eps


@partial(jax.jit, static_argnames=("d", "orthogonal"))
def draw_frequencies(key, d, orthogonal):
    kinds = gaussian_frequencies, laplace_frequencies, imq_frequencies
    return [draw(key, NUM, d, orthogonal=orthogonal) for draw in kinds], uniform_phases(key, NUM)


@few
@given(SEEDS, st.sampled_from([(2, True), (1, False)]))
def test_frequencies(seed, kind):
    d, orthogonal = kind
    drawn, phases = draw_frequencies(jax.random.key(seed), d, orthogonal)
    for frequencies in drawn:
        assert frequencies.shape == (NUM, d)
        # In float32 whatever is switched on: they depend on key and shape alone.
        assert_finite(frequencies, np.float32)
        if orthogonal:
            pairs = np.asarray(frequencies, np.float64)[:4].reshape(2, 2, 2)
            sizes = np.linalg.norm(pairs, axis=2).prod(axis=1)
            inner = (pairs[:, 0] * pairs[:, 1]).sum(axis=1)
            assert (np.abs(inner) <= 32 * np.finfo(np.float32).eps * sizes).all()
    assert_finite(phases, np.float32)
    assert (phases >= 0).all()
    assert (phases < 2 * np.pi).all()


@partial(jax.jit, static_argnames="block_size")
def fourier(x, y, w, v, bandwidth, frequencies, phases, block_size):
    options = {"block_size": block_size}
    embeddings = [
        mean_embedding(points, frequencies, bandwidth, weights=weights, **options)
        for points, weights in ((x, w), (y, v))
    ]

    def total(x, bandwidth):
        return random_fourier_features(x, frequencies, bandwidth, phases=phases).sum()

    return {
        "plain": random_fourier_features(x, frequencies, bandwidth),
        "phased": features_of_projections(project(x, frequencies), bandwidth, phases=phases),
        "gradient": jax.grad(total, argnums=(0, 1))(x, bandwidth)[0],
        "embeddings": embeddings,
        "equal": mean_embedding(x, frequencies, bandwidth, phases=phases, **options),
    }


@jax.jit
def from_embeddings(mu, nu):
    return mmd_squared_rff(mu, nu), mmd_squared_rff_unbiased(mu, nu, 3, 2.5)


@many
@given(clouds(shapes=[(1, 4, 2), (5, 7, 9)]))
def test_fourier_features(case):
    x, y, w, v = case.in_float64()
    n, d, eps, dtype = *x.shape, case.eps, case.x.dtype
    rng = np.random.default_rng(case.seed)
    frequencies = rng.normal(size=(NUM, d)).astype(np.float32)
    phases = rng.uniform(0, 6, size=NUM).astype(np.float32)
    arrays = jnp.asarray(frequencies), jnp.asarray(phases)
    found = fourier(*case.on_device(), case.bandwidth, *arrays, 2 if n == 5 else 1024)
    assert_finite(found, dtype)
    frequencies, phases = frequencies.astype(np.float64), phases.astype(np.float64)

    def features(points):
        angles = points @ frequencies.T / case.bandwidth
        size = np.abs(points) @ np.abs(frequencies).T / case.bandwidth
        error = np.minimum(2, (d + 4) * eps * (size + 6)) + 2 * eps
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(NUM)
        shifted = np.sqrt(2 / NUM) * np.cos(angles + phases)
        return both, shifted, np.sqrt(2 / NUM) * error

    plain, phased, error = features(x)
    twice = np.concatenate([error, error], axis=1)
    assert_within(found["plain"], plain, twice, dtype)
    assert_within(found["phased"], phased, error, dtype)
    assert_within(np.square(found["plain"]).sum(axis=1), np.ones(n), 4 * NUM * eps)
    rounding = (2 * len(x) + 2 * len(y) + 8) * eps
    assert_within(found["equal"], phased.mean(axis=0), error.mean(axis=0) + rounding, dtype)
    for embedding, points, weights in zip(found["embeddings"], (x, y), (w, v)):
        shares, (plain, _, error) = weights / weights.sum(), features(points)
        bound = shares @ np.concatenate([error, error], axis=1) + rounding
        assert_within(embedding, shares @ plain, bound, dtype)
    biased, unbiased = from_embeddings(*found["embeddings"])
    mu, nu = (np.asarray(embedding, np.float64) for embedding in found["embeddings"])
    squared = np.square(mu - nu).sum()
    assert_within(biased, squared, (2 * NUM + 4) * eps * squared, dtype)
    biases = (1 - mu @ mu) / (3 - 1) + (1 - nu @ nu) / (2.5 - 1)
    size = squared + (1 + mu @ mu) / 2 + (1 + nu @ nu) / 1.5
    assert_within(unbiased, squared - biases, (2 * NUM + 8) * eps * size, dtype)


@jax.jit
def nystrom(key, x, y, bandwidth):
    kernel = gaussian(bandwidth)
    whole, drawn = landmark_basis(kernel, y), nystrom_basis(key, kernel, y, 2)
    points = jnp.concatenate([y, x])
    return [(b, nystrom_features(kernel, b, points, block_size=3)) for b in (whole, drawn)]


@many
@given(clouds(shapes=[(6, 5, 1), (1, 4, 2)]))
def test_nystrom_features(case):
    x, y, *_ = case.in_float64()
    found = nystrom(jax.random.key(case.seed), *case.on_device()[:2], case.bandwidth)
    assert_finite(found, case.x.dtype)
    points = np.concatenate([y, x])
    squares = np.square(points[:, None] - points[None]).sum(axis=-1)
    gram = np.exp(-squares / (2 * case.bandwidth**2))
    for basis, features in found:
        landmarks, features = np.asarray(basis.landmarks), np.asarray(features, np.float64)
        rank = len(landmarks)
        at = [int(np.flatnonzero((case.y == row).all(axis=1))[0]) for row in landmarks]
        products = features @ features[at].T
        # At a landmark what is left out of K is below rank eps of its trace, in every direction.
        bound = 20 * rank**3 * case.eps
        assert_within(products[at], gram[np.ix_(at, at)], bound)
        # Elsewhere |k_x . v|^2 is at most the eigenvalue of v: the root of that.
        assert_within(products, gram[:, at], bound + np.sqrt(rank * bound))
        assert np.square(features).sum(axis=1).max() <= 1 + np.sqrt(rank * bound) + bound


compiled_differences = jax.jit(moment_differences)


@many
@given(SEEDS, DTYPES, EXPONENTS, st.sampled_from([(1, 1, 1), (7, 4, 3)]), st.booleans())
def test_moments(seed, dtype, exponent, shape, constant):
    (m, n, f), eps, rng = shape, np.finfo(dtype).eps, np.random.default_rng(seed)
    real, condensed = (10.0**exponent * rng.normal(size=(k, f)) for k in (m, n))
    if constant:
        real[:, 0] = real[0, 0]
    real, condensed = real.astype(dtype), condensed.astype(dtype)
    found = compiled_differences(real, condensed)
    real, condensed = real.astype(np.float64), condensed.astype(np.float64)
    std = np.where(np.ptp(real, axis=0) > 0, np.std(real, axis=0), 1)
    z = [(points - real.mean(axis=0)) / std for points in (real, condensed)]
    # z is off by roundings of its mean and spread, in units of the latter.
    units = np.abs(np.concatenate([real, condensed])).max(axis=0) / std
    highest = np.maximum(np.abs(z[0]).max(axis=0), np.abs(z[1]).max(axis=0))
    away = (m + 8) * eps * (units + highest)
    assume(away.max() < 0.1 * max(1, highest.max()))
    # A norm squares the fourth powers.
    assume(highest.max() ** 8 < 0.01 * np.finfo(dtype).max)
    expected, bound = [], []
    for p in (1, 2, 3, 4):
        expected.append(np.linalg.norm(np.mean(z[0] ** p, axis=0) - np.mean(z[1] ** p, axis=0)))
        moved = 2 * p * (highest + away) ** (p - 1) * away + (m + n + 8) * eps * highest**p
        bound.append(2 * np.linalg.norm(moved))
    assert_within(found.orders, expected, np.array(bound), dtype)
    covariances = [np.cov(points.T, bias=True).reshape(f, f) for points in z]
    difference = (covariances[0] - covariances[1]) * (1 - np.eye(f))
    moved = 8 * np.linalg.norm(highest + away) * np.linalg.norm(away)
    moved += 4 * (m + n + 8) * eps * np.linalg.norm(highest) ** 2
    assert_within(found.covariance, np.linalg.norm(difference), moved, dtype)
