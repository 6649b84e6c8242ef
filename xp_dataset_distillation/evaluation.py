"""One evaluator for condensed sets and baselines: classifiers trained from scratch.

Several classifiers a set are trained at once, each from a key of its own. What counts is the
accuracy after the last epoch, on the test split, or, where training images were held out to choose
settings by, on those alone: the test split is then not read.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib import augment, datasets, runs
from lib.augment.cutmix import cutmix
from lib.networks import classification, convolution, network_by_name, optimizers
from lib.numerics import key_of_seed
from lib.runs import processes
from xp_dataset_distillation import baselines, real_data
from xp_dataset_distillation.condense import (
    condense,
    known_by_content,
    setting_of,
    training_images,
)
from xp_dataset_distillation.config import (
    EXPERIMENT,
    BaselineConfig,
    CondenseConfig,
    Entry,
    Evaluator,
    Judged,
    is_whole,
)
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.objectives import Setting


class TrainingSet(NamedTuple):
    """What classifiers are trained on: images [N, H, W, c] float32 in [0, 1], labels [N]."""

    images: np.ndarray
    labels: np.ndarray


class Judge(NamedTuple):
    """What they are judged on, images uint8, and what all of them must know."""

    images: np.ndarray | jax.Array
    labels: np.ndarray
    setting: Setting


def judge(
    entry: Entry,
    real: real_data.RealData,
    held_out: tuple[np.ndarray | jax.Array, np.ndarray] | None,
    data_root: Path | None,
) -> Judge:
    """The test split, or the images that the entry's settings hold out."""
    if held_out is not None:
        return Judge(*held_out, setting_of(entry, real))
    test = datasets.load(entry.dataset, split="test", data_root=data_root)
    if entry.size is not None and test.image_shape[:2] != real.image_shape[:2]:
        test = datasets.resize(test, entry.size)
    if test.class_names != real.class_names or test.image_shape != real.image_shape:
        raise ValueError(
            f"the test split of {real.name} has images {test.image_shape} of classes "
            f"{test.class_names}, its training split {real.image_shape} of {real.class_names}"
        )
    return Judge(test.images, test.labels, setting_of(entry, real))


# ---- Training and judging


@cache
def optimizer(evaluator: Evaluator, num_steps: int) -> optax.GradientTransformation:
    """One object for each setting: jit tells optimisers apart by identity."""
    if evaluator.optimizer == "adamw":
        return optimizers.adamw(evaluator.lr)
    milestones = tuple(int(share * num_steps) for share in evaluator.milestones)
    return optimizers.sgd(
        evaluator.lr,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=milestones,
        factor=evaluator.decay,
    )


@cache
def transform(
    augmentation: augment.Augmentation, setting: Setting, cutmix_probability: float
) -> Callable:
    """What a batch goes through: augmentation, each image on its own, then normalisation, then
    CutMix."""

    def apply(key, images, targets):
        change_key, mix_key = jax.random.split(key)
        changes = augment.draw(change_key, augmentation, len(images))
        images = setting.normalised(augment.apply(changes, images))
        if cutmix_probability:
            return cutmix(mix_key, images, targets, probability=cutmix_probability)
        return images, targets

    return apply


def accuracies(
    key: jax.Array,
    training: TrainingSet,
    judged_on: Judge,
    evaluator: Evaluator,
    *,
    num_networks: int,
    run: runs.Run | None = None,
    show_progress: bool = True,
    description: str = "training",
) -> np.ndarray:
    """Shares of right labels of `num_networks` classifiers, [num_networks]."""
    about = judged_on.setting
    network = network_by_name(
        evaluator.network,
        about.num_classes,
        about.image_shape,
        width=evaluator.width,
        depth=evaluator.depth,
        convolution=convolution.fastest(),
    )
    augmentation = augment.parse(
        evaluator.augmentation, dialect=evaluator.dialect, flips=about.flips
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
        transform=transform(augmentation, about, evaluator.cutmix),
        at_once=convolution.networks_at_once(),
        run=run,
        show_progress=show_progress,
        description=description,
        mesh=processes.current(),
    )
    images = about.normalised(jnp.asarray(judged_on.images, jnp.float32) / 255)
    labels = jnp.asarray(judged_on.labels)
    return np.asarray(
        jax.lax.map(lambda p: classification.accuracy(network, p, images, labels), parameters)
    )


