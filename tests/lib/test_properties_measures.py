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

from lib.datasets.synthetic import gaussian_mixture, gaussians, rings, rings_even
from lib.mmd import (
    SlicedKernel,
    mmd_squared_measures,
    sliced_gaussian,
    sliced_imq,
    sliced_laplace,
    sliced_riesz,
    subsample_classes,
    target_value_and_grad_gaussian,
    target_value_and_grad_gaussian_by_hand,
    target_value_and_grad_imq,
    target_value_and_grad_laplace,
    target_value_and_grad_riesz,
    wow_value_and_grad,
)
from lib.sliced_wasserstein import random_directions

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
    "gaussian": sliced_gaussian,
    "imq": sliced_imq,
    "riesz": lambda h: sliced_riesz(0.6),
    "laplace": lambda h: sliced_laplace(jnp.sqrt(h)),
}


@partial(jax.jit, static_argnames=("p", "block_size"))
def measures(x, y, directions, a, b, h, kind, p, block_size):
    """One program for all kernels of an order p: which of them is a number, `kind`."""
    kernels = [make(h) for make in KERNELS.values()]
    profiles = [kernel.profile for kernel in kernels if kernel.p == p]
    kernel = SlicedKernel(lambda cost: jax.lax.switch(kind, profiles, cost), p)
    options = {"x_weights": a, "y_weights": b, "block_size": block_size}
    squared = mmd_squared_measures(kernel, x, y, directions, **options) if p == 1 else None
    return wow_value_and_grad(kernel, x, y, directions, **options), squared


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
            # Of factors that underflow before they meet 1 / h^(3/2) at most, and n / a_c.
            flushed = 16 * tiny * (1 + h**-1.5) * (1 + size)
            gradient_error[c] += flushed / a[c] if a[c] > 0 else 0
    return value, value_error, gradient, gradient_error + tiny


MEASURES = st.sampled_from([(1, 2, 1, 3, 1), (3, 2, 3, 3, 2)])


@pytest.mark.slow
@many
@given(SEEDS, DTYPES, EXPONENTS, MEASURES, st.sampled_from(list(KERNELS)), st.booleans())
def test_mmd_of_measures(seed, dtype, exponent, shape, name, shared):
    c, e, n, m, d = shape
    rng, info, scale = np.random.default_rng(seed), np.finfo(dtype), 10.0**exponent
    x, y = ((scale * rng.normal(size=s)).astype(dtype) for s in ((c, n, d), (e, m, d)))
    if shared:
        x[-1] = x[0]
        y[0] = x[0, rng.permutation(m) % n]
    a, b = (draw_weights(rng, kind, k) for kind, k in (("zeros", c), ("random", e)))
    a, b = ((weights / weights.sum()).astype(dtype) for weights in (a, b))
    relative = scale**2 * 10 ** rng.uniform(-2, 2)
    h = float(dtype(relative if rng.random() < 0.5 else 10 ** rng.uniform(-6, 6)))
    directions = draw_directions(seed, 3, d, dtype)
    kind, p = (0, 1) if name == "laplace" else (list(KERNELS).index(name), 2)
    found = measures(x, y, directions, a, b, h, kind, p, 2 if c == 1 else None)
    (value, gradient), squared = found
    assert_finite(found, dtype)
    x, y, a, b, directions = (z.astype(np.float64) for z in (x, y, a, b, directions))
    arguments = name, x, y, directions, a, b, h, float(info.eps), float(info.tiny)
    expected, error, slope, slope_error = measures_by_loops(*arguments)
    assert_within(value, expected / 2, error / 2, dtype)
    if squared is not None:
        assert_within(squared, expected, error, dtype)
    held = (a > 0)[:, None, None]
    slope_error = np.where(held, n / 2 * slope_error[:, None, None], 0)
    assert_within(gradient, np.where(held, n / 2 * slope, 0), slope_error, dtype)


TARGETS = {
    "gaussian": target_value_and_grad_gaussian,
    "riesz": lambda *arguments, h, **options: target_value_and_grad_riesz(
        *arguments, r=0.6, **options
    ),
    "imq": target_value_and_grad_imq,
    "laplace": lambda *arguments, h, **options: target_value_and_grad_laplace(
        *arguments, h=jnp.sqrt(h), **options
    ),
}
# Two are compiled for each dtype.
COMPILED = {np.float32: ("gaussian", "riesz"), np.float64: ("imq", "laplace")}


