"""Baselines of condensation against loops, scikit-learn and closed forms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from condensing import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances_argmin

from lib.networks import ConvNet, classification, optimizers
from xp_dataset_distillation import baselines, real_data
from xp_dataset_distillation.config import BaselineConfig

KEY = jax.random.key(0)
TOY = real_data.from_dataset(toy())


def herding_by_loop(features, num):
    """As it is published: every candidate's mean, one at a time."""
    mean, chosen = features.mean(axis=0), []
    for _ in range(num):
        others = [i for i in range(len(features)) if i not in chosen]
        costs = [np.linalg.norm(mean - features[[*chosen, i]].mean(axis=0)) for i in others]
        chosen.append(others[int(np.argmin(costs))])
    return chosen


@pytest.mark.parametrize("offset", [0, 1000])
def test_herding_is_the_greedy_loop(offset):
    features = np.random.default_rng(0).normal(size=(30, 4)) + offset
    assert list(baselines.herding(features, 30)) == herding_by_loop(features, 30)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([2**-10, 1, 2**10]))
def test_herding_does_not_depend_on_scale_and_nests(seed, scale):
    features = np.random.default_rng(seed).normal(size=(12, 3))
    six = baselines.herding(features, 6)
    np.testing.assert_array_equal(baselines.herding(scale * features, 6), six)
    np.testing.assert_array_equal(baselines.herding(features, 3), six[:3])
    assert len(set(six)) == 6


def test_herding_chooses_equal_rows_in_order_and_refuses_bad_input():
    np.testing.assert_array_equal(baselines.herding(np.ones((4, 2)), 4), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="cannot choose 5 of 4 rows"):
        baselines.herding(np.ones((4, 2)), 5)
    with pytest.raises(ValueError, match="NaN"):
        baselines.herding(np.full((4, 2), np.nan), 1)


@pytest.mark.parametrize("block_size", [4, 100])
def test_herded_images_are_chosen_within_the_class_by_the_features(block_size):
    matrix = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    shapes = set()

    def features(images):
        shapes.add(images.shape)
        assert images.dtype == jnp.float32
        assert images.max() <= 1
        return images.reshape(len(images), -1) @ matrix

    herded = baselines.herded_images(TOY, 3, features, block_size=block_size)
    assert shapes == {(min(block_size, 9), 3, 2, 1)}
    for label in range(3):
        images = TOY.images[TOY.labels == label].astype(np.float32) / 255
        chosen = herding_by_loop((images.reshape(len(images), -1) @ matrix).astype(float), 3)
        np.testing.assert_allclose(herded[label], images[chosen], rtol=1e-6)


def test_random_images_are_different_ones_of_their_class():
    drawn = baselines.random_images(KEY, TOY, 5)
    assert drawn.shape == (3, 5, 3, 2, 1)
    assert drawn.dtype == np.float32
    for label, images in enumerate(np.rint(drawn * 255).astype(np.uint8)):
        members = {image.tobytes() for image in TOY.images[TOY.labels == label]}
        of_class = {image.tobytes() for image in images}
        assert of_class <= members
        assert len(of_class) == 5
    assert not np.array_equal(drawn, baselines.random_images(jax.random.key(1), TOY, 5))


def test_centers_are_the_means_of_the_images_nearest_to_them():
    real = real_data.from_dataset(toy((40, 30)))
    centers = baselines.kmeans_centers(KEY, real, 4)
    assert centers.shape == (2, 4, 3, 2, 1)
    assert centers.dtype == np.float32
    for label, of_class in enumerate(centers.reshape(2, 4, -1)):
        rows = real.images[real.labels == label].reshape(-1, 6) / 255
        nearest = pairwise_distances_argmin(rows, of_class)
        means = [rows[nearest == k].mean(axis=0) for k in range(4)]
        np.testing.assert_allclose(of_class, means, atol=1e-5)
        sizes = np.bincount(nearest, minlength=4)
        assert list(sizes) == sorted(sizes, reverse=True)
    np.testing.assert_array_equal(centers, baselines.kmeans_centers(KEY, real, 4))


@pytest.mark.parametrize("kind", ["random", "herding", "kmeans"])
def test_more_images_than_a_class_has_are_refused_by_its_name_and_size(kind, monkeypatch):
    monkeypatch.setattr(baselines, "trained_features", lambda *_: lambda x: x.reshape(len(x), -1))
    config = BaselineConfig("toy", kind=kind, images_per_class=5)
    assert baselines.images_of(config, TOY, seed=0).shape == (3, 5, 3, 2, 1)
    with pytest.raises(ValueError, match=r"'b' of toy .* the 6 asked for \(--images_per_class"):
        baselines.images_of(replace(config, images_per_class=6), TOY, seed=0)


@pytest.mark.slow
def test_features_are_those_of_the_trained_network_before_its_last_layer():
    config = BaselineConfig("digits", feature_epochs=1, feature_width=2, feature_depth=1)
    real = real_data.subset(KEY, real_data.load("digits"), 3)
    images = jnp.asarray(real.images, jnp.float32) / 255
    features = baselines.trained_features(KEY, config, real)(images)
    network, normalized = ConvNet(10, depth=1, width=2), (images - real.mean[0]) / real.std[0]
    parameters, _ = classification.train(
        KEY, network, normalized, jnp.asarray(real.labels), optimizer=optimizers.adam(1e-3),
        num_epochs=1, batch_size=256,
    )  # fmt: skip
    last = parameters["params"]["Dense_0"]
    logits = features @ last["kernel"] + last["bias"][None]
    np.testing.assert_allclose(logits, network.apply(parameters, normalized), atol=1e-4)
