"""Figures of this experiment, drawn from stored results only."""

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib.report import plotting
from lib.report.spreads import spread, standard_error
from xp_data_mixing.study import tables
from xp_data_mixing.study.config import SIGMAS

LINES = (("0.6", ":"), ("0.6", "-."), ("0.6", "--"), ("0.0", "--"), ("0.0", "-"), ("0.0", ":"))
"""Of the estimators without a bandwidth, uniform aside, in their order."""
BANDWIDTH = "σ / √(median d² / 2)"


def recovery(rows: list[dict]) -> Figure:
    """Total variation against the bandwidth, a panel per label; mean over seeds and targets, the
    standard error shaded. Estimators without a bandwidth are horizontal lines."""
    figure, axes = plt.subplots(
        1, len(rows), figsize=(max(5.5, 2.6 * len(rows)), 3.6), squeeze=False, sharey=False
    )
    for axis, row in zip(axes[0], rows):
        tv = tables.variations(row)
        for column, color in zip(tables.kernel_columns(row), plotting.CLASS_COLORS):
            values = np.stack([tv[f"{column}, σ = {sigma:g}"].ravel() for sigma in SIGMAS])
            mean, error = values.mean(1), standard_error(values, 1)
            axis.semilogx(SIGMAS, mean, color=color, label=column)
            axis.fill_between(SIGMAS, mean - error, mean + error, color=color, alpha=0.2, lw=0)
        for name, (color, style) in zip(tables.others(row)[1:], LINES, strict=True):
            axis.axhline(tv[name].mean(), color=color, ls=style, lw=1.2, label=name)
        axis.set_ylim(0, min(0.25, 1.1 * max(tv[name].mean() for name in tv)))
        axis.set_xticks(SIGMAS[::2], [f"{sigma:g}" for sigma in SIGMAS[::2]])
        axis.minorticks_off()
        axis.set_title(row["label"])
        axis.set_xlabel(BANDWIDTH)
    axes[0, 0].set_ylabel("total variation")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    return figure


def coverage(rows: list[dict], *, shown: int = 40) -> Figure:
    """For each class the first intervals, red where they miss its true weight; and the coverage."""
    figure, axes = plt.subplots(
        1, len(rows), figsize=(max(4.0, 3.2 * len(rows)), 3.4), squeeze=False, sharey=True
    )
    for axis, row in zip(axes[0], rows):
        covered, _ = tables.coverage_of(row)
        truth = np.asarray(row["truth"])[0]
        intervals = np.asarray(row["intervals"])[0, :shown]
        for i, weight in enumerate(truth):
            x = i + np.linspace(-0.38, 0.38, len(intervals))
            low, high = intervals[:, i].T
            missed = (weight < low) | (weight > high)
            colors = np.where(missed, plotting.CLASS_COLORS[1], plotting.CLASS_COLORS[5])
            axis.vlines(x, low, high, colors=colors, lw=0.8)
            axis.hlines(weight, i - 0.42, i + 0.42, color="black", lw=1.0)
            axis.annotate(
                f"{100 * covered[i]:.0f}",
                (i, max(high.max(), weight)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axis.set_title(f"{row['label']}: {100 * covered.mean():.0f}% in all")
        axis.set_xlabel("class; above it, coverage in percent")
        axis.set_xticks(range(len(truth)))
    axes[0, 0].set_ylabel("weight")
    return figure


def downstream(rows: list[dict]) -> Figure:
    """Loss and accuracy by mixture: each seed a thin line, the mean with its standard error."""
    row = rows[0]
    names = row["names"][0]
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0))
    for axis, name, label in zip(
        axes, ("loss", "accuracy"), ("validation loss", "validation accuracy")
    ):
        values = np.asarray(row[name])
        axis.plot(values.T, color="0.8", lw=0.7)
        error = standard_error(values, 0)
        axis.errorbar(
            range(len(names)), values.mean(0), error, fmt="o", color=plotting.CLASS_COLORS[0]
        )
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=7)
        axis.set_ylabel(label)
    return figure


def ablation(rows: list[dict]) -> Figure:
    """Total variation against the bandwidth, a panel per size of the sources, a line per number of
    features; mean over seeds and targets, the standard deviation shaded."""
    row = rows[0]
    tv, settings = np.asarray(row["tv"]), row["settings"]
    labels = [f"D = {count}" for count in settings["num_features"]] + ["exact"]
    sizes = settings["sizes"]
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(max(5.0, 2.5 * len(sizes)), 3.4), sharey=True, squeeze=False
    )
    for n, (axis, size) in enumerate(zip(axes[0], sizes)):
        for d, (label, color) in enumerate(zip(labels, plotting.CLASS_COLORS)):
            values = tv[:, n, d].swapaxes(0, 1).reshape(len(SIGMAS), -1)
            mean, std = values.mean(1), spread(values, 1)
            axis.loglog(SIGMAS, mean, color=color, label=label)
            axis.fill_between(SIGMAS, mean - std, mean + std, color=color, alpha=0.12, lw=0)
        axis.set_title(f"{size} rows per source")
        axis.set_xticks(SIGMAS[::2], [f"{sigma:g}" for sigma in SIGMAS[::2]])
        axis.minorticks_off()
        axis.set_xlabel(BANDWIDTH)
    ticks = [0.03, 0.05, 0.1, 0.2, 0.4]
    axes[0, 0].set_ylim(0.02, 0.6)
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].set_ylabel("total variation")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(labels),
        fontsize=7,
    )
    return figure


DRAWN = {
    "recovery": recovery,
    "coverage": coverage,
    "unequal": coverage,
    "downstream": downstream,
    "ablation": ablation,
}


def figures(summary: Path) -> list[Path]:
    """Draws what a group's summary has to show; returns the files."""
    summary = Path(summary)
    about = json.loads(summary.read_text())
    if about["group"] not in DRAWN:
        return []
    with plotting.style():
        figure = DRAWN[about["group"]](about["rows"])
        return [plotting.save_figure(figure, summary.parent / "figures" / f"{summary.stem}.png")]
