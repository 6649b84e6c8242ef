"""Settings of mixtures as sources of flow matching."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lib.flow_matching.sampling import EVALUATIONS_PER_STEP, Method
from lib.numerics import check_seed
from lib.runs.settings import check_not_negative, check_positive, check_sizes

EXPERIMENT = "xp_gmm_source"
"""The folder of results."""

CovarianceType = Literal["full", "tied", "diag", "spherical", "low_rank"]


@dataclass(frozen=True)
class FitConfig:
    """One mixture of images, with the flags of the published gmm_fit.py and its defaults."""

    dataset: str = "cifar10"
    """A data set's name, or the path of a folder or zip of images."""
    n_components: int = 2
    """K, the number of Gaussian components."""
    n_pca: int | None = None
    """Principal components to fit in. None, or the number of pixels (3072): no PCA."""
    covariance_type: CovarianceType = "full"
    """low_rank: rank `rank` + diagonal, written to the .pkl as full."""
    n_stat_samples: int = 50_000
    """Draws behind the statistics of the .pt. 0: their exact values."""
    batch_size: int = 128
    """Draws at a time."""
    random_state: int = 0
    """Seed of the start, the PCA, the flips and the draws."""
    augmentation: bool = False
    """Flip each image, at random, once."""
    engine: Literal["jax", "sklearn"] = "jax"
    """sklearn: scikit-learn's own GaussianMixture, from its k-means start."""
    reg_covar: float = 1e-6
    """Added to every variance, in squared units of [-1, 1]."""
    tol: float = 1e-3
    """The fit ends when the mean log-likelihood moves by less, in nats per image."""
    max_iter: int = 100
    rank: int = 32
    """Of low_rank."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of products over images (jax) or of everything (sklearn); ours keeps sums and covariances in
    float64 either way."""

    def __post_init__(self):
        check_sizes(self, "n_components", "batch_size", "max_iter", "rank")
        if self.n_pca is not None:
            check_sizes(self, "n_pca")
        if self.n_stat_samples < 0 or self.n_stat_samples == 1:
            raise ValueError(f"n_stat_samples must be 0 or >= 2, got {self.n_stat_samples}")
        check_seed(self.random_state, "random_state")
        check_not_negative(self, "reg_covar", "tol")
        if self.engine == "sklearn" and self.covariance_type == "low_rank":
            raise ValueError("scikit-learn has no low_rank covariances: use --engine jax")


SourceName = Literal["gaussian", "norm_aligned", "gmm", "dct"]
Coupling = Literal["independent", "optimal", "mode", "semidiscrete"]
Preset = Literal["quick", "paper", "gpu"]


