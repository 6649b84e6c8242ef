"""Times a step of the (de)-regularized MMD flows: ours against the published way.

    python benchmarks/drmmd.py [--sizes 300 600 1200] [--rounds 7] [--out FILE]

Three rings, N = M particles and target points in two dimensions, lambda = 1e-3, float64. Fixed
lambda, adaptive lambda, KALE and MMD; ours with everything a step of `xp_drmmd` does (value
included), the published one rebuilt in `published_drmmd.py`. Both run as flows do, many steps in
one compiled loop, from particles some steps on the way, so that KALE's Newton starts as warm as it
does within a flow. Both velocities are compared before anything is timed. One process, rounds in
turn, median; compiling is timed apart.
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published_drmmd as published
import tyro

from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig
from xp_drmmd.problems import problem

FLOORS = {"fixed": 7, "adaptive": 15, "kale": 15}
"""How many times faster than published ours is to be at N = M = 300, on a CPU."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Our step against the published one."""

    sizes: tuple[int, ...] = (300, 600, 1200)
    rounds: int = 7
    steps: int = 50
    """Timed at a time."""
    steps_before: int = 200
    out: Path = Path("results/benchmarks/drmmd.json")


CONFIGS = {
    "mmd": FlowConfig(flow="mmd"),
    "fixed": FlowConfig(),
    "adaptive": FlowConfig(adaptive="published"),
    "kale": FlowConfig(flow="kale"),
}


def loop(step, count: int):
    """`count` steps as one compiled call."""
    return jax.jit(lambda state: jax.lax.scan(lambda s, _: (step(s), None), state, length=count)[0])


def contenders(name: str, config: FlowConfig, count: int):
    """({contender: a call that takes `count` steps}, seconds each took to compile, the relative
    difference of the two velocities)."""
    start, target, *_ = problem(config, 0)
    prepared = flows.prepare(config, target)
    value_and_grad = flows.objective(config)
    key = jax.random.PRNGKey(0)

    def ours(state):
        y, memory = state
        _, velocity, memory = value_and_grad(y[None], prepared, key, memory)
        return y - velocity[0], memory

    before = loop(ours, Options.steps_before)((start, flows.first_memory(prepared)))
    y, memory = before
    (_, _, step_size), velocity, _ = (z[0] for z in value_and_grad(y[None], prepared, key, memory))
    ell, fixed = config.bandwidth, config.lmbda
    if name == "mmd":
        theirs = partial(published.mmd_velocity, x=target, bandwidth=ell)
    elif name == "fixed":
        regularized = published.inverse(target, fixed, ell)
        theirs = partial(
            published.drmmd_velocity, x=target, regularized=regularized, lmbda=fixed, bandwidth=ell
        )
    elif name == "adaptive":
        first = memory.first_value[0]

        def theirs(y):
            return published.adaptive_step(y, target, memory.lmbda[0], fixed, first, ell)[0]
    else:
        theirs = partial(published.kale_velocity, x=target, lmbda=fixed, bandwidth=ell)
    expected = jax.jit(theirs)(y)
    difference = float(jnp.abs(velocity / step_size - expected).max() / jnp.abs(expected).max())
    calls = {
        "ours": partial(loop(ours, count), before),
        "published": partial(loop(lambda y: y - step_size * theirs(y), count), y),
    }
    compiling = {}
    for contender, call in calls.items():
        began = time.perf_counter()
        jax.block_until_ready(call())
        compiling[contender] = time.perf_counter() - began
    return calls, compiling, difference


def measure(calls: dict, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds per step."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name].append((wall / count, cpu / count))
    return {
        name: dict(zip(("wall", "cpu"), np.median(each, axis=0).tolist()))
        for name, each in times.items()
    }


def main(options: Options) -> None:
    jax.config.update("jax_enable_x64", True)
    load, rows = os.getloadavg()[0], []
    print(f"{'N = M':>6s} {'flow':9s} {'ours ms':>8s} {'published':>9s} {'wall':>6s} {'CPU':>6s}")
    for size in options.sizes:
        for name, base in CONFIGS.items():
            config = dataclasses.replace(base, source_particle_num=size, target_particle_num=size)
            calls, compiling, error = contenders(name, config, options.steps)
            times = measure(calls, options.steps, options.rounds)
            ratio = {t: times["published"][t] / times["ours"][t] for t in ("wall", "cpu")}
            floor = FLOORS.get(name) if size == 300 else None
            rows.append(
                {"size": size, "flow": name, "times": times, "compiling": compiling}
                | {"ratio": ratio, "floor": floor, "difference": error}
            )
            print(
                f"{size:6d} {name:9s} {1e3 * times['ours']['wall']:8.2f} "
                f"{1e3 * times['published']['wall']:9.2f} "
                f"{ratio['wall']:5.1f}x {ratio['cpu']:5.1f}x "
                f"{'' if floor is None else f'{floor}x':5s} velocities differ by {error:.1e}",
                flush=True,
            )
            about = {"environment": environment(), "options": options, "load_before": load}
            write_json(options.out, {**about, "rows": rows})
    print(f"load before: {load:.2f}; written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
