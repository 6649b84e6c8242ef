"""Settings of data set condensation: how images are condensed, and how they are evaluated.

Fields whose published names differ keep these as further names of their options.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from lib.runs.settings import check_not_negative, check_positive, check_sizes

EXPERIMENT = "xp_dataset_distillation"
"""The folder of results."""

MethodName = Literal["echo", "dm", "mmdsw"]
KernelName = Literal["gaussian", "gaussian_fixed", "linear", "polynomial", "energy", "rff"]
BaselineName = Literal["random", "herding", "kmeans", "whole"]
Start = Literal["real", "mixed", "noise"]
Strategy = Literal["idc", "dsa"]
"""Of augmentation: as IDC and M3D or as DSA and DM apply it."""
Networks = Literal["random", "trained", "aged", "interpolated"]
NetworkName = Literal["convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18"]
Preset = Literal["quick", "paper", "hour", "gpu"]


@dataclass(frozen=True)
class PoolConfig:
    """A pool of networks to condense under, trained on the images that a condensation may use."""

    dataset: str = "fashion_mnist"
    """A data set's name, or the path of a folder or zip of images."""
    network: NetworkName = "convnet"
    width: int = 128
    depth: int = 3
    pool_networks: int = 8
    pool_epochs: int = 2
    size: int | None = None
    """Side of the images, to which they are resized; None: as they are."""
    num_per_class: int | None = None
    """Training images per class, drawn at random; None: all."""
    held_out: int = 0
    """Training images per class that are held out."""
    flips: bool | None = None
    """As in `CondenseConfig`."""

    def __post_init__(self):
        check_sizes(self, "width", "depth", "pool_networks", "pool_epochs")


