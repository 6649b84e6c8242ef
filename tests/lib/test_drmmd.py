"""(De)-regularized MMD against dense float64 NumPy, autodiff, SciPy and closed forms."""

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
    witness_function,
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


def setup(weighted=False, kernel=KERNEL, **options):
    y, x, v, w = samples(weighted=weighted, **options)
    target = prepare_target(kernel, jnp.asarray(x), jnp.asarray(w))
    statistics, evaluate = particle_statistics(kernel, jnp.asarray(y), target, jnp.asarray(v))
    return (y, x, v, w), target, statistics, evaluate


def direct(y, x, v, w, lmbda, at):
    """h at `at`: 2 (1 + lambda) (S + lambda)^-1 f by one dense solve,
    (S + lambda)^-1 f = (f - sum_j c_j k_xj) / lambda with (W K + lambda) c = W f(X)."""
    f = gram(x, y) @ v - gram(x, x) @ w
    c = linalg.solve(w[:, None] * gram(x, x) + lmbda * np.eye(len(x)), w * f)
    return 2 * (1 + lmbda) / lmbda * (gram(at, y) @ v - gram(at, x) @ (w + c))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lmbda", LAMBDAS)
def test_witness_is_that_of_the_direct_formula(lmbda, weighted):
    (y, x, v, w), target, statistics, evaluate = setup(weighted)
    witness = drmmd_witness(target, statistics, lmbda)
    at = np.random.default_rng(1).normal(size=(5, 2))
    expected = [direct(y, x, v, w, lmbda, z) for z in (y, x, at)]
    found = (
        evaluate(witness)[0],
        witness.at_target,
        witness_function(KERNEL, witness, target, jnp.asarray(y), jnp.asarray(at), jnp.asarray(v)),
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(b).max())
    value = (v @ expected[0] - w @ expected[1]) / 2
    np.testing.assert_allclose(witness.value, value, rtol=1e-9)


