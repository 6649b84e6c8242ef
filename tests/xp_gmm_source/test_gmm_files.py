"""gmm_fit.py, its files, and the PyTorch sampler, against scikit-learn, torch and closed forms."""

import dataclasses
import importlib
import pickle
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import joblib
import numpy as np
import pytest
import torch
from gaussian_mixtures import dense, moments
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch.utils._python_dispatch import TorchDispatchMode

from lib import gmm, runs
from xp_gmm_source import convert, gmm_files, gmm_fit
from xp_gmm_source.config import FitConfig
from xp_gmm_source.sources import moments_of
from xp_gmm_source.torch_sampler import GMM_TORCH

SHAPE = 3, 2, 3  # height, width, channels: no two orders of the pixels are alike
KINDS = ("full", "tied", "diag", "spherical")


def images_of(num, shape=SHAPE, seed=0):
    """Two kinds of uint8 images, with pixels that hang together."""
    rng, d = np.random.default_rng(seed), int(np.prod(shape))
    pixels = 128 + rng.normal(size=(num, d)) @ rng.normal(size=(d, d)) * 10
    pixels += np.where(rng.random(num) < 0.4, -30, 30)[:, None] * rng.random(d)
    return np.clip(pixels, 0, 255).astype(np.uint8).reshape(num, *shape)


def fitted(kind="full", *, pca=None, engine="jax", shape=SHAPE):
    settings = {"max_iter": 3, "reg_covar": 1e-3, "rank": 2, "dtype": "float64"}
    config = FitConfig(n_components=2, covariance_type=kind, n_pca=pca, engine=engine, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = gmm_fit.fit_images(config, images_of(200, shape), show_progress=False)
    statistics = moments_of(fit.mixture, fit.projection)
    return gmm_files.ImageMixture(fit.mixture, fit.projection, *statistics, shape, {"a": 1})


@pytest.fixture(scope="module")
def stored():
    """One mixture of each kind, and one behind a PCA."""
    kinds = {kind: fitted(kind, engine="sklearn") for kind in KINDS}
    return kinds | {"low_rank": fitted("low_rank"), "pca": fitted(pca=5, engine="sklearn")}


of_all_kinds = pytest.mark.parametrize("name", [*KINDS, "low_rank", "pca"])


def density(mixture, points):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(gmm.log_prob)(mixture, points))


@of_all_kinds
def test_npz_keeps_every_bit(stored, name, tmp_path):
    whole, path = stored[name], tmp_path / "mixture.npz"
    gmm_files.save(path, whole)
    loaded = gmm_files.load(path)
    page = (Path(gmm_fit.__file__).parent / "README.md").read_text()
    assert all(f"`{key}`" in page for key in np.load(path))
    assert (loaded.image_shape, loaded.about) == (SHAPE, {"a": 1})
    assert type(loaded.mixture.covariance) is type(whole.mixture.covariance)
    for a, b in (
        *zip(loaded.mixture[:2], whole.mixture[:2]),
        *zip(loaded.projection or (), whole.projection or ()),
        (loaded.mean, whole.mean),
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(dense(loaded.mixture), dense(whole.mixture), rtol=1e-12)
    points = np.random.default_rng(0).normal(size=(9, loaded.mixture.means.shape[1]))
    densities = [density(image_mixture.mixture, points) for image_mixture in (loaded, whole)]
    np.testing.assert_allclose(*densities, rtol=1e-9)


@of_all_kinds
def test_published_pickle_is_scikit_learns_in_torchs_order(stored, name, tmp_path):
    """The density of an image [channels, H, W] by scikit-learn is ours of [H, W, channels]; and the
    way back."""
    whole, path = stored[name], tmp_path / "mixture.pkl"
    gmm_files.save_published(path, whole, regularization=1e-3)
    content = joblib.load(path)
    assert set(content) == {"gmm", "pca"}
    assert isinstance(content["gmm"], GaussianMixture)
    assert isinstance(content["pca"], PCA if name == "pca" else type(None))
    images = images_of(9, seed=1) / 127.5 - 1
    first, ours = images.transpose(0, 3, 1, 2).reshape(9, -1), images.reshape(9, -1)
    if name == "pca":
        first = content["pca"].transform(first)
        ours = (ours - whole.projection.center) @ whole.projection.components.T
    expected = density(whole.mixture, ours)
    np.testing.assert_allclose(content["gmm"].score_samples(first), expected, rtol=1e-9)
    back = gmm_files.load_published(path, image_shape=SHAPE, trust_pickle=True)
    np.testing.assert_allclose(density(back.mixture, ours), expected, rtol=1e-9)
    np.testing.assert_allclose(back.std, whole.std, rtol=1e-9)
    np.testing.assert_allclose(back.mean, whole.mean, rtol=1e-9, atol=1e-12)


def test_pickles_are_opened_on_request_alone(stored, tmp_path):
    path = tmp_path / "stranger.pkl"

    class Trap:
        def __reduce__(self):
            return (path.with_suffix(".ran").touch, ())

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"stranger\.pkl is a pickle.*trust_pickle"):
        gmm_files.load_published(path)
    assert not path.with_suffix(".ran").exists()
    gmm_files.save_published(path, stored["diag"])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"stranger\.pkl cannot be unpickled"):
        gmm_files.load_published(path, trust_pickle=True)
    joblib.dump([1, 2], path)
    with pytest.raises(ValueError, match="no dict with 'gmm'"):
        gmm_files.load_published(path, trust_pickle=True)


