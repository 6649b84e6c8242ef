"""The one "mean ± spread", against Python's own statistics; parts of figures."""

import re
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from PIL import Image
from scripts import REPOSITORY

from lib.report import plotting
from lib.report.spreads import mean_and_spread, spread, standard_error

# What is standardized, or drawn as wide as the target: no spread of results.
COMPUTED = {"xp_dataset_distillation/moments.py", "xp_drmmd/problems.py"}
ROW = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


@settings(max_examples=20)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_spreads_are_those_of_the_sample(rows):
    for values, axis in ((np.array(rows), 0), (np.array(rows, np.float32), (0,)), (rows, 0)):
        columns = list(zip(*rows))
        expected = [statistics.stdev(one) if len(rows) > 1 else 0 for one in columns]
        np.testing.assert_allclose(spread(values, axis), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(
            standard_error(values, axis), np.array(expected) / len(rows) ** 0.5, atol=1e-9
        )
    flat = [value for row in rows for value in row]
    expected = statistics.stdev(flat)
    np.testing.assert_allclose(spread(np.array(rows), (0, 1)), expected, rtol=1e-9, atol=1e-9)
    mean, shown = map(float, mean_and_spread(rows, ".4f", ".6f").split(" ± "))
    assert mean == pytest.approx(statistics.mean(flat), abs=1e-4)
    assert shown == pytest.approx(expected, abs=1e-5)


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert mean_and_spread([0.5], ".1f") == mean_and_spread(0.5, ".1f") == "0.5"
    assert spread([0.5]) == standard_error([0.5]) == 0
    with pytest.raises(ValueError, match="no value"):
        mean_and_spread([], ".1f")


def test_nothing_else_takes_standard_deviations_of_results():
    files = [
        p for q in ("lib/**/*.py", "xp_*/**/*.py", "benchmarks/*.py") for p in REPOSITORY.glob(q)
    ]
    paths = {
        path.relative_to(REPOSITORY).as_posix()
        for path in [*files, *REPOSITORY.glob("notebooks/*.ipynb")]
        for line in path.read_text().splitlines()
        if len(line) < 1000  # a figure in a notebook
        and re.search(r"\b(nan)?(std|stdev|pstdev|var|variance)\(|ddof", line)
        and "standardized = " not in line
    }
    assert paths - COMPUTED == {"lib/report/spreads.py"}


# Figures


def test_losses_at_or_below_zero_are_left_out():
    axes = plt.figure().subplots()
    plotting.plot_losses(axes, np.array([1.0, 0.0, -1.0, 0.5]), label="F")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, np.nan, np.nan, 0.5])
    assert (axes.get_yscale(), axes.lines[0].get_label()) == ("log", "F")


def test_long_paths_are_left_out():
    """Two classes of two particles over three records, one of which goes further than 1."""
    records = np.zeros((3, 2, 2, 2))
    records[:, 0, 1, 0] = 0, 0.3, 0.6
    records[:, 1, 0, 1] = 0, 2.0, 0.0
    axes = plt.figure().subplots()
    plotting.plot_paths(axes, records, longest=1.0)
    assert len(axes.lines) == 3
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [0, 0.3, 0.6])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_images_of_integers_keep_their_levels(dtype):
    """All 256, in four tiles of a sheet."""
    sheet = plotting.tile_images(np.arange(256, dtype=dtype).reshape(2, 2, 8, 8, 1))
    tiles = [sheet[i : i + 8, j : j + 8] for i in (0, 9) for j in (0, 9)]
    np.testing.assert_array_equal(np.ravel(tiles), [level / 255 for level in range(256)])


def test_an_animation_has_its_frames(tmp_path):
    figure, axes = plt.subplots(figsize=(1, 1))
    path = plotting.save_animation(figure, lambda i: axes.plot([0, i]), 3, tmp_path / "a.gif")
    with Image.open(path) as film:
        assert film.n_frames == 3
    assert [child.name for child in tmp_path.iterdir()] == ["a.gif"]
    assert not plt.fignum_exists(figure.number)
