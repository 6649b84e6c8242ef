"""The number of components by held-out likelihood: against scikit-learn, and on a known mixture."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from xp_gmm_source import gmm_fit, selection
from xp_gmm_source.config import FitConfig


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_bic_is_scikit_learns(kind):
    x = np.random.default_rng(0).normal(size=(80, 3))
    model = GaussianMixture(4, covariance_type=kind, random_state=0).fit(x)
    parameters = selection.num_parameters(kind, 4, 3, rank=0)
    assert selection.bic(model.score(x), parameters, len(x)) == pytest.approx(model.bic(x))


def test_low_rank_covariances_of_full_rank_count_as_full_ones_and_a_diagonal():
    """Loadings of rank d up to a rotation are d (d + 1) / 2 numbers."""
    low, full = (selection.num_parameters(kind, 2, 5, rank=5) for kind in ("low_rank", "full"))
    assert low == full + 2 * 5


def fit_of(values):
    """A fit whose held-out likelihood is known by K; what it was given is kept."""
    seen = []

    def fit(config, images, *, test_images, mesh):
        seen.append((config.n_components, len(images), len(test_images)))
        about = {"log_likelihoods": [0.0], "dimension": 2, "seconds": 1.0}
        value = values[config.n_components]
        return SimpleNamespace(about=about | {"test_log_likelihood": value})

    return fit, seen


def test_it_stops_after_two_falls_and_takes_the_best():
    fit, seen = fit_of({1: 0.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: 1.5, 6: 1.0, 7: 9.0})
    images = np.arange(50)[:, None]
    candidates = selection.select(FitConfig(), images, fit, numbers=range(1, 8))
    assert [number for number, *_ in seen] == [1, 2, 3, 4, 5, 6]
    assert {(kept, held_out) for _, kept, held_out in seen} == {(45, 5)}
    assert selection.best(candidates) == 2
    with pytest.raises(ValueError, match="5 images are too few"):
        selection.select(FitConfig(), images[:5], fit)


@pytest.mark.slow
def test_three_clusters_of_images_get_three_components(tmp_path, monkeypatch):
    """Clusters of 2 x 2 gray images far apart; K = 2 has too few, and 5 gains nothing held out."""
    rng = np.random.default_rng(0)
    centers = rng.integers(40, 215, (3, 4))
    pixels = np.clip(centers[rng.integers(0, 3, 600)] + rng.normal(0, 5, (600, 4)), 0, 255)
    images = pixels.astype(np.uint8).reshape(-1, 2, 2, 1)
    config = FitConfig(tol=1e-4)
    candidates = selection.select(config, images, gmm_fit.fit_images, numbers=(1, 2, 3, 6, 10))
    assert selection.best(candidates) == 3
    assert min(candidates, key=lambda c: c.bic).n_components == 3


@pytest.mark.slow
def test_the_command_fits_the_number_that_it_chose(tmp_path, capsys):
    arguments = gmm_fit.Arguments(
        "digits", "auto", n_pca=5, covariance_type="diag", n_stat_samples=0, max_iter=20,
        output_dir=tmp_path, results=tmp_path,
    )  # fmt: skip
    path = gmm_fit.main(arguments)
    rows = re.findall(r"^\| (\d+) \| (\S+) ", capsys.readouterr().out, re.MULTILINE)
    best = max(rows, key=lambda row: float(row[1]))[0]
    assert path.name == f"digits_gmm{best}_pca5_diag.npz"
    with pytest.raises(ValueError, match="n_components"):
        gmm_fit.Arguments("digits", 0)
