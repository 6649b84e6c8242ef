"""Mixing weights of N source datasets for a target, with what a practitioner needs beside them.

    result = estimate(jax.random.key(0), sources, target, bootstrap=Bootstrap(replicates=200))
    result.weights, result.intervals, result.warnings

The weights minimize MMD^2 between the mixture and the target (`lib.simplex_qp`), with kernel
means from one pass over the rows or exact ones (`xp_data_mixing.block_moments`). No files, no
printing: samples are arrays or `lib.rows.Rows`. Everything after the means is float64.

Intervals come from weights of resampled data. Each replicate draws blocks of rows of every source
and of the target anew, and solves its own QP. A mean of drawn blocks carries the noise of the
drawing on top of that of the data. This adds v_i / n_i once more to A_ii and would push all
replicates towards equal weights, so that known bias is subtracted. At the boundary an interval
reaches further than the replicates do: where the unconstrained optimum has a w_i far below 0, w_i
is 0 in all of them, and what noise gives to sources without weight it takes from the others, in the
weights and again in the replicates. So an interval reaches from the lower of the percentiles q and
their reflections at the weight, 2 w_i - q, to the higher, within the bounds.
Noise in the means of the sources also biases the weights (errors in variables), the more so the
less the sources' distances exceed it: one small source among large ones is enough. Below `WEAK`
times the noise, intervals therefore reach as well to the percentiles moved by twice the replicates'
mean deviation from w, once for them and once for w, and there is a warning.
On Gaussian toys of 4 and 8 sources intervals cover single weights in .89 to .92 of draws at a level
of .9 where all are positive, in .78 to 1 where some are 0 (percentiles only: .44 to 1). Coverage is
least for the largest weight, where one source is all of the target or sources overlap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key
from scipy.linalg import eigh, null_space

from lib.numerics import named_key
from lib.report.spreads import spread
from lib.rff import gaussian_frequencies
from lib.rows import Rows, as_rows, check_bandwidths, check_same_width, pooled
from lib.rows.files import RowFile
from lib.rows.fourier_means import OnRows
from lib.rows.kernel_means import noise_of_means, streamed_median_bandwidth
from lib.simplex_qp import (
    Problem,
    Quadratic,
    Solution,
    from_gram,
    make_problem,
    solve,
    solve_batch,
    solve_with_cvxpy,
)
from xp_data_mixing.block_moments import (
    BlockMoments,
    bootstrap_counts,
    exact_moments,
    feature_moments,
    grams,
    origin,
    split_features,
)
from xp_data_mixing.calibration import FACTORS, Choice, Kind, host_rng
from xp_data_mixing.features import fitted_features
from xp_data_mixing.mixing_warnings import WEAK, find_warnings

FOLDS = 5
"""Of the held-out MMD^2."""
Estimator = Literal["rff", "exact", "whitened", "posteriors", "auto"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
ADAPTIVE: dict[str, tuple[Kind, ...]] = {
    "whitened": ("whitened",),
    "posteriors": ("posteriors",),
    "auto": ("whitened", "posteriors"),
}
"""The kinds of features that these estimators choose from."""


@dataclass(frozen=True)
class Kernel:
    """The Gaussian kernel, and how its means are computed. Raises ValueError on bad values."""

    bandwidth: float | Literal["auto"] = "auto"
    """sigma in the units of the rows. auto: the median distance of a subsample."""
    bandwidth_rows: int = 1000
    """Rows of that subsample, of all samples together."""
    estimator: Estimator = "rff"
    """rff: random Fourier features, one pass over the rows. exact: the kernel itself, quadratic in
    the rows. whitened: Fourier features in the metric of their covariance within the sources.
    posteriors: those of classifiers between the sources. auto: whichever of whitened, posteriors
    and plain MMD recovers mixtures of the sources best (see `xp_data_mixing.calibration`)."""
    num_features: int = 1000
    """Frequencies of the features, each a cosine and a sine. They depend on the key and d only."""
    check_features: int = 256
    """Further frequencies of rff, for the held-out MMD^2; 0 leaves that out, of any estimator."""
    statistic: Literal["v", "u"] = "v"
    """u: without the pairs of a row with itself, which in v add (1 - A_ii) / n_i to the distance of
    a small source. Of rff and exact: the other estimators are always u."""
    sample_rows: int = 10_000
    """Rows of all sources together, and of the target, that whitened, posteriors and auto are
    chosen and fitted on; the means come from all rows."""
    choice: Choice | None = None
    """What a result of whitened, posteriors or auto has chosen, for similar sources: then nothing
    is chosen anew."""

    @property
    def unbiased(self) -> bool:
        return self.statistic == "u" or self.adaptive

    @property
    def adaptive(self) -> bool:
        """Whether features are fitted to the rows."""
        return self.estimator in ADAPTIVE

    def __post_init__(self):
        if self.bandwidth != "auto":
            check_bandwidths([self.bandwidth])
        for name, known in (("estimator", ESTIMATORS), ("statistic", ("v", "u"))):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.sample_rows < 1:
            raise ValueError(f"sample_rows must be at least 1, got {self.sample_rows}")
        if self.num_features < 1 or self.check_features < 0:
            sizes = f"{self.num_features}, {self.check_features}"
            raise ValueError(f"num_features >= 1 and check_features >= 0 are needed, got {sizes}")


@dataclass(frozen=True)
class Constraints:
    """What is asked of the weights beside the least MMD^2; see `lib.simplex_qp.make_problem`."""

    ridge: float = 1e-5
    """In units of the kernel, whose values are at most 1."""
    prior: ArrayLike | None = None
    l2_penalty: float = 0.0
    kl_penalty: float = 0.0
    lower: ArrayLike | None = None
    """Bounds of the weights: one number, or one per source."""
    upper: ArrayLike | None = None

    def problem(self, quadratic: Quadratic) -> Problem:
        """Raises ValueError on bad values, and where no weights meet the bounds."""
        given = {"prior": self.prior, "lower": self.lower, "upper": self.upper}
        arrays: dict[str, Any] = {
            name: np.asarray(value, np.float64)
            for name, value in given.items()
            if value is not None
        }
        penalties = {"l2_penalty": self.l2_penalty, "kl_penalty": self.kl_penalty}
        return make_problem(quadratic, ridge=self.ridge, **penalties, **arrays)


@dataclass(frozen=True)
class Bootstrap:
    """Intervals from resampled blocks of rows. Raises ValueError on bad values."""

    replicates: int = 0
    """0: no intervals."""
    confidence: float = 0.9
    num_blocks: int = 50
    """Blocks of rows per sample."""

    def __post_init__(self):
        if self.replicates < 0 or not 0 < self.confidence < 1 or self.num_blocks < 2:
            raise ValueError(
                "bootstrap replicates >= 0, 0 < confidence < 1 and num_blocks >= 2 are needed, got "
                f"{self.replicates}, {self.confidence}, {self.num_blocks}"
            )


class Baselines(NamedTuple):
    """MMD^2 to the target of four mixtures."""

    uniform: float
    size_proportional: float
    best_single: float
    optimal: float


class MixingResult(NamedTuple):
    """What `estimate` returns; arrays are float64 on the host.

    weights [N]          sum 1, never negative
    intervals [N, 2]     None without bootstrap
    replicates [R, N]    the weights of the bootstrap, R = 0 without
    objective, gap, condition, diagonal_shift   see `lib.simplex_qp.Solution`
    mmd_squared          on the rows that the weights were fitted to; V- or U-statistic as asked
    held_out             U-statistics (unbiased, of any sign), means over folds: weights, and the
                         best single source, chosen without the fold's rows, evaluated on them only
                         and with other frequencies; None where a sample has too few rows
    fold_weights [K, N]  the weights of these folds
    best_single          the source that comes closest by itself
    leave_one_out_costs [N]   rise of the minimum without the source; infinite where nothing
                         feasible is left
    noise [N + 1]        v / n: squared error of each source's mean embedding, last the target's
    kernel_means [N + 1, N + 1]   the kernel's mean between rows of two samples, last the target,
                         and on the diagonal between different rows of one; NaN for a single row
    kernel_mean          of rows of one source, on average over the sources: near 1 or 0 the
                         bandwidth is far too wide or narrow; NaN where every source has one row
    signal_to_noise      ascending, by directions in weight space between the sources of more than
                         one row: how many times their sampling noise the sources' true distance
                         makes of MMD^2
    unidentifiable       how many of these directions noise explains
    bandwidth            sigma; `median_rule`: whether the median distance gave it
    choice               the features of an adaptive estimator, with the error of all that was
                         tried; None for others. Then all MMD^2 and means are of these features,
                         whose mean square within sources is 1, and kernel_mean is NaN
    column_deviations [d] standard deviations of the columns, over some rows of every sample
    """

    weights: Float[np.ndarray, " N"]
    intervals: Float[np.ndarray, "N 2"] | None
    replicates: Float[np.ndarray, "R N"]
    objective: float
    gap: float
    condition: float
    diagonal_shift: float
    mmd_squared: Baselines
    held_out: Baselines | None
    fold_weights: Float[np.ndarray, "K N"]
    best_single: int
    leave_one_out_costs: Float[np.ndarray, " N"]
    noise: Float[np.ndarray, " M"]
    kernel_means: Float[np.ndarray, "M M"]
    kernel_mean: float
    signal_to_noise: Float[np.ndarray, " L"]
    unidentifiable: int
    bandwidth: float
    median_rule: bool
    choice: Choice | None
    column_deviations: Float[np.ndarray, " d"]
    sizes: Int[np.ndarray, " N"]
    target_size: int
    names: tuple[str, ...]
    warnings: tuple[str, ...]


def estimate(
    key: Key[Array, ""],
    sources: Sequence[Any],
    target: Any,
    *,
    target_weights: Sequence[float] | None = None,
    kernel: Kernel = Kernel(),
    constraints: Constraints = Constraints(),
    bootstrap: Bootstrap = Bootstrap(),
    solver: str = "own",
    chunk_size: int = 1024,
    devices: Sequence[jax.Device] | None = None,
    on_rows: OnRows | None = None,
) -> MixingResult:
    """Weights w of the sources with sum_i w_i P_i nearest to the target, in MMD of a Gaussian
    kernel, or in that of features that are fitted to the sources.

    Sources and target are arrays [n, d], `lib.rows.files.open_rows(path)`, or `lib.rows.Rows`
    without weights. A list as target is pooled, or counts by `target_weights`, one >= 0 for each.
    Where a sample is both source and (part of the) target, no row is compared with itself.
    `solver` is "own" or a name of cvxpy's; `chunk_size` rows are read at a time, and `on_rows` is
    told of them.

    Raises ValueError on bad options before a row is read, on bad rows naming their sample, and
    where no weights meet the bounds.
    """
    samples = _samples(sources, target, target_weights)
    groups, num_rows = samples.groups, samples.num_rows
    least = 4 if kernel.adaptive else 2 if kernel.unbiased else 1
    for i, group in enumerate(groups):
        needed = least if i < len(num_rows) - 1 else min(least, 2)
        if group.shape[0] < needed:
            what = (
                "features chosen by halves need four" if needed > 2 else "a U-statistic needs two"
            )
            rows = "one row" if group.shape[0] == 1 else f"{group.shape[0]} rows"
            raise ValueError(f"{group.name} has {rows}: {what}")
    num_sources = len(num_rows) - 1
    # Only to raise before any row is read.
    rehearsal = constraints.problem(from_gram(np.eye(num_sources), np.zeros(num_sources), 0.0))
    if solver != "own":
        solve_with_cvxpy(rehearsal, solver=solver)

    bandwidth_key, frequency_key, check_key, block_key, bootstrap_key = jax.random.split(key, 5)
    bandwidth = kernel.bandwidth
    if bandwidth == "auto":
        bandwidth = streamed_median_bandwidth(
            bandwidth_key, groups, num_points=kernel.bandwidth_rows
        )
    reading: dict[str, Any] = {"on_rows": on_rows}
    reading["num_blocks"] = bootstrap.num_blocks if bootstrap.replicates else FOLDS
    choice, width = None, groups[0].shape[1]
    if kernel.estimator == "exact":
        fit = check = exact_moments(block_key, groups, bandwidth, **reading)
    else:
        reading |= {"chunk_size": chunk_size, "devices": devices}
        frequencies = gaussian_frequencies(frequency_key, kernel.num_features, width)
    if kernel.estimator == "rff":
        if kernel.check_features:
            checks = gaussian_frequencies(check_key, kernel.check_features, width)
            frequencies = jnp.concatenate([frequencies, checks])
        moments = feature_moments(block_key, groups, frequencies, bandwidth, **reading)
        fit, check = split_features(moments, kernel.num_features)
    elif kernel.adaptive:
        features = fitted_features(
            named_key(key, "features"),
            groups[:num_sources],
            pooled(samples.parts),
            frequencies,
            [bandwidth] if kernel.bandwidth != "auto" else [f * bandwidth for f in FACTORS],
            kinds=kernel.choice or ADAPTIVE[kernel.estimator],
            count=kernel.sample_rows,
            offset=origin(groups),
        )
        choice = features.choice
        bandwidth = choice.bandwidth
        reading |= {"readout": features.readout, "corrections": features.corrections}
        some = frequencies[: features.num_frequencies]
        fit = check = feature_moments(block_key, groups, some, bandwidth, **reading)

    corrections = int(kernel.unbiased)
    (of_groups,) = grams(fit, fit.filled[None].astype(float))
    noise_of_groups = noise_of_means(of_groups, samples.sizes, fit.mean_squares(fit.filled))
    noise = samples.noise(noise_of_groups)
    corrected = samples.without_noise(of_groups, noise_of_groups, corrections)
    problem, shift = _problem(corrected, constraints)
    solution = solve(problem) if solver == "own" else solve_with_cvxpy(problem, solver=solver)
    weights = solution.weights + 0.0  # no -0.0
    mixtures = _mixtures(corrected, num_rows, weights)
    kernel_means = samples.without_noise(of_groups, noise_of_groups, 1)
    np.fill_diagonal(kernel_means, np.where(num_rows > 1, np.diag(kernel_means), np.nan))
    within = np.diag(kernel_means)[:-1]
    within = within[~np.isnan(within)]
    signal_to_noise = _signal_to_noise(problem.quadratic.gram, noise, num_rows, corrections)

    intervals, replicates = None, np.zeros((0, num_sources))
    if bootstrap.replicates:
        resampled = grams(fit, bootstrap_counts(host_rng(bootstrap_key), fit, bootstrap.replicates))
        problems = (
            samples.without_noise(gram, noise_of_groups, corrections, resampled=True)
            for gram in resampled
        )
        solutions = solve_batch(_problem(gram, constraints)[0] for gram in problems)
        replicates = np.stack([solution.weights for solution in solutions])
        biased = len(signal_to_noise) > 0 and signal_to_noise[0] < WEAK
        intervals = _intervals(
            replicates, weights, bootstrap.confidence, problem.bounds, biased=biased
        )
    held_out, fold_weights = None, np.zeros((0, num_sources))
    if kernel.check_features:
        held_out, fold_weights = _held_out(samples, fit, check, corrections, constraints)
    result = MixingResult(
        weights=weights,
        intervals=intervals,
        replicates=replicates,
        objective=solution.objective - shift,
        gap=solution.gap,
        condition=solution.condition,
        diagonal_shift=solution.diagonal_shift,
        mmd_squared=Baselines(*(_mmd_squared(corrected, mixture) for mixture in mixtures)),
        held_out=held_out,
        fold_weights=fold_weights,
        best_single=int(np.argmax(mixtures[2])),
        leave_one_out_costs=_leave_one_out_costs(problem.quadratic, constraints, solution),
        noise=noise,
        kernel_means=kernel_means,
        kernel_mean=float(np.mean(within)) if len(within) and choice is None else math.nan,
        signal_to_noise=signal_to_noise,
        unidentifiable=int(np.sum(signal_to_noise < 1)),
        bandwidth=float(bandwidth),
        median_rule=kernel.bandwidth == "auto" and choice is None,
        choice=choice,
        column_deviations=_column_deviations(groups),
        sizes=num_rows[:-1],
        target_size=int(num_rows[-1]),
        names=tuple(group.name for group in groups[:num_sources]),
        warnings=(),
    )
    return result._replace(warnings=find_warnings(result))


def _column_deviations(groups: Sequence[Rows], count: int = 256) -> Float[np.ndarray, " d"]:
    """Over `count` rows of every sample, evenly spread, or all where there are no more."""
    some = [
        group.take(np.arange(0, n, -(-n // count))) for group in groups if (n := group.shape[0])
    ]
    return spread(np.concatenate(some), axis=0)


class _Samples(NamedTuple):
    """What is read, and how sources and target are made of it.

    groups [G]   the sources, and the parts of the target that are none of them
    shares [G]   of the groups' means in the target's
    parts        of the target
    """

    groups: list[Rows]
    shares: Float[np.ndarray, " G"]
    parts: list[Rows]
    num_sources: int

    @property
    def sizes(self) -> Int[np.ndarray, " G"]:
        return np.array([group.shape[0] for group in self.groups])

    @property
    def num_rows(self) -> Int[np.ndarray, " M"]:
        """Of the sources, and last of the target."""
        return np.append(self.sizes[: self.num_sources], sum(p.shape[0] for p in self.parts))

    def noise(self, of_groups: Float[np.ndarray, " G"]) -> Float[np.ndarray, " M"]:
        """Of the sources' means, and last of the target's."""
        return np.append(of_groups[: self.num_sources], np.square(self.shares) @ of_groups)

    def without_noise(
        self, gram, noise, corrections: int, *, resampled: bool = False
    ) -> Float[np.ndarray, "M M"]:
        """The Gram matrix of means of the sources, and last the target, from that of the groups.

        Noise is taken off the diagonal `corrections` times, and once where the target has rows of a
        source; each time once more for the noise of resampling.
        """
        n = self.num_sources
        cross = gram[:n] @ self.shares - (1 + resampled) * (self.shares * noise)[:n]
        square = np.array([[self.shares @ gram @ self.shares]])
        combined = np.block([[gram[:n, :n], cross[:, None]], [cross[None, :], square]])
        return combined - np.diag((corrections + resampled) * self.noise(noise))


def _samples(sources, target, target_weights) -> _Samples:
    samples = [as_rows(rows, f"source {i}") for i, rows in enumerate(sources)]
    given = list(target) if isinstance(target, list | tuple) else [target]
    parts = [as_rows(rows, f"target {i}") for i, rows in enumerate(given)]
    if not samples or not parts:
        counts = f"{len(samples)} sources and {len(parts)} targets"
        raise ValueError(f"{counts}: at least one of both is needed")
    check_same_width(samples + parts)
    known = [_identity(rows) for rows in sources]
    places = [known.index(i) if i in known else None for i in map(_identity, given)]
    shares = np.array([part.shape[0] for part in parts], float)
    if target_weights is not None:
        shares = np.asarray(target_weights, float)
        if shares.shape != (len(parts),) or not (shares >= 0).all() or not shares.sum() > 0:
            raise ValueError(
                f"target_weights must be {len(parts)} numbers >= 0, not all 0, got {target_weights}"
            )
    elif set(places) == {None}:
        parts, places, shares = [pooled(parts)], [None], np.ones(1)
    new = [part for part, place in zip(parts, places) if place is None]
    of_groups, next_place = np.zeros(len(samples) + len(new)), count(len(samples))
    for place, share in zip(places, shares / shares.sum()):
        of_groups[next(next_place) if place is None else place] += share
    return _Samples([*samples, *new], of_groups, parts, len(samples))


def _identity(rows: Any) -> Any:
    """The same for one array, and for one matrix of one file however often it is opened."""
    x = rows.x if isinstance(rows, Rows) else rows
    return (x.path.resolve(), x.key) if isinstance(x, RowFile) else id(x)


def _problem(gram, constraints: Constraints) -> tuple[Problem, float]:
    """And what was added to the objective: a constant on the simplex, so that a matrix which is
    convex between weights of one sum is so altogether, although MMD^2 itself may be negative.
    """
    quadratic = from_gram(gram[:-1, :-1], gram[:-1, -1], gram[-1, -1])
    shift = 0.0
    if quadratic.smallest_eigenvalue < 0:
        shift = float(np.abs(quadratic.gram).max())
        quadratic = from_gram(gram[:-1, :-1], gram[:-1, -1], gram[-1, -1] + shift)
    return constraints.problem(quadratic), shift


def _mmd_squared(gram, mixture):
    difference = np.append(mixture, -1.0)
    return float(difference @ gram @ difference)


def _mixtures(gram, num_rows, weights):
    """As in `Baselines`."""
    n = len(weights)
    single = np.zeros(n)
    single[np.argmin([_mmd_squared(gram, vertex) for vertex in np.eye(n)])] = 1.0
    return np.full(n, 1 / n), num_rows[:n] / num_rows[:n].sum(), single, weights


def _intervals(replicates, weights, confidence, bounds, *, biased):
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = np.quantile(replicates, tails, axis=0)
    shift = 2 * (replicates.mean(axis=0) - weights) * biased
    low, high = (
        np.minimum(np.minimum(low, low - shift), 2 * weights - high),
        np.maximum(np.maximum(high, high - shift), 2 * weights - low),
    )
    low = np.minimum(np.maximum(low, bounds[0]), weights)  # whatever rounding does
    high = np.maximum(np.minimum(high, np.minimum(bounds[1], 1.0)), weights)
    return np.stack([low, high], axis=1)


def _held_out(
    samples: _Samples,
    fit: BlockMoments,
    check: BlockMoments,
    corrections,
    constraints: Constraints,
):
    """(Baselines, weights of the folds); none of either where a fold leaves or holds fewer than two
    rows of a sample. Blocks go to folds in turn.
    """
    in_fold = np.arange(fit.sizes.shape[1])[None, :] % FOLDS == np.arange(FOLDS)[:, None]
    held, fitted = (part[:, None, :] & fit.filled[None] for part in (in_fold, ~in_fold))
    held_rows, fitted_rows = ((part * fit.sizes).sum(axis=2) for part in (held, fitted))
    if min(held_rows.min(), fitted_rows.min()) < 2:
        return None, np.zeros((0, len(samples.num_rows) - 1))
    values, fold_weights = [], []
    folds = zip(grams(fit, fitted.astype(float)), grams(check, held.astype(float)))
    for k, (gram, held_gram) in enumerate(folds):
        noise = noise_of_means(gram, fitted_rows[k], fit.mean_squares(fitted[k]))
        gram = samples.without_noise(gram, noise, corrections)
        held_noise = noise_of_means(held_gram, held_rows[k], check.mean_squares(held[k]))
        held_gram = samples.without_noise(held_gram, held_noise, 1)
        fold_weights.append(solve(_problem(gram, constraints)[0]).weights)
        mixtures = _mixtures(gram, fitted_rows[k], fold_weights[-1])
        values.append([_mmd_squared(held_gram, mixture) for mixture in mixtures])
    return Baselines(*np.mean(values, axis=0).tolist()), np.stack(fold_weights)


def _leave_one_out_costs(quadratic: Quadratic, constraints: Constraints, solution: Solution):
    """Without a source that has no weight and no lower bound nothing changes: only the others are
    solved."""
    n = len(quadratic.gram)
    lower, upper = (
        np.broadcast_to(np.asarray(default if given is None else given, float), n)
        for given, default in ((constraints.lower, 0.0), (constraints.upper, 1.0))
    )
    costs = np.zeros(n)
    for i in np.flatnonzero((solution.weights > 0) | (lower > 0)):
        others = np.arange(n) != i
        without = replace(
            constraints, lower=np.where(others, lower, 0.0), upper=np.where(others, upper, 0.0)
        )
        try:
            problem = without.problem(quadratic)
        except ValueError:  # what is left cannot sum to 1
            costs[i] = np.inf
            continue
        start = np.where(others, solution.weights, 0.0)
        costs[i] = solve(problem, start=start).objective - solution.objective
    return costs


def _signal_to_noise(gram, noise, num_rows, corrections):
    """Ascending eigenvalues of v'Gv / v' diag(noise) v over the v of sum 0, without the noise that
    is in G itself; of the sources of several rows, whose noise is known."""
    several = num_rows[:-1] > 1
    gram, noise = gram[np.ix_(several, several)], noise[:-1][several]
    if len(gram) < 2:
        return np.zeros(0)
    between = null_space(np.ones((1, len(gram))))
    # Where all rows of a source are the same no noise is seen.
    noise = np.maximum(noise, np.finfo(float).eps)
    scale = between.T @ (noise[:, None] * between)
    return eigh(between.T @ gram @ between, scale, eigvals_only=True) - (1 - corrections)
