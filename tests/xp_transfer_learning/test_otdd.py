"""OTDD by Sinkhorn against POT's exact one.

Sinkhorn stops with marginals off by up to 1e-3 in total, which bounds what its plans are worth.
With an epsilon of 1e-3 they are vertices up to that, except near ties; the value, at worst off by
log(points) epsilon mean costs and 1e-3 largest ones (0.7 % here), is by 0.04 %.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from cases import slow
from strategies import normal

from xp_transfer_learning.otdd import Plans, marginal_errors, otdd_plans, otdd_value_and_grad

THRESHOLD = 1e-3
sharp = {"epsilon": 1e-3, "max_iterations": 20_000}
value_and_grad = jax.jit(partial(otdd_value_and_grad, **sharp))
plans_of = jax.jit(partial(otdd_plans, **sharp))


@pytest.fixture(autouse=True)
def ranks():
    """ott promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def clouds(seed=0, classes=(2, 3), points=(3, 2)):
    (num_x, num_y), (n, k) = classes, points
    return normal(seed, num_x, n, 2), 1 + 2 * normal(seed + 1, num_y, k, 2)


def copies():
    """Classes of 4 corners each, far from each other; y's are x's, moved, in another order."""
    corners = 2.0 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    means = 12.0 * np.array([[0, 0], [1, 0], [0, 1]])[:, None]
    noise_x, noise_y = 0.3 * normal(0, 2, 3, 4, 2)
    return means + corners + noise_x, 1 + means[[2, 0, 1]] + corners[[3, 1, 0, 2]] + noise_y


def by_pot(x, y, solve=lambda cost: ot.emd([], [], cost)):
    """(OTDD^2, cost [C, n, D, k], plans of the points, plans of the classes)."""
    (num_x, n, d), (num_y, k, _) = x.shape, y.shape
    squared = ot.dist(x.reshape(-1, d), y.reshape(-1, d)).reshape(num_x, n, num_y, k)
    classes = np.array([[solve(squared[c, :, e]) for e in range(num_y)] for c in range(num_x)])
    between = np.einsum("cdnk,cndk->cd", classes, squared)
    cost = squared + between[:, None, :, None]
    flat = cost.reshape(num_x * n, num_y * k)
    points = solve(flat)
    return np.sum(points * flat), cost, points.reshape(cost.shape), classes


def with_fixed_plans(x, y, points, classes):
    """What OTDD^2 is as a function of x, as long as the plans do not change."""
    squared = jnp.square(x[:, :, None, None] - y[None, None]).sum(axis=-1)
    between = jnp.sum(classes * jnp.swapaxes(squared, 1, 2), axis=(2, 3))
    return jnp.sum(points * (squared + between[:, None, :, None]))


def fixed_gradient(x, y, points, classes):
    """C n times the gradient."""
    gradient = jax.grad(with_fixed_plans)(*map(jnp.asarray, (x, y, points, classes)))
    return np.asarray(x.shape[0] * x.shape[1] * gradient)


def in_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def assert_near(values, expected, error):
    """Up to a share of the largest."""
    np.testing.assert_allclose(values, expected, rtol=0, atol=error * np.abs(expected).max())


@pytest.mark.parametrize(
    ("seed", "options"),
    [*((seed, {}) for seed in range(4)), slow(0, {"classes": (2, 2), "points": (4, 1)})],
)
def test_value_and_costs_are_those_of_pot(seed, options):
    x, y = clouds(seed, **options)
    expected, expected_cost, _, _ = by_pot(x, y)
    value, _ = value_and_grad(*in_float32(x, y))
    cost, _ = plans_of(*in_float32(x, y))
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert_near(cost, expected_cost, 1e-3)


def test_plans_are_those_of_pot():
    x, y = copies()
    _, plans = plans_of(*in_float32(x, y))
    _, _, points, classes = by_pot(x, y)
    assert np.count_nonzero(points) == 12
    assert np.count_nonzero(classes) == 9 * 4
    np.testing.assert_allclose(plans.points, points, atol=THRESHOLD)
    np.testing.assert_allclose(plans.classes, classes, atol=THRESHOLD)


