"""The energy MMD by sorting: loops over pairs, closed forms, the exact energy MMD."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from strategies import normal

from lib import mmd
from lib.kernels import riesz
from lib.sliced_wasserstein import basis_directions, random_directions

KEY = jax.random.key(0)
energy = jax.jit(mmd.sliced_energy_value_and_grad, static_argnames="block_size")
LINE = jnp.ones((1, 1))


def by_pairs(x, y, w, v):
    """Value and Wasserstein gradient on the line."""
    w, v = w / w.sum(), v / v.sum()
    points, masses = np.concatenate([x, y]), np.concatenate([w, -v])
    distances = np.abs(points[:, None] - points[None])
    slopes = np.sign(x[:, None] - points[None])
    return -masses @ distances @ masses / 2, -slopes @ masses


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "m"),
    [
        (7, 5),
        (6, 6),
        slow(1, 9),
        slow(40, 1),
    ],
)
def test_on_the_line_it_is_the_sum_over_pairs(n, m, weighted):
    """Of two problems at once, with ties within and between samples."""
    rng = np.random.default_rng(n + m)
    x, y = (rng.integers(-3, 4, (2, size)) / 2 for size in (n, m))
    w, v = (rng.uniform(size=(2, size)) * (rng.uniform(size=(2, size)) < 0.8) for size in (n, m))
    w[:, 0] = v[:, 0] = 1.0
    if not weighted:
        w, v = np.ones((2, n)), np.ones((2, m))
    given = {"x_weights": jnp.asarray(w), "y_weights": jnp.asarray(v)} if weighted else {}
    values, gradients = energy(x[..., None], y[..., None], LINE, **given)
    for c in range(2):
        value, gradient = by_pairs(x[c], y[c], w[c], v[c])
        np.testing.assert_allclose(values[c], value, atol=1e-14)
        np.testing.assert_allclose(gradients[c, :, 0], gradient, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_many_directions_give_the_energy_mmd_and_its_gradient():
    """Within four standard errors of the mean over batches of directions, in three dimensions."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=(9, 3)) + 0.3)
    w = jnp.asarray(rng.uniform(size=12))
    w = w / w.sum()
    exact = jax.value_and_grad(lambda z: mmd.mmd_squared(riesz(), z, y, x_weights=w) / 2)
    value, gradient = exact(x)
    draws = [
        energy(x, y, random_directions(key, 400, 3, dtype=x.dtype), x_weights=w, block_size=150)
        for key in jax.random.split(KEY, 30)
    ]
    for drawn, expected in zip(zip(*draws), (value, gradient / w[:, None])):
        errors = np.std(drawn, axis=0, ddof=1) / np.sqrt(30)
        assert np.all(np.abs(np.mean(drawn, axis=0) - expected) < 4 * errors)
        assert np.all(errors < 0.02)


def test_a_sample_in_another_order_is_at_rest():
    """Exactly, in float32, also with points that coincide: of integers, whose projections are not
    rounded."""
    x = normal(0, 50, 4).round().astype("f")
    value, gradient = energy(x, x[::-1], (np.eye(4) + 2 * np.eye(4)[::-1]).astype("f"))
    assert value == 0
    assert np.abs(gradient).max() == 0


@pytest.mark.usefixtures("x64")
def test_a_weight_counts_as_that_many_points():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(6, 4))
    counts = np.array([1, 3, 0, 2, 1, 0, 0])  # of sum 7, so that one program serves for both
    directions = random_directions(KEY, 30, 4, dtype=float)
    value, gradient = energy(x, y, directions, x_weights=jnp.asarray(counts, float))
    value_of_copies, of_copies = energy(
        np.repeat(x, counts, axis=0), y, directions, x_weights=np.ones(7)
    )
    np.testing.assert_allclose(value, value_of_copies, rtol=1e-12)
    np.testing.assert_allclose(np.repeat(gradient, counts, axis=0), of_copies, atol=1e-14)
    in_blocks = energy(x, y, directions, x_weights=jnp.asarray(counts, float), block_size=7)
    np.testing.assert_allclose(in_blocks[1], gradient, atol=1e-14)


@pytest.mark.slow
def test_a_flow_of_classes_comes_to_its_own_class():
    y = jax.random.normal(KEY, (2, 30, 2)) + jnp.array([-5.0, 5.0])[:, None, None]
    x = jax.random.normal(jax.random.key(1), (2, 40, 2))
    function = jax.jit(mmd.target_value_and_grad_sliced_energy(num_directions=20))
    first, _ = function(x, y, KEY)
    for step in range(200):
        value, gradient = function(x, y, jax.random.fold_in(KEY, step))
        x = x - (1 - step / 200) * gradient
    assert value < first / 300
    np.testing.assert_allclose(x.mean(axis=1), y.mean(axis=1), atol=0.1)
    assert function(x, y, KEY)[0] != function(x, y, jax.random.key(9))[0]


@pytest.mark.usefixtures("unannotated")
def test_errors():
    x, y, directions = jnp.zeros((4, 3)), jnp.ones((5, 3)), jnp.ones((2, 3))
    check = partial(mmd.sliced_energy_value_and_grad, directions=directions)
    for x_, y_ in ((x, y[:, :2]), (x[None], y)):
        with pytest.raises(ValueError, match="must share their leading axes"):
            check(x_, y_)
    with pytest.raises(ValueError, match=r"y must be \[..., points, dimension\]"):
        check(x, y[:0])
    with pytest.raises(ValueError, match="x is not finite in row 1"):
        check(x.at[1, 0].set(jnp.nan), y)
    with pytest.raises(ValueError, match=r"x_weights .* must hold one weight per point"):
        check(x, y, x_weights=jnp.ones(5))
    with pytest.raises(ValueError, match="y_weights must be >= 0"):
        check(x, y, y_weights=-jnp.ones(5))


# ---- Directions of a fixed basis


def test_each_block_of_basis_directions_is_an_orthonormal_basis():
    directions = basis_directions(KEY, 25, 10)
    for block in (directions[:10], directions[10:20]):
        np.testing.assert_allclose(block @ block.T, np.eye(10), atol=1e-6)
    rest = directions[20:]
    np.testing.assert_allclose(rest @ rest.T, np.eye(5), atol=1e-6)
    assert np.abs(directions[:10] @ directions[10:20].T).max() < 0.999
    assert np.abs(directions - basis_directions(jax.random.key(1), 25, 10)).max() > 0.1


@pytest.mark.slow
def test_basis_directions_have_the_moments_of_the_sphere():
    """Of each coordinate: 0 and 1 / d; the fourth is near 3 / (d (d + 2)), as documented."""
    d = 64
    drawn = np.concatenate([basis_directions(jax.random.key(k), 16, d) for k in range(400)])
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=5 / np.sqrt(len(drawn) * d))
    np.testing.assert_allclose((drawn**2).mean(axis=0) * d, 1, atol=0.1)
    np.testing.assert_allclose((drawn**4).mean() * d * (d + 2) / 3, 0.92, atol=0.03)


@pytest.mark.slow
def test_a_basis_sees_the_difference_of_means_exactly():
    """SW_2^2 of two points is |x - y|^2 / d."""
    from lib.sliced_wasserstein import sliced_wasserstein_power

    x, y = jax.random.normal(KEY, (2, 1, 100))
    power = sliced_wasserstein_power(x, y, basis_directions(KEY, 200, 100))
    np.testing.assert_allclose(power, jnp.sum((x - y) ** 2) / 100, rtol=1e-5)
