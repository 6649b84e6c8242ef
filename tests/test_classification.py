"""Training against a plain loop with gradients in numpy, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from lib.classification import accuracy, adam, predict, train, train_seeds
from lib.networks import LeNet5


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


def plain_loop(key, images, labels, optimizer, num_epochs, batch_size):
    """(weights, biases, losses) of a `Linear`, one batch after the other."""
    key_init, key_shuffle = jax.random.split(key)
    start = Linear().init(key_init, images[:1])["params"]["Dense_0"]
    parameters = np.asarray(start["kernel"]), np.asarray(start["bias"])
    state = optimizer.init(parameters)
    x, one_hot, losses = images.reshape(len(images), -1), np.eye(3)[labels], []
    for i in range(num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key_shuffle, i), len(x)))
        total = 0.0
        while len(order):
            batch, order = order[:batch_size], order[batch_size:]
            logs = log_softmax(x[batch] @ parameters[0] + parameters[1], axis=1)
            total -= (one_hot[batch] * logs).sum()
            residuals = (np.exp(logs) - one_hot[batch]) / len(batch)
            gradient = x[batch].T @ residuals, residuals.sum(axis=0)
            updates, state = optimizer.update(gradient, state, parameters)
            parameters = tuple(p + np.asarray(u) for p, u in zip(parameters, updates))
        losses.append(total / len(x))
    return *parameters, losses


@pytest.mark.parametrize(
    ("n", "batch_size", "optimizer"),
    [(6, 3, SGD), (7, 3, SGD), (7, 3, ADAM), (5, 64, ADAM), (4, 1, SGD), (1, 8, SGD)],
    ids=["whole", "short", "adam", "one", "single", "point"],
)
def test_training_is_the_plain_loop(x64, n, batch_size, optimizer):
    images, labels = blobs(n)
    key, options = jax.random.key(3), {"num_epochs": 4, "batch_size": batch_size}
    parameters, losses = train(
        key, Linear(), jnp.asarray(images), jnp.asarray(labels), optimizer=optimizer, **options
    )
    kernel, bias, expected = plain_loop(key, images, labels, optimizer, **options)
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


def test_adam_is_one_object_a_step_size_and_steps_as_published():
    """Kingma and Ba (2015), algorithm 1, for two steps."""
    assert adam(0.1) is adam(0.1)
    assert adam(0.1) is not adam(0.2)
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    parameters = jnp.asarray(x, jnp.float32)
    state = adam(0.1).init(parameters)
    for t, gradient in enumerate(([0.5, -3.0], [-1.0, 2.0]), 1):
        updates, state = adam(0.1).update(jnp.asarray(gradient, jnp.float32), state)
        parameters = optax.apply_updates(parameters, updates)
        g = np.array(gradient)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(parameters, x, rtol=1e-5)
