"""Do samples differ? Exact permutation tests by MMD and DrMMD, under several kernels at once.

With phi a kernel's feature map, z_1, ..., z_N the pooled points and s = 1/n on x and -1/m on y,
f = sum_i s_i phi(z_i) is the difference of the mean embeddings. S is the covariance of phi over the
pooled points, which does not know whose they are. The statistic is

    T(lambda) = (1 + lambda) <f, g(S) f>,    g(rho) = 1 / (rho + lambda) (Tikhonov),

which is MMD^2 for lambda = inf. A small lambda gives weight to directions in which the pooled
points vary little, to which a kernel's mean by itself is blind (Hagrass, Sriperumbudur and Li,
Spectral regularized kernel two-sample tests, Annals of Statistics 52(3), 2024). With the
eigenvectors v_i of S and its eigenvalues rho_i, T = (1 + lambda) sum_i g(rho_i) <f, v_i>^2: one
eigendecomposition serves every lambda and every relabelling.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from lib.drmmd import SpectralFilter, tikhonov
from lib.drmmd.nystrom import landmark_basis, nystrom_features
from lib.kernels import (
    Kernel,
    gaussian,
    kernel_mean_and_largest,
    laplace,
    quantile_bandwidths,
)
from lib.mmd import _as_samples
from lib.numerics import as_sample, map_leading, named_key, product, to_blocks

LMBDAS = (math.inf, 0.01, 0.001)
"""MMD, and DrMMD with two regularizations; kernels are taken to be of the order of 1."""
MMD = (math.inf,)
MAX_EXACT = 1024
"""Pooled points up to which Gram matrices are taken whole by default."""
RANK = 300
MAX_BINS = 2000
MIN_BINS = 20  # of the smallest sample


class PermutationTest(NamedTuple):
    """What a test finds for each kernel and lambda, and for all of them together."""

    statistics: Float[Array, "kernels lmbdas"]
    p_values: Float[Array, "kernels lmbdas"]  # not corrected for their number
    p_value: Float[Array, ""]  # aggregated, exact


def permutations(
    key: Key[Array, ""], num_permutations: int, size: int
) -> Int[Array, "num_permutations size"]:
    """Independent uniform permutations of 0, ..., size - 1."""
    keys = jax.random.split(key, num_permutations)
    return jax.vmap(lambda key: jax.random.permutation(key, size))(keys)


def default_kernels(key: Key[Array, ""], pooled: Float[Array, "n d"]) -> list[Kernel]:
    """Gaussian kernels, and Laplace kernels of the sum of absolute differences, of five bandwidths
    each: `quantile_bandwidths` of the pooled points."""
    return [kernel(h) for kernel, grid in default_families(key, pooled) for h in grid]


def default_families(key, pooled) -> list[tuple[Callable[[Any], Kernel], Array]]:
    """The same as (a function of the bandwidth, bandwidths), of which one program is compiled."""
    laplaces = quantile_bandwidths(key, pooled, distance="l1")
    return [
        (gaussian, quantile_bandwidths(key, pooled)),
        (partial(laplace, distance="l1"), laplaces),
    ]


def families_of(
    kernels: Sequence[Kernel] | None, key, points, *, name: str = "kernels"
) -> list[tuple[Callable[[Any], Kernel], Array]]:
    """The default ones, or the given kernels as families of one. Raises ValueError for none."""

    def family(kernel):
        return lambda _: kernel

    if kernels is None:
        return default_families(key, points)
    if not len(kernels):
        raise ValueError(f"{name} is empty")
    return [(family(kernel), jnp.zeros(1)) for kernel in kernels]


def two_sample_test(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    kernels: Sequence[Kernel] | None = None,
    *,
    lmbdas: Sequence[float] = LMBDAS,
    spectral_filter: SpectralFilter = tikhonov,
    num_permutations: int = 999,
    rank: int | None = None,
    relabellings: Int[Array, "b n_plus_m"] | None = None,
    block_size: int = 1024,
) -> PermutationTest:
    """Permutation test of P = Q by MMD (lambda = inf) and DrMMD under several kernels at once.

    For each kernel and lambda, p = (1 + #{b : T_b >= T}) / (1 + B), where T_b is T after the pooled
    points have been relabelled by the b-th of B permutations. Over kernels and lambdas, the
    smallest p is compared with the smallest p that each relabelling would itself have got among the
    same B + 1 (the minP procedure of Westfall and Young 1993; aggregation over bandwidths as in
    MMDAgg, Schrab et al., JMLR 2023); among equal ones the larger mean of 1 / p counts as smaller,
    since of many statistics the smallest p is often 1 / (1 + B). All p-values are exact:
    P(p <= alpha) <= alpha for each n and m if the pooled points are exchangeable and the kernels do
    not depend on which point is whose; `default_kernels`, taken where none are given, do not.

    With `rank`, and by default for more than `MAX_EXACT` pooled points unless all lambdas are inf,
    each kernel is replaced by its Nystrom features at so many pooled points (`RANK` by default):
    O((n + m) rank^2) operations and O((n + m) d + rank^2) memory instead of (n + m)^3 and
    (n + m)^2. Labels then move in bins of equally many points of one sample, drawn at random, about
    `MAX_BINS` of them (Domingo-Enrich, Dwivedi and Mackey, Cheap permutation testing, 2025): so
    permutations cost no pass over the points, and the level stays exact.

    Statistics that are equal up to rounding count as equal: T_b >= T stands for T_b >= T - 2 eps
    max|k| (n + m)^2 / (n m) (1 + lambda) / lambda; what equal statistics of float32 and float64
    were seen to differ by is a fifth of it. Use float64 where lambda is small. Rows are summed in
    an order drawn from `key`, the same for T and every T_b: so larger rounding, if there is any,
    cannot tell the samples' own labels from the drawn ones, and the p-values stay exact.

    Where all lambdas are inf and `rank` is None, memory is O((n + m) B + block_size^2 + block_size
    B), and a loop is compiled for each kernel, so jit what calls this more than once.

    Kernels must be symmetric, and positive definite (on weights of sum 0) where a lambda is finite.
    `relabellings` are the rows of `permutations`, drawn from `key` unless given. A kernel whose
    values on the samples are not finite has no p-value: its own and the aggregated one are NaN.
    p-values that the dtype does not hold are rounded down: p <= .05 is true of 5 / 100. Raises as
    `mmd_squared` does, without kernels or lambdas, and for a lambda that is not positive.
    """
    x, y, *_ = _as_samples(x, y)
    contrasts = np.array([[1 / len(x)], [-1 / len(y)]])
    return _permutation_test(
        key, (x, y), contrasts, kernels, lmbdas, spectral_filter, num_permutations, rank,
        relabellings, block_size,
    )  # fmt: skip


def k_sample_test(
    key: Key[Array, ""],
    samples: Sequence[Float[Array, "_ d"]],
    kernels: Sequence[Kernel] | None = None,
    *,
    lmbdas: Sequence[float] = LMBDAS,
    spectral_filter: SpectralFilter = tikhonov,
    num_permutations: int = 999,
    rank: int | None = None,
    block_size: int = 1024,
) -> PermutationTest:
    """Permutation test of P_1 = ... = P_k, exact as `two_sample_test`, whose options it shares.

    T(lambda) = (1 + lambda) sum_a n_a / N <f_a, g(S) f_a>, where f_a is the mean embedding of
    sample a less that of all: the variance between samples of a kernel's analysis of variance. Of
    two samples it is n m / N^2 times the statistic of `two_sample_test`. Raises as that, and for
    fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"samples must be two or more, got {len(samples)}")
    samples = [as_sample(f"samples[{a}]", sample)[0] for a, sample in enumerate(samples)]
    if len({sample.shape[1] for sample in samples}) > 1:
        raise ValueError(
            f"samples must have one dimension, got shapes {[s.shape for s in samples]}"
        )
    sizes = np.array(list(map(len, samples)))
    shares = sizes / sizes.sum()
    contrasts = np.sqrt(shares) * (np.diag(1 / sizes) - 1 / sizes.sum())
    return _permutation_test(
        key, samples, contrasts, kernels, lmbdas, spectral_filter, num_permutations, rank, None,
        block_size,
    )  # fmt: skip


