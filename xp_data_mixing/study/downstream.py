"""A classifier trained on images drawn from estimated and other mixtures, for one target."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from lib.networks import MLP, classification, optimizers
from xp_data_mixing.calibration import host_rng, total_variation
from xp_data_mixing.gradient_embeddings import class_counts, images_and_labels
from xp_data_mixing.mixing import Estimator, Kernel, estimate
from xp_data_mixing.study import problems
from xp_data_mixing.study.config import DownstreamConfig

MIXTURES = ("uniform", "size-proportional", "estimate()", "whitened", "auto", "oracle")

ESTIMATORS: tuple[Estimator, ...] = ("rff", "whitened", "auto")


def unequal_sizes(key: Key[Array, ""], config: DownstreamConfig, num_sources: int) -> list[int]:
    """Geometric from largest to smallest, in random order."""
    sizes = np.rint(np.geomspace(config.largest, config.smallest, num_sources)).astype(int)
    return host_rng(key).permutation(sizes).tolist()


def draw_from(
    key: Key[Array, ""], sources: list[np.ndarray], weights: np.ndarray, count: int
) -> Int[np.ndarray, " count"]:
    """`count` entries of the sources in the shares `weights`; a source is repeated whole before any
    of its entries comes once more."""
    rng = host_rng(key)
    chosen = []
    for members, wanted in zip(sources, class_counts(weights, count)):
        rounds = -(-int(wanted) // len(members))
        orders = [rng.permutation(members) for _ in range(rounds)]
        chosen.append(np.concatenate([*orders, members[:0]])[:wanted])
    return np.concatenate(chosen)


def evaluate(
    network: MLP, parameters: Any, images: Array, labels: Array, weights: Float[np.ndarray, " N"]
) -> tuple[float, float]:
    """(cross-entropy, accuracy) on classes in the shares `weights`: means over each class's images,
    weighted. Raises ValueError for a class of positive weight without an image."""
    losses, hits = map(np.asarray, _losses_and_hits(network, parameters, images, labels))
    labels, total = np.asarray(labels), np.zeros(2)
    for label, weight in enumerate(weights):
        members = labels == label
        if weight > 0 and not members.any():
            raise ValueError(f"class {label} has the weight {weight} and no image to evaluate on")
        if weight > 0:
            total += weight * np.array([losses[members].mean(), hits[members].mean()])
    return float(total[0]), float(total[1])


@partial(jax.jit, static_argnames="network")
def _losses_and_hits(network, parameters, images, labels):
    logits = network.apply(parameters, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=1) == labels


def compare(config: DownstreamConfig, seed: int, data_root: Path | None = None) -> dict[str, Any]:
    """For each of `MIXTURES` [M]: weights [M, N], their total variation tv [M], and cross-entropy
    loss and accuracy [M] of a network trained on as many images in as many steps, from one start.

    Evaluated on images in neither sources nor the target's sample, weighted as the target's classes
    are.
    """
    splits = problems.load(config.samples, data_root)
    keys = jax.random.split(jax.random.key(seed), 7)
    size_key, source_key, mixture_key, target_key, estimate_key, draw_key, network_key = keys
    num_sources = splits.num_classes
    sizes = unequal_sizes(size_key, config, num_sources)
    sources = problems.draw_sources(source_key, splits, sizes)
    mixture = problems.draw_mixture(mixture_key, num_sources)
    dataset, target, truth = problems.draw_target(target_key, splits, mixture, sources)
    rest = np.setdiff1d(np.arange(len(dataset.labels)), target)
    if config.samples.target_from == "rest":
        rest = np.setdiff1d(rest, np.concatenate(sources))

    rows = [problems.pixels(splits.train, images) for images in sources]
    target_rows = problems.pixels(dataset, target)
    mixtures = (
        np.full(num_sources, 1 / num_sources),
        np.array(sizes) / sum(sizes),
        *(
            estimate(
                estimate_key,
                rows,
                target_rows,
                kernel=Kernel(
                    estimator=estimator, num_features=config.num_features, check_features=0
                ),
            ).weights
            for estimator in ESTIMATORS
        ),
        truth,
    )
    network = MLP(num_classes=num_sources, hidden=(config.hidden,))
    images = images_and_labels(dataset, rest)
    losses, accuracies = [], []
    for weights in mixtures:
        chosen = draw_from(draw_key, sources, weights, config.num_images)
        parameters, _ = classification.train(
            network_key,
            network,
            *images_and_labels(splits.train, chosen),
            optimizer=optimizers.adam(config.learning_rate),
            num_epochs=config.num_epochs,
        )
        loss, accuracy = evaluate(network, parameters, *images, truth)
        losses.append(loss)
        accuracies.append(accuracy)
    return {
        "names": np.array(MIXTURES),
        "weights": np.stack(mixtures),
        "tv": total_variation(np.stack(mixtures), truth[None]),
        "loss": np.array(losses),
        "accuracy": np.array(accuracies),
        "sizes": np.array(sizes),
    }
