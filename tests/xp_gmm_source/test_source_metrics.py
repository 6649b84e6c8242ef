"""Metrics of image samples against scipy, closed forms and loops in numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from scipy.stats import entropy

from lib import datasets
from xp_gmm_source import metrics

KEY = jax.random.key(0)


def as_images(dataset):
    return dataset.images.astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def digits():
    """(training images, labels, test images, labels) of scikit-learn's digits in [-1, 1]."""
    train, test = (datasets.load("digits", split=split) for split in ("train", "test"))
    return as_images(train), train.labels, as_images(test), test.labels


@pytest.fixture(scope="module")
def network(digits):
    x, y, *test = digits
    return metrics.train_feature_network(KEY, x, y, test=tuple(test), num_epochs=20)


@pytest.fixture(scope="module")
def reference(digits, network):
    return metrics.reference(jax.random.key(1), digits[2][:200], network, num_directions=100)


# Frechet distance


def random_moments(seed, d=6, rank=6):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, rank))
    return metrics.Moments(rng.normal(size=d), root @ root.T / d)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_is_that_of_scipys_square_root(seed):
    first, second = random_moments(seed), random_moments(seed + 100)
    cross = np.trace(sqrtm(first.covariance @ second.covariance).real)
    expected = np.sum((first.mean - second.mean) ** 2) - 2 * cross
    expected += np.trace(first.covariance) + np.trace(second.covariance)
    assert metrics.frechet_distance_of_moments(first, second) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_frechet_distance_is_symmetric_and_moves_with_no_rotation(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    y = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    rotation, shift = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.normal(size=5)
    value = metrics.frechet_distance(x, y)
    assert metrics.frechet_distance(y, x) == pytest.approx(value, rel=1e-9)
    moved = metrics.frechet_distance(x @ rotation + shift, y @ rotation + shift)
    assert moved == pytest.approx(value, rel=1e-9)
    assert metrics.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-9)


@pytest.mark.parametrize(("ridge", "bound"), [(0.1, 1e-13), (0, 1e-7)])
def test_frechet_distance_of_equal_moments_is_zero_and_never_negative(ridge, bound):
    for seed in range(20):
        m = random_moments(seed, rank=3)
        m = m._replace(covariance=m.covariance + ridge * np.eye(6))
        value = metrics.frechet_distance_of_moments(m, m)
        assert 0 <= value < bound * np.trace(m.covariance)


def test_moments_are_numpys():
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32) + 100
    found = metrics.moments(x)
    np.testing.assert_allclose(found.mean, x.astype(float).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T.astype(float)), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"n >= 2, got shape \(1, 3\)"):
        metrics.moments(x[:1])
    x[4, 1] = np.inf
    with pytest.raises(ValueError, match="row 4"):
        metrics.moments(x)
    with pytest.raises(ValueError, match=r"\(3,\) and of \(4,\)"):
        metrics.frechet_distance(np.eye(3), np.eye(4))


# Features


def test_feature_network_classifies_digits(digits, network):
    assert network.accuracy > 0.95
    x, y, test, labels = digits
    assert metrics.outputs(network, test).features.shape == (len(test), 64)
    share = np.mean(np.asarray(metrics.outputs(network, test).predictions) == labels)
    assert network.accuracy == pytest.approx(share)
    again = metrics.train_feature_network(KEY, x, y, num_epochs=20)
    assert again.accuracy is None
    for a, b in zip(jax.tree.leaves(again.parameters), jax.tree.leaves(network.parameters)):
        np.testing.assert_array_equal(a, b)


def test_bad_data_are_refused(digits, reference):
    x, y, test, labels = digits
    for options, more, message in (
        ((x, y[:-1]), {}, "labels must be"),
        ((x, y - 1), {}, "integers >= 0"),
        ((x, y.astype(float)), {}, "float64"),
        ((x * np.nan, y), {}, "image 0 is not finite"),
        ((x, y), {"test": (test[:, :7], labels)}, "test labels"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.train_feature_network(KEY, *options, num_epochs=1, **more)
    samples = x[:20].copy()
    samples[5, 0] = np.nan
    for bad, message in (
        (x[:20].reshape(20, -1)[:, :63], r"\(20, 63\) is no sample of images \(8, 8, 1\)"),
        (x[:20, ..., 0], r"\(20, 8, 8\) is no sample"),
        (x[:1], "two samples"),
        (samples, "points is not finite in row 5"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.evaluate(bad, reference)


# Judgement


def test_judge_is_what_numpy_finds(digits, network, reference):
    samples = digits[0][:150] + 0.3 * np.random.default_rng(0).normal(size=(150, 8, 8, 1))
    found = metrics.evaluate(samples.astype(np.float32), reference)
    x, y = (z.reshape(len(z), -1).astype(np.float32) for z in (samples, digits[2][:200]))
    of_x, of_y = metrics.outputs(network, x), metrics.outputs(network, y)

    def mmd_squared(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        sigma = np.median(pdist(y))
        kxx, kyy, kxy = (
            np.exp(-cdist(a, b, "sqeuclidean") / (2 * sigma**2))
            for a, b in ((x, x), (y, y), (x, y))
        )
        n, m = kxy.shape
        within = (kxx.sum() - n) / (n * (n - 1)) + (kyy.sum() - m) / (m * (m - 1))
        return within - 2 * kxy.mean()

    assert found["mmd2_pixels"] == pytest.approx(mmd_squared(x, y), rel=1e-3)
    assert found["mmd2_features"] == pytest.approx(
        mmd_squared(of_x.features, of_y.features), rel=1e-3
    )
    expected = metrics.frechet_distance(of_x.features, of_y.features)
    assert found["frechet"] == pytest.approx(expected, rel=1e-6)

    # W_2^2 on the line of 150 and 200 points: both repeated to 600.
    directions = np.asarray(reference.directions, float)
    u, v = (np.sort(np.repeat(z @ directions.T, 600 // len(z), axis=0), axis=0) for z in (x, y))
    sliced = np.sqrt(np.mean((u - v) ** 2))
    assert found["sliced_wasserstein"] == pytest.approx(sliced, rel=1e-4)

    p, q = (
        np.bincount(np.asarray(o.predictions), minlength=10) / len(o.predictions)
        for o in (of_x, of_y)
    )
    # Total variation is the transport cost for a distance of 1 between any two classes.
    assert found["class_distance"] == pytest.approx(np.maximum(p - q, 0).sum())
    assert found["class_entropy_gap"] == pytest.approx(entropy(q) - entropy(p))


def test_a_dropped_mode_and_noise_are_seen_above_the_floor(digits, network, reference):
    train, labels, test, _ = digits
    half = np.concatenate([test[:200], train[:200]])
    floor = metrics.floor(KEY, half, network, num_directions=100)
    real = metrics.evaluate(train[:200], reference)
    even = metrics.evaluate(train[labels % 2 == 0][:200], reference)
    noise = np.asarray(jax.random.normal(KEY, (200, 8, 8, 1)))
    noisy = metrics.evaluate(noise, reference)
    for name in ("frechet", "mmd2_features", "class_distance"):
        assert even[name] > 3 * abs(floor[name]), name
        assert even[name] > 3 * abs(real[name]), name
    for name in ("frechet", "mmd2_pixels", "mmd2_features", "sliced_wasserstein"):
        assert noisy[name] > 3 * abs(floor[name]), name
    assert even["class_distance"] == pytest.approx(0.5, abs=0.06)
    assert even["class_entropy_gap"] == pytest.approx(np.log(2), abs=0.1)
    assert list(floor) == list(real)
