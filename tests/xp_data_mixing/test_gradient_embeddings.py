"""Projected gradients against one gradient at a time and a whole projection matrix, in float64."""

import json
import os
import weakref
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import tyro
from cases import slow
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy.optimize import nnls
from strategies import normal

from lib import datasets
from lib.networks import classification
from xp_data_mixing.embedding_files import write_embeddings
from xp_data_mixing.gradient_embeddings import (
    Arguments,
    adam_direction,
    class_counts,
    cross_entropy,
    main,
    project_gradients,
    random_signs,
)

EPS = np.finfo(np.float32).eps


def given_gradient(parameters, example):
    """A loss whose gradient is the example."""
    return sum(jax.tree.leaves(jax.tree.map(lambda p, e: jnp.sum(p * e), parameters, example)))


def projection(key, leaves, dimension):
    """All of P, [p, D] float64."""
    sizes = [np.size(leaf) for leaf in leaves]
    rows = jnp.arange(max(sizes))  # of one shape, to compile once
    parts = [random_signs(key, i, rows, dimension)[:size] for i, size in enumerate(sizes)]
    return np.concatenate(parts).astype(float) / np.sqrt(dimension)


def projected(key, loss, parameters, batch, **options):
    return jax.jit(partial(project_gradients, key, loss, **options))(parameters, batch)


def one_at_a_time(key, loss, parameters, batch, dimension):
    """(gradients [B, p], rows [B, D]) in float64."""
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(parameters, batch)
    leaves = [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(gradients)]
    gradients = np.concatenate(leaves, axis=1)
    return gradients, gradients @ projection(key, [leaf[0] for leaf in leaves], dimension)


def assert_rows(rows, gradients, expected):
    """Float32 sums of |g_i| / sqrt(D), signed: off by at most a few eps of their total."""
    size = np.abs(gradients).sum(axis=1, keepdims=True) / np.sqrt(expected.shape[1])
    assert rows.dtype == jnp.float32
    assert rows.shape == expected.shape
    assert np.all(np.abs(rows - expected) <= 8 * EPS * size)


def plain_model():
    """Leaves of rank 0, 1 and 3, of sizes 1, 3 and 24."""
    parameters = {"a": 0.3, "b": normal(0, 3), "c": normal(2, 2, 3, 4)}

    def loss(parameters, example):
        hidden = jnp.tanh(parameters["c"] @ example["x"])
        out = parameters["a"] * jnp.sum(hidden**2) + jnp.sum(hidden @ parameters["b"])
        return (out - example["y"]) ** 2

    return loss, parameters, {"x": normal(3, 7, 4), "y": normal(4, 7)}


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.GroupNorm(2)(nn.Conv(4, (3, 3), use_bias=False, param_dtype=float)(images))
        return nn.Dense(3, use_bias=False, param_dtype=float)(nn.relu(x).reshape(len(x), -1))


def flax_model():
    network, images = Convolutions(), normal(0, 4, 5, 5, 1)
    parameters = jax.jit(network.init)(jax.random.key(0), images[:1])
    return cross_entropy(network), parameters, (images, np.array([0, 2, 1, 1]))


@pytest.mark.parametrize(
    ("model", "dimension", "block_size", "normalize"),
    [(plain_model, 70, 5, False), slow(plain_model, 33, 24, True), (flax_model, 33, 7, True)],
)
def test_one_gradient_at_a_time_and_a_whole_projection(
    x64, model, dimension, block_size, normalize
):
    loss, parameters, batch = model()
    parameters, batch = jax.tree.map(jnp.asarray, (parameters, batch))
    key, options = jax.random.key(3), {"block_size": block_size, "normalize": normalize}
    gradients, expected = one_at_a_time(key, loss, parameters, batch, dimension)
    rows = projected(key, loss, parameters, batch, dimension=dimension, **options)
    if normalize:
        norms = np.linalg.norm(expected, axis=1, keepdims=True)
        gradients, expected = gradients / norms, expected / norms
    assert_rows(rows, gradients, expected)


