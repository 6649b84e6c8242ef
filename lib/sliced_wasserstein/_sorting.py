"""Sorting the columns of matrices: the inner loop of every sliced-Wasserstein distance.

XLA's CPU sort of floats runs one comparison at a time (about 0.17 µs a value, measured at n = 500).
Here a bitonic network (Batcher, 1968) compares whole rows at once, so every stage is a vectorized
minimum and maximum: 10 to 25 times faster at n = 50 to 2,000. Its stages grow with log(n)^2; from
16,000 rows on, XLA's sort of integers, whose comparisons are compiled, is faster (1.7 to 1.9 times
at 50,000 to 200,000, with the permutation, two cores) and compiles in a quarter of the time: a
float32 and its row are an int64. Other platforms use `jax.lax.sort`. Arrays are `[..., n, m]`; each
of the m columns is sorted by itself.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Each stage is a loop to compile: half a second in all at n = 512, one and a half at 200,000.
LONGEST_NETWORK = 2**14
# Of float64 with its permutation, which no integer holds. Value and row of a float32 share a
# float64, exact up to 53 bits, 32 of them the value's.
LONGEST_NETWORK_OF_DOUBLES = 2**20
# Sorts of a share of the columns each, which XLA runs beside each other.
SORTS_AT_A_TIME = 16
# Values that go through a stage together: enough to outweigh starting a loop, few enough to stay
# in cache. Small matrices share a pass (a step on the rings is 15% faster for it), large ones are
# cut into columns.
VALUES_A_PASS = 250_000
MOST_VALUES_A_PASS = 2**20


def _stages(n: int) -> Iterator[tuple[int, bool]]:
    """(distance, mirrored) of each stage: runs of `distance` are merged by a mirrored comparison
    of two neighbors, then cleaned at halving distances. All comparisons point the same way."""
    run = 1
    while run < n:
        yield run, True
        distance = run // 2
        while distance:
            yield distance, False
            distance //= 2
        run *= 2


def _resize(rows: Array, count: int, fill) -> Array:
    missing = count - rows.shape[0]
    if missing <= 0:
        return rows[:count]
    # Not an array of its own: JAX would move it out of loops, and so to other platforms.
    return lax.pad(rows, rows.dtype.type(fill), ((0, missing, 0), (0, 0, 0)))


def _halves(rows: Array, distance: int, mirrored: bool) -> tuple[Array, Array]:
    pairs = rows.reshape(-1, 2, distance, rows.shape[1])
    lower, upper = pairs[:, 0], pairs[:, 1]
    return lower, upper[:, ::-1] if mirrored else upper


def _join(lower: Array, upper: Array, mirrored: bool) -> Array:
    if mirrored:
        upper = upper[:, ::-1]
    return jnp.stack([lower, upper], axis=1).reshape(-1, lower.shape[-1])


def _network(keys: Float[Array, "n m"], with_permutation: bool):
    """Sorted columns, and the row each value came from (or None).

    Missing rows count as +inf at the end: no comparison moves them up, so blocks that hold
    nothing else are left out stage by stage, and no index ever points at one of them.
    """
    n = keys.shape[0]
    origin = lax.broadcasted_iota(jnp.int32, keys.shape, 0) if with_permutation else None
    for distance, mirrored in _stages(n):
        rows = -(-n // (2 * distance)) * 2 * distance
        a, b = _halves(_resize(keys, rows, jnp.inf), distance, mirrored)
        keys = _join(jnp.minimum(a, b), jnp.maximum(a, b), mirrored)
        if origin is not None:
            i, j = _halves(_resize(origin, rows, 0), distance, mirrored)
            swap = a > b
            origin = _join(jnp.where(swap, j, i), jnp.where(swap, i, j), mirrored)
        # One loop a stage: without the barrier XLA fuses stages and recomputes them 2^s times.
        keys, origin = lax.optimization_barrier((keys, origin))
    return keys[:n], origin[:n] if origin is not None else None


def _packed_network(keys: Float[Array, "n m"]):
    """`_network` with its permutation for float32, 1 to 2.5 times faster: value and row share one
    float64, exact up to 53 bits: 32 that keep the value's order, then those of the row."""
    rows = 2.0 ** (keys.shape[0] - 1).bit_length()
    with jax.enable_x64(True):
        ordered = _mirror_negative(lax.bitcast_convert_type(keys, jnp.int32))
        # + 0 of the keys, so that JAX does not move these float64 out of loops, to other platforms.
        row = lax.broadcasted_iota(jnp.int32, keys.shape, 0) + (ordered[:1, :1] & 0)
        packed = ordered.astype(jnp.float64) * rows + row.astype(jnp.float64)
        packed, _ = _network(packed, False)
        high = jnp.floor(packed * (1 / rows))
        origin = (packed - high * rows).astype(jnp.int32)
        bits = _mirror_negative(high.astype(jnp.int32))
        return lax.bitcast_convert_type(bits, jnp.float32), origin


