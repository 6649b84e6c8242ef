"""The group `tests`: how often two-sample tests reject where samples differ, against how much.

Draws that are stored are not drawn again.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot as plt

from lib.kernels import gaussian, median_bandwidth
from lib.report import plotting
from lib.report.tables import Table, write_summary
from lib.runs.files import write_json
from lib.two_sample import MMD, two_sample_test
from xp_drmmd.alternatives import Pair, pairs
from xp_drmmd.config import EXPERIMENT, Preset

ALPHA = 0.05
OURS = "MMD + DrMMD"
Hits = dict[str, list[bool]]
Method = Callable[[np.random.Generator, np.ndarray, np.ndarray], Mapping[str, bool]]
"""Whether each of the tests that it makes rejects."""

QUICK = {"uniform1": (30, 80), "variance10": (30, 80)}
"""Draws and points of what needs no data."""


@jax.jit
def _ours(key, x, y):
    return two_sample_test(key, x, y).p_value


@jax.jit
def _median(key, x, y):
    kernel = gaussian(median_bandwidth(key, x, y))
    return two_sample_test(key, x, y, [kernel], lmbdas=MMD).p_value


def key_of(rng: np.random.Generator):
    return jax.random.key(int(rng.integers(2**31)))


def ours(rng, x, y) -> dict[str, bool]:
    return {OURS: float(_ours(key_of(rng), x, y)) <= ALPHA}


def mmd_median(rng, x, y) -> dict[str, bool]:
    """MMD with a Gaussian kernel of the median bandwidth: what most people try first."""
    return {"MMD, median": float(_median(key_of(rng), x, y)) <= ALPHA}


METHODS: dict[str, Method] = {"ours": ours, "median": mmd_median}


def rejections(
    path: Path,
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    methods: Mapping[str, Method],
    num_draws: int,
    *identity,
) -> Hits:
    """For each test whether it rejects, draw by draw; `path` holds what is known and gets the rest.

    Draw i is the same for every method, and depends on nothing else than i and `identity`.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    for name, method in methods.items():
        hits = stored.setdefault(name, {})
        for i in range(min(map(len, hits.values()), default=0), num_draws):
            seed = zlib.crc32(repr(identity).encode()), i
            x, y = draw(np.random.default_rng(seed))
            rng = np.random.default_rng((*seed, zlib.crc32(name.encode())))
            for test, rejected in method(rng, x, y).items():
                hits.setdefault(test, []).append(bool(rejected))
            if i + 1 == num_draws or (i + 1) % 20 == 0:
                write_json(path, stored)
    return {t: row[:num_draws] for name in methods for t, row in stored[name].items()}


def interval(hits: Iterable[bool], z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    hits = list(hits)
    n, p = len(hits), float(np.mean(hits))
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def rate(hits: Iterable[bool]) -> str:
    low, high = interval(hits)
    return f"{np.mean(list(hits)):.2f} ({low:.2f} to {high:.2f})"


def _draw(pair: Pair, level: float, rng: np.random.Generator):
    return pair.draw(rng, pair.n, level)


def figure(curves: Mapping[str, tuple[Pair, list[Hits]]]) -> plt.Figure:
    """Power against the level, a panel per pair; 95% intervals shaded."""
    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    drawing, axes = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 2.8 * lines), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (pair, hits) in zip(axes.flat, curves.values()):
        for i, test in enumerate(hits[0]):
            rows = [at_level[test] for at_level in hits]
            color, bounds = plotting.CLASS_COLORS[i], np.transpose(list(map(interval, rows)))
            width = 2.5 if test == OURS else 1
            means = [np.mean(row) for row in rows]
            axis.plot(pair.levels, means, "o-", ms=3, lw=width, color=color, label=test)
            axis.fill_between(pair.levels, *bounds, color=color, alpha=0.15, lw=0)
        axis.axhline(ALPHA, color="0.7", ls=":", lw=1)
        axis.set_title(pair.title, fontsize=8)
        axis.set_xticks(pair.levels)
        axis.set_xlabel(pair.varied)
        axis.set_ylim(0, 1.03)
    axes[0, 0].set_ylabel("power")
    handles = axes[0, 0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=4, fontsize=7)
    return drawing


def run_tests(preset: Preset, results: Path, data_root: Path | None = None) -> Path:
    """Power of our test and of the MMD with the median bandwidth; returns the summary."""
    every = pairs(data_root)
    if preset == "quick":
        every = {name: every[name]._replace(n=n) for name, (_, n) in QUICK.items()}
    folder, rows = results / EXPERIMENT / f"tests_{preset}", []
    curves: dict[str, tuple[Pair, list[Hits]]] = {}
    for name, pair in every.items():
        num_draws = QUICK[name][0] if preset == "quick" else 200
        curves[name] = pair, []
        for level in pair.levels:
            draw = partial(_draw, pair, level)
            path = folder / f"{name}_{level:g}.json"
            hits = rejections(path, draw, METHODS, num_draws, name, pair.n, level)
            curves[name][1].append(hits)
            cells = [rate(row) for row in hits.values()]
            rows.append([pair.title, f"{pair.varied} {level:g}", str(num_draws), *cells])
            print("  " + ", ".join(map(str, rows[-1])), flush=True)
    document = {"group": "tests", "alpha": ALPHA, "curves": {n: h for n, (_, h) in curves.items()}}
    caption = f"Rejections at level {ALPHA}, with 95% intervals over the draws."
    heads = ["samples", "level", "draws", OURS, "MMD, median"]

    def draw_figure(path):
        with plotting.style():
            yield plotting.save_figure(figure(curves), path.parent / "figures" / f"{path.stem}.png")

    path = results / EXPERIMENT / f"tests_{preset}.json"
    return write_summary(path, document, [Table(heads, rows, caption)], figures=draw_figure)