def test_signs_depend_on_key_leaf_and_row_only():
    key, rows = jax.random.key(0), jnp.arange(2000)
    signs = np.asarray(random_signs(key, 0, rows, 70))
    assert signs.shape == (2000, 70)
    assert signs.dtype == np.float32
    assert np.all(np.abs(signs) == 1)
    chosen = jnp.array([1999, 3, 3])
    np.testing.assert_array_equal(random_signs(key, 0, chosen, 70), signs[chosen])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(random_signs(key, 0, jnp.arange(2000), 70), signs)
    for other in (random_signs(jax.random.key(1), 0, rows, 70), random_signs(key, 1, rows, 70)):
        # Of 140,000 fair signs, the sum of the products has a standard deviation of sqrt(140,000).
        assert abs(np.sum(signs * other)) < 5 * np.sqrt(signs.size)
    # So it is for the signs themselves, and for any two columns or rows.
    assert abs(signs.sum()) < 5 * np.sqrt(signs.size)
    for gram, terms in ((signs.T @ signs, 2000), (signs[:100] @ signs[:100].T, 70)):
        assert np.abs(gram - np.diag(np.diagonal(gram))).max() < 6 * np.sqrt(terms)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_one_key_makes_one_projection(impl):
    """Also for rbg keys, whose random bits are not the same under vmap."""
    batch, parameters = jnp.asarray(normal(0, 3, 50), "f"), jnp.zeros(50)
    key = jax.random.key(5, impl=impl)
    project = partial(project_gradients, loss=given_gradient, dimension=32, normalize=False)
    rows = project(key, parameters=parameters, batch=batch)
    again = project(jax.random.key(5, impl=impl), parameters=parameters, batch=batch)
    np.testing.assert_array_equal(rows, again)
    blocks = project(key, parameters=parameters, batch=batch, block_size=7)
    assert_rows(blocks, np.asarray(batch), np.asarray(rows, float))
    assert np.abs(rows - project(jax.random.key(6), parameters=parameters, batch=batch)).max() > 0.1


def test_rows_have_norm_one_and_zero_stays_zero():
    """Down to gradients whose squares are 0 in float32, and up to those whose squares are inf."""
    scales = np.array([1, 0, 1e-30, 1e25, 1e-3])
    batch = jnp.asarray(scales[:, None] * normal(0, 1, 30), "f")
    project = partial(project_gradients, jax.random.key(0), given_gradient, dimension=64)
    rows = project(jnp.zeros(30), batch)
    norms = np.linalg.norm(np.asarray(rows, float), axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1, 1, 1], rtol=4 * EPS)
    np.testing.assert_allclose(rows[2:], np.tile(rows[0], (3, 1)), atol=1e-5)
    low = project(jnp.zeros(30, jnp.bfloat16), batch[4:].astype("bfloat16"))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low[0], rows[0], atol=5e-3)


def test_adam_direction_is_the_step_that_adam_would_take(x64):
    """After three real steps: optax.adam's own update over -lr."""
    loss, parameters, batch = plain_model()
    parameters, batch = jax.tree.map(jnp.asarray, (parameters, batch))
    examples = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(7)]
    gradient = jax.jit(jax.grad(loss))
    optimizer = optax.adam(0.1, b1=0.8, b2=0.97, eps=1e-3)
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for example in examples[:3]:
        updates, state = update(gradient(parameters, example), state)
        parameters = optax.apply_updates(parameters, updates)
    transform = adam_direction(state[0], b1=0.8, b2=0.97, eps=1e-3)
    updates = [update(gradient(parameters, example), state)[0] for example in examples]
    directions = np.stack([ravel_pytree(update)[0] / -0.1 for update in updates])
    for example, direction in zip(examples, directions):
        taken = ravel_pytree(transform(gradient(parameters, example)))[0]
        np.testing.assert_allclose(taken, direction, rtol=1e-9)
    key, options = jax.random.key(1), {"normalize": False, "transform": transform}
    rows = projected(key, loss, parameters, batch, dimension=24, **options)
    expected = directions @ projection(key, jax.tree.leaves(parameters), 24)
    assert_rows(rows, directions, expected)


