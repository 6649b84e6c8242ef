"""MMD between measures on measures and its WoW gradient, against POT, loops and plain autodiff."""

import inspect
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import ot
import pytest

from lib.mmd import (
    SlicedKernel,
    mmd_squared_measures,
    sliced_gaussian,
    sliced_imq,
    sliced_laplace,
    sliced_riesz,
    subsample_classes,
    target_value_and_grad_gaussian,
    target_value_and_grad_gaussian_by_hand,
    target_value_and_grad_imq,
    target_value_and_grad_laplace,
    target_value_and_grad_riesz,
    wow_value_and_grad,
)
from lib.sliced_wasserstein import percentile_coupling

KEY = jax.random.key(0)
x64 = pytest.mark.usefixtures("x64")

# The kernel, its formula in numpy, the power of the distance it takes.
KERNELS = {
    "gaussian": (sliced_gaussian(0.7), lambda cost: np.exp(-cost / 1.4), 2),
    "laplace": (sliced_laplace(0.7), lambda cost: np.exp(-cost / 0.7), 1),
    "imq": (sliced_imq(0.7), lambda cost: 1 / np.sqrt(0.7 + cost), 2),
    "riesz": (sliced_riesz(1.5), lambda cost: -(cost**0.75), 2),
}
TARGETS = {
    "gaussian": target_value_and_grad_gaussian,
    "laplace": target_value_and_grad_laplace,
    "imq": target_value_and_grad_imq,
    "riesz": target_value_and_grad_riesz,
}
names = pytest.mark.parametrize("name", KERNELS)
compiled = jax.jit(wow_value_and_grad, static_argnames=("kernel", "block_size"))


