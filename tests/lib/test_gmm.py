"""Gaussian mixtures against scikit-learn, scipy, closed forms, and themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow
from chunks import interrupt, metrics
from gaussian_mixtures import dense, restricted, weighted_moments
from sklearn.cluster import KMeans
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture

from lib.gmm import (
    Mixture,
    cast,
    covariances,
    from_sklearn,
    log_prob,
    responsibilities,
    sample,
    sample_components,
    sample_coupled,
    to_sklearn,
    without_empty,
)
from lib.gmm import _linalg as linalg
from lib.gmm.covariances import Full, Spherical, from_matrices
from lib.gmm.em import fit, mean_log_likelihood
from lib.gmm.starts import kmeans, kmeans_plus_plus, kmeans_start
from lib.rows import Rows
from lib.rows.files import open_rows
from lib.rows.fourier_means import stream_mean_embeddings
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
    return [name if name in names else slow(name) for name in STRUCTURES]


quiet_fit = partial(fit, show_progress=False)


def clusters(seed, n=300, d=5, num=3, spread=1.5):
    """Points about `num` means, each cluster with a covariance of its own, [n, d] float64."""
    rng = np.random.default_rng(seed)
    means = spread * rng.normal(size=(num, d))
    mixing = rng.normal(size=(num, d, d)) / np.sqrt(d)
    labels = rng.integers(num, size=n)
    return means[labels] + np.einsum("nij,nj->ni", mixing[labels], rng.normal(size=(n, d)))


def start_of(x, structure, num=3):
    """Components of one weight and width about some of the points, in float64."""
    means = x[np.random.default_rng(1).choice(len(x), num, replace=False)]
    with jax.enable_x64(True):
        covariance = STRUCTURES[structure](num, np.full(x.shape[1], x.var(axis=0).mean()))
        return jax.tree.map(np.asarray, Mixture(np.full(num, 1 / num), means, covariance))


def kmeans_start_of(x, structure, num=3, weights=None, **options):
    data = Rows(x, weights=weights, dtype=np.float64)
    return kmeans_start(jax.random.key(0), data, num, STRUCTURES[structure], **options)


def test_sums_skip_rows_without_weight(x64):
    """From no row with weight to all of them, scattered, in each of the sizes and between."""
    rng, lengths = np.random.default_rng(0), []

    def sums(x, weights):
        lengths.append(len(x))
        return weights @ x

    x = jnp.asarray(rng.normal(size=(64, 3)))
    cut = jax.jit(partial(linalg.over_responsible, sums))
    for active in (0, 1, 7, 8, 9, 16, 31, 48, 49, 63, 64):
        weights = rng.permutation(np.arange(64) < active) * (rng.random(64) + 0.1)
        np.testing.assert_allclose(cut(x, weights), weights @ x, rtol=1e-12, atol=1e-14)
    assert sorted(set(lengths)) == [0, 8, 16, 32, 48, 64]


def sklearn_fit(x, start, **options):
    model = to_sklearn(start)
    starts = {"weights_init": model.weights_, "means_init": model.means_}
    starts |= {"precisions_init": model.precisions_, "init_params": "random_from_data"}
    return model.set_params(**starts, random_state=0, **options).fit(x)


# EM


@pytest.mark.parametrize(
    ("structure", "d"),
    [
        ("tied", 5),
        ("diag", 5),
        ("full", 67),
        slow("full", 5),
        slow("spherical", 5),
        slow("tied", 67),
    ],
)
def test_every_iteration_is_scikit_learns(structure, d):
    """Also where triangles are taken in panels."""
    x = clusters(2, n=400, d=d)
    start = start_of(x, structure)
    with pytest.warns(match="did not converge"):
        theirs = sklearn_fit(x, start, tol=0, max_iter=10)
    data = Rows(x, dtype=np.float64, block_size=64, chunk_size=150)
    ours = quiet_fit(data, start, tolerance=0.0, max_iterations=10)
    assert not ours.converged
    assert not ours.ridges.any()
    np.testing.assert_allclose(ours.log_likelihoods, theirs.lower_bounds_, rtol=1e-9)
    assert np.ptp(ours.log_likelihoods) > 0.1
    np.testing.assert_allclose(ours.mixture.weights, theirs.weights_, rtol=1e-9)
    np.testing.assert_allclose(ours.mixture.means, theirs.means_, rtol=1e-8, atol=1e-10)
    matrices = ours.mixture.covariance.matrices()
    np.testing.assert_allclose(matrices, theirs.covariances_, rtol=1e-8, atol=1e-10)


def test_converges_as_scikit_learn():
    x = clusters(10)
    start = start_of(x, "full")
    result = quiet_fit(Rows(x, dtype=np.float64), start)
    assert result.converged
    assert len(result.log_likelihoods) == sklearn_fit(x, start).n_iter_ < 100


@pytest.mark.parametrize("structure", ["full", slow("tied"), "diag", slow("spherical")])
def test_start_from_clusters(structure):
    """Means and covariances by their definitions, with weights of the points; also of clusters 1e8
    standard deviations apart, which leave nothing of a second moment about the mean of all."""
    x, weights, ridge = clusters(3, n=90), np.random.default_rng(0).random(90), 0.01
    apart = x + 1e8 * (np.arange(90)[:, None] % 3)
    for rows, atol in ((x, 1e-12), (apart, 1e-7)):
        data = Rows(rows, weights=weights, dtype=np.float64)
        centers = kmeans(jax.random.key(0), data, 3)
        start = kmeans_start_of(rows, structure, weights=weights, regularization=ridge)
        labels = np.square(rows[:, None] - centers).sum(axis=2).argmin(axis=1)
        means, moments, counts = weighted_moments(rows, np.eye(3)[labels] * weights[:, None])
        np.testing.assert_allclose(start.weights, counts / counts.sum(), rtol=1e-12)
        np.testing.assert_allclose(start.means, means, rtol=1e-10, atol=1e-12)
        expected = restricted(structure, moments + ridge * np.eye(5), counts / counts.sum())
        np.testing.assert_allclose(start.covariance.matrices(), expected, rtol=1e-10, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_float32_products_beside_float64(structure):
    """With constant features, and eigenvalues that a Gram matrix purely in float32 would lose."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    x = 0.5 + (clusters(4, n=3000, d=24) * np.geomspace(0.3, 1e-3, 24)) @ basis
    x[:, :3] = [0.25, 0.0, 1.0]
    start = kmeans_start_of(x, structure, max_passes=0)
    histories = [
        quiet_fit(Rows(x, dtype=dtype), start, tolerance=0.0, max_iterations=8).log_likelihoods
        for dtype in (np.float32, np.float64)
    ]
    assert np.abs(histories[0] - histories[1]).max() < 1e-4 * 24
    assert histories[0][-1] > histories[0][0] + 0.1


