"""The flow engine against plain loops; records, chunks, and what survives a stop."""

import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from chunks import record_chunks, stop_after

from lib import gd, gd_images, runs
from lib.gd import (
    FlowResult,
    flow_init,
    flow_step,
    recorded_steps,
    wasserstein_gradient_descent,
    wasserstein_gradient_descent_lbfgs,
)
from lib.runs import files
from lib.runs.console import Interrupted
from lib.runs.files import RunFileError
from lib.runs.loop import DivergedError

KEY = jax.random.key(0)
x64 = pytest.mark.usefixtures("x64")


def quadratic(x, y, key):
    """Of curvatures 1, 2, ...: no two coordinates move alike."""
    curvature = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return 0.5 * jnp.sum(curvature * (x - y) ** 2), curvature * (x - y)


def noisy(x, y, key):
    noise = jax.random.normal(key, x.shape, x.dtype)
    gradient = jnp.sin(x) - y + noise
    return jnp.sum(gradient**2), gradient


def start(shape=(2, 3, 2), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)]


def flow(target=noisy, n_epochs=13, lr=0.1, m=0.5, x0=None, y=None, rng=KEY, **options):
    x, z = start()
    return wasserstein_gradient_descent(
        x if x0 is None else jnp.asarray(x0),
        z if y is None else y,
        target,
        rng,
        n_epochs,
        lr,
        m,
        **options,
    )


