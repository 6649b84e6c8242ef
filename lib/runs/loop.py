"""Long compiled loops in chunks of steps: progress, saves, stops on request, resuming, NaN.

A chunk is as many steps as one call of a compiled function takes in about `SECONDS_PER_CHUNK`; then
the loop is back in Python. What a step computes must not depend on where chunks end: a resumed run
ends in the bits of one that was never interrupted. What is shown goes into metrics.jsonl at the
next save.
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from lib import devices
from lib.runs import processes
from lib.runs._folders import Run
from lib.runs.console import Interrupted, interruptible, progress
from lib.runs.files import Identity, RunFileError

SECONDS_PER_CHUNK = 0.5
_HASHED_BYTES = 2**26


class DivergedError(FloatingPointError):
    """A run met NaN or infinity. `state` is the last good state, `step` the steps behind it; None
    where the loop held one state only."""

    def __init__(self, state: PyTree, step: int, bad_step: int, run: Run | None):
        saved = run and run.checkpoint.exists()
        where = f"; the last good state is in {run.checkpoint}" if run and saved else ""
        super().__init__(
            f"NaN or infinity in step {bad_step} (counted from 0): lower the step size{where}"
        )
        self.state, self.step = state, step


class Chunk(NamedTuple):
    """The state after some steps, numbers to show, and the first step, counted from the chunk's
    beginning, that met NaN or infinity, if one did."""

    state: Any
    shown: Mapping[str, Any]
    bad_step: int | None = None


def run_steps(
    advance: Callable[[Any, int, int], Chunk],
    state: PyTree,
    num_steps: int,
    *,
    run: Run | None,
    identity: Callable[[], Mapping[str, PyTree]],
    history: Callable[[int], PyTree] = lambda done: (),
    place: Callable[[PyTree], PyTree] = lambda state: jax.tree.map(jnp.asarray, state),
    converged: Callable[[int], bool] = lambda done: False,
    max_chunk: int | None = None,
    keeps_state: bool = True,
    checkpoint_seconds: float = 60.0,
    show_progress: bool = True,
    description: str = "",
) -> tuple[Any, int]:
    """(state, steps done) after `num_steps` steps, or as soon as the loop has converged.

    Args:
      advance: `advance(state, done, size)` takes `size` steps from the state after `done` steps.
      state: before the first step, any arrays. They lose their weak types, which do not survive a
        checkpoint: without them a resumed run promotes alike.
      run: a run folder to save into and, if it holds a checkpoint, to resume from.
      identity: by name what a checkpoint must share with the run that resumes it; see
        `fingerprint`. Called if there is a run.
      history: views of the arrays on the host, written by `advance`, that count after `done` steps.
        They are saved with the state, and filled on resuming.
      place: puts a state on the devices, a new or a saved one.
      converged: whether to end after `done` steps.
      max_chunk: steps in a chunk, at most.
      keeps_state: False where `advance` overwrites the state that it gets: after a bad step the
        last good one is then that of the last save.
      checkpoint_seconds: seconds between saves; the end and a stop save too.

    SIGINT and SIGTERM save and raise `Interrupted`, or KeyboardInterrupt without a run. Several
    processes (`lib.runs.processes`) take the same steps in the same chunks.

    Raises:
      DivergedError: where a chunk has a bad step; the state before the chunk is saved.
      RunFileError: the folder's checkpoint is of another identity, or past `num_steps`.
    """
    state = without_weak_types(state)
    done, digests = 0, {}
    if run:
        digests = {name: fingerprint(part) for name, part in identity().items()}
        state, done = _resume(run, state, num_steps, digests, history)
    state = place(state)
    size, saved, rows = 1, time.monotonic(), list[dict[str, Any]]()

    def save() -> None:
        nonlocal saved, rows
        if run:
            run.append_metrics(rows)
            saved_state = devices.fetch(state), history(done)
            run.save_checkpoint(saved_state, step=done, identity=digests)
        saved, rows = time.monotonic(), []

    with (
        interruptible() as stop_requested,
        progress(
            num_steps, initial=done, description=description, enabled=show_progress, line_every=10.0
        ) as tick,
    ):
        while done < num_steps and not converged(done):
            size = min(size, num_steps - done)
            started = time.monotonic()
            chunk = jax.block_until_ready(advance(state, done, size))
            seconds = max(time.monotonic() - started, 1e-9)  # a coarse clock may not have moved
            if chunk.bad_step is not None:
                if keeps_state:
                    save()
                good = state if keeps_state else None
                raise DivergedError(good, done, done + chunk.bad_step, run)
            state, done = chunk.state, done + size
            tick(size, **chunk.shown)
            rows.append({"step": done - 1, **chunk.shown})
            # Doubling at most: the first chunk's time is mostly compilation.
            size = max(1, int(size * min(2.0, SECONDS_PER_CHUNK / seconds)))
            size = min(size, max_chunk or size)
            due = time.monotonic() - saved > checkpoint_seconds
            size, stopping, due = processes.agreed(size, stop_requested(), due)
            finished = done == num_steps or converged(done)
            if stopping or finished or due:
                save()
            if stopping and not finished:
                raise Interrupted(run.checkpoint, done) if run else KeyboardInterrupt
    return state, done


def _resume(
    run: Run, state: PyTree, num_steps: int, digests: Identity, history: Callable[[int], PyTree]
) -> tuple[PyTree, int]:
    """The saved state and its step, if there is one; fills the history up to it."""

    def saved_after(step: int) -> PyTree:
        if step > num_steps:
            raise RunFileError(
                f"{run.checkpoint} is at step {step}, past the {num_steps} asked for"
            )
        return state, history(step)

    done = 0
    if (loaded := run.load_checkpoint(saved_after, digests)) is not None:
        (state, arrays), done = loaded
        jax.tree.map(np.copyto, history(done), arrays)
    run.truncate_metrics(done)
    return state, done


def without_weak_types(tree: PyTree) -> PyTree:
    """The leaves as arrays whose dtype no longer gives way to another."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def first_nonfinite(values: np.ndarray, state_finite: bool) -> int | None:
    """The first of the steps' `values` [steps, ...] that is not finite. Where all are but the state
    after them is not, the last step made it so."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    bad[-1] |= not state_finite
    return int(np.argmax(bad)) if bad.any() else None


def fingerprint(tree: PyTree) -> np.ndarray:
    """SHA-256 of the leaves and their places in the tree, [32] bytes: arrays by shape, dtype and
    bits, keys by their data, anything else, such as settings and networks, by how it prints."""
    digest = hashlib.sha256()
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(place).encode())
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            digest.update(_without_addresses(repr(leaf)).encode())
            continue
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        if isinstance(leaf, jax.Array):
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            leaf = np.asarray(jax.random.key_data(leaf) if key else leaf)
        # By rows: a memory map may be larger than memory.
        rows = max(1, _HASHED_BYTES // max(1, math.prod(leaf.shape[1:]) * leaf.dtype.itemsize))
        starts = range(0, leaf.shape[0], rows) if leaf.shape else ()
        for part in (leaf[i : i + rows] for i in starts) if starts else (leaf,):
            digest.update(np.ascontiguousarray(part).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def traced(function: Callable, *arguments: PyTree) -> PyTree:
    """What `function` computes of arguments of such shapes, as JAX traces it, for a fingerprint:
    the settings that a function closes over are part of its program."""
    program = jax.make_jaxpr(function)(*arguments)
    return _without_addresses(str(program)), program.consts


def traced_optimizer(optimizer: optax.GradientTransformation, parameters: PyTree) -> PyTree:
    """`traced` of one update of the parameters, with its schedule."""
    state = jax.eval_shape(optimizer.init, parameters)
    return traced(optimizer.update, parameters, state, parameters)


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
