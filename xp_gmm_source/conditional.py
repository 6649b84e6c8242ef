"""Flow matching with a condition: what a coupling must know of it.

    python xp_gmm_source/conditional.py --preset quick
    python xp_gmm_source/conditional.py --preset paper --seeds 0 1 2

Three couplings train the same network, which knows the label: independent pairs; minibatch optimal
transport, which gives each class the part of the source that lies near to it, although samples of
the class will start from all of it; and optimal transport within each class of the batch. Samples
of every class, after few evaluations, are compared with held-out data of the class.

`moons`: eight Gaussians to two moons, the moon is the label; beside it, the exact transport between
the source and each moon. `fashion_mnist` and other sets of images: their classes, from N(0, I).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from lib import flow_matching, runs
from lib.datasets import file_stem
from lib.flow_matching import Coupling, sampling
from lib.networks import optimizers
from lib.numerics import key_of_seed
from lib.report.spreads import mean_and_spread, standard_error
from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_gmm_source import flow, metrics
from xp_gmm_source.config import EXPERIMENT, FlowConfig
from xp_gmm_source.sources import gaussian

COUPLINGS: tuple[Coupling, ...] = get_args(Coupling)
MOONS = "moons"
PATH_STEPS = 40


@dataclass(frozen=True)
class ConditionalConfig:
    """One training."""

    dataset: str = MOONS
    """moons, a data set's name, or the path of a folder or zip of images."""
    coupling: Coupling = "conditional"
    num_steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    width: int = 64
    """Of the layers (moons), or of the U-Net at its finest level."""
    num_per_class: int = 1000
    """Samples of each class that are evaluated."""
    euler: tuple[int, ...] = (1, 2, 3, 5, 20)


PRESETS: dict[str, tuple[ConditionalConfig, ...]] = {
    "quick": (ConditionalConfig(num_steps=1000, num_per_class=300),),
    "paper": (
        ConditionalConfig(),
        ConditionalConfig(
            "fashion_mnist", num_steps=4000, batch_size=64, width=32, num_per_class=100
        ),
    ),
}


class EightGaussians(NamedTuple):
    """Equal parts of N(c, deviation^2 I), the centers c on a circle of that radius."""

    radius: Float[Array, ""]
    deviation: Float[Array, ""]

    def sample(self, key: Key[Array, ""], num: int) -> Float[Array, "num 2"]:
        of_center, of_noise = jax.random.split(key)
        angles = jax.random.randint(of_center, (num,), 0, 8) * (jnp.pi / 4)
        centers = self.radius * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return centers + self.deviation * jax.random.normal(of_noise, (num, 2))

    def couple(self, key: Key[Array, ""], x1: Float[Array, "B 2"]) -> Float[Array, "B 2"]:
        return self.sample(key, len(x1))


class ConditionalMLP(nn.Module):
    """v(x, t, label): three hidden layers of `width`."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, images, times, labels):
        x = images.reshape(len(images), -1)
        classes = jax.nn.one_hot(labels, self.num_classes, dtype=x.dtype)
        h = jnp.concatenate([x, times[:, None].astype(x.dtype), classes], axis=1)
        for _ in range(3):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(x.shape[1])(h).reshape(images.shape)


class Task(NamedTuple):
    """Images and labels to train on; `measure` compares samples [C, n, d] of all classes with
    held-out data; `about` is what its numbers are read against."""

    images: Array
    labels: Array
    source: flow_matching.Source
    network: nn.Module
    num_classes: int
    measure: Callable[[np.ndarray], dict[str, float]]
    about: dict[str, float]


def moons(config: ConditionalConfig) -> Task:
    """Radius 5 and moons 3 units wide, as Tong et al. (2024) and torchcfm have them."""
    from sklearn.datasets import make_moons

    def drawn(seed, num):
        x, labels = make_moons(num, noise=0.05, random_state=seed)
        return (3 * x - 1).astype(np.float32), labels.astype(np.int32)

    x, labels = drawn(0, 20_000)
    n = config.num_per_class
    source = EightGaussians(jnp.asarray(5.0), jnp.asarray(0.3))
    held_out, again = (
        [points[of == c][:n] for c in range(2)]
        for points, of in (drawn(seed, 4 * n) for seed in (1, 2))
    )
    x0 = np.asarray(source.sample(jax.random.key(9), n))
    about = {
        "floor": float(np.mean([w2_squared(*pair) for pair in zip(again, held_out)])),
        "least cost": float(np.mean([w2_squared(x0, y) for y in held_out])) / 2,
    }

    def measure(samples):
        return {"W2²": float(np.mean([w2_squared(*pair) for pair in zip(samples, held_out)]))}

    network = ConditionalMLP(2, config.width)
    points = jnp.asarray(x[:, None, None, :])
    return Task(points, jnp.asarray(labels), source, network, 2, measure, about)


def w2_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Exact (POT), of equal weights."""
    import ot

    costs = ot.dist(np.asarray(x, np.float64), np.asarray(y, np.float64))
    return float(ot.emd2([], [], costs, numItermax=1_000_000))


