"""What to distrust in mixing weights, in words."""

from typing import Any

import numpy as np

WIDE, NARROW = 0.85, 0.02
"""Mean kernel values past which the bandwidth is far off; the median distance gives about .6."""
FEW_ROWS = 30
WORST_CONDITION = 1e8
MISFIT = 20.0
"""MMD^2 so many times what sampling explains."""


def find_warnings(result: Any) -> tuple[str, ...]:
    """Warnings about a `xp_data_mixing.mixing.MixingResult`, most severe first."""
    return tuple(
        warning
        for found in (_kernel, _conditioning, _vertex, _held_out, _misfit, _rows)
        for warning in found(result)
    )


def _kernel(result):
    mean, sigma = result.kernel_mean, result.bandwidth
    if mean > WIDE:
        yield (
            f"kernel saturated: rows of one set have a kernel value of {mean:.3f} on average, so "
            f"only their means count and little else; sigma {sigma:.4g} is wide for these data, "
            'bandwidth "auto" takes the median distance'
        )
    if mean < NARROW:
        yield (
            f"kernel saturated: rows of one set have a kernel value of {mean:.3g} on average, so "
            f"hardly any two rows are neighbours; sigma {sigma:.4g} is narrow for these data, "
            'bandwidth "auto" takes the median distance'
        )


def _conditioning(result):
    n = len(result.weights)
    if result.undetermined:
        yield (
            f"ill-conditioned: along {result.undetermined} of {n - 1} directions the weights are "
            "not determined by these rows (MMD^2 changes by less than sampling noise); sums over "
            f"similar sets are, their parts are not (condition number {result.condition:.1e})"
        )
    elif result.condition > WORST_CONDITION:
        yield f"ill-conditioned: the condition number is {result.condition:.1e}"
    if result.lift > 0:
        yield (
            "the U-statistic's matrix is not positive semidefinite with so few rows: "
            f"{result.lift:.2g} |w|^2 was added, which pulls towards equal weights"
        )


def _vertex(result):
    top = int(np.argmax(result.weights))
    if len(result.weights) == 1 or result.weights[top] < 0.99:
        return
    others = np.concatenate([result.fold_weights[:, top], result.replicates[:, top]])
    if len(others) and np.quantile(others, 0.1) < 0.9:
        yield (
            f"at a vertex by noise: all weight is on {result.names[top]}, but with other rows of "
            f"the same sets it falls to {others.min():.2f}"
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
    w = result.weights
    explained = float(np.square(w) @ result.noise[:-1] + result.noise[-1])
    if explained > 0 and result.mmd_squared.optimal > MISFIT * explained:
        yield (
            f"the target is no mixture of these sets: MMD^2 at the weights is "
            f"{result.mmd_squared.optimal:.3g}, sampling explains {explained:.3g}; the weights are "
            "those of the nearest mixture"
        )


def _rows(result):
    few = [f"{name} ({n})" for name, n in zip(result.names, result.sizes.tolist()) if n < FEW_ROWS]
    if result.target_size < FEW_ROWS:
        few.append(f"the target ({result.target_size})")
    if few:
        yield f"fewer than {FEW_ROWS} rows: {', '.join(few)}"
