"""Condensed sets beside baselines, under one evaluator.

    python xp_dataset_distillation/experiments.py --preset quick
    python xp_dataset_distillation/experiments.py --preset paper --only fashion_mnist --seeds 0 1 2
    python xp_dataset_distillation/experiments.py --preset paper --only order kernels
    python xp_dataset_distillation/experiments.py --preset gpu --only cifar10 --dataset cifar10.zip

Groups are in `presets.py`. A set is condensed once and goes through all evaluations of its group;
what is finished is skipped, what was interrupted resumes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import datasets
from lib.report.tables import write_summary
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_dataset_distillation import baselines, tables
from xp_dataset_distillation.condense import condense
from xp_dataset_distillation.config import (
    EXPERIMENT,
    BaselineConfig,
    Comparison,
    CondenseConfig,
    Evaluation,
    Method,
    Preset,
    is_whole,
)
from xp_dataset_distillation.evaluation import (
    EvaluationSet,
    TrainingSet,
    labelled,
    stored_accuracies,
    test_split,
)
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.presets import presets
from xp_dataset_distillation.real_data import (
    RealData,
    known_by_content,
    setting_of,
    training_images,
)


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    labels: tuple[str, ...] = ()
    """Methods to run, by their labels; none: all."""
    images_per_class: tuple[int, ...] = ()
    """In place of the groups' own."""
    dataset: str | None = None
    """In place of the groups' own, and of its name where that is a group's: a name, or the path of
    a folder or zip of images."""
    num_steps: Annotated[int | None, tyro.conf.arg(aliases=("--iterations",))] = None
    """In place of the preset's number of steps of condensation."""
    held_out: int = 0
    """Training images per class that are held out and evaluated on in place of the test split: to
    choose settings by."""
    seeds: tuple[int, ...] = (0,)
    """One condensed set, and its classifiers, per seed."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def chosen(arguments: Arguments) -> dict[str, Comparison]:
    """The groups and methods that the arguments name. Raises ValueError on unknown ones."""
    groups, selected = presets(arguments.preset), {}
    for name in settings.chosen(arguments.only, groups, kind="group"):
        group = groups[name]
        labels = settings.chosen(arguments.labels, group.methods, kind="method")
        methods = {label: changed(group.methods[label], arguments) for label in labels}
        numbers = arguments.images_per_class or group.images_per_class
        group = replace(group, methods=methods, images_per_class=numbers)
        selected[called(name, arguments)] = group
    return selected


def called(group: str, arguments: Arguments) -> str:
    """The group's name: called by a data set, that of the one in its place, else with that."""
    if arguments.dataset is None:
        return group
    used = datasets.file_stem(arguments.dataset, data_root=arguments.data_root)
    return used if group in datasets.NAMES else f"{group}_{used}"


def changed(method: Method, arguments: Arguments) -> Method:
    changes: dict[str, Any] = {"held_out": arguments.held_out}
    if arguments.dataset is not None:
        changes["dataset"] = arguments.dataset
    if arguments.num_steps is not None and isinstance(method, CondenseConfig):
        changes["num_steps"] = arguments.num_steps
    return replace(method, **changes)


def training_set(
    method: Method, real: RealData, *, seed: int, mesh: Mesh | None = None, **where: Any
) -> TrainingSet:
    """What classifiers of the method are trained on: its condensed images, decoded, or its training
    images."""
    if isinstance(method, CondenseConfig):
        run = condense(method, seed=seed, mesh=mesh, **where)
        return labelled(np.asarray(decode(jnp.asarray(run.load_arrays()["images"]), method.factor)))
    if is_whole(method):
        return TrainingSet(np.asarray(real.images, np.float32) / 255, real.labels)
    return labelled(baselines.images_of(method, real, seed=seed))


def evaluation_set(
    method: Method,
    real: RealData,
    held_out: tuple[np.ndarray | jax.Array, np.ndarray] | None,
    data_root: Path | None,
) -> EvaluationSet:
    """The test split, or the images that the method holds out."""
    if held_out is not None:
        return EvaluationSet(*held_out)
    test = test_split(
        method.dataset,
        real.name,
        real.class_names,
        real.image_shape,
        resized=method.size is not None,
        data_root=data_root,
    )
    return EvaluationSet(test.images, test.labels)


