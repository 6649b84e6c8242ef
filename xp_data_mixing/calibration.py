"""Settings of an estimator chosen from the sources only, and the best default made of it.

Self-calibration: each source is halved at random. A target of known weights is made of the second
halves, and the first halves have to recover them; then with the halves exchanged. The settings that
do so best, in total variation on average over Dirichlet weights, are taken. Neither the target nor
any truth about it is used.

`estimate_calibrated` does so for whitened random Fourier features (`xp_data_mixing.whitening`), in
memory. `calibrated_bandwidth` does so for MMD itself, from one Gram matrix of the halves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from lib.rff import features_of_projections, frequency_projections, gaussian_frequencies
from lib.rows.kernel_means import noise_of_means, streamed_median_bandwidth
from xp_data_mixing.whitening import simplex_weights, spectrum, whitened_weights

CONCENTRATION = 0.5
"""Of the Dirichlet law of the pseudo-targets' weights."""
NUM_TARGETS = 30
FACTORS = (0.35, 0.7, 1.4)
"""Bandwidths to choose from, over the median distance."""
DAMPINGS = (1e-3, 1e-2, 1e-1)


def total_variation(weights: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Half the sum of absolute differences, over the last axis."""
    return np.abs(np.asarray(weights) - np.asarray(truth)).sum(axis=-1) / 2


def host_rng(key: Key[Array, ""]) -> np.random.Generator:
    """For draws on the host: jax.random compiles anew for every size of a source."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def pseudo_weights(
    key: Key[Array, ""], num_sources: int, *, num_targets: int = NUM_TARGETS
) -> Float[np.ndarray, "T N"]:
    """Weights of pseudo-targets, Dirichlet(`CONCENTRATION`), float64."""
    return host_rng(key).dirichlet(np.full(num_sources, CONCENTRATION), num_targets)


