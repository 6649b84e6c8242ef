"""Gaussian mixtures by expectation-maximization, streamed: starts, steps, fits.

    moments = expectation(mixture, x)                  sums over rows: those of parts add up
    mixture, ridge = maximization(mixture, moments)
    mixture, info = em_step(mixture, x)                both

are pure functions of arrays, to be jitted by their caller, in the dtypes of their arguments: points
may be float32 beside a float64 mixture. `fit` is the driver for data of any size
(`lib.rows.Rows`): it adds up moments in float64 over chunks and devices and maximizes in
float64, whatever the dtype of the products. Responsibilities are never stored: beside the data a
fit holds O(K d^2 + K block_size d). Starts are in `lib.gmm.starts`.
"""

import gc
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, ScalarLike

from lib.gmm._mixture import Mixture, Prepared, cast, joint_log_densities, prepare
from lib.gmm.covariances import Full
from lib.numerics import as_sample
from lib.rows import Rows
from lib.rows.sums import sum_over_blocks, sum_over_rows
from lib.runs import Run
from lib.runs.loop import Chunk, fingerprint, run_steps, traced

NEGLIGIBLE = 1e-18
"""Responsibilities up to here count as 0."""


class Moments(NamedTuple):
    """Sums over weighted rows under a mixture; `first` and `second` are those of its structure."""

    weight: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    counts: Float[Array, " K"]
    first: PyTree
    second: PyTree


class StepInfo(NamedTuple):
    """Of the mixture before the step the mean log-likelihood in nats per point, of the data's
    weight each component's share times n, `counts` [K]; of the one after it the ridges [K]."""

    log_likelihood: Float[Array, ""]
    counts: Float[Array, " K"]
    ridge: Float[Array, " K"]


# One step


def block_moments(
    prepared: Prepared,
    points: Float[Array, "b d"],
    weights: Float[Array, " b"],
    given: Float[Array, "b K"] | None = None,
) -> Moments:
    """Moments of one block, with the mixture's responsibilities or those given."""
    joint, left = joint_log_densities(prepared, points)
    log_density = jax.nn.logsumexp(joint, axis=1)
    if given is None:
        given = jnp.exp(joint - log_density[:, None])
        # Less moves no sum and costs time: as a number too small to be normal, or as a row.
        given = jnp.where(given > NEGLIGIBLE, given, 0)
    shares = given.astype(points.dtype) * weights[:, None]
    first, second = prepared.covariance.moments(left, shares)
    # A row of weight 0 has no say, were its density 0.
    log_density = jnp.where(weights > 0, log_density, 0)
    log_likelihood = jnp.sum(weights * log_density)
    return Moments(jnp.sum(weights), log_likelihood, jnp.sum(shares, axis=0), first, second)


def expectation(
    mixture: Mixture,
    x: Float[Array, "n d"],
    weights: Float[Array, " n"] | None = None,
    *,
    block_size: int = 512,
) -> Moments:
    """The E-step: moments of the rows, each of weight 1 by default.

    Products are taken in the dtype of x, sums over blocks in that of the mixture. O(K n d^2)
    operations, O(K d^2 + K block_size d) memory. Raises ValueError as `lib.numerics.as_sample`.
    """
    x, weights = as_sample("x", x, weights)
    weights = jnp.ones(len(x), x.dtype) if weights is None else weights
    dtype = jnp.asarray(mixture.means).dtype
    prepared = prepare(mixture, x.dtype)
    return sum_over_blocks(
        block_moments, prepared, x, weights, dtype=x.dtype, total_dtype=dtype, block_size=block_size
    )


