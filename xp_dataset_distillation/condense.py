"""Condenses a labelled set of images into a few images per class.

    python xp_dataset_distillation/condense.py echo --dataset fashion_mnist --images_per_class 10
    python xp_dataset_distillation/condense.py echo --dataset path/to/images.zip --factor 1 --lr 5
    python xp_dataset_distillation/condense.py dm --dataset mnist

Only training images are read. The condensed set lands in the run's folder as `condensed/`
(`export.py`: .npz, PNG folder, metadata; `condensed_numpy.py` reads it with numpy only), which
`evaluate.py` takes. An interrupted run resumes to the same bits.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.numerics import key_of_seed
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_dataset_distillation import export
from xp_dataset_distillation.config import EXPERIMENT, CondenseConfig, dm, mmdsw
from xp_dataset_distillation.factor import check_factor, encode
from xp_dataset_distillation.objectives import Target, first_carry, objective, optimizer, step_of
from xp_dataset_distillation.pool import pool_of, train_pool
from xp_dataset_distillation.real_data import (
    RealData,
    Setting,
    check_images_per_class,
    draw_batch,
    known_by_content,
    setting_of,
    training_images,
)


class Keys(NamedTuple):
    """What a seed decides: the first images, the networks, and what each step draws."""

    start: jax.Array
    networks: jax.Array
    steps: jax.Array


def keys_of(seed: int) -> Keys:
    return Keys(*jax.random.split(key_of_seed(seed), 3))


class Problem(NamedTuple):
    """Training images by class, and what the objective must know of them."""

    real: RealData
    setting: Setting


def problem(config: CondenseConfig, data_root: Path | None) -> Problem:
    """Reads the training images. Raises ValueError on what does not fit together."""
    real, _ = training_images(config, data_root)
    check_images_per_class(real, config.images_per_class)
    check_factor(config.factor, *real.image_shape[:2])
    return Problem(real, setting_of(config, real))


def start(key: jax.Array, config: CondenseConfig, real: RealData) -> np.ndarray:
    """The stored images before the first step, [classes, n, H, W, c] in [0, 1]."""
    classes, n, shape = real.num_classes, config.images_per_class, real.image_shape
    if config.start == "noise":
        noise = jax.random.normal(key, (classes, n, *shape))
        return np.asarray(jnp.clip(noise / 4 + 0.5, 0, 1))
    per_image = config.factor**2 if config.start == "mixed" else 1
    # Of a class too small for distinct cells each cell is drawn by itself.
    if n * per_image <= min(real.counts):
        images = draw_batch(key, real, n * per_image)
    else:
        keys = jax.random.split(key, per_image)
        images = jnp.concatenate([draw_batch(key, real, n) for key in keys], axis=1)
    images = jnp.asarray(images, jnp.float32) / 255
    return np.asarray(encode(images, config.factor) if config.start == "mixed" else images)


def condense(
    config: CondenseConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> runs.Run:
    """Condenses unless it is done, after training the pool of its networks, if it has one and it
    is not there. The folder holds arrays images [classes, n, H, W, c] in [0, 1],
    snapshots [.., classes, n, H, W, c] uint8 at `steps`, losses [num_steps], seconds; and the
    exported set in `condensed/`."""
    name = f"{Path(config.dataset).stem}-{config.method}-ipc{config.images_per_class}"
    known = known_by_content(config, data_root)
    exclude = (*runs.NOT_HASHED, *config.without_effect())
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed, exclude=exclude)
    if run.finished:
        return run
    real, setting = problem(config, data_root)
    pool = None
    if config.networks != "random":
        where: dict[str, Any] = {"results": results, "data_root": data_root, "mesh": mesh}
        stored = train_pool(pool_of(config), show_progress=show_progress, **where)
        pool = jnp.asarray(stored["parameters"])
    keys = keys_of(seed)
    x0 = start(keys.start, config, real)
    save_every = -(-config.num_steps // config.num_snapshots)
    config = dataclasses.replace(config, real_batch=min(config.real_batch, *real.counts))
    began = time.perf_counter()
    losses, particles = wasserstein_gradient_descent(
        jnp.asarray(x0).reshape(*x0.shape[:2], -1),
        Target(real, jax.random.key_data(keys.networks), pool),
        objective(config, setting, mesh),
        keys.steps,
        n_epochs=config.num_steps,
        optimizer=optimizer(*step_of(config, setting)),
        carry=first_carry(config, setting),
        record_every=save_every,
        run=run,
        show_progress=show_progress,
        description=name,
        mesh=mesh,
    )
    seconds = time.perf_counter() - began
    snapshots = particles.reshape(-1, *x0.shape)
    export.save(run.folder / "condensed", condensed_set(snapshots[-1], known, real, seed))
    run.finish(
        images=snapshots[-1],
        snapshots=np.rint(snapshots * 255).astype(np.uint8),
        steps=recorded_steps(config.num_steps, save_every),
        losses=losses,
        seconds=np.asarray(seconds),
    )
    return run


def condensed_set(
    images: np.ndarray, config: CondenseConfig, real: RealData, seed: int
) -> export.Condensed:
    """The images with all that a user of them must know."""
    return export.Condensed(
        images=np.asarray(images, np.float32),
        class_names=real.class_names,
        factor=config.factor,
        mean=np.array(real.mean),
        std=np.array(real.std),
        dataset=real.name,
        about={"settings": dataclasses.asdict(config), "seed": seed},
    )


# ---- The command


@dataclasses.dataclass(frozen=True)
class Arguments(DeviceOptions, CondenseConfig):
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Condenses, exports, draws; returns the folder of the exported set."""
    from xp_dataset_distillation import plot

    config = settings_of(CondenseConfig, arguments)
    run = condense(
        config,
        seed=arguments.seed,
        results=arguments.results,
        data_root=arguments.data_root,
        mesh=mesh,
    )
    folder, seconds = run.folder / "condensed", float(run.load_arrays()["seconds"])
    for figure in plot.run_figures(run, run.folder / "condensed.png", run.folder / "along.png"):
        print(f"figure:  {figure}")
    print(f"images:  {folder} ({config.images_per_class} per class, {seconds:.0f} s)")
    return folder


if __name__ == "__main__":
    bases = {
        "echo": ("MMD with a Gaussian kernel, factor 2", Arguments()),
        "dm": ("distribution matching: means", dm(Arguments())),
        "mmdsw": ("sliced-Wasserstein kernel between classes", mmdsw(Arguments())),
    }
    run_command(
        main,
        lambda: tyro.extras.overridable_config_cli(bases),
        lower="--class_chunk, --real_batch or --most_decoded",
    )
