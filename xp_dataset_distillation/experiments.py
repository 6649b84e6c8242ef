"""Condensed sets beside baselines, under one evaluator.

    python xp_dataset_distillation/experiments.py --preset quick
    python xp_dataset_distillation/experiments.py --preset paper --only fashion_mnist --seeds 0 1 2
    python xp_dataset_distillation/experiments.py --preset paper --only order kernels
    python xp_dataset_distillation/experiments.py --preset gpu --only cifar10 --dataset cifar10.zip

Groups are in `presets.py`. A set is condensed once and judged by all judges of its group; what is
finished is skipped, what was interrupted resumes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lib import datasets, runs
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.files import write_bytes, write_json
from lib.runs.processes import DeviceOptions
from xp_dataset_distillation import plot, tables
from xp_dataset_distillation.condense import condense
from xp_dataset_distillation.config import (
    EXPERIMENT,
    BaselineConfig,
    Comparison,
    CondenseConfig,
    Entry,
    Preset,
    is_whole,
)
from xp_dataset_distillation.evaluation import evaluate
from xp_dataset_distillation.presets import presets


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    labels: tuple[str, ...] = ()
    """Entries to run, by their labels; none: all."""
    images_per_class: tuple[int, ...] = ()
    """In place of the groups' own."""
    dataset: str | None = None
    """In place of the groups' own: a name, or the path of a folder or zip of images."""
    iterations: int | None = None
    """In place of the preset's number of steps of condensation."""
    held_out: int = 0
    """Training images a class that are kept away and judged on in place of the test split: to
    choose settings by."""
    seeds: tuple[int, ...] = (0,)
    """One condensed set, and its classifiers, a seed."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def chosen(arguments: Arguments) -> dict[str, Comparison]:
    """The groups and entries that the arguments name. Raises ValueError on unknown ones."""
    groups, found = presets(arguments.preset), {}
    for name in settings.chosen(arguments.only, groups, kind="group"):
        group = groups[name]
        labels = settings.chosen(arguments.labels, group.entries, kind="entry")
        entries = {label: changed(group.entries[label], arguments) for label in labels}
        numbers = arguments.images_per_class or group.images_per_class
        found[name] = replace(group, entries=entries, images_per_class=numbers)
    return found


def changed(entry: Entry, arguments: Arguments) -> Entry:
    changes: dict[str, Any] = {"held_out": arguments.held_out}
    if arguments.dataset is not None:
        changes["dataset"] = arguments.dataset
    if arguments.iterations is not None and isinstance(entry, CondenseConfig):
        changes["iterations"] = arguments.iterations
    return replace(entry, **changes)


def run_group(name: str, group: Comparison, arguments: Arguments) -> Path:
    """Condenses and judges; returns the summary: a row for each entry, number of images and judge,
    with accuracies [seeds, classifiers]."""
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    rows: dict[tuple, dict[str, Any]] = {}
    # Seeds outermost: what is there after an interruption compares all entries.
    for seed in arguments.seeds:
        for number in group.images_per_class:
            for label, entry in group.at(number).items():
                for judge, judged in group.judges.items():
                    found = evaluate(entry, judged, seed=seed, **where)
                    row = row_of(label, entry, judge)
                    key = (row["label"], row["images_per_class"], judge)
                    row = rows.setdefault(key, row | {"settings": entry, "judged": judged})
                    row.setdefault("accuracies", {})[seed] = found["accuracies"]
                    row["num_images"] = found["num_images"]
                    row["num_epochs"] = found["num_epochs"]
                shown = 100 * np.mean(rows[key]["accuracies"][seed])
                print(f"seed {seed}, {number} a class, {label}: {shown:.1f}%", flush=True)
    listed = [row | {"accuracies": list(row["accuracies"].values())} for row in rows.values()]
    file_name = f"{name}_{arguments.preset}" + ("_held_out" if arguments.held_out else "")
    if arguments.dataset is not None:
        file_name += f"_{datasets.file_stem(arguments.dataset, data_root=arguments.data_root)}"
    summary = arguments.results / EXPERIMENT / f"{file_name}.json"
    about = {"group": name, "seeds": arguments.seeds, "environment": runs.environment()}
    about["judged_on"] = "held-out training images" if arguments.held_out else "the test split"
    write_json(summary, {**about, "rows": listed})
    page = tables.page({**about, "rows": listed})
    write_bytes(summary.with_suffix(".md"), page.encode())
    print(tables.markdown(listed))
    print(f"numbers: {summary}")
    print(f"figure:  {plot.summary_figure(summary)}")
    for figure in image_figures(group, summary, arguments):
        print(f"figure:  {figure}")
    return summary


def row_of(label: str, entry: Entry, judge: str) -> dict[str, Any]:
    number = None if is_whole(entry) else entry.images_per_class
    return {"label": label, "images_per_class": number, "judge": judge}


def image_figures(group: Comparison, summary: Path, arguments: Arguments) -> list[Path]:
    """The first seed's condensed images at the largest number a class, and how they came to be."""
    saved = []
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    for label, entry in group.at(max(group.images_per_class)).items():
        if isinstance(entry, BaselineConfig):
            continue
        run = condense(entry, seed=arguments.seeds[0], **where)
        stem = f"{summary.stem}_{label.replace(', ', '-').replace(' ', '_')}"
        files = (summary.with_name(f"{stem}{ending}.png") for ending in ("", "_along"))
        saved += plot.run_figures(run, *files, label=label)
    return saved


def main(arguments: Arguments) -> list[Path]:
    """Runs the groups; returns their summaries."""
    summaries = []
    for name, group in chosen(arguments).items():
        print(f"{name}: {len(group.entries)} entries x {len(arguments.seeds)} seeds", flush=True)
        summaries.append(run_group(name, group, arguments))
    return summaries


if __name__ == "__main__":
    lower = "class_chunk or real_batch in presets.py, or the preset (--preset quick)"
    run_command(main, lambda: tyro.cli(Arguments), lower=lower)
