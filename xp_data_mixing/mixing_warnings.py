"""What to distrust in mixing weights, in words."""

from typing import Any

import numpy as np

WIDE, NARROW = 0.85, 0.02
"""Mean kernel values past which the bandwidth is far off; the median distance gives about .6."""
NO_SPREAD = 1 - 1e-5
"""Mean kernel values from which rows are equal: up to rounding in float32."""
UNEQUAL = 4.0
"""Standard deviation of one column, in those of the median one."""
FEW_ROWS = 30
WORST_CONDITION = 1e8
WEAK = 4.0
"""Of the signal over the noise between weights: below it noise biases them (see the README)."""
MISFIT = 20.0
"""MMD^2 so many times what sampling explains."""
ROUNDING = 1e-6
"""Of an MMD^2 between means in float32: less is no misfit, however little sampling explains."""


def find_warnings(result: Any) -> tuple[str, ...]:
    """Warnings about a `xp_data_mixing.mixing.MixingResult`, most severe first."""
    return tuple(warning for check in CHECKS for warning in check(result))


def _kernel(result):
    """By sources whose rows differ; where there is none, by rows of two sources, unless these are
    equal rows that stand apart. Features that are fitted have no bandwidth of their own."""
    if result.choice is not None:
        return
    within, between = np.diag(result.kernel_means)[:-1], _between(result)
    whose, known = "one source", within[~np.isnan(within)]
    values = known[known < NO_SPREAD]
    if not len(values):
        if len(known) and np.mean(between) <= WIDE:
            return
        whose, values = "two sources", between
    mean = float(np.mean(values))
    saturated = (
        f"kernel saturated: rows of {whose} have a kernel value of {mean:.3g} on average, so "
    )
    if mean > WIDE:
        yield (
            f"{saturated}only their means count and little else; sigma {result.bandwidth:.4g} is "
            f"wide for these data, {_instead(result, 'smaller')}"
        )
    if mean < NARROW:
        yield (
            f"{saturated}hardly any two rows are neighbors; sigma {result.bandwidth:.4g} is "
            f"narrow for these data, {_instead(result, 'larger')}"
        )


def _columns(result):
    deviations = result.column_deviations
    varying = deviations[deviations > 0]
    if len(varying) < 2:
        return
    top, others = int(np.argmax(deviations)), float(np.median(np.sort(varying)[:-1]))
    share = deviations[top] ** 2 / np.sum(np.square(deviations))
    if share > 0.5 and deviations[top] > UNEQUAL * others:
        yield (
            f"columns of unequal scale: column {top}, counted from 0, has {share:.0%} of the "
            f"variance and {deviations[top] / others:.0f} times the standard deviation of the "
            "median column, so distances hardly see the others; if units are all that makes it "
            "so, divide every column by its standard deviation over all files together"
        )


def _instead(result, size):
    if result.median_rule:
        return f"although it is the median distance between rows of all sources: give a {size} one"
    return 'bandwidth "auto" takes the median distance'


def _between(result):
    """Of every two sources, and of each with the target."""
    return result.kernel_means[np.triu_indices(len(result.kernel_means), 1)]


def _spread(result):
    names, within = (*result.names, "the target"), np.diag(result.kernel_means)
    single = [name for name, value in zip(names, within) if np.isnan(value)]
    if single:
        yield (
            f"a single row has no spread: of {_listed(single)} the sampling noise is not known, so "
            "neither intervals nor comparisons with it count"
        )
    equal = [name for name, value in zip(names, within) if value >= NO_SPREAD]
    if result.choice is None and equal and np.mean(_between(result)) <= WIDE:
        yield (
            f"no spread: the rows of {_listed(equal)} are equal, or differ by far less than sigma "
            f"{result.bandwidth:.4g}"
        )


def _listed(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _conditioning(result):
    n = len(result.weights)
    if result.unidentifiable:
        yield (
            f"ill-conditioned: along {result.unidentifiable} of {n - 1} directions the weights are "
            "not determined by these rows (MMD^2 changes by less than sampling noise); sums over "
            f"similar sources are, their parts are not (condition number {result.condition:.1e})"
        )
    elif result.condition > WORST_CONDITION:
        yield f"ill-conditioned: the condition number is {result.condition:.1e}"
    if result.diagonal_shift > 0:
        yield (
            "the U-statistic's matrix is not positive semidefinite with so few rows: "
            f"{result.diagonal_shift:.2g} |w|^2 was added, which favors equal weights"
        )


def _biased(result):
    signal = result.signal_to_noise
    if not result.unidentifiable and len(signal) and signal[0] < WEAK:
        noisiest = int(np.argmax(result.noise[:-1]))
        yield (
            f"biased by noise: along one direction the sources' distance is {signal[0]:.1f} times "
            f"its sampling noise; below {WEAK:g} times weights are off to one side, and intervals "
            f"may miss more often than they say; most noise has {result.names[noisiest]} "
            f"({result.sizes[noisiest]} rows)"
        )


def _vertex(result):
    top = int(np.argmax(result.weights))
    if len(result.weights) == 1 or result.weights[top] < 0.99:
        return
    others = np.concatenate([result.fold_weights[:, top], result.replicates[:, top]])
    if len(others) and np.quantile(others, 0.1) < 0.9:
        yield (
            f"at a vertex by noise: all weight is on {result.names[top]}, but with other rows of "
            f"the same sources it falls to {others.min():.2f}"
        )


def _held_out(result):
    held = result.held_out
    if held is None:
        yield "no held-out MMD^2: too few rows for folds, or not asked for"
    elif len(result.weights) > 1 and held.optimal >= held.uniform:
        yield (
            f"on held-out rows the weights are no better than equal ones: MMD^2 {held.optimal:.3g} "
            f"against {held.uniform:.3g}"
        )


def _misfit(result):
    shares = np.append(result.weights, 1.0)
    if np.isnan(np.diag(result.kernel_means)[shares > 0]).any():
        return  # how much sampling explains is not known
    explained = float(np.square(shares) @ result.noise)
    if result.mmd_squared.optimal > max(MISFIT * explained, ROUNDING):
        yield (
            f"the target is no mixture of these sources: MMD^2 at the weights is "
            f"{result.mmd_squared.optimal:.3g}, sampling explains {explained:.3g}; the weights are "
            "those of the nearest mixture"
        )


def _rows(result):
    few = [f"{name} ({n})" for name, n in zip(result.names, result.sizes.tolist()) if n < FEW_ROWS]
    if result.target_size < FEW_ROWS:
        few.append(f"the target ({result.target_size})")
    if few:
        yield f"fewer than {FEW_ROWS} rows: {', '.join(few)}"


CHECKS = (
    _kernel, _columns, _spread, _conditioning, _biased, _vertex, _held_out, _misfit, _rows,
)  # fmt: skip