def evaluate(
    method: Method,
    evaluation: Evaluation,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Accuracies [num_networks] of the classifiers trained on one set, that of `seed`; stored, and
    read back if done before; interrupted, it resumes."""
    evaluator = evaluation.evaluator
    if is_whole(method):
        evaluator = replace(evaluator, num_epochs=evaluation.whole_epochs)
    kind = method.kind if isinstance(method, BaselineConfig) else method.method
    name = f"accuracy-{Path(method.dataset).stem}-{kind}-ipc{method.images_per_class}"

    def read():
        real, held_out = training_images(method, data_root)
        test = evaluation_set(method, real, held_out, data_root)
        training = training_set(
            method, real, seed=seed, mesh=mesh, results=results, data_root=data_root
        )
        return training, test, setting_of(method, real)

    return stored_accuracies(
        read,
        name,
        {"method": known_by_content(method, data_root)},
        evaluator,
        num_networks=evaluation.num_networks,
        seed=seed,
        results=results,
        show_progress=show_progress,
        mesh=mesh,
    )


def run_group(name: str, group: Comparison, arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Condenses and evaluates; returns the summary: a row for each method, number of images and
    evaluation, with accuracies [seeds, classifiers] and, where images were condensed, the minutes
    that each seed's took, without the pool's."""
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    rows: dict[tuple, dict[str, Any]] = {}
    # Seeds outermost: what is there after an interruption compares all methods.
    for seed in arguments.seeds:
        for number in group.images_per_class:
            for label, method in group.at(number).items():
                minutes = None
                if isinstance(method, CondenseConfig):
                    run = condense(method, seed=seed, mesh=mesh, **where)
                    minutes = float(run.load_arrays()["seconds"]) / 60
                for evaluator, evaluation in group.evaluations.items():
                    stored = evaluate(method, evaluation, seed=seed, mesh=mesh, **where)
                    row = row_of(label, method, evaluator)
                    key = (row["label"], row["images_per_class"], evaluator)
                    row = rows.setdefault(key, row | {"settings": method, "evaluation": evaluation})
                    row.setdefault("accuracies", {})[seed] = stored["accuracies"]
                    row["num_images"] = stored["num_images"]
                    row["num_epochs"] = stored["num_epochs"]
                    if minutes is not None:
                        row.setdefault("minutes", {})[seed] = minutes
                shown = 100 * np.mean(rows[key]["accuracies"][seed])
                print(f"seed {seed}, {number} per class, {label}: {shown:.1f}%", flush=True)
    by_seed = ("accuracies", "minutes")
    listed = [
        row | {name: list(row[name].values()) for name in by_seed if name in row}
        for row in rows.values()
    ]
    file_name = f"{name}_{arguments.preset}" + ("_held_out" if arguments.held_out else "")
    path = arguments.results / EXPERIMENT / f"{file_name}.json"
    summary = {"group": name, "seeds": arguments.seeds, "rows": listed}
    summary["evaluated_on"] = "held-out training images" if arguments.held_out else "the test split"
    return write_summary(
        path,
        summary,
        tables.tables(summary),
        figures=lambda path: figures(group, path, arguments),
    )


def row_of(label: str, method: Method, evaluator: str) -> dict[str, Any]:
    number = None if is_whole(method) else method.images_per_class
    return {"label": label, "images_per_class": number, "evaluator": evaluator}


def figures(group: Comparison, summary: Path, arguments: Arguments) -> list[Path]:
    """The accuracies; the first seed's condensed images at the largest number per class, and how
    they came to be."""
    from xp_dataset_distillation import plot

    saved = [plot.summary_figure(summary)]
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    for label, method in group.at(max(group.images_per_class)).items():
        if isinstance(method, BaselineConfig):
            continue
        run = condense(method, seed=arguments.seeds[0], **where)
        stem = f"{summary.stem}_{label.replace(', ', '-').replace(' ', '_')}"
        files = (summary.with_name(f"{stem}{ending}.png") for ending in ("", "_along"))
        saved += plot.run_figures(run, *files, label=label)
    return saved


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the groups; returns their summaries."""
    summaries = []
    for name, group in chosen(arguments).items():
        print(f"{name}: {len(group.methods)} methods x {len(arguments.seeds)} seeds", flush=True)
        summaries.append(run_group(name, group, arguments, mesh))
    return summaries


if __name__ == "__main__":
    lower = "class_chunk or real_batch in presets.py, or the preset (--preset quick)"
    run_command(main, lambda: tyro.cli(Arguments), lower=lower)