def assert_same_bits(a, b):
    for u, v in zip(a, b):
        assert isinstance(u, np.ndarray)
        assert u.dtype == v.dtype
        np.testing.assert_array_equal(u, v)


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run of `flow()`, every step kept."""
    return flow()


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "flow", {"m": 0.5}, seed=0)


# What a step is


@x64
@pytest.mark.parametrize("m", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.1, lambda step: 0.1 / (1 + step)])
def test_heavy_ball_against_a_numpy_loop(m, lr):
    x0, y = start(dtype=np.float64)
    losses, particles = wasserstein_gradient_descent(x0, y, quadratic, KEY, 20, lr, m)
    x, target, v, curvature = np.array(x0), np.array(y), 0.0, np.array([1.0, 2.0])
    for step in range(20):
        np.testing.assert_allclose(particles[step], x, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(losses[step], 0.5 * np.sum(curvature * (x - target) ** 2))
        v = curvature * (x - target) + m * v
        x = x - (lr(step) if callable(lr) else lr) * v
    np.testing.assert_allclose(particles[20], x, rtol=1e-12, atol=1e-14)
    assert losses.dtype == particles.dtype == np.float64


@x64
def test_gradient_descent_on_a_quadratic_in_closed_form():
    x0, y = start(dtype=np.float64)
    particles = wasserstein_gradient_descent(x0, y, quadratic, KEY, 20, 0.1).particles
    shrink = (1 - 0.1 * np.array([1.0, 2.0])) ** np.arange(21)[:, None, None, None]
    x0, y = np.asarray(x0), np.asarray(y)
    np.testing.assert_allclose(particles, y + shrink * (x0 - y), rtol=1e-12)


def test_defaults_are_the_published_ones():
    x0, y = start()
    x0 = y + 0.25 * x0
    losses, particles = wasserstein_gradient_descent(x0, y, quadratic, KEY)
    assert losses.shape == (101,)
    assert particles.shape == (102, 2, 3, 2)
    # lr = 1 and m = 0: curvature 1 is solved in one step, curvature 2 swings for ever.
    np.testing.assert_allclose(particles[1, ..., 0], y[..., 0], atol=1e-6)
    np.testing.assert_allclose(particles[101, ..., 1], (2 * y - x0)[..., 1], atol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.1), optax.chain(optax.clip(0.5), optax.sgd(1.0))]
)
def test_any_optax_optimizer(optimizer):
    x, y = start()
    losses, particles = flow(optimizer=optimizer, lr=7.0)
    state = optimizer.init(x)
    for step in range(13):
        value, gradient = noisy(x, y, jax.random.fold_in(KEY, step))
        np.testing.assert_allclose(losses[step], value, rtol=1e-5)
        updates, state = optimizer.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(particles[step + 1], x, rtol=1e-5, atol=1e-6)


def test_flow_step_in_a_loop_of_ones_own(whole):
    x0, y = start()
    optimizer = optax.sgd(0.1, momentum=0.5)
    step, state = jax.jit(flow_step(noisy, optimizer)), flow_init(optimizer, x0)
    for i in range(13):
        assert state.step == i
        state, value = step(KEY, state, y)
        np.testing.assert_allclose(value, whole.losses[i], rtol=1e-5)
        np.testing.assert_allclose(state.particles, whole.particles[i + 1], rtol=1e-5, atol=1e-6)


def test_both_kinds_of_key(whole):
    assert_same_bits(flow(rng=jax.random.PRNGKey(0)), whole)
    assert np.abs(flow(rng=jax.random.key(1)).losses - whole.losses).max() > 0.1


def test_result(whole):
    assert isinstance(whole, FlowResult)
    assert whole.losses.shape == (13,)
    assert whole.particles.shape == (14, 2, 3, 2)
    np.testing.assert_array_equal(whole.particles[0], start()[0])


def test_start_may_be_a_numpy_array(monkeypatch, whole):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x0, y = map(np.asarray, start())
    assert_same_bits(wasserstein_gradient_descent(x0, y, noisy, KEY, 13, 0.1, 0.5), whole)


def test_target_is_any_pytree(whole):
    x0, y = start()

    def target(x, tree, key):
        return noisy(x, tree["points"][0] * tree["scale"], key)

    tree = {"points": (2 * np.asarray(y), None), "scale": 0.5}
    result = wasserstein_gradient_descent(x0, tree, target, KEY, 13, 0.1, 0.5)
    for a, b in zip(result, whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_flows_in_a_batch_are_single_flows():
    xs, ys = start((4, 2, 3, 2))

    def target(x, y, key):
        return jax.vmap(noisy, in_axes=(0, 0, None))(x, y, key)

    losses, particles = flow(target, x0=xs, y=ys, record_every=4)
    assert losses.shape == (13, 4)
    assert particles.shape == (5, 4, 2, 3, 2)
    for i in range(4):
        single = flow(x0=xs[i], y=ys[i], record_every=4)
        np.testing.assert_allclose(losses[:, i], single.losses, rtol=1e-5)
        np.testing.assert_allclose(particles[:, i], single.particles, rtol=1e-5, atol=1e-6)


def test_second_flow_with_the_same_functions_compiles_nothing():
    traces = []

    def target(x, y, key):
        traces.append(x.shape)
        return noisy(x, y, key)

    first = flow(target)
    traces.clear()
    # Another start, target, key and length.
    flow(target, 29, x0=start(seed=3)[0], y=start(seed=3)[1], rng=jax.random.key(9))
    assert traces == []
    assert_same_bits(flow(target), first)
    flow(target, lr=0.2)
    assert traces != []


# Records and chunks


@pytest.mark.parametrize("n_epochs", [1, 2, 9, 10, 11])
@pytest.mark.parametrize("record_every", [1, 2, 5, 10, 100])
def test_recorded_steps(n_epochs, record_every):
    expected = [s for s in range(n_epochs + 1) if s % record_every == 0 or s == n_epochs]
    np.testing.assert_array_equal(recorded_steps(n_epochs, record_every), expected)


# (n_epochs, record_every): a multiple, no multiple, longer than the run, the run itself.
@pytest.mark.parametrize(("n_epochs", "record_every"), [(12, 4), (13, 4), (13, 40), (13, 13)])
@pytest.mark.parametrize("max_steps", [1024, 3])
def test_records_are_slices_of_the_whole_run(monkeypatch, whole, n_epochs, record_every, max_steps):
    monkeypatch.setattr(gd, "MAX_STEPS_PER_CHUNK", max_steps)
    losses, particles = flow(n_epochs=n_epochs, record_every=record_every)
    steps = [s for s in range(n_epochs + 1) if s % record_every == 0 or s == n_epochs]
    assert_same_bits((losses, particles), (whole.losses[:n_epochs], whole.particles[steps]))


@pytest.mark.parametrize("max_steps", [1, 5])
def test_chunks_leave_the_bits(monkeypatch, whole, max_steps):
    monkeypatch.setattr(gd, "MAX_STEPS_PER_CHUNK", max_steps)
    assert_same_bits(flow(), whole)


def test_record_buffer_is_bounded(monkeypatch, whole):
    x0 = start()[0]
    sizes = record_chunks(monkeypatch, seconds=1e9)
    monkeypatch.setattr(gd, "MAX_RECORD_BYTES_PER_CHUNK", 3 * x0.nbytes)
    kept = flow(record_every=2).particles
    np.testing.assert_array_equal(kept, whole.particles[[0, 2, 4, 6, 8, 10, 12, 13]])
    assert max(sizes) == 4


# The documented example

SNIPPET = """
import jax
from lib.gd import wasserstein_gradient_descent
from lib.mmd import target_value_and_grad_riesz

