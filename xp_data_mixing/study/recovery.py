"""Recovery of known mixtures by every estimator; and MMD over bandwidths, features and sizes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key
from scipy.special import softmax

from lib.rff import gaussian_frequencies, uniform_phases
from lib.rows import as_rows
from lib.rows.fourier_means import stream_mean_embeddings
from lib.rows.kernel_means import (
    exact_gram_of_means,
    noise_of_means,
    streamed_median_bandwidth,
)
from lib.simplex_qp import from_means, make_problem, solve
from xp_data_mixing.block_moments import origin
from xp_data_mixing.calibration import (
    Choice,
    calibrated_bandwidth,
    fourier,
    halves,
    pseudo_weights,
    total_variation,
)
from xp_data_mixing.features import Posteriors, draw_sample, fitted_features
from xp_data_mixing.likelihood import likelihood_weights
from xp_data_mixing.mixing import Estimator, Kernel, estimate
from xp_data_mixing.posteriors import logits as classifier_logits
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import SIGMAS, AblationConfig, RecoveryConfig
from xp_data_mixing.whitening import simplex_weights

UNIFORM, LINEAR = "uniform", "linear mean matching"
CALIBRATED_MMD, WHITENED, EMQ, AUTO = "MMD, calibrated σ", "whitened", "EMQ", "auto"
PACKAGE = "estimate(), its defaults"
ESTIMATORS: dict[str, Estimator] = {WHITENED: "whitened", AUTO: "auto"}


def exact_grams(groups: Sequence[ArrayLike], bandwidths: Sequence[float]) -> np.ndarray:
    """Means of the Gaussian kernel between every two groups of rows, [S, G, G] float64."""
    means = exact_gram_of_means(groups[:-1], groups[-1], bandwidths)
    cross, square = means.b[:, :, None], means.q[:, None, None]
    return np.block([[means.a, cross], [np.swapaxes(cross, 1, 2), square]])


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
    """Weights of N = G - 1 sources from the means of the kernel between them and, last, the target;
    a U-statistic where `sizes` [N] of the sources are given, for k(x, x) = 1."""
    a = gram[:-1, :-1]
    if sizes is not None:
        a = a - np.diag(noise_of_means(a, sizes))
    return simplex_weights(a, gram[:-1, -1], gram[-1, -1])


def feature_means(key, groups, num_features, bandwidths, *, phases: bool) -> np.ndarray:
    """Mean random Fourier features, [S, G, F]: as in the published code with phases, else pairs."""
    frequency_key, phase_key = jax.random.split(key)
    frequencies = gaussian_frequencies(frequency_key, num_features, groups[0].shape[1])
    shift = uniform_phases(phase_key, num_features) if phases else None
    embeddings = [
        stream_mean_embeddings(rows, frequencies, bandwidths, phases=shift) for rows in groups
    ]
    return np.stack([embedding.means for embedding in embeddings], axis=1)


def recover(config: RecoveryConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """Weights [E, T, N] by every estimator (names [E]) of the same sources in T targets, their
    truth [T, N], total variation tv [E, T], and what calibration chose: sigma (as `SIGMAS`) for
    MMD, and the features of `ESTIMATORS` in words, choices [2]."""
    splits = problems.load(config.samples, data_root)
    keys = jax.random.split(jax.random.key(seed), 6)
    draw_key, median_key, halves_key, pseudo_key, feature_key, estimate_key = keys
    drawn = problems.draw(draw_key, splits, config.num_targets)
    sources, targets, num_sources = drawn.sources, drawn.targets, len(drawn.sources)
    sizes = [len(rows) for rows in sources]
    median = streamed_median_bandwidth(median_key, sources)
    bandwidths = [sigma * median / np.sqrt(2) for sigma in SIGMAS]
    weights: dict[str, list[np.ndarray]] = {}

    def add(name, of_target):
        weights.setdefault(name, []).append(of_target)

    # One pass over the kernel serves all bandwidths and targets, and calibration by halves.
    sides = zip(*halves(halves_key, sizes))
    groups = [*(rows[chosen] for side in sides for rows, chosen in zip(sources, side)), *targets]
    group_sizes = [len(rows) for rows in groups]
    grams = exact_grams(groups, bandwidths)
    pseudo = pseudo_weights(pseudo_key, num_sources)
    half_grams = grams[:, : 2 * num_sources, : 2 * num_sources]
    chosen, _ = calibrated_bandwidth(half_grams, group_sizes[: 2 * num_sources], pseudo)
    linear = np.stack([rows.mean(axis=0, dtype=np.float64) for rows in groups[: 2 * num_sources]])
    linear = (linear * np.array(group_sizes[: 2 * num_sources])[:, None]).reshape(
        2, num_sources, -1
    )
    linear = linear.sum(axis=0) / np.array(sizes)[:, None]
    features = {
        count: feature_means(
            jax.random.fold_in(feature_key, count),
            [*sources, *targets],
            count,
            bandwidths,
            phases=True,
        )
        for count in config.num_features
    }
    choices: dict[str, Choice | None] = dict.fromkeys(ESTIMATORS)
    for t, target in enumerate(targets):
        members = [*((i, num_sources + i) for i in range(num_sources)), (2 * num_sources + t,)]
        both = merged(grams, group_sizes, members)
        for s, sigma in enumerate(SIGMAS):
            add(f"exact V, σ = {sigma:g}", mmd_weights(both[s]))
            add(f"exact U, σ = {sigma:g}", mmd_weights(both[s], sizes))
            for count, means in features.items():
                problem = from_means(means[s, :num_sources], means[s, num_sources + t])
                add(f"RFF D = {count}, σ = {sigma:g}", solve(make_problem(problem)).weights)
        mean = from_means(linear, target.mean(axis=0, dtype=np.float64))
        add(UNIFORM, np.full(num_sources, 1 / num_sources))
        add(LINEAR, solve(make_problem(mean)).weights)
        add(
            PACKAGE,
            estimate(estimate_key, sources, target, kernel=Kernel(check_features=0)).weights,
        )
        add(CALIBRATED_MMD, mmd_weights(both[chosen], sizes))
        for name, estimator in ESTIMATORS.items():
            # The sources are the same: so is what they choose.
            kernel = Kernel(
                estimator=estimator,
                choice=choices[name],
                num_features=config.num_chosen,
                check_features=0,
            )
            result = estimate(estimate_key, sources, target, kernel=kernel)
            add(name, result.weights)
            choices[name] = result.choice
        add(EMQ, emq_weights(estimate_key, sources, target, median, config.num_chosen))
    all_weights = np.stack([np.stack(of_targets) for of_targets in weights.values()])
    return {
        "names": np.array(list(weights)),
        "weights": all_weights,
        "truth": drawn.truth,
        "tv": total_variation(all_weights, drawn.truth[None]),
        "sigma": np.array(SIGMAS[chosen]),
        "choices": np.array([choice.name for choice in choices.values() if choice is not None]),
    }


def emq_weights(
    key: Key[Array, ""],
    sources: Sequence[np.ndarray],
    target: np.ndarray,
    median: float,
    num_features: int,
) -> Float[np.ndarray, " N"]:
    """Most likely weights under posteriors of a uniform prior, of the median bandwidth."""
    groups = [as_rows(rows, "rows") for rows in (*sources, target)]
    frequency_key, feature_key, sample_key = jax.random.split(key, 3)
    count, offset = max(map(len, (target, np.concatenate(sources)))), origin(groups)
    frequencies = gaussian_frequencies(frequency_key, num_features, target.shape[1])
    options: dict[str, Any] = {"kinds": ["posteriors"], "count": count, "offset": offset}
    features = fitted_features(
        feature_key, groups[:-1], groups[-1], frequencies, [median], **options
    )
    assert isinstance(features.readout, Posteriors)
    projections = draw_sample(sample_key, groups[-1], count, frequencies, offset).projections
    logits = classifier_logits(features.readout.classifiers, fourier(projections, median))
    return likelihood_weights(np.log(softmax(logits, axis=-1).mean(axis=0))).weights


def ablate(config: AblationConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """Total variation tv [n, D, S, T] of MMD (U-statistic) for sources of n rows, D random Fourier
    features (pairs; the last is the kernel itself), bandwidths `SIGMAS`, and T targets."""
    splits = problems.load(config.samples, data_root)
    draw_key, median_key, feature_key = jax.random.split(jax.random.key(seed), 3)
    drawn = problems.draw(draw_key, splits, config.num_targets)
    num_sources, edges = len(drawn.sources), (0, *config.sizes)
    median = streamed_median_bandwidth(median_key, drawn.sources)
    bandwidths = [sigma * median / np.sqrt(2) for sigma in SIGMAS]
    # Parts between the sizes: the smaller sources are the beginnings of the larger ones.
    parts = [rows[a:b] for a, b in pairwise(edges) for rows in drawn.sources]
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
        sources = [[k * num_sources + i for k in range(n + 1)] for i in range(num_sources)]
        for d, grams in enumerate(all_grams):
            for t in range(config.num_targets):
                both = merged(grams, group_sizes, [*sources, [len(parts) + t]])
                for s in range(len(SIGMAS)):
                    weights = mmd_weights(both[s], [size] * num_sources)
                    tv[n, d, s, t] = total_variation(weights, drawn.truth[t])
    return {"tv": tv, "truth": drawn.truth}
