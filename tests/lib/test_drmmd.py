"""(De)-regularised MMD against dense float64 NumPy, autodiff, SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize

from lib import mmd
from lib.drmmd import (
    adaptive_lambda,
    cutoff,
    density_ratio,
    drmmd_witness,
    kale_witness,
    mmd_witness,
    particle_statistics,
    prepare_target,
    prepare_target_nystrom,
    showalter,
    tikhonov,
    witness_function,
)
from lib.kernels import gaussian, imq, laplace, riesz

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
    statistics, pull = particle_statistics(kernel, jnp.asarray(y), target, jnp.asarray(v))
    return (y, x, v, w), target, statistics, pull


def direct(y, x, v, w, lmbda, at):
    """h at `at`: 2 (1 + lambda) (S + lambda)^-1 f by one dense solve,
    (S + lambda)^-1 f = (f - sum_j c_j k_xj) / lambda with (W K + lambda) c = W f(X)."""
    f = gram(x, y) @ v - gram(x, x) @ w
    c = linalg.solve(w[:, None] * gram(x, x) + lmbda * np.eye(len(x)), w * f)
    return 2 * (1 + lmbda) / lmbda * (gram(at, y) @ v - gram(at, x) @ (w + c))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lmbda", LAMBDAS)
def test_witness_is_that_of_the_direct_formula(lmbda, weighted):
    (y, x, v, w), target, statistics, pull = setup(weighted)
    witness = drmmd_witness(target, statistics, lmbda)
    at = np.random.default_rng(1).normal(size=(5, 2))
    expected = [direct(y, x, v, w, lmbda, z) for z in (y, x, at)]
    found = (
        pull(witness)[0],
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
    (y, x, v, w), target, statistics, pull = setup(weighted=True)
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
    np.testing.assert_allclose(pull(witness)[0], features_y.T @ h, rtol=1e-6, atol=1e-8)
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
@pytest.mark.parametrize("kernel", [gaussian(0.8), imq(0.7), laplace(1.0)])
def test_velocity_is_the_gradient_of_the_value(kind, kernel):
    """By central differences, weights apart: dF / dy_i = v_i grad h(y_i)."""
    (y, _, v, _), target, statistics, pull = setup(weighted=True, kernel=kernel)
    solve = values(kind, target)

    @jax.jit
    def value(y):
        return solve(particle_statistics(kernel, y, target, jnp.asarray(v))[0]).value

    gradient = pull(solve(statistics))[1]
    for i, j in [(0, 0), (3, 1), (8, 0)]:
        step = np.zeros_like(y)
        step[i, j] = 1e-5
        slope = (value(jnp.asarray(y + step)) - value(jnp.asarray(y - step))) / 2e-5
        np.testing.assert_allclose(v[i] * gradient[i, j], slope, rtol=1e-5, atol=1e-8)


def test_mmd_is_half_the_squared_mmd():
    (y, x, v, w), target, statistics, pull = setup(weighted=True)
    witness = mmd_witness(target, statistics)
    y, x, v, w = map(jnp.asarray, (y, x, v, w))
    expected = mmd.mmd_squared(KERNEL, y, x, x_weights=v, y_weights=w)
    np.testing.assert_allclose(2 * witness.value, expected, rtol=1e-12)
    h, _ = pull(witness)
    np.testing.assert_allclose(v @ h - w @ witness.at_target, expected, rtol=1e-12)


@pytest.mark.parametrize("spectral_filter", [tikhonov, showalter])
def test_large_lambda_gives_mmd_squared(spectral_filter):
    _, target, statistics, pull = setup(weighted=True)
    witness = drmmd_witness(target, statistics, 1e7, spectral_filter=spectral_filter)
    reference = mmd_witness(target, statistics)
    np.testing.assert_allclose(witness.value, 2 * reference.value, rtol=1e-6)
    np.testing.assert_allclose(pull(witness)[1], 2 * pull(reference)[1], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_small_lambda_gives_the_chi_squared_of_gaussians():
    """chi^2(N(m, 1) || N(0, 1)) = exp(m^2) - 1; samples at quantiles, not drawn."""
    from scipy.stats import norm

    n, shift = 1500, 0.5
    x = norm.ppf((np.arange(n) + 0.5) / n)[:, None]
    kernel = gaussian(1.0)
    target = prepare_target(kernel, jnp.asarray(x))
    statistics, _ = particle_statistics(kernel, jnp.asarray(x + shift), target)
    found = [float(drmmd_witness(target, statistics, lam).value) for lam in (1e-1, 1e-3, 1e-5)]
    expected = np.exp(shift**2) - 1
    assert found[0] < found[1] < found[2]
    np.testing.assert_allclose(found[2], expected, rtol=0.02)
    ratio = density_ratio(drmmd_witness(target, statistics, 1e-5), 1e-5)
    middle = np.abs(x[:, 0]) < 1.5
    exact = np.exp(shift * x[:, 0] - shift**2 / 2)
    np.testing.assert_allclose(ratio[middle], exact[middle], rtol=0.05)


def test_at_the_target_nothing_moves():
    _, x, _, w = samples(weighted=True)
    x, w = jnp.asarray(x), jnp.asarray(w)
    target = prepare_target(KERNEL, x, w)
    statistics, pull = particle_statistics(KERNEL, x, target, w)
    for lmbda in LAMBDAS:
        witness = drmmd_witness(target, statistics, lmbda)
        np.testing.assert_allclose(witness.value, 0, atol=1e-12)
        np.testing.assert_allclose(pull(witness)[1], 0, atol=1e-9 / lmbda)
        np.testing.assert_allclose(density_ratio(witness, lmbda), 1, atol=1e-10)
    witness, log_ratio = kale_witness(target, statistics, 0.01, jnp.zeros(len(x)))
    np.testing.assert_allclose(witness.value, 0, atol=1e-12)
    np.testing.assert_allclose(log_ratio, 0, atol=1e-10)


# KALE


@pytest.mark.parametrize("lmbda", [1e-2, 1.0])
def test_kale_is_the_maximum_over_functions(lmbda):
    """The primal over h = sum of kernels at all points, by SciPy; no gap to our dual."""
    (y, x, v, w), target, statistics, pull = setup(weighted=True)
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
    np.testing.assert_allclose(pull(witness)[0], h[len(x) :], rtol=1e-4, atol=1e-5)
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


# Blocks, low rank, weights


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_blocks_change_nothing(block_size):
    (y, _, v, _), target, statistics, pull = setup(weighted=True)
    options = {"block_size": block_size}
    blocked, pull_blocked = particle_statistics(
        KERNEL, jnp.asarray(y), target, jnp.asarray(v), **options
    )
    np.testing.assert_allclose(blocked.energy, statistics.energy, rtol=1e-12)
    np.testing.assert_allclose(blocked.at_target, statistics.at_target, rtol=1e-12)
    witness = drmmd_witness(target, statistics, 0.1)
    for a, b in zip(pull_blocked(witness), pull(witness)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_nystrom_of_full_rank_is_exact_and_of_less_close():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(60, 2))), jnp.asarray(rng.normal(size=(40, 2)))
    kernel, key = gaussian(1.5), jax.random.key(0)
    exact = prepare_target(kernel, x)
    statistics, pull = particle_statistics(kernel, y, exact)
    for spectral_filter in (tikhonov, showalter, cutoff):
        options = {"lmbda": 1e-2, "spectral_filter": spectral_filter}
        reference = drmmd_witness(exact, statistics, **options)
        errors = []
        for rank in (10, 45, 60):
            target = prepare_target_nystrom(key, kernel, x, rank)
            assert target.eigenvectors.shape == (60, rank)
            found = drmmd_witness(target, statistics, **options)
            velocity = pull(reference)[1]
            errors.append(float(jnp.abs(pull(found)[1] - velocity).max() / abs(velocity).max()))
        assert errors[2] < 1e-7
        assert errors[1] < 1e-3
        assert errors[0] > errors[1]


def test_a_point_in_two_halves_is_the_point():
    (y, x, v, w), target, statistics, _ = setup(weighted=True)
    split = np.concatenate([x, x[:1]]), np.concatenate([w, w[:1] / 3])
    split[1][0] *= 2 / 3
    halves = prepare_target(KERNEL, *map(jnp.asarray, split))
    again, _ = particle_statistics(KERNEL, jnp.asarray(y), halves, jnp.asarray(v))
    for lmbda in (1e-3, 0.1, 10.0):
        whole = drmmd_witness(target, statistics, lmbda)
        parts = drmmd_witness(halves, again, lmbda)
        np.testing.assert_allclose(parts.value, whole.value, rtol=1e-8)
        np.testing.assert_allclose(parts.at_target[:-1], whole.at_target, rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.floats(-4, 2))
def test_value_grows_as_lambda_falls_and_lies_between_mmd_and_its_bound(seed, exponent):
    """DrMMD / (1 + lambda) falls with lambda; DrMMD itself lies above MMD^2."""
    y, x, _, _ = samples(seed=seed)
    with jax.enable_x64(True):
        target = prepare_target(KERNEL, jnp.asarray(x))
        statistics, _ = particle_statistics(KERNEL, jnp.asarray(y), target)
        lmbda = 10.0**exponent
        small, large = (drmmd_witness(target, statistics, c).value for c in (lmbda, 2 * lmbda))
        assert small / (1 + lmbda) >= large / (1 + 2 * lmbda)
        assert small >= 2 * mmd_witness(target, statistics).value * (1 - 1e-9)


@pytest.mark.parametrize("spectral_filter", [tikhonov, showalter, cutoff])
def test_divided_differences_of_the_filters(spectral_filter):
    lmbda = 0.01
    rho = jnp.asarray([0.0, 1e-12, 1e-6, 1e-4, 9.9e-4, 1.01e-3, 5e-3, 0.02, 1.0])
    inverse, slope = spectral_filter(rho, lmbda)
    at_zero = spectral_filter(jnp.zeros(1), lmbda).inverse
    # Where the division is accurate.
    large = np.asarray(rho) > 1e-4
    expected = ((inverse - at_zero) / rho)[large]
    np.testing.assert_allclose(slope[large], expected, rtol=1e-9)
    if spectral_filter is not cutoff:
        limit = {tikhonov: -1.0, showalter: -0.5}[spectral_filter] / lmbda**2
        np.testing.assert_allclose(slope[:2], limit, rtol=1e-8)
        np.testing.assert_allclose(inverse[:2], 1 / lmbda, rtol=1e-8)


# Rules


def test_adaptive_lambda_starts_where_told_and_follows_the_value():
    assert adaptive_lambda(2.0, 2.0, 0.1) == pytest.approx(0.1)
    assert adaptive_lambda(0.5, 2.0, 0.1) == pytest.approx(0.1 / 2)
    assert adaptive_lambda(2.0 / 8, 2.0, 0.1, regularity=0.5) == pytest.approx(0.1 / 4)
    assert adaptive_lambda(2e4, 2.0, 0.1) == 1.0
    assert adaptive_lambda(2e4, 2.0, 0.1, largest=np.inf) == pytest.approx(10)
    assert adaptive_lambda(-1e-18, 2.0, 0.1) == 0.0


# At the door


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
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 7\]"):
        prepare_target_nystrom(jax.random.key(0), KERNEL, x, 8)
    low_rank = prepare_target_nystrom(jax.random.key(0), KERNEL, x, 3)
    with pytest.raises(ValueError, match="whole Gram matrix"):
        kale_witness(low_rank, statistics, 0.1, jnp.zeros(7))
