"""Tables of this experiment, from stored summaries only."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread
from lib.report.tables import Table

NAMES = {"mmd2": "MMD²", "w1": "W1", "w2": "W2", "kl": "KL", "validation": "validation error"}


def _spread(values: np.ndarray) -> str:
    forms = (".4f", ".4f") if 1e-3 <= abs(np.mean(values)) < 10 else (".1e", ".0e")
    return mean_and_spread(values, *forms)


def line(row: dict) -> str:
    """A flow's distances at its end, in one line."""
    parts = [
        f"{NAMES[name]} {_spread(np.asarray(row[name])[:, -1])}" for name in NAMES if name in row
    ]
    return f"{row['label']:30s} {int(row['steps'][-1]):7,d} steps: " + ", ".join(parts)


def first_below(row: dict, name: str, level: float) -> int | None:
    """The first recorded step at which the mean over seeds is at most `level`."""
    reached = np.flatnonzero(np.mean(row[name], axis=0) <= level)
    return int(row["steps"][reached[0]]) if len(reached) else None


def table(
    summary: Mapping[str, Any], *, names: Iterable[str] = NAMES, w1: float | None = None
) -> Table:
    """A row per flow: the distances `names` that it has at its end, mean ± sample standard
    deviation over seeds; with `w1` also the first recorded step at which the mean W1 is at most
    that."""
    rows, seeds = summary["rows"], len(summary["seeds"])
    names = [name for name in names if name in rows[0]]
    unit = "epochs" if "validation" in names else "steps"
    heads = ["flow", "λ", "step size", unit, *(NAMES[name] for name in names)]
    if w1 is not None:
        heads.append(f"W1 ≤ {w1:g} at step")
    lines = []
    for row in rows:
        settings = row["settings"]
        lmbda = f"{settings['lmbda']:g}" if settings["flow"] in ("drmmd", "kale") else "-"
        size = f"{settings['step_size']:g}"
        cells = [row["label"], lmbda, size, f"{row['steps'][-1]:,.0f}"]
        cells += [_spread(np.asarray(row[name])[:, -1]) for name in names]
        if w1 is not None:
            step = first_below(row, "w1", w1)
            cells.append("-" if step is None else f"{step:,}")
        lines.append(cells)
    spread = f", mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else ""
    return Table(heads, lines, f"Where each flow ends{spread}.")
