"""Condenses a labelled set of images into a few images a class.

    python xp_dataset_distillation/condense.py echo --dataset fashion_mnist --images_per_class 10
    python xp_dataset_distillation/condense.py echo --dataset path/to/images.zip --factor 1 --lr 5
    python xp_dataset_distillation/condense.py dm --dataset mnist --evaluate idc

Only training images are read. The condensed set lands in the run's folder as `condensed/`
(`export.py`: .npz, PNG folder, metadata; `condensed_numpy.py` reads it with numpy alone). An
interrupted run resumes to the same bits. `--evaluate` then trains classifiers on it and prints
their accuracy on the test split.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lib import datasets, runs
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.numerics import key_of_seed, named_key
from lib.runs import processes
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import chosen, settings_of
from xp_dataset_distillation import config as settings
from xp_dataset_distillation import export, plot, real_data
from xp_dataset_distillation.config import EXPERIMENT, CondenseConfig, Entry
from xp_dataset_distillation.factor import check_factor, encode
from xp_dataset_distillation.objectives import Setting, Target, objective, optimizer, step_of

WITHOUT_FLIPS = ("digits", "mnist", "svhn", "usps", "kmnist")
"""A mirrored digit or letter is another one or none: data sets of these, in whatever size."""


AnyEntry = TypeVar("AnyEntry", bound=Entry)


class Keys(NamedTuple):
    """What a seed decides: the first images, the networks, and what each step draws."""

    start: jax.Array
    networks: jax.Array
    steps: jax.Array


def keys_of(seed: int) -> Keys:
    return Keys(*jax.random.split(key_of_seed(seed), 3))


class Problem(NamedTuple):
    """Training images by class, and what the objective must know of them."""

    real: real_data.RealData
    setting: Setting


def training_images(
    entry: Entry, data_root: Path | None
) -> tuple[real_data.RealData, tuple[np.ndarray | jax.Array, np.ndarray] | None]:
    """The training images that an entry may use, and, with their labels, those it holds out. Both
    draws are the same for all seeds."""
    real, kept = real_data.load(entry.dataset, data_root=data_root, size=entry.size), None
    if entry.held_out:
        key = named_key(jax.random.key(0), "held out")
        real, images, labels = real_data.held_out(key, real, num_per_class=entry.held_out)
        kept = images, labels
    if entry.num_per_class is not None:
        real = real_data.subset(named_key(jax.random.key(0), "subset"), real, entry.num_per_class)
    return real, kept


def _names_characters(class_names: tuple[str, ...]) -> bool:
    """Whether each class is called by one digit or letter, as in a folder of images of these."""
    return all(len(name) == 1 and name.isalnum() for name in class_names)


def setting_of(entry: Entry, real: real_data.RealData) -> Setting:
    """What objective and classifiers must know of the data."""
    flips = getattr(entry, "flips", None)
    if flips is None:
        flips = not (real.origin in WITHOUT_FLIPS or _names_characters(real.class_names))
    return Setting(real.num_classes, real.image_shape, real.mean, real.std, flips)


def problem(config: CondenseConfig, data_root: Path | None) -> Problem:
    """Reads the training images. Raises ValueError on what does not fit together."""
    real, _ = training_images(config, data_root)
    real_data.check_images_per_class(real, config.images_per_class)
    check_factor(config.factor, *real.image_shape[:2])
    return Problem(real, setting_of(config, real))


def start(key: jax.Array, config: CondenseConfig, real: real_data.RealData) -> np.ndarray:
    """The stored images before the first step, [classes, n, H, W, c] in [0, 1]."""
    classes, n, shape = real.num_classes, config.images_per_class, real.image_shape
    if config.start == "noise":
        noise = jax.random.normal(key, (classes, n, *shape))
        return np.asarray(jnp.clip(noise / 4 + 0.5, 0, 1))
    per_image = config.factor**2 if config.start == "mixed" else 1
    # Of a class too small for distinct cells each cell is drawn on its own.
    if n * per_image <= min(real.counts):
        images = real_data.draw_batch(key, real, n * per_image)
    else:
        keys = jax.random.split(key, per_image)
        images = jnp.concatenate([real_data.draw_batch(key, real, n) for key in keys], axis=1)
    images = jnp.asarray(images, jnp.float32) / 255
    return np.asarray(encode(images, config.factor) if config.start == "mixed" else images)


def known_by_content(entry: AnyEntry, data_root: Path | None) -> AnyEntry:
    """The settings by which results are known: `lib.datasets.identity` in place of a path."""
    known_by = datasets.identity(entry.dataset, data_root=data_root)
    return dataclasses.replace(entry, dataset=known_by)


def condense(
    config: CondenseConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
) -> runs.Run:
    """Condenses, or finds it done. The folder holds arrays images [classes, n, H, W, c] in [0, 1],
    records [.., classes, n, H, W, c] uint8 at `steps`, losses [iterations], seconds; and the
    exported set in `condensed/`."""
    name = f"{Path(config.dataset).stem}-{config.method}-ipc{config.images_per_class}"
    known = known_by_content(config, data_root)
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed)
    if run.finished:
        return run
    real, setting = problem(config, data_root)
    keys = keys_of(seed)
    x0 = start(keys.start, config, real)
    classes, n, *shape = x0.shape
    batch = min(config.real_batch, min(real.counts))
    target = Target(real, jax.random.key_data(keys.networks))
    record_every = -(-config.iterations // config.records)
    began = time.perf_counter()
    losses, particles = wasserstein_gradient_descent(
        jnp.asarray(x0).reshape(classes, n, -1),
        target,
        objective(dataclasses.replace(config, real_batch=batch), setting, processes.current()),
        keys.steps,
        n_epochs=config.iterations,
        optimizer=optimizer(*step_of(config, setting)),
        carry=jnp.zeros((), jnp.int32),
        record_every=record_every,
        run=run,
        show_progress=show_progress,
        description=name,
        mesh=processes.current(),
    )
    seconds = time.perf_counter() - began
    records = particles.reshape(-1, classes, n, *shape)
    export.save(run.folder / "condensed", condensed_set(records[-1], known, real, seed))
    run.finish(
        images=records[-1],
        records=np.rint(records * 255).astype(np.uint8),
        steps=recorded_steps(config.iterations, record_every),
        losses=losses,
        seconds=np.asarray(seconds),
    )
    return run


def condensed_set(
    images: np.ndarray, config: CondenseConfig, real: real_data.RealData, seed: int
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
    evaluate: tuple[str, ...] = ()
    """Evaluators to judge by, of dm, idc and wow, in full: hours without a GPU."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def main(arguments: Arguments) -> Path:
    """Condenses, exports, draws; returns the folder of the exported set."""
    from xp_dataset_distillation import evaluation  # it reads this module

    config = settings_of(CondenseConfig, arguments)
    judges = chosen(arguments.evaluate, settings.EVALUATORS, kind="evaluator")
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    run = condense(config, seed=arguments.seed, **where)
    folder, seconds = run.folder / "condensed", float(run.load_arrays()["seconds"])
    for figure in plot.run_figures(run, run.folder / "condensed.png", run.folder / "along.png"):
        print(f"figure:  {figure}")
    print(f"images:  {folder} ({config.images_per_class} a class, {seconds:.0f} s)")
    for name in judges if arguments.evaluate else ():
        judged = settings.Judged(settings.EVALUATORS[name])
        found = evaluation.evaluate(config, judged, seed=arguments.seed, **where)["accuracies"]
        print(f"{name}: {100 * np.mean(found):.1f}% of the test split, {len(found)} classifiers")
    return folder


if __name__ == "__main__":
    bases = {
        "echo": ("MMD with a Gaussian kernel, factor 2", Arguments()),
        "dm": ("distribution matching: means", settings.dm(Arguments())),
        "mmdsw": ("sliced-Wasserstein kernel between classes", settings.mmdsw(Arguments())),
    }
    run_command(
        main,
        lambda: tyro.extras.overridable_config_cli(bases),
        lower="--class_chunk, --real_batch or --most_decoded",
    )
