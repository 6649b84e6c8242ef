"""Exact kernel means between samples against SciPy, and the median distance."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from strategies import DECADES, DTYPES, SEEDS, few, sample

from lib.rows import Rows, kernel_means
from lib.rows.files import open_rows
from lib.rows.kernel_means import exact_gram_of_means, noise_of_means, streamed_median_bandwidth

BANDWIDTHS = [0.3, 1.0, 4.0]


def samples(dimension, sizes=(7, 1, 12, 30), dtype=np.float64):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, dimension)) + i / 3).astype(dtype) for i, n in enumerate(sizes)]


SETS = samples(3)
TARGET, OTHER = SETS.pop(), np.ones((2, 4))
INFINITE = SETS[0].copy()
INFINITE[[2, 5]] = np.inf


@few(15)
@given(
    st.sampled_from([((1,), 1, 1), ((3, 1, 5), 4, 2), ((2, 2), 3, 11)]),
    DTYPES,
    DECADES,
    st.booleans(),
    st.sampled_from([2, 64]),
    SEEDS,
)
def test_exact_means(shape, dtype, exponent, same, block_size, seed):
    """A squared distance is off by 16 roundings of |x|^2 + |y|^2 at most, as its module says (above
    eight dimensions; below by d + 2 of its own), the kernel by that over 2 s^2 and a few of its
    own. Equal samples have equal means, in any order; the diagonal without noise is a mean
    over pairs."""
    (sizes, m, d), rng = shape, np.random.default_rng(seed)
    parts = [sample(rng, n, d, exponent, dtype, same) for n in (*sizes, m)]
    *sets, target = parts
    bandwidths = 10.0**exponent * np.array([0.7, 3.0])
    gram = kernel_means.exact_gram_of_means(sets, target, bandwidths, block_size=block_size)
    assert isinstance(gram, kernel_means.GramOfMeans)
    assert {a.dtype for a in gram[:3]} == {np.dtype(np.float64)}
    assert (gram.sizes.tolist(), gram.target_size) == (list(sizes), m)
    grams = [np.block([[a, b[:, None]], [b[None], q]]) for a, b, q in zip(*gram[:3])]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    members = (owners == np.arange(len(parts))[:, None]) / np.bincount(owners)[:, None]
    x = np.concatenate(parts).astype(float)
    distances = np.square(x[:, None] - x[None]).sum(axis=2)
    norms = np.square(x - x.mean(axis=0)).sum(axis=1).max() + np.square(x).sum(axis=1).max()
    off = 16 * np.finfo(dtype).eps * (norms if d > 8 else distances.max())
    for mean, bandwidth in zip(grams, bandwidths):
        kernel = np.exp(-distances / (2 * bandwidth**2))
        bound = off / bandwidth**2 + 8 * np.finfo(dtype).eps
        np.testing.assert_allclose(mean, members @ kernel @ members.T, rtol=0, atol=bound)
        if same:
            np.testing.assert_allclose(mean.diagonal(), 1, rtol=0, atol=1e-14)
    shuffled = [rng.permutation(part) for part in parts]
    again = kernel_means.exact_gram_of_means(shuffled[:-1], shuffled[-1:], bandwidths)
    for one, other in zip(gram[:3], again[:3]):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    noise = kernel_means.noise_of_means(gram.a[-1], sizes)
    for k, part in enumerate(sets):
        if len(part) == 1:
            np.testing.assert_allclose(noise[k], 0, atol=1e-14)
            continue
        chosen = owners == k
        pairs = kernel[chosen][:, chosen][~np.eye(len(part), dtype=bool)]
        np.testing.assert_allclose(gram.a[-1, k, k] - noise[k], pairs.mean(), atol=2 * bound)


def test_half_precision_is_widened():
    *sets, target = samples(12, (300, 200, 400), np.float16)
    narrow = exact_gram_of_means(sets, target, BANDWIDTHS, block_size=256)
    wide = exact_gram_of_means([x.astype("f") for x in sets], target, BANDWIDTHS, block_size=256)
    np.testing.assert_array_equal(narrow.a, wide.a)


def test_small_means_without_noise_are_kept_in_single_precision():
    """Where kernels between rows are 1e-8 the diagonal, 1 / n, must not drown them."""
    *sets, target = samples(30, (500, 400, 600), np.float32)
    result = exact_gram_of_means([*sets, target], target, [0.9], block_size=256)
    gram = result.a[0]
    for x, value in zip((*sets, target), np.diag(gram) - noise_of_means(gram, result.sizes)):
        expected = np.exp(-pdist(x.astype(float), "sqeuclidean") / (2 * 0.9**2)).mean()
        assert expected < 1e-7
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_a_target_in_several_parts():
    *sets, first, second = samples(4, (6, 9, 5, 8))
    parts = exact_gram_of_means(sets, [first, second], BANDWIDTHS, block_size=4)
    whole = exact_gram_of_means(sets, np.concatenate([first, second]), BANDWIDTHS)
    assert parts.target_size == whole.target_size == 13
    for in_parts, expected in zip(parts[:3], whole[:3]):
        np.testing.assert_allclose(in_parts, expected, rtol=1e-12)


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_means, "median_bandwidth", lambda key, rows, **_: rows.sum())
    arrays, results = samples(9, dtype=np.float32), []
    for i, rows in enumerate(arrays):
        torch.save(torch.from_numpy(rows), tmp_path / f"{i}.pt")
    for sets in (arrays, [open_rows(tmp_path / f"{i}.pt") for i in range(4)]):
        gram = exact_gram_of_means(sets[:3], sets[3], BANDWIDTHS, block_size=6)
        median = streamed_median_bandwidth(jax.random.key(0), sets, num_points=20)
        results.append((gram.a, median))
    jax.tree.map(np.testing.assert_array_equal, *results)


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


@pytest.mark.parametrize(
    ("sets", "target", "options", "message"),
    [
        ([], TARGET, {}, "0 sets and 1 targets"),
        (SETS, [], {}, "3 sets and 0 targets"),
        ([*SETS, OTHER], TARGET, {}, r"set 0 has shape \(7, 3\), set 3 has .* 4\)"),
        (SETS, [TARGET, OTHER], {}, "target 1 has shape"),
        ([INFINITE], TARGET, {}, "set 0: NaN or infinity in 2 of 7 rows, the .* row 2"),
        ([TARGET[0]], TARGET, {}, r"set 0 must be rows .* \(3,\)"),
        ([Rows(TARGET, weights=np.arange(30))], TARGET, {}, "data has weights"),
        (SETS, TARGET, {"bandwidths": [-1.0]}, "bandwidths must be positive"),
        (SETS, TARGET, {"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_bad_input(sets, target, options, message):
    with pytest.raises(ValueError, match=message):
        exact_gram_of_means(sets, target, **({"bandwidths": [1.0]} | options))


class Counting:
    """An `x` of `Rows` that notes which of its rows were read."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __getitem__(self, rows):
        self.taken = rows
        return self.x[rows]


