"""Tables of results, and that READMEs show what these make of the published numbers."""

import json
import re

import numpy as np
import pytest
from scripts import REPOSITORY

from xp_data_mixing import language
from xp_data_mixing.study import tables as data_mixing
from xp_dataset_distillation import tables as distillation
from xp_drmmd import tables as drmmd
from xp_gmm_source import tables as gmm_source
from xp_transfer_learning import controls, plot
from xp_transfer_learning.tables import (
    PUBLISHED_TRANSFER,
    ablation_table,
    published_transfer,
    transfer_table,
)


def test_published_numbers_are_those_of_the_paper():
    assert published_transfer("mnist", "usps", 10, "mmdsw") == (77.2, 1.2)
    assert published_transfer("mnist", "fashion_mnist", 1, "target_only") == (26.0, 5.3)
    assert published_transfer("mnist", "kmnist", 5, "mmd_product") == (39.0, 1.0)
    assert published_transfer("mnist", "usps", 100, "otdd") is None
    assert published_transfer("digits", "usps", 1, "mmdsw") is None
    assert published_transfer("mnist", "my_images", 1, "mmdsw") is None
    assert all(set(cells) == {1, 5, 10, 100} for cells in PUBLISHED_TRANSFER.values())


def test_a_line_a_row():
    row = {"source": "mnist", "target": "usps", "k": 5, "method": "mmdsw"}
    row["training"] = {"num_epochs": 50, "learning_rate": 1e-3, "labelling": "transport"}
    # Two tries of two trainings; the first record does not count.
    row["accuracies"] = [[[0.1, 0.1], [0.7, 0.8]], [[0.1, 0.1], [0.5, 0.6]]]
    training = {"num_epochs": 1650, "learning_rate": 3e-4, "labelling": "axis"}
    target_only = row | {"method": "target_only", "training": training}
    k10 = row | {"k": 10, "label_agreement": [0.7149, 0.998]}
    k100 = row | {"k": 100, "label_agreement": [1.0, 0.996]}
    axis = row | {"training": row["training"] | {"labelling": "axis"}}
    first, by_axis, second, ten, hundred = transfer_table([target_only, axis, k100, k10, row]).rows
    cells = ["65.0 ± 12.9", "14.1", "73.0 ± 1.0"]
    assert first == ["mnist → usps", "5", "mmdsw", "50", "transport", *cells]
    assert second[2:5] == ["target_only", "1,650, Adam 0.0003", "-"]
    assert second[-1] == ""
    assert by_axis[4:] == ["axis", *cells[:2], ""]
    assert (ten[1], ten[4]) == ("10", "transport (71 to 100%)")
    assert (hundred[1], hundred[4]) == ("100", "transport (100%)")


def test_a_line_an_option():
    row = {"option": "ours", "settings": {"step_size": 20.0}, "seconds_per_step": 0.02}
    row |= {"to_objective": [700, 800], "to_accuracy": [300, None]}
    row |= {"last_losses": [0.003, 0.005], "last_accuracies": [0.98, 0.99]}
    gone = {"option": "L-BFGS", "settings": {"step_size": 0.1}, "diverged": "NaN in step 3"}
    table = ablation_table([row, gone], objective=0.05, accuracy=0.99)
    assert "to 5% of the loss" in table.heads[3]
    assert "accuracy of 99%" in table.heads[5]
    assert table.rows[0] == [
        "ours", "20", "20", "750 ± 71", "15.0", "-", "-", "4.0e-03 ± 1e-03", "98.5 ± 0.7"
    ]  # fmt: skip
    assert table.rows[1] == ["L-BFGS", "0.1", "diverged", *[""] * 6]


def test_sheets_show_the_first_record_the_last_and_more_early_ones():
    steps = np.arange(0, 2001, 50)
    chosen = plot.early_and_late(steps, 6)
    assert list(steps[chosen]) == [0, 50, 150, 350, 800, 2000]
    assert list(plot.early_and_late(np.array([0, 7]))) == [0, 1]


CELL = re.compile(r"(-?[\d.]+(?:e[-+]\d+)?) ± ([\d.]+(?:e[-+]\d+)?)(?: \[(\S+), (\S+)\])?")


def summaries(experiment, pattern="*.json"):
    """{name: what is stored} of the published ones."""
    paths = sorted((REPOSITORY / experiment / "published").glob(pattern))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def rows_of(text):
    """The lines of tables that have a spread."""
    return [line for line in text.splitlines() if line.startswith("|") and "±" in line]


