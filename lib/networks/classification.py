"""Classifiers: train one from a key, evaluate it; several seeds and several sets at once.

Training runs in one compiled loop. The key, the epoch and the step fix what each step draws, so
`fit_seeds`, which trains in chunks (`lib.runs.loop`), ends in the same bits, interrupted or not.

Nothing is selected on the way: what comes back is the network after the last epoch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lib import devices
from lib.runs import Run
from lib.runs.loop import Chunk, run_steps, traced, traced_optimizer

Parameters = Any
# transform(key, images [B, H, W, channels], targets [B, classes]) -> (images, targets): augments,
# mixes, normalizes. A pure function, known to jit by its hash: make it once.
Transform = Callable[[Array, Array, Array], tuple[Array, Array]]
"""An augmentation: of a key, images and targets; gives images and targets."""

NEVER = np.iinfo(np.int32).max


# Training


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """ceil(num_images / batch_size): the last batch may be short."""
    return -(-num_images // min(batch_size, num_images))


class TrainState(NamedTuple):
    """What the next step depends on, data and key aside; `losses[e]` is the sum over the images
    that epoch e has seen so far."""

    parameters: Parameters
    optimizer_state: Any
    losses: Float[Array, "*ensemble num_epochs"]
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("network", "optimizer", "num_epochs", "batch_size", "transform"))
def train(
    key: Array,
    network: nn.Module,
    images: Float[Array, "n height width channels"],
    labels: Int[Array, " n"],
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int = 50,
    batch_size: int = 64,
    transform: Transform | None = None,
) -> tuple[Parameters, Float[Array, " num_epochs"]]:
    """(parameters after the last epoch, mean loss of each epoch) by cross-entropy.

    An epoch is a fresh shuffle, in ceil(n / batch_size) batches; the last one, if short, is a mean
    over what it has. `vmap` over keys trains seeds at once, with the same results.

    `transform` makes of every batch and its one-hot targets what is trained on, with targets t that
    need not be one-hot: the loss is -sum_k t_k log p_k. It sees a short batch filled up with images
    from the beginning of the epoch, which count in the loss only as far as it mixes them into the
    others.
    """
    state = _start(key, images, network=network, optimizer=optimizer, num_epochs=num_epochs)
    options = {"network": network, "optimizer": optimizer, "transform": transform}
    num_steps = num_epochs * steps_per_epoch(len(images), batch_size)
    state, *_ = _steps(key, state, images, labels, num_steps, batch_size=batch_size, **options)
    return state.parameters, state.losses / len(images)


def fit_seeds(
    keys: Array,
    network: nn.Module,
    images: Array,
    labels: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int = 50,
    batch_size: int = 64,
    transform: Transform | None = None,
    parameters: Parameters | None = None,
    at_once: bool = True,
    run: Run | None = None,
    checkpoint_seconds: float = 60.0,
    show_progress: bool = True,
    description: str = "training",
    mesh: Mesh | None = None,
) -> tuple[Parameters, Float[Array, "*sets seeds num_epochs"]]:
    """`train` for every key at once, with a progress bar and, in a run folder, checkpoints; for the
    other arguments see there. Parameters have a leading axis of seeds.

    Args:
      images: [n, H, W, channels], or [sets, n, H, W, channels]: each set is then trained on from
        every key, and what comes back has axes [sets, seeds].
      labels: [n], or [sets, n].
      parameters: to start from (fine-tuning), with the leading axes of what comes back; None: drawn
        from the keys.
      at_once: False trains the seeds of one set one after the other within each chunk, equal to
        rounding. For convolutions that is better: one with several kernels costs twice as much as
        one each on a CPU, and on a GPU its gradient is a grouped one with windows as large as the
        image (jax issue 13800).
      run, checkpoint_seconds: the run folder (`lib.runs.open_run`) to save into and to resume from,
        and the seconds between saves; `lib.runs.loop.run_steps` says more.
      mesh: devices (`lib.devices`) that share the seeds, or the sets where there are several.

    Raises:
      ValueError: before any step, on NaN in the images, labels of another shape, a number of
        epochs or a batch size below 1, several sets without `at_once`.
      DivergedError: NaN or infinity in any network; the last good state is saved.
      RunFileError: the folder's checkpoint is of other data, settings or keys.
    """
    _check_input(images, labels, num_epochs, batch_size)
    if not at_once and images.ndim == 5:
        raise ValueError("several sets are trained at once: at_once=False is for one")
    options = {"network": network, "optimizer": optimizer}
    start = partial(_start_all, keys, images, parameters, num_epochs=num_epochs, **options)
    options |= {"batch_size": batch_size, "transform": transform}
    inputs = devices.device_put((keys, images, labels), mesh)
    step = partial(_advance, at_once=at_once, mesh=mesh, **options)

    def advance(state, done, size):
        state, *results = step(state, size, *inputs)
        loss, first_bad = devices.fetch(results)
        bad = int(np.min(first_bad))
        return Chunk(state, {"loss": np.mean(loss)}, None if bad == NEVER else bad - done)

    state, _ = run_steps(
        advance,
        start(),
        num_epochs * steps_per_epoch(images.shape[-4], batch_size),
        run=run,
        identity=lambda: _identity(keys, images, labels, num_epochs, parameters, **options),
        place=partial(devices.device_put, mesh=mesh),
        checkpoint_seconds=checkpoint_seconds,
        show_progress=show_progress,
        description=description,
    )
    return devices.gather((state.parameters, state.losses / images.shape[-4]), mesh)


# The compiled loop


def _start(key, images, parameters=None, *, network, optimizer, num_epochs) -> TrainState:
    if parameters is None:
        parameters = network.init(jax.random.split(key)[0], images[:1])
    losses = jnp.zeros(num_epochs, images.dtype)
    return TrainState(parameters, optimizer.init(parameters), losses, jnp.zeros((), jnp.int32))


def _steps(
    key, state, images, labels, num_steps, *, network, optimizer, batch_size, transform
) -> tuple[TrainState, Float[Array, ""], Int[Array, ""]]:
    """(state after `num_steps`, the last one's loss, the first step that met NaN or NEVER)."""
    n = len(images)
    batch_size = min(batch_size, n)
    num_batches = steps_per_epoch(n, batch_size)
    key_shuffle = jax.random.split(key)[1]
    key_transform = jax.random.fold_in(key, 2)  # the split's two are no fold_in of this one

    def shuffled(epoch):
        return jax.random.permutation(jax.random.fold_in(key_shuffle, epoch), n)

    def loss(parameters, step, chosen, present):
        batch = images[chosen]
        if transform is None:
            logits = network.apply(parameters, batch)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
        else:
            num_classes = jax.eval_shape(network.apply, parameters, batch).shape[1]
            targets = jax.nn.one_hot(labels[chosen], num_classes, dtype=images.dtype)
            batch, targets = transform(jax.random.fold_in(key_transform, step), batch, targets)
            losses = optax.softmax_cross_entropy(network.apply(parameters, batch), targets)
        return jnp.sum(present * losses) / jnp.sum(present)

    def body(step, carry):
        state, order, _, first_bad = carry
        epoch, batch = step // num_batches, step % num_batches
        order = lax.cond((batch == 0) | (step == first), shuffled, lambda _: order, epoch)
        # Beyond the end: images from the beginning, which a transform may mix in, at weight 0.
        places = batch * batch_size + jnp.arange(batch_size)
        present = (places < n).astype(images.dtype)
        value, gradient = jax.value_and_grad(loss)(
            state.parameters, step, order[places % n], present
        )
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        value = value.astype(images.dtype)
        losses = state.losses.at[epoch].add(value * jnp.sum(present))
        bad = jnp.where(jnp.isfinite(value), NEVER, step).astype(jnp.int32)
        state = TrainState(parameters, optimizer_state, losses, state.step + 1)
        return state, order, value, jnp.minimum(first_bad, bad)

    first, last = state.step, state.step + num_steps - 1
    start = state, jnp.arange(n), jnp.zeros((), images.dtype), jnp.asarray(NEVER, jnp.int32)
    state, _, value, first_bad = lax.fori_loop(first, last + 1, body, start)
    # Non-finite parameters after finite losses: the last step made them.
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.parameters)]
    return state, value, jnp.where(jnp.stack(finite).all(), first_bad, jnp.minimum(first_bad, last))


