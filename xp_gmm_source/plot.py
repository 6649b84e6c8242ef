"""Figures of this experiment, drawn from stored results only."""

import json
import textwrap
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure

from lib import runs
from lib.report import plotting
from xp_gmm_source import gmm_files
from xp_gmm_source.sources import mixture_source
from xp_gmm_source.tables import MEASURES, rows_of

STYLES = ("-", "--", ":")
SHOWN_IMAGES = 8
SHOWN_PATHS = 40
MOST_COMPONENTS = 20
LOGARITHMIC = ("frechet", "sliced_wasserstein")


def curves(rows: list[dict], floor: dict[str, float]) -> Figure:
    """Every measure against the number of evaluations of Euler's method: mean over seeds, their
    range shaded; dotted, what as many training images are worth."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(3.3 * len(MEASURES), 3.8))
    for axis, (name, title) in zip(axes, MEASURES.items()):
        for i, row in enumerate(rows):
            chosen = [method == "euler" for method in row["methods"]]
            evaluations = np.asarray(row["evaluations"])[chosen]
            values = np.asarray(row[name])[:, chosen]
            color = plotting.CLASS_COLORS[i % len(plotting.CLASS_COLORS)]
            style = STYLES[i // len(plotting.CLASS_COLORS)]
            axis.plot(evaluations, values.mean(0), style, color=color, label=row["label"])
            axis.fill_between(evaluations, values.min(0), values.max(0), color=color, alpha=0.2)
        axis.axhline(floor[name], color="0.4", ls=":", label="training images")
        axis.set_xscale("log")
        if name in LOGARITHMIC:
            axis.set_yscale("log")
            axis.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(ticker.FormatStrFormatter("%g"))
            axis.tick_params(axis="y", which="both", labelsize=7)
        axis.set_xticks(evaluations, [str(num) for num in evaluations], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("evaluations")
        axis.set_title(title, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def training_curves(summary: Path) -> Path:
    """The Fréchet distance against training steps: a panel per width and number of evaluations of
    Euler's method, a line per source (mean over seeds), a dot per seed; dotted, as many training
    images."""
    told = json.loads(summary.read_text())
    points = told["points"]
    widths, samplers = sorted({p["width"] for p in points}), points[0]["samplers"]
    columns = [j for j, sampler in enumerate(samplers) if sampler.startswith("euler")]
    labels = list(dict.fromkeys(point["label"] for point in points))
    with plotting.style():
        size = 3.3 * len(columns), 3.2 * len(widths) + 0.6
        shape = len(widths), len(columns)
        figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True, sharey=True)
        for line, width in zip(axes, widths):
            for j, axis in zip(columns, line):
                for i, label in enumerate(labels):
                    own = [p for p in points if p["width"] == width and p["label"] == label]
                    steps = np.array([p["step"] for p in own])
                    values = np.array([p["frechet"][j] for p in own])
                    color = plotting.CLASS_COLORS[i % len(plotting.CLASS_COLORS)]
                    marks = np.unique(steps)
                    means = [values[steps == mark].mean() for mark in marks]
                    axis.plot(marks, means, color=color, label=label)
                    axis.scatter(steps, values, s=8, color=color, lw=0)
                axis.axhline(points[0]["floor"]["frechet"], color="0.4", ls=":")
                axis.set_xscale("log")
                axis.set_yscale("log")
                axis.set_title(f"{samplers[j]}, width {width}", fontsize=9)
        for axis in axes[-1]:
            axis.set_xlabel("training steps")
        axes[0, 0].set_ylabel(MEASURES["frechet"])
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7)
        path = plotting.save_figure(figure, summary.with_suffix(".png"))
        plt.close(figure)
    return path


def sample_grid(rows: list[dict], stored: list[dict[str, np.ndarray]]) -> Figure:
    """Samples of the first seed: a line per source, a column per number of evaluations (of Euler's
    method where there are any)."""
    methods = rows[0]["methods"]
    numbers = [j for j, method in enumerate(methods) if method == "euler"] or range(len(methods))
    size = 1.0 + 1.9 * len(numbers), 1.0 * len(rows) + 0.4
    figure, axes = plt.subplots(
        len(rows), len(numbers), figsize=size, squeeze=False, layout="constrained"
    )
    for line, row, arrays in zip(axes, rows, stored):
        for axis, j in zip(line, numbers):
            images = arrays["samples"][row["variant"], j, :SHOWN_IMAGES]
            images = images[: len(images) // 2 * 2]
            plotting.show_images(axis, images.reshape(2, -1, *images.shape[1:]))
        line[0].text(
            -0.05,
            0.5,
            "\n".join(textwrap.wrap(row["label"], 16)),
            transform=line[0].transAxes,
            ha="right",
            va="center",
            fontsize=7,
        )
    for axis, j in zip(axes[0], numbers):
        axis.set_title(f"{rows[0]['evaluations'][j]} evaluations", fontsize=8)
    return figure


def paths(rows: list[dict], stored: list[dict[str, np.ndarray]]) -> Figure:
    """Paths of the first seed on the test images' first two principal components."""
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.3 * columns, 2.4 * lines),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    for axis in axes.ravel()[len(rows) :]:
        axis.set_axis_off()
    for axis, row, arrays in zip(axes.ravel(), rows, stored):
        path = arrays["paths"][row["variant"]][:, :SHOWN_PATHS]
        axis.scatter(*arrays["targets"].T, s=2, color="0.8", lw=0, zorder=0)
        axis.plot(path[..., 0], path[..., 1], color="0.4", lw=0.5)
        axis.scatter(*path[0].T, s=6, color=plotting.CLASS_COLORS[0], zorder=3, lw=0)
        axis.scatter(*path[-1].T, s=6, color=plotting.CLASS_COLORS[1], zorder=3, lw=0)
        straight = float(np.mean(row["normalised_straightness"]))
        axis.set_title(
            "\n".join(textwrap.wrap(row["label"], 24)) + f"\nstraightness {straight:.3f}",
            fontsize=7,
        )
    return figure