def _mirror_negative(bits: Array) -> Array:
    """A float's bits to integers of the same order, and back."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _by_network(x: Array, with_permutation: bool):
    n, m = x.shape[-2:]
    passes = min(m, -(-n * m // MOST_VALUES_A_PASS))
    width = -(-m // passes)
    # Each matrix as `passes` of equal width, the last filled up with zeros.
    flat = jnp.pad(x.reshape(-1, n, m), ((0, 0), (0, 0), (0, -m % passes)))
    flat = jnp.swapaxes(flat.reshape(-1, n, passes, width), 1, 2).reshape(-1, n, width)
    packed = with_permutation and x.dtype == jnp.float32
    network = _packed_network if packed else partial(_network, with_permutation=with_permutation)
    together = min(VALUES_A_PASS // (n * width), len(flat))
    keys, origin = lax.map(network, flat, batch_size=together if together > 1 else None)

    def whole(parts: Array) -> Array:
        joined = jnp.swapaxes(parts.reshape(-1, passes, n, width), 1, 2)
        return joined.reshape(-1, n, passes * width)[..., :m].reshape(x.shape)

    return whole(keys), whole(origin) if with_permutation else None


def _by_integers(x: Array, with_permutation: bool):
    """Integers of the same order as the values, with the row in the lower half of an int64."""
    with jax.enable_x64(True):
        bits = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
        keys = _mirror_negative(lax.bitcast_convert_type(x, bits))
        if with_permutation:
            row = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
            keys = (keys.astype(jnp.int64) << 32) | row.astype(jnp.int64)
        width = -(-x.shape[-1] // SORTS_AT_A_TIME)
        parts = (keys[..., i : i + width] for i in range(0, x.shape[-1], width))
        keys = jnp.concatenate(
            [lax.sort(part, dimension=x.ndim - 2, is_stable=False) for part in parts], axis=-1
        )
        origin = None
        if with_permutation:
            origin, keys = keys.astype(jnp.int32), (keys >> 32).astype(jnp.int32)
        return lax.bitcast_convert_type(_mirror_negative(keys), x.dtype), origin


def _by_xla(x: Array, with_permutation: bool):
    if not with_permutation:
        return lax.sort(x, dimension=x.ndim - 2, is_stable=False), None
    origin = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)
    return tuple(lax.sort((x, origin), dimension=x.ndim - 2, is_stable=False, num_keys=1))


def _on_cpu(x: Array, with_permutation: bool):
    in_integers = x.dtype == jnp.float32 or (x.dtype == jnp.float64 and not with_permutation)
    longest = LONGEST_NETWORK if in_integers else LONGEST_NETWORK_OF_DOUBLES
    if x.shape[-2] <= longest:
        return _by_network(x, with_permutation)
    return (_by_integers if in_integers else _by_xla)(x, with_permutation)


def _sort(x: Array, with_permutation: bool):
    if x.size == 0:
        return _by_xla(x, with_permutation)
    return lax.platform_dependent(
        x,
        cpu=lambda x: _on_cpu(x, with_permutation),
        default=lambda x: _by_xla(x, with_permutation),
    )


@jax.custom_jvp
@jax.jit
def sort_with_permutation(
    x: Float[Array, "*batch n m"],
) -> tuple[Float[Array, "*batch n m"], Int[Array, "*batch n m"]]:
    """Columns of x in ascending order, and the row each value came from.

    `sorted[..., i, l] == x[..., permutation[..., i, l], l]`. Equal values keep no particular order.
    NaN gives NaN. Differentiable in both modes, as `sort_columns`.
    """
    return _sort(x, with_permutation=True)


@jax.custom_jvp
@jax.jit
def sort_columns(x: Float[Array, "*batch n m"]) -> Float[Array, "*batch n m"]:
    """Columns of x in ascending order (axis -2), differentiable in both modes.

    The derivative is the permutation that sorts; at ties it is one of the valid ones. Reverse mode
    keeps only the permutation: n m integers, whatever the length of the network.
    """
    return _sort(x, with_permutation=False)[0]


@sort_with_permutation.defjvp
def _sort_with_permutation_jvp(primals, tangents):
    values, permutation = sort_with_permutation(*primals)
    no_tangent = np.zeros(permutation.shape, jax.dtypes.float0)
    return (values, permutation), (
        take_rows(jnp.asarray(tangents[0]), permutation, unique=True),
        no_tangent,
    )


@sort_columns.defjvp
def _sort_columns_jvp(primals, tangents):
    values, permutation = sort_with_permutation(*primals)
    return values, take_rows(jnp.asarray(tangents[0]), permutation, unique=True)


def take_rows(
    values: Float[Array, "*batch n m"], origin: Int[Array, "*batch n m"], *, unique: bool = False
) -> Float[Array, "*batch n m"]:
    """`values[..., origin[..., i, l], l]` by one flat index. `unique`: no row is taken twice; the
    transpose, the scatter that brings a gradient back to the points, is then 9 times faster on CPU
    than that of `take_along_axis`."""
    flat = values.reshape(-1).at[_flat_index(origin)]
    return flat.get(mode="promise_in_bounds", unique_indices=unique).reshape(values.shape)


def put_rows(
    values: Float[Array, "*batch n m"], origin: Int[Array, "*batch n m"]
) -> Float[Array, "*batch n m"]:
    """The inverse of `take_rows` where `origin` permutes the rows of each column."""
    flat = jnp.zeros(values.size, values.dtype).at[_flat_index(origin)]
    put = flat.set(values.reshape(-1), mode="promise_in_bounds", unique_indices=True)
    return put.reshape(values.shape)


def _flat_index(origin):
    if origin.size >= 2**31:
        raise ValueError(
            f"{origin.shape} are more than 2^31 projections at a time: give a block_size"
        )
    n, m = origin.shape[-2:]
    matrix = jnp.arange(origin.size // (n * m), dtype=jnp.int32).reshape((*origin.shape[:-2], 1, 1))
    column = lax.broadcasted_iota(jnp.int32, origin.shape, origin.ndim - 1)
    return ((matrix * n + origin) * m + column).reshape(-1)
