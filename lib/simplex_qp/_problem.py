"""The problem of mixing weights: a quadratic over the simplex with bounds and penalties.

    min_w  |sum_i w_i mu_i - mu_Q|^2 + ridge |w|^2 + penalty(w | p)
    over   w_1 + ... + w_N = 1,  lower <= w <= upper

which is MMD^2 between a mixture of N domains and a target, with an optional penalty towards prior
weights p: l2_penalty |w - p|^2, or kl_penalty sum_i w_i log(w_i / p_i), or both. With A = (mu_i .
mu_j) and b = (mu_i . mu_Q) its first term is w'Aw - 2 b'w + |mu_Q|^2, which on the simplex is w'Gw
with the centered G = A - b1' - 1b' + |mu_Q|^2 11' = CC', C = M - mu_Q: its condition number is far
smaller, and it yields MMD^2 without cancellation. Everything here is float64 NumPy.

The certificate of any weights is the Frank-Wolfe gap: by convexity g . w - min_v g . v over the
feasible v, g the gradient at w, bounds how far the objective at w lies above its minimum. The KL
penalty, whose gradient is infinite at 0, is not linearized in it: see `_entropic`.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.linalg.lapack import dsyevd
from scipy.special import rel_entr

from lib.simplex_qp._active_set import (
    Program,
    Vector,
    linear_gap,
    make_program,
    project_onto_simplex,
)
from lib.simplex_qp._entropic import entropic_gap

# Sums given from outside (priors, bounds, weights) may be off by this much.
SUM_TOLERANCE = 1e-6
EPSILON = float(np.finfo(np.float64).eps)
# Asymmetry that float32 rounding explains, as a share of the largest entry.
ASYMMETRY = 1e-5


class Quadratic(NamedTuple):
    """w'Gw [N, N], the squared distance of a mixture to the target, and G's extreme eigenvalues.

    `factor` is C [N, D] with G = CC', None where only G is known.
    """

    gram: Float[np.ndarray, "n n"]
    factor: Float[np.ndarray, "n d"] | None
    smallest_eigenvalue: float
    largest_eigenvalue: float


class Problem(NamedTuple):
    """What `make_problem` makes.

    `program` has H = G + (ridge + l2_penalty + diagonal_shift) I and c = l2_penalty p; upper bounds
    are infinite where the sum implies them. `diagonal_shift` >= 0 is what was missing for H to be
    positive semidefinite. `condition` is that of H, infinite where H is singular to rounding error.
    """

    program: Program
    quadratic: Quadratic
    prior: Vector | None
    ridge: float
    l2_penalty: float
    kl_penalty: float
    diagonal_shift: float
    condition: float

    @property
    def size(self) -> int:
        """N."""
        return len(self.quadratic.gram)

    @property
    def hessian(self) -> Float[np.ndarray, "n n"]:
        return self.program.saddle[:-1, :-1]

    @property
    def linear(self) -> Vector:
        return self.program.right[:-1]

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        """Lower and upper bounds, 0 and infinite where there are none."""
        return self.program.lower[:-1], self.program.upper_bounds()[:-1]

    @property
    def scale(self) -> float:
        """max_i H_ii, the worst single domain's objective: what gaps are relative to.

        A domain f times as far from the target as the others costs them f^2 in relative accuracy.
        """
        return self.program.scale


# Making problems


def from_means(means: ArrayLike, target_mean: ArrayLike) -> Quadratic:
    """G = CC' with C = M - mu_Q, of mean embeddings M [N, D] and mu_Q [D], in float64.

    Raises ValueError on shapes that do not fit and on values that are not finite.
    """
    means, target_mean = np.asarray(means, np.float64), np.asarray(target_mean, np.float64)
    if means.ndim != 2 or 0 in means.shape or target_mean.shape != means.shape[1:]:
        raise ValueError(
            f"means must be [N, D] and the target's [D], got {means.shape} and {target_mean.shape}"
        )
    _check_finite("means", means)
    _check_finite("the target's mean", target_mean)
    factor = means - target_mean
    gram = factor.dot(factor.T)
    # The other product has the same eigenvalues other than 0.
    wide = factor.shape[0] <= factor.shape[1]
    smallest, largest = _extreme_eigenvalues(gram if wide else factor.T.dot(factor))
    return Quadratic(gram, factor, max(smallest, 0.0) if wide else 0.0, max(largest, 0.0))


def from_gram(gram: ArrayLike, cross: ArrayLike, target_square: ArrayLike) -> Quadratic:
    """G = A - b1' - 1b' + |mu_Q|^2 11' from A = `gram` [N, N], b = `cross` [N], `target_square`.

    A diagonal corrected for its bias (U-statistics) may leave G indefinite: `make_problem` then
    shifts its diagonal. Raises ValueError on shapes that do not fit, on values that are not finite,
    and where A is not symmetric up to float32 rounding; asymmetry below that is averaged out.
    """
    gram, cross = np.asarray(gram, np.float64), np.asarray(cross, np.float64)
    target_square = np.asarray(target_square, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.size == 0:
        raise ValueError(f"the Gram matrix must be square, got shape {gram.shape}")
    if cross.shape != gram.shape[:1] or target_square.shape != ():
        raise ValueError(
            f"for a Gram matrix of shape {gram.shape} the products with the target must be "
            f"[{len(gram)}] and its square a number, got {cross.shape} and {target_square.shape}"
        )
    _check_finite("the Gram matrix", gram)
    _check_finite("the products with the target", cross)
    _check_finite("the target's square", target_square)
    asymmetry = np.abs(gram - gram.T)
    if asymmetry.max() > ASYMMETRY * np.abs(gram).max():
        i, j = np.unravel_index(np.argmax(asymmetry), gram.shape)
        raise ValueError(
            f"the Gram matrix is not symmetric: {gram[i, j]} at ({i}, {j}) but {gram[j, i]} across"
        )
    gram = (gram + gram.T) / 2 - cross[:, None] - cross[None, :] + target_square
    return Quadratic(gram, None, *_extreme_eigenvalues(gram))


def _extreme_eigenvalues(symmetric):
    """Without the overhead of NumPy's; workspace for blocks of 64."""
    eigenvalues, _, failed = dsyevd(symmetric.T, 0, 1, 66 * len(symmetric))
    if failed or not np.isfinite(eigenvalues[-1]):
        raise ValueError("the squared distances of the means to the target's overflow float64")
    return float(eigenvalues[0]), float(eigenvalues[-1])


