"""Features of the source's network: matching, logistic regression, Distribution Calibration."""

import jax
import numpy as np
import pytest

from lib.networks import LeNet5
from xp_transfer_learning.features import (
    calibrated,
    calibrated_sample,
    features,
    logistic_accuracy,
    match_p_value,
)

RNG = np.random.default_rng(0)


def test_features_are_what_the_last_layer_sees():
    images = RNG.random((5, 28, 28, 1)).astype(np.float32)
    parameters = jax.jit(LeNet5().init)(jax.random.key(0), images)
    last = parameters["params"]["Dense_2"]
    got = features(parameters, images) @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    logits = jax.jit(LeNet5().apply)(parameters, images)
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)


def test_classes_that_correspond_have_the_least_p_value():
    costs = RNG.random((8, 8)) - 5 * np.eye(8)[:, RNG.permutation(8)]
    shifted = costs + 10 * RNG.random((8, 1)) + 10 * RNG.random(8)
    assert match_p_value(costs, 199) == 1 / 200
    assert match_p_value(shifted, 199) == 1 / 200  # means of rows and columns say nothing


def test_the_p_value_of_costs_without_a_correspondence_is_conservative():
    """300 matrices: .5 on average, and below .2 no more often than that, within four standard
    errors."""
    values = np.array([match_p_value(RNG.normal(size=(6, 6)), 49) for _ in range(300)])
    assert abs(values.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 300)
    assert np.mean(values <= 0.2) < 0.2 + 4 * np.sqrt(0.2 * 0.8 / 300)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_equal_costs_are_no_evidence(shape):
    assert match_p_value(np.ones(shape), 19) == 1


def test_calibrated_normals_are_those_of_the_two_nearest_classes():
    means = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 3.0]])
    covariances = np.array([1.0, 2.0, 5.0])[:, None, None] * np.eye(2)
    mean, covariance = calibrated(np.array([0.0, 1.0]), means, covariances)
    np.testing.assert_allclose(mean, [0, (0 + 3 + 1) / 3])
    np.testing.assert_allclose(covariance, [[3.21, 0.21], [0.21, 3.21]])


def test_a_calibrated_sample_has_the_normals_moments():
    source, target = RNG.random((4, 50, 3)), RNG.random((2, 2, 3))
    x, labels = calibrated_sample(0, source, target, 40_000)
    np.testing.assert_allclose(x[:4], np.sqrt(target).reshape(4, 3))
    np.testing.assert_array_equal(labels[:4], [0, 0, 1, 1])
    assert [int(np.sum(labels == c)) for c in (0, 1)] == [40_002] * 2
    roots = np.sqrt(source)
    means, covariances = roots.mean(axis=1), [np.cov(rows.T) for rows in roots]
    mean, covariance = calibrated(np.sqrt(target)[1, 1], means, np.asarray(covariances))
    drawn = x[4 + 60_000 :]
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.02)
    assert np.all(labels[4 + 60_000 :] == 1)


def test_logistic_regression_separates_what_can_be():
    x = np.concatenate([RNG.normal(size=(20, 2)), RNG.normal(size=(20, 2)) + 20])
    labels = np.repeat([0, 1], 20)
    assert logistic_accuracy(x, labels, x, labels) == 1
    assert logistic_accuracy(x, labels, x, 1 - labels) == 0
