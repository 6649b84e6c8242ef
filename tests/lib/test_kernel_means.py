"""Exact kernel means between samples against `lib.mmd` and double loops; the median distance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from lib.kernels import gaussian, median_bandwidth
from lib.mmd import mmd_squared, mmd_squared_unbiased
from lib.rows import Rows
from lib.rows.files import open_rows
from lib.rows.kernel_means import (
    exact_gram_of_means,
    noise_of_means,
    streamed_median_bandwidth,
)

BANDWIDTHS = [0.3, 1.0, 4.0]


def samples(dimension, sizes=(7, 1, 12, 30), dtype=np.float64):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, dimension)) + i / 3).astype(dtype) for i, n in enumerate(sizes)]


def by_loops(sets, target, bandwidth):
    def mean(x, y):
        total = 0.0
        for p in x.astype(float):
            for q in y.astype(float):
                total += np.exp(-np.sum((p - q) ** 2) / (2 * bandwidth**2))
        return total / (len(x) * len(y))

    a = [[mean(x, y) for y in sets] for x in sets]
    return np.array(a), np.array([mean(x, target) for x in sets]), mean(target, target)


@pytest.mark.parametrize("block_size", [1, 2, 5, 13, 1000])
@pytest.mark.parametrize("dimension", [3, 20])
def test_means_by_loops(dimension, block_size):
    *sets, target = samples(dimension)
    found = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=block_size)
    for s, bandwidth in enumerate(BANDWIDTHS):
        a, b, q = by_loops(sets, target, bandwidth)
        np.testing.assert_allclose(found.a[s], a, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.b[s], b, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.q[s], q, rtol=1e-12)
    np.testing.assert_array_equal(found.a, np.swapaxes(found.a, 1, 2))
    assert list(found.sizes) == [7, 1, 12]
    assert found.target_size == 30
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_single_precision(dtype):
    """Kernel values in float32, their sums in float64."""
    *sets, target = samples(12, (300, 200, 400), dtype)
    found = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=256)
    for s, bandwidth in enumerate(BANDWIDTHS):
        values = np.exp(-cdist(sets[0], sets[1], "sqeuclidean") / (2 * bandwidth**2))
        np.testing.assert_allclose(found.a[s, 0, 1], values.mean(), rtol=2e-4 if s == 0 else 1e-5)
    wide = exact_gram_of_means([x.astype("f") for x in sets], target, BANDWIDTHS, block_size=256)
    np.testing.assert_array_equal(found.a, wide.a)


def mixture(sets, weights):
    rows = jnp.concatenate([jnp.asarray(x) for x in sets])
    each = np.concatenate([np.full(len(x), w / len(x)) for x, w in zip(sets, weights)])
    return rows, jnp.asarray(each)


def test_mmd_of_a_mixture(x64):
    """w' a w - 2 b' w + q is the MMD^2 of the weighted sample that the mixture is."""
    *sets, target = samples(11)
    found = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=8)
    weights = np.array([0.5, 0.2, 0.3])
    rows, each = mixture(sets, weights)
    for s, bandwidth in enumerate(BANDWIDTHS):
        value = weights @ found.a[s] @ weights - 2 * found.b[s] @ weights + found.q[s]
        expected = mmd_squared(gaussian(bandwidth), rows, jnp.asarray(target), x_weights=each)
        np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.slow
def test_unbiased_statistics(x64):
    *sets, target = samples(11, (7, 5, 12, 30))
    found = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=8)
    for s, bandwidth in enumerate(BANDWIDTHS):
        pairs_of_target = found.q[s] - noise_of_means(found.q[s][None, None], [30])[0]
        for i, (x, noise) in enumerate(zip(sets, noise_of_means(found.a[s], found.sizes))):
            pairs_of_set = found.a[s, i, i] - noise
            value = pairs_of_set - 2 * found.b[s, i] + pairs_of_target
            unbiased = partial(mmd_squared_unbiased, gaussian(bandwidth))
            expected = unbiased(jnp.asarray(x), jnp.asarray(target))
            np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-15)
            pairs = np.exp(-pdist(x, "sqeuclidean") / (2 * bandwidth**2))
            np.testing.assert_allclose(pairs_of_set, pairs.mean(), rtol=1e-9, atol=1e-16)


def test_a_single_row_has_no_noise():
    np.testing.assert_array_equal(
        noise_of_means(np.array([[1.0, 0.3], [0.3, 0.6]]), [1, 5]), [0, 0.1]
    )


def test_small_means_without_noise_are_kept_in_single_precision():
    """Where kernels between rows are 1e-8 the diagonal, 1 / n, must not drown them."""
    *sets, target = samples(30, (500, 400, 600), np.float32)
    found = exact_gram_of_means([*sets, target], target, [0.9], block_size=256)
    gram = found.a[0]
    for x, value in zip((*sets, target), np.diag(gram) - noise_of_means(gram, found.sizes)):
        expected = np.exp(-pdist(x.astype(float), "sqeuclidean") / (2 * 0.9**2)).mean()
        assert expected < 1e-7
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_a_target_in_several_parts():
    *sets, first, second = samples(4, (6, 9, 5, 8))
    parts = exact_gram_of_means(sets, [first, second], BANDWIDTHS, block_size=4)
    whole = exact_gram_of_means(sets, np.concatenate([first, second]), BANDWIDTHS)
    assert parts.target_size == whole.target_size == 13
    for found, expected in zip(parts[:3], whole[:3]):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_blocks_across_many_small_sets():
    sets = samples(3, [1, 2, 1, 3, 1] * 8)
    found = exact_gram_of_means(sets, sets[0], [1.0], block_size=16)
    i, j = 3, 38
    expected = np.exp(-cdist(sets[i], sets[j], "sqeuclidean") / 2).mean()
    np.testing.assert_allclose(found.a[0, i, j], expected, rtol=1e-12)
    np.testing.assert_allclose(found.a[0, :, 0], found.b[0], rtol=1e-12)


def test_files(tmp_path):
    *sets, target = samples(9, dtype=np.float32)
    for i, rows in enumerate([*sets, target]):
        torch.save(torch.from_numpy(rows), tmp_path / f"{i}.pt")
    files = [open_rows(tmp_path / f"{i}.pt") for i in range(4)]
    found = exact_gram_of_means(files[:3], files[3], BANDWIDTHS, block_size=6)
    expected = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=6)
    np.testing.assert_array_equal(found.a, expected.a)
    bandwidth = streamed_median_bandwidth(jax.random.key(0), files, num_points=20)
    assert bandwidth == streamed_median_bandwidth(jax.random.key(0), [*sets, target], num_points=20)


@pytest.mark.parametrize("which", range(4))
def test_files_with_rows_that_are_not_finite(tmp_path, which):
    for i, rows in enumerate(samples(9, dtype=np.float32)):
        if i == which:
            rows[-1, 2] = np.nan
        np.save(tmp_path / f"{i}.npy", rows)
    files = [open_rows(tmp_path / f"{i}.npy") for i in range(4)]
    for block_size in (6, 100):
        with pytest.raises(ValueError, match=rf"{which}\.npy: NaN or infinity in 1 of "):
            exact_gram_of_means(files[:3], files[3], BANDWIDTHS, block_size=block_size)
    with pytest.raises(ValueError, match=rf"{which}\.npy: NaN or infinity in 1 of "):
        streamed_median_bandwidth(jax.random.key(0), files)


def test_bad_input(tmp_path):
    *sets, target = samples(3)
    other = np.ones((2, 4))
    torch.save(torch.ones(3, 4), tmp_path / "other.pt")
    bad = sets[0].copy()
    bad[[2, 5]] = np.inf
    find = exact_gram_of_means
    for call, message in (
        (lambda: find([], target, [1.0]), "0 sets and 1 targets"),
        (lambda: find(sets, [], [1.0]), "3 sets and 0 targets"),
        (
            lambda: find([*sets, other], target, [1.0]),
            r"set 0 has shape \(7, 3\), set 3 has .* 4\)",
        ),
        (lambda: find(sets, open_rows(tmp_path / "other.pt"), [1.0]), r"set 0 .*other\.pt has"),
        (lambda: find(sets, [target, other], [1.0]), "target 1 has shape"),
        (lambda: find([bad], target, [1.0]), "set 0: NaN or infinity in 2 of 7 rows, the .* row 2"),
        (lambda: find([target[0]], target, [1.0]), r"set 0 must be rows .* \(3,\)"),
        (lambda: find([Rows(target, weights=np.arange(30))], target, [1.0]), "data has weights"),
        (lambda: find(sets, target, [-1.0]), "bandwidths must be positive"),
        (lambda: find(sets, target, [1.0], block_size=0), "block_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Bandwidths


def test_median_over_all_rows():
    """Of as many rows as are wanted or fewer, all count: the median over pairs, by SciPy."""
    sets = samples(5, (20, 30, 30))
    expected = np.median(pdist(np.concatenate(sets)))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
        cast = [x.astype(dtype) for x in sets]
        found = streamed_median_bandwidth(jax.random.key(0), cast, num_points=90)
        assert isinstance(found, float)
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    pooled = jnp.asarray(np.concatenate(sets), jnp.float32)
    same = median_bandwidth(jax.random.key(1), pooled)
    np.testing.assert_allclose(found, same, rtol=1e-6)


class Counting:
    """An `x` of `Rows` that notes which of its rows were read."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __getitem__(self, rows):
        self.taken = rows
        return self.x[rows]


