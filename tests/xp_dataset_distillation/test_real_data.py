"""Real images by class: sorted, held out, drawn; every error by its words."""

from functools import partial

import jax
import numpy as np
import pytest
from condensing import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from lib import datasets
from xp_dataset_distillation import real_data
from xp_dataset_distillation.config import BaselineConfig, CondenseConfig

KEY = jax.random.key(0)


def numbers(images):
    return np.asarray(images)[..., 0, 0, 0]


def labels_of(images):
    return np.asarray(images)[..., 0, 1, 0]


def test_images_are_sorted_by_class_and_keep_their_order():
    dataset = toy()
    real = real_data.from_dataset(dataset)
    wanted = np.argsort(dataset.labels, kind="stable")
    np.testing.assert_array_equal(real.images, dataset.images[wanted])
    np.testing.assert_array_equal(real.labels, dataset.labels[wanted])
    np.testing.assert_array_equal(real.starts, [0, 7, 12])
    assert (real.counts, real.num_classes, real.image_shape) == ((7, 5, 9), 3, (3, 2, 1))
    assert (real.name, real.class_names) == ("toy", ("a", "b", "c"))


def test_sizes_are_those_of_pillow_and_the_constants_those_of_the_resized():
    real, dataset = real_data.load("digits", size=5), datasets.load("digits")
    first = dataset.images[dataset.labels == 0][0, ..., 0]
    wanted = Image.fromarray(first).resize((5, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(real.images[0, ..., 0], np.asarray(wanted))
    np.testing.assert_allclose(real.mean, np.mean(real.images / 255), rtol=1e-12)
    assert real_data.load("digits", size=8).name == "digits"


def test_mnist_gets_the_published_constants(data_root):
    real = real_data.load("mnist", data_root=data_root)
    assert (real.mean, real.std) == real_data.PUBLISHED["mnist"]
    assert sum(real.counts) == 60_000


def test_constants_are_those_of_the_literature_whatever_is_held_out():
    """Of the data set itself, not of a folder that is called like it."""
    color = toy(shape=(3, 2, 3))._replace(name="cifar10", origin="cifar10")
    real = real_data.from_dataset(color)
    assert (real.mean, real.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    real = real_data.from_dataset(toy()._replace(name="mnist", origin="mnist"))
    rest, *_ = real_data.held_out(KEY, real, 2)
    part = real_data.subset(KEY, real, 2)
    assert (rest.mean, rest.std) == (part.mean, part.std) == real_data.PUBLISHED["mnist"]
    folder = real_data.from_dataset(toy()._replace(name="mnist"))
    assert (folder.mean, folder.std) == datasets.normalization_constants(toy())


def classes(**changes):
    return real_data.from_dataset(toy()._replace(**changes))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classes(class_names=tuple("abcd")), "class 'd' of toy .*no image: no label is 3"),
        (lambda: classes(labels=np.repeat(np.int32([0, 2]), [20, 1])), "'b' of toy has no image"),
        (lambda: classes(labels=np.full(21, 3, np.int32)), r"lie in 0\.\.2, not in 3\.\.3"),
        (lambda: classes(labels=np.full(21, -1, np.int32)), r"lie in 0\.\.2, not in -1\.\.-1"),
        (lambda: classes(labels=np.zeros(20, np.int32)), "toy has 21 images, 20 labels"),
        (lambda: classes(images=np.full((21, 3, 2, 1), 7, np.uint8)), "channel 0 .* is the same"),
        (lambda: real_data.subset(KEY, classes(), 6), r"5 images, .* the 6 asked for \(--num_per"),
        (lambda: real_data.held_out(KEY, classes(), 6), r"5 images, .* the 6 asked for \(--held_o"),
        (lambda: real_data.held_out(KEY, classes(), 0), "least 1 image of every class, not 0"),
        (lambda: real_data.held_out(KEY, classes(), 5), "out 5 of the 5 images of 'b' leaves none"),
        (lambda: real_data.load("digits", size=0), "size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_held_out_images_and_the_rest_are_the_whole():
    real = real_data.from_dataset(toy())
    rest, images, labels = real_data.held_out(KEY, real, 4)
    assert rest.counts == (3, 1, 5)
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
    scaled = real.images.astype(float) / 255
    np.testing.assert_allclose(real.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(real.std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)
    if held_out is not None:  # and they are normalized with the constants of the others
        unused = np.setdiff1d(numbers(dataset.images), numbers(real.images))
        dataset.images[unused, 2, 1] = 255 - dataset.images[unused, 2, 1]
        again, _ = real_data.training_images(config, None)
        assert (again.mean, again.std) == (real.mean, real.std)


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


def test_subsets_are_nested():
    real = real_data.from_dataset(toy())
    small, large = (real_data.subset(KEY, real, num) for num in (2, 5))
    assert small.counts == (2, 2, 2)
    assert large.counts == (5, 5, 5)
    np.testing.assert_array_equal(labels_of(large.images), large.labels)
    assert set(numbers(small.images)) < set(numbers(large.images))


draw = partial(jax.jit, static_argnums=2)(real_data.draw_batch)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), num=st.sampled_from([1, 5]))
def test_batches_hold_different_images_of_every_class(seed, num):
    batch = draw(jax.random.key(seed), real_data.from_dataset(toy()), num)
    assert batch.shape == (3, num, 3, 2, 1)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(labels_of(batch), np.repeat([[0], [1], [2]], num, axis=1))
    assert all(len(set(row)) == num for row in numbers(batch))
    # The pixels belong to the number.
    np.testing.assert_array_equal(batch, toy().images[numbers(batch)])


def test_draws_are_uniform_over_ordered_pairs():
    counts = 3, 5
    draw = jax.jit(jax.vmap(lambda key: real_data.draw_indices(key, counts, 2)))
    drawn = np.asarray(draw(jax.random.split(KEY, 12_000)))
    for of_class, count in zip(np.swapaxes(drawn, 0, 1), counts):
        pairs, *_ = np.histogram2d(*of_class.T, bins=np.arange(count + 1) - 0.5)
        assert not np.diag(pairs).any()
        assert stats.chisquare(pairs[~np.eye(count, dtype=bool)]).pvalue > 1e-3
    # One class's draw says nothing about another's.
    table, *_ = np.histogram2d(*drawn[:, :, 0].T, bins=(3, 5))
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_images_are_an_argument_of_the_program_and_not_a_constant():
    real = jax.device_put(real_data.from_dataset(toy((300, 300))))
    assert isinstance(real.images, jax.Array)
    text = jax.jit(real_data.draw_batch, static_argnums=2).lower(KEY, real, 2).as_text()
    assert "%arg1: tensor<600x3x2x1xui8>" in text
