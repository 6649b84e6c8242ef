"""Does a mixture help? Sources of flow matching compared at one cost of training.

    python xp_gmm_source/experiments.py --preset quick
    python xp_gmm_source/experiments.py --preset paper --only mnist --seeds 0 1 2
    python xp_gmm_source/experiments.py --preset gpu --dataset path/to/cifar10.zip --seeds 0

Groups (data sets) and their flows are in `config.py`. A finished flow is skipped, an interrupted
one resumes. Mixtures and the classifier whose features are compared are fitted once per data set,
for all seeds.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.datasets import file_stem
from lib.report.tables import write_summary
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_gmm_source import metrics, tables
from xp_gmm_source.config import EXPERIMENT, FlowConfig, Preset, presets
from xp_gmm_source.flow import (
    Split,
    at_most_tested,
    fitted_mixture,
    known_by_content,
    read,
    reference,
    run_flow,
)
from xp_gmm_source.gmm_files import ImageMixture
from xp_gmm_source.sources import mixture_source


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    labels: tuple[str, ...] = ()
    """Flows to run, by their labels; none: all."""
    dataset: str | None = None
    """In place of the groups' own: a name, or the path of a folder or zip of images. Of fewer test
    images than the preset evaluates all are taken."""
    num_steps: int | None = None
    """In place of the preset's number of training steps."""
    seeds: tuple[int, ...] = (0,)
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def chosen(arguments: Arguments) -> dict[str, dict[str, FlowConfig]]:
    """The groups and flows that the arguments name. Raises ValueError on unknown ones."""
    groups = presets(arguments.preset)
    given = {"dataset": arguments.dataset, "num_steps": arguments.num_steps}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    result = {}
    for group in settings.chosen(arguments.only, groups, kind="group"):
        flows = groups[group]
        labels = settings.chosen(arguments.labels, flows, kind="flow")
        result[group] = {label: replace(flows[label], **changes) for label in labels}
    return result


def run_group(
    group: str, flows: dict[str, FlowConfig], arguments: Arguments, mesh: Mesh | None = None
) -> Path:
    """Runs the flows of a group and returns its summary: for each source its settings, measures
    [seeds, samplers] and folders."""
    done: dict[str, list[runs.Run]] = {label: [] for label in flows}
    # Seeds outermost: what is there after an interruption compares all sources.
    for seed in arguments.seeds:
        for label, config in flows.items():
            done[label].append(
                run_flow(
                    config,
                    seed=seed,
                    results=arguments.results,
                    data_root=arguments.data_root,
                    mesh=mesh,
                )
            )
    rows: list[dict[str, Any]] = []
    for label, config in flows.items():
        stored = [run.load_arrays() for run in done[label]]
        folders = [run.folder.relative_to(arguments.results).as_posix() for run in done[label]]
        for row in tables.rows_of(label, stored):
            rows.append(row | {"settings": config, "folders": folders})
    name = f"{group}_{arguments.preset}"
    if arguments.dataset is not None:
        name += f"_{file_stem(arguments.dataset, data_root=arguments.data_root)}"
    path = arguments.results / EXPERIMENT / f"{name}.json"
    mixtures = fitted_mixtures(flows, arguments)
    summary = {
        "group": group,
        "seeds": arguments.seeds,
        "rows": rows,
        "feature_accuracy": float(stored[0]["feature_accuracy"]),
        "floor": tables.floor_of(stored[0]),
        "mixtures": mixtures_alone(mixtures, arguments.results),
    }
    return write_summary(
        path,
        summary,
        tables.tables(summary),
        figures=lambda path: figures(mixtures, path),
    )


Mixtures = dict[str, tuple[FlowConfig, Split, ImageMixture]]


def fitted_mixtures(flows: dict[str, FlowConfig], arguments: Arguments) -> Mixtures:
    """Every mixture that a flow started from, by its number of components and covariance type."""
    mixtures = {}
    for config in flows.values():
        name = f"{config.n_components}_{config.covariance_type}"
        if config.source == "gmm" and name not in mixtures:
            split = read(config, arguments.data_root)
            config = known_by_content(config, arguments.data_root)
            mixtures[name] = config, split, fitted_mixture(config, split.train, arguments.results)
    return mixtures


def mixtures_alone(mixtures: Mixtures, results: Path) -> dict[str, dict[str, float]]:
    """What draws of the mixtures are worth as images, before any flow: the measures of
    `metrics.evaluate`."""
    values = {}
    for name, (config, split, stored) in mixtures.items():
        source = mixture_source(stored.mixture, mean=0.0, std=1.0, pca=stored.projection)
        draws = source.sample(jax.random.key(2), config.num_samples)
        measured = metrics.evaluate(draws, reference(config, split, results))
        values[name] = {measure: float(value) for measure, value in measured.items()}
    return values


def figures(mixtures: Mixtures, summary: Path) -> list[Path]:
    """Those of `plot`; means and draws of every mixture that a flow started from."""
    from xp_gmm_source import plot

    saved = plot.figures(summary)
    for name, (_, split, stored) in mixtures.items():
        path = summary.with_name(f"{summary.stem}_mixture_{name}.png")
        saved.append(plot.mixture_sheet(stored, split.train.name, path))
    return saved


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the groups; returns their summaries."""
    summaries = []
    for group, flows in chosen(arguments).items():
        if arguments.dataset is not None:
            (most,) = {config.num_samples for config in flows.values()}
            num = at_most_tested(most, arguments.dataset, arguments.data_root)
            flows = {label: replace(config, num_samples=num) for label, config in flows.items()}
        used = arguments.dataset or group
        print(f"{used}, {len(flows)} flows x {len(arguments.seeds)} seeds", flush=True)
        summaries.append(run_group(group, flows, arguments, mesh))
    return summaries


if __name__ == "__main__":
    lower = "batch_size or width in config.py, or the preset (--preset quick)"
    run_command(main, lambda: tyro.cli(Arguments), lower=lower)