rng = jax.random.PRNGKey(0)
master_key, key, key_x0, key_tgt = jax.random.split(rng, num=4)

# x0 and X_data are of shape (C, n, d), see Ring notebook for an example
x0 = jax.random.normal(key_x0, shape=(3, 80, 2))
X_data = jax.random.normal(key_tgt, shape=(3, 80, 2))

n_epochs = 501
L_loss, L_particles = wasserstein_gradient_descent(x0, X_data, jax.jit(target_value_and_grad_riesz), key, n_epochs=n_epochs, lr=0.1)
"""  # noqa: E501  as printed


def test_the_documented_example_runs_as_printed():
    names = {}
    exec(SNIPPET, names)
    losses, particles = names["L_loss"], names["L_particles"]
    assert losses.shape == (501,)
    assert particles.shape == (502, 3, 80, 2)
    np.testing.assert_array_equal(particles[0], names["x0"])
    assert losses[-20:].mean() < 0.2 * losses[0]


# Input validation

NAN, INF = float("nan"), float("inf")


def spoilt(where, value):
    x = np.array(start()[0])
    x[where] = value
    return x


BAD_INPUTS = {
    "NaN start": ({"x0": spoilt((0, 2, 1), NAN)}, r"x0 holds NaN or infinity.*\(0, 2, 1\)"),
    "infinite start": ({"x0": spoilt((1, 0, 0), -INF)}, r"x0 holds NaN or infinity.*\(1, 0, 0\)"),
    "NaN target": ({"y": spoilt((1, 2, 0), NAN)}, r"x_tgt holds NaN or infinity.*\(1, 2, 0\)"),
    "no class": ({"x0": np.zeros((0, 3, 2), np.float32)}, r"x0 must be .*none 0: \(0, 3, 2\)"),
    "empty class": ({"y": np.zeros((2, 0, 2), np.float32)}, r"x_tgt must be .*none 0: \(2, 0, 2\)"),
    "one class alone": ({"x0": np.zeros((3, 2), np.float32)}, r"x0 must be \(classes, points, dim"),
    "integers": ({"x0": np.zeros((2, 3, 2), np.int32)}, "x0 must be floating point, got int32"),
    "dimension": (
        {"y": np.zeros((2, 3, 5), np.float32)},
        r"x0 \(2, 3, 2\) and x_tgt \(2, 3, 5\) differ in dimension",
    ),
    "no step": ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
    "step size 0": ({"lr": 0.0}, r"lr must be positive, got 0\.0"),
    "negative step size": ({"lr": -0.1}, "lr must be positive, got -0.1"),
    "infinite step size": ({"lr": INF}, "lr must be positive, got inf"),
    "NaN step size": ({"lr": NAN}, "lr must be positive, got nan"),
    "momentum 1": ({"m": 1.0}, r"m must lie in \[0, 1\), got 1\.0"),
    "negative momentum": ({"m": -0.1}, r"m must lie in \[0, 1\), got -0.1"),
    "NaN momentum": ({"m": NAN}, r"m must lie in \[0, 1\), got nan"),
    "record_every": ({"record_every": 0}, "record_every must be at least 1, got 0"),
    "too much to keep": (
        {
            "x0": np.zeros((1, 1, 2**16), np.float32),
            "y": np.zeros((1, 1, 2**16)),
            "n_epochs": 19999,
        },
        r"of 19999 steps of \(1, 1, 65536\) takes 4\.9 GiB; raise record_every",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_raises_before_any_step(bad, run):
    options, message = BAD_INPUTS[bad]
    calls = []

    def target(x, y, key):
        calls.append(x)
        return noisy(x, y, key)

    with pytest.raises(ValueError, match=message):
        flow(target, run=run, **options)
    assert calls == []
    assert not run.checkpoint.exists()


def test_nan_in_a_pytree_of_targets_is_named_before_any_step():
    def target(x, y, key):
        raise AssertionError("no step may be taken")

    y = {"points": start()[1], "weights": [np.ones(2), np.array([0.5, NAN])], "key": KEY}
    with pytest.raises(ValueError, match=r"x_tgt\.weights\.1 holds NaN .* first at index \(1,\)"):
        flow(target, y=y)


def test_gradient_of_another_shape_raises():
    def target(x, y, key):
        return jnp.sum(x), x[:, :1]

    message = r"gradient \(2, 1, 2\) is not of the particles' shape \(2, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        flow(target)


# What a function hands from step to step


def remembering(x, y, key, carry):
    """A gradient that counts its steps and keeps a running mean of the particles."""
    count, mean = carry["count"], carry["mean"]
    following = {"count": count + 1, "mean": mean + (x - mean) / (count + 1)}
    return jnp.sum(mean**2), jnp.cos(x) + mean - y / (1 + count), following


def first_carry():
    return {"count": jnp.zeros((), jnp.int32), "mean": jnp.zeros((2, 3, 2))}


def test_a_carry_goes_from_step_to_step():
    x, y = (np.asarray(z, np.float64) for z in start())
    mean, velocity, losses = np.zeros_like(x), np.zeros_like(x), []
    for count in range(13):
        losses.append(np.sum(mean**2))
        gradient = np.cos(x) + mean - y / (1 + count)
        mean = mean + (x - mean) / (count + 1)
        velocity = gradient + 0.5 * velocity
        x = x - 0.1 * velocity
    found = flow(remembering, carry=first_carry())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.particles[-1], x, rtol=1e-4, atol=1e-5)


def test_a_carry_survives_a_stop(monkeypatch, run):
    expected = flow(remembering, carry=first_carry())
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            flow(remembering, carry=first_carry(), run=run)
    assert_same_bits(flow(remembering, carry=first_carry(), run=run), expected)
    other = first_carry() | {"mean": jnp.ones((2, 3, 2))}
    with pytest.raises(RunFileError, match="another"):
        flow(remembering, carry=other, run=run)


def test_functions_that_return_too_little_or_another_carry_raise():
    with pytest.raises(ValueError, match=r"\(value, gradient, carry\), it returned 2"):
        flow(lambda x, y, key, carry: (jnp.sum(x), x), carry=first_carry())
    with pytest.raises(ValueError, match=r"\(value, gradient\), it returned 3"):
        flow(lambda x, y, key: (jnp.sum(x), x, x))
    with pytest.raises(ValueError, match="carry that comes back"):
        flow(lambda x, y, key, carry: (jnp.sum(x), x, carry["count"]), carry=first_carry())


# NaN on the way


def doubling(x, y, key):
    """x doubles at every step from 1; the value is NaN from 32 on, that is in step 5."""
    return jnp.where(jnp.max(x) < 32, jnp.sum(x), jnp.nan), -x


def doubling_into_infinity(x, y, key):
    """Every value is finite; the gradient is infinite in step 5."""
    return jnp.zeros(()), jnp.where(jnp.max(x) < 32, -x, -jnp.inf)


ONES = np.ones((1, 2, 1), np.float32)


@pytest.mark.parametrize("target", [doubling, doubling_into_infinity])
def test_divergence_keeps_the_last_good_state(monkeypatch, run, target):
    record_chunks(monkeypatch)
    with pytest.raises(DivergedError, match=r"NaN or infinity in step 5 \(counted") as caught:
        flow(target, 50, 1.0, 0.0, ONES, ONES, run=run)
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert str(run.checkpoint) in str(error)
    assert error.step == error.state.step == 5
    np.testing.assert_array_equal(error.state.particles, 32 * ONES)
    # The same command stops at the same place.
    with pytest.raises(DivergedError, match="in step 5 "):
        flow(target, 50, 1.0, 0.0, ONES, ONES, run=run)


def test_divergence_within_a_chunk(monkeypatch):
    """Chunks of 1, 2, 4 steps: the state is that after 3, the step still the first bad one."""
    record_chunks(monkeypatch, seconds=1e9)
    with pytest.raises(DivergedError, match=r"in step 5 .*lower the step size$") as caught:
        flow(doubling, 50, 1.0, 0.0, ONES, ONES)
    assert caught.value.step == 3
    np.testing.assert_array_equal(caught.value.state.particles, 8 * ONES)


def test_a_flow_may_be_told_to_run_on():
    losses, particles = flow(doubling, 8, 1.0, 0.0, ONES, ONES, stop_at_nonfinite=False)
    np.testing.assert_array_equal(np.isnan(losses), np.arange(8) >= 5)
    np.testing.assert_array_equal(particles[:, 0, 0, 0], 2.0 ** np.arange(9))


# Stops and resumes


@pytest.mark.parametrize("record_every", [1, 4])
def test_a_second_call_resumes_and_a_third_extends(monkeypatch, run, record_every):
    """10 is no multiple of 4: the last record of the first run is none of the third's."""
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted, match="after step 6;"):
            flow(n_epochs=10, run=run, record_every=record_every)
    sizes = record_chunks(monkeypatch)
    for n_epochs in (10, 10, 13):
        found = flow(n_epochs=n_epochs, run=run, record_every=record_every)
        assert_same_bits(found, flow(n_epochs=n_epochs, record_every=record_every))
    assert len(sizes) == 4 + 10 + 10 + 3 + 13


