"""Every experiment on mixing weights, in groups: each a table, figures and a summary.

    python xp_data_mixing/study/experiments.py --preset quick
    python xp_data_mixing/study/experiments.py --preset paper --only recovery coverage

The groups and their settings are in `config.py`. What is finished is skipped.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.datasets import identity
from lib.report.tables import write_summary
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.files import rounded
from lib.runs.processes import DeviceOptions
from xp_data_mixing.study import coverage, downstream, recovery, solvers, tables
from xp_data_mixing.study.config import EXPERIMENT, Config, Group, Preset, presets

MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "recovery": recovery.recover,
    "coverage": coverage.cover,
    "unequal": coverage.cover,
    "downstream": downstream.compare,
    "ablation": recovery.ablate,
    "solvers": solvers.compare_solvers,
}


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    seeds: tuple[int, ...] = ()
    """None: 0, 1, ..., as many as the group's settings say."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def run_one(group: str, config: Config, seed: int, arguments: Arguments) -> runs.Run:
    """Measures unless it is done; the folder holds what the group's function returns, and the
    seconds of CPU time it took."""
    content = identity(config.samples.dataset, data_root=arguments.data_root)
    known = replace(config, samples=replace(config.samples, dataset=content))
    run = runs.open_run(arguments.results, EXPERIMENT, group, known, seed=seed)
    if not run.finished:
        began = time.process_time()
        measured = MEASURES[group](config, seed, arguments.data_root)
        run.finish(**measured, seconds=np.array(time.process_time() - began))
    return run


def run_group(name: str, group: Group, arguments: Arguments) -> Path:
    """Runs a group and returns its summary: for each label its settings and, of every array of its
    runs except the weights, the list over seeds."""
    from xp_data_mixing.study import plot

    seeds, rows = arguments.seeds or tuple(range(group.seeds)), []
    for label, config in group.settings.items():
        stored = []
        for seed in seeds:
            stored.append(run_one(name, config, seed, arguments).load_arrays())
        row: dict[str, Any] = {"label": label, "settings": asdict(config)}
        for array in sorted(stored[0].keys() - {"weights"}):
            row[array] = rounded([arrays[array].tolist() for arrays in stored], 5)
        rows.append(row)
        print("\n".join(f"  {line}" for line in tables.lines(name, row)), flush=True)
    path = arguments.results / EXPERIMENT / f"{name}_{arguments.preset}.json"
    summary = {"group": name, "seeds": seeds, "rows": rows}
    return write_summary(path, summary, tables.tables(summary), figures=plot.figures)


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the groups; returns their summaries."""
    groups = presets(arguments.preset)
    summaries = []
    for name in settings.chosen(arguments.only, groups, kind="group"):
        if name == "solvers" and not (find_spec("cvxpy") or arguments.only):
            print("solvers: left out, they are cvxpy's: pip install cvxpy", flush=True)
            continue
        print(f"{name}: {', '.join(groups[name].settings)}", flush=True)
        summaries.append(run_group(name, groups[name], arguments))
    return summaries


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="the preset (--preset quick)")
