"""Streamed mean embeddings against loops in float64, the embedding of the whole, and themselves."""

import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.rff import gaussian_frequencies, mean_embedding, uniform_phases
from lib.rows import Rows, fourier_means, one_behind, read_ahead
from lib.rows.files import open_rows
from lib.rows.fourier_means import row_blocks, stream_mean_embeddings

NUM_FEATURES, DIMENSION = 6, 5
BANDWIDTHS = [0.7, 2.0, 10.0]
FREQUENCIES = gaussian_frequencies(jax.random.key(0), NUM_FEATURES, DIMENSION)
PHASES = uniform_phases(jax.random.key(1), NUM_FEATURES)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def by_hand(rows, phases=None, offset=0.0):
    """The features of each row and bandwidth in float64, [n, S, F], by their formula."""
    frequencies, features = np.asarray(FREQUENCIES, float), []
    for row in np.asarray(rows, float) - offset:
        angles = [[float(omega @ row) / s for omega in frequencies] for s in BANDWIDTHS]
        if phases is None:
            pairs = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
            features.append(pairs / np.sqrt(NUM_FEATURES))
        else:
            cosines = np.cos(np.array(angles) + np.asarray(phases, float))
            features.append(cosines * np.sqrt(2 / NUM_FEATURES))
    return np.array(features)


@pytest.mark.parametrize("phases", [None, PHASES], ids=["pairs", "phases"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_means_by_hand(dtype, phases):
    rows = normal(0, 700, DIMENSION).astype(dtype)
    found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, phases=phases, chunk_size=300)
    expected = by_hand(rows, phases).mean(axis=0)
    assert found.means.dtype == np.float64
    assert found.num_rows == 700
    tolerance = 1e-13 if dtype == np.float64 else 3e-7
    np.testing.assert_allclose(found.means, expected, rtol=0, atol=tolerance)
    assert not jax.config.jax_enable_x64


def test_means_are_those_of_the_whole():
    rows = normal(0, 1000, DIMENSION).astype("f")
    for phases in (None, PHASES):
        found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, phases=phases)
        for bandwidth, mean in zip(BANDWIDTHS, found.means):
            whole = mean_embedding(jnp.asarray(rows), FREQUENCIES, bandwidth, phases=phases)
            np.testing.assert_allclose(mean, whole, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_widened(dtype):
    rows = np.asarray(jnp.asarray(normal(0, 40, DIMENSION), dtype))
    found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS)
    wide = stream_mean_embeddings(rows.astype("f"), FREQUENCIES, BANDWIDTHS)
    np.testing.assert_array_equal(found.means, wide.means)


def to_unit(images):
    return images / 127.5 - 1


