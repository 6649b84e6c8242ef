"""What condensation minimizes: a loss between condensed and real images, as a step of `lib.gd`.

Particles are the stored images as rows, [classes, images, H W channels], in [0, 1]. A step draws
real images of every class, decodes the condensed ones (`factor`), augments both with the same
parameters, normalizes them, and compares their features under random networks. All classes are one
wide batch; `class_chunk` bounds how many are held at a time. The carry (`first_carry`) is the
number of the step, from which the networks are drawn: they stay for `steps_per_network` steps.
Where real images stay too (`steps_per_batch`), it holds their features.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from lib import augment, devices
from lib.gd import StatefulValueAndGrad
from lib.networks import convolution, network_by_name
from xp_dataset_distillation import losses
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.real_data import RealData, Setting, draw_batch


class Target(NamedTuple):
    """Arguments of a step: real images by class, and the data of the key of all networks."""

    real: RealData
    network_key: Array
    pool: Array | None = None
    """Of `pool.train_pool`, [networks, ages, P]; None where networks are random."""


class Batch(NamedTuple):
    """What a step compares; the first axis counts classes, except where a loss takes all at once:
    then `changes` and `keys` are one for all."""

    stored: Array
    """Condensed images [classes, n, H, W, c]."""
    chosen: Array | None
    """Indices [classes, k] of those that count; None: all."""
    real: Array | None
    """uint8 [classes, m, H, W, c]; None where their features are known."""
    features: Array | None
    """[classes, networks, m, f], of the network at hand [classes, m, f]; None: not known yet."""
    changes: Any
    """Parameters of the augmentation."""
    keys: Array
    """Of the loss."""
    labels: Array
    """[classes]."""


class Kept(NamedTuple):
    """Of real images that stay for several steps."""

    features: Array
    """[classes, networks, m, f]."""
    changes: Any
    """Parameters of the augmentation."""


Loss = Callable[[Array, Any, Batch], Array]
"""(the stored images that count, parameters of a network, batch) -> loss of every class, or of all
classes [1]."""


def network_of(
    config: CondenseConfig, setting: Setting, num_classes: int | None = None
) -> nn.Module:
    """The network; without `num_classes`, up to its features."""
    return network_by_name(
        config.network,
        num_classes,
        setting.image_shape,
        width=config.width,
        depth=config.depth,
        convolution=convolution.fastest(),
    )


@cache
def objective(
    config: CondenseConfig, setting: Setting, mesh: Mesh | None = None
) -> StatefulValueAndGrad:
    """(x, target, key, carry) -> (loss, gradient like x, next carry): the sum of the class losses,
    or `losses.dataset_loss`. The carry is `first_carry`'s. One object for each setting, so that a
    second run compiles nothing.

    The devices of a mesh share classes and networks; with mmdsw, which compares all classes, the
    classes' features and then the directions.
    """
    network = network_of(config, setting) if config.space == "features" else None
    augmentation = _augmentation(config, setting)
    num_classes, shape = setting.num_classes, setting.image_shape
    joint, keeps = config.method == "mmdsw", config.steps_per_batch > 1
    if joint:
        loss = _dataset_loss(config, setting, network, mesh)
        values_and_gradient = _mean_over_networks(loss, config)
    else:
        of_classes = _mean_over_networks(_class_losses(config, setting, network), config)
        most = config.class_chunk or num_classes
        in_chunks = partial(_in_chunks, of_classes, most)
        values_and_gradient = _over_devices(in_chunks, mesh, config, num_classes)
        in_chunks = partial(_in_chunks, _real_features(setting, network), most)
        real_features = devices.over_devices(in_chunks, mesh, replicated=1)

    def value_and_grad(x, target, key, carry):
        step, kept = carry if keeps else (carry, None)
        batch_key, change_key, loss_key, choice_key = jax.random.split(key, 4)
        parameters = None
        if network is not None:
            parameters = _draw_networks(target, step, config, setting)
        stored = x.reshape(num_classes, -1, *shape)
        real = draw_batch(batch_key, target.real, config.real_batch)
        if joint:
            changes, keys = augment.draw(change_key, augmentation, None), loss_key
        else:
            changes = _draw_changes(change_key, augmentation, num_classes)
            keys = jax.random.split(loss_key, num_classes)
        chosen = _choose(choice_key, stored, config.most_decoded // config.factor**2)
        batch = Batch(stored, chosen, real, None, changes, keys, jnp.arange(num_classes))
        if keeps:
            kept = lax.cond(
                step % config.steps_per_batch == 0,
                lambda: Kept(real_features(parameters, batch), changes),
                lambda: kept,
            )
            batch = batch._replace(real=None, features=kept.features, changes=kept.changes)
        values, gradient = values_and_gradient(parameters, batch)
        following = (step + 1, kept) if keeps else step + 1
        return jnp.sum(values), gradient.reshape(x.shape), following

    return value_and_grad


def first_carry(config: CondenseConfig, setting: Setting):
    """Of `objective`: step 0; with `steps_per_batch` also room for what is kept."""
    step = jnp.zeros((), jnp.int32)
    if config.steps_per_batch == 1:
        return step
    network, blank = network_of(config, setting), jnp.zeros((1, *setting.image_shape))

    def kept(key):
        changes = _draw_changes(key, _augmentation(config, setting), setting.num_classes)
        features: Any = network.apply(network.init(key, blank), blank)
        room = setting.num_classes, config.num_networks, config.real_batch, features.size
        return Kept(jnp.zeros(room), changes)

    return step, _zeros(jax.eval_shape(kept, jax.random.key(0)))


def _augmentation(config: CondenseConfig, setting: Setting) -> augment.Augmentation:
    return augment.parse(config.augmentation, dialect=config.strategy, flips=setting.flips)


def _draw_changes(key, augmentation: augment.Augmentation, num_classes: int):
    """Parameters of an augmentation of its own for each class."""
    keys = jax.random.split(key, num_classes)
    return jax.vmap(lambda key: augment.draw(key, augmentation, None))(keys)


def _zeros(shapes: Any) -> Any:
    """Arrays of zeros, of the shapes and dtypes that `jax.eval_shape` gives."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _class_losses(config: CondenseConfig, setting: Setting, network: nn.Module | None) -> Loss:
    """Each class by itself, with an augmentation of its own."""
    class_loss = losses.class_loss(
        config.kernel, scale=config.bandwidth_scale, num_features=config.num_features
    )
    features = partial(_augmented_features, network, setting)

    def loss(stored, parameters, batch):
        x = features(parameters, batch.changes, decode(stored, config.factor))
        y = batch.features
        if y is None:
            y = lax.stop_gradient(features(parameters, batch.changes, _unit(batch.real)))
        values = jax.vmap(class_loss)(batch.keys, x, y)
        if config.class_weight:
            values += config.class_weight * _cross_entropy(parameters, x, batch.labels)
        return values

    return loss


