"""The one rule by which a random key is derived for a use: the use's name is folded in.

`split(key)[i]` and `fold_in(key, i)` are the same key, so splits and numbers of steps, seeds or
classes that start from one key meet each other. A name does not meet them: `named_key(key, "flow")`
for what happens, `fold_in(named_key(key, "flow"), step)` for its repetitions.
"""

import hashlib

import jax
from jaxtyping import Array, Key, UInt32

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]


def named_key(key: PRNGKey, name: str) -> PRNGKey:
    """`fold_in(key, h)`, h the first four bytes of SHA-256(name), little endian.

    Of n names or small numbers two share an h with a probability near n^2 / 2^33. Raises ValueError
    for an empty name.
    """
    if not name:
        raise ValueError("a key is derived for a name, got an empty one")
    word = hashlib.sha256(name.encode()).digest()[:4]
    return jax.random.fold_in(key, int.from_bytes(word, "little"))
