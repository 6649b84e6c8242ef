"""Settings of the study: known mixtures, intervals, training, ablation, solvers."""

from dataclasses import dataclass, field, replace
from typing import Literal

from lib.runs.settings import check_sizes

EXPERIMENT = "xp_data_mixing"
"""The folder of results."""

SIGMAS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0)
"""Bandwidths, sigma over sqrt(median squared distance / 2)."""


@dataclass(frozen=True)
class Samples:
    """Classes of images as the sources; targets with shares of the classes from Dirichlet(1/2)."""

    dataset: str = "fashion_mnist"
    """A name, or a folder or zip of images, as lib.datasets.load takes it."""
    space: Literal["pixels", "gradients"] = "pixels"
    """gradients: projected gradients of an MLP that was trained on images in neither sources nor
    targets. They depend on labels, the target's too."""
    num_per_class: int = 500
    num_target: int = 1000
    target_from: Literal["test", "rest"] = "test"
    """The test split, or images of the training split that are in no source."""
    labels: Literal["fixed", "drawn"] = "fixed"
    """fixed: each class has its share of the target's images. drawn: the images' classes are
    independent draws, which adds their noise."""

    def __post_init__(self):
        check_sizes(self, "num_per_class", "num_target")


DIGITS = Samples(dataset="digits", num_per_class=50, num_target=80, target_from="rest")


@dataclass(frozen=True)
class RecoveryConfig:
    """Every estimator on the same sources and targets."""

    samples: Samples = Samples()
    num_targets: int = 4
    num_features: tuple[int, ...] = (100, 1000)
    num_chosen: int = 1000
    """Frequencies of the features that are chosen, and of EMQ's classifiers."""

    def __post_init__(self):
        check_sizes(self, "num_targets", "num_chosen")


@dataclass(frozen=True)
class CoverageConfig:
    """Intervals on sources and targets that are drawn again and again from one mixture."""

    samples: Samples = Samples(labels="drawn")
    estimator: Literal["auto", "whitened", "mmd"] = "auto"
    """auto, whitened: what features are used is chosen once, on a draw that is not counted. mmd:
    the U-statistic at the median bandwidth."""
    resamples: int = 200
    replicates: int = 200
    confidence: float = 0.9
    num_features: int = 1000
    small_set: tuple[int, int] | None = None
    """(class, rows): one source has so many rows, the others num_per_class."""

    def __post_init__(self):
        check_sizes(self, "resamples", "replicates", "num_features")


@dataclass(frozen=True)
class DownstreamConfig:
    """A classifier trained on a mixture of sources of unequal sizes, evaluated on the target's."""

    samples: Samples = Samples()
    """num_per_class does not count here."""
    largest: int = 2000
    """Rows of the sources, geometric from here to `smallest`, in random order."""
    smallest: int = 200
    num_images: int = 2000
    """Drawn from the mixture, sources being repeated where they are too small."""
    num_epochs: int = 20
    hidden: int = 128
    learning_rate: float = 1e-3
    num_features: int = 1000

    def __post_init__(self):
        check_sizes(self, "smallest", "num_images", "num_epochs", "hidden")
        if self.largest < self.smallest:
            raise ValueError(f"largest must be at least smallest: {self.largest}, {self.smallest}")


@dataclass(frozen=True)
class AblationConfig:
    """MMD (U-statistic) over bandwidths, features and sizes of the sources."""

    samples: Samples = Samples()
    num_targets: int = 4
    sizes: tuple[int, ...] = (50, 100, 200, 500)
    """Rows per source; the last is samples.num_per_class."""
    num_features: tuple[int, ...] = (30, 100, 300, 1000)

    def __post_init__(self):
        check_sizes(self, "num_targets")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[-1] != (
            self.samples.num_per_class
        ):
            raise ValueError(
                f"sizes must rise to num_per_class, {self.samples.num_per_class}: {self.sizes}"
            )