@dataclass(frozen=True)
class CondenseConfig:
    """A labelled set of images, condensed into `images_per_class` images of every class."""

    dataset: str = "fashion_mnist"
    """A data set's name, or the path of a folder or zip of images."""
    images_per_class: int = 10
    method: MethodName = "echo"
    """echo: MMD between the features of a class and of its condensed images. dm: the same with the
    linear kernel. mmdsw: MMD between all classes at once, by a sliced-Wasserstein kernel."""
    kernel: KernelName = "gaussian"
    """Of echo. gaussian: five bandwidths about the mean distance; gaussian_fixed: exp(-gamma D),
    gamma .1, 1, 5; rff: the first by random features."""
    bandwidth_scale: float = 1.0
    """Of gaussian and rff: multiplies their five squared bandwidths."""
    num_features: int = 500
    """Frequencies of rff."""
    space: Literal["features", "pixels"] = "features"
    """Where the distributions are compared. pixels: without network."""
    factor: int = 2
    """A stored image holds factor x factor images of the size of the data."""
    start: Start = "mixed"
    """real: images of the class. mixed: a smaller real image in every cell. noise: gray noise."""
    num_steps: Annotated[int, tyro.conf.arg(aliases=("--iterations",))] = 10_000
    steps_per_network: Annotated[int, tyro.conf.arg(aliases=("--iterations-per-network",))] = 5
    num_networks: int = 1
    """Random networks per step, whose losses are averaged."""
    networks_at_once: bool = False
    """Several networks by one vmapped program, which takes as many times the memory, and not one
    after the other."""
    real_batch: int = 256
    """Real images per class and step."""
    steps_per_batch: int = 1
    """Steps that share the real images, their augmentation and their features, which are computed
    once: a divisor of steps_per_network."""
    most_decoded: int = 200
    """Decoded condensed images per class and step, at most: more are subsampled at random."""
    step_size: Annotated[float | None, tyro.conf.arg(aliases=("--lr",))] = None
    """None: images_per_class, the published rule for images of 32 x 32 pixels, times the share of
    their pixels that these have."""
    momentum: float = 0.5
    sequential: bool = True
    """The published loop: a step for each class in turn, momentum carrying over; joined into one
    (see `objectives.step_of`). False: one step of heavy ball for all classes."""
    augmentation: str = "color_crop_cutout"
    strategy: Annotated[Strategy, tyro.conf.arg(aliases=("--dialect",))] = "idc"
    flips: bool | None = None
    """None: never for digits and letters (the data sets digits, mnist, svhn, usps and kmnist in any
    size; a folder or zip whose classes are all called by one digit or letter, 0 to 9 say)."""
    network: NetworkName = "convnet"
    width: int = 128
    depth: int = 3
    networks: Networks = "random"
    """random: new ones. The others come from a pool that is trained first (see `pool.py`): at the
    end of their training, after any of its epochs, or between start and end."""
    pool_networks: int = PoolConfig.pool_networks
    pool_epochs: int = PoolConfig.pool_epochs
    class_weight: float = 0.0
    """Adds so many times the cross-entropy of the condensed images under the pool's networks, as
    IDM and DANCE do."""
    num_directions: int = 500
    """Of mmdsw."""
    class_chunk: int | None = None
    """Classes whose features are held at a time; None: all."""
    size: int | None = None
    """Side of the images, to which they are resized; None: as they are."""
    num_per_class: int | None = None
    """Training images per class, drawn at random; None: all."""
    held_out: int = 0
    """Training images per class that are held out, to choose settings by."""
    num_snapshots: int = 5
    """How many times the images are stored on the way."""

    def __post_init__(self):
        check_sizes(
            self, "images_per_class", "factor", "num_steps", "steps_per_network",
            "num_networks", "real_batch", "steps_per_batch", "most_decoded", "width", "depth",
            "num_directions", "num_features", "num_snapshots", "pool_networks", "pool_epochs",
        )  # fmt: skip
        if self.networks != "random" and self.space == "pixels":
            raise ValueError(f"networks {self.networks} are of --space features")
        if self.steps_per_network % self.steps_per_batch:
            raise ValueError(
                f"steps_per_batch {self.steps_per_batch} does not divide steps_per_network "
                f"{self.steps_per_network}: features are those of one network"
            )
        if self.steps_per_batch > 1 and (self.space == "pixels" or self.method == "mmdsw"):
            raise ValueError("steps_per_batch is of --space features, and not of mmdsw")
        check_positive(self, "bandwidth_scale")
        check_not_negative(self, "held_out", "class_weight")
        if self.class_weight and (self.networks == "random" or self.method == "mmdsw"):
            raise ValueError(
                "class_weight is of networks that know the classes (--networks trained, aged or "
                "interpolated), and not of mmdsw"
            )
        if self.step_size is not None:
            check_positive(self, "step_size")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        for name in ("class_chunk", "size", "num_per_class"):
            if getattr(self, name) is not None:
                check_sizes(self, name)
        if self.most_decoded < self.factor**2:
            raise ValueError(
                f"most_decoded {self.most_decoded} is less than one image of factor {self.factor}"
            )
        if self.method == "mmdsw" and self.class_chunk is not None:
            raise ValueError("mmdsw compares all classes at once: class_chunk is not for it")

    def without_effect(self) -> tuple[str, ...]:
        """Later settings that change nothing here: a run made before them keeps its name."""
        names = () if self.steps_per_batch > 1 else ("steps_per_batch",)
        if self.networks == "random":
            return (*names, "networks", "pool_networks", "pool_epochs", "class_weight")
        return names if self.class_weight else (*names, "class_weight")

    def resolved_step_size(self, image_shape: tuple[int, int, int]) -> float:
        """`step_size`, or its rule for these images."""
        if self.step_size is not None:
            return self.step_size
        height, width, _ = image_shape
        return self.images_per_class * height * width / 1024


def dm(base: CondenseConfig) -> CondenseConfig:
    """Zhao and Bilen (2023): the linear kernel, a new network and a joint step each time, real
    images to start from, no factor, one operation of augmentation at a time."""
    return replace(
        base,
        method="dm",
        kernel="linear",
        factor=1,
        start="real",
        steps_per_network=1,
        steps_per_batch=1,
        sequential=False,
        step_size=1.0,
        augmentation="color_crop_cutout_flip_scale_rotate",
        strategy="dsa",
    )


def mmdsw(base: CondenseConfig) -> CondenseConfig:
    """Bonet et al. (2025): one network and one augmentation a step for all classes."""
    return replace(dm(base), method="mmdsw", kernel="gaussian", momentum=0.9, most_decoded=10_000)


