"""Properties of flow matching, its solvers, the flow engine, made-up data and settings, at any
scale and in both dtypes, against loops in NumPy."""

import dataclasses
import math
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lib.runs.settings
from lib import flow_matching, gd, gd_images
from lib.datasets import synthetic
from lib.flow_matching import sampling
from lib.runs import open_run
from lib.runs.loop import DivergedError

DTYPES = st.sampled_from([np.float32, np.float64])
EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)
KEY = jax.random.key(0)


def few(examples):
    return settings(max_examples=examples, deadline=None)


def sample(rng, n, d, exponent, dtype):
    """Rows at a scale, the last the first again."""
    x = 10.0**exponent * rng.normal(size=(n, d))
    x[-1] = x[0]
    return x.astype(dtype)


# Flow matching


class Normal(NamedTuple):
    scale: Any  # [d]

    def sample(self, key, num):
        shape = num, len(self.scale)
        return self.scale[None] * jax.random.normal(key, shape, self.scale.dtype)

    def couple(self, key, x1):
        return self.sample(key, len(x1))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, times):
        return nn.Dense(images.shape[-1])(images) + times[:, None, None, None]


@jax.jit
def matched(x0, x1, times, matrix):
    def constant(x, times):
        return x @ matrix

    loss, gradient = jax.value_and_grad(flow_matching.loss, argnums=(1, 2))(constant, x0, x1, times)
    source = Normal(jnp.abs(x1[0]))
    assert isinstance(source, flow_matching.Source)
    pairs = [flow_matching.couple(KEY, source, x1, kind) for kind in ("independent", "optimal")]
    found = flow_matching.optimal_permutation(x0, x1)
    return flow_matching.interpolate(x0, x1, times), loss, gradient, found, pairs


@few(12)
@given(st.sampled_from([(1, 1), (5, 3)]), DTYPES, EXPONENTS, SEEDS)
def test_paths_losses_and_couplings(shape, dtype, exponent, seed):
    """Paths and losses by their formulas; no permutation is cheaper than the optimal one, beyond
    the rounding of distances: 16 of |x|^2 + |y|^2 each (`lib.kernels.squared_distances`)."""
    (n, d), rng = shape, np.random.default_rng(seed)
    x0, x1 = (sample(rng, n, d, exponent, dtype) for _ in range(2))
    times, matrix = (rng.uniform(size=size).astype(dtype) for size in (n, (d, d)))
    times[0] = seed % 2
    with jax.enable_x64(True):
        found = matched(*map(jnp.asarray, (x0, x1, times, matrix)))
        path, loss, gradients, order, pairs = jax.tree.map(np.asarray, found)
    eps, wide = np.finfo(dtype).eps, [a.astype(float) for a in (x0, x1, times, matrix)]
    assert {leaf.dtype for leaf in (path, loss, *gradients, *pairs)} == {np.dtype(dtype)}
    x0, x1, times, matrix = wide
    t = times[:, None]
    size = (1 - t) * np.abs(x0) + t * np.abs(x1)
    assert np.all(np.abs(path - ((1 - t) * x0 + t * x1)) <= 3 * eps * size)
    np.testing.assert_array_equal(path[0], (x0, x1)[seed % 2][0])
    residuals = ((1 - t) * x0 + t * x1) @ matrix - (x1 - x0)
    terms = size @ np.abs(matrix) + np.abs(x1) + np.abs(x0)
    bound = (n + d + 2 * (d + 6)) * eps * np.mean(terms**2)
    assert abs(loss - np.mean(residuals**2)) <= bound
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(n))
    distances = np.square(x0[:, None] - x1[None]).sum(axis=2)
    norms = np.square(x0).sum(axis=1).max() + np.square(x1).sum(axis=1).max()
    rows = np.arange(n)
    cheapest = min(distances[list(p), rows].sum() for p in permutations(range(n)))
    assert distances[order, rows].sum() <= cheapest + 2 * n * 16 * eps * 4 * norms
    assert sorted(map(tuple, pairs[0])) == sorted(map(tuple, pairs[1]))


@partial(jax.jit, static_argnames=("num", "flip"))
def batches(key, images, num, flip):
    return flow_matching.draw_batch(key, images, num, augment_flip=flip)


