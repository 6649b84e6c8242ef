"""Parts of figures: what is drawn, and what is left out."""

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from lib.report import plotting


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


def test_an_animation_has_its_frames(tmp_path):
    figure, axes = plt.subplots(figsize=(1, 1))
    path = plotting.save_animation(figure, lambda i: axes.plot([0, i]), 3, tmp_path / "a.gif")
    with Image.open(path) as film:
        assert film.n_frames == 3
    assert [child.name for child in tmp_path.iterdir()] == ["a.gif"]
    assert not plt.fignum_exists(figure.number)
