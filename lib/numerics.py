"""What the numerics share: aliases, products, sums in blocks, input validation, random keys.

A random key is derived for a use by one rule, `named_key`: the use's name is folded in.
`split(key)[i]` and `fold_in(key, i)` are the same key, so splits and numbers of steps, seeds or
classes that start from one key meet each other. A name does not meet them: `named_key(key, "flow")`
for what happens, `fold_in(named_key(key, "flow"), step)` for its repetitions.

What starts from a seed takes it through `check_seed`: `jax.random.key` keeps 32 bits of a seed, so
that -1, or 2**32 + 1, would silently be another one's key.
"""

import hashlib
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree, Shaped, UInt32

AnyArray = Array | np.ndarray
"""An array of jax or of numpy."""
PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
"""A random key of either kind: `jax.random.key(0)` or `jax.random.PRNGKey(0)`."""


# Products and elementary functions


def product(a: AnyArray, b: AnyArray) -> Array:
    """a b at the highest precision: less loses the small eigenvalues of a Gram matrix."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def orthonormal_rows(normal: Float[Array, "groups d k"]) -> Float[Array, "rows d"]:
    """`groups` times k <= d orthonormal vectors as rows, uniform (Haar) if the entries are N(0, 1).

    QR itself leaves the signs as its reflections fall; with a positive diagonal of R, Q is uniform
    (Mezzadri, How to generate random matrices from the classical compact groups, 2007).
    """
    q, r = jnp.linalg.qr(normal)
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    return jnp.swapaxes(q, 1, 2).reshape(-1, normal.shape[1])


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` itself, or `x` in float32 where it comes in half precision."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _zero_at_zero(function, values):
    """`function(values)`, with 0 for the value and every derivative where values <= 0."""
    zero = values <= 0
    return jnp.where(zero, 0, function(jnp.where(zero, 1, values)))


def safe_sqrt(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(values), with value and derivatives 0 (not infinite) where values <= 0."""
    return _zero_at_zero(jnp.sqrt, values)


def safe_norm(x: Float[Array, "*shape d"]) -> Float[Array, "*shape"]:
    """Euclidean norm over the last axis, with derivatives 0 (not NaN) at x = 0."""
    return safe_sqrt(jnp.sum(jnp.square(x), axis=-1))


