"""Properties of (de)-regularized MMD, with kernels and with explicit features.

With T = W^1/2 K W^1/2, whose trace is 1, and F = |W^1/2 f|, the filters are at most 1 / lambda and
their slopes at most 1 / lambda^2. An eigendecomposition is that of T up to A = 20 M eps, and moves
g(T) W^1/2 f by A F / lambda^2; an error e of f moves it by e / lambda.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, EXPONENTS, SEEDS, assert_finite, assert_within, clouds

from lib import drmmd
from lib.drmmd.features import (
    feature_moments,
    feature_velocity,
    feature_witness,
    prepare_target_features,
)
from lib.kernels import gaussian
from lib.numerics import product

pytestmark = pytest.mark.usefixtures("x64")
many = settings(max_examples=25, deadline=None)
FILTERS = {"tikhonov": drmmd.tikhonov, "showalter": drmmd.showalter, "cutoff": drmmd.cutoff}


@st.composite
def flows(draw, shapes=((1, 1, 1), (4, 5, 2)), largest=6):
    """Clouds, the second a target of positive weights, and a lambda."""
    case = draw(clouds(shapes=shapes))
    case.y_weights[case.y_weights == 0] = 1
    return case, float(case.x.dtype.type(10.0 ** draw(st.floats(-largest, largest))))


@partial(jax.jit, static_argnames="block_size")
def witnesses(x, y, v, w, bandwidth, lmbda, block_size):
    kernel = gaussian(bandwidth)
    target = drmmd.prepare_target(kernel, y, w)
    statistics, evaluate = drmmd.particle_statistics(kernel, x, target, v, block_size=block_size)
    by_name = {"mmd": drmmd.mmd_witness(target, statistics)}
    for name, spectral_filter in FILTERS.items():
        by_name[name] = drmmd.drmmd_witness(
            target, statistics, lmbda, spectral_filter=spectral_filter
        )
    at = partial(drmmd.witness_function, kernel, target=target, particles=x, points=x, weights=v)
    evaluated = {
        name: (*evaluate(by_name[name]), at(by_name[name])) for name in ("mmd", "tikhonov")
    }
    ratio = drmmd.density_ratio(by_name["tikhonov"], lmbda)
    return target, statistics, by_name, evaluated, ratio


def grams(case):
    """The particles, the target, their Gram matrices and normalized weights, and the error of a
    kernel value: its exponent s / (2 sigma^2) has d + 6 roundings, and t exp(-t) is below 0.37."""
    x, y, v, w = case.in_float64()
    between = lambda a, b: np.exp(  # noqa: E731
        -np.square(a[:, None] - b[None]).sum(axis=-1) / (2 * case.bandwidth**2)
    )
    error = (0.37 * (x.shape[1] + 6) + 4) * case.eps
    return x, y, between(x, x), between(x, y), between(y, y), v / v.sum(), w / w.sum(), error


@many
@given(flows())
def test_witnesses(flow):
    case, lmbda = flow
    x, y, k_xx, k_xy, k_yy, v, w, rounding = grams(case)
    (n, d), m, eps, dtype = x.shape, len(y), case.eps, case.x.dtype
    arguments = *case.on_device(), case.bandwidth, lmbda
    target, statistics, by_name, evaluated, ratio = witnesses(*arguments, 2 if d == 1 else None)
    assert_finite((target, statistics, by_name, evaluated, ratio), dtype)
    rounding += 2 * (n + m + 4) * eps  # of a mean of the kernel, values of at most 1
    f, root = k_xy.T @ v - k_yy @ w, np.sqrt(w)
    assert_within(target.embedding, k_yy @ w, rounding)
    assert_within(target.energy, w @ k_yy @ w, 2 * rounding)
    assert_within(statistics.energy, v @ k_xx @ v, 2 * rounding)
    assert_within(statistics.at_target, k_xy.T @ v, rounding)
    spectrum = np.linalg.eigvalsh(root[:, None] * k_yy * root)
    spectral = 20 * m * eps + rounding
    assert_within(target.eigenvalues, np.maximum(spectrum, 0), spectral)
    energy = v @ k_xx @ v - 2 * v @ k_xy @ w + w @ k_yy @ w
    assert_within(by_name["mmd"].value, energy / 2, 4 * rounding)
    assert_within(by_name["mmd"].at_target, f, 2 * rounding)
    # DrMMD by Woodbury's identity, without a spectrum.
    size = np.linalg.norm(root * f) + 2 * rounding
    matrix = lmbda * np.eye(m) + root[:, None] * k_yy * root
    filtered = np.linalg.solve(matrix, root * f)
    value = (1 + lmbda) / lmbda * (energy - (root * f) @ filtered)
    units = 4 * rounding + 8 * rounding * (1 + size / lmbda) + spectral * (size / lmbda) ** 2
    assert_within(by_name["tikhonov"].value, value, 2 * (1 + lmbda) / lmbda * units)
    away = 2 * rounding / lmbda + 2 * spectral * size / lmbda**2 + m * eps * size / lmbda
    at_target = 2 * (1 + lmbda) * filtered / root
    assert_within(by_name["tikhonov"].at_target, at_target, 2 * (1 + lmbda) * away / root)
    assert_within(ratio, 1 + filtered / root, away / root + 4 * eps * (1 + np.abs(filtered / root)))
    for name, witness in by_name.items():
        # The witness is one function: at the target, at the particles, and by its value.
        s, b = float(witness.particle_scale), np.asarray(witness.target_weights, np.float64)
        total = abs(s) + np.abs(b).sum()
        factor = 1 if name == "mmd" else 2 * (1 + lmbda)
        move = 0 if name == "mmd" else factor * away
        here = s * (k_xy.T @ v) - k_yy @ b
        assert_within(witness.at_target, here, move / root + 2 * total * rounding / root)
        values = s * (k_xx @ v) - k_xy @ b
        value = (v @ values - w @ np.asarray(witness.at_target, np.float64)) / 2
        bound = total * rounding + (m + 4) * eps * np.abs(witness.at_target).max()
        assert_within(witness.value, value, 2 * bound)
        if name not in evaluated:
            continue
        for h in (evaluated[name][0], evaluated[name][2]):
            assert_within(h, values, total * rounding)
        # grad k = -k (y - z) / sigma^2, with y and z about a common center.
        center = (x.mean(axis=0) + y.mean(axis=0)) / 2
        points, weights = np.concatenate([x, y]), np.concatenate([s * v, -b])
        gram = np.concatenate([k_xx, k_xy], axis=1) / case.bandwidth**2
        apart = x[:, None] - points[None]
        gradient = -np.einsum("j,ij,ijk->ik", weights, gram, apart)
        reach = np.concatenate([np.abs(z - center).max(axis=1) for z in (x, y)])
        # Their center may be computed once for each, and is off by its own rounding.
        span, off = 2 * reach.max(), 4 * eps * np.abs(points).max()
        t = -np.log(np.maximum(gram * case.bandwidth**2, 1e-300))
        relative = (n + m + 20 + (d + 6) * t) * eps
        bound = 4 * np.einsum("j,ij->i", np.abs(weights), gram * (relative * span + off))
        flushed = case.tiny * max(1, 1 / case.bandwidth**2)
        bound += span * np.abs(weights).sum() * flushed + case.tiny
        assert_within(evaluated[name][1], gradient, bound[:, None])


@jax.jit
def filter_all(eigenvalues, lmbda):
    return {name: function(eigenvalues, lmbda) for name, function in FILTERS.items()}


@many
@given(SEEDS, DTYPES, EXPONENTS)
def test_filters(seed, dtype, exponent):
    rng, eps = np.random.default_rng(seed), np.finfo(dtype).eps
    lmbda = float(dtype(10.0**exponent))
    rho = (lmbda * 10.0 ** rng.uniform(-12, 6, size=6)).astype(dtype)
    rho[0] = 0
    filters = filter_all(jnp.asarray(rho), lmbda)
    rho = rho.astype(np.float64)
    t = rho / lmbda
    assert_within(filters["tikhonov"].inverse, 1 / (rho + lmbda), 4 * eps / (rho + lmbda), dtype)
    slope = 1 / (rho + lmbda) / lmbda
    assert_within(filters["tikhonov"].slope, -slope, 8 * eps * slope, dtype)
    # expm1 is exact to rounding; below 1e-8 two terms of its series are.
    inverse = np.where(t > 1e-8, -np.expm1(-t) / np.where(t > 0, t, 1), 1 - t / 2)
    assert_within(filters["showalter"].inverse, inverse / lmbda, 8 * eps * inverse / lmbda, dtype)
    series = sum((-1) ** k * t ** (k - 1) / math.factorial(k + 1) for k in range(1, 25))
    slope = np.where(t < 0.5, series, (inverse - 1) / np.where(t > 0, t, 1)) / lmbda**2
    # From t = 0.1 on a difference is taken, of size t / 2 and more.
    assert_within(filters["showalter"].slope, slope, 64 * eps * np.abs(slope), dtype)
    kept = rho > lmbda
    inverse = np.where(kept, 1 / np.where(kept, rho, 1), 0)
    assert_within(filters["cutoff"].inverse, inverse, 2 * eps * inverse, dtype)
    assert_within(filters["cutoff"].slope, inverse**2, 6 * eps * inverse**2, dtype)


@jax.jit
def kale(x, y, v, w, bandwidth, lmbda, log_ratio):
    kernel = gaussian(bandwidth)
    target = drmmd.prepare_target(kernel, y, w)
    statistics, _ = drmmd.particle_statistics(kernel, x, target, v)
    return drmmd.kale_witness(target, statistics, lmbda, log_ratio)


@many
@given(flows([(4, 5, 2)], largest=2), st.booleans())
def test_kale_is_between_its_dual_and_its_primal(flow, cold):
    case, lmbda = flow
    _, _, k_xx, k_xy, k_yy, v, w, rounding = grams(case)
    m, eps, dtype = len(w), case.eps, case.x.dtype
    start = np.zeros(m) if cold else np.random.default_rng(case.seed).normal(size=m)
    arguments = *case.on_device(), case.bandwidth, lmbda, jnp.asarray(start, dtype)
    witness, log_ratio = kale(*arguments)
    assert_finite((witness, log_ratio), dtype)
    s = float(witness.particle_scale) / (1 + lmbda)
    b = np.asarray(witness.target_weights, np.float64) / (1 + lmbda)
    at_target = s * (k_xy.T @ v) - k_yy @ b
    norm = s * s * v @ k_xx @ v - 2 * s * v @ k_xy @ b + b @ k_yy @ b
    mean = s * v @ k_xx @ v - v @ k_xy @ b
    primal = 1 + mean - w @ np.exp(at_target) - lmbda * norm / 2
    # The duality gap is sum_j a_j (g_j - 1 + exp(-g_j)), about half of sum_j a_j g_j^2.
    tolerance = max(1e-16, (16 * eps / lmbda) ** 2)
    rounding += 2 * (len(v) + m + 4) * eps
    mass = 1 + lmbda * b.sum()
    bound = tolerance + 8 * rounding * mass * (1 + mass / lmbda)
    assert_within(witness.value, (1 + lmbda) * primal, (1 + lmbda) * bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [1, 0.5, np.float64(1), np.float32(1)])
def test_plain_numbers_do_not_promote(dtype, number):
    def everything(x, y):
        target = drmmd.prepare_target(gaussian(number), y)
        particles, _ = drmmd.particle_statistics(gaussian(number), x, target)
        value, share = particles.energy, number if isinstance(number, float) else 1.0
        results = [
            drmmd.kale_witness(target, particles, number, jnp.zeros(4, dtype)),
            drmmd.adaptive_lambda(value, number, number, regularity=share, largest=share),
        ]
        features = prepare_target_features(lambda points: points, y)
        for spectral_filter in FILTERS.values():
            results.append(spectral_filter(value, number))
            witness = drmmd.drmmd_witness(
                target, particles, number, spectral_filter=spectral_filter
            )
            results += [witness, drmmd.density_ratio(witness, number)]
            mean = jnp.zeros(1, dtype)
            results.append(feature_witness(features, mean, number, spectral_filter=spectral_filter))
        return results

    points = jax.ShapeDtypeStruct((4, 1), dtype)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(everything, points, points))}
    assert {kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)} == {np.dtype(dtype)}


@partial(jax.jit, static_argnames="block_size")
def by_features(x, y, v, w, directions, lmbda, block_size):
    def features(points):
        return jnp.tanh(product(points, directions))

    options = {"block_size": block_size}
    target = prepare_target_features(features, y, w, **options)
    mean, none = feature_moments(features, x, v, second=False, **options)
    assert none is None
    by_filter = {}
    for name, spectral_filter in FILTERS.items():
        witness = feature_witness(target, mean, lmbda, spectral_filter=spectral_filter)
        by_filter[name] = witness, feature_velocity(features, witness, x, **options)
    return feature_moments(features, y, w, **options), mean, target, by_filter


@many
@given(flows(shapes=[(4, 5, 2), (5, 2, 1)]))
def test_features(flow):
    case, lmbda = flow
    x, y, v, w = case.in_float64()
    (n, d), m, num, eps, dtype = x.shape, len(y), 3, case.eps, case.x.dtype
    v, w = v / v.sum(), w / w.sum()
    largest = max(np.abs(x).max(), np.abs(y).max())
    directions = np.random.default_rng(case.seed).normal(size=(d, num)) / largest
    directions = directions.astype(dtype)
    arguments = *case.on_device(), jnp.asarray(directions), lmbda
    (mean, second), particle_mean, target, by_filter = by_features(*arguments, 2)
    assert_finite((mean, second, particle_mean, target, by_filter), dtype)
    directions = directions.astype(np.float64)
    phi_x, phi_y = np.tanh(x @ directions), np.tanh(y @ directions)
    # tanh has slope 1 at most, and some roundings of its own; a mean has those of its terms.
    angle = (largest * np.abs(directions).sum(axis=0)).max()
    rounding = (d + 2) * eps * angle + (8 + n + m) * eps
    assert_within(mean, w @ phi_y, 2 * rounding, dtype)
    assert_within(particle_mean, v @ phi_x, 2 * rounding, dtype)
    matrix = phi_y.T @ (w[:, None] * phi_y)
    assert_within(second, matrix, 4 * rounding, dtype)
    spectral = 20 * num * max(m, num) * eps + 4 * rounding
    spectrum = np.sort(np.linalg.eigvalsh(matrix))[-len(target.eigenvalues) :]
    assert_within(np.sort(target.eigenvalues), np.maximum(spectrum, 0), spectral)
    f = v @ phi_x - w @ phi_y
    size = np.linalg.norm(f) + 4 * rounding
    rho, basis = np.linalg.eigh(matrix)
    rho, gap = np.maximum(rho, 1e-300), np.abs(rho - lmbda).min()
    away = 4 * rounding / lmbda + 2 * spectral * size / lmbda**2 + 8 * num * eps * size / lmbda
    for name, inverse, further in (
        ("tikhonov", 1 / (rho + lmbda), 0),
        ("showalter", -np.expm1(-rho / lmbda) / rho, 0),
        # It jumps at lambda, from where the nearest eigenvalue is at this distance.
        ("cutoff", np.where(rho > lmbda, 1 / rho, 0), 4 * spectral * size / lmbda / gap),
    ):
        direction = 2 * (1 + lmbda) * basis @ (inverse * (basis.T @ f))
        if name != "cutoff" or gap > 2 * spectral:
            bound = 2 * (1 + lmbda) * (away + further)
            assert_within(by_filter[name][0].direction, direction, bound, dtype)
    for witness, velocity in by_filter.values():
        direction = np.asarray(witness.direction, np.float64)
        # (phi_mu - phi_pi) . direction / 2, of the means as they were computed
        bound = (4 * rounding + num * eps * size) * np.abs(direction).sum()
        assert_within(witness.value, f @ direction / 2, bound, dtype)
        slope = 1 - phi_x**2
        expected = (slope * direction) @ directions.T
        bound = (2 * rounding + (num + 4) * eps) * np.abs(direction) @ np.abs(directions).T
        assert_within(velocity, expected, bound[None] + case.tiny, dtype)