@pytest.mark.slow
def test_low_rank_climbs_to_factor_analysis():
    """With one component: scikit-learn's FactorAnalysis; with three no step goes down."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 12)) + 0.7 * rng.normal(size=(500, 12))
    data, climb = Rows(x, dtype=np.float64), partial(quiet_fit, regularization=0.0)
    start = start_of(x, "low rank", num=1)
    result = climb(data, start, tolerance=1e-8, max_iterations=500)
    assert result.converged
    theirs = FactorAnalysis(2, svd_method="lapack", tol=1e-10, max_iter=5000).fit(x).score(x)
    np.testing.assert_allclose(mean_log_likelihood(result.mixture, data), theirs, atol=1e-6)
    x = clusters(9)
    start = start_of(x, "low rank")
    result = climb(Rows(x, dtype=np.float64), start, tolerance=0.0, max_iterations=40)
    assert np.diff(result.log_likelihoods).min() > -1e-12


def test_arrays_and_files_of_the_same_rows_are_fitted_alike(tmp_path):
    """EM from k-means, and mean embeddings: array, memory map, .npy, .pt, all in the same bits."""
    x = clusters(3).astype("f")
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.from_numpy(x), tmp_path / "x.pt")
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    files = [open_rows(tmp_path / name) for name in ("x.npy", "x.pt")]
    results, frequencies = [], jax.random.normal(jax.random.key(1), (4, x.shape[1]))
    for source in (x, jnp.asarray(x), mapped, *files):
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
def test_held_out_data_stop_the_fit():
    """Few points in many dimensions: held-out likelihood falls while training's rises."""
    x = clusters(11, n=200, d=8, num=2)
    train, held_out = (Rows(part, dtype=np.float64) for part in (x[:60], x[60:]))
    start = kmeans_start_of(x[:60], "full", regularization=0.01)
    result = quiet_fit(train, start, held_out=held_out, tolerance=0.0, regularization=0.01)
    assert result.converged
    assert len(result.held_out) == len(result.log_likelihoods) + 1 < 100
    best = result.held_out.argmax()
    assert best == len(result.held_out) - 2
    np.testing.assert_allclose(
        mean_log_likelihood(result.mixture, held_out), result.held_out[best], rtol=1e-12
    )


