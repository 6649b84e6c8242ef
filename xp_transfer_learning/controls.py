"""Does flowing help a transfer? Flowed images beside the controls that say why.

    python xp_transfer_learning/controls.py --src_dataset mnist --tgt_dataset usps --k_shot 1 5

Every arm makes a classifier from k target images per class and labelled source images, evaluated
on the target's test split after the last epoch. Networks are LeNet-5, trained for as many gradient
steps in every arm. See `ARMS`: without the source, with it as it is, part of the way to the target,
arrived; part of the way without a flow (mixed with images of the class at random), with classes
permuted (regularization, then, and no transfer); fine-tuned; by features.

Each source class belongs to a target class: by optimal transport between classes in the features
of a network trained on the source (`--matching features`), between images (`images`), or by its
number (`number`). The flow takes it there by the MMD of the energy kernel. Where both have source
images, the target's are repeated until they are half of the training set.

`auto` chooses among `CANDIDATES` by cross-validation over the k images: the best, if it is above
the k images, augmented, by more than a standard error. Of one image per class nothing can be left
out: it then uses the source if classes correspond (`match_p_value`).
Differences are paired by draw.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from scipy.spatial.distance import cdist

from lib import augment, datasets, runs
from lib.augment.elastic import elastic
from lib.augment.mixup import mixup
from lib.networks import LeNet5
from lib.networks.classification import Transform, steps_per_epoch
from lib.numerics import named_key
from lib.report.spreads import mean_and_spread, standard_error
from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_transfer_learning import methods
from xp_transfer_learning.config import (
    EXPERIMENT,
    METHODS,
    ROTATED,
    Preset,
    TrainingConfig,
    TransferConfig,
)
from xp_transfer_learning.data import known_by_content, load, pair_name, shaped, summary_name
from xp_transfer_learning.features import (
    calibrated_sample,
    features,
    logistic_accuracy,
    match_p_value,
    of_classes,
)
from xp_transfer_learning.labels import class_costs, match_classes
from xp_transfer_learning.transfer import accuracies, data, train_networks

Matching = Literal["features", "images", "number"]
Augmentation = Literal["none", "affine", "elastic", "mixup"]


class Arm(NamedTuple):
    """share: of the way that source images have gone; None: none are used. way: along the flow; to
    the target image that a flow of features couples an image with; or to one drawn at random, both
    of the image's class."""

    kind: Literal["images", "fine-tuned", "logistic", "calibration", "auto"] = "images"
    share: float | None = None
    augmentation: Augmentation = "affine"
    permuted: bool = False
    way: Literal["flow", "features", "random"] = "flow"


BASELINE = "k images, augmented"
ELASTIC = "k images, augmented, elastic"
SOURCE = "with the source"
ARMS = {
    "k images": Arm(augmentation="none"),
    BASELINE: Arm(),
    ELASTIC: Arm(augmentation="elastic"),
    "k images, augmented, mixup": Arm(augmentation="mixup"),
    SOURCE: Arm(share=0.0),
    "with the source, elastic": Arm(share=0.0, augmentation="elastic"),
    "with the source, classes permuted": Arm(share=0.0, permuted=True),
    "a quarter of the way": Arm(share=0.25),
    "half of the way": Arm(share=0.5),
    "half of the way, coupled by features": Arm(share=0.5, way="features"),
    "half of the way, no flow": Arm(share=0.5, way="random"),
    "half of the way, classes permuted": Arm(share=0.5, permuted=True),
    "arrived": Arm(share=1.0),
    "source, fine-tuned": Arm("fine-tuned"),
    "source's features, logistic regression": Arm("logistic"),
    "source's features, Distribution Calibration": Arm("calibration"),
    "auto": Arm("auto"),
}
CANDIDATES = (BASELINE, ELASTIC, SOURCE, "source, fine-tuned")
CORRESPOND = 0.5
"""Below this p-value classes are taken to correspond. Chosen on draws 100 to 105 of five pairs: of
MNIST to USPS five of six lie below, of pairs without common classes none of eighteen."""
CHOOSING = 5
"""How many times shorter the trainings are that `auto` chooses by."""
PRETRAINING = 500_000
"""Added to the seed of a network of the source only."""


@dataclass(frozen=True)
class ControlsConfig:
    """What a draw depends on."""

    transfer: TransferConfig
    training: TrainingConfig
    matching: Matching = "features"


