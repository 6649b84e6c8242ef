"""Fits a Gaussian mixture to the images of a data set, for use as a source of flow matching.

    python xp_gmm_source/gmm_fit.py                                            (CIFAR-10, K = 2)
    python xp_gmm_source/gmm_fit.py --n_components 10 --n_pca 300 --covariance_type full
    python xp_gmm_source/gmm_fit.py --dataset path/to/images.zip --covariance_type diag
    python xp_gmm_source/gmm_fit.py --dataset mnist --n_pca 50 --n_components auto

Writes NAME = {dataset}_gmm{K}_pca{D}_{covariance_type} to --output_dir: NAME.pkl and NAME_stats.pt,
which PyTorch code reads as the published ones, NAME.npz, the same without pickle, which is written
last of these, and NAME.png, its means and draws. {dataset} is a name, or the last part of a path
and eight digits of a hash of the images: other images of the same name have files of their own.
Pixels are in [-1, 1]. An interrupted fit resumes when the command is given again.
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import gmm, runs
from lib.datasets import Dataset, file_stem, identity, load, to_unit
from lib.gmm.covariances import diagonal, full, low_rank, spherical, tied
from lib.gmm.em import fit, mean_log_likelihood
from lib.gmm.starts import Structure, kmeans_start
from lib.numerics import named_key
from lib.rows import Rows
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_gmm_source import gmm_files, selection
from xp_gmm_source.config import EXPERIMENT, FitConfig
from xp_gmm_source.sources import Projection, mixture_source, moments_of

DATA = Path(__file__).resolve().parents[1] / "data"


class Fitted(NamedTuple):
    """A fitted mixture, with its projection if it has one, and the history of the fit."""

    mixture: gmm.Mixture
    projection: Projection | None
    about: dict[str, Any]


# ---- The data


def flipped(images: np.ndarray, seed: int) -> np.ndarray:
    """Each image mirrored left to right with probability 1/2."""
    chosen = np.random.default_rng(seed).random(len(images)) < 0.5
    return np.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def check_sizes(config: FitConfig, images: np.ndarray) -> int | None:
    """The number of principal components, None without a PCA. Raises ValueError on sizes that
    cannot be, and warns where covariances must be singular."""
    n, d = len(images), int(np.prod(images.shape[1:]))
    if config.n_components > n:
        raise ValueError(f"n_components is {config.n_components}, but there are {n} images")
    num_pca = None if config.n_pca in (None, d) else config.n_pca
    if num_pca is not None and num_pca > min(n, d):
        raise ValueError(
            f"n_pca is {num_pca}, but {n} images of {d} pixels have at most {min(n, d)} principal "
            f"components; leave it out, or give {d}, to fit pixels"
        )
    dimension = num_pca or d
    if config.covariance_type == "low_rank" and config.rank >= dimension:
        raise ValueError(f"rank is {config.rank}, but must be below the dimension {dimension}")
    if config.covariance_type == "full" and n < config.n_components * (dimension + 1):
        warnings.warn(
            f"{n} images are {n / config.n_components:.0f} per component, in {dimension} "
            "dimensions: full covariances are singular except for reg_covar. Use --n_pca, or "
            "--covariance_type tied, diag, spherical or low_rank, instead",
            stacklevel=2,
        )
    return num_pca


def memory_needed(config: FitConfig, dimension: int) -> int:
    """Bytes of the covariances in a fit: factors before and after a step, and the moments."""
    num = config.n_components if config.covariance_type == "full" else 1
    if config.covariance_type not in ("full", "tied"):
        return 0
    return num * dimension**2 * 8 * 5


def check_memory(config: FitConfig, dimension: int) -> None:
    """Raises ValueError where the covariances need more memory than the machine has."""
    needed = memory_needed(config, dimension)
    if not hasattr(os, "sysconf") or jax.default_backend() != "cpu":
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ValueError(
            f"{config.n_components} full covariances in {dimension} dimensions need about "
            f"{needed / 2**30:.0f} GiB while they are fitted, the machine has "
            f"{present / 2**30:.0f}: use --n_pca, or --covariance_type tied, diag, spherical or "
            "low_rank"
        )


def principal_components(
    images: np.ndarray, num: int, seed: int
) -> tuple[Projection, np.ndarray, float]:
    """Scikit-learn's PCA of the pixels in [-1, 1]: the projection, the images in its coordinates
    [n, num] float32, and the share of the variance that it keeps."""
    from sklearn.decomposition import PCA

    pixels = to_unit(np.float64(images.reshape(len(images), -1)))
    pca = PCA(num, random_state=seed, copy=False)
    coordinates = pca.fit_transform(pixels)
    projection = Projection(
        np.asarray(pca.components_, np.float64), np.asarray(pca.mean_, np.float64)
    )
    return projection, coordinates, float(pca.explained_variance_ratio_.sum())


# ---- The fit


class Keys(NamedTuple):
    """Of a fit: of the k-means start, of low_rank's first loadings, of the draws' statistics."""

    start: jax.Array
    loadings: jax.Array
    draws: jax.Array


def keys_of(config: FitConfig) -> Keys:
    """From `random_state`; the start splits its key in two, which are number 0 and 1 of it."""
    key = jax.random.key(config.random_state)
    return Keys(key, named_key(key, "loadings"), jax.random.fold_in(key, 2))


def structure_of(config: FitConfig) -> Structure:
    makers: dict[str, Structure] = {
        "full": full,
        "tied": tied,
        "diag": diagonal,
        "spherical": spherical,
    }
    return makers.get(config.covariance_type) or low_rank(keys_of(config).loadings, config.rank)


def fit_images(
    config: FitConfig,
    images: np.ndarray,
    *,
    test_images: np.ndarray | None = None,
    run: runs.Run | None = None,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> Fitted:
    """The mixture that `config` asks for, of uint8 images [n, H, W, channels].

    `test_images` decide nothing: their mean log-likelihood is reported. Raises ValueError on sizes
    that cannot be, before any work.
    """
    num_pca = check_sizes(config, images)
    dimension = num_pca or int(np.prod(images.shape[1:]))
    check_memory(config, dimension)
    about: dict[str, Any] = {"images": len(images), "dimension": dimension}
    if config.augmentation:
        images = flipped(images, config.random_state)
    began = time.perf_counter()
    projection, dtype = None, np.dtype(config.dtype)
    devices = None if mesh is None else tuple(mesh.devices.flat)
    if num_pca:
        projection, points, kept = principal_components(images, num_pca, config.random_state)
        about["variance_kept"] = kept
        data = Rows(points.astype(dtype, copy=False), dtype=dtype, devices=devices)
    else:
        data = Rows(images, transform=to_unit, dtype=dtype, chunk_size=4096, devices=devices)
    fitting = _fit_with_sklearn if config.engine == "sklearn" else _fit_with_jax
    mixture, history = fitting(config, data, run, show_progress)
    about |= history | {"seconds": time.perf_counter() - began}
    if test_images is not None and len(test_images):
        about["test_log_likelihood"] = mean_log_likelihood(
            mixture, _same_coordinates(test_images, projection, data)
        )
    return Fitted(mixture, projection, about)


def _same_coordinates(images: np.ndarray, projection: Projection | None, data: Rows) -> Rows:
    if projection is None:
        return dataclasses.replace(data, x=images, weights=None)
    pixels = to_unit(np.float64(images.reshape(len(images), -1)))
    points = (pixels - projection.center) @ projection.components.T
    return Rows(points.astype(data.dtype), dtype=data.dtype, devices=data.devices)


def _fit_with_jax(config, data: Rows, run, show_progress) -> tuple[gmm.Mixture, dict[str, Any]]:
    with warnings.catch_warnings():
        # `check_sizes` has said it already, in the words of the command.
        warnings.filterwarnings("ignore", message=".*full covariances.*")
        result = fit(
            data,
            # No name for the start: `fit` lets go of it.
            kmeans_start(
                keys_of(config).start,
                data,
                config.n_components,
                structure_of(config),
                regularization=config.reg_covar,
            ),
            regularization=config.reg_covar,
            tolerance=config.tol,
            max_iterations=config.max_iter,
            run=run,
            show_progress=show_progress,
            description=f"EM, K = {config.n_components}",
        )
    return result.mixture, {
        "converged": result.converged,
        "log_likelihoods": result.log_likelihoods.tolist(),
        "repairs": result.repairs,
    }


def _fit_with_sklearn(config, data: Rows, run, show_progress):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    points = data.x
    if data.transform is not None:
        points = np.asarray(data.transform(points.astype(data.dtype))).reshape(len(points), -1)
    model = GaussianMixture(
        config.n_components,
        covariance_type=config.covariance_type,
        reg_covar=config.reg_covar,
        tol=config.tol,
        max_iter=config.max_iter,
        random_state=config.random_state,
        verbose=2 if show_progress else 0,
        verbose_interval=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the summary
        model.fit(points)
    history = {"converged": bool(model.converged_), "repairs": []}
    lower_bounds = getattr(model, "lower_bounds_", [model.lower_bound_])
    return gmm.from_sklearn(model), history | {
        "log_likelihoods": [float(bound) for bound in lower_bounds]
    }


def image_mixture(fitted: Fitted, image_shape: tuple[int, int, int]) -> gmm_files.ImageMixture:
    """What is stored of a fit: with the exact mean and std of its draws."""
    mixture, projection, about = fitted
    mean, std = moments_of(mixture, projection)
    return gmm_files.ImageMixture(mixture, projection, mean, std, image_shape, about)


# ---- Statistics of draws


def draws(key: jax.Array, stored: gmm_files.ImageMixture, num: int, batch: int) -> Iterator[Any]:
    """`num` draws as pixels [b, d], `batch` at a time, float32."""
    source = mixture_source(stored.mixture, mean=0.0, std=1.0, pca=stored.projection)

    @jax.jit
    def draw(key, source):
        return source.sample(key, batch)

    for i in range(-(-num // batch)):
        part = np.asarray(draw(jax.random.fold_in(key, i), source))
        yield part[: num - i * batch]


def sampled_moments(
    key: jax.Array, stored: gmm_files.ImageMixture, num: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [d] over `num` draws, in float64."""
    # About the exact mean, so that no digits are lost in the difference of squares.
    first = second = np.zeros_like(stored.mean)
    for part in draws(key, stored, num, batch):
        centered = part.astype(np.float64) - stored.mean
        first, second = first + centered.sum(axis=0), second + np.square(centered).sum(axis=0)
    variance = (second - np.square(first) / num) / (num - 1)
    return stored.mean + first / num, np.sqrt(np.maximum(variance, 0))


