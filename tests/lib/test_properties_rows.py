"""Properties of samples that are read in pieces, and of their kernel means.

The oracles are NumPy's loops in float64. A mean of kernels or features, all at most 1, is off by
what their arguments are: eps times the terms that make up the argument, as said beside each bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import rows
from lib.rows import fourier_means, kernel_means

DTYPES = st.sampled_from([np.float32, np.float64])
EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)


def few(examples):
    return settings(max_examples=examples, deadline=None)


def sample(rng, n, d, exponent, dtype, same=False):
    """Rows at a scale, half of them twice, or all the same one."""
    x = 10.0**exponent * rng.normal(size=(n, d))
    x[n // 2 :] = x[: n - n // 2]
    return (np.repeat(x[:1], n, axis=0) if same else x).astype(dtype)


# Rows, and the pipeline


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
    """In order, in float32 at least, whatever the pieces; taken by any indices, also twice; of
    several samples as of one."""
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(n, d)).astype(dtype)
    wide = array.astype(np.float64 if dtype == np.float64 else np.float32)
    made = rows.as_rows(array, "x")
    assert isinstance(made, rows.Rows)
    assert rows.as_rows(made, "y") is made
    assert rows.pooled([made]) is made
    several = rows.pooled([made, rows.as_rows(array[:1], "y"), made])
    assert several.name == "x, y, x"
    for sample, expected in ((made, wide), (several, np.concatenate([wide, wide[:1], wide]))):
        assert (sample.shape, sample.dtype) == (expected.shape, wide.dtype)
        pieces = list(rows.read_ahead(sample.chunks(size, start=start), depth=1 + seed % 3))
        assert all(len(piece) == size for piece in pieces[:-1])
        np.testing.assert_array_equal(np.concatenate([wide[:0], *pieces]), expected[start:])
        indices = rng.integers(len(expected), size=size)
        np.testing.assert_array_equal(sample.take(indices), expected[indices])
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
        assert checked.dtype == np.float64
        assert checked.tolist() == values
    else:
        with pytest.raises(ValueError, match="bandwidths must be"):
            rows.check_bandwidths(values)


# Means


jit_blocks = jax.jit(fourier_means.row_blocks, static_argnums=(2, 3))


@few(10)
@given(
    st.sampled_from([(1, 1, 1, np.float32, True), (30, 12, 5, np.float64, False)]),
    EXPONENTS,
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
    found = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            key = jax.random.key(seed)
            found.append(
                fourier_means.stream_mean_embeddings(
                    x,
                    jnp.asarray(frequencies),
                    bandwidths,
                    phases=None if phases is None else jnp.asarray(phases),
                    offset=offset,
                    num_blocks=3,
                    block_key=key,
                    chunk_size=size,
                )
            )
    jax.tree.map(np.testing.assert_array_equal, *found)
    blocks = np.asarray(jit_blocks(key, 0, n, 3))
    assert isinstance(found[0], fourier_means.StreamedMeans)
    means, num_rows, block_sums, block_sizes = found[0]
    assert (means.dtype, block_sums.dtype, num_rows) == (np.float64, np.float64, n)
    np.testing.assert_array_equal(block_sizes, np.bincount(blocks, minlength=3))
    centred = x.astype(float) - offset
    for i, bandwidth in enumerate(bandwidths.astype(dtype).astype(float)):
        angles = centred @ frequencies.T.astype(float) / bandwidth
        sizes = np.abs(centred) @ np.abs(frequencies).T / bandwidth
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


@few(15)
@given(
    st.sampled_from([((1,), 1, 1), ((3, 1, 5), 4, 2), ((2, 2), 3, 11)]),
    DTYPES,
    EXPONENTS,
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
    found = [np.block([[a, b[:, None]], [b[None], q]]) for a, b, q in zip(*gram[:3])]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    members = (owners == np.arange(len(parts))[:, None]) / np.bincount(owners)[:, None]
    x = np.concatenate(parts).astype(float)
    distances = np.square(x[:, None] - x[None]).sum(axis=2)
    norms = np.square(x - x.mean(axis=0)).sum(axis=1).max() + np.square(x).sum(axis=1).max()
    off = 16 * np.finfo(dtype).eps * (norms if d > 8 else distances.max())
    for mean, bandwidth in zip(found, bandwidths):
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


@few(8)
@given(st.sampled_from([((2,), 1, np.float64), ((1, 1, 5), 12, np.float32)]), EXPONENTS, SEEDS)
def test_median_distance(case, exponent, seed):
    """NumPy's median of all pairs; a length: it scales with the rows."""
    (sizes, d, dtype), rng = case, np.random.default_rng(seed)
    sets = [(10.0**exponent * rng.normal(size=(n, d))).astype(dtype) for n in sizes]
    found = kernel_means.streamed_median_bandwidth(jax.random.key(seed), sets)
    assert type(found) is float
    x = np.concatenate(sets).astype(float)
    lengths = np.linalg.norm(x[:, None] - x[None], axis=2)[np.triu_indices(len(x), 1)]
    largest = 4 * np.square(x).sum(axis=1).max()
    bound = 16 * np.finfo(dtype).eps * largest / np.median(lengths)
    assert abs(found - np.median(lengths)) <= bound
    power = [part * dtype(4) for part in sets]
    scaled = kernel_means.streamed_median_bandwidth(jax.random.key(seed), power)
    assert scaled == 4 * found
