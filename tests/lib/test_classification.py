"""Training against a plain loop with gradients in numpy, in float64; resuming."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chunks import record_chunks, stop_after
from scipy.special import log_softmax

from lib import runs
from lib.networks import LeNet5
from lib.networks.classification import (
    accuracy,
    fit_seeds,
    predict,
    steps_per_epoch,
    train,
    train_seeds,
)
from lib.networks.optimizers import sgd
from lib.runs.console import Interrupted
from lib.runs.files import RunFileError
from lib.runs.loop import DivergedError


class Linear(nn.Module):
    """Logits are W x + b."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes, param_dtype=x.dtype)(x)


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(20)(images.reshape(len(images), -1)))
        return nn.Dense(3)(x)


SGD, ADAM = optax.sgd(0.3, momentum=0.9), optax.adam(0.05)


def blobs(n, num_classes=3, size=2, separation=1.0, seed=0):
    """Images [n, size, size, 1] about `num_classes` means, with their labels."""
    rng = np.random.default_rng(seed)
    means = separation * rng.normal(size=(num_classes, size, size, 1))
    labels = np.arange(n) % num_classes
    return means[labels] + rng.normal(size=(n, size, size, 1)), labels


def mixed(key, images, targets):
    """Noise, and every image and target mixed with another's; targets no longer sum to 1."""
    noise_key, partner_key = jax.random.split(key)
    partners = jax.random.permutation(partner_key, len(images))
    images = images + 0.1 * jax.random.normal(noise_key, images.shape, images.dtype)
    return 0.6 * images + 0.4 * images[partners], 0.6 * targets + 0.5 * targets[partners]


def plain_loop(key, images, labels, optimizer, num_epochs, batch_size, transform=None):
    """(weights, biases, losses) of a `Linear`, one batch after the other."""
    key_init, key_shuffle = jax.random.split(key)
    start = Linear().init(key_init, images[:1])["params"]["Dense_0"]
    parameters = np.asarray(start["kernel"]), np.asarray(start["bias"])
    state = optimizer.init(parameters)
    one_hot, losses, step = np.eye(3)[labels], [], 0
    for i in range(num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key_shuffle, i), len(images)))
        total, left = 0.0, order
        while len(left):
            batch, left = left[:batch_size], left[batch_size:]
            x, targets = images[batch], one_hot[batch]
            if transform is not None:
                filled = np.concatenate([batch, order])[: min(batch_size, len(images))]
                step_key = jax.random.fold_in(jax.random.fold_in(key, 2), step)
                made = transform(step_key, *map(jnp.asarray, (images[filled], one_hot[filled])))
                x, targets = (np.asarray(array)[: len(batch)] for array in made)
            x, step = x.reshape(len(batch), -1), step + 1
            logs = log_softmax(x @ parameters[0] + parameters[1], axis=1)
            total -= (targets * logs).sum()
            residuals = np.exp(logs) * targets.sum(axis=1, keepdims=True) - targets
            residuals /= len(batch)
            gradient = x.T @ residuals, residuals.sum(axis=0)
            updates, state = optimizer.update(gradient, state, parameters)
            parameters = tuple(p + np.asarray(u) for p, u in zip(parameters, updates))
        losses.append(total / len(images))
    return *parameters, losses