@pytest.mark.parametrize("spectral_filter", [tikhonov, showalter, cutoff])
def test_witness_is_the_filter_of_the_covariance_in_feature_space(spectral_filter):
    """In the coordinates of all points' kernels, S and f are a matrix and a vector."""
    (y, x, v, w), target, statistics, evaluate = setup(weighted=True)
    lmbda = 0.03
    points = np.concatenate([x, y])
    half = linalg.sqrtm(gram(points, points)).real  # column i: features of point i
    features_x, features_y = half[:, : len(x)], half[:, len(x) :]
    covariance = features_x @ np.diag(w) @ features_x.T
    f = features_y @ v - features_x @ w
    rho, basis = linalg.eigh(covariance)
    g = {
        tikhonov: lambda r: 1 / (r + lmbda),
        showalter: lambda r: -np.expm1(-np.maximum(r, 1e-300) / lmbda) / np.maximum(r, 1e-300),
        cutoff: lambda r: np.where(r > lmbda, 1 / np.where(r > lmbda, r, 1), 0),
    }[spectral_filter](np.where(rho > 1e-12, rho, 0))
    h = 2 * (1 + lmbda) * basis @ (g * (basis.T @ f))
    witness = drmmd_witness(target, statistics, lmbda, spectral_filter=spectral_filter)
    np.testing.assert_allclose(evaluate(witness)[0], features_y.T @ h, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(witness.at_target, features_x.T @ h, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(witness.value, f @ h / 2, rtol=1e-7)


def values(kind, target):
    if kind == "mmd":
        return lambda statistics: mmd_witness(target, statistics)
    if kind == "kale":
        start = jnp.zeros(len(target.points))
        return lambda statistics: kale_witness(target, statistics, 0.05, start)[0]
    spectral_filter = {"tikhonov": tikhonov, "showalter": showalter, "cutoff": cutoff}[kind]
    return lambda s: drmmd_witness(target, s, 0.05, spectral_filter=spectral_filter)


@pytest.mark.parametrize("kind", ["mmd", "kale", "tikhonov", "showalter", "cutoff"])
@pytest.mark.parametrize("kernel", [gaussian(0.8), laplace(1.0)])
def test_velocity_is_the_gradient_of_the_value(kind, kernel):
    """By central differences, weights apart: dF / dy_i = v_i grad h(y_i)."""
    (y, _, v, _), target, statistics, evaluate = setup(weighted=True, kernel=kernel)
    solve = values(kind, target)

    @jax.jit
    def value(y):
        return solve(particle_statistics(kernel, y, target, jnp.asarray(v))[0]).value

    gradient = evaluate(solve(statistics))[1]
    for i, j in [(0, 0), (3, 1), (8, 0)]:
        step = np.zeros_like(y)
        step[i, j] = 1e-5
        slope = (value(jnp.asarray(y + step)) - value(jnp.asarray(y - step))) / 2e-5
        np.testing.assert_allclose(v[i] * gradient[i, j], slope, rtol=1e-5, atol=1e-8)


def test_at_the_target_nothing_moves():
    _, x, _, w = samples(weighted=True)
    x, w = jnp.asarray(x), jnp.asarray(w)
    target = prepare_target(KERNEL, x, w)
    statistics, evaluate = particle_statistics(KERNEL, x, target, w)
    for lmbda in LAMBDAS:
        witness = drmmd_witness(target, statistics, lmbda)
        np.testing.assert_allclose(witness.value, 0, atol=1e-12)
        np.testing.assert_allclose(evaluate(witness)[1], 0, atol=1e-9 / lmbda)
        np.testing.assert_allclose(density_ratio(witness, lmbda), 1, atol=1e-10)
    witness, log_ratio = kale_witness(target, statistics, 0.01, jnp.zeros(len(x)))
    np.testing.assert_allclose(witness.value, 0, atol=1e-12)
    np.testing.assert_allclose(log_ratio, 0, atol=1e-10)


# KALE


@pytest.mark.parametrize("lmbda", [1e-2, 1.0])
def test_kale_is_the_maximum_over_functions(lmbda):
    """The primal over h = sum of kernels at all points, by SciPy; no gap to our dual."""
    (y, x, v, w), target, statistics, evaluate = setup(weighted=True)
    witness, log_ratio = kale_witness(target, statistics, lmbda, jnp.zeros(len(x)))
    points = np.concatenate([x, y])
    root = linalg.sqrtm(gram(points, points)).real
    features_x, features_y = root[:, : len(x)], root[:, len(x) :]

    def loss(theta):
        e = w * np.exp(features_x.T @ theta)
        value = -(1 + v @ features_y.T @ theta - e.sum() - lmbda / 2 * theta @ theta)
        return value, -(features_y @ v - features_x @ e - lmbda * theta)

    best = optimize.minimize(loss, np.zeros(len(points)), jac=True, tol=1e-14)
    np.testing.assert_allclose(witness.value, -(1 + lmbda) * best.fun, rtol=1e-8)
    h = (1 + lmbda) * root.T @ best.x
    np.testing.assert_allclose(witness.at_target, h[: len(x)], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluate(witness)[0], h[len(x) :], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((1 + lmbda) * log_ratio, witness.at_target, rtol=1e-6, atol=1e-8)


def test_kale_from_a_good_start_takes_few_iterations_and_from_a_bad_one_arrives():
    _, target, statistics, _ = setup(weighted=True)
    start = jnp.zeros(len(target.points))
    exact, log_ratio = kale_witness(target, statistics, 1e-2, start)
    warm, _ = kale_witness(target, statistics, 1e-2, log_ratio + 1e-4, max_iterations=2)
    np.testing.assert_allclose(warm.value, exact.value, rtol=1e-10)
    for wrong in (-5.0, 5.0):
        far, _ = kale_witness(target, statistics, 1e-2, start + wrong)
        np.testing.assert_allclose(far.value, exact.value, rtol=1e-9)


# Blocks


def test_filters_without_float64():
    """Their series have integers past int32."""
    with jax.enable_x64(False):
        inverse, slope = jax.jit(showalter)(jnp.array([0.0, 0.05, 1.0]), 0.5)
    t = np.array([0.1, 2.0])
    np.testing.assert_allclose(inverse, [2, *(2 * -np.expm1(-t) / t)], rtol=1e-6)
    assert slope.dtype == jnp.float32


# Rules


def test_adaptive_lambda_starts_where_told_and_follows_the_value():
    assert adaptive_lambda(2.0, 2.0, 0.1) == pytest.approx(0.1)
    assert adaptive_lambda(0.5, 2.0, 0.1) == pytest.approx(0.1 / 2)
    assert adaptive_lambda(2.0 / 8, 2.0, 0.1, regularity=0.5) == pytest.approx(0.1 / 4)
    assert adaptive_lambda(2e4, 2.0, 0.1) == 1.0
    assert adaptive_lambda(2e4, 2.0, 0.1, largest=np.inf) == pytest.approx(10)
    assert adaptive_lambda(-1e-18, 2.0, 0.1) == 0.0


# Input validation


def test_bad_input():
    y, x, _, _ = map(jnp.asarray, samples())
    target = prepare_target(KERNEL, x)
    statistics, _ = particle_statistics(KERNEL, y, target)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        prepare_target(riesz(1.0), x)
    with pytest.raises(ValueError, match="leave out points of weight 0"):
        prepare_target(KERNEL, x, jnp.ones(7).at[2].set(0))
    with pytest.raises(ValueError, match="target is not finite in row 3"):
        prepare_target(KERNEL, x.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="target must be"):
        prepare_target(KERNEL, x[:0])
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="lambda must be positive and finite"):
            drmmd_witness(target, statistics, bad)
        with pytest.raises(ValueError, match="lambda must be positive and finite"):
            kale_witness(target, statistics, bad, jnp.zeros(7))
