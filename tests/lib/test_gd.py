"""The flow engine against plain loops; records, chunks, and what survives a stop."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow
from chunks import assert_same_bits, interrupt, record_chunks

from lib import gd, gd_images
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
    x0, y = x if x0 is None else jnp.asarray(x0), z if y is None else y
    return gd.wasserstein_gradient_descent(x0, y, target, rng, n_epochs, lr, m, **options)


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run of `flow()`, every step kept."""
    return flow()


# What a step is


@pytest.mark.usefixtures("unannotated")
def test_keys_of_both_kinds_and_starts_that_are_numpy_arrays(whole):
    assert isinstance(whole, gd.FlowResult)
    assert all(isinstance(array, np.ndarray) for array in whole)
    assert (whole.losses.shape, whole.particles.shape) == ((13,), (14, 2, 3, 2))
    x0, y = map(np.asarray, start())
    np.testing.assert_array_equal(whole.particles[0], x0)
    for key in (KEY, jax.random.PRNGKey(0)):
        assert_same_bits(gd.wasserstein_gradient_descent(x0, y, noisy, key, 13, 0.1, 0.5), whole)
    assert np.abs(flow(rng=jax.random.key(1)).losses - whole.losses).max() > 0.1


def test_defaults_are_the_published_ones():
    x0, y = start()
    x0 = y + 0.25 * x0
    losses, particles = gd.wasserstein_gradient_descent(x0, y, quadratic, KEY)
    assert (losses.shape, particles.shape) == ((101,), (102, 2, 3, 2))
    # lr = 1 and m = 0: curvature 1 is solved in one step, curvature 2 swings for ever.
    np.testing.assert_allclose(particles[1, ..., 0], y[..., 0], atol=1e-6)
    np.testing.assert_allclose(particles[101, ..., 1], (2 * y - x0)[..., 1], atol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.1), optax.chain(optax.clip(0.5), optax.sgd(1.0))]
)
def test_any_optax_optimizer(optimizer):
    x, y = start()
    result, state = flow(optimizer=optimizer, lr=7.0), optimizer.init(x)
    evaluate, update = jax.jit(noisy), jax.jit(optimizer.update)
    for step, (loss, following) in enumerate(zip(result.losses, result.particles[1:])):
        value, gradient = evaluate(x, y, jax.random.fold_in(KEY, step))
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(following, x, rtol=1e-5, atol=1e-6)


def test_target_is_any_pytree(whole):
    def target(x, tree, key):
        return noisy(x, tree["points"][0] * tree["scale"], key)

    tree = {"points": (2 * np.asarray(start()[1]), None), "scale": 0.5}
    for a, b in zip(flow(target, y=tree), whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_flows_in_a_batch_are_single_flows():
    xs, ys = start((4, 2, 3, 2))
    batched = jax.vmap(noisy, in_axes=(0, 0, None))
    losses, particles = flow(batched, x0=xs, y=ys, record_every=4)
    assert (losses.shape, particles.shape) == ((13, 4), (5, 4, 2, 3, 2))
    for i in range(4):
        single = flow(x0=xs[i], y=ys[i], record_every=4)
        np.testing.assert_allclose(losses[:, i], single.losses, rtol=1e-5)
        np.testing.assert_allclose(particles[:, i], single.particles, rtol=1e-5, atol=1e-6)


def test_a_function_is_traced_once_and_a_second_flow_compiles_nothing():
    traces, compiled = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
    )

    def target(x, y, key):
        traces.append(x.shape)
        return noisy(x, y, key)

    first = flow(target)
    flow(target, lr=0.2)
    assert len(traces) == 1
    x0, y = start(seed=3)
    compiled.clear()
    flow(target, 29, x0=x0, y=y, rng=jax.random.key(9))
    assert_same_bits(flow(target), first)
    assert not [name for name in compiled if "compile" in name]


# (n_epochs, record_every): all, a multiple, no multiple, longer than the run, the run itself.
@pytest.mark.parametrize(
    ("n_epochs", "record_every"), [(13, 1), (12, 4), (13, 4), (13, 40), (13, 13)]
)
@pytest.mark.parametrize("max_steps", [1024, 5, slow(3), slow(1)])
def test_records_are_slices_of_the_whole_run(monkeypatch, whole, n_epochs, record_every, max_steps):
    monkeypatch.setattr(gd, "MAX_STEPS_PER_CHUNK", max_steps)
    records = flow(n_epochs=n_epochs, record_every=record_every)
    steps = gd.recorded_steps(n_epochs, record_every)
    assert_same_bits(records, (whole.losses[:n_epochs], whole.particles[steps]))


