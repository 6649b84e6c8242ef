"""One flow-matching model from one source: trained, sampled from, evaluated.

    python xp_gmm_source/flow.py --dataset mnist --source gmm --n_components 10 --coupling optimal
    python xp_gmm_source/flow.py --dataset path/to/images.zip --source norm_aligned --prune

The model sees only training images and is evaluated against test images, with the running mean
of its parameters after the last step: nothing is selected. An interrupted run resumes.
"""

import dataclasses
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from lib import flow_matching, runs
from lib.datasets import Dataset, identity, load, to_unit
from lib.flow_matching import Source, sampling
from lib.flow_matching.semidiscrete import fit_potentials
from lib.flow_matching.unet import UNet
from lib.networks import convolution
from lib.numerics import key_of_seed, named_key
from lib.runs import files
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_gmm_source import gmm_files, metrics
from xp_gmm_source.config import EXPERIMENT, FitConfig, FlowConfig
from xp_gmm_source.gmm_fit import fit_images, image_mixture
from xp_gmm_source.shaped_sources import (
    PUBLISHED_AXIS_THRESHOLD,
    PUBLISHED_THRESHOLD,
    PrunedSource,
    acceptance,
    cosine_quantile,
    cosine_threshold,
    frequency_source,
    pruned,
)
from xp_gmm_source.sources import (
    Gaussian,
    gaussian,
    mixture_source,
    mode_coupled_source,
    norm_aligned,
)

PUBLISHED_DIMENSION = 3072
LEAST_ACCEPTANCE = 0.01
SHOWN = 64
"""Samples that are kept for figures."""
PATHS, PATH_STEPS = 500, 40
"""Paths whose straightness is measured, and their Euler steps."""
MEASURE_OF = {
    "value": "straightness",
    "normalized": "normalised_straightness",
    "length_ratio": "length_ratio",
    "transport_cost": "transport_cost",
}
MEASURES = tuple(MEASURE_OF.values())


class Split(NamedTuple):
    """Training images and labels, and as many test images as are evaluated."""

    train: Dataset
    test: Dataset


def read(config: FlowConfig, data_root: Path | None) -> Split:
    """Both splits. Raises ValueError where there are fewer test images than samples to evaluate."""
    train, test = (
        load(config.dataset, split=split, data_root=data_root) for split in ("train", "test")
    )
    if config.num_train is not None:
        if config.num_train > len(train.images):
            raise ValueError(
                f"num_train is {config.num_train}, {train.name} has {len(train.images)} images"
            )
        train = train._replace(
            images=train.images[: config.num_train], labels=train.labels[: config.num_train]
        )
    if config.num_samples > len(test.images):
        raise ValueError(
            f"num_samples is {config.num_samples}, but {test.name} has {len(test.images)} test "
            "images to compare with"
        )
    return Split(train, test)


def at_most_tested(num: int, dataset: str, data_root: Path | None) -> int:
    """`num`, or the number of test images of the data set where these are fewer."""
    return min(num, len(load(dataset, split="test", data_root=data_root).images))


def known_by_content(config: FlowConfig, data_root: Path | None) -> FlowConfig:
    """The settings by which results are known: `lib.datasets.identity` in place of a path."""
    known_by = identity(config.dataset, data_root=data_root)
    return dataclasses.replace(config, dataset=known_by)


# ---- What is fitted once for all seeds; of all these functions `config` is known by its content


def fitted_mixture(
    config: FlowConfig,
    train: Dataset,
    results: Path,
    *,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> gmm_files.ImageMixture:
    """The mixture of the training images, fitted or found in its folder."""
    wanted = FitConfig(
        dataset=config.dataset,
        n_components=config.n_components,
        n_pca=config.n_pca,
        covariance_type=config.covariance_type,
        max_iter=config.em_iterations,
    )
    name = f"mixture-{train.name}-{config.n_components}-{config.covariance_type}"
    settings = {**dataclasses.asdict(wanted), "num_train": config.num_train}
    run = runs.open_run(results, EXPERIMENT, name, settings, seed=0, wait=True)
    path = run.folder / "mixture.npz"
    if path.exists():
        stored = gmm_files.load(path)
    else:
        fitted = fit_images(wanted, train.images, run=run, show_progress=show_progress, mesh=mesh)
        stored = image_mixture(fitted, train.image_shape)
        gmm_files.save(path, stored)
    if not run.finished:
        run.finish(log_likelihoods=np.asarray(stored.about["log_likelihoods"]))
    return stored


def feature_network(config: FlowConfig, split: Split, results: Path) -> metrics.FeatureNetwork:
    """The classifier of this data set, trained or found in its folder."""
    settings = {"dataset": config.dataset, "num_train": config.num_train}
    name = f"features-{split.train.name}"
    run = runs.open_run(results, EXPERIMENT, name, settings, seed=0, wait=True)
    network = metrics.default_network(split.train.image_shape, len(split.train.class_names))
    path = run.folder / "network.npz"
    if not (run.finished and path.exists()):
        print(f"{split.train.name}: training the classifier of the features", flush=True)
        trained = metrics.train_feature_network(
            jax.random.key(0),
            to_unit(split.train.images),
            split.train.labels,
            test=(to_unit(split.test.images), split.test.labels),
            network=network,
        )
        files.save_checkpoint(path, trained.parameters, step=0)
        run.finish(accuracy=np.asarray(trained.accuracy))
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *split.train.image_shape)))
    parameters, _ = files.load_checkpoint(path, like)
    accuracy = float(run.load_arrays()["accuracy"])
    return metrics.FeatureNetwork(network, parameters, split.train.image_shape, accuracy)


