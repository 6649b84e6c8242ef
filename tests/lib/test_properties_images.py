"""Properties of what changes images, at any scale and in both dtypes, against loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.augment import _warps as warps
from lib.augment import cutmix
from lib.flow_matching import unet

EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)


def few(examples):
    return settings(max_examples=examples, deadline=None)


# Warps


def bilinear(images, row, column):
    """The images [n, H, W, c] at one place, 0 outside."""
    total = np.zeros(images.shape[::3])
    for a in range(images.shape[1]):
        for b in range(images.shape[2]):
            weight = max(0, 1 - abs(row - a)) * max(0, 1 - abs(column - b))
            total += weight * images[:, a, b]
    return total


@jax.jit
def warped(images, rows, columns, angle, weights):
    """Both warps, and what each hands back to the images for `weights` on its output."""

    def both(images):
        return warps.sample_grid(images, rows, columns), warps.rotate(images, angle)

    values, pullback = jax.vjp(both, images)
    nothing = jnp.zeros_like(weights)
    return values, (pullback((weights, nothing))[0], pullback((nothing, weights))[0])


@few(16)
@given(
    st.sampled_from(
        [((1, 1, 1, 1), np.float32), ((3, 5, 4, 2), np.float32), ((2, 4, 7, 1), np.float64)]
    ),
    EXPONENTS,
    st.floats(-7, 7),
    SEEDS,
)
def test_warps(case, exponent, angle, seed):
    """A place is off by 8 roundings of the sides; so is a weight, and a value takes four pixels.
    Gradients are the transpose, to as many roundings as there are products in both."""
    (shape, dtype), rng = case, np.random.default_rng(seed)
    n, height, width, channels = shape
    images = 10.0**exponent * rng.normal(size=shape)
    weights = rng.normal(size=shape)
    rows, columns = rng.uniform(-2, height + 1, height), rng.uniform(-2, width + 1, width)
    rows[0], columns[-1] = height - 1, 0
    given_ = [np.asarray(a, dtype) for a in (images, rows, columns, angle, weights)]
    with jax.enable_x64(True):
        values, gradients = warped(*map(jnp.asarray, given_))
        values, gradients = jax.tree.map(np.asarray, (values, gradients))
    images, rows, columns, angle, weights = (np.asarray(a, float) for a in given_)
    eps, largest = np.finfo(dtype).eps, np.abs(images).max()
    expected = np.zeros((2, *shape))
    centre_i, centre_j = (height - 1) / 2, (width - 1) / 2
    cos, sin = np.cos(angle), np.sin(angle)
    for i in range(height):
        for j in range(width):
            expected[0, :, i, j] = bilinear(images, rows[i], columns[j])
            y, x = i - centre_i, j - centre_j
            place = cos * y + sin * x + centre_i, cos * x - sin * y + centre_j
            expected[1, :, i, j] = bilinear(images, *place)
    bound = 4 * 8 * (height + width) * eps * largest
    for value, gradient, exact in zip(values, gradients, expected):
        assert value.dtype == gradient.dtype == dtype
        assert np.all(np.abs(value - exact) <= bound)
        inner = np.sum(exact * weights), np.sum(images * gradient)
        slack = 2 * (n + channels + 9) * np.abs(weights).sum() * bound
        assert abs(inner[0] - inner[1]) <= slack
        assert np.isfinite(gradient).all()


# CutMix


@partial(jax.jit, static_argnames="probability")
def mixed(key, images, targets, probability):
    return cutmix.cutmix(key, images, targets, probability=probability)


@few(16)
@given(
    st.sampled_from([((1, 1, 1, 1), np.float64, 0.5), ((4, 6, 3, 2), np.float32, 1.0)]),
    EXPONENTS,
    SEEDS,
)
def test_boxes_and_targets_agree(case, exponent, seed):
    """Each pixel is one of the image's or its partner's, of whom there is one permutation; a target
    gives its partner the box's share of the pixels, and its sum stays."""
    (shape, dtype, probability), rng = case, np.random.default_rng(seed)
    # No value comes twice, so that each tells where it is from.
    images = 10.0**exponent * (1 + np.arange(np.prod(shape)).reshape(shape))
    targets = rng.dirichlet(np.ones(5), shape[0])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, dtype) for a in (images, targets)]
        found = mixed(jax.random.key(seed), *arrays, probability)
        images, targets, new_images, new_targets = map(np.asarray, (*arrays, *found))
    assert new_images.dtype == new_targets.dtype == dtype
    box = np.zeros(shape[1:3], bool)
    partners = np.arange(len(images))
    flat = images.reshape(len(images), -1)
    for i, image in enumerate(new_images):
        places = image != images[i]
        box |= places[..., 0]
        if places.any():
            partners[i] = np.argwhere(flat == image[places][0])[0, 0]
    assert sorted(partners) == list(range(len(images)))
    expected = np.where(box[None, :, :, None], images[partners], images)
    np.testing.assert_array_equal(new_images, expected)
    share = box.mean()  # 0 also where the permutation moves nobody, and a box cannot be seen
    wanted = (1 - share) * targets.astype(float) + share * targets.astype(float)[partners]
    np.testing.assert_allclose(new_targets, wanted, rtol=0, atol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(new_targets.sum(axis=1), 1, rtol=0, atol=8 * np.finfo(dtype).eps)


# Blocks of pixels


@few(16)
@given(
    st.sampled_from([((1, 1, 1, 1), 1), ((2, 4, 6, 3), 2), ((1, 6, 3, 1), 3)]),
    st.sampled_from([np.float32, np.float64, np.float16]),
    SEEDS,
)
def test_pixels_become_channels_and_come_back(case, dtype, seed):
    (shape, factor), rng = case, np.random.default_rng(seed)
    images = rng.normal(size=shape).astype(dtype)
    n, height, width, channels = shape
    with jax.enable_x64(True):
        blocks = unet.space_to_depth(jnp.asarray(images), factor)
        back = unet.depth_to_space(blocks, factor)
        blocks, back = np.asarray(blocks), np.asarray(back)
    assert blocks.shape == (n, height // factor, width // factor, factor**2 * channels)
    for i in range(height):
        for j in range(width):
            first = (i % factor * factor + j % factor) * channels
            pixels = blocks[:, i // factor, j // factor, first : first + channels]
            np.testing.assert_array_equal(pixels, images[:, i, j])
    assert blocks.dtype == back.dtype == dtype
    np.testing.assert_array_equal(back, images)
