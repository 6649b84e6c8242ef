"""Tables of the comparison of sources, from stored results alone."""

from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread

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
            row[name] = np.stack([one[name][i] for one in stored])
        for name in (*PATHS, "straightness"):
            row[name] = np.stack([one[name][i] for one in stored])
        row["train_seconds"] = np.stack([one["train_seconds"] for one in stored])
        if i > 0:
            row["pruned_axes"] = stored[0]["pruned_axes"]
            row["acceptance"] = np.stack([one["acceptance"] for one in stored])
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


def page(document: dict[str, Any]) -> str:
    """Markdown: the tables of a summary's content and what stands in them."""
    words = f"{MEASURES['frechet']} after so many evaluations, straightness and cost of the paths"
    seeds = len(document["seeds"])
    spread = f", mean ± sample standard deviation over {seeds} seeds" * (seeds > 1)
    parts = [f"{words}{spread}.", markdown(document["rows"], document["floor"])]
    if document["mixtures"]:
        lines = [
            f"| {name} | " + " | ".join(f"{measures[one]:.3g}" for one in MEASURES) + " |"
            for name, measures in document["mixtures"].items()
        ]
        heads = f"| mixture | {' | '.join(MEASURES.values())} |\n|---|{'---|' * len(MEASURES)}"
        parts += ["Draws of the mixtures themselves, without a flow.", "\n".join([heads, *lines])]
    return "\n\n".join(parts) + "\n"


def markdown(rows: list[dict[str, Any]], floor: dict[str, float], measure: str = "frechet") -> str:
    """One line a source: the measure at every sampler, then how straight its paths are."""
    first = rows[0]
    names = [f"{method} {num}" for method, num in zip(first["methods"], first["evaluations"])]
    lines = [
        f"| source | {' | '.join(names)} | straightness | cost |",
        f"|---|{'---|' * (len(names) + 2)}",
    ]
    for row in rows:
        values = np.asarray(row[measure])
        cells = [cell(values[:, j]) for j in range(values.shape[1])]
        cells += [cell(row["normalised_straightness"]), cell(row["transport_cost"])]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    blank = " |" * (len(names) + 1)
    lines.append(f"| as many training images | {floor[measure]:.3g} |{blank}")
    return "\n".join(lines)
