"""Real images by class: sorted, held out, drawn; every error by its words."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from lib import augment, datasets
from lib.datasets import Dataset
from xp_dataset_distillation import real_data
from xp_dataset_distillation.config import EVALUATORS, BaselineConfig, CondenseConfig

KEY = jax.random.key(0)
COUNTS = 7, 5, 9


def toy(counts=COUNTS, *, shape=(3, 2, 1), seed=0) -> Dataset:
    """Shuffled images; the first pixel is an image's own number, the second its label."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(len(labels)), labels
    return Dataset("toy", images, labels, tuple("abcdefgh"[: len(counts)]))


def numbers(images):
    return np.asarray(images)[..., 0, 0, 0]


def labels_of(images):
    return np.asarray(images)[..., 0, 1, 0]


# ---- Loading


def test_images_are_sorted_by_class_and_keep_their_order():
    dataset = toy()
    real = real_data.from_dataset(dataset)
    wanted = [i for c in range(3) for i in range(21) if dataset.labels[i] == c]
    np.testing.assert_array_equal(real.images, dataset.images[wanted])
    np.testing.assert_array_equal(real.labels, dataset.labels[wanted])
    np.testing.assert_array_equal(real.starts, [0, 7, 12])
    assert real.counts == COUNTS
    assert real.num_classes == 3
    assert real.image_shape == (3, 2, 1)
    assert (real.name, real.class_names) == ("toy", ("a", "b", "c"))


def test_published_constants_are_those_of_the_literature():
    dataset = toy(shape=(3, 2, 3))._replace(name="cifar10", origin="cifar10")
    real = real_data.from_dataset(dataset)
    assert real.mean == (0.4914, 0.4822, 0.4465)
    assert real.std == (0.2023, 0.1994, 0.2010)


def test_sizes_are_those_of_pillow_and_the_constants_those_of_the_resized():
    real, dataset = real_data.load("digits", size=5), datasets.load("digits")
    first = dataset.images[dataset.labels == 0][0, ..., 0]
    wanted = Image.fromarray(first).resize((5, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(real.images[0, ..., 0], np.asarray(wanted))
    np.testing.assert_allclose(real.mean, np.mean(real.images / 255), rtol=1e-12)
    assert real_data.load("digits", size=8).name == "digits"
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        real_data.load("digits", size=0)


def test_mnist_gets_the_published_constants(data_root):
    real = real_data.load("mnist", data_root=data_root)
    assert (real.mean, real.std) == real_data.PUBLISHED["mnist"]
    assert sum(real.counts) == 60_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": tuple("abcd")}, "class 'd' of toy has no image: no label is 3"),
        ({"labels": np.repeat(np.int32([0, 2]), [20, 1])}, "class 'b' of toy has no image"),
        ({"labels": np.full(21, 3, np.int32)}, r"lie in 0\.\.2, not in 3\.\.3"),
        ({"labels": np.full(21, -1, np.int32)}, r"lie in 0\.\.2, not in -1\.\.-1"),
        ({"labels": np.zeros(20, np.int32)}, "toy has 21 images, 20 labels"),
        ({"images": np.full((21, 3, 2, 1), 7, np.uint8)}, "channel 0 of toy is the same"),
    ],
)
def test_labels_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        real_data.from_dataset(toy()._replace(**change))


# ---- Subsets


def test_held_out_images_and_the_rest_are_the_whole():
    real = real_data.from_dataset(toy())
    rest, images, labels = real_data.held_out(KEY, real, 4)
    assert rest.counts == tuple(np.subtract(COUNTS, 4))
    np.testing.assert_array_equal(np.bincount(labels), 4)
    np.testing.assert_array_equal(labels_of(images), labels)
    np.testing.assert_array_equal(labels_of(rest.images), rest.labels)
    together = np.concatenate([numbers(rest.images), numbers(images)])
    np.testing.assert_array_equal(np.sort(together), np.arange(21))
    _, others, _ = real_data.held_out(jax.random.key(1), real, 4)
    assert set(numbers(images)) != set(numbers(others))