def pictures(config: ConditionalConfig, results: Path, data_root: Path | None) -> Task:
    """Classes of images; `right` is the share of samples that a classifier of the training split
    gives their class."""
    images = FlowConfig(
        config.dataset, width=config.width, num_samples=config.num_per_class, euler=config.euler
    )
    split = flow.read(images, data_root)
    num_classes, shape = len(split.train.class_names), split.train.image_shape
    images = replace(images, num_samples=min(len(split.test.images), 1000))
    known = flow.known_by_content(images, data_root)
    held_out = flow.reference(known, split, results)
    order = np.random.default_rng(1).permutation(len(split.train.images))[: images.num_samples]
    real = metrics.evaluate(flow.to_unit(split.train.images[order]), held_out)
    of_network = held_out.feature_network

    def measure(samples):
        flat = samples.reshape(-1, samples.shape[2])
        predictions = np.asarray(metrics.outputs(of_network, flat).predictions)
        wanted = np.repeat(np.arange(num_classes), samples.shape[1])
        measured = {"right": float(np.mean(predictions == wanted))}
        return measured | {"frechet": metrics.evaluate(flat, held_out)["frechet"]}

    about = {"floor": real["frechet"], "right": float(of_network.accuracy or np.nan)}
    network = replace(flow.network(images), num_classes=num_classes)
    return Task(
        jnp.asarray(split.train.images), jnp.asarray(split.train.labels),
        gaussian(int(np.prod(shape))), network, num_classes, measure, about,
    )  # fmt: skip


def task_of(config: ConditionalConfig, results: Path, data_root: Path | None) -> Task:
    return moons(config) if config.dataset == MOONS else pictures(config, results, data_root)