def maximization(
    mixture: Mixture,
    moments: Moments,
    *,
    regularization: ScalarLike = 1e-6,
    rounding: ScalarLike | None = None,
) -> tuple[Mixture, Float[Array, " K"]]:
    """The M-step from moments under `mixture`, and the ridges [K] that it had to add.

    `regularization` is added to every variance, as scikit-learn's reg_covar. A ridge is 0 but where
    a covariance is singular all the same (`lib.gmm._linalg.factorize`). A component that has
    lost all its points (a share below 10 eps) keeps its mean and covariance, at weight 0.

    `rounding` is the eps of the products that the moments are sums of, that of the moments
    themselves by default. A ridge is infinite where a mean moves by so many standard deviations
    (130 in float32) that rounding hides the covariance about it: that is kept as it was, and found
    by a further step. The ridge of no other covariance is infinite.
    """
    mixture = jax.tree.map(jnp.asarray, mixture)
    total = jnp.sum(moments.counts)
    eps = jnp.finfo(moments.counts.dtype).eps
    counts = jnp.where(moments.counts > 10 * eps * total, moments.counts, 0)
    means, covariance, ridge = mixture.covariance.m_step(
        mixture.means,
        counts,
        moments.first,
        moments.second,
        regularization,
        eps if rounding is None else rounding,
    )
    return Mixture(counts / jnp.sum(counts), means, covariance), ridge


def em_step(
    mixture: Mixture,
    x: Float[Array, "n d"],
    weights: Float[Array, " n"] | None = None,
    *,
    regularization: ScalarLike = 1e-6,
    block_size: int = 512,
) -> tuple[Mixture, StepInfo]:
    """One iteration of EM: `expectation`, then `maximization`."""
    moments = expectation(mixture, x, weights, block_size=block_size)
    mixture, ridge = maximization(
        mixture, moments, regularization=regularization, rounding=jnp.finfo(x.dtype).eps
    )
    return mixture, StepInfo(moments.log_likelihood / moments.weight, moments.counts, ridge)


# Fits


class FitResult(NamedTuple):
    """A fitted mixture, float64 on the host, and T iterations of history.

    `log_likelihoods[t]` is the training data's mean under the mixture before step t, as
    scikit-learn's lower_bounds_; `held_out[t]` the held-out data's, [T + 1], the last entry after
    the last step, or empty. `counts[t]` [K] are the weights that the components own in step t, and
    `ridges[t]` [K] what step t had to add to a singular covariance: 0 where nothing was repaired,
    infinity where it kept the covariance of a mean that moved too far (`maximization`).
    """

    mixture: Mixture
    converged: bool
    log_likelihoods: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray
    ridges: np.ndarray

    @property
    def repairs(self) -> list[str]:
        """What was repaired on the way, in words."""
        repairs = []
        kept = np.isinf(self.ridges)
        ridges = np.where(kept, 0, self.ridges)
        for k in np.flatnonzero(ridges.any(axis=0)):
            steps = np.flatnonzero(ridges[:, k])
            repairs.append(
                f"component {k}: a ridge of at most {ridges[:, k].max():.1e} was added to a "
                f"singular covariance in {len(steps)} steps, the last being step {steps[-1]}"
            )
        for k in np.flatnonzero(kept.any(axis=0)):
            steps = np.flatnonzero(kept[:, k])
            last = " and is not that of its points: take more steps" * bool(kept[-1, k])
            repairs.append(
                f"component {k}: its mean moved too far for the rounding of the products in "
                f"{len(steps)} steps, the last being step {steps[-1]}, where its covariance stayed "
                f"as it was{last}"
            )
        for k in np.flatnonzero(np.asarray(self.mixture.weights) == 0):
            repairs.append(
                f"component {k} lost all its points: it has weight 0 and its last shape "
                "(lib.gmm.without_empty leaves it out)"
            )
        return repairs


def mean_log_likelihood(mixture: Mixture, data: Rows) -> float:
    """The weighted mean of log p(x) over rows, in nats per point."""
    with jax.enable_x64(True):
        prepared = prepare_jit(cast(mixture, jnp.float64), data.dtype)
        weight, total = sum_over_rows(_block_log_likelihood, prepared, data)
        return float(total / weight)


