"""Augmentation against torch (sampling, slices, gradients), loops over pixels and drawing laws."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from lib.augment import OPERATIONS, Parameters, apply, augment, draw, parse
from lib.augment._warps import rotate

x64 = pytest.mark.usefixtures("x64")
ALL = "color_crop_cutout_flip_scale_rotate"
NEUTRAL = {
    "flip": False,
    "crop_share": 0.0,
    "scale_rows": 1.0,
    "scale_columns": 1.0,
    "angle": 0.0,
    "cutout_share": 0.0,
    "brightness": 0.0,
    "saturation": 1.0,
    "contrast": 1.0,
}
jit_apply = jax.jit(apply)
jit_draw = jax.jit(draw, static_argnums=(1, 2))


def random_images(seed, *shape, dtype=float):
    return np.random.default_rng(seed).uniform(size=shape).astype(dtype)


def value_and_gradient(parameters, images, weights):
    def run(parameters, images, weights):
        value, pullback = jax.vjp(lambda images: apply(parameters, images), images)
        return value, pullback(weights)[0]

    return run(parameters, jnp.asarray(images), jnp.asarray(weights))


jit_value_and_gradient = jax.jit(value_and_gradient)


# The reference: one image [channels, H, W] at a time, in torch


def by_affine_grid(x, theta):
    grid = F.affine_grid(torch.tensor([theta], dtype=x.dtype), (1, *x.shape), align_corners=False)
    return F.grid_sample(x[None], grid, padding_mode="zeros", align_corners=False)[0]


def rotation(x, angle):
    """Normalised coordinates turn ellipses of the sides; pixels of the image turn in circles."""
    cos, sin, aspect = math.cos(angle), math.sin(angle), x.shape[1] / x.shape[2]
    return by_affine_grid(x, [[cos, -sin * aspect, 0], [sin / aspect, cos, 0]])


def shift_of(size, share, position):
    reach = int(share * size + 0.5)
    return int(position * (2 * reach + 1)) - reach


def shifted(x, rows, columns):
    height, width = x.shape[1:]
    x = F.pad(x, (width, width, height, height))
    return x[:, height + rows : 2 * height + rows, width + columns : 2 * width + columns]


def with_hole(x, share, positions):
    mask = torch.ones_like(x)
    sides = [int(share * size + 0.5) for size in x.shape[1:]]
    centres = [
        int(u * (size + (1 - side % 2))) for u, size, side in zip(positions, x.shape[1:], sides)
    ]
    for a in range(sides[0]):
        for b in range(sides[1]):
            row = min(max(a + centres[0] - sides[0] // 2, 0), x.shape[1] - 1)
            column = min(max(b + centres[1] - sides[1] // 2, 0), x.shape[2] - 1)
            mask[:, row, column] = 0
    return x * mask


def reference(p, x):
    x = x + p.brightness
    mean = x.mean(dim=0, keepdim=True)
    x = (x - mean) * p.saturation + mean
    x = (x - x.mean()) * p.contrast + x.mean()
    if p.flip:
        x = torch.flip(x, (2,))
    x = by_affine_grid(x, [[p.scale_columns, 0, 0], [0, p.scale_rows, 0]])
    rows = shift_of(x.shape[1], p.crop_share, p.crop_row)
    columns = shift_of(x.shape[2], p.crop_share, p.crop_column)
    x = shifted(x, rows, columns)
    return with_hole(rotation(x, p.angle), p.cutout_share, (p.cutout_row, p.cutout_column))


def by_torch(parameters, images, weights):
    inputs = torch.tensor(images, requires_grad=True)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i].item(), parameters) for i in range(len(images))]
    outputs = torch.stack(
        [reference(p, x).permute(1, 2, 0) for p, x in zip(rows, inputs.permute(0, 3, 1, 2))]
    )
    (outputs * torch.tensor(weights)).sum().backward()
    return outputs.detach().numpy(), inputs.grad.numpy()


@x64
@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 10, 3)])
def test_values_and_gradients_are_those_of_torch(shape):
    images, weights = random_images(0, 24, *shape), random_images(1, 24, *shape)
    for dialect in ("idc", "dsa"):
        parameters = jit_draw(jax.random.key(2), parse(ALL, dialect=dialect), 24)
        # One comparison sees each operation.
        assert all(
            np.any(np.asarray(getattr(parameters, name)) != value)
            for name, value in NEUTRAL.items()
        )
        results = jit_value_and_gradient(parameters, images, weights)
        expected = by_torch(parameters, images, weights)
        for result, target in zip(results, expected):
            assert result.dtype == jnp.float64
            np.testing.assert_allclose(result, target, rtol=0, atol=1e-12)


@x64
def test_rotations_by_any_angle_and_their_transpose():
    """The transpose looks at 3 x 3 outputs for each pixel, at any angle."""
    angles = np.deg2rad([0, 15, -15, 30, 44.9, 45, 46, 90, 135, 180, -77, 200])
    images, weights = random_images(3, 12, 6, 9, 2), random_images(4, 12, 6, 9, 2)

    @jax.jit
    def run(angles, images, weights):
        def each(images):
            return jax.vmap(lambda image, angle: rotate(image[None], angle)[0])(images, angles)

        value, pullback = jax.vjp(each, images)
        return value, pullback(weights)[0]

    results = run(jnp.asarray(angles), jnp.asarray(images), jnp.asarray(weights))
    inputs = torch.tensor(images, requires_grad=True)
    outputs = torch.stack(
        [rotation(x, a).permute(1, 2, 0) for x, a in zip(inputs.permute(0, 3, 1, 2), angles)]
    )
    (outputs * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(results[0], outputs.detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(results[1], inputs.grad, rtol=0, atol=1e-12)


# Siamese


@pytest.mark.parametrize("shape", [(28, 28, 1), (5, 8, 3)])
def test_neutral_parameters_keep_every_bit(shape):
    images = random_images(14, 3, *shape, dtype=np.float32)
    values = dict.fromkeys(Parameters._fields, 0.5) | NEUTRAL
    one = Parameters(**{name: jnp.asarray(value) for name, value in values.items()})
    each = jax.tree.map(lambda leaf: jnp.full(3, leaf), one)
    np.testing.assert_array_equal(jit_apply(one, images), images)
    np.testing.assert_array_equal(jit_apply(each, images), images)
    np.testing.assert_array_equal(apply(Parameters(), jnp.asarray(images)), images)


def test_flips_and_crops_keep_every_bit():
    images = random_images(15, 3, 9, 8, 2, dtype=np.float32)
    mirrored = jit_apply(Parameters(flip=jnp.asarray(True)), images)
    np.testing.assert_array_equal(mirrored, images[:, :, ::-1])
    # Of 3 places along rows the last, of 3 along columns the first: shifts 1 and -1.
    crop = Parameters(
        crop_share=jnp.asarray(0.125), crop_row=jnp.asarray(0.99), crop_column=jnp.asarray(0.1)
    )
    expected = np.zeros_like(images)
    expected[:, :-1, 1:] = images[:, 1:, :-1]
    np.testing.assert_array_equal(jit_apply(crop, images), expected)


def test_augment_is_a_draw_and_its_application():
    images = random_images(16, 5, 8, 8, 3, dtype=np.float32)
    augmentation, key = parse("brightness_crop", dialect="idc"), jax.random.key(17)
    jit_augment = jax.jit(augment, static_argnames=("augmentation", "siamese"))
    for siamese, num in ((True, None), (False, 5)):
        result = jit_augment(key, images, augmentation, siamese=siamese)
        expected = jit_apply(jit_draw(key, augmentation, num), images)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        other = jit_augment(jax.random.key(18), images, augmentation, siamese=siamese)
        assert np.abs(other - result).max() > 0.05
    same = jit_augment(key, np.repeat(images[:1], 5, axis=0), augmentation, siamese=True)
    np.testing.assert_array_equal(same[1:], np.repeat(same[:1], 4, axis=0))
    nothing = augment(key, jnp.asarray(images), parse("none", dialect="dsa"), siamese=False)
    np.testing.assert_array_equal(nothing, images)


# Laws of the draws


NUM = 4096


def changed(parameters, names):
    """Shares of the draws that change something, by field."""
    return {name: np.asarray(getattr(parameters, name)) != NEUTRAL[name] for name in names}


def assert_frequency(happened, probability):
    assert scipy.stats.binomtest(int(happened.sum()), len(happened), probability).pvalue > 1e-3


@pytest.mark.parametrize("strategy", [ALL, "flip_crop_rotate_brightness"])
def test_idc_does_everything_named_and_one_of_the_geometry(strategy):
    parameters = jit_draw(jax.random.key(21), parse(strategy, dialect="idc"), NUM)
    full = strategy == ALL
    for name in ("cutout_share", "saturation", "contrast") if full else ():
        assert changed(parameters, [name])[name].mean() > 0.999
    assert changed(parameters, ["brightness"])["brightness"].mean() > 0.999
    assert_frequency(np.asarray(parameters.flip), 0.5)
    geometry = ["crop_share", "scale_rows", "angle"] if full else ["crop_share", "angle"]
    drawn = changed(parameters, geometry)
    np.testing.assert_array_equal(sum(happened.astype(int) for happened in drawn.values()), 1)
    for happened in drawn.values():
        assert_frequency(happened, 1 / len(geometry))
    if not full:
        assert parameters.scale_rows is parameters.contrast is parameters.cutout_share is None
    else:
        np.testing.assert_array_equal(drawn["scale_rows"], parameters.scale_columns != 1)


def test_dsa_does_one_thing_and_colour_is_one():
    parameters = jit_draw(jax.random.key(22), parse(ALL, dialect="dsa"), NUM)
    names = ["crop_share", "scale_rows", "angle", "cutout_share", "brightness"]
    drawn = changed(parameters, names)
    for happened in drawn.values():
        assert_frequency(happened, 1 / 6)
    assert_frequency(np.asarray(parameters.flip), 1 / 12)
    total = sum(happened.astype(int) for happened in drawn.values()) + np.asarray(parameters.flip)
    assert total.max() == 1
    assert_frequency(total == 0, 1 / 12)
    for name in ("saturation", "contrast"):
        assert np.mean(drawn["brightness"] == (np.asarray(getattr(parameters, name)) != 1)) > 0.999


def test_dsa_counts_operations_of_colour_apart_where_they_are_named_apart():
    strategy = "brightness_contrast_saturation"
    drawn = changed(
        jit_draw(jax.random.key(23), parse(strategy, dialect="dsa"), NUM), strategy.split("_")
    )
    np.testing.assert_array_equal(sum(happened.astype(int) for happened in drawn.values()), 1)
    for happened in drawn.values():
        assert_frequency(happened, 1 / 3)


def test_values_are_uniform_on_their_ranges():
    ranges = {
        "scale_rows": (1 / 1.2, 1.2),
        "scale_columns": (1 / 1.2, 1.2),
        "angle": (-math.pi / 12, math.pi / 12),
        "crop_row": (0, 1),
        "crop_column": (0, 1),
        "cutout_row": (0, 1),
        "cutout_column": (0, 1),
        "brightness": (-0.5, 0.5),
        "saturation": (0, 2),
        "contrast": (0.5, 1.5),
    }
    parameters = jit_draw(jax.random.key(24), parse(ALL, dialect="idc"), NUM)
    values = {}
    for name, (low, high) in ranges.items():
        value = np.asarray(getattr(parameters, name))
        values[name] = value = value[value != NEUTRAL.get(name)]
        assert low - 1e-6 <= value.min() <= value.max() <= high + 1e-6
        assert scipy.stats.kstest(value, "uniform", (low, high - low)).pvalue > 1e-3
    # Each draws anew: no two of the same law agree.
    for first, second in (
        ("scale_rows", "scale_columns"),
        ("crop_row", "crop_column"),
        ("cutout_row", "cutout_column"),
        ("crop_row", "cutout_row"),
        ("brightness", "contrast"),
    ):
        n = min(len(values[first]), len(values[second]))
        assert abs(scipy.stats.pearsonr(values[first][:n], values[second][:n]).statistic) < 0.1


def rows_of(strategy, size):
    """Changed images [NUM, size, 1, 1] whose pixels were 1, 2, ..."""
    parameters = jit_draw(jax.random.key(26), parse(strategy, dialect="idc"), NUM)
    images = np.broadcast_to(
        np.arange(1, size + 1, dtype=np.float32)[:, None, None], (NUM, size, 1, 1)
    )
    # One column would be a hole half of the time: of a hole in rows and columns see the rows.
    if strategy == "cutout":
        parameters = parameters._replace(cutout_column=jnp.zeros(NUM))
    return np.asarray(jit_apply(parameters, images))[:, :, 0, 0]


@pytest.mark.parametrize("size", [9, 28])
def test_crops_shift_by_every_number_of_pixels_alike(size):
    reach = int(0.125 * size + 0.5)
    counts = np.zeros(2 * reach + 1)
    for row in rows_of("crop", size):
        inside = np.flatnonzero(row)
        shift = row[inside[0]] - 1 - inside[0]
        np.testing.assert_array_equal(row[inside], inside + 1 + shift)
        assert len(inside) == size - abs(shift)
        counts[int(shift) + reach] += 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [8, 9])
def test_holes_lie_around_every_place_of_the_image_alike(size):
    side = int(0.5 * size + 0.5)
    expected = {}
    for centre in range(size + (side % 2 == 0)):
        low, high = max(0, centre - side // 2), min(size, centre - side // 2 + side)
        expected[low, high] = expected.get((low, high), 0) + NUM / (size + (side % 2 == 0))
    counts = dict.fromkeys(expected, 0)
    for row in rows_of("cutout", size):
        hole = np.flatnonzero(row == 0)
        low, high = int(hole[0]), int(hole[-1]) + 1
        assert len(hole) == high - low
        counts[low, high] += 1
    assert scipy.stats.chisquare(list(counts.values()), list(expected.values())).pvalue > 1e-3


# Strategies and errors


def test_strategies():
    assert parse("", dialect="dsa").operations == parse("none", dialect="idc").operations == ()
    digits = parse(ALL, dialect="idc", flips=False)
    assert digits.operations == ("color", "crop", "cutout", "scale", "rotate")
    assert draw(jax.random.key(27), parse("flip", dialect="idc", flips=False), 2) == Parameters()
    assert jax.eval_shape(lambda key: draw(key, digits, 2), jax.random.key(27)).flip is None
    assert parse("_".join(OPERATIONS), dialect="dsa").operations == OPERATIONS
    assert hash(parse(ALL, dialect="dsa")) == hash(parse(ALL, dialect="dsa"))
    assert parse(ALL, dialect="dsa") != parse(ALL, dialect="idc")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("color_crops", "no operation 'crops'; there are flip"),
        ("crop_", "no operation ''"),
        ("flip_crop_flip", "flip is named more than once"),
        ("color_contrast", "contrast is named more than once"),
    ],
)
def test_strategies_that_are_none(strategy, message):
    with pytest.raises(ValueError, match=message):
        parse(strategy, dialect="idc")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip_probability", 1.5),
        ("crop_share", -0.1),
        ("scale_ratio", 0.9),
        ("scale_ratio", math.inf),
        ("rotation_degrees", 181.0),
        ("cutout_share", 2.0),
        ("contrast", math.nan),
    ],
)
def test_strengths_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        replace(parse(ALL, dialect="idc"), **{name: value})


def test_errors_of_application():
    parameters = draw(jax.random.key(28), parse("flip", dialect="idc"), 3)
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\] for 2 images"):
        apply(parameters, jnp.zeros((2, 4, 4, 1)))
