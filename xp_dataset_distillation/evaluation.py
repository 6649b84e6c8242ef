"""One evaluator for all training sets: classifiers trained from scratch.

Several classifiers per set are trained at once, each from a key of its own. What counts is the
accuracy after the last epoch, on the test split, or, where training images were held out to choose
settings by, on those only: the test split is then not read.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lib import augment, datasets, runs
from lib.augment.cutmix import cutmix
from lib.networks import classification, convolution, network_by_name, optimizers
from lib.numerics import key_of_seed
from xp_dataset_distillation.config import EXPERIMENT, Evaluator
from xp_dataset_distillation.real_data import Setting


class TrainingSet(NamedTuple):
    """What classifiers are trained on: images [N, H, W, c] float32 in [0, 1], labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def labelled(images: np.ndarray) -> TrainingSet:
    """Of images [classes, n, H, W, c] in [0, 1]."""
    labels = np.repeat(np.arange(len(images), dtype=np.int32), images.shape[1])
    return TrainingSet(np.asarray(images.reshape(-1, *images.shape[2:]), np.float32), labels)


class EvaluationSet(NamedTuple):
    """What they are evaluated on: images uint8 [M, H, W, c], labels [M]."""

    images: np.ndarray | jax.Array
    labels: np.ndarray


def test_split(
    dataset: str,
    name: str,
    class_names: tuple[str, ...],
    image_shape: tuple[int, ...],
    *,
    resized: bool,
    data_root: Path | None,
) -> datasets.Dataset:
    """Of a data set whose training images, called `name`, have these classes and this shape, to
    which the test images are brought where the others were `resized`. Raises ValueError where the
    two splits do not fit."""
    test = datasets.load(dataset, split="test", data_root=data_root)
    if resized and test.image_shape[:2] != image_shape[:2]:
        height, width = image_shape[:2]
        test = datasets.resize(test, (height, width))
    if test.class_names != class_names or test.image_shape != image_shape:
        raise ValueError(
            f"the test split of {test.name} has images {test.image_shape} of classes "
            f"{test.class_names}, the training images of {name} {image_shape} of {class_names}"
        )
    return test


@cache
def optimizer(evaluator: Evaluator, num_steps: int) -> optax.GradientTransformation:
    """One object for each setting: jit tells optimizers apart by identity."""
    if evaluator.optimizer == "adamw":
        return optimizers.adamw(evaluator.learning_rate)
    # Of a few steps some fall on none, or together.
    milestones = sorted({int(share * num_steps) for share in evaluator.milestones} - {0})
    return optimizers.sgd(
        evaluator.learning_rate,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=tuple(milestones),
        factor=evaluator.decay,
    )


@cache
def transform(
    augmentation: augment.Augmentation, setting: Setting, cutmix_probability: float
) -> Callable:
    """What a batch goes through: augmentation, each image by itself, then normalization, then
    CutMix."""

    def apply(key, images, targets):
        change_key, mix_key = jax.random.split(key)
        changes = augment.draw(change_key, augmentation, len(images))
        images = setting.normalized(augment.apply(changes, images))
        if cutmix_probability:
            return cutmix(mix_key, images, targets, probability=cutmix_probability)
        return images, targets

    return apply


def accuracies(
    key: jax.Array,
    training: TrainingSet,
    test: EvaluationSet,
    setting: Setting,
    evaluator: Evaluator,
    *,
    num_networks: int,
    run: runs.Run | None = None,
    show_progress: bool = True,
    description: str = "training",
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Shares of right labels of `num_networks` classifiers, [num_networks]."""
    network = network_by_name(
        evaluator.network,
        setting.num_classes,
        setting.image_shape,
        width=evaluator.width,
        depth=evaluator.depth,
        convolution=convolution.fastest(),
    )
    augmentation = augment.parse(
        evaluator.augmentation, dialect=evaluator.strategy, flips=setting.flips
    )
    batches = classification.steps_per_epoch(len(training.images), evaluator.batch_size)
    parameters, _ = classification.fit_seeds(
        jax.random.split(key, num_networks),
        network,
        jnp.asarray(training.images, jnp.float32),
        jnp.asarray(training.labels, jnp.int32),
        optimizer=optimizer(evaluator, batches * evaluator.num_epochs),
        num_epochs=evaluator.num_epochs,
        batch_size=evaluator.batch_size,
        transform=transform(augmentation, setting, evaluator.cutmix),
        at_once=False,
        run=run,
        show_progress=show_progress,
        description=description,
        mesh=mesh,
    )
    images = setting.normalized(jnp.asarray(test.images, jnp.float32) / 255)
    labels = jnp.asarray(test.labels)
    return np.asarray(
        jax.lax.map(lambda p: classification.accuracy(network, p, images, labels), parameters)
    )


def stored_accuracies(
    read: Callable[[], tuple[TrainingSet, EvaluationSet, Setting]],
    name: str,
    known_by: dict[str, Any],
    evaluator: Evaluator,
    *,
    num_networks: int,
    seed: int,
    results: Path,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """`accuracies` on what `read` returns, with num_images and num_epochs, in a run's folder; read
    back if done before, and resumed where interrupted. `known_by` tells the sets from others."""
    settings = known_by | {"evaluator": evaluator, "num_networks": num_networks}
    run = runs.open_run(results, EXPERIMENT, name, settings, seed=seed)
    if not run.finished:
        training, test, setting = read()
        run.finish(
            accuracies=accuracies(
                key_of_seed(seed, shift=1_000_000),
                training,
                test,
                setting,
                evaluator,
                num_networks=num_networks,
                run=run,
                show_progress=show_progress,
                description=name,
                mesh=mesh,
            ),
            num_images=np.asarray(len(training.images)),
            num_epochs=np.asarray(evaluator.num_epochs),
        )
    return run.load_arrays()
