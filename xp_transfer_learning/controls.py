"""Does flowing help a transfer? Flowed images beside the controls that say why.

    python xp_transfer_learning/controls.py --src_dataset mnist --tgt_dataset usps --k_shot 1 5

Every arm trains LeNet-5 on its own images for as many gradient steps, and is evaluated after the
last epoch on the target's test split. The arms: the k images; these augmented (shifts, scales,
rotations of each image anew, one of them each time); the source images as they are, labelled as the
flow labels them; source images on the way to the target (a share of the way of each particle from
its start to its end); the same with classes permuted at random before the flow, which tells
transfer from regularization; arrived ones. `--flow sliced_mmd` takes every class to the target
class of its number, for data sets with the same classes; `mmdsw` chooses the classes itself.

The share of the way is chosen for each draw by cross-validation over the k images, among `SHARES`
(by short trainings, the flow made anew without what is left out; with one image per class nothing
can be, and it is `DEFAULT_SHARE`). Differences are paired by draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import augment, datasets, runs
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
    FlowSettings,
    Preset,
    TrainingConfig,
    TransferConfig,
)
from xp_transfer_learning.data import known_by_content, load, pair_name, shaped, summary_name
from xp_transfer_learning.labels import label_particles
from xp_transfer_learning.transfer import accuracies, data

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_SHARE = 0.5
BASELINE = "k images, augmented"


class Arm(NamedTuple):
    """share: of the way that the source images have gone; None: no source images; "chosen": by
    cross-validation. permuted: classes, at random, before the flow. balanced: target images are
    repeated until they are half of the training set."""

    share: float | Literal["chosen"] | None
    augmented: bool = False
    permuted: bool = False
    balanced: bool = False


ARMS = {
    "k images": Arm(None),
    BASELINE: Arm(None, augmented=True),
    "source as it is": Arm(0.0),
    "source as it is, augmented": Arm(0.0, augmented=True),
    "source as it is, augmented, balanced": Arm(0.0, augmented=True, balanced=True),
    "on the way": Arm("chosen"),
    "on the way, augmented": Arm("chosen", augmented=True),
    "on the way, augmented, balanced": Arm("chosen", augmented=True, balanced=True),
    "on the way, classes permuted, augmented": Arm("chosen", augmented=True, permuted=True),
    "arrived": Arm(1.0),
    "arrived, augmented": Arm(1.0, augmented=True),
}


@dataclass(frozen=True)
class ControlsConfig:
    """What a draw depends on."""

    transfer: TransferConfig
    training: TrainingConfig
    choosing_epochs: int = 10
    """Of each short training that a share is chosen by."""


class Draw(NamedTuple):
    """Source images at the start and at the end of the flow, their labels [C, n], and the target
    images."""

    start: np.ndarray
    end: np.ndarray
    labels: np.ndarray
    x_tgt: np.ndarray
    image_shape: tuple[int, int, int]


@cache
def shifts_scales_rotations() -> Transform:
    """One of the three for each image of a batch, by itself."""
    augmentation = augment.parse("crop_scale_rotate", dialect="idc")

    def transform(key, images, targets):
        return augment.apply(augment.draw(key, augmentation, len(images)), images), targets

    return transform


def flowed(config: ControlsConfig, x0, x_tgt, seed: int, mesh: Mesh | None, run=None) -> dict:
    """end [C, n, d] and labels [C, n] of source images, and the flow's losses."""
    done = methods.flow(
        config.transfer.flow,
        x0,
        x_tgt,
        seed=seed,
        records=1,
        run=run,
        description="flow",
        mesh=mesh,
    )
    end = done.images[-1]
    return {"end": end, "labels": label_particles(end, np.asarray(x_tgt)), "losses": done.losses}