def test_convert(tmp_path, capsys):
    gray, path = fitted("diag", shape=(4, 4, 1), engine="sklearn"), tmp_path / "gray.pkl"
    gmm_files.save_published(path, gray)
    with pytest.raises(ValueError, match="trust_pickle"):
        convert.main(convert.Arguments(path))
    loaded = gmm_files.load(convert.main(convert.Arguments(path, trust_pickle=True)))
    assert loaded.image_shape == (4, 4, 1)
    assert "diag, K = 2" in capsys.readouterr().out
    np.testing.assert_allclose(loaded.mixture.means, gray.mixture.means)
    with pytest.raises(ValueError, match=r"of 16 pixels, not of images of shape \(5, 4, 1\)"):
        convert.main(convert.Arguments(path, trust_pickle=True, image_shape=(5, 4, 1)))


def test_torch_seeds_and_the_published_normalization(stored):
    content = gmm_files.published(stored["full"])["gmm"]
    ramp = torch.linspace(0, 1, 18).reshape(1, 3, 3, 2)
    stats = {"mean": ramp, "std": 1 + ramp}
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(GMM_TORCH(gmm=content, gmm_stats=stats, device="cpu").sample(4))
    assert torch.equal(*draws)
    seeded = [GMM_TORCH(content, stats, seed=7).sample(4) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(seeded[0], draws[0])
    pixels = seeded[0] * stats["std"] + stats["mean"]
    published = GMM_TORCH(content, stats, seed=7, per_channel=True).sample(4)
    means, stds = (stats[name].mean(dim=(2, 3), keepdim=True) for name in ("mean", "std"))
    torch.testing.assert_close(published, (pixels - means) / stds, rtol=1e-5, atol=1e-5)


@of_all_kinds
def test_draws_in_torch_have_the_moments_of_their_components(stored, name, tmp_path):
    """In both precisions, from both files, whichever way they are asked for: `sample` by the
    statistics, in the order [channels, H, W], and `sample_from_cluster` as pixels."""
    whole, num, order = stored[name], 20_000, gmm_files.channels_first(SHAPE)
    gmm_files.save(tmp_path / "mixture.npz", whole)
    gmm_files.save_stats(tmp_path / "stats.pt", whole.mean, whole.std, SHAPE)
    stats = torch.load(tmp_path / "stats.pt", weights_only=True)
    (content, pca), exact = gmm_files.published(whole).values(), {"dtype": torch.float64}
    for sampler, dtype in (
        (GMM_TORCH(gmm=content, gmm_stats=stats, pca=pca, seed=2, **exact), torch.float64),
        (GMM_TORCH.from_npz(tmp_path / "mixture.npz", seed=1), torch.float32),
    ):
        for statistic, wanted in ((sampler.mu, whole.mean), (sampler.std, whole.std)):
            assert statistic.shape == (1, 3, 3, 2)
            np.testing.assert_allclose(statistic.ravel(), wanted[order], rtol=1e-6, atol=1e-6)
        draws, owners = sampler.sample(num_samples=num, return_cluster=True)
        assert (draws.dtype, draws.shape, sampler.n_cluster) == (dtype, (num, 3, 3, 2), 2)
        pixels = draws * sampler.std + sampler.mu
        mixed = sampler.sample_from_cluster(num, owners)
        for k, weight in enumerate(np.asarray(whole.mixture.weights)):
            assert abs(np.mean(owners.numpy() == k) - weight) < 5 * 0.5 / np.sqrt(num)
            one = whole.mixture._replace(weights=np.eye(2)[k])
            mean, covariance = moments(one, whole.projection)
            scale = np.sqrt(np.diagonal(covariance)[order])
            correlation = covariance[np.ix_(order, order)] / np.outer(scale, scale)
            for x in (pixels[owners == k], sampler.sample_from_cluster(num, k), mixed[owners == k]):
                z = (x.reshape(len(x), -1).numpy() - mean[order]) / scale
                assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(len(z))
                assert np.abs(np.cov(z.T) - correlation).max() < 5 * np.sqrt(2 / len(z))


def test_no_statistics_leave_the_draws_as_they_are():
    """Of square images, gray or in color; channel_wise is the published normalization."""
    for shape in ((4, 4, 1), (2, 2, 3)):
        content = gmm_files.published(fitted("diag", shape=shape, engine="sklearn"))["gmm"]
        plain = GMM_TORCH(gmm=content, dtype=torch.float32, seed=1)
        stats = {"mean": torch.rand(1, *plain.shape), "std": 1 + torch.rand(1, *plain.shape)}
        assert plain.shape == (shape[2], *shape[:2])
        assert torch.equal(plain.sample(3), GMM_TORCH(content, seed=1, per_channel=True).sample(3))
        wise, per = (
            GMM_TORCH(content, stats, seed=1, **option).sample(num_samples=3)
            for option in ({"stats_type": "channel_wise"}, {"per_channel": True})
        )
        assert torch.equal(wise, per)


SNIPPET = """
import joblib
import torch
from utils.gmm import GMM_TORCH

model_data = joblib.load('data/cifar10_gmm2_pca3072_full.pkl')
gmm_sklearn = model_data['gmm']
stats = torch.load('data/cifar10_gmm2_pca3072_full_stats.pt')
gmm = GMM_TORCH(
    gmm=gmm_sklearn,
    gmm_stats=stats,
    device='cpu'
)
x0 = gmm.sample(batch_size)  # Returns (B, 3, 32, 32) normalized tensor
"""


@pytest.mark.parametrize("folder", [".", "xp_gmm_source"])
def test_published_snippet_as_printed(stored, folder, tmp_path, monkeypatch):
    """With `utils` of the folder where a user stands, which gives way to a package of his own."""
    folder = (Path(gmm_fit.__file__).parents[1] / folder).resolve()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.chdir(tmp_path)
    path, whole = tmp_path / "data" / "cifar10_gmm2_pca3072_full.pkl", stored["full"]
    path.parent.mkdir()
    gmm_files.save_published(path, whole)
    gmm_files.save_stats(path.with_name(f"{path.stem}_stats.pt"), whole.mean, whole.std, SHAPE)
    for name in ("utils", "utils.gmm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    names = {"batch_size": 7}
    exec(SNIPPET, names)
    assert names["x0"].shape == (7, 3, 3, 2)
    assert Path(sys.modules["utils.gmm"].__file__).parents[1] == folder
    own = tmp_path / "own" / "utils"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("mine = True")
    sys.path.append(str(own.parent))
    for name in ("utils", "utils.gmm"):
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module("utils").mine
    sys.modules.pop("utils")


def test_a_batch_in_torch_needs_no_factor_for_each_draw():
    """No intermediate is larger than the batch or the factors: none has B d^2 numbers."""
    d, num = 60, 50
    rng = np.random.default_rng(0)
    factors = np.tril(rng.normal(size=(2, d, d))) + 5 * np.eye(d)
    mixture = gmm.Mixture(np.full(2, 0.5), rng.normal(size=(2, d)), gmm.from_cholesky(factors))
    stats = {"mean": torch.zeros(1, 1, 6, 10), "std": torch.ones(1, 1, 6, 10)}
    sampler, sizes = GMM_TORCH(gmm.to_sklearn(mixture), stats), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Sizes():
        sampler.sample(num)
    assert max(sizes) <= 2 * d * d
    assert num * d in sizes


GOOD = {"mean": torch.zeros(1, 3, 3, 2), "std": torch.ones(1, 3, 3, 2)}
LARGER = {name: torch.ones(1, 3, 4, 4) for name in GOOD}
BAD_STATISTICS = [
    ({"mean": GOOD["mean"]}, "'mean' and 'std'"),
    (GOOD | {"std": torch.ones(3, 3, 2)}, r"'std' must be \(1, channels, H, W\)"),
    (GOOD | {"std": torch.full((1, 3, 3, 2), float("nan"))}, "'std' holds NaN"),
    (GOOD | {"std": -GOOD["std"]}, "'std' is negative"),
    (GOOD | {"std": torch.ones(1, 3, 2, 2)}, r"'std' \(1, 3, 2, 2\)"),
]


def test_what_does_not_fit_is_named(stored, tmp_path):
    plain = gmm_files.published(stored["full"])["gmm"]
    behind, pca = gmm_files.published(stored["pca"]).values()
    sampler, path = GMM_TORCH(plain, GOOD), tmp_path / "mixture.npz"

    def loaded(**changes):
        gmm_files.save(path, stored["full"]._replace(**changes))
        gmm_files.load(path)

    def fit(**options):
        gmm_fit.fit_images(FitConfig(**options), images_of(20), show_progress=False)

    for call, words in (
        *((partial(GMM_TORCH, plain, statistics), words) for statistics, words in BAD_STATISTICS),
        (lambda: GMM_TORCH(plain, LARGER), r"18 dimensions, the statistics 48 pixels \(3, 4, 4\)"),
        (lambda: GMM_TORCH(behind, GOOD), "pass the PCA it was fitted behind"),
        (lambda: GMM_TORCH(behind, LARGER, pca=pca), "the PCA maps 18 pixels to 5.*48 pixels"),
        (lambda: GMM_TORCH(plain, GOOD, stats_type="cpu"), "one of pixel_wise, channel_wise, got"),
        (lambda: GMM_TORCH(plain, GOOD, dtype=torch.int32), "floating-point one of torch"),
        (lambda: GMM_TORCH(plain), "18 pixels, not of square images"),
        (lambda: GMM_TORCH(GaussianMixture(2), GOOD), "has not been fitted"),
        (lambda: sampler.sample(0), "num_samples must be at least 1"),
        (lambda: sampler.sample_from_cluster(3, 2), "cluster_idx is from 0 to 1"),
        (lambda: sampler.sample_from_cluster(3, -1), "cluster_idx is from 0 to 1"),
        (lambda: sampler.sample_from_cluster(3, torch.tensor([0, 2, 1])), "is from 0 to 1"),
        (lambda: sampler.sample_from_cluster(3, torch.zeros(4).long()), "one component or 3 of"),
        (lambda: loaded(mean=np.zeros(17)), r"mean is \(17,\), not \(18,\)"),
        (lambda: loaded(std=np.full(18, np.nan)), "std is not all finite"),
        (lambda: fit(n_components=21), "n_components is 21, but there are 20 images"),
        (lambda: fit(n_pca=19), "n_pca is 19, but 20 images of 18 pixels have at most 18"),
        (lambda: fit(covariance_type="low_rank", rank=18), "rank is 18, but must be below the"),
        (lambda: fit(n_components=0), "n_components"),
        (lambda: fit(random_state=-1), "must be a whole number from 0 to 4294967295"),
        (lambda: fit(tol=-1.0), "tol"),
        (lambda: fit(n_stat_samples=1), "n_stat_samples"),
        (lambda: fit(reg_covar=np.inf), "reg_covar"),
        (lambda: fit(engine="sklearn", covariance_type="low_rank"), "no low_rank covariances"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for statistics, _ in BAD_STATISTICS:
        torch.save(statistics, tmp_path / "bad_stats.pt")
        with pytest.raises(ValueError, match=r"bad_stats\.pt"):
            gmm_files.load_stats(tmp_path / "bad_stats.pt")


def test_command_writes_its_files_and_finds_them_again(tmp_path, capsys):
    arguments = gmm_fit.Arguments(
        dataset="digits", n_components=2, n_pca=8, max_iter=2, n_stat_samples=20_000,
        batch_size=1000, output_dir=tmp_path / "data", results=tmp_path / "results",
    )  # fmt: skip
    path = gmm_fit.main(arguments)
    endings, stem = (".npz", ".pkl", "_stats.pt", ".png"), "digits_gmm2_pca8_full"
    assert {p.name for p in path.parent.iterdir()} == {stem + ending for ending in endings}
    (config,) = arguments.results.rglob("config.json")
    assert runs.Run(config.parent).finished
    said, stats_path = capsys.readouterr().out, path.with_name(f"{stem}_stats.pt")
    assert "not converged: raise --max_iter" in said
    assert "test images:" in said
    assert f"figure:   {path.with_suffix('.png')}" in said
    mixture, stats = gmm_files.load(path), gmm_files.load_stats(stats_path)
    error = 5 * mixture.std / np.sqrt(20_000) + 1e-7
    for name in ("mean", "std"):
        assert (np.abs(stats[name].numpy().ravel() - getattr(mixture, name)) <= error).all()
    before = path.stat().st_mtime_ns
    gmm_fit.main(arguments)
    assert "there already" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    gmm_fit.main(dataclasses.replace(arguments, n_stat_samples=0))
    exact = gmm_files.load_stats(stats_path)
    np.testing.assert_allclose(exact["std"].numpy().ravel(), mixture.std, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_fit_alike(kind):
    """From k-means starts of their own: well separated clusters have one optimum to find."""
    images = images_of(400, (2, 2, 1), seed=2)
    images[:200] = np.clip(images[:200].astype(int) + 90, 0, 255)
    options = {"covariance_type": kind, "max_iter": 60, "tol": 1e-7, "reg_covar": 1e-3}
    ends = []
    for engine in ("jax", "sklearn"):
        config = FitConfig(engine=engine, dtype="float64", **options)
        fit = gmm_fit.fit_images(config, images, show_progress=False)
        ends.append(fit.about["log_likelihoods"][-1])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_the_uses_of_a_seed_share_no_key(seed):
    """Those of k-means, its seeds, the loadings, and the draws behind the statistics."""
    keys = gmm_fit.keys_of(FitConfig(random_state=seed))
    halves = jax.random.split(keys.start)
    used = [*halves, *jax.random.split(halves[1], 20), keys.loadings, keys.draws]
    used += [jax.random.fold_in(keys.draws, i) for i in range(20)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in used}) == len(used)


def test_flips_each_image_or_not():
    images = images_of(50)
    flipped = gmm_fit.flipped(images, 0)
    same, turned = ((flipped == x).all(axis=(1, 2, 3)) for x in (images, images[:, :, ::-1]))
    assert (same | turned).all()
    assert 10 < (turned & ~same).sum() < 40
    assert np.array_equal(flipped, gmm_fit.flipped(images, 0))


@pytest.mark.slow
def test_singular_covariances_are_announced(monkeypatch):
    """As with 100 components on CIFAR-10: a warning with the way out, and no more than that where
    there is memory; where there is not, an error before any work."""
    images = images_of(40)
    config = FitConfig(n_components=3, max_iter=1, reg_covar=1e-2)
    with pytest.warns(
        UserWarning, match="13 per component, in 18 dim.*tied, diag, spherical or low"
    ):
        gmm_fit.fit_images(config, images, show_progress=False)
    monkeypatch.setattr(gmm_fit.os, "sysconf", lambda name: 100)
    with (
        pytest.warns(UserWarning, match="singular"),
        pytest.raises(ValueError, match="the machine has 0: use --n_pca"),
    ):
        gmm_fit.fit_images(config, images, show_progress=False)
    assert gmm_fit.memory_needed(FitConfig(n_components=100), 3072) > 30 * 2**30