def fit(
    data: Rows,
    start: Mixture,
    *,
    held_out: Rows | None = None,
    regularization: float = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    run: Run | None = None,
    show_progress: bool = True,
    description: str = "EM",
) -> FitResult:
    """EM from `start` until the mean log-likelihood moves by less than `tolerance` nats per point.

    Args:
      data: the rows, and how they are read and where.
      start: from `lib.gmm.starts`, or `lib.gmm.from_sklearn`.
      held_out: rows that decide instead of the training data: the fit ends when a step gains less
        than `tolerance` on them, with the better of the mixtures before and after it.
      regularization: added to every variance, in the squared units of the data (reg_covar).
      run: a run folder to save into and, if it holds a checkpoint, to resume from, to the same
        bits. SIGINT and SIGTERM then save after the iteration and raise `Interrupted`.

    Full covariances cost 4 n d^2 K operations per iteration, of which panels save 3/8 at most, and
    about 7 d^3 K in float64.

    Warns where a full covariance has fewer points than dimensions: only the regularization
    then decides the density off their span.

    Raises:
      ValueError: more components than points, other dimensions, bad options; before any work.
      FloatingPointError: NaN or infinity on the way.
      RunFileError: the folder's checkpoint is of another start, other data or options.
    """
    _check_fit(data, held_out, start, regularization, tolerance, max_iterations)
    (num_components, d), is_full = start.means.shape, isinstance(start.covariance, Full)
    present = np.count_nonzero(data.weights)
    crowded = is_full and present <= num_components * d
    if crowded:
        points = f"{present} points for {num_components} full covariances in {d} dimensions"
        _warn_singular(f"{points}: at least one")
    log_likelihoods = np.full(max_iterations, np.nan)
    held_outs = np.full(max_iterations + 1, np.nan)
    counts, ridges = np.full((2, max_iterations, num_components), np.nan)

    def history(done: int) -> dict[str, np.ndarray]:
        return {
            "log_likelihoods": log_likelihoods[:done],
            "held_out": held_outs[: done + 1 if held_out else 0],
            "counts": counts[:done],
            "ridges": ridges[:done],
        }

    def converged(done: int) -> bool:
        if held_out:
            return done > 0 and not held_outs[done] - held_outs[done - 1] >= tolerance
        if done < 2 or np.isinf(ridges[done - 1]).any():  # a covariance waits for the next step
            return False
        return bool(abs(log_likelihoods[done - 1] - log_likelihoods[done - 2]) < tolerance)

    def advance(mixture: Mixture, done: int, size: int) -> Chunk:
        if held_out and done == 0:
            held_outs[0] = mean_log_likelihood(mixture, held_out)
        # Of held-out data the better of two mixtures is kept.
        following, info = _iterate(mixture, data, regularization, keep=held_out is not None)
        log_likelihoods[done] = _finite(following, float(info.log_likelihood), done)
        counts[done], ridges[done] = info.counts, info.ridge
        shown = {"log_likelihood": log_likelihoods[done]}
        if held_out:
            held_outs[done + 1] = mean_log_likelihood(following, held_out)
            shown["held_out"] = held_outs[done + 1]
        worse = held_out and not held_outs[done + 1] >= held_outs[done]
        return Chunk(mixture if worse else following, shown)

    started_from = fingerprint(start) if run else None
    with jax.enable_x64(True):
        states = [jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float64), start)]
        del start  # at d = 3072 it is a third of what a fit holds, unless the caller keeps it
        gc.collect()  # jaxlib lets go of what it borrowed from numpy when garbage is collected
        mixture, done = run_steps(
            advance,
            states.pop(),
            max_iterations,
            run=run,
            identity=lambda: {
                "start": started_from,
                "data": _identity(data),
                "held-out data": held_out and _identity(held_out),
                "regularization": regularization,
                "tolerance": tolerance,
                "max_iterations": max_iterations,
            },
            history=history,
            place=partial(cast, dtype=jnp.float64),
            converged=converged,
            max_chunk=1,
            show_progress=show_progress,
            description=description,
        )
        mixture = jax.tree.map(np.asarray, jax.device_get(mixture))
    least = np.min(counts[done - 1], where=counts[done - 1] > 0, initial=np.inf)
    if is_full and not crowded and least <= d:
        points = f"a component owns {least:.1f} points in {d} dimensions"
        _warn_singular(f"{points}: its full covariance")
    return FitResult(mixture, converged(done), **history(done))


