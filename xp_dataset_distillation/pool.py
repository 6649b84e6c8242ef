"""A pool of networks trained a little on the real images, to condense under.

    python xp_dataset_distillation/pool.py --dataset fashion_mnist --width 32

Features of such networks tell classes apart, those of random ones hardly do. A condensation draws
from the pool in place of random parameters: networks at the end of their training ("trained"), at
the end of any epoch ("aged": IDM, Zhao et al., CVPR 2023; DREAM, Liu et al., ICCV 2023), or on the
line between start and end ("interpolated": DANCE, Zhang et al., IJCAI 2024). One pool serves all
methods, numbers of images and seeds; it is trained once, and kept in its folder.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from lib import augment, runs
from lib.networks import classification, convolution, network_by_name, optimizers
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of
from xp_dataset_distillation.config import EXPERIMENT, CondenseConfig, PoolConfig
from xp_dataset_distillation.evaluation import transform
from xp_dataset_distillation.real_data import known_by_content, setting_of, training_images


def pool_of(config: CondenseConfig) -> PoolConfig:
    """What the pool of a condensation depends on: its data, held-out images aside, and network."""
    return settings_of(PoolConfig, config)


def train_pool(
    config: PoolConfig,
    *,
    results: Path,
    data_root: Path | None = None,
    show_progress: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Trains the pool, or reads it: parameters [networks, 1 + epochs, P] of the networks, as flat
    vectors (`jax.flatten_util.ravel_pytree`), at the start and after each epoch; losses
    [networks, epochs], and seconds."""
    known = known_by_content(config, data_root)
    name = f"networks-{Path(config.dataset).stem}-{config.network}{config.width}"
    run = runs.open_run(results, EXPERIMENT, name, known, seed=0, wait=True)
    if run.finished:
        return run.load_arrays()
    real, _ = training_images(config, data_root)
    setting, began = setting_of(config, real), time.perf_counter()
    network = network_by_name(
        config.network,
        real.num_classes,
        real.image_shape,
        width=config.width,
        depth=config.depth,
        convolution=convolution.fastest(),
    )
    augmentation = augment.parse("color_crop_cutout_flip", dialect="idc", flips=setting.flips)
    images = jnp.asarray(real.images, jnp.float32) / 255
    key = jax.random.key(0)
    blank = jnp.zeros((1, *real.image_shape))

    def flat(parameters):
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(parameters)

    keys = jax.random.split(key, config.pool_networks)
    parameters = jax.vmap(network.init, in_axes=(0, None))(keys, blank)
    ages, losses = [flat(parameters)], []
    for epoch in range(config.pool_epochs):
        parameters, loss = classification.fit_seeds(
            jax.random.split(jax.random.fold_in(key, 1 + epoch), config.pool_networks),
            network,
            images,
            jnp.asarray(real.labels),
            optimizer=optimizers.adam(1e-3),
            num_epochs=1,
            batch_size=128,
            transform=transform(augmentation, setting, 0.0),
            parameters=parameters,
            at_once=False,
            show_progress=show_progress,
            description=f"{name}, epoch {epoch + 1}",
            mesh=mesh,
        )
        ages.append(flat(parameters))
        losses.append(loss[:, 0])
    seconds = time.perf_counter() - began
    run.finish(
        parameters=np.stack(ages, axis=1), losses=np.stack(losses, axis=1),
        seconds=np.asarray(seconds),
    )  # fmt: skip
    return run.load_arrays()


# ---- The command


@dataclass(frozen=True)
class Arguments(DeviceOptions, PoolConfig):
    results: Path = Path("results")
    data_root: Path | None = None
    """A torchvision root. None: the environment's DATA_ROOT, else ./data."""


def main(arguments: Arguments, mesh: Mesh | None = None) -> None:
    """Trains the pool and says what it cost."""
    config = settings_of(PoolConfig, arguments)
    pool = train_pool(config, results=arguments.results, data_root=arguments.data_root, mesh=mesh)
    networks, ages, size = pool["parameters"].shape
    print(
        f"{networks} networks of {size:,} parameters, {ages - 1} epochs, loss "
        f"{pool['losses'][:, -1].mean():.3f}, {float(pool['seconds']):.0f} s"
    )


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--width or --pool_networks")
