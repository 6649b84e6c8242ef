"""Condensed sets on disk: the round trip, the reader that needs only numpy, and damaged files."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC

from lib import datasets, runs
from xp_dataset_distillation import condensed_numpy, export, factor
from xp_dataset_distillation.export import Condensed

EXPERIMENT = Path(export.__file__).parent
ABOUT = {"settings": {"steps": 3, "rates": [0.1, 1.0]}, "commit": "abc"}
FASHION = ("T-shirt/top", "Trouser", "Bag")


def condensed(*, num=2, shape=(7, 6, 3), names=("ant", "bee", "cat"), cells=2) -> Condensed:
    channels = shape[2]
    return Condensed(
        images=np.random.default_rng(0).random((len(names), num, *shape), np.float32),
        class_names=names,
        factor=cells,
        mean=np.array([0.1307, 0.5, 0.25][:channels], np.float32),
        std=np.array([0.3081, 0.2, 0.1][:channels], np.float32),
        dataset="insects",
        about=ABOUT,
    )


def assert_same(loaded: Condensed, stored: Condensed):
    for name in ("images", "mean", "std"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(stored, name), strict=True)
    for name in ("class_names", "factor", "dataset", "about"):
        assert getattr(loaded, name) == getattr(stored, name)


@pytest.mark.parametrize(
    ("names", "channels"), [(("ant", "bee", "cat"), 1), (FASHION, 3), (("only",), 3)]
)
def test_what_is_saved_is_loaded_bit_for_bit_and_is_a_folder_of_images(tmp_path, names, channels):
    stored, path = condensed(names=names, shape=(7, 6, channels)), tmp_path / "deep" / "set"
    export.save(path, stored)
    assert os.listdir(path.parent) == ["set"]
    for loaded in (path, path / "condensed.npz"):
        assert_same(export.load(loaded), stored)
    wanted = np.rint(stored.images.astype(np.float64) * 255).reshape(-1, 7, 6, channels)
    for folder in (datasets.load(path), datasets.load(path / "images")):
        np.testing.assert_array_equal(folder.images, wanted)
        np.testing.assert_array_equal(folder.labels, np.repeat(np.arange(len(names)), 2))
        assert folder.class_names == export.folder_names(names)


def test_eight_bits_are_those_of_the_pictures(tmp_path):
    export.save(tmp_path / "set", condensed(), eight_bits=True)
    images = datasets.load(tmp_path / "set").images.reshape(3, 2, 7, 6, 3)
    np.testing.assert_array_equal(export.load(tmp_path / "set").images, np.float32(images) / 255)
    with np.load(tmp_path / "set" / "condensed.npz") as archive:
        assert archive["images"].dtype == np.uint8


def test_the_metadata_of_the_archive_are_those_of_the_file_and_say_it_all(tmp_path):
    export.save(tmp_path / "set", condensed())
    metadata = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert metadata == condensed_numpy.read(tmp_path / "set")[2]
    expected = {
        "mean": [0.1307, 0.5, 0.25], "std": [0.3081, 0.2, 0.1], "factor": 2, "dataset": "insects",
        "class_names": ["ant", "bee", "cat"], "image_shape": [7, 6, 3], "about": ABOUT,
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    assert "align_corners=False" in metadata["decode"]
    export.save(tmp_path / "set", condensed()._replace(about={}))
    assert export.load(tmp_path / "set").about["commit"] == runs.environment()["commit"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=12, unique=True))
def test_sorted_folders_have_the_classes_labels(names):
    folders = export.folder_names(names)
    assert list(folders) == sorted(folders)
    assert len({folder.lower() for folder in folders}) == len(names)
    for folder in folders:
        assert folder == folder.strip()
        assert not set(folder) & set('/\\:*?"<>|\n\0')
        assert folder[0] != "."


def test_class_names_are_kept_as_folders_where_they_can_be():
    assert export.folder_names(tuple("0123456789")) == tuple("0123456789")
    assert export.folder_names(FASHION) == ("0_T-shirt-top", "1_Trouser", "2_Bag")
    assert export.folder_names(("test", "train")) == ("0_test", "1_train")
    assert export.folder_names(("A", "a")) == ("0_A", "1_a")


def test_another_export_is_replaced_whole_and_anything_else_is_kept(tmp_path):
    export.save(tmp_path / "set", condensed(num=3))
    export.save(tmp_path / "set", condensed(num=1))
    assert len(list(tmp_path.glob("set/images/ant/*"))) == 1
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="set holds something other than condensed images"):
        export.save(tmp_path / "set", condensed())
    assert (tmp_path / "set" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file holds something other"):
        export.save(tmp_path / "file", condensed())


def test_a_failed_swap_puts_the_old_export_back(tmp_path, monkeypatch):
    export.save(tmp_path / "set", condensed(num=3))
    rename, calls = os.replace, []

    def fail_to_move_in(source, target):
        if Path(target) == tmp_path / "set" and not calls:
            calls.append(source)
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_to_move_in)
    with pytest.raises(OSError, match="no"):
        export.save(tmp_path / "set", condensed(num=1))
    assert calls
    assert os.listdir(tmp_path) == ["set"]
    assert_same(export.load(tmp_path / "set"), condensed(num=3))


@pytest.mark.parametrize(("shape", "cells"), [((8, 8, 1), 1), ((8, 8, 1), 2), ((7, 10, 3), 3)])
def test_decoding_with_numpy_is_that_of_the_runs(tmp_path, shape, cells):
    """In dtypes and shapes that torch and the normalization take as they are."""
    stored = condensed(shape=shape, cells=cells)
    export.save(tmp_path / "set", stored)
    images, labels, metadata = condensed_numpy.load(tmp_path / "set")
    wanted = factor.decode(jnp.asarray(stored.images), cells)
    np.testing.assert_allclose(images, wanted.reshape(-1, *shape), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels, np.repeat(np.arange(3), 2 * cells**2))
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    for name in ("mean", "std"):
        np.testing.assert_array_equal(metadata[name], getattr(stored, name), strict=True)
    with pytest.raises(ValueError, match="factor 3 leaves no pixels of images of 2 x 8"):
        condensed_numpy.decode(np.zeros((1, 2, 8, 1)), 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.full((3, 1, 4, 4, 1), 1.5)}, r"in \[0, 1\], not in \[1.5, 1.5\]"),
        ({"images": np.full((3, 1, 4, 4, 1), np.nan)}, "NaN"),
        ({"images": np.zeros((3, 1, 4, 4, 2))}, "1 or 3 channels, not 2"),
        ({"images": np.zeros((3, 0, 4, 4, 1))}, r"not float32\[0, 4, 4, 1\]"),
        ({"images": np.zeros((2, 1, 4, 4, 1))}, r"\[3 classes, n, H, W, channels\], not \[2, 1"),
        ({"class_names": ("a", "b", "a")}, "class names are different"),
        ({"factor": 5}, "factor 5 leaves no pixels of images of 4 x 4"),
        ({"factor": 1.5}, "factor is a int, not 1.5"),
        ({"mean": [0.1, 0.2]}, "mean has 1 numbers"),
        ({"std": [0.0]}, "std has 1 positive numbers"),
        ({"about": {"a": object()}}, "no JSON for"),
    ],
)
def test_sets_that_cannot_be_are_refused_before_anything_is_written(tmp_path, changed, message):
    fine = condensed(shape=(4, 4, 1))
    export.checked(fine)
    with pytest.raises((ValueError, TypeError), match=message):
        export.save(tmp_path / "set", fine._replace(**changed))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("reader", [condensed_numpy.load, export.load])
def test_absent_and_foreign_files_are_named(tmp_path, reader):
    """Damaged ones: `tests/system/test_fuzz_files.py`."""
    path = tmp_path / "condensed.npz"
    with pytest.raises(FileNotFoundError):
        reader(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"condensed\.npz holds no condensed images"):
        reader(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"labels": None}, "holds no condensed images"),
        ({"metadata": np.array({"a": 1}, object)}, "allow_pickle"),
        ({"metadata": "[1]"}, "not of the format"),
        ({"metadata": '{"format": "x"}'}, "not of the format"),
        ({"labels": np.int32([2, 1, 0]).repeat(2)}, "labels are int32, 0 to 2 in order"),
        ({"images": np.zeros((6, 7, 6, 3))}, "images are float32"),
        ({"images": np.zeros((5, 7, 6, 3), "f4")}, "5 images are no equal number of 3"),
        ({"class_names": [1, 2, 3]}, "class names are different texts"),
        ({"mean": ["a", 1, 2]}, "mean has 3 numbers"),
    ],
)
def test_archives_with_other_members_are_refused(tmp_path, members, message):
    export.save(tmp_path / "set", condensed())
    with np.load(tmp_path / "set" / "condensed.npz") as archive:
        whole = dict(archive)
    if members.keys() <= whole.keys():
        whole |= members
    else:
        whole["metadata"] = json.dumps(json.loads(str(whole["metadata"])) | members)
    kept = {name: member for name, member in whole.items() if member is not None}
    np.savez(tmp_path / "other.npz", **kept)
    with pytest.raises(ValueError, match=rf"other\.npz.*{message}"):
        condensed_numpy.load(tmp_path / "other.npz")


def test_the_published_set_trains_what_its_readme_says(data_root):
    images, labels, _ = condensed_numpy.load(EXPERIMENT / "published/fashion_mnist_1")
    test = datasets.load("fashion_mnist", split="test", data_root=data_root)
    model = SVC(C=10).fit(images.reshape(40, -1), labels)
    score = model.score(test.images.reshape(len(test.images), -1) / 255, test.labels)
    assert f"# {100 * score:.1f}% of the test split" in (EXPERIMENT / "README.md").read_text()
