"""Figures of this experiment, drawn from stored results only."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import runs
from lib.datasets import as_images
from lib.report import plotting
from lib.report.spreads import spread
from xp_transfer_learning import data


def load_rings(summary: Path) -> list[dict]:
    """The rows of a rings summary, each with its first seed's `losses` [T], `particles`
    [records, 3, n, 2], `steps` and `x_tgt`."""
    summary = Path(summary)
    root = summary.parent.parent
    rows = json.loads(summary.read_text())["rows"]
    loaded: dict[str, dict] = {}
    for row in rows:
        folder = row["folders"][0]
        if folder not in loaded:
            loaded[folder] = runs.Run(root / folder).load_arrays()
        arrays, i = loaded[folder], row["index"]
        row |= {"losses": arrays["losses"][:, i], "particles": arrays["particles"][:, i]}
        row |= {"steps": arrays["steps"], "x_tgt": arrays["x_tgt"]}
    return rows


def rings_grid(rows: list[dict]) -> Figure:
    """A row per kernel, a column per bandwidth: the last particles, paths, the target in gray."""
    names = [n for n in ("gaussian", "laplace", "imq", "riesz", "momentum", "decay") if any(
        row["kernel"] == n for row in rows)]  # fmt: skip
    columns = max(sum(row["kernel"] == name for row in rows) for name in names)
    figure, axes = plt.subplots(
        len(names), columns, figsize=(2.1 * columns, 1.05 * len(names)), squeeze=False
    )
    for name, line in zip(names, axes):
        shown = [row for row in rows if row["kernel"] == name]
        for axis in line[len(shown) :]:
            axis.set_axis_off()
        for axis, row in zip(line, shown):
            plotting.scatter_classes(axis, row["particles"][-1], target=row["x_tgt"])
            # Longer ones jitter about their end and would hide it.
            plotting.plot_paths(axis, row["particles"], longest=6)
            axis.set_title(f"{name}, {row['parameter']} = {row['value']:g}", fontsize=7, pad=2)
            axis.set_xlim(-1.95, 0.45)
            axis.set_ylim(-0.45, 0.45)
    return figure


def rings_losses(rows: list[dict]) -> Figure:
    """Loss against step, a panel a sweep."""
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(9, 4.8), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        for row in rows:
            if row["kernel"] == name:
                label = f"{row['parameter']} = {row['value']:g}"
                plotting.plot_losses(axis, row["losses"], label=label)
        axis.set_title(name)
        axis.legend(fontsize=6)
    return figure


def rings(summary: Path) -> list[Path]:
    """Draws the grid and the losses of each estimator, and the animation of the Riesz flow."""
    summary, written = Path(summary), []
    rows = load_rings(summary)
    folder = summary.parent / "figures"
    with plotting.style():
        for estimator in dict.fromkeys(row["estimator"] for row in rows):
            chosen = [row for row in rows if row["estimator"] == estimator]
            stem = f"{summary.stem}_{estimator.replace(' ', '_')}"
            written.append(plotting.save_figure(rings_grid(chosen), folder / f"{stem}.png"))
            losses = rings_losses(chosen)
            written.append(plotting.save_figure(losses, folder / f"{stem}_losses.png"))
        row = next(row for row in rows if row["kernel"] == "riesz" and row["value"] == 1.0)
        written.append(animate_rings(row, folder / f"{summary.stem}.gif"))
    return written


def animate_rings(row: dict, path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(4.8, 2.2))

    def draw(frame: int) -> None:
        axis.clear()
        plotting.scatter_classes(axis, row["particles"][frame], target=row["x_tgt"])
        axis.set_xlim(-1.95, 0.45)
        axis.set_ylim(-0.45, 0.45)
        axis.set_title(f"step {row['steps'][frame]}")

    return plotting.save_animation(figure, draw, len(row["steps"]), path)


def early_and_late(steps: np.ndarray, count: int = 10) -> np.ndarray:
    """Indices of up to `count` records, the first and the last among them, at equal ratios of
    steps: most happens early."""
    wanted = np.concatenate([[0], np.geomspace(max(1, steps[1]), steps[-1], count - 1)])
    return np.unique(np.searchsorted(steps, wanted.round()).clip(0, len(steps) - 1))


def step_names(steps: np.ndarray) -> list[str]:
    return [f"step\n{int(step):,}" for step in steps]


def sample_sheet(
    samples: np.ndarray,
    shape: tuple[int, int, int],
    title: str,
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Figure:
    """Images [columns, C, d] as a sheet: a row per class; names over columns and beside rows."""
    sheet = np.swapaxes(np.asarray(as_images(samples, shape)), 0, 1)
    width = 0.62 * sheet.shape[1] + 0.06 * max(map(len, rows), default=0)
    figure, axis = plt.subplots(figsize=(max(3, width), 0.62 * sheet.shape[0] + 0.7))
    plotting.show_images(axis, sheet)
    for i, name in enumerate(columns):
        axis.text((i + 0.5) * (shape[1] + 1) - 1, -1, name, ha="center", va="bottom", fontsize=6)
    for i, name in enumerate(rows):
        axis.text(-2, (i + 0.5) * (shape[0] + 1) - 1, name, ha="right", va="center", fontsize=6)
    if rows:
        axis.set_anchor("E")  # the names have the rest of the width
    figure.suptitle(title, fontsize=8, wrap=True)
    return figure


def image_flow(arrays: dict, title: str, stem: Path) -> list[Path]:
    """Samples along one flow (a row per source class, a column per step; last the target image
    nearest to where the sample ended, for classes are matched by the flow), and its loss."""
    particles, steps = arrays["particles"], arrays["steps"]
    shape = data.stored_shape(arrays)
    with plotting.style():
        chosen = early_and_late(steps)
        targets = arrays["x_tgt"].reshape(-1, arrays["x_tgt"].shape[-1])
        squared = ((particles[-1, :, None, 0] - targets[None]) ** 2).sum(axis=-1)
        nearest = targets[squared.argmin(axis=1)]
        figure = sample_sheet(
            np.concatenate([particles[chosen, :, 0], nearest[None]]),
            shape,
            title,
            columns=[*step_names(steps[chosen]), "nearest\ntarget"],
            rows=list(arrays.get("class_names", ())),  # not of older runs
        )
        samples = plotting.save_figure(figure, stem.with_suffix(".png"))
        figure, axis = plt.subplots(figsize=(4.5, 3))
        plotting.plot_losses(axis, arrays["losses"])
        axis.set_xscale("symlog", linthresh=10)
        axis.set_title(title)
        losses = plotting.save_figure(figure, stem.with_name(f"{stem.name}_loss.png"))
        animation = animate_images(particles, steps, shape, stem.with_suffix(".gif"))
    return [samples, losses, animation]


def animate_images(
    particles: np.ndarray, steps: np.ndarray, shape: tuple[int, int, int], path: Path
) -> Path:
    """Two images per class, one below the other, on their way, at some forty records, more of
    them early on."""
    last = len(steps) - 1
    frames = np.unique(np.geomspace(1, last + 1, 40).round().astype(int) - 1)
    shown = np.asarray(as_images(particles[frames][:, :, :2].swapaxes(1, 2), shape))
    rows, columns = shown.shape[1:3]
    figure, axis = plt.subplots(figsize=(0.62 * columns, 0.62 * rows + 0.3))

    def draw(i: int) -> None:
        axis.clear()
        plotting.show_images(axis, shown[i])
        axis.set_title(f"step {int(steps[frames[i]]):,}", fontsize=8)

    return plotting.save_animation(figure, draw, len(frames), path)


def along_curves(rows: list[dict]) -> Figure:
    """Accuracy (mean and sample standard deviation over all tries and trainings) and loss along the
    flows of those rows of transfer summaries that have them."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for row in rows:
        if len(row["steps"]) < 2:
            continue
        every, steps = 100 * np.asarray(row["accuracies"]), np.asarray(row["steps"])
        mean, std = every.mean(axis=(0, 2)), spread(every, (0, 2))
        name = f"{row['target']}, k = {row['k']}, {row['method']}"
        axes[0].plot(steps, mean, ".-", label=name)
        axes[0].fill_between(steps, mean - std, mean + std, alpha=0.3)
        if np.size(row["losses"]):
            axes[1].semilogy(steps, np.asarray(row["losses"])[:, 1:].mean(axis=0), ".-")
    axes[0].set_ylabel("test accuracy of LeNet-5, %")
    axes[1].set_ylabel("loss of that step")
    for axis in axes:
        axis.set_xlabel("step of the flow")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def transfer_along(summary: Path) -> Path:
    """Draws `along_curves` of one summary."""
    summary = Path(summary)
    with plotting.style():
        figure = along_curves(json.loads(summary.read_text())["rows"])
        return plotting.save_figure(figure, summary.parent / "figures" / f"{summary.stem}.png")


