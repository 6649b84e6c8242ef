"""Streamed mean embeddings against their formula in float64, and themselves."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from hypothesis import given
from hypothesis import strategies as st
from strategies import DECADES, SEEDS, few, normal, sample

from lib import rows
from lib.rff import gaussian_frequencies
from lib.rows import Rows, fourier_means, one_behind, read_ahead
from lib.rows.files import open_rows
from lib.rows.fourier_means import row_blocks, stream_mean_embeddings

NUM_FEATURES, DIMENSION = 6, 5
BANDWIDTHS = [0.7, 2.0, 10.0]
FREQUENCIES = gaussian_frequencies(jax.random.key(0), NUM_FEATURES, DIMENSION)


def features_of(rows):
    """The features of each row and bandwidth in float64, [n, S, F], by their formula."""
    angles = np.asarray(rows, float) @ np.asarray(FREQUENCIES, float).T
    angles = angles[:, None] / np.array(BANDWIDTHS)[:, None]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=2) / np.sqrt(NUM_FEATURES)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_widened(dtype):
    rows = np.asarray(jnp.asarray(normal(0, 40, DIMENSION), dtype))
    narrow = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS)
    wide = stream_mean_embeddings(rows.astype("f"), FREQUENCIES, BANDWIDTHS)
    np.testing.assert_array_equal(narrow.means, wide.means)
    assert (narrow.block_sums.shape, narrow.block_sizes) == ((1, *narrow.means.shape), [40])


def to_unit(images):
    return images / 127.5 - 1


def test_weighted_images():
    """uint8 with a transform: the weighted mean of the features, also from its blocks."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, DIMENSION, 1), dtype=np.uint8)
    weights, key = rng.uniform(size=300), jax.random.key(5)
    sample = Rows(images, weights=weights, transform=to_unit, dtype=np.float64)
    options = {"num_blocks": 4, "block_key": key, "chunk_size": 70}
    streamed = stream_mean_embeddings(sample, FREQUENCIES, BANDWIDTHS, **options)
    expected = np.average(features_of(to_unit(images[..., 0])), axis=0, weights=weights)
    np.testing.assert_allclose(streamed.means, expected, rtol=0, atol=1e-13)
    blocks = np.asarray(jitted_row_blocks(key, 0, 300, 4))
    np.testing.assert_allclose(streamed.block_sizes, np.bincount(blocks, weights), rtol=1e-13)


def test_sums_over_chunks_are_in_float64():
    """In float32, 1 + 2^-24 is 1: the more chunks, the less each of them would add."""
    row = normal(0, 1, DIMENSION).astype("f")
    repeated = stream_mean_embeddings(row.repeat(200, 0), FREQUENCIES, BANDWIDTHS, chunk_size=1)
    one = stream_mean_embeddings(row, FREQUENCIES, BANDWIDTHS)
    np.testing.assert_allclose(repeated.means, one.means, rtol=1e-13)


def test_samples_of_many_sizes_compile_once():
    fourier_means._chunk_sums.clear_cache()
    for size in (405, 500, 1012):
        rows = normal(0, size, DIMENSION).astype("f")
        stream_mean_embeddings(rows, FREQUENCIES, [2.0, 3.0, 4.0], chunk_size=507)
    assert fourier_means._chunk_sums._cache_size() == 1  # for 512 rows


def test_offset_saves_the_digits_of_rows_far_from_the_origin():
    """Distances between embeddings, whose exact values do not depend on the offset."""
    x = (1e4 + normal(0, 400, DIMENSION)).astype("f")
    y = (1e4 + 0.5 + normal(1, 400, DIMENSION)).astype("f")

    def distance(x, y, **options):
        means = (stream_mean_embeddings(z, FREQUENCIES, BANDWIDTHS, **options) for z in (x, y))
        return np.linalg.norm(next(means).means - next(means).means, axis=1)

    exact = distance(x.astype(float), y.astype(float))
    plain = np.abs(distance(x, y) / exact - 1).max()
    offset = np.full(DIMENSION, 1e4)
    centered = np.abs(distance(x, y, offset=offset) / exact - 1).max()
    assert centered < 2e-6 < 20 * centered < plain


# Blocks of rows

jitted_row_blocks = jax.jit(row_blocks, static_argnums=(2, 3))


@pytest.mark.parametrize("num_blocks", [7, slow(1000)])
def test_blocks_do_not_depend_on_chunks(num_blocks):
    key = jax.random.key(3)
    whole = np.asarray(jitted_row_blocks(key, 0, 100, num_blocks))
    parts = [jitted_row_blocks(key, first, 50, num_blocks) for first in (0, 50)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(set(whole[:num_blocks])) == len(set(whole)) == min(100, num_blocks)
    assert not np.array_equal(jitted_row_blocks(jax.random.key(4), 0, 100, num_blocks), whole)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jitted_row_blocks(key, 0, 100, num_blocks), whole)


