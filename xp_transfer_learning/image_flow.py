"""A labelled set of images flows to another: MNIST to Fashion-MNIST, or data of your own.

    python xp_transfer_learning/image_flow.py --preset quick
    python xp_transfer_learning/image_flow.py --src_dataset usps --tgt_dataset my_images.zip
    python xp_transfer_learning/image_flow.py --src_dataset noise --tgt_dataset cifar10

Without data at hand the quick preset flows scikit-learn's digits to rotated and inverted ones; it
adds MNIST to Fashion-MNIST when the data root has both. Nothing is downloaded unless asked for.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import mmd, runs
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_transfer_learning.config import (
    EXPERIMENT,
    IMAGE_FLOWS,
    NOISE,
    QUICK_WITH_DATA,
    Directions,
    ImageFlowConfig,
    Preset,
)
from xp_transfer_learning.data import draw, known_by_content, load, pair_name, shaped, stem
from xp_transfer_learning.labels import nearest
from xp_transfer_learning.methods import DIRECTIONS


def data(key, config: ImageFlowConfig, data_root: Path | None):
    """(x0, x_tgt, image shape, names of the source's classes, none of noise): the source is
    resized, and made gray or color, like the target."""
    source = None
    if config.source != NOISE:
        source = load(config.source, config.split, data_root)
    target = load(config.target, config.split, data_root)
    key_source, key_target = jax.random.split(key)
    x_tgt = draw(key_target, target, config.num_per_class, "--num_per_class")
    if source is None:
        return jax.random.normal(key_source, x_tgt.shape), x_tgt, target.image_shape, ()
    source = shaped(source, target.image_shape)
    x0 = draw(key_source, source, config.num_per_class, "--num_per_class")
    return x0, x_tgt, target.image_shape, source.class_names


def run_flow(
    config: ImageFlowConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None,
    mesh: Mesh | None = None,
) -> runs.Run:
    """Runs one flow, or finds it done. Its folder holds losses [T], particles
    [records, C, n, d], steps, x_tgt, image_shape and the source's class_names."""
    name = pair_name(config.source, config.target)
    known = known_by_content(config, data_root)
    exclude = (*runs.NOT_HASHED, *config.without_effect())
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed, exclude=exclude)
    if run.finished:
        print(f"{run.folder}: done before")
        return run
    key_data, key_flow = jax.random.split(jax.random.PRNGKey(seed))
    x0, x_tgt, image_shape, class_names = data(key_data, config, data_root)
    if config.flow == "sliced_mmd" and len(x0) != len(x_tgt):
        raise ValueError(
            "sliced_mmd takes every class to the target class of its number: "
            f"{config.source} has {len(x0)} classes, {config.target} {len(x_tgt)}"
        )
    draws: dict[str, Any] = {
        "num_directions": config.num_directions,
        "draw_directions": DIRECTIONS[config.directions],
        "block_size": config.block_size,
        "mesh": mesh,
    }
    if config.flow == "sliced_mmd":
        target_value_and_grad = mmd.target_value_and_grad_sliced_energy(**draws)
    else:
        target_value_and_grad = mmd.target_value_and_grad(
            mmd.sliced_riesz(), num_target_points=config.n_sample_batch, **draws
        )
    print(f"{config.source} -> {config.target}: {config.num_steps} steps of {tuple(x0.shape)}")
    losses, particles = wasserstein_gradient_descent(
        x0,
        x_tgt,
        target_value_and_grad,
        key_flow,
        n_epochs=config.num_steps,
        lr=_linear_decay(config.step_size, config.num_steps) if config.decay else config.step_size,
        m=config.m,
        record_every=config.record_every,
        run=run,
        description=name,
        mesh=mesh,
    )
    run.finish(
        losses=losses,
        particles=particles,
        steps=recorded_steps(config.num_steps, config.record_every),
        x_tgt=np.asarray(x_tgt),
        image_shape=np.asarray(image_shape),
        class_names=np.asarray(class_names, str),
    )
    return run


def arrival(particles: np.ndarray, x_tgt: np.ndarray) -> dict:
    """How near particles [C, n, d] are to the target images [C', k, d]: the root mean square a
    pixel to each particle's nearest one, and how many different images are nearest to some."""
    index, distances = nearest(particles, x_tgt)
    distances = distances / np.sqrt(x_tgt.shape[2])
    measures: dict[str, Callable[..., Any]] = {"median": np.median, "mean": np.mean, "max": np.max}
    return {
        "root_mean_square_to_nearest_target_image": {k: f(distances) for k, f in measures.items()},
        "distinct_nearest_target_images": len(np.unique(index)),
        "target_images": x_tgt.shape[0] * x_tgt.shape[1],
    }


