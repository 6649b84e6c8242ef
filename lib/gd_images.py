"""Flows of images by the engine of `lib.gd`, with the published results: the last particles, or
some of them on the way, where `lib.gd` keeps every step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jaxtyping import Array, PyTree

from lib import gd

LAST_ONLY = np.iinfo(np.int32).max


def wasserstein_gradient_descent(*flow: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(losses [n_epochs], the last particles, of x0's shape).

    Arguments and errors as `lib.gd.wasserstein_gradient_descent`, without `record_every`.
    """
    losses, particles = gd.wasserstein_gradient_descent(*flow, record_every=LAST_ONLY, **options)
    return losses, particles[-1]


def wasserstein_gradient_descent_save(
    x0: Array,
    x_tgt: PyTree,
    target_value_and_grad: gd.TargetValueAndGrad,
    rng: Array,
    n_epochs: int = 101,
    lr: float | int | Callable[[Array], Array] = 1,
    m: float | int = 0,
    save_interval: int = 1,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(losses [n_epochs], particles [n_epochs // save_interval + 1, ...]).

    `particles[i]` are those after i `save_interval` steps, the first x0 (which the published
    function overwrites), except the last, which are those after all steps. Arguments and errors as
    `lib.gd.wasserstein_gradient_descent`.
    """
    flow = x0, x_tgt, target_value_and_grad, rng, n_epochs, lr, m
    options["record_every"] = save_interval
    losses, particles = gd.wasserstein_gradient_descent(*flow, **options)
    if n_epochs % save_interval:
        # `lib.gd` has one more, the last multiple of the interval before the end.
        particles = np.delete(particles, -2, axis=0)
    return losses, particles


def wasserstein_gradient_descent_optax(
    x0: Array,
    x_tgt: PyTree,
    target_value_and_grad: gd.TargetValueAndGrad,
    rng: Array,
    optimizer: optax.GradientTransformation,
    n_epochs: int = 101,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """As `wasserstein_gradient_descent`, with the steps of an optax optimizer."""
    return wasserstein_gradient_descent(
        x0, x_tgt, target_value_and_grad, rng, n_epochs, optimizer=optimizer, **options
    )
