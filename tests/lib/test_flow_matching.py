"""Flows between Gaussians against their closed forms; training against loops; resuming."""

from functools import partial
from itertools import permutations
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow
from chunks import assert_same_bits, interrupt, record_chunks
from scipy.integrate import quad

from lib import runs
from lib.flow_matching import (
    draw_step,
    fit,
    init,
    optimal_permutation,
    train_step,
    velocity,
)
from lib.flow_matching.sampling import euler, heun, integrate, ralston3, straightness
from lib.flow_matching.unet import UNet
from lib.kernels import squared_distances
from lib.runs.files import RunFileError
from lib.runs.loop import DivergedError

KEY = jax.random.key(3)


class Normal(NamedTuple):
    mean: jax.Array

    def sample(self, key, num):
        return self.mean[None] + jax.random.normal(key, (num, len(self.mean)))

    def couple(self, key, x1):
        return self.sample(key, len(x1))


class Affine(nn.Module):
    """v(x, t) = A x + b + c t."""

    @nn.compact
    def __call__(self, images, times):
        x = images.reshape(len(images), -1)
        x = jnp.concatenate([x, times[:, None].astype(x.dtype)], axis=1)
        return nn.Dense(images[0].size, param_dtype=x.dtype)(x).reshape(images.shape)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, images, times):
        x = images.reshape(len(images), -1)
        h = jnp.concatenate([x, times[:, None], times[:, None] ** 2], axis=1)
        h = nn.silu(nn.Dense(32)(h))
        h = nn.silu(nn.Dense(32)(h))
        return nn.Dense(x.shape[1])(h).reshape(images.shape)


OPTIMIZER = optax.adam(0.02)


def images(n=12, seed=0, shape=(2, 3, 1), dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, *shape)), dtype)


def training(**changes):
    options = {"optimizer": OPTIMIZER, "num_steps": 13, "batch_size": 4, "ema_decay": 0.5}
    options |= {"show_progress": False} | changes
    data = options.pop("data", images())
    source = options.pop("source", Normal(jnp.zeros(6)))
    return fit(options.pop("key", KEY), options.pop("network", Affine()), source, data, **options)


# Between Gaussians N(0, I) and N(m, diag(s^2)), drawn independently, the velocity is
# m + (sigma' / sigma) (x - t m) with sigma_t^2 = (1 - t)^2 + t^2 s^2, and x0 goes to m + s x0.

M, S = np.array([1.0, -2.0]), np.array([0.5, 2.0])


def sigma(t, s):
    return np.sqrt((1 - t) ** 2 + t**2 * s**2)


def gaussian_velocity(x, times):
    t = times[:, None]
    rate = (t - 1 + t * S[None] ** 2) / ((1 - t) ** 2 + t**2 * S[None] ** 2)
    return M[None] + rate * (x - t * M[None])


SOLVERS = {"euler": (euler, 1), "heun": (heun, 2), "ralston3": (ralston3, 3)}


