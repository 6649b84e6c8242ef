"""Classifiers: train one from a key, evaluate it; several seeds are a vmap over keys.

Nothing is selected on the way: what comes back is the network after the last epoch.
"""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

Parameters = Any


@cache
def adam(learning_rate: float) -> optax.GradientTransformation:
    """`optax.adam`, one object for each step size: jit tells optimisers apart by identity."""
    return optax.adam(learning_rate)


@partial(jax.jit, static_argnames=("network", "optimizer", "num_epochs", "batch_size"))
def train(
    key: Array,
    network: nn.Module,
    images: Float[Array, "n height width channels"],
    labels: Int[Array, " n"],
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int = 50,
    batch_size: int = 64,
) -> tuple[Parameters, Float[Array, " num_epochs"]]:
    """(parameters after the last epoch, mean loss of each epoch) by cross-entropy.

    An epoch is a fresh shuffle, in ceil(n / batch_size) batches; the last one, if short, is a mean
    over what it has. `vmap` over keys trains seeds at once, with the same results.
    """
    n = len(images)
    batch_size = min(batch_size, n)
    num_batches = -(-n // batch_size)
    key_init, key_shuffle = jax.random.split(key)
    parameters = network.init(key_init, images[:1])

    def loss(parameters, chosen, present):
        logits = network.apply(parameters, images[chosen])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
        return jnp.sum(present * each) / jnp.sum(present)

    def epoch(carry, i):
        order = jax.random.permutation(jax.random.fold_in(key_shuffle, i), n)
        order = jnp.pad(order, (0, num_batches * batch_size - n), constant_values=-1)

        def step(carry, chosen):
            parameters, state = carry
            present = (chosen >= 0).astype(images.dtype)
            value, gradient = jax.value_and_grad(loss)(parameters, chosen, present)
            updates, state = optimizer.update(gradient, state, parameters)
            return (optax.apply_updates(parameters, updates), state), value * jnp.sum(present)

        carry, values = lax.scan(step, carry, order.reshape(num_batches, batch_size))
        return carry, jnp.sum(values) / n

    start = parameters, optimizer.init(parameters)
    (parameters, _), losses = lax.scan(epoch, start, jnp.arange(num_epochs))
    return parameters, losses


def train_seeds(
    keys: Array, network: nn.Module, images: Array, labels: Array, **options
) -> tuple[Parameters, Float[Array, "seeds num_epochs"]]:
    """`train` for every key at once; parameters have a leading axis of seeds."""
    return jax.vmap(lambda key: train(key, network, images, labels, **options))(keys)


@partial(jax.jit, static_argnames=("network", "block_size"))
def predict(
    network: nn.Module,
    parameters: Parameters,
    images: Float[Array, "n height width channels"],
    *,
    block_size: int = 1000,
) -> Int[Array, " n"]:
    """The class of the largest logit, `block_size` images at a time."""

    def label(image):
        return jnp.argmax(network.apply(parameters, image[None])[0])

    return lax.map(label, images, batch_size=min(block_size, len(images)))


def accuracy(
    network: nn.Module,
    parameters: Parameters,
    images: Float[Array, "n height width channels"],
    labels: Int[Array, " n"],
    *,
    block_size: int = 1000,
) -> Float[Array, ""]:
    """Share of the images whose label is predicted; `vmap` over parameters for an ensemble."""
    return jnp.mean(predict(network, parameters, images, block_size=block_size) == labels)
