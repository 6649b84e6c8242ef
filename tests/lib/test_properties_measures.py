"""Properties of flows between labelled sets, and of made-up ones."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    EXPONENTS,
    SEEDS,
    assert_within,
    draw_weights,
)

from lib.datasets.synthetic import gaussian_mixture, gaussians, rings, rings_even
from lib.mmd import (
    SLICED_KERNELS,
    target_value_and_grad,
)

pytestmark = pytest.mark.usefixtures("x64")
few = settings(max_examples=12, deadline=None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [1, 0.5, np.float64(1), np.float32(1)])
def test_plain_numbers_do_not_promote(dtype, number):
    x, y = jnp.zeros((2, 3, 2), dtype), jnp.zeros((3, 4, 2), dtype)
    for kernel, levels in itertools.product(SLICED_KERNELS.values(), (None, 3)):
        function = target_value_and_grad(kernel(number), num_directions=2, num_levels=levels)
        value, gradient = jax.eval_shape(function, x, y, jax.random.key(0))
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
    options = {"centers": centres, "radius": scale}
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