@pytest.mark.parametrize("method", SOLVERS)
def test_errors_fall_with_the_order_of_the_method(x64, method):
    """x(1) = m + s x0; twice the steps, 2^order times less."""
    solve, order = SOLVERS[method]
    x0 = jax.random.normal(jax.random.key(0), (50, 2), jnp.float64)
    exact = M + S * np.asarray(x0)
    errors = [np.abs(solve(gaussian_velocity, x0, n) - exact).max() for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("method", SOLVERS)
def test_one_program_serves_all_numbers_of_evaluations(x64, method):
    solve, per_step = SOLVERS[method]
    x0, traced = jax.random.normal(jax.random.key(0), (7, 2), jnp.float64), []

    @jax.jit
    def sampled(num):
        traced.append(num)
        return integrate(gaussian_velocity, x0, num_evaluations=num, method=method, block_size=4)

    for num in (6, 12, 18):
        expected = solve(gaussian_velocity, x0, num // per_step)
        np.testing.assert_allclose(sampled(jnp.asarray(num)), expected, rtol=1e-12)
    assert len(traced) == 1


def test_straightness_of_gaussian_flows_against_quadrature(x64):
    """x'(t) = m + sigma'_t x0 and x(1) - x(0) = m + (s - 1) x0."""
    x0 = jax.random.normal(jax.random.key(0), (400, 2), jnp.float64)
    x0 = (x0 - x0.mean(axis=0, keepdims=True)) / x0.std(axis=0, keepdims=True)
    result = straightness(heun(gaussian_velocity, x0, 400, keep_path=True))

    def squared(t, s):
        return (s - 1 - (t - 1 + t * s**2) / sigma(t, s)) ** 2

    value = sum(quad(squared, 0, 1, args=(s,))[0] for s in S)
    cost = (M**2 + (S - 1) ** 2).sum()
    np.testing.assert_allclose(result.value, value, rtol=1e-3)
    np.testing.assert_allclose(result.normalized, value / cost, rtol=1e-3)
    np.testing.assert_allclose(result.transport_cost, cost / 2, rtol=1e-3)
    times = np.linspace(0, 1, 401)[:, None, None]
    exact = times * M + sigma(times, S) * np.asarray(x0)
    lengths = np.linalg.norm(np.diff(exact, axis=0), axis=2).sum(axis=0)
    ratio = lengths.mean() / np.linalg.norm(exact[-1] - exact[0], axis=1).mean()
    assert ratio > 1.01
    np.testing.assert_allclose(result.length_ratio, ratio, rtol=1e-3)


def test_batches():
    """Rows of the data, mapped from 0..255 and mirrored for about half."""
    data = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 2, 3, 2)), jnp.uint8)
    rows = np.asarray(data, np.float32) / 127.5 - 1
    source = Normal(jnp.zeros(12))
    batch, mirrored = (
        np.asarray(draw_step(KEY, 0, source, data, 400, augment_flip=flip)[1]).reshape(-1, 2, 3, 2)
        for flip in (False, True)
    )
    which = np.array([np.abs(rows - x).max(axis=(1, 2, 3)).argmin() for x in batch])
    np.testing.assert_allclose(batch, rows[which], atol=1e-6)
    assert np.bincount(which, minlength=5).min() > 50
    same = (mirrored == batch).all(axis=(1, 2, 3))
    assert 150 < same.sum() < 250
    np.testing.assert_array_equal(mirrored[~same], batch[~same][:, :, ::-1])


@pytest.mark.parametrize("coupling", [slow("independent"), "optimal"])
def test_fit_is_a_loop_of_steps_and_the_running_mean_a_numpy_loop(coupling):
    result, source = training(coupling=coupling), Normal(jnp.zeros(6))
    init_key, key = jax.random.split(KEY)
    state = init(init_key, Affine(), OPTIMIZER, (2, 3, 1))
    ema = jax.tree.map(np.float64, state.parameters)
    options = {"network": Affine(), "optimizer": OPTIMIZER, "batch_size": 4, "ema_decay": 0.5}
    step_once = jax.jit(
        lambda state, permutation: train_step(key, state, source, images(), permutation, **options)
    )
    draw = jax.jit(partial(draw_step, batch_size=4))
    distances = jax.jit(squared_distances)
    for step in range(13):
        x0, x1, *_ = draw(key, step, source, images())
        pairs = optimal_permutation(distances(x1, x0)) if coupling == "optimal" else None
        state, value = step_once(state, pairs)
        np.testing.assert_allclose(value, result.losses[step], rtol=1e-5)
        decay = min(0.5, (1 + step) / (10 + step))
        ema = jax.tree.map(
            lambda mean, p, a=decay: a * mean + (1 - a) * np.asarray(p), ema, state.parameters
        )
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, result[:2], (state.parameters, ema))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), result.ema, result.parameters)
    assert max(jax.tree.leaves(differences)) > 1e-3


@pytest.mark.slow
def test_a_gaussian_is_carried_to_a_gaussian():
    """Mean and covariance of what a small network makes of N(0, I)."""
    rng, source = np.random.default_rng(0), Normal(jnp.zeros(2))
    x1 = rng.normal(size=(4000, 2)) @ [[0.6, 0.4], [0.0, 0.3]] + [0.5, -1.0]
    result = training(
        network=TwoLayers(),
        source=source,
        data=jnp.asarray(x1, jnp.float32).reshape(-1, 1, 2, 1),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 1500)),
        num_steps=1500,
        batch_size=128,
        ema_decay=0.99,
    )
    field = velocity(TwoLayers(), result.ema, (1, 2, 1))
    generate = jax.jit(partial(integrate, field, num_evaluations=40, method="heun"))
    made = np.asarray(generate(source.sample(jax.random.key(1), 4000)))
    np.testing.assert_allclose(made.mean(axis=0), x1.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(made.T), np.cov(x1.T), atol=0.04)