def make_problem(
    quadratic: Quadratic,
    *,
    ridge: ArrayLike = 0.0,
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    prior: ArrayLike | None = None,
    l2_penalty: ArrayLike = 0.0,
    kl_penalty: ArrayLike = 0.0,
) -> Problem:
    """The problem of the module. `lower` (0) and `upper` (1) bounds are [N] or one number for all.

    `prior` [N] is nonnegative, of sum 1, and needed for either penalty; with kl_penalty its zeros
    are zeros of w. Raises ValueError on a negative or infinite ridge or penalty, on a bad prior and
    where no weights meet the bounds.
    """
    n = len(quadratic.gram)
    ridge = _check_strength("ridge", ridge)
    l2_penalty = _check_strength("l2_penalty", l2_penalty)
    kl_penalty = _check_strength("kl_penalty", kl_penalty)
    if prior is not None:
        prior = _check_prior(np.asarray(prior, np.float64), n)
    elif l2_penalty or kl_penalty:
        raise ValueError(f"l2_penalty {l2_penalty} and kl_penalty {kl_penalty} need a prior")
    bounds = None
    if lower is not None or upper is not None or (kl_penalty and not np.all(prior)):
        bounds = _check_bounds(lower, upper, prior if kl_penalty else None, n)
    diagonal = ridge + l2_penalty
    smallest, largest = quadratic.smallest_eigenvalue, quadratic.largest_eigenvalue
    rounding = n * EPSILON * max(abs(smallest), abs(largest))
    missing = -(smallest + diagonal)
    diagonal_shift = missing if missing > rounding else 0.0
    hessian = quadratic.gram.copy()
    hessian.flat[:: n + 1] += diagonal + diagonal_shift
    smallest, largest = diagonal_shift - missing, largest + diagonal + diagonal_shift
    condition = largest / smallest if smallest > rounding else np.inf
    program = make_program(hessian, np.zeros(n) if prior is None else l2_penalty * prior, bounds)
    return Problem(
        program, quadratic, prior, ridge, l2_penalty, kl_penalty, diagonal_shift, condition
    )


def _check_finite(name, array):
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} must be finite, got {array[tuple(where)]} at {where}")


def _check_strength(name, value):
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must lie in [0, inf), got {value}")
    return float(value)


def _check_prior(prior, n):
    if prior.shape != (n,):
        raise ValueError(f"the prior must be [{n}], got shape {prior.shape}")
    _check_finite("the prior", prior)
    if prior.min() < 0:
        raise ValueError(f"the prior of domain {prior.argmin()} is negative: {prior.min()}")
    if abs(prior.sum() - 1) > SUM_TOLERANCE:
        raise ValueError(f"the prior must sum to 1, got {prior.sum()}")
    return prior / prior.sum()


