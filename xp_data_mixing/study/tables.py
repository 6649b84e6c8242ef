"""Tables of this experiment, from stored summaries only."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lib.report.spreads import mean_and_spread
from xp_data_mixing.study.config import SIGMAS

KERNEL_COLUMNS = ("exact V", "exact U")


def rows_of(summary: Path) -> list[dict]:
    return json.loads(Path(summary).read_text())["rows"]


def _row(summary: Path, label: str) -> dict:
    return next(row for row in rows_of(summary) if row["label"] == label)


def _markdown(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*table, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _spread(values, *, digits: int = 3) -> str:
    """mean ± sample standard deviation."""
    return mean_and_spread(values, f".{digits}f")


# Recovery


def variations(row: dict) -> dict[str, np.ndarray]:
    """Total variation of each estimator, [seeds, T]."""
    return dict(zip(row["names"][0], np.swapaxes(np.asarray(row["tv"]), 0, 1)))


def kernel_columns(row: dict) -> list[str]:
    """Names of the columns that have one estimator per bandwidth."""
    suffix = f", σ = {SIGMAS[0]:g}"
    return [name.removesuffix(suffix) for name in variations(row) if name.endswith(suffix)]


def others(row: dict) -> list[str]:
    """Names of the estimators that are no cell of the columns."""
    return [name for name in variations(row) if ", σ = " not in name]


def bandwidth_table(summary: Path, label: str) -> str:
    """Total variation by bandwidth and estimator; spread over all seeds and targets."""
    row = _row(summary, label)
    tv, columns = variations(row), kernel_columns(row)
    return _markdown(
        ["σ / √(median d² / 2)", *columns],
        [
            [f"{sigma:g}", *(_spread(tv[f"{name}, σ = {sigma:g}"]) for name in columns)]
            for sigma in SIGMAS
        ],
    )


def recovery_table(summary: Path) -> str:
    """Total variation of what has no bandwidth to choose; spread over all seeds and targets."""
    rows = rows_of(summary)
    names = others(rows[0])
    return _markdown(
        ["sources and targets", *names],
        [[row["label"], *(_spread(variations(row)[name]) for name in names)] for row in rows],
    )


# The others


def coverage_of(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(share of the intervals that hold the truth [N], their mean width [N]), over all draws."""
    intervals, truth = np.asarray(row["intervals"]), np.asarray(row["truth"])[:, None]
    # Weights and mixture were rounded to five digits.
    low, high = intervals[..., 0] - 1e-9, intervals[..., 1] + 1e-9
    inside = (low <= truth) & (truth <= high)
    return inside.mean(axis=(0, 1)), (high - low).mean(axis=(0, 1))


def coverage_table(summary: Path) -> str:
    """A line per class: its true weight; for each label coverage in percent and mean width."""
    rows = rows_of(summary)
    covered = [coverage_of(row) for row in rows]
    truth = np.asarray(rows[0]["truth"]).mean(axis=0)
    lines = [
        [str(i), f"{weight:.3f}", *(f"{100 * c[i]:.0f}%, {w[i]:.3f}" for c, w in covered)]
        for i, weight in enumerate(truth)
    ]
    lines.append(["all", "", *(f"{100 * c.mean():.1f}%, {w.mean():.3f}" for c, w in covered)])
    return _markdown(["class", "weight", *(row["label"] for row in rows)], lines)


def unequal_table(summary: Path) -> str:
    """A line per label: of the small source, and of all others together, the coverage in percent
    with its binomial standard error over draws; the small source's true weight, the bias of its
    estimate and its mean width; the median over draws of the least signal over noise."""
    lines = []
    for row in rows_of(summary):
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
    return _markdown([*heads, "of the others, %"], lines)