KILLED = """
import sys
from pathlib import Path
import jax
from lib import gd
from lib.mmd import target_value_and_grad_riesz
from lib.runs import Run, loop

def target(x, y, key):
    return target_value_and_grad_riesz(x, y, key, n_projs=20)

def flow(folder):
    x0, y = jax.random.normal(jax.random.key(1), (2, 3, 10, 2))
    return gd.wasserstein_gradient_descent(
        x0, y, target, jax.random.key(2), 300, 0.1, 0.9,
        record_every=7, run=folder and Run(Path(folder)), checkpoint_seconds=0.0,
    )

if __name__ == "__main__":
    loop.SECONDS_PER_CHUNK = 0.0
    flow(sys.argv[1])
"""


def test_a_killed_process_resumes_in_the_same_bits(tmp_path):
    checkpoint, step = tmp_path / "checkpoint.npz", 0
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        try:
            while step < 30 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
                step = int(files.load_arrays(checkpoint)["step"]) if checkpoint.exists() else 0
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    names = {"__name__": "resumed"}
    exec(KILLED, names)
    expected = names["flow"](None)
    step = int(files.load_arrays(checkpoint)["step"])
    assert 30 <= step < 300
    assert_same_bits(names["flow"](tmp_path), expected)
    assert np.all(np.isfinite(expected.losses))
    assert expected.losses[-50:].mean() < 0.5 * expected.losses[0]


