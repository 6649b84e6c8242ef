"""Differentiable siamese augmentation: random changes of images that gradients pass through.

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation" (2021), and the
variant of Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (2022).
Real and synthetic images get the same changes: draw one set of parameters, apply it to both.

Pixels are in [0, 1] before a change, and may leave it after one. Images are [N, height, width,
channels] of any size; what enters from outside of an image is 0. The order is: color (brightness,
saturation, contrast), geometry (flip, scale, crop, rotation), cutout. So means of color are those
of the image itself, and borders and holes stay 0. No image affects another, so that
equal parameters change it alike in any batch.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lib.augment._warps import Images, rotate, sample_grid

GEOMETRY = ("crop", "scale", "rotate")
# By operation a, b and the value that changes nothing: a + b u, u uniform on [0, 1), is added to
# the image as brightness, or is the factor of the other two. These and what follows are the
# published strengths.
COLOR = {
    "brightness": (-0.5, 1.0, 0.0),
    "saturation": (0.0, 2.0, 1.0),
    "contrast": (0.5, 1.0, 1.0),
}
OPERATIONS = ("flip", *GEOMETRY, "cutout", *COLOR)
FLIP_PROBABILITY = 0.5
CROP_SHARE = 0.125  # The largest shift, as a share of a side.
SCALE_RATIO = 1.2  # Sides shrink and grow by this factor at most.
ROTATION_DEGREES = 15.0
CUTOUT_SHARE = 0.5  # The side of the hole, as a share of the image's.

Dialect = Literal["idc", "dsa"]
"""The published code that the augmentations follow: IDC's or DSA's."""
Number = Float[Array, "*num"] | None


@dataclass(frozen=True)
class Augmentation:
    """What may be done to images, at the published strengths.

    `operations` are names among `OPERATIONS`, or "color", which stands for the last three as one.
    `dialect` says which of them are done each time:
      "idc": flip, color and cutout always (flip with its probability), and exactly one, drawn
        uniformly, of those of crop, scale and rotate that are named.
      "dsa": exactly one, drawn uniformly ("color" counts once; a drawn flip has its probability).

    Hashable: a static argument of jit. Raises ValueError on names that are unknown or come twice
    and on an unknown dialect.
    """

    operations: tuple[str, ...]
    dialect: Dialect

    def __post_init__(self):
        unknown = [name for name in self.operations if name not in (*OPERATIONS, "color")]
        if unknown:
            raise ValueError(
                f"no operation {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(OPERATIONS)}, and color for the last three"
            )
        for name in OPERATIONS:
            if self._expanded().count(name) > 1:
                raise ValueError(f"{name} is named more than once: {'_'.join(self.operations)}")
        if self.dialect not in ("idc", "dsa"):
            raise ValueError(f'the dialect must be "idc" or "dsa", got {self.dialect!r}')

    def _expanded(self) -> list[str]:
        parts = [COLOR if name == "color" else (name,) for name in self.operations]
        return [name for part in parts for name in part]


def parse(strategy: str, *, dialect: Dialect, flips: bool = True) -> Augmentation:
    """The augmentation of a published strategy string, such as "color_crop_cutout".

    "" and "none" name no operation. `flips=False` leaves flip out: a mirrored digit is none.
    Raises ValueError as `Augmentation` does.
    """
    names = strategy.split("_") if strategy not in ("", "none") else []
    return Augmentation(tuple(name for name in names if flips or name != "flip"), dialect)


class Parameters(NamedTuple):
    """One change of images: scalars for one that all share, [N] arrays for one for each image.

    None where the strategy does not name an operation: nothing is computed for it. Shares and
    positions are relative, so that one change fits images of any size. Positions are uniform on
    [0, 1) and are turned into whole pixels: see `apply`.
    """

    flip: Bool[Array, "*num"] | None = None
    crop_share: Number = None
    crop_row: Number = None
    crop_column: Number = None
    scale_rows: Number = None
    scale_columns: Number = None
    angle: Number = None  # In radians.
    cutout_share: Number = None
    cutout_row: Number = None
    cutout_column: Number = None
    brightness: Number = None  # What is added; 0 changes nothing.
    saturation: Number = None  # A factor, as is contrast; 1 changes nothing.
    contrast: Number = None


def draw(key: Array, augmentation: Augmentation, num: int | None = None) -> Parameters:
    """Random parameters for `num` images, or with None one set for all (siamese).

    An operation that is named but not drawn this time has the value that changes nothing.
    """
    shape, dialect = () if num is None else (num,), augmentation.dialect
    named = augmentation._expanded()
    rivals = [name for name in augmentation.operations if dialect == "dsa" or name in GEOMETRY]
    key_choice, *keys = jax.random.split(key, 1 + len(OPERATIONS))
    choice = jax.random.randint(key_choice, shape, 0, max(1, len(rivals)))

    def drawn(name):
        if dialect == "dsa" and name not in rivals:
            name = "color"
        return choice == rivals.index(name) if name in rivals else jnp.ones(shape, bool)

    def uniforms(name, count):
        return jax.random.uniform(keys[OPERATIONS.index(name)], (count, *shape))

    values = {}
    if "flip" in named:
        (u,) = uniforms("flip", 1)
        values["flip"] = drawn("flip") & (u < FLIP_PROBABILITY)
    for name, share in (("crop", CROP_SHARE), ("cutout", CUTOUT_SHARE)):
        if name in named:
            values[f"{name}_row"], values[f"{name}_column"] = uniforms(name, 2)
            values[f"{name}_share"] = jnp.where(drawn(name), share, 0.0)
    if "scale" in named:
        low, high = 1 / SCALE_RATIO, SCALE_RATIO
        factors = jnp.where(drawn("scale"), low + (high - low) * uniforms("scale", 2), 1.0)
        values["scale_rows"], values["scale_columns"] = factors
    if "rotate" in named:
        (u,) = uniforms("rotate", 1)
        angle = jnp.deg2rad(ROTATION_DEGREES) * (2 * u - 1)
        values["angle"] = jnp.where(drawn("rotate"), angle, 0.0)
    for name, (start, factor, neutral) in COLOR.items():
        if name in named:
            (u,) = uniforms(name, 1)
            values[name] = jnp.where(drawn(name), start + factor * u, neutral)
    return Parameters(**values)


def apply(parameters: Parameters, images: Images) -> Images:
    """The changed images. Gradients in `images` by reverse mode; parameters count as constants.

    With rows i counted from an image's center, all sampling bilinear and 0 outside:
      brightness:  x + brightness
      saturation:  saturation (x - m) + m, m the mean over a pixel's channels; gray images keep x
      contrast:    contrast (x - m) + m, m the mean over the image
      flip:        columns j -> -j
      scale, crop: output row i samples row scale_rows i + shift, |shift| <= int(crop_share height
                   + 1/2) a whole number of pixels (columns alike): a scale over 1 shrinks
      rotate:      output (i, j) samples (i cos + j sin, j cos - i sin) of the angle
      cutout:      0 on int(cutout_share height + 1/2) rows and so many columns, around a center
                   uniform over the image, clipped at its edges
    `draw` never gives a scale, a crop and a rotation together, so each pixel is sampled once.
    Pixels are square: a rotation keeps angles where an image is not square.

    Raises ValueError on images that are not floating point, or of another number than parameters.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point [N, height, width, channels], got {images.dtype} "
            f"{images.shape}"
        )
    shapes = {leaf.shape for leaf in jax.tree.leaves(parameters)}
    parameters = jax.lax.stop_gradient(parameters)
    if shapes <= {()}:
        return _apply(parameters, images)
    if shapes != {(len(images),)}:
        raise ValueError(f"parameters of shapes {sorted(shapes)} for {len(images)} images")
    return jax.vmap(lambda change, image: _apply(change, image[None])[0])(parameters, images)