@few(12)
@given(
    st.sampled_from([((1, 1, 1, 1), False, True), ((5, 2, 3, 2), True, False)]),
    st.booleans(),
    SEEDS,
)
def test_batches_are_of_the_images(case, uint8, seed):
    """Each row is an image or its mirror image; uint8 are mapped to [-1, 1], in float32."""
    (shape, *flips), rng = case, np.random.default_rng(seed)
    flip = flips[uint8]
    images = rng.integers(0, 256, shape).astype(np.uint8 if uint8 else np.float64)
    with jax.enable_x64(True):
        batch = batches(jax.random.key(seed), jnp.asarray(images), 4, flip)
        batch = np.asarray(batch)
    assert (batch.dtype, batch.shape) == (np.float32 if uint8 else np.float64, (4, images[0].size))
    if uint8:
        batch = np.rint((batch.astype(float) + 1) * 127.5)
    both = np.concatenate([images, images[:, :, ::-1]] if flip else [images])
    known = {tuple(image.ravel().tolist()) for image in both}
    assert {tuple(row.tolist()) for row in batch} <= known


@pytest.mark.slow
@few(5)
@given(EXPONENTS)
def test_fits_are_finite_at_any_scale_in_float32_with_float64_on(exponent):
    images = 10.0**exponent * np.random.default_rng(0).normal(size=(4, 2, 1, 1))
    with jax.enable_x64(True):
        found = flow_matching.fit(
            KEY,
            Linear(),
            Normal(jnp.ones(2, np.float32)),
            jnp.asarray(images, np.float32),
            optimizer=optax.adam(1e-2),
            num_steps=3,
            coupling="optimal",
            batch_size=3,
            show_progress=False,
        )
    assert isinstance(found, flow_matching.FitResult)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all()


@few(5)
@given(EXPONENTS)
def test_training_keeps_its_dtypes(exponent):
    """With float64 on parameters stay float32, whatever the images are, and losses are as these."""
    rng, network, optimizer = np.random.default_rng(0), Linear(), optax.adam(1e-2)
    data = 10.0**exponent * rng.normal(size=(4, 2, 1, 1))
    options = {"optimizer": optimizer, "batch_size": 3, "coupling": "optimal"}
    with jax.enable_x64(True):
        step = partial(flow_matching.train_step, KEY, network=network, **options)
        for dtype in (np.float32, np.float64):
            images, source = jnp.asarray(data, dtype), Normal(jnp.ones(2, dtype))
            state = flow_matching.init(KEY, network, optimizer, images.shape[1:])
            following, value = jax.eval_shape(step, state, source, images)
            assert isinstance(following, flow_matching.TrainState)
            assert value.dtype == dtype
            kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, following))
            assert kinds[0] == kinds[1]
            evaluate = flow_matching.velocity(network, state.parameters, images.shape[1:])
            flat = evaluate(images.reshape(4, 2), jnp.zeros(4, dtype))
            whole = network.apply(state.parameters, images, jnp.zeros(4, dtype))
            np.testing.assert_array_equal(np.asarray(flat), np.asarray(whole).reshape(4, 2))


# Solvers


def relaxing(x, times):
    return -x * (1 + times[:, None])


@partial(jax.jit, static_argnums=1)
def solved(x0, num_steps):
    paths = [
        solve(relaxing, x0, num_steps, keep_path=True) for solve in (sampling.euler, sampling.heun)
    ]
    ends = [
        sampling.integrate(
            relaxing, x0, num_evaluations=count * num_steps, method=method, block_size=2
        )
        for method, count in sampling.EVALUATIONS_PER_STEP.items()
    ]
    return paths, ends, sampling.straightness(paths[0])


@few(10)
@given(
    st.sampled_from([(1, 1, np.float64, 1), (5, 3, np.float32, 4)]),
    EXPONENTS,
    SEEDS,
)
def test_solvers(case, exponent, seed):
    """Of x' = -(1 + t) x steps are NumPy's, off by 10 roundings of |x0| each. Straightness
    is that of the path."""
    (n, d, dtype, num_steps), rng = case, np.random.default_rng(seed)
    x0 = sample(rng, n, d, exponent, dtype)
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, solved(jnp.asarray(x0), num_steps))
    paths, ends, straightness = found
    assert isinstance(straightness, sampling.Straightness)
    leaves = *paths, *ends, *straightness
    assert {leaf.dtype for leaf in leaves} == {np.dtype(dtype)}
    eps, h, x0 = np.finfo(dtype).eps, 1 / num_steps, x0.astype(float)
    size = np.abs(x0).max()
    for path, end, heun in zip(paths, ends, (False, True)):
        x, states = x0, [x0]
        for i in range(num_steps):
            first = -x * (1 + i * h)
            second = -(x + h * first) * (1 + (i + 1) * h)
            x = x + h * ((first + second) / 2 if heun else first)
            states.append(x)
        bound = 10 * num_steps * eps * size
        np.testing.assert_allclose(path, states, rtol=0, atol=bound)
        np.testing.assert_allclose(end, states[-1], rtol=0, atol=bound)
    path = paths[0].astype(float)
    moved, moves = path[-1] - path[0], np.diff(path, axis=0)
    squared = np.mean(np.sum(moved**2, axis=1))
    value = np.mean(np.sum((moved - num_steps * moves) ** 2, axis=2))
    lengths = np.mean(np.linalg.norm(moves, axis=2).sum(axis=0))
    terms = np.mean(np.sum((np.abs(moved) + num_steps * np.abs(moves)) ** 2, axis=2))
    rounding = (n + d + 4 * num_steps + 8) * eps
    # Differences of states lose their digits: h |x| is far from 0 here, but for one step of -x.
    lost = rounding * (1 + num_steps) * size * (1 + np.sqrt(d))
    assert abs(straightness.value - value) <= rounding * terms + 2 * lost * np.sqrt(terms)
    assert abs(straightness.transport_cost - squared / d) <= rounding * squared / d + lost**2
    np.testing.assert_allclose(straightness.normalised, value / squared, atol=10 * rounding)
    ratio = lengths / np.mean(np.linalg.norm(moved, axis=1))
    np.testing.assert_allclose(straightness.length_ratio, ratio, rtol=10 * rounding)