@dataclass(frozen=True)
class Evaluator:
    """How a classifier is trained from scratch on condensed images; what counts is its accuracy
    on the test split after the last epoch."""

    num_epochs: int = 1000
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: with momentum .9 and weight decay 5e-4."""
    learning_rate: float = 0.01
    milestones: tuple[float, ...] = ()
    """Shares of the training after which the rate is multiplied by `decay`."""
    decay: float = 0.2
    augmentation: str = ""
    strategy: Strategy = "dsa"
    cutmix: float = 0.0
    """Probability that a batch is mixed."""
    network: NetworkName = "convnet"
    width: int = 128
    depth: int = 3

    def __post_init__(self):
        check_sizes(self, "num_epochs", "batch_size", "width", "depth")
        check_positive(self, "learning_rate", "decay")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix must be a probability, got {self.cutmix}")
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones are shares of the training, got {self.milestones}")


EVALUATORS = {
    "dm": Evaluator(
        batch_size=256,
        milestones=(0.5,),
        decay=0.1,
        augmentation="color_crop_cutout_flip_scale_rotate",
    ),
    "idc": Evaluator(
        milestones=(2 / 3, 5 / 6),
        augmentation="color_crop_flip_scale_rotate",
        cutmix=0.5,
    ),
    "wow": Evaluator(optimizer="adamw", learning_rate=3e-4),
}
"""The three published protocols, except that each reports the last epoch."""


@dataclass(frozen=True)
class BaselineConfig:
    """Training images in place of condensed ones."""

    dataset: str = "fashion_mnist"
    kind: BaselineName = "random"
    """random: drawn. herding: whose mean of features follows the class's (Welling, 2009). kmeans:
    centers of clusters of pixels. whole: all training images."""
    images_per_class: int = 10
    """Not of whole."""
    feature_epochs: int = 5
    """Of herding: the training, on all images, of the network whose features count."""
    feature_width: int = 128
    feature_depth: int = 3
    size: int | None = None
    num_per_class: int | None = None
    held_out: int = 0

    def __post_init__(self):
        check_sizes(self, "images_per_class", "feature_epochs", "feature_width", "feature_depth")
        check_not_negative(self, "held_out")
        for name in ("size", "num_per_class"):
            if getattr(self, name) is not None:
                check_sizes(self, name)


@dataclass(frozen=True)
class Evaluation:
    """An evaluator, and how many classifiers it trains on each set."""

    evaluator: Evaluator
    num_networks: int = 3
    whole_epochs: int = 10
    """Of the whole set, whose epochs are long."""

    def __post_init__(self):
        check_sizes(self, "num_networks", "whole_epochs")


Method = CondenseConfig | BaselineConfig


def is_whole(method: Method) -> bool:
    """Whether it is the whole set, which has no number of images per class."""
    return isinstance(method, BaselineConfig) and method.kind == "whole"


# ---- Comparisons


@dataclass(frozen=True)
class Comparison:
    """Methods by label, at several numbers of images per class, under several evaluators."""

    methods: dict[str, Method]
    images_per_class: tuple[int, ...]
    evaluations: dict[str, Evaluation]
    """By the name that the table gives them; another architecture is another one."""

    def at(self, num: int) -> dict[str, Method]:
        """The methods with `num` images per class; the whole set stays what it is."""
        return {
            label: method if is_whole(method) else replace(method, images_per_class=num)
            for label, method in self.methods.items()
        }


def baselines(dataset: str, *kinds: BaselineName, **settings) -> dict[str, BaselineConfig]:
    titles = {
        "random": "Random",
        "herding": "Herding",
        "kmeans": "K-means",
        "whole": "whole set",
    }
    return {titles[kind]: BaselineConfig(dataset, kind=kind, **settings) for kind in kinds}


def with_kernel(base: CondenseConfig, kernel: KernelName) -> CondenseConfig:
    """The linear kernel, whose gradient does not shrink with the bandwidth, takes DM's step."""
    return replace(base, kernel=kernel, step_size=1.0 if kernel == "linear" else base.step_size)


def order(base: CondenseConfig) -> dict[str, CondenseConfig]:
    """First-order against higher-order alignment, with and without factor."""
    starts: dict[int, Start] = {1: "real", 2: "mixed"}
    return {
        f"{kernel}, factor {factor}": replace(with_kernel(base, kernel), factor=factor, start=start)
        for factor, start in starts.items()
        for kernel in ("linear", "gaussian")
    }


def pools(base: CondenseConfig) -> dict[str, CondenseConfig]:
    """Random networks against those of a pool, under each kernel and factor."""
    kinds: tuple[Networks, ...] = ("random", "trained", "aged", "interpolated")
    return {
        f"{networks}, {label}": replace(method, networks=networks)
        for networks in kinds
        for label, method in order(base).items()
    }


def kernels(base: CondenseConfig) -> dict[str, CondenseConfig]:
    """Every kernel, and the Gaussian one at other bandwidths."""
    names: tuple[KernelName, ...] = (
        "gaussian", "gaussian_fixed", "linear", "polynomial", "energy", "rff",
    )  # fmt: skip
    methods: dict[str, CondenseConfig] = {name: with_kernel(base, name) for name in names}
    for scale in (0.1, 0.3, 3.0, 10.0):
        methods[f"gaussian, bandwidths x {scale:g}"] = replace(base, bandwidth_scale=scale)
    return methods
