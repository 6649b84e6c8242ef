"""How many components? Held-out likelihood, and BIC beside it.

`gmm_fit.py --n_components auto` asks here: K grows through `CANDIDATES` until the mean
log-likelihood of a tenth of the training images, held out of the fits, has fallen twice; the best
of these K is then fitted to all of them. Test images have no part in it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from lib.report.tables import Table
from xp_gmm_source.config import CovarianceType, FitConfig

CANDIDATES = (1, 2, 5, 10, 20, 50, 100)
HELD_OUT = 0.1


class Candidate(NamedTuple):
    """`held_out`, `train`: mean log-likelihoods in nats per image; `bic` of the training part."""

    n_components: int
    held_out: float
    train: float
    bic: float
    seconds: float


def num_parameters(kind: CovarianceType, num_components: int, dimension: int, rank: int) -> int:
    """Free parameters of a mixture: means, weights (one less than K) and covariances; low_rank
    counts its loadings up to a rotation."""
    full = dimension * (dimension + 1) // 2
    loadings = dimension * rank - rank * (rank - 1) // 2
    covariances = {
        "full": num_components * full,
        "tied": full,
        "diag": num_components * dimension,
        "spherical": num_components,
        "low_rank": num_components * (loadings + dimension),
    }
    return covariances[kind] + num_components * dimension + num_components - 1


def bic(mean_log_likelihood: float, parameters: int, num_images: int) -> float:
    """-2 log L + parameters log n (Schwarz, 1978): less is better."""
    return -2 * num_images * mean_log_likelihood + parameters * math.log(num_images)


def select(
    config: FitConfig,
    images: np.ndarray,
    fit: Callable,
    *,
    numbers: Sequence[int] = CANDIDATES,
    mesh: Mesh | None = None,
) -> list[Candidate]:
    """Fits with every K until the held-out likelihood has fallen twice in a row. `fit` is
    `gmm_fit.fit_images`. Raises ValueError where there are too few images to hold some out."""
    num_held_out = int(HELD_OUT * len(images))
    if num_held_out < 1:
        raise ValueError(f"{len(images)} images are too few to hold {HELD_OUT:.0%} of them out")
    order = np.random.default_rng(config.random_state).permutation(len(images))
    held_out, kept = images[order[:num_held_out]], images[order[num_held_out:]]
    candidates: list[Candidate] = []
    for number in numbers:
        if number > len(kept):
            break
        one = dataclasses.replace(config, n_components=number)
        about = fit(one, kept, test_images=held_out, mesh=mesh).about
        train, parameters = about["log_likelihoods"][-1], num_parameters(
            config.covariance_type, number, about["dimension"], config.rank
        )  # fmt: skip
        candidates.append(
            Candidate(
                number, about["test_log_likelihood"], train, bic(train, parameters, len(kept)),
                about["seconds"],
            )
        )  # fmt: skip
        values = [candidate.held_out for candidate in candidates]
        if len(values) > 2 and values[-1] < values[-2] < values[-3]:
            break
    return candidates


def best(candidates: Sequence[Candidate]) -> int:
    """The K with the largest held-out likelihood, the least of equals."""
    return max(candidates, key=lambda candidate: candidate.held_out).n_components


def table(candidates: Sequence[Candidate], dimension: int) -> Table:
    rows = [
        [str(c.n_components), f"{c.held_out / dimension:.4f}", f"{c.train / dimension:.4f}",
         f"{c.bic:.4g}", f"{c.seconds:.1f}"]
        for c in candidates
    ]  # fmt: skip
    heads = ["K", "held out", "training images", "BIC", "seconds"]
    caption = "Mean log-likelihood in nats per dimension, BIC (less is better), time of the fit."
    return Table(heads, rows, caption)