def measures(seed=0):
    """x [3, 5, 3], y [2, 4, 3], directions [6, 3]: no two sizes equal that need not be."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 5, 3)) + rng.standard_normal((3, 1, 3))
    y = 1.5 * rng.standard_normal((2, 4, 3))
    directions = rng.standard_normal((6, 3))
    return x, y, directions / np.linalg.norm(directions, axis=1, keepdims=True)


EQUAL = np.full(3, 1 / 3), np.full(2, 1 / 2)
# Used as given: they need not sum to 1.
UNEQUAL = np.array([0.5, 0.0, 0.9]), np.array([0.3, 0.6])


def wow(name, x, y, directions, a, b, **options):
    """Weights are always passed, so that all tests share one compilation a kernel."""
    return compiled(KERNELS[name][0], x, y, directions, x_weights=a, y_weights=b, **options)


def sliced_cost(x, y, directions, p):
    return np.mean(ot.wasserstein_1d(x @ directions.T, y @ directions.T, p=p))


def mmd_by_loops(profile, p, x, y, directions, a, b, cost=sliced_cost):
    total = 0.0
    for (u, s), (v, t) in itertools.product(zip(x, a), zip(x, a)):
        total += s * t * profile(cost(u, v, directions, p))
    for (u, s), (v, t) in itertools.product(zip(x, a), zip(y, b)):
        total -= 2 * s * t * profile(cost(u, v, directions, p))
    for (u, s), (v, t) in itertools.product(zip(y, b), zip(y, b)):
        total += s * t * profile(cost(u, v, directions, p))
    return total


def value_by_loops(name, x, y, directions, a, b):
    _, profile, p = KERNELS[name]
    return 0.5 * mmd_by_loops(profile, p, x, y, directions, a, b)


def by_plain_autodiff(name, x, y, directions, a, b):
    """F and its Euclidean gradient by jnp.sort of the points, repeated to a common number."""
    kernel, _, p = KERNELS[name]

    def objective(x):
        def quantiles(points):
            values = jnp.sort(jnp.einsum("cnd,ld->cnl", points, directions), axis=1)
            return jnp.repeat(values, 20 // points.shape[1], axis=1)

        def gram(u, v, same):
            gap = jnp.abs(u[:, None] - v[None]) ** p
            cost = gap.mean(axis=(2, 3))
            if not same:
                return kernel.profile(cost)
            diagonal = jnp.eye(len(u), dtype=bool)
            at_zero = kernel.profile(jnp.zeros_like(cost))
            return jnp.where(diagonal, at_zero, kernel.profile(jnp.where(diagonal, 1.0, cost)))

        u, v = quantiles(x), quantiles(y)
        squared = a @ gram(u, u, True) @ a - 2 * a @ gram(u, v, False) @ b
        return 0.5 * (squared + b @ gram(v, v, True) @ b)

    return jax.jit(jax.value_and_grad(objective))(x)


# Kernels between measures


@x64
@names
def test_profiles_are_the_published_formulas(name):
    kernel, profile, p = KERNELS[name]
    assert isinstance(kernel, SlicedKernel)
    assert kernel.p == p
    cost = jnp.array([0.0, 1e-12, 0.3, 1.0, 7.0])
    np.testing.assert_allclose(kernel.profile(cost), profile(np.asarray(cost)), rtol=1e-12)
    slopes = jax.vmap(jax.grad(kernel.profile))(cost)
    step = 1e-6
    centred = (profile(np.asarray(cost[2:]) + step) - profile(np.asarray(cost[2:]) - step)) / 2
    np.testing.assert_allclose(slopes[2:], centred / step, rtol=1e-7)
    assert np.all(np.isfinite(slopes))
    if name == "riesz":
        assert slopes[0] == 0


def test_parameters_out_of_range_raise():
    for kernel in (sliced_gaussian, sliced_laplace, sliced_imq):
        for h in (0, -1.0, np.nan, np.array(0.0)):
            with pytest.raises(ValueError, match="h must be positive"):
                kernel(h)
    for kernel in (sliced_gaussian, sliced_laplace, sliced_imq, sliced_riesz):
        for wrong in (np.array([0.1, 0.2]), jnp.ones(1), [0.5]):
            with pytest.raises(ValueError, match=r"must be one number, got shape \([12],\)"):
                kernel(wrong)
    for r in (0, 2, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"r must lie in \(0, 2\)"):
            sliced_riesz(r)


# Value and gradient


@x64
@names
@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_value_and_gradient(name, weights):
    x, y, directions = measures()
    a, b = weights
    value, gradient = wow(name, x, y, directions, a, b)
    assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(value, value_by_loops(name, x, y, directions, a, b), rtol=1e-11)
    # n / a_c times the Euclidean gradient, which is C n for equal weights; 0 without weight.
    scale = np.where(a > 0, 5 / np.where(a > 0, a, 1), 0)[:, None, None]
    if weights is EQUAL:
        np.testing.assert_allclose(scale, 3 * 5)
    plain_value, plain = by_plain_autodiff(name, x, y, directions, a, b)
    np.testing.assert_allclose(value, plain_value, rtol=1e-11)
    np.testing.assert_allclose(gradient, scale * plain, rtol=1e-9, atol=1e-11)
    step, differences = 1e-6, np.zeros_like(x)
    for index in itertools.product(range(3), (0, 3), range(3)):
        moved = np.zeros_like(x)
        moved[index] = step
        up, down = (value_by_loops(name, z, y, directions, a, b) for z in (x + moved, x - moved))
        differences[index] = (up - down) / (2 * step)
    picked = np.asarray(gradient)[:, [0, 3]]
    np.testing.assert_allclose(picked, (scale * differences)[:, [0, 3]], rtol=1e-6, atol=1e-7)


@x64
def test_no_weights_are_equal_weights():
    x, y, directions = measures()
    value, gradient = compiled(KERNELS["riesz"][0], x, y, directions)
    expected = wow("riesz", x, y, directions, *EQUAL)
    np.testing.assert_allclose(value, expected[0], rtol=1e-13)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-14)


@x64
def test_mmd_squared_is_twice_the_value_and_differentiable_in_the_weights():
    x, y, directions = measures()
    a, b = UNEQUAL
    kernel, profile, p = KERNELS["imq"]

    def squared(a, b):
        return mmd_squared_measures(kernel, *device, x_weights=a, y_weights=b)

    device = [jnp.asarray(v) for v in (x, y, directions)]
    value, slopes = jax.jit(jax.value_and_grad(squared, (0, 1)))(a, b)
    oracle = partial(mmd_by_loops, profile, p, x, y, directions)
    np.testing.assert_allclose(value, oracle(a, b), rtol=1e-12)
    # A quadratic form: central differences are exact.
    for i, step in enumerate(np.eye(3)):
        np.testing.assert_allclose(slopes[0][i], (oracle(a + step, b) - oracle(a - step, b)) / 2)
    for j, step in enumerate(np.eye(2)):
        np.testing.assert_allclose(slopes[1][j], (oracle(a, b + step) - oracle(a, b - step)) / 2)


@x64
@names
def test_order_of_points_and_classes(name):
    x, y, directions = measures()
    a, b = UNEQUAL
    value, gradient = wow(name, x, y, directions, a, b)
    rng = np.random.default_rng(1)
    points = np.argsort(rng.uniform(size=(3, 5, 1)), axis=1)
    other = np.argsort(rng.uniform(size=(2, 4, 1)), axis=1)
    moved = np.take_along_axis(x, points, axis=1), np.take_along_axis(y, other, axis=1)
    result = wow(name, *moved, directions, a, b)
    np.testing.assert_allclose(result[0], value, rtol=1e-12)
    expected = np.take_along_axis(np.asarray(gradient), points, axis=1)
    np.testing.assert_allclose(result[1], expected, rtol=1e-11, atol=1e-13)
    order = [2, 0, 1]
    result = wow(name, x[order], y[::-1], directions, a[order], b[::-1])
    np.testing.assert_allclose(result[0], value, rtol=1e-12)
    np.testing.assert_allclose(result[1], gradient[jnp.array(order)], rtol=1e-11, atol=1e-13)


@x64
@pytest.mark.parametrize(
    ("name", "block_size"), [("riesz", 4), pytest.param("laplace", 1, marks=pytest.mark.slow)]
)
def test_block_size_changes_rounding_alone(name, block_size):
    arguments = (*measures(), *UNEQUAL)
    value, gradient = wow(name, *arguments)
    blocked, in_blocks = wow(name, *arguments, block_size=block_size)
    np.testing.assert_allclose(blocked, value, rtol=1e-12)
    np.testing.assert_allclose(in_blocks, gradient, rtol=1e-11, atol=1e-13)


@x64
@pytest.mark.parametrize("name", ["riesz", pytest.param("laplace", marks=pytest.mark.slow)])
def test_a_class_split_in_two_halves(name):
    x, y, directions = measures()
    a, b = np.array([0.2, 0.3, 0.5]), EQUAL[1]
    value, gradient = wow(name, x, y, directions, a, b)
    parts = np.array([0.2, 0.3, 0.25, 0.25])
    result = wow(name, x[[0, 1, 2, 2]], y, directions, parts, b)
    np.testing.assert_allclose(result[0], value, rtol=1e-12)
    expected = np.asarray(gradient)[[0, 1, 2, 2]]
    np.testing.assert_allclose(result[1], expected, rtol=1e-11, atol=1e-13)


@x64
def test_percentile_coupling_against_numpy():
    x, y, directions = measures()
    levels, grid = np.random.default_rng(2).uniform(size=(6, 7)), np.linspace(0, 1, 100)

    def cost(u, v, directions, p):
        quantiles = [
            [
                np.interp(q, grid, np.percentile(z @ t, 100 * grid))
                for q, t in zip(levels, directions)
            ]
            for z in (u, v)
        ]
        return np.mean(np.abs(np.subtract(*quantiles)) ** p)

    @partial(jax.jit, static_argnums=0)
    def squared(kernel, levels, x, y, directions):
        coupling = percentile_coupling(levels)
        return mmd_squared_measures(kernel, x, y, directions, coupling=coupling)

    for name in ("riesz", "laplace"):
        kernel, profile, p = KERNELS[name]
        expected = mmd_by_loops(profile, p, x, y, directions, *EQUAL, cost=cost)
        ours = squared(kernel, levels, x, y, directions)
        np.testing.assert_allclose(ours, expected, rtol=1e-11)


# Identical measures


@pytest.mark.parametrize(
    ("name", "num_levels"),
    [
        *((name, None) for name in KERNELS),
        ("riesz", 7),
        pytest.param("laplace", 7, marks=pytest.mark.slow),
    ],
)
def test_identical_measures(name, num_levels):
    """Value 0 and gradient exactly 0; also where the classes themselves are equal. The percentile
    form adds the shares of its levels in no fixed order: 0 to rounding."""
    x = np.float32(measures()[0])
    twins = np.stack([x[0], x[0], x[1]])

    @jax.jit
    def value_and_grad(x, y):
        options = {"n_projs": 6, "num_levels": num_levels}
        return TARGETS[name](x, y, jax.random.key(0), **options)

    for points in (x, twins):
        value, gradient = value_and_grad(points, points)
        assert abs(value) <= 1e-7
        assert np.abs(gradient).max() <= (0 if num_levels is None else 1e-7)
    # Classes that coincide with some of another set's, not all: no NaN.
    value, gradient = value_and_grad(twins, x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[0], gradient[1])
    assert np.abs(gradient[0]).max() > 0


@pytest.mark.parametrize("name", ["riesz", pytest.param("laplace", marks=pytest.mark.slow)])
def test_equal_measures_in_another_order_do_not_push_each_other(name):
    """Measures, not arrays: the order of the points must not matter, rounding included."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 64)).astype(np.float32)
    y = x[::-1, ::-1]
    value, gradient = jax.jit(partial(TARGETS[name], n_projs=6))(x, y, jax.random.key(0))
    assert abs(value) < 1e-5
    assert np.abs(gradient).max() < 1e-4


