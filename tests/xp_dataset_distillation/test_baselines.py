"""Baselines of condensation against loops, scikit-learn and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances_argmin

from lib.datasets import Dataset
from xp_dataset_distillation import baselines, real_data

KEY = jax.random.key(0)


def toy(counts=(7, 5, 9), *, shape=(3, 2, 1), seed=0):
    """Random images whose first pixel is the label."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    images[:, 0, 0, 0] = labels
    names = tuple("abcdefgh"[: len(counts)])
    return real_data.from_dataset(Dataset("toy", images, labels, names))


def herding_by_loop(features, num):
    """As it is published: every candidate's mean, one at a time."""
    features = features.astype(np.float64)
    mean, taken = features.mean(axis=0), []
    for _ in range(num):
        left = [i for i in range(len(features)) if i not in taken]
        costs = [np.linalg.norm(mean - features[[*taken, i]].mean(axis=0)) for i in left]
        taken.append(left[int(np.argmin(costs))])
    return taken


@pytest.mark.parametrize("offset", [0, 1000])
def test_herding_is_the_greedy_loop(offset):
    features = np.random.default_rng(0).normal(size=(30, 4)) + offset
    assert list(baselines.herding(features, 30)) == herding_by_loop(features, 30)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([2**-10, 1, 2**10]))
def test_herding_does_not_know_scale_and_nests(seed, scale):
    features = np.random.default_rng(seed).normal(size=(12, 3))
    wanted = baselines.herding(features, 6)
    np.testing.assert_array_equal(baselines.herding(scale * features, 6), wanted)
    np.testing.assert_array_equal(baselines.herding(features, 3), wanted[:3])
    assert len(set(wanted)) == 6


def test_herding_of_equal_rows_takes_each_once():
    np.testing.assert_array_equal(baselines.herding(np.ones((4, 2)), 4), [0, 1, 2, 3])


def test_herding_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="cannot take 5 of 4 rows"):
        baselines.herding(np.ones((4, 2)), 5)
    with pytest.raises(ValueError, match="NaN"):
        baselines.herding(np.full((4, 2), np.nan), 1)


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_herded_images_are_chosen_within_the_class_by_the_features(block_size):
    real, matrix = toy(), jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)))
    seen = []

    def features(images):
        seen.append(images.shape)
        assert images.dtype == jnp.float32
        assert images.max() <= 1
        return images.reshape(len(images), -1) @ matrix

    found = baselines.herded_images(real, 3, features, block_size=block_size)
    assert set(seen) == {(min(block_size, 9), 3, 2, 1)}
    for label, (start, count) in enumerate(zip(real.starts, real.counts)):
        images = real.images[start : start + count].astype(np.float32) / 255
        wanted = herding_by_loop(images.reshape(count, -1) @ np.asarray(matrix), 3)
        np.testing.assert_allclose(found[label], images[wanted], rtol=1e-6)


def test_random_images_are_different_ones_of_their_class():
    real = toy()
    found = baselines.random_images(KEY, real, 5)
    assert found.shape == (3, 5, 3, 2, 1)
    assert found.dtype == np.float32
    for label, images in enumerate(np.rint(found * 255).astype(np.uint8)):
        members = {image.tobytes() for image in real.images[real.labels == label]}
        assert {image.tobytes() for image in images} <= members
        assert len({image.tobytes() for image in images}) == 5
    assert not np.array_equal(found, baselines.random_images(jax.random.key(1), real, 5))


def test_centres_are_the_means_of_the_images_nearest_to_them():
    real = toy((40, 30))
    found = baselines.kmeans_centres(KEY, real, 4)
    assert found.shape == (2, 4, 3, 2, 1)
    assert found.dtype == np.float32
    for label, centres in enumerate(found.reshape(2, 4, -1)):
        rows = real.images[real.labels == label].reshape(-1, 6) / 255
        nearest = pairwise_distances_argmin(rows, centres)
        means = [rows[nearest == k].mean(axis=0) for k in range(4)]
        np.testing.assert_allclose(centres, means, atol=1e-5)
        sizes = np.bincount(nearest, minlength=4)
        assert list(sizes) == sorted(sizes, reverse=True)
    np.testing.assert_array_equal(found, baselines.kmeans_centres(KEY, real, 4))


def test_one_centre_is_the_mean_of_the_class():
    real = toy()
    found = baselines.kmeans_centres(KEY, real, 1)
    wanted = [real.images[real.labels == c].mean(axis=0) / 255 for c in range(3)]
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "baseline",
    [
        lambda real, num: baselines.random_images(KEY, real, num),
        lambda real, num: baselines.herded_images(real, num, lambda x: x.reshape(len(x), -1)),
        lambda real, num: baselines.kmeans_centres(KEY, real, num),
    ],
)
def test_more_images_than_a_class_has_are_refused_by_its_name_and_size(baseline):
    with pytest.raises(ValueError, match="class 'b' of toy has 5 images, fewer than the 6"):
        baseline(toy(), 6)
    with pytest.raises(ValueError, match="at least 1 image of every class, not 0"):
        baseline(toy(), 0)
