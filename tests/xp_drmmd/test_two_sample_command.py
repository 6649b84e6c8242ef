"""The command for two files or folders: what it finds, its exit status, its page, its errors."""

import json

import numpy as np
import pytest
from PIL import Image

from xp_drmmd import two_sample
from xp_drmmd.two_sample import Arguments, main


@pytest.fixture
def files(tmp_path):
    """x, a draw of the same law, and one whose column 2 is half as wide again; others are equal."""
    rng = np.random.default_rng(0)
    x, same, wide = rng.normal(size=(3, 150, 4)).astype(np.float32)
    wide[:, 2] *= 2
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "same.npz", rows=same)
    np.save(tmp_path / "wide.npy", wide)
    return tmp_path


def options(folder, y, **others):
    return Arguments(x=folder / "x.npy", y=folder / y, num_permutations=99, **others)


@pytest.mark.slow
def test_nothing_is_rejected_where_nothing_differs(files, capsys):
    document = main(options(files, "same.npz:rows"))
    assert document["p_value"] > 0.05
    assert "no difference found at level 0.05" in capsys.readouterr().out
    assert sorted(path.name for path in files.iterdir()) == ["same.npz", "wide.npy", "x.npy"]


def test_a_difference_is_located_on_a_page_and_in_the_exit_status(files):
    with pytest.raises(SystemExit) as stopped:
        main(options(files, "wide.npy", report=files / "page.html"))
    assert stopped.value.code == two_sample.REJECTED
    document = json.loads((files / "page.json").read_text())
    assert document["p_value"] <= 0.05
    assert document["telling"]["coordinates"][0]["column"] == 2
    wide = np.load(files / "wide.npy")
    of_y = [int(row["name"].removeprefix("row ")) for row in document["telling"]["y"]]
    assert np.abs(wide[of_y, 2]).mean() > 2  # its typical rows are far out
    page = (files / "page.html").read_text()
    assert "The samples differ" in page
    assert f"row {of_y[0]}" in page


@pytest.mark.slow
def test_larger_samples_are_drawn_from(files):
    document = main(options(files, "same.npz:rows", max_rows=50))
    assert document["samples"]["x"] == {"path": str(files / "x.npy"), "rows": 150, "used": 50}


@pytest.mark.slow
def test_folders_of_images(tmp_path):
    """Gray squares, and brighter ones, of several sizes and in a folder within."""
    rng = np.random.default_rng(0)
    for name, level in (("x", 100), ("y", 160)):
        for i in range(30):
            path = tmp_path / name / ("a" if i % 2 else "b") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(level, 20, (12 + i % 3, 12)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    given = {"x": tmp_path / "x", "y": tmp_path / "y", "num_permutations": 99, "side": 16}
    for features in ("pixels", "convnet"):
        with pytest.raises(SystemExit) as stopped:
            main(Arguments(**given, features=features, report=tmp_path / "page.html"))
        assert stopped.value.code == two_sample.REJECTED
    document = json.loads((tmp_path / "page.json").read_text())
    assert document["telling"]["x"][0]["name"].endswith(".png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: options(f, "absent.npy"), "no such file.*absent.npy"),
        (lambda f: Arguments(x=f / "x.npy", y=f), "one is a folder, the other is not"),
        (lambda f: Arguments(x=f, y=f), "no images in this folder"),
        (lambda f: options(f, "narrow.npy"), "x.npy has 4 columns and .*narrow.npy 2"),
        (lambda f: options(f, "bad.npy"), "bad.npy: 1 rows .* not finite .* row 1"),
        (lambda f: options(f, "one.npy"), "one.npy: two rows or more are needed"),
        (lambda f: options(f, "wide.npy", alpha=1.0), "--alpha must be between 0 and 1, not 1.0"),
        (
            lambda f: options(f, "wide.npy", report=f / "a.pdf"),
            "a.pdf: the report must be an .html",
        ),
    ],
)
def test_errors_name_the_file(files, make, message):
    bad = np.ones((3, 4), np.float32)
    bad[1, 2] = np.nan
    for name, rows in {"narrow": bad[[0, 2], :2], "bad": bad, "one": bad[:1]}.items():
        np.save(files / f"{name}.npy", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(make(files))