def test_a_transform_may_pick_layers_or_make_them_one():
    loss, parameters, batch = plain_model()
    key, tree = jax.random.key(0), jax.tree.map(lambda x: jnp.asarray(x, "f"), (parameters, batch))
    project = partial(projected, key, loss, *tree, dimension=12, normalize=False)
    gradients, _ = one_at_a_time(key, loss, *tree, 1)
    some = project(transform=lambda gradient: gradient["c"])
    picked = gradients[:, 4:]  # a and b come before
    assert_rows(some, picked, picked @ projection(key, [picked[0]], 12))
    one = project(transform=lambda gradient: ravel_pytree(gradient)[0])
    assert_rows(one, gradients, gradients @ projection(key, [gradients[0]], 12))


def test_memory_is_that_of_the_gradients_and_a_block():
    """All of P would be 200,000 x 4,096 numbers, 3 GiB; the gradients here are 6 MiB."""
    shapes = [jax.ShapeDtypeStruct((*num, 200_000), jnp.float32) for num in ((), (8,))]
    project = partial(project_gradients, jax.random.key(0), given_gradient)
    project = jax.jit(partial(project, dimension=4096, block_size=256))
    memory = project.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert memory < 2 * 4 * 8 * 200_000 + 3 * 4 * 256 * 4096


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        (np.ones((3, 2)), {"dimension": 0}, "must be >= 1: 0, 512"),
        (np.ones((3, 2)), {"block_size": 0}, "must be >= 1: 4, 0"),
        (np.ones((0, 2)), {}, r"one B >= 1, got shapes \[\(0, 2\)\]"),
        ((), {}, r"one B >= 1, got shapes \[\]"),
        (np.float32(1), {}, r"one B >= 1, got shapes \[\(\)\]"),
        ((np.ones((3, 2)), np.ones(4)), {}, r"got shapes \[\(3, 2\), \(4,\)\]"),
        (np.ones((3, 2)), {"transform": lambda gradient: ()}, "no parameters to differentiate"),
    ],
)
def test_bad_batches_raise(batch, options, words):
    options = {"dimension": 4, **options}
    with pytest.raises(ValueError, match=words):
        project_gradients(jax.random.key(0), given_gradient, jnp.zeros(2), batch, **options)


@pytest.mark.parametrize(("normalize", "value"), [(False, np.nan), (True, np.inf)])
def test_a_gradient_that_is_not_finite_names_its_example(normalize, value):
    batch = np.ones((6, 5), np.float32)
    batch[[2, 5], 3] = value
    words = r"gradient of example 2 of the batch is not finite \(2 of 6"
    project = partial(project_gradients, jax.random.key(0), given_gradient, jnp.zeros(5))
    for block_size in (2, 512):  # two blocks of 2, and a third moved back by one
        with pytest.raises(ValueError, match=words):
            project(jnp.asarray(batch), dimension=4, normalize=normalize, block_size=block_size)


def test_adam_wants_its_moments():
    with pytest.raises(ValueError, match=r"the first part of optax\.adam's, not tuple"):
        adam_direction(optax.adam(0.1).init(jnp.zeros(2)))


def read(path):
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    return torch.load(path, mmap=True, weights_only=True).numpy()


@pytest.mark.parametrize(("suffix", "dtype"), [(".npy", "float16"), (".pt", "float32")])
def test_files_are_read_back(tmp_path, suffix, dtype):
    path, rows = tmp_path / f"rows{suffix}", normal(0, 11, 3).astype("f")
    batches = (rows[:4], jnp.asarray(rows[4:5]), rows[:0], np.asfortranarray(rows[5:]))
    assert write_embeddings(path, batches, dtype=dtype) == (11, 3)
    stored = read(path)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, rows.astype(dtype))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_batches_are_not_kept(tmp_path, suffix):
    made, path = weakref.WeakSet(), tmp_path / f"rows{suffix}"

    class Batch(np.ndarray):
        __hash__ = object.__hash__

    def batches():
        for i in range(9):
            batch = np.full((5, 4), i, np.float32).view(Batch)
            made.add(batch)
            assert len(made) <= 2
            yield batch

    assert write_embeddings(path, batches()) == (45, 4)
    np.testing.assert_array_equal(read(path)[:, 0], np.repeat(range(9), 5))