def mixture(stored: gmm_files.ImageMixture, draws: np.ndarray, title: str) -> Figure:
    """The means of the components that weigh most, with their weights, and draws of the mixture as
    pixels."""
    order = np.argsort(-stored.mixture.weights)[:MOST_COMPONENTS]
    means = stored.mixture.means[order]
    if stored.projection is not None:
        means = means @ stored.projection.components + stored.projection.center
    columns = max(10, len(order))
    figure, axes = plt.subplots(
        2, 1, figsize=(0.75 * columns, 4.2), height_ratios=(1, 4), layout="constrained"
    )
    height, width, _ = stored.image_shape
    blank = np.ones((columns - len(order), height * width * stored.image_shape[2]))
    plotting.show_images(axes[0], _sheet(np.concatenate([means, blank]), stored.image_shape, 1))
    for i, k in enumerate(order):
        place = (i + 0.5) * (width + 1), -1
        weight = f"{stored.mixture.weights[k]:.2f}"
        axes[0].text(*place, weight, ha="center", va="bottom", fontsize=7)
    shown = draws[: 4 * columns]
    plotting.show_images(axes[1], _sheet(shown, stored.image_shape, 4))
    figure.suptitle(title, fontsize=9)
    return figure


def _sheet(points: np.ndarray, shape: tuple[int, int, int], lines: int) -> np.ndarray:
    """Points in [-1, 1] as images [lines, columns, H, W, channels] in [0, 1]."""
    return (np.asarray(points, float) / 2 + 0.5).reshape(lines, -1, *shape)


def flow_samples(run: runs.Run, label: str) -> Path:
    """Draws the samples of one flow into its folder."""
    stored = run.load_arrays()
    rows = rows_of(label, [stored])
    with plotting.style():
        figure = sample_grid(rows, [stored] * len(rows))
        return plotting.save_figure(figure, run.folder / "samples.png")


def mixture_sheet(stored: gmm_files.ImageMixture, name: str, path: Path) -> Path:
    """Draws `mixture` of a data set's mixture, with 80 draws of it, to `path`."""
    source = mixture_source(stored.mixture, mean=0.0, std=1.0, pca=stored.projection)
    draws = np.asarray(source.sample(jax.random.key(0), 4 * MOST_COMPONENTS))
    kind = f"K = {len(stored.mixture.weights)}, {gmm_files.kind_of(stored.mixture)}"
    title = f"{name}, {kind}: means and their weights, above; draws, below"
    with plotting.style():
        return plotting.save_figure(mixture(stored, draws, title), path)


def figures(summary: Path) -> list[Path]:
    """Draws everything that a summary tells of, beside it."""
    told = json.loads(summary.read_text())
    rows, root = told["rows"], summary.parents[1]
    stored = [runs.Run(root / row["folders"][0]).load_arrays() for row in rows]
    saved = []
    with plotting.style():
        drawn = {
            "nfe": curves(rows, told["floor"]),
            "samples": sample_grid(rows, stored),
            "paths": paths(rows, stored),
        }
        for name, figure in drawn.items():
            path = summary.with_name(f"{summary.stem}_{name}.png")
            saved.append(plotting.save_figure(figure, path))
            plt.close(figure)
    return saved
