"""Sets and targets of known mixtures: classes of images, as pixels or as projected gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lib import datasets
from lib.networks import MLP, classification, optimizers
from xp_data_mixing.calibration import host_rng
from xp_data_mixing.config import Samples
from xp_data_mixing.gradient_embeddings import class_counts, cross_entropy, project_gradients

BATCH_SIZE = 100  # gradients held at once
DIMENSION = 512  # of projected gradients

Embedding = Callable[[datasets.Dataset, np.ndarray], Float[np.ndarray, "n d"]]
"""Rows of the images of a data set at some indices."""


class Source(NamedTuple):
    """Both splits, where targets are drawn, and what they are drawn like."""

    train: datasets.Dataset
    test: datasets.Dataset
    samples: Samples

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)


class Drawn(NamedTuple):
    """Sets [n_i, d], targets [m, d] and their true weights [T, N]."""

    sets: list[np.ndarray]
    targets: list[np.ndarray]
    truth: Float[np.ndarray, "T N"]


def load(samples: Samples, data_root: Path | None = None) -> Source:
    """Raises as lib.datasets.load does."""
    return Source(
        datasets.load(samples.dataset, split="train", data_root=data_root),
        datasets.load(samples.dataset, split="test", data_root=data_root),
        samples,
    )


def draw_mixture(key: Key[Array, ""], num_classes: int) -> Float[np.ndarray, " N"]:
    """Dirichlet(1/2, ..., 1/2), float64."""
    return host_rng(key).dirichlet(np.full(num_classes, 0.5))


def draw_sets(key: Key[Array, ""], source: Source, sizes: Sequence[int]) -> list[np.ndarray]:
    """Indices of images of the training split, `sizes` [N] of each class, without replacement."""
    return [
        datasets.draw_indices(key, source.train, size, classes=[label])[0]
        for label, size in enumerate(sizes)
    ]


def draw_target(
    key: Key[Array, ""], source: Source, mixture: np.ndarray, sets: list[np.ndarray]
) -> tuple[datasets.Dataset, np.ndarray, np.ndarray]:
    """(data set, indices in it of a target's images, true weights), disjoint from the sets and in
    random order: streamed intervals take neighbouring rows for a stratum.

    True are the counts' shares where labels are fixed, the mixture where they are drawn. Raises
    ValueError where a class has too few images.
    """
    samples, rng = source.samples, host_rng(key)
    counts = class_counts(mixture, samples.num_target)
    if samples.labels == "drawn":
        counts = rng.multinomial(samples.num_target, mixture)
    truth = mixture if samples.labels == "drawn" else counts / counts.sum()
    dataset, chosen = source.test, []
    if samples.target_from == "rest":
        dataset = source.train
    for label, count in enumerate(counts):
        pool = np.flatnonzero(dataset.labels == label)
        if samples.target_from == "rest":
            pool = np.setdiff1d(pool, sets[label])
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


def images_and_labels(dataset: datasets.Dataset, indices: np.ndarray) -> tuple[Array, Array]:
    """[n, H, W, channels] in [0, 1] and labels [n]."""
    images = datasets.as_images(datasets.flat(dataset, indices), dataset.image_shape)
    return images, jnp.asarray(dataset.labels[indices])


def gradient_embedding(key: Key[Array, ""], source: Source, sets: list[np.ndarray]) -> Embedding:
    """Unit rows of projected gradients of an MLP trained on images in neither sets nor targets: the
    rest of the training split, or the test split where targets come from that rest."""
    network_key, projection_key = jax.random.split(key)
    dataset, left = source.test, np.arange(len(source.test.labels))
    if source.samples.target_from == "test":
        dataset = source.train
        left = np.setdiff1d(np.arange(len(dataset.labels)), np.concatenate(sets))
    network = MLP(num_classes=source.num_classes)
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
        starts = range(0, len(indices), BATCH_SIZE)
        batches = [images_and_labels(dataset, indices[i : i + BATCH_SIZE]) for i in starts]
        return np.concatenate([np.asarray(project(batch)) for batch in batches])

    return embedding


def draw(
    key: Key[Array, ""], source: Source, num_targets: int, *, sizes: Sequence[int] | None = None
) -> Drawn:
    """Sets and targets in the space that the samples name; each target has a mixture of its own."""
    sets_key, mixture_key, target_key, network_key = jax.random.split(key, 4)
    count = source.num_classes
    indices = draw_sets(sets_key, source, sizes or [source.samples.num_per_class] * count)
    embedding = pixels
    if source.samples.space == "gradients":
        embedding = gradient_embedding(network_key, source, indices)
    targets, truth = [], []
    for t in range(num_targets):
        mixture = draw_mixture(jax.random.fold_in(mixture_key, t), count)
        dataset, chosen, weights = draw_target(
            jax.random.fold_in(target_key, t), source, mixture, indices
        )
        targets.append(embedding(dataset, chosen))
        truth.append(weights)
    return Drawn([embedding(source.train, one) for one in indices], targets, np.stack(truth))
