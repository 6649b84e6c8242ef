"""What the property tests draw, and the bounds on rounding error that they hold results to.

Shapes come from a short list, so that compiled programs serve again; everything else is drawn:
dtype, scale, seed, repeated points, weights. The numbers drawn are exact in the drawn dtype, so an
oracle in float64 sees the very same input.
"""

import itertools
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from hypothesis import settings

# n, m, d: one point, one dimension, and distances in both of their ways (d <= 8 and above).
SHAPES = ((1, 4, 1), (6, 5, 2), (5, 7, 9))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([np.float32, np.float64])
# Powers of ten.
EXPONENTS = st.floats(-6, 6)
DECADES = st.integers(-6, 6)


def few(examples):
    return settings(max_examples=examples, deadline=None)


class Clouds(NamedTuple):
    """Two weighted samples in `dtype`, a bandwidth, and the seed of whatever else a test draws."""

    x: np.ndarray
    y: np.ndarray
    x_weights: np.ndarray
    y_weights: np.ndarray
    bandwidth: float
    seed: int

    @property
    def eps(self) -> float:
        return float(np.finfo(self.x.dtype).eps)

    @property
    def tiny(self) -> float:
        return float(np.finfo(self.x.dtype).tiny)

    def on_device(self):
        return tuple(jnp.asarray(array) for array in self[:4])

    def in_float64(self):
        return tuple(array.astype(np.float64) for array in self[:4])


def draw_points(rng, kind, shape, other):
    """Rows of order 1; `other` is the sample drawn before, if any."""
    n = shape[0]
    if kind == "identical" and other is not None:
        return np.resize(other, shape)
    points = rng.normal(size=shape)
    if kind == "repeated":
        points = points[rng.integers(min(n, 2), size=n)]
        if other is not None:
            points[0] = other[-1]
    elif kind == "one point":
        points = np.tile(points[:1] if other is None else other[:1], (n, 1))
    elif kind == "far":
        points += 100.0
    elif kind == "near" and other is not None:
        points = np.resize(other, shape) + 1e-4 * points
    return points


def draw_weights(rng, kind, n):
    """Not negative, sum not 0 and not 1."""
    weights = rng.uniform(0.1, 1.0, size=n)
    if kind == "equal":
        weights[:] = 0.25
    elif kind == "zeros":
        weights[rng.permutation(n)[: n // 2]] = 0
    elif kind == "one":
        weights[:] = 0
        weights[rng.integers(n)] = 3.0
    elif kind == "uneven":
        weights *= 10.0 ** rng.uniform(-5, 2, size=n)
    return weights


POINTS = st.sampled_from(["normal", "normal", "identical", "repeated", "one point", "far", "near"])
WEIGHTS = st.sampled_from(["equal", "random", "zeros", "one", "uneven"])


@st.composite
def clouds(draw, *, shapes=SHAPES, dtypes=DTYPES, points=POINTS, weights=WEIGHTS):
    """`Clouds` of scale 1e-6 to 1e6; the bandwidth is near the scale, or anything in that range."""
    n, m, d = draw(st.sampled_from(shapes))
    dtype, seed, scale = draw(dtypes), draw(SEEDS), 10.0 ** draw(EXPONENTS)
    rng, kind = np.random.default_rng(seed), draw(points)
    x = draw_points(rng, kind, (n, d), None)
    y = draw_points(rng, kind, (m, d), x)
    x_weights, y_weights = (draw_weights(rng, draw(weights), size) for size in (n, m))
    relative = draw(st.booleans())
    bandwidth = scale * 10.0 ** rng.uniform(-2, 2) if relative else 10.0 ** draw(EXPONENTS)
    return Clouds(
        *((scale * sample).astype(dtype) for sample in (x, y)),
        *(w.astype(dtype) for w in (x_weights, y_weights)),
        float(dtype(bandwidth)),
        seed,
    )


def clouds_each_once(shapes=SHAPES):
    """`clouds` of every shape in one dtype, float64 and float32 in turn: a program for each."""
    dtypes = itertools.cycle((np.float64, np.float32))
    return st.one_of(
        *(clouds(shapes=[shape], dtypes=st.just(dtype)) for shape, dtype in zip(shapes, dtypes))
    )


def drawn_clouds(shapes=SHAPES):
    """Parametrizes a test by `drawn`: `clouds_each_once`, and, slow, `clouds` of all kinds."""
    cases = [clouds_each_once(shapes), slow(clouds(shapes=list(shapes)))]
    return pytest.mark.parametrize("drawn", cases, ids=["each once", "all"])


def assert_within(found, expected, bound, dtype=None):
    """Asserts that `found` is finite, of the shape of `expected`, of `dtype` if given, and off by
    at most `bound`, entry by entry."""
    assert dtype is None or found.dtype == dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.abs(found - expected)
    assert (error <= bound).all(), f"off by {error}, allowed {bound}: {found}, not {expected}"


def assert_finite(tree, dtype):
    """Asserts that all floating point leaves are finite and of `dtype`."""
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == dtype
            assert np.isfinite(np.asarray(leaf)).all()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def sample(rng, n, d, exponent, dtype, same=False):
    """Rows at a scale, half of them twice, or all the same one."""
    x = 10.0**exponent * rng.normal(size=(n, d))
    x[n // 2 :] = x[: n - n // 2]
    return (np.repeat(x[:1], n, axis=0) if same else x).astype(dtype)
