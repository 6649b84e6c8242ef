"""Elastic deformation: a smooth random field says from where each pixel is taken.

Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual
document analysis" (2003); the field here is interpolated from a coarse grid.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float


def elastic(
    key: Array,
    images: Float[Array, "n height width channels"],
    *,
    pixels: float = 1.5,
    grid: int = 4,
) -> Float[Array, "n height width channels"]:
    """Each image sampled at (i, j) + its own field, bilinearly, 0 outside.

    The field is N(0, pixels^2), row and column apart, on a grid x grid lattice, and interpolated
    from there by cubic splines.

    Raises ValueError on a deviation in pixels that is not at least 0, or a grid of less than two.
    """
    if not pixels >= 0 or grid < 2:
        raise ValueError(f"pixels must be at least 0 and grid at least 2, got {pixels}, {grid}")
    n, height, width, _ = images.shape
    coarse = pixels * jax.random.normal(key, (n, 2, grid, grid), images.dtype)
    field = jax.image.resize(coarse, (n, 2, height, width), "cubic")
    places = jnp.mgrid[:height, :width].astype(images.dtype)[None] + field

    def deformed(image, places):
        channels = jnp.moveaxis(image, 2, 0)
        sampled = jax.vmap(lambda x: map_coordinates(x, list(places), order=1))(channels)
        return jnp.moveaxis(sampled, 0, 2)

    return jax.vmap(deformed)(images, places)