# ---- The command


@dataclasses.dataclass(frozen=True)
class Arguments(DeviceOptions, FitConfig):
    n_components: int | Literal["auto"] = FitConfig.n_components  # type: ignore[assignment]
    """K, the number of Gaussian components; auto: by held-out likelihood (see selection.py)."""
    output_dir: Path = DATA
    """Where the files go. Default: the folder data beside this one."""
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""
    results: Path = Path("results")
    """Where an unfinished fit keeps its checkpoint."""

    def __post_init__(self):
        if self.n_components != "auto":
            super().__post_init__()


def chosen(arguments: Arguments, train: Dataset, mesh: Mesh | None = None) -> int:
    """K by held-out likelihood; prints what it is chosen from."""
    config = settings_of(FitConfig, dataclasses.replace(arguments, n_components=1))
    candidates = selection.select(config, train.images, fit_images, mesh=mesh)
    made = selection.table(candidates, config.n_pca or int(np.prod(train.image_shape)))
    print(f"{made.caption}\n\n{made.markdown()}\n")
    return selection.best(candidates)


def _finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `path` and its companions come from these settings."""
    others = path.with_suffix(".pkl"), path.with_name(f"{path.stem}_stats.pt")
    if not path.exists() or not all(other.exists() for other in others):
        return False
    return gmm_files.load(path).about.get("settings") == settings


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Fits, writes the files, says where they lie; returns the path of the npz."""
    from xp_gmm_source import plot

    where: dict[str, Any] = {"data_root": arguments.data_root}
    train = load(arguments.dataset, **where)
    if arguments.n_components == "auto":
        arguments = dataclasses.replace(arguments, n_components=chosen(arguments, train, mesh))
    config = settings_of(FitConfig, arguments)
    d = int(np.prod(train.image_shape))
    kind = f"gmm{config.n_components}_pca{config.n_pca or d}_{config.covariance_type}"
    stem = train.origin or file_stem(config.dataset, **where)
    path = arguments.output_dir / f"{stem}_{kind}.npz"
    known = dataclasses.replace(config, dataset=identity(config.dataset, **where))
    settings = dataclasses.asdict(known)
    if _finished(path, settings):
        print(f"there already, with these settings: {path}")
        return path
    try:
        test_images = load(config.dataset, split="test", **where).images
    except (FileNotFoundError, ValueError):
        test_images = None  # a folder of images need not have any
    run = runs.open_run(arguments.results, EXPERIMENT, f"fit-{train.name}_{kind}", known, seed=0)
    print(
        f"{train.name}: {len(train.images)} images of {d} pixels, K = {config.n_components}, "
        f"{config.covariance_type}, {config.engine}"
    )
    fitted = fit_images(config, train.images, test_images=test_images, run=run, mesh=mesh)
    fitted = fitted._replace(
        about=fitted.about | {"settings": settings, "environment": runs.environment()}
    )
    stored = image_mixture(fitted, train.image_shape)
    mean, std = stored.mean, stored.std
    if config.n_stat_samples:
        key = keys_of(config).draws
        mean, std = sampled_moments(key, stored, config.n_stat_samples, config.batch_size)
    stats = path.with_name(f"{path.stem}_stats.pt")
    gmm_files.save_published(path.with_suffix(".pkl"), stored, regularization=config.reg_covar)
    gmm_files.save_stats(stats, mean, std, train.image_shape)
    gmm_files.save(path, stored)
    run.finish(log_likelihoods=np.asarray(stored.about["log_likelihoods"]))
    _say(stored.about, d if fitted.projection is None else len(fitted.projection.components))
    print(f"PyTorch:  {path.with_suffix('.pkl')}, {stats}")
    print(f"JAX:      {path}")
    print(f"figure:   {plot.mixture_sheet(stored, train.name, path.with_suffix('.png'))}")
    return path


def _say(about: dict[str, Any], dimension: int) -> None:
    history = about["log_likelihoods"]
    ended = "converged" if about["converged"] else "not converged: raise --max_iter"
    print(
        f"log-likelihood {history[-1] / dimension:.4f} nats per dimension after {len(history)} "
        f"iterations ({ended}), {about['seconds']:.1f} s"
    )
    if "variance_kept" in about:
        print(f"the PCA keeps {about['variance_kept']:.1%} of the variance")
    if "test_log_likelihood" in about:
        print(f"test images: {about['test_log_likelihood'] / dimension:.4f} nats per dimension")
    for repair in about["repairs"]:
        print(f"repaired: {repair}")


if __name__ == "__main__":
    lower = "--n_components, --n_pca or --batch_size, or take another --covariance_type"
    run_command(main, lambda: tyro.cli(Arguments), lower=lower)
