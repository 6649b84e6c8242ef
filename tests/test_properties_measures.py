"""Properties of MMDs between measures on measures, and of made-up labelled sets.

The oracle is a loop over pairs of classes and directions, with the bounds of
`test_properties_sliced` for each cost; a kernel moves as its profile does over that interval. What
lies next to a jump of the gradient or to the infinite slope of Riesz has to be finite, no more.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    EXPONENTS,
    SEEDS,
    assert_finite,
    assert_within,
    draw_directions,
    draw_weights,
    equal,
    projection_rounding,
    walk,
)

from lib.sliced_wasserstein import random_directions
from lib.synthetic import gaussian_mixture, gaussians, rings, rings_even
from lib.wow import (
    mmd_squared_measures,
    sliced_gaussian,
    sliced_imq,
    sliced_laplace,
    sliced_riesz,
    subsample_classes,
    target_value_and_grad_gaussian,
    target_value_and_grad_imq,
    target_value_and_grad_laplace,
    target_value_and_grad_riesz,
    wow_value_and_grad,
)

COVERS = {
    "lib.wow": (
        "mmd_squared_measures", "sliced_gaussian", "sliced_imq", "sliced_laplace", "sliced_riesz",
        "subsample_classes", "target_value_and_grad_gaussian", "target_value_and_grad_imq",
        "target_value_and_grad_laplace", "target_value_and_grad_riesz", "wow_value_and_grad",
    ),
    "lib.synthetic": ("gaussian_mixture", "gaussians", "rings", "rings_even"),
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
few = settings(max_examples=12, deadline=None)


def profiles(name, h, c):
    """(K, dK/dc, roundings) of a cost c; h is a squared length, and 0.6 the power of Riesz."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "gaussian":
            return np.exp(-c / (2 * h)), -np.exp(-c / (2 * h)) / (2 * h), 4
        if name == "laplace":
            return np.exp(-c / h**0.5), -np.exp(-c / h**0.5) / h**0.5, 4
        if name == "imq":
            return (h + c) ** -0.5, -0.5 * (h + c) ** -1.5, 8
        size = np.where(c > 0, np.abs(np.log(c)), 0)
        return -(c**0.3), -0.3 * c**-0.7, 8 + 2 * size


KERNELS = {
    "gaussian": lambda h: sliced_gaussian(h),
    "laplace": lambda h: sliced_laplace(jnp.sqrt(h)),
    "imq": lambda h: sliced_imq(h),
    "riesz": lambda h: sliced_riesz(0.6),
}


@partial(jax.jit, static_argnames="block_size")
def measures(x, y, directions, a, b, h, block_size):
    options = {"x_weights": a, "y_weights": b, "block_size": block_size}
    found = {
        name: wow_value_and_grad(make(h), x, y, directions, **options)
        for name, make in KERNELS.items()
    }
    return mmd_squared_measures(sliced_gaussian(h), x, y, directions, **options), found


def gap(values):
    """The smallest distance of two of the values."""
    return np.inf if len(values) < 2 else np.diff(np.sort(values)).min()


def measures_by_loops(name, x, y, directions, a, b, h, eps, tiny):
    """MMD^2 and its Euclidean gradient in x over a_c, each with its bound."""
    p = 1 if name == "laplace" else 2
    everything, masses = [*x, *y], np.concatenate([a, -b])
    value, value_error = 0.0, 0.0
    gradient, gradient_error = np.zeros_like(x), np.zeros(len(x))
    for c, mu in enumerate(everything):
        for e, nu in enumerate(everything):
            bound, _ = projection_rounding(mu, nu, directions, p, eps, len(mu) + len(nu))
            lines = [(mu @ direction, nu @ direction) for direction in directions]
            walks = [walk(*line, equal(len(mu)), equal(len(nu)), p) for line in lines]
            cost = np.mean([cost for cost, _ in walks])
            # The very same projections; those of an equal class may round otherwise.
            bound = 0 if c == e else bound + tiny
            k, slope, roundings = profiles(name, h, np.float64(cost))
            ends = [
                profiles(name, h, np.maximum(cost + sign * (bound + 4 * eps * cost), 0))
                for sign in (1, -1)
            ]
            mass = masses[c] * masses[e]
            value += mass * k
            error = max(abs(end[0] - k) for end in ends) + roundings * eps * abs(k) + tiny
            value_error += abs(mass) * (error + 2 * len(everything) * eps * abs(k))
            if c >= len(x) or c == e or masses[e] == 0:
                continue
            if not np.isfinite([slope, *(end[1] for end in ends)]).all():
                gradient_error[c] = np.inf  # next to the infinite slope of Riesz
                continue
            push = np.mean([s[:, None] * d[None] for (_, s), d in zip(walks, directions)], axis=0)
            size = np.abs(push).max()
            gradient[c] += masses[e] * 2 * slope * push
            slope_error = max(abs(end[1] - slope) for end in ends) + 12 * eps * abs(slope)
            moved = (len(mu) + len(nu) + len(directions) + 8) * eps * size
            delta = projection_rounding(mu, nu, directions, 1, eps, 0)[0]
            moved += p * delta / len(mu)
            # Where points change places by rounding, or u - v its sign, nothing is promised.
            unclear = any(min(gap(u), gap(v)) < 2 * delta for u, v in lines)
            unclear |= p == 1 and any(np.abs(u[:, None] - v).min() < 2 * delta for u, v in lines)
            error = np.inf if unclear else slope_error * (size + moved) + abs(slope) * moved
            gradient_error[c] += 2 * abs(masses[e]) * error
    return value, value_error, gradient, gradient_error + tiny


MEASURES = st.sampled_from([(1, 2, 1, 3, 1), (3, 2, 3, 3, 2)])