def test_every_block_is_as_likely_for_every_row():
    draw = jax.vmap(lambda key: jitted_row_blocks(key, 2, 3, 4))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    counts = np.stack([(draws == block).sum(axis=0) for block in range(4)])
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(4000 * 3 / 16)


@pytest.mark.parametrize("sort", [False, True])
def test_block_bootstrap_has_the_spread_of_the_mean(sort):
    """About the variance over fresh samples, var(cos) / n, in whatever order the rows are."""
    rows = normal(0, 4000, DIMENSION)
    rows = rows[np.argsort(rows[:, 0])] if sort else rows
    options = {"num_blocks": 100, "block_key": jax.random.key(5)}
    streamed = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, **options)
    weights = np.random.default_rng(1).multinomial(100, np.full(100, 0.01), size=2000)
    sums = np.tensordot(weights, streamed.block_sums[:, 1], 1)
    draws = sums / (weights @ streamed.block_sizes)[:, None]
    ratio = draws.var(axis=0) / (features_of(rows)[:, 1].var(axis=0) / 4000)
    # A variance from 100 blocks has a relative deviation of sqrt(2 / 99) = .14.
    assert np.abs(ratio - 1).max() < 4 * 0.15
    assert abs(ratio.mean() - 1) < 0.2


ROWS = normal(0, 8, DIMENSION).astype("f")


