"""Keys derived by a name: another for every name, and for every split and number."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.keys import named_key

COVERS = {"lib.keys": ("named_key",)}


@given(
    st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), st.integers(0, 2**32 - 1)
)
def test_names_splits_and_numbers_never_share_a_key(names, seed):
    key = jax.random.key(seed)
    keys = [key, *(named_key(key, name) for name in names)]
    keys += [*jax.random.split(key, 8), *(jax.random.fold_in(key, i) for i in range(8, 16))]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys)


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