def training_set(
    entry: Entry, real: real_data.RealData, *, seed: int, results: Path, data_root: Path | None
) -> TrainingSet:
    """What the entry trains on: its condensed images, decoded, or its baseline's."""
    if isinstance(entry, CondenseConfig):
        run = condense(entry, seed=seed, results=results, data_root=data_root)
        images = np.asarray(decode(jnp.asarray(run.load_arrays()["images"]), entry.factor))
    else:
        images = baseline(entry, real, seed=seed)
    if isinstance(images, TrainingSet):
        return images
    labels = np.repeat(np.arange(len(images)), images.shape[1])
    return TrainingSet(
        np.asarray(images.reshape(-1, *images.shape[2:]), np.float32), labels.astype(np.int32)
    )


def baseline(entry: BaselineConfig, real: real_data.RealData, *, seed: int):
    """Images [classes, n, H, W, c] in [0, 1], or of `whole` a TrainingSet."""
    key = key_of_seed(seed)
    real_data.check_images_per_class(real, entry.images_per_class if entry.kind != "whole" else 1)
    match entry.kind:
        case "whole":
            return TrainingSet(np.asarray(real.images, np.float32) / 255, real.labels)
        case "random":
            return baselines.random_images(key, real, entry.images_per_class)
        case "kmeans":
            return baselines.kmeans_centres(key, real, entry.images_per_class)
        case "herding":
            features = trained_features(key, entry, real)
            return baselines.herded_images(real, entry.images_per_class, features)


def trained_features(
    key: jax.Array, entry: BaselineConfig, real: real_data.RealData
) -> baselines.Features:
    """images [n, H, W, c] in [0, 1] -> features [n, f] of a ConvNet trained on all images."""
    size = {"width": entry.feature_width, "depth": entry.feature_depth}
    made = partial(
        network_by_name,
        "convnet",
        image_shape=real.image_shape,
        convolution=convolution.fastest(),
        **size,
    )
    whole, headless = made(num_classes=real.num_classes), made(num_classes=None)
    normalised = setting_of(entry, real).normalised
    parameters, _ = classification.train(
        key,
        whole,
        normalised(jnp.asarray(real.images, jnp.float32) / 255),
        jnp.asarray(real.labels),
        optimizer=optimizers.adam(1e-3),
        num_epochs=entry.feature_epochs,
        batch_size=256,
    )
    # The headless network has all layers but the last, under the same names.
    wanted = jax.eval_shape(headless.init, key, jnp.zeros((1, *real.image_shape)))["params"]
    shared = {"params": {name: parameters["params"][name] for name in wanted}}
    return jax.jit(lambda images: headless.apply(shared, normalised(images)))


def evaluate(
    entry: Entry,
    judged: Judged,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
) -> dict[str, np.ndarray]:
    """Accuracies [num_networks] of the classifiers trained on one set, that of `seed`; stored, and
    read back if done before; interrupted, it resumes."""
    evaluator = judged.evaluator
    if is_whole(entry):
        evaluator = replace(evaluator, num_epochs=judged.whole_epochs)
    kind = entry.kind if isinstance(entry, BaselineConfig) else entry.method
    name = f"accuracy-{Path(entry.dataset).stem}-{kind}-ipc{entry.images_per_class}"
    known = known_by_content(entry, data_root)
    settings = {"entry": known, "evaluator": evaluator, "num_networks": judged.num_networks}
    run = runs.open_run(results, EXPERIMENT, name, settings, seed=seed)
    if not run.finished:
        real, kept = training_images(entry, data_root)
        judged_on = judge(entry, real, kept, data_root)
        training = training_set(entry, real, seed=seed, results=results, data_root=data_root)
        found = accuracies(
            key_of_seed(seed, shift=1_000_000),
            training,
            judged_on,
            evaluator,
            num_networks=judged.num_networks,
            run=run,
            show_progress=show_progress,
            description=name,
        )
        run.finish(
            accuracies=found,
            num_images=np.asarray(len(training.images)),
            num_epochs=np.asarray(evaluator.num_epochs),
        )
    return run.load_arrays()