def test_large_particles_are_held_once(monkeypatch, whole, run):
    """The state is overwritten, the caller's arrays are not; a diverged flow has none to return."""
    monkeypatch.setattr(gd, "MAX_RECORD_BYTES_PER_CHUNK", 1)
    x0 = jnp.asarray(start()[0])
    assert_same_bits(
        flow(x0=x0, record_every=4), (whole.losses, whole.particles[[0, 4, 8, 12, 13]])
    )
    assert_same_bits(flow(x0=x0, record_every=13, run=run).particles, whole.particles[[0, 13]])
    with pytest.raises(DivergedError) as caught:
        flow(x0=x0, lr=lambda step: jnp.where(step == 5, jnp.inf, 0.1))
    assert caught.value.state is None


def test_record_buffer_is_bounded(monkeypatch, whole):
    x0 = start()[0]
    sizes = record_chunks(monkeypatch, seconds=1e9)
    monkeypatch.setattr(gd, "MAX_RECORD_BYTES_PER_CHUNK", 2 * x0.nbytes)
    kept = flow(record_every=2).particles
    np.testing.assert_array_equal(kept, whole.particles[[0, 2, 4, 6, 8, 10, 12, 13]])
    assert max(sizes) == 4


NAN, INF = float("nan"), float("inf")


def spoilt(where, value):
    x = np.array(start()[0])
    x[where] = value
    return x


