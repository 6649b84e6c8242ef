"""The image flow as a user calls it: embedded digits, a folder of images, a stop and a resume."""

import json

import numpy as np
import pytest
import tyro
from PIL import Image
from scipy.spatial.distance import cdist
from scripts import run_script
from sklearn.datasets import load_digits

from lib import datasets
from lib.report import plotting
from lib.runs.console import one_line_errors
from xp_transfer_learning import plot
from xp_transfer_learning.data import shaped
from xp_transfer_learning.image_flow import Arguments, chosen, main

SHORT = ["--num_per_class", "10", "--n_epochs", "30", "--record_every", "10"]


def run(results, *arguments):
    script, empty = "xp_transfer_learning/image_flow.py", str(results / "no data")
    run_script(script, "--results", results, *arguments, DATA_ROOT=empty)


@pytest.mark.slow
def test_quick_flows_bring_digits_to_the_target(tmp_path):
    run(tmp_path, "--preset", "quick")
    folders = sorted(p.parent for p in tmp_path.rglob("arrays.npz"))
    assert len(folders) == 2
    for folder in folders:
        arrays = dict(np.load(folder / "arrays.npz"))
        assert arrays["losses"][-1] < 1e-3 * arrays["losses"][0]
        # Every particle ends at a target image, and every target image is met: distances fall
        # from several gray levels per pixel to less than a tenth of one in [0, 1].
        particles, target = (a.reshape(-1, 64) for a in (arrays["particles"][-1], arrays["x_tgt"]))
        squared = cdist(particles, target, "sqeuclidean") / 64
        distances = np.sqrt(squared.min(axis=1))
        assert distances.mean() < 0.1
        summary = json.loads((folder / "summary.json").read_text())
        statistics = {name: getattr(np, name)(distances) for name in ("median", "mean", "max")}
        nearest = summary["root_mean_square_to_nearest_target_image"]
        assert nearest == pytest.approx(statistics, rel=1e-3)
        assert summary["distinct_nearest_target_images"] == len(set(squared.argmin(axis=1)))
        assert summary["losses"]["399"] == arrays["losses"][-1]
        assert len(list((folder / "figures").glob("*.png"))) == 2
        assert json.loads((folder / "config.json").read_text())["num_per_class"] == 60


@pytest.mark.slow
def test_a_folder_of_images_flows(tmp_path):
    """Ten classes flow to the two of the folder."""
    digits, target = load_digits(), tmp_path / "mine"
    for label in (3, 7):
        folder = target / "train" / f"digit {label}"
        folder.mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:12]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    run(tmp_path, "--src_dataset", "digits", "--tgt_dataset", str(target), *SHORT)
    (path,) = tmp_path.rglob("arrays.npz")
    arrays = dict(np.load(path))
    shapes = {name: arrays[name].shape for name in ("particles", "x_tgt", "losses")}
    assert shapes == {"particles": (4, 10, 10, 64), "x_tgt": (2, 10, 64), "losses": (30,)}


@pytest.mark.slow
def test_sliced_mmd_brings_each_class_to_its_own(tmp_path):
    """Of half as many target points, from noise."""
    arguments = ["--src_dataset", "noise", "--tgt_dataset", "digits", "--flow", "sliced_mmd"]
    run(
        tmp_path,
        *arguments,
        *SHORT,
        "--n_epochs",
        "200",
        "--lr",
        "10",
        "--decay",
        "True",
        "--m",
        "0",
    )
    (path,) = tmp_path.rglob("arrays.npz")
    arrays = dict(np.load(path))
    assert arrays["losses"][-1] < 0.03 * arrays["losses"][0]
    for particles, target in zip(arrays["particles"][-1], arrays["x_tgt"]):
        start = cdist(arrays["particles"][0, 0], target).min(axis=1).mean()
        assert cdist(particles, target).min(axis=1).mean() < 0.2 * start
    assert json.loads((path.parent / "config.json").read_text())["flow"] == "sliced_mmd"


def test_settings_of_older_runs_keep_their_names():
    (config, *_) = chosen(Arguments("paper"))
    assert config.without_effect() == ("flow", "directions")
    (other, *_) = chosen(Arguments("paper", flow="sliced_mmd", directions="basis"))
    assert other.without_effect() == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--num_per_class 10 --flow sliced_mmd --n_sample_batch 3", "n_sample_batch is of the wow"),
        ("--src_dataset TWO --num_per_class 5 --flow sliced_mmd", "2 classes, digits 10"),
        ("--src_dataset no_such_set", "no_such_set"),
        ("--num_per_class 999", "fewer than the 999 asked for (--num_per_class)"),
        ("--num_per_class 10 --lr -1", "-1"),
        ("--num_per_class 10 --n_epochs 0", "n_ep"),
    ],
)
def test_bad_arguments_end_in_one_clear_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "no data"))
    for label in "ab":
        (tmp_path / "two/train" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8), i).save(tmp_path / f"two/train/{label}/{i}.png")
    arguments = arguments.replace("TWO", str(tmp_path / "two"))
    named = f"--results {tmp_path} --src_dataset digits --tgt_dataset digits {arguments}".split()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main(tyro.cli(Arguments, args=named))
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert words in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("arrays.npz"))


def test_tiles_keep_every_pixel_and_clip():
    images = np.random.default_rng(0).uniform(-1, 2, (2, 3, 4, 5, 1))
    sheet = plotting.tile_images(images)
    assert sheet.shape == (9, 17, 1)
    for i in range(2):
        for j in range(3):
            tile = sheet[5 * i : 5 * i + 4, 6 * j : 6 * j + 5]
            np.testing.assert_array_equal(tile, np.clip(images[i, j], 0, 1))
    assert np.all(sheet[4] == 1)
    assert np.all(sheet[:, 5] == 1)


def test_a_sheet_names_rows_and_columns_and_nothing_is_cut_off():
    """The least sheet under a long title: all texts lie within the figure."""
    title = "photographs_of_the_night → scikit_learns_digits, 50 per class, and a line more"
    names = {
        "columns": ["step\n0", "nearest\ntarget"],
        "rows": ["circle", "a very long class name"],
    }
    with plotting.style():
        figure = plot.sample_sheet(np.zeros((2, 2, 64)), (8, 8, 1), title, **names)
        figure.draw_without_rendering()
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == [*names["columns"], *names["rows"]]
    boxes = [text.get_window_extent() for text in (*axis.texts, figure._suptitle)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    assert not any(box.overlaps(boxes[-1]) for box in boxes[:-1])


def test_what_is_not_of_the_targets_shape_is_made_so_and_a_line_says_it(capsys):
    images = np.zeros((4, 6, 5, 3), np.uint8)
    source = datasets.Dataset("of two sizes", images, np.zeros(4, np.int32), ("a",))
    for _ in range(2):
        assert shaped(source, (8, 8, 1)).images.shape == (4, 8, 8, 1)
    line = "of two sizes: images of 6 x 5 in color are made 8 x 8 in gray\n"
    assert capsys.readouterr().out == line  # once
    assert shaped(source, source.image_shape) is source
    assert not capsys.readouterr().out


def test_what_bounds_memory_can_be_given():
    arguments = Arguments("paper", block_size=7, n_sample_batch=3)
    for config in chosen(arguments):
        assert (config.block_size, config.n_sample_batch) == (7, 3)