OTHERS = {
    "start": {"x0": start(seed=5)[0]},
    "target": {"y": start((2, 4, 2))[1]},
    "key": {"rng": jax.random.key(5)},
    "step size or optimizer": {"lr": 0.2},
    "step size or optimizer,": {"m": 0.6},
    "record_every": {"record_every": 4},
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_flow_is_refused(run, other):
    flow(n_epochs=4, run=run)

    def target(x, y, key):
        return noisy(x, y[:, :3], key)

    with pytest.raises(RunFileError, match=f"another {other}"):
        flow(target, run=run, **OTHERS[other])


# The published results of image flows


@pytest.mark.parametrize(
    ("n_epochs", "interval", "steps"),
    [(13, 4, (0, 4, 8, 13)), (12, 4, (0, 4, 8, 12)), (3, 4, (3,))],
)
def test_image_flows_may_save_some_particles_on_the_way(n_epochs, interval, steps, whole):
    """As many as the published function has, n_epochs // save_interval + 1."""
    x0, y = start()
    saved = gd_images.wasserstein_gradient_descent_save(
        x0, y, noisy, KEY, n_epochs, 0.1, 0.5, interval
    )
    assert_same_bits(saved, (whole.losses[:n_epochs], whole.particles[list(steps)]))


def test_image_flows_return_the_last_particles(whole):
    x0, y = start()
    for losses, last in (
        gd_images.wasserstein_gradient_descent(x0, y, noisy, KEY, 13, 0.1, 0.5),
        gd_images.wasserstein_gradient_descent_optax(
            x0, y, noisy, KEY, optax.sgd(0.1, momentum=0.5), 13
        ),
    ):
        assert_same_bits((losses, last), (whole.losses, whole.particles[-1]))


# L-BFGS


class Landscape(NamedTuple):
    """Weights of a quadratic about y of curvatures 1 and 100, a push drawn anew, cosines."""

    y: jax.Array
    square: float = 0.0
    push: float = 0.0
    cosine: float = 0.0


def landscape(x, parts, key):
    curvature = parts.square * jnp.array([1.0, 100.0], x.dtype)[None, None]
    push = parts.push * jax.random.normal(key, x.shape, x.dtype)
    value = curvature * (x - parts.y) ** 2 / 2 + push * x + parts.cosine * jnp.cos(x)
    return jnp.sum(value), curvature * (x - parts.y) + push - parts.cosine * jnp.sin(x)


LBFGS = optax.scale_by_lbfgs()


@jax.jit
def published_step(x, parts, key, state):
    direction, state = LBFGS.update(landscape(x, parts, key)[1], state, x)
    return x - 0.3 * direction, state


def published_lbfgs(x, parts):
    """The loop as published: the gradients of a pair have different keys."""
    particles, state = [x], LBFGS.init(x)
    for key in jax.random.split(KEY, 60):
        x, state = published_step(x, parts, key, state)
        particles.append(x)
    return np.asarray(jnp.stack(particles))


@x64
def test_lbfgs_takes_the_published_steps_on_a_convex_target_and_better_ones_elsewhere():
    x0, y = (100 * z for z in start(dtype=np.float64))

    def ours(x0, parts):
        return wasserstein_gradient_descent_lbfgs(x0, parts, landscape, KEY, 60, 0.3).particles

    convex = Landscape(y, square=1.0)
    np.testing.assert_allclose(ours(x0, convex), published_lbfgs(x0, convex), rtol=0, atol=1e-6)

    # Draws: the exact inverse would leave noise of sd sqrt(.3 / 1.7) = .42.
    pushed = Landscape(y, square=1.0, push=1.0)
    found, published = ours(x0, pushed)[-20:], published_lbfgs(x0, pushed)[-20:]
    assert np.sqrt(np.mean((found - np.asarray(y)) ** 2)) < 0.42
    assert np.sqrt(np.mean((published - np.asarray(y)) ** 2)) > 0.84

    # Negative curvature: from beside the maximum down to the minima, as no published pair leads.
    cosines = Landscape(y, cosine=1.0)
    assert np.cos(ours(x0 / 1e4, cosines)[-1]).max() < -0.999
    assert np.cos(published_lbfgs(x0 / 1e4, cosines)[-1]).max() > 0
