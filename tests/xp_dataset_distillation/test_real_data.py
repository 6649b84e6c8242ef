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
from lib.datasets import Dataset, Normalization
from xp_dataset_distillation import condense, evaluation, real_data
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


def test_digits_are_normalised_by_their_own_constants():
    real, dataset = real_data.load("digits"), datasets.load("digits")
    values = dataset.images.astype(np.float64) / 255
    np.testing.assert_allclose([*real.mean, *real.std], [values.mean(), values.std()], rtol=1e-12)
    assert sum(real.counts) == len(dataset.images)


def test_published_constants_are_those_of_the_literature_and_can_be_replaced():
    dataset = toy(shape=(3, 2, 3))._replace(name="cifar10", origin="cifar10")
    real = real_data.from_dataset(dataset)
    assert real.mean == (0.4914, 0.4822, 0.4465)
    assert real.std == (0.2023, 0.1994, 0.2010)
    own = Normalization((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    real = real_data.from_dataset(dataset, normalisation=own)
    assert (real.mean, real.std) == own


def test_sizes_are_those_of_pillow_and_the_constants_those_of_the_resized():
    real, dataset = real_data.load("digits", size=5), datasets.load("digits")
    first = dataset.images[dataset.labels == 0][0, ..., 0]
    wanted = Image.fromarray(first).resize((5, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(real.images[0, ..., 0], np.asarray(wanted))
    np.testing.assert_allclose(real.mean, np.mean(real.images / 255), rtol=1e-12)
    assert real_data.load("digits", size=8).name == "digits"
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        real_data.load("digits", size=0)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_published_constants_are_near_those_over_all_pixels(name, data_root):
    own = datasets.normalization_constants(datasets.load(name, data_root=data_root))
    np.testing.assert_allclose(real_data.PUBLISHED[name], own, atol=2e-4)


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
    for options, nums in (({"num_per_class": 4}, (4, 4, 4)), ({"share": 0.4}, (2, 2, 3))):
        rest, images, labels = real_data.held_out(KEY, real, **options)
        assert rest.counts == tuple(np.subtract(COUNTS, nums))
        np.testing.assert_array_equal(np.bincount(labels), nums)
        np.testing.assert_array_equal(labels_of(images), labels)
        np.testing.assert_array_equal(labels_of(rest.images), rest.labels)
        together = np.concatenate([numbers(rest.images), numbers(images)])
        np.testing.assert_array_equal(np.sort(together), np.arange(21))


@pytest.mark.parametrize(
    "entry", [{"held_out": 2}, {"num_per_class": 3}, {"held_out": 1, "num_per_class": 3}]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_constants_are_of_the_images_that_may_be_used(monkeypatch, entry, channels):
    """Of nothing else: images that are held out may be anything."""
    dataset = toy(shape=(3, 2, channels))
    monkeypatch.setattr(datasets, "load", lambda *_, **__: dataset)
    config = BaselineConfig("imgs", **entry)
    real, kept = condense.training_images(config, None)
    for channel in range(channels):
        values = [float(v) / 255 for v in real.images[..., channel].ravel()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        assert real.mean[channel] == pytest.approx(mean, rel=1e-12)
        assert real.std[channel] == pytest.approx(math.sqrt(variance), rel=1e-12)
    if kept is not None:  # and they are judged with the constants of the others
        unused = np.setdiff1d(numbers(dataset.images), numbers(real.images))
        dataset.images[unused, 2, 1] = 255 - dataset.images[unused, 2, 1]
        again, _ = condense.training_images(config, None)
        assert (again.mean, again.std) == (real.mean, real.std)
        assert evaluation.judge(config, again, kept, None).setting.mean == real.mean


def test_published_constants_stay_those_whatever_is_held_out():
    dataset = toy()._replace(name="mnist", origin="mnist")
    own = Normalization((0.25,), (2.0,))
    for real in (
        real_data.from_dataset(dataset),
        real_data.from_dataset(toy(), normalisation=own),
    ):
        rest, *_ = real_data.held_out(KEY, real, num_per_class=2)
        part = real_data.subset(KEY, real, 2)
        assert (rest.mean, rest.std) == (part.mean, part.std) == (real.mean, real.std)


def test_a_folder_that_is_called_like_a_data_set_is_not_one():
    own = real_data.from_dataset(toy()._replace(name="mnist"))
    assert (own.mean, own.std) != real_data.PUBLISHED["mnist"]
    assert (own.mean, own.std) == datasets.normalization_constants(toy())


CHANGES = {
    "resize": lambda dataset: datasets.resize(dataset, (4, 5)),
    "to_rgb": datasets.to_rgb,
    "to_gray": datasets.to_gray,
    "rotate": lambda dataset: datasets.rotate(dataset, 1),
    "invert": datasets.invert,
}


@settings(deadline=None, max_examples=25)
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
    wanted = origin in (None, "fashion_mnist", "cifar10", "cifar100") and names[0] == "cat"
    for entry in (CondenseConfig("x"), BaselineConfig("x")):
        assert condense.setting_of(entry, real).flips == wanted
    for flips in (True, False):
        assert condense.setting_of(CondenseConfig("x", flips=flips), real).flips == flips


def test_resized_digits_are_judged_without_mirrored_ones():
    entry = BaselineConfig("digits", size=12)
    real, kept = condense.training_images(entry, None)
    about = evaluation.judge(entry, real, kept, None).setting
    for evaluator in EVALUATORS.values():
        parsed = augment.parse("color_flip", dialect=evaluator.dialect, flips=about.flips)
        assert "flip" not in parsed.operations


def test_another_key_holds_out_other_images():
    real = real_data.from_dataset(toy((40, 40)))
    first, second = (
        real_data.held_out(jax.random.key(seed), real, num_per_class=5)[1] for seed in (0, 1)
    )
    assert set(numbers(first)) != set(numbers(second))


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
        real_data.held_out(KEY, real, num_per_class=0)
    with pytest.raises(ValueError, match="out 5 of the 5 images of 'b' leaves none"):
        real_data.held_out(KEY, real, num_per_class=5)
    for options in ({}, {"num_per_class": 1, "share": 0.5}):
        with pytest.raises(ValueError, match="one of the two"):
            real_data.held_out(KEY, real, **options)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"share must lie between 0 and 1, got {share}"):
            real_data.held_out(KEY, real, share=share)
    lonely = real_data.from_dataset(toy((1, 5)))
    with pytest.raises(ValueError, match="out 1 of the 1 images of 'a' leaves none"):
        real_data.held_out(KEY, lonely, share=0.1)


# ---- Batches

draw = partial(jax.jit, static_argnums=2)(real_data.draw_batch)


@settings(deadline=None, max_examples=30)
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
        found = pairs[~np.eye(count, dtype=bool)]
        assert stats.chisquare(found).pvalue > 1e-3
    # One class's draw says nothing about another's.
    table = np.zeros((3, 5))
    np.add.at(table, (drawn[:, 0, 0], drawn[:, 1, 0]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_whole_class_is_a_permutation():
    drawn = np.asarray(real_data.draw_indices(KEY, (6, 6), 6))
    np.testing.assert_array_equal(np.sort(drawn), np.tile(np.arange(6), (2, 1)))


def test_the_images_are_an_argument_of_the_program_and_not_a_constant():
    real = jax.device_put(real_data.from_dataset(toy((300, 300))))
    assert isinstance(real.images, jax.Array)
    text = jax.jit(real_data.draw_batch, static_argnums=2).lower(KEY, real, 2).as_text()
    assert "%arg1: tensor<600x3x2x1xui8>" in text


def test_batches_larger_than_a_class_are_refused():
    with pytest.raises(ValueError, match="class 'b' of toy has 5 images, fewer than the 6"):
        draw(KEY, real_data.from_dataset(toy()), 6)
    with pytest.raises(ValueError, match="at least 1 image of every class, not 0"):
        draw(KEY, real_data.from_dataset(toy()), 0)
