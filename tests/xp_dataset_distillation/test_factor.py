"""Factor decoding and encoding against torch's interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xp_dataset_distillation.factor import decode, encode

x64 = pytest.mark.usefixtures("x64")
both = pytest.mark.parametrize(
    ("shape", "factor"), [((8, 8, 1), 2), ((13, 7, 2), 2), ((13, 7, 2), 3), ((3, 8, 1), 3)]
)


def pixels(*shape):
    return np.random.default_rng(0).random(shape)


def cells_of(image, factor):
    """The cells of one image, row by row."""
    rows = np.array_split(image, factor, axis=0)
    return [cell for row in rows for cell in np.array_split(row, factor, axis=1)]


def torch_resized(image, size, *, antialias=False):
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    resized = torch.nn.functional.interpolate(
        tensor, size=size, mode="bilinear", align_corners=False, antialias=antialias
    )
    return resized[0].numpy().transpose(1, 2, 0)


@x64
@both
def test_decode_is_torchs_bilinear_interpolation_of_every_cell_in_order(shape, factor):
    images = pixels(2, 3, *shape)
    decoded = decode(jnp.asarray(images), factor)
    expected = [
        [torch_resized(cell, shape[:2]) for image in row for cell in cells_of(image, factor)]
        for row in images
    ]
    np.testing.assert_allclose(decoded, np.array(expected), rtol=0, atol=1e-12)


@x64
@both
def test_encode_is_antialiased_interpolation_into_every_cell(shape, factor):
    images = pixels(2 * factor**2, *shape)
    stored = np.asarray(encode(jnp.asarray(images), factor))
    assert stored.shape == (2, *shape)
    into = [cell for image in stored for cell in cells_of(image, factor)]
    for image, cell in zip(images, into):
        resized = torch_resized(image, cell.shape[:2], antialias=True)
        np.testing.assert_allclose(cell, resized, atol=1e-12)


def test_factor_1_is_the_identity_and_vmap_is_a_batch():
    images = jnp.asarray(pixels(2, 2, 8, 8, 1), jnp.float32)
    assert np.array_equal(decode(images, 1), images)
    assert np.array_equal(encode(images, 1), images)
    decoded = jax.vmap(lambda x: decode(x, 2))(images)
    assert decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded, decode(images, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("function", "images", "factor", "message"),
    [
        *((f, jnp.zeros((25, 6, 4, 1)), n, f"factor {n} leaves no pixels .* 6 x 4")
          for f in (decode, encode) for n in (0, -1, 5)),
        (decode, jnp.zeros((1, 4, 4, 1), jnp.uint8), 2, r"floats \[..., n, H, W,.* not uint8"),
        (decode, jnp.zeros((4, 4, 1)), 2, r"not float32\[4, 4, 1\]"),
        (encode, jnp.zeros((5, 4, 4, 1)), 2, "5 images do not fill stored images of 4 cells"),
    ],
)  # fmt: skip
def test_other_input_is_refused(function, images, factor, message):
    with pytest.raises(ValueError, match=message):
        function(images, factor)