@dataclass(frozen=True)
class SolversConfig:
    """The same problems by several solvers; classes are split into parts for more sources."""

    samples: Samples = Samples()
    parts: tuple[int, ...] = (1, 5, 20)
    """Sources per class; each divides the last, the last num_per_class."""
    solvers: tuple[str, ...] = ("OSQP", "CLARABEL", "SCS")
    ridge: float = 1e-5

    def __post_init__(self):
        most = self.parts[-1]
        if self.samples.num_per_class % most or any(most % part for part in self.parts):
            raise ValueError(
                f"parts {self.parts} must divide the last, and that {self.samples.num_per_class}"
            )


Config = RecoveryConfig | CoverageConfig | DownstreamConfig | AblationConfig | SolversConfig
Preset = Literal["quick", "paper"]


@dataclass(frozen=True)
class Group:
    """Settings by label, and how many seeds each runs."""

    settings: dict[str, Config] = field(default_factory=dict)
    seeds: int = 1


_ESTIMATORS: dict[str, Literal["auto", "whitened", "mmd"]] = {
    "auto": "auto",
    "whitened": "whitened",
    "MMD": "mmd",
}
_DRAWN = Samples(labels="drawn")
_REST = replace(_DRAWN, target_from="rest")
GROUPS: dict[str, Group] = {
    "recovery": Group(
        {
            "pixels": RecoveryConfig(),
            "pixels, no shift": RecoveryConfig(Samples(target_from="rest")),
            "gradients": RecoveryConfig(Samples(space="gradients")),
            "digits, pixels": RecoveryConfig(DIGITS),
            "digits, gradients": RecoveryConfig(replace(DIGITS, space="gradients")),
        },
        seeds=5,
    ),
    "coverage": Group(
        {
            f"{name}{shift}": CoverageConfig(samples, estimator=estimator)
            for name, estimator in _ESTIMATORS.items()
            for shift, samples in (("", _DRAWN), (", no shift", _REST))
        }
    ),
    "unequal": Group(
        {
            f"class {label}: {rows} rows, {name}": CoverageConfig(
                _REST, estimator=estimator, small_set=(label, rows)
            )
            for label, rows in ((6, 30), (6, 100), (8, 30))
            for name, estimator in _ESTIMATORS.items()
            if name != "whitened"
        }
    ),
    "downstream": Group({"pixels": DownstreamConfig()}, seeds=10),
    "ablation": Group({"pixels": AblationConfig()}, seeds=3),
    "solvers": Group({"pixels": SolversConfig()}),
}

QUICK: dict[str, Group] = {
    "recovery": Group(
        {
            "digits, pixels": RecoveryConfig(DIGITS, num_features=(100,), num_chosen=100),
            "digits, gradients": RecoveryConfig(
                replace(DIGITS, space="gradients"), num_features=(100,), num_chosen=100
            ),
        }
    ),
    "coverage": Group(
        {
            "auto": CoverageConfig(
                replace(DIGITS, labels="drawn"), resamples=20, replicates=50, num_features=100
            ),
        }
    ),
    "unequal": Group(
        {
            "class 8: 15 rows": CoverageConfig(
                replace(DIGITS, labels="drawn"),
                estimator="mmd",
                resamples=10,
                replicates=50,
                num_features=100,
                small_set=(8, 15),
            ),
        }
    ),
    "downstream": Group(
        {
            "pixels": DownstreamConfig(
                DIGITS,
                largest=60,
                smallest=15,
                num_images=400,
                num_epochs=20,
                hidden=32,
                num_features=100,
            )
        },
        seeds=2,
    ),
    "ablation": Group(
        {"pixels": AblationConfig(DIGITS, num_targets=2, sizes=(10, 50), num_features=(30, 300))}
    ),
    "solvers": Group({"pixels": SolversConfig(DIGITS, parts=(1, 5))}),
}


def presets(preset: Preset) -> dict[str, Group]:
    """The groups of a preset."""
    return GROUPS if preset == "paper" else QUICK