BAD_INPUTS = {
    "NaN start": ({"x0": spoilt((0, 2, 1), NAN)}, r"x0 holds NaN or infinity.*\(0, 2, 1\)"),
    "infinite start": ({"x0": spoilt((1, 0, 0), -INF)}, r"x0 holds NaN or infinity.*\(1, 0, 0\)"),
    "NaN target": ({"y": spoilt((1, 2, 0), NAN)}, r"x_tgt holds NaN or infinity.*\(1, 2, 0\)"),
    "NaN in a pytree": (
        {"y": {"points": start()[1], "weights": [np.ones(2), np.array([0.5, NAN])], "key": KEY}},
        r"x_tgt\.weights\.1 holds NaN .* first at index \(1,\)",
    ),
    "no class": ({"x0": np.zeros((0, 3, 2), np.float32)}, r"x0 must be .*none 0: \(0, 3, 2\)"),
    "empty class": ({"y": np.zeros((2, 0, 2), np.float32)}, r"x_tgt must be .*none 0: \(2, 0, 2\)"),
    "no axis of classes": (
        {"x0": np.zeros((3, 2), np.float32)},
        r"x0 must be \(classes, points, dim",
    ),
    "integers": ({"x0": np.zeros((2, 3, 2), np.int32)}, "x0 must be floating point, got int32"),
    "dimension": ({"y": np.zeros((2, 3, 5), "f")}, r"x0 \(2, 3, 2\) and x_tgt \(2, 3, 5\) differ"),
    "no step": ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
    **{f"lr {x}": ({"lr": x}, f"lr must be positive, got {x}") for x in (0.0, -0.1, INF, NAN)},
    **{f"m {x}": ({"m": x}, rf"m must lie in \[0, 1\), got {x}") for x in (1.0, -0.1, NAN)},
    "record_every": ({"record_every": 0}, "record_every must be at least 1, got 0"),
    "too much to keep": (
        {"x0": np.zeros((1, 1, 2**16), "f"), "y": np.zeros((1, 1, 2**16)), "n_epochs": 19999},
        r"of 19999 steps of \(1, 1, 65536\) takes 4\.9 GiB; raise record_every",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_raises_before_any_step(bad, run):
    options, message = BAD_INPUTS[bad]

    def target(x, y, key):
        raise AssertionError("no step may be taken")

    with pytest.raises(ValueError, match=message):
        flow(target, run=run, **options)
    assert not run.checkpoint.exists()


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
        velocity = np.cos(x) + mean - y / (1 + count) + 0.5 * velocity
        mean, x = mean + (x - mean) / (count + 1), x - 0.1 * velocity
    result = flow(remembering, carry=first_carry())
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.particles[-1], x, rtol=1e-4, atol=1e-5)


def test_a_carry_survives_a_stop(monkeypatch, run):
    expected = flow(remembering, carry=first_carry())
    interrupt(monkeypatch, partial(flow, remembering, carry=first_carry(), run=run), 6)
    assert_same_bits(flow(remembering, carry=first_carry(), run=run), expected)
    with pytest.raises(RunFileError, match="another"):
        flow(remembering, carry=first_carry() | {"mean": jnp.ones((2, 3, 2))}, run=run)


@pytest.mark.parametrize(
    ("target", "carry", "message"),
    [
        (lambda x, y, key: (x[0, 0, 0], x[:, :1]), False, r"gradient \(2, 1, 2\) .* \(2, 3, 2\)"),
        (lambda x, y, key, carry: (x[0, 0, 0], x), True, r"gradient, carry\), it returned 2"),
        (lambda x, y, key: (x[0, 0, 0], x, x), False, r"\(value, gradient\), it returned 3"),
        (lambda x, y, key, carry: (x[0, 0, 0], x, 1), True, "carry that comes back"),
        (lambda x, y, key, carry: (x[0, 0, 0], x, carry["count"]), True, "carry that comes back"),
    ],
)
def test_functions_that_return_too_little_or_another_shape_or_carry_raise(target, carry, message):
    with pytest.raises(ValueError, match=message):
        flow(target, **({"carry": first_carry()} if carry else {}))


def doubling(x, y, key):
    """x doubles at every step from 1; the value is NaN from 32 on, that is in step 5."""
    return jnp.where(jnp.max(x) < 32, jnp.sum(x), jnp.nan), -x


def doubling_into_infinity(x, y, key):
    """Every value is finite; the gradient is infinite in step 5."""
    return jnp.zeros(()), jnp.where(jnp.max(x) < 32, -x, -jnp.inf)


ONES = np.ones((1, 2, 1), np.float32)


@pytest.mark.parametrize(
    ("target", "seconds", "last_good"),
    [(doubling, 0.0, (5, 5)), (doubling_into_infinity, 0.0, (5, 5)), (doubling, 1e9, (3, 4))],
)
def test_divergence_keeps_the_last_good_state(monkeypatch, run, target, seconds, last_good):
    """Of chunks of single steps, or of 1, 2, 4: the step named is still the first bad one."""
    record_chunks(monkeypatch, seconds=seconds)
    for good in last_good:  # the same command stops at the same step
        with pytest.raises(DivergedError, match=r"NaN or infinity in step 5 \(counted") as caught:
            flow(target, 50, 1.0, 0.0, ONES, ONES, run=run)
        error = caught.value
        assert str(run.checkpoint) in str(error)
        assert error.step == error.state.step == good
        np.testing.assert_array_equal(error.state.particles, 2.0**good * ONES)
    run.discard_saved()
    assert not run.checkpoint.exists()
    with pytest.raises(DivergedError, match=r"in step 5 .*lower the step size$"):
        flow(target, 50, 1.0, 0.0, ONES, ONES)


def test_a_flow_may_be_told_to_run_on():
    losses, particles = flow(doubling, 8, 1.0, 0.0, ONES, ONES, stop_at_nonfinite=False)
    np.testing.assert_array_equal(np.isnan(losses), np.arange(8) >= 5)
    np.testing.assert_array_equal(particles[:, 0, 0, 0], 2.0 ** np.arange(9))


@pytest.mark.parametrize("record_every", [1, 4])
def test_a_second_call_resumes_and_a_third_extends(monkeypatch, run, record_every):
    """10 is no multiple of 4: the last record of the first run is none of the third's."""
    interrupt(monkeypatch, partial(flow, n_epochs=10, run=run, record_every=record_every), 6)
    sizes = record_chunks(monkeypatch)
    for n_epochs in (10, 10, 13):
        resumed = flow(n_epochs=n_epochs, run=run, record_every=record_every)
        assert_same_bits(resumed, flow(n_epochs=n_epochs, record_every=record_every))
    assert len(sizes) == 4 + 10 + 10 + 3 + 13


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


@pytest.mark.parametrize(
    ("n_epochs", "interval", "steps"),
    [(13, 4, (0, 4, 8, 13)), (12, 4, (0, 4, 8, 12)), (3, 4, (3,))],
)
def test_image_flows_save_as_many_particles_as_published_or_the_last(
    n_epochs, interval, steps, whole
):
    arguments = *start(), noisy, KEY
    saved = gd_images.wasserstein_gradient_descent_save(*arguments, n_epochs, 0.1, 0.5, interval)
    losses = whole.losses[:n_epochs]
    assert_same_bits(saved, (losses, whole.particles[list(steps)]))
    for last in (
        gd_images.wasserstein_gradient_descent(*arguments, n_epochs, 0.1, 0.5),
        gd_images.wasserstein_gradient_descent_optax(
            *arguments, optax.sgd(0.1, momentum=0.5), n_epochs
        ),
    ):
        assert_same_bits(last, (losses, whole.particles[n_epochs]))


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
        return gd.wasserstein_gradient_descent_lbfgs(x0, parts, landscape, KEY, 60, 0.3).particles

    convex = Landscape(y, square=1.0)
    np.testing.assert_allclose(ours(x0, convex), published_lbfgs(x0, convex), rtol=0, atol=1e-6)

    # Draws: the exact inverse would leave noise of sd sqrt(.3 / 1.7) = .42.
    pushed = Landscape(y, square=1.0, push=1.0)
    particles, published = ours(x0, pushed)[-20:], published_lbfgs(x0, pushed)[-20:]
    assert np.sqrt(np.mean((particles - np.asarray(y)) ** 2)) < 0.42
    assert np.sqrt(np.mean((published - np.asarray(y)) ** 2)) > 0.84

    # Negative curvature: from beside the maximum down to the minima, as no published pair leads.
    cosines = Landscape(y, cosine=1.0)
    assert np.cos(ours(x0 / 1e4, cosines)[-1]).max() < -0.999
    assert np.cos(published_lbfgs(x0 / 1e4, cosines)[-1]).max() > 0
