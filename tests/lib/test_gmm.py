"""Gaussian mixtures against scikit-learn, scipy, closed forms, and themselves."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from chunks import stop_after
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture

from lib.gmm import (
    Mixture,
    cast,
    component_log_prob,
    covariances,
    from_sklearn,
    log_prob,
    responsibilities,
    sample,
    sample_components,
    sample_coupled,
    to_sklearn,
)
from lib.gmm import _linalg as linalg
from lib.gmm.covariances import (
    Diagonal,
    Full,
    LowRank,
    Spherical,
    from_matrices,
    latent_projections,
)
from lib.gmm.em import (
    em_step,
    expectation,
    fit,
    maximisation,
    mean_log_likelihood,
)
from lib.gmm.starts import (
    kmeans,
    kmeans_plus_plus,
    kmeans_start,
    responsibilities_start,
)
from lib.rows import Rows
from lib.rows.files import open_rows
from lib.rows.fourier_means import stream_mean_embeddings
from lib.runs import open_run
from lib.runs.console import Interrupted
from lib.runs.files import RunFileError

STRUCTURES = {
    "full": covariances.full,
    "tied": covariances.tied,
    "diag": covariances.diagonal,
    "spherical": covariances.spherical,
    "low rank": covariances.low_rank(jax.random.key(5), 2),
}
SKLEARN = ("full", "tied", "diag", "spherical")


def quick(*names):
    """All structures; the others than these are slow."""
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in STRUCTURES
    ]


quiet_fit = partial(fit, show_progress=False)


def clusters(seed, n=300, d=5, num=3, spread=1.5):
    """Points about `num` means, each cluster with a covariance of its own, [n, d] float64."""
    rng = np.random.default_rng(seed)
    means = spread * rng.normal(size=(num, d))
    mixing = rng.normal(size=(num, d, d)) / np.sqrt(d)
    labels = rng.integers(num, size=n)
    return means[labels] + np.einsum("nij,nj->ni", mixing[labels], rng.normal(size=(n, d)))


def soft(x, num, seed=0):
    """Responsibilities [n, num] by the distance to `num` of the points."""
    centres = x[np.random.default_rng(seed).choice(len(x), num, replace=False)]
    squared = np.square(x[:, None] - centres).sum(axis=2)
    return softmax(-squared / squared.mean() * 4, axis=1)


def start_of(x, structure, num=3, seed=0, **options):
    data = Rows(x, dtype=np.float64)
    return responsibilities_start(data, soft(x, num, seed), STRUCTURES[structure], **options)


def dense(mixture):
    """The covariances [K, d, d] of any structure, in numpy."""
    matrices = np.asarray(mixture.covariance.matrices())
    num, d = mixture.means.shape
    if matrices.shape == (num, d, d):
        return matrices
    if matrices.shape == (d, d):
        return np.broadcast_to(matrices, (num, d, d))
    return np.stack([np.diag(np.broadcast_to(variances, d)) for variances in matrices])


def numpy_joint(mixture, x):
    """log w_k + log N(x_i; mu_k, Sigma_k) by scipy."""
    columns = [
        np.log(weight) + multivariate_normal(mean, covariance).logpdf(x)
        for weight, mean, covariance in zip(*mixture[:2], dense(mixture))
    ]
    return np.stack(columns, axis=1)


# Densities


@pytest.mark.parametrize("structure", STRUCTURES)
def test_densities_agree_with_scipy(x64, structure):
    x = clusters(0, n=41)
    mixture = start_of(x, structure)
    joint = numpy_joint(mixture, x)
    points = jnp.asarray(x)
    found = component_log_prob(mixture, points, block_size=8)
    np.testing.assert_allclose(found, joint, rtol=1e-11)
    density = logsumexp(joint, axis=1)
    np.testing.assert_allclose(log_prob(mixture, points, block_size=7), density, rtol=1e-11)
    shares = np.exp(joint - density[:, None])
    np.testing.assert_allclose(responsibilities(mixture, points), shares, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        mean_log_likelihood(mixture, Rows(x, dtype=np.float64)), density.mean(), rtol=1e-11
    )


def test_densities_in_float32_and_their_dtype():
    """A float64 mixture beside float32 points: within float32's rounding, under jit."""
    x = clusters(1, n=50)
    mixture = start_of(x, "full")
    found = jax.jit(log_prob)(mixture, jnp.asarray(x, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logsumexp(numpy_joint(mixture, x), axis=1), atol=2e-5)


def test_panels_of_a_large_triangle(x64):
    """Past one panel the triangles are put together again."""
    d = 2 * linalg.PANEL + 17
    rng = np.random.default_rng(0)
    x, triangle, weights = rng.normal(size=(9, d)), np.tril(rng.normal(size=(d, d))), np.arange(9.0)
    found = linalg.triangular_product(jnp.asarray(x), jnp.asarray(triangle))
    np.testing.assert_allclose(found, x @ triangle.T, rtol=1e-10, atol=1e-10)
    panels = linalg.weighted_gram(jnp.asarray(x), jnp.asarray(weights))
    assert len(panels) > 1
    assert sum(panel.size for panel in panels) < 0.8 * d * d
    expected = (x * weights[:, None]).T @ x
    whole = linalg.symmetric(panels)
    np.testing.assert_allclose(whole, expected, rtol=1e-10, atol=1e-10)
    moved = triangle @ expected @ triangle.T
    found = linalg.congruence(jnp.asarray(triangle), whole)
    np.testing.assert_allclose(np.tril(found), np.tril(moved), atol=1e-12 * np.abs(moved).max())


def test_sums_skip_rows_without_weight(x64):
    """From no row with weight to all of them, scattered, in each of the sizes and between."""
    rng, lengths = np.random.default_rng(0), []

    def sums(x, weights):
        lengths.append(len(x))
        return weights @ x

    x = jnp.asarray(rng.normal(size=(64, 3)))
    cut = jax.jit(partial(linalg.over_responsible, sums))
    for active in (0, 1, 7, 8, 9, 16, 31, 48, 49, 63, 64):
        weights = np.zeros(64)
        weights[rng.choice(64, active, replace=False)] = rng.random(active) + 0.1
        np.testing.assert_allclose(
            cut(x, jnp.asarray(weights)), weights @ x, rtol=1e-12, atol=1e-14
        )
    assert sorted(set(lengths)) == [0, 8, 16, 32, 48, 64]


# EM


@pytest.mark.parametrize("structure", SKLEARN)
def test_every_iteration_is_scikit_learns(structure):
    """Log-likelihood to 1e-9 relative in each of ten iterations, parameters after the last."""
    x = clusters(2, n=400)
    start = start_of(x, structure)
    theirs = to_sklearn(start)
    theirs.set_params(
        weights_init=theirs.weights_, means_init=theirs.means_, precisions_init=theirs.precisions_
    ).set_params(tol=0, max_iter=10, init_params="random_from_data", random_state=0)
    with pytest.warns(match="did not converge"):
        theirs.fit(x)
    data = Rows(x, dtype=np.float64, block_size=64, chunk_size=150)
    ours = quiet_fit(data, start, tolerance=0.0, max_iterations=10)
    assert not ours.converged
    assert not ours.ridges.any()
    np.testing.assert_allclose(ours.log_likelihoods, theirs.lower_bounds_, rtol=1e-9)
    assert np.ptp(ours.log_likelihoods) > 0.1
    np.testing.assert_allclose(ours.mixture.weights, theirs.weights_, rtol=1e-9)
    np.testing.assert_allclose(ours.mixture.means, theirs.means_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        ours.mixture.covariance.matrices(), theirs.covariances_, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("structure", SKLEARN)
def test_start_from_responsibilities(structure):
    """Means and covariances by their definitions, with weights of the points."""
    x, shares, weights = (
        clusters(3, n=90),
        soft(clusters(3, n=90), 3),
        np.random.default_rng(0).random(90),
    )
    data = Rows(x, weights=weights, dtype=np.float64)
    start = responsibilities_start(data, shares, STRUCTURES[structure], regularisation=0.01)
    share = shares * weights[:, None]
    counts = share.sum(axis=0)
    means = share.T @ x / counts[:, None]
    covariances = np.stack([np.cov(x.T, aweights=share[:, k], bias=True) for k in range(3)])
    ridge = 0.01 * np.eye(5)
    expected = {
        "full": covariances + ridge,
        "tied": np.einsum("k,kij->ij", counts / counts.sum(), covariances) + ridge,
        "diag": np.diagonal(covariances, axis1=1, axis2=2) + 0.01,
        "spherical": np.trace(covariances, axis1=1, axis2=2) / 5 + 0.01,
    }[structure]
    np.testing.assert_allclose(start.weights, counts / counts.sum(), rtol=1e-12)
    np.testing.assert_allclose(start.means, means, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(start.covariance.matrices(), expected, rtol=1e-10, atol=1e-12)
    # Clusters 1e8 standard deviations apart leave nothing of a second moment about the mean of all.
    one_hot = np.eye(3)[np.arange(90) % 3]
    apart, own = (
        responsibilities_start(
            Rows(x + shift, dtype=np.float64), one_hot, STRUCTURES[structure], regularisation=0.01
        )
        for shift in (1e8 * (one_hot[:, :1] - one_hot[:, 1:2]), -one_hot @ one_hot.T @ x / 30)
    )
    np.testing.assert_allclose(dense(apart), dense(own), atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_float32_products_beside_float64(structure):
    """Within 1e-4 nats a dimension, with constant features and eigenvalues of 1e-6 of the largest,
    where a Gram matrix in float32 alone would lose them."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    x = 0.5 + (clusters(4, n=3000, d=24) * np.geomspace(0.3, 1e-3, 24)) @ basis
    x[:, :3] = [0.25, 0.0, 1.0]
    start = start_of(x, structure)
    histories = [
        quiet_fit(Rows(x, dtype=dtype), start, tolerance=0.0, max_iterations=8).log_likelihoods
        for dtype in (np.float32, np.float64)
    ]
    assert np.abs(histories[0] - histories[1]).max() < 1e-4 * 24
    assert histories[0][-1] > histories[0][0] + 0.1


@pytest.mark.slow
def test_pure_steps_are_the_fits(x64):
    """em_step under jit, expectation of parts added up, and `fit`: one and the same."""
    x, weights = clusters(5, n=120), np.random.default_rng(0).random(120)
    start = start_of(x, "full")
    step = jax.jit(em_step)
    mixture, infos = start, []
    for _ in range(3):
        mixture, info = step(mixture, jnp.asarray(x), jnp.asarray(weights))
        infos.append(float(info.log_likelihood))
    data = Rows(x, weights=weights, dtype=np.float64, chunk_size=50)
    result = quiet_fit(data, start, tolerance=0.0, max_iterations=3)
    np.testing.assert_allclose(result.log_likelihoods, infos, rtol=1e-12)
    np.testing.assert_allclose(result.mixture.means, mixture.means, rtol=1e-10, atol=1e-12)
    parts = [expectation(start, jnp.asarray(x[a:b]), jnp.asarray(weights[a:b]))
             for a, b in ((0, 30), (30, 120))]  # fmt: skip
    total = jax.tree.map(jnp.add, *parts)
    whole = expectation(start, jnp.asarray(x), jnp.asarray(weights), block_size=16)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), total, whole)
    first = maximisation(start, total)[0]
    one = quiet_fit(data, start, max_iterations=1).mixture
    np.testing.assert_allclose(first.covariance.cholesky, one.covariance.cholesky, atol=1e-11)


@pytest.mark.slow
def test_step_without_float64():
    """In plain float32, where x64 is off, a step is still a step."""
    x = jnp.asarray(clusters(6), jnp.float32)
    mixture = cast(start_of(np.asarray(x, float), "full"), jnp.float32)
    for _ in range(4):
        mixture, info = jax.jit(em_step)(mixture, x)
        assert info.log_likelihood.dtype == jnp.float32
    expected = quiet_fit(Rows(np.asarray(x)), start_of(np.asarray(x, float), "full"),
                         tolerance=0.0, max_iterations=4)  # fmt: skip
    np.testing.assert_allclose(info.log_likelihood, expected.log_likelihoods[-1], atol=1e-3)


# Low rank + diagonal


@pytest.mark.slow
def test_low_rank_step_by_its_formulas():
    """The published update in dense matrices: B = W' Sigma^-1, S about the new mean."""
    x = clusters(7, n=150)
    start = start_of(x, "low rank", num=2)
    share = np.exp(numpy_joint(start, x) - logsumexp(numpy_joint(start, x), axis=1)[:, None])
    result = quiet_fit(
        Rows(x, dtype=np.float64), start, max_iterations=1, regularisation=0.0
    ).mixture
    for k in range(2):
        mean = share[:, k] @ x / share[:, k].sum()
        scatter = np.cov(x.T, aweights=share[:, k], bias=True)
        loadings = start.covariance.loadings[k]
        projection = loadings.T @ np.linalg.inv(dense(start)[k])
        latent = np.eye(2) - projection @ loadings + projection @ scatter @ projection.T
        expected = scatter @ projection.T @ np.linalg.inv(latent)
        variances = np.diag(scatter - expected @ projection @ scatter)
        np.testing.assert_allclose(result.means[k], mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(result.covariance.loadings[k], expected, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(result.covariance.scales[k] ** 2, variances, rtol=1e-8)


@pytest.mark.slow
def test_low_rank_climbs_to_factor_analysis():
    """With one component: scikit-learn's FactorAnalysis; with three no step goes down."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 12)) + 0.7 * rng.normal(size=(500, 12))
    start = responsibilities_start(
        Rows(x, dtype=np.float64), np.ones((500, 1)), STRUCTURES["low rank"]
    )
    data = Rows(x, dtype=np.float64)
    result = quiet_fit(data, start, regularisation=0.0, tolerance=1e-8, max_iterations=500)
    assert result.converged
    theirs = FactorAnalysis(2, svd_method="lapack", tol=1e-10, max_iter=5000).fit(x).score(x)
    np.testing.assert_allclose(mean_log_likelihood(result.mixture, data), theirs, atol=1e-6)
    x = clusters(9)
    result = quiet_fit(
        Rows(x, dtype=np.float64),
        start_of(x, "low rank"),
        regularisation=0.0,
        tolerance=0.0,
        max_iterations=40,
    )
    assert np.diff(result.log_likelihoods).min() > -1e-12


# Invariances


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["full", "tied", "diag", "spherical", "low rank"]),
    st.integers(0, 10**6),
    st.sampled_from([7, 1000]),
    st.floats(-3, 3),
)
def test_invariances(structure, seed, block_size, shift):
    """Order of rows, a row split into two weights, block and chunk sizes, a constant added."""
    x = clusters(seed, n=64, d=3)
    start = start_of(x, structure, num=2, seed=seed)
    x = np.vstack([x, x[5]])
    weights = np.append(np.ones(64), 0.0)
    order = np.random.default_rng(seed).permutation(65)

    def run(x, weights, start, **options):
        data = Rows(x, weights=weights, dtype=np.float64, **options)
        return quiet_fit(data, start, tolerance=0.0, max_iterations=3, regularisation=0.01)

    plain = run(x, weights, start)
    split = weights.copy()
    split[[5, 64]] = 0.7, 0.3
    others = (
        run(x[order], weights[order], start, block_size=block_size, chunk_size=30),
        run(x, split, start),
        run(x + shift, weights, start._replace(means=start.means + shift)),
    )
    for other, moved in zip(others, (0.0, 0.0, shift)):
        np.testing.assert_allclose(other.log_likelihoods, plain.log_likelihoods, rtol=1e-8)
        np.testing.assert_allclose(
            other.mixture.means - moved, plain.mixture.means, rtol=1e-6, atol=1e-7
        )
        np.testing.assert_allclose(dense(other.mixture), dense(plain.mixture), atol=1e-7)


def test_arrays_and_files_of_the_same_rows_are_fitted_alike(tmp_path):
    """EM from k-means, and mean embeddings: array, memory map, .npy, .pt, all in the same bits."""
    x = clusters(3).astype("f")
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.from_numpy(x), tmp_path / "x.pt")
    sources = (
        x,
        jnp.asarray(x),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        open_rows(tmp_path / "x.npy"),
        open_rows(tmp_path / "x.pt"),
    )
    results, frequencies = [], jax.random.normal(jax.random.key(1), (4, x.shape[1]))
    for source in sources:
        data = Rows(source, chunk_size=100)
        start = kmeans_start(jax.random.key(0), data, 3, covariances.full)
        result = quiet_fit(data, start, max_iterations=2, tolerance=0.0)
        means = stream_mean_embeddings(data, frequencies, [1.0], chunk_size=100).means
        results.append((start, result.mixture, result.log_likelihoods, means))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
    x[[7, 150]] = np.nan
    np.save(tmp_path / "x.npy", x)
    for fit_or_start in (
        lambda data: quiet_fit(data, start),
        lambda data: kmeans(jax.random.key(0), data, 3),
    ):
        with pytest.raises(ValueError, match=rf"x\.npy: NaN or infinity in 2 of {len(x)} .* row 7"):
            fit_or_start(Rows(open_rows(tmp_path / "x.npy")))


@pytest.mark.slow
def test_images_are_read_as_they_are():
    """uint8 on the host in chunks, scaled on the device, beside floats scaled before."""
    images = np.random.default_rng(0).integers(0, 256, size=(130, 3, 2, 1), dtype=np.uint8)
    shares = soft(images.reshape(130, 6) / 1.0, 2)

    def scale(block):
        assert block.shape[1:] == (3, 2, 1)
        return block / 127.5 - 1

    histories = []
    for data in (
        Rows(images, transform=scale, dtype=np.float64, block_size=16, chunk_size=40),
        Rows(images.reshape(130, 6) / 127.5 - 1, dtype=np.float64),
        Rows(jnp.asarray(images), transform=scale, dtype=np.float64, chunk_size=40),
    ):
        start = responsibilities_start(data, shares, covariances.full)
        histories.append(quiet_fit(data, start, max_iterations=4).log_likelihoods)
    np.testing.assert_allclose(histories[1:], [histories[0]] * 2, rtol=1e-10)


SHARDED = """
import jax, numpy as np
from lib.gmm import Mixture, from_matrices
from lib.gmm.em import fit
from lib.rows import Rows
x = np.random.default_rng(0).normal(size=(101, 4)) + np.arange(101)[:, None] % 3
start = Mixture(np.array([0.4, 0.6]), x[:2], from_matrices(np.stack([np.eye(4)] * 2)))
for count in (1, 3):
    data = Rows(x, dtype=np.float64, chunk_size=40, devices=jax.devices()[:count])
    result = fit(data, start, tolerance=0.0, max_iterations=4, show_progress=False)
    print(*result.log_likelihoods)
"""


def test_devices_share_the_rows():
    """Three devices beside one, in a process of its own that has three."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    one, three = (np.array(line.split(), float) for line in done.stdout.splitlines())
    assert len(one) == 4
    np.testing.assert_allclose(three, one, rtol=1e-12)


# Fits: convergence, held-out data, resuming


def test_converges_as_scikit_learn():
    x = clusters(10)
    start = start_of(x, "full")
    theirs = to_sklearn(start)
    theirs.set_params(
        weights_init=theirs.weights_,
        means_init=theirs.means_,
        precisions_init=theirs.precisions_,
        init_params="random_from_data",
    ).fit(x)
    result = quiet_fit(Rows(x, dtype=np.float64), start)
    assert result.converged
    assert len(result.log_likelihoods) == theirs.n_iter_ < 100


@pytest.mark.slow
def test_held_out_data_stop_the_fit():
    """Few points in many dimensions: held-out likelihood falls while training's rises."""
    x = clusters(11, n=200, d=8, num=2)
    train, held_out = (Rows(part, dtype=np.float64) for part in (x[:60], x[60:]))
    start = responsibilities_start(train, soft(x[:60], 3), covariances.full, regularisation=0.01)
    result = quiet_fit(train, start, held_out=held_out, tolerance=0.0, regularisation=0.01)
    assert result.converged
    assert len(result.held_out) == len(result.log_likelihoods) + 1 < 100
    best = result.held_out.argmax()
    assert best == len(result.held_out) - 2
    np.testing.assert_allclose(
        mean_log_likelihood(result.mixture, held_out), result.held_out[best], rtol=1e-12
    )


def test_resumes_to_the_same_bits(tmp_path, monkeypatch):
    x = clusters(12)
    start, data = start_of(x, "full"), Rows(x)
    options = {"tolerance": 0.0, "max_iterations": 6}
    whole = quiet_fit(data, start, **options)
    run = open_run(tmp_path, "gmm", "test", {}, seed=0)

    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="after step 3"):
        quiet_fit(data, start, run=run, **options)
    monkeypatch.undo()
    resumed = quiet_fit(data, start, run=run, **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    found = [(row["step"], row["log_likelihood"]) for row in run.read_metrics()]
    assert found == list(enumerate(whole.log_likelihoods))
    again = quiet_fit(data, start, run=run, **options)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    other = start._replace(means=start.means + 1), Rows(x, transform=jnp.tanh)
    with pytest.raises(RunFileError, match="another start, data, tolerance,"):
        quiet_fit(other[1], other[0], run=run, **options | {"tolerance": 1e-9})


# Bad data: errors and repairs


def test_bad_input():
    x = clusters(13, n=20)
    start = start_of(x, "full")
    bad = x.copy()
    bad[7, 2] = np.nan
    with pytest.raises(
        ValueError, match="the data: NaN or infinity in 1 of 20 rows, the first is row 7"
    ):
        Rows(bad)
    with pytest.raises(ValueError, match=r"got shape \(20,\)"):
        Rows(x[:, 0])
    with pytest.raises(ValueError, match="weights must be finite and >= 0"):
        Rows(x, weights=-np.ones(20))
    with pytest.raises(ValueError, match="float32 or float64, got int32"):
        Rows(x, dtype=np.int32)
    with pytest.raises(ValueError, match="3 components, but 2 points"):
        quiet_fit(Rows(x[:2]), start)
    with pytest.raises(ValueError, match="21 components, but 20 points"):
        kmeans(jax.random.key(0), Rows(x), 21)
    with pytest.raises(ValueError, match="the data have dimension 4, the start 5"):
        quiet_fit(Rows(x[:, :4]), start)
    with pytest.raises(ValueError, match="component 1 starts with no point"):
        responsibilities_start(Rows(x), np.eye(2)[np.zeros(20, int)], covariances.full)
    with pytest.raises(ValueError, match="regularisation must be"):
        quiet_fit(Rows(x), start, regularisation=-1.0)
    structure = covariances.low_rank(jax.random.key(0), 5)
    with pytest.raises(ValueError, match="rank must be at least 1 and below d = 5"):
        responsibilities_start(Rows(x), np.ones((20, 1)), structure)
    with pytest.raises(ValueError, match="not positive definite"):
        from_matrices(-np.eye(3))
    with pytest.raises(ValueError, match="has not been fitted"):
        from_sklearn(GaussianMixture())
    with pytest.raises(FloatingPointError, match="the transform makes NaN"):
        quiet_fit(Rows(x, transform=jnp.sqrt), start)
    with pytest.raises(ValueError, match=r"points are \[n, 5\], got shape \(20, 3\)"):
        log_prob(start, jnp.asarray(x[:, :3], jnp.float32))


@pytest.mark.parametrize("structure", quick("full", "low rank"))
def test_constant_features_are_given_a_ridge(structure):
    """Without regularisation: recorded, and with it not needed."""
    x = clusters(14, n=200)
    x[:, 1] = 3.0
    data = Rows(x, dtype=np.float64)
    start = start_of(x, structure)
    assert not quiet_fit(data, start, max_iterations=3).ridges.any()
    result = quiet_fit(data, start, max_iterations=3, regularisation=0.0)
    needed = structure != "spherical"
    assert result.ridges.any() == needed
    assert len(result.repairs) == (3 if needed else 0)
    if needed:
        assert "a ridge of at most" in result.repairs[0]
        assert result.ridges.max() < 1e-9
    assert np.isfinite(result.log_likelihoods).all()


def test_a_ridge_rises_until_a_factor_exists(x64):
    """A matrix with an eigenvalue of -1e-3: the ridge passes it, tenfold at a time."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    matrix = basis @ np.diag([-1e-3, 1, 1, 2, 2, 3]) @ basis.T
    cholesky, inverse, ridge = jax.jit(linalg.factorize)(jnp.asarray(matrix))
    assert 1e-3 < ridge < 1.1e-2
    expected = matrix + float(ridge) * np.eye(6)
    np.testing.assert_allclose(cholesky @ cholesky.T, expected, atol=1e-12)
    np.testing.assert_allclose(inverse @ cholesky, np.eye(6), atol=1e-10)
    sound = linalg.factorize(jnp.asarray(expected))
    assert sound[2] == 0
    assert np.isnan(linalg.factorize(jnp.full((2, 2), jnp.nan))[0]).any()


@pytest.mark.slow
def test_duplicated_points():
    """One point alone has a singular covariance; k-means wants as many points as components."""
    x = np.ones((30, 2))
    data = Rows(x, dtype=np.float64)
    with pytest.raises(ValueError, match="2 components, but 1 distinct points"):
        kmeans(jax.random.key(0), data, 2)
    start = responsibilities_start(data, np.ones((30, 1)), covariances.full, regularisation=0.0)
    result = quiet_fit(data, start, regularisation=0.0, max_iterations=3)
    assert (result.ridges > 0).all()
    assert np.isfinite(result.log_likelihoods).all()


@pytest.mark.parametrize("structure", quick("diag"))
def test_an_emptied_component_is_kept_at_weight_0(structure):
    x = clusters(15, n=100, num=1)
    start = start_of(x, structure, num=2)
    far = start._replace(means=start.means + np.array([[0.0], [1e4]]))
    data = Rows(x, dtype=np.float64)
    result = quiet_fit(data, far, max_iterations=4, tolerance=0.0)
    np.testing.assert_array_equal(result.mixture.weights, [1, 0])
    np.testing.assert_allclose(result.mixture.means[1], far.means[1], rtol=1e-12)
    assert result.repairs == ["component 1 lost all its points: it has weight 0 and its last shape"]
    assert (np.asarray(sample(jax.random.key(0), result.mixture, 50)[1]) == 0).all()


@pytest.mark.slow
def test_too_few_points_warn():
    x = clusters(16, n=40)
    start = start_of(x[:12], "full")
    with pytest.warns(match="12 points for 3 full covariances in 5 dimensions"):
        quiet_fit(Rows(x[:12]), start, max_iterations=1)
    light = np.concatenate([[4.0], np.full(39, 1e-3)])
    with pytest.warns(match=r"a component owns \d\.\d points in 5 dimensions"):
        quiet_fit(Rows(x, weights=light), start, max_iterations=1)
    quiet_fit(Rows(x[:12]), start_of(x[:12], "tied"), max_iterations=1)


# Starts


def test_kmeans_plus_plus_draws_by_squared_distance():
    """Of three points on a line from seed 0: the second is drawn by its squared distance."""
    points = jnp.asarray([[0.0], [1.0], [3.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(key, points, 2)[:, 0]))
    draws = np.asarray(draw(keys))
    first_is_0 = draws[draws[:, 0] == 0, 1]
    assert abs(len(first_is_0) / 4000 - 1 / 3) < 0.03
    assert abs((first_is_0 == 3).mean() - 0.9) < 0.03
    weighted = jnp.asarray([0.0, 1.0, 1.0])
    draw = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(key, points, 2, weighted)[:, 0]))
    assert set(np.unique(draw(keys[:200]))) == {1.0, 3.0}


def test_kmeans_start_finds_clusters_apart():
    """Also in float32, where one of them is so far that norms say nothing of the others."""
    x = clusters(17, n=300, spread=30.0)
    far = np.float32(x + 1e6 * (np.arange(300) < 100)[:, None])
    found = kmeans(jax.random.key(0), Rows(far, chunk_size=100), 4)
    theirs = KMeans(4, init=found, n_init=1, max_iter=1).fit(np.float64(far))
    np.testing.assert_allclose(found, theirs.cluster_centers_, rtol=1e-6, atol=1e-4)
    start = kmeans_start(jax.random.key(0), Rows(x, chunk_size=100), 3, covariances.full)
    labels = responsibilities(cast(start, jnp.float32), jnp.asarray(x, jnp.float32)).argmax(axis=1)
    for k in range(3):
        members = x[np.asarray(labels) == k]
        np.testing.assert_allclose(start.weights[k], len(members) / 300, rtol=1e-12)
        np.testing.assert_allclose(start.means[k], members.mean(axis=0), rtol=1e-9)
        expected = np.cov(members.T, bias=True) + 1e-6 * np.eye(5)
        np.testing.assert_allclose(start.covariance.matrices()[k], expected, rtol=1e-8, atol=1e-9)


# Samples


def example(structure, num=3, d=5):
    return start_of(2 * clusters(18, d=d), structure, num=num)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_moments_of_their_components(structure):
    """Means within 5 standard errors, covariances within 5 of Gaussian fourth moments."""
    mixture = example(structure)
    x, components = jax.jit(sample, static_argnums=2)(jax.random.key(1), mixture, 30_000)
    assert x.dtype == jnp.float32
    x, components = np.asarray(x, float), np.asarray(components)
    shares = np.bincount(components, minlength=3) / 30_000
    np.testing.assert_allclose(shares, mixture.weights, atol=5 * np.sqrt(0.25 / 30_000))
    for k, covariance in enumerate(dense(mixture)):
        members, variances = x[components == k], np.diag(covariance)
        error = np.sqrt(variances / len(members))
        assert np.all(np.abs(members.mean(axis=0) - mixture.means[k]) < 5 * error)
        error = np.sqrt((np.outer(variances, variances) + covariance**2) / len(members))
        assert np.all(np.abs(np.cov(members.T) - covariance) < 5 * error)


@pytest.mark.parametrize("structure", ["full", "low rank"])
def test_draws_of_one_component_are_grouped(structure):
    """Rows come back in their places: components of hardly any width, each at its own mean."""
    mixture = example(structure)
    narrow = jax.tree.map(lambda leaf: 1e-4 * leaf, mixture.covariance)
    mixture = mixture._replace(covariance=narrow)
    for components in ([2, 0, 2, 2, 0], [1], [0] * 300 + [2] * 7, [1, 1, 1]):
        indices = jnp.asarray(components)
        draws = jax.jit(sample_components)(jax.random.key(0), mixture, indices)
        np.testing.assert_allclose(draws, mixture.means[np.array(components)], atol=0.01)
        assert len(np.unique(draws, axis=0)) == len(components)


@pytest.mark.slow
def test_coupled_samples_come_from_the_responsible_component(x64):
    mixture = example("full")
    mixture = mixture._replace(means=np.arange(3.0)[:, None] + mixture.means)
    x1, _ = sample(jax.random.key(0), mixture, 20_000)
    x0, components = jax.jit(sample_coupled)(jax.random.key(1), mixture, x1)
    shares = np.asarray(responsibilities(mixture, x1))
    chosen = np.eye(3)[np.asarray(components)]
    error = np.sqrt((shares * (1 - shares)).sum(axis=0))
    assert np.all(np.abs((chosen - shares).sum(axis=0)) < 5 * error)
    # By the responsibilities and not only on average: E <chosen, shares> = E |shares|^2.
    agreement = (chosen * shares).sum(axis=1) - np.square(shares).sum(axis=1)
    assert abs(agreement.mean()) < 5 * agreement.std() / np.sqrt(20_000)
    assert np.square(shares).sum(axis=1).mean() > 0.4
    expected = mixture.means[np.asarray(components)]
    deviation = np.asarray(x0) - expected
    assert np.all(np.abs(deviation.mean(axis=0)) < 5 * deviation.std(axis=0) / np.sqrt(20_000))


def test_samples_need_no_factor_for_each():
    """512 draws in 512 dimensions: B d d floats would be 512 MiB."""
    num, d, batch = 4, 512, 512
    factors = jax.ShapeDtypeStruct((num, d, d), jnp.float32)
    mixture = Mixture(
        jax.ShapeDtypeStruct((num,), jnp.float32),
        jax.ShapeDtypeStruct((num, d), jnp.float32),
        Full(factors, factors),
    )
    lowered = jax.jit(sample, static_argnums=2).lower(jax.random.key(0), mixture, batch)
    analysis = lowered.compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 16 * 4 * batch * d


# scikit-learn


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scikit_learn_and_back(x64, structure):
    x = clusters(19)
    mixture = quiet_fit(Rows(x, dtype=np.float64), start_of(x, structure), max_iterations=3).mixture
    model = to_sklearn(mixture)
    density = log_prob(mixture, jnp.asarray(x))
    np.testing.assert_allclose(model.score_samples(x), density, rtol=1e-9)
    back = from_sklearn(model)
    np.testing.assert_allclose(dense(back), dense(mixture), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_prob(back, jnp.asarray(x)), density, rtol=1e-9)
    assert model.sample(10)[0].shape == (10, 5)
    assert model.predict(x).shape == (300,)


def test_weights_of_any_dtype_sum_to_1_in_scikit_learn():
    """To what numpy's multinomial asks for, there and back; float64 weights keep their bits."""
    rng, means, one = np.random.default_rng(0), np.zeros((9, 1)), Spherical(np.ones(9), np.ones(1))
    for dtype in [np.float32] * 200 + [np.float64] * 20:
        weights = rng.dirichlet(np.full(9, 0.3)) * (rng.random(9) < 0.8)
        weights = (weights / weights.sum()).astype(dtype)
        model = to_sklearn(jax.tree.map(dtype, Mixture(weights, means, one)))
        assert model.weights_.dtype == model.means_.dtype == model.covariances_.dtype == np.float64
        assert model.sample(5)[0].shape == (5, 1)
        np.testing.assert_allclose(model.weights_, weights, rtol=1e-6)
        assert dtype == np.float32 or np.array_equal(model.weights_, weights)
        model.weights_ = weights  # as scikit-learn leaves those that it fits to float32 data
        assert abs(from_sklearn(model).weights.sum() - 1) < 1e-15
    for bad in ([0.5, 0.6], [1.1, -0.1], [np.nan, 1]):
        with pytest.raises(ValueError, match="weights are >= 0 and sum to 1, got"):
            to_sklearn(Mixture(np.array(bad), means[:2], Spherical(np.ones(2), np.ones(1))))


@pytest.mark.parametrize("structure", SKLEARN)
def test_from_a_fitted_model(structure):
    x = clusters(20)
    model = GaussianMixture(2, covariance_type=structure, random_state=0).fit(x)
    mixture = from_sklearn(model)
    np.testing.assert_allclose(mixture.covariance.matrices(), model.covariances_, rtol=1e-9)
    score = mean_log_likelihood(mixture, Rows(x, dtype=np.float64))
    np.testing.assert_allclose(score, model.score(x), rtol=1e-10)


def test_structures_of_ones_own(x64):
    """Diagonal, spherical and low rank from their parameters, beside the full matrices."""
    x, means = jnp.asarray(clusters(21, n=20)), np.random.default_rng(1).normal(size=(2, 5))
    loadings = np.random.default_rng(2).normal(size=(2, 5, 2))
    scales = np.array([[1.0, 2, 3, 4, 5], [0.5, 1, 1, 1, 2]])
    for covariance in (
        Diagonal(scales),
        Spherical(np.array([0.5, 2.0]), np.ones(5)),
        LowRank(loadings, scales, latent_projections(loadings, scales)),
    ):
        mixture = Mixture(np.array([0.3, 0.7]), means, covariance)
        same = mixture._replace(covariance=from_matrices(dense(mixture)))
        np.testing.assert_allclose(log_prob(mixture, x), log_prob(same, x), rtol=1e-10)
