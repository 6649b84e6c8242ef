"""What condensation descends: a loss between condensed and real images, as a step of `lib.gd`.

Particles are the stored images as rows, [classes, images, H W channels], in [0, 1]. A step draws
real images of every class, decodes the condensed ones (`factor`), changes both by the same
parameters of augmentation, normalises them, and compares their features under random networks.
All classes are one wide batch; `class_chunk` bounds how many are held at a time. The carry is the
number of the step, from which the networks are drawn: they stay for `iterations_per_network` steps.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from lib import augment, devices
from lib.gd import StatefulValueAndGrad
from lib.networks import convolution, network_by_name
from xp_dataset_distillation import losses
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.real_data import RealData, draw_batch


class Target(NamedTuple):
    """Arguments of a step: real images by class, and the data of the key of all networks."""

    real: RealData
    network_key: Array


class Setting(NamedTuple):
    """What the data say to the objective; hashable."""

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def normalised(self, images: Array) -> Array:
        """(images - mean) / std by channel, the last axis."""
        shape = (1,) * (images.ndim - 1) + (-1,)
        mean, std = (jnp.asarray(v, images.dtype).reshape(shape) for v in (self.mean, self.std))
        return (images - mean) / std


def feature_network(config: CondenseConfig, setting: Setting) -> nn.Module:
    """The network without its last layer."""
    return network_by_name(
        config.network,
        None,
        setting.image_shape,
        width=config.width,
        depth=config.depth,
        convolution=convolution.fastest(),
    )


@cache
def objective(
    config: CondenseConfig, setting: Setting, mesh: Mesh | None = None
) -> StatefulValueAndGrad:
    """(x, target, key, step) -> (loss, gradient like x, step + 1): the sum of the class losses, or
    `losses.dataset_loss`. One object for each setting, so that a second run compiles nothing.

    The devices of a mesh share classes and networks; with mmdsw, which compares all classes, the
    classes' features and then the directions.
    """
    network = feature_network(config, setting) if config.space == "features" else None
    augmentation = augment.parse(config.augmentation, dialect=config.dialect, flips=setting.flips)
    joint = config.method == "mmdsw"
    at_once = config.networks_at_once
    if at_once is None:
        at_once = convolution.networks_at_once()
    shape, num_classes = setting.image_shape, setting.num_classes
    most_stored = config.most_decoded // config.factor**2
    class_loss = losses.class_loss(
        config.kernel, scale=config.bandwidth_scale, num_features=config.num_features
    )

    def features(parameters, images, changes):
        """[classes, k, f] of images [classes, k, H, W, c]."""
        if joint:
            flat = images.reshape(-1, *shape)
            images = augment.apply(changes, flat).reshape(images.shape)
        else:
            images = jax.vmap(augment.apply)(changes, images)
        classes, k = images.shape[:2]
        if network is None:
            return images.reshape(classes, k, -1)
        normalised = setting.normalised(images).reshape(-1, *shape)
        embedded: Any = network.apply(parameters, normalised)
        return embedded.reshape(classes, k, -1)

    def loss(images, parameters, real, changes, keys):
        """Over some classes, under one network: images [classes, n, H, W, c] stored, real uint8
        [classes, m, ...]."""
        decoded = decode(images, config.factor)
        real = real.astype(jnp.float32) / 255
        if joint:
            of_classes = devices.over_devices(
                lambda parameters, changes, images: features(parameters, images, changes),
                mesh,
                whole=2,
            )
            x = of_classes(parameters, changes, decoded)
            y = lax.stop_gradient(of_classes(parameters, changes, real))
            found = losses.dataset_loss(keys, x, y, num_directions=config.num_directions, mesh=mesh)
            return found[None]
        x = features(parameters, decoded, changes)
        y = lax.stop_gradient(features(parameters, real, changes))
        return jax.vmap(class_loss)(keys, x, y)

    def value_and_grad(x, target, key, step):
        batch_key, change_key, loss_key, choice_key = jax.random.split(key, 4)
        parameters = networks(target.network_key, step)
        images = x.reshape(num_classes, -1, *shape)
        real = draw_batch(batch_key, target.real, config.real_batch)
        if joint:
            changes = augment.draw(change_key, augmentation, None)
            keys = loss_key
        else:
            changes = jax.vmap(lambda key: augment.draw(key, augmentation, None))(
                jax.random.split(change_key, num_classes)
            )
            keys = jax.random.split(loss_key, num_classes)
        chosen = _choose(choice_key, images, most_stored)

        def of_classes(parameters, chunk):
            images, chosen, real, changes, keys = chunk

            def value(images, parameters):
                taken = images if chosen is None else jax.vmap(lambda i, c: i[c])(images, chosen)
                values = loss(taken, parameters, real, changes, keys)
                return jnp.sum(values), values

            def each(images, parameters):
                (_, values), gradient = jax.value_and_grad(value, has_aux=True)(images, parameters)
                return values, gradient

            return mean_over_networks(each, images, parameters)

        def in_chunks(parameters, chunk):
            most = config.class_chunk or num_classes
            return _in_chunks(partial(of_classes, parameters), chunk, most)

        chunk = (images, chosen, real, changes, keys)
        advance = of_classes if joint else _over_devices(in_chunks, mesh, config, num_classes)
        values, gradient = advance(parameters, chunk)
        return jnp.sum(values), gradient.reshape(x.shape), step + 1

    def mean_over_networks(each, images, parameters):
        if network is None:
            return each(images, None)
        if len(jax.tree.leaves(parameters)[0]) == 1:
            return each(images, jax.tree.map(lambda leaf: leaf[0], parameters))
        if at_once:
            found = jax.vmap(each, in_axes=(None, 0))(images, parameters)
        else:
            found = lax.map(lambda one: each(images, one), parameters)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)

    def networks(network_key, step) -> Any:
        if network is None:
            return None
        key = jax.random.fold_in(
            jax.random.wrap_key_data(network_key), step // config.iterations_per_network
        )
        keys = jax.random.split(key, config.num_networks)
        return jax.vmap(network.init, in_axes=(0, None))(keys, jnp.zeros((1, *shape)))

    return value_and_grad


def _choose(key, images, most: int):
    """At most `most` of each class's images, as indices [classes, most]; None: all of them."""
    classes, n = images.shape[:2]
    if n <= most:
        return None
    keys = jax.random.split(key, classes)
    return jax.vmap(lambda key: jax.random.permutation(key, n)[:most])(keys)