# The published functions


def test_minibatches_of_the_target_pull_it_together_and_less_so_the_larger_they_are():
    """The bias that `n_sample_batch` warns of: at the target the mean gradient is not 0."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 2)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def mean_pull(m):
        keys = jax.random.split(jax.random.key(0), 60)
        options = {"h": 1.0, "n_projs": 5, "n_sample_batch": m}
        gradient = jax.lax.map(lambda key: TARGETS["gaussian"](y, y, key, **options)[1], keys)
        return jnp.vdot(gradient.mean(axis=0), y - y.mean(axis=1, keepdims=True))

    pulls = [float(mean_pull(m)) for m in (5, 10, None)]
    assert pulls[0] > 1.5 * pulls[1] > 20 * abs(pulls[2])


@pytest.mark.parametrize(
    ("name", "parameter", "default"),
    [("gaussian", "h", 0.1), ("laplace", "h", 0.5), ("imq", "h", 1.0), ("riesz", "r", 1.0)],
)
def test_published_signatures(name, parameter, default):
    parameters = inspect.signature(TARGETS[name]).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = ["x", "y", "rng", "x_weights", parameter, "n_projs", "n_sample_batch"]
    assert [p.name for p in positional] == expected
    assert [p.default for p in positional[3:]] == [None, default, 500, None]


DEFAULTS = {
    "gaussian": lambda cost: np.exp(-cost / 0.2),
    "laplace": lambda cost: np.exp(-cost / 0.5),
    "imq": lambda cost: 1 / np.sqrt(1 + cost),
    "riesz": lambda cost: -np.sqrt(cost),
}


@x64
@names
def test_published_defaults(name):
    """F at the default bandwidth, with 500 directions, given here."""
    x, y, directions = measures()
    drawn = []

    def draw(key, count, d, *, dtype):
        drawn.append((count, d, dtype))
        return jnp.asarray(directions)

    key = jax.random.key(0)
    function = partial(TARGETS[name], draw_directions=draw)
    # The value alone: what its gradient takes is not compiled.
    value = jax.jit(lambda x, y: function(x, y, key)[0])(x, y)
    assert drawn == [(500, 3, jnp.float64)]
    expected = mmd_by_loops(DEFAULTS[name], KERNELS[name][2], x, y, directions, *EQUAL) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-11)


@x64
def test_published_positional_arguments():
    x, y, directions = measures()
    a, b = UNEQUAL
    drawn = []

    def draw(key, count, d, *, dtype):
        drawn.append(count)
        return jnp.asarray(directions)

    def function(x, y, key, a, h, b):
        options = {"y_weights": b, "draw_directions": draw}
        return target_value_and_grad_imq(x, y, key, a, h, 6, 4, **options)

    value, gradient = jax.jit(function)(x, y, jax.random.key(0), a, 0.7, b)
    assert drawn == [6]
    # A minibatch of all four points is the target itself.
    expected = wow("imq", x, y, directions, a, b)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-11, atol=1e-13)


def program(function, *arguments, **options):
    """What `function` computes, as text: equal texts are equal bits."""
    x, y, _ = (jnp.float32(v) for v in measures())
    text = str(jax.make_jaxpr(lambda key: function(x, y, key, *arguments, **options))(KEY))
    return re.sub("0x[0-9a-f]+", "", text)  # where functions lie


@pytest.mark.parametrize("name", ["laplace", "imq"])
def test_a_number_in_place_of_weights_is_the_published_h(name):
    """(x, y, rng, h, n_projs, n_sample_batch) there, with x_weights before h here."""
    target, a = TARGETS[name], jnp.float32(UNEQUAL[0])
    expected = program(target, h=0.7, n_projs=6, n_sample_batch=3)
    assert program(target, 0.7, 6, 3) == program(target, None, 0.7, 6, 3) == expected
    assert program(target, 0.7, n_sample_batch=3, n_projs=6) == expected
    assert program(target, np.float64(0.7), 6, 3) == expected
    weighted = program(target, x_weights=a, h=0.7, n_projs=6)
    assert program(target, a, 0.7, 6) == weighted
    assert program(target, 0.7, 6, x_weights=a) == weighted
    assert program(lambda *z: jax.jit(lambda h: target(*z, h, 6))(0.7)) == program(
        lambda *z: jax.jit(lambda h: target(*z, h=h, n_projs=6))(0.7)
    )


def test_the_gaussian_gradient_by_hand_is_the_gaussian_one():
    parameters = inspect.signature(target_value_and_grad_gaussian_by_hand).parameters
    assert list(parameters) == ["x", "y", "rng", "h", "n_projs"]
    by_hand, gaussian = target_value_and_grad_gaussian_by_hand, target_value_and_grad_gaussian
    assert program(by_hand) == program(gaussian)
    assert program(by_hand, 0.7, 6) == program(gaussian, None, 0.7, 6)


@pytest.mark.usefixtures("unannotated")
def test_neither_weights_nor_h_is_taken_for_the_other():
    x, y, _ = (jnp.float32(v) for v in measures())
    for target in (target_value_and_grad_gaussian, target_value_and_grad_riesz):
        with pytest.raises(ValueError, match=r"x_weights \(\) must hold one weight per class"):
            target(x, y, KEY, 0.7)
    for target in (*TARGETS.values(), target_value_and_grad_gaussian_by_hand):
        name = "r" if target is target_value_and_grad_riesz else "h"
        weights = jnp.ones(3) / 3
        with pytest.raises(ValueError, match=rf"{name} must be one number, got shape \(3,\)"):
            target(x, y, KEY, **{name: weights})


@x64
def test_minibatch_is_a_subset_of_every_class():
    """The value is that of one of the 36 choices of 2 points of 4 in 2 classes."""
    x, y, directions = measures()
    options = {"n_sample_batch": 2, "draw_directions": lambda *_, dtype: jnp.asarray(directions)}
    function = jax.jit(lambda key: target_value_and_grad_imq(*device, key, **options)[0])
    device = [jnp.asarray(v) for v in (x, y)]
    pairs = list(itertools.combinations(range(4), 2))
    choices = {
        (i, j): mmd_by_loops(
            DEFAULTS["imq"], 2, x, np.stack([y[0][list(i)], y[1][list(j)]]), directions, *EQUAL
        )
        / 2
        for i, j in itertools.product(pairs, pairs)
    }
    values = np.sort(list(choices.values()))
    assert np.diff(values).min() > 1e-8
    seen = set()
    for seed in range(20):
        value = function(jax.random.key(seed))
        (match,) = [c for c, v in choices.items() if abs(v - value) < 1e-12]
        seen.add(match)
    assert len(seen) > 8
    assert any(i != j for i, j in seen)


def test_subsample_draws_without_replacement_from_its_own_class():
    y = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    draw = jax.jit(jax.vmap(lambda key: subsample_classes(key, y, 3)))
    batches = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    points = batches[..., 0] / 3
    np.testing.assert_array_equal(batches, batches[..., :1] + np.arange(3))
    index = (points - [[0], [4]]).astype(int)
    assert index.min() >= 0
    assert index.max() <= 3
    assert np.all(np.diff(np.sort(index, axis=2), axis=2) > 0)
    counts = np.stack([np.bincount(index[:, c].ravel(), minlength=4) for c in range(2)])
    assert np.abs(counts / 2000 - 3 / 4).max() < 5 * np.sqrt(3 / 16 / 2000)
    assert np.mean(np.sort(index[:, 0]) == np.sort(index[:, 1])) < 0.9


def test_fresh_directions_and_levels_for_every_key():
    x, y, directions = (jnp.float32(v) for v in measures())
    fixed = {"draw_directions": lambda *_, dtype: directions, "num_levels": 7, "n_projs": 6}
    for options in ({"n_projs": 6}, fixed):
        function = jax.jit(lambda key, o=options: target_value_and_grad_riesz(x, y, key, **o)[0])
        values = [float(function(jax.random.key(k))) for k in (0, 0, 1)]
        assert values[0] == values[1] != values[2]


@x64
def test_vmap_over_bandwidths():
    x, y, directions = map(jnp.asarray, measures())
    fixed = partial(target_value_and_grad_gaussian, draw_directions=lambda *_, dtype: directions)
    bandwidths, key = jnp.array([0.1, 0.7, 3.0]), jax.random.key(0)
    values, gradients = jax.jit(jax.vmap(lambda h: fixed(x, y, key, None, h)))(bandwidths)
    arrays = [np.asarray(v) for v in (x, y, directions)]
    for h, value in zip(bandwidths, values):
        profile = partial(lambda h, cost: np.exp(-cost / (2 * h)), float(h))
        expected = mmd_by_loops(profile, 2, *arrays, *EQUAL) / 2
        np.testing.assert_allclose(value, expected, rtol=1e-10)
    expected = wow("gaussian", x, y, directions, *EQUAL)[1]
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_vmap_over_seeds():
    """One seed at a time gives what many at once do."""
    many = [measures(seed)[:2] for seed in range(2)]
    keys = jax.random.split(jax.random.key(1), 2)
    seeded = jax.jit(partial(target_value_and_grad_riesz, n_projs=6))
    xs, ys = (jnp.stack([jnp.float32(v) for v in pair]) for pair in zip(*many))
    values, gradients = jax.jit(jax.vmap(seeded))(xs, ys, keys)
    for i in range(2):
        value, gradient = seeded(xs[i], ys[i], keys[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(gradients[i], gradient, rtol=1e-4, atol=1e-6)


@x64
@names
def test_float32_stays_float32_where_float64_is_on(name):
    x, y, _ = (jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in measures())
    for options in ({}, {"num_levels": 5}, {"n_sample_batch": 2}, {"block_size": 4}):
        function = partial(TARGETS[name], n_projs=6, **options)
        value, gradient = jax.eval_shape(function, x, y, jax.random.key(0))
        assert value.dtype == gradient.dtype == jnp.float32
        assert (value.shape, gradient.shape) == ((), x.shape)


# What raises


@pytest.fixture
def unannotated(monkeypatch):
    """Without the shape checks of these tests, as a user meets the functions."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("function", [mmd_squared_measures, wow_value_and_grad])
