"""Flow matching, its solvers and the flow engine at any scale, in both dtypes, against NumPy."""

from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st
from strategies import DECADES, DTYPES, SEEDS, few, sample

from lib import flow_matching, gd
from lib.flow_matching import sampling
from lib.kernels import squared_distances

KEY = jax.random.key(0)


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
    drawn = flow_matching.draw_step(KEY, 0, source, x1[:, None, None], len(x1))
    return flow_matching.interpolate(x0, x1, times), loss, gradient, drawn


@few(12)
@given(st.sampled_from([(1, 1), (5, 3)]), DTYPES, DECADES, SEEDS)
def test_paths_losses_and_couplings(shape, dtype, exponent, seed):
    """Paths and losses by their formulas; no permutation is cheaper than the optimal one, beyond
    the rounding of distances: 16 of |x|^2 + |y|^2 each (`lib.kernels.squared_distances`)."""
    (n, d), rng = shape, np.random.default_rng(seed)
    x0, x1 = (sample(rng, n, d, exponent, dtype) for _ in range(2))
    times, matrix = (rng.uniform(size=size).astype(dtype) for size in (n, (d, d)))
    times[0] = seed % 2
    with jax.enable_x64(True):
        costs = squared_distances(jnp.asarray(x1), jnp.asarray(x0))
        order = flow_matching.optimal_permutation(costs)
        arrays = matched(*map(jnp.asarray, (x0, x1, times, matrix)))
        path, loss, gradients, drawn = jax.tree.map(np.asarray, arrays)
    eps, wide = np.finfo(dtype).eps, [a.astype(float) for a in (x0, x1, times, matrix)]
    assert {leaf.dtype for leaf in (path, loss, *gradients, *drawn[:3])} == {np.dtype(dtype)}
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
    assert (order.dtype, sorted(order)) == (np.int32, list(range(n)))
    distances = np.square(x0[:, None] - x1[None]).sum(axis=2)
    norms = np.square(x0).sum(axis=1).max() + np.square(x1).sum(axis=1).max()
    rows = np.arange(n)
    cheapest = min(distances[list(p), rows].sum() for p in permutations(range(n)))
    assert distances[order, rows].sum() <= cheapest + 2 * n * 16 * eps * 4 * norms
    assert {tuple(row) for row in drawn[1]} <= {tuple(row) for row in x1}


@few(5)
@given(DECADES)
def test_training_keeps_its_dtypes(exponent):
    """With float64 on parameters stay float32, whatever the images are, and losses are as these."""
    rng, network, optimizer = np.random.default_rng(0), Linear(), optax.adam(1e-2)
    data = 10.0**exponent * rng.normal(size=(4, 2, 1, 1))
    options = {"optimizer": optimizer, "batch_size": 3}
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
    return paths, ends


@few(10)
@given(st.sampled_from([(1, 1, np.float64, 1), (5, 3, np.float32, 4)]), DECADES, SEEDS)
def test_solvers(case, exponent, seed):
    """Of x' = -(1 + t) x steps are NumPy's, off by 10 roundings of |x0| each."""
    (n, d, dtype, num_steps), rng = case, np.random.default_rng(seed)
    x0 = sample(rng, n, d, exponent, dtype)
    with jax.enable_x64(True):
        solutions = jax.tree.map(np.asarray, solved(jnp.asarray(x0), num_steps))
    paths, ends = solutions
    assert {leaf.dtype for leaf in (*paths, *ends)} == {np.dtype(dtype)}
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


def test_straight_paths_are_straight_and_no_path_has_no_ratio():
    path = np.arange(3.0)[:, None, None] * [1.0, -2.0] + np.eye(2)
    straight = sampling.straightness(jnp.asarray(path, jnp.float32))
    assert isinstance(straight, sampling.Straightness)
    np.testing.assert_allclose(straight, [0, 0, 1, (2**2 + 4**2) / 2], atol=1e-6)
    still = sampling.straightness(jnp.ones((3, 2, 2)))
    assert (float(still.value), float(still.transport_cost)) == (0, 0)
    assert np.isnan(still.normalized)
    assert np.isnan(still.length_ratio)


def quadratic(x, target, key):
    return jnp.sum(jnp.square(x - target)), 2 * (x - target)


@few(50)
@given(st.integers(1, 300), st.integers(1, 400))
def test_recorded_steps_are_multiples_and_the_last(n_epochs, every):
    expected = sorted({*range(0, n_epochs + 1, every), n_epochs})
    assert gd.recorded_steps(n_epochs, every).tolist() == expected


@few(8)
@given(st.sampled_from([(np.float32, 1, True), (np.float64, 3, False)]), DECADES, SEEDS)
def test_descent_is_a_loop(case, exponent, seed):
    """Heavy ball in NumPy, off by 4 roundings per step; a schedule does not widen float32. Records
    are those of every step or of some; L-BFGS arrives."""
    dtype, every, schedule = case
    rng, eps, steps = np.random.default_rng(seed), np.finfo(dtype).eps, 7
    x0, target = (sample(rng, 6, 2, exponent, dtype).reshape(2, 3, 2) for _ in range(2))
    rate = falling if schedule else 0.2
    options = {"lr": rate, "m": 0.5, "show_progress": False}
    with jax.enable_x64(True):
        arguments = jnp.asarray(x0), jnp.asarray(target), quadratic, KEY
        result = gd.wasserstein_gradient_descent(*arguments, steps, record_every=every, **options)
        optimizer = optax.sgd(rate, momentum=0.5)
        arrived = gd.wasserstein_gradient_descent_lbfgs(*arguments, 12, show_progress=False)
        state = gd.flow_init(optimizer, jnp.asarray(x0))
        step = jax.jit(gd.flow_step(quadratic, optimizer))
        for _ in range(steps):
            state, _ = step(KEY, state, jnp.asarray(target))
        last = np.asarray(state.particles)
    assert isinstance(state, gd.FlowState)
    assert isinstance(result, gd.FlowResult)
    x, target, moving, states, losses = x0.astype(float), target.astype(float), 0, [], []
    for t in range(steps):
        states.append(x)
        losses.append(np.sum((x - target) ** 2))
        moving = 2 * (x - target) + 0.5 * moving
        x = x - (falling(t) if schedule else rate) * moving
    states.append(x)
    # Each step's rounding is carried on by factors below 1 in norm, except a transient of 4.
    bound = 16 * (steps + 1) * eps * (np.abs(x0).max() + np.abs(target).max())
    assert result.losses.dtype == result.particles.dtype == last.dtype == dtype
    recorded = [states[i] for i in gd.recorded_steps(steps, every)]
    np.testing.assert_allclose(result.particles, recorded, rtol=0, atol=bound)
    slack = 12 * bound * np.sqrt(12 * max(losses)) + bound**2
    np.testing.assert_allclose(result.losses, losses, rtol=0, atol=slack)
    np.testing.assert_allclose(last, x, rtol=0, atol=bound)
    # Newton's steps, once a pair of the length of rounding has been left behind.
    np.testing.assert_allclose(arrived.particles[-1], target, rtol=0, atol=bound)


def falling(step):
    return 0.2 * (1 - step / 7)
