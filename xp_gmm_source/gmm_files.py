"""Mixtures of images in files: ours without pickle, and the published pair for PyTorch.

`NAME.npz` is what our own code reads (`load`): only numbers, in the order of our images, [H, W,
channels]. `NAME.pkl` and `NAME_stats.pt` are the published files, in PyTorch's order [channels, H,
W]: a joblib dict {'gmm': GaussianMixture, 'pca': PCA or None}, and {'mean', 'std'} of shape
(1, channels, H, W). A pickle runs what its author put into it, so `load_published` wants to be told
that the author is trusted.
"""

import io
import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import joblib
import numpy as np

from lib import gmm
from lib.runs.files import atomic_file, load_arrays, save_arrays, write_bytes
from xp_gmm_source.sources import Projection, moments_of

FORMAT = "mixture of images, version 1"
_KINDS = {
    "full": gmm.Full,
    "tied": gmm.Tied,
    "diag": gmm.Diagonal,
    "spherical": gmm.Spherical,
    "low_rank": gmm.LowRank,
}
# What is stored of a structure; the rest follows from it.
_FACTORS = {
    "full": ("cholesky",),
    "tied": ("cholesky",),
    "diag": ("scales",),
    "spherical": ("scales",),
    "low_rank": ("loadings", "scales"),
}


class ImageMixture(NamedTuple):
    """A mixture of images in [-1, 1] as rows of H W channels numbers, and how it came about.

    With a projection the mixture lives in its coordinates. `mean` and `std` [d] are those of the
    mixture's draws as pixels, by which a source is standardized; `about` is of JSON's own types.
    """

    mixture: gmm.Mixture
    projection: Projection | None
    mean: np.ndarray
    std: np.ndarray
    image_shape: tuple[int, int, int]
    about: dict[str, Any]


def kind_of(mixture: gmm.Mixture) -> str:
    """full, tied, diag, spherical or low_rank."""
    return next(name for name, kind in _KINDS.items() if isinstance(mixture.covariance, kind))


def channels_first(image_shape: tuple[int, int, int]) -> np.ndarray:
    """Where the number at each place of [channels, H, W] lies in [H, W, channels], flat."""
    places = np.arange(np.prod(image_shape)).reshape(image_shape)
    return places.transpose(2, 0, 1).ravel()


# ---- Ours


def save(path: Path, stored: ImageMixture) -> None:
    """Writes `stored` as an npz of numbers, in float64, atomically."""
    kind = kind_of(stored.mixture)
    arrays = {name: getattr(stored.mixture.covariance, name) for name in _FACTORS[kind]}
    if stored.projection is not None:
        arrays |= {"pca_components": stored.projection.components}
        arrays |= {"pca_centre": stored.projection.center}
    header = {"format": FORMAT, "kind": kind, "about": stored.about}
    save_arrays(
        path,
        header=np.asarray(json.dumps(header)),
        image_shape=np.asarray(stored.image_shape),
        weights=np.asarray(stored.mixture.weights, np.float64),
        means=np.asarray(stored.mixture.means, np.float64),
        mean=np.asarray(stored.mean, np.float64),
        std=np.asarray(stored.std, np.float64),
        **{name: np.asarray(array, np.float64) for name, array in arrays.items()},
    )


def load(path: Path) -> ImageMixture:
    """What `save` wrote. Raises FileNotFoundError, or ValueError naming the file and what is wrong
    with it: damaged, no mixture, shapes that do not fit, NaN."""
    arrays = load_arrays(path)
    try:
        header = json.loads(str(arrays.pop("header")))
        if header["format"] != FORMAT:
            raise KeyError("format")
        kind = header["kind"]
        shape = tuple(int(size) for size in arrays.pop("image_shape"))
        wanted = {"weights", "means", "mean", "std", *_FACTORS[kind]}
        if "pca_components" in arrays:
            wanted |= {"pca_components", "pca_centre"}
        missing, about = wanted - set(arrays), dict(header["about"])
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError("image_shape")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no mixture of images written by gmm_fit.py") from error
    if missing:
        raise ValueError(f"{path} holds no {', '.join(sorted(missing))}")
    for name, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} is not all finite numbers")
    _check_shapes(path, kind, arrays, math.prod(shape))
    mixture = gmm.Mixture(arrays["weights"], arrays["means"], _structure(kind, arrays))
    projection = None
    if "pca_components" in arrays:
        projection = Projection(arrays["pca_components"], arrays["pca_centre"])
    return ImageMixture(mixture, projection, arrays["mean"], arrays["std"], shape, about)