def halves(
    key: Key[Array, ""], sizes: Sequence[int]
) -> list[tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"]]]:
    """Rows 0, ..., n - 1 of sources of sizes n, each in two parts at random; the first is the
    larger by one if n is odd."""
    rng = host_rng(key)
    orders = [rng.permutation(size) for size in sizes]
    return [(order[: -(-len(order) // 2)], order[-(-len(order) // 2) :]) for order in orders]


# MMD


def calibrated_bandwidth(
    gram: Float[np.ndarray, "S K K"],
    sizes: Sequence[int],
    weights: Float[np.ndarray, "T N"],
) -> tuple[int, Float[np.ndarray, " S"]]:
    """(Which of S bandwidths recovers pseudo-targets best, mean total variation of each.)

    `gram` holds the means of the kernel between K = 2 N halves (`lib.rows.kernel_means`): the N
    first ones, then the N second ones in the same order; `sizes` [K] are their rows. The
    diagonal's bias is taken off the side that recovers, for a kernel with k(x, x) = 1.
    """
    num_sources = len(sizes) // 2
    first, second = slice(0, num_sources), slice(num_sources, None)
    sizes, errors = np.asarray(sizes), []
    for of_bandwidth in gram:
        tv = []
        for fit, held in ((first, second), (second, first)):
            a = of_bandwidth[fit, fit]
            a = a - np.diag(noise_of_means(a, sizes[fit]))
            b, q = of_bandwidth[fit, held], of_bandwidth[held, held]
            for w in weights:
                recovered = simplex_weights(a, b @ w, w @ q @ w)
                tv.append(total_variation(recovered, w))
        errors.append(np.mean(tv))
    return int(np.argmin(errors)), np.array(errors)


# Whitened features


class CalibratedResult(NamedTuple):
    """What `estimate_calibrated` returns.

    weights [N]; replicates [R, N] of the bootstrap and intervals [N, 2], None without; the
    bandwidth and damping chosen, and the pseudo-targets' mean total variation of every pair
    [factors, dampings], None where both were given.
    """

    weights: Float[np.ndarray, " N"]
    replicates: Float[np.ndarray, "R N"]
    intervals: Float[np.ndarray, "N 2"] | None
    bandwidth: float
    damping: float
    errors: Float[np.ndarray, "B L"] | None


def estimate_calibrated(
    key: Key[Array, ""],
    sources: Sequence[Any],
    target: Any,
    *,
    bandwidth: float | None = None,
    damping: float | None = None,
    num_features: int = 300,
    bootstrap: int = 0,
    confidence: float = 0.9,
) -> CalibratedResult:
    """Weights of the sources in the target, by whitened Fourier features of calibrated settings.

    Sets and target are arrays [n, d], the features of all of them in memory: 2 num_features each
    row, and matrices of (2 num_features)^2. With `bandwidth` and `damping` both given nothing is
    calibrated. Intervals are percentiles over `bootstrap` draws of the rows of sources and target.

    Raises ValueError where only one of bandwidth and damping is given, and where a source has fewer
    than four rows (two without calibration).
    """
    if (bandwidth is None) != (damping is None):
        raise ValueError(f"give both bandwidth and damping or neither: {bandwidth}, {damping}")
    sources, target = [np.asarray(rows) for rows in sources], np.asarray(target)
    sizes, errors = [len(rows) for rows in sources], None
    if min(sizes) < (4 if bandwidth is None else 2) or not len(target):
        raise ValueError(f"too few rows: {sizes} in the sources, {len(target)} in the target")
    frequency_key, median_key, calibration_key, bootstrap_key = jax.random.split(key, 4)
    dimension = target.shape[1]
    frequencies = gaussian_frequencies(frequency_key, num_features, dimension)
    # All bandwidths share the projections, and one program serves sources of any sizes.
    projections = _project(np.concatenate([*sources, target]), frequencies)
    ends = np.cumsum(sizes)

    def features(bandwidth):
        return np.split(np.asarray(_features(projections, bandwidth)), ends)

    if bandwidth is None or damping is None:
        median = streamed_median_bandwidth(median_key, sources)
        bandwidths = [factor * median for factor in FACTORS]
        all_features = (features(sigma)[:-1] for sigma in bandwidths)
        errors = _whitened_errors(calibration_key, all_features, sizes)
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        bandwidth, damping = bandwidths[i], DAMPINGS[j]
    rows = features(bandwidth)
    whitened = spectrum(rows[:-1])
    target_mean = rows[-1].mean(axis=0, dtype=np.float64) @ whitened.basis
    weights = whitened_weights(whitened, target_mean, damping)
    replicates, intervals = np.zeros((0, len(sources))), None
    if bootstrap:
        rng = host_rng(bootstrap_key)
        drawn = [_resampled_means(rng, sample, bootstrap) @ whitened.basis for sample in rows]
        replicates = np.stack(
            [
                whitened_weights(whitened, means[-1], damping, replicate=means[:-1])
                for means in np.stack(drawn, axis=1)
            ]
        )
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        low, high = np.quantile(replicates, tails, axis=0)
        intervals = np.stack([np.minimum(low, weights), np.maximum(high, weights)], axis=1)
    return CalibratedResult(
        weights, replicates, intervals, float(bandwidth), float(damping), errors
    )


_project, _features = jax.jit(frequency_projections), jax.jit(features_of_projections)


def _resampled_means(rng, rows, replicates):
    """Means of as many rows drawn with replacement, [R, F] float64."""
    counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=replicates)
    return (counts.astype(rows.dtype) @ rows).astype(np.float64) / len(rows)


def _whitened_errors(key, all_features, sizes):
    """Mean total variation of the pseudo-targets, [bandwidths, DAMPINGS]; `all_features` has the
    sources' features for each bandwidth."""
    halves_key, weights_key = jax.random.split(key)
    parts = halves(halves_key, sizes)
    weights, errors = pseudo_weights(weights_key, len(sizes)), []
    for sources in all_features:
        first, second = (
            [rows[chosen] for rows, chosen in zip(sources, side)] for side in zip(*parts)
        )
        tv = np.zeros(len(DAMPINGS))
        for fit, held in ((first, second), (second, first)):
            known = spectrum(fit)
            means = np.stack([rows.mean(axis=0, dtype=np.float64) for rows in held]) @ known.basis
            for j, damping in enumerate(DAMPINGS):
                recovered = np.stack([whitened_weights(known, w @ means, damping) for w in weights])
                tv[j] += total_variation(recovered, weights).mean() / 2
        errors.append(tv)
    return np.stack(errors)
