"""The image flow as a user calls it: embedded digits, a folder of images, a stop and a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from sklearn.datasets import load_digits

from lib.report import plotting
from lib.runs.console import one_line_errors
from xp_transfer_learning.image_flow import Arguments, chosen, main

REPOSITORY = Path(__file__).parents[2]
SHORT = ["--num_per_class", "10", "--n_epochs", "30", "--record_every", "10"]


def command(results, *arguments):
    script = "xp_transfer_learning/image_flow.py"
    return [sys.executable, script, "--results", str(results), *arguments]


def run(results, *arguments):
    return subprocess.run(
        command(results, *arguments),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "DATA_ROOT": str(results / "no data")},
    )


def final(results):
    (path,) = results.rglob("arrays.npz")
    return dict(np.load(path))


@pytest.mark.slow
def test_quick_flows_bring_digits_to_the_target(tmp_path):
    done = run(tmp_path, "--preset", "quick")
    assert done.returncode == 0, done.stderr
    folders = sorted(p.parent for p in tmp_path.rglob("arrays.npz"))
    assert len(folders) == 2
    for folder in folders:
        arrays = dict(np.load(folder / "arrays.npz"))
        assert arrays["losses"][-1] < 1e-3 * arrays["losses"][0]
        # Every particle ends at a target image, and every target image is met: distances fall
        # from several grey levels a pixel to less than a tenth of one in [0, 1].
        particles, target = (a.reshape(-1, 64) for a in (arrays["particles"][-1], arrays["x_tgt"]))
        squared = ((particles[:, None] - target[None]) ** 2).mean(axis=-1)
        distances = np.sqrt(squared.min(axis=1))
        assert distances.mean() < 0.1
        summary = json.loads((folder / "summary.json").read_text())
        found = summary["root_mean_square_to_nearest_target_image"]
        expected = {"median": np.median(distances), "mean": distances.mean()}
        expected["max"] = distances.max()
        assert found == pytest.approx(expected, rel=1e-3)
        assert summary["distinct_nearest_target_images"] == len(set(squared.argmin(axis=1)))
        assert summary["losses"]["399"] == arrays["losses"][-1]
        assert len(list((folder / "figures").glob("*.png"))) == 2
        assert json.loads((folder / "config.json").read_text())["num_per_class"] == 60


@pytest.fixture
def image_folder(tmp_path):
    digits = load_digits()
    for label in (3, 7):
        folder = tmp_path / "mine" / "train" / f"digit {label}"
        folder.mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:12]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "mine"


@pytest.mark.slow
def test_a_folder_of_images_flows(tmp_path, image_folder):
    """Ten classes flow to the two of the folder."""
    done = run(tmp_path, "--src_dataset", "digits", "--tgt_dataset", str(image_folder), *SHORT)
    assert done.returncode == 0, done.stderr
    arrays = final(tmp_path)
    assert arrays["particles"].shape == (4, 10, 10, 64)
    assert arrays["x_tgt"].shape == (2, 10, 64)
    assert arrays["losses"].shape == (30,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--src_dataset", "no_such_set"), "no_such_set"),
        (("--src_dataset", "digits", "--tgt_dataset", "digits", "--num_per_class", "999"), "999"),
        (("--src_dataset", "digits", "--tgt_dataset", "digits", *SHORT, "--lr", "-1"), "-1"),
        (("--src_dataset", "digits", "--tgt_dataset", "digits", *SHORT, "--n_epochs", "0"), "n_ep"),
    ],
)
def test_bad_arguments_end_in_one_clear_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "no data"))
    arguments = tyro.cli(Arguments, args=["--results", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main(arguments)
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert words in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("arrays.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_flow_resumes_to_the_same_bits(tmp_path, number):
    arguments = ("--src_dataset", "digits", "--tgt_dataset", "digits:inverted", *SHORT)
    arguments = (*arguments, "--n_epochs", "3000")
    assert run(tmp_path / "whole", *arguments).returncode == 0
    stopped = subprocess.Popen(
        command(tmp_path / "stopped", *arguments),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The flow's own first line; it takes some seconds from there, with its compilation.
    assert any(" 0/3000 " in line for line in stopped.stderr)
    time.sleep(1)
    stopped.send_signal(number)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode != 0
    assert not list(tmp_path.glob("stopped/**/arrays.npz"))
    if number == signal.SIGINT:
        assert "resume" in errors.strip().splitlines()[-1]
        assert list(tmp_path.glob("stopped/**/checkpoint.npz"))
    assert run(tmp_path / "stopped", *arguments).returncode == 0
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "stopped")
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], strict=True)


def test_tiles_keep_every_pixel_and_clip():
    images = np.random.default_rng(0).uniform(-1, 2, (2, 3, 4, 5, 1))
    sheet = plotting.tile_images(images, padding=1)
    assert sheet.shape == (9, 17, 1)
    for i in range(2):
        for j in range(3):
            tile = sheet[5 * i : 5 * i + 4, 6 * j : 6 * j + 5]
            np.testing.assert_array_equal(tile, np.clip(images[i, j], 0, 1))
    assert np.all(sheet[4] == 1)
    assert np.all(sheet[:, 5] == 1)


def test_what_bounds_memory_can_be_given():
    arguments = Arguments("paper", block_size=7, n_sample_batch=3)
    for config in chosen(arguments):
        assert (config.block_size, config.n_sample_batch) == (7, 3)
