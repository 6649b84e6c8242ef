"""Wasserstein gradient descent: one engine for every flow of particles.

A flow is particles, arrays of shape (C, n, d), a function `target_value_and_grad(x, x_tgt, key)`
that returns a value and a gradient of the particles' shape, and an optax optimizer. Steps run in
one compiled loop, in chunks (`lib.runs.loop`). A step's key is `fold_in(rng, step)`, so a run does
not depend on where chunks end.

The leading axes are the caller's: a function vmapped over seeds or bandwidths runs
(B, C, n, d) particles, with losses (B,), through the same loop.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from lib import devices
from lib.numerics import AnyArray
from lib.runs import Run
from lib.runs.loop import Chunk, first_nonfinite, run_steps, traced_optimizer, without_weak_types

TargetValueAndGrad = Callable[[Array, PyTree, Array], tuple[Array, Array]]
"""A function of particles, target and key that gives a value and a gradient of the particles."""
StatefulValueAndGrad = Callable[[Array, PyTree, Array, PyTree], tuple[Array, Array, PyTree]]
"""The same, with a state that it gets and gives back, such as an adapted lambda."""

MAX_STEPS_PER_CHUNK = 1024
MAX_RECORD_BYTES_PER_CHUNK = 64 * 2**20
"""Of the records on the device, if there is more than one; particles above it are held once."""
MAX_RECORD_BYTES = 4 * 2**30
"""Of all records, on the host."""


class FlowState(NamedTuple):
    """What the next step depends on, the target and the key aside."""

    particles: Array
    optimizer_state: PyTree
    step: Array
    carry: PyTree = None


class FlowResult(NamedTuple):
    """`losses[t]`, [n_epochs, ...]: the value before step t; `particles[i]`: those after
    `recorded_steps(n_epochs, record_every)[i]` steps, the first being x0."""

    losses: np.ndarray
    particles: np.ndarray


def recorded_steps(n_epochs: int, record_every: int = 1) -> np.ndarray:
    """How many steps each record has behind it: 0, every `record_every`-th, and the last."""
    return np.union1d(np.arange(0, n_epochs + 1, record_every), [n_epochs])


def flow_init(
    optimizer: optax.GradientTransformation, x0: Array, carry: PyTree = None
) -> FlowState:
    """The state before the first step."""
    state = FlowState(jnp.asarray(x0), optimizer.init(x0), jnp.zeros((), jnp.int32), carry)
    return without_weak_types(state)


def flow_step(
    target_value_and_grad: TargetValueAndGrad | StatefulValueAndGrad,
    optimizer: optax.GradientTransformation,
) -> Callable[[Array, FlowState, PyTree], tuple[FlowState, Array]]:
    """step(rng, state, x_tgt) -> (state, value before the step): a pure function, for loops of
    your own. `rng` is the key of the whole run. Where the state has a carry, the function gets it
    as its fourth argument and returns the next one."""
    evaluate: Callable[..., Any] = target_value_and_grad

    def step(rng, state, x_tgt):
        key = jax.random.fold_in(rng, state.step)
        carried = () if state.carry is None else (state.carry,)
        value, gradient, *carried = evaluate(state.particles, x_tgt, key, *carried)
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, state.particles
        )
        particles = optax.apply_updates(state.particles, updates)
        return FlowState(particles, optimizer_state, state.step + 1, *carried), value

    return step


def wasserstein_gradient_descent(
    x0: Array,
    x_tgt: PyTree,
    target_value_and_grad: TargetValueAndGrad | StatefulValueAndGrad,
    rng: Array,
    n_epochs: int = 101,
    lr: float | int | Callable[[Array], Array] = 1,
    m: float | int = 0,
    *,
    optimizer: optax.GradientTransformation | None = None,
    carry: PyTree = None,
    record_every: int = 1,
    run: Run | None = None,
    checkpoint_seconds: float = 60.0,
    show_progress: bool = True,
    description: str = "flow",
    stop_at_nonfinite: bool = True,
    mesh: Mesh | None = None,
) -> FlowResult:
    """`n_epochs` steps x <- x - lr v, v <- grad + m v (heavy ball), from x0.

    Args:
      x0: particles, (C, n, d), or more leading axes.
      x_tgt: target, (C', n', d), or any pytree that `target_value_and_grad` understands.
      target_value_and_grad: (x, x_tgt, key) -> (value, gradient like x), such as
        `lib.mmd.target_value_and_grad_riesz`.
      rng: key of the run; step t uses `fold_in(rng, t)`.
      lr: step size, or a schedule: a function of the step number, as in optax.
      m: momentum in [0, 1); the effective step is lr / (1 - m).
      optimizer: an optax optimizer to use instead; lr and m are then not used.
      carry: arrays that the function hands from step to step (a regularization, a warm start): it
        is then called with (x, x_tgt, key, carry) and returns (value, gradient, carry).
      record_every: steps between the particles kept; x0 and the last are always kept.
      run: a run folder (`lib.runs.open_run`) to save into and, if it holds a checkpoint, to resume
        from. SIGINT and SIGTERM then save and raise `Interrupted`.
      checkpoint_seconds: seconds between saves.
      stop_at_nonfinite: False lets a flow run on, for several flows at once of which some may fail.
      mesh: devices (`lib.devices`) over which particles, records and the optimizer's state are
        divided, along points or classes, whichever they share equally, points first. How a step
        divides its work is up to `target_value_and_grad`. Results are those of one device, to
        rounding; a checkpoint can be resumed on another number of devices.

    Raises:
      ValueError: before any step, on NaN or infinity in the input, an empty class, a dimension
        that differs, a negative step size, momentum out of range, or records between the start
        and the end whose whole takes more than 4 GiB.
      DivergedError: NaN or infinity on the way; the last good state is saved. Of particles above
        64 MiB it is that of the last save: no second copy is held.
      RunFileError: the folder's checkpoint is of another start, target, key, optimizer (with all
        its settings) or `record_every`, or past `n_epochs`.
    """
    x0, x_tgt = jnp.asarray(x0), jax.tree.map(jnp.asarray, x_tgt)
    _check_input(x0, x_tgt, n_epochs, lr, m, record_every)
    if optimizer is None:
        optimizer = _sgd(lr, momentum=float(m) or None)
    carried = () if carry is None else (without_weak_types(carry),)
    value_and_grad = _traced_once(target_value_and_grad)
    returned = value_and_grad.eval_shape(x0, x_tgt, rng, *carried)
    if len(returned) != 2 + len(carried):
        names = "(value, gradient, carry)" if carried else "(value, gradient)"
        raise ValueError(f"target_value_and_grad must return {names}, it returned {len(returned)}")
    value, gradient, *following = returned
    if gradient.shape != x0.shape:
        raise ValueError(f"gradient {gradient.shape} is not of the particles' shape {x0.shape}")
    kinds = partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    if kinds(following) != kinds(list(carried)):
        raise ValueError("the carry that comes back is not of the shapes and types that went in")
    losses = np.zeros((n_epochs, *value.shape), value.dtype)
    particles = np.zeros((len(recorded_steps(n_epochs, record_every)), *x0.shape), x0.dtype)
    particles[0] = x0

    target, key = devices.device_put((x_tgt, rng), mesh)
    max_steps = _max_steps(x0.nbytes, record_every)
    held_once = x0.nbytes > MAX_RECORD_BYTES_PER_CHUNK
    compiled = _advance(value_and_grad, optimizer, record_every, mesh, held_once)
    slots = -(-max_steps // record_every) if record_every < n_epochs else 0
    by_particles = PartitionSpec(None, *_where(x0, x0.shape, mesh))
    buffers = (
        jnp.zeros((max_steps, *value.shape), value.dtype, device=devices.sharding(mesh)),
        jnp.zeros((slots, *x0.shape), x0.dtype, device=devices.sharding(mesh, by_particles)),
    )

    def advance(state, done, size):
        nonlocal buffers
        state, finite, buffers = compiled(key, state, target, size, buffers)
        new_losses, records = devices.fetch(buffers[0])[:size], buffers[1]
        losses[done : done + size] = new_losses
        before = 1 + done // record_every
        for i in range(before, 1 + (done + size) // record_every):
            last = i * record_every == n_epochs
            particles[i] = devices.fetch(state.particles if last else records[i - before])
        bad_step = first_nonfinite(new_losses, bool(devices.fetch(finite)))
        shown = {"loss": float(np.ravel(new_losses[-1])[0])}
        return Chunk(state, shown, bad_step if stop_at_nonfinite else None)

    begin = flow_init(optimizer, x0, carry)
    if held_once:  # the caller's arrays stay theirs, and on the host
        begin, x0 = jax.tree.map(jnp.copy, begin), np.asarray(x0)
    state, _ = run_steps(
        advance,
        begin,
        n_epochs,
        run=run,
        identity=lambda: {
            "start": (x0, carry),
            "target": x_tgt,
            "key": rng,
            "step size or optimizer": traced_optimizer(optimizer, x0),
            "record_every": record_every,
        },
        history=lambda done: {
            "losses": losses[:done],
            "particles": particles[: 1 + done // record_every],
        },
        place=lambda state: _divide(devices.device_put, state, mesh),
        max_chunk=max_steps,
        keeps_state=not held_once,
        checkpoint_seconds=checkpoint_seconds,
        show_progress=show_progress,
        description=description,
    )
    particles[-1] = devices.fetch(state.particles)
    return FlowResult(losses, particles)


wasserstein_gradient_descent_jit = wasserstein_gradient_descent
"""The published name of the compiled loop, which `wasserstein_gradient_descent` always is."""


def wasserstein_gradient_descent_lbfgs(
    x0: Array,
    x_tgt: PyTree,
    target_value_and_grad: TargetValueAndGrad,
    rng: Array,
    n_epochs: int = 101,
    lr: float | int | Callable[[Array], Array] = 1,
    **options: Any,
) -> FlowResult:
    """`n_epochs` steps x <- x - lr H grad, H the L-BFGS inverse Hessian of the last ten steps.

    The published signature; no line search, as there (Nocedal and Wright, Numerical Optimization,
    Algorithm 7.4, by `optax.scale_by_lbfgs`). Where the directions are drawn anew at each step, the
    published difference of two gradients is mostly the noise of the draw. Here both gradients of a
    pair are taken with the key of one step (Schraudolph, Yu and Guenter, AISTATS 2007), which costs
    a second gradient a step, and pairs of negative curvature, which would lead uphill, are left
    out. A convex target without randomness takes the published steps. On the rings with Riesz's
    kernel and lr = .01, F after 251 steps is 1.0e-3, with the published pairs .12.

    Arguments, results and errors as `wasserstein_gradient_descent`, whose other options it takes.
    """
    x0 = jnp.asarray(x0)
    memory = optax.scale_by_lbfgs().init(x0)._replace(params=x0)
    return wasserstein_gradient_descent(
        x0, x_tgt, _quasi_newton(target_value_and_grad), rng, n_epochs, lr, carry=memory, **options
    )


# The compiled loop


# The function itself to JAX, which keeps its trace: the check of its shapes is the one compiled.
_traced_once = lru_cache(maxsize=32)(partial(jax.jit, inline=True))
_sgd = lru_cache(maxsize=32)(optax.sgd)


@lru_cache(maxsize=32)
def _quasi_newton(target_value_and_grad: TargetValueAndGrad) -> StatefulValueAndGrad:
    """(value, L-BFGS direction, memory), the memory being the state of `optax.scale_by_lbfgs`."""
    lbfgs = optax.scale_by_lbfgs()

    def value_and_direction(x, x_tgt, key, memory):
        value, gradient = target_value_and_grad(x, x_tgt, key)
        _, previous = target_value_and_grad(memory.params, x_tgt, key)
        curvature = jnp.vdot(gradient - previous, x - memory.params)
        # A difference of 0 has no weight in the memory.
        previous = jnp.where(curvature > 0, previous, gradient)
        direction, memory = lbfgs.update(gradient, memory._replace(updates=previous), x)
        return value, direction, memory

    return value_and_direction


def _max_steps(particle_bytes: int, record_every: int) -> int:
    """Steps in a chunk, at most: they bound what is buffered on the device."""
    slots = max(1, MAX_RECORD_BYTES_PER_CHUNK // max(1, particle_bytes))
    return min(MAX_STEPS_PER_CHUNK, slots * record_every)


def _where(leaf: AnyArray, shape: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    """What is of the particles' shape is divided as they are, the rest is on every device."""
    return devices.partition_spec(shape, (-2, -3), mesh) if leaf.shape == shape else PartitionSpec()