class Draw(NamedTuple):
    """Images of one draw: the source's [C, n, d] and the target's [D, k, d]; `matched` [C] is the
    target class of each source class."""

    x0: np.ndarray
    x_tgt: np.ndarray
    matched: np.ndarray
    image_shape: tuple[int, int, int]


class Held(NamedTuple):
    """Labelled images that were held out, to evaluate on."""

    images: np.ndarray
    labels: np.ndarray


# ---- Training


@cache
def transform(augmentation: Augmentation) -> Transform | None:
    """Shifts, scales or rotations of each image, one of them each time; the last two go on from
    there."""
    if augmentation == "none":
        return None
    affine = augment.parse("crop_scale_rotate", dialect="idc")

    def changed(key, images, targets):
        key_affine, key = jax.random.split(key)
        images = augment.augment(key_affine, images, affine, siamese=False)
        if augmentation == "elastic":
            images = elastic(key, images)
        return mixup(key, images, targets) if augmentation == "mixup" else (images, targets)

    return changed


class Trainer(NamedTuple):
    """Trains networks for as many gradient steps whatever the number of images: those of
    `training.num_epochs` epochs of `everything` images."""

    training: TrainingConfig
    everything: int
    num_classes: int
    seed: int
    mesh: Mesh | None

    def __call__(self, images, labels, augmentation: Augmentation, parameters=None):
        """Parameters [trainings, ...]."""
        batch_size = self.training.batch_size
        steps = self.training.num_epochs * steps_per_epoch(self.everything, batch_size)
        epochs = max(1, steps // steps_per_epoch(len(images), batch_size))
        return train_networks(
            images, labels, replace(self.training, num_epochs=epochs), self.num_classes,
            seed=self.seed, mesh=self.mesh, transform=transform(augmentation),
            parameters=parameters,
        )  # fmt: skip


def training_images(
    draw: Draw, share: float | None, end: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): the target's first; if `share` is not None then the source's after that
    share of their way to `end`, clipped to [0, 1], and the target's so often that they are half."""
    num_classes, k, d = draw.x_tgt.shape
    images, labels = draw.x_tgt.reshape(-1, d), np.repeat(np.arange(num_classes), k)
    if share is not None:
        moved = draw.x0 if end is None else (1 - share) * draw.x0 + share * end
        moved = np.clip(moved, 0, 1).reshape(-1, d)
        times = max(1, len(moved) // len(images))
        images = np.concatenate([*[images] * times, moved])
        labels = np.concatenate([*[labels] * times, np.repeat(draw.matched, draw.x0.shape[1])])
    return images.reshape(-1, *draw.image_shape).astype(np.float32), labels


def measure(
    arm: Arm, draw: Draw, test: Held, train: Trainer,
    ends: Mapping[str, Callable[[Draw], np.ndarray]], source_network: Any,
) -> np.ndarray:  # fmt: skip
    """Accuracies [trainings] of one arm but `auto`. `ends`: by way, where it takes the source."""
    if arm.kind in ("logistic", "calibration"):
        return np.atleast_1d(by_features(arm, draw, test, source_network, train.seed))
    if arm.permuted:
        key = named_key(jax.random.key(train.seed), "classes")
        draw = draw._replace(matched=np.asarray(jax.random.permutation(key, draw.matched)))
    start = None
    if arm.kind == "fine-tuned":
        labels = np.repeat(draw.matched, draw.x0.shape[1])
        images = draw.x0.reshape(-1, *draw.image_shape).astype(np.float32)
        pretrain = train._replace(seed=train.seed + PRETRAINING)
        start = pretrain(images, labels, arm.augmentation)
    end = ends[arm.way](draw) if arm.share else None
    networks = train(*training_images(draw, arm.share, end), arm.augmentation, start)
    return accuracies(networks, *test, num_classes=train.num_classes)


def by_features(arm: Arm, draw: Draw, test: Held, source_network: Any, seed: int) -> float:
    """Accuracy in the features of the source's network, of the k images or of their calibrated
    normals."""

    target = of_classes(source_network, draw.x_tgt, draw.image_shape)
    test_features = features(source_network, test.images)
    if arm.kind == "logistic":
        labels = np.repeat(np.arange(len(target)), target.shape[1])
        target = target.reshape(len(labels), -1)
        return logistic_accuracy(target, labels, test_features, test.labels)
    source = of_classes(source_network, draw.x0, draw.image_shape)
    sample = calibrated_sample(seed, source, target)
    return logistic_accuracy(*sample, np.sqrt(test_features), test.labels)


def choose(
    draw: Draw, rematch: Callable[[np.ndarray], np.ndarray], train: Trainer, p_value: float
) -> str:
    """The best of `CANDIDATES` on the k images, the first of equals: each fold leaves one image per
    class out of matching and of one training. `BASELINE` unless the gain over it, a mean over
    folds, is more than its standard error. With one image per class: `SOURCE` if its classes
    correspond, else `BASELINE`."""
    num_classes, k, _ = draw.x_tgt.shape
    if k == 1:
        return SOURCE if p_value <= CORRESPOND else BASELINE
    short = max(1, train.training.num_epochs // CHOOSING)
    train = train._replace(training=replace(train.training, num_epochs=short, num_trainings=1))
    means = np.zeros((k, len(CANDIDATES)))
    for fold in range(k):
        kept = np.delete(draw.x_tgt, fold, axis=1)
        left = draw.x_tgt[:, fold].reshape(-1, *draw.image_shape).astype(np.float32)
        test = Held(left, np.arange(num_classes))
        fitted = draw._replace(x_tgt=kept, matched=rematch(kept))
        for i, name in enumerate(CANDIDATES):
            means[fold, i] = measure(ARMS[name], fitted, test, train, {}, None).mean()
    best = int(means.mean(axis=0).argmax())
    gains = means[:, best] - means[:, CANDIDATES.index(BASELINE)]
    return CANDIDATES[best] if gains.mean() > standard_error(gains) else BASELINE


# ---- Runs


class Place(NamedTuple):
    """Where results are, and data."""

    results: Path
    data_root: Path | None
    mesh: Mesh | None

    def open(self, config: ControlsConfig, part: str, seed: int, **settings: Any) -> runs.Run:
        transfer = config.transfer
        pair = pair_name(transfer.source, transfer.target)
        name = f"controls_{part}_{pair}-k{transfer.k_shot}"
        known = replace(config, transfer=known_by_content(transfer, self.data_root))
        settings |= {"controls": known}
        return runs.open_run(self.results, EXPERIMENT, name, settings, seed=seed, wait=True)


@dataclass(frozen=True)
class Task:
    """One draw of a pair of data sets, and what its arms share: stored, and read back."""

    config: ControlsConfig
    seed: int
    place: Place

    def images(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
        x0, x_tgt, image_shape = data(self.seed, self.config.transfer, self.place.data_root)
        return np.asarray(x0), np.asarray(x_tgt), image_shape

    def trainer(self, num_classes: int) -> Trainer:
        transfer = self.config.transfer
        everything = num_classes * (transfer.num_per_class + transfer.k_shot)
        training, mesh = self.config.training, self.place.mesh
        return Trainer(training, everything, num_classes, self.seed, mesh)

    def source_network(self) -> Any:
        """Of the source images under their own labels, as many steps as an arm takes."""
        x0, x_tgt, image_shape = self.images()
        num_classes, n, _ = x0.shape
        images = x0.reshape(-1, *image_shape).astype(np.float32)
        network = LeNet5(num_classes)
        run = self.place.open(self.config, "source", self.seed)
        if not run.finished:
            labels = np.repeat(np.arange(num_classes), n)
            one = replace(self.config.training, num_trainings=1)
            train = self.trainer(len(x_tgt))._replace(
                training=one, num_classes=num_classes, seed=self.seed + PRETRAINING
            )
            parameters = train(images, labels, "affine")
            run.finish(parameters=np.asarray(ravel_pytree(parameters)[0]))
        like = jax.eval_shape(network.init, jax.random.key(0), images[:1])
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return ravel_pytree(like)[1](run.load_arrays()["parameters"])

    def costs(self, x0: np.ndarray, x_tgt: np.ndarray, image_shape) -> np.ndarray:
        """Between classes, [C, D]: W_2^2 of the images, or of their features."""
        if self.config.matching == "features":
            network = self.source_network()
            x0, x_tgt = (of_classes(network, x, image_shape) for x in (x0, x_tgt))
        return class_costs(x0, x_tgt)

    def match(self, x0: np.ndarray, x_tgt: np.ndarray, image_shape) -> tuple[np.ndarray, float]:
        """The target class of every source class, and `match_p_value`."""
        if self.config.matching == "number":
            if len(x0) != len(x_tgt):
                raise ValueError(
                    f"--matching number needs as many classes in both: {len(x0)} and {len(x_tgt)}; "
                    "use --matching features"
                )
            return np.arange(len(x0)), 0.0
        costs = self.costs(x0, x_tgt, image_shape)
        return match_classes(costs), match_p_value(costs)

    def flowed(
        self, x0: np.ndarray, x_tgt: np.ndarray, step_size: float, **settings: Any
    ) -> np.ndarray:
        """Where the flow takes x0 [C, n, d] to, from each class to that of its number."""
        run = self.place.open(self.config, "flow", self.seed, **settings)
        if not run.finished:
            end = methods.flow(
                replace(self.config.transfer.flow, step_size=step_size),
                jnp.asarray(x0), jnp.asarray(x_tgt), seed=self.seed,
                records=1, run=run, description="flow", mesh=self.place.mesh,
            ).images[-1]  # fmt: skip
            run.finish(end=end)
        return run.load_arrays()["end"]

    def end_of_flow(self, draw: Draw) -> np.ndarray:
        step_size, matched = self.config.transfer.flow.step_size, draw.matched.tolist()
        return self.flowed(draw.x0, draw.x_tgt[draw.matched], step_size, matched=matched)

    def end_by_features(self, draw: Draw) -> np.ndarray:
        """The target image next to whose features those of each source image arrive."""
        network, x_tgt = self.source_network(), draw.x_tgt[draw.matched]
        source, target = (of_classes(network, x, draw.image_shape) for x in (draw.x0, x_tgt))
        # As far per step as images go: a way grows with the root of the dimension, and a gradient
        # averaged over directions falls with it.
        scale = np.sqrt(np.mean(x_tgt**2) / np.mean(target**2))
        step_size = self.config.transfer.flow.step_size * target.shape[-1] / x_tgt.shape[-1]
        matched = draw.matched.tolist()
        arrived = self.flowed(
            scale * source, scale * target, step_size, matched=matched, of="features"
        )
        nearest = [cdist(x, y).argmin(axis=1) for x, y in zip(arrived, scale * target)]
        return np.take_along_axis(x_tgt, np.stack(nearest)[..., None], axis=1)

    def random_end(self, draw: Draw) -> np.ndarray:
        rng, (num_classes, n, _) = np.random.default_rng(self.seed), draw.x0.shape
        places = rng.integers(0, draw.x_tgt.shape[1], (num_classes, n))
        return draw.x_tgt[draw.matched[:, None], places]

    def test(self, image_shape) -> Held:
        test = shaped(load(self.config.transfer.target, "test", self.place.data_root), image_shape)
        images = np.asarray(datasets.flat(test)).reshape(-1, *image_shape)
        return Held(images, test.labels)

    def run(self, name: str) -> dict[str, Any]:
        """accuracies [trainings] of one arm, matched [C], p_value, and which arm it was."""
        rule = {"rule": "one standard error"} if ARMS[name].kind == "auto" else {}
        run = self.place.open(self.config, "arm", self.seed, arm=name, **rule)
        if not run.finished:
            x0, x_tgt, image_shape = self.images()
            matched, p_value = self.match(x0, x_tgt, image_shape)
            draw, train = Draw(x0, x_tgt, matched, image_shape), self.trainer(len(x_tgt))
            arm = name
            if ARMS[name].kind == "auto":
                arm = choose(draw, lambda x: self.match(x0, x, image_shape)[0], train, p_value)
                done = self.run(arm)["accuracies"]
            else:
                ends = {
                    "flow": self.end_of_flow,
                    "features": self.end_by_features,
                    "random": self.random_end,
                }
                test, network = self.test(image_shape), self.source_network()
                done = measure(ARMS[name], draw, test, train, ends, network)
            of_match = {"matched": matched, "p_value": np.asarray(p_value)}
            run.finish(accuracies=done, arm=np.asarray(arm), **of_match)
        return run.load_arrays()


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per pair, k and arm: accuracy in percent, mean ± sample standard deviation over draws
    (each the mean of its trainings), the paired difference to `BASELINE` with 1.96 standard errors,
    and what `auto` chose."""
    lines = []
    for row in rows:
        baseline = next(r for r in rows if r["arm"] == BASELINE and r["k"] == row["k"])
        means, others = (100 * np.asarray(r["accuracies"]).mean(axis=1) for r in (row, baseline))
        less, compared = means - others, "-"
        if row is not baseline and len(less) > 1:
            compared = f"{less.mean():+.1f} ± {1.96 * standard_error(less):.1f}"
        name = row["arm"]
        if name == "auto":
            chosen, counts = np.unique(row["chosen"], return_counts=True)
            name += f": {', '.join(f'{c} {n}x' for c, n in zip(chosen, counts))}"
        pair = f"{row['source']} → {row['target']}"
        lines.append([pair, str(row["k"]), name, mean_and_spread(means, ".1f"), compared])
    draws = len(rows[0]["accuracies"])
    return Table(
        ["flow", "k", "training images", "accuracy", f"less {BASELINE!r}"],
        lines,
        f"Accuracy in percent on the target's test split, mean ± sample standard deviation over "
        f"{draws} draw{'s' * (draws > 1)}; paired difference with 1.96 standard errors.",
    )


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset | None = None
    """quick: embedded digits. paper: ten draws. None: what the rest says."""
    src_dataset: str = "mnist"
    """A data set's name, or the path of a folder or zip of images; likewise `tgt_dataset`."""
    tgt_dataset: str = "usps"
    k_shot: tuple[int, ...] = (1, 5)
    matching: Matching = "features"
    arms: tuple[str, ...] = tuple(ARMS)
    ntry: int = 3
    """Draws of source and target images."""
    num_trainings: int = 1
    n_epochs_nn: int = TrainingConfig.num_epochs
    """Epochs, and Adam's step size `lr_nn`, of the networks."""
    lr_nn: float = TrainingConfig.learning_rate
    n_epochs_wgd: int | None = None
    """Steps of the flow; None: the method's own."""
    num_per_class: int = 200
    size: int | None = None
    """Side of the images; None: the source's."""
    first_seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")


def preset(arguments: Arguments) -> Arguments:
    if arguments.preset == "quick":
        return replace(
            arguments, src_dataset="digits", tgt_dataset=ROTATED, k_shot=(2,), ntry=1,
            n_epochs_nn=5, n_epochs_wgd=50, num_per_class=40, size=28,
        )  # fmt: skip
    return replace(arguments, ntry=10) if arguments.preset == "paper" else arguments


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs the arms; returns the summary's path."""
    from xp_transfer_learning import plot

    arguments = preset(arguments)
    flow = METHODS["sliced_mmd"]
    if arguments.n_epochs_wgd is not None:
        flow = replace(flow, num_steps=arguments.n_epochs_wgd)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.ntry)
    names = [name for name in ARMS if name in {BASELINE, *arguments.arms}]
    place, rows = Place(arguments.results, arguments.data_root, mesh), []
    for k in arguments.k_shot:
        config = ControlsConfig(
            TransferConfig(
                arguments.src_dataset, arguments.tgt_dataset, k, arguments.num_per_class,
                arguments.size, flow,
            ),
            TrainingConfig(
                num_epochs=arguments.n_epochs_nn, learning_rate=arguments.lr_nn,
                num_trainings=arguments.num_trainings,
            ),
            arguments.matching,
        )  # fmt: skip
        for name in names:
            stored = []
            for seed in seeds:
                stored.append(Task(config, seed, place).run(name))
                mean = 100 * stored[-1]["accuracies"].mean()
                print(f"  k = {k}, {name}, draw {seed}: {mean:.1f}", flush=True)
            row = {"source": arguments.src_dataset, "target": arguments.tgt_dataset, "k": k}
            row |= {"arm": name, "accuracies": np.stack([one["accuracies"] for one in stored])}
            if name == "auto":
                row |= {"chosen": [str(one["arm"]) for one in stored]}
                row |= {
                    key: np.stack([one[key] for one in stored]) for key in ("matched", "p_value")
                }
            rows.append(row)
    pair = summary_name(arguments.src_dataset, arguments.tgt_dataset, arguments.data_root)
    stem = f"controls_{pair}-k{'_'.join(map(str, arguments.k_shot))}-{arguments.matching}"
    path = arguments.results / EXPERIMENT / f"{stem}.json"
    summary = {"seeds": list(seeds), "n_epochs_nn": arguments.n_epochs_nn, "rows": rows}
    return write_summary(path, summary, [table(rows)], figures=lambda path: [plot.controls(path)])


if __name__ == "__main__":
    run_command(
        main, lambda: tyro.cli(Arguments), lower="--num_per_class, --size or --num_trainings"
    )
