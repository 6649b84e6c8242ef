"""`GMM_TORCH`: standardized draws of a fitted mixture for PyTorch code, from the published files.

    model_data = joblib.load('data/cifar10_gmm2_pca3072_full.pkl')
    stats = torch.load('data/cifar10_gmm2_pca3072_full_stats.pt')
    gmm = GMM_TORCH(gmm=model_data['gmm'], gmm_stats=stats, device='cuda', pca=model_data['pca'])
    x0 = gmm.sample(512)                                    # (512, 3, 32, 32)

or, without a pickle, `GMM_TORCH.from_npz('data/cifar10_gmm2_pca3072_full.npz', device='cuda')`.
From this repository's folder, and from this one, `from utils.gmm import GMM_TORCH` finds it too, as
in the published code.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from lib import gmm as mixtures
from lib.numerics import check_seed
from xp_gmm_source import gmm_files
from xp_gmm_source.sources import SMALLEST_DEVIATION

STATS_TYPES = "pixel_wise", "channel_wise"


class GMM_TORCH:
    """Draws x0 = (x - mean) / std of a Gaussian mixture, as images (B, channels, H, W).

    Args:
      gmm: a `sklearn.mixture.GaussianMixture` of any covariance type, in the order [channels, H, W]
        of its pixels or in the coordinates of `pca`.
      gmm_stats: {'mean', 'std'} of shape (1, channels, H, W), as `gmm_fit.py` writes them. None:
        draws are left as they are, mean 0 and std 1; images are then square, color where that
        fits.
      device: where factors are kept and draws made.
      dtype: of factors and draws.
      pca: the `sklearn.decomposition.PCA` that the mixture was fitted behind; draws are mapped back
        to pixels.
      seed: of a generator of its own. None: torch's global one, so that `torch.manual_seed` counts.
      per_channel: divide by the channel's mean of std, as the published sampler does, in place of
        every pixel's own; variance is then 1 at no pixel in particular.
      stats_type: "channel_wise" is `per_channel` under its published name.

    As published, it has `device`, `dtype`, `weights`, `means`, `n_cluster`, and of the statistics
    `mu` and `std`.

    A batch costs O(B d^2) operations and O(B d) memory: draws that share a component share its
    factor. Raises ValueError where the shapes of mixture, PCA and statistics do not fit.
    """

    def __init__(
        self,
        gmm: Any,
        gmm_stats: dict[str, torch.Tensor] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        pca: Any = None,
        seed: int | None = None,
        per_channel: bool = False,
        stats_type: str = "pixel_wise",
    ):
        if stats_type not in STATS_TYPES:
            raise ValueError(f"stats_type is one of {', '.join(STATS_TYPES)}, got {stats_type!r}")
        projection, per_channel = None, per_channel or stats_type == "channel_wise"
        if pca is not None:
            projection = np.asarray(pca.components_), np.asarray(pca.mean_)
        mixture = mixtures.from_sklearn(gmm)
        self._set(mixture, projection, gmm_stats, device, dtype, seed, per_channel)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        seed: int | None = None,
        per_channel: bool = False,
    ) -> "GMM_TORCH":
        """The sampler of an npz of `gmm_fit.py`, with the mixture's exact mean and std."""
        stored = gmm_files.load(Path(path))
        (height, width, channels), order = (
            stored.image_shape,
            gmm_files.channels_first(stored.image_shape),
        )
        stats = {
            name: torch.tensor(values[order].reshape(1, channels, height, width))
            for name, values in (("mean", stored.mean), ("std", stored.std))
        }
        projection, mixture = None, stored.mixture
        if stored.projection is None:
            mixture = mixtures.permuted(mixture, order)
        else:
            projection = stored.projection.components[:, order], stored.projection.center[order]
        sampler = cls.__new__(cls)
        sampler._set(mixture, projection, stats, device, dtype, seed, per_channel)
        return sampler

    def _set(self, mixture, projection, stats, device, dtype, seed, per_channel) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is a floating-point one of torch, got {dtype}")
        if stats is None:
            d = mixture.means.shape[1] if projection is None else projection[0].shape[1]
            height, width, channels = gmm_files.square_shape(d, "the mixture without gmm_stats")
            shape = 1, channels, height, width
            stats = {"mean": torch.zeros(shape), "std": torch.ones(shape)}
        gmm_files.check_stats(stats, "gmm_stats")
        mean, std = (stats[name].to(torch.float64) for name in ("mean", "std"))
        self.shape = tuple(mean.shape[1:])
        d, pixels = mixture.means.shape[1], mean.numel()
        if projection is None and d != pixels:
            raise ValueError(
                f"the mixture has {d} dimensions, the statistics {pixels} pixels "
                f"{self.shape}: pass the PCA it was fitted behind, or its own statistics"
            )
        if projection is not None and projection[0].shape != (d, pixels):
            raise ValueError(
                f"the PCA maps {projection[0].shape[1]} pixels to {projection[0].shape[0]}, the "
                f"mixture has {d} dimensions and the statistics {pixels} pixels {self.shape}"
            )
        if per_channel:
            mean, std = (x.mean(dim=(2, 3), keepdim=True) for x in (mean, std))

        def tensor(array):
            return torch.tensor(np.asarray(array, np.float64), dtype=dtype, device=device)

        self.device, self.dtype = torch.device(device), dtype
        self.weights = torch.tensor(np.asarray(mixture.weights), device=device)
        self.means, self.n_cluster = tensor(mixture.means), len(mixture.weights)
        self._structure = jax.tree.map(tensor, mixture.covariance)
        self._projection = None if projection is None else [tensor(part) for part in projection]
        self.mu = mean.to(self.device, dtype)
        # A pixel that hardly varies stays at 0: rounding errors are not blown up.
        smallest = SMALLEST_DEVIATION * std.square().mean().sqrt()
        self.std = torch.where(std > smallest, std, 1).to(self.device, dtype)
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(check_seed(seed))

    def sample(
        self, num_samples: int, return_cluster: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(num_samples, channels, H, W): standardized draws on the device; with `return_cluster`
        also the components (num_samples,) that they come from."""
        _check_number(num_samples)
        owners = torch.multinomial(
            self.weights, num_samples, replacement=True, generator=self._generator
        )
        draws = (self._images(owners) - self.mu) / self.std
        return (draws, owners) if return_cluster else draws

    def sample_from_cluster(
        self, num_samples: int, cluster_idx: int | torch.Tensor
    ) -> torch.Tensor:
        """(num_samples, channels, H, W): draws of one component, or of one each. As published they
        are pixels, not standardized: `(x - gmm.mu) / gmm.std` does it."""
        _check_number(num_samples)
        owners = torch.as_tensor(cluster_idx, device=self.device)
        if owners.is_floating_point() or owners.shape not in ((), (num_samples,)):
            raise ValueError(
                f"cluster_idx is one component or {num_samples} of them, got {cluster_idx}"
            )
        if not (int(owners.min()) >= 0 and int(owners.max()) < self.n_cluster):
            raise ValueError(f"cluster_idx is from 0 to {self.n_cluster - 1}, got {cluster_idx}")
        return self._images(owners.long().expand(num_samples))

    def _images(self, owners: torch.Tensor) -> torch.Tensor:
        """Draws of the components `owners`, as pixels."""
        draws = self.means[owners] + self._color(owners)
        if self._projection is not None:
            components, center = self._projection
            draws = draws @ components + center
        return draws.reshape(len(owners), *self.shape)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=self._generator)

    def _color(self, owners: torch.Tensor) -> torch.Tensor:
        """Draws of N(0, Sigma_k), k = owners[i]."""
        num, d = len(owners), self.means.shape[1]
        tensors: dict[str, torch.Tensor] = self._structure._asdict()
        match self._structure:
            case mixtures.Full():
                return _grouped(self._noise(num, d), owners, tensors["cholesky"])
            case mixtures.Tied():
                return self._noise(num, d) @ tensors["cholesky"].T
            case mixtures.Diagonal():
                return tensors["scales"][owners] * self._noise(num, d)
            case mixtures.Spherical():
                return tensors["scales"][owners][:, None] * self._noise(num, d)
        latent = self._noise(num, tensors["loadings"].shape[2])
        noise = tensors["scales"][owners] * self._noise(num, d)
        return _grouped(latent, owners, tensors["loadings"]) + noise


def _check_number(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _grouped(noise: torch.Tensor, owners: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Row i is factors[owners[i]] noise[i]: one product for each component that is drawn."""
    result = noise.new_empty(len(noise), factors.shape[1])
    for k in owners.unique().tolist():
        rows = (owners == k).nonzero()[:, 0]
        result[rows] = noise[rows] @ factors[k].T
    return result