@jax.custom_jvp
def cos_sin(
    angles: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """(cos, sin), in float32 to 1e-7, and past 1e4 to the rounding of the angle itself.

    XLA's own take fifteen times as long on CPU (measured, jax 0.10), as long as the product W x in
    800 dimensions. Here float32 angles lose their
    multiples of pi/2, subtracted in parts so short that the product with each is exact up to 1e4
    (Cody and Waite 1980), and Taylor polynomials on [-pi/4, pi/4] do the rest.
    """
    if angles.dtype != jnp.float32:
        return jnp.cos(angles), jnp.sin(angles)
    quarters = jnp.round(angles * (2 / math.pi))
    rest = angles
    for part in _QUARTER_TURN:
        rest = rest - quarters * part
    # Of a huge angle no digit is left, but its cosine stays one.
    rest = jnp.clip(rest, -0.8, 0.8)
    square, quarters = jnp.square(rest), quarters.astype(jnp.int32)
    even, odd = (_taylor(square, range(first, 11, 2)) for first in (0, 1))
    odd = odd * rest
    turned = quarters % 2 == 1
    cos, sin = jnp.where(turned, odd, even), jnp.where(turned, even, odd)
    cos = jnp.where((quarters + 1) % 4 >= 2, -cos, cos)
    return cos, jnp.where(quarters % 4 >= 2, -sin, sin)


@cos_sin.defjvp
def _cos_sin_jvp(primals, tangents):
    cos, sin = cos_sin(*primals)
    return (cos, sin), (-sin * tangents[0], cos * tangents[0])


def _taylor(square, powers):
    """sum_k (-1)^k square^k / p_k! over the powers p_0, p_1, ..."""
    total = jnp.zeros_like(square)
    for power in reversed(powers):
        total = (-1) ** (power // 2) / math.factorial(power) + square * total
    return total


def _parts(value, bits):
    """`value` as a sum of numbers, all but the last one multiples of 2^-b."""
    for b in bits:
        part = math.floor(value * 2**b) / 2**b
        yield part
        value -= part
    yield value


_QUARTER_TURN = tuple(_parts(math.pi / 2, (10, 22)))


# Sums over samples


def uniform_weights(x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """1/n for each row of `x`."""
    if x.shape[0] == 0:
        raise ValueError(f"an empty sample has no weights: shape {x.shape}")
    return jnp.full(x.shape[0], 1 / x.shape[0], jnp.promote_types(x.dtype, jnp.float32))


def normalized_weights(
    x: Float[Array, "n d"], weights: Float[Array, " n"] | None
) -> Float[Array, " n"]:
    """The weights divided by their sum; 1/n where there are none."""
    return uniform_weights(x) if weights is None else weights / jnp.sum(weights)


def to_blocks(
    x: Shaped[Array, "n d"], weights: Float[Array, "n *columns"], block_size: int
) -> tuple[Shaped[Array, "blocks size d"], Float[Array, "blocks size *columns"]]:
    """Rows and weights in blocks of equal size, at most `block_size`.

    What is missing in the last block is filled with copies of the last row, at weight 0: padding
    that moves no mean, meets no point that the data does not have, and adds nothing to a sum.
    """
    x = _blocks(x, block_size)
    if missing := x.shape[0] * x.shape[1] - len(weights):
        weights = jnp.pad(weights, ((0, missing),) + ((0, 0),) * (weights.ndim - 1))
    return x, weights.reshape(*x.shape[:2], *weights.shape[1:])


def map_blocks(function: Callable, x: Shaped[Array, "n d"], block_size: int) -> PyTree:
    """The rows [n, ...] of `function(rows of x)`, computed at most `block_size` rows at a time.

    `function` must treat each row by itself; it may return several arrays.
    """

    def join(values):
        return values.reshape(-1, *values.shape[2:])[: len(x)]

    return jax.tree.map(join, map_leading(function, _blocks(x, block_size)))


def map_leading(function: Callable, items: PyTree) -> PyTree:
    """`lax.map(function, items)` over the leading axis, without a loop where it has length 1."""
    if len(jax.tree.leaves(items)[0]) > 1:
        return lax.map(function, items)
    only = jax.tree.map(lambda leaf: leaf[0], items)
    return jax.tree.map(lambda leaf: leaf[None], function(only))


def _blocks(x, block_size):
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if x.shape[0] == 0:
        raise ValueError(f"an empty sample: shape {x.shape}")
    if x.shape[0] <= block_size:
        return x.reshape(1, x.shape[0], -1)
    blocks = -(-x.shape[0] // block_size)
    size = -(-x.shape[0] // blocks)
    x = jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0)), mode="edge")
    return x.reshape(blocks, size, -1)


def pairwise_sum(terms: Float[Array, "n *columns"]) -> Float[Array, "*columns"]:
    """The sum over the first axis by halves: its rounding error grows with log n, not with n."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = jnp.concatenate([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
    return terms[0]


# Input validation


def plain_number(value: Any) -> Any:
    """A number of Python or NumPy as a Python float, whose dtype gives way to that of arrays (a
    NumPy float64 makes float64 of float32 under x64); anything else as it is."""
    return float(value) if isinstance(value, numbers.Real) else value


def _is_concrete(array):
    return not isinstance(array, jax.core.Tracer)


def as_sample(
    name: str, points: Any, weights: Any = None
) -> tuple[Float[Array, "n d"], Float[Array, " n"] | None]:
    """A weighted sample as JAX arrays, `points` [n, d] and `weights` [n] or None.

    Anything that NumPy can read may come in: arrays, nested lists, torch tensors on the CPU.

    Raises ValueError, with the sample's `name`, unless it is floating point, n and d at least 1,
    everything finite, no weight negative and not all of them 0; TypeError for what is no array.
    Shapes and dtypes are always checked, values only where they are not traced, so that what calls
    this can be jitted.
    """
    arrays = {name: points} if weights is None else {name: points, f"{name}_weights": weights}
    for label, array in arrays.items():
        try:
            array = array if isinstance(array, jax.Array) else np.asarray(array)
            arrays[label] = jnp.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{label} is no array that NumPy can read: {error}") from error
    points, weights = arrays[name], arrays.get(f"{name}_weights")
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"{name} must be [n, d] with n, d >= 1, got shape {points.shape}")
    if weights is not None and weights.shape != points.shape[:1]:
        raise ValueError(f"{name}_weights must be [{len(points)}], got shape {weights.shape}")
    for label, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{label} must be floating point, got {array.dtype}")
        if not _is_concrete(array):
            continue
        with jax.ensure_compile_time_eval():
            if not jnp.isfinite(array).all():
                first = int(jnp.argmin(jnp.isfinite(array.reshape(len(array), -1)).all(axis=1)))
                raise ValueError(f"{label} is not finite in row {first}: {array[first]}")
    if weights is not None and _is_concrete(weights):
        with jax.ensure_compile_time_eval():
            if weights.min() < 0 or weights.sum() == 0:
                raise ValueError(
                    f"{name}_weights must be >= 0 with a positive sum, got a minimum of "
                    f"{weights.min()} and a sum of {weights.sum()}"
                )
    return points, weights


# Seeds and keys

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
