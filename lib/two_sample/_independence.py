"""Are x and y independent? The Hilbert-Schmidt independence criterion, permuted."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from lib.kernels import Kernel
from lib.numerics import as_sample, map_leading, named_key, product
from lib.two_sample._permutations import (
    PermutationTest,
    aggregated_test,
    centered,
    families_of,
    permutations,
)


def independence_test(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m e"],
    x_kernels: Sequence[Kernel] | None = None,
    y_kernels: Sequence[Kernel] | None = None,
    *,
    num_permutations: int = 999,
) -> PermutationTest:
    """Permutation test that x_i and y_i, drawn in pairs, are independent.

    HSIC = sum_ij (H K H)_ij L_ij / n^2, with the Gram matrices K of x and L of y and H = I - 1/n:
    the squared MMD between the pairs and all combinations (Gretton, Fukumizu, Teo, Song, Schoelkopf
    and Smola, A kernel statistical test of independence, NIPS 2007). The rows of y are permuted.
    `statistics` [x_kernels, y_kernels]; aggregation, ties and exactness as in `two_sample_test`,
    and by default its kernels. O(n^2) memory for each kernel, O(B n^2) operations for each pair.
    Raises ValueError unless x and y have equally many rows, two or more, and without kernels.
    """
    x, y = as_sample("x", x)[0], as_sample("y", y)[0]
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"x and y must have equally many rows, two or more; got shapes {x.shape} and {y.shape}"
        )
    order = jax.random.permutation(named_key(key, "order of the rows"), len(x))
    grams = []
    for name, points, kernels in (("x", x, x_kernels), ("y", y, y_kernels)):
        own_key, rows = named_key(key, f"bandwidths of {name}"), points[order]
        of_families = [
            map_leading(lambda h, family=family, rows=rows: family(h)(rows, rows), grid)
            for family, grid in families_of(kernels, own_key, points, name=f"{name}_kernels")
        ]
        grams.append(jnp.concatenate(of_families))
    drawn = permutations(key, num_permutations, len(x))
    drawn = jnp.concatenate([jnp.arange(len(x))[None], drawn])
    middle, others = jax.vmap(centered)(grams[0]), grams[1]

    def hsic(order):
        permuted = others[:, order][:, :, order].reshape(len(others), -1)
        return product(middle.reshape(len(middle), -1), permuted.T) / len(x) ** 2

    values = jnp.moveaxis(lax.map(hsic, drawn), 0, 2)
    largest = [jnp.max(jnp.abs(gram), axis=(1, 2)) for gram in grams]
    tolerances = 8 * jnp.finfo(values.dtype).eps * largest[0][:, None] * largest[1][None, :]
    return aggregated_test(values, tolerances)