@pytest.mark.parametrize(
    ("channels", "options"),
    [(1, {"held_out": 2}), (3, {"num_per_class": 3}), (3, {"held_out": 1, "num_per_class": 3})],
)
def test_constants_are_of_the_images_that_may_be_used(monkeypatch, channels, options):
    """Of nothing else: images that are held out may be anything."""
    dataset = toy(shape=(3, 2, channels))
    monkeypatch.setattr(datasets, "load", lambda *_, **__: dataset)
    config = BaselineConfig("imgs", **options)
    real, held_out = real_data.training_images(config, None)
    for channel in range(channels):
        values = [float(v) / 255 for v in real.images[..., channel].ravel()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        assert real.mean[channel] == pytest.approx(mean, rel=1e-12)
        assert real.std[channel] == pytest.approx(math.sqrt(variance), rel=1e-12)
    if held_out is not None:  # and they are normalized with the constants of the others
        unused = np.setdiff1d(numbers(dataset.images), numbers(real.images))
        dataset.images[unused, 2, 1] = 255 - dataset.images[unused, 2, 1]
        again, _ = real_data.training_images(config, None)
        assert (again.mean, again.std) == (real.mean, real.std)


def test_published_constants_stay_those_whatever_is_held_out():
    """Of the data set itself, not of a folder that is called like it."""
    folder = real_data.from_dataset(toy()._replace(name="mnist"))
    assert (folder.mean, folder.std) == datasets.normalization_constants(toy())
    real = real_data.from_dataset(toy()._replace(name="mnist", origin="mnist"))
    rest, *_ = real_data.held_out(KEY, real, 2)
    part = real_data.subset(KEY, real, 2)
    assert (rest.mean, rest.std) == (part.mean, part.std) == real_data.PUBLISHED["mnist"]


CHANGES = {
    "resize": lambda dataset: datasets.resize(dataset, (4, 5)),
    "to_rgb": datasets.to_rgb,
    "to_gray": datasets.to_gray,
    "rotate": lambda dataset: datasets.rotate(dataset, 1),
    "invert": datasets.invert,
}


@settings(deadline=None, max_examples=10)
@given(
    origin=st.sampled_from([*datasets.NAMES, None]),
    changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=4),
    names=st.sampled_from([("cat", "dog", "emu"), ("0", "1", "2"), ("a", "7", "é")]),
)
def test_digits_and_letters_are_never_mirrored(origin, changes, names):
    """By what they are, whatever is done to the images and to their name."""
    dataset = toy()._replace(name=origin or "imgs", origin=origin, class_names=names)
    for change in changes:
        dataset = CHANGES[change](dataset)
    real = real_data.subset(KEY, real_data.from_dataset(dataset), 3)
    mirrored = origin in (None, "fashion_mnist", "cifar10", "cifar100") and names[0] == "cat"
    for method in (CondenseConfig("x"), BaselineConfig("x")):
        assert real_data.setting_of(method, real).flips == mirrored
    for flips in (True, False):
        assert real_data.setting_of(CondenseConfig("x", flips=flips), real).flips == flips


def test_resized_digits_are_evaluated_without_mirrored_ones():
    method = BaselineConfig("digits", size=12)
    setting = real_data.setting_of(method, real_data.training_images(method, None)[0])
    for evaluator in EVALUATORS.values():
        parsed = augment.parse("color_flip", dialect=evaluator.strategy, flips=setting.flips)
        assert "flip" not in parsed.operations


def test_subsets_are_nested():
    real = real_data.from_dataset(toy())
    small, large = (real_data.subset(KEY, real, num) for num in (2, 5))
    assert small.counts == (2, 2, 2)
    assert large.counts == (5, 5, 5)
    np.testing.assert_array_equal(labels_of(large.images), large.labels)
    assert set(numbers(small.images)) < set(numbers(large.images))


def test_subsets_that_cannot_be_are_refused():
    real = real_data.from_dataset(toy())
    with pytest.raises(ValueError, match="class 'b' of toy has 5 images, fewer than the 6 asked"):
        real_data.subset(KEY, real, 6)
    with pytest.raises(ValueError, match="at least 1 image of every class, not 0"):
        real_data.held_out(KEY, real, 0)
    with pytest.raises(ValueError, match="out 5 of the 5 images of 'b' leaves none"):
        real_data.held_out(KEY, real, 5)


# ---- Batches

draw = partial(jax.jit, static_argnums=2)(real_data.draw_batch)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), num=st.sampled_from([1, 5]))
def test_batches_hold_different_images_of_every_class(seed, num):
    real = real_data.from_dataset(toy())
    batch = draw(jax.random.key(seed), real, num)
    assert batch.shape == (3, num, 3, 2, 1)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(labels_of(batch), np.repeat([[0], [1], [2]], num, axis=1))
    assert all(len(set(row)) == num for row in numbers(batch))
    # The pixels belong to the number.
    dataset = toy()
    np.testing.assert_array_equal(batch, dataset.images[numbers(batch)])


def test_draws_are_uniform_over_ordered_pairs():
    num_draws, counts = 12_000, (3, 5)
    keys = jax.random.split(KEY, num_draws)
    draw = jax.jit(jax.vmap(lambda key: real_data.draw_indices(key, counts, 2)))
    drawn = np.asarray(draw(keys))
    for of_class, count in zip(np.swapaxes(drawn, 0, 1), counts):
        pairs = np.bincount(of_class[:, 0] * count + of_class[:, 1], minlength=count**2)
        pairs = pairs.reshape(count, count)
        assert not np.diag(pairs).any()
        assert stats.chisquare(pairs[~np.eye(count, dtype=bool)]).pvalue > 1e-3
    # One class's draw says nothing about another's.
    table = np.zeros((3, 5))
    np.add.at(table, (drawn[:, 0, 0], drawn[:, 1, 0]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_images_are_an_argument_of_the_program_and_not_a_constant():
    real = jax.device_put(real_data.from_dataset(toy((300, 300))))
    assert isinstance(real.images, jax.Array)
    text = jax.jit(real_data.draw_batch, static_argnums=2).lower(KEY, real, 2).as_text()
    assert "%arg1: tensor<600x3x2x1xui8>" in text
