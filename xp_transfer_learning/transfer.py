"""Transfer learning: source images flow to k target images per class, then train a classifier.

    python xp_transfer_learning/transfer.py --src_dataset mnist --tgt_dataset usps --k_shot 5
    python xp_transfer_learning/transfer.py --method otdd --k_shot 10 --ntry 3

Each try draws source and target images anew, flows the source to the target, clips to [0, 1],
labels the particles, trains LeNet-5 several times on target and flowed images, and reports the
accuracy on the target's whole test split after the last epoch. Nothing is chosen by that accuracy.

The flowed images make an epoch longer. So `target_only`, training on only the target images, comes
twice: for the same number of epochs, as published, and for as many gradient steps as the others,
in whole epochs.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import datasets, runs
from lib.networks import LeNet5, check_size, classification, optimizers
from lib.numerics import key_of_seed
from lib.report.spreads import mean_and_spread, spread
from lib.report.tables import write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_transfer_learning import methods, tables
from xp_transfer_learning.config import (
    EXPERIMENT,
    METHODS,
    ROTATED,
    Labelling,
    Method,
    Preset,
    TrainingConfig,
    TransferConfig,
)
from xp_transfer_learning.data import (
    draw,
    known_by_content,
    load,
    pair_name,
    resized,
    shaped,
    stored_shape,
    summary_name,
)
from xp_transfer_learning.labels import agreement, label_particles


def data(seed: int, config: TransferConfig, data_root: Path | None):
    """(x0 [C, n, d], x_tgt [D, k, d], image shape): a draw of its own for every seed, the same for
    every method. Images take the source's size, gray if one of the two is."""
    source = resized(load(config.source, "train", data_root), config.size)
    target = load(config.target, "train", data_root)
    shape = (*source.image_shape[:2], min(source.image_shape[2], target.image_shape[2]))
    check_size(LeNet5(), shape)  # before the flow, not after it
    key_source, key_target = jax.random.split(key_of_seed(seed))
    x0 = draw(key_source, shaped(source, shape), config.num_per_class, "--num_per_class")
    return x0, draw(key_target, shaped(target, shape), config.k_shot, "--k_shot"), shape


def _setting(config: TransferConfig) -> str:
    return f"{pair_name(config.source, config.target)}-k{config.k_shot}-{config.flow.method}"


def flow(
    config: TransferConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None,
    mesh: Mesh | None = None,
) -> dict:
    """The flowed images of one try: particles [records, C, n, d] (none for target_only), steps,
    losses, x_tgt, image_shape. Stored, and read back if done before."""
    name = f"transfer_{_setting(config)}"
    known = known_by_content(config, data_root)
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed, wait=True)
    if not run.finished:
        x0, x_tgt, image_shape = data(seed, config, data_root)
        stored = {"x_tgt": np.asarray(x_tgt), "image_shape": np.asarray(image_shape)}
        settings = config.flow
        if settings.method == "target_only":
            stored["particles"] = np.zeros((1, 0, 0, x0.shape[2]), np.float32)
            stored |= {"steps": np.zeros(1, np.int64), "losses": np.zeros(0, np.float32)}
        else:
            stored["losses"], stored["steps"], stored["particles"] = methods.flow(
                settings,
                x0,
                x_tgt,
                seed=seed,
                records=config.records,
                run=run,
                description=name,
                mesh=mesh,
            )
        run.finish(**stored)
    return run.load_arrays()


def training_set(particles, x_tgt, image_shape, labelling):
    """(images, labels, share of right labels): the target's images first, then the flowed ones,
    clipped to [0, 1]. A flowed image's label is right where its nearest target image has it; the
    share is NaN where nothing flows."""
    num_classes, k, d = x_tgt.shape
    images = x_tgt.reshape(-1, d)
    labels = np.repeat(np.arange(num_classes), k)
    right = np.nan
    if particles.size:
        flowed = np.clip(particles, 0, 1)
        flowed_labels = label_particles(flowed, x_tgt, labelling)
        right = agreement(flowed_labels, flowed, x_tgt)
        images = np.concatenate([images, flowed.reshape(-1, d)])
        labels = np.concatenate([labels, flowed_labels.ravel()])
    return images.reshape(-1, *image_shape), labels, right


def train_networks(
    images,
    labels,
    config: TrainingConfig,
    num_classes: int,
    *,
    seed: int,
    mesh: Mesh | None = None,
    transform: classification.Transform | None = None,
    parameters=None,
):
    """Parameters [trainings, ...] of `config.num_trainings` LeNet-5 trained from keys of their own,
    on batches that go through `transform`, from `parameters` if they are given."""
    return classification.fit_seeds(
        jax.random.split(key_of_seed(seed, shift=1_000_000), config.num_trainings),
        LeNet5(num_classes),
        jnp.asarray(images),
        jnp.asarray(labels),
        optimizer=optimizers.adam(config.learning_rate),
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        transform=transform,
        parameters=parameters,
        show_progress=False,
        mesh=mesh,
    )[0]