@pytest.mark.parametrize("options", [{}, slow(sharp)], ids=["default", "sharp"])
def test_marginals_of_plans(x64, options):
    """Sinkhorn ends on the particles' side, whose weights are exact."""
    x, y = map(jnp.asarray, clouds(0))
    _, (points, classes) = jax.jit(partial(otdd_plans, **options))(x, y)
    assert (points.shape, classes.shape) == ((2, 3, 3, 2), (2, 3, 3, 2))
    np.testing.assert_allclose(points.sum(axis=(2, 3)), 1 / 6, rtol=1e-10)
    np.testing.assert_allclose(classes.sum(axis=3), 1 / 3, rtol=1e-10)
    assert np.abs(points.sum(axis=(0, 1)) - 1 / 6).sum() < THRESHOLD
    assert np.abs(classes.sum(axis=2) - 1 / 2).sum(axis=2).max() < THRESHOLD
    assert min(points.min(), classes.min()) >= 0


def test_marginal_errors_are_the_mass_that_is_misplaced():
    points = np.full((2, 3, 1, 2), 1 / 12)
    classes = np.full((2, 1, 3, 2), 1 / 6)
    np.testing.assert_allclose(marginal_errors(Plans(points, classes)), 0, atol=1e-7)
    # A tenth of the mass moves from one source point to another; in one class between targets.
    points[0, 0, 0] -= 0.05
    points[1, 2, 0] += 0.05
    classes[1, 0, :, 0] -= 0.02
    classes[1, 0, :, 1] += 0.02
    np.testing.assert_allclose(marginal_errors(Plans(points, classes)), [0.1, 0.06], rtol=1e-5)


def test_classes_that_have_arrived_stay(x64):
    """At its only target point a class has cost 0 everywhere, and no mean cost to go by."""
    y = 3 * normal(0, 2, 1, 10)
    there = np.repeat(y, 3, axis=1)
    value, gradient = value_and_grad(jnp.asarray(there), jnp.asarray(y))
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)

    half = there + np.array([0, 0.3])[:, None, None] * normal(1, 2, 3, 10)
    value, gradient = value_and_grad(jnp.asarray(half), jnp.asarray(y))
    np.testing.assert_allclose(value, np.sum((half - y) ** 2) / 3, rtol=1e-9)
    np.testing.assert_allclose(gradient, 4 * (half - y), rtol=1e-9, atol=1e-11)


def test_gradient_is_that_with_its_plans_fixed(x64):
    for x, y in (clouds(0), clouds(1)):
        value, gradient = value_and_grad(jnp.asarray(x), jnp.asarray(y), jax.random.key(0))
        _, plans = plans_of(jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(value, with_fixed_plans(x, y, *plans), rtol=1e-10)
        np.testing.assert_allclose(gradient, fixed_gradient(x, y, *plans), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
def test_with_a_large_epsilon_all_is_as_by_sinkhorn_of_pot(seed):
    """Plans are smooth in the cost here, and near ties no matter."""

    def blurred(cost):
        options = {"method": "sinkhorn_log", "stopThr": 1e-9, "numItermax": 10_000}
        return ot.sinkhorn([], [], cost, 0.1 * cost.mean(), **options)

    x, y = clouds(seed)
    value, gradient = jax.jit(partial(otdd_value_and_grad, epsilon=0.1))(*in_float32(x, y))
    expected, _, *plans = by_pot(x, y, blurred)
    assert expected > 1.005 * by_pot(x, y)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert_near(gradient, fixed_gradient(x, y, *plans), 2e-3)


def test_gradient_is_the_slope_of_the_exact_distance():
    """Central differences are exact where the plans stay: OTDD^2 is quadratic there."""
    x, y = clouds(0)
    _, gradient = value_and_grad(*in_float32(x, y))
    steps = 1e-3 * np.eye(x.size).reshape(-1, *x.shape)
    slopes = [6 * (by_pot(x + step, y)[0] - by_pot(x - step, y)[0]) / 2e-3 for step in steps]
    assert_near(gradient.ravel(), np.array(slopes), 0.01)