def test_weighted_images():
    """uint8 with a transform: the weighted mean of the features by hand, also from its blocks."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, DIMENSION, 1), dtype=np.uint8)
    weights, key = rng.uniform(size=300), jax.random.key(5)
    sample = Rows(images, weights=weights, transform=to_unit, dtype=np.float64)
    found = stream_mean_embeddings(
        sample, FREQUENCIES, BANDWIDTHS, num_blocks=4, block_key=key, chunk_size=70
    )
    expected = np.average(by_hand(to_unit(images[..., 0].astype(float))), axis=0, weights=weights)
    np.testing.assert_allclose(found.means, expected, rtol=0, atol=1e-13)
    blocks = np.asarray(jitted_row_blocks(key, 0, 300, 4))
    np.testing.assert_allclose(found.block_sizes, np.bincount(blocks, weights), rtol=1e-13)


@settings(deadline=None, max_examples=15)
@given(size=st.integers(1, 400), seed=st.integers(0, 9))
def test_neither_chunks_nor_order_matter(size, seed):
    rows = normal(0, 300, DIMENSION)
    whole = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS).means
    shuffled = np.random.default_rng(seed).permutation(rows)
    parts = stream_mean_embeddings(shuffled, FREQUENCIES, BANDWIDTHS, chunk_size=size).means
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-14)


def test_sums_over_chunks_are_in_float64():
    """In float32, 1 + 2^-24 is 1: the more chunks, the less each of them would add."""
    row = normal(0, 1, DIMENSION).astype("f")
    found = stream_mean_embeddings(row.repeat(200, 0), FREQUENCIES, BANDWIDTHS, chunk_size=1)
    one = stream_mean_embeddings(row, FREQUENCIES, BANDWIDTHS)
    np.testing.assert_allclose(found.means, one.means, rtol=1e-13)


def test_samples_of_many_sizes_compile_once():
    fourier_means._chunk_sums.clear_cache()
    for size in (405, 500, 1012):
        rows = normal(0, size, DIMENSION).astype("f")
        stream_mean_embeddings(rows, FREQUENCIES, [2.0, 3.0, 4.0], chunk_size=507)
    assert fourier_means._chunk_sums._cache_size() == 1  # for 512 rows


def test_offset():
    rows = normal(0, 50, DIMENSION) + 3
    offset = normal(1, DIMENSION)
    found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, offset=offset)
    expected = by_hand(rows, offset=offset).mean(axis=0)
    np.testing.assert_allclose(found.means, expected, rtol=0, atol=1e-13)


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
    centred = np.abs(distance(x, y, offset=offset) / exact - 1).max()
    assert centred < 2e-6 < 20 * centred < plain


# Blocks of rows

jitted_row_blocks = jax.jit(row_blocks, static_argnums=(2, 3))


@pytest.mark.parametrize("num_blocks", [7, 1000])
def test_blocks_do_not_depend_on_chunks(num_blocks):
    key = jax.random.key(3)
    whole = np.asarray(jitted_row_blocks(key, 0, 100, num_blocks))
    parts = [
        jitted_row_blocks(key, first, count, num_blocks) for first, count in ((0, 50), (50, 50))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(set(whole[:num_blocks])) == min(100, num_blocks)
    assert len(set(whole)) == min(100, num_blocks)
    assert not np.array_equal(jitted_row_blocks(jax.random.key(4), 0, 100, num_blocks), whole)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jitted_row_blocks(key, 0, 100, num_blocks), whole)


def test_every_block_is_as_likely_for_every_row():
    draw = jax.vmap(lambda key: jitted_row_blocks(key, 2, 3, 4))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    counts = np.stack([(draws == block).sum(axis=0) for block in range(4)])
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(4000 * 3 / 16)


@pytest.mark.parametrize("num_blocks", [4, 50])
def test_sums_of_blocks(num_blocks):
    key, rows = jax.random.key(5), normal(0, 23, DIMENSION)
    options = {"num_blocks": num_blocks, "block_key": key, "chunk_size": 9}
    found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, **options)
    features, blocks = by_hand(rows), np.asarray(jitted_row_blocks(key, 0, 23, num_blocks))
    expected = np.zeros((num_blocks, *features.shape[1:]))
    for block, row in zip(blocks, features):
        expected[block] += row
    np.testing.assert_allclose(found.block_sums, expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found.block_sizes, np.bincount(blocks, minlength=num_blocks))
    np.testing.assert_allclose(found.block_sums.sum(axis=0) / 23, found.means, rtol=1e-14)
    plain = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS)
    np.testing.assert_allclose(found.means, plain.means, rtol=0, atol=1e-14)
    assert plain.block_sums.shape == (1, *plain.means.shape)
    assert plain.block_sizes == [23]


def test_bootstrap_over_blocks_is_that_over_rows_when_they_suffice():
    rows, rng = normal(0, 12, DIMENSION), np.random.default_rng(0)
    options = {"num_blocks": 30, "block_key": jax.random.key(5)}
    found = stream_mean_embeddings(rows, FREQUENCIES, BANDWIDTHS, **options)
    weights = rng.poisson(1, size=30)
    drawn = np.tensordot(weights, found.block_sums, 1) / (weights @ found.block_sizes)
    row_weights = weights[np.asarray(jitted_row_blocks(options["block_key"], 0, 12, 30))]
    expected = np.average(by_hand(rows), axis=0, weights=row_weights)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sort", [False, True])
def test_block_bootstrap_has_the_spread_of_the_mean(sort):
    """Its variance is about that of the mean over fresh samples, here var(cos) / n by hand, in
    whatever order the rows are."""
    rows = normal(0, 4000, DIMENSION)
    rows = rows[np.argsort(rows[:, 0])] if sort else rows
    options = {"num_blocks": 100, "block_key": jax.random.key(5)}
    found = stream_mean_embeddings(rows, FREQUENCIES, [2.0], **options)
    weights = np.random.default_rng(1).multinomial(100, np.full(100, 0.01), size=2000)
    sums = np.tensordot(weights, found.block_sums[:, 0], 1)
    draws = sums / (weights @ found.block_sizes)[:, None]
    angles = rows @ np.asarray(FREQUENCIES, float).T / 2
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(NUM_FEATURES)
    ratio = draws.var(axis=0) / (features.var(axis=0) / 4000)
    # A variance from 100 blocks has a relative deviation of sqrt(2 / 99) = .14.
    assert np.abs(ratio - 1).max() < 4 * 0.15
    assert abs(ratio.mean() - 1) < 0.2


# What raises


def test_bad_input():
    rows = normal(0, 8, DIMENSION).astype("f")
    bad, find = rows.copy(), stream_mean_embeddings
    bad[6, 1] = np.inf
    for sample, bandwidths, options, message in (
        (rows[:0], BANDWIDTHS, {}, r"the sample must be rows .* shape \(0, 5\)"),
        (rows[:, :3], BANDWIDTHS, {}, "rows of 5 columns are needed.*, got rows of 3"),
        (rows[0], BANDWIDTHS, {}, r"must be rows .* shape \(5,\)"),
        (rows + 0j, BANDWIDTHS, {}, "the sample must be numbers, got complex64"),
        (bad, BANDWIDTHS, {}, "NaN or infinity in 1 of 8 rows, the first is row 6"),
        (3e38 * np.sign(FREQUENCIES), BANDWIDTHS, {}, "NaN or infinity in . of 6 rows, .* row 0"),
        (rows, [1.0, 0.0], {}, r"positive and finite, got \[1. 0.\]"),
        (rows, [], {}, "must be a vector"),
        (rows, 2.0, {}, r"must be a vector, got shape \(\)"),
        (rows, BANDWIDTHS, {"num_blocks": 0}, "num_blocks must be 1"),
        (rows, BANDWIDTHS, {"num_blocks": 2}, "more with a block_key: 2"),
        (rows, BANDWIDTHS, {"chunk_size": 0}, "chunk_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            find(sample, FREQUENCIES, bandwidths, **options)


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


def run_python(code, *arguments, **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | variables, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SEVERAL_DEVICES = """
import jax, numpy as np
from lib.rff import gaussian_frequencies, uniform_phases
from lib.rows.fourier_means import stream_mean_embeddings
devices = jax.local_devices()
assert len(devices) == 4
rng = np.random.default_rng(0)
frequencies = gaussian_frequencies(jax.random.key(0), 20, 8)
phases = uniform_phases(jax.random.key(1), 20)
options = {"num_blocks": 5, "block_key": jax.random.key(2), "phases": phases, "chunk_size": 700}
rows = rng.normal(size=(1413, 8))
one, three, four = (
    stream_mean_embeddings(rows, frequencies, [1.0, 3.0], devices=some, **options)
    for some in (devices[1:2], devices[:3], None)
)
for several in (three, four):
    np.testing.assert_allclose(several.block_sums, one.block_sums, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(several.block_sizes, one.block_sizes)
    assert np.abs(several.block_sums).max() > 1
print("equal")
"""


def test_several_devices():
    flags = "--xla_force_host_platform_device_count=4"
    assert run_python(SEVERAL_DEVICES, XLA_FLAGS=flags).strip() == "equal"


MEMORY = """
import resource, sys
import jax
from lib.rff import gaussian_frequencies
from lib.rows.files import open_rows
from lib.rows.fourier_means import stream_mean_embeddings
unit = 1 if sys.platform == "darwin" else 1024
frequencies = jax.block_until_ready(gaussian_frequencies(jax.random.key(0), 100, 8192))
file = open_rows(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = stream_mean_embeddings(file, frequencies, [50.0, 100.0], chunk_size=256)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * unit, found.num_rows)
"""


@pytest.mark.slow
def test_memory_is_that_of_chunks(tmp_path):
    """312 MiB of float16 would be 625 MiB in float32; a chunk of 256 rows is 8 MiB."""
    torch.save(torch.ones(20_000, 8192, dtype=torch.float16), tmp_path / "rows.pt")
    growth, rows = map(int, run_python(MEMORY, tmp_path / "rows.pt").split())
    assert rows == 20_000
    assert growth < 150 * 2**20
