"""Settings of the (de)-regularized MMD flows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lib.runs.settings import check_not_negative, check_positive, check_sizes

EXPERIMENT = "xp_drmmd"
"""The folder of results."""

IMAGES = ("digits", "mnist", "fashion_mnist")
DatasetName = Literal[
    "ThreeRing", "FourGaussian", "Gaussian1D", "Gaussian1DExact", "Gaussian1d", "Gaussian2d",
    "Student", "digits", "mnist", "fashion_mnist", "files",
]  # fmt: skip
FlowName = Literal["drmmd", "mmd", "kale", "sliced_mmd", "ula", "svgd"]
KernelName = Literal["Gaussian", "Laplace", "IMQ", "Energy"]
FilterName = Literal["tikhonov", "showalter", "cutoff"]
OptimizerName = Literal["sgd", "momentum", "adam"]


@dataclass(frozen=True)
class FlowConfig:
    """One flow of particles (section 7 of Chen et al., 2025)."""

    dataset: DatasetName = "ThreeRing"
    """Gaussian1d, Gaussian2d and Student are those of the published code. Its Gaussian1d is N(0, 1)
    within [-1, 1] from N(0, .01^2); the Gaussian1D here is N(0, 1) from N(0, 1/2). files: the rows
    of `target`."""
    target: str | None = None
    """A file of rows (`lib.rows.files`), all of which are the target."""
    source: str | None = None
    """One whose rows are the particles at the start, beside `target`. None: `source_particle_num`
    of a normal distribution with the target's mean and mean variance."""
    flow: FlowName = "drmmd"
    """sliced_mmd is the flow mmd of the kernel Energy, which `kernel` need not say, by
    `num_directions` new directions per step: n log n instead of n^2."""
    kernel: KernelName = "Gaussian"
    """All but Energy are functions of |x - y|, the Euclidean distance; see `distance`. Energy is
    (|x| + |y| - |x - y|) / (2 sigma)."""
    distance: Literal["l2", "l1"] = "l2"
    """Of the Laplace kernel, exp(-|x - y| / sigma): l2 is Euclidean; l1, the sum of absolute
    differences, is what the published code calls Laplace."""
    bandwidth: float = 0.15
    """sigma, a length: exp(-|x - y|^2 / (2 sigma^2)) for the Gaussian. 0: the median distance of
    the target."""
    lmbda: float = 1e-3
    """Regularization; the first one where `adaptive` is not "fixed"."""
    step_size: float = 1e-4
    """Step size."""
    num_steps: int = 20_000
    source_particle_num: int = 300
    target_particle_num: int = 300
    opt: OptimizerName = "sgd"
    """momentum: heavy ball, m = .9."""
    decay: bool = False
    """The step decays linearly to 0."""
    adaptive: Literal["fixed", "paper", "published"] = "fixed"
    """paper: lambda_n ~ DrMMD^(1/(r+1)), at most 1. published: r = 1, no bound, and the step falls
    with lambda, not below 1e-4."""
    regularity: float = 1.0
    """r of the paper's rule."""
    step_rule: Literal["fixed", "normalized"] = "fixed"
    """normalized: step_size sqrt(lambda / DrMMD_n). The paper's bound for descent has chi^2 there,
    of which DrMMD / (1 + lambda) is only a lower bound: no descent is guaranteed."""
    largest_step_size: float = 0.1
    """Of the normalized step."""
    spectral_filter: FilterName = "tikhonov"
    noise: float = 0.0
    """Standard deviation of the noise injected where the velocity is evaluated (Arbel et al.,
    2019); it falls as 1 / sqrt(step)."""
    diffusion_noise_scale: float = 1.0
    """Factor of the noise of the Langevin flow, ula."""
    target_scale: float = 1.0
    """Standard deviation of the target Gaussian2d."""
    approximation: Literal["none", "nystrom", "rff"] = "none"
    """Of the kernel, by `rank` features, for samples too large for a Gram matrix: MMD and DrMMD
    then cost O(N rank) a step, nystrom O(M rank^2): its landmarks are target points and, anew at
    each step, particles, half of each. rff: only Gaussian."""
    rank: int = 300
    num_directions: int = 100
    """Of sliced_mmd."""
    records: int = 50
    """How often particles are kept and evaluated."""
    components: int = 50
    """Principal components of images."""

    def __post_init__(self):
        if (self.dataset == "files") != (self.target is not None):
            raise ValueError("--target PATH is of the data set files, and of no other")
        if self.source is not None and self.target is None:
            raise ValueError(f"--source {self.source} needs --target PATH, where it flows to")
        check_positive(
            self, "lmbda", "step_size", "largest_step_size", "regularity", "target_scale"
        )
        check_not_negative(self, "bandwidth", "noise", "diffusion_noise_scale")
        for name, fits, where in (
            ("distance", self.kernel == "Laplace", "--kernel Laplace"),
            ("diffusion_noise_scale", self.flow == "ula", "--flow ula"),
            ("target_scale", self.dataset == "Gaussian2d", "--dataset Gaussian2d"),
            ("num_directions", self.flow == "sliced_mmd", "--flow sliced_mmd"),
            ("noise", self.flow in ("mmd", "drmmd", "kale"), "--flow mmd, drmmd or kale"),
        ):
            value = getattr(self, name)
            if not fits and value != getattr(FlowConfig, name):
                raise ValueError(f"{name} {value} has no effect without {where}")
        if self.flow == "sliced_mmd" and self.kernel not in ("Gaussian", "Energy"):
            raise ValueError(f"sliced_mmd is of the kernel Energy, not of {self.kernel}")
        if self.flow == "svgd" and self.kernel == "Energy":
            raise ValueError("svgd needs a kernel of x - y, which Energy is not")
        check_sizes(
            self,
            "rank",
            "num_directions",
            "num_steps",
            "source_particle_num",
            "target_particle_num",
            "records",
            "components",
        )

    def without_effect(self) -> tuple[str, ...]:
        """The later settings that change nothing here: a run made before them keeps its name."""
        return (
            *(name for name in ("target", "source") if getattr(self, name) is None),
            *(() if self.kernel == "Laplace" else ("distance",)),
            *(() if self.diffusion_noise_scale != 1 else ("diffusion_noise_scale",)),
            *(() if self.dataset == "Gaussian2d" else ("target_scale",)),
            *(() if self.flow == "sliced_mmd" else ("num_directions",)),
        )


