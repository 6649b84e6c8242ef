"""Semidiscrete optimal transport from a source to a data set: pairs that no batch limits.

Potentials g [n] of the data y_j make a map of the source, x0 -> the y_j with the least
|x0 - y_j|^2 - g_j, which sends a share p_j(g) of the source to y_j. Where every share is 1/n it is
the optimal map (Aurenhammer, Hoffmann and Aronov, 1998), and g maximizes the concave dual

    E min_j (|x0 - y_j|^2 - g_j) + mean_j g_j

whose gradient is 1/n - p_j(g): stochastic ascent over draws of the source (Genevay et al., 2016).
For flow matching: "Flow matching with semidiscrete couplings" (arXiv 2509.25519).

Potentials are learnt once; a pair then costs O(n d). Batches of independent data, coupled, pair
each draw with the best of B points only, and the plan is biased towards independence.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lib.kernels import squared_distances
from lib.numerics import map_blocks, product
from lib.runs import Run
from lib.runs.loop import Chunk, first_nonfinite, run_steps

MAX_STEPS_PER_CHUNK = 256


class Potentials(NamedTuple):
    """`values` g [n]; `duals` [T] what each step's batch said of the dual, before the step."""

    values: Float[Array, " n"]
    duals: np.ndarray


def assign(
    x0: Float[Array, "B d"],
    points: Float[Array, "n d"],
    values: Float[Array, " n"],
    *,
    block_size: int = 1024,
) -> Int[Array, " B"]:
    """argmin_j |x0_i - y_j|^2 - g_j for every row, `block_size` rows at a time."""
    return _least(x0, points, values, block_size)[1]


def _least(x0, points, values, block_size) -> tuple[Array, Array]:
    """(the least |x0_i - y_j|^2 - g_j over j, where it is)."""
    offsets = jnp.sum(jnp.square(points), axis=1) - values

    def of_rows(rows):
        scores = offsets[None] - 2 * product(rows, points.T)
        index = jnp.argmin(scores, axis=1)
        least = jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]
        return least + jnp.sum(jnp.square(rows), axis=1), index

    return map_blocks(of_rows, x0, block_size)


def fit_potentials(
    key: Key[Array, ""],
    source: Any,
    points: Float[Array, "n d"],
    *,
    num_steps: int,
    batch_size: int = 256,
    step_size: float = 0.1,
    run: Run | None = None,
    show_progress: bool = True,
) -> Potentials:
    """Potentials by stochastic ascent, averaged over the second half of the steps.

    A step of n batch_size d operations lowers the potential of a point that was drawn by eta_t for
    each time, and raises all so that their mean stays 0. eta_t = step_size s / sqrt(1 + t B / n):
    the draws that a point sees count, not the steps. s, and the start, are from a first batch: how
    costs vary, and potentials that make all points as near on average.

    Args:
      source: draws x0 [B, d] (`lib.flow_matching.Source`).
      points: the data, rows.
      run: a run folder to save into and to resume from.

    Raises ValueError unless sizes and step are positive and there are two points or more; as
    `lib.runs.loop.run_steps` else.
    """
    n = len(points)
    if n < 2:
        raise ValueError(f"two points are needed, got {n}")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    start, scale = _start(jax.random.fold_in(key, num_steps), source, points, batch_size)
    scale = step_size * scale
    duals = np.zeros(num_steps, np.float32)

    def advance(state, done, size):
        state, values = _ascend(
            key, state, source, points, scale, done, size,
            num_steps=num_steps, batch_size=batch_size,
        )  # fmt: skip
        latest = duals[done : done + size] = np.asarray(values)[:size]
        return Chunk(state, {"dual": latest.mean()}, first_nonfinite(latest, True))

    state, _ = run_steps(
        advance,
        (start, start),
        num_steps,
        run=run,
        identity=lambda: {
            "data": points,
            "source": (type(source).__name__, source),
            "key": key,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "step_size": step_size,
        },
        history=lambda done: duals[:done],
        max_chunk=MAX_STEPS_PER_CHUNK,
        show_progress=show_progress,
        description="potentials",
    )
    return Potentials(state[1], duals)


@partial(jax.jit, static_argnames="batch_size")
def _start(key, source, points, batch_size):
    """(potentials that make all points as near on average, how far costs then vary): means over
    draws of |x0 - y_j|^2, less their mean; the root mean square of what is left of the costs after
    means of rows and columns."""
    costs = squared_distances(source.sample(key, batch_size), points)
    means = jnp.mean(costs, axis=0)
    rest = costs - means[None] - jnp.mean(costs - means[None], axis=1, keepdims=True)
    return means - jnp.mean(means), jnp.sqrt(jnp.mean(jnp.square(rest)))


@partial(jax.jit, static_argnames=("num_steps", "batch_size"))
def _ascend(key, state, source, points, scale, done, size, *, num_steps, batch_size):
    """(potentials and their mean over the second half so far, dual values in a buffer)."""
    n = len(points)
    first = num_steps // 2

    def body(i, carry):
        (values, mean), duals = carry
        t = done + i
        x0 = source.sample(jax.random.fold_in(key, t), batch_size)
        least, index = _least(x0, points, values, batch_size)
        dual = jnp.mean(least) + jnp.mean(values)
        counts = jnp.zeros(n, points.dtype).at[index].add(1.0)
        eta = scale / jnp.sqrt(1 + t * batch_size / n)
        values = values + eta * (batch_size / n - counts)
        # The mean of the iterates from `first` on.
        weight = jnp.where(t < first, 1.0, 1 / (1 + jnp.maximum(t - first, 0)))
        return (values, mean + weight * (values - mean)), duals.at[i].set(dual)

    buffer = jnp.zeros(MAX_STEPS_PER_CHUNK, points.dtype)
    return jax.lax.fori_loop(0, size, body, (state, buffer))