def accuracies(parameters, images, labels, *, num_classes: int) -> np.ndarray:
    """Accuracy of each of the networks that `train_networks` returns."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    return np.asarray(_accuracies(parameters, images, labels, num_classes))


@partial(jax.jit, static_argnames="num_classes")
def _accuracies(parameters, images, labels, num_classes):
    network = LeNet5(num_classes)
    return jax.lax.map(lambda p: classification.accuracy(network, p, images, labels), parameters)


def run_try(
    config: TransferConfig,
    training: TrainingConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None,
    along: bool = False,
    mesh: Mesh | None = None,
) -> dict:
    """One try: accuracies [records, trainings] and label_agreement [records] at `steps`, the last
    record only unless `along`; the flow's losses."""
    name = f"transfer_accuracy_{_setting(config)}"
    known = known_by_content(config, data_root)
    settings = {"transfer": known, "training": training, "along": along}
    run = runs.open_run(results, EXPERIMENT, name, settings, seed=seed)
    if not run.finished:
        flowed = flow(config, seed=seed, results=results, data_root=data_root, mesh=mesh)
        shape = stored_shape(flowed)
        test = shaped(load(config.target, "test", data_root), shape)
        test_images = np.asarray(datasets.flat(test)).reshape(-1, *shape)
        records = range(len(flowed["steps"])) if along else [len(flowed["steps"]) - 1]
        rows, agreements = [], []
        for record in records:
            images, labels, right = training_set(
                flowed["particles"][record], flowed["x_tgt"], shape, training.labelling
            )
            num_classes = int(max(labels.max(), test.labels.max())) + 1
            networks = train_networks(images, labels, training, num_classes, seed=seed, mesh=mesh)
            rows.append(accuracies(networks, test_images, test.labels, num_classes=num_classes))
            agreements.append(right)
        run.finish(
            accuracies=np.stack(rows),
            label_agreement=np.asarray(agreements),
            steps=flowed["steps"][list(records)],
            losses=flowed["losses"],
        )
    return run.load_arrays()


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset | None = None
    """quick: embedded digits, in a minute. paper: all of Table 2. None: what the rest says."""
    src_dataset: str = "mnist"
    """A data set's name, or the path of a folder or zip of images; likewise `tgt_dataset`."""
    tgt_dataset: str = "fashion_mnist"
    k_shot: tuple[int, ...] = (5,)
    """Target images per class; several are run one after the other."""
    method: tuple[Method | Literal["auto"], ...] = ("mmdsw",)
    """auto: no method of the table; `controls.py` chooses how to use the source, if at all."""
    ntry: int = 3
    """Tries, each with its own draw of source and target images."""
    n_epochs_wgd: int | None = None
    """Steps of the flow, and its step size `lr`; None: the method's own (see config.py)."""
    lr: float | None = None
    decay: bool | None = None
    m: float | None = None
    num_per_class: int = 200
    size: int | None = None
    """Side of the images; None: the source's."""
    n_epochs_nn: int = TrainingConfig.num_epochs
    """Epochs, and Adam's step size `lr_nn`, of the classifier."""
    lr_nn: float = TrainingConfig.learning_rate
    num_trainings: int = 5
    labelling: tuple[Labelling, ...] = ("transport",)
    """transport: classes by optimal transport; axis: by position; particles: each for itself."""
    along: bool = False
    """Train at every record of the flow too, to see when the accuracy stops moving."""
    first_seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def preset(arguments: Arguments) -> list[Arguments]:
    """What the preset stands for, or the arguments as they are."""
    if arguments.preset == "quick":
        small: dict[str, Any] = {
            "ntry": 1,
            "num_trainings": 2,
            "n_epochs_nn": 10,
            "n_epochs_wgd": 200,
        }
        small |= {"num_per_class": 40, "size": 28, "method": ("mmdsw", "target_only")}
        return [replace(arguments, src_dataset="digits", tgt_dataset=ROTATED, **small)]
    if arguments.preset == "paper":
        table = []
        for target in ("fashion_mnist", "kmnist", "usps"):
            ours = replace(arguments, tgt_dataset=target, method=("mmdsw", "target_only"))
            # These two move points, not classes: a class may end in several.
            baselines: dict[str, Any] = {
                "method": ("otdd", "mmd_product"),
                "labelling": ("transport", "particles"),
            }
            table.append(replace(ours, k_shot=(1, 5, 10, 100)))
            table.append(replace(ours, k_shot=(1, 5, 10), **baselines))
        return table
    return [arguments]


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs what the preset or the arguments say; returns the summaries' paths."""
    tables = preset(arguments)
    paths = [run_auto(table, mesh) for table in tables if "auto" in table.method]
    for table in tables:
        if set(table.method) != {"auto"}:
            paths.append(run_table(table, mesh))
    return paths


