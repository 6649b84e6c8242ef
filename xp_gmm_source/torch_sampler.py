"""`GMM_TORCH`: standardised draws of a fitted mixture for PyTorch code, from the published files.

    model_data = joblib.load('data/cifar10_gmm2_pca3072_full.pkl')
    stats = torch.load('data/cifar10_gmm2_pca3072_full_stats.pt')
    gmm = GMM_TORCH(gmm=model_data['gmm'], gmm_stats=stats, device='cuda', pca=model_data['pca'])
    x0 = gmm.sample(512)                                    # (512, 3, 32, 32)

or, without a pickle, `GMM_TORCH.from_npz('data/cifar10_gmm2_pca3072_full.npz', device='cuda')`.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from lib import gmm as mixtures
from lib.keys import check_seed
from xp_gmm_source import gmm_files
from xp_gmm_source.sources import SMALLEST_DEVIATION


class GMM_TORCH:
    """Draws x0 = (x - mean) / std of a Gaussian mixture, as images (B, channels, H, W), float32.

    Args:
      gmm: a `sklearn.mixture.GaussianMixture` of any covariance type, in the order [channels, H, W]
        of its pixels or in the coordinates of `pca`.
      gmm_stats: {'mean', 'std'} of shape (1, channels, H, W), as `gmm_fit.py` writes them.
      device: where factors are kept and draws made.
      pca: the `sklearn.decomposition.PCA` that the mixture was fitted behind; draws are mapped back
        to pixels.
      seed: of a generator of its own. None: torch's global one, so that `torch.manual_seed` counts.
      per_channel: divide by the channel's mean of std, as the published sampler does, in place of
        every pixel's own; variance is then 1 at no pixel in particular.

    A batch costs O(B d^2) operations and O(B d) memory: draws that share a component share its
    factor. Raises ValueError where the shapes of mixture, PCA and statistics do not fit.
    """

    def __init__(
        self,
        gmm: Any,
        gmm_stats: dict[str, torch.Tensor],
        device: str | torch.device = "cpu",
        *,
        pca: Any = None,
        seed: int | None = None,
        per_channel: bool = False,
    ):
        projection = None
        if pca is not None:
            projection = np.asarray(pca.components_), np.asarray(pca.mean_)
        self._set(mixtures.from_sklearn(gmm), projection, gmm_stats, device, seed, per_channel)

    @classmethod
    def from_npz(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
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
            projection = stored.projection.components[:, order], stored.projection.centre[order]
        sampler = cls.__new__(cls)
        sampler._set(mixture, projection, stats, device, seed, per_channel)
        return sampler

    def _set(self, mixture, projection, stats, device, seed, per_channel) -> None:
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
            return torch.tensor(np.asarray(array, np.float32), device=device)

        self.device = torch.device(device)
        self._weights = torch.tensor(np.asarray(mixture.weights), device=device)
        self._means = tensor(mixture.means)
        self._structure = jax.tree.map(tensor, mixture.covariance)
        self._projection = None if projection is None else [tensor(one) for one in projection]
        self._mean = mean.to(self.device, torch.float32)
        # A pixel that hardly varies stays at 0: rounding errors are not blown up.
        smallest = SMALLEST_DEVIATION * std.square().mean().sqrt()
        self._std = torch.where(std > smallest, std, 1).to(self.device, torch.float32)
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(check_seed(seed))

    def sample(self, batch_size: int) -> torch.Tensor:
        """(batch_size, channels, H, W): standardised draws, float32, on the device."""
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        owners = torch.multinomial(
            self._weights, batch_size, replacement=True, generator=self._generator
        )
        draws = self._means[owners] + self._colour(owners)
        if self._projection is not None:
            components, centre = self._projection
            draws = draws @ components + centre
        return (draws.reshape(batch_size, *self.shape) - self._mean) / self._std

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self._generator)

    def _colour(self, owners: torch.Tensor) -> torch.Tensor:
        """Draws of N(0, Sigma_k), k = owners[i]."""
        num, d = len(owners), self._means.shape[1]
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


def _grouped(noise: torch.Tensor, owners: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Row i is factors[owners[i]] noise[i]: one product for each component that is drawn."""
    result = noise.new_empty(len(noise), factors.shape[1])
    for k in owners.unique().tolist():
        rows = (owners == k).nonzero()[:, 0]
        result[rows] = noise[rows] @ factors[k].T
    return result
