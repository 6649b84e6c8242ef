"""MMD between measures on measures and its WoW gradient, against POT, loops and plain autodiff."""

import inspect
import itertools
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from cases import slow

from lib import mmd

KEY = jax.random.key(0)
x64 = pytest.mark.usefixtures("x64")

# The kernel, its formula in numpy, the power of the distance it takes.
KERNELS = {
    "gaussian": (mmd.sliced_gaussian(0.7), lambda cost: np.exp(-cost / 1.4), 2),
    "laplace": (mmd.sliced_laplace(0.7), lambda cost: np.exp(-cost / 0.7), 1),
    "imq": (mmd.sliced_imq(0.7), lambda cost: 1 / np.sqrt(0.7 + cost), 2),
    "riesz": (mmd.sliced_riesz(1.5), lambda cost: -(cost**0.75), 2),
}
names = pytest.mark.parametrize("name", KERNELS)
# One of cost p = 1, and the one whose slope is singular: the others differ from these in profiles.
few_names = [slow("gaussian"), "laplace", slow("imq"), "riesz"]
compiled = jax.jit(mmd.wow_value_and_grad, static_argnames=("kernel", "block_size"))

# Used as given: they need not sum to 1.
WEIGHTS = {
    "equal": (np.full(3, 1 / 3), np.full(2, 1 / 2)),
    "unequal": (np.array([0.5, 0.0, 0.9]), np.array([0.3, 0.6])),
}
UNEQUAL = WEIGHTS["unequal"]


