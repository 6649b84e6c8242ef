"""Flow matching on straight paths: couplings and training.

Data x1 are images in [-1, 1] as flat rows of d = H W channels numbers, x0 is drawn from a source,
and x_t = (1 - t) x0 + t x1. The velocity E[x1 - x0 | x_t] is learnt by least squares (Lipman et
al., 2023; Liu et al., 2023; Tong et al., 2024); following it carries the source to the data
(`lib.flow_matching.sampling`).

Training runs in one compiled loop, in chunks (`lib.runs.loop`). The key of step t is
`fold_in(key, t)` and fixes its batch, its draws of the source and its times, so a run does not
depend on where chunks end.

With labels the velocity E[x1 - x0 | x_t, label] is learnt. Optimal transport within a batch that
does not know them pairs the source with classes by where they are, so that draws of a class no
longer start from the whole source; within each class of the batch it does not (C2OT: Cheng and
Schwing, "The curse of conditions", arXiv 2503.10636, at an infinite weight of the condition).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from lib import devices
from lib.flow_matching.semidiscrete import assign
from lib.kernels import squared_distances
from lib.runs import Run
from lib.runs.loop import Chunk, first_nonfinite, run_steps, traced_optimizer

Coupling = Literal["independent", "optimal", "conditional", "semidiscrete"]
"""optimal: within a batch; conditional: within each class of it. semidiscrete: of the source with
all of the data, by potentials (`lib.flow_matching.semidiscrete`)."""
Velocity = Callable[[Float[Array, "B d"], Float[Array, " B"]], Float[Array, "B d"]]
"""v(x, t) of points and their times."""

MAX_STEPS_PER_CHUNK = 1024
MAX_COUPLED_STEPS = 64
"""With optimal coupling: the distances of two chunks are held, B^2 numbers per step."""


@runtime_checkable
class Source(Protocol):
    """Where flows start: a pytree of arrays, so that it can be an argument of jitted functions."""

    def sample(self, key: Key[Array, ""], num: int) -> Float[Array, "num d"]:
        """Independent draws."""

    def couple(self, key: Key[Array, ""], x1: Float[Array, "B d"]) -> Float[Array, "B d"]:
        """One draw x0 for each x1: `sample(key, len(x1))` where they are independent."""


class TrainState(NamedTuple):
    """What the next step depends on, data, source and key aside; `ema` is the running mean of the
    parameters, to sample with."""

    parameters: PyTree
    ema: PyTree
    optimizer_state: PyTree
    step: Int[Array, ""]


class Draws(NamedTuple):
    """What a step is taken on: starts and data [B, d], times [B], and labels [B] or None."""

    x0: Float[Array, "B d"]
    x1: Float[Array, "B d"]
    times: Float[Array, " B"]
    labels: Int[Array, " B"] | None


class FitResult(NamedTuple):
    """`losses[t]` is the loss of the batch of step t, before the step, [num_steps]."""

    parameters: PyTree
    ema: PyTree
    losses: np.ndarray


# Objective


def velocity(
    network: nn.Module,
    parameters: PyTree,
    image_shape: tuple[int, ...],
    *,
    labels: int | Int[Array, "*B"] | None = None,
    mesh: Mesh | None = None,
) -> Velocity:
    """`network` on flat rows: v(x [B, d], t [B]) -> [B, d], given `labels` ([B], or one for all
    rows) if it has classes; the devices of a mesh (`lib.devices`) share the rows."""

    def evaluate(parameters, x, times, *labels):
        velocities = _apply(network, parameters, x.reshape(-1, *image_shape), times, *labels)
        return velocities.reshape(x.shape)

    of_rows = partial(devices.over_devices(evaluate, mesh, replicated=1), parameters)
    if labels is None:
        return of_rows
    given = jnp.asarray(labels)
    return lambda x, times: of_rows(x, times, jnp.broadcast_to(given, times.shape))


@partial(jax.jit, static_argnums=0, inline=True)
def _apply(
    network: nn.Module, parameters: PyTree, images: Array, times: Array, *labels: Array
) -> Array:
    """JAX keeps its trace, for every loop that a network of such shapes stands in."""
    velocities: Any = network.apply(parameters, images, times, *labels)
    return velocities


def interpolate(
    x0: Float[Array, "B d"], x1: Float[Array, "B d"], times: Float[Array, " B"]
) -> Float[Array, "B d"]:
    """x_t = (1 - t) x0 + t x1, row by row."""
    return (1 - times[:, None]) * x0 + times[:, None] * x1


def loss(
    velocity: Velocity, x0: Float[Array, "B d"], x1: Float[Array, "B d"], times: Float[Array, " B"]
) -> Float[Array, ""]:
    """Mean over rows of |v(x_t, t) - (x1 - x0)|^2 / d (Tong et al., 2024, equation 10, at
    sigma = 0): per coordinate, in squared units of the data."""
    residuals = velocity(interpolate(x0, x1, times), times) - (x1 - x0)
    return jnp.mean(jnp.square(residuals))


def optimal_permutation(
    costs: Float[Array, "B B"], labels: Int[Array, " B"] | None = None
) -> Int[np.ndarray, " B"]:
    """The permutation p that minimizes sum_i costs[i, p_i], [B]. Of costs |x1_i - x0_j|^2
    (`lib.kernels.squared_distances`) it is exact optimal transport within a batch (Pooladian et
    al., 2023; Tong et al., 2024). With `labels`, among the permutations that keep them.

    SciPy's assignment solver on the host, O(B^3), so not for use inside jit. Where a cost is NaN or
    infinite the identity comes back.
    """
    from scipy.optimize import linear_sum_assignment

    costs = devices.fetch(costs)
    order = np.arange(len(costs), dtype=np.int32)
    if not np.isfinite(costs).all():
        return order
    labels = np.zeros_like(order) if labels is None else devices.fetch(labels)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        order[places] = places[linear_sum_assignment(costs[np.ix_(places, places)])[1]]
    return order


# A step


@partial(jax.jit, static_argnames=("network", "optimizer", "image_shape", "with_labels"))
def init(
    key: Key[Array, ""],
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    with_labels: bool = False,
) -> TrainState:
    """The state before the first step."""
    labels = (jnp.zeros(1, jnp.int32),) * with_labels
    parameters = network.init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1), *labels)
    return TrainState(parameters, parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))


def draw_step(
    key: Key[Array, ""],
    step: int | Int[Array, ""],
    source: Source,
    images: Num[Array, "n height width channels"],
    batch_size: int,
    labels: Int[Array, " n"] | None = None,
    potentials: Float[Array, " n"] | None = None,
    *,
    augment_flip: bool = False,
    mesh: Mesh | None = None,
) -> Draws:
    """The source's own pairs of a step, or those of `potentials`. `key` is that of the whole run.

    x1 are images, `labels` theirs, drawn independently (so one may come twice), as flat rows; with
    `potentials` those that x0 are assigned to. uint8 is mapped from 0..255 to [-1, 1]. With
    `augment_flip` each is mirrored left to right with probability 1/2.
    """
    batch_key, source_key, time_key = jax.random.split(jax.random.fold_in(key, step), 3)
    index_key, flip_key = jax.random.split(batch_key)
    x0 = None
    if potentials is None:
        chosen = jax.random.randint(index_key, (batch_size,), 0, len(images))
    else:
        x0 = source.sample(source_key, batch_size)
        chosen = assign(x0, in_unit(images).reshape(len(images), -1), potentials)
    batch = in_unit(images[chosen])
    if augment_flip:
        flipped = jax.random.bernoulli(flip_key, shape=(batch_size, 1, 1, 1))
        batch = jnp.where(flipped, batch[:, :, ::-1], batch)
    # All of the batch in one place, for the assignment.
    x1 = devices.constrain(batch.reshape(batch_size, -1), mesh)
    x0 = devices.constrain(source.couple(source_key, x1) if x0 is None else x0, mesh)
    times = jax.random.uniform(time_key, (batch_size,), x1.dtype)
    return Draws(x0, x1, times, None if labels is None else labels[chosen])


def in_unit(images: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 images in [-1, 1]; others as they are."""
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images