def augment(key: Array, images: Images, augmentation: Augmentation, *, siamese: bool) -> Images:
    """`apply` of a fresh `draw`: one set of parameters for all images, or one for each."""
    return apply(draw(key, augmentation, None if siamese else len(images)), images)


def _apply(parameters: Parameters, images: Images) -> Images:
    return _cutout(parameters, _geometry(parameters, _color(parameters, images)))


def _color(parameters: Parameters, images: Images) -> Images:
    brightness, saturation, contrast = (
        value if value is None else value.astype(images.dtype)
        for value in (parameters.brightness, parameters.saturation, parameters.contrast)
    )
    # s x + (1 - s) m, not s (x - m) + m: a factor of 1 then keeps every bit.
    if brightness is not None:
        images = images + brightness
    if saturation is not None and images.shape[3] > 1:
        mean = jnp.mean(images, axis=3, keepdims=True)
        images = saturation * images + (1 - saturation) * mean
    if contrast is not None:
        mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
        images = contrast * images + (1 - contrast) * mean
    return images


def _geometry(parameters: Parameters, images: Images) -> Images:
    _, height, width, _ = images.shape
    flip, scale, share = parameters.flip, parameters.scale_rows, parameters.crop_share

    def source(size, flip, scale, position):
        # Counted from the center, a flip and a scale of 1 are exact.
        center = (size - 1) / 2
        rows = jnp.arange(size, dtype=float) - center
        if scale is not None:
            rows = scale * rows
        if share is not None:
            reach = jnp.floor(share * size + 0.5)
            rows = rows + _whole(position, 2 * reach + 1) - reach
        return (rows if flip is None else jnp.where(flip, -rows, rows)) + center

    if any(value is not None for value in (flip, scale, share)):
        rows = source(height, None, scale, parameters.crop_row)
        columns = source(width, flip, parameters.scale_columns, parameters.crop_column)
        images = sample_grid(images, rows, columns)
    return images if parameters.angle is None else rotate(images, parameters.angle)


def _whole(position, count):
    """0, ..., count - 1, alike for a position uniform on [0, 1); rounding may not reach count."""
    return jnp.minimum(jnp.floor(position * count), count - 1)


def _cutout(parameters: Parameters, images: Images) -> Images:
    share = parameters.cutout_share
    if share is None:
        return images
    _, height, width, _ = images.shape

    def within(size, position):
        side = jnp.floor(share * size + 0.5)
        # An even side lies around a corner of pixels, of which there is one more.
        low = _whole(position, size + 1 - side % 2) - side // 2
        indices = jnp.arange(size)
        return (indices >= low) & (indices < low + side)

    rows, columns = within(height, parameters.cutout_row), within(width, parameters.cutout_column)
    return jnp.where(rows[None, :, None, None] & columns[None, None, :, None], 0.0, images)