@dataclass(frozen=True)
class StudentConfig:
    """Section 7 of Chen et al. (2025)."""

    flow: Literal["mmd", "drmmd"] = "drmmd"
    form: Literal["particles", "dense"] = "particles"
    """dense: W is shared, as in the published code."""
    lmbda: float = 0.1
    step_size: float = 0.1
    """Of SGD on the particles: times N the gradient of the functional."""
    noise: float = 0.0
    """Standard deviation of the noise injected at first; halved every `halve_every` epochs."""
    halve_every: int = 1000
    num_epochs: int = 15_000
    students: int = 1000
    teachers: int = 1
    num_inputs: int = 1000
    """Inputs on the sphere, for training and as many for validation."""
    batch_size: int = 100
    records: int = 100

    def __post_init__(self):
        check_positive(self, "lmbda", "step_size")
        check_not_negative(self, "noise")
        check_sizes(
            self, "halve_every", "num_epochs", "students", "teachers", "batch_size", "records"
        )
        if self.num_inputs % self.batch_size:
            raise ValueError(
                f"batches of {self.batch_size} inputs do not divide num_inputs, {self.num_inputs}"
            )


Preset = Literal["quick", "paper"]

# Three rings (Figure 2 of the paper), each flow beside others of the same length of step: the
# witness of DrMMD is about twice that of KALE, and 1 / lambda times that of MMD.
RINGS: dict[str, FlowConfig] = {
    "DrMMD": FlowConfig(num_steps=100_000),
    "KALE": FlowConfig(flow="kale", num_steps=100_000),
    "KALE, 2 x step": FlowConfig(flow="kale", step_size=2e-4, num_steps=100_000),
    "MMD": FlowConfig(flow="mmd", num_steps=100_000),
    "MMD, 100 x step": FlowConfig(flow="mmd", step_size=1e-2, num_steps=100_000),
    "MMD, 100 x step, noise": FlowConfig(flow="mmd", step_size=1e-2, noise=0.3, num_steps=100_000),
    "adaptive, published, from .1": FlowConfig(
        lmbda=0.1, step_size=1e-3, adaptive="published", num_steps=100_000
    ),
    "adaptive, published, from .01": FlowConfig(
        lmbda=0.01, step_size=1e-3, adaptive="published", num_steps=100_000
    ),
    "adaptive, paper, from .1": FlowConfig(lmbda=0.1, adaptive="paper", num_steps=100_000),
    "ours: normalized step": FlowConfig(step_size=3e-3, step_rule="normalized", num_steps=10_000),
    "ours: Adam, falling": FlowConfig(step_size=1e-2, opt="adam", decay=True, num_steps=10_000),
}

