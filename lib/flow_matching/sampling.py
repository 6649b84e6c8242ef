"""Following a velocity from the source (t = 0) to the data (t = 1), and how straight the way is.

A velocity is a function v(x [B, d], times [B]) -> [B, d], such as `lib.flow_matching.velocity`.
Nothing here is jitted: jit at the caller, with the network's parameters as an argument.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lib.flow_matching.training import Velocity
from lib.numerics import map_blocks, safe_norm

Method = Literal["euler", "heun", "ralston3"]
"""A Runge-Kutta method of order 1, 2 or 3."""
NumSteps = int | Int[Array, ""]
"""A traced number lets one compiled program serve all."""
EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2, "ralston3": 3}


# Fixed steps


def euler(
    velocity: Velocity, x0: Float[Array, "B d"], num_steps: NumSteps, *, keep_path: bool = False
) -> Float[Array, "B d"] | Float[Array, "states B d"]:
    """x <- x + h v(x, t) with h = 1 / num_steps, one evaluation a step; order 1.

    Returns x(1), or with `keep_path` the states at times 0, h, ..., 1, [num_steps + 1, B, d].
    """
    return _fixed_steps(lambda v, x, t, h: x + h * v(x, t), velocity, x0, num_steps, keep_path)


def heun(
    velocity: Velocity, x0: Float[Array, "B d"], num_steps: NumSteps, *, keep_path: bool = False
) -> Float[Array, "B d"] | Float[Array, "states B d"]:
    """Heun's method, the trapezoid with an Euler step in it: two evaluations per step; order 2.

    Returns what `euler` returns.
    """

    def step(v, x, t, h):
        first = v(x, t)
        return x + h / 2 * (first + v(x + h * first, t + h))

    return _fixed_steps(step, velocity, x0, num_steps, keep_path)


def ralston3(
    velocity: Velocity, x0: Float[Array, "B d"], num_steps: NumSteps, *, keep_path: bool = False
) -> Float[Array, "B d"] | Float[Array, "states B d"]:
    """The Runge-Kutta method of order 3 with the least bound on its error (Ralston, 1962): three
    evaluations per step.

    Returns what `euler` returns.
    """

    def step(v, x, t, h):
        first = v(x, t)
        second = v(x + h / 2 * first, t + h / 2)
        third = v(x + 3 * h / 4 * second, t + 3 * h / 4)
        return x + h / 9 * (2 * first + 3 * second + 4 * third)

    return _fixed_steps(step, velocity, x0, num_steps, keep_path)


def _fixed_steps(step, velocity, x0, num_steps, keep_path):
    if isinstance(num_steps, int) and num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    h = jnp.asarray(1 / num_steps, x0.dtype)

    def at(x, t):
        return velocity(x, jnp.full(len(x), t, x.dtype))

    def body(x, i):
        x = step(at, x, i.astype(x.dtype) * h, h)
        return x, x if keep_path else None

    if not isinstance(num_steps, int):
        return lax.fori_loop(0, num_steps, lambda i, x: body(x, i)[0], x0)
    x1, states = lax.scan(body, x0, jnp.arange(num_steps))
    return jnp.concatenate([x0[None], states]) if keep_path else x1


def integrate(
    velocity: Velocity,
    x0: Float[Array, "n d"],
    *,
    num_evaluations: NumSteps,
    method: Method = "euler",
    block_size: int = 500,
) -> Float[Array, "n d"]:
    """x(1) [n, d] at a cost of `num_evaluations` of the velocity a point, in blocks of points.

    Memory is that of a velocity on `block_size` points. A traced `num_evaluations` lets one program
    serve all numbers, without reverse gradients; it is not checked. Raises ValueError where the
    method's steps (`EVALUATIONS_PER_STEP`) do not add up to `num_evaluations`.
    """
    if method not in EVALUATIONS_PER_STEP:
        raise ValueError(f"method is one of {', '.join(EVALUATIONS_PER_STEP)}, got {method!r}")
    num_steps, left = divmod(num_evaluations, EVALUATIONS_PER_STEP[method])
    if isinstance(num_steps, int) and (num_steps < 1 or left):
        raise ValueError(f"{num_evaluations} evaluations are no whole number of {method} steps")
    solve = {"euler": euler, "heun": heun, "ralston3": ralston3}[method]
    return map_blocks(lambda rows: solve(velocity, rows, num_steps), x0, block_size)


# Straightness


class Straightness(NamedTuple):
    """How straight generated paths are; all but `transport_cost` are least for straight lines at
    constant speed: 0, 0 and 1. The two ratios are NaN where no point moves."""

    value: Float[Array, ""]
    normalized: Float[Array, ""]
    length_ratio: Float[Array, ""]
    transport_cost: Float[Array, ""]


def straightness(path: Float[Array, "*shape"]) -> Straightness:
    """Of the paths [steps + 1, B, d] that `euler` or `heun` keep, with no further evaluation.

    value is S = E int_0^1 |(x(1) - x(0)) - x'(t)|^2 dt (Liu et al., 2023, section 2.2), in squared
    units of the data and summed over coordinates, of the piecewise linear path: exactly that of an
    Euler path, and to order 1 / steps that of the flow. normalized is S / E|x(1) - x(0)|^2,
    length_ratio E length / E|x(1) - x(0)|, and transport_cost E|x(1) - x(0)|^2 / d.
    """
    if path.ndim != 3 or len(path) < 2:
        raise ValueError(f"a path is [steps + 1, B, d] with steps >= 1, got shape {path.shape}")
    displacement, moves = path[-1] - path[0], jnp.diff(path, axis=0)
    num_steps, _, dimension = moves.shape
    deviations = displacement[None] - num_steps * moves
    value = jnp.mean(jnp.sum(jnp.square(deviations), axis=2))
    squared = jnp.mean(jnp.sum(jnp.square(displacement), axis=1))
    lengths = jnp.sum(jax.vmap(safe_norm)(moves), axis=0)
    ratio = jnp.mean(lengths) / jnp.mean(safe_norm(displacement))
    return Straightness(value, value / squared, ratio, squared / dimension)
