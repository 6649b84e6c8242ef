"""A mixing result as the JSON document that is written, and that document as text, figure, page."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib import runs
from lib.report import _html as html
from lib.rows.files import RowFile, path_and_key
from lib.runs.files import write_bytes
from xp_data_mixing.mixing import MixingResult

TEMPLATE = Path(__file__).with_name("report.html.j2")
NEGLIGIBLE = 0.02
"""A weight up to which a source can be left out."""
LARGEST_FIGURE = 40
"""Sources that the figure shows, those of largest weight."""
MIXTURES = {
    "uniform": "equal",
    "size_proportional": "by size",
    "best_single": "best single",
    "optimal": "optimal",
}


def labels(paths: Sequence[str]) -> list[str]:
    """The files' names without suffix, or with as many folders as tell them apart."""
    files = [path_and_key(path) for path in paths]
    stems = [path.with_suffix("") for path, _ in files]
    parts = [
        stem.parts if key is None else (*stem.parent.parts, f"{stem.name}:{key}")
        for stem, (_, key) in zip(stems, files)
    ]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def document(
    result: MixingResult,
    files: tuple[Sequence[RowFile], Sequence[RowFile]],
    *,
    experiment_name: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is known of the weights, for `write_json`. MMDs are squared."""
    train, val = files
    names = labels([file.name for file in train])
    environment = runs.environment()
    intervals = result.intervals
    ratios = {
        name: {
            "weight": weight,
            "percentage": 100 * weight,
            "file_path": file.name,
            "interval": None if intervals is None else intervals[i].tolist(),
            "leave_one_out_cost": _finite(result.leave_one_out_costs[i]),
            "rows": file.shape[0],
            "verdict": verdict(weight, None if intervals is None else intervals[i]),
        }
        for i, (name, file, weight) in enumerate(zip(names, train, result.weights.tolist()))
    }
    positive = result.weights[result.weights > 0]
    return {
        "experiment_name": experiment_name,
        "timestamp": environment["time"],
        "total_weight": float(result.weights.sum()),
        "mixing_ratios": ratios,
        "summary": {
            "num_train_datasets": len(train),
            "num_val_datasets": len(val),
            "largest_weight": names[int(np.argmax(result.weights))],
            "sets_with_weight": len(positive),
            "effective_sets": float(np.exp(-positive @ np.log(positive))),
            "confidence": None if intervals is None else options["confidence"],
        },
        "features": None
        if result.choice is None
        else {"chosen": result.choice.name, "recovery_errors": dict(result.choice.errors)},
        "file_paths": {
            "train": [file.name for file in train],
            "validation": [file.name for file in val],
        },
        "mmd_squared": result.mmd_squared._asdict(),
        "held_out_mmd_squared": None if result.held_out is None else result.held_out._asdict(),
        "best_single": names[result.best_single],
        "certificate": {
            "objective": result.objective,
            "frank_wolfe_gap": result.gap,
            "condition_number": _finite(result.condition),
            "diagonal_shift": result.diagonal_shift,
            "unidentifiable_directions": result.unidentifiable,
            "signal_to_noise": result.signal_to_noise.tolist(),
        },
        "warnings": list(result.warnings),
        "manifest": {
            "sigma": result.bandwidth,
            "seed": options["random_seed"],
            "options": options,
            "mean_kernel_value": _finite(result.kernel_mean),
            "files": [
                {
                    "path": file.name,
                    "shape": list(file.shape),
                    "dtype": file.dtype.name,
                    "content": file.fingerprint(),
                }
                for file in [*train, *val]
            ],
            "environment": environment,
        },
    }


def verdict(weight: float, interval: Any) -> str | None:
    """Whether the target needs a source, in words; None without an interval."""
    if interval is None:
        return None
    low, high = interval
    if low > 0:
        return f"needed: {low:.1%} or more"
    if high <= NEGLIGIBLE:
        return f"can be left out: {high:.1%} at most"
    return f"not settled: 0 to {high:.1%}"


def _finite(value):
    return float(value) if math.isfinite(value) else None


def text(document: dict[str, Any]) -> str:
    """A table of the weights, MMD^2 of mixtures, warnings."""
    ratios, confidence = document["mixing_ratios"], document["summary"]["confidence"]
    width = max(map(len, ratios))
    lines = []
    for name, row in ratios.items():
        line = f"{name:{width}}  {row['weight']:.4f}"
        if row["interval"] is not None:
            line += "  [{:.4f}, {:.4f}]  {}".format(*row["interval"], row["verdict"])
        lines.append(line)
    if confidence is not None:
        lines.append(f"(intervals at {confidence:g})")
    for title, key in (("MMD^2", "mmd_squared"), ("held out", "held_out_mmd_squared")):
        if document[key] is not None:
            values = (f"{MIXTURES[name]} {value:.3e}" for name, value in document[key].items())
            lines.append(f"{title}: {', '.join(values)}")
    if document["features"] is not None:
        lines.append(f"features: {document['features']['chosen']}")
    certificate = document["certificate"]
    lines.append(
        f"objective {certificate['objective']:.6e}, at most {certificate['frank_wolfe_gap']:.1e} "
        f"above the minimum; sigma {document['manifest']['sigma']:.4g}, "
        f"seed {document['manifest']['seed']}"
    )
    return "\n".join(lines + [f"warning: {warning}" for warning in document["warnings"]])


def figure(document: dict[str, Any]) -> Any:
    """Weights with intervals, what each source is worth, and MMD^2 of the mixtures."""
    from matplotlib import pyplot as plt

    from lib.report import plotting

    rows = sorted(document["mixing_ratios"].items(), key=lambda item: -item[1]["weight"])
    rows = rows[:LARGEST_FIGURE]
    total = sum(row["rows"] for row in document["mixing_ratios"].values())
    places = np.arange(len(rows))[::-1]
    height = max(2.6, 0.9 + 0.24 * len(rows))
    with plotting.style():
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(10, height), width_ratios=(3, 2, 2)
        )
        for place, (_, row) in zip(places, rows):
            if row["interval"] is not None:
                left.plot(
                    row["interval"], [place] * 2, lw=5, color="C0", alpha=0.3, solid_capstyle="butt"
                )
        weights = [row["weight"] for _, row in rows]
        left.plot(weights, places, "o", ms=5, color="C0", label="weight", zorder=3)
        shares = [row["rows"] / total for _, row in rows]
        left.plot(shares, places, "|", ms=9, color="C1", label="by size", zorder=2)
        left.axvline(1 / len(document["mixing_ratios"]), lw=0.8, ls=":", color="0.5", label="equal")
        left.set_yticks(places, [name for name, _ in rows])
        left.set_xlim(left=-0.02)
        left.set_xlabel("weight")
        confidence = document["summary"]["confidence"]
        left.set_title("weights" if confidence is None else f"weights, intervals at {confidence:g}")
        left.legend(fontsize=7)

        values = [row["leave_one_out_cost"] for _, row in rows]
        middle.barh(places, [value or 0.0 for value in values], height=0.6, color="C2")
        for place, value in zip(places, values):
            if value is None:
                middle.text(0, place, " no weights without it", va="center", fontsize=7)
        middle.set_yticks(places, [])
        middle.set_ylim(left.get_ylim())
        middle.set_title("objective's rise without the source")
        middle.set_xlabel("MMD²")
        middle.ticklabel_format(axis="x", scilimits=(-2, 2))

        bars = np.arange(len(MIXTURES))[::-1]
        right.barh(bars + 0.2, document["mmd_squared"].values(), 0.36, color="C0", label="fitted")
        if document["held_out_mmd_squared"] is not None:
            held = document["held_out_mmd_squared"].values()
            right.barh(bars - 0.2, held, 0.36, color="C4", label="held out")
            right.axvline(0, lw=0.6, color="0.3")
            right.legend(fontsize=7)
        right.set_yticks(bars, MIXTURES.values())
        right.set_ylim(3.6 - max(4.2, 0.4 * len(rows)), 3.6)
        right.set_title("squared distance to the target")
        right.set_xlabel("MMD²")
        right.ticklabel_format(axis="x", scilimits=(-2, 2))
    return figure


def page(document: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    from lib.report import plotting

    with tempfile.TemporaryDirectory() as folder:
        image = plotting.save_figure(figure(document), Path(folder, "figure.png")).read_bytes()
    shown = {
        "figure": html.data_uri(image, "PNG"),
        "manifest_text": json.dumps(document["manifest"], indent=2, default=str),
        "mixtures": MIXTURES,
        "intervals": document["summary"]["confidence"] is not None,
    }
    return html.render(TEMPLATE, document | shown)


def write(document: dict[str, Any], path: Path) -> None:
    """The page where the suffix is .html, else the figure; atomically."""
    from lib.report import plotting

    if path.suffix == ".html":
        write_bytes(path, page(document).encode())
    else:
        plotting.save_figure(figure(document), path)
