"""The one rule by which a random key is derived for a use: the use's name is folded in.

`split(key)[i]` and `fold_in(key, i)` are the same key, so splits and numbers of steps, seeds or
classes that start from one key meet each other. A name does not meet them: `named_key(key, "flow")`
for what happens, `fold_in(named_key(key, "flow"), step)` for its repetitions.

What starts from a seed takes it through `check_seed`: `jax.random.key` keeps 32 bits of a seed, so
that -1, or 2**32 + 1, would silently be another one's key.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, UInt32

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]

MOST_SEED = 2**32 - 1
"""The largest seed: also NumPy's and scikit-learn's."""
_SHIFTED_BELOW = 1_000_000


def check_seed(seed: Any, name: str = "seed") -> int:
    """The seed as an int. Raises ValueError, which begins with `name`, unless it is a whole number
    from 0 to 2**32 - 1."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed <= MOST_SEED:
        raise ValueError(
            f"{name} must be a whole number from 0 to {MOST_SEED}, got {seed!r}: random keys hold "
            "32 bits"
        )
    return int(seed)


def key_of_seed(seed: int, *, shift: int = 0) -> Key[Array, ""]:
    """A key of the seed, and for runs that need a second one another, with a `shift` of a million.

    `jax.random.key(shift + seed)` for seeds below a million. The keys of larger ones, which would
    meet those of other seeds with the other shift, or wrap around, are derived by name. Raises
    ValueError as `check_seed`.
    """
    seed = check_seed(seed)
    if seed < _SHIFTED_BELOW:
        return jax.random.key(shift + seed)
    return named_key(jax.random.key(seed), f"shift {shift}")


def named_key(key: PRNGKey, name: str) -> PRNGKey:
    """`fold_in(key, h)`, h the first four bytes of SHA-256(name), little endian.

    Of n names or small numbers two share an h with a probability near n^2 / 2^33. Raises ValueError
    for an empty name.
    """
    if not name:
        raise ValueError("a key is derived for a name, got an empty one")
    word = hashlib.sha256(name.encode()).digest()[:4]
    return jax.random.fold_in(key, int.from_bytes(word, "little"))