def run_auto(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """The arm `auto` of `controls.py` beside the k images, augmented; the summary's path."""
    from xp_transfer_learning import controls

    same = {field.name for field in fields(controls.Arguments)} - {"preset"}
    given = {name: value for name, value in vars(arguments).items() if name in same}
    return controls.main(controls.Arguments(**given, arms=("auto",)), mesh)


def run_table(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs every k and method, prints and stores accuracies; returns the summary's path."""
    from xp_transfer_learning import plot

    given: dict[str, Any] = {"num_steps": arguments.n_epochs_wgd, "step_size": arguments.lr}
    given |= {"decay": arguments.decay, "m": arguments.m}
    given = {name: value for name, value in given.items() if value is not None}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.ntry)
    where: dict[str, Any] = {
        "results": arguments.results,
        "data_root": arguments.data_root,
        "mesh": mesh,
    }
    num_classes = 0, 0
    if "target_only" in arguments.method:
        named = arguments.src_dataset, arguments.tgt_dataset
        source, target = (load(name, "train", arguments.data_root) for name in named)
        num_classes = len(source.class_names), len(target.class_names)
    rows = []
    for k in arguments.k_shot:
        for method in arguments.method:
            if method == "auto":
                continue
            settings = METHODS[method]
            if method != "target_only":
                settings = replace(settings, **given)
            config = TransferConfig(
                arguments.src_dataset,
                arguments.tgt_dataset,
                k,
                num_per_class=arguments.num_per_class,
                size=arguments.size,
                flow=settings,
            )
            for training in trainings(method, k, arguments, num_classes):
                tries = [
                    run_try(config, training, seed=seed, along=arguments.along, **where)
                    for seed in seeds
                ]
                every = np.stack([t["accuracies"] for t in tries])  # [tries, records, trainings]
                row = {"source": arguments.src_dataset, "target": arguments.tgt_dataset, "k": k}
                row |= {"method": method, "settings": settings, "training": asdict(training)}
                row |= {"steps": tries[0]["steps"], "accuracies": every}
                # A flow's loss at those steps, the start before them.
                shown = np.concatenate([[0], row["steps"]])
                row["losses"] = [
                    t["losses"][shown.clip(max=len(t["losses"]) - 1)] if len(t["losses"]) else []
                    for t in tries
                ]
                if method != "target_only":
                    row["label_agreement"] = [t["label_agreement"][-1] for t in tries]
                rows.append(row)
                print(describe(row), flush=True)
    pair = summary_name(arguments.src_dataset, arguments.tgt_dataset, arguments.data_root)
    stem = f"{pair}-k{'_'.join(map(str, arguments.k_shot))}-{'_'.join(arguments.method)}"
    if arguments.lr_nn != TrainingConfig.learning_rate:
        stem += f"-lr_nn{arguments.lr_nn:g}"
    # Not a row of the table of last accuracies.
    stem = f"along_{stem}" if arguments.along else f"transfer_{stem}"
    path = arguments.results / EXPERIMENT / f"{stem}.json"
    summary = {"seeds": list(seeds), "n_epochs_nn": arguments.n_epochs_nn, "rows": rows}
    return write_summary(
        path,
        summary,
        [tables.transfer_table(rows)],
        figures=lambda path: [plot.transfer_along(path)] if arguments.along else [],
    )


def trainings(
    method: Method, k: int, arguments: Arguments, num_classes: tuple[int, int]
) -> list[TrainingConfig]:
    """How the classifier is trained: once for each labelling, or, without flowed images, for the
    same epochs and for as many whole epochs as take no more gradient steps than training on the
    flowed images too. `num_classes` are those of the source and of the target, which count only
    there."""
    base = TrainingConfig(
        num_epochs=arguments.n_epochs_nn,
        learning_rate=arguments.lr_nn,
        num_trainings=arguments.num_trainings,
    )
    if method != "target_only":
        return [replace(base, labelling=labelling) for labelling in arguments.labelling]
    of_source, of_target = num_classes
    without = classification.steps_per_epoch(of_target * k, base.batch_size)
    flowed = of_source * arguments.num_per_class
    together = classification.steps_per_epoch(of_target * k + flowed, base.batch_size)
    return [base, replace(base, num_epochs=base.num_epochs * together // without)]


def describe(row: dict) -> str:
    """One line a setting: accuracy in percent, mean and spread over tries and trainings."""
    every = 100 * np.asarray(row["accuracies"])
    training = row["training"]
    name = f"k = {row['k']:<3d} {row['method']:12s} {training['num_epochs']:5d} epochs"
    if row["method"] != "target_only":
        agreement = 100 * np.mean(row["label_agreement"])
        name += f", labels by {training['labelling']} ({agreement:.0f}% right)"
    parts = []
    for i, step in enumerate(row["steps"]):
        last = every[:, i]
        parts.append(
            mean_and_spread(last, ".1f")
            + (f" (tries' means ± {spread(last.mean(axis=1)):.1f})" if len(last) > 1 else "")
            + (f" at step {int(step)}" if len(row["steps"]) > 1 else "")
        )
    return f"  {name}: " + "; ".join(parts)


if __name__ == "__main__":
    run_command(
        main, lambda: tyro.cli(Arguments), lower="--num_per_class, --size or --num_trainings"
    )