def controls(summary: Path) -> Path:
    """Accuracies of `controls.py`: a panel per k, a line per arm; a dot per draw, their mean, and a
    dotted line at the k images, augmented."""
    rows = json.loads(summary.read_text())["rows"]
    numbers = list(dict.fromkeys(row["k"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))[::-1]
    with plotting.style():
        figure, axes = plt.subplots(
            1, len(numbers), figsize=(3.4 * len(numbers) + 2.2, 0.3 * len(arms) + 1.2),
            squeeze=False, sharey=True, layout="constrained",
        )  # fmt: skip
        for axis, k in zip(axes[0], numbers):
            for row in (row for row in rows if row["k"] == k):
                means = 100 * np.mean(row["accuracies"], axis=1)
                place = arms.index(row["arm"])
                color = plotting.CLASS_COLORS[0 if "way" in row["arm"] else 1]
                if row["arm"] in ("arrived", "auto"):
                    color = plotting.CLASS_COLORS[("arrived", "auto").index(row["arm"]) * 2]
                axis.scatter(means, np.full(len(means), place), s=8, color=color, alpha=0.5, lw=0)
                axis.scatter(means.mean(), place, s=50, marker="|", color=color)
                if row["arm"] == "k images, augmented":
                    axis.axvline(means.mean(), color="0.5", ls=":", lw=1)
            axis.set_yticks(range(len(arms)), arms, fontsize=7)
            axis.set_xlabel("accuracy in percent")
            axis.set_title(f"{rows[0]['source']} → {rows[0]['target']}, k = {k}", fontsize=9)
        return plotting.save_figure(figure, summary.with_suffix(".png"))


def matching(costs: np.ndarray, matched: np.ndarray) -> Figure:
    """Costs [C, D] between flowed and target classes; in red the target class [C] of each."""
    figure, axis = plt.subplots(figsize=(3.6, 3))
    image = axis.imshow(costs, cmap="viridis")
    axis.plot(matched, np.arange(len(matched)), "r.", label="matched")
    axis.set_xlabel("target class")
    axis.set_ylabel("source class")
    axis.set_xticks(range(costs.shape[1]))
    axis.set_yticks(range(costs.shape[0]))
    figure.colorbar(image, label="$W_2^2$")
    figure.legend(loc="outside upper right", fontsize=7)
    return figure


PUBLISHED_ADAPTATION = {
    "fashion_mnist": (
        (0, 5e3, 1e4, 2.5e4, 5e4, 1e5, 1.5e5),
        (15.2, 60.9, 87.7, 95.8, 98.4, 99.7, 100),
    ),
    "kmnist": ((0, 5e3, 1e4, 2.5e4, 5e4, 1e5, 1.6e5), (25.7, 55.3, 84.7, 94.8, 98.0, 99.7, 100)),
    "usps": ((0, 5e3, 1e4, 2.5e4, 5e4, 1e5, 1.52e5), (41.8, 81.2, 89.8, 95.9, 98.3, 99.8, 100)),
}
"""Accuracy in percent by step, read off the published files (target MNIST)."""


def adaptation_curve(stored: dict) -> Figure:
    """Accuracy along the flow of one summary, mean and sample standard deviation over tries, beside
    the published one where there is one."""
    config, steps = stored["config"], np.asarray(stored["steps"])
    accuracies = 100 * np.asarray(stored["accuracies"])
    figure, axis = plt.subplots(figsize=(4.5, 3))
    mean, std = accuracies.mean(axis=0), spread(accuracies, 0)
    draws = f"{len(accuracies)} draw{'s' if len(accuracies) > 1 else ''}"
    axis.plot(steps, mean, ".-", label=f"ours, {draws} of the source")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.3)
    if config["source"] in PUBLISHED_ADAPTATION and config["target"] == "mnist":
        published = PUBLISHED_ADAPTATION[config["source"]]
        axis.plot(*published, ".--", color="0.4", label="published")
    axis.axhline(99, color="0.8", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=max(1, steps[1]))
    # Powers of ten below the linear part would stand on each other.
    axis.set_xticks([0, *(10**k for k in range(1, 7) if 10**k > steps[1])])
    axis.set_xlim(0, axis.dataLim.x1)
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy of the frozen classifier, %")
    axis.set_title(f"{config['source']} → {config['target']}")
    axis.legend(fontsize=7)
    return figure


def adaptation(summary: Path, arrays: dict) -> list[Path]:
    """The curve of a summary, and samples of one flow."""
    summary = Path(summary)
    stored = json.loads(summary.read_text())
    config, steps = stored["config"], np.asarray(stored["steps"])
    stem = summary.parent / "figures" / summary.stem
    with plotting.style():
        curve = plotting.save_figure(adaptation_curve(stored), stem.with_suffix(".png"))
        shape = data.stored_shape(arrays)
        chosen = early_and_late(steps)
        title = f"{data.stem(config['source'])} → {data.stem(config['target'])}"
        samples, names = arrays["samples"][chosen], step_names(steps[chosen])
        figure = sample_sheet(samples, shape, f"{title}, one image per class", columns=names)
        samples = plotting.save_figure(figure, stem.with_name(f"{stem.name}_samples.png"))
    return [curve, samples]