# The same rings and steps with the kernel of the energy distance, which sees far: all pairs, and
# sorted along directions.
ENERGY: dict[str, FlowConfig] = {
    "MMD, energy kernel": FlowConfig(flow="mmd", kernel="Energy", num_steps=100_000),
    "MMD, energy kernel, 100 x step": FlowConfig(
        flow="mmd", kernel="Energy", step_size=1e-2, num_steps=100_000
    ),
    "sliced MMD, 100 x step": FlowConfig(
        flow="sliced_mmd", step_size=1e-2, num_directions=20, num_steps=100_000
    ),
    "MMD, energy kernel, Adam, falling": FlowConfig(
        flow="mmd", kernel="Energy", step_size=1e-2, opt="adam", decay=True, num_steps=10_000
    ),
    "sliced MMD, Adam, falling": FlowConfig(
        flow="sliced_mmd", step_size=1e-2, num_directions=20, opt="adam", decay=True,
        num_steps=10_000,
    ),
}  # fmt: skip

_FOUR = FlowConfig(
    dataset="FourGaussian", bandwidth=2.0, lmbda=1e-2, step_size=1e-2, num_steps=20_000
)
FILTERS: dict[str, FlowConfig] = {
    "DrMMD, Tikhonov": _FOUR,
    "DrMMD, Showalter": replace(_FOUR, spectral_filter="showalter"),
    "DrMMD, cutoff": replace(_FOUR, spectral_filter="cutoff"),
    "KALE": replace(_FOUR, flow="kale"),
    "MMD": replace(_FOUR, flow="mmd"),
    "MMD, 100 x step": replace(_FOUR, flow="mmd", step_size=1.0),
    "Langevin (knows the density)": replace(_FOUR, flow="ula"),
    "Stein (knows the density)": replace(_FOUR, flow="svgd", step_size=0.1),
}

# N(0, 1/2) to N(0, 1): 3 units of time. "exact" targets are the whole of N(0, 1).
_LINE = FlowConfig(
    dataset="Gaussian1DExact",
    bandwidth=1.0,
    step_size=1e-3,
    num_steps=3_000,
    source_particle_num=500,
    target_particle_num=80,
)
GAUSSIAN: dict[str, FlowConfig] = {
    "lambda = .1": replace(_LINE, lmbda=0.1),
    "lambda = .01": replace(_LINE, lmbda=0.01),
    "lambda = .001": replace(_LINE, lmbda=0.001),
    "adaptive, paper, from .1": replace(_LINE, lmbda=0.1, adaptive="paper"),
    "lambda = .01, 500 samples": replace(
        _LINE, dataset="Gaussian1D", lmbda=0.01, target_particle_num=500
    ),
    "adaptive, 500 samples": replace(
        _LINE, dataset="Gaussian1D", lmbda=0.1, adaptive="paper", target_particle_num=500
    ),
}