class Place(NamedTuple):
    """Where results are, and data."""

    results: Path
    data_root: Path | None
    mesh: Mesh | None

    def open(self, config: ControlsConfig, part: str, seed: int, **settings: Any) -> runs.Run:
        transfer = config.transfer
        pair = pair_name(transfer.source, transfer.target)
        name = f"controls_{part}_{pair}-k{transfer.k_shot}"
        known: Any = replace(config, transfer=known_by_content(transfer, self.data_root))
        if part == "flow":  # which is the same for every training
            known = known.transfer
        settings |= {"controls": known}
        return runs.open_run(self.results, EXPERIMENT, name, settings, seed=seed, wait=True)


def draw_of(config: ControlsConfig, seed: int, place: Place, *, permuted: bool = False) -> Draw:
    """Images of one draw and their flow, which is stored."""
    x0, x_tgt, image_shape = data(seed, config.transfer, place.data_root)
    if permuted:
        x0 = x0[jax.random.permutation(named_key(jax.random.key(seed), "classes"), len(x0))]
    run = place.open(config, "flow", seed, permuted=permuted)
    if not run.finished:
        run.finish(**flowed(config, x0, x_tgt, seed, place.mesh, run))
    stored = run.load_arrays()
    return Draw(np.asarray(x0), stored["end"], stored["labels"], np.asarray(x_tgt), image_shape)


