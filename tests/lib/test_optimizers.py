"""Optimizers against the published formulas and torch's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from lib.networks.optimizers import adam, adamw, sgd


def test_adam_steps_as_published():
    """Kingma and Ba (2015), algorithm 1, for two steps."""
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    parameters = jnp.asarray(x, jnp.float32)
    state = adam(0.1).init(parameters)
    for t, gradient in enumerate(([0.5, -3.0], [-1.0, 2.0]), 1):
        updates, state = adam(0.1).update(jnp.asarray(gradient, jnp.float32), state)
        parameters = optax.apply_updates(parameters, updates)
        g = np.array(gradient)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(parameters, x, rtol=1e-5)


def descents(optimizer, by_torch, x0, num_steps):
    """Paths [num_steps, d] from x0 on sum x^4 / 4 + x, by optax and by torch."""
    x, state, path = jnp.asarray(x0), optimizer.init(jnp.asarray(x0)), []
    point = torch.tensor(x0, requires_grad=True)
    step, expected = by_torch(point), []
    for _ in range(num_steps):
        updates, state = optimizer.update(x**3 + 1, state, x)
        x = optax.apply_updates(x, updates)
        point.grad = point.detach() ** 3 + 1
        step()
        path.append(np.asarray(x))
        expected.append(point.detach().numpy().copy())
    return np.stack(path), np.stack(expected)


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "milestones"),
    [(0.0, 0.0, ()), (0.9, 0.3, ()), (0.9, 0.05, (2, 3)), (0.0, 0.1, (1,))],
)
def test_sgd_is_that_of_torch(x64, momentum, weight_decay, milestones):
    """5 epochs of 3 steps, torch's schedule stepping once an epoch."""
    settings = {"momentum": momentum, "weight_decay": weight_decay}
    optimizer = sgd(0.1, **settings, milestones=milestones, factor=0.2, steps_per_epoch=3)

    def by_torch(point):
        reference = torch.optim.SGD([point], lr=0.1, **settings)
        schedule = torch.optim.lr_scheduler.MultiStepLR(reference, milestones, gamma=0.2)
        done = 0

        def step():
            nonlocal done
            reference.step()
            done += 1
            if done % 3 == 0:
                schedule.step()

        return step

    path, expected = descents(optimizer, by_torch, np.array([1.0, -0.5, 0.2]), 15)
    np.testing.assert_allclose(path, expected, rtol=1e-12)


def test_adamw_is_that_of_torch(x64):
    for options in ({}, {"weight_decay": 0.4}):
        path, expected = descents(
            adamw(0.05, **options),
            lambda point, options=options: torch.optim.AdamW([point], lr=0.05, **options).step,
            np.array([1.0, -0.5]),
            8,
        )
        np.testing.assert_allclose(path, expected, rtol=1e-12)


def test_optimizers_are_one_object_a_setting_and_milestones_increase():
    assert adam(0.1) is adam(0.1)
    assert adam(0.1) is not adam(0.2)
    assert sgd(0.1, momentum=0.9) is sgd(0.1, momentum=0.9)
    assert sgd(0.1, momentum=0.9) is not sgd(0.1, momentum=0.8)
    assert adamw(0.1) is adamw(0.1)
    assert adamw(0.1) is not adamw(0.1, weight_decay=0.2)
    for milestones in ((0,), (3, 3), (4, 2)):
        with pytest.raises(ValueError, match="milestones must be positive and increase"):
            sgd(0.1, milestones=milestones)