def _divide(put: Callable[..., Any], state: FlowState, mesh: Mesh | None) -> FlowState:
    """`devices.device_put` or `devices.constrain` of every leaf, as `_where` says."""
    shape = state.particles.shape
    return jax.tree.map(lambda leaf: put(leaf, mesh, _where(leaf, shape, mesh)), state)


@lru_cache(maxsize=32)
def _advance(
    target_value_and_grad, optimizer, record_every: int, mesh: Mesh | None = None, held_once=False
):
    """advance(rng, state, x_tgt, num_steps, buffers) -> (state, particles finite?, buffers), the
    buffers (losses, records) written in place, and the state too where it is `held_once`; cached,
    so that a second flow with the same functions and shapes compiles nothing."""
    step = flow_step(target_value_and_grad, optimizer)

    @partial(jax.jit, donate_argnums=(1, 4) if held_once else 4)
    def advance(rng, state, x_tgt, num_steps, buffers):
        start = state.step

        def body(i, carry):
            state, losses, records = carry
            # A slot is overwritten until the step that completes its interval: no branch needed.
            # What would begin one more is dropped.
            slot = state.step // record_every - start // record_every
            state, value = step(rng, state, x_tgt)
            state = _divide(devices.constrain, state, mesh)
            if len(records):
                records = records.at[slot].set(state.particles, mode="drop")
            return state, losses.at[i].set(value), records

        state, losses, records = lax.fori_loop(0, num_steps, body, (state, *buffers))
        divided = _where(state.particles, state.particles.shape, mesh)
        buffers = (
            devices.constrain(losses, mesh),
            devices.constrain(records, mesh, PartitionSpec(None, *divided)),
        )
        return state, jnp.isfinite(state.particles).all(), buffers

    return advance


