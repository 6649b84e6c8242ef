"""The energy MMD and its gradient by sorted projections, beside sums over all pairs.

    python benchmarks/sliced_energy.py [--sizes 1000 10000 100000] [--rounds 3] [--out FILE]

n particles from N(0, I), as many target points from N(.3, I), float32. Ours by new directions at
each call, drawn in the call; over pairs: the gradient of `lib.mmd.mmd_squared`, in blocks; geomloss
(`SamplesLoss("energy")`, all pairs in memory, with the gradient), also by KeOps, which compiles a
program for each formula with g++, and POT (`ot.dist` averaged; the value only), where they are
installed: `pip install geomloss pykeops pybind11`. A contender has no larger size than
`--most_pairs` allows. One process, a round of each in turn, median; the first call is apart.

Error: at n = 2,000, the cosine of our gradient with that over pairs, and the relative standard
deviation of the value, over `--draws` draws of the directions.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ot
import tyro

from lib.kernels import riesz
from lib.mmd import mmd_squared, sliced_energy_value_and_grad
from lib.report.spreads import spread
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from xp_transfer_learning.methods import DIRECTIONS


@dataclasses.dataclass(frozen=True)
class Options:
    """The sliced energy MMD beside the exact one."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    dimension: int = 50
    num_directions: int = 100
    block_size: int = 20
    most_pairs: int = 10_000
    """Particles, at most, of which all pairs are looked at."""
    rounds: int = 3
    error_size: int = 2_000
    error_directions: tuple[int, ...] = (50, 100, 500, 1_000, 2_000, 5_000)
    draws: int = 10
    out: Path = Path("results/benchmarks/sliced_energy.json")


def clouds(n: int, dimension: int) -> tuple[Any, Any]:
    x, y = jax.random.normal(jax.random.key(0), (2, n, dimension))
    return x, y + 0.3


def over_pairs(x, y):
    """As ours: half of MMD^2, n times its gradient."""
    value, gradient = jax.value_and_grad(lambda z: mmd_squared(riesz(), z, y) / 2)(x)
    return value, len(x) * gradient


def by_geomloss(x, y, backend: str) -> Callable[[], Any]:
    import torch
    from geomloss import SamplesLoss

    loss = SamplesLoss("energy", backend=backend)
    x, y = (torch.tensor(np.asarray(z)) for z in (x, y))

    def call():
        z = x.clone().requires_grad_()
        value = loss(z, y)
        (gradient,) = torch.autograd.grad(value, z)
        return np.asarray(value.detach()), len(x) * np.asarray(gradient)

    return call


def by_pot(x, y) -> Callable[[], Any]:
    x, y = np.asarray(x), np.asarray(y)

    def call():
        xy, xx, yy = (ot.dist(*pair, metric="euclidean").mean() for pair in ((x, y), (x,), (y,)))
        return xy - xx / 2 - yy / 2, None

    return call


def contenders(n: int, options: Options) -> dict[str, Callable[[], Any]]:
    x, y = clouds(n, options.dimension)
    keys = iter(jax.random.split(jax.random.key(1), 1_000))

    @jax.jit
    def sliced(key, x, y):
        directions = DIRECTIONS["random"](key, options.num_directions, options.dimension)
        return sliced_energy_value_and_grad(x, y, directions, block_size=options.block_size)

    made: dict[str, Callable[[], Any]] = {"ours": lambda: sliced(next(keys), x, y)}
    if n <= options.most_pairs:
        made["over pairs"] = partial(jax.jit(over_pairs), x, y)
        if importlib.util.find_spec("geomloss"):
            made["geomloss"] = by_geomloss(x, y, "tensorized")
            if importlib.util.find_spec("pykeops"):
                made["geomloss, KeOps"] = by_geomloss(x, y, "online")
        made["POT, value"] = by_pot(x, y)
    return made


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def times(options: Options) -> list[dict[str, Any]]:
    rows = []
    for n in options.sizes:
        made = contenders(n, options)
        first = {name: seconds(call) for name, call in made.items()}
        rounds = [
            {name: seconds(call) for name, call in made.items()} for _ in range(options.rounds)
        ]
        median = {name: float(np.median([r[name] for r in rounds])) for name in made}
        values = {name: float(call()[0]) for name, call in made.items()}
        rows.append({"n": n, "first": first, "seconds": median, "values": values})
        shown = ", ".join(f"{name} {s:.3f} s" for name, s in median.items())
        print(f"n = {n:,}: {shown}", flush=True)
    return rows


def errors(options: Options) -> list[dict[str, Any]]:
    x, y = clouds(options.error_size, options.dimension)
    value, gradient = jax.jit(over_pairs)(x, y)
    rows = []
    for kind, draw in DIRECTIONS.items():
        for count in options.error_directions:

            @jax.jit
            def sliced(key, draw=draw, count=count):
                directions = draw(key, count, options.dimension)
                return sliced_energy_value_and_grad(x, y, directions)

            drawn = [sliced(key) for key in jax.random.split(jax.random.key(2), options.draws)]
            values = np.array([v for v, _ in drawn])
            cosines = [
                jnp.vdot(g, gradient) / jnp.linalg.norm(g) / jnp.linalg.norm(gradient)
                for _, g in drawn
            ]
            rows.append(
                {
                    "directions": kind,
                    "count": count,
                    "cosine": float(np.mean(cosines)),
                    "value_spread": float(spread(values) / value),
                    "value_bias": float(values.mean() / value - 1),
                }
            )
            shown = {name: f"{v:.4f}" for name, v in rows[-1].items() if isinstance(v, float)}
            print(f"{kind}, {count}: {shown}", flush=True)
    return rows


def main(options: Options) -> Path:
    load = os.getloadavg()[0]
    rows, measured = times(options), errors(options)
    exponents = {
        name: float(
            np.log(rows[-1]["seconds"][name] / rows[-2]["seconds"][name])
            / np.log(rows[-1]["n"] / rows[-2]["n"])
        )
        for name in (rows[-1]["seconds"] if len(rows) > 1 else ())
    }
    write_json(
        options.out,
        {
            "options": dataclasses.asdict(options),
            "times": rows,
            "exponents": exponents,
            "errors": measured,
            "load_before": load,
            "environment": environment(),
        },
    )
    print(f"exponents in n: {exponents}\nnumbers: {options.out}")
    return options.out


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options), lower="--sizes or --block_size")