def measures(seed=0):
    """x [3, 5, 3], y [2, 4, 3], directions [6, 3]: no two sizes equal that need not be."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 5, 3)) + rng.standard_normal((3, 1, 3))
    y = 1.5 * rng.standard_normal((2, 4, 3))
    directions = rng.standard_normal((6, 3))
    return x, y, directions / np.linalg.norm(directions, axis=1, keepdims=True)


def wow(name, x, y, directions, a, b, **options):
    """Weights are always passed, so that tests share one compilation per kernel."""
    return compiled(KERNELS[name][0], x, y, directions, x_weights=a, y_weights=b, **options)


def sliced_cost(x, y, directions, p):
    return np.mean(ot.wasserstein_1d(x @ directions.T, y @ directions.T, p=p))


def mmd_by_loops(profile, p, x, y, directions, a, b):
    pairs = itertools.product(zip((*x, *y), (*a, *-b)), repeat=2)
    return sum(s * t * profile(sliced_cost(u, v, directions, p)) for (u, s), (v, t) in pairs)


def by_plain_autodiff(name, x, y, directions, a, b):
    """F and its Euclidean gradient by jnp.sort of the points, repeated to a common number."""
    kernel, _, p = KERNELS[name]
    weights, same = np.concatenate([a, -b]), np.eye(len(x) + len(y), dtype=bool)

    def quantiles(points):
        values = jnp.sort(jnp.einsum("cnd,ld->cnl", points, directions), axis=1)
        return jnp.repeat(values, 20 // points.shape[1], axis=1)

    def objective(x):
        q = jnp.concatenate([quantiles(x), quantiles(y)])
        cost = jnp.mean(jnp.abs(q[:, None] - q[None]) ** p, axis=(2, 3))
        gram = kernel.profile(jnp.where(same, 1.0, cost))
        return weights @ jnp.where(same, kernel.profile(0 * cost), gram) @ weights / 2

    return jax.jit(jax.value_and_grad(objective))(x)


@x64
@names
def test_profiles_are_the_published_formulas(name):
    kernel, profile, p = KERNELS[name]
    assert isinstance(kernel, mmd.SlicedKernel)
    assert kernel.p == p
    cost = jnp.array([0.0, 1e-12, 0.3, 1.0, 7.0])
    np.testing.assert_allclose(kernel.profile(cost), profile(np.asarray(cost)), rtol=1e-12)
    slopes = jax.vmap(jax.grad(kernel.profile))(cost)
    step = 1e-6
    centered = (profile(np.asarray(cost[2:]) + step) - profile(np.asarray(cost[2:]) - step)) / 2
    np.testing.assert_allclose(slopes[2:], centered / step, rtol=1e-7)
    assert np.all(np.isfinite(slopes))
    if name == "riesz":
        assert slopes[0] == 0


def test_parameters_out_of_range_raise():
    for kernel in (mmd.sliced_gaussian, mmd.sliced_laplace, mmd.sliced_imq):
        for h in (0, -1.0, np.nan, np.array(0.0)):
            with pytest.raises(ValueError, match="h must be positive"):
                kernel(h)
    for kernel in (mmd.sliced_gaussian, mmd.sliced_laplace, mmd.sliced_imq, mmd.sliced_riesz):
        for wrong in (np.array([0.1, 0.2]), jnp.ones(1), [0.5]):
            with pytest.raises(ValueError, match=r"must be one number, got shape \([12],\)"):
                kernel(wrong)
    for r in (0, 2, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"r must lie in \(0, 2\)"):
            mmd.sliced_riesz(r)


# Value and gradient


@x64
@pytest.mark.parametrize("name", few_names)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_value_and_gradient(name, weights):
    x, y, directions = measures()
    a, b = WEIGHTS[weights]
    value, gradient = wow(name, x, y, directions, a, b)
    assert value.dtype == gradient.dtype == jnp.float64
    _, profile, p = KERNELS[name]
    np.testing.assert_allclose(2 * value, mmd_by_loops(profile, p, x, y, directions, a, b), 1e-11)
    # n / a_c times the Euclidean gradient, which is C n for equal weights; 0 without weight.
    scale = np.divide(5, a, where=a > 0, out=np.zeros(3))[:, None, None]
    plain_value, plain = by_plain_autodiff(name, x, y, directions, a, b)
    np.testing.assert_allclose(value, plain_value, rtol=1e-11)
    np.testing.assert_allclose(gradient, scale * plain, rtol=1e-9, atol=1e-11)
    if weights == "equal":
        np.testing.assert_allclose(scale, 3 * 5)
        unweighted = compiled(KERNELS[name][0], x, y, directions)
        np.testing.assert_allclose(unweighted[0], value, rtol=1e-13)
        np.testing.assert_allclose(unweighted[1], gradient, rtol=1e-12, atol=1e-14)


@x64
def test_mmd_squared_is_twice_the_value_and_differentiable_in_the_weights():
    x, y, directions = measures()
    a, b = UNEQUAL
    kernel, profile, p = KERNELS["imq"]

    def squared(a, b):
        return mmd.mmd_squared_measures(kernel, *device, x_weights=a, y_weights=b)

    device = [jnp.asarray(v) for v in (x, y, directions)]
    value, slopes = jax.jit(jax.value_and_grad(squared, (0, 1)))(a, b)
    oracle = partial(mmd_by_loops, profile, p, x, y, directions)
    np.testing.assert_allclose(value, oracle(a, b), rtol=1e-12)
    # A quadratic form: central differences are exact.
    for slope, step in zip(slopes[0], np.eye(3)):
        np.testing.assert_allclose(slope, (oracle(a + step, b) - oracle(a - step, b)) / 2)
    for slope, step in zip(slopes[1], np.eye(2)):
        np.testing.assert_allclose(slope, (oracle(a, b + step) - oracle(a, b - step)) / 2)


@x64
@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (np.float32, 1),
        (np.float32, np.float64(1)),
        (np.float64, np.float32(1)),
        slow(np.float32, 0.5),
        slow(np.float32, np.float32(1)),
        slow(np.float64, 1),
        slow(np.float64, 0.5),
        slow(np.float64, np.float64(1)),
    ],
)
def test_plain_numbers_do_not_promote(dtype, number):
    x, y = jnp.zeros((2, 3, 2), dtype), jnp.zeros((3, 4, 2), dtype)
    for kernel, levels in itertools.product(mmd.SLICED_KERNELS.values(), (None, 3)):
        function = mmd.target_value_and_grad(kernel(number), num_directions=2, num_levels=levels)
        value, gradient = jax.eval_shape(function, x, y, KEY)
        assert value.dtype == gradient.dtype == dtype


# The factory


@cache
def flow(name, **options):
    return jax.jit(mmd.target_value_and_grad(KERNELS[name][0], num_directions=6, **options))


@pytest.mark.parametrize(
    ("name", "num_levels"),
    [slow("gaussian", None), ("laplace", None), slow("imq", None), ("riesz", None), ("riesz", 7)],
)
def test_identical_measures(name, num_levels):
    """Value 0 and gradient exactly 0; also where the classes themselves are equal. The percentile
    form adds the shares of its levels in no fixed order: 0 to rounding."""
    x = np.float32(measures()[0])
    twins = np.stack([x[0], x[0], x[1]])
    value_and_grad = flow(name, num_levels=num_levels)
    for points in (x, twins):
        value, gradient = value_and_grad(points, points, KEY)
        assert abs(value) <= 1e-7
        assert np.abs(gradient).max() <= (0 if num_levels is None else 1e-7)
    # Classes that coincide with some of another set's, not all: no NaN.
    value, gradient = value_and_grad(twins, x, KEY)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[0], gradient[1])
    assert np.abs(gradient[0]).max() > 0


def test_equal_measures_in_another_order_do_not_push_each_other():
    """Measures, not arrays: the order of the points must not matter, rounding included."""
    x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    value, gradient = flow("riesz")(x, x[::-1, ::-1], KEY)
    assert abs(value) < 1e-5
    assert np.abs(gradient).max() < 1e-4


@pytest.mark.slow
def test_minibatches_narrow_the_target_and_less_so_the_larger_they_are():
    """The bias that the docstring warns of: at the target the mean gradient is not 0."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 2)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def mean_narrowing(m):
        options = {"num_directions": 5, "num_target_points": m}
        function = mmd.target_value_and_grad(mmd.sliced_gaussian(1.0), **options)
        keys = jax.random.split(KEY, 60)
        gradient = jax.lax.map(lambda key: function(y, y, key)[1], keys)
        return jnp.vdot(gradient.mean(axis=0), y - y.mean(axis=1, keepdims=True))

    narrowing = [float(mean_narrowing(m)) for m in (5, 10, None)]
    assert narrowing[0] > 1.5 * narrowing[1] > 20 * abs(narrowing[2])


