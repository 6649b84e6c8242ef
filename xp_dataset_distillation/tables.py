"""Tables of accuracies, from stored summaries only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread
from lib.report.tables import Table


def percent(accuracies: Any) -> np.ndarray:
    """Percent: of accuracies [sets, classifiers] or [classifiers] each set's mean over classifiers,
    of one set each classifier's."""
    values = 100 * np.atleast_2d(np.asarray(accuracies, float))
    return values.mean(axis=1) if len(values) > 1 else values[0]


def cell(accuracies: Any) -> str:
    """mean ± sample standard deviation of `percent`."""
    return mean_and_spread(percent(accuracies), ".1f")


def mean(row: dict[str, Any]) -> float:
    return float(np.mean(row["accuracies"]))


def relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `over_random`, the accuracy less that of Random at the same number of images
    and evaluator, and `share_of_whole`, the ratio to the whole set's; None where these are not
    there.
    """
    base = {(row["label"], row["images_per_class"], row["evaluator"]): mean(row) for row in rows}
    whole = {row["evaluator"]: mean(row) for row in rows if row["label"] == "whole set"}
    compared = []
    for row in rows:
        random = base.get(("Random", row["images_per_class"], row["evaluator"]))
        of_whole = whole.get(row["evaluator"])
        compared.append(
            row
            | {
                "over_random": None if random is None else mean(row) - random,
                "share_of_whole": None if not of_whole else mean(row) / of_whole,
            }
        )
    return compared


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """For each evaluator one table: a row per method, accuracies by images per class, and minutes
    of condensation where they are known."""
    of = "classifiers"
    if len(summary["seeds"]) > 1:
        of = "sets (of the means over their classifiers)"
    caption = f"Accuracy in percent on {summary['evaluated_on']}, mean ± sample standard deviation"
    compared, made = relative(summary["rows"]), []
    for evaluator in dict.fromkeys(row["evaluator"] for row in compared):
        these = [row for row in compared if row["evaluator"] == evaluator]
        numbers = sorted({row["images_per_class"] for row in these if row["images_per_class"]})
        timed = any("minutes" in row for row in these)
        lines = []
        for label in dict.fromkeys(row["label"] for row in these):
            by_number = {row["images_per_class"]: row for row in these if row["label"] == label}
            if None in by_number:
                cells = [cell(by_number[None]["accuracies"])] + [""] * (len(numbers) - 1)
                lines.append([label, *cells, "", "100%", *[""] * timed])
                continue
            cells = [cell(by_number[n]["accuracies"]) if n in by_number else "" for n in numbers]
            listed = [by_number[number] for number in numbers if number in by_number]
            over = _joined(listed, "over_random", "{:+.1f}", scale=100)
            share = _joined(listed, "share_of_whole", "{:.0f}%", scale=100)
            minutes = [_joined(listed, "minutes", "{:.0f}")] * timed
            lines.append([label, *cells, over, share, *minutes])
        heads = [evaluator, *(f"{number} per class" for number in numbers)]
        heads += ["over Random", "of the whole set", *["minutes per set"] * timed]
        made.append(Table(heads, lines, f"{caption} over {of}."))
    return made


def _joined(rows: list[dict[str, Any]], name: str, form: str, *, scale: float = 1.0) -> str:
    """Of each row its value, or the mean of its values, times `scale`; "" where there is none."""
    values = [row.get(name) for row in rows]
    if all(value is None for value in values):
        return ""
    texts = ["" if v is None else form.format(scale * float(np.mean(v))) for v in values]
    return " / ".join(texts)
