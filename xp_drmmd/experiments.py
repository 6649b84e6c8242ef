"""Every experiment of the paper, in groups: each a table, a figure and a summary.

    python xp_drmmd/experiments.py --preset quick
    python xp_drmmd/experiments.py --preset paper --only rings filters --seeds 0 1 2

The groups and their settings are in `config.py`; `tests`, of two samples, is in `power.py`. A
finished flow is skipped, an interrupted one resumes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.report.tables import write_summary
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_drmmd import tables
from xp_drmmd.config import EXPERIMENT, FlowConfig, Preset, StudentConfig, presets
from xp_drmmd.power import run_tests
from xp_drmmd.run import run_flow
from xp_drmmd.student_teacher import run_student


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    only: tuple[str, ...] = ()
    """Groups to run; none: all."""
    seeds: tuple[int, ...] = (0,)
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def run_one(
    config: FlowConfig | StudentConfig, seed: int, arguments: Arguments, mesh: Mesh | None = None
) -> runs.Run:
    """One flow or one student, or finds it done."""
    if isinstance(config, StudentConfig):
        return run_student(config, seed=seed, results=arguments.results, mesh=mesh)
    where: dict[str, Any] = {"results": arguments.results, "data_root": arguments.data_root}
    return run_flow(config, seed=seed, mesh=mesh, **where)


def run_group(
    group: str,
    flows: Mapping[str, FlowConfig | StudentConfig],
    arguments: Arguments,
    mesh: Mesh | None = None,
) -> Path:
    """Runs the flows of a group and returns its summary: for each label its settings, steps
    (epochs of students), distances [seeds, records], seconds [seeds] and folders."""
    from xp_drmmd import plot

    rows = []
    for label, config in flows.items():
        done = [run_one(config, seed, arguments, mesh) for seed in arguments.seeds]
        stored = [run.load_arrays() for run in done]
        row = {"label": label, "settings": asdict(config), "steps": stored[0]["steps"]}
        for name in (*tables.NAMES, "seconds"):
            if name in stored[0]:
                row[name] = np.stack([arrays[name] for arrays in stored])
        row["folders"] = [run.folder.relative_to(arguments.results).as_posix() for run in done]
        rows.append(row)
        print(f"  {tables.line(row)}", flush=True)
    path = arguments.results / EXPERIMENT / f"{group}_{arguments.preset}.json"
    summary = {"group": group, "seeds": arguments.seeds, "rows": rows}
    return write_summary(path, summary, [tables.table(summary)], figures=plot.figures)


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Runs the groups; returns their summaries."""
    groups = presets(arguments.preset)
    summaries = []
    for group in settings.chosen(arguments.only, groups | {"tests": {}}, kind="group"):
        if group == "tests":
            print("tests of two samples")
            summaries.append(run_tests(arguments.preset, arguments.results, arguments.data_root))
            continue
        print(f"{group}, {len(groups[group])} flows x {len(arguments.seeds)} seeds")
        summaries.append(run_group(group, groups[group], arguments, mesh))
    return summaries


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="the preset (--preset quick)")
