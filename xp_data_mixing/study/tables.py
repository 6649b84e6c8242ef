"""Tables of this experiment, from stored summaries only."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread
from lib.report.tables import Table
from xp_data_mixing.study.config import SIGMAS

Rows = Sequence[Mapping[str, Any]]


def rows_of(summary: Path) -> list[dict]:
    return json.loads(Path(summary).read_text())["rows"]


def _row(rows: Rows, label: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["label"] == label)


def _spread(values, *, digits: int = 3) -> str:
    """mean ± sample standard deviation."""
    return mean_and_spread(values, f".{digits}f")


# Recovery


def variations(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Total variation of each estimator, [seeds, T]."""
    return dict(zip(row["names"][0], np.swapaxes(np.asarray(row["tv"]), 0, 1)))


def kernel_columns(row: Mapping[str, Any]) -> list[str]:
    """Names of the columns that have one estimator per bandwidth."""
    suffix = f", σ = {SIGMAS[0]:g}"
    return [name.removesuffix(suffix) for name in variations(row) if name.endswith(suffix)]


def others(row: Mapping[str, Any]) -> list[str]:
    """Names of the estimators that are no cell of the columns."""
    return [name for name in variations(row) if ", σ = " not in name]


def bandwidth_table(rows: Rows, label: str) -> Table:
    """Total variation by bandwidth and estimator; spread over all seeds and targets."""
    row = _row(rows, label)
    tv, columns = variations(row), kernel_columns(row)
    return Table(
        ["σ / √(median d² / 2)", *columns],
        [
            [f"{sigma:g}", *(_spread(tv[f"{name}, σ = {sigma:g}"]) for name in columns)]
            for sigma in SIGMAS
        ],
    )


def recovery_table(rows: Rows) -> Table:
    """Total variation of what has no bandwidth to choose; spread over all seeds and targets."""
    names = others(rows[0])
    return Table(
        ["sources and targets", *names],
        [[row["label"], *(_spread(variations(row)[name]) for name in names)] for row in rows],
    )


# The others