def _permutation_test(
    key, samples, contrasts, kernels, lmbdas, spectral_filter, num_permutations, rank, relabellings,
    block_size,
):  # fmt: skip
    """T = (1 + lambda) sum_g <f_g, g(S) f_g> with f_g = sum_i contrasts[sample of i, g] phi(z_i),
    and the same after relabelling."""
    pooled = jnp.concatenate(samples)
    sizes, size = [len(sample) for sample in samples], len(pooled)
    families = families_of(kernels, named_key(key, "bandwidths"), pooled)
    if not len(lmbdas):
        raise ValueError("lmbdas is empty")
    if not all(lmbda > 0 for lmbda in lmbdas):
        raise ValueError(f"lmbdas must be positive, got {tuple(lmbdas)}")
    mmd_only = all(map(math.isinf, lmbdas))
    if rank is None and size > MAX_EXACT and not mmd_only:
        rank = RANK

    per_bin = max(1, min(-(-size // MAX_BINS), min(sizes) // MIN_BINS)) if rank else 1
    label_of_bin = np.repeat(np.arange(len(sizes)), [n // per_bin for n in sizes])
    if relabellings is None:
        relabellings = permutations(key, num_permutations, len(label_of_bin))
    labels = jnp.concatenate([label_of_bin[None], jnp.asarray(label_of_bin)[relabellings]])
    # [bins, B + 1, contrasts] as columns.
    columns = jnp.asarray(contrasts, pooled.dtype)[labels.T].reshape(len(label_of_bin), -1)
    order = jax.random.permutation(named_key(key, "order of the rows"), size)

    if rank:
        owners = _bins(named_key(key, "bins"), sizes, per_bin)
        own = jnp.asarray(np.repeat(contrasts, sizes, axis=0), pooled.dtype)
        fixed = jnp.where(owners[:, None] < len(columns), 0, own)
        rows = {"pooled": pooled[order], "owners": owners[order], "fixed": fixed[order]}
        options = {"columns": columns, "rank": rank, "block_size": block_size}
        spectrum: Callable = partial(_feature_spectrum, **rows, **options)
    else:
        spectrum = partial(_exact_spectrum, pooled=pooled[order], columns=columns[order])

    norm = float(np.sum(sizes @ contrasts**2)) * size  # N |s|^2
    factors = np.array([1 if math.isinf(lmbda) else (1 + lmbda) / lmbda for lmbda in lmbdas])

    def of_kernel(kernel):
        """Statistics [lambdas, 1 + B], and what they may differ by in rounding [lambdas]."""
        if mmd_only and not rank:
            values, largest = kernel_mean_and_largest(
                kernel, pooled[order], columns[order], block_size=block_size
            )
            values = jnp.tile(values, (len(lmbdas), 1))
        else:
            eigenvalues, squares, largest = spectrum(kernel)
            values = jnp.stack(
                [_filtered(spectral_filter, eigenvalues, squares, lmbda) for lmbda in lmbdas]
            )
        values = values.reshape(len(lmbdas), len(labels), -1).sum(axis=2)
        rounding = 2 * norm * jnp.finfo(values.dtype).eps * largest
        return values, rounding * factors.astype(values.dtype)

    by_family = [
        map_leading(lambda h, family=family: of_kernel(family(h)), grid)
        for family, grid in families
    ]
    return aggregated_test(*map(jnp.concatenate, zip(*by_family)))


def aggregated_test(
    statistics: Float[Array, "kernels lmbdas num"], tolerances: Float[Array, "kernels lmbdas"]
) -> PermutationTest:
    """The test of several statistics, each of the observed and then of relabelled samples, by minP
    as in `two_sample_test`. Those that differ by no more than their tolerance count as equal."""
    num = statistics.shape[2]
    flat = statistics.reshape(-1, num)
    p_values = jax.vmap(_permutation_p_values)(flat, tolerances.ravel())
    aggregated = _permutation_p_values(-_smallest(p_values), 0)
    shape = tolerances.shape
    return PermutationTest(statistics[:, :, 0], p_values[:, 0].reshape(shape), aggregated[0])


def centered(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """H K H with H = I - 1/n, symmetric to the last bit."""
    rows = jnp.mean(gram, axis=0)
    both = gram - rows[None, :] - rows[:, None] + jnp.mean(rows)
    return (both + both.T) / 2


def _bins(key, sizes, per_bin):
    """The bin of each pooled point; past the last for the points that fill none."""
    counts = [n // per_bin for n in sizes]
    owners, first = [], 0
    for n, count, own_key in zip(sizes, counts, jax.random.split(key, len(sizes))):
        own = np.arange(n) // per_bin
        own = np.where(own < count, first + own, sum(counts))
        owners.append(jax.random.permutation(own_key, own) if per_bin > 1 else own)
        first += count
    return jnp.concatenate(owners)


def _exact_spectrum(kernel, *, pooled, columns):
    """(eigenvalues of S [N], <f, v_i>^2 [N, columns], max |k|) from the centered Gram matrix: with
    K = U diag(w) U', rho = w / N and <f, v> = sqrt(w) U's."""
    gram = kernel(pooled, pooled)
    values, vectors = jnp.linalg.eigh(centered(gram))
    values = jnp.maximum(values, 0)
    squares = values[:, None] * jnp.square(product(vectors.T, columns))
    return values / len(pooled), squares, jnp.max(jnp.abs(gram))


def _feature_spectrum(kernel, *, pooled, owners, fixed, columns, rank, block_size):
    """The same in Nystrom features at the first `rank` points, in one pass over blocks of rows:
    points `owners[i]` move together, and those past the last bin stay with the weights `fixed`."""
    basis = landmark_basis(kernel, pooled[:rank])
    size, dtype = basis.inverse_root.shape[1], basis.inverse_root.dtype

    def add(total, block):
        (points, weights), (owners, _) = block
        phi = nystrom_features(kernel, basis, points, block_size=block_size)
        phi = jnp.where(weights[:, :1] > 0, phi, 0)  # not the rows that fill the last block
        mean, second, bins, rest = total
        bins = bins.at[owners[:, 0]].add(phi, mode="drop")
        rest += product(phi.T, weights[:, 1:])
        return (mean + jnp.sum(phi, axis=0), second + product(phi.T, phi), bins, rest), None

    shapes = (size,), (size, size), (len(columns), size), (size, fixed.shape[1])
    ones = jnp.ones((len(pooled), 1), dtype)
    blocks = (
        to_blocks(pooled, jnp.concatenate([ones, fixed], axis=1), block_size),
        to_blocks(owners[:, None], ones, block_size),
    )
    start = tuple(jnp.zeros(shape, dtype) for shape in shapes)
    mean, second, bins, rest = lax.scan(add, start, blocks)[0]
    mean, second = mean / len(pooled), second / len(pooled)
    values, vectors = jnp.linalg.eigh(second - mean[:, None] * mean[None, :])
    f = product(bins.T, columns) + jnp.tile(rest, (1, columns.shape[1] // rest.shape[1]))
    largest = jnp.max(jnp.abs(kernel(basis.landmarks, basis.landmarks)))
    return jnp.maximum(values, 0), jnp.square(product(vectors.T, f)), largest


def _filtered(spectral_filter, eigenvalues, squares, lmbda):
    """(1 + lambda) sum_i g(rho_i) <f, v_i>^2, for each column."""
    if math.isinf(lmbda):
        return jnp.sum(squares, axis=0)
    return (1 + lmbda) * product(spectral_filter(eigenvalues, lmbda).inverse, squares)


def _smallest(p_values):
    """The smallest p of each column in units of 1 / (B + 1), less than 1 for the mean of 1 / p."""
    num = p_values.shape[1]
    return jnp.round(p_values.min(axis=0) * num) - jnp.mean(1 / p_values, axis=0) / (2 * num)


def _permutation_p_values(statistics, tolerance):
    """For each entry, the share of entries that are at least as large, itself included; NaN where
    any entry is not finite."""
    smaller = jnp.searchsorted(jnp.sort(statistics), statistics - tolerance)
    exact = np.arange(len(statistics) + 1) / len(statistics)
    # Looked up, since XLA divides by multiplying with a rounded inverse, and rounded down, so that
    # 2 / 40 <= .05 holds in every dtype.
    shares = exact.astype(statistics.dtype)
    shares = np.where(shares > exact, np.nextafter(shares, -np.inf, dtype=shares.dtype), shares)
    p_values = jnp.asarray(shares)[len(statistics) - smaller]
    return jnp.where(jnp.isfinite(statistics).all(), p_values, jnp.nan)
