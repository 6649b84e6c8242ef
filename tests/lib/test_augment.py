"""Augmentation against torch (sampling, slices, gradients), loops over pixels and drawing laws."""

import itertools
import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from cases import slow
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from strategies import DECADES, SEEDS, few

from lib.augment import OPERATIONS, Parameters, apply, augment, draw, parse
from lib.augment import _warps as warps
from lib.augment.cutmix import cutmix
from lib.augment.elastic import elastic
from lib.augment.mixup import mixup

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


def by_affine_grid(x, theta):
    grid = F.affine_grid(torch.tensor([theta], dtype=x.dtype), (1, *x.shape), align_corners=False)
    return F.grid_sample(x[None], grid, padding_mode="zeros", align_corners=False)[0]


def rotation(x, angle):
    """Normalized coordinates turn ellipses of the sides; pixels of the image turn in circles."""
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
    """Pixels that the hole would have outside of the image lie on its edge."""
    mask, places = torch.ones_like(x), []
    for u, size in zip(positions, x.shape[1:]):
        side = int(share * size + 0.5)
        center = int(u * (size + (1 - side % 2)))
        places.append(np.clip(np.arange(side) + center - side // 2, 0, size - 1))
    mask[:, places[0][:, None], places[1]] = 0
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


def happened(parameters, name):
    """In which draws the field changes something."""
    return np.asarray(getattr(parameters, name)) != NEUTRAL[name]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [slow((8, 8, 1)), (7, 20, 3)])
@pytest.mark.parametrize("dialect", ["idc", "dsa"])
def test_values_and_gradients_are_those_of_torch(shape, dialect):
    images, weights = (random_images(seed, 24, *shape) for seed in (0, 1))
    parameters = jit_draw(jax.random.key(2), parse(ALL, dialect=dialect), 24)
    assert all(happened(parameters, name).any() for name in NEUTRAL)
    value, pullback = jax.vjp(partial(jit_apply, parameters), images)
    results = value, *pullback(weights)
    for result, target in zip(results, by_torch(parameters, images, weights)):
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, target, rtol=0, atol=1e-12)


# Siamese


@pytest.mark.parametrize("shape", [slow((28, 28, 1)), (5, 8, 3)])
def test_flips_and_neutral_parameters_keep_every_bit(shape):
    images = random_images(14, 3, *shape, dtype=np.float32)
    values = dict.fromkeys(Parameters._fields, 0.5) | NEUTRAL
    one = Parameters(**{name: jnp.asarray(value) for name, value in values.items()})
    each = jax.tree.map(lambda leaf: jnp.full(3, leaf), one)
    np.testing.assert_array_equal(jit_apply(one, images), images)
    np.testing.assert_array_equal(jit_apply(each, images), images)
    np.testing.assert_array_equal(apply(Parameters(), jnp.asarray(images)), images)
    mirrored = jit_apply(Parameters(flip=jnp.asarray(True)), images)
    np.testing.assert_array_equal(mirrored, images[:, :, ::-1])


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


def assert_frequency(drawn, probability):
    assert scipy.stats.binomtest(int(drawn.sum()), len(drawn), probability).pvalue > 1e-3


@pytest.mark.parametrize("strategy", [ALL, "flip_crop_rotate_brightness"])
def test_idc_does_everything_named_and_one_of_the_geometry(strategy):
    parameters = jit_draw(jax.random.key(21), parse(strategy, dialect="idc"), NUM)
    full = strategy == ALL
    for name in ("brightness", *(("cutout_share", "saturation", "contrast") if full else ())):
        assert happened(parameters, name).mean() > 0.999
    assert_frequency(np.asarray(parameters.flip), 0.5)
    geometry = ["crop_share", "angle", *(["scale_rows"] if full else [])]
    drawn = np.array([happened(parameters, name) for name in geometry])
    np.testing.assert_array_equal(drawn.sum(axis=0), 1)
    for operation in drawn:
        assert_frequency(operation, 1 / len(geometry))
    if full:
        np.testing.assert_array_equal(drawn[2], happened(parameters, "scale_columns"))
    else:
        assert parameters.scale_rows is parameters.contrast is parameters.cutout_share is None


def test_dsa_does_one_thing_and_color_is_one():
    parameters = jit_draw(jax.random.key(22), parse(ALL, dialect="dsa"), NUM)
    names = ["crop_share", "scale_rows", "angle", "cutout_share", "brightness"]
    drawn = np.array([happened(parameters, name) for name in names])
    for operation in drawn:
        assert_frequency(operation, 1 / 6)
    assert_frequency(np.asarray(parameters.flip), 1 / 12)
    total = drawn.sum(axis=0) + np.asarray(parameters.flip)
    assert total.max() == 1
    assert_frequency(total == 0, 1 / 12)
    for name in ("saturation", "contrast"):
        assert np.mean(drawn[-1] == happened(parameters, name)) > 0.999


