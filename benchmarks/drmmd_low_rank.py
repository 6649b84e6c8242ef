"""DrMMD flows too large for a Gram matrix: seconds per step, and the error against the exact flow.

    python benchmarks/drmmd_low_rank.py [--num_points 20000] [--num_exact 2000] [--out FILE]

Three rings, lambda = 1e-3, gamma = 1e-4, float64. Nystrom features and random Fourier features of
several ranks. The error is that of velocities at the start and after `steps` steps of the exact
flow of `num_exact` particles, relative to the largest velocity; then both flow `steps` steps and
end `moved` apart (root mean square, the exact flow having gone `gone`).
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig
from xp_drmmd.problems import problem


@dataclasses.dataclass(frozen=True)
class Options:
    """Seconds per step and errors of the approximations."""

    num_points: tuple[int, ...] = (20_000, 100_000)
    num_exact: int = 2_000
    nystrom: tuple[int, ...] = (50, 150, 300)
    rff: tuple[int, ...] = (500, 2000)
    steps: int = 200
    rounds: int = 5
    out: Path = Path("results/benchmarks/drmmd_low_rank.json")


def stepper(config: FlowConfig):
    """(start, aim, step): a flow's step, one compiled call of (particles, aim)."""
    setup = problem(config, 0)
    prepared = flows.prepare(config, setup.target)
    value_and_grad = flows.objective(config)
    key = jax.random.PRNGKey(0)

    @jax.jit
    def step(y, prepared):
        return value_and_grad(y[None], prepared, key, flows.first_memory(prepared))[1][0]

    return setup.start, prepared, step


def flow(start, prepared, step, count: int):
    """The particles after `count` steps."""
    advance = jax.jit(
        lambda y, prepared: jax.lax.scan(
            lambda y, _: (y - step(y, prepared), None), y, None, length=count
        )
    )
    return advance(start, prepared)[0]


def main(options: Options) -> None:
    jax.config.update("jax_enable_x64", True)
    load, rows = os.getloadavg()[0], []
    kinds = [("nystrom", rank) for rank in options.nystrom]
    kinds += [("rff", rank) for rank in options.rff]

    def sized(num, **changes):
        count = num - num % 3
        return FlowConfig(source_particle_num=count, target_particle_num=count, **changes)

    start, prepared, step = stepper(sized(options.num_exact))
    end = flow(start, prepared, step, options.steps)
    exact = {"start": step(start, prepared), "end": step(end, prepared)}
    gone = float(jnp.sqrt(jnp.mean(jnp.sum((end - start) ** 2, axis=1))))
    began = time.perf_counter()
    jax.block_until_ready(step(end, prepared))
    print(f"exact, {options.num_exact}: {time.perf_counter() - began:.3f} s per step")
    for kind, rank in kinds:
        changes = {"approximation": kind, "rank": rank}
        _, prepared, step = stepper(sized(options.num_exact, **changes))
        row = {"kind": kind, "rank": rank, "gone": gone}
        for name, at in (("start", start), ("end", end)):
            scale = jnp.abs(exact[name]).max()
            row[f"error_{name}"] = float(jnp.abs(step(at, prepared) - exact[name]).max() / scale)
        own = flow(start, prepared, step, options.steps)
        row["moved"] = float(jnp.sqrt(jnp.mean(jnp.sum((own - end) ** 2, axis=1))))
        row["seconds"] = {}
        for num in options.num_points:
            large, prepared, step = stepper(sized(num, **changes))
            jax.block_until_ready(step(large, prepared))
            times = []
            for _ in range(options.rounds):
                began = time.perf_counter()
                jax.block_until_ready(step(large, prepared))
                times.append(time.perf_counter() - began)
            row["seconds"][str(num)] = float(np.median(times))
        rows.append(row)
        seconds = ", ".join(f"{int(n):,}: {s:.3f} s" for n, s in row["seconds"].items())
        print(
            f"{kind:8s} {rank:5d}: velocities off by {row['error_start']:.1e} at the start, "
            f"{row['error_end']:.1e} after {options.steps} exact steps; flows {row['moved']:.1e} "
            f"apart of {gone:.2f}; a step of {seconds}",
            flush=True,
        )
        about = {"environment": environment(), "options": options, "load_before": load}
        write_json(options.out, {**about, "rows": rows})
    print(f"load before: {load:.2f}; written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
