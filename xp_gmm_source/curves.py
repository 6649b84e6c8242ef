"""Training curves: what a source is worth after ever more training steps.

    python xp_gmm_source/curves.py --dataset fashion_mnist --seeds 0 1
    python xp_gmm_source/curves.py --dataset fashion_mnist --labels "GMM-10, OT" --marks 64000

One network per source, seed and width is trained at a constant rate and evaluated at every mark, by
the running mean of its parameters. A longer curve goes on from the last checkpoint; points of a
summary given by `--add_to` (a published one, say) are kept and not evaluated again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from lib import runs
from lib.datasets import file_stem
from lib.numerics import key_of_seed
from lib.report.spreads import standard_error
from lib.report.tables import Table, write_summary
from lib.runs import settings
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_gmm_source import flow
from xp_gmm_source.config import EXPERIMENT, FlowConfig, comparison
from xp_gmm_source.tables import MEASURES, cell, floor_of

LABELS = (
    "Gaussian, OT",
    "norm-aligned, OT",
    "DCT, OT",
    "GMM-1, OT",
    "GMM-10, OT",
    "GMM-10, mode-coupled",
)
BASELINE = "Gaussian, OT"
PATHS = ("normalised_straightness", "transport_cost")


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    dataset: str = "fashion_mnist"
    """A data set's name, or the path of a folder or zip of images."""
    labels: tuple[str, ...] = LABELS
    """Sources and couplings, by their labels in config.py."""
    seeds: tuple[int, ...] = (0, 1)
    width: int = FlowConfig.width
    """Channels of the U-Net at its finest level."""
    marks: tuple[int, ...] = (1000, 2000, 4000, 8000, 16_000, 32_000)
    """Numbers of training steps to evaluate at."""
    euler: tuple[int, ...] = (1, 2, 3, 5, 20, 100)
    """Numbers of function evaluations, as the next two: few are where a source matters."""
    heun: tuple[int, ...] = (2, 20)
    ralston3: tuple[int, ...] = (3,)
    num_samples: int | None = None
    """Evaluated. None: 1,000, or all test images where these are fewer."""
    add_to: Path | None = None
    """A summary of this command whose points are kept."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


class Place(NamedTuple):
    """What a point is known by, in a summary."""

    label: str
    seed: int
    width: int
    step: int


def place_of(point: Mapping[str, Any]) -> Place:
    return Place(*(point[name] for name in Place._fields))


def config_of(arguments: Arguments, label: str) -> FlowConfig:
    """The flow of `experiments.py`, at a constant rate."""
    assert arguments.num_samples is not None  # `main` has counted them
    base = FlowConfig(
        dataset=arguments.dataset, width=arguments.width, decay=False, euler=arguments.euler,
        heun=arguments.heun, ralston3=arguments.ralston3, num_samples=arguments.num_samples,
    )  # fmt: skip
    known = {name: replace(one, prune=False) for name, one in comparison(base).items()}
    return known[settings.chosen((label,), known, kind="flow")[0]]


def curve(
    arguments: Arguments, label: str, seed: int, marks: Iterable[int], mesh: Mesh | None = None
) -> Iterable[dict[str, Any]]:
    """A point for each mark, in ascending order: measures [evaluations] and how straight the paths
    are, as `flow.evaluate_flow`; trained from one mark to the next."""
    config = config_of(arguments, label)
    split = flow.read(config, arguments.data_root)
    config = flow.known_by_content(config, arguments.data_root)
    name = f"curve-{Path(arguments.dataset).stem}-{config.source}-{config.coupling}"
    # The number of steps is no part of a curve, nor what is evaluated of a training.
    trained_by = replace(config, num_steps=1, euler=(), heun=(), ralston3=(), num_samples=1)
    training = runs.open_run(arguments.results, EXPERIMENT, name, trained_by, seed=seed)
    source = flow.source_of(config, split.train, arguments.results, mesh=mesh)
    pairs = flow.pairs_of(config, source, split.train, arguments.results)
    warm_up = config.warm_up
    optimizer = flow.optimizer(config.learning_rate, warm_up, 2 * warm_up, decay=False)
    train_key, evaluation_key = jax.random.split(key_of_seed(seed, shift=1000))
    for mark in sorted(marks):
        at_mark = replace(config, num_steps=mark)
        run = runs.open_run(arguments.results, EXPERIMENT, f"{name}-point", at_mark, seed=seed)
        if not run.finished:
            trained = flow.train(
                train_key, at_mark, source, split.train, optimizer=optimizer, run=training,
                description=f"{label}, seed {seed}", mesh=mesh, **pairs,
            )  # fmt: skip
            references = flow.reference(config, split, arguments.results)
            run.finish(
                **flow.evaluate_flow(
                    evaluation_key, config, trained.ema, {"own": source}, references, split.train
                )
            )
        stored = run.load_arrays()
        point = {"label": label, "seed": seed, "width": arguments.width, "step": mark}
        names = (*MEASURES, *PATHS, "sample_seconds")  # seconds: not of older points
        point |= {name: stored[name][0] for name in names if name in stored}
        samplers = [
            f"{method} {num}" for method, num in zip(stored["methods"], stored["evaluations"])
        ]
        yield point | {"samplers": samplers, "floor": floor_of(stored)}


def values(points: Sequence[Mapping[str, Any]], label: str, step: int, measure: str, j: int):
    """By seed, the measure of a label after so many steps, at the j-th number of evaluations."""
    chosen = (p for p in points if p["label"] == label and p["step"] == step)
    return {p["seed"]: float(p[measure][j]) for p in chosen}


def tables(points: Sequence[Mapping[str, Any]]) -> list[Table]:
    """For each width and number of evaluations: the Fréchet distance of every source at every
    mark, and, paired by seed, what it is less that of `BASELINE`."""
    made = []
    for width in sorted({point["width"] for point in points}):
        of_width = [point for point in points if point["width"] == width]
        labels = list(dict.fromkeys(point["label"] for point in of_width))
        marks = sorted({point["step"] for point in of_width})
        for j, sampler in enumerate(of_width[0]["samplers"]):
            lines = []
            for label in labels:
                cells = []
                for mark in marks:
                    own = values(of_width, label, mark, "frechet", j)
                    other = values(of_width, BASELINE, mark, "frechet", j)
                    cells.append(_cell(own, {} if label == BASELINE else other))
                lines.append([label, *cells])
            caption = (
                f"{MEASURES['frechet']} by training steps, with {sampler} evaluations, width "
                f"{width}, mean ± sample standard deviation over seeds; in brackets less "
                f"{BASELINE!r}, paired by seed, with 1.96 standard errors."
            )
            made.append(Table(["source", *(f"{mark:,}" for mark in marks)], lines, caption))
    return made


def _cell(own: Mapping[int, float], other: Mapping[int, float]) -> str:
    if not own:
        return "-"
    text = cell(np.array(list(own.values())))
    less = np.array([own[seed] - other[seed] for seed in own if seed in other])
    if len(less) > 1:
        text += f" ({less.mean():+.2f} ± {1.96 * standard_error(less):.2f})"
    return text


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Trains and evaluates what is missing; returns the summary, written after each point."""
    from xp_gmm_source import plot

    if arguments.num_samples is None:
        num = flow.at_most_tested(FlowConfig.num_samples, arguments.dataset, arguments.data_root)
        arguments = replace(arguments, num_samples=num)
    for label in arguments.labels:
        config_of(arguments, label)  # an unknown one, before any training
    stem = file_stem(arguments.dataset, data_root=arguments.data_root)
    path = arguments.results / EXPERIMENT / f"curves_{stem}.json"
    points: dict[Place, dict[str, Any]] = {}
    for earlier in (arguments.add_to, path):
        if earlier is not None and (earlier == arguments.add_to or earlier.exists()):
            points |= {place_of(p): p for p in json.loads(earlier.read_text())["points"]}
    write = partial(write_points, arguments, path, points)
    for seed in arguments.seeds:
        for label in arguments.labels:
            place = partial(Place, label, seed, arguments.width)
            missing = [mark for mark in arguments.marks if place(mark) not in points]
            for point in curve(arguments, label, seed, missing, mesh):
                points[place_of(point)] = point
                shown = ", ".join(
                    f"{sampler} {value:.3g}"
                    for sampler, value in zip(point["samplers"], point["frechet"])
                )
                print(f"  {label}, seed {seed}, step {point['step']:,}: {shown}", flush=True)
                write(show=False)
    return write(figures=lambda path: [plot.training_curves(path)])


def write_points(
    arguments: Arguments, path: Path, points: Mapping[Place, Any], *, show: bool = True, **drawn
) -> Path:
    order = {label: i for i, label in enumerate(comparison(FlowConfig()))}
    ordered = sorted(
        points, key=lambda p: (p.width, order.get(p.label, len(order)), p.seed, p.step)
    )
    document = {"dataset": arguments.dataset, "points": [points[place] for place in ordered]}
    return write_summary(path, document, tables(document["points"]) if show else (), **drawn)


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--width or --num_samples")