def _check_shapes(path: Path, kind: str, arrays: dict[str, np.ndarray], pixels: int) -> None:
    # Sizes that others are held against; an array of another rank has none, and is found below.
    num = arrays["weights"].size
    d = (*arrays["pca_components"].shape, 0)[0] if "pca_components" in arrays else pixels
    rank = (0, *arrays["loadings"].shape)[-1] if "loadings" in arrays else 0
    expected = {
        "weights": (num,),
        "means": (num, d),
        "mean": (pixels,),
        "std": (pixels,),
        "cholesky": (d, d) if kind == "tied" else (num, d, d),
        "scales": (num,) if kind == "spherical" else (num, d),
        "loadings": (num, d, rank),
        "pca_components": (d, pixels),
        "pca_centre": (pixels,),
    }
    for name, array in arrays.items():
        if array.shape != expected.get(name):
            raise ValueError(f"{path}: {name} is {array.shape}, not {expected.get(name)}")


def _structure(kind: str, arrays: dict[str, np.ndarray]) -> gmm.Covariance:
    match kind:
        case "full" | "tied":
            return gmm.from_cholesky(arrays["cholesky"])
        case "diag":
            return gmm.Diagonal(arrays["scales"])
        case "spherical":
            return gmm.Spherical(arrays["scales"], np.ones(arrays["means"].shape[1]))
    loadings, scales = arrays["loadings"], arrays["scales"]
    with jax.enable_x64(True):
        return gmm.LowRank(loadings, scales, np.asarray(gmm.latent_projections(loadings, scales)))


# ---- The published pair


def published(stored: ImageMixture, *, regularization: float = 1e-6) -> dict[str, Any]:
    """{'gmm': GaussianMixture, 'pca': PCA or None} in the order [channels, H, W]; low rank +
    diagonal is written out as full."""
    order = channels_first(stored.image_shape)
    if stored.projection is None:
        mixture, pca = gmm.permuted(stored.mixture, order), None
    else:
        mixture, pca = stored.mixture, _to_sklearn_pca(stored.projection, order)
    return {"gmm": gmm.to_sklearn(mixture, regularization=regularization), "pca": pca}


def save_published(path: Path, stored: ImageMixture, *, regularization: float = 1e-6) -> None:
    """Writes the published .pkl, atomically."""
    content = published(stored, regularization=regularization)
    with atomic_file(path) as file:
        joblib.dump(content, file)


def save_stats(
    path: Path, mean: np.ndarray, std: np.ndarray, image_shape: tuple[int, int, int]
) -> None:
    """Writes the published _stats.pt of pixels in our order, atomically."""
    import torch

    order, (height, width, channels) = channels_first(image_shape), image_shape
    shape = 1, channels, height, width
    arrays = {"mean": mean, "std": std}
    tensors = {
        name: torch.from_numpy(np.asarray(array, np.float32)[order].reshape(shape))
        for name, array in arrays.items()
    }
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_bytes(path, buffer.getvalue())


def load_stats(path: Path) -> dict[str, Any]:
    """The tensors {'mean', 'std'} of a _stats.pt, opened with weights_only=True.

    Raises ValueError naming the file unless both are finite, (1, channels, H, W), and every std
    positive.
    """
    import torch

    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the many parts of torch raise
        raise ValueError(
            f"{path} cannot be read as tensors: damaged, or not a _stats.pt"
        ) from error
    check_stats(stats, str(path))
    return stats