# The step is that of all networks: a batched one would make each step shuffle.
_ENSEMBLE = TrainState._make((0, 0, 0, None))


@partial(jax.jit, static_argnames=("network", "optimizer", "num_epochs"))
def _start_all(keys, images, parameters, *, network, optimizer, num_epochs) -> TrainState:
    start = partial(_start, network=network, optimizer=optimizer, num_epochs=num_epochs)
    of_seeds = jax.vmap(start, (0, None, 0), _ENSEMBLE)
    if images.ndim == 5:
        of_seeds = jax.vmap(of_seeds, (None, 0, 0), _ENSEMBLE)
    return of_seeds(keys, images, parameters)


@partial(
    jax.jit, static_argnames=("network", "optimizer", "batch_size", "transform", "at_once", "mesh")
)
def _advance(
    state, num_steps, keys, images, labels, *, at_once=True, mesh=None, **options
) -> tuple[TrainState, Array, Array]:
    """`_steps` of every network. `num_steps` is not static: chunks of any size, and the whole,
    share one program, and so their bits."""

    def of_one(key, own, images, labels):
        """Of one network; `own` is its state except the step, which is that of all."""
        start = TrainState._make((*own, state.step))
        following, loss, first_bad = _steps(key, start, images, labels, num_steps, **options)
        return following[:3], loss, first_bad

    def of_seeds(images, labels, keys, own):
        if at_once:
            return jax.vmap(of_one, (0, 0, None, None))(keys, own, images, labels)
        return lax.map(lambda one: of_one(one[0], one[1], images, labels), (keys, own))

    def of_sets(keys, images, labels, own):
        return jax.vmap(of_seeds, (0, 0, None, 0))(images, labels, keys, own)

    own = state[:3]
    if images.ndim == 5:
        results = devices.over_devices(of_sets, mesh, replicated=1)(keys, images, labels, own)
    else:
        results = devices.over_devices(of_seeds, mesh, replicated=2)(images, labels, keys, own)
    following, losses, first_bad = results
    following = devices.constrain(TrainState._make((*following, state.step + num_steps)), mesh)
    return following, losses, first_bad


def _check_input(images, labels, num_epochs, batch_size) -> None:
    if images.ndim not in (4, 5) or 0 in images.shape or labels.shape != images.shape[:-3]:
        raise ValueError(
            "images are [n, H, W, channels] or [sets, n, H, W, channels], none 0, with a label "
            f"each, got {images.shape} and {labels.shape}"
        )
    for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not bool(jnp.isfinite(images).all()):
        raise ValueError("NaN or infinity in the images")


def _identity(
    keys, images, labels, num_epochs, start=None, *, network, optimizer, batch_size, transform
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    count = min(batch_size, images.shape[-4])
    batch = jax.ShapeDtypeStruct((count, *images.shape[-3:]), images.dtype)
    parameters = jax.eval_shape(network.init, keys[0], batch)
    classes = jax.eval_shape(network.apply, parameters, batch).shape[1]
    targets = jax.ShapeDtypeStruct((count, classes), images.dtype)
    return {
        "data": (images, labels),
        "key": keys,
        "network": network,
        "optimizer": traced_optimizer(optimizer, parameters),
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "transform": transform and traced(transform, keys[0], batch, targets),
        **({} if start is None else {"parameters": start}),
    }


# Evaluation


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