@x64
@pytest.mark.slow
def test_settings_reach_the_gradient_and_a_bandwidth_may_be_traced():
    x, y, directions = (jnp.asarray(array) for array in measures())
    (a, b), drawn = UNEQUAL, []

    def draw(key, count, d, *, dtype):
        drawn.append((count, d, dtype))
        return directions

    # A minibatch of all four points is the target itself.
    options = {"num_directions": 6, "num_target_points": 4, "block_size": 4}
    options |= {"x_weights": jnp.asarray(a), "y_weights": jnp.asarray(b), "draw_directions": draw}

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def function(h, key):
        return mmd.target_value_and_grad(mmd.sliced_imq(h), **options)(x, y, key)

    values, gradients = function(jnp.array([0.1, 0.7]), KEY)
    assert drawn == [(6, 3, jnp.float64)]
    expected = wow("imq", x, y, directions, a, b)
    np.testing.assert_allclose(values[1], expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-11, atol=1e-13)


def test_every_key_draws_fresh_directions_and_levels():
    x, _, directions = (jnp.float32(v) for v in measures())
    fixed = {"draw_directions": lambda *_, dtype: directions, "num_levels": 7}
    for options in ({}, fixed):
        function = flow("riesz", **options)
        values = [float(function(x, 2 * x, jax.random.key(k))[0]) for k in (0, 0, 1)]
        assert values[0] == values[1] != values[2]


def test_subsample_draws_without_replacement_from_its_own_class():
    y = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    draw = jax.jit(jax.vmap(lambda key: mmd.subsample_classes(key, y, 3)))
    batches = np.asarray(draw(jax.random.split(KEY, 2000)))
    np.testing.assert_array_equal(batches, batches[..., :1] + np.arange(3))
    index = (batches[..., 0] / 3 - [[0], [4]]).astype(int)
    assert 0 <= index.min() <= index.max() <= 3
    assert np.all(np.diff(np.sort(index, axis=2), axis=2) > 0)
    counts = np.stack([np.bincount(index[:, c].ravel(), minlength=4) for c in range(2)])
    assert np.abs(counts / 2000 - 3 / 4).max() < 5 * np.sqrt(3 / 16 / 2000)
    # Classes draw apart from each other.
    assert np.mean(np.sort(index[:, 0]) == np.sort(index[:, 1])) < 0.9
    for num_points in (0, 5):
        with pytest.raises(ValueError, match=rf"must lie in 1\.\.4, got {num_points}"):
            mmd.subsample_classes(KEY, y, num_points)


PUBLISHED = {
    "gaussian": (mmd.target_value_and_grad_gaussian, "x_weights h n_projs n_sample_batch", 0.1),
    "laplace": (mmd.target_value_and_grad_laplace, "h n_projs n_sample_batch", 0.5),
    "imq": (mmd.target_value_and_grad_imq, "h n_projs n_sample_batch", 1.0),
    "riesz": (mmd.target_value_and_grad_riesz, "x_weights r n_projs n_sample_batch", 1.0),
    "gaussian by hand": (mmd.target_value_and_grad_gaussian_by_hand, "h n_projs", 0.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_functions_are_the_factory(name):
    """In their order of arguments and with their defaults; equal programs are equal bits."""
    function, order, default = PUBLISHED[name]
    x, y, _ = (jnp.float32(array) for array in measures())

    def program(function):
        text = str(jax.make_jaxpr(function)(x, y, KEY))
        return re.sub("0x[0-9a-f]+", "", text)  # where functions lie

    make = mmd.SLICED_KERNELS[name.split()[0]]
    assert list(inspect.signature(function).parameters) == ["x", "y", "rng", *order.split()]
    expected = mmd.target_value_and_grad(make(default), num_directions=500)
    assert (
        program(function)
        == program(expected)
        == program(mmd.target_value_and_grad(make(), num_directions=500))
    )
    given = {"x_weights": jnp.float32(UNEQUAL[0]), "h": 0.7, "r": 0.7, "n_projs": 6}
    given["n_sample_batch"] = 3
    arguments = [given[parameter] for parameter in order.split()]
    expected = mmd.target_value_and_grad(
        make(0.7),
        num_directions=6,
        num_target_points=3 if "n_sample_batch" in order else None,
        x_weights=given["x_weights"] if "x_weights" in order else None,
    )
    assert program(lambda *arrays: function(*arrays, *arguments)) == program(expected)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("function", [mmd.mmd_squared_measures, mmd.wow_value_and_grad])
def test_errors(function):
    kernel = mmd.sliced_riesz()
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
