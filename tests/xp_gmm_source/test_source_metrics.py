"""Metrics of image samples against scipy, closed forms and loops in numpy."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import kernel, mmd_squared
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from lib import datasets
from xp_gmm_source import metrics

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def digits():
    """(training images, labels, test images, labels) of scikit-learn's digits in [-1, 1]."""
    sets = (datasets.load("digits", split=split) for split in ("train", "test"))
    pairs = [(loaded.images.astype(np.float32) / 127.5 - 1, loaded.labels) for loaded in sets]
    return *pairs[0], *pairs[1]


@pytest.fixture(scope="module")
def network(digits):
    x, y, *test = digits
    return metrics.train_feature_network(KEY, x, y, test=tuple(test), num_epochs=20)


@pytest.fixture(scope="module")
def reference(digits, network):
    return metrics.reference(jax.random.key(1), digits[2][:200], network, num_directions=100)


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
    of_x = metrics.moments(x)
    np.testing.assert_allclose(of_x.mean, x.astype(float).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(of_x.covariance, np.cov(x.T.astype(float)), rtol=1e-9, atol=1e-12)


def test_feature_network_classifies_digits(digits, network):
    assert network.accuracy > 0.95
    x, y, test, labels = digits
    outputs = metrics.outputs(network, test)
    assert outputs.features.shape == (len(test), 64)
    assert network.accuracy == pytest.approx(np.mean(np.asarray(outputs.predictions) == labels))
    again = metrics.train_feature_network(KEY, x, y, num_epochs=20)
    assert again.accuracy is None
    jax.tree.map(np.testing.assert_array_equal, again.parameters, network.parameters)


X, Y = np.zeros((20, 8, 8, 1), np.float32), np.arange(20) % 10
BROKEN = np.where(np.arange(20)[:, None, None, None] == 5, np.nan, X)
train = partial(metrics.train_feature_network, KEY, num_epochs=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: train(X, Y[:-1]), "labels must be"),
        (lambda _: train(X, Y - 1), "integers >= 0"),
        (lambda _: train(X, Y.astype(float)), "float64"),
        (lambda _: train(BROKEN, Y), "image 5 is not finite"),
        (lambda _: train(X, Y, test=(X[:, :7], Y)), "test labels"),
        (lambda _: metrics.moments(np.ones((1, 3), "f")), r"n >= 2, got shape \(1, 3\)"),
        (lambda _: metrics.moments(np.float32([[0, 1], [np.inf, 2]])), "row 1"),
        (lambda _: metrics.frechet_distance(np.eye(3), np.eye(4)), r"\(3,\) and of \(4,\)"),
        (partial(metrics.evaluate, X.reshape(20, -1)[:, :63]), r"\(20, 63\) is no sample of imag"),
        (partial(metrics.evaluate, X[..., 0]), r"\(20, 8, 8\) is no sample"),
        (partial(metrics.evaluate, X[:1]), "two samples"),
        (partial(metrics.evaluate, BROKEN), "points is not finite in row 5"),
    ],
)
def test_bad_input_is_refused(reference, call, words):
    with pytest.raises(ValueError, match=words):
        call(reference)


def test_evaluate_is_what_numpy_finds(digits, network, reference):
    noise = np.random.default_rng(0).normal(size=(150, 8, 8, 1))
    samples = (digits[0][:150] + 0.3 * noise).astype(np.float32)
    evaluated = metrics.evaluate(samples, reference)
    x, y = (z.reshape(len(z), -1) for z in (samples, digits[2][:200]))
    of_x, of_y = metrics.outputs(network, x), metrics.outputs(network, y)
    features = [np.asarray(outputs.features, float) for outputs in (of_x, of_y)]
    pixels = x.astype(float), y.astype(float)
    for name, pair in (("mmd2_pixels", pixels), ("mmd2_features", features)):
        gaussian = partial(kernel, bandwidth=np.median(pdist(pair[1])))
        expected = mmd_squared(*pair, gaussian, unbiased=True)
        assert evaluated[name] == pytest.approx(expected, rel=1e-3)
    expected = metrics.frechet_distance(of_x.features, of_y.features)
    assert evaluated["frechet"] == pytest.approx(expected, rel=1e-6)

    # W_2^2 on the line of 150 and 200 points: both repeated to 600.
    directions = np.asarray(reference.directions, float)
    u, v = (np.sort(np.repeat(z @ directions.T, 600 // len(z), axis=0), axis=0) for z in (x, y))
    sliced = np.sqrt(np.mean((u - v) ** 2))
    assert evaluated["sliced_wasserstein"] == pytest.approx(sliced, rel=1e-4)

    labels = (np.asarray(outputs.predictions) for outputs in (of_x, of_y))
    p, q = (np.bincount(predictions, minlength=10) / len(predictions) for predictions in labels)
    # Total variation is the transport cost for a distance of 1 between any two classes.
    assert evaluated["class_distance"] == pytest.approx(np.maximum(p - q, 0).sum())
    assert evaluated["class_entropy_gap"] == pytest.approx(entropy(q) - entropy(p))


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
