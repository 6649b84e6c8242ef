"""Semidiscrete transport against exact plans, and on the line, where it is the quantile map."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from chunks import assert_same_bits, interrupt

from lib import runs
from lib.flow_matching import draw_step
from lib.flow_matching.semidiscrete import assign, fit_potentials

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


class Uniform(NamedTuple):
    """On [0, 1]^d."""

    corner: jax.Array

    def sample(self, key, num):
        return jax.random.uniform(key, (num, len(self.corner)))

    def couple(self, key, x1):
        return self.sample(key, len(x1))


def fitted(points, num_steps=1500, **options):
    source = Uniform(jnp.zeros(points.shape[1]))
    options = {"batch_size": 64, "show_progress": False} | options
    return source, fit_potentials(KEY, source, points, num_steps=num_steps, **options)


def test_assignments_are_the_least_of_all_pairs():
    x0, points = (jnp.asarray(RNG.normal(size=(n, 3)), jnp.float32) for n in (30, 11))
    values = jnp.asarray(RNG.normal(size=11), jnp.float32)
    costs = np.square(np.asarray(x0)[:, None] - np.asarray(points)[None]).sum(axis=2)
    expected = (costs - np.asarray(values)[None]).argmin(axis=1)
    for block_size in (4, 100):
        np.testing.assert_array_equal(assign(x0, points, values, block_size=block_size), expected)


def test_on_the_line_every_point_gets_its_quantiles():
    """The uniform source: the j-th of n points gets [j / n, (j + 1) / n]."""
    points = jnp.asarray([[-3.0], [0.1], [0.2], [5.0]])
    _, potentials = fitted(points, num_steps=4000)
    x0 = (jnp.arange(400)[:, None] + 0.5) / 400
    index = np.asarray(assign(x0, points, potentials.values))
    assert np.mean(index == np.arange(400) // 100) > 0.98


def test_shares_are_equal_and_the_dual_is_the_cost_of_an_exact_plan():
    """30 points in the plane: shares of 20,000 fresh draws; the dual of 3,000 of them is below the
    cost of their exact plan (POT), and near it."""
    points = jnp.asarray(RNG.random((30, 2)) ** 2, jnp.float32)
    source, potentials = fitted(points, num_steps=4000)
    x0 = source.sample(jax.random.key(1), 20_000)
    index = np.asarray(assign(x0, points, potentials.values))
    np.testing.assert_allclose(np.bincount(index, minlength=30) / 20_000, 1 / 30, rtol=0.2)
    costs = ot.dist(np.asarray(x0[:3000], np.float64), np.asarray(points, np.float64))
    exact, values = ot.emd2([], [], costs, numItermax=10**6), np.asarray(potentials.values)
    dual = (costs - values).min(axis=1).mean() + values.mean()
    assert 0.98 * exact < dual <= exact
    assert potentials.duals[-1000:].mean() == pytest.approx(dual, rel=0.15)  # of other draws


def test_training_pairs_each_draw_with_its_image():
    """uint8 images, mapped to [-1, 1], and their labels."""
    images = jnp.asarray(RNG.integers(0, 256, (9, 1, 2, 1)), jnp.uint8)
    rows = np.asarray(images).reshape(9, 2) / 127.5 - 1
    values = jnp.asarray(RNG.normal(size=9), jnp.float32)
    source, labels = Uniform(jnp.zeros(2)), jnp.arange(9) + 10
    drawn = draw_step(KEY, 3, source, images, 40, labels, values)
    costs = np.square(np.asarray(drawn.x0)[:, None] - rows[None]).sum(axis=2) - np.asarray(values)
    np.testing.assert_allclose(drawn.x1, rows[costs.argmin(axis=1)], rtol=1e-6)
    np.testing.assert_array_equal(drawn.labels, labels[costs.argmin(axis=1)])


def test_interrupted_ascent_ends_in_the_same_bits(monkeypatch, tmp_path):
    points = jnp.asarray(RNG.normal(size=(9, 2)), jnp.float32)
    run = runs.open_run(tmp_path, "x", "potentials", {}, seed=0)
    _, whole = fitted(points, num_steps=40)
    interrupt(monkeypatch, partial(fitted, points, num_steps=40, run=run), 7, 21)
    assert_same_bits(fitted(points, num_steps=40, run=run)[1], whole)


def test_bad_settings_are_named():
    points = jnp.zeros((3, 2))
    for options, message in (
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"step_size": 0.0}, "step_size must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(points, **options)
    with pytest.raises(ValueError, match="two points are needed, got 1"):
        fitted(points[:1])
