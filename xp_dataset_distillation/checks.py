"""Checks of the MMD behind condensation, and of what condensed sets share with the real ones.

    python xp_dataset_distillation/checks.py mmd
    python xp_dataset_distillation/checks.py moments --dataset fashion_mnist --iterations 1000

`mmd`: samples whose distributions differ in only their first, second or third moment: how many
standard errors of equal distributions each loss is above 0. `moments`: condenses a data set with
each kernel and prints how far the first four moments of its features are from the real ones'.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Union

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from tyro.conf import subcommand

from lib import datasets
from lib.report.spreads import spread
from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_dataset_distillation import condense, losses, moments
from xp_dataset_distillation.config import EXPERIMENT, CondenseConfig, KernelName, Start
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.objectives import network_of
from xp_dataset_distillation.presets import CPU

KERNELS = ("linear", "polynomial", "gaussian", "energy", "rff")


def written(
    name: str, measured: dict, arguments: "Mmd | Moments", *, says: str, heads: list[str], form: str
) -> Path:
    """Writes and prints what a check measured as a table under `heads`; returns the file.

    `says` is what stands in the table; its numbers are means, in the format `form`."""
    (rows,) = measured.values()
    lines = [
        [label, *(format(np.mean(row[head]), form) for head in heads[1:])]
        for label, row in rows.items()
    ]
    path = arguments.results / EXPERIMENT / f"{name}.json"
    return write_summary(path, {"arguments": arguments, **measured}, [Table(heads, lines, says)])


# ---- Known moments


def known_samples(key: jax.Array, which: str, num: int, dimension: int) -> jax.Array:
    """Draws [num, dimension] of independent coordinates. equal: N(0, 1). mean: N(.3, 1). variance:
    N(0, 1.5). skewness: exponential, moved and scaled to mean 0 and variance 1."""
    if which == "skewness":
        return jax.random.exponential(key, (num, dimension)) - 1
    normal = jax.random.normal(key, (num, dimension))
    return {"equal": normal, "mean": normal + 0.3, "variance": 1.5**0.5 * normal}[which]


MOMENTS = ("order 1", "order 2", "order 3", "order 4", "covariance")
DIFFERENCES = ("equal", "mean", "variance", "skewness")


def mmd_table(
    *,
    num: int = 200,
    dimension: int = 5,
    repeats: int = 50,
    kernels: tuple[str, ...] = KERNELS,
) -> dict[str, dict[str, float]]:
    """For each kernel and difference, (mean loss - mean loss of equal distributions) / standard
    deviation of the loss of equal distributions, over `repeats` pairs of samples of `num` points.
    """
    size = {"num": num, "dimension": dimension}
    keys = jax.random.split(jax.random.key(0), (2, len(DIFFERENCES), repeats))
    x = jnp.stack(
        [
            jnp.stack([known_samples(key, which, **size) for key in row])
            for which, row in zip(DIFFERENCES, keys[0])
        ]
    )
    y = jnp.stack([known_samples(key, "equal", **size) for key in keys[1].ravel()])
    pairs = x.reshape(y.shape), y
    table = {}
    for kernel in kernels:
        loss = losses.class_loss(kernel)

        @jax.jit
        def values(keys, pairs, loss=loss):
            return jax.lax.map(lambda drawn: loss(drawn[0], *drawn[1]), (keys, pairs))

        loss_keys = jax.random.split(jax.random.key(1), len(y))
        losses_of = np.asarray(values(loss_keys, pairs)).reshape(len(DIFFERENCES), repeats)
        null = losses_of[DIFFERENCES.index("equal")]
        sizes = (losses_of.mean(axis=1) - null.mean()) / spread(null)
        table[kernel] = dict(zip(DIFFERENCES, sizes.tolist()))
    return table


@dataclass(frozen=True)
class Mmd(DeviceOptions):
    """Distributions that differ in only one moment."""

    num: int = 200
    """Points per sample."""
    dimension: int = 5
    repeats: int = 50
    results: Path = Path("results")


def run_mmd(arguments: Mmd) -> Path:
    table = mmd_table(num=arguments.num, dimension=arguments.dimension, repeats=arguments.repeats)
    says = (
        "How far the mean loss of distributions that differ in one moment lies above that of equal "
        "ones, in standard deviations of the latter."
    )
    heads = ["kernel", *DIFFERENCES[1:]]
    return written("check_mmd", {"table": table}, arguments, says=says, heads=heads, form=".1f")


# ---- Moments of condensed sets


@dataclass(frozen=True)
class Moments(DeviceOptions):
    """Moments of the features of condensed and real images."""

    dataset: str = "digits"
    kernels: tuple[KernelName, ...] = ("linear", "polynomial", "gaussian")
    images_per_class: int = 10
    factor: int = 1
    num_steps: Annotated[int, tyro.conf.arg(aliases=("--iterations",))] = 1000
    step_size: Annotated[float | None, tyro.conf.arg(aliases=("--lr",))] = None
    width: int = CPU.width
    depth: int = CPU.depth
    real_batch: int = CPU.real_batch
    augmentation: str = CPU.augmentation
    num_networks: int = 5
    """Random networks, others than those that condensed, over which the differences are averaged.
    """
    num_real: int = 1000
    """Real images per class, at most."""
    seed: int = 0
    results: Path = Path("results")
    data_root: Path | None = None


def moment_differences(
    config: CondenseConfig, images: np.ndarray, problem: condense.Problem, *,
    num_networks: int, num_real: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`moments.moment_differences` of every class and network, [networks, classes] per measure."""
    network = network_of(config, problem.setting)
    decoded = np.asarray(decode(jnp.asarray(images), config.factor))

    @jax.jit
    def features(parameters, images):
        return network.apply(parameters, problem.setting.normalized(images))

    differences: dict[str, list] = {name: [] for name in MOMENTS}
    for key in jax.random.split(jax.random.key(12345), num_networks):
        parameters = network.init(key, jnp.zeros((1, *problem.real.image_shape)))
        for c, first in enumerate(problem.real.starts):
            count = min(problem.real.counts[c], num_real)
            real = problem.real.images[first : first + count] / np.float32(255)
            pair = [features(parameters, jnp.asarray(images)) for images in (real, decoded[c])]
            orders, covariance = moments.moment_differences(*pair)
            for name, value in zip(MOMENTS, (*orders, covariance)):
                differences[name].append(float(value))
    return {name: np.reshape(values, (num_networks, -1)) for name, values in differences.items()}