# The document's open questions, on the rings.
_SHORT = FlowConfig(num_steps=20_000)
ABLATIONS: dict[str, FlowConfig] = {
    "Tikhonov": _SHORT,
    "Showalter": replace(_SHORT, spectral_filter="showalter"),
    "cutoff": replace(_SHORT, spectral_filter="cutoff"),
    **{f"bandwidth {h:g}": replace(_SHORT, bandwidth=h) for h in (0.05, 0.1, 0.3, 0.6)},
    **{
        f"adaptive, r = {r:g}": replace(_SHORT, lmbda=0.01, adaptive="paper", regularity=r)
        for r in (0.25, 0.5, 1.0, 2.0)
    },
    "Laplace kernel (not smooth)": replace(_SHORT, kernel="Laplace"),
    "IMQ kernel": replace(_SHORT, kernel="IMQ"),
}

_IMAGES = FlowConfig(
    dataset="fashion_mnist",
    bandwidth=0.0,
    lmbda=1e-3,
    step_size=1e-2,
    num_steps=20_000,
    source_particle_num=1000,
    target_particle_num=1000,
    records=20,
)
IMAGE_FLOWS: dict[str, FlowConfig] = {
    "DrMMD": _IMAGES,
    "MMD": replace(_IMAGES, flow="mmd"),
    "MMD, 100 x step": replace(_IMAGES, flow="mmd", step_size=1.0),
    "MMD, 1,000 x step": replace(_IMAGES, flow="mmd", step_size=10.0),
}

# lambda = .1 makes a step up to 2 (1 + lambda) / lambda = 22 times as long as that of MMD.
STUDENTS: dict[str, StudentConfig] = {
    "MMD": StudentConfig(flow="mmd"),
    "MMD, 5 x step": StudentConfig(flow="mmd", step_size=0.5),
    "MMD, 22 x step": StudentConfig(flow="mmd", step_size=2.2),
    "MMD, noise": StudentConfig(flow="mmd", noise=1.0),
    "MMD, 22 x step, noise": StudentConfig(flow="mmd", step_size=2.2, noise=1.0),
    "DrMMD": StudentConfig(),
    "DrMMD, noise": StudentConfig(noise=1.0),
    "MMD, shared layer": StudentConfig(flow="mmd", form="dense"),
    "DrMMD, shared layer": StudentConfig(form="dense"),
}

GROUPS: dict[str, Mapping[str, FlowConfig | StudentConfig]] = {
    "rings": RINGS,
    "energy": ENERGY,
    "gaussian": GAUSSIAN,
    "filters": FILTERS,
    "ablations": ABLATIONS,
    "images": IMAGE_FLOWS,
    "students": STUDENTS,
}


def _quick(config: FlowConfig | StudentConfig) -> FlowConfig | StudentConfig:
    """Fewer steps, embedded data."""
    if isinstance(config, StudentConfig):
        return replace(config, num_epochs=100, students=200, records=20)
    if config.dataset in IMAGES:
        small: dict[str, Any] = {
            "source_particle_num": 300,
            "target_particle_num": 300,
            "components": 20,
        }
        return replace(config, dataset="digits", num_steps=1_000, records=5, **small)
    return replace(config, num_steps=min(config.num_steps, 2_000), records=20)


QUICK = {
    "rings": ("DrMMD", "KALE", "MMD", "MMD, 100 x step", "ours: Adam, falling"),
    "energy": ("MMD, energy kernel, 100 x step", "sliced MMD, 100 x step"),
    "gaussian": ("lambda = .1", "lambda = .001", "adaptive, paper, from .1"),
    "filters": ("DrMMD, Tikhonov", "DrMMD, Showalter", "MMD", "Langevin (knows the density)"),
    "images": ("DrMMD", "MMD, 100 x step"),
    "students": ("MMD", "MMD, 22 x step", "DrMMD"),
}


def presets(preset: Preset) -> dict[str, Mapping[str, FlowConfig | StudentConfig]]:
    """The groups of a preset: label and settings of each flow."""
    if preset == "paper":
        return GROUPS
    return {
        group: {label: _quick(GROUPS[group][label]) for label in labels}
        for group, labels in QUICK.items()
    }
