"""Sources of flow matching against closed forms, scipy, scikit-learn and loops in numpy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from gaussian_mixtures import moments
from scipy import fft, stats
from sklearn.decomposition import PCA

from lib import gmm
from xp_gmm_source import shaped_sources as shaped
from xp_gmm_source import sources

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def images(n=40, height=6, width=5, channels=1, seed=0):
    """Smooth images in [-1, 1], so that low frequencies have the most energy."""
    rough = np.random.default_rng(seed).normal(size=(n, height + 2, width + 2, channels))
    smooth = sum(rough[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return np.tanh(smooth / 3 + 0.3).astype(np.float32)


def mixture(structure, d=6):
    rng = np.random.default_rng(1)
    means, roots = rng.normal(size=(3, d)), rng.normal(size=(3, d, d)) / np.sqrt(d)
    matrices = roots @ np.swapaxes(roots, 1, 2) + 0.1 * np.eye(d)
    scales, loadings = rng.uniform(0.3, 1.5, size=(3, d)), roots[..., :2]
    match structure:
        case "full" | "tied":
            covariance = gmm.from_matrices(matrices if structure == "full" else matrices[0])
        case "diag":
            covariance = gmm.Diagonal(scales)
        case "spherical":
            covariance = gmm.Spherical(scales[:, 0], np.ones(d))
        case "low rank":
            projections = np.asarray(gmm.latent_projections(loadings, scales))
            covariance = gmm.LowRank(loadings, scales, projections)
    return gmm.Mixture(np.array([0.5, 0.3, 0.2]), means, covariance)


def projection(p=6, d=9):
    rng = np.random.default_rng(2)
    return sources.Projection(np.linalg.qr(rng.normal(size=(d, p)))[0].T, rng.normal(size=d))


@partial(jax.jit, static_argnums=1)
def drawn(source, num):
    return source.sample(KEY, num)


def assert_standard(draws):
    """Mean 0 and variance 1 in every coordinate, up to five standard errors of each."""
    draws = np.asarray(draws, np.float64)
    squares = np.square(draws)
    errors = np.sqrt((np.square(squares).mean(axis=0) - 1) / len(draws))
    assert np.abs(draws.mean(axis=0)).max() < 5 / np.sqrt(len(draws))
    assert (np.abs(squares.mean(axis=0) - 1) < 5 * errors).all()


@cache
def every_source():
    color = images(60, 8, 8, 3)
    return {
        "gaussian": sources.gaussian(192),
        "norm aligned": sources.norm_aligned(color),
        "mixture": sources.mixture_source(mixture("spherical", 192)),
        "projected": sources.mixture_source(mixture("diag", 6), pca=projection(6, 192)),
        "mode coupled": sources.mode_coupled_source(mixture("tied", 6), pca=projection(6, 192)),
        "frequency": shaped.frequency_source(color, masked_share=0.5),
        "pruned": shaped.pruned(color, axis_threshold=0.2, threshold=0.15),
    }


@pytest.mark.parametrize(
    "name",
    [
        slow("gaussian"),
        "norm aligned",
        "mixture",
        slow("projected"),
        "mode coupled",
        "frequency",
        "pruned",
    ],
)
def test_sources_are_pytrees_that_jit_takes_as_arguments(name):
    source = every_source()[name]
    x1 = jnp.asarray(RNG.normal(size=(7, 192)), jnp.float32)
    copied = jax.tree.map(lambda leaf: leaf + 0, source)
    sampled = jax.jit(lambda s, key: s.sample(key, 7))(copied, KEY)
    coupled = jax.jit(lambda s, key, x: s.couple(key, x))(copied, KEY, x1)
    assert sampled.shape == coupled.shape == (7, 192)
    assert sampled.dtype == coupled.dtype == jnp.float32
    np.testing.assert_allclose(sampled, source.sample(KEY, 7), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coupled, source.couple(KEY, x1), rtol=1e-4, atol=1e-4)
    if name not in ("mode coupled", "pruned"):  # couplings that do not look at the data
        np.testing.assert_array_equal(source.couple(KEY, -x1), source.sample(KEY, 7))
    assert np.abs(sampled - source.sample(jax.random.key(1), 7)).max() > 0.1
    with pytest.raises(ValueError, match=r"points are \[B, 192\], got shape \(7, 191\)"):
        source.couple(KEY, x1[:, :191])


def test_gaussian_draws_have_its_scale():
    for dimension in (1, 2, 64, 3072):
        expected = stats.chi(dimension).mean()
        assert sources.mean_norm(dimension) == pytest.approx(expected, rel=1e-9)
    assert_standard(sources.gaussian(5, scale=3.0).sample(KEY, 20_000) / 3)


def test_norm_aligned_draws_have_the_mean_norm_of_the_data():
    data = images(5000, seed=4)  # two chunks
    norms = np.linalg.norm(data.reshape(len(data), -1), axis=1)
    lengths = np.linalg.norm(drawn(sources.norm_aligned(data), 20_000), axis=1)
    error = lengths.std() / np.sqrt(20_000)
    assert lengths.mean() == pytest.approx(norms.mean(), abs=5 * error)
    assert error < 0.002 * norms.mean()


@pytest.mark.parametrize("structure", ["full", "tied", "diag", "spherical", "low rank"])
@pytest.mark.parametrize("pca", [None, projection()], ids=["pixels", "pca"])
def test_mixture_draws_are_standardized_by_moments_of_dense_covariances(structure, pca):
    m = mixture(structure)
    mean, covariance = moments(m, pca)
    drawn_mean, drawn_std = sources.moments_of(m, pca)
    np.testing.assert_allclose(drawn_mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.square(drawn_std), np.diag(covariance), rtol=1e-9)
    assert_standard(sources.mixture_source(m, pca=pca).sample(KEY, 8000))


def test_projection_maps_back_as_scikit_learn_does():
    data = images(50).reshape(50, -1).astype(np.float64)
    pca = PCA(4).fit(data)
    fitted = sources.Projection(pca.components_, pca.mean_)
    mean, std = RNG.normal(size=30), RNG.uniform(0.5, 2, size=30)
    source = sources.mixture_source(mixture("full", 4), mean=mean, std=std, pca=fitted)
    coordinates = RNG.normal(size=(8, 4)).astype(np.float32)
    expected = (pca.inverse_transform(coordinates) - mean) / std
    standard = source.standardize(jnp.asarray(coordinates))
    np.testing.assert_allclose(standard, expected, rtol=1e-4, atol=1e-5)
    back = source.coordinates(jnp.asarray(data, jnp.float32))
    np.testing.assert_allclose(back, pca.transform(data), atol=1e-4)


def test_statistics_of_channels_repeat_over_pixels():
    statistics = {"mean": np.arange(3.0), "std": np.arange(1.0, 4)}
    repeated = {name: np.tile(values, 4) for name, values in statistics.items()}
    few, many = (sources.mixture_source(mixture("full", 12), **s) for s in (statistics, repeated))
    np.testing.assert_array_equal(drawn(few, 5), drawn(many, 5))


@pytest.mark.parametrize("pca", [None, projection(2, 5)], ids=["pixels", "pca"])
def test_mode_coupled_draws_follow_the_responsibilities(pca):
    means = np.array([[-1.0, 0], [1, 0], [0, 1.5]])
    m = gmm.Mixture(np.array([0.5, 0.3, 0.2]), means, gmm.Diagonal(np.full((3, 2), 0.4)))
    point = np.array([0.05, 0.5])
    joint = m.weights * stats.norm(means, 0.4).pdf(point).prod(axis=1)
    shares = joint / joint.sum()
    assert shares.min() > 0.05
    source = sources.mode_coupled_source(m, pca=pca)
    x1 = point if pca is None else pca.center + point @ pca.components
    x1 = jnp.tile(jnp.asarray(x1, jnp.float32)[None], (6000, 1))
    x0 = np.asarray(jax.jit(lambda source, x1: source.couple(KEY, x1))(source, x1), np.float64)
    draws = x0 * np.asarray(source.source.std) + np.asarray(source.source.mean)
    draws = draws if pca is None else (draws - pca.center) @ pca.components.T
    # The draws are of sum_k p(k | x1) N(mu_k, .16 I): its mean and covariance identify p(k | x1).
    mean, covariance = moments(m._replace(weights=shares))
    errors = 5 * draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - mean) < errors).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=5 / np.sqrt(len(draws)))
    np.testing.assert_array_equal(source.sample(KEY, 9), source.source.sample(KEY, 9))


def dct_statistics(data, block):
    """By scipy, block by block: mean and variance [down, across, channels]."""
    color = shaped.YCRCB if data.shape[3] == 3 else np.eye(1)
    height, width = data.shape[1:3]
    down, across = (block or height), (block or width)
    padding = ((0, 0), (0, -height % down), (0, -width % across), (0, 0))
    padded = np.pad(data.astype(np.float64), padding, mode="edge") @ color.T
    blocks = padded.reshape(
        len(data), padded.shape[1] // down, down, padded.shape[2] // across, across, -1
    )
    coefficients = fft.dctn(blocks, axes=(2, 4), norm="ortho")
    return coefficients.mean(axis=(0, 1, 3)), coefficients.var(axis=(0, 1, 3))


@pytest.mark.parametrize(
    ("shape", "block", "share"),
    [
        slow((8, 8, 1), 8, 0.6),
        ((6, 5, 1), None, 0.5),
        ((12, 10, 3), 8, 0.6),
        slow((7, 7, 1), 4, 0.3),
        slow((5, 6, 1), 8, 0.3),
    ],
)
def test_frequency_statistics_are_scipys_and_draws_are_standardized(shape, block, share):
    data = images(30, *shape)
    expected = dct_statistics(data, block)
    for statistic, exact in zip(shaped.frequency_statistics(data, block=block), expected):
        np.testing.assert_allclose(statistic, exact, atol=1e-10)
    source = shaped.frequency_source(data, masked_share=share, block=block)
    assert_standard(drawn(source, 8000))
    assert np.ptp(np.asarray(source.std)) > 1e-3 * np.asarray(source.std).max()


def test_masked_coefficients_are_zero_before_standardization():
    source = shaped.frequency_source(images(30, 16, 8, 3), masked_share=0.4)
    draws = np.asarray(drawn(source, 50)).reshape(50, 16, 8, 3) * np.asarray(source.std)
    bands = np.moveaxis(draws @ shaped.YCRCB.T, 3, 1).reshape(50, 3, 2, 8, 8)
    coefficients = fft.dctn(bands, axes=(3, 4), norm="ortho")  # [n, channel, block, p, q]
    deviations = coefficients.std(axis=(0, 2))
    kept = np.moveaxis(np.asarray(source.kept), 2, 0).reshape(3, 2, 8, 8)
    np.testing.assert_array_equal(kept[:, 0], kept[:, 1])
    kept = kept[:, 0] == 1
    assert round(0.4 * 192) == np.sum(~kept)
    assert deviations[~kept].max() < 1e-5
    # Y = .299 R + .587 G + .114 B, Cr = .713 (R - Y), Cb = .564 (B - Y) (ITU-R 601).
    luminance = np.array([0.299, 0.587, 0.114])
    red, blue = np.eye(3)[[0, 2]] - luminance
    np.testing.assert_allclose(shaped.YCRCB, [luminance, 0.713 * red, 0.564 * blue], atol=1e-12)
    # Luminance of white noise has the variance .299^2 + .587^2 + .114^2, the chrominances theirs.
    expected = np.broadcast_to(np.linalg.norm(shaped.YCRCB, axis=1)[:, None, None], (3, 8, 8))
    np.testing.assert_allclose(deviations[kept], expected[kept], rtol=5 / np.sqrt(2 * 100))


def test_least_energy_is_masked_and_nothing_masked_is_white_noise():
    data = images(30, 8, 8)
    mean, variance = dct_statistics(data, 8)
    source = shaped.frequency_source(data, masked_share=0.5)
    energy, kept = np.square(mean) + variance, np.asarray(source.kept) == 1
    assert energy[~kept].max() <= energy[kept].min()
    white = shaped.frequency_source(data, masked_share=0.0)
    np.testing.assert_allclose(white.std, 1, rtol=1e-5)
    draws = np.asarray(drawn(white, 5000))
    off_diagonal = np.corrcoef(draws.T) - np.eye(64)
    assert np.abs(off_diagonal).max() < 6 / np.sqrt(5000)


def test_published_rule_is_of_pixels_in_0_to_255():
    data = images(30, 8, 8) / 40
    coefficients = fft.dctn(127.5 * (data.astype(float) + 1)[..., 0], axes=(1, 2), norm="ortho")
    for bounds in ((0.5, 30.0), (1.0, 60.0)):
        masked = np.abs(coefficients.mean(axis=0)) < bounds[0]
        masked &= coefficients.var(axis=0) < bounds[1]
        assert 0 < masked.sum() < 63
        source = shaped.frequency_source(data, thresholds=bounds)
        np.testing.assert_array_equal(np.asarray(source.kept)[..., 0] == 0, masked)
    # The mean level is never masked, whatever the bounds.
    assert float(shaped.frequency_source(data, thresholds=(1e9, 1e9)).kept.sum()) == 1


def test_data_sparse_axes_are_those_of_scikit_learn():
    data = images(300, 5, 5) + 0.3
    rows = data.reshape(300, -1).astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    components = PCA().fit(rows).components_
    axes = np.concatenate([components, -components])
    expected = axes[(axes @ rows.T).max(axis=1) <= 0.2]
    source = shaped.pruned(data, axis_threshold=0.2, threshold=0.3)
    assert 2 <= len(expected) < 50
    cosines = np.asarray(source.axes) @ expected.T
    assert len(source.axes) == len(expected)
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-4)
    np.testing.assert_array_equal(np.sort(cosines.argmax(axis=1)), np.arange(len(expected)))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_pruned_draws_keep_to_the_rule_and_have_the_law_of_rejection(scale):
    data = images(300, 5, 5) + 0.3
    source = shaped.pruned(data, axis_threshold=0.2, threshold=0.25, scale=scale)
    axes = np.asarray(source.axes, np.float64)

    def largest(points):
        points = np.asarray(points, np.float64)
        return (points @ axes.T / np.linalg.norm(points, axis=1, keepdims=True)).max(axis=1)

    proposals = scale * np.random.default_rng(5).normal(size=(20_000, 25))
    accepted = proposals[largest(proposals) <= 0.25]
    rate = len(accepted) / len(proposals)
    assert 0.02 < rate < 0.5
    error = 5 * np.sqrt(2 * rate / 20_000)
    assert float(shaped.acceptance(KEY, source, 20_000)) == pytest.approx(rate, abs=error)
    draws = np.asarray(source.sample(KEY, 3000))
    assert np.isfinite(draws).all()
    assert largest(draws).max() <= 0.25 + 1e-5
    assert len(np.unique(draws, axis=0)) == 3000
    for statistic in (largest, lambda x: np.linalg.norm(x, axis=1), lambda x: x[:, 0]):
        assert stats.ks_2samp(statistic(draws), statistic(accepted)).pvalue > 1e-3


def test_what_cannot_be_accepted_is_nan():
    source = shaped.pruned(images(300, 5, 5) + 0.3, axis_threshold=0.2, threshold=-1.0)
    assert float(shaped.acceptance(KEY, source, 1000)) == 0
    assert np.isnan(source.sample(KEY, 20, max_tries=3)).all()
    coupled = source.couple(KEY, jnp.ones((4, 25)))
    np.testing.assert_array_equal(coupled, source.gaussian.sample(KEY, 4))
    partly = source._replace(threshold=jnp.float32(0.25))
    draws = np.asarray(partly.sample(KEY, 200, max_tries=1))
    finite = np.isfinite(draws).all(axis=1)
    assert 0 < finite.sum() < 200
    np.testing.assert_array_equal(np.isnan(draws).all(axis=1), ~finite)
    assert bool(partly.accepts(jnp.asarray(draws[finite])).all())


def test_quantiles_of_cosines():
    assert shaped.cosine_quantile(0.048, 3072) == pytest.approx(0.9961, abs=5e-5)
    noise = np.random.default_rng(6).normal(size=(40_000, 16))
    cosines = noise[:, 0] / np.linalg.norm(noise, axis=1)
    assert shaped.cosine_quantile(0.3, 16) == pytest.approx(np.mean(cosines <= 0.3), abs=0.01)
    # Near the normal law of variance 1 / d.
    near = stats.norm.cdf(0.048 * np.sqrt(3072))
    assert shaped.cosine_quantile(0.048, 3072) == pytest.approx(near, abs=1e-4)
    assert shaped.cosine_quantile(shaped.cosine_threshold(0.99, 50), 50) == pytest.approx(0.99)


IMAGES, CONSTANT = images(), np.full_like(images(), 0.5)
BROKEN, GRAY = np.where(np.arange(40)[:, None, None, None] == 3, np.nan, IMAGES), IMAGES[..., 0]
FADING = IMAGES * np.arange(40, dtype=np.float32)[:, None, None, None]
of_mixture = partial(sources.mixture_source, mixture("full"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sources.norm_aligned(BROKEN), "image 3 is not finite"),
        (lambda: sources.check_images(BROKEN), "image 3 is not finite"),
        (lambda: sources.norm_aligned(GRAY), r"\[n, height, .*, got shape \(40, 6, 5\)"),
        (lambda: sources.norm_aligned(np.zeros((3, 4, 4, 1), np.uint8)), "got uint8"),
        (lambda: sources.check_images(IMAGES[:0]), r"got shape \(0, 6, 5, 1\)"),
        (lambda: sources.norm_aligned(0 * IMAGES), "0 < scale"),
        (lambda: sources.gaussian(5, scale=0.0), "scale"),
        (lambda: sources.gaussian(0), "d >= 1"),
        (lambda: of_mixture(mean=np.zeros(6)), "both mean and std"),
        (lambda: of_mixture(mean=np.zeros(5), std=np.ones(5)), r"mean must .* \[6\], got \(5,\)"),
        (lambda: of_mixture(mean=np.zeros(6), std=np.ones((6, 1))), r"std must be .*\(6, 1\)"),
        (lambda: of_mixture(mean=np.full(6, np.nan), std=np.ones(6)), "finite"),
        (lambda: of_mixture(mean=np.zeros(6), std=np.zeros(6)), "not 0 everywhere"),
        (lambda: of_mixture(pca=projection(5)), r"components \[5, 9\]"),
        (lambda: of_mixture(pca=projection()._replace(center=np.zeros(8))), r"a center \(8,\)"),
        (lambda: shaped.frequency_source(IMAGES), "either masked_share or thresholds"),
        (lambda: shaped.frequency_source(IMAGES, masked_share=0.3, thresholds=(1, 1)), "either"),
        (lambda: shaped.frequency_source(IMAGES, masked_share=1.0), r"\[0, 1\), got 1.0"),
        (lambda: shaped.frequency_source(IMAGES, masked_share=0.3, block=0), "block"),
        (lambda: shaped.frequency_source(images(channels=2), masked_share=0.3), "channels, got 2"),
        (lambda: shaped.frequency_source(CONSTANT, masked_share=0.3), "all the same"),
        (lambda: shaped.frequency_source(BROKEN, masked_share=0.3), "image 3 is not finite"),
        (lambda: shaped.pruned(BROKEN, threshold=0.1), "image 3 is not finite"),
        (lambda: shaped.pruned(FADING, threshold=0.1), "image 0 is 0"),
        (lambda: shaped.pruned(CONSTANT, threshold=0.1), "all have one direction"),
        (lambda: shaped.pruned(IMAGES, threshold=1.5), "threshold is a cosine, got 1.5"),
        (lambda: shaped.pruned(IMAGES, threshold=0.1, axis_threshold=np.nan), "axis_threshold is"),
        (lambda: shaped.pruned(IMAGES, threshold=0.1, scale=-1.0), "scale"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