def train_step(
    key: Key[Array, ""],
    state: TrainState,
    source: Source,
    images: Num[Array, "n height width channels"],
    permutation: Int[Array, " B"] | None = None,
    labels: Int[Array, " n"] | None = None,
    potentials: Float[Array, " n"] | None = None,
    *,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    ema_decay: float = 0.999,
    augment_flip: bool = False,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """(state after the step, loss before it). `key` is that of the whole run.

    `permutation` says which x0 of `draw_step` goes to which x1: x0[permutation]; None: the source's
    own pairs. The running mean moves by m <- a m + (1 - a) parameters with a = min(ema_decay,
    (1 + step) / (10 + step)), step counted from 0, so that it forgets its start.
    """
    x0, x1, times, of_batch = draw_step(
        key, state.step, source, images, batch_size, labels, potentials,
        augment_flip=augment_flip, mesh=mesh,
    )  # fmt: skip
    if permutation is not None:
        x0 = x0[permutation]

    def objective(parameters):
        v = velocity(network, parameters, images.shape[1:], labels=of_batch, mesh=mesh)
        return loss(v, x0, x1, times)

    value, gradient = jax.value_and_grad(objective)(state.parameters)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(parameters, state.ema, 1 - decay)
    return TrainState(parameters, ema, optimizer_state, state.step + 1), value


# Training


def fit(
    key: Key[Array, ""],
    network: nn.Module,
    source: Source,
    images: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    coupling: Coupling = "independent",
    batch_size: int = 128,
    ema_decay: float = 0.999,
    augment_flip: bool = False,
    labels: Array | None = None,
    potentials: Array | None = None,
    run: Run | None = None,
    show_progress: bool = True,
    description: str = "flow matching",
    mesh: Mesh | None = None,
) -> FitResult:
    """Trains `network` (called as network(images [B, H, W, c], times [B]), and labels [B] if there
    are any) for `num_steps` steps.

    Args:
      key: key of the run, for the network's start and every step.
      source: draws x0 [B, H W channels]; see `Source`.
      images: [n, H, W, channels], float in [-1, 1], or uint8, which is mapped there batch by batch.
      coupling: "independent", "optimal" within each batch, "conditional": within each class of it,
        or "semidiscrete": with all images, by their `potentials` [n].
      batch_size: images per step, drawn independently.
      ema_decay: of the running mean of the parameters, in [0, 1).
      augment_flip: mirrors images at random.
      labels: [n] integers, the images' classes.
      run: a run folder (`lib.runs.open_run`) to save into and, if it holds a checkpoint, to resume
        from, for more steps than before too: an optimizer whose rate does not depend on their
        number ends where one run of so many steps does. SIGINT and SIGTERM then save and raise
        `Interrupted`.
      mesh: devices (`lib.devices`) that share each batch.

    Raises:
      ValueError: before any step, on images or a source of wrong shape or dtype, NaN, a batch
        larger than the data, or settings out of range.
      DivergedError: NaN or infinity on the way; the last good state is saved.
      RunFileError: the folder's checkpoint is of other data, settings or key.
    """
    images, source = jnp.asarray(images), jax.tree.map(jnp.asarray, source)
    labels, potentials = (None if a is None else jnp.asarray(a) for a in (labels, potentials))
    _check_input(images, source, labels, num_steps, batch_size, coupling, ema_decay)
    _check_potentials(potentials, images, coupling, augment_flip)
    init_key, key = jax.random.split(key)
    start = partial(init, init_key, network, optimizer, images.shape[1:], labels is not None)
    parameters = jax.eval_shape(start).parameters  # shares its trace with the start itself
    settings = {
        "network": network,
        "batch_size": batch_size,
        "ema_decay": float(ema_decay),
        "augment_flip": augment_flip,
    }
    _check_network(network, parameters, images, labels)
    losses = np.zeros(num_steps, np.float32)
    buffer = devices.device_put(np.zeros(MAX_STEPS_PER_CHUNK, np.float32), mesh)
    inputs = devices.device_put((key, source, images, labels, potentials), mesh)
    in_batches = coupling in ("optimal", "conditional")
    costs = partial(_costs, batch_size=batch_size, augment_flip=augment_flip, mesh=mesh)
    assigned = dict[int, Future]()

    def permutations(done, size):
        """Those of a chunk's steps, [64, B]. The next chunk's are found while this one is taken:
        its distances are asked for first, and assigned on a thread."""
        for step in range(done, min(done + 2 * size, num_steps)):
            if step not in assigned:
                of_batch = costs(np.int32(step), *inputs)
                of_batch = of_batch if coupling == "conditional" else of_batch[:1]
                assigned[step] = thread.submit(optimal_permutation, *of_batch)
        table = np.zeros((MAX_COUPLED_STEPS, batch_size), np.int32)
        table[:size] = [assigned.pop(step).result() for step in range(done, done + size)]
        return devices.device_put(table, mesh)

    def advance(state, done, size):
        nonlocal buffer
        table = permutations(done, size) if in_batches else None
        state, finite, buffer = _advance(
            state, size, buffer, table, *inputs, optimizer=optimizer, mesh=mesh, **settings
        )
        fetched, finite = devices.fetch((buffer, finite))
        latest = losses[done : done + size] = fetched[:size]
        return Chunk(state, {"loss": latest.mean()}, first_nonfinite(latest, bool(finite)))

    with ThreadPoolExecutor(1) as thread:
        state, _ = run_steps(
            advance,
            start(),
            num_steps,
            run=run,
            identity=lambda: {
                "data": images,
                "source": (type(source).__name__, source),
                "key": key,
                "optimizer": traced_optimizer(optimizer, parameters),
                "coupling": coupling,
                **({} if labels is None else {"labels": labels}),
                **({} if potentials is None else {"potentials": potentials}),
                **settings,
            },
            history=lambda done: losses[:done],
            place=partial(devices.device_put, mesh=mesh),
            max_chunk=MAX_COUPLED_STEPS if in_batches else MAX_STEPS_PER_CHUNK,
            show_progress=show_progress,
            description=description,
        )
    state = devices.gather(state, mesh)
    return FitResult(state.parameters, state.ema, losses)


@partial(
    jax.jit,
    static_argnames=("network", "optimizer", "batch_size", "ema_decay", "augment_flip", "mesh"),
    donate_argnames="buffer",
)
def _advance(state, size, buffer, permutations, key, source, images, *given, **settings):
    """(state after `size` steps, whether it is finite, the losses in `buffer`).

    `size` is not static: chunks of any size share one program.
    """

    def body(i, carry):
        state, losses = carry
        permutation = None if permutations is None else permutations[i]
        state, value = train_step(key, state, source, images, permutation, *given, **settings)
        state = devices.constrain(state, settings["mesh"])
        return state, losses.at[i].set(value.astype(losses.dtype))

    state, buffer = lax.fori_loop(0, size, body, (state, buffer))
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.parameters, state.ema))]
    return state, jnp.stack(finite).all(), devices.constrain(buffer, settings["mesh"])


