"""Sources and targets of known mixtures: classes of images, as pixels or as projected gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from lib import datasets
from lib.networks import MLP, classification, optimizers
from xp_data_mixing.calibration import host_rng
from xp_data_mixing.gradient_embeddings import (
    class_counts,
    cross_entropy,
    images_and_labels,
    project_gradients,
    projected_batches,
)
from xp_data_mixing.study.config import Samples

DIMENSION = 512  # of projected gradients

Embedding = Callable[[datasets.Dataset, np.ndarray], Float[np.ndarray, "n d"]]
"""Rows of the images of a data set at some indices."""


class Splits(NamedTuple):
    """Both splits, where targets are drawn, and what they are drawn like."""

    train: datasets.Dataset
    test: datasets.Dataset
    samples: Samples

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)


class Drawn(NamedTuple):
    """Sources [n_i, d], targets [m, d] and their true weights [T, N]."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    truth: Float[np.ndarray, "T N"]


def load(samples: Samples, data_root: Path | None = None) -> Splits:
    """Raises as lib.datasets.load does."""
    return Splits(
        datasets.load(samples.dataset, split="train", data_root=data_root),
        datasets.load(samples.dataset, split="test", data_root=data_root),
        samples,
    )


def draw_mixture(key: Key[Array, ""], num_classes: int) -> Float[np.ndarray, " N"]:
    """Dirichlet(1/2, ..., 1/2), float64."""
    return host_rng(key).dirichlet(np.full(num_classes, 0.5))


def draw_sources(key: Key[Array, ""], splits: Splits, sizes: Sequence[int]) -> list[np.ndarray]:
    """Indices of images of the training split, `sizes` [N] of each class, without replacement."""
    return [
        datasets.draw_indices(key, splits.train, size, classes=[label])[0]
        for label, size in enumerate(sizes)
    ]


def draw_target(
    key: Key[Array, ""], splits: Splits, mixture: np.ndarray, sources: list[np.ndarray]
) -> tuple[datasets.Dataset, np.ndarray, np.ndarray]:
    """(data set, indices in it of a target's images, true weights), disjoint from the sources and
    in random order.

    True are the counts' shares where labels are fixed, the mixture where they are drawn. Raises
    ValueError where a class has too few images.
    """
    samples, rng = splits.samples, host_rng(key)
    counts = class_counts(mixture, samples.num_target)
    if samples.labels == "drawn":
        counts = rng.multinomial(samples.num_target, mixture)
    truth = mixture if samples.labels == "drawn" else counts / counts.sum()
    dataset, chosen = splits.test, []
    if samples.target_from == "rest":
        dataset = splits.train
    for label, count in enumerate(counts):
        pool = np.flatnonzero(dataset.labels == label)
        if samples.target_from == "rest":
            pool = np.setdiff1d(pool, sources[label])
        if count > len(pool):
            raise ValueError(
                f"a target needs {count} images of class {dataset.class_names[label]!r} of "
                f"{dataset.name}, {len(pool)} are left"
            )
        chosen.append(rng.choice(pool, count, replace=False))
    return dataset, rng.permutation(np.concatenate(chosen)), truth


def pixels(dataset: datasets.Dataset, indices: np.ndarray) -> Float[np.ndarray, "n d"]:
    """Rows of pixels in [0, 1], float32."""
    return np.asarray(datasets.flat(dataset, indices))


def gradient_embedding(key: Key[Array, ""], splits: Splits, sources: list[np.ndarray]) -> Embedding:
    """Unit rows of projected gradients of an MLP trained on images in neither sources nor targets:
    the rest of the training split, or the test split where targets come from that rest."""
    network_key, projection_key = jax.random.split(key)
    dataset, left = splits.test, np.arange(len(splits.test.labels))
    if splits.samples.target_from == "test":
        dataset = splits.train
        left = np.setdiff1d(np.arange(len(dataset.labels)), np.concatenate(sources))
    network = MLP(num_classes=splits.num_classes)
    parameters, _ = classification.train(
        network_key,
        network,
        *images_and_labels(dataset, left),
        optimizer=optimizers.adam(1e-3),
        # As many steps for few images as for many.
        num_epochs=max(3, 10_000 // len(left)),
    )
    project = partial(
        project_gradients, projection_key, cross_entropy(network), parameters, dimension=DIMENSION
    )

    def embedding(dataset, indices):
        return np.concatenate([*map(np.asarray, projected_batches(project, dataset, indices))])

    return embedding


def draw(
    key: Key[Array, ""], splits: Splits, num_targets: int, *, sizes: Sequence[int] | None = None
) -> Drawn:
    """Sources and targets in the space that the samples name; each target has a mixture of its
    own."""
    sources_key, mixture_key, target_key, network_key = jax.random.split(key, 4)
    count = splits.num_classes
    indices = draw_sources(sources_key, splits, sizes or [splits.samples.num_per_class] * count)
    embedding = pixels
    if splits.samples.space == "gradients":
        embedding = gradient_embedding(network_key, splits, indices)
    targets, truth = [], []
    for t in range(num_targets):
        mixture = draw_mixture(jax.random.fold_in(mixture_key, t), count)
        dataset, chosen, weights = draw_target(
            jax.random.fold_in(target_key, t), splits, mixture, indices
        )
        targets.append(embedding(dataset, chosen))
        truth.append(weights)
    return Drawn([embedding(splits.train, images) for images in indices], targets, np.stack(truth))