@pytest.mark.parametrize(
    ("n", "batch_size", "optimizer", "transform"),
    [
        (6, 3, SGD, None),
        (7, 3, SGD, None),
        (7, 3, ADAM, None),
        (5, 64, ADAM, None),
        (4, 1, SGD, None),
        (1, 8, SGD, None),
        (7, 4, SGD, mixed),
    ],
    ids=["whole", "short", "adam", "one", "single", "point", "mixed"],
)
def test_training_is_the_plain_loop(x64, n, batch_size, optimizer, transform):
    images, labels = blobs(n)
    key, options = jax.random.key(3), {"num_epochs": 4, "batch_size": batch_size}
    options |= {"optimizer": optimizer, "transform": transform}
    parameters, losses = train(key, Linear(), jnp.asarray(images), jnp.asarray(labels), **options)
    kernel, bias, expected = plain_loop(key, images, labels, **options)
    layer = parameters["params"]["Dense_0"]
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    np.testing.assert_allclose(layer["kernel"], kernel, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(layer["bias"], bias, rtol=1e-8, atol=1e-12)


def test_seeds_at_once_are_seeds_one_by_one():
    """To float32 rounding, which the steps carry on: products of an ensemble are batched, and sum
    in another order."""
    images, labels = blobs(10, size=3)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    network = TwoLayers()
    keys = jax.random.split(jax.random.key(0), 3)
    options = {"optimizer": SGD, "num_epochs": 3, "batch_size": 4}
    parameters, losses = train_seeds(keys, network, images, labels, **options)
    alone = [train(key, network, images, labels, **options) for key in keys]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    for leaf, reference in zip(jax.tree.leaves((parameters, losses)), jax.tree.leaves(expected)):
        assert leaf.shape == reference.shape
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6 * np.abs(reference).max())
    assert np.ptp(losses, axis=0).min() > 0.01


# Sets and seeds, chunks and interruptions

KEYS = jax.random.split(jax.random.key(5), 2)
FLAT = sgd(0.05, momentum=0.9, milestones=(2,), steps_per_epoch=3)


def two_sets(n=7):
    images, labels = zip(*(blobs(n, seed=seed) for seed in (0, 1)))
    labels = [labels[0], labels[1][::-1]]
    return jnp.asarray(np.stack(images), jnp.float32), jnp.asarray(np.stack(labels), jnp.int32)


def fitted(train=fit_seeds, **changes):
    images, labels = two_sets()
    options = {"keys": KEYS, "network": Linear(), "images": images, "labels": labels}
    options |= {"optimizer": FLAT, "num_epochs": 4, "batch_size": 3, "transform": mixed}
    options |= {"show_progress": False} if train is fit_seeds else {}
    return train(**options | changes)


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_sets_and_seeds_at_once_are_each_alone():
    parameters, losses = fitted(train_seeds)
    assert losses.shape == (2, 2, 4)
    images, labels = two_sets()
    for i in range(2):
        for j, key in enumerate(KEYS):
            options = {"num_epochs": 4, "batch_size": 3, "transform": mixed}
            alone = train(key, Linear(), images[i], labels[i], optimizer=FLAT, **options)
            found = jax.tree.map(lambda leaf, at=(i, j): leaf[at], (parameters, losses))
            for leaf, reference in zip(jax.tree.leaves(found), jax.tree.leaves(alone)):
                assert leaf.shape == reference.shape
                np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6)
    spread = np.ptp(np.asarray(losses).reshape(4, 4), axis=0)
    assert spread.min() > 0.01


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "fit", {}, seed=0)


def test_chunks_and_interruptions_change_no_bit(monkeypatch, run):
    """4 epochs of 3 steps: stops within epochs and between them."""
    whole = fitted(train_seeds)
    assert_same_bits(fitted(), whole)
    for step in (1, 6, 11):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"after step {step};"):
                fitted(run=run)
    sizes = record_chunks(monkeypatch)
    assert_same_bits(fitted(run=run), whole)
    assert sizes == [1]
    assert_same_bits(fitted(), whole)
    assert sizes == [1] * 13


def test_seeds_in_turn_are_those_at_once(monkeypatch, run):
    images, labels = two_sets()
    one = {"images": images[0], "labels": labels[0]}
    whole = fitted(**one, at_once=False)
    for leaf, reference in zip(jax.tree.leaves(whole), jax.tree.leaves(fitted(**one))):
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted, match="after step 5;"):
            fitted(**one, at_once=False, run=run)
    assert_same_bits(fitted(**one, at_once=False, run=run), whole)
    with pytest.raises(ValueError, match="several sets"):
        fitted(at_once=False)


