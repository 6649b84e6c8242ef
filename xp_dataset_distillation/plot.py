"""Figures of this experiment, drawn from stored results only."""

import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib.report import plotting
from lib.report.spreads import spread
from lib.runs import Run
from xp_dataset_distillation import export, tables

MOST_SHOWN = 10


def condensed(images: np.ndarray, class_names: tuple[str, ...], title: str = "") -> Figure:
    """Images [classes, n, H, W, c] in [0, 1], a class per line."""
    images = images[:, :MOST_SHOWN]
    classes, n = images.shape[:2]
    width = max(0.62 * n + 1.4, 3.0)
    figure, axis = plt.subplots(figsize=(width, 0.62 * classes + 0.3))
    plotting.show_images(axis, images)
    height = images.shape[2] + 1
    for i, name in enumerate(class_names):
        axis.text(-2, (i + 0.5) * height, name, ha="right", va="center", fontsize=7)
    # Ten letters to the inch: few images make a sheet narrower than its title.
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=9)
    return figure


def along(snapshots: np.ndarray, steps: np.ndarray, losses: np.ndarray) -> Figure:
    """The first image of every class at each snapshot, one per line, above the loss."""
    figure, axes = plt.subplots(
        2, 1, figsize=(6, 0.55 * len(snapshots) + 2.6), height_ratios=(0.55 * len(snapshots), 2.2)
    )
    plotting.show_images(axes[0], snapshots[:, :, 0] / 255)
    height = snapshots.shape[3] + 1
    for i, step in enumerate(steps):
        axes[0].text(-2, (i + 0.5) * height, str(step), ha="right", va="center", fontsize=7)
    axes[1].plot(losses, lw=0.6, color="0.6", label="each step")
    if (width := len(losses) // 50) > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        centers = np.arange(len(smooth)) + (width - 1) / 2
        axes[1].plot(centers, smooth, label=f"mean of {width} steps")
    axes[1].legend(fontsize=7)
    scale = "log" if 0 < 20 * losses.min() < losses.max() else "linear"
    axes[1].set(xlabel="step", ylabel="loss", yscale=scale)
    return figure


def run_figures(run: Run, images: Path, course: Path, *, label: str = "") -> list[Path]:
    """Draws what a run has condensed and how it came to be, into the files `images` and `course`;
    returns them."""
    stored, exported = run.load_arrays(), export.load(run.folder / "condensed")
    title = exported.dataset
    if label:
        title = f"{label}: {title}, {exported.images.shape[1]} per class, factor {exported.factor}"
    with plotting.style():
        figure = condensed(exported.images, exported.class_names, title)
        saved = [plotting.save_figure(figure, images)]
        figure = along(stored["snapshots"], stored["steps"], stored["losses"])
        return [*saved, plotting.save_figure(figure, course)]


def accuracies(rows: list[dict]) -> Figure:
    """A panel per evaluator: accuracy of every method, a marker per number of images; bars are the
    sample standard deviation over sets, or over the classifiers of one set."""
    evaluators = list(dict.fromkeys(row["evaluator"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    size = (3.4 * len(evaluators) + 1.2, 0.32 * len(labels) + 1.2)
    figure, axes = plt.subplots(1, len(evaluators), figsize=size, squeeze=False, sharey=True)
    numbers = sorted({row["images_per_class"] for row in rows if row["images_per_class"]})
    for axis, evaluator in zip(axes[0], evaluators):
        for row in (row for row in rows if row["evaluator"] == evaluator):
            values = tables.percent(row["accuracies"])
            n = row["images_per_class"]
            if n is None:
                axis.axvline(values.mean(), color="0.6", ls=":")
                continue
            color = plotting.CLASS_COLORS[numbers.index(n)]
            place = labels.index(row["label"])
            axis.errorbar(values.mean(), place, xerr=spread(values), fmt="o", ms=4, color=color)
        axis.set(title=evaluator, xlabel="accuracy, %")
        axis.grid(axis="x", lw=0.3)
    shown = [label for label in labels if label != "whole set"]
    axes[0, 0].set_yticks([labels.index(label) for label in shown], shown)
    axes[0, 0].invert_yaxis()
    handles = [
        plt.Line2D([], [], marker="o", ls="", ms=4, color=plotting.CLASS_COLORS[i])
        for i in range(len(numbers))
    ]
    names = [f"{n} per class" for n in numbers]
    if any(row["images_per_class"] is None for row in rows):
        handles.append(plt.Line2D([], [], color="0.6", ls=":"))
        names.append("whole set")
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def summary_figure(summary: Path) -> Path:
    """Draws a summary's accuracies beside it."""
    rows = tables.relative(json.loads(summary.read_text())["rows"])
    with plotting.style():
        return plotting.save_figure(accuracies(rows), summary.with_suffix(".png"))
