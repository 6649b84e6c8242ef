"""Wasserstein gradient descent: one engine for every flow of particles.

A flow is particles, arrays of shape (C, n, d), a function `target_value_and_grad(x, x_tgt, key)`
that returns a value and a gradient of the particles' shape, and an optax optimiser. Steps run in
one compiled loop; the host is visited about twice a second, to show progress, look for NaN, keep
records and save. A step's key is `fold_in(rng, step)`, so a run does not depend on where those
visits fall, and a resumed run ends in the same bits as one that was never interrupted.

The leading axes are the caller's: a function vmapped over seeds or bandwidths runs
(B, C, n, d) particles, with losses (B,), through the same loop.
"""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from lib import devices
from lib.runs import Run
from lib.runs.files import DamagedFileError, RunFileError, load_arrays, save_arrays
from lib.runs.loop import advance_in_visits

TargetValueAndGrad = Callable[[Array, PyTree, Array], tuple[Array, Array]]
StatefulValueAndGrad = Callable[[Array, PyTree, Array, PyTree], tuple[Array, Array, PyTree]]

SECONDS_BETWEEN_VISITS = 0.5
MAX_STEPS_BETWEEN_VISITS = 1024
MAX_RECORD_BYTES_BETWEEN_VISITS = 64 * 2**20
MAX_RECORD_BYTES = 4 * 2**30


class FlowState(NamedTuple):
    """What the next step depends on, the target and the key aside."""

    particles: Array
    optimizer_state: PyTree
    step: Array
    carry: PyTree = None


class FlowResult(NamedTuple):
    """`losses[t]`: the value before step t; `particles[i]`: the particles after
    `recorded_steps(...)[i]` steps, the first being x0."""

    losses: np.ndarray
    particles: np.ndarray


class DivergedError(FloatingPointError):
    """A run met NaN or infinity. `state` is the last good state, `step` the steps it has taken."""

    def __init__(self, state: Any, bad_step: int, saved_in: Path | None):
        where = f"; the last good state is in {saved_in}" if saved_in else ""
        super().__init__(
            f"NaN or infinity in step {bad_step} (counted from 0): lower the step size{where}"
        )
        self.state = state
        self.step = int(state.step)


def recorded_steps(n_epochs: int, record_every: int = 1) -> np.ndarray:
    """How many steps each record has behind it: 0, every `record_every`-th, and the last."""
    return np.union1d(np.arange(0, n_epochs + 1, record_every), [n_epochs])


