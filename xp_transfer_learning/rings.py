"""Three Gaussian clouds flow to three rings, by four kernels, several bandwidths and momenta.

    python xp_transfer_learning/rings.py --preset quick

All bandwidths of a kernel are one run, a vmap. Finished runs are skipped, interrupted ones resume.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from lib import datasets, mmd, runs
from lib.gd import recorded_steps, wasserstein_gradient_descent
from lib.report.tables import write_summary
from lib.runs.commands import run_command
from lib.runs.processes import DeviceOptions
from xp_transfer_learning import tables
from xp_transfer_learning.config import EXPERIMENT, RINGS, Preset, RingsConfig

# Last losses of Bonet et al. (2025), one run each, seed and draw unknown.
GRID = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
PUBLISHED = {
    "gaussian": dict(zip(GRID, (0.215, 0.090, 0.0, 0.0, 0.0, 0.002))),
    "imq": dict(zip(GRID, (4.291, 1.682, 0.0, 0.0, 0.0, 0.0))),
    "laplace": dict(zip(GRID, (0.333, 0.333, 0.242, 0.171, 0.007, 0.003))),
    "riesz": {0.5: 0.044, 1.0: 0.003, 1.5: 0.000},
    "momentum": {0.0: 0.066, 0.25: 0.042, 0.6: 0.0, 0.9: 0.0},
}


class Sweep(NamedTuple):
    """Flows that differ in one number and run side by side."""

    name: str
    parameter: str
    values: tuple[float, ...]
    target_value_and_grad: Callable
    optimizer: optax.GradientTransformation
    num_steps: int


def sweeps(config: RingsConfig, mesh: Mesh | None = None) -> list[Sweep]:
    """The sweeps of Figure 1 and appendix D.2, and a decaying step."""
    mesh = None if config.num_levels else mesh
    sampling: dict[str, Any] = {
        "num_directions": config.num_directions,
        "num_levels": config.num_levels,
        "mesh": mesh,
    }

    def over(kernel, values):
        def value_and_grad(x, x_tgt, key):
            # One key: the flows see the same directions and differ by their number only.
            def one_flow(x, value):
                return mmd.target_value_and_grad(kernel(value), **sampling)(x, x_tgt, key)

            return jax.vmap(one_flow)(x, jnp.asarray(values, x.dtype))

        return value_and_grad

    constant = optax.sgd(config.step_size)
    listed = [
        Sweep(
            kernel,
            "r" if kernel == "riesz" else "h",
            getattr(config, kernel),
            over(mmd.SLICED_KERNELS[kernel], getattr(config, kernel)),
            constant,
            config.num_steps,
        )
        for kernel in ("gaussian", "imq", "laplace", "riesz")
    ]
    ones = (1.0,) * len(config.momenta)
    decays = jnp.asarray(config.momenta)[:, None, None, None]
    heavy_ball = optax.chain(optax.trace(decays), optax.scale(-config.momentum_step_size))
    listed.append(
        Sweep(
            "momentum",
            "m",
            config.momenta,
            over(mmd.sliced_riesz, ones),
            heavy_ball,
            config.momentum_steps,
        )
    )
    if config.decay:
        falling = optax.sgd(optax.linear_schedule(config.step_size, 0.0, config.num_steps))
        listed.append(
            Sweep("decay", "r", (1.0,), over(mmd.sliced_riesz, (1.0,)), falling, config.num_steps)
        )
    return listed


def data(key, config: RingsConfig) -> tuple[jax.Array, jax.Array]:
    """(x0, x_tgt), each [3, n, 2]: every class starts as N((-.3, 0), 1e-4 I)."""
    key_x0, key_tgt = jax.random.split(key)
    x0 = 0.01 * jax.random.normal(key_x0, (3, config.num_points, 2))
    x0 = x0 + jnp.asarray([-0.3, 0.0]).reshape(1, 1, 2)
    return x0, datasets.rings(key_tgt, config.num_points)


def run_sweep(sweep: Sweep, config: RingsConfig, *, seed: int, results: Path) -> runs.Run:
    """Runs one sweep, or finds it done. Its folder holds losses [T, B] and particles
    [records, B, 3, n, 2]."""
    settings = {
        "parameter": sweep.parameter,
        "values": sweep.values,
        "num_steps": sweep.num_steps,
        "step_size": config.momentum_step_size if sweep.name == "momentum" else config.step_size,
        "num_points": config.num_points,
        "num_directions": config.num_directions,
        "num_levels": config.num_levels,
    }
    run = runs.open_run(results, EXPERIMENT, f"rings_{sweep.name}", settings, seed=seed)
    if run.finished:
        print(f"{run.folder}: done before")
        return run
    key_data, key_flow = jax.random.split(jax.random.PRNGKey(seed))
    x0, x_tgt = data(key_data, config)
    every = 10
    losses, particles = wasserstein_gradient_descent(
        jnp.broadcast_to(x0, (len(sweep.values), *x0.shape)),
        x_tgt,
        sweep.target_value_and_grad,
        key_flow,
        n_epochs=sweep.num_steps,
        optimizer=sweep.optimizer,
        record_every=every,
        run=run,
        description=f"rings, {sweep.name}, seed {seed}",
        stop_at_nonfinite=False,
    )
    run.finish(
        losses=losses,
        particles=particles,
        steps=recorded_steps(sweep.num_steps, every),
        x_tgt=np.asarray(x_tgt),
        values=np.asarray(sweep.values),
    )
    return run


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    preset: Preset = "quick"
    seeds: tuple[int, ...] | None = None
    """Data and directions. None: (0,) for quick, (0, 1, 2, 3, 4) for paper."""
    results: Path = Path("results")


def main(arguments: Arguments, mesh: Mesh | None = None) -> Path:
    """Runs the preset, prints the last losses beside the published ones, draws the figures, and
    returns the path of the summary."""
    from xp_transfer_learning import plot

    seeds = arguments.seeds or ((0,) if arguments.preset == "quick" else (0, 1, 2, 3, 4))
    rows = []
    for config in RINGS[arguments.preset]:
        estimator = "exact" if config.num_levels is None else f"{config.num_levels} percentiles"
        for sweep in sweeps(config, mesh):
            folders = [
                run_sweep(sweep, config, seed=seed, results=arguments.results).folder
                for seed in seeds
            ]
            last = np.stack([runs.Run(f).load_arrays()["losses"][-1] for f in folders])
            for i, value in enumerate(sweep.values):
                rows.append(
                    {
                        "kernel": sweep.name,
                        "estimator": estimator,
                        "parameter": sweep.parameter,
                        "value": value,
                        "num_steps": sweep.num_steps,
                        "last_losses": last[:, i].tolist(),
                        "published": PUBLISHED.get(sweep.name, {}).get(value),
                        "folders": [str(f.relative_to(arguments.results)) for f in folders],
                        "index": i,
                    }
                )
    path = arguments.results / EXPERIMENT / f"rings_{arguments.preset}.json"
    summary = {"preset": arguments.preset, "seeds": seeds, "rows": rows}
    return write_summary(path, summary, [tables.rings_table(rows, len(seeds))], figures=plot.rings)


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="the preset (--preset quick)")