@many
@given(SEEDS, DTYPES, EXPONENTS, MEASURES, st.booleans(), st.booleans())
def test_mmd_of_measures(seed, dtype, exponent, shape, relative, shared):
    c, e, n, m, d = shape
    rng, info, scale = np.random.default_rng(seed), np.finfo(dtype), 10.0**exponent
    x, y = ((scale * rng.normal(size=s)).astype(dtype) for s in ((c, n, d), (e, m, d)))
    if shared:
        x[-1] = x[0]
        y[0] = x[0, rng.permutation(m) % n]
    a, b = (draw_weights(rng, kind, k) for kind, k in (("zeros", c), ("random", e)))
    a, b = ((weights / weights.sum()).astype(dtype) for weights in (a, b))
    h = float(dtype(scale**2 * 10 ** rng.uniform(-2, 2) if relative else 10 ** rng.uniform(-6, 6)))
    directions = draw_directions(seed, 3, d, dtype)
    squared, found = measures(x, y, directions, a, b, h, 2 if c == 1 else None)
    x, y, a, b, directions = (z.astype(np.float64) for z in (x, y, a, b, directions))
    for name, (value, gradient) in found.items():
        arguments = name, x, y, directions, a, b, h, float(info.eps), float(info.tiny)
        expected, error, slope, slope_error = measures_by_loops(*arguments)
        assert_within(value, expected / 2, error / 2, dtype)
        if name == "gaussian":
            assert_within(squared, expected, error, dtype)
        held = (a > 0)[:, None, None]
        slope_error = np.where(held, n / 2 * slope_error[:, None, None], 0)
        assert_within(gradient, np.where(held, n / 2 * slope, 0), slope_error, dtype)


TARGETS = {
    "gaussian": target_value_and_grad_gaussian,
    "laplace": target_value_and_grad_laplace,
    "imq": target_value_and_grad_imq,
}


@jax.jit
def targets(x, y, key, h):
    options = {"n_projs": 2, "n_sample_batch": 2}
    bandwidths = {"gaussian": h, "laplace": jnp.sqrt(h), "imq": h}
    found = {
        name: target(x, y, key, h=bandwidths[name], **options) for name, target in TARGETS.items()
    }
    found["riesz"] = target_value_and_grad_riesz(x, y, key, r=0.6, **options)
    percentiles = target_value_and_grad_gaussian(x, y, key, h=h, num_levels=3, **options)
    key_directions, key_batch, _ = jax.random.split(key, 3)
    directions = random_directions(key_directions, 2, x.shape[-1], dtype=x.dtype)
    return found, percentiles, directions, subsample_classes(key_batch, y, 2)


@few
@given(SEEDS, DTYPES, EXPONENTS)
def test_published_targets(seed, dtype, exponent):
    rng, info, scale = np.random.default_rng(seed), np.finfo(dtype), 10.0**exponent
    x, y = ((scale * rng.normal(size=s)).astype(dtype) for s in ((2, 3, 2), (3, 4, 2)))
    h = float(dtype(scale**2))
    found, percentiles, directions, batch = targets(x, y, jax.random.key(seed), h)
    assert_finite((found, percentiles), dtype)
    for some, rows in zip(np.asarray(batch), y):
        chosen = {tuple(row) for row in some}
        assert len(chosen) == 2
        assert chosen <= {tuple(row) for row in rows}
    x, batch, directions = (np.asarray(z, np.float64) for z in (x, batch, directions))
    for name, (value, gradient) in found.items():
        expected, error, *_ = measures_by_loops(
            name, x, batch, directions, equal(2), equal(3), h, float(info.eps), float(info.tiny)
        )
        assert_within(value, expected / 2, error, dtype)
        assert gradient.shape == x.shape


# Made-up sets


@few
@given(SEEDS, EXPONENTS, st.sampled_from([1, 7]))
def test_made_up_sets_lie_where_they_are_said_to(seed, exponent, num):
    rng, eps, key = np.random.default_rng(seed), np.finfo(float).eps, jax.random.key(seed)
    scale = 10.0**exponent
    centres = scale * rng.normal(size=(2, 2))
    for points in (
        rings(key, num, centres=centres, radius=scale),
        rings_even(num, centres=centres, radius=scale),
    ):
        radii = np.linalg.norm(np.asarray(points) - centres[:, None], axis=-1)
        assert points.shape == (2, num, 2)
        assert_within(radii, np.full((2, num), scale), 8 * eps * (scale + np.abs(centres).max()))
    right, up = np.moveaxis(np.asarray(points) - centres[:, None], -1, 0)
    spacing = np.diff(np.unwrap(np.arctan2(up, right)))
    # An angle is off by what its point is, in units of the radius.
    bound = 32 * eps * (1 + np.abs(centres).max() / scale)
    assert_within(spacing, np.full((2, num - 1), 2 * np.pi / num), bound)
    unit = gaussians(key, 0 * centres, num, scale=1.0)
    for spread in ({"scale": scale}, {"covariances": scale**2 * np.tile(np.eye(2), (2, 1, 1))}):
        points = gaussians(key, centres, num, **spread)
        expected = centres[:, None] + scale * np.asarray(unit)
        size = np.abs(centres).max() + scale * np.abs(unit).max()
        assert_within(points, expected, 8 * eps * size, np.float64)
    weights = draw_weights(rng, "zeros", 3)
    drawn = gaussian_mixture(key, weights, scale * np.eye(3), np.zeros(3), num)
    component = np.argmax(drawn, axis=1)
    np.testing.assert_array_equal(drawn, (scale * np.eye(3))[component])
    assert (weights[component] > 0).all()