def flow_init(
    optimizer: optax.GradientTransformation, x0: Array, carry: PyTree = None
) -> FlowState:
    """The state before the first step."""
    state = FlowState(jnp.asarray(x0), optimizer.init(x0), jnp.zeros((), jnp.int32), carry)
    # Weak types do not survive a checkpoint; without them a resumed run promotes alike.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)


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
        carry = state.carry
        if carry is None:
            value, gradient = evaluate(state.particles, x_tgt, key)
        else:
            value, gradient, carry = evaluate(state.particles, x_tgt, key, carry)
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, state.particles
        )
        particles = optax.apply_updates(state.particles, updates)
        return FlowState(particles, optimizer_state, state.step + 1, carry), value

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
      optimizer: an optax optimiser to use instead; lr and m are then not used.
      carry: arrays that the function hands from step to step (a regularisation, a warm start): it
        is then called with (x, x_tgt, key, carry) and returns (value, gradient, carry).
      record_every: steps between the particles kept; x0 and the last are always kept.
      run: a run folder (`lib.runs.open_run`) to save into and, if it holds a checkpoint, to resume
        from. SIGINT and SIGTERM then save and raise `Interrupted`.
      checkpoint_seconds: seconds between saves.
      stop_at_nonfinite: False lets a flow run on, for several flows at once of which some may fail.
      mesh: devices (`lib.devices`) over which particles, records and the optimiser's state are
        divided, along points or classes, whichever they share equally, points first. How a step
        divides its work is up to `target_value_and_grad`. Results are those of one device, to
        rounding; a checkpoint can be resumed on another number of devices.

    Returns:
      (losses, particles), NumPy arrays: losses[t] is the value before step t, [n_epochs, ...];
      particles[i] those after `recorded_steps(n_epochs, record_every)[i]` steps.

    Raises:
      ValueError: before any step, on NaN or infinity in the input, an empty class, a dimension
        that differs, a negative step size, momentum out of range, or more records than 4 GiB.
      DivergedError: NaN or infinity on the way; the last good state is saved.
      RunFileError: the folder's checkpoint is of another start, target or key.
    """
    x0, x_tgt = jnp.asarray(x0), jax.tree.map(jnp.asarray, x_tgt)
    _check_input(x0, x_tgt, n_epochs, lr, m, record_every)
    if optimizer is None:
        optimizer = _heavy_ball(lr, float(m))
    state = flow_init(optimizer, x0, carry)
    carried = () if carry is None else (state.carry,)
    returned = jax.eval_shape(target_value_and_grad, x0, x_tgt, rng, *carried)
    if len(returned) != 2 + len(carried):
        names = "(value, gradient, carry)" if carried else "(value, gradient)"
        raise ValueError(f"target_value_and_grad must return {names}, it returned {len(returned)}")
    value, gradient, *following = returned
    if gradient.shape != x0.shape:
        raise ValueError(f"gradient {gradient.shape} is not of the particles' shape {x0.shape}")
    if jax.tree.map(_kind, following) != jax.tree.map(_kind, list(carried)):
        raise ValueError("the carry that comes back is not of the shapes and types that went in")
    steps = recorded_steps(n_epochs, record_every)
    losses = np.zeros((n_epochs, *value.shape), value.dtype)
    particles = np.zeros((len(steps), *x0.shape), x0.dtype)
    particles[0] = x0
    origin = _fingerprint(x0, (x_tgt, carried), rng, lr, optimizer) if run else ""
    if run:
        state = _resume(run, state, losses, particles, steps, origin)

    state = jax.tree.map(
        lambda leaf: devices.place(leaf, mesh, _where(leaf, x0.shape, mesh)), state
    )
    x_tgt, rng = devices.place((x_tgt, rng), mesh)
    max_steps = _max_steps(x0.nbytes, record_every)
    advance = _advance(target_value_and_grad, optimizer, record_every, mesh)
    slots = -(-max_steps // record_every) + 1
    by_particles = PartitionSpec(None, *_where(x0, x0.shape, mesh))
    buffers = (
        jnp.zeros((max_steps, *value.shape), value.dtype, device=devices.sharding(mesh)),
        jnp.zeros((slots, *x0.shape), x0.dtype, device=devices.sharding(mesh, by_particles)),
    )
    done = int(state.step)

    def save():
        assert run is not None
        _save(run, devices.fetch(state), losses, particles, steps, origin)

    def take(num_steps):
        nonlocal state, done, buffers
        following, finite, buffers = jax.block_until_ready(
            advance(rng, state, x_tgt, num_steps, buffers)
        )
        losses_kept, records = buffers
        new_losses = devices.fetch(losses_kept)[:num_steps]
        bad = (
            _first_nonfinite(new_losses, bool(devices.fetch(finite))) if stop_at_nonfinite else None
        )
        if bad is not None:
            if run:
                save()
            raise DivergedError(state, done + bad, run.checkpoint if run else None)
        losses[done : done + num_steps] = new_losses
        for i in np.flatnonzero((steps > done) & (steps <= done + num_steps)):
            slot = (steps[i] - 1) // record_every - done // record_every
            particles[i] = devices.fetch(records[slot])
        state, done = following, done + num_steps
        return {"loss": float(np.ravel(new_losses[-1])[0])}

    advance_in_visits(
        take,
        save,
        done=done,
        total=n_epochs,
        seconds_between=SECONDS_BETWEEN_VISITS,
        most=max_steps,
        run=run,
        checkpoint_seconds=checkpoint_seconds,
        show_progress=show_progress,
        description=description,
    )
    return FlowResult(losses, particles)


# The published name of the compiled loop, which this one always is.
wasserstein_gradient_descent_jit = wasserstein_gradient_descent


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
        x0,
        x_tgt,
        _quasi_newton(target_value_and_grad),
        rng,
        n_epochs,
        lr,
        carry=memory,
        **options,
    )


# The compiled loop


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


@lru_cache(maxsize=32)
def _heavy_ball(lr, m: float) -> optax.GradientTransformation:
    return optax.sgd(lr, momentum=m or None)


def _max_steps(particle_bytes: int, record_every: int) -> int:
    """Steps between two visits, at most: they bound what is buffered on the device."""
    slots = max(1, MAX_RECORD_BYTES_BETWEEN_VISITS // max(1, particle_bytes) - 1)
    return min(MAX_STEPS_BETWEEN_VISITS, slots * record_every)


def _where(leaf: Array, shape: tuple[int, ...], mesh: Mesh | None) -> PartitionSpec:
    """What is of the particles' shape is divided as they are, the rest is on every device."""
    return devices.divided(shape, (-2, -3), mesh) if leaf.shape == shape else PartitionSpec()


@lru_cache(maxsize=32)
def _advance(target_value_and_grad, optimizer, record_every: int, mesh: Mesh | None = None):
    """advance(rng, state, x_tgt, num_steps, buffers) -> (state, particles finite?, buffers), the
    buffers (losses, records) written in place; cached, so that a second flow with the same
    functions and shapes compiles nothing."""
    step = flow_step(target_value_and_grad, optimizer)

    def like_the_start(state):
        shape = state.particles.shape
        return jax.tree.map(
            lambda leaf: devices.constrain(leaf, mesh, _where(leaf, shape, mesh)), state
        )

    @partial(jax.jit, donate_argnums=4)
    def advance(rng, state, x_tgt, num_steps, buffers):
        start = state.step

        def body(i, carry):
            state, losses, records = carry
            # A slot is overwritten until the step that completes its interval: no branch needed.
            slot = state.step // record_every - start // record_every
            state, value = step(rng, state, x_tgt)
            state = like_the_start(state)
            return state, losses.at[i].set(value), records.at[slot].set(state.particles)

        state, losses, records = lax.fori_loop(0, num_steps, body, (state, *buffers))
        divided = _where(state.particles, state.particles.shape, mesh)
        buffers = (
            devices.constrain(losses, mesh),
            devices.constrain(records, mesh, PartitionSpec(None, *divided)),
        )
        return state, jnp.isfinite(state.particles).all(), buffers

    return advance