def report(run: runs.Run, config: ImageFlowConfig, seed: int) -> None:
    """Writes the finished run's summary.json and figures into its folder, and prints them."""
    from xp_transfer_learning import plot

    arrays = run.load_arrays()
    losses, arrived = arrays["losses"], arrival(arrays["particles"][-1], arrays["x_tgt"])
    shown = {str(i): losses[i] for i in np.linspace(0, len(losses) - 1, 11).astype(int)}
    table = Table(
        ["step", "loss F = MMD²/2"],
        [[f"{int(step):,}", f"{loss:.4g}"] for step, loss in shown.items()],
        "Loss before each step; at the end the nearest target images are "
        f"{arrived['root_mean_square_to_nearest_target_image']['median']:.2g} per pixel away "
        f"(median), {arrived['distinct_nearest_target_images']:,} different ones of "
        f"{arrived['target_images']:,}.",
    )
    title = f"{stem(config.source)} → {stem(config.target)}, {config.num_per_class} per class"
    name = run.folder / "figures" / pair_name(config.source, config.target)
    write_summary(
        run.folder / "summary.json",
        {"config": config, "seed": seed, "losses": shown, **arrived},
        [table],
        figures=lambda _: plot.image_flow(arrays, title, name),
    )
    print(f"arrays:  {run.arrays}")


def _linear_decay(step_size: float, num_steps: int):
    return lambda step: step_size * (1 - step / num_steps)


def with_data(data_root: Path | None) -> bool:
    """Whether MNIST and Fashion-MNIST are in the data root."""
    root = Path(data_root or os.environ.get("DATA_ROOT", "data"))
    return all((root / name / "raw").is_dir() for name in ("MNIST", "FashionMNIST"))


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    src_dataset: str | None = None
    """A data set's name, or the path of a folder or zip of images: this flow, in the paper's
    settings, instead of the preset's. Likewise `tgt_dataset`."""
    tgt_dataset: str | None = None
    num_per_class: int | None = None
    """This and the next ten replace what the preset says."""
    flow: Literal["wow", "sliced_mmd"] | None = None
    num_directions: int | None = None
    directions: Directions | None = None
    n_epochs: int | None = None
    lr: float | None = None
    decay: bool | None = None
    m: float | None = None
    record_every: int | None = None
    block_size: int | None = None
    """Directions at a time: bounds memory, changes nothing else."""
    n_sample_batch: int | None = None
    """Target points drawn per class at each step, as published. Biased: the flow ends at a narrower
    set than the target, the more so the fewer points are drawn."""
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def chosen(arguments: Arguments) -> list[ImageFlowConfig]:
    """The preset's flows, or the one asked for, with what the arguments replace."""
    configs = list(IMAGE_FLOWS[arguments.preset])
    if arguments.preset == "quick" and with_data(arguments.data_root):
        configs.append(QUICK_WITH_DATA)
    if arguments.src_dataset or arguments.tgt_dataset:
        named: dict[str, Any] = {"source": arguments.src_dataset, "target": arguments.tgt_dataset}
        configs = [replace(ImageFlowConfig(), **{k: v for k, v in named.items() if v})]
    given: dict[str, Any] = {
        "num_per_class": arguments.num_per_class,
        "flow": arguments.flow,
        "num_directions": arguments.num_directions,
        "directions": arguments.directions,
        "num_steps": arguments.n_epochs,
        "step_size": arguments.lr,
        "decay": arguments.decay,
        "m": arguments.m,
        "record_every": arguments.record_every,
        "block_size": arguments.block_size,
        "n_sample_batch": arguments.n_sample_batch,
    }
    replaced = {name: value for name, value in given.items() if value is not None}
    return [replace(config, **replaced) for config in configs]


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the flows and draws their figures; returns the run folders."""
    folders = []
    asked_for = bool(arguments.src_dataset or arguments.tgt_dataset)
    for config in chosen(arguments):
        try:
            run = run_flow(
                config,
                seed=arguments.seed,
                results=arguments.results,
                data_root=arguments.data_root,
                mesh=mesh,
            )
        except FileNotFoundError as error:
            if asked_for:
                raise
            print(f"left out, {config.source} -> {config.target}: {error}")
            continue
        report(run, config, arguments.seed)
        folders.append(run.folder)
    return folders


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--block_size or --num_per_class")