def _check_bounds(lower, upper, prior, n):
    """The bounds [N], upper ones infinite where lower ones and the sum imply them; None for none.

    Where they leave but one point, up to rounding in their sums, both are moved on to it.
    """
    bounds = []
    for name, given, default in (("lower", lower, 0.0), ("upper", upper, np.inf)):
        bound = np.asarray(default if given is None else given, np.float64)
        if bound.shape not in ((), (n,)):
            raise ValueError(f"{name} bounds must be a number or [{n}], got shape {bound.shape}")
        if not (bound >= 0).all():
            wrong = bound.ravel()[np.argmin(bound >= 0)]
            raise ValueError(f"{name} bounds must not be negative or NaN, got {wrong}")
        bounds.append(np.broadcast_to(bound, n))
    lower, upper = bounds
    if prior is not None:
        wrong = (prior == 0) & (lower > 0)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"domain {i} has a lower bound of {lower[i]} but, with kl_penalty, a prior of 0"
            )
        upper = np.where(prior == 0, 0.0, upper)
    wrong = lower > upper
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"the lower bound of domain {i} is above its upper one: {lower[i]} > {upper[i]}"
        )
    least, most = lower.sum(), upper.sum()
    if least > 1 + SUM_TOLERANCE:
        raise ValueError(f"no weights of sum 1: the lower bounds (floors) sum to {least}")
    if most < 1 - SUM_TOLERANCE:
        raise ValueError(f"no weights of sum 1: the upper bounds (caps) sum to {most}")
    if least > 1 - 1e-12 or most < 1 + 1e-12:
        point = lower / least if least > 1 - 1e-12 else upper / most
        point[np.argmax(point)] += 1 - math.fsum(point.tolist())
        return point, point
    upper = np.where(upper >= 1 - (least - lower), np.inf, upper)
    return (lower, upper) if lower.any() or np.isfinite(upper).any() else None


# Values and certificates


def mmd_squared(problem: Problem, weights: Vector) -> float:
    """|sum_i w_i mu_i - mu_Q|^2; from a Gram matrix w'Gw, of any sign."""
    factor = problem.quadratic.factor
    if factor is None:
        return float(weights.dot(problem.quadratic.gram.dot(weights)))
    difference = weights.dot(factor)
    return float(difference.dot(difference))


def penalties(problem: Problem, weights: Vector) -> float:
    """(ridge + diagonal_shift) |w|^2 and the penalties towards the prior."""
    value = (problem.ridge + problem.diagonal_shift) * float(weights.dot(weights))
    if problem.l2_penalty:
        value += problem.l2_penalty * float(np.square(weights - problem.prior).sum())
    if problem.kl_penalty:
        value += problem.kl_penalty * float(rel_entr(weights, problem.prior).sum())
    return value


def objective(problem: Problem, weights: Vector) -> float:
    """mmd_squared + penalties: the module's objective, with the diagonal shift."""
    return mmd_squared(problem, weights) + penalties(problem, weights)


def frank_wolfe_gap(problem: Problem, weights: Vector) -> float:
    """A bound on objective(weights) - minimum, for feasible weights from anywhere.

    Raises ValueError where they miss the sum or a bound by more than `SUM_TOLERANCE`; see
    `nearest_weights`.
    """
    lower, upper = problem.bounds
    missed = max(abs(weights.sum() - 1), (lower - weights).max(), (weights - upper).max())
    if not missed <= SUM_TOLERANCE:
        raise ValueError(f"the weights miss their sum or a bound by {missed}")
    slope = 2 * (problem.hessian.dot(weights) - problem.linear)
    if not problem.kl_penalty:
        return linear_gap(weights, slope, lower, upper)
    kept, penalty = domains_kept(problem)
    return entropic_gap(weights[kept], slope[kept], *penalty)


def domains_kept(problem: Problem) -> tuple[np.ndarray, tuple[Vector, float, Vector, Vector]]:
    """Indices of the domains that kl_penalty and upper bounds allow a weight, and the penalty's
    prior and strength and the bounds of these."""
    assert problem.prior is not None  # `make_problem` refuses kl_penalty without
    lower, upper = problem.bounds
    kept = np.flatnonzero((problem.prior > 0) & (upper > 0))
    return kept, (problem.prior[kept], problem.kl_penalty, lower[kept], upper[kept])


def nearest_weights(problem: Problem, weights: ArrayLike) -> Vector:
    """The feasible weights nearest to `weights`, such as those of a solver with tolerances."""
    return project_onto_simplex(np.asarray(weights, np.float64), *problem.bounds, 1.0)
