import json

import numpy as np

from xp_transfer_learning import plot
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


def test_a_line_a_row(tmp_path):
    row = {"source": "mnist", "target": "usps", "k": 5, "method": "mmdsw"}
    row["training"] = {"n_epochs": 50, "lr": 1e-3, "labelling": "transport"}
    # Two tries of two trainings; the first record does not count.
    row["accuracies"] = [[[0.1, 0.1], [0.7, 0.8]], [[0.1, 0.1], [0.5, 0.6]]]
    training = {"n_epochs": 1650, "lr": 3e-4, "labelling": "axis"}
    alone = row | {"method": "target_only", "training": training}
    path = tmp_path / "summary.json"
    k10 = row | {"k": 10, "label_agreement": [0.7149, 0.998]}
    k100 = row | {"k": 100, "label_agreement": [1.0, 0.996]}
    axis = row | {"training": row["training"] | {"labelling": "axis"}}
    path.write_text(json.dumps({"rows": [alone, axis, k100, k10, row]}))
    _, _, first, by_axis, second, ten, hundred = transfer_table([path]).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        "mnist → usps", "5", "mmdsw", "50", "transport", "65.0 ± 11.2", "10.0", "73.0 ± 1.0"
    ]  # fmt: skip
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells[2:5] == ["target_only", "1,650, Adam 0.0003", "-"]
    assert cells[-1] == ""
    assert by_axis.endswith("| axis | 65.0 ± 11.2 | 10.0 |  |")
    assert "| 10 | mmdsw | 50 | transport (71 to 100%) |" in ten
    assert "| 100 | mmdsw | 50 | transport (100%) |" in hundred


def test_a_line_an_option(tmp_path):
    row = {"option": "ours", "settings": {"lr": 20.0}, "seconds_per_step": 0.02}
    row |= {"to_objective": [700, 800], "to_accuracy": [300, None]}
    row |= {"last_losses": [0.003, 0.005], "last_accuracies": [0.98, 0.99]}
    gone = {"option": "L-BFGS", "settings": {"lr": 0.1}, "diverged": "NaN in step 3"}
    about = {"arguments": {"objective": 0.05, "accuracy": 0.99}, "rows": [row, gone]}
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(about))
    head, _, first, second = ablation_table(path).splitlines()
    assert "to 5% of the loss" in head
    assert "accuracy of 99%" in head
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == [
        "ours", "20", "20", "750 ± 50", "15.0", "-", "-", "4.0e-03 ± 1e-03", "98.5 ± 0.5"
    ]  # fmt: skip
    assert second.startswith("| L-BFGS | 0.1 | diverged |")
    assert second.count("|") == head.count("|")


def test_sheets_show_the_first_record_the_last_and_more_early_ones():
    steps = np.arange(0, 2001, 50)
    chosen = plot.early_and_late(steps, 6)
    assert list(steps[chosen]) == [0, 50, 150, 350, 800, 2000]
    assert list(plot.early_and_late(np.array([0, 7]))) == [0, 1]
