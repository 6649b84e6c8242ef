"""Pairs of samples against their moments, intervals against SciPy, and draws that are kept."""

import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binomtest

from xp_drmmd import alternatives, power
from xp_drmmd.experiments import Arguments, main


def test_blobs_have_the_same_centers_and_other_covariances():
    x, y = alternatives.blobs(np.random.default_rng(0), 5000, ratio=1.5)
    for sample, covariance in ((x, np.eye(2)), (y, [[1.25, 0.25], [0.25, 1.25]])):
        centers = 10 * np.round(sample / 10)
        assert set(np.unique(centers)) == {0, 10, 20}
        np.testing.assert_allclose(np.cov((sample - centers).T), covariance, atol=0.1)


@pytest.mark.parametrize("d", [1, 2])
def test_bumps_hold_what_their_density_says(d):
    """Of one bump a side: what moves from the half below its middle to the half above, or back."""
    x, y = alternatives.perturbed_uniform(np.random.default_rng(0), 40_000, 1, d=d)
    volume, _ = quad(lambda t: np.exp(-1 / (1 - (4 * t + 3) ** 2)), -1, -0.5)
    odd = np.mod(np.sum(y > 0.5, axis=1), 2)
    expected = 2 ** (d - 1) * {1: 2.7, 2: 7.3}[d] * volume**d
    assert abs(abs(odd.mean() - 0.5) - expected) < 4 * 0.5 / 200
    assert abs(np.mean(x) - 0.5) < 4 * 0.29 / 200
    assert ((y >= 0) & (y <= 1)).all()


def test_images_of_two_draws_are_distinct(monkeypatch):
    images = np.arange(400, dtype=np.uint16).astype(np.uint8)[:, None, None, None]
    labels = np.arange(400) % 10
    monkeypatch.setattr(alternatives, "_images", lambda name, root: (images, labels))
    first, second = alternatives._two_draws(np.random.default_rng(0), labels, 150, without=(8, 6))
    assert not set(first) & set(second)
    assert set(labels[second]) == {0, 1, 2, 3, 4, 5, 7, 9}
    shares = np.where(np.arange(10) < 5, 1.9, 0.1)
    _, second = alternatives._two_draws(np.random.default_rng(0), labels, 100, shares=shares)
    assert np.mean(labels[second] < 5) > 0.8


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 40), (200, 200)])
def test_interval(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    interval = power.interval([True] * hits + [False] * (n - hits))
    np.testing.assert_allclose(interval, expected, atol=1e-4)


def test_draws_are_the_same_for_all_and_are_not_repeated(tmp_path):
    seen = []

    def method(rng, x, y):
        seen.append(x)
        return {"test": x > 0.5}

    def draw(rng):
        return rng.random(), None

    def rejections(names, num):
        methods = dict.fromkeys(names, method)
        return power.rejections(tmp_path / "a.json", draw, methods, num, "a")

    assert len(rejections(["one"], 3)["test"]) == len(seen) == 3
    first = rejections(["one"], 5)["test"]
    assert len(first) == len(seen) == 5
    assert rejections(["two"], 5)["test"] == first
    assert seen[5:] == seen[:5]


@pytest.mark.slow
def test_quick_group(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "QUICK", {"variance10": (2, 10)})
    (path,) = main(Arguments(only=("tests",), results=tmp_path))
    stored = json.loads(path.read_text())
    assert [len(row[power.OURS]) for row in stored["curves"]["variance10"]] == [2, 2]
    assert (tmp_path / "xp_drmmd/figures/tests_quick.png").stat().st_size > 10_000
