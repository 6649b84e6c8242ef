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
from lib.numerics import safe_norm

Method = Literal["euler", "heun"]
FIRST_STEP = 0.01  # of the adaptive solvers
NumSteps = int | Int[Array, ""]
EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2}


# Fixed steps


def euler(
    velocity: Velocity, x0: Float[Array, "B d"], num_steps: NumSteps, *, keep_path: bool = False
) -> Float[Array, "B d"] | Float[Array, "states B d"]:
    """x <- x + h v(x, t) with h = 1 / num_steps, one evaluation a step; order 1.

    Returns x(1), or with `keep_path` the states at times 0, h, ..., 1, [num_steps + 1, B, d].
    """
    return _fixed_steps(lambda x, t, h: x + h * _at(velocity, x, t), x0, num_steps, keep_path)


def heun(
    velocity: Velocity, x0: Float[Array, "B d"], num_steps: NumSteps, *, keep_path: bool = False
) -> Float[Array, "B d"] | Float[Array, "states B d"]:
    """Heun's method, the trapezoid with an Euler step in it: two evaluations a step; order 2.

    Returns what `euler` returns.
    """

    def step(x, t, h):
        first = _at(velocity, x, t)
        return x + h / 2 * (first + _at(velocity, x + h * first, t + h))

    return _fixed_steps(step, x0, num_steps, keep_path)


def _at(velocity, x, t):
    return velocity(x, jnp.full(len(x), t, x.dtype))


def _fixed_steps(step, x0, num_steps, keep_path):
    if isinstance(num_steps, int) and num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    h = jnp.asarray(1 / num_steps, x0.dtype)

    def body(x, i):
        x = step(x, i.astype(x.dtype) * h, h)
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
    method's steps (Heun's take 2 evaluations) do not add up to `num_evaluations`.
    """
    if method not in EVALUATIONS_PER_STEP:
        raise ValueError(f'method is "euler" or "heun", got {method!r}')
    num_steps, left = divmod(num_evaluations, EVALUATIONS_PER_STEP[method])
    if isinstance(num_steps, int) and (num_steps < 1 or left):
        raise ValueError(f"{num_evaluations} evaluations are no whole number of {method} steps")
    solve = euler if method == "euler" else heun
    blocks = _blocks(x0, block_size)
    x1 = lax.map(lambda block: solve(velocity, block, num_steps), blocks)
    return x1.reshape(-1, x0.shape[1])[: len(x0)]


def _blocks(x0, block_size):
    """[blocks, size, d], equal sizes of at most `block_size`; the last row fills the last block."""
    if block_size < 1 or not len(x0):
        raise ValueError(f"{len(x0)} points in blocks of {block_size}: both must be at least 1")
    count = -(-len(x0) // block_size)
    size = -(-len(x0) // count)
    padded = jnp.pad(x0, ((0, count * size - len(x0)), (0, 0)), mode="edge")
    return padded.reshape(count, size, -1)


# Adaptive steps


class AdaptiveResult(NamedTuple):
    """x(1) [n, d], and evaluations of the velocity for each block of points [blocks]."""

    points: Float[Array, "n d"]
    num_evaluations: Int[Array, " blocks"]


def integrate_adaptive(
    velocity: Velocity,
    x0: Float[Array, "n d"],
    *,
    tolerance: float = 1e-5,
    solver: Literal["tsit5", "dopri5"] = "tsit5",
    block_size: int = 500,
    max_steps: int = 4096,
) -> AdaptiveResult:
    """x(1) by an explicit Runge-Kutta pair of order 5(4) with step size control (diffrax).

    The points of a block share their steps. `tolerance` is both the absolute and the relative one
    of the error of a step, a root mean square over the block. Rejected steps count as evaluations.
    Where `max_steps` do not suffice, points are NaN.
    """
    import diffrax

    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if solver not in ("tsit5", "dopri5"):
        raise ValueError(f'solver is "tsit5" or "dopri5", got {solver!r}')
    method = diffrax.Tsit5() if solver == "tsit5" else diffrax.Dopri5()
    term = diffrax.ODETerm(lambda t, x, _: _at(velocity, x, t))

    # As Python numbers they would be float64 where that is on, and make the points so.
    t0, t1, dt0 = (jnp.asarray(time, x0.dtype) for time in (0, 1, FIRST_STEP))

    def solve(block):
        solution = diffrax.diffeqsolve(
            term,
            method,
            t0=t0,
            t1=t1,
            dt0=dt0,
            y0=block,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=max_steps,
            throw=False,
        )
        solved = solution.result == diffrax.RESULTS.successful
        # Seven stages, of which the first is the last of the step before.
        evaluations = 1 + 6 * solution.stats["num_steps"]
        return jnp.where(solved, solution.ys[0], jnp.nan), evaluations

    points, num_evaluations = lax.map(solve, _blocks(x0, block_size))
    return AdaptiveResult(points.reshape(-1, x0.shape[1])[: len(x0)], num_evaluations)


# Straightness


class Straightness(NamedTuple):
    """How straight generated paths are; all but `transport_cost` are least for straight lines at
    constant speed: 0, 0 and 1. The two ratios are NaN where no point moves."""

    value: Float[Array, ""]
    normalised: Float[Array, ""]
    length_ratio: Float[Array, ""]
    transport_cost: Float[Array, ""]


def straightness(path: Float[Array, "*shape"]) -> Straightness:
    """Of the paths [steps + 1, B, d] that `euler` or `heun` keep, with no further evaluation.

    value is S = E int_0^1 |(x(1) - x(0)) - x'(t)|^2 dt (Liu et al., 2023, section 2.2), in squared
    units of the data and summed over coordinates, of the piecewise linear path: exactly that of an
    Euler path, and to order 1 / steps that of the flow. normalised is S / E|x(1) - x(0)|^2,
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
