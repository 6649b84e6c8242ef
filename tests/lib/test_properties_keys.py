"""Keys derived by a name: another for every name, and for every split and number."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.numerics import check_seed, key_of_seed, named_key

SEEDS = st.integers(0, 2**32 - 1) | st.integers(0, 3_000_000)


@given(
    st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), st.integers(0, 2**32 - 1)
)
def test_names_splits_and_numbers_never_share_a_key(names, seed):
    key = jax.random.key(seed)
    keys = [key, *(named_key(key, name) for name in names)]
    keys += [*jax.random.split(key, 8), *(jax.random.fold_in(key, i) for i in range(8, 16))]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys)


@given(st.lists(SEEDS, min_size=1, max_size=5, unique=True), st.booleans())
def test_seeds_never_share_a_key_nor_do_their_second_ones(seeds, x64):
    with jax.enable_x64(x64):
        neighbors = {
            s for seed in seeds for s in (seed, (seed + 1_000_000) % 2**32, (seed + 1000) % 2**32)
        }
        keys = [key_of_seed(s, shift=shift) for s in neighbors for shift in (0, 1_000_000)]
        assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys)
        for seed in seeds:
            if seed < 1_000_000:  # what published numbers were drawn with
                for shift in (0, 1000, 1_000_000):
                    key_data = jax.random.key_data(key_of_seed(seed, shift=shift))
                    np.testing.assert_array_equal(key_data, jax.random.PRNGKey(shift + seed))


NO_SEEDS = [
    *(-1, 2**32, 2**32 + 1, -(2**31), 2**63, 2**64, int(2e21), True, False, 1.0, 2e21, "1", None),
    *(np.int64(-1), np.uint64(2**63), np.float32(3), np.True_, np.array([1]), math.nan),
]


@pytest.mark.parametrize("seed", NO_SEEDS, ids=repr)
def test_what_is_no_seed_is_refused_in_one_line(seed):
    with pytest.raises(
        ValueError, match=r"^--seed must be a whole number from 0 to 4294967295, got"
    ):
        check_seed(seed, "--seed")
    for number in (0, 7, 2**32 - 1, np.int64(5), np.uint32(2**32 - 1), np.int8(3)):
        assert type(check_seed(number)) is int
        assert check_seed(number) == number


def test_a_name_means_the_same_key_everywhere():
    """Also in another process, of typed keys and of raw ones: Python's own hash of text is not."""
    key = named_key(jax.random.key(3), "flow")
    word = 0x8127213B  # printf flow | sha256sum, its first four bytes read from the right
    np.testing.assert_array_equal(
        jax.random.key_data(key), jax.random.key_data(jax.random.fold_in(jax.random.key(3), word))
    )
    np.testing.assert_array_equal(
        jax.random.key_data(key), named_key(jax.random.PRNGKey(3), "flow")
    )
    with pytest.raises(ValueError, match="empty"):
        named_key(key, "")