def reference(config: FlowConfig, split: Split, results: Path) -> metrics.Reference:
    """The first test images in an order of their own, the same for every flow of a data set."""
    order = np.random.default_rng(0).permutation(len(split.test.images))[: config.num_samples]
    images = to_unit(split.test.images[order])
    return metrics.reference(jax.random.key(1), images, feature_network(config, split, results))


# ---- Sources and networks


def source_of(
    config: FlowConfig,
    train: Dataset,
    results: Path,
    *,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> Source:
    """The source that the model is trained from."""
    match config.source:
        case "gaussian":
            return gaussian(int(np.prod(train.image_shape)))
        case "norm_aligned":
            return norm_aligned(to_unit(train.images))
        case "dct":
            return frequency_source(to_unit(train.images), masked_share=config.masked_share)
    stored = fitted_mixture(config, train, results, show_progress=show_progress, mesh=mesh)
    make = mode_coupled_source if config.coupling == "mode" else mixture_source
    return make(stored.mixture, mean=stored.mean, std=stored.std, pca=stored.projection)


def pairs_of(
    config: FlowConfig,
    source: Source,
    train: Dataset,
    results: Path,
    *,
    show_progress: bool = True,
) -> dict[str, Any]:
    """How `flow_matching.fit` is to pair x0 and x1; potentials are learnt, or found in their
    folder, beside the seconds that they took."""
    if config.coupling != "semidiscrete":
        # The pairs of "mode" are the source's own.
        return {"coupling": "optimal" if config.coupling == "optimal" else "independent"}
    about = ("dataset", "source", "n_components", "covariance_type", "n_pca", "em_iterations",
             "masked_share", "num_train", "potential_steps", "potential_batch")  # fmt: skip
    known = {name: getattr(config, name) for name in about}
    name = f"potentials-{train.name}-{config.source}"
    run = runs.open_run(results, EXPERIMENT, name, known, seed=0, wait=True)
    if not run.finished:
        began = time.perf_counter()
        points = jnp.asarray(to_unit(train.images).reshape(len(train.images), -1), jnp.float32)
        potentials = fit_potentials(
            jax.random.key(3), source, points, num_steps=config.potential_steps,
            batch_size=config.potential_batch, run=run, show_progress=show_progress,
        )  # fmt: skip
        seconds = np.asarray(time.perf_counter() - began)
        run.finish(**potentials._asdict(), seconds=seconds)
    return {"coupling": "semidiscrete", "potentials": jnp.asarray(run.load_arrays()["values"])}


def sampling_sources(
    config: FlowConfig, source: Source, train: Dataset, *, show_progress: bool = True
) -> dict[str, Source]:
    """The sources that are sampled from, by name: the model's own, and pruned.

    The published cosines are taken to this dimension, where those of noise are larger by
    sqrt(3072 / d): .01 of data with an axis by that factor, .048 of draws to the same quantile.
    Says so, and leaves it out, where pruning accepts less than `LEAST_ACCEPTANCE` of the draws.
    """
    sources = {"own": source}
    if not config.prune:
        return sources
    assert isinstance(source, Gaussian)  # `FlowConfig` prunes no other
    d = int(np.prod(train.image_shape))
    source = pruned(
        to_unit(train.images),
        axis_threshold=PUBLISHED_AXIS_THRESHOLD * (PUBLISHED_DIMENSION / d) ** 0.5,
        threshold=cosine_threshold(cosine_quantile(PUBLISHED_THRESHOLD, PUBLISHED_DIMENSION), d),
        scale=float(source.scale[0]),
    )
    key = named_key(jax.random.key(2), "acceptance")
    accepted = float(acceptance(key, source, 10_000))
    if accepted >= LEAST_ACCEPTANCE:
        return sources | {"pruned": source}
    if show_progress:
        print(f"no pruning: {len(source.axes)} axes leave {accepted:.1e} of the draws")
    return sources


@cache
def optimizer(
    learning_rate: float, warm_up: int, num_steps: int, decay: bool
) -> optax.GradientTransformation:
    """Adam, its rate linear from 0 over `warm_up` steps, then constant or along a cosine to 0."""
    warm_up = min(warm_up, num_steps // 2)
    if decay:
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, num_steps)
    else:
        rate = optax.linear_schedule(0.0, learning_rate, warm_up)
    return optax.adam(rate)


def network(config: FlowConfig) -> UNet:
    return UNet(
        width=config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        patch=config.patch,
        convolution=convolution.fastest(),
    )


# ---- One model


def train(
    key: jax.Array, config: FlowConfig, source: Source, images: Dataset, **options: Any
) -> flow_matching.FitResult:
    """`flow_matching.fit` of `config.num_steps` steps; `options` are those of it."""
    return flow_matching.fit(
        key,
        network(config),
        source,
        jnp.asarray(images.images),
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        ema_decay=config.ema_decay,
        augment_flip=config.augment_flip,
        **options,
    )


def run_flow(
    config: FlowConfig,
    *,
    seed: int,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> runs.Run:
    """Trains one model, or finds it done. See `evaluate_flow` for what its folder holds, beside
    losses [num_steps] and train_seconds."""
    name = f"{Path(config.dataset).stem}-{config.source}-{config.coupling}"
    known = known_by_content(config, data_root)
    exclude = (*runs.NOT_HASHED, *config.without_effect())
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed, exclude=exclude)
    if run.finished:
        return run
    split = read(config, data_root)
    config = known
    source = source_of(config, split.train, results, show_progress=show_progress, mesh=mesh)
    pairs = pairs_of(config, source, split.train, results, show_progress=show_progress)
    train_key, evaluation_key = jax.random.split(key_of_seed(seed, shift=1000))
    began = time.perf_counter()
    trained = train(
        train_key,
        config,
        source,
        split.train,
        optimizer=optimizer(config.learning_rate, config.warm_up, config.num_steps, config.decay),
        run=run,
        show_progress=show_progress,
        description=name,
        mesh=mesh,
        **pairs,
    )
    seconds = time.perf_counter() - began
    sources = sampling_sources(config, source, split.train, show_progress=show_progress)
    reference_images = reference(config, split, results)
    measured = evaluate_flow(
        evaluation_key, config, trained.ema, sources, reference_images, split.train
    )
    run.finish(**measured, losses=trained.losses, train_seconds=np.asarray(seconds))
    return run


def evaluate_flow(
    key: jax.Array,
    config: FlowConfig,
    parameters: Any,
    sources: dict[str, Source],
    reference_images: metrics.Reference,
    train: Dataset,
) -> dict[str, np.ndarray]:
    """Samples at every number of evaluations, and what they are worth.

    Of S samplers (methods and evaluations [S]) and V sources (`own`, then `pruned` if asked): every
    measure of `metrics.evaluate` [V, S], and of as many training images (floor_*); samples uint8
    [V, S, 64, H, W, channels] and the starts of the first source; sample_seconds [V, S] for 1,000
    of them, without compilation; their straightness [V];
    paths [V, steps + 1, 64, 2] on the test images' first two principal components; of pruning
    the number of axes and the share of draws accepted; accuracy of the feature network; targets
    [500, 2], test images on those components.
    """
    shape, model = train.image_shape, network(config)
    samplers = config.samplers()
    order = np.random.default_rng(1).permutation(len(train.images))[: config.num_samples]
    floor = metrics.evaluate(to_unit(train.images[order]), reference_images)
    names = (*floor, "samples", "sample_seconds", "paths", *MEASURES)
    measured: dict[str, list] = {name: [] for name in names}
    basis, starts, compiled = _two_components(reference_images.points), None, set()
    for i, source in enumerate(sources.values()):
        x0 = _draw(jax.random.fold_in(key, i), source, config.num_samples)
        starts = x0[:SHOWN] if starts is None else starts
        rows, images, seconds = [], [], []
        for method, num in samplers:
            integrate = partial(_integrate, model=model, shape=shape, num=num, method=method)
            if method not in compiled:  # once for all numbers of evaluations
                jax.block_until_ready(integrate(parameters, x0))
                compiled.add(method)
            began = time.perf_counter()
            x1 = jax.block_until_ready(integrate(parameters, x0))
            seconds.append(1000 / config.num_samples * (time.perf_counter() - began))
            rows.append(metrics.evaluate(x1, reference_images))
            images.append(_pixels(x1[:SHOWN], shape))
        for name in floor:
            measured[name].append([row[name] for row in rows])
        measured["samples"].append(np.stack(images))
        measured["sample_seconds"].append(seconds)
        path = _euler_path(parameters, x0[:PATHS], model=model, shape=shape)
        for name, value in sampling.straightness(path)._asdict().items():
            measured[MEASURE_OF[name]].append(value)
        measured["paths"].append(np.asarray(path[:, :SHOWN]) @ basis)
    about = {
        "evaluations": [num for _, num in samplers],
        "methods": [method for method, _ in samplers],
        "starts": np.asarray(starts).reshape(-1, *shape),
        "feature_accuracy": reference_images.feature_network.accuracy,
        "basis": basis,
        "targets": np.asarray(reference_images.points[:PATHS]) @ basis,
        **{f"floor_{name}": value for name, value in floor.items()},
    }
    for source in sources.values():
        if isinstance(source, PrunedSource):
            about["pruned_axes"] = len(source.axes)
            # 99: after the numbers of the sources, of which there are two at most.
            about["acceptance"] = acceptance(jax.random.fold_in(key, 99), source, 10_000)
    return {name: np.asarray(value) for name, value in (measured | about).items()}


@partial(jax.jit, static_argnames="num")
def _draw(key, source, num):
    return source.sample(key, num)


@partial(jax.jit, static_argnames=("model", "shape", "method"))
def _integrate(parameters, x0, *, model, shape, num, method):
    velocity = flow_matching.velocity(model, parameters, shape)
    return sampling.integrate(velocity, x0, num_evaluations=num, method=method)


@partial(jax.jit, static_argnames=("model", "shape"))
def _euler_path(parameters, x0, *, model, shape):
    velocity = flow_matching.velocity(model, parameters, shape)
    return sampling.euler(velocity, x0, PATH_STEPS, keep_path=True)


def _pixels(points, shape) -> np.ndarray:
    """uint8 images of points in [-1, 1]."""
    values = np.clip(np.asarray(points) * 127.5 + 127.5, 0, 255)
    return np.rint(values).astype(np.uint8).reshape(-1, *shape)


def _two_components(points) -> np.ndarray:
    centered = np.asarray(points, np.float64)
    centered = centered - centered.mean(axis=0)
    return np.linalg.eigh(centered.T @ centered)[1][:, :-3:-1].astype(np.float32)


# ---- The command


@dataclasses.dataclass(frozen=True)
class Arguments(DeviceOptions, FlowConfig):
    num_samples: int | None = None  # type: ignore[assignment]
    """Evaluated, against as many test images. None: 1,000, or all test images where these are
    fewer."""
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        if self.num_samples is not None:
            super().__post_init__()


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Trains and evaluates one model, prints what it is worth, draws it, returns its folder."""
    from xp_gmm_source import plot

    if arguments.num_samples is None:
        num = at_most_tested(FlowConfig.num_samples, arguments.dataset, arguments.data_root)
        arguments = dataclasses.replace(arguments, num_samples=num)
    config = settings_of(FlowConfig, arguments)
    run = run_flow(
        config,
        seed=arguments.seed,
        results=arguments.results,
        data_root=arguments.data_root,
        mesh=mesh,
    )
    stored = run.load_arrays()
    shown = ("frechet", "mmd2_pixels", "sliced_wasserstein", "class_distance")
    starts = ("the source it was trained from", "that source, pruned")
    for i, start in enumerate(starts[: len(stored["frechet"])]):
        print(f"{config.source}, {config.coupling}: samples that start from {start}")
        for j, (method, num) in enumerate(zip(stored["methods"], stored["evaluations"])):
            values = ", ".join(f"{name} {stored[name][i, j]:.4g}" for name in shown)
            print(f"  {method} {num:4d}: {values}")
    print("as many training images: " + ", ".join(f"{n} {stored[f'floor_{n}']:.4g}" for n in shown))
    print(f"numbers: {run.arrays}")
    print(f"figure:  {plot.flow_samples(run, f'{config.source}, {config.coupling}')}")
    return run.folder


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--batch_size, --width or --n_components")
