"""scikit-learn's own checks, and scikit-learn's own mixture beside ours."""

import re
import warnings

import numpy as np
import pytest
import sklearn.mixture
from cases import slow
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lib.gmm.estimator import GaussianMixture

X = load_iris().data


@pytest.mark.slow
@parametrize_with_checks([GaussianMixture()])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "kind",
    ["diag", *(slow(k) for k in ("full", "tied", "spherical"))],
)
def test_a_fit_is_scikit_learns(kind):
    """Of well separated clusters, from which k-means leaves one place to go."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.3 + 0.2 * c, (60, 2)) for c in (0, 3, 7)])
    options = {"n_components": 3, "covariance_type": kind, "tol": 1e-9, "max_iter": 500}
    ours, theirs = (
        model(random_state=0, **options).fit(points)
        for model in (GaussianMixture, sklearn.mixture.GaussianMixture)
    )
    order, other = np.argsort(ours.means_[:, 0]), np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(ours.means_[order], theirs.means_[other], atol=1e-4)
    np.testing.assert_allclose(
        ours.score_samples(X[:, :2]), theirs.score_samples(X[:, :2]), atol=2e-3
    )
    probabilities = ours.predict_proba(points)[:, order]
    np.testing.assert_allclose(probabilities, theirs.predict_proba(points)[:, other], atol=1e-4)
    assert ours.bic(points) == pytest.approx(theirs.bic(points), rel=1e-6)
    assert ours.sample(7)[0].shape == (7, 2)


@pytest.mark.slow
def test_in_a_pipeline_and_warm():
    pipeline = make_pipeline(StandardScaler(), GaussianMixture(3, random_state=0))
    labels = pipeline.fit_predict(X)
    np.testing.assert_array_equal(labels, pipeline.predict(X))
    model = GaussianMixture(3, random_state=0, warm_start=True, max_iter=2, tol=0.0)
    with pytest.warns(ConvergenceWarning, match="has not converged in 2 iterations"):
        first = model.fit(X).lower_bound_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert model.fit(X).lower_bound_ > first


@pytest.mark.slow
def test_the_best_of_several_starts_is_kept():
    scores = [
        GaussianMixture(6, random_state=0, n_init=n, tol=1e-2).fit(X).lower_bound_ for n in (1, 4)
    ]
    assert scores[1] >= scores[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_params": "random"}, "init_params is \"kmeans\" here, got 'random'"),
        ({"means_init": X[:1]}, "means_init is not taken here"),
        ({"n_components": 200}, "Expected n_samples >= n_components"),
    ],
)
def test_what_it_has_not_is_said(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        GaussianMixture(**options).fit(X)
