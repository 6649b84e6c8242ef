"""Properties of random Fourier and Nystrom features.

An angle w . x / sigma is off by (d + 2) eps of its terms' magnitudes, and its cosine by no more,
nor by more than 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_finite, assert_within, clouds, drawn_clouds

from lib.drmmd.nystrom import landmark_basis, nystrom_features
from lib.kernels import gaussian
from lib.rff import (
    features_of_projections,
    frequency_projections,
    mean_embedding,
    mmd_squared_rff,
    random_fourier_features,
)

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
NUM = 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2)])
def test_plain_numbers_do_not_promote(dtype, number):
    x, frequencies = jnp.ones((3, 2), dtype), jnp.ones((5, 2), np.float32)
    for phases in (None, jnp.ones(5, np.float32)):
        for function in (random_fourier_features, mean_embedding):
            features = partial(function, frequencies=frequencies, bandwidth=number, phases=phases)
            assert jax.eval_shape(features, x).dtype == dtype
            assert jax.eval_shape(features, x.astype(jnp.bfloat16)).dtype == np.float32


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
        "phased": features_of_projections(
            frequency_projections(x, frequencies), bandwidth, phases=phases
        ),
        "gradient": jax.grad(total, argnums=(0, 1))(x, bandwidth)[0],
        "embeddings": embeddings,
        "equal": mean_embedding(x, frequencies, bandwidth, phases=phases, **options),
    }


@many
@given(clouds(shapes=[(1, 4, 2), (5, 7, 9)]))
def test_fourier_features(case):
    x, y, w, v = case.in_float64()
    n, d, eps, dtype = *x.shape, case.eps, case.x.dtype
    rng = np.random.default_rng(case.seed)
    frequencies = rng.normal(size=(NUM, d)).astype(np.float32)
    phases = rng.uniform(0, 6, size=NUM).astype(np.float32)
    arrays = jnp.asarray(frequencies), jnp.asarray(phases)
    outputs = fourier(*case.on_device(), case.bandwidth, *arrays, 2 if n == 5 else 1024)
    assert_finite(outputs, dtype)
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
    assert_within(outputs["plain"], plain, twice, dtype)
    assert_within(outputs["phased"], phased, error, dtype)
    assert_within(np.square(outputs["plain"]).sum(axis=1), np.ones(n), 4 * NUM * eps)
    rounding = (2 * len(x) + 2 * len(y) + 8) * eps
    assert_within(outputs["equal"], phased.mean(axis=0), error.mean(axis=0) + rounding, dtype)
    for embedding, points, weights in zip(outputs["embeddings"], (x, y), (w, v)):
        shares, (plain, _, error) = weights / weights.sum(), features(points)
        bound = shares @ np.concatenate([error, error], axis=1) + rounding
        assert_within(embedding, shares @ plain, bound, dtype)
    biased = mmd_squared_rff(*outputs["embeddings"])
    mu, nu = (np.asarray(embedding, np.float64) for embedding in outputs["embeddings"])
    squared = np.square(mu - nu).sum()
    assert_within(biased, squared, (2 * NUM + 4) * eps * squared, dtype)


@jax.jit
def nystrom(x, y, bandwidth):
    kernel, points = gaussian(bandwidth), jnp.concatenate([y, x])
    bases = [landmark_basis(kernel, landmarks) for landmarks in (y, y[:2])]
    return [(basis, nystrom_features(kernel, basis, points, block_size=3)) for basis in bases]


@drawn_clouds([(1, 4, 2), (6, 5, 1)])
@many
@given(st.data())
def test_nystrom_features(drawn, data):
    case = data.draw(drawn)
    x, y, *_ = case.in_float64()
    bases = nystrom(*case.on_device()[:2], case.bandwidth)
    assert_finite(bases, case.x.dtype)
    points = np.concatenate([y, x])
    squares = np.square(points[:, None] - points[None]).sum(axis=-1)
    gram = np.exp(-squares / (2 * case.bandwidth**2))
    for basis, features in bases:
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