def _over_devices(of_classes: Callable, mesh, config: CondenseConfig, num_classes: int) -> Callable:
    """`of_classes(parameters of networks, arrays of classes)` with both divided over devices."""
    if mesh is None or mesh.size == 1:  # one device has no axes to average over
        return of_classes
    networks = config.num_networks if config.space == "features" else 1
    rectangle = devices.grid(mesh, num_classes, networks, ("classes", "networks"))

    def of_one(parameters, chunk):
        return lax.pmean(of_classes(parameters, chunk), "networks")

    return devices.over_devices(
        of_one, rectangle, whole=1, axis="classes", specs=(PartitionSpec("networks"),)
    )


def _in_chunks(function: Callable, arrays: Any, most: int) -> tuple[Array, Array]:
    """(values, gradients) of `function` over chunks of classes, the first axis, the largest
    divisor of their number up to `most` at a time."""
    classes = jax.tree.leaves(arrays)[0].shape[0]
    size = max(size for size in range(1, classes + 1) if classes % size == 0 and size <= most)
    if size == classes:
        return function(arrays)
    split = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), arrays)
    values, gradients = lax.map(function, split)
    return values.reshape(-1), gradients.reshape(-1, *gradients.shape[2:])


# ---- The step


def step_of(config: CondenseConfig, setting: Setting) -> tuple[float, float]:
    """(step size, momentum) of the joint heavy ball.

    The published loop takes a step of v <- g + m v, x <- x - lr v for each class in turn, where g
    is the gradient of that class alone. With C classes, each class's images thus move by
    lr (1 + m + ... + m^(C-1)) v between two of their gradients, and v shrinks to m^C v: exactly
    one joint step of size lr (1 - m^C) / (1 - m) with momentum m^C, but for the clipping.
    """
    m, step_size = config.momentum, config.step_size(setting.image_shape)
    if not config.sequential:
        return step_size, m
    coasted = m**setting.num_classes
    return step_size * (1 - coasted) / (1 - m), coasted


@cache
def optimizer(lr: float, momentum: float) -> optax.GradientTransformation:
    """Heavy ball, then back into [0, 1] pixel by pixel; the momentum is not clipped."""
    return optax.chain(optax.sgd(lr, momentum=momentum or None), _within_unit_interval())


def _within_unit_interval() -> optax.GradientTransformation:
    def update(updates, state, parameters):
        moved = jax.tree.map(lambda p, u: jnp.clip(p + u, 0, 1) - p, parameters, updates)
        return moved, state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)
