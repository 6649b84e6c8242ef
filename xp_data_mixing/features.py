"""Features that weights are estimated from, as they are read from rows of any number.

Whatever they are, they are a function of random Fourier features, a `readout`: a linear one where
they are whitened, or posteriors of classifiers. It is chosen, and fitted, on a subsample of the
rows; the means come from all of them, in one pass (`xp_data_mixing.block_moments`).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lib.numerics import product
from lib.rff import frequency_projections
from lib.rows import Rows, fill_up
from lib.rows.fourier_means import ROW_MULTIPLE
from xp_data_mixing import posteriors
from xp_data_mixing.calibration import (
    WHITENED_FEATURES,
    Choice,
    Kind,
    choose,
    fourier,
    host_rng,
)
from xp_data_mixing.posteriors import Classifiers
from xp_data_mixing.whitening import Spectrum, metric, spectrum


class Sample(NamedTuple):
    """Rows of a sample that features are chosen on, and their projections on D frequencies."""

    indices: Int[np.ndarray, " n"]
    projections: Float[np.ndarray, "n D"]


class Metric(NamedTuple):
    """x -> y = (x - center) root, and last |y|^2, from which the noise of means is computed."""

    center: Float[Array, " F"]
    root: Float[Array, "F G"]

    def __call__(self, x: Float[Array, "n F"]) -> Float[Array, "n G_plus_1"]:
        center, root = (part.astype(x.dtype) for part in self)
        y = product(x - center[None, :], root)
        return jnp.concatenate([y, jnp.sum(jnp.square(y), axis=1, keepdims=True)], axis=1)


class Posteriors(NamedTuple):
    """Mean posteriors of classifiers under a prior, in a metric."""

    classifiers: Classifiers
    prior: Float[Array, " N"]
    metric: Metric

    def __call__(self, x: Float[Array, "n F"]) -> Float[Array, "n N_plus_1"]:
        return self.metric(self.classifiers.posteriors(x, self.prior))


class Features(NamedTuple):
    """The features of a choice. The first `num_frequencies` frequencies are used.

    corrections: for each source (rows, what is added to what is read out of them); empty where
    nothing is.
    """

    choice: Choice
    num_frequencies: int
    readout: Metric | Posteriors
    corrections: Sequence[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n G"]]] = ()


def draw_sample(
    key: Key[Array, ""],
    rows: Rows,
    count: int,
    frequencies: Float[Array, "D d"],
    offset: Float[np.ndarray, " d"],
) -> Sample:
    """`count` rows, or all where there are no more, in order; only these are read."""
    indices = np.arange(rows.shape[0])
    if rows.shape[0] > count:
        indices = np.sort(host_rng(key).choice(rows.shape[0], count, replace=False))
    parts = []
    for i in range(0, len(indices), ROW_MULTIPLE):
        points = rows.take(indices[i : i + ROW_MULTIPLE])
        filled = fill_up((points - offset.astype(points.dtype)).astype(np.float32), ROW_MULTIPLE)
        parts.append(np.asarray(_project(filled, frequencies))[: len(points)])
    return Sample(indices, np.concatenate(parts))


_project = jax.jit(frequency_projections)


def fitted_features(
    key: Key[Array, ""],
    sources: Sequence[Rows],
    target: Rows,
    frequencies: Float[Array, "D d"],
    bandwidths: Sequence[float],
    *,
    kinds: Sequence[Kind] | Choice,
    count: int,
    offset: Float[np.ndarray, " d"],
) -> Features:
    """The features of the kinds and bandwidths that recover mixtures of the sources best.

    They are chosen, unless a choice is given, on `count` rows, a sample of each source, and fitted
    to them and, for the prior of posteriors, to as many of the target. Their mean square within
    sources is 1, as is a Gaussian kernel's k(x, x). Raises ValueError as `choose`.
    """
    source_key, target_key, choice_key, fold_key = jax.random.split(key, 4)
    share = -(-count // len(sources))
    samples = [
        draw_sample(jax.random.fold_in(source_key, i), rows, share, frequencies, offset)
        for i, rows in enumerate(sources)
    ]
    if isinstance(kinds, Choice):
        choice = kinds
    else:
        projections = [sample.projections for sample in samples]
        choice = choose(choice_key, projections, bandwidths, kinds)
    if choice.kind == "posteriors":
        of_target = draw_sample(target_key, target, count, frequencies, offset)
        return _fitted_posteriors(fold_key, choice, samples, of_target)
    num_frequencies = min(WHITENED_FEATURES, len(frequencies))
    rows = [fourier(s.projections, choice.bandwidth, most=num_frequencies) for s in samples]
    return Features(choice, num_frequencies, _metric(spectrum(rows), choice.damping))


def _fitted_posteriors(key, choice, sources, target):
    rows = [fourier(sample.projections, choice.bandwidth) for sample in sources]
    classifiers, own = posteriors.cross_fitted(host_rng(key), rows, choice.ridge)
    of_target = posteriors.logits(classifiers, fourier(target.projections, choice.bandwidth))
    mean = partial(posteriors.mean_posteriors, of_target)
    _, prior, known = posteriors.weights_and_prior(own, mean, choice.damping)
    readout = Posteriors(
        classifiers, jnp.asarray(prior, jnp.float32), _metric(known, choice.damping)
    )
    # The rows that trained the classifiers are given only to the one that they did not train.
    corrections = []
    for sample, z, logits in zip(sources, rows, own):
        by_one = readout.metric(jnp.asarray(posteriors.with_prior(logits, prior), jnp.float32))
        difference = np.asarray(by_one - readout(jnp.asarray(z)), np.float64)
        corrections.append((sample.indices, difference))
    return Features(choice, rows[0].shape[1] // 2, readout, corrections)


def _metric(known: Spectrum, damping: float) -> Metric:
    """(S + damping s I)^(-1/2), from the mean of the sources on, times what makes the mean square
    of rows within sources 1."""
    scales = metric(known.eigenvalues, damping)
    center = known.means.mean(axis=0)
    squares = known.variances + np.square(known.means - center)
    size = np.mean((squares / scales).sum(axis=1))
    root = known.basis / np.sqrt(scales * (size if size > 0 else 1.0))
    return Metric(*(jnp.asarray(part, jnp.float32) for part in (known.basis @ center, root)))