def coverage_of(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(share of the intervals that hold the truth [N], their mean width [N]), over all draws."""
    intervals, truth = np.asarray(row["intervals"]), np.asarray(row["truth"])[:, None]
    # Weights and mixture were rounded to five digits.
    low, high = intervals[..., 0] - 1e-9, intervals[..., 1] + 1e-9
    inside = (low <= truth) & (truth <= high)
    return inside.mean(axis=(0, 1)), (high - low).mean(axis=(0, 1))


def coverage_table(rows: Rows) -> Table:
    """A line per class: its true weight; for each label coverage in percent and mean width."""
    covered = [coverage_of(row) for row in rows]
    truth = np.asarray(rows[0]["truth"]).mean(axis=0)
    lines = [
        [str(i), f"{weight:.3f}", *(f"{100 * c[i]:.0f}%, {w[i]:.3f}" for c, w in covered)]
        for i, weight in enumerate(truth)
    ]
    lines.append(["all", "", *(f"{100 * c.mean():.1f}%, {w.mean():.3f}" for c, w in covered)])
    return Table(["class", "weight", *(row["label"] for row in rows)], lines)


def unequal_table(rows: Rows) -> Table:
    """A line per label: of the small source, and of all others together, the coverage in percent
    with its binomial standard error over draws; the small source's true weight, the bias of its
    estimate and its mean width; the median over draws of the least signal over noise."""
    lines = []
    for row in rows:
        label, _ = row["settings"]["small_set"]
        covered, width = coverage_of(row)
        draws = np.shape(row["intervals"])[0] * np.shape(row["intervals"])[1]
        truth = np.mean(row["truth"], axis=0)[label]
        others = np.delete(covered, label)
        error = np.sqrt(covered * (1 - covered) / draws)
        bias = np.mean(row["mean_weights"], axis=0)[label] - truth
        lines.append(
            [
                row["label"],
                f"{np.median(row['signal']):.1f}",
                f"{truth:.3f}",
                f"{bias:+.3f}",
                f"{width[label]:.3f}",
                f"{100 * covered[label]:.0f} (standard error {100 * error[label]:.0f})",
                f"{100 * others.mean():.0f} ({100 * others.min():.0f} to {100 * others.max():.0f})",
            ]
        )
    heads = ["small source", "least signal / noise", "its weight", "bias", "width", "coverage, %"]
    return Table([*heads, "of the others, %"], lines)


def downstream_table(rows: Rows) -> Table:
    """A line per mixture: loss, its difference to uniform of the same seed, accuracy, and total
    variation; spread over seeds."""
    row = rows[0]
    loss, accuracy = np.asarray(row["loss"]), 100 * np.asarray(row["accuracy"])
    more, tv = loss - loss[:, :1], np.asarray(row["tv"])
    return Table(
        ["mixture", "validation loss", "difference to uniform", "accuracy, %", "TV to the target"],
        [
            [
                name,
                _spread(loss[:, i]),
                "-" if i == 0 else _spread(more[:, i]),
                _spread(accuracy[:, i], digits=1),
                _spread(tv[:, i]),
            ]
            for i, name in enumerate(row["names"][0])
        ],
    )


def ablation_table(rows: Rows) -> Table:
    """A line per size of the sources: for each number of features the best mean total variation
    over bandwidths, spread over all seeds and targets, and its bandwidth."""
    row = rows[0]
    tv, settings = np.asarray(row["tv"]), row["settings"]
    heads = [f"D = {count}" for count in settings["num_features"]] + ["exact"]
    lines = []
    for n, size in enumerate(settings["sizes"]):
        best = tv[:, n].mean(axis=(0, 3)).argmin(axis=1)
        cells = [
            f"{_spread(tv[:, n, d, s])} (σ {SIGMAS[s]:g})" for d, s in zip(range(len(best)), best)
        ]
        lines.append([str(size), *cells])
    return Table(["rows per source", *heads], lines)


def solver_table(rows: Rows) -> Table:
    """A line per number of sources and solver, of the first seed."""
    row = rows[0]
    condition = row["condition"][0]
    numbers = {name: row[name][0] for name in ("objective", "gap", "distance", "tv")}
    lines = []
    for p, count in enumerate(row["num_sets"][0]):
        for q, solver in enumerate(row["names"][0]):
            objective, gap, distance, tv = (numbers[name][p][q] for name in numbers)
            if not isinstance(gap, float) or math.isnan(gap):  # in JSON a NaN is text
                lines.append([str(count), f"{condition[p]:.1e}", solver, *["failed"] * 4])
                continue
            cells = [f"{objective:.5g}", f"{gap:.1e}", f"{distance:.1e}", f"{tv:.3f}"]
            lines.append([str(count), f"{condition[p]:.1e}", solver, *cells])
    return Table(
        [
            "sources",
            "condition",
            "solver",
            "objective",
            "gap / scale",
            "largest difference to own",
            "TV of the classes",
        ],
        lines,
    )


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a summary."""
    group, rows = summary["group"], summary["rows"]
    seeds = f"{len(summary['seeds'])} seed{'s' * (len(summary['seeds']) > 1)}"
    over = f"mean ± sample standard deviation over {seeds}"
    targets = f"mean ± sample standard deviation over all targets of {seeds}"
    if group == "recovery":
        caption = f"Total variation to the truth, {targets}."
        made = [recovery_table(rows)._replace(caption=caption)]
        for row in rows:
            if kernel_columns(row):
                caption = f"{row['label']}: the same by bandwidth and estimator."
                made.append(bandwidth_table(rows, row["label"])._replace(caption=caption))
        return made
    if group == "coverage":
        table, caption = coverage_table, "Share of the {} intervals that hold the truth, and width"
        caption = caption.format(f"{rows[0]['settings']['confidence']:.0%}")
        caption += f", over the draws of {seeds}."
    elif group == "unequal":
        table, caption = unequal_table, "One small set: coverage of {} intervals over the draws of "
        caption = caption.format(f"{rows[0]['settings']['confidence']:.0%}") + f"{seeds}."
    elif group == "downstream":
        table = downstream_table
        caption = f"A classifier trained on each mixture, evaluated on the target, {over}."
    elif group == "ablation":
        table = ablation_table
        caption = "Total variation to the truth at the best bandwidth, by the number of features, "
        caption += f"{targets}."
    else:
        table, caption = solver_table, "Solvers of one problem, of the first seed."
    return [table(rows)._replace(caption=caption)]


# What is printed while running


def lines(group: str, row: Mapping[str, Any]) -> list[str]:
    """A run in words."""
    if group == "recovery":
        tv = variations(row)
        shown = [f"{name} {np.mean(tv[name]):.3f}" for name in others(row)]
    elif group in ("coverage", "unequal"):
        covered, width = coverage_of(row)
        shown = [f"coverage {100 * covered.mean():.1f}%, mean width {width.mean():.3f}"]
    elif group == "downstream":
        losses = np.mean(row["loss"], axis=0)
        shown = [f"{name} {loss:.3f}" for name, loss in zip(row["names"][0], losses)]
    elif group == "ablation":
        best = np.asarray(row["tv"]).mean(axis=(0, 4)).min(axis=(1, 2))
        sizes = row["settings"]["sizes"]
        shown = [f"{size} rows: {value:.3f}" for size, value in zip(sizes, best)]
    else:
        shown = [
            f"{count} sources: gap {gap[0]:.1e}"
            for count, gap in zip(row["num_sets"][0], row["gap"][0])
        ]
    return [f"{row['label']}: " + ", ".join(shown)]