def _cross_entropy(parameters: Any, features: Array, labels: Array) -> Array:
    """The mean over the images of each class, [classes], by the network's last layer."""
    layers = parameters["params"]
    last = layers[max(name for name in layers if name.startswith("Dense"))]
    logits = nn.Dense(last["bias"].size).apply({"params": last}, features)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:, None])
    return jnp.mean(each, axis=1)


def _dataset_loss(
    config: CondenseConfig, setting: Setting, network: nn.Module | None, mesh: Mesh | None
) -> Loss:
    """All classes at once, with the same augmentation."""

    def features(parameters, changes, images):
        flat = images.reshape(-1, *setting.image_shape)
        images = augment.apply(changes, flat).reshape(images.shape)
        return _features(network, setting, parameters, images)

    of_classes = devices.over_devices(features, mesh, replicated=2)

    def loss(stored, parameters, batch):
        decoded = decode(stored, config.factor)
        x = of_classes(parameters, batch.changes, decoded)
        y = lax.stop_gradient(of_classes(parameters, batch.changes, _unit(batch.real)))
        value = losses.dataset_loss(
            batch.keys, x, y, num_directions=config.num_directions, mesh=mesh
        )
        return value[None]

    return loss


def _real_features(setting: Setting, network: nn.Module | None) -> Callable:
    """(parameters of networks, batch) -> features of its real images under each, [classes,
    networks, m, f]."""

    def features(parameters, batch):
        def under_network(parameters):
            real = _unit(batch.real)
            return _augmented_features(network, setting, parameters, batch.changes, real)

        return jnp.moveaxis(lax.map(under_network, parameters), 0, 1)

    return features


def _unit(images: Array) -> Array:
    """uint8 as floats in [0, 1]."""
    return images.astype(jnp.float32) / 255


def _augmented_features(network, setting: Setting, parameters, changes, images: Array) -> Array:
    """`_features` of images of which each class is changed in a way of its own."""
    return _features(network, setting, parameters, jax.vmap(augment.apply)(changes, images))


def _features(network: nn.Module | None, setting: Setting, parameters: Any, images: Array) -> Array:
    """[classes, k, f] of images [classes, k, H, W, c]; without a network, their pixels."""
    classes, k = images.shape[:2]
    if network is None:
        return images.reshape(classes, k, -1)
    normalized = setting.normalized(images).reshape(-1, *setting.image_shape)
    features: Any = network.apply(parameters, normalized)
    return features.reshape(classes, k, -1)


