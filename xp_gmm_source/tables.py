"""Tables of the comparison of sources, from stored results only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread
from lib.report.tables import Table

MEASURES = {
    "frechet": "Fréchet distance of features",
    "sliced_wasserstein": "sliced Wasserstein, pixels",
    "mmd2_features": "MMD² of features",
    "class_distance": "total variation of classes",
}
PATHS = ("normalised_straightness", "length_ratio", "transport_cost")


def rows_of(label: str, stored: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """One row a sampler's source (own, pruned) of a flow: measures [seeds, S], paths [seeds]."""
    rows = []
    for i in range(len(stored[0]["frechet"])):
        row: dict[str, Any] = {"label": label if i == 0 else f"{label}, pruned", "variant": i}
        row["methods"] = [str(method) for method in stored[0]["methods"]]
        row["evaluations"] = stored[0]["evaluations"]
        for name in (*MEASURES, "mmd2_pixels", "class_entropy_gap"):
            row[name] = np.stack([arrays[name][i] for arrays in stored])
        for name in (*PATHS, "straightness"):
            row[name] = np.stack([arrays[name][i] for arrays in stored])
        row["train_seconds"] = np.stack([arrays["train_seconds"] for arrays in stored])
        if i > 0:
            row["pruned_axes"] = stored[0]["pruned_axes"]
            row["acceptance"] = np.stack([arrays["acceptance"] for arrays in stored])
        rows.append(row)
    return rows


def floor_of(stored: dict[str, np.ndarray]) -> dict[str, float]:
    """What as many training images are worth."""
    prefix = "floor_"
    return {
        name.removeprefix(prefix): float(value)
        for name, value in stored.items()
        if name.startswith(prefix)
    }


def cell(values: np.ndarray) -> str:
    """mean ± sample standard deviation over seeds."""
    return mean_and_spread(values, ".3g", ".1g")


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The sources at every sampler and how straight their paths are; draws of the mixtures."""
    words = f"{MEASURES['frechet']} after so many evaluations, straightness and cost of the paths"
    seeds = len(summary["seeds"])
    spread = f", mean ± sample standard deviation over {seeds} seeds" * (seeds > 1)
    sources = table(summary["rows"], summary["floor"])._replace(caption=f"{words}{spread}.")
    if not summary.get("mixtures"):
        return [sources]
    draws = [
        [name, *(f"{measures[measure]:.3g}" for measure in MEASURES)]
        for name, measures in summary["mixtures"].items()
    ]
    caption = "Draws of the mixtures themselves, without a flow."
    return [sources, Table(["mixture", *MEASURES.values()], draws, caption)]


def table(
    rows: Sequence[Mapping[str, Any]], floor: Mapping[str, float], measure: str = "frechet"
) -> Table:
    """A row per source: the measure at every sampler, then how straight its paths are."""
    first = rows[0]
    names = [f"{method} {num}" for method, num in zip(first["methods"], first["evaluations"])]
    lines = []
    for row in rows:
        values = np.asarray(row[measure])
        cells = [cell(values[:, j]) for j in range(values.shape[1])]
        cells += [cell(row["normalised_straightness"]), cell(row["transport_cost"])]
        lines.append([row["label"], *cells])
    blank = [""] * (len(names) + 1)
    lines.append(["as many training images", f"{floor[measure]:.3g}", *blank])
    return Table(["source", *names, "straightness", "cost"], lines)
