"""Recovery of known mixtures by every estimator; and MMD over bandwidths, features and sizes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from lib.rff import gaussian_frequencies, uniform_phases
from lib.rows.fourier_means import stream_mean_embeddings
from lib.rows.kernel_means import (
    exact_gram_of_means,
    noise_of_means,
    streamed_median_bandwidth,
)
from lib.simplex_qp import from_means, make_problem, solve
from xp_data_mixing import problems
from xp_data_mixing.calibration import (
    CalibratedResult,
    calibrated_bandwidth,
    estimate_calibrated,
    halves,
    pseudo_weights,
    total_variation,
)
from xp_data_mixing.config import SIGMAS, AblationConfig, RecoveryConfig
from xp_data_mixing.mixing import estimate
from xp_data_mixing.whitening import simplex_weights

UNIFORM, LINEAR = "uniform", "linear mean matching"
CALIBRATED_MMD, CALIBRATED = "MMD, calibrated σ", "whitened, calibrated"
PACKAGE = "estimate(), its defaults"


def exact_grams(groups: Sequence[ArrayLike], bandwidths: Sequence[float]) -> np.ndarray:
    """Means of the Gaussian kernel between every two groups of rows, [S, G, G] float64."""
    found = exact_gram_of_means(groups[:-1], groups[-1], bandwidths)
    cross = found.b[:, :, None]
    low = np.concatenate([np.swapaxes(cross, 1, 2), found.q[:, None, None]], axis=2)
    return np.concatenate([np.concatenate([found.a, cross], axis=2), low], axis=1)


def merged(
    grams: Float[np.ndarray, "S K K"], sizes: Sequence[int], groups: Sequence[Sequence[int]]
) -> Float[np.ndarray, "S G G"]:
    """The same between unions of groups: `groups` [G] names the members of each union."""
    sizes, shares = np.asarray(sizes, float), np.zeros((len(groups), len(sizes)))
    for share, members in zip(shares, groups):
        share[list(members)] = sizes[list(members)] / sizes[list(members)].sum()
    return shares @ grams @ shares.T


def mmd_weights(
    gram: Float[np.ndarray, "G G"], sizes: Sequence[int] | None = None
) -> Float[np.ndarray, " N"]:
    """Weights of N = G - 1 sets from the means of the kernel between them and, last, the target; a
    U-statistic where `sizes` [N] of the sets are given, for k(x, x) = 1."""
    a = gram[:-1, :-1]
    if sizes is not None:
        a = a - np.diag(noise_of_means(a, sizes))
    return simplex_weights(a, gram[:-1, -1], gram[-1, -1])


def feature_means(key, groups, num_features, bandwidths, *, phases: bool) -> np.ndarray:
    """Mean random Fourier features, [S, G, F]: as in the published code with phases, else pairs."""
    frequency_key, phase_key = jax.random.split(key)
    frequencies = gaussian_frequencies(frequency_key, num_features, groups[0].shape[1])
    shift = uniform_phases(phase_key, num_features) if phases else None
    found = [
        stream_mean_embeddings([rows], frequencies, bandwidths, phases=shift) for rows in groups
    ]
    return np.stack([one.means for one in found], axis=1)


def recover(config: RecoveryConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """Weights [E, T, N] by every estimator (names [E]) of the same sets in T targets, their truth
    [T, N], total variation tv [E, T], and what calibration chose: sigma (as `SIGMAS`) for MMD,
    factor (over the median distance) and damping [T] for the whitened features."""
    source = problems.load(config.samples, data_root)
    keys = jax.random.split(jax.random.key(seed), 6)
    draw_key, median_key, halves_key, pseudo_key, feature_key, estimate_key = keys
    drawn = problems.draw(draw_key, source, config.num_targets)
    sets, targets, num_sets = drawn.sets, drawn.targets, len(drawn.sets)
    sizes = [len(rows) for rows in sets]
    median = streamed_median_bandwidth(median_key, sets)
    bandwidths = [sigma * median / np.sqrt(2) for sigma in SIGMAS]
    weights: dict[str, list[np.ndarray]] = {}

    def add(name, found):
        weights.setdefault(name, []).append(found)

    # One pass over the kernel serves all bandwidths and targets, and calibration by halves.
    sides = zip(*halves(halves_key, sizes))
    groups = [*(rows[chosen] for side in sides for rows, chosen in zip(sets, side)), *targets]
    group_sizes = [len(rows) for rows in groups]
    grams = exact_grams(groups, bandwidths)
    pseudo = pseudo_weights(pseudo_key, num_sets)
    half_grams = grams[:, : 2 * num_sets, : 2 * num_sets]
    chosen, _ = calibrated_bandwidth(half_grams, group_sizes[: 2 * num_sets], pseudo)
    linear = np.stack([rows.mean(axis=0, dtype=np.float64) for rows in groups[: 2 * num_sets]])
    linear = (linear * np.array(group_sizes[: 2 * num_sets])[:, None]).reshape(2, num_sets, -1)
    linear = linear.sum(axis=0) / np.array(sizes)[:, None]
    features = {
        count: feature_means(
            jax.random.fold_in(feature_key, count),
            [*sets, *targets],
            count,
            bandwidths,
            phases=True,
        )
        for count in config.num_features
    }
    factors, dampings = [], []
    best: CalibratedResult | None = None
    for t, target in enumerate(targets):
        members = [*((i, num_sets + i) for i in range(num_sets)), (2 * num_sets + t,)]
        both = merged(grams, group_sizes, members)
        for s, sigma in enumerate(SIGMAS):
            add(f"exact V, σ = {sigma:g}", mmd_weights(both[s]))
            add(f"exact U, σ = {sigma:g}", mmd_weights(both[s], sizes))
            for count, means in features.items():
                problem = from_means(means[s, :num_sets], means[s, num_sets + t])
                add(f"RFF D = {count}, σ = {sigma:g}", solve(make_problem(problem)).weights)
        mean = from_means(linear, target.mean(axis=0, dtype=np.float64))
        add(UNIFORM, np.full(num_sets, 1 / num_sets))
        add(LINEAR, solve(make_problem(mean)).weights)
        add(PACKAGE, estimate(estimate_key, sets, target, check_features=0).weights)
        add(CALIBRATED_MMD, mmd_weights(both[chosen], sizes))
        settings: dict[str, Any] = {}
        if best is not None:  # the sets are the same: so is what they choose
            settings = {"bandwidth": best.bandwidth, "damping": best.damping}
        best = estimate_calibrated(estimate_key, sets, target, **settings)
        add(CALIBRATED, best.weights)
        factors.append(best.bandwidth / median)
        dampings.append(best.damping)
    found = np.stack([np.stack(one) for one in weights.values()])
    return {
        "names": np.array(list(weights)),
        "weights": found,
        "truth": drawn.truth,
        "tv": total_variation(found, drawn.truth[None]),
        "sigma": np.array(SIGMAS[chosen]),
        "factor": np.array(factors),
        "damping": np.array(dampings),
    }


def ablate(config: AblationConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """Total variation tv [n, D, S, T] of MMD (U-statistic) for sets of n rows, D random Fourier
    features (pairs; the last is the kernel itself), bandwidths `SIGMAS`, and T targets."""
    source = problems.load(config.samples, data_root)
    draw_key, median_key, feature_key = jax.random.split(jax.random.key(seed), 3)
    drawn = problems.draw(draw_key, source, config.num_targets)
    num_sets, edges = len(drawn.sets), (0, *config.sizes)
    median = streamed_median_bandwidth(median_key, drawn.sets)
    bandwidths = [sigma * median / np.sqrt(2) for sigma in SIGMAS]
    # Parts between the sizes: the smaller sets are the beginnings of the larger ones.
    parts = [rows[a:b] for a, b in pairwise(edges) for rows in drawn.sets]
    groups = [*parts, *drawn.targets]
    group_sizes = [len(rows) for rows in groups]
    all_grams = []
    for count in config.num_features:
        key = jax.random.fold_in(feature_key, count)
        means = feature_means(key, groups, count, bandwidths, phases=False)
        all_grams.append(means @ np.swapaxes(means, 1, 2))
    all_grams.append(exact_grams(groups, bandwidths))
    tv = np.zeros((len(config.sizes), len(all_grams), len(SIGMAS), config.num_targets))
    for n, size in enumerate(config.sizes):
        sets = [[k * num_sets + i for k in range(n + 1)] for i in range(num_sets)]
        for d, grams in enumerate(all_grams):
            for t in range(config.num_targets):
                both = merged(grams, group_sizes, [*sets, [len(parts) + t]])
                for s in range(len(SIGMAS)):
                    found = mmd_weights(both[s], [size] * num_sets)
                    tv[n, d, s, t] = total_variation(found, drawn.truth[t])
    return {"tv": tv, "truth": drawn.truth}
