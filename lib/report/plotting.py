"""One matplotlib style, and the parts that figures share. The only module that draws."""

import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lib.runs.files import atomic_file

COLORS_OF_ANIMATIONS = 32
"""Few: noisy images do not compress."""
# Okabe and Ito's palette: told apart by color-blind readers.
CLASS_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#000000", "#F0E442", "#8C6BB1", "#7F7F7F",
)  # fmt: skip

STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.rcsetup.cycler(color=CLASS_COLORS),
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


def style() -> AbstractContextManager[None]:
    """The common style, only within the block."""
    return mpl.rc_context(STYLE)


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes the figure whole or not at all, closes it, and returns the path."""
    path = Path(path)
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix[1:] or None)
    finally:
        plt.close(figure)
    return path


def save_animation(
    figure: Figure, draw: Callable[[int], Any], num_frames: int, path: str | os.PathLike
) -> Path:
    """Writes a GIF of `draw(0)`, ..., `draw(num_frames - 1)` on the figure, 12 per second, and
    closes it. The first frame and the last stay for a second and more. The layout of the first
    frame is kept: nothing moves but what is drawn."""
    frames = []
    try:
        for i in range(num_frames):
            draw(i)
            if i == 0:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
            figure.savefig(stream := io.BytesIO(), format="png", dpi=90)
            frames.append(Image.open(stream).convert("RGB"))
        frames = [frame.quantize(COLORS_OF_ANIMATIONS) for frame in frames]
        durations = [1000, *[80] * (num_frames - 2), 2000][-num_frames:]
        with atomic_file(path) as file:
            frames[0].save(
                file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
            )
    finally:
        plt.close(figure)
    return Path(path)


def scatter_classes(axes: Axes, points: np.ndarray, *, target: np.ndarray | None = None) -> None:
    """Points [C, n, 2], a color per class, over a target [C', m, 2] in gray."""
    if target is not None:
        x, y = target.reshape(-1, 2).T
        axes.scatter(x, y, s=9, color="0.8", linewidths=0, zorder=1)
    for label, cloud in enumerate(points):
        color = CLASS_COLORS[label % len(CLASS_COLORS)]
        x, y = cloud.T
        axes.scatter(x, y, s=5, color=color, linewidths=0, zorder=3)
    axes.set_aspect("equal")
    axes.set_axis_off()


def plot_paths(axes: Axes, records: np.ndarray, *, longest: float = np.inf) -> None:
    """Thin lines along records [T, C, n, 2] of particles; paths over `longest` are left out."""
    length = np.linalg.norm(np.diff(records, axis=0), axis=-1).sum(axis=0)
    for label in range(records.shape[1]):
        color = CLASS_COLORS[label % len(CLASS_COLORS)]
        paths = records[:, label][:, length[label] <= longest]
        axes.plot(*np.moveaxis(paths, -1, 0), lw=0.3, alpha=0.25, color=color, zorder=2)


def tile_images(images: np.ndarray) -> np.ndarray:
    """Images [rows, columns, H, W, channels] in [0, 1], or of integers 0 to 255, as one
    [H', W', channels] in [0, 1], with a white pixel between them."""
    images = np.asarray(images)
    if np.issubdtype(images.dtype, np.integer):
        images = images / 255
    rows, columns, height, width, channels = images.shape
    tiles = np.ones((rows, height + 1, columns, width + 1, channels))
    tiles[:, :-1, :, :-1] = np.clip(images, 0, 1).swapaxes(1, 2)
    return tiles.reshape(rows * (height + 1), -1, channels)[:-1, :-1]


def show_images(axes: Axes, images: np.ndarray) -> None:
    """A sheet of images [rows, columns, H, W, 1 or 3], integers 0 to 255 or values clipped to
    [0, 1]."""
    axes.imshow(tile_images(images).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def plot_losses(axes: Axes, losses: np.ndarray, *, label: str | None = None) -> None:
    """A loss against its step, logarithmic: parts at or below 0 (rounding) are left out."""
    axes.semilogy(np.where(losses > 0, losses, np.nan), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss F = MMD²/2")
