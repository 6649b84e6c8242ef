"""Factor decoding and encoding against torch's interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xp_dataset_distillation.factor import decode, encode

SHAPES = [(8, 8, 1), (13, 7, 2)]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def cells_of(image, factor):
    """The cells of one image, row by row."""
    return [
        cell
        for row in np.array_split(image, factor, axis=0)
        for cell in np.array_split(row, factor, axis=1)
    ]


def torch_resized(image, size, *, antialias=False):
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    resized = torch.nn.functional.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False, antialias=antialias
    )
    return resized[0].numpy().transpose(1, 2, 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_torchs_bilinear_interpolation_of_every_cell_in_order(shape, factor):
    images = pixels(2, 3, *shape)
    decoded = decode(jnp.asarray(images), factor)
    expected = [
        [torch_resized(cell, shape[:2]) for image in row for cell in cells_of(image, factor)]
        for row in images
    ]
    np.testing.assert_allclose(decoded, np.array(expected), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_is_antialiased_interpolation_into_every_cell(shape, factor):
    images = pixels(2 * factor**2, *shape)
    stored = np.asarray(encode(jnp.asarray(images), factor))
    assert stored.shape == (2, *shape)
    into = [cell for image in stored for cell in cells_of(image, factor)]
    for image, cell in zip(images, into):
        resized = torch_resized(image, cell.shape[:2], antialias=True)
        np.testing.assert_allclose(cell, resized, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("function", "num"), [(decode, 2), (encode, 8)])
def test_the_gradient_is_the_adjoint_map(function, num):
    x = jnp.asarray(pixels(num, 7, 8, 1))
    value, vjp = jax.vjp(lambda x: function(x, 2), x)
    y = jnp.asarray(pixels(*value.shape, seed=1))
    np.testing.assert_allclose(jnp.vdot(value, y), jnp.vdot(x, vjp(y)[0]), rtol=1e-13)


def test_factor_1_is_the_identity_and_vmap_is_a_batch():
    images = jnp.asarray(pixels(2, 2, 8, 8, 1), jnp.float32)
    assert np.array_equal(decode(images, 1), images)
    assert np.array_equal(encode(images, 1), images)
    decoded = jax.vmap(lambda x: decode(x, 2))(images)
    assert decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded, decode(images, 2), atol=1e-6)


@pytest.mark.parametrize(("shape", "factor"), [((5, 4), 2), ((3, 8), 3)])
def test_constants_survive_both_ways_and_values_stay_in_their_range(shape, factor):
    flat = jnp.full((9, *shape, 1), 0.3)[: factor**2]
    stored = encode(flat, factor)
    np.testing.assert_allclose(stored, flat[:1], atol=1e-6)
    np.testing.assert_allclose(decode(stored, factor), flat, atol=1e-6)
    image = jnp.asarray(pixels(1, *shape, 1), jnp.float32)
    decoded = decode(image, factor)
    assert image.min() - 1e-6 <= decoded.min()
    assert decoded.max() <= image.max() + 1e-6


@pytest.mark.parametrize("factor", [0, -1, 5])
@pytest.mark.parametrize("function", [decode, encode])
def test_a_factor_that_leaves_no_pixels_is_named_with_the_size(function, factor):
    with pytest.raises(ValueError, match=rf"factor {factor} leaves no pixels .* 6 x 4"):
        function(jnp.zeros((25, 6, 4, 1)), factor)


def test_other_input_is_refused():
    with pytest.raises(ValueError, match=r"floats \[..., n, H, W, channels\], not uint8"):
        decode(jnp.zeros((1, 4, 4, 1), jnp.uint8), 2)
    with pytest.raises(ValueError, match=r"not float32\[4, 4, 1\]"):
        decode(jnp.zeros((4, 4, 1)), 2)
    with pytest.raises(ValueError, match="5 images do not fill stored images of 4 cells"):
        encode(jnp.zeros((5, 4, 4, 1)), 2)
