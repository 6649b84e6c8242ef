"""Features and metric chosen from the sources only, by how well they recover known mixtures.

Self-calibration: each source is halved at random. A target of known weights is made of the second
halves, and the first halves have to recover them; then with the halves exchanged. What does so
best, in total variation on average over Dirichlet weights, is taken. Neither the target nor any
truth about it is used.

The choice is between random Fourier features of a few bandwidths in the metrics of
`xp_data_mixing.whitening`, of which MMD is one, and posteriors (`xp_data_mixing.posteriors`), whose
bandwidth and ridge are those of least cross-entropy on rows left out. `calibrated_bandwidth`
chooses the bandwidth of MMD with the kernel itself, from one Gram matrix of the halves.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from lib.rff import features_of_projections
from lib.rows.kernel_means import noise_of_means
from xp_data_mixing import posteriors
from xp_data_mixing.whitening import simplex_weights, spectrum, whitened_weights

CONCENTRATION = 0.5
"""Of the Dirichlet law of the pseudo-targets' weights."""
NUM_TARGETS = 30
FACTORS = (0.35, 0.7, 1.4)
"""Bandwidths to choose from, over the median distance."""
METRICS = (1e-3, 1e-2, 1e-1, math.inf)
"""Dampings of whitened Fourier features; inf is MMD."""
RIDGES = (0.01, 0.03, 0.1)
"""Of the classifiers, over the number of rows."""
POSTERIOR_DAMPING = 0.01
"""Between .001 and .1 it makes no difference."""
MOST_CLASSES = 100
"""Sources up to which `choose` tries posteriors beside other features: their cost is 2 D numbers
per source and fold, and posteriors of every sampled row for every pseudo-target."""
WHITENED_FEATURES = 300
"""Most frequencies that are whitened: the cost grows with their cube."""

Kind = Literal["whitened", "posteriors"]


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


# MMD of the kernel itself


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


# Features


class Choice(NamedTuple):
    """What features weights are estimated from: the damping is the metric's (inf: that of MMD),
    the ridge the classifiers'. `errors`: mean total variation of the pseudo-targets for everything
    that was tried, by its name."""

    kind: Kind
    bandwidth: float
    damping: float
    ridge: float | None
    errors: Mapping[str, float] = MappingProxyType({})

    @property
    def name(self) -> str:
        """In words."""
        of_bandwidth = f"bandwidth {self.bandwidth:.4g}"
        if self.kind == "posteriors":
            return f"posteriors, {of_bandwidth}, ridge {self.ridge:g}"
        if np.isinf(self.damping):
            return f"MMD, {of_bandwidth}"
        return f"whitened, {of_bandwidth}, damping {self.damping:g}"


def fourier(
    projections: Float[np.ndarray, "n D"], bandwidth: float, *, most: int | None = None
) -> Float[np.ndarray, "n F"]:
    """Fourier features, of the first `most` frequencies."""
    return np.asarray(_features(projections[:, :most], bandwidth))


_features = jax.jit(features_of_projections)


def choose(
    key: Key[Array, ""],
    projections: Sequence[Float[np.ndarray, "n D"]],
    bandwidths: Sequence[float],
    kinds: Sequence[Kind],
) -> Choice:
    """Of these kinds and bandwidths what recovers mixtures of the sources best.

    `projections` of rows of each source on D frequencies of variance 1, in float32 or float64. One
    source is any mixture of itself. Raises ValueError where a source has fewer than four rows.
    """
    sizes = [len(rows) for rows in projections]
    if min(sizes) < 4:
        raise ValueError(
            f"too few rows to choose features by halves: four of each source, got {sizes}"
        )
    halves_key, weights_key, folds_key = jax.random.split(key, 3)
    parts, rng = halves(halves_key, sizes), host_rng(folds_key)
    weights = pseudo_weights(weights_key, len(sizes))
    tried: list[Choice] = []
    errors: list[float] = []
    if "whitened" in kinds or len(sizes) == 1:
        for bandwidth in bandwidths:
            features = [fourier(rows, bandwidth, most=WHITENED_FEATURES) for rows in projections]
            tried += [Choice("whitened", bandwidth, damping, None) for damping in METRICS]
            errors += _whitened_errors(features, parts, weights)
    most = MOST_CLASSES if tried else math.inf
    if "posteriors" in kinds and 1 < len(sizes) <= most:
        bandwidth, ridge = _best_classifier(rng, projections, bandwidths)
        features = [fourier(rows, bandwidth) for rows in projections]
        tried.append(Choice("posteriors", bandwidth, POSTERIOR_DAMPING, ridge))
        errors.append(_posterior_errors(rng, features, parts, weights, ridge))
    by_name = {choice.name: error for choice, error in zip(tried, errors)}
    return tried[int(np.argmin(errors))]._replace(errors=by_name)


def _both_ways(parts):
    """(Rows of each source to recover with, rows that the pseudo-targets are made of), twice."""
    first, second = zip(*parts)
    return (first, second), (second, first)


def _whitened_errors(features, parts, weights) -> list[float]:
    """For each of `METRICS` the mean total variation of the pseudo-targets."""
    errors = np.zeros(len(METRICS))
    for fit, held in _both_ways(parts):
        known = spectrum([rows[chosen] for rows, chosen in zip(features, fit)])
        means = [
            rows[chosen].mean(axis=0, dtype=np.float64) for rows, chosen in zip(features, held)
        ]
        targets = weights @ np.stack(means) @ known.basis
        for j, damping in enumerate(METRICS):
            recovered = [whitened_weights(known, target, damping) for target in targets]
            errors[j] += total_variation(np.stack(recovered), weights).mean() / 2
    return errors.tolist()


def _best_classifier(rng, projections, bandwidths) -> tuple[float, float]:
    """The bandwidth and ridge of least cross-entropy on a fold that is left out."""
    sizes = [len(rows) for rows in projections]
    labels, num_sources = np.repeat(np.arange(len(sizes)), sizes), len(sizes)
    left_out = posteriors.random_folds(rng, sizes) == 0
    weights = posteriors.balanced(labels, num_sources)
    kept = np.tile(weights * ~left_out, (len(RIDGES), 1))
    losses = {}
    for bandwidth in bandwidths:
        features = fourier(np.concatenate(projections), bandwidth)
        ridges = np.array(RIDGES, np.float32) / len(labels)
        classifiers = posteriors.fit_classifiers(
            features, labels, kept, ridges, num_sources=num_sources
        )
        for ridge, logits in zip(RIDGES, posteriors.logits(classifiers, features[left_out])):
            losses[bandwidth, ridge] = posteriors.log_loss(
                logits, labels[left_out], weights[left_out]
            )
    return min(losses, key=losses.__getitem__)


def _posterior_errors(rng, features, parts, weights, ridge) -> float:
    """Mean total variation of the pseudo-targets."""
    errors = []
    for fit, held in _both_ways(parts):
        known = [rows[chosen] for rows, chosen in zip(features, fit)]
        classifiers, own = posteriors.cross_fitted(rng, known, ridge)
        logits = [
            posteriors.logits(classifiers, rows[chosen]) for rows, chosen in zip(features, held)
        ]
        for w in weights:

            def mean(prior, logits=logits, w=w):
                return w @ np.stack([posteriors.mean_posteriors(rows, prior) for rows in logits])

            recovered, _, _ = posteriors.weights_and_prior(own, mean, POSTERIOR_DAMPING)
            errors.append(total_variation(recovered, w))
    return float(np.mean(errors))