# Input validation


def _check_input(x0, x_tgt, n_epochs, lr, m, record_every) -> None:
    arrays = {"x0": x0}
    if hasattr(x_tgt, "shape"):
        arrays["x_tgt"] = x_tgt
    for name, array in arrays.items():
        if array.ndim < 3 or 0 in array.shape:
            raise ValueError(f"{name} must be (classes, points, dimension), none 0: {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
    for path, leaf in jax.tree_util.tree_leaves_with_path({"x0": x0, "x_tgt": x_tgt}):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            where = tuple(map(int, np.argwhere(~np.isfinite(np.asarray(leaf)))[0]))
            raise ValueError(f"{name} holds NaN or infinity, first at index {where}")
    if "x_tgt" in arrays and x0.shape[-1] != x_tgt.shape[-1]:
        raise ValueError(f"x0 {x0.shape} and x_tgt {x_tgt.shape} differ in dimension")
    for name, number in (("n_epochs", n_epochs), ("record_every", record_every)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not callable(lr) and not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"the step size lr must be positive, got {lr}")
    if not 0 <= m < 1:
        raise ValueError(f"the momentum m must lie in [0, 1), got {m}")
    # The length of `recorded_steps`, without making what may be too long to make.
    between = (n_epochs - 1) // record_every
    size = (2 + between) * x0.nbytes
    if between and size > MAX_RECORD_BYTES:
        raise ValueError(
            f"recording every {record_every} of {n_epochs} steps of {x0.shape} takes "
            f"{size / 2**30:.1f} GiB; raise record_every"
        )