def test_each_set_gives_the_same_number_of_rows():
    sets = [Counting(x) for x in samples(5, (1000, 5, 23))]
    data = [Rows(x, dtype=np.float64) for x in sets]
    found = streamed_median_bandwidth(jax.random.key(0), data, num_points=61)
    assert [len(set(x.taken)) for x in sets] == [21, 5, 21]
    drawn = np.concatenate([x.x[x.taken] for x in sets])
    np.testing.assert_allclose(found, np.median(pdist(drawn)), rtol=1e-12)
    first = sets[0].taken
    assert found == streamed_median_bandwidth(jax.random.key(0), data, num_points=61)
    streamed_median_bandwidth(jax.random.key(1), data, num_points=61)
    assert set(sets[0].taken) != set(first)


def test_the_subsample_is_uniform():
    ten, counts = Counting(samples(2, (10,))[0]), np.zeros(10)
    for key in jax.random.split(jax.random.key(0), 100):
        streamed_median_bandwidth(key, [Rows(ten)], num_points=4)
        counts[ten.taken] += 1
    assert np.abs(counts - 40).max() < 4 * np.sqrt(100 * 0.4 * 0.6)


def test_medians_that_do_not_exist():
    key, x = jax.random.key(0), samples(3)[0]
    for sets, num_points, message in (
        ([], 1000, "no pair in 1000 points of 0 sets"),
        ([x], 1, "no pair in 1 points of 1 sets"),
        ([x[:1]], 1000, "no pair in 1 points"),
        ([x, np.ones((3, 2))], 1000, r"set 0 has shape \(7, 3\), set 1 has shape \(3, 2\)"),
        (
            [np.ones((5, 3)), np.ones((2, 3))],
            1000,
            "all rows of set 0, set 1 are equal, .*give a number in place of auto",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            streamed_median_bandwidth(key, sets, num_points=num_points)
