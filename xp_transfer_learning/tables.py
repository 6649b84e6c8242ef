"""Tables of this experiment, from stored summaries only, beside the published numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from lib.report.spreads import mean_and_spread, spread
from lib.report.tables import Table
from xp_transfer_learning.config import METHODS, Labelling, TrainingConfig

# Bonet et al. (2025), Table 2: accuracy in percent and its standard deviation, which leaves out the
# draw of the data. By target and k: target only, MMDSW, OTDD, product kernel.
PUBLISHED_METHODS = ("target_only", "mmdsw", "otdd", "mmd_product")
PUBLISHED_TRANSFER: dict[str, dict[int, tuple[tuple[float, float] | None, ...]]] = {
    "fashion_mnist": {
        1: ((26.0, 5.3), (40.5, 4.7), (30.5, 4.2), (36.4, 3.3)),
        5: ((38.5, 6.7), (61.5, 4.6), (59.7, 1.8), (62.7, 1.1)),
        10: ((53.9, 7.9), (65.4, 1.5), (64.0, 1.4), (66.2, 1.0)),
        100: ((71.1, 1.5), (74.7, 0.8), None, (73.5, 0.7)),
    },
    "kmnist": {
        1: ((18.4, 3.1), (20.9, 2.0), (18.8, 2.1), (19.4, 1.9)),
        5: ((25.9, 4.0), (37.4, 2.2), (31.3, 1.4), (39.0, 1.0)),
        10: ((30.9, 4.6), (44.7, 1.8), (34.1, 0.9), (44.1, 1.2)),
        100: ((60.1, 1.1), (66.8, 0.8), (66.3, 0.9), (62.4, 1.2)),
    },
    "usps": {
        1: ((32.4, 7.9), (37.4, 6.1), (39.5, 7.9), (35.0, 5.6)),
        5: ((51.4, 9.8), (73.0, 1.0), (73.3, 1.4), (69.6, 1.3)),
        10: ((60.3, 10.1), (77.2, 1.2), (72.7, 2.7), (75.6, 1.2)),
        100: ((87.5, 0.7), (89.7, 0.4), None, (88.1, 0.6)),
    },
}


def published_transfer(source: str, target: str, k: int, method: str) -> tuple[float, float] | None:
    """(mean, std) in percent, or None where there is none."""
    if source != "mnist":
        return None
    cell = PUBLISHED_TRANSFER.get(target, {}).get(k)
    return cell[PUBLISHED_METHODS.index(method)] if cell else None


def rings_table(rows: Sequence[Mapping[str, Any]], num_seeds: int) -> Table:
    """The last losses of `rings.py` beside the published ones."""
    over = f"mean ± sample standard deviation over {num_seeds} seeds (data and directions)"
    lines = [
        [
            row["kernel"],
            f"{row['parameter']} = {row['value']:g}",
            row["estimator"],
            mean_and_spread(np.asarray(row["last_losses"]), ".2e", ".1e"),
            "" if row["published"] is None else f"{row['published']:.3f}",
        ]
        for row in rows
    ]
    return Table(
        ["kernel", "parameter", "estimator", "last loss", "published"],
        lines,
        f"Last loss F = MMD²/2, {over if num_seeds > 1 else 'one seed'}; published: one run.",
    )


def adaptation_table(pair: str, steps: np.ndarray, accuracies: np.ndarray) -> Table:
    """The accuracies [tries, T] of `domain_adaptation.py` in percent along the flow."""
    tries = len(accuracies)
    over = f", mean ± sample standard deviation over {tries} draws" if tries > 1 else ""
    lines = [
        [f"{int(step):,}", mean_and_spread(column, ".1f")]
        for step, column in zip(steps, 100 * np.asarray(accuracies).T)
    ]
    return Table(["step", "accuracy"], lines, f"{pair}, accuracy in percent{over}.")


def transfer_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each target, k, method and way of training, in that order.

    Accuracy in percent at the end of the flow: mean and sample standard deviation over all tries
    and trainings, then that of the tries' means. Behind the labelling, the least and
    greatest percentage of labels that are right, over the tries, where the summary has them.
    """
    lines = []
    for row in sorted(rows, key=_place):
        training = row["training"]
        last = 100 * np.asarray(row["accuracies"])[:, -1]
        unflowed = row["method"] == "target_only"
        labelling = training["labelling"]
        labels = "-" if unflowed else labelling
        if not unflowed and "label_agreement" in row:
            least, most = (f(100 * np.asarray(row["label_agreement"])) for f in (np.min, np.max))
            span = f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"
            labels += f" ({span}%)"
        published = published_transfer(row["source"], row["target"], row["k"], row["method"])
        # The paper trains for as many epochs without flowed images, and does not label by position.
        other_epochs = training["num_epochs"] != TrainingConfig.num_epochs
        if (unflowed and other_epochs) or (not unflowed and labelling == "axis"):
            published = None
        rate = (
            ""
            if training["learning_rate"] == TrainingConfig.learning_rate
            else f", Adam {training['learning_rate']:g}"
        )
        cells = [f"{row['source']} → {row['target']}", str(row["k"]), row["method"]]
        cells += [f"{training['num_epochs']:,}{rate}", labels, mean_and_spread(last, ".1f")]
        cells.append(f"{spread(last.mean(axis=1)):.1f}" if len(last) > 1 else "-")
        cells.append("" if published is None else f"{published[0]} ± {published[1]}")
        lines.append(cells)
    heads = ["flow", "k", "method", "epochs", "labels", "accuracy", "std of tries' means"]
    return Table(
        [*heads, "published"],
        lines,
        "Accuracy in percent at the end of the flow, mean ± sample standard deviation over all "
        "tries and trainings.",
    )


def ablation_table(
    rows: Iterable[Mapping[str, Any]], *, objective: float, accuracy: float
) -> Table:
    """A row per option of `ablation.py`. Steps and seconds of flowing until the objective is the
    given share of its start, and until the accuracy is the given one: mean and sample standard
    deviation over the tries, "-" unless all arrived; then loss and accuracy at the end."""
    heads = ["option", "step size", "ms per step", f"to {100 * objective:g}% of the loss, steps"]
    heads += ["seconds", f"to an accuracy of {100 * accuracy:g}%, steps", "seconds"]
    return Table(
        [*heads, "last loss", "last accuracy"],
        [ablation_cells(row) for row in rows],
        "Options of the flow, mean ± sample standard deviation over tries.",
    )


def ablation_cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["option"], f"{row['settings']['step_size']:g}"]
    if "diverged" in row:
        return [*cells, "diverged", *[""] * 6]
    pace = row["seconds_per_step"]
    cells.append(f"{1e3 * pace:.0f}")
    for steps in (row["to_objective"], row["to_accuracy"]):
        if None in steps:
            cells += ["-", "-"]
        else:
            cells.append(mean_and_spread(steps, ".0f"))
            cells.append(f"{np.mean(steps) * pace:.1f}")
    losses, accuracies = np.array(row["last_losses"]), 100 * np.array(row["last_accuracies"])
    cells.append(mean_and_spread(losses, ".1e", ".0e"))
    return [*cells, mean_and_spread(accuracies, ".1f")]


def _place(row: Mapping[str, Any]) -> tuple:
    training = row["training"]
    method = list(METHODS).index(row["method"])
    labelling = get_args(Labelling).index(training["labelling"])
    place = row["source"], row["target"], row["k"], method, labelling
    return (*place, -training["learning_rate"], training["num_epochs"])