@dataclass(frozen=True)
class FlowConfig:
    """One flow-matching model, trained from one source, evaluated at several costs of sampling."""

    dataset: str = "mnist"
    """A data set's name, or the path of a folder or zip of images."""
    source: SourceName = "gaussian"
    """gaussian: N(0, I). norm_aligned: N(0, s^2 I), as long as the images on average. gmm: a
    mixture fitted to the training images, standardized. dct: N(0, I) without the frequencies that
    the images hardly have."""
    coupling: Coupling = "optimal"
    """Of x0 and x1. optimal: exact optimal transport within the minibatch. mode: x0 from the
    component responsible for x1 (gmm only). semidiscrete: optimal transport between the source and
    all training images."""
    potential_steps: int = 4000
    """Of the ascent that learns the potentials of semidiscrete, with `potential_batch` draws each:
    n d of these operations a step, n training images."""
    potential_batch: int = 256
    n_components: int = 10
    """Of the mixture, as the next two."""
    covariance_type: CovarianceType = "full"
    n_pca: int | None = None
    em_iterations: int = 30
    """At most, of fitting the mixture."""
    masked_share: float = 0.3
    """Of dct: the share of coefficients that are masked."""
    prune: bool = False
    """Sample, beside the source itself, from it without the directions in which there are no
    images (gaussian and norm_aligned)."""
    num_train: int | None = None
    """Training images; None: all."""
    augment_flip: bool = False
    width: int = 32
    """Channels of the U-Net at its finest level, as the next four."""
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    patch: int = 4
    num_steps: int = 2000
    """Of Adam, after `warm_up` steps at `learning_rate`, which decays to 0 along a cosine."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    warm_up: int = 100
    decay: bool = True
    """False: the rate stays, as published."""
    ema_decay: float = 0.999
    num_samples: int = 1000
    """Evaluated, against as many test images."""
    euler: tuple[int, ...] = (5, 10, 20, 40, 100)
    """Numbers of function evaluations."""
    heun: tuple[int, ...] = (20,)
    """Even: two evaluations per step."""
    ralston3: tuple[int, ...] = ()
    """Multiples of three: as many evaluations per step."""

    def __post_init__(self):
        check_sizes(
            self,
            "n_components",
            "width",
            "blocks",
            "patch",
            "num_steps",
            "batch_size",
            "num_samples",
            "potential_steps",
            "potential_batch",
        )
        if self.coupling == "semidiscrete" and self.augment_flip:
            raise ValueError("augment_flip makes images that semidiscrete potentials do not know")
        if self.coupling == "mode" and self.source != "gmm":
            raise ValueError(f"coupling mode is of a mixture, not of source {self.source}")
        if self.prune and self.source not in ("gaussian", "norm_aligned"):
            raise ValueError(f"prune is for gaussian and norm_aligned, not {self.source}")
        if not 0 <= self.masked_share < 1:
            raise ValueError(f"masked_share must be in [0, 1), got {self.masked_share}")
        for method, num in self.samplers():
            per_step = EVALUATIONS_PER_STEP[method]
            if num < 1 or num % per_step:
                raise ValueError(f"{method}: evaluations are a multiple of {per_step}, got {num}")
        check_positive(self, "learning_rate")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def without_effect(self) -> tuple[str, ...]:
        """Later settings that change nothing here: a run made before them keeps its name."""
        later = () if self.ralston3 else ("ralston3",)
        semidiscrete = self.coupling == "semidiscrete"
        return later if semidiscrete else (*later, "potential_steps", "potential_batch")

    def samplers(self) -> list[tuple[Method, int]]:
        """Methods and their numbers of evaluations."""
        return [(method, num) for method in get_args(Method) for num in getattr(self, method)]


def comparison(base: FlowConfig) -> dict[str, FlowConfig]:
    """The sources that are compared on one data set, at one cost of training."""
    diagonal = {"covariance_type": "diag"}
    choices: dict[str, dict[str, Any]] = {
        "Gaussian": {"coupling": "independent", "prune": True},
        "Gaussian, OT": {"prune": True},
        "Gaussian, semidiscrete": {"coupling": "semidiscrete"},
        "norm-aligned, OT": {"source": "norm_aligned", "prune": True},
        "DCT, OT": {"source": "dct"},
        "GMM-1, OT": {"source": "gmm", "n_components": 1},
        "GMM-10": {"source": "gmm", "coupling": "independent"},
        "GMM-10, OT": {"source": "gmm"},
        "GMM-10, mode-coupled": {"source": "gmm", "coupling": "mode"},
        "GMM-10 diagonal, mode-coupled": {"source": "gmm", "coupling": "mode", **diagonal},
    }
    if base.augment_flip:  # of images that the potentials would not know
        del choices["Gaussian, semidiscrete"]
    return {label: replace(base, **choice) for label, choice in choices.items()}


QUICK = FlowConfig(
    dataset="digits",
    width=16,
    patch=1,
    num_steps=500,
    num_samples=350,
    euler=(5, 10, 20, 40),
)
# Lee et al. (2025): U-Net of 128 channels, Adam 2e-4, batches of 512, 200,000 steps, EMA .9999.
CIFAR10 = FlowConfig(
    dataset="cifar10",
    augment_flip=True,
    width=128,
    multipliers=(1, 2, 2, 2),
    blocks=2,
    attention=(1,),
    patch=1,
    num_steps=200_000,
    batch_size=512,
    learning_rate=2e-4,
    warm_up=5000,
    decay=False,
    ema_decay=0.9999,
    num_samples=10_000,
)


def presets(preset: Preset) -> dict[str, dict[str, FlowConfig]]:
    """Groups of flows by label: one group a data set."""
    if preset == "quick":
        labels = ("Gaussian, OT", "GMM-10, OT", "GMM-10, mode-coupled")
        flows = comparison(QUICK)
        return {"digits": {label: flows[label] for label in labels}}
    if preset == "gpu":
        return {"cifar10": comparison(CIFAR10)}
    names = ("mnist", "fashion_mnist")
    return {name: comparison(FlowConfig(dataset=name)) for name in names}