def run_one(
    config: ConditionalConfig, task: Task, *, seed: int, results: Path, known_as: str,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Trains with one coupling; every measure of the task at every number of evaluations, and of
    paths of `PATH_STEPS` the normalized straightness and the transport cost per coordinate."""
    known = replace(config, dataset=known_as)
    name = f"conditional-{Path(config.dataset).stem}-{config.coupling}"
    run = runs.open_run(results, EXPERIMENT, name, known, seed=seed)
    if not run.finished:
        train_key, key = jax.random.split(key_of_seed(seed, shift=1000))
        shape = task.images.shape[1:]
        trained = flow_matching.fit(
            train_key, task.network, task.source, task.images, labels=task.labels,
            coupling=config.coupling, optimizer=optimizers.adam(config.learning_rate),
            num_steps=config.num_steps, batch_size=config.batch_size, run=run, description=name,
            mesh=mesh,
        )  # fmt: skip
        x0 = jnp.stack(
            [
                task.source.sample(jax.random.fold_in(key, c), config.num_per_class)
                for c in range(task.num_classes)
            ]
        )
        rows = []
        for num in config.euler:
            samples = sampled(task.network, shape, trained.ema, x0, num)
            rows.append(task.measure(np.asarray(samples)))
        path = paths(task.network, shape, trained.ema, x0[:, :100])
        straight = sampling.straightness(jnp.concatenate(list(path), axis=1))
        run.finish(
            **{measure: np.array([row[measure] for row in rows]) for measure in rows[0]},
            straightness=straight.normalized, cost=straight.transport_cost,
        )  # fmt: skip
    return run.load_arrays()


@partial(jax.jit, static_argnames=("network", "shape"))
def sampled(network, shape, parameters, x0, num):
    """Samples [C, n, d] after `num` Euler steps from x0, class by class."""

    def of_class(one):
        label, rows = one
        v = flow_matching.velocity(network, parameters, shape, labels=label)
        return sampling.integrate(v, rows, num_evaluations=num)

    return jax.lax.map(of_class, (jnp.arange(len(x0)), x0))


@partial(jax.jit, static_argnames=("network", "shape"))
def paths(network, shape, parameters, x0):
    """[C, steps + 1, n, d]."""

    def of_class(one):
        label, rows = one
        v = flow_matching.velocity(network, parameters, shape, labels=label)
        return sampling.euler(v, rows, PATH_STEPS, keep_path=True)

    return jax.lax.map(of_class, (jnp.arange(len(x0)), x0))


# ---- Tables


def table(rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """A row per coupling: the measure by number of evaluations, mean ± sample standard deviation
    over seeds, and in brackets less that of `conditional`, paired by seed."""
    form = ".3f" if measure == "right" else ".3g"
    (own,) = [row for row in rows if row["coupling"] == "conditional"]
    lines = []
    for row in rows:
        values, others = (np.asarray(r[measure]) for r in (row, own))
        cells = []
        for j in range(values.shape[1]):
            text = mean_and_spread(values[:, j], form, ".1g")
            less = values[:, j] - others[:, j]
            if row is not own and len(less) > 1:
                text += f" ({less.mean():+.2g} ± {1.96 * standard_error(less):.1g})"
            cells.append(text)
        paths = (mean_and_spread(np.asarray(row[name]), ".3g", ".1g") for name in PATHS)
        lines.append([row["coupling"], *cells, *paths])
    about = ", ".join(f"{name} {value:.3g}" for name, value in rows[0]["about"].items())
    return Table(
        ["coupling", *(f"{num}" for num in rows[0]["euler"]), *PATHS],
        lines,
        f"{rows[0]['dataset']}: {measure} by number of evaluations, mean ± sample standard "
        f"deviation over seeds; in brackets less conditional, paired by seed, with 1.96 standard "
        f"errors. Beside: {about}.",
    )


PATHS = ("straightness", "cost")
MEASURES = ("W2²", "frechet", "right")


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: str = "quick"
    """quick: moons, few steps. paper: moons and Fashion-MNIST."""
    dataset: str | None = None
    """Only this one of the preset; a path takes the place of Fashion-MNIST."""
    couplings: tuple[Coupling, ...] = COUPLINGS
    seeds: tuple[int, ...] = (0,)
    num_steps: int | None = None
    """In place of the preset's."""
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}, got {self.preset!r}")
        if "conditional" not in self.couplings:
            raise ValueError("couplings are compared with conditional: name it too")


def chosen(arguments: Arguments) -> list[ConditionalConfig]:
    configs = list(PRESETS[arguments.preset])
    if arguments.dataset is not None:
        named = [config for config in configs if config.dataset == arguments.dataset]
        configs = named or [replace(PRESETS["paper"][1], dataset=arguments.dataset)]
    if arguments.num_steps is not None:
        configs = [replace(config, num_steps=arguments.num_steps) for config in configs]
    return configs


def main(arguments: Arguments, mesh: Mesh | None = None) -> list[Path]:
    """Trains and evaluates; returns the summaries, one per data set."""
    summaries = []
    where: dict[str, Any] = {"results": arguments.results, "mesh": mesh}
    for config in chosen(arguments):
        task = task_of(config, arguments.results, arguments.data_root)
        stem = config.dataset
        if config.dataset != MOONS:
            stem = file_stem(config.dataset, data_root=arguments.data_root)
        rows = []
        for coupling in arguments.couplings:
            one = replace(config, coupling=coupling)
            stored = [
                run_one(one, task, seed=seed, known_as=stem, **where) for seed in arguments.seeds
            ]
            measures = [name for name in (*MEASURES, *PATHS) if name in stored[0]]
            row = asdict(one) | {"about": task.about}
            rows.append(row | {name: np.stack([s[name] for s in stored]) for name in measures})
        path = arguments.results / EXPERIMENT / f"conditional_{stem}_{arguments.preset}.json"
        made = [table(rows, name) for name in MEASURES if name in rows[0]]
        summaries.append(write_summary(path, {"seeds": arguments.seeds, "rows": rows}, made))
    return summaries


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--dataset moons")