# Interruptions


@pytest.mark.parametrize("coupling", ["independent", "optimal"])
def test_resumed_runs_end_in_the_same_bits(monkeypatch, run, coupling):
    whole = training(coupling=coupling)
    interrupt(monkeypatch, partial(training, coupling=coupling, run=run), 1, 7, 12)
    sizes = record_chunks(monkeypatch)
    assert_same_bits(training(coupling=coupling, run=run), whole)
    assert sizes == [1]


def test_a_longer_run_goes_on_from_a_shorter_one(monkeypatch, run):
    whole = training(num_steps=17)
    training(num_steps=10, run=run)
    sizes = record_chunks(monkeypatch)
    assert_same_bits(training(num_steps=17, run=run), whole)
    assert sum(sizes) == 7
    with pytest.raises(RunFileError, match="17"):
        training(num_steps=16, run=run)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": TwoLayers()},
        {"data": images(seed=1)},
        {"source": Normal(jnp.ones(6))},
        {"key": jax.random.key(4)},
        {"batch_size": 5},
        {"coupling": "optimal"},
        {"augment_flip": True},
        {"ema_decay": 0.6},
        {"optimizer": optax.adam(0.03)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_runs_checkpoint_is_refused(changes, saved_run):
    (name,) = changes
    with pytest.raises(RunFileError, match=f"run with another .*{name}"):
        training(run=saved_run, **changes)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    run = runs.open_run(tmp_path_factory.mktemp("runs"), "xp", "flow", {}, seed=0)
    training(run=run)
    return run


def test_divergence_names_the_step_and_saves_the_last_good_state(monkeypatch, run):
    """A step size that becomes infinite at step 5: the loss of step 6 shows it at the latest."""
    optimizer = optax.sgd(lambda step: jnp.where(step == 5, jnp.inf, 0.01))
    record_chunks(monkeypatch)
    with pytest.raises(DivergedError, match=r"in step 5 .*last good state is in") as caught:
        training(optimizer=optimizer, run=run)
    good = training(optimizer=optimizer, num_steps=5)
    assert caught.value.step == 5
    assert_same_bits(caught.value.state.parameters, good.parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": jnp.zeros((12, 6))}, r"images are \[n, H, W, channels\].*\(12, 6\)"),
        ({"data": jnp.zeros((12, 2, 3, 1), jnp.int32)}, "floating point or uint8, got int32"),
        ({"data": images().at[3, 1, 1, 0].set(jnp.nan)}, "NaN or infinity in the images"),
        ({"source": Normal(jnp.full(6, jnp.inf))}, "NaN or infinity in the source"),
        ({"source": Normal(jnp.zeros(5))}, r"source draws \(4, 5\) for .*\(4, 6\)"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 13}, "batch_size 13 is larger than the 12 images"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
    ],
)
def test_bad_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(euler, num_steps=0), "num_steps must be at least 1, got 0"),
        (partial(integrate, num_evaluations=5, method="heun"), "5 evaluations are no whole number"),
        (partial(integrate, num_evaluations=4, block_size=0), "block_size must be at least 1"),
        (lambda _, x0: straightness(x0[None]), "a path is"),
    ],
)
def test_bad_numbers_of_steps_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian_velocity, jnp.zeros((2, 2)))


# With labels

LABELS = jnp.arange(12) % 3


class Means(nn.Module):
    """v(x, t, label) is a vector of the label's."""

    @nn.compact
    def __call__(self, images, times, labels):
        zeros = nn.initializers.zeros_init()
        return nn.Embed(3, 6, embedding_init=zeros)(labels).reshape(images.shape)


class Unaware(Affine):
    """Sees labels and does not use them."""

    @nn.compact
    def __call__(self, images, times, labels):
        return Affine.__call__(self, images, times)


@pytest.mark.parametrize("coupling", [slow("independent"), "optimal"])
def test_labels_that_are_not_used_change_nothing(coupling):
    assert_same_bits(
        training(network=Unaware(), labels=LABELS, coupling=coupling), training(coupling=coupling)
    )


