"""gmm_fit.py, its files, and the PyTorch sampler, against scikit-learn, torch and closed forms."""

import dataclasses
import importlib
import pickle
import sys
import warnings
from pathlib import Path

import jax
import joblib
import numpy as np
import pytest
import torch
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


def fitted(kind="full", *, pca=None, num=2, engine="jax", shape=SHAPE):
    settings = {"max_iter": 3, "reg_covar": 1e-3, "rank": 2, "dtype": "float64"}
    config = FitConfig(n_components=num, covariance_type=kind, n_pca=pca, engine=engine, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gmm_fit.fit_images(config, images_of(200, shape), show_progress=False)
    mean, std = moments_of(found.mixture, found.projection)
    return gmm_files.ImageMixture(found.mixture, found.projection, mean, std, shape, {"a": 1})


def torch_stats(image_mixture):
    """Mean and deviation as GMM_TORCH takes them."""
    order = gmm_files.channels_first(SHAPE)
    return {
        name: torch.tensor(getattr(image_mixture, name)[order].reshape(1, 3, 3, 2))
        for name in ("mean", "std")
    }


@pytest.fixture(scope="module")
def stored():
    """One mixture of each kind, and one behind a PCA."""
    kinds = {kind: fitted(kind, engine="sklearn") for kind in KINDS}
    return kinds | {"low_rank": fitted("low_rank"), "pca": fitted(pca=5, engine="sklearn")}


NAMES = (*KINDS, "low_rank", "pca")


def dense(mixture):
    """The covariances [K, d, d] of any structure."""
    matrices, (num, d) = np.asarray(mixture.covariance.matrices()), mixture.means.shape
    if matrices.shape == (num, d, d):
        return matrices
    if isinstance(mixture.covariance, gmm.Tied):
        return np.broadcast_to(matrices, (num, d, d))
    return np.stack([np.diag(np.broadcast_to(one, d)) for one in matrices])


def density(mixture, points):
    with jax.enable_x64(True):
        return np.asarray(gmm.log_prob(mixture, jax.numpy.asarray(points)))


def in_pixels(image_mixture):
    """Mean [d] and covariance [d, d] of the draws, by the law of total variance."""
    mixture, projection = image_mixture[:2]
    weights, means = np.asarray(mixture.weights), np.asarray(mixture.means)
    centred = means - weights @ means
    covariance = np.einsum("k,kij->ij", weights, dense(mixture))
    covariance += np.einsum("k,ki,kj->ij", weights, centred, centred)
    mean = weights @ means
    if projection is None:
        return mean, covariance
    components, centre = projection
    return mean @ components + centre, components.T @ covariance @ components


# ---- Files


@pytest.mark.parametrize("name", NAMES)
def test_npz_keeps_every_bit(stored, name, tmp_path):
    one, path = stored[name], tmp_path / "mixture.npz"
    gmm_files.save(path, one)
    found = gmm_files.load(path)
    assert found.image_shape == SHAPE
    assert found.about == {"a": 1}
    assert type(found.mixture.covariance) is type(one.mixture.covariance)
    for field in ("weights", "means"):
        assert np.array_equal(getattr(found.mixture, field), getattr(one.mixture, field))
    np.testing.assert_allclose(dense(found.mixture), dense(one.mixture), rtol=1e-12)
    points = np.random.default_rng(0).normal(size=(7, found.mixture.means.shape[1]))
    np.testing.assert_allclose(
        density(found.mixture, points), density(one.mixture, points), rtol=1e-9
    )
    assert np.array_equal(found.mean, one.mean)
    if name == "pca":
        assert np.array_equal(found.projection.components, one.projection.components)


@pytest.mark.parametrize("name", NAMES)
def test_published_pickle_is_scikit_learns_in_torchs_order(stored, name, tmp_path):
    """The density of an image [channels, H, W] by scikit-learn is ours of [H, W, channels]; and the
    way back."""
    one, path = stored[name], tmp_path / "mixture.pkl"
    gmm_files.save_published(path, one, regularisation=1e-3)
    content = joblib.load(path)
    assert set(content) == {"gmm", "pca"}
    assert isinstance(content["gmm"], GaussianMixture)
    images = images_of(9, seed=1) / 127.5 - 1
    first = images.transpose(0, 3, 1, 2).reshape(9, -1)
    ours = images.reshape(9, -1)
    if name == "pca":
        assert isinstance(content["pca"], PCA)
        first = content["pca"].transform(first)
        ours = (ours - one.projection.centre) @ one.projection.components.T
    else:
        assert content["pca"] is None
    np.testing.assert_allclose(
        content["gmm"].score_samples(first), density(one.mixture, ours), rtol=1e-9
    )
    back = gmm_files.load_published(path, image_shape=SHAPE, trust_pickle=True)
    np.testing.assert_allclose(density(back.mixture, ours), density(one.mixture, ours), rtol=1e-9)
    np.testing.assert_allclose(back.std, one.std, rtol=1e-9)
    np.testing.assert_allclose(back.mean, one.mean, rtol=1e-9, atol=1e-12)


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


def test_convert(stored, tmp_path, capsys):
    one, path = fitted("diag", shape=(4, 4, 1), engine="sklearn"), tmp_path / "gray.pkl"
    gmm_files.save_published(path, one)
    with pytest.raises(ValueError, match="trust_pickle"):
        convert.main(convert.Arguments(path))
    found = gmm_files.load(convert.main(convert.Arguments(path, trust_pickle=True)))
    assert found.image_shape == (4, 4, 1)
    assert "diag, K = 2" in capsys.readouterr().out
    np.testing.assert_allclose(found.mixture.means, one.mixture.means)
    with pytest.raises(ValueError, match=r"of 16 pixels, not of images of shape \(5, 4, 1\)"):
        convert.main(convert.Arguments(path, trust_pickle=True, image_shape=(5, 4, 1)))


def test_mixtures_that_do_not_fit_their_statistics(stored, tmp_path):
    path = tmp_path / "mixture.npz"
    for changes, message in (
        ({"mean": np.zeros(17)}, r"mean is \(17,\), not \(18,\)"),
        ({"std": np.full(18, np.nan)}, "std is not all finite"),
    ):
        gmm_files.save(path, stored["full"]._replace(**changes))
        with pytest.raises(ValueError, match=message):
            gmm_files.load(path)


# ---- The PyTorch sampler


@pytest.mark.parametrize("name", NAMES)
def test_draws_in_torch_have_the_moments_of_the_mixture(stored, name, tmp_path):
    """Mean 0, and the covariance of the standardised mixture in the order [channels, H, W]."""
    one, num = stored[name], 40_000
    mean, covariance = in_pixels(one)
    np.testing.assert_allclose(one.mean, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.std, np.sqrt(np.diagonal(covariance)), rtol=1e-9)
    order = gmm_files.channels_first(SHAPE)
    correlation = (covariance / np.outer(one.std, one.std))[np.ix_(order, order)]
    gmm_files.save(tmp_path / "mixture.npz", one)
    gmm_files.save_stats(tmp_path / "stats.pt", one.mean, one.std, SHAPE)
    stats = torch.load(tmp_path / "stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 3, 3, 2)
    content = gmm_files.published(one)
    for sampler in (
        GMM_TORCH(content["gmm"], stats, "cpu", pca=content["pca"], seed=0),
        GMM_TORCH.from_npz(tmp_path / "mixture.npz", seed=1),
    ):
        x0 = sampler.sample(num)
        assert x0.shape == (num, 3, 3, 2)
        assert x0.dtype == torch.float32
        flat = x0.reshape(num, -1).double().numpy()
        assert np.abs(flat.mean(axis=0)).max() < 5 / np.sqrt(num)
        # The variance of a product of two coordinates is at most the kurtosis, here about 4.
        assert np.abs(np.cov(flat.T) - correlation).max() < 5 * 2 / np.sqrt(num)


def test_torch_seeds_and_the_published_normalisation(stored):
    content, stats = gmm_files.published(stored["full"])["gmm"], torch_stats(stored["full"])
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(GMM_TORCH(gmm=content, gmm_stats=stats, device="cpu").sample(4))
    assert torch.equal(*draws)
    seeded = [GMM_TORCH(content, stats, seed=7).sample(4) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(seeded[0], draws[0])
    pixels = GMM_TORCH(content, stats, seed=7).sample(5) * stats["std"] + stats["mean"]
    published = GMM_TORCH(content, stats, seed=7, per_channel=True).sample(5)
    means, stds = (stats[name].mean(dim=(2, 3), keepdim=True) for name in ("mean", "std"))
    torch.testing.assert_close(published.double(), (pixels - means) / stds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_draws_in_torch_tell_their_components(stored, name):
    """Each component's draws have its own mean and covariance, in float64, whichever way they are
    asked for; `sample_from_cluster` gives pixels."""
    one, num = stored[name], 20_000
    content, order = gmm_files.published(one), gmm_files.channels_first(SHAPE)
    stats = torch_stats(one)
    options = {"dtype": torch.float64, "device": "cpu", "pca": content["pca"]}
    sampler = GMM_TORCH(gmm=content["gmm"], gmm_stats=stats, seed=2, **options)
    draws, owners = sampler.sample(num_samples=num, return_cluster=True)
    assert (draws.dtype, sampler.n_cluster) == (torch.float64, 2)
    pixels = draws * sampler.std + sampler.mu
    mixed = sampler.sample_from_cluster(num, owners)
    for k in range(2):
        alone = one.mixture._replace(weights=np.eye(2)[k])
        mean, covariance = in_pixels(one._replace(mixture=alone))
        scale = np.sqrt(np.diagonal(covariance)[order])
        correlation = covariance[np.ix_(order, order)] / np.outer(scale, scale)
        for x in (pixels[owners == k], sampler.sample_from_cluster(num, k), mixed[owners == k]):
            z = (x.reshape(len(x), -1).numpy() - mean[order]) / scale
            assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(len(z))
            assert np.abs(np.cov(z.T) - correlation).max() < 5 * np.sqrt(2 / len(z))


def test_no_statistics_leave_the_draws_as_they_are():
    """Of square images, gray or in color; channel_wise is the published normalisation."""
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

# Load the fitted model
model_data = joblib.load('data/cifar10_gmm2_pca3072_full.pkl')
gmm_sklearn = model_data['gmm']

# Load normalization statistics
stats = torch.load('data/cifar10_gmm2_pca3072_full_stats.pt')

# Create PyTorch GMM sampler
gmm = GMM_TORCH(
    gmm=gmm_sklearn,
    gmm_stats=stats,
    device='cpu'
)

# Sample from GMM
x0 = gmm.sample(batch_size)  # Returns (B, 3, 32, 32) normalized tensor
"""


@pytest.mark.parametrize("folder", [".", "xp_gmm_source"])
def test_published_snippet_as_printed(stored, folder, tmp_path, monkeypatch):
    """With `utils` of the folder where a user stands, which gives way to a package of his own."""
    repository = Path(gmm_fit.__file__).parents[1]
    monkeypatch.setattr(sys, "path", [str(repository / folder), *sys.path])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data" / "cifar10_gmm2_pca3072_full.pkl"
    path.parent.mkdir()
    one = stored["full"]
    gmm_files.save_published(path, one)
    gmm_files.save_stats(path.with_name(f"{path.stem}_stats.pt"), one.mean, one.std, SHAPE)
    for name in ("utils", "utils.gmm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    names = {"batch_size": 7}
    exec(SNIPPET, names)
    assert names["x0"].shape == (7, 3, 3, 2)
    assert Path(sys.modules["utils.gmm"].__file__).parents[1] == (repository / folder).resolve()
    own = tmp_path / "own" / "utils"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("mine = True")
    sys.path.append(str(own.parent))
    for name in ("utils", "utils.gmm"):
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module("utils").mine
    sys.modules.pop("utils")


def test_a_batch_in_torch_needs_no_factor_for_each_draw():
    """No intermediate is larger than the batch or the factors, let alone B d^2 numbers."""
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


def test_statistics_that_do_not_fit(stored, tmp_path):
    content, behind = (gmm_files.published(stored[name]) for name in ("full", "pca"))
    good = {"mean": torch.zeros(1, 3, 3, 2), "std": torch.ones(1, 3, 3, 2)}
    larger = {name: torch.ones(1, 3, 4, 4) for name in good}
    refused = [
        ((content["gmm"], bad), {}, message)
        for bad, message in (
            ({"mean": good["mean"]}, "'mean' and 'std'"),
            (good | {"std": torch.ones(3, 3, 2)}, r"'std' must be \(1, channels, H, W\)"),
            (good | {"std": torch.full((1, 3, 3, 2), float("nan"))}, "'std' holds NaN"),
            (good | {"std": -good["std"]}, "'std' is negative"),
            (good | {"std": torch.ones(1, 3, 2, 2)}, r"'std' \(1, 3, 2, 2\)"),
        )
    ]
    for (_, bad), _, _ in refused:
        torch.save(bad, tmp_path / "bad_stats.pt")
        with pytest.raises(ValueError, match=r"bad_stats\.pt"):
            gmm_files.load_stats(tmp_path / "bad_stats.pt")
    refused += [
        ((content["gmm"], larger), {}, r"18 dimensions, the statistics 48 pixels \(3, 4, 4\)"),
        ((behind["gmm"], good), {}, "pass the PCA it was fitted behind"),
        ((behind["gmm"], larger), {"pca": behind["pca"]}, "the PCA maps 18 pixels to 5.*48 pixels"),
        ((content["gmm"], good), {"stats_type": "cpu"}, "one of pixel_wise, channel_wise, got"),
        ((content["gmm"], good), {"dtype": torch.int32}, "floating-point one of torch"),
        ((content["gmm"],), {}, "18 pixels, not of square images"),
        ((GaussianMixture(2), good), {}, "has not been fitted"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            GMM_TORCH(*arguments, **options)
    sampler = GMM_TORCH(content["gmm"], good)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        sampler.sample(0)
    for bad in (2, -1, torch.tensor([0, 2, 1])):
        with pytest.raises(ValueError, match="cluster_idx is from 0 to 1"):
            sampler.sample_from_cluster(3, bad)
    with pytest.raises(ValueError, match="one component or 3 of them"):
        sampler.sample_from_cluster(3, torch.zeros(4, dtype=torch.int64))


# ---- The command


def test_command_writes_three_files_and_finds_them_again(tmp_path, capsys):
    arguments = gmm_fit.Arguments(
        dataset="digits", n_components=2, n_pca=8, max_iter=2, n_stat_samples=20_000,
        batch_size=1000, output_dir=tmp_path / "data", results=tmp_path / "results",
    )  # fmt: skip
    path = gmm_fit.main(arguments)
    stats_path = path.with_name("digits_gmm2_pca8_full_stats.pt")
    said = capsys.readouterr().out
    assert {p.name for p in path.parent.iterdir()} == {
        "digits_gmm2_pca8_full.npz", "digits_gmm2_pca8_full.pkl", stats_path.name
    }  # fmt: skip
    (config,) = arguments.results.rglob("config.json")
    assert runs.Run(config.parent).finished
    assert "not converged: raise --max_iter" in said
    assert "test images:" in said
    found, stats = gmm_files.load(path), gmm_files.load_stats(stats_path)
    error = 5 * found.std / np.sqrt(20_000)
    for name in ("mean", "std"):
        assert (np.abs(stats[name].numpy().ravel() - getattr(found, name)) <= error + 1e-7).all()
    before = path.stat().st_mtime_ns
    gmm_fit.main(arguments)
    assert "there already" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    gmm_fit.main(dataclasses.replace(arguments, n_stat_samples=0))
    exact = gmm_files.load_stats(stats_path)
    np.testing.assert_allclose(exact["std"].numpy().ravel(), found.std, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_fit_alike(kind):
    """From k-means starts of their own: well separated clusters have one optimum to find."""
    images = images_of(400, (2, 2, 1), seed=2)
    images[:200] = np.clip(images[:200].astype(int) + 90, 0, 255)
    config = FitConfig(covariance_type=kind, max_iter=60, tol=1e-7, reg_covar=1e-3, dtype="float64")
    ends = []
    for engine in ("jax", "sklearn"):
        found = gmm_fit.fit_images(
            dataclasses.replace(config, engine=engine), images, show_progress=False
        )
        ends.append(found.about["log_likelihoods"][-1])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_the_uses_of_a_seed_share_no_key(seed):
    """Those of k-means, its seeds, the loadings, and the draws behind the statistics."""
    keys = gmm_fit.keys_of(FitConfig(random_state=seed))
    halves = jax.random.split(keys.start)
    used = [
        *halves,
        *jax.random.split(halves[1], 20),
        keys.loadings,
        *(jax.random.fold_in(keys.draws, i) for i in range(20)),
        keys.draws,
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in used}) == len(used)


def test_flips_each_image_or_not():
    images = images_of(50)
    found = gmm_fit.flipped(images, 0)
    same, turned = ((found == x).all(axis=(1, 2, 3)) for x in (images, images[:, :, ::-1]))
    assert (same | turned).all()
    assert 10 < (turned & ~same).sum() < 40
    assert np.array_equal(found, gmm_fit.flipped(images, 0))


def test_sizes_that_cannot_be():
    for options, message in (
        ({"n_components": 21}, "n_components is 21, but there are 20 images"),
        ({"n_pca": 19}, r"n_pca is 19, but 20 images of 18 pixels have at most 18"),
        ({"covariance_type": "low_rank", "rank": 18}, "rank is 18, but must be below the dim"),
        ({"n_components": 0}, "n_components"),
        ({"tol": -1.0}, "tol"),
        ({"n_stat_samples": 1}, "n_stat_samples"),
        ({"reg_covar": np.inf}, "reg_covar"),
        ({"engine": "sklearn", "covariance_type": "low_rank"}, "no low_rank covariances"),
    ):
        with pytest.raises(ValueError, match=message):
            gmm_fit.fit_images(FitConfig(**options), images_of(20), show_progress=False)


@pytest.mark.slow
def test_singular_covariances_are_announced(monkeypatch):
    """As with 100 components on CIFAR-10: a warning with the way out, and no more than that where
    there is memory; where there is not, an error before any work."""
    images = images_of(40)
    config = FitConfig(n_components=3, max_iter=1, reg_covar=1e-2)
    with pytest.warns(UserWarning, match="13 a component, in 18 dim.*tied, diag, spherical or low"):
        gmm_fit.fit_images(config, images, show_progress=False)
    monkeypatch.setattr(gmm_fit.os, "sysconf", lambda name: 100)
    with (
        pytest.warns(UserWarning, match="singular"),
        pytest.raises(ValueError, match="the machine has 0: use --n_pca"),
    ):
        gmm_fit.fit_images(config, images, show_progress=False)
    assert gmm_fit.memory_needed(FitConfig(n_components=100), 3072) > 30 * 2**30
