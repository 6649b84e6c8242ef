"""Several training images in one stored image: the factor of a condensed set.

A stored image [H, W] is cut into factor x factor cells, and each cell, enlarged to [H, W], is one
training image (Kim et al., Dataset condensation via efficient synthetic-data parameterization,
ICML 2022). So one stored image gives factor^2 training images of less detail.

Cells lie as `numpy.array_split` cuts: where factor does not divide the height, the first H mod
factor rows of cells have one pixel more than the others. Published mixed starts are laid out so
too; published decoders cut cells of ceil(H / factor) instead, and fill what is missing at the end
with gray, which then shines into the last cells. Where factor divides H and W they are the same.

Decoded image k factor^2 + i factor + j is the cell in row i and column j of stored image k.

Both directions are linear and separable: one product with a constant matrix for the rows and one
for the columns, so gradients, vmap and scan go through.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def check_factor(factor: int, height: int, width: int) -> None:
    """Raises ValueError unless each of factor x factor cells of an image has a pixel."""
    if not 1 <= factor <= min(height, width):
        raise ValueError(
            f"factor {factor} leaves no pixels of images of {height} x {width}: it must lie in "
            f"[1, {min(height, width)}]"
        )


def _enlarge(length: int, size: int) -> np.ndarray:
    """[size, length]: linear interpolation between pixel centers, beyond the last ones their
    value."""
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(length)), 0)


def _shrink(size: int, length: int) -> np.ndarray:
    """[length, size]: weights of a triangle of half width size / length around each new pixel's
    center, cut at the edge and scaled to sum 1."""
    scale = size / length
    center = (np.arange(length) + 0.5) * scale
    weights = np.maximum(1 - np.abs(np.arange(size) + 0.5 - center[:, None]) / scale, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@cache
def _matrices(size: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """(enlarging [factor, size, size] from a stored axis to that of each cell, shrinking [factor,
    size, size] back), zero outside of the cell."""
    enlarging, shrinking = np.zeros((2, factor, size, size))
    for i, cell in enumerate(np.array_split(np.arange(size), factor)):
        enlarging[i][:, cell] = _enlarge(len(cell), size)
        shrinking[i][cell] = _shrink(size, len(cell))
    return enlarging, shrinking


def _check_pixels(images: Array, name: str) -> None:
    if images.ndim < 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{name} are floats [..., n, H, W, channels], not {images.dtype}{list(images.shape)}"
        )


def decode(
    images: Float[Array, "... n height width channels"], factor: int
) -> Float[Array, "... num_decoded height width channels"]:
    """Every cell enlarged to the full size, bilinearly: [..., n factor^2, H, W, channels].

    Pixel centers are at half integers (align_corners=False) and the edge is repeated. Values stay
    within those of their cell. With factor 1 the images are returned as they are.

    Raises ValueError for a factor that leaves no pixels, and for images that are not floats.
    """
    _check_pixels(images, "images")
    *batch, n, height, width, channels = images.shape
    check_factor(factor, height, width)
    if factor == 1:
        return images
    rows, columns = (
        jnp.asarray(_matrices(size, factor)[0], images.dtype) for size in (height, width)
    )
    exact = lax.Precision.HIGHEST
    cells = jnp.einsum("...nhwc,ayh->...naywc", images, rows, precision=exact)
    cells = jnp.einsum("...naywc,bxw->...nabyxc", cells, columns, precision=exact)
    return cells.reshape(*batch, n * factor**2, height, width, channels)


def encode(
    cells: Float[Array, "... num_cells height width channels"], factor: int
) -> Float[Array, "... n height width channels"]:
    """Each factor^2 images shrunk into the cells of one: the mixed start of a condensed set.

    `cells` [..., n factor^2, H, W, channels] are in the order of `decode`; they are shrunk
    bilinearly with antialiasing, as Pillow does, so that every pixel counts. Not the inverse of
    `decode`, which detail does not survive. With factor 1 the images are returned as they are.

    Raises ValueError for a factor that leaves no pixels, and for a number of images that factor^2
    does not divide.
    """
    _check_pixels(cells, "cells")
    *batch, num_cells, height, width, channels = cells.shape
    check_factor(factor, height, width)
    if num_cells % factor**2:
        raise ValueError(f"{num_cells} images do not fill stored images of {factor**2} cells each")
    if factor == 1:
        return cells
    rows, columns = (
        jnp.asarray(_matrices(size, factor)[1], cells.dtype) for size in (height, width)
    )
    cells = cells.reshape(*batch, -1, factor, factor, height, width, channels)
    exact = lax.Precision.HIGHEST
    images = jnp.einsum("...nabyxc,bwx->...naywc", cells, columns, precision=exact)
    return jnp.einsum("...naywc,ahy->...nhwc", images, rows, precision=exact)