def test_no_path_has_no_ratio():
    still = sampling.straightness(jnp.ones((3, 2, 2)))
    assert (float(still.value), float(still.transport_cost)) == (0, 0)
    assert np.isnan(still.normalised)
    assert np.isnan(still.length_ratio)


# The engine


def quadratic(x, target, key):
    return jnp.sum(jnp.square(x - target)), 2 * (x - target)


@few(50)
@given(st.integers(1, 300), st.integers(1, 400))
def test_recorded_steps_are_multiples_and_the_last(n_epochs, every):
    expected = sorted({*range(0, n_epochs + 1, every), n_epochs})
    assert gd.recorded_steps(n_epochs, every).tolist() == expected


@few(8)
@given(st.sampled_from([(np.float32, 1, True), (np.float64, 3, False)]), EXPONENTS, SEEDS)
def test_descent_is_a_loop(case, exponent, seed):
    """Heavy ball in NumPy, off by 4 roundings a step; a schedule does not widen float32. Records
    are those of every step or of some; L-BFGS arrives."""
    dtype, every, schedule = case
    rng, eps, steps = np.random.default_rng(seed), np.finfo(dtype).eps, 7
    x0, target = (sample(rng, 6, 2, exponent, dtype).reshape(2, 3, 2) for _ in range(2))
    rate = falling if schedule else 0.2
    options = {"lr": rate, "m": 0.5, "show_progress": False}
    with jax.enable_x64(True):
        arguments = jnp.asarray(x0), jnp.asarray(target), quadratic, KEY
        found = gd.wasserstein_gradient_descent(*arguments, steps, record_every=every, **options)
        saved = gd_images.wasserstein_gradient_descent_save(
            *arguments, steps, save_interval=every, **options
        )
        optimizer = optax.sgd(rate, momentum=0.5)
        ends = [
            gd_images.wasserstein_gradient_descent(*arguments, steps, **options),
            gd_images.wasserstein_gradient_descent_optax(
                *arguments, optimizer, steps, show_progress=False
            ),
        ]
        arrived = gd.wasserstein_gradient_descent_lbfgs(*arguments, 12, show_progress=False)
        state = gd.flow_init(optimizer, jnp.asarray(x0))
        step = jax.jit(gd.flow_step(quadratic, optimizer))
        for _ in range(steps):
            state, _ = step(KEY, state, jnp.asarray(target))
        last = np.asarray(state.particles)
    assert isinstance(state, gd.FlowState)
    assert isinstance(found, gd.FlowResult)
    x, target, moving, states, losses = x0.astype(float), target.astype(float), 0, [], []
    for t in range(steps):
        states.append(x)
        losses.append(np.sum((x - target) ** 2))
        moving = 2 * (x - target) + 0.5 * moving
        x = x - (falling(t) if schedule else rate) * moving
    states.append(x)
    # Each step's rounding is carried on by factors below 1 in norm, but for a transient of 4.
    bound = 16 * (steps + 1) * eps * (np.abs(x0).max() + np.abs(target).max())
    assert found.losses.dtype == found.particles.dtype == last.dtype == dtype
    some = [states[i] for i in range(0, steps, every)][: steps // every]
    for result, expected in (
        (found, [states[i] for i in gd.recorded_steps(steps, every)]),
        (saved, [*some, x]),
        *((end, x) for end in ends),
    ):
        np.testing.assert_allclose(result[1], expected, rtol=0, atol=bound)
        np.testing.assert_allclose(
            result[0], losses, rtol=0, atol=12 * bound * np.sqrt(12 * max(losses)) + bound**2
        )
    np.testing.assert_allclose(last, x, rtol=0, atol=bound)
    # Newton's steps, once a pair of the length of rounding has been left behind.
    np.testing.assert_allclose(arrived.particles[-1], target, rtol=0, atol=bound)


def falling(step):
    return 0.2 * (1 - step / 7)


def test_a_flow_that_diverges_says_where_and_what_it_saved_is_discarded(tmp_path):
    run = open_run(tmp_path, "flows", "test", {}, seed=0)
    x = jnp.ones((1, 2, 1))
    with pytest.raises(DivergedError, match="NaN or infinity in step") as raised:
        gd.wasserstein_gradient_descent(
            x, 0 * x, quadratic, KEY, 300, lr=3.0, run=run, show_progress=False
        )
    assert np.isfinite(raised.value.state.particles).all()
    assert run.checkpoint.exists()
    run.discard_saved()
    assert not run.checkpoint.exists()


# Made-up data


@few(8)
@given(st.sampled_from([(1, 1, False), (3, 4, True)]), EXPONENTS, SEEDS)
def test_made_up_points_lie_where_they_should(case, exponent, seed):
    """Rings at their radius; Gaussians and mixtures move and stretch with their means and scales,
    for one key. In the dtype that jax works in."""
    (num, n, x64), rng = case, np.random.default_rng(seed)
    scale = 10.0**exponent
    centres = scale * rng.normal(size=(num, 2))
    with jax.enable_x64(x64):
        dtype, key = jnp.zeros(()).dtype, jax.random.key(seed)
        circles = [
            synthetic.rings(key, n, centers=centres, radius=scale),
            synthetic.rings_even(n, centers=centres, radius=scale),
        ]
        means, factors = np.zeros((num, 2)), np.stack([np.diag([2.0, 3.0])] * num)
        noise = synthetic.gaussians(key, means, n, scale=1.0)
        moved = synthetic.gaussians(key, centres, n, scale=np.full(num, scale))
        turned = synthetic.gaussians(key, centres, n, covariances=scale**2 * factors**2)
        weights = np.eye(num)[-1] * 3
        drawn = synthetic.gaussian_mixture(key, weights, centres, np.full(num, scale), n)
        same = synthetic.gaussian_mixture(key, np.ones(1), means[:1], np.ones(1), n)
        arrays = [*circles, noise, moved, turned, drawn, same]
        arrays = [np.asarray(array) for array in arrays]
    assert {array.dtype for array in arrays} == {dtype}
    *circles, noise, moved, turned, drawn, same = (array.astype(float) for array in arrays)
    size = np.abs(centres).max() + scale * (1 + 3 * np.abs(noise).max())
    bound = 8 * np.finfo(dtype).eps * size
    for circle in circles:
        radii = np.linalg.norm(circle - centres[:, None], axis=2)
        np.testing.assert_allclose(radii, scale, rtol=0, atol=2 * bound)
    first = centres + np.array([scale, 0])
    np.testing.assert_allclose(circles[1][:, 0], first, rtol=0, atol=2 * bound)
    middle = centres[:, None]
    np.testing.assert_allclose(moved, middle + scale * noise, rtol=0, atol=bound)
    np.testing.assert_allclose(turned, middle + scale * noise * [2, 3], rtol=0, atol=bound)
    bound = bound + 8 * np.finfo(dtype).eps * scale * np.abs(same).max()
    np.testing.assert_allclose(drawn, centres[-1] + scale * same, rtol=0, atol=bound)


# Settings


@dataclasses.dataclass(frozen=True)
class Numbers:
    size: float
    rate: float


@few(60)
@given(st.floats(), st.floats(), st.lists(st.sampled_from("abcd"), max_size=3))
@example(1.0, math.nan, [])
def test_settings(size, rate, wanted):
    """Each check passes just the numbers that it names; NaN passes none."""
    numbers = Numbers(size, rate)
    copied = lib.runs.settings.settings_of(Numbers, numbers)
    assert repr(copied) == repr(numbers)
    for check, good, message in (
        (lib.runs.settings.check_sizes, rate >= 1, "rate must be at least 1"),
        (lib.runs.settings.check_positive, 0 < rate < math.inf, "rate must be positive"),
        (lib.runs.settings.check_not_negative, 0 <= rate < math.inf, "rate must be at least 0"),
    ):
        check(numbers)
        if good:
            check(numbers, "rate")
        else:
            with pytest.raises(ValueError, match=message):
                check(numbers, "rate")
    available = {"a": 1, "b": 2, "c": 3}
    if "d" in wanted:
        with pytest.raises(ValueError, match="no thing d; there are a, b, c"):
            lib.runs.settings.chosen(wanted, available, kind="thing")
    else:
        expected = tuple(wanted) or tuple(available)
        assert lib.runs.settings.chosen(wanted, available, kind="thing") == expected