def run_moments(arguments: Moments, mesh: Mesh | None = None) -> Path:
    shared = {field.name for field in dataclasses.fields(CondenseConfig)}
    settings = {name: value for name, value in vars(arguments).items() if name in shared}
    start: Start = "real" if arguments.factor == 1 else "mixed"
    base = CondenseConfig(**settings, start=start)
    problem = condense.problem(base, arguments.data_root)
    rows = {}
    key = condense.keys_of(arguments.seed).start
    sets = {"start": condense.start(key, base, problem.real)}
    for kernel in arguments.kernels:
        run = condense.condense(
            replace(base, kernel=kernel),
            seed=arguments.seed,
            results=arguments.results,
            data_root=arguments.data_root,
            mesh=mesh,
        )
        sets[kernel] = run.load_arrays()["images"]
    for label, images in sets.items():
        rows[label] = moment_differences(
            base,
            images,
            problem,
            num_networks=arguments.num_networks,
            num_real=arguments.num_real,
        )
    says = "How far moments of the condensed images' features are from those of the real ones."
    heads = ["condensed by", *MOMENTS]
    stem = datasets.file_stem(arguments.dataset, data_root=arguments.data_root)
    name = f"check_moments_{stem}"
    return written(name, {"rows": rows}, arguments, says=says, heads=heads, form=".4g")


Check = Union[  # noqa: UP007  tyro's subcommands
    Annotated[Mmd, subcommand("mmd")], Annotated[Moments, subcommand("moments")]
]


def main(arguments: Mmd | Moments, mesh: Mesh | None = None) -> Path:
    if isinstance(arguments, Mmd):
        return run_mmd(arguments)
    return run_moments(arguments, mesh)


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Check))