@pytest.mark.slow
def test_each_set_gives_the_same_number_of_rows():
    sets = [Counting(x) for x in samples(5, (1000, 5, 23))]
    data = [Rows(x, dtype=np.float64) for x in sets]
    bandwidth = streamed_median_bandwidth(jax.random.key(0), data, num_points=61)
    assert [len(set(x.taken)) for x in sets] == [21, 5, 21]
    drawn = np.concatenate([x.x[x.taken] for x in sets])
    np.testing.assert_allclose(bandwidth, np.median(pdist(drawn)), rtol=1e-12)
    first = sets[0].taken
    assert bandwidth == streamed_median_bandwidth(jax.random.key(0), data, num_points=61)
    streamed_median_bandwidth(jax.random.key(1), data, num_points=61)
    assert set(sets[0].taken) != set(first)


def test_the_subsample_is_uniform(monkeypatch):
    monkeypatch.setattr(kernel_means, "median_bandwidth", lambda *_, **__: 1.0)
    ten, counts = Counting(samples(2, (10,))[0]), np.zeros(10)
    for key in jax.random.split(jax.random.key(0), 100):
        streamed_median_bandwidth(key, [Rows(ten)], num_points=4)
        counts[ten.taken] += 1
    assert np.abs(counts - 40).max() < 4 * np.sqrt(100 * 0.4 * 0.6)


@pytest.mark.parametrize(
    ("sets", "num_points", "message"),
    [
        ([], 1000, "no pair in 1000 points of 0 sets"),
        (SETS[:1], 1, "no pair in 1 points of 1 sets"),
        ([SETS[0][:1]], 1000, "no pair in 1 points"),
        ([SETS[0], OTHER], 1000, r"set 0 has shape \(7, 3\), set 1 has shape \(2, 4\)"),
        ([OTHER, OTHER], 1000, "all rows of set 0, set 1 are equal, .*give a number in place of"),
    ],
)
def test_medians_that_do_not_exist(sets, num_points, message):
    with pytest.raises(ValueError, match=message):
        streamed_median_bandwidth(jax.random.key(0), sets, num_points=num_points)
