"""CutMix against a loop over pixels, and the law of its boxes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lib.augment.cutmix import cutmix

BATCH, HEIGHT, WIDTH = 5, 6, 9
# Pixel (i, j) of channel k of image n has a value that no other pixel has.
IMAGES = np.arange(BATCH * HEIGHT * WIDTH * 2, dtype=np.float32).reshape(BATCH, HEIGHT, WIDTH, 2)
TARGETS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1]]


@partial(jax.jit, static_argnames=("probability", "alpha", "num"))
def many(key, num, **options):
    keys = jax.random.split(key, num)
    each = jax.vmap(lambda key: cutmix(key, jnp.asarray(IMAGES), jnp.asarray(TARGETS), **options))
    return each(keys)


def boxes(images):
    """(row, end row, column, end column) of what changed in one batch, None if nothing did."""
    where = np.argwhere((np.asarray(images) != IMAGES).any(axis=(0, 3)))
    if not len(where):
        return None
    (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0) + 1
    return top, bottom, left, right


def test_half_of_the_batches_and_boxes_of_half_the_area_around_every_pixel():
    """A large alpha has lambda = 1/2: no box is empty, none seen where the permutation (of 120)
    moves nobody."""
    num = 2000
    images, _ = many(jax.random.key(1), num, probability=0.5, alpha=1e5)
    found = np.array([box for box in map(boxes, np.asarray(images)) if box is not None])
    assert scipy.stats.binomtest(len(found), num, 0.5 * (1 - 1 / 120)).pvalue > 1e-3
    for size, low, high in ((HEIGHT, *found.T[:2]), (WIDTH, *found.T[2:])):
        half = int(size * 0.5**0.5) // 2
        expected = {}
        for centre in range(size):
            ends = max(0, centre - half), min(size, centre + half)
            expected[ends] = expected.get(ends, 0) + len(found) / size
        counts = dict.fromkeys(expected, 0)
        for ends in zip(low.tolist(), high.tolist()):
            counts[ends] += 1
        assert scipy.stats.chisquare(list(counts.values()), list(expected.values())).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.3, pytest.param(3.0, marks=pytest.mark.slow)])
def test_areas_follow_the_beta_law(alpha):
    """Of those that are seen: the box is not empty, and the permutation of two moves both."""
    size, num = 32, 4000
    pair = jnp.stack([jnp.zeros((size, size, 1)), jnp.ones((size, size, 1))])

    @jax.jit
    @jax.vmap
    def draw(key):
        images, targets = cutmix(key, pair, jnp.eye(2), probability=1.0, alpha=alpha)
        return jnp.mean(images[0]), targets[0, 1]

    means, areas = draw(jax.random.split(jax.random.key(4), num))
    np.testing.assert_array_equal(means, areas)
    rng, expected = np.random.default_rng(5), []
    for _ in range(num):
        half = int(size * (1 - rng.beta(alpha, alpha)) ** 0.5) // 2
        sides = [min(size, c + half) - max(0, c - half) for c in rng.integers(size, size=2)]
        expected.append(sides[0] * sides[1] / size**2)
    expected = np.array(expected)
    seen = np.asarray(areas)[np.asarray(areas) > 0]
    share = np.mean(expected > 0) / 2
    assert scipy.stats.binomtest(len(seen), num, share).pvalue > 1e-3
    assert scipy.stats.ks_2samp(seen, expected[expected > 0]).pvalue > 1e-3


def test_gradients_go_to_the_images_that_are_seen():
    @jax.jit
    @partial(jax.grad, has_aux=True)
    def slope(images):
        mixed, _ = cutmix(
            jax.random.key(6), images, jnp.asarray(TARGETS), probability=1.0, alpha=1e5
        )
        return jnp.sum(mixed * jnp.asarray(IMAGES)), mixed

    gradient, mixed = slope(jnp.asarray(IMAGES))
    # A pixel has the weight of the place that shows it.
    expected = np.zeros(IMAGES.size)
    expected[np.asarray(mixed).astype(int).ravel()] = IMAGES.ravel()
    np.testing.assert_array_equal(gradient.ravel(), expected)
    assert boxes(mixed) is not None


def test_options_out_of_range():
    for options, message in (
        ({"probability": 1.5}, "probability must lie in .* got 1.5"),
        ({"probability": -0.1}, "got -0.1"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": float("inf")}, "got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            cutmix(jax.random.key(7), jnp.asarray(IMAGES), jnp.asarray(TARGETS), **options)