def tables_of(experiment):
    """All that this experiment's tables make of its published summaries."""
    stored = summaries(experiment, "*_paper.json" if experiment == "xp_data_mixing" else "*.json")
    if experiment == "xp_transfer_learning":
        (ablation,) = (one for name, one in stored.items() if name.startswith("ablation"))
        levels = {name: ablation["arguments"][name] for name in ("objective", "accuracy")}
        rows = [r for name, one in stored.items() if name[:9] == "transfer_" for r in one["rows"]]
        arms = [controls.table(one["rows"]) for name, one in stored.items() if "controls" in name]
        return [ablation_table(ablation["rows"], **levels), transfer_table(rows), *arms]
    if experiment == "xp_drmmd":
        by_rings = drmmd.table(stored["rings_paper"], w1=0.0105)
        by_kl = drmmd.table(stored["gaussian_paper"], names=("kl",))
        return [*map(drmmd.table, stored.values()), by_rings, by_kl]
    make = {
        "xp_data_mixing": lambda summary: (
            language.tables(summary["rows"])
            if summary["group"] == "language"
            else data_mixing.tables(summary)
        ),
        "xp_gmm_source": gmm_source.tables,
        "xp_dataset_distillation": distillation.tables,
    }[experiment]
    return [table for summary in stored.values() for table in make(summary)]


def lines_of(tables):
    return set("\n".join(table.markdown() for table in tables).splitlines())


def by_hand():
    """{beginning of a README's row: its cells' values}, of the tables that no function makes."""
    cells, titles = {}, {"momentum": "riesz, τ = .01, 251 steps", "decay": "riesz, τ from .1 to 0"}
    (rings,) = summaries("xp_transfer_learning", "rings*.json").values()
    for row in rings["rows"]:
        kernel = titles.get(row["kernel"], row["kernel"])
        start = f"| {kernel} | {row['parameter']} = {row['value']:g} |"
        cells.setdefault(start, []).append(row["last_losses"])
    for name, stored in summaries("xp_transfer_learning", "adaptation*.json").items():
        cells[name] = dict(zip(stored["steps"], 100 * np.array(stored["accuracies"]).T))
    return cells


@pytest.mark.parametrize(
    "experiment", ["xp_data_mixing", "xp_drmmd", "xp_gmm_source", "xp_dataset_distillation"]
)
def test_rows_of_the_readmes_are_made_of_the_published_numbers(experiment):
    shown = rows_of((REPOSITORY / experiment / "README.md").read_text())
    tables = tables_of(experiment)
    assert shown
    assert not set(shown) - lines_of(tables)
    for table in tables:
        assert table.caption.endswith(".")
        assert {len(row) for row in table.rows} == {len(table.heads)}


def test_rows_of_transfer_learning_are_made_of_the_published_numbers():
    text = (REPOSITORY / "xp_transfer_learning" / "README.md").read_text()
    made, hand = lines_of(tables_of("xp_transfer_learning")), by_hand()
    pairs, before = [], ""
    for line in text.splitlines():
        if "→ MNIST, step |" in line:
            name = line.split()[1].lower().replace("-", "_")
            numbers = [int(cell.replace(",", "")) for cell in line.strip("|").split("|")[1:]]
            before = [hand[f"adaptation_{name}-mnist"][number] for number in numbers]
        if line.startswith("| ours |") and line not in made:
            pairs.append((line, before))
        elif line in rows_of(line) and line not in made:
            pairs.append((line, hand[line[: line.index("|", line.index("|", 2) + 1) + 1]]))
    assert len(pairs) == 26 + 3
    for line, samples in pairs:
        cells = CELL.findall(line)
        assert len(cells) == len(samples), line
        for cell, values in zip(cells, samples):
            ours = np.mean(values), np.std(values, ddof=1), np.min(values), np.max(values)
            for text, number in zip(filter(None, cell), ours):
                kind = ".0e" if re.fullmatch(r"\d+e.*", text) else ".1e" if "e" in text else ""
                kind = kind or f".{len(text.partition('.')[2])}f"
                assert float(f"{number:{kind}}") == float(text), (line, text, number)


def test_spreads_of_the_large_tables_are_those_of_the_others():
    cells = []
    for path in REPOSITORY.glob("xp_*/README.md"):
        cells += [(float(a), float(b)) for a, b, *_ in CELL.findall(path.read_text())]
    large = "".join((REPOSITORY / name).read_text() for name in ("README.md", "docs/results.md"))
    assert len(CELL.findall(large)) > 5
    for mean, deviation, *_ in CELL.findall(large):
        digits = [len(text.partition(".")[2]) for text in (mean, deviation)]
        shown = {tuple(round(x, n) for x, n in zip(cell, digits)) for cell in cells}
        assert (float(mean), float(deviation)) in shown