def _kind(leaf: Any) -> tuple:
    return leaf.shape, leaf.dtype


def _first_nonfinite(losses: np.ndarray, particles_finite: bool) -> int | None:
    bad = ~np.isfinite(losses).reshape(len(losses), -1).all(axis=1)
    if bad.any():
        return int(np.argmax(bad))
    # Non-finite particles after finite losses: the last step made them.
    return None if particles_finite else len(losses) - 1


# The door


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
    if n_epochs < 1:
        raise ValueError(f"n_epochs must be at least 1, got {n_epochs}")
    if not callable(lr) and not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"the step size lr must be positive, got {lr}")
    if not 0 <= m < 1:
        raise ValueError(f"the momentum m must lie in [0, 1), got {m}")
    if record_every < 1:
        raise ValueError(f"record_every must be at least 1, got {record_every}")
    # The length of `recorded_steps`, without making what may be too long to make.
    size = (2 + (n_epochs - 1) // record_every) * x0.nbytes
    if size > MAX_RECORD_BYTES:
        raise ValueError(
            f"recording every {record_every} of {n_epochs} steps of {x0.shape} takes "
            f"{size / 2**30:.1f} GiB; raise record_every"
        )


# Saving


def _fingerprint(x0: Array, x_tgt: PyTree, rng: Array, lr: Any, optimizer) -> str:
    """What a checkpoint must share with the flow that resumes it.

    Settings of an optimiser are closed over: it is known by what it does with two gradients of
    ones. A schedule may begin as another does, so its values along the way count too. Digits that
    differ between devices are left out.
    """
    key = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    digest = hashlib.sha256()
    for leaf in (x0, *jax.tree.leaves(x_tgt), key):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    state = optimizer.init(x0)
    for _ in range(2):
        update, state = optimizer.update(jnp.ones_like(x0), state, x0)
        digest.update(f"{float(jnp.mean(update)):.4g},".encode())
    if callable(lr):
        values = [float(lr(jnp.asarray(10**k))) for k in range(7)]
        digest.update(",".join(f"{value:.4g}" for value in values).encode())
    return digest.hexdigest()


def _save(run: Run, state: FlowState, losses, particles, steps, origin: str) -> None:
    """The trajectory first: whatever kills us, it reaches at least as far as the checkpoint."""
    done = int(state.step)
    kept = int(np.searchsorted(steps, done, side="right"))
    save_arrays(
        run.trajectory,
        losses=losses[:done],
        particles=particles[:kept],
        steps=steps[:kept],
        origin=np.array(origin),
    )
    run.save_checkpoint(state, step=done)


def _load_trajectory(run: Run, done: int) -> dict[str, Any]:
    """What `_save` wrote; it reaches `done` steps at least. Raises RunFileError where it does not:
    the losses on the way are nowhere else."""
    path = run.trajectory
    again = f"delete {run.folder} to start anew"
    try:
        trajectory = load_arrays(path)
    except (FileNotFoundError, DamagedFileError) as error:
        raise DamagedFileError(f"{path} is gone or damaged ({error}); {again}") from error
    if not {"origin", "losses", "particles", "steps"} <= trajectory.keys():
        raise DamagedFileError(f"{path} holds no trajectory; {again}")
    if len(trajectory["losses"]) < done:
        raise RunFileError(
            f"{path} ends before the checkpoint's step {done}, it is another run's; {again}"
        )
    return trajectory


def _resume(run: Run, state: FlowState, losses, particles, steps, origin: str) -> FlowState:
    """The saved state, if there is one; fills `losses` and `particles` up to it."""
    loaded = run.load_checkpoint(state)
    if loaded is None:
        return state
    saved, done = loaded
    trajectory = _load_trajectory(run, done)
    if str(trajectory["origin"]) != origin:
        raise RunFileError(
            f"{run.checkpoint} belongs to a flow with another start, target, key or step size; "
            "delete its folder to start anew"
        )
    if done > len(losses):
        raise RunFileError(f"{run.checkpoint} is at step {done}, past the {len(losses)} asked for")
    kept = int(np.searchsorted(steps, done, side="right"))
    if not np.array_equal(trajectory["steps"][:kept], steps[:kept]):
        raise RunFileError(f"{run.trajectory} was recorded at other intervals; delete its folder")
    losses[:done] = trajectory["losses"][:done]
    particles[:kept] = trajectory["particles"][:kept]
    return jax.tree.map(jnp.asarray, saved)