def check_stats(stats: Any, name: str) -> None:
    """Raises ValueError unless `stats` is {'mean', 'std'}, finite, (1, channels, H, W)."""
    import torch

    if not isinstance(stats, dict) or not {"mean", "std"} <= set(stats):
        raise ValueError(f"{name}: statistics are a dict of tensors 'mean' and 'std'")
    mean, std = stats["mean"], stats["std"]
    for key, tensor in (("mean", mean), ("std", std)):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or len(tensor) != 1:
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor)
            raise ValueError(f"{name}: '{key}' must be (1, channels, H, W), not {shape}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: '{key}' holds NaN or infinity")
    if mean.shape != std.shape:
        raise ValueError(f"{name}: 'mean' is {tuple(mean.shape)}, but 'std' {tuple(std.shape)}")
    if (std < 0).any():
        raise ValueError(f"{name}: 'std' is negative")


def load_published(
    path: Path, *, image_shape: tuple[int, int, int] | None = None, trust_pickle: bool = False
) -> ImageMixture:
    """A published .pkl as our own `ImageMixture`, with exact mean and std.

    `image_shape` (H, W, channels): by default 32 x 32 color at 3072 pixels, and square gray.
    Raises ValueError without `trust_pickle`, and on a file that is damaged or holds something else.
    """
    if not trust_pickle:
        raise ValueError(
            f"{path} is a pickle, which runs whatever its author put into it: pass trust_pickle "
            "(--trust_pickle) if you trust the author"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another version of scikit-learn
            content = joblib.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} cannot be unpickled ({error}): truncated or damaged") from error
    if not isinstance(content, dict) or "gmm" not in content:
        raise ValueError(f"{path} holds no dict with 'gmm' and 'pca'")
    return from_published(content, image_shape=image_shape, name=str(path))


def from_published(
    content: dict[str, Any], *, image_shape: tuple[int, int, int] | None = None, name: str = "gmm"
) -> ImageMixture:
    """As `load_published`, of the dict."""
    mixture, pca = gmm.from_sklearn(content["gmm"]), content.get("pca")
    d = mixture.means.shape[1] if pca is None else pca.components_.shape[1]
    if image_shape is None:
        image_shape = square_shape(d, name)
    height, width, channels = map(int, image_shape)
    if height * width * channels != d:
        raise ValueError(f"{name} is of {d} pixels, not of images of shape {image_shape}")
    back, projection = np.argsort(channels_first(image_shape)), None
    if pca is None:
        mixture = gmm.permuted(mixture, back)
    else:
        if getattr(pca, "whiten", False):
            raise ValueError(f"{name}: a whitening PCA has no place here")
        projection = Projection(
            np.asarray(pca.components_, np.float64)[:, back],
            np.asarray(pca.mean_, np.float64)[back],
        )
    mean, std = moments_of(mixture, projection)
    return ImageMixture(mixture, projection, mean, std, (height, width, channels), {"from": name})


def square_shape(num_pixels: int, name: str) -> tuple[int, int, int]:
    """(H, W, channels) of square images, in color where that fits. Raises ValueError, naming
    `name`, where the number is of no square."""
    for channels in (3, 1):
        side = math.isqrt(num_pixels // channels)
        if side**2 * channels == num_pixels:
            return side, side, channels
    raise ValueError(f"{name} is of {num_pixels} pixels, not of square images: give their shape")


def _to_sklearn_pca(projection: Projection, order: np.ndarray) -> Any:
    from sklearn.decomposition import PCA

    components = np.asarray(projection.components)[:, order]
    pca = PCA(n_components=len(components))
    pca.components_, pca.mean_ = components, np.asarray(projection.center)[order]
    pca.n_components_, pca.n_features_in_ = components.shape
    return pca