prepare_jit = jax.jit(prepare, static_argnums=1)
maximize_jit = jax.jit(maximization)
maximize_in_place = jax.jit(maximization, donate_argnums=0)


def _iterate(
    mixture: Mixture, data: Rows, regularization: float, *, keep: bool = True
) -> tuple[Mixture, StepInfo]:
    """`em_step` over rows; unless `keep`, the new mixture takes the memory of the old one."""
    moments = sum_over_rows(block_moments, prepare_jit(mixture, data.dtype), data)
    maximize = maximize_jit if keep else maximize_in_place
    rounding = float(np.finfo(data.dtype).eps)
    mixture, ridge = maximize(mixture, moments, regularization=regularization, rounding=rounding)
    return mixture, StepInfo(moments.log_likelihood / moments.weight, moments.counts, ridge)


def _block_log_likelihood(prepared, points, weights):
    log_density = jax.nn.logsumexp(joint_log_densities(prepared, points)[0], axis=1)
    return jnp.sum(weights), jnp.sum(weights * jnp.where(weights > 0, log_density, 0))


def _finite(mixture: Mixture, log_likelihood: float, step: int) -> float:
    if not np.isfinite(log_likelihood):
        raise FloatingPointError(
            f"the log-likelihood is {log_likelihood} in step {step} (from 0): the transform "
            "makes NaN or infinity of the data, or they lie beyond what their dtype holds"
        )
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(mixture)):
        raise FloatingPointError(f"step {step} (from 0) made NaN or infinity: scale the data")
    return log_likelihood


def _warn_singular(which: str) -> None:
    """To the caller of `fit`."""
    advice = "singular except for the regularization; use tied, diagonal or low_rank"
    warnings.warn(f"{which} is {advice}", stacklevel=3)


def check_num_components(data: Rows, num_components: int) -> None:
    """Raises ValueError unless there are from one to as many as points of positive weight."""
    present = np.count_nonzero(data.weights)
    if not 1 <= num_components <= present:
        raise ValueError(f"{num_components} components, but {present} points of positive weight")


def _check_fit(data, held_out, start, regularization, tolerance, max_iterations) -> None:
    num_components, d = start.means.shape
    check_num_components(data, num_components)
    for name, rows in (("the data", data), ("the held-out data", held_out)):
        if rows is not None and rows.shape[1] != d:
            raise ValueError(f"{name} have dimension {rows.shape[1]}, the start {d}")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(start)):
        raise ValueError("the start holds NaN or infinity")
    if not 0 <= regularization < np.inf:
        raise ValueError(f"regularization must be >= 0 and finite, got {regularization}")
    if not tolerance >= 0 or max_iterations < 1:
        raise ValueError(
            f"tolerance must be >= 0 and max_iterations >= 1: {tolerance}, {max_iterations}"
        )


def _identity(data: Rows) -> dict[str, Any]:
    """What is hashed of rows: of a transform its program, of devices their number."""
    transform = data.transform
    if transform is not None:
        transform = traced(transform, jax.ShapeDtypeStruct((1, *data.x.shape[1:]), data.dtype))
    return {
        "x": data.x,
        "weights": data.weights,
        "transform": transform,
        "dtype": data.dtype,
        "block_size": data.block_size,
        "chunk_size": data.chunk_size,
        "num_devices": len(data.devices),
    }