@pytest.mark.parametrize(
    ("name", "batches", "dtype", "words"),
    [
        ("rows.npz", [np.ones((1, 2))], "float32", r"rows\.npz: .* as \.npy or \.pt, not '\.npz'"),
        ("rows.npy", [np.ones((1, 2))], "float64", r"rows\.npy: .* or float32, not float64"),
        ("rows.npy", [], "float32", r"rows\.npy: no rows"),
        ("rows.pt", [np.ones((0, 2))], "float32", r"rows\.pt: no rows"),
        ("rows.npy", [np.ones(2)], "float32", r"rows\.npy: a batch of shape \(2,\)"),
        ("rows.npy", [np.ones((1, 0))], "float32", r"a batch of shape \(1, 0\)"),
        ("rows.pt", [np.ones((3, 2)), np.ones((1, 4))], "float32", r"\(1, 4\) after 3 rows of 2"),
        ("rows.npy", [np.eye(2), np.array([[1, np.nan]])], "float32", "row 2 is not finite in"),
        ("rows.npy", [np.array([[1.0], [-7e4]])], "float16", r"row 1 .* float16 .* is 70000\.0\)"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, name, batches, dtype, words):
    with pytest.raises(ValueError, match=words):
        write_embeddings(tmp_path / name, batches, dtype=dtype)
    assert os.listdir(tmp_path) == []


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(1, 10**5))
def test_class_counts_sum_to_the_total_and_are_nearest(shares, total):
    mixture = np.asarray(shares) / sum(shares)
    counts = class_counts(mixture, total)
    assert counts.sum() == total
    assert np.abs(counts - mixture * total).max() < 1
    assert np.all(counts[mixture == 0] == 0)


@pytest.mark.slow
def test_digits_from_the_command(tmp_path, monkeypatch, capsys):
    """Files of the right shapes, and a target whose mixture they tell: total variation from the
    truth far below that of the uniform guess, by least squares on the mean rows."""
    seen, train, mixture = [], classification.train, (0.5, 0, 0.3, 0.2, 0, 0, 0, 0, 0, 0)

    def recorded(key, network, images, labels, **options):
        seen.append(len(images))
        return train(key, network, images, labels, **options)

    monkeypatch.setattr(classification, "train", recorded)
    arguments = Arguments(
        out_dir=tmp_path / "new/folder", dataset="digits", dimension=200, num_per_class=60,
        num_target=60, mixture=mixture, hidden=16, num_epochs=10,
    )  # fmt: skip
    summary = main(arguments)
    assert seen == [len(datasets.load("digits").labels) - 600]
    about = json.loads(summary.read_text())
    assert list(about["target_mixture"].values()) == list(mixture)
    names = [*(f"train_{label}.npy" for label in range(10)), "target.npy"]
    assert sorted(os.listdir(summary.parent)) == sorted([*names, "embeddings.json"])
    assert about["files"] == {name: [60, 200] for name in names}
    printed, means = capsys.readouterr().out, []
    for name in names:
        rows = read(summary.parent / name)
        assert rows.shape == (60, 200)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        assert f"{summary.parent / name} (60, 200)" in printed
        means.append(rows.mean(axis=0))
    weights, _ = nnls(np.transpose(means[:10]), means[10])
    distance = np.abs(weights / weights.sum() - mixture).sum() / 2
    assert distance < 0.5 * np.abs(0.1 - np.asarray(mixture)).sum() / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mixture", ".5", ".4"], "one share >= 0 for each of 10 classes"),
        (["--mixture", *["0.2"] * 10], r"of sum 1, got \(0\.2,"),
        (["--dimension", "0"], "dimension must be >= 1, got 0"),
        (["--num_per_class", "500"], r"has \d+ images, fewer than the 500 asked for"),
    ],
)
def test_bad_arguments_raise(tmp_path, arguments, words):
    arguments = ["--dataset", "digits", "--out_dir", str(tmp_path), *arguments]
    with pytest.raises(ValueError, match=words):
        main(tyro.cli(Arguments, args=arguments))
    assert os.listdir(tmp_path) == []
