"""Figures of this experiment, drawn from stored results only."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import runs
from lib.report import plotting
from xp_drmmd import analytic
from xp_drmmd.tables import NAMES

STYLES = ("-", "--", ":")


def curves(rows: list[dict]) -> Figure:
    """Distances against the step (epoch), both logarithmic: mean over seeds, their range shaded."""
    names = [name for name in NAMES if name in rows[0]]
    width = max(5.0, 3.4 * len(names))
    figure, axes = plt.subplots(1, len(names), figsize=(width, 3.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        for i, row in enumerate(rows):
            values = np.maximum(np.asarray(row[name])[:, 1:], 1e-17)
            steps = np.asarray(row["steps"])[1:]
            # Ten colors: a second line style for the flows after that.
            style = STYLES[i // len(plotting.CLASS_COLORS)]
            color = plotting.CLASS_COLORS[i % len(plotting.CLASS_COLORS)]
            axis.loglog(steps, values.mean(0), style, color=color, label=row["label"])
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        axis.set_xlabel("epoch" if name == "validation" else "step")
        axis.set_title(NAMES[name])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4 if len(names) > 1 else 2,
        fontsize=7,
    )
    return figure


def ends(rows: list[dict], root: Path) -> Figure:
    """Where the particles of the first seed end, in two dimensions, over the target in gray."""
    stored = [runs.Run(root / row["folders"][0]).load_arrays() for row in rows]
    low, high = stored[0]["target"].min(0), stored[0]["target"].max(0)
    low, high = low - 0.15 * (high - low).max(), high + 0.15 * (high - low).max()
    # Panels as wide as the target is: the rings are tall.
    wide = (high - low)[0] / (high - low)[1]
    columns = min(6 if wide < 0.8 else 4, len(rows))
    lines = -(-len(rows) // columns)
    size = 1.5 * columns, (1.5 / wide + 0.4) * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(rows) :]:
        axis.set_axis_off()
    for axis, row, arrays in zip(axes.ravel(), rows, stored):
        plotting.scatter_classes(axis, arrays["particles"][-1][None], target=arrays["target"])
        axis.set_title("\n".join(textwrap.wrap(row["label"], 20)), fontsize=7)
        axis.set_xlim(low[0], high[0])
        axis.set_ylim(low[1], high[1])
    return figure


def flow(stored: Mapping[str, np.ndarray], title: str) -> Figure:
    """One flow: the first two coordinates at the start, after a tenth of the steps and at the end,
    over the target in gray, and the distances. On the line only these."""
    particles, target, steps = stored["particles"], stored["target"], stored["steps"]
    shown = () if target.shape[1] == 1 else (0, int(np.searchsorted(steps, steps[-1] / 10)), -1)
    panels = len(shown) + 1
    figure, axes = plt.subplots(1, panels, figsize=(3 * panels, 3), layout="constrained")
    *scatters, last = np.atleast_1d(axes)
    everything = np.concatenate([target, *(particles[record] for record in shown)])
    low, high = everything.min(axis=0), everything.max(axis=0)
    for axis, record in zip(scatters, shown):
        points = particles[record][None, :, :2]
        plotting.scatter_classes(axis, points, target=target[:, :2])
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axis.set_title(f"step {steps[record]:,}", fontsize=8)
    for name in NAMES:
        if name in stored:
            last.semilogy(steps, np.maximum(stored[name], 1e-17), label=NAMES[name])
    last.set_xlabel("step")
    last.legend(fontsize=7)
    shape = f"{particles.shape[1]:,} particles in {target.shape[1]} dimensions"
    figure.suptitle(f"{title}: {shape}, target in gray", fontsize=9)
    return figure


def kl_decay(rows: list[dict]) -> Figure:
    """KL to N(0, 1) against time on the line, beside the chi^2 flow and its exponential bound."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    for row in rows:
        time = np.asarray(row["steps"]) * row["settings"]["step_size"]
        style = "--" if row["settings"]["dataset"] == "Gaussian1D" else "-"
        axis.semilogy(time, np.maximum(row["kl"], 1e-12).mean(0), style, label=row["label"])
    longest = max(row["steps"][-1] * row["settings"]["step_size"] for row in rows)
    times = np.linspace(0, longest, 60)
    kl = analytic.chi_squared_kl(times)
    axis.semilogy(times, kl, color="0.2", lw=2, alpha=0.6, label="χ² flow")
    axis.semilogy(times, kl[0] * np.exp(-2 * times), color="0.6", ls=":", label="bound for χ²")
    axis.set_ylim(1e-6, 2 * kl[0])
    axis.set_xlabel("time (steps × γ)")
    axis.set_ylabel("KL(μ ‖ N(0, 1))")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def image_sheets(rows: list[dict], root: Path, *, count: int = 12) -> Figure:
    """For each flow a few particles of the first seed as images, a line each record on the way;
    last, each particle's nearest target image."""
    lines = -(-len(rows) // 2)
    figure, axes = plt.subplots(
        lines, 2, figsize=(9, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows):
        stored = runs.Run(root / row["folders"][0]).load_arrays()
        records = np.unique(np.linspace(0, len(stored["steps"]) - 1, 5).round().astype(int))
        shown = stored["particles"][records][:, :count]
        last, target = shown[-1], stored["target"]
        nearest = target[((last[:, None] - target[None]) ** 2).sum(-1).argmin(1)]
        coordinates = np.concatenate([shown, nearest[None]])
        pixels = stored["center"] + coordinates @ stored["components"]
        plotting.show_images(axis, pixels.reshape(len(pixels), count, *stored["image_shape"]))
        axis.set_title(row["label"], fontsize=8)
    return figure


def figures(summary: Path) -> list[Path]:
    """Draws what a group's summary has to show; returns the files."""
    summary = Path(summary)
    about = json.loads(summary.read_text())
    rows, root, made = about["rows"], summary.parent.parent, {}
    with plotting.style():
        if about["group"] == "gaussian":
            made["kl"] = kl_decay(rows)
        else:
            made["curves"] = curves(rows)
        if about["group"] == "images":
            made["images"] = image_sheets(rows, root)
        elif about["group"] not in ("gaussian", "students"):
            made["ends"] = ends(rows, root)
        folder = summary.parent / "figures"
        return [
            plotting.save_figure(figure, folder / f"{summary.stem}_{name}.png")
            for name, figure in made.items()
        ]