def test_dsa_counts_operations_of_color_apart_where_they_are_named_apart():
    names = ["brightness", "contrast", "saturation"]
    parameters = jit_draw(jax.random.key(23), parse("_".join(names), dialect="dsa"), NUM)
    drawn = np.array([happened(parameters, name) for name in names])
    np.testing.assert_array_equal(drawn.sum(axis=0), 1)
    for operation in drawn:
        assert_frequency(operation, 1 / 3)


def test_values_are_uniform_on_their_ranges():
    places = "crop_row", "crop_column", "cutout_row", "cutout_column"
    ranges = dict.fromkeys(places, (0, 1)) | {"angle": (-math.pi / 12, math.pi / 12)}
    ranges |= dict.fromkeys(("scale_rows", "scale_columns"), (1 / 1.2, 1.2))
    ranges |= {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}
    parameters = jit_draw(jax.random.key(24), parse(ALL, dialect="idc"), NUM)
    values = {}
    for name, (low, high) in ranges.items():
        value = np.asarray(getattr(parameters, name))
        values[name] = value = value[value != NEUTRAL.get(name)]
        assert low - 1e-6 <= value.min() <= value.max() <= high + 1e-6
        assert scipy.stats.kstest(value, "uniform", (low, high - low)).pvalue > 1e-3
    # Each draws anew: no two agree.
    for first, second in itertools.combinations(values.values(), 2):
        n = min(len(first), len(second))
        assert abs(scipy.stats.pearsonr(first[:n], second[:n]).statistic) < 0.1


def test_strategies():
    assert parse("", dialect="dsa").operations == parse("none", dialect="idc").operations == ()
    digits = parse(ALL, dialect="idc", flips=False)
    assert digits.operations == ("color", "crop", "cutout", "scale", "rotate")
    assert draw(jax.random.key(27), parse("flip", dialect="idc", flips=False), 2) == Parameters()
    assert jax.eval_shape(lambda key: draw(key, digits, 2), jax.random.key(27)).flip is None
    assert parse("_".join(OPERATIONS), dialect="dsa").operations == OPERATIONS
    assert hash(parse(ALL, dialect="dsa")) == hash(parse(ALL, dialect="dsa"))
    assert parse(ALL, dialect="dsa") != parse(ALL, dialect="idc")


# CutMix

BATCH, HEIGHT, WIDTH = 5, 6, 9
# Pixel (i, j) of channel k of image n has a value that no other pixel has.
IMAGES = np.arange(BATCH * HEIGHT * WIDTH * 2, dtype=np.float32).reshape(BATCH, HEIGHT, WIDTH, 2)
TARGETS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1]]


def test_half_of_the_batches_and_boxes_of_half_the_area_around_every_pixel():
    """A large alpha has lambda = 1/2: no box is empty, none seen where the permutation (of 120)
    moves nobody."""
    num, arrays = 2000, {"images": jnp.asarray(IMAGES), "targets": jnp.asarray(TARGETS)}
    each = jax.jit(jax.vmap(partial(cutmix, **arrays, probability=0.5, alpha=1e5)))
    images, _ = each(jax.random.split(jax.random.key(1), num))
    changed = (np.asarray(images) != IMAGES).any(axis=(1, 4))
    boxes = changed[changed.any(axis=(1, 2))]
    assert scipy.stats.binomtest(len(boxes), num, 0.5 * (1 - 1 / 120)).pvalue > 1e-3
    for size, sides in ((HEIGHT, boxes.any(axis=2)), (WIDTH, boxes.any(axis=1))):
        half = int(size * 0.5**0.5) // 2
        spans = [(max(0, c - half), min(size, c + half)) for c in range(size)]
        counts = Counter((side.argmax(), size - side[::-1].argmax()) for side in sides)
        assert counts.keys() <= set(spans)
        assert scipy.stats.chisquare([counts[span] for span in spans]).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.3, slow(3.0)])
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


parse_idc = partial(parse, dialect="idc")
IDC = parse_idc(ALL)
mix = partial(cutmix, jax.random.key(7), jnp.asarray(IMAGES), jnp.asarray(TARGETS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(parse_idc, "color_crops"), "no operation 'crops'; there are flip"),
        (partial(parse_idc, "crop_"), "no operation ''"),
        (partial(parse_idc, "flip_crop_flip"), "flip is named more than once"),
        (partial(parse_idc, "color_contrast"), "contrast is named more than once"),
        (
            lambda: apply(draw(jax.random.key(28), IDC, 3), jnp.zeros((2, 4, 4, 1))),
            r"shapes \[\(3,\)\] for 2 images",
        ),
        (partial(mix, probability=1.5), "probability must lie in .* got 1.5"),
        (partial(mix, probability=-0.1), "got -0.1"),
        (partial(mix, alpha=0.0), "alpha must be positive and finite, got 0.0"),
        (partial(mix, alpha=math.inf), "got inf"),
    ],
)
def test_what_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Properties, at any scale and in both dtypes


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
    DECADES,
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
    at, i, j, channel = np.indices(shape)
    y, x, cos, sin = i - (height - 1) / 2, j - (width - 1) / 2, np.cos(angle), np.sin(angle)
    turned = cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2
    expected = [
        map_coordinates(images, [at, *places, channel], order=1, mode="grid-constant")
        for places in ((rows[i], columns[j]), turned)
    ]
    bound = 4 * 8 * (height + width) * eps * largest
    for value, gradient, exact in zip(values, gradients, expected):
        assert value.dtype == gradient.dtype == dtype
        assert np.all(np.abs(value - exact) <= bound)
        inner = np.sum(exact * weights), np.sum(images * gradient)
        slack = 2 * (n + channels + 9) * np.abs(weights).sum() * bound
        assert abs(inner[0] - inner[1]) <= slack
        assert np.isfinite(gradient).all()


