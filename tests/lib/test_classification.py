"""Training against a plain loop with gradients in numpy, in float64; resuming."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow
from chunks import assert_same_bits, interrupt, record_chunks
from scipy.special import log_softmax

from lib.networks.classification import accuracy, fit_seeds, predict, train
from lib.networks.optimizers import sgd
from lib.runs import open_run
from lib.runs.files import RunFileError
from lib.runs.loop import DivergedError


class Linear(nn.Module):
    """Logits are W x + b."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes, param_dtype=x.dtype)(x)


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
    state, step = optimizer.init(parameters), 0
    one_hot, losses = np.eye(3)[labels], []
    for i in range(num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key_shuffle, i), len(images)))
        total = 0.0
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
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
            gradient = x.T @ residuals / len(batch), residuals.mean(axis=0)
            updates, state = optimizer.update(gradient, state, parameters)
            parameters = tuple(p + np.asarray(u) for p, u in zip(parameters, updates))
        losses.append(total / len(images))
    return *parameters, losses


@pytest.mark.parametrize(
    ("n", "batch_size", "optimizer", "transform"),
    [
        slow(6, 3, SGD, None),
        (7, 3, SGD, None),
        slow(7, 3, ADAM, None),
        (5, 64, ADAM, None),
        slow(4, 1, SGD, None),
        slow(1, 8, SGD, None),
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


# Sets and seeds, chunks and interruptions

KEYS = jax.random.split(jax.random.key(5), 2)
FLAT = sgd(0.05, momentum=0.9, milestones=(2,), steps_per_epoch=3)


def two_sets(n=7):
    images, labels = zip(*(blobs(n, seed=seed) for seed in (0, 1)))
    labels = [labels[0], labels[1][::-1]]
    return jnp.asarray(np.stack(images), jnp.float32), jnp.asarray(np.stack(labels), jnp.int32)


def fitted(**changes):
    images, labels = two_sets()
    options = {"keys": KEYS, "network": Linear(), "images": images, "labels": labels}
    options |= {"optimizer": FLAT, "num_epochs": 4, "batch_size": 3, "transform": mixed}
    return fit_seeds(**{"show_progress": False} | options | changes)


def test_sets_and_seeds_at_once_are_each_alone():
    """To float32 rounding, which the steps carry on: products of an ensemble are batched."""
    parameters, losses = fitted()
    assert losses.shape == (2, 2, 4)
    images, labels = two_sets()
    for i, j in np.ndindex(2, 2):
        options = {"num_epochs": 4, "batch_size": 3, "transform": mixed, "optimizer": FLAT}
        single = train(KEYS[j], Linear(), images[i], labels[i], **options)
        ours = jax.tree.map(lambda leaf, at=(i, j): leaf[at], (parameters, losses))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, single)
    assert np.ptp(losses, axis=(0, 1)).min() > 0.01


def test_chunks_and_interruptions_change_no_bit(monkeypatch, run):
    """4 epochs of 3 steps: stops within epochs and between them."""
    whole = fitted()
    interrupt(monkeypatch, partial(fitted, run=run), 1, 6, 11)
    sizes = record_chunks(monkeypatch)
    assert_same_bits(fitted(run=run), whole)
    assert sizes == [1]
    assert_same_bits(fitted(), whole)
    assert sizes == [1] * 13


@pytest.mark.slow
def test_seeds_in_turn_are_those_at_once(monkeypatch, run):
    images, labels = two_sets()
    one = {"images": images[0], "labels": labels[0]}
    whole = fitted(**one, at_once=False)
    for leaf, reference in zip(jax.tree.leaves(whole), jax.tree.leaves(fitted(**one))):
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6)
    interrupt(monkeypatch, partial(fitted, **one, at_once=False, run=run), 5)
    assert_same_bits(fitted(**one, at_once=False, run=run), whole)
    with pytest.raises(ValueError, match="several sets"):
        fitted(at_once=False)


def test_another_runs_checkpoint_is_refused(monkeypatch, run):
    interrupt(monkeypatch, partial(fitted, run=run), 1)
    images, labels = two_sets()
    for name, change in (
        ("data", {"images": images.at[1, 3].multiply(1.5)}),
        ("data", {"labels": labels[::-1]}),
        ("key", {"keys": KEYS[::-1]}),
        ("batch_size", {"batch_size": 4}),
        ("num_epochs", {"num_epochs": 5}),
        ("transform", {"transform": lambda key, images, targets: (images, targets)}),
        ("optimizer", {"optimizer": sgd(0.05, momentum=0.9, milestones=(3,), steps_per_epoch=3)}),
    ):
        with pytest.raises(RunFileError, match=f"run with another {name}"):
            fitted(run=run, **change)


@pytest.mark.parametrize("block_size", [1, 4, 11, 1000])
def test_predictions_and_accuracies_of_an_ensemble_do_not_depend_on_blocks(block_size):
    images, labels = blobs(11)
    images = images.astype("f")
    keys = jax.random.split(jax.random.key(1), 4)
    parameters = jax.vmap(partial(Linear().init, images=jnp.asarray(images[:1])))(keys)
    layer = jax.tree.map(np.asarray, parameters["params"]["Dense_0"])
    logits = images.reshape(11, -1) @ layer["kernel"] + layer["bias"][:, None]
    expected = np.argmax(logits, axis=2)
    arrays, options = (jnp.asarray(images), jnp.asarray(labels)), {"block_size": block_size}
    predicted = jax.vmap(lambda p: predict(Linear(), p, arrays[0], **options))(parameters)
    np.testing.assert_array_equal(predicted, expected)
    shares = jax.vmap(lambda p: accuracy(Linear(), p, *arrays, **options))(parameters)
    np.testing.assert_allclose(shares, np.mean(expected == labels, axis=1), rtol=1e-6)
    assert len(set(np.asarray(shares).tolist())) > 1


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


def test_training_goes_on_from_given_parameters(tmp_path):
    """From what the keys would draw: the same bits; from what was trained: a lower first loss, and
    a checkpoint of another start is refused."""
    images, labels = (jnp.asarray(a) for a in blobs(12))
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"optimizer": SGD, "num_epochs": 3, "batch_size": 4, "show_progress": False}
    drawn = [Linear().init(jax.random.split(key)[0], images[:1]) for key in keys]
    drawn = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    plain = fit_seeds(keys, Linear(), images, labels, **options)
    assert_same_bits(plain, fit_seeds(keys, Linear(), images, labels, parameters=drawn, **options))
    _, losses = fit_seeds(keys, Linear(), images, labels, parameters=plain[0], **options)
    assert np.all(losses[:, 0] < plain[1][:, 0])
    run = open_run(tmp_path, "x", "tuned", {}, seed=0)
    fit_seeds(keys, Linear(), images, labels, parameters=drawn, run=run, **options)
    with pytest.raises(RunFileError, match="parameters"):
        fit_seeds(keys, Linear(), images, labels, parameters=plain[0], run=run, **options)
