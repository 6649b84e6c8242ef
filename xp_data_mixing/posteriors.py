"""Posteriors of the sources: which source a row is from, by classifiers that have not seen the row.

Multinomial logistic regression on random Fourier features, in which every source counts the same
whatever its size, so that posteriors are those of a uniform prior. Of K classifiers each leaves a
K-th of the rows out (cross-fitting). A row that trained some is given to the one that it did not
train; any other row, the target's too, to all K, whose posteriors are averaged. Given the
classifiers, the mean of the target's posteriors is then on average the same mixture of the sources'
means as the target is of the sources: what weights are estimated from, by least squares as from
any other features (adjusted counts: Forman, Quantifying counts and costs via classification, 2008;
with posteriors: Bella et al., Quantification via probability estimators, ICDM 2010).

How precise that is depends on the prior. Under the target's own weights w the posteriors
w_i p_i(x) / sum_j w_j p_j(x) are the derivatives of the log-likelihood of w (times w_i), the most
precise features there are; so a first estimate is their prior (`UNIFORM_SHARE` of it uniform).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from lib.numerics import product
from xp_data_mixing.whitening import Spectrum, spectrum, whitened_weights

FOLDS = 5
UNIFORM_SHARE = 0.1
"""Share of the uniform prior in the target's estimated one: posteriors of a prior near 0 tell
nothing."""
BOUND_ROWS = 4000
"""Rows that the bound is taken from, at most."""
NUM_STEPS = 25
"""Of L-BFGS; 25 more change the penalized loss by less than .003."""


class Classifiers(NamedTuple):
    """Logits z'W_k + b_k of the features z under a uniform prior.

    weights [K, F, N], biases [K, N]
    """

    weights: Float[Array, "K F N"]
    biases: Float[Array, "K N"]

    def logits(self, features: Float[Array, "n F"]) -> Float[Array, "K n N"]:
        return jax.vmap(lambda w, b: product(features, w) + b[None, :])(self.weights, self.biases)

    def posteriors(self, features: Float[Array, "n F"], prior: Float[Array, " N"]):
        """Their mean over the classifiers, [n, N]."""
        logits = self.logits(features) + jnp.log(prior)[None, None, :].astype(features.dtype)
        return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=0)


@partial(jax.jit, static_argnames=("num_sources", "num_steps"))
def fit_classifiers(
    features: Float[Array, "n F"],
    labels: Int[Array, " n"],
    weights: Float[Array, "K n"],
    ridges: Float[Array, " K"],
    *,
    num_sources: int,
    num_steps: int = NUM_STEPS,
) -> Classifiers:
    """K multinomial logistic regressions, one for each row of `weights` and its ridge:

        min  sum_i v_i cross_entropy(z_i'W + b, label_i) / sum_i v_i + ridge / 2 |W|^2

    by `num_steps` of L-BFGS from 0, in coordinates in which Boehning's bound on the Hessian (1992)
    is the identity: without them steps would be ten times as many.
    """
    n, size = features.shape
    dtype = features.dtype
    mean = jnp.mean(features, axis=0)
    centered = features - mean[None, :]
    targets = jax.nn.one_hot(labels, num_sources, dtype=dtype)
    some = centered[:: -(-n // BOUND_ROWS)]
    bound = product(some.T, some) / (2 * len(some))

    # A preconditioner only: in float32 a smaller ridge could leave it indefinite.
    damping = jnp.maximum(jnp.min(ridges), 1e-5).astype(dtype)
    root = jnp.linalg.cholesky(bound + damping * jnp.eye(size, dtype=dtype))

    def original(w):
        return solve_triangular(root.T, w, lower=False)

    count = len(weights)
    shares = (weights / jnp.sum(weights, axis=1, keepdims=True)).T

    # One problem of all of them, so that each step reads the features once.
    def loss(parameters):
        w, b = original(parameters[0]), parameters[1]
        logits = (product(centered, w) + b[None, :]).reshape(n, count, num_sources)
        losses = optax.softmax_cross_entropy(logits, targets[:, None, :])
        squares = jnp.sum(jnp.square(w).reshape(size, count, num_sources), axis=(0, 2))
        return jnp.sum(shares * losses) + jnp.sum(ridges * squares) / 2

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry, _):
        parameters, state = carry
        value, grad = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(
            grad, state, parameters, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(parameters, updates), state), value

    columns = count * num_sources
    start = jnp.zeros((size, columns), dtype), jnp.zeros(columns, dtype)
    (w, b), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=num_steps)[0]
    w = original(w)
    b = (b - mean @ w).reshape(count, num_sources)
    return Classifiers(jnp.swapaxes(w.reshape(size, count, num_sources), 0, 1), b)


def balanced(labels: Int[np.ndarray, " n"], num_sources: int) -> Float[np.ndarray, " n"]:
    """Weights of rows by which every source has the same, of mean 1; float32."""
    counts = np.bincount(labels, minlength=num_sources)
    return (len(labels) / num_sources / np.maximum(counts, 1))[labels].astype(np.float32)


def random_folds(rng: np.random.Generator, sizes: Sequence[int]) -> Int[np.ndarray, " n"]:
    """A fold 0, ..., `FOLDS` - 1 for each row of each source, as equal in number as can be."""
    return np.concatenate([rng.permutation(np.arange(size) % FOLDS) for size in sizes])


def cross_fitted(
    rng: np.random.Generator, sources: Sequence[Float[np.ndarray, "n F"]], ridge: float
) -> tuple[Classifiers, list[Float[np.ndarray, "n N"]]]:
    """(`FOLDS` classifiers, the k-th without the rows of fold k; calibrated logits of each source's
    rows, each by the one that it did not train.) `ridge` is divided by the number of rows."""
    sizes, num_sources = [len(rows) for rows in sources], len(sources)
    features, labels = np.concatenate(sources), np.repeat(np.arange(num_sources), sizes)
    folds, weights = random_folds(rng, sizes), balanced(labels, num_sources)
    kept = weights[None, :] * (folds[None, :] != np.arange(FOLDS)[:, None])
    ridges = np.full(FOLDS, ridge / len(labels), np.float32)
    classifiers = fit_classifiers(features, labels, kept, ridges, num_sources=num_sources)
    own = logits(classifiers, features)[folds, np.arange(len(labels))]
    scale, shift = calibration(own, labels, weights)
    calibrated = Classifiers(
        classifiers.weights * np.float32(scale),
        classifiers.biases * np.float32(scale) + shift.astype(np.float32)[None, :],
    )
    return calibrated, np.split(own * scale + shift, np.cumsum(sizes)[:-1])


def logits(
    classifiers: Classifiers, features: Float[np.ndarray, "n F"]
) -> Float[np.ndarray, "K n N"]:
    """On the host, float64."""
    return np.asarray(_logits(classifiers, features)).astype(np.float64)


_logits = jax.jit(Classifiers.logits)


def calibration(
    logits: Float[np.ndarray, "n N"],
    labels: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> tuple[float, Float[np.ndarray, " N"]]:
    """(s, c) by which softmax(s logits + c) has the least cross-entropy, of logits out of fold:
    bias-corrected temperature scaling (Alexandari, Kundaje and Shrikumar, Maximum likelihood with
    bias-corrected calibration is hard-to-beat at label shift adaptation, ICML 2020)."""
    weights, rows = weights / weights.sum(), np.arange(len(labels))

    def loss(parameters):
        scale = np.exp(parameters[0])
        scores = log_softmax(logits * scale + parameters[1:], axis=1)
        errors = np.exp(scores)
        errors[rows, labels] -= 1
        by_scale = scale * weights @ (errors * logits).sum(axis=1)
        return -weights @ scores[rows, labels], np.append(by_scale, weights @ errors)

    # Where sources are told apart without an error the best scale is infinite.
    bounds = [(-3.0, 3.0), *[(None, None)] * logits.shape[1]]
    start = np.zeros(1 + logits.shape[1])
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(best[0])), best[1:]


def log_loss(logits, labels, weights) -> float:
    """Mean cross-entropy of the rows, weighted."""
    scores = log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return float(-weights @ scores / weights.sum())


def with_prior(
    logits: Float[np.ndarray, "*n N"], prior: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "*n N"]:
    """Posteriors under a prior in place of the uniform one."""
    return softmax(logits + np.log(prior), axis=-1)


def mean_posteriors(
    logits: Float[np.ndarray, "K n N"], prior: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Over classifiers and rows."""
    return with_prior(logits, prior).mean(axis=(0, 1))


def weights_and_prior(
    own: Sequence[Float[np.ndarray, "n N"]],
    target_mean: Callable[[Float[np.ndarray, " N"]], Float[np.ndarray, " N"]],
    damping: float,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"], Spectrum]:
    """(Weights, the prior of the posteriors that they are from, the sources' moments in them.)

    `own` are logits of each source's rows out of fold, `target_mean` gives the target's mean
    posteriors under a prior. The prior is a first estimate, from posteriors of a uniform one,
    moved towards that.
    """
    weights = np.full(len(own), 1 / len(own))
    for _ in range(2):
        prior = (1 - UNIFORM_SHARE) * weights + UNIFORM_SHARE / len(own)
        known = spectrum([with_prior(logits, prior) for logits in own])
        weights = whitened_weights(known, target_mean(prior) @ known.basis, damping)
    return weights, prior, known