@partial(jax.jit, static_argnames="probability")
def mixed(key, images, targets, probability):
    """Images, targets, and what is handed back for `images` as weights on the output."""
    mix = partial(cutmix, key, targets=targets, probability=probability)
    new_images, pullback, new_targets = jax.vjp(mix, images, has_aux=True)
    return new_images, new_targets, pullback(images)[0]


@few(16)
@given(
    st.sampled_from([((1, 1, 1, 1), np.float64, 0.5), ((4, 6, 3, 2), np.float32, 1.0)]),
    DECADES,
    SEEDS,
)
def test_boxes_and_targets_agree(case, exponent, seed):
    """Partners are one permutation; a target gives its partner the box's share of the pixels."""
    (shape, dtype, probability), rng = case, np.random.default_rng(seed)
    # No value comes twice, so that each tells where it is from.
    images = 10.0**exponent * (1 + np.arange(np.prod(shape)).reshape(shape))
    targets = rng.dirichlet(np.ones(5), shape[0])
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, dtype) for a in (images, targets)]
        outputs = mixed(jax.random.key(seed), *arrays, probability)
        images, targets, new_images, new_targets, gradient = map(np.asarray, (*arrays, *outputs))
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
    index = np.arange(images.size).reshape(shape)
    seen = np.where(box[None, :, :, None], index[partners], index)
    np.testing.assert_array_equal(new_images, images.ravel()[seen])
    # A pixel has the weight of the place that shows it.
    np.testing.assert_array_equal(gradient.ravel()[seen], images)
    share = box.mean()  # 0 also where the permutation moves nobody, and a box cannot be seen
    wanted = (1 - share) * targets.astype(float) + share * targets.astype(float)[partners]
    np.testing.assert_allclose(new_targets, wanted, rtol=0, atol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(new_targets.sum(axis=1), 1, rtol=0, atol=8 * np.finfo(dtype).eps)


# Mixup and elastic deformations


def test_mixup_mixes_images_and_targets_alike():
    """One-hot targets and images e_i: rows are share e_i + (1 - share) e_pi(i)."""
    images, targets = np.eye(8, dtype="f").reshape(8, 2, 4, 1), np.eye(8, dtype="f")
    mix, shares = jax.jit(partial(mixup, alpha=1.0)), []
    for i in range(40):
        mixed, labels = map(np.asarray, mix(jax.random.key(i), images, targets))
        np.testing.assert_array_equal(mixed.reshape(8, 8), labels)
        np.testing.assert_allclose(labels.sum(axis=0), 1, rtol=1e-5)
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-5)
        (share,) = {float(row[j]) for j, row in enumerate(labels) if row[j] < 1}
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 4 * np.sqrt(1 / 12 / 40)  # Beta(1, 1) is uniform


def test_elastic_deformations_sample_along_their_field():
    """Against scipy, with the same field; each image has its own."""
    key, images = jax.random.key(0), jnp.asarray(np.random.default_rng(0).random((3, 9, 7, 2)))
    changed = elastic(key, images, pixels=2.0, grid=3)
    coarse = 2.0 * jax.random.normal(key, (3, 2, 3, 3), images.dtype)
    field = np.asarray(jax.image.resize(coarse, (3, 2, 9, 7), "cubic"))
    for image, shift, got in zip(np.asarray(images), field, np.asarray(changed), strict=True):
        places = np.mgrid[:9, :7] + shift
        for channel in range(2):
            wanted = map_coordinates(image[..., channel], places, order=1, mode="grid-constant")
            np.testing.assert_allclose(got[..., channel], wanted, atol=1e-5)
    np.testing.assert_array_equal(elastic(key, images, pixels=0.0), images)


def test_bad_settings_of_mixup_and_elastic_are_named():
    images = jnp.zeros((2, 3, 3, 1))
    with pytest.raises(ValueError, match=r"alpha must be positive and finite, got 0.0"):
        mixup(jax.random.key(0), images, jnp.eye(2), alpha=0.0)
    for options in ({"pixels": -1.0}, {"grid": 1}):
        with pytest.raises(ValueError, match=r"pixels must be at least 0 and grid at least 2"):
            elastic(jax.random.key(0), images, **options)
