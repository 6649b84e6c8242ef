"""How the flow is best run: schedules, optimizers, directions, on one adaptation task.

    python xp_transfer_learning/ablation.py
    python xp_transfer_learning/ablation.py --src_dataset digits:rotated --tgt_dataset digits

    python xp_transfer_learning/ablation.py --options Adam --lr 0.01 0.05 --first_seed 100 --ntry 1

Every option of `config.ABLATION` runs the same task from the same draws: steps, and seconds of
only flowing (compilation aside), until the objective is a given share of its start, and until the
frozen classifier of `domain_adaptation.py` gives a given share of the images their class.
"""

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib.gd import flow_init, flow_step
from lib.report.tables import write_summary
from lib.runs.commands import run_command
from lib.runs.loop import DivergedError
from lib.runs.processes import DeviceOptions
from xp_transfer_learning import domain_adaptation, methods, tables
from xp_transfer_learning.config import ABLATION, EXPERIMENT, AdaptationConfig
from xp_transfer_learning.data import summary_name


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    src_dataset: str = "fashion_mnist"
    """A data set's name, or the path of a folder or zip of images; likewise `tgt_dataset`."""
    tgt_dataset: str = "mnist"
    num_per_class: int = 50
    size: int | None = None
    """Side of the images; None: the target's."""
    n_epochs_wgd: Annotated[int, tyro.conf.arg(aliases=("--n-epochs",))] = 1000
    ntry: int = 3
    first_seed: int = 0
    objective: float = 0.05
    """Share of the first loss that is to be reached, by the median of ten losses."""
    accuracy: float = 0.99
    options: tuple[str, ...] = tuple(ABLATION)
    lr: tuple[float, ...] = ()
    """Every option with each of these step sizes, to choose one; none: with its own."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def seconds_per_step(
    config: AdaptationConfig,
    data_root: Path | None,
    repeats: int = 40,
    mesh: Mesh | None = None,
) -> float:
    """Median wall time of a compiled step, on the task's own arrays."""
    x0, x_tgt, _ = domain_adaptation.data(0, config, data_root)
    problem, optimizer = (
        methods.problem(config.flow, x0, x_tgt, mesh),
        methods.optimizer(config.flow),
    )
    step = jax.jit(flow_step(problem.value_and_grad, optimizer))
    state, key, times = flow_init(optimizer, problem.start), jax.random.PRNGKey(0), []
    for _ in range(2 + repeats):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(key, state, problem.target))
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))


def steps_to_objective(losses: np.ndarray, share: float) -> int | None:
    """The first step after which the median of the last ten losses is at most share * losses[0]."""
    windows = np.lib.stride_tricks.sliding_window_view(losses, min(10, len(losses)))
    reached = np.flatnonzero(np.median(windows, axis=1) <= share * losses[0])
    return int(reached[0]) + windows.shape[1] if len(reached) else None


def steps_to_accuracy(steps: np.ndarray, accuracies: np.ndarray, wanted: float) -> int | None:
    """The first recorded step with that accuracy."""
    reached = np.flatnonzero(accuracies >= wanted)
    return int(steps[reached[0]]) if len(reached) else None


def measured(tries: list[dict], arguments: Arguments) -> dict:
    """What the table says of an option, a value per try."""
    return {
        "to_objective": [steps_to_objective(t["losses"], arguments.objective) for t in tries],
        "to_accuracy": [
            steps_to_accuracy(t["steps"], t["accuracies"], arguments.accuracy) for t in tries
        ],
        "last_losses": [float(t["losses"][-10:].mean()) for t in tries],
        "last_accuracies": [float(t["accuracies"][-1]) for t in tries],
    }


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs the options, prints the table as it grows, returns the summary's path."""
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.ntry)
    rows = []
    for option, step_size in product(arguments.options, arguments.lr or (None,)):
        flow = replace(ABLATION[option], num_steps=arguments.n_epochs_wgd)
        if step_size is not None:
            flow = replace(flow, step_size=step_size)
        config = AdaptationConfig(
            arguments.src_dataset,
            arguments.tgt_dataset,
            arguments.num_per_class,
            arguments.size,
            flow,
            records=25,
        )
        try:
            tries = [
                domain_adaptation.run_try(
                    config,
                    seed=seed,
                    results=arguments.results,
                    data_root=arguments.data_root,
                    mesh=mesh,
                ).load_arrays()
                for seed in seeds
            ]
            row: dict[str, Any] = measured(tries, arguments)
            row["seconds_per_step"] = seconds_per_step(config, arguments.data_root, mesh=mesh)
        except DivergedError as error:
            row = {"diverged": str(error)}
        rows.append({"option": option, "settings": asdict(flow), **row})
        print(" | ".join(tables.ablation_cells(rows[-1])), flush=True)
    pair = summary_name(arguments.src_dataset, arguments.tgt_dataset, arguments.data_root)
    kind = "step_sizes" if arguments.lr else "ablation"
    path = arguments.results / EXPERIMENT / f"{kind}_{pair}.json"
    table = tables.ablation_table(rows, objective=arguments.objective, accuracy=arguments.accuracy)
    return write_summary(path, {"arguments": arguments, "rows": rows}, [table])


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--num_per_class or --size")