def test_resumes_to_the_same_bits(run, monkeypatch):
    x = clusters(12)
    start, data = start_of(x, "full"), Rows(x)
    options = {"tolerance": 0.0, "max_iterations": 6}
    whole = quiet_fit(data, start, **options)
    interrupt(monkeypatch, partial(quiet_fit, data, start, run=run, **options), 3)
    resumed = quiet_fit(data, start, run=run, **options)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    logged = [(row["step"], row["log_likelihood"]) for row in metrics(run)]
    assert logged == list(enumerate(whole.log_likelihoods))
    again = quiet_fit(data, start, run=run, **options)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    other = start._replace(means=start.means + 1), Rows(x, transform=jnp.tanh)
    with pytest.raises(RunFileError, match="another start, data, tolerance,"):
        quiet_fit(other[1], other[0], run=run, **options | {"tolerance": 1e-9})


# Bad data: errors and repairs


X = clusters(13, n=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda start: Rows(X[:, 0]), r"got shape \(20,\)"),
        (lambda start: Rows(X, weights=-np.ones(20)), "weights must be finite and >= 0"),
        (lambda start: Rows(X, dtype=np.int32), "float32 or float64, got int32"),
        (lambda start: quiet_fit(Rows(X[:2]), start), "3 components, but 2 points"),
        (lambda start: kmeans(jax.random.key(0), Rows(X), 21), "21 components, but 20 points"),
        (lambda start: quiet_fit(Rows(X[:, :4]), start), "the data have dimension 4, the start 5"),
        (lambda start: quiet_fit(Rows(X), start, regularization=-1.0), "regularization must be"),
        (
            lambda _: covariances.low_rank(jax.random.key(0), 5)(1, jnp.ones(5)),
            "rank .* below d = 5",
        ),
        (lambda start: from_matrices(-np.eye(3)), "not positive definite"),
        (lambda start: from_sklearn(GaussianMixture()), "has not been fitted"),
        (lambda start: log_prob(start, jnp.ones((20, 3))), r"points are \[n, 5\], .* \(20, 3\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(start_of(X, "full"))


def test_what_is_not_finite_is_named():
    bad = X.copy()
    bad[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"the data: NaN or infinity in 1 of 20 rows, .* row 7"):
        Rows(bad)
    with pytest.raises(FloatingPointError, match="the transform makes NaN"):
        quiet_fit(Rows(X, transform=jnp.sqrt), start_of(X, "full"))


@pytest.mark.parametrize("structure", quick("full"))
def test_constant_features_are_given_a_ridge(structure):
    """Without regularization: recorded, and with it not needed."""
    x = clusters(14, n=200)
    x[:, 1] = 3.0
    data = Rows(x, dtype=np.float64)
    start = start_of(x, structure)
    assert not quiet_fit(data, start, max_iterations=3).ridges.any()
    result = quiet_fit(data, start, max_iterations=3, regularization=0.0)
    needed = structure != "spherical"
    assert (result.ridges.any(), len(result.repairs)) == (needed, 3 if needed else 0)
    if needed:
        assert "a ridge of at most" in result.repairs[0]
        assert result.ridges.max() < 1e-9
    assert np.isfinite(result.log_likelihoods).all()


def test_a_ridge_rises_until_a_factor_exists(x64):
    """A matrix with an eigenvalue of -1e-3: the ridge passes it, tenfold at a time."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    matrix = basis @ np.diag([-1e-3, 1, 1, 2, 2, 3]) @ basis.T
    factorize = jax.jit(linalg.factorize)
    cholesky, inverse, ridge = factorize(matrix)
    assert 1e-3 < ridge < 1.1e-2
    expected = matrix + float(ridge) * np.eye(6)
    np.testing.assert_allclose(cholesky @ cholesky.T, expected, atol=1e-12)
    np.testing.assert_allclose(inverse @ cholesky, np.eye(6), atol=1e-10)
    assert factorize(expected)[2] == 0
    assert np.isnan(factorize(np.full((6, 6), np.nan))[0]).any()


@pytest.mark.slow
def test_duplicated_points():
    """A single point has a singular covariance; k-means wants as many points as components."""
    x = np.ones((30, 2))
    data = Rows(x, dtype=np.float64)
    with pytest.raises(ValueError, match="2 components, but 1 distinct points"):
        kmeans(jax.random.key(0), data, 2)
    start = kmeans_start_of(x, "full", num=1, regularization=0.0)
    result = quiet_fit(data, start, regularization=0.0, max_iterations=3)
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
    (repair,) = result.repairs
    assert repair.startswith("component 1 lost all its points: it has weight 0 and its last shape")
    smaller = without_empty(result.mixture)
    assert smaller.means.shape == (1, x.shape[1])
    densities = (jax.jit(log_prob)(mixture, x[:5]) for mixture in (smaller, result.mixture))
    np.testing.assert_allclose(*densities, rtol=1e-5)
    draw = jax.jit(sample, static_argnums=2)
    assert (np.asarray(draw(jax.random.key(0), result.mixture, 50)[1]) == 0).all()


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


def test_kmeans_plus_plus_draws_by_squared_distance():
    """Of three points on a line from seed 0: the second is drawn by its squared distance."""
    points = jnp.asarray([[0.0], [1.0], [3.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: kmeans_plus_plus(key, points, 2, jnp.ones(3))[:, 0]))
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
    centers = kmeans(jax.random.key(0), Rows(far, chunk_size=100), 4)
    theirs = KMeans(4, init=centers, n_init=1, max_iter=1).fit(np.float64(far))
    np.testing.assert_allclose(centers, theirs.cluster_centers_, rtol=1e-6, atol=1e-4)
    scaled = kmeans(jax.random.key(0), Rows(4 * far, chunk_size=100), 4)
    np.testing.assert_array_equal(scaled, 4 * centers)
    start = kmeans_start(jax.random.key(0), Rows(x, chunk_size=100), 3, covariances.full)
    shares = jax.jit(responsibilities)(cast(start, jnp.float32), x.astype("f"))
    for k in range(3):
        members = x[np.asarray(shares).argmax(axis=1) == k]
        np.testing.assert_allclose(start.weights[k], len(members) / 300, rtol=1e-12)
        np.testing.assert_allclose(start.means[k], members.mean(axis=0), rtol=1e-9)
        expected = np.cov(members.T, bias=True) + 1e-6 * np.eye(5)
        np.testing.assert_allclose(start.covariance.matrices()[k], expected, rtol=1e-8, atol=1e-9)


# Samples


def example(structure, num=3, d=5):
    return kmeans_start_of(2 * clusters(18, d=d), structure, num=num)


@pytest.mark.parametrize("structure", quick("full"))
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


@pytest.mark.parametrize("structure", ["full", slow("low rank")])
def test_draws_of_one_component_are_grouped(structure):
    """Rows come back in their places: components of hardly any width, each at its own mean."""
    mixture = example(structure)
    narrow = jax.tree.map(lambda leaf: 1e-4 * leaf, mixture.covariance)
    mixture = mixture._replace(covariance=narrow)
    for components in ([2, 0, 2, 2, 0], [1], [0] * 300 + [2] * 7, [1] * 300):
        draws = jax.jit(sample_components)(jax.random.key(0), mixture, jnp.asarray(components))
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


@pytest.mark.parametrize("structure", quick("tied"))
def test_scikit_learn_and_back(x64, structure):
    """Of a mixture that we fitted, and of those that scikit-learn did."""
    x = clusters(19)
    data = Rows(x, dtype=np.float64)
    ours = quiet_fit(data, start_of(x, structure), max_iterations=3).mixture
    model = to_sklearn(ours)
    density = jax.jit(log_prob)(ours, x)
    np.testing.assert_allclose(model.score_samples(x), density, rtol=1e-9)
    with jax.enable_x64(False):
        single = jax.jit(log_prob)(ours, jnp.asarray(x, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, density, atol=2e-5)
    np.testing.assert_allclose(dense(from_sklearn(model)), dense(ours), rtol=1e-9, atol=1e-12)
    assert (model.sample(10)[0].shape, model.predict(x).shape) == ((10, 5), (300,))
    models = [model]
    if structure in SKLEARN:
        models += [GaussianMixture(2, covariance_type=structure, random_state=0).fit(x)]
    for model in models:
        back = from_sklearn(model)
        np.testing.assert_allclose(back.covariance.matrices(), model.covariances_, rtol=1e-9)
        np.testing.assert_allclose(mean_log_likelihood(back, data), model.score(x), rtol=1e-10)


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