def downstream_table(summary: Path) -> str:
    """A line per mixture: loss, its difference to uniform of the same seed, accuracy, and total
    variation; spread over seeds."""
    row = rows_of(summary)[0]
    loss, accuracy = np.asarray(row["loss"]), 100 * np.asarray(row["accuracy"])
    more, tv = loss - loss[:, :1], np.asarray(row["tv"])
    return _markdown(
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


def ablation_table(summary: Path) -> str:
    """A line per size of the sources: for each number of features the best mean total variation
    over bandwidths, spread over all seeds and targets, and its bandwidth."""
    row = rows_of(summary)[0]
    tv, settings = np.asarray(row["tv"]), row["settings"]
    heads = [f"D = {count}" for count in settings["num_features"]] + ["exact"]
    lines = []
    for n, size in enumerate(settings["sizes"]):
        best = tv[:, n].mean(axis=(0, 3)).argmin(axis=1)
        cells = [
            f"{_spread(tv[:, n, d, s])} (σ {SIGMAS[s]:g})" for d, s in zip(range(len(best)), best)
        ]
        lines.append([str(size), *cells])
    return _markdown(["rows per source", *heads], lines)


def solver_table(summary: Path) -> str:
    """A line per number of sources and solver, of the first seed."""
    row = rows_of(summary)[0]
    condition = row["condition"][0]
    numbers = {name: row[name][0] for name in ("objective", "gap", "distance", "tv")}
    lines = []
    for p, count in enumerate(row["num_sets"][0]):
        for q, solver in enumerate(row["names"][0]):
            objective, gap, distance, tv = (numbers[name][p][q] for name in numbers)
            if not isinstance(gap, float):
                lines.append([str(count), f"{condition[p]:.1e}", solver, *["failed"] * 4])
                continue
            cells = [f"{objective:.5g}", f"{gap:.1e}", f"{distance:.1e}", f"{tv:.3f}"]
            lines.append([str(count), f"{condition[p]:.1e}", solver, *cells])
    return _markdown(
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


# What a page of the results shows


def page(summary: Path) -> str:
    """Markdown: all tables of a summary, and what stands in them."""
    about = json.loads(Path(summary).read_text())
    seeds = f"{len(about['seeds'])} seed{'s' * (len(about['seeds']) > 1)}"
    over = f"mean ± sample standard deviation over {seeds}"
    targets = f"mean ± sample standard deviation over all targets of {seeds}"
    if about["group"] == "recovery":
        parts = [
            f"Total variation to the truth, {targets}.",
            recovery_table(summary),
        ]
        for row in about["rows"]:
            if kernel_columns(row):
                words = f"{row['label']}: the same by bandwidth and estimator."
                parts += [words, bandwidth_table(summary, row["label"])]
    elif about["group"] == "coverage":
        confidence = about["rows"][0]["settings"]["confidence"]
        words = f"How many of the {confidence:.0%} intervals hold the truth, and their mean width"
        parts = [f"{words}, over the draws of {seeds}.", coverage_table(summary)]
    elif about["group"] == "unequal":
        confidence = about["rows"][0]["settings"]["confidence"]
        words = (
            f"One small source: coverage of {confidence:.0%} intervals over the draws of {seeds}"
        )
        parts = [f"{words}.", unequal_table(summary)]
    elif about["group"] == "downstream":
        words = "A classifier trained on each mixture and evaluated on the target"
        parts = [f"{words}, {over}.", downstream_table(summary)]
    elif about["group"] == "ablation":
        words = "Total variation to the truth at the best bandwidth, by the number of features"
        parts = [f"{words}, {targets}.", ablation_table(summary)]
    else:
        parts = ["Solvers of one problem, of the first seed.", solver_table(summary)]
    return "\n\n".join(parts) + "\n"


# What is printed while running


def lines(group: str, row: dict) -> list[str]:
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
        sizes = row["settings"].sizes
        shown = [f"{size} rows: {value:.3f}" for size, value in zip(sizes, best)]
    else:
        shown = [
            f"{count} sources: gap {gap[0]:.1e}"
            for count, gap in zip(row["num_sets"][0], row["gap"][0])
        ]
    return [f"{row['label']}: " + ", ".join(shown)]
