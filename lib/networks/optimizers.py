"""Optimizers for training networks, one object for each setting.

A jitted training loop takes its optimizer as a static argument, and jit tells functions apart by
identity: with two objects of the same setting it would compile twice.
"""

from functools import cache, partial

import optax

adam = cache(optax.adam)
"""optax's Adam (Kingma and Ba, 2015), of a step size."""
adamw = cache(partial(optax.adamw, weight_decay=0.01))
"""The same with a decay of weights (Loshchilov and Hutter, 2019), by default torch's."""


@cache
def sgd(
    learning_rate: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    milestones: tuple[int, ...] = (),
    factor: float = 0.1,
    steps_per_epoch: int = 1,
) -> optax.GradientTransformation:
    """v <- gradient + weight_decay p + momentum v, p <- p - lr v, as torch has it.

    lr starts at `learning_rate` and is multiplied by `factor` when an epoch of `milestones`
    (counted from 0) begins; `steps_per_epoch` is that of the data, or 1 for milestones in steps.
    """
    if any(after <= before for before, after in zip((0, *milestones), milestones)):
        raise ValueError(f"milestones must be positive and increase, got {milestones}")
    boundaries = {milestone * steps_per_epoch: factor for milestone in milestones}
    schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule if milestones else learning_rate, momentum=momentum or None),
    )