def test_semidiscrete_training_resumes_and_refuses_what_does_not_fit(monkeypatch, run):
    options = {"coupling": "semidiscrete", "potentials": jnp.linspace(0, 1, 12)}
    whole = training(**options)
    assert not np.array_equal(whole.losses, training().losses)
    interrupt(monkeypatch, partial(training, **options, run=run), 5)
    assert_same_bits(training(**options, run=run), whole)
    for changes, message in (
        ({"potentials": None}, "which needs them"),
        ({"coupling": "optimal"}, "potentials are of coupling semidiscrete"),
        ({"potentials": jnp.zeros(5)}, r"potentials are \[12\], one per image, not \(5,\)"),
        ({"augment_flip": True}, "images that the potentials do not know"),
    ):
        with pytest.raises(ValueError, match=message):
            training(**options | changes)


@pytest.mark.parametrize("coupling", [slow("independent"), "conditional"])
def test_a_velocity_of_the_label_only_is_the_mean_of_its_class(coupling):
    """E[x1 - x0 | label] is the class's mean less the source's, whatever the pairs within it."""
    source = Normal(jnp.arange(6.0))
    result = training(
        network=Means(), labels=LABELS, coupling=coupling, source=source, batch_size=12,
        num_steps=600, ema_decay=0.99, optimizer=optax.sgd(1.0),
    )  # fmt: skip
    means = np.asarray(images()).reshape(4, 3, 6).mean(axis=0)
    vectors = result.ema["params"]["Embed_0"]["embedding"]
    np.testing.assert_allclose(vectors, means - np.arange(6.0), atol=0.35)


def test_pairs_that_keep_labels_are_the_cheapest_of_these():
    """Against all permutations of six."""
    rng, labels = np.random.default_rng(0), np.array([0, 1, 0, 2, 1, 0])
    for _ in range(20):
        costs = rng.normal(size=(6, 6)).astype(np.float32)
        every = [p for p in permutations(range(6)) if np.array_equal(labels[list(p)], labels)]
        best = min(every, key=lambda p: costs[np.arange(6), list(p)].sum())
        order = optimal_permutation(jnp.asarray(costs), jnp.asarray(labels))
        np.testing.assert_array_equal(order, best)


def test_conditional_training_resumes_and_knows_its_labels(monkeypatch, run):
    options = {"network": Unaware(), "coupling": "conditional", "labels": LABELS}
    whole = training(**options)
    interrupt(monkeypatch, partial(training, **options, run=run), 5)
    assert_same_bits(training(**options, run=run), whole)
    with pytest.raises(RunFileError, match=r"run with another .*labels"):
        training(**options | {"labels": LABELS[::-1]}, run=run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": "conditional"}, "coupling conditional needs labels"),
        ({"labels": LABELS[:5]}, r"labels are 12 integers, one per image, got int32 \(5,\)"),
        ({"labels": jnp.zeros(12)}, r"got float32 \(12,\)"),
    ],
)
def test_bad_labels_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)


@pytest.mark.slow
def test_a_unet_with_classes_adds_a_vector_per_class():
    """With vectors of 0 it is the network without; else each label has its own velocity."""
    shapes = {"width": 4, "multipliers": (1,)}
    x, times, labels = images(2, shape=(4, 4, 1)), jnp.array([0.2, 0.7]), jnp.array([0, 2])
    network, plain = UNet(**shapes, num_classes=3), UNet(**shapes)
    parameters = network.init(KEY, x, times, labels)
    parameters = jax.tree.map(lambda p: p + 0.1, parameters)
    embedding = parameters["params"].pop("Embed_0")["embedding"]
    zero = {"params": parameters["params"] | {"Embed_0": {"embedding": 0 * embedding}}}
    expected = plain.apply(parameters, x, times)
    np.testing.assert_allclose(network.apply(zero, x, times, labels), expected, rtol=1e-6)
    vectors = {"params": parameters["params"] | {"Embed_0": {"embedding": embedding}}}
    other = [network.apply(vectors, x, times, jnp.full(2, label)) for label in range(3)]
    assert np.abs(other[0] - other[2]).max() > 1e-4
    mixed = network.apply(vectors, x, times, labels)
    np.testing.assert_allclose(mixed, [other[0][0], other[2][1]], rtol=1e-5)
    with pytest.raises(ValueError, match="3 classes: it needs labels"):
        network.init(KEY, x, times)