@partial(jax.jit, static_argnames=("batch_size", "augment_flip", "mesh"))
def _costs(step, key, source, images, labels, potentials, **settings):
    """|x1_i - x0_j|^2 of a step's batch, [B, B], and its labels."""
    x0, x1, _, of_batch = draw_step(key, step, source, images, labels=labels, **settings)
    return devices.constrain(squared_distances(x1, x0), settings["mesh"]), of_batch


# Input validation


def _check_input(images, source, labels, num_steps, batch_size, coupling, ema_decay) -> None:
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images are [n, H, W, channels], none 0, got shape {images.shape}")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are floating point or uint8, got {images.dtype}")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if batch_size > len(images):
        raise ValueError(f"batch_size {batch_size} is larger than the {len(images)} images")
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling is one of {', '.join(get_args(Coupling))}, got {coupling!r}")
    if labels is None and coupling == "conditional":
        raise ValueError("coupling conditional needs labels")
    whole = labels is None or jnp.issubdtype(labels.dtype, jnp.integer)
    if labels is not None and (labels.shape != (len(images),) or not whole):
        raise ValueError(
            f"labels are {len(images)} integers, one per image, got {labels.dtype} {labels.shape}"
        )
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
    for name, tree in (("images", images), ("source", source)):
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
                raise ValueError(f"NaN or infinity in the {name}")
    x1 = jax.ShapeDtypeStruct((batch_size, int(np.prod(images.shape[1:]))), jnp.float32)
    x0 = jax.eval_shape(lambda source, x1: source.couple(jax.random.key(0), x1), source, x1)
    if x0.shape != x1.shape:
        raise ValueError(f"the source draws {x0.shape} for a batch of images of shape {x1.shape}")


def _check_potentials(potentials, images, coupling, augment_flip) -> None:
    if (potentials is not None) != (coupling == "semidiscrete"):
        raise ValueError("potentials are of coupling semidiscrete, which needs them")
    if potentials is not None and potentials.shape != (len(images),):
        raise ValueError(f"potentials are [{len(images)}], one per image, not {potentials.shape}")
    if potentials is not None and augment_flip:
        raise ValueError("augment_flip makes images that the potentials do not know")


def _check_network(network, parameters, images, labels) -> None:
    batch = jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.float32)
    given = () if labels is None else (jax.ShapeDtypeStruct((2,), jnp.int32),)
    returned = jax.eval_shape(network.apply, parameters, batch, times, *given)
    if returned.shape != batch.shape:
        raise ValueError(f"the network turns {batch.shape} into {returned.shape}")
