"""Convex quadratic programs over a box cut by a sum, solved to rounding error by active sets.

    min_x  x' H x - 2 c' x   over  {x : lower <= x <= upper, sum x = total}

with H [n, n] symmetric positive semidefinite, in float64 NumPy and LAPACK. With some entries held
at their bounds, the others, the free ones, and the multiplier lambda of the sum solve the rows of

    [ H   -s ] [    x     ]   [    c     ]
    [ -s'  0 ] [ lambda/s ] = [ -s total ]        (s as large as H, so that no row is small)

that belong to them. The residual of the other rows is half the gradient less lambda, which tells
whether their bounds hold them back. Which entries are free is found by

- block pivoting: solve, then exchange every entry that is out of bounds or whose residual has the
  wrong sign, all at once (Judice and Pires, A block principal pivoting algorithm for large-scale
  strictly monotone linear complementarity problems, Computers and Operations Research 21, 1994).
  It takes a handful of systems where it converges, as it does where H is well conditioned;
- where it does not, the same from a damped H to H itself in steps small enough for it;
- where that fails too, as it can on ties and degenerate vertices, the primal active set method: one
  entry at a time, each step feasible and downhill, so that no set of free entries comes back.

The result is certified, not trusted: its gap bounds the distance to the minimum, and where it is
not down to rounding error iterative refinement solves again for a correction. If H is singular,
`damping` on its diagonal makes this the proximal point method, whose fixed points are the minima
without.

For ten entries a NumPy call costs more than its arithmetic: hence `dot` and `take`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8
from scipy.linalg.lapack import dgesv

Vector = Float[np.ndarray, " n"]
Bordered = Float[np.ndarray, " m"]  # m = n + 1: with the multiplier

AT_LOWER, FREE, AT_UPPER = -1, 0, 1
# Shares of the scale of H: what is rounding; the damping of a singular H, and the most that is
# tried where this leaves a gap; where the path to H itself starts, and its last step.
ROUNDING = 2 * float(np.finfo(np.float64).eps)
DAMPING, WORST_DAMPING, START_OF_PATH, END_OF_PATH = 1e-14, 1e-9, 1e-3, 1e-9
# Block pivoting may fail this often in a row to lower the number of wrong entries.
PATIENCE = 5


class Program(NamedTuple):
    """The saddle point system [m, m], m = n + 1, its right side [m], and bounds on its unknowns.

    The multiplier, last, is unbounded. `upper` None: no upper bounds, and the lower ones are 0.
    `scale` is what rounding error is measured against.
    """

    saddle: Float[np.ndarray, "m m"]
    right: Bordered
    lower: Bordered
    upper: Bordered | None
    scale: float

    def upper_bounds(self) -> Bordered:
        return np.full(len(self.right), np.inf) if self.upper is None else self.upper


class Minimum(NamedTuple):
    """`x` [n] within its bounds; `state` [n] AT_LOWER, FREE or AT_UPPER; `gap` >= value - minimum.

    `iterations` counts the linear systems solved.
    """

    x: Vector
    state: Int8[np.ndarray, " n"]
    gap: float
    iterations: int


def make_program(
    hessian: Float[np.ndarray, "n n"],
    linear: Vector,
    bounds: tuple[Vector, Vector] | None = None,
    *,
    scale: float | None = None,
) -> Program:
    """The program of the module with sum 1; bounds of 0 and infinity and `scale` max H_ii by
    default. That H is positive semidefinite and a point feasible is not checked.
    """
    n = len(linear)
    scale = scale or float(hessian.diagonal().max()) or 1.0
    saddle, right = np.empty((n + 1, n + 1)), np.append(linear, -0.1 * scale)
    saddle[:n, :n] = hessian
    saddle[n] = saddle[:n, n] = right[n]
    saddle[n, n] = 0
    lower, upper = bounds or (np.zeros(n), None)
    high = None if upper is None else np.append(upper, np.inf)
    return Program(saddle, right, np.append(lower, -np.inf), high, scale)


def minimize(
    program: Program, *, start: Vector | None = None, damping: float = 0.0, corrections: int = 10
) -> Minimum:
    """Solves `program` until the gap is rounding error, by iterative refinement.

    The first pass solves it as it is. Each of at most so many `corrections` solves for the
    difference from the best point so far: the same program about that point, its right side the
    residual there, which is small and so loses no digits.

    `start` [n] says which entries to begin with as free: those off their bounds; all by default.
    `damping` >= 0 is raised where a system is singular and where corrections do not help. Holds two
    copies of the rows of the free entries, and one of the system where there is damping.
    """
    saddle, right, lower, upper, scale = program
    state = np.zeros(len(right), np.int8)
    if start is not None:
        state[:-1][start <= lower[:-1]] = AT_LOWER
        if upper is not None:
            state[:-1][start >= upper[:-1]] = AT_UPPER
    current, center, best, iterations = program, 0.0, None, 0
    for _ in range(1 + corrections):
        y = None
        while y is None:
            try:
                y, state, count = _solve(_damped(current, damping) if damping else current, state)
            except np.linalg.LinAlgError:
                damping = _more(damping, scale)
        iterations += count
        y = _within(program, center + y, state)
        residual = saddle.dot(y) - right
        minimum = Minimum(y[:-1], state[:-1], _gap(program, y, residual), iterations)
        if minimum.gap <= ROUNDING * scale:
            return minimum
        helped = best is None or minimum.gap < 0.5 * best.gap
        if best is None or minimum.gap < best.gap:
            best, center = minimum, y
            around = {"lower": lower - y, "upper": program.upper_bounds() - y}
            current = program._replace(right=-residual, **around)
        if not helped:
            damping = _more(damping, scale)
            if damping > WORST_DAMPING * scale:
                break
    assert best is not None  # of the first pass
    return best._replace(iterations=iterations)


def bound_states(x: Vector, lower: Vector, upper: Vector) -> Int8[np.ndarray, " n"]:
    """Of each entry of `x`: AT_LOWER, AT_UPPER or FREE."""
    return np.where(x <= lower, AT_LOWER, np.where(x >= upper, AT_UPPER, FREE)).astype(np.int8)


def _more(damping, scale):
    return max(100 * damping, DAMPING * scale)


def _damped(program, damping):
    saddle = program.saddle.copy()
    saddle.flat[: -1 : len(saddle) + 1] += damping
    return program._replace(saddle=saddle)


def _within(program, y, state):
    """`y` exactly on the bounds that `state` says, and of sum 1 to the last bits."""
    lower, upper = program.lower, program.upper
    y = np.maximum(y, lower) + 0.0  # no -0.0
    if upper is not None:
        y = np.where(state == AT_LOWER, lower, np.where(state == AT_UPPER, upper, y))
        np.minimum(y, upper, out=y)
    x = y[:-1]
    missing = 1 - math.fsum(x.tolist())
    if abs(missing) > 1e-9:  # of a nearly singular system
        x[:] = project_onto_simplex(x, lower[:-1], program.upper_bounds()[:-1], 1.0)
    elif upper is None:
        x[x.argmax()] += missing
    else:
        mend_sum(x, lower[:-1], upper[:-1], 1.0)
    return y


def _solve(program, state):
    """One pass without certificate: the unknowns, their state and the systems solved."""
    y, pivoted, iterations, settled = _pivot_blocks(program, state)
    if not settled:
        # From where this came to, unless nothing except the multiplier is free there.
        onward = pivoted if np.count_nonzero(pivoted == FREE) > 1 else state
        y, pivoted, count, settled = _follow_path(program, onward)
        iterations += count
    if not settled:
        y, pivoted, count = _descend(program._replace(upper=program.upper_bounds()), y)
        iterations += count
    return y, pivoted, iterations


def _stationary(program, free, fixed=None):
    """The unknowns that solve the rows `free` (indices), and the residual of the other rows, 0 in
    those; None if there are no others.

    The other unknowns are those of `fixed`, which is 0 where free; without it they are 0. Raises
    LinAlgError where the system is singular.
    """
    saddle, right = program.saddle, program.right
    if fixed is not None:
        right = right - saddle.dot(fixed)
    # Symmetric matrices, so transposing puts them into LAPACK's order.
    if len(free) == len(right):
        _, _, y, failed = dgesv(saddle.T, right)
        residual = None
    else:
        rows = saddle.take(free, 0)
        _, _, values, failed = dgesv(rows.take(free, 1).T, right.take(free), 1, 1)
        y = np.zeros(len(right)) if fixed is None else fixed.copy()
        y[free] = values
        residual = values.dot(rows) - right
        residual[free] = 0
    if failed:
        raise np.linalg.LinAlgError
    return y, residual


def _pivot_blocks(program, state):
    """Block pivoting: the unknowns, their state, the systems solved, and whether all is settled."""
    lower, upper = program.lower, program.upper
    tolerance, state = ROUNDING * program.scale, state.copy()
    y, fixed, fewest, patience, iterations = lower, None, len(state) + 1, PATIENCE, 0
    movable = True
    if upper is not None:
        movable = lower < upper
        state[~movable] = AT_LOWER
        if not movable[:-1].any():
            return np.append(lower[:-1], 0), state, 0, True
    while patience:
        free = (state == FREE).nonzero()[0]
        if len(free) == 1:  # only the multiplier
            break
        if upper is not None:
            fixed = np.where(state == AT_UPPER, upper, lower)
            fixed[free] = 0
        y, residual = _stationary(program, free, fixed)
        iterations += 1
        low = (y < lower).nonzero()[0]
        enters = high = low[:0]
        if residual is not None:
            enters = (movable & (state * residual > tolerance)).nonzero()[0]
        if upper is not None:
            high = (y > upper).nonzero()[0]
        wrong = len(low) + len(enters) + len(high)
        if wrong == 0:
            return y, state, iterations, True
        state[low], state[enters], state[high] = AT_LOWER, FREE, AT_UPPER
        patience = PATIENCE if wrong < fewest else patience - 1
        fewest = min(fewest, wrong)
    return y, state, iterations, False


def _follow_path(program, state):
    """Block pivoting with ever less damping, each time from the state before; as `_pivot_blocks`.

    It starts at the first of a few dampings, from the least on, with which pivoting converges. The
    steps from one to the next are, on a logarithmic scale, doubled where the state hardly changes
    and halved where pivoting does not converge.
    """
    damped = _damped(program, 0)
    diagonal = np.einsum("ii->i", damped.saddle)[:-1]
    undamped = diagonal.copy()
    y, last, iterations = program.lower, None, 0
    damping, ratio = START_OF_PATH * program.scale, 0.1
    while ratio < 0.9 and damping < 10 * program.scale:
        diagonal[:] = undamped + damping
        new, pivoted, count, settled = _pivot_blocks(damped, state)
        iterations += count
        if settled:
            y, state, last, ratio = new, pivoted, damping, ratio**2 if count <= 2 else ratio
            if damping == 0:
                return y, state, iterations, True
        elif last is None:
            damping *= 10
            continue
        else:
            ratio **= 0.5
        damping = last * ratio if last > END_OF_PATH * program.scale else 0
    return y, state, iterations, False


def _descend(program, y):
    """The primal active set method from the projection of `y`: as `_pivot_blocks`, but settled.

    Each round goes towards the minimizer over the free entries as far as the bounds allow, or, if
    this lowers nothing, towards that over them and the entry that should join them most; where none
    is free, over the pair that should.
    """
    saddle, right, lower, upper, scale = program
    total = right[-1] / saddle[-1, 0]
    y = np.append(project_onto_simplex(y[:-1], lower[:-1], upper[:-1], total), 0.0)
    movable, last = lower < upper, len(y) - 1
    movable[last] = False
    iterations = 0

    def go(free):
        """Whether towards the minimizer over `free` (a mask) it goes down; if so, `y` moves."""
        nonlocal iterations, y
        iterations += 1
        rows = np.append(np.flatnonzero(free), last)
        target, _ = _stationary(program, rows, np.where(free, 0, y))
        step = target - y
        step[last] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            lengths = np.where(step < 0, lower - y, upper - y) / step
        lengths[step == 0] = np.inf
        length = min(1, lengths.min())
        fall = -length * (2 * slope.dot(step) + length * step.dot(saddle.dot(step)))
        if fall <= 0.1 * ROUNDING * scale * length * np.abs(step).sum():
            return False
        blocked = lengths <= length
        y = np.where(blocked, np.where(step < 0, lower, upper), y + length * step)
        return True

    while iterations < 10 * len(y) + 100:
        slope = saddle.dot(y) - right
        rising, falling = movable & (y < upper), movable & (y > lower)
        if not (rising.any() and falling.any()):
            break
        up = np.argmin(np.where(rising, slope, np.inf))
        down = np.argmax(np.where(falling, slope, -np.inf))
        if slope[down] - slope[up] <= ROUNDING * scale:
            break
        free = rising & falling
        if free.any():
            if go(free):
                continue
            multiplier = slope[free].mean()
            free[up if multiplier - slope[up] > slope[down] - multiplier else down] = True
        else:
            free[[up, down]] = True
        if not go(free):
            break
    return y, bound_states(y, lower, upper), iterations


# Certificate and projection


def _gap(program, y, residual):
    x, slope = y[:-1], residual[:-1]
    if program.upper is None:
        return 2 * float((slope - slope[slope.argmin()]).dot(x))
    return 2 * linear_gap(x, slope, program.lower[:-1], program.upper[:-1])


def linear_gap(x: Vector, slope: Vector, lower: Vector, upper: Vector) -> float:
    """slope . x - min slope . v over lower <= v <= upper of the same sum as `x`; never negative.

    The minimum is found by filling the entries to their upper bounds, from the least slope on. The
    gap is summed as (slope - multiplier) . (x - v), the multiplier being the slope of the entry at
    which the filling stops, so that no term is negative.
    """
    v = lower.copy()
    left = max(x.sum() - v.sum(), 0)
    order = np.argsort(slope)
    filled = np.cumsum((upper - lower)[order])
    v[order] += np.diff(np.minimum(filled, left), prepend=0)
    last = order[min(int(np.searchsorted(filled, left)), len(v) - 1)]
    return float(np.abs((slope - slope[last]) * (x - v)).sum())


def project_onto_simplex(y: Vector, lower: Vector, upper: Vector, total: float) -> Vector:
    """The point of {lower <= x <= upper, sum x = total} nearest to `y`: y shifted and clipped."""
    free, full = free_entries(y, lower, upper, lambda x: np.sum(x) - total)
    x = np.where(full, upper, lower)
    if free.any():
        x[free] = 0
        apart = y[free] - y[free][0]
        share = (total - math.fsum(x.tolist()) - math.fsum(apart.tolist())) / len(apart)
        x[free] = np.clip(apart + share, lower[free], upper[free])
    return mend_sum(x + 0.0, lower, upper, total)  # no -0.0


def free_entries(
    y: Vector, lower: Vector, upper: Vector, excess: Callable[[Vector], float]
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which entries of x = clip(y + shift, lower, upper) are free, and which at their upper bounds,
    with the shift at which `excess(x)`, nondecreasing in it, is 0.

    That shift lies between two of the 2 n at which an entry meets a bound: sorted, then bisected,
    O(n log n). Only differences of entries are taken, so that none is too large for the others to
    count. `lower` may be -inf and `upper` inf.
    """
    n, bounds = len(y), np.concatenate([lower, upper])
    order = np.argsort(bounds - np.tile(y, 2), kind="stable")
    rank = np.empty(2 * n, np.intp)
    rank[order] = np.arange(2 * n)
    enters, leaves = rank[:n], rank[n:]
    low = max(int(np.count_nonzero(bounds == -np.inf)) - 1, 0)
    high = int(np.count_nonzero(bounds < np.inf))
    while high - low > 1:
        middle = (low + high) // 2
        meets = order[middle]
        x = np.clip((y - y[meets % n]) + bounds[meets], lower, upper)
        low, high = (middle, high) if excess(x) < 0 else (low, middle)
    full = leaves <= low
    return (enters <= low) & ~full, full


def mend_sum(x: Vector, lower: Vector, upper: Vector, total: float) -> Vector:
    """`x` with the rounding error of its sum added to the entry farthest from its bounds."""
    i = np.minimum(x - lower, upper - x).argmax()
    x[i] = min(max(x[i] + (total - math.fsum(x.tolist())), lower[i]), upper[i])
    return x