def test_errors(function):
    kernel = sliced_riesz()
    x, y, directions = (jnp.float32(v) for v in measures())
    for arrays in ((x, y[..., :2], directions), (x, y, directions[:, :2])):
        with pytest.raises(ValueError, match="must share their last axis"):
            function(kernel, *arrays)
    for name, arrays in (("x", (x[:0], y)), ("x", (x[:, :0], y)), ("y", (x, y[0]))):
        with pytest.raises(ValueError, match=rf"^{name} must be \[classes, points, dimension\]"):
            function(kernel, *arrays, directions)
    for name in ("x_weights", "y_weights"):
        with pytest.raises(ValueError, match=f"{name} .* must hold one weight per class"):
            function(kernel, x, y, directions, **{name: jnp.ones(4)})
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        function(kernel, x, y, directions, block_size=0)


@pytest.mark.usefixtures("unannotated")
def test_errors_of_the_published_functions():
    x, y, _ = (jnp.float32(v) for v in measures())
    key = jax.random.key(0)
    for function in TARGETS.values():
        for size in (5, 0):
            message = rf"n_sample_batch must lie in 1\.\.4, got {size}"
            with pytest.raises(ValueError, match=message):
                function(x, y, key, n_sample_batch=size)
        with pytest.raises(ValueError, match="must share their last axis"):
            function(x, y[..., :2], key)
    for function in (TARGETS[name] for name in ("gaussian", "laplace", "imq")):
        with pytest.raises(ValueError, match="h must be positive, got 0"):
            function(x, y, key, None, 0)
    with pytest.raises(ValueError, match=r"r must lie in \(0, 2\), got 2"):
        target_value_and_grad_riesz(x, y, key, None, 2)


# Memory


@pytest.mark.slow
def test_memory_of_a_step_on_images():
    """No [C, D, n, L] tensor, which would take 19 MiB for each of three Gram matrices twice over,
    and a good deal less with blocks of directions."""
    points = jax.ShapeDtypeStruct((10, 100, 784), jnp.float32)

    def temporaries(block_size):
        step = jax.jit(partial(target_value_and_grad_riesz, block_size=block_size))
        analysis = step.lower(points, points, jax.random.key(0)).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 2**20

    whole, blocked = temporaries(None), temporaries(50)
    assert whole < 40
    assert blocked < whole / 3