@pytest.mark.parametrize(
    ("sample", "bandwidths", "options", "message"),
    [
        (ROWS[:0], BANDWIDTHS, {}, r"the sample must be rows .* shape \(0, 5\)"),
        (ROWS[:, :3], BANDWIDTHS, {}, "rows of 5 columns are needed.*, got rows of 3"),
        (ROWS[0], BANDWIDTHS, {}, r"must be rows .* shape \(5,\)"),
        (ROWS + 0j, BANDWIDTHS, {}, "the sample must be numbers, got complex64"),
        (3e38 * np.sign(FREQUENCIES), BANDWIDTHS, {}, "NaN or infinity in . of 6 rows, .* row 0"),
        (ROWS, [1.0, 0.0], {}, r"positive and finite, got \[1. 0.\]"),
        (ROWS, [], {}, "must be a vector"),
        (ROWS, 2.0, {}, r"must be a vector, got shape \(\)"),
        (ROWS, BANDWIDTHS, {"num_blocks": 0}, "num_blocks must be 1"),
        (ROWS, BANDWIDTHS, {"num_blocks": 2}, "more with a block_key: 2"),
        (ROWS, BANDWIDTHS, {"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_input(sample, bandwidths, options, message):
    with pytest.raises(ValueError, match=message):
        stream_mean_embeddings(sample, FREQUENCIES, bandwidths, **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("offset", [None, np.ones(DIMENSION)])
def test_files_with_rows_that_are_not_finite(tmp_path, dtype, bad, offset):
    """Told by the device; and no float64 scope is left behind."""
    rows = normal(0, 300, DIMENSION).astype(dtype)
    for column in range(DIMENSION):
        rows[50 * column + 17, column] = bad
    rows[299] = bad
    np.save(tmp_path / "x.npy", rows)
    file = open_rows(tmp_path / "x.npy")
    for size in (20, 1000):
        with pytest.raises(ValueError, match=r"x\.npy: .*infinity in 6 of 300 rows, .* row 17$"):
            stream_mean_embeddings(file, FREQUENCIES, BANDWIDTHS, offset=offset, chunk_size=size)
    assert jnp.ones(1).dtype == jnp.float32


# The pipeline


def test_read_ahead():
    """In order, by another thread, two items ahead and no further; errors come in their place."""
    taken = []

    def items():
        for i in range(6):
            taken.append((i, threading.get_ident()))
            yield i
        raise OSError("the disk is gone")

    reader = read_ahead(items())
    for i in range(6):
        assert next(reader) == i
        time.sleep(0.05)
        # Asked for: this one and the two after it; the third waits for the next turn.
        assert len(taken) == min(6, i + 3)
    with pytest.raises(OSError, match="the disk is gone"):
        next(reader)
    assert threading.get_ident() not in {thread for _, thread in taken}


def test_read_ahead_ends_with_its_consumer():
    threads = threading.active_count()
    reader = read_ahead(iter(range(10**9)))
    assert next(reader) == 0
    reader.close()
    assert threading.active_count() == threads


def test_one_behind():
    asked = []

    def results():
        for i in range(3):
            asked.append(i)
            yield jnp.full(2, float(i))

    for i, result in enumerate(one_behind(results())):
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, [i, i])
        assert len(asked) == min(3, i + 2)
    assert list(one_behind([])) == []


# At any scale and in both dtypes


@few(60)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([np.float16, jnp.bfloat16, np.float32, np.float64]),
    st.integers(1, 50),
    st.integers(0, 45),
    SEEDS,
)
def test_rows_of_an_array(n, d, dtype, size, start, seed):
    """In order, in float32 at least, whatever the pieces; of several samples as of one."""
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(n, d)).astype(dtype)
    wide = array.astype(np.float64 if dtype == np.float64 else np.float32)
    made = rows.as_rows(array, "x")
    assert isinstance(made, rows.Rows)
    assert rows.as_rows(made, "y") is made
    assert rows.pooled([made]) is made
    several = rows.pooled([made, rows.as_rows(array[:1], "y"), made])
    assert several.name == "x, y, x"
    for data, expected in ((made, wide), (several, np.concatenate([wide, wide[:1], wide]))):
        assert (data.shape, data.dtype) == (expected.shape, wide.dtype)
        pieces = list(rows.read_ahead(data.chunks(size, start=start), depth=1 + seed % 3))
        assert all(len(piece) == size for piece in pieces[:-1])
        np.testing.assert_array_equal(np.concatenate([wide[:0], *pieces]), expected[start:])
        indices = rng.integers(len(expected), size=size)
        np.testing.assert_array_equal(data.take(indices), expected[indices])
    filled = rows.fill_up(wide, size)
    assert filled.dtype == wide.dtype
    np.testing.assert_array_equal(filled[:n], wide)
    np.testing.assert_array_equal(filled[n:], np.repeat(wide[-1:], max(0, size - n), axis=0))


@few(30)
@given(st.lists(st.integers(0, 9), max_size=6))
def test_the_pipeline_keeps_items_and_their_order(items):
    assert list(rows.read_ahead(items)) == items
    arrays = [jnp.full((2,), item, jnp.float32) for item in items]
    fetched = list(rows.one_behind(arrays))
    assert [(type(a), a.tolist()) for a in fetched] == [(np.ndarray, 2 * [1.0 * i]) for i in items]


@few(40)
@given(st.lists(st.floats(allow_subnormal=False), max_size=4))
def test_bandwidths_are_positive_and_finite_and_lose_no_digit(values):
    if len(values) > 0 and all(0 < value < np.inf for value in values):
        checked = rows.check_bandwidths(values)
        assert (checked.dtype, checked.tolist()) == (np.float64, values)
    else:
        with pytest.raises(ValueError, match="bandwidths must be"):
            rows.check_bandwidths(values)


@few(10)
@given(
    st.sampled_from([(1, 1, 1, np.float32, True), (30, 12, 5, np.float64, False)]),
    DECADES,
    st.integers(1, 31),
    SEEDS,
)
def test_streamed_means(case, exponent, size, seed):
    """Against cos(w x / s) summed in float64. An argument is off by d + 3 roundings of
    |w| |x| / s, its cosine by one more. Sums over blocks are those of the blocks' own rows, in
    float64 scope or out of it."""
    (n, d, num_features, dtype, cosines), rng = case, np.random.default_rng(seed)
    x = sample(rng, n, d, exponent, dtype)
    offset = x[0]
    frequencies = rng.normal(size=(num_features, d)).astype(np.float32)
    phases = rng.uniform(0, 6, num_features).astype(np.float32) if cosines else None
    bandwidths = 10.0**exponent * np.array([0.5, 2.0])
    options = {"phases": phases if phases is None else jnp.asarray(phases), "offset": offset}
    options |= {"num_blocks": 3, "block_key": jax.random.key(seed), "chunk_size": size}
    streamed, arguments = [], (x, jnp.asarray(frequencies), bandwidths)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            streamed.append(stream_mean_embeddings(*arguments, **options))
    jax.tree.map(np.testing.assert_array_equal, *streamed)
    blocks = np.asarray(jitted_row_blocks(options["block_key"], 0, n, 3))
    assert isinstance(streamed[0], fourier_means.StreamedMeans)
    means, num_rows, block_sums, block_sizes = streamed[0]
    assert (means.dtype, block_sums.dtype, num_rows) == (np.float64, np.float64, n)
    np.testing.assert_array_equal(block_sizes, np.bincount(blocks, minlength=3))
    centered = x.astype(float) - offset
    for i, bandwidth in enumerate(bandwidths.astype(dtype).astype(float)):
        angles = centered @ frequencies.T.astype(float) / bandwidth
        sizes = np.abs(centered) @ np.abs(frequencies).T / bandwidth
        if cosines:
            features, scale = np.cos(angles + phases), np.sqrt(2 / num_features)
            sizes = sizes + phases
        else:
            features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
            sizes, scale = np.concatenate([sizes, sizes], axis=1), 1 / np.sqrt(num_features)
        rounding = np.finfo(dtype).eps * ((d + 4) * sizes + n + 4) * scale
        for block in range(3):
            members = blocks == block
            error = np.abs(block_sums[block, i] - scale * features[members].sum(axis=0))
            assert np.all(error <= rounding[members].sum(axis=0) + 1e-300)
        assert np.all(np.abs(means[i] - scale * features.mean(axis=0)) <= rounding.mean(axis=0))
