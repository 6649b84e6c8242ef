"""Flows of points in files of one's own."""

import numpy as np
import pytest

from lib.runs import Run
from xp_drmmd import problems
from xp_drmmd.config import FlowConfig
from xp_drmmd.run import Arguments, main, stray_line

SHORT = {"num_steps": 3, "records": 3, "flow": "sliced_mmd", "gamma": 1.0}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)) + 2, rng.normal(size=(15, 3)).astype(np.float32)
    for name, rows in (("a", a), ("b", b)):
        np.save(tmp_path / f"{name}.npy", rows)
    return tmp_path, a, b


def flowed(folder, **options):
    return main(Arguments(**SHORT, results=folder / "results", **options))


def test_rows_of_one_file_flow_to_those_of_another(files):
    folder, a, b = files
    run = flowed(folder, source=str(folder / "a.npy"), target=str(folder / "b.npy"))
    stored = Run(run).load_arrays()
    np.testing.assert_allclose(stored["particles"][0], a)
    np.testing.assert_array_equal(stored["target"], b)
    distances = np.linalg.norm(b[:, None] - b[None], axis=2)[np.triu_indices(15, 1)]
    np.testing.assert_allclose(stored["bandwidth"], np.median(distances), rtol=1e-6)
    assert stored["w1"][-1] < stored["w1"][0]
    assert (run / "flow.png").stat().st_size > 1000


def test_without_a_source_particles_start_as_a_normal_of_the_targets_moments(files):
    folder, _, b = files
    config = FlowConfig("files", target=str(folder / "b.npy"), source_particle_num=20_000)
    start = np.asarray(problems.problem(config, seed=0).start)
    np.testing.assert_allclose(start.mean(axis=0), b.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(start.var(axis=0), b.var(axis=0).mean(), rtol=0.05)


@pytest.mark.slow
def test_a_result_is_known_by_what_the_files_hold(files):
    folder, _, b = files
    first = flowed(folder, target=str(folder / "b.npy"))
    (folder / "b.npy").rename(folder / "moved.npy")
    assert flowed(folder, target=str(folder / "moved.npy")) == first
    np.save(folder / "moved.npy", b + 1)
    assert flowed(folder, target=str(folder / "moved.npy")) != first


def test_files_that_do_not_fit_are_refused(files):
    folder, a, _ = files
    target = str(folder / "b.npy")
    np.save(folder / "wide.npy", np.ones((4, 5)))
    a[[3, 5], 0] = np.nan
    np.save(folder / "nan.npy", a)
    for name, words in (
        ("wide", r"wide.npy has 5 columns and .*b.npy 3"),
        ("nan", r"nan.npy: 2 rows hold NaN or infinity, the first is row 3"),
    ):
        with pytest.raises(ValueError, match=words):
            flowed(folder, source=str(folder / f"{name}.npy"), target=target)
    with pytest.raises(ValueError, match=r"a.npy needs --target PATH"):
        Arguments(source="a.npy")
    with pytest.raises(ValueError, match=r"--target PATH is of the data set files"):
        Arguments(dataset="Student", target=target)
    with pytest.raises(ValueError, match=r"--target PATH is of the data set files"):
        Arguments(dataset="files")


def test_particles_far_from_the_target_are_counted():
    target = np.array([[0.0, 0.0], [1.0, 2.0]])  # widened: [-.5, 1.5] x [-1, 3]
    inside = [[-0.4, 2.9], [1.4, -0.9]]
    assert stray_line(np.array(inside), target).startswith("0 of 2 particles end outside")
    line = stray_line(np.array([*inside, [1.6, 0.0], [0.0, -1.1]]), target)
    assert line.startswith("2 of 4 particles end outside")
    assert line.endswith("--flow sliced_mmd sees far, a larger --bandwidth farther")
