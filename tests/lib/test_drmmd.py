"""(De)-regularized MMD against dense float64 NumPy, autodiff, SciPy and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize

from lib.drmmd import (
    adaptive_lambda,
    cutoff,
    density_ratio,
    drmmd_witness,
    kale_witness,
    mmd_witness,
    particle_statistics,
    prepare_target,
    showalter,
    tikhonov,
)
from lib.kernels import gaussian, laplace, riesz

pytestmark = pytest.mark.usefixtures("x64")
LAMBDAS = [1e-4, 1e-2, 1.0, 100.0]
KERNEL = gaussian(0.8)


def samples(n=9, m=7, d=2, seed=0, weighted=False):
    """(particles, target points, their weights): no weights are equal if `weighted`."""
    rng = np.random.default_rng(seed)
    y, x = rng.normal(size=(n, d)), 0.5 + rng.normal(size=(m, d))
    v, w = (rng.uniform(0.5, 2, size=k) if weighted else np.ones(k) for k in (n, m))
    return y, x, v / v.sum(), w / w.sum()


def gram(x, y, bandwidth=0.8):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * bandwidth**2))


@jax.jit
def prepared(y, x, v, w):
    target = prepare_target(KERNEL, x, w)
    return target, particle_statistics(KERNEL, y, target, v)[0]


@jax.jit
def evaluated(y, v, target, witness):
    return particle_statistics(KERNEL, y, target, v)[1](witness)


def setup(weighted=False):
    y, x, v, w = samples(weighted=weighted)
    target, statistics = prepared(y, x, v, w)
    return (y, x, v, w), target, statistics, partial(evaluated, y, v, target)


jit_drmmd_witness = jax.jit(drmmd_witness, static_argnames="spectral_filter")
jit_kale_witness = jax.jit(kale_witness, static_argnames="max_iterations")


FILTERS = {"tikhonov": tikhonov, "showalter": showalter, "cutoff": cutoff}


def witness_of(kind, target, statistics):
    if kind == "mmd":
        return mmd_witness(target, statistics)
    if kind == "kale":
        return kale_witness(target, statistics, 0.05, jnp.zeros(len(target.points)))[0]
    return drmmd_witness(target, statistics, 0.05, spectral_filter=FILTERS[kind])


@pytest.mark.parametrize("spectral_filter", FILTERS.values())
def test_witness_is_the_filter_of_the_covariance_in_feature_space(spectral_filter):
    (y, x, v, w), target, statistics, evaluate = setup(weighted=True)
    lmbda, (features_x, features_y) = 0.03, in_features(x, y)
    f = features_y @ v - features_x @ w
    rho, basis = linalg.eigh(features_x @ np.diag(w) @ features_x.T)
    g = {
        tikhonov: lambda r: 1 / (r + lmbda),
        showalter: lambda r: -np.expm1(-np.maximum(r, 1e-300) / lmbda) / np.maximum(r, 1e-300),
        cutoff: lambda r: np.where(r > lmbda, 1 / np.where(r > lmbda, r, 1), 0),
    }[spectral_filter](np.where(rho > 1e-12, rho, 0))
    h = 2 * (1 + lmbda) * basis @ (g * (basis.T @ f))
    witness = jit_drmmd_witness(target, statistics, lmbda, spectral_filter=spectral_filter)
    np.testing.assert_allclose(evaluate(witness)[0], features_y.T @ h, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(witness.at_target, features_x.T @ h, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(witness.value, f @ h / 2, rtol=1e-7)


@pytest.mark.parametrize("kernel", [gaussian(0.8), laplace(1.0)])
def test_velocity_is_the_gradient_of_the_value(kernel):
    """By central differences, weights apart: dF / dy_i = v_i grad h(y_i)."""
    y, x, v, w = samples(weighted=True)

    @jax.jit
    def values_and_gradients(y):
        """Of every kind of witness."""
        target = prepare_target(kernel, jnp.asarray(x), jnp.asarray(w))
        statistics, evaluate = particle_statistics(kernel, y, target, jnp.asarray(v))
        witnesses = [witness_of(kind, target, statistics) for kind in ("mmd", "kale", *FILTERS)]
        gradients = [evaluate(witness)[1] for witness in witnesses]
        return jnp.stack([witness.value for witness in witnesses]), jnp.stack(gradients)

    gradients = np.asarray(values_and_gradients(y)[1])
    for i, j in [(0, 0), (3, 1), (8, 0)]:
        step = np.zeros_like(y)
        step[i, j] = 1e-5
        slopes = np.subtract(*(values_and_gradients(z)[0] for z in (y + step, y - step))) / 2e-5
        np.testing.assert_allclose(v[i] * gradients[:, i, j], slopes, rtol=1e-5, atol=1e-8)


def in_features(points, particles):
    """Features of both in coordinates of their own, [n + m, n] each: columns are points."""
    both = np.concatenate([points, particles])
    root = linalg.sqrtm(gram(both, both)).real
    return root[:, : len(points)], root[:, len(points) :]


def test_at_the_target_nothing_moves():
    _, x, _, w = samples(weighted=True)
    target, statistics = prepared(x, x, w, w)
    for lmbda in LAMBDAS:
        witness = jit_drmmd_witness(target, statistics, lmbda)
        np.testing.assert_allclose(witness.value, 0, atol=1e-12)
        np.testing.assert_allclose(evaluated(x, w, target, witness)[1], 0, atol=1e-9 / lmbda)
        np.testing.assert_allclose(density_ratio(witness, lmbda), 1, atol=1e-10)
    witness, log_ratio = jit_kale_witness(target, statistics, 0.01, jnp.zeros(len(x)))
    np.testing.assert_allclose(witness.value, 0, atol=1e-12)
    np.testing.assert_allclose(log_ratio, 0, atol=1e-10)


@pytest.mark.parametrize("lmbda", [1e-2, 1.0])
def test_kale_is_the_maximum_over_functions(lmbda):
    """The primal over h = sum of kernels at all points, by SciPy; no gap to our dual."""
    (y, x, v, w), target, statistics, evaluate = setup(weighted=True)
    witness, log_ratio = jit_kale_witness(target, statistics, lmbda, jnp.zeros(len(x)))
    features_x, features_y = in_features(x, y)

    def loss(theta):
        e = w * np.exp(features_x.T @ theta)
        value = -(1 + v @ features_y.T @ theta - e.sum() - lmbda / 2 * theta @ theta)
        return value, -(features_y @ v - features_x @ e - lmbda * theta)

    best = optimize.minimize(loss, np.zeros(len(features_x)), jac=True, tol=1e-14)
    np.testing.assert_allclose(witness.value, -(1 + lmbda) * best.fun, rtol=1e-8)
    h = (1 + lmbda) * best.x
    np.testing.assert_allclose(witness.at_target, features_x.T @ h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluate(witness)[0], features_y.T @ h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((1 + lmbda) * log_ratio, witness.at_target, rtol=1e-6, atol=1e-8)


def test_kale_from_a_good_start_takes_few_iterations_and_from_a_bad_one_arrives():
    _, target, statistics, _ = setup(weighted=True)
    start = jnp.zeros(len(target.points))
    exact, log_ratio = jit_kale_witness(target, statistics, 1e-2, start)
    warm, _ = jit_kale_witness(target, statistics, 1e-2, log_ratio + 1e-4, max_iterations=2)
    np.testing.assert_allclose(warm.value, exact.value, rtol=1e-10)
    for wrong in (-5.0, 5.0):
        far, _ = jit_kale_witness(target, statistics, 1e-2, start + wrong)
        np.testing.assert_allclose(far.value, exact.value, rtol=1e-9)


def test_filters_without_float64():
    """Their series have integers past int32."""
    with jax.enable_x64(False):
        inverse, slope = jax.jit(showalter)(jnp.array([0.0, 0.05, 1.0]), 0.5)
    t = np.array([0.1, 2.0])
    np.testing.assert_allclose(inverse, [2, *(2 * -np.expm1(-t) / t)], rtol=1e-6)
    assert slope.dtype == jnp.float32


@pytest.mark.parametrize(
    ("value", "first", "options", "expected"),
    [
        (2.0, 2.0, {}, 0.1),
        (2.0 / 8, 2.0, {"regularity": 0.5}, 0.1 / 4),
        (2e4, 2.0, {}, 1.0),
        (2e4, 2.0, {"largest": np.inf}, 10),
        # At the target a value is 0, or next to it on either side.
        (-1e-18, 2.0, {}, 0.0),
        (0.0, 2.0, {}, 0.0),
        (-1e-9, -1e-9, {}, 0.0),
        (0.0, 0.0, {}, 0.0),
    ],
)
def test_adaptive_lambda_starts_where_told_and_follows_the_value(value, first, options, expected):
    assert adaptive_lambda(value, first, 0.1, **options) == pytest.approx(expected)


RIESZ, PLACES = riesz(1.0), jnp.arange(14.0).reshape(7, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RIESZ, PLACES), "not positive semi-definite"),
        ((KERNEL, PLACES, jnp.ones(7).at[2].set(0)), "leave out points of weight 0"),
        ((KERNEL, PLACES.at[3, 1].set(jnp.nan)), "target is not finite in row 3"),
        ((KERNEL, PLACES[:0]), "target must be"),
    ],
)
def test_targets_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_target(*arguments)


@pytest.mark.parametrize("lmbda", [0.0, -1.0, np.nan, np.inf])
def test_impossible_lambdas(lmbda):
    _, target, statistics, _ = setup()
    with pytest.raises(ValueError, match="lambda must be positive and finite"):
        drmmd_witness(target, statistics, lmbda)
    with pytest.raises(ValueError, match="lambda must be positive and finite"):
        kale_witness(target, statistics, lmbda, jnp.zeros(7))