def _draw_networks(target: Target, step, config: CondenseConfig, setting: Setting) -> Any:
    """Parameters of networks, stacked along a first axis: random ones, or drawn from the pool."""
    key = jax.random.fold_in(
        jax.random.wrap_key_data(target.network_key), step // config.steps_per_network
    )
    keys = jax.random.split(key, config.num_networks)
    blank = jnp.zeros((1, *setting.image_shape))
    if config.networks == "random":
        network = network_of(config, setting)
        return jax.vmap(network.init, in_axes=(0, None))(keys, blank)
    pool = target.pool
    assert pool is not None
    whole = network_of(config, setting, setting.num_classes)
    _, unravel = ravel_pytree(_zeros(jax.eval_shape(whole.init, keys[0], blank)))

    def drawn(key):
        key, key_age = jax.random.split(key)
        ages = pool[jax.random.randint(key, (), 0, len(pool))]
        if config.networks == "trained":
            return unravel(ages[-1])
        if config.networks == "aged":
            return unravel(ages[jax.random.randint(key_age, (), 0, len(ages))])
        share = jax.random.uniform(key_age)
        return unravel((1 - share) * ages[0] + share * ages[-1])

    return jax.vmap(drawn)(keys)


def _choose(key, images, most: int):
    """At most `most` of each class's images, as indices [classes, most]; None: all of them."""
    classes, n = images.shape[:2]
    if n <= most:
        return None
    keys = jax.random.split(key, classes)
    return jax.vmap(lambda key: jax.random.permutation(key, n)[:most])(keys)


def _mean_over_networks(loss: Loss, config: CondenseConfig) -> Callable:
    """(parameters of networks, batch) -> (losses, gradients like the stored images)."""

    def values_and_gradient(parameters, batch):
        def total(stored, parameters, features):
            if batch.chosen is not None:
                stored = jax.vmap(lambda images, c: images[c])(stored, batch.chosen)
            values = loss(stored, parameters, batch._replace(features=features))
            return jnp.sum(values), values

        def under_network(network):
            value_and_grad = jax.value_and_grad(total, has_aux=True)
            (_, values), gradient = value_and_grad(batch.stored, *network)
            return values, gradient

        if parameters is None:
            return under_network((None, None))
        features = None if batch.features is None else jnp.moveaxis(batch.features, 1, 0)
        networks = parameters, features
        if len(jax.tree.leaves(parameters)[0]) == 1:
            return under_network(jax.tree.map(lambda leaf: leaf[0], networks))
        over = (
            jax.vmap(under_network) if config.networks_at_once else partial(lax.map, under_network)
        )
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), over(networks))

    return values_and_gradient


def _over_devices(of_classes: Callable, mesh, config: CondenseConfig, num_classes: int) -> Callable:
    """`of_classes(parameters of networks, batch)` with both divided over devices."""
    if mesh is None or mesh.size == 1:  # one device has no axes to average over
        return of_classes
    # Kept features are divided by classes only.
    divisible = config.space == "features" and config.steps_per_batch == 1
    networks = config.num_networks if divisible else 1
    rectangle = devices.grid(mesh, num_classes, networks, ("classes", "networks"))

    def of_shard(parameters, batch):
        return lax.pmean(of_classes(parameters, batch), "networks")

    return devices.over_devices(
        of_shard, rectangle, replicated=1, axis="classes", specs=(PartitionSpec("networks"),)
    )


def _in_chunks(of_classes: Callable, most: int, parameters: Any, batch: Batch):
    """`of_classes` of chunks of classes, the first axis, the largest divisor of their number up to
    `most` at a time."""
    classes = batch.stored.shape[0]
    size = max(size for size in range(1, classes + 1) if classes % size == 0 and size <= most)
    if size == classes:
        return of_classes(parameters, batch)
    chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batch)
    results = lax.map(partial(of_classes, parameters), chunks)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)


# ---- The step


def step_of(config: CondenseConfig, setting: Setting) -> tuple[float, float]:
    """(step size, momentum) of the joint heavy ball.

    The published loop takes a step of v <- g + m v, x <- x - lr v for each class in turn, where g
    is the gradient of that class only. With C classes, each class's images thus move by
    lr (1 + m + ... + m^(C-1)) v between two of their gradients, and v shrinks to m^C v: exactly
    one joint step of size lr (1 - m^C) / (1 - m) with momentum m^C, except for the clipping.
    """
    m, step_size = config.momentum, config.resolved_step_size(setting.image_shape)
    if not config.sequential:
        return step_size, m
    coasted = m**setting.num_classes
    return step_size * (1 - coasted) / (1 - m), coasted


@cache
def optimizer(step_size: float, momentum: float) -> optax.GradientTransformation:
    """Heavy ball, then back into [0, 1] pixel by pixel; the momentum is not clipped."""
    return optax.chain(optax.sgd(step_size, momentum=momentum or None), _within_unit_interval())


def _within_unit_interval() -> optax.GradientTransformation:
    def update(updates, state, parameters):
        moved = jax.tree.map(lambda p, u: jnp.clip(p + u, 0, 1) - p, parameters, updates)
        return moved, state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)