def test_another_runs_checkpoint_is_refused(monkeypatch, run):
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        fitted(run=run)
    images, labels = two_sets()
    changes = [
        {"images": images.at[1, 3].multiply(1.5)},
        {"labels": labels[::-1]},
        {"keys": KEYS[::-1]},
        {"batch_size": 4},
        {"num_epochs": 5},
        {"transform": lambda key, images, targets: (images, targets)},
        {"optimizer": sgd(0.05, momentum=0.9, milestones=(3,), steps_per_epoch=3)},
    ]
    for change in changes:
        (name,) = change
        name = {"images": "data", "labels": "data", "keys": "key"}.get(name, name)
        with pytest.raises(RunFileError, match=f"run with another {name}"):
            fitted(run=run, **change)


def test_divergence_names_the_step_and_saves_the_last_good_state(monkeypatch, run):
    """A step size that becomes infinite at step 5 makes parameters that are not finite."""
    optimizer = optax.sgd(lambda step: jnp.where(step == 5, jnp.inf, 0.01))
    record_chunks(monkeypatch)
    with pytest.raises(DivergedError, match=r"in step 5 .*last good state is in") as caught:
        fitted(optimizer=optimizer, run=run)
    assert caught.value.step == 5
    saved, step = run.load_checkpoint((caught.value.state, ()))
    assert step == 5
    assert_same_bits(saved[0], caught.value.state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved[0].parameters))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": jnp.zeros((2, 7, 2, 2, 1)).at[1, 2, 0, 1, 0].set(jnp.nan)}, "NaN or infinity"),
        ({"images": jnp.zeros((2, 6, 2, 2, 1))}, r"label each, got \(2, 6, 2, 2, 1\) and \(2, 7\)"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        fitted(**changes)


# A whole problem


def test_a_separable_problem_is_learnt():
    images, labels = blobs(60, size=16, separation=3.0)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    network = LeNet5(num_classes=3)
    options = {"optimizer": optax.adam(3e-3), "num_epochs": 15, "batch_size": 16}
    parameters, losses = train(jax.random.key(0), network, images[:45], labels[:45], **options)
    assert losses[-1] < 0.05 * losses[0]
    assert accuracy(network, parameters, images[45:], labels[45:]) == 1


@pytest.mark.parametrize("block_size", [1, 4, 11, 1000])
def test_predictions_do_not_depend_on_blocks(block_size):
    images, labels = blobs(11)
    images = images.astype("f")
    parameters = Linear().init(jax.random.key(1), jnp.asarray(images[:1]))
    layer = jax.tree.map(np.asarray, parameters["params"]["Dense_0"])
    expected = np.argmax(images.reshape(11, -1) @ layer["kernel"] + layer["bias"], axis=1)
    assert len(set(expected)) > 1
    predicted = predict(Linear(), parameters, jnp.asarray(images), block_size=block_size)
    np.testing.assert_array_equal(predicted, expected)
    share = accuracy(
        Linear(), parameters, jnp.asarray(images), jnp.asarray(labels), block_size=block_size
    )
    assert 0 < np.mean(expected == labels) < 1
    np.testing.assert_allclose(share, np.mean(expected == labels), rtol=1e-6)


def test_accuracy_of_an_ensemble():
    images, labels = blobs(11)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(1), 4)
    ensemble = [Linear().init(key, images[:1]) for key in keys]
    expected = [accuracy(Linear(), p, images, labels, block_size=4) for p in ensemble]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    shares = jax.vmap(lambda p: accuracy(Linear(), p, images, labels, block_size=4))(stacked)
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    assert len(set(np.asarray(shares).tolist())) > 1


def test_steps_per_epoch_counts_a_short_batch():
    sizes = [(6, 3), (7, 3), (5, 64), (1, 1)]
    assert [steps_per_epoch(*size) for size in sizes] == [2, 3, 1, 1]
