"""Tables of accuracies, from stored summaries only."""

from typing import Any

import numpy as np

from lib.report.spreads import mean_and_spread


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


def page(document: dict[str, Any]) -> str:
    """Markdown: the tables of a summary's content and what stands in them."""
    of = "classifiers"
    if len(document["seeds"]) > 1:
        of = "sets (of the means over their classifiers)"
    words = f"Accuracy in percent on {document['evaluated_on']}, mean ± sample standard deviation"
    words += f" over {of}."
    return f"{words}\n\n{markdown(document['rows'])}\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    """For each evaluator one table: a line per method, accuracies by images per class."""
    parts = []
    for evaluator in dict.fromkeys(row["evaluator"] for row in rows):
        these = [row for row in relative(rows) if row["evaluator"] == evaluator]
        numbers = sorted({row["images_per_class"] for row in these if row["images_per_class"]})
        heads = [f"{number} per class" for number in numbers]
        lines = [
            f"| {evaluator} | {' | '.join(heads)} | over Random | of the whole set |",
            f"|---|{'---|' * (len(heads) + 2)}",
        ]
        for label in dict.fromkeys(row["label"] for row in these):
            by_number = {row["images_per_class"]: row for row in these if row["label"] == label}
            if None in by_number:
                cells = [cell(by_number[None]["accuracies"])] + [""] * (len(numbers) - 1)
                lines.append(f"| {label} | {' | '.join(cells)} | | 100% |")
                continue
            cells = [cell(by_number[n]["accuracies"]) if n in by_number else "" for n in numbers]
            over = _joined(by_number, numbers, "over_random", "{:+.1f}")
            share = _joined(by_number, numbers, "share_of_whole", "{:.0f}%")
            lines.append(f"| {label} | {' | '.join(cells)} | {over} | {share} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _joined(by_number, numbers, name, form) -> str:
    values = [by_number[n][name] for n in numbers if n in by_number]
    return " / ".join("" if value is None else form.format(100 * value) for value in values)
