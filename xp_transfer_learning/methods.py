"""The methods of the transfer experiment behind one interface: what flows, and along what."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from lib import mmd
from lib.gd import TargetValueAndGrad, recorded_steps, wasserstein_gradient_descent
from lib.numerics import named_key
from lib.runs import Run
from lib.sliced_wasserstein import basis_directions, orthogonal_directions, random_directions
from xp_transfer_learning.config import FlowSettings
from xp_transfer_learning.product_kernel import MOMENTS, product_value_and_grad, with_moments

DIRECTIONS: dict[str, Callable[..., Array]] = {
    "random": random_directions,
    "orthogonal": orthogonal_directions,
    "basis": basis_directions,
}


class Flowed(NamedTuple):
    """`losses` [T], and `images` [records, C, n, d] after `steps` [records] steps."""

    losses: np.ndarray
    steps: np.ndarray
    images: np.ndarray


def flow(
    settings: FlowSettings,
    x0: Array,
    x_tgt: Array,
    *,
    seed: int,
    records: int,
    run: Run | None,
    description: str,
    mesh: Mesh | None = None,
) -> Flowed:
    """Moves x0 [C, n, d] to x_tgt [D, k, d] by `settings`, saving into, or resuming, `run`. The
    devices of `mesh` share what can be shared."""
    moved = problem(settings, x0, x_tgt, mesh)
    every = max(1, settings.num_steps // records)
    losses, particles = wasserstein_gradient_descent(
        moved.start,
        moved.target,
        moved.value_and_grad,
        named_key(jax.random.PRNGKey(seed), f"flow by {settings.method}"),
        n_epochs=settings.num_steps,
        optimizer=optimizer(settings),
        record_every=every,
        run=run,
        description=f"{description}, try {seed}",
        mesh=mesh,
    )
    images = np.asarray(moved.points(particles))
    return Flowed(losses, recorded_steps(settings.num_steps, every), images)


class Problem(NamedTuple):
    """`start` and `target` are what `lib.gd` moves, and where to; `points` takes such particles
    [..., n, d'] to images [..., n, d]."""

    start: Array
    target: Array
    value_and_grad: TargetValueAndGrad
    points: Callable[[Any], Array]


def problem(settings: FlowSettings, x0: Array, x_tgt: Array, mesh: Mesh | None = None) -> Problem:
    """The flow of x0 [C, n, d] to x_tgt [D, k, d] by `settings.method`."""
    value_and_grad = _value_and_grad(settings, mesh)
    if settings.method == "mmd_product":
        extended = with_moments(x0, x_tgt)
        return Problem(*extended, value_and_grad, lambda x: x[..., :-MOMENTS])
    return Problem(x0, x_tgt, value_and_grad, lambda x: x)


@cache
def _value_and_grad(settings: FlowSettings, mesh: Mesh | None) -> TargetValueAndGrad:
    # Cached, so that flows of the same settings and shapes share one compiled loop.
    draws: dict[str, Any] = {
        "num_directions": settings.num_directions,
        "draw_directions": DIRECTIONS[settings.directions],
        "mesh": mesh,
    }
    if settings.method == "mmdsw":
        return mmd.target_value_and_grad(mmd.SLICED_KERNELS[settings.kernel](), **draws)
    if settings.method == "sliced_mmd":
        return mmd.target_value_and_grad_sliced_energy(**draws)
    if settings.method == "otdd":
        # Here, since importing ott takes seconds.
        from xp_transfer_learning.otdd import otdd_value_and_grad

        return partial(otdd_value_and_grad, epsilon=settings.epsilon, mesh=mesh)
    if settings.method == "mmd_product":
        return partial(product_value_and_grad, noise=settings.noise, mesh=mesh)
    raise ValueError(f"{settings.method} moves nothing")


@cache
def optimizer(settings: FlowSettings) -> optax.GradientTransformation:
    """The optimizer of the particles, its step size constant or with linear decay."""
    step_size = settings.step_size
    if settings.decay:
        step_size = optax.linear_schedule(settings.step_size, 0.0, settings.num_steps)
    if settings.optimizer == "adam":
        return optax.adam(step_size)
    if settings.optimizer == "lbfgs":
        return optax.lbfgs(step_size, memory_size=10, linesearch=None)
    return optax.sgd(step_size, momentum=settings.m or None)