def training_images(
    draw: Draw, share: float | None, *, balanced: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): the target's first, then the source's after `share` of their way, clipped
    to [0, 1]."""
    num_classes, k, d = draw.x_tgt.shape
    images, labels = draw.x_tgt.reshape(-1, d), np.repeat(np.arange(num_classes), k)
    if share is not None:
        moved = np.clip((1 - share) * draw.start + share * draw.end, 0, 1).reshape(-1, d)
        times = max(1, len(moved) // len(images)) if balanced else 1
        images = np.concatenate([*[images] * times, moved])
        labels = np.concatenate([*[labels] * times, draw.labels.ravel()])
    return images.reshape(-1, *draw.image_shape).astype(np.float32), labels


def train(
    config: ControlsConfig, images, labels, test_images, test_labels, *, augmented: bool,
    seed: int, mesh: Mesh | None,
) -> np.ndarray:  # fmt: skip
    """Accuracies [trainings]: as many gradient steps as `num_epochs` of all source and k target
    images per class take."""
    training, transfer = config.training, config.transfer
    everything = len(np.unique(labels)) * (transfer.num_per_class + transfer.k_shot)
    steps = training.num_epochs * steps_per_epoch(everything, training.batch_size)
    epochs = max(1, steps // steps_per_epoch(len(images), training.batch_size))
    return accuracies(
        images, labels, test_images, test_labels, replace(training, num_epochs=epochs), seed=seed,
        mesh=mesh, transform=shifts_scales_rotations() if augmented else None,
    )  # fmt: skip


def choose_share(config: ControlsConfig, seed: int, place: Place) -> float:
    """Of `SHARES` the one with the best mean accuracy on the k images: each fold leaves one image
    of each class out, of the flow and of short, augmented trainings."""
    run = place.open(config, "share", seed)
    if not run.finished:
        x0, x_tgt, image_shape = data(seed, config.transfer, place.data_root)
        num_classes, k, _ = x_tgt.shape
        short = replace(config.training, num_epochs=config.choosing_epochs, num_trainings=1)
        means = np.zeros((k, len(SHARES)))
        for fold in range(k):
            kept = np.delete(np.asarray(x_tgt), fold, axis=1)
            moved = flowed(config, x0, jax.numpy.asarray(kept), seed, place.mesh)
            draw = Draw(np.asarray(x0), moved["end"], moved["labels"], kept, image_shape)
            held_out = np.asarray(x_tgt[:, fold]).reshape(-1, *image_shape)
            for i, share in enumerate(SHARES):
                means[fold, i] = train(
                    replace(config, training=short), *training_images(draw, share), held_out,
                    np.arange(num_classes), augmented=True, seed=seed, mesh=place.mesh,
                ).mean()  # fmt: skip
        run.finish(accuracies=means, share=np.asarray(SHARES[int(means.mean(axis=0).argmax())]))
    return float(run.load_arrays()["share"])


def run_arm(config: ControlsConfig, name: str, seed: int, place: Place) -> dict[str, Any]:
    """accuracies [trainings] of one arm of one draw, and the share of the way (NaN for none)."""
    run = place.open(config, "arm", seed, arm=name)
    if not run.finished:
        arm = ARMS[name]
        draw = draw_of(config, seed, place, permuted=arm.permuted)
        test = shaped(load(config.transfer.target, "test", place.data_root), draw.image_shape)
        test_images = np.asarray(datasets.flat(test)).reshape(-1, *draw.image_shape)
        share = arm.share
        if share == "chosen":
            one = config.transfer.k_shot == 1
            share = DEFAULT_SHARE if one else choose_share(config, seed, place)
        measured = train(
            config, *training_images(draw, share, balanced=arm.balanced), test_images, test.labels,
            augmented=arm.augmented, seed=seed, mesh=place.mesh,
        )  # fmt: skip
        run.finish(accuracies=measured, share=np.asarray(np.nan if share is None else share))
    return run.load_arrays()


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per pair, k and arm: accuracy in percent, mean ± sample standard deviation over draws
    (each the mean of its trainings), the paired difference to `BASELINE` with 1.96 standard errors,
    and the shares of the way that were chosen."""
    lines = []
    for row in rows:
        baseline = next(r for r in rows if r["arm"] == BASELINE and r["k"] == row["k"])
        means, others = (100 * np.asarray(r["accuracies"]).mean(axis=1) for r in (row, baseline))
        less, compared = means - others, "-"
        if row is not baseline and len(less) > 1:
            compared = f"{less.mean():+.1f} ± {1.96 * standard_error(less):.1f}"
        shares = np.unique(row["shares"])
        way = "-" if np.isnan(shares).any() else ", ".join(f"{share:g}" for share in shares)
        pair = f"{row['source']} → {row['target']}"
        cells = [pair, str(row["k"]), row["arm"], way, mean_and_spread(means, ".1f"), compared]
        lines.append(cells)
    draws = len(rows[0]["accuracies"])
    return Table(
        ["flow", "k", "training images", "share of the way", "accuracy", f"less {BASELINE!r}"],
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
    flow: Literal["sliced_mmd", "mmdsw"] = "sliced_mmd"
    arms: tuple[str, ...] = tuple(ARMS)
    ntry: int = 3
    """Draws of source and target images."""
    num_trainings: int = 2
    n_epochs_nn: int = TrainingConfig.num_epochs
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
            num_trainings=1, n_epochs_nn=5, n_epochs_wgd=50, num_per_class=40, size=28,
        )  # fmt: skip
    return replace(arguments, ntry=10) if arguments.preset == "paper" else arguments


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs the arms; returns the summary's path."""
    arguments = preset(arguments)
    flow: FlowSettings = METHODS[arguments.flow]
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
                num_epochs=arguments.n_epochs_nn, num_trainings=arguments.num_trainings
            ),
        )  # fmt: skip
        for name in names:
            stored = []
            for seed in seeds:
                stored.append(run_arm(config, name, seed, place))
                mean = 100 * stored[-1]["accuracies"].mean()
                print(f"  k = {k}, {name}, draw {seed}: {mean:.1f}", flush=True)
            row = {"source": arguments.src_dataset, "target": arguments.tgt_dataset, "k": k}
            row |= {"arm": name, "flow": arguments.flow}
            row |= {"accuracies": np.stack([arrays["accuracies"] for arrays in stored])}
            row |= {"shares": np.stack([arrays["share"] for arrays in stored])}
            rows.append(row)
    pair = summary_name(arguments.src_dataset, arguments.tgt_dataset, arguments.data_root)
    stem = f"controls_{pair}-k{'_'.join(map(str, arguments.k_shot))}-{arguments.flow}"
    path = arguments.results / EXPERIMENT / f"{stem}.json"
    summary = {"seeds": list(seeds), "n_epochs_nn": arguments.n_epochs_nn, "rows": rows}
    return write_summary(path, summary, [table(rows)])


if __name__ == "__main__":
    run_command(
        main, lambda: tyro.cli(Arguments), lower="--num_per_class, --size or --num_trainings"
    )