@jax.jit
def targets(x, y, key, h):
    options = {"n_projs": 2, "n_sample_batch": 2}
    found = {name: TARGETS[name](x, y, key, h=h, **options) for name in COMPILED[x.dtype.type]}
    key_directions, key_batch, _ = jax.random.split(key, 3)
    directions = random_directions(key_directions, 2, x.shape[-1], dtype=x.dtype)
    return found, directions, subsample_classes(key_batch, y, 2)


@few
@given(SEEDS, DTYPES, EXPONENTS)
def test_published_targets(seed, dtype, exponent):
    rng, info, scale = np.random.default_rng(seed), np.finfo(dtype), 10.0**exponent
    x, y = ((scale * rng.normal(size=s)).astype(dtype) for s in ((2, 3, 2), (3, 4, 2)))
    h = float(dtype(scale**2))
    found, directions, batch = targets(x, y, jax.random.key(seed), h)
    assert_finite(found, dtype)
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [1, 0.5, np.float64(1), np.float32(1)])
def test_published_targets_keep_the_dtype(dtype, number):
    x, y = jnp.zeros((2, 3, 2), dtype), jnp.zeros((3, 4, 2), dtype)
    with_parameters = (
        partial(target_value_and_grad_gaussian, h=number),
        partial(target_value_and_grad_laplace, h=number),
        partial(target_value_and_grad_imq, h=number),
        partial(target_value_and_grad_riesz, r=number),
    )
    calls = [
        partial(target, num_levels=levels) for target in with_parameters for levels in (None, 3)
    ]
    for call in (*calls, partial(target_value_and_grad_gaussian_by_hand, h=number)):
        value, gradient = jax.eval_shape(partial(call, n_projs=2), x, y, jax.random.key(0))
        assert value.dtype == gradient.dtype == dtype


# Made-up sets


@partial(jax.jit, static_argnames="num")
def made_up(key, centres, scale, weights, num):
    covariances = scale**2 * jnp.tile(jnp.eye(2), (2, 1, 1))
    spread = (
        gaussians(key, centres, num, scale=scale),
        gaussians(key, centres, num, covariances=covariances),
    )
    unit = gaussians(key, jnp.zeros((2, 2)), num, scale=1.0)
    drawn = gaussian_mixture(key, weights, scale * jnp.eye(3), jnp.zeros(3), num)
    return unit, spread, drawn


@few
@given(SEEDS, EXPONENTS, st.sampled_from([1, 7]))
def test_made_up_sets_lie_where_they_are_said_to(seed, exponent, num):
    rng, eps, key = np.random.default_rng(seed), np.finfo(float).eps, jax.random.key(seed)
    scale = 10.0**exponent
    centres = scale * rng.normal(size=(2, 2))
    weights = draw_weights(rng, "zeros", 3)
    unit, spread, drawn = made_up(key, centres, scale, weights, num)
    options = {"centres": centres, "radius": scale}
    for points in (rings(key, num, **options), rings_even(num, **options)):
        radii = np.linalg.norm(np.asarray(points) - centres[:, None], axis=-1)
        assert points.shape == (2, num, 2)
        assert_within(radii, np.full((2, num), scale), 8 * eps * (scale + np.abs(centres).max()))
    right, up = np.moveaxis(np.asarray(points) - centres[:, None], -1, 0)
    spacing = np.diff(np.unwrap(np.arctan2(up, right)))
    # An angle is off by what its point is, in units of the radius.
    bound = 32 * eps * (1 + np.abs(centres).max() / scale)
    assert_within(spacing, np.full((2, num - 1), 2 * np.pi / num), bound)
    for points in spread:
        expected = centres[:, None] + scale * np.asarray(unit)
        size = np.abs(centres).max() + scale * np.abs(unit).max()
        assert_within(points, expected, 8 * eps * size, np.float64)
    component = np.argmax(drawn, axis=1)
    np.testing.assert_array_equal(drawn, (scale * np.eye(3))[component])
    assert (weights[component] > 0).all()
