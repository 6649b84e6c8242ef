"""Times the sliced-Wasserstein MMD flow: our step against the published way to compute it.

    python benchmarks/flows.py [--shapes 3 80 2 10 100 784] [--repeats 7] [--out FILE]

What is compared, for (C, n, d) particles and as many targets, on the CPU and on JAX's GPU if any:
- step: F = MMD^2 / 2 and its WoW gradient, fresh directions at every call. `ours` is
  `lib.mmd.target_value_and_grad_*`; `published` the percentile form with automatic differentiation
  (`published_wow.py`, rebuilt from its description). Their values estimate the same F.
- pair: SW_2 of one pair of clouds along given directions. Ours against POT's NumPy backend, and
  value with gradient against POT's PyTorch backend; CPU only.
- parts: what our step is made of, each part compiled by itself, beside the least time in which this
  machine could do it (arithmetic at its float32 matrix-product rate, or reading every input and
  writing every output once at its copy bandwidth, whichever is longer).
- flow: `wasserstein_gradient_descent` over 1 and 20 steps, so that what a flow costs once and what
  the engine adds to a step come apart.

How: one process, one call at a time. Lowering and compiling are timed apart, two calls warm up,
then rounds A, B, A, B, ... share any drift fairly. A call shorter than ROUND_SECONDS is repeated
within its round and the mean is kept. Wall time is the median over rounds (with minimum and
quartiles); CPU time is that of the whole process, all threads. Temporaries are what XLA plans to
allocate beside inputs and outputs. The machine's load before each shape is kept too: on a busy
machine wall times say little, CPU times and temporaries more. The report is written after every
shape, with the raw rounds.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ot
import published_wow
import torch
import tyro

from lib.gd import wasserstein_gradient_descent
from lib.mmd import (
    target_value_and_grad_gaussian,
    target_value_and_grad_imq,
    target_value_and_grad_laplace,
    target_value_and_grad_riesz,
)
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.sliced_wasserstein import (
    exact_coupling,
    pairwise_cost,
    project,
    random_directions,
    self_pairwise_cost,
    sliced_wasserstein,
    sort_columns,
    sort_with_permutation,
)
from lib.sliced_wasserstein._sorting import _take_rows

Shape = tuple[int, int, int]

OURS = {
    "riesz": target_value_and_grad_riesz,
    "gaussian": target_value_and_grad_gaussian,
    "laplace": target_value_and_grad_laplace,
    "imq": target_value_and_grad_imq,
}
PUBLISHED = {
    "riesz": published_wow.riesz,
    "gaussian": published_wow.gaussian,
    "laplace": published_wow.laplace,
    "imq": published_wow.imq,
}

# How many times faster than the published step ours must be on a CPU: Riesz kernel, 500 directions.
FLOORS = {(3, 80, 2): 10, (10, 100, 784): 8, (10, 500, 784): 6, (40, 50, 784): 80}
MAX_TEMPORARY_BYTES = 100 * 2**20

ROUND_SECONDS = 0.1
QUIET_LOAD = 0.5
FLOW_STEPS = 20
NUM_VALUES = 3
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """Our flow step against the published one."""

    shapes: tuple[Shape, ...] = tuple(FLOORS)
    """Triples C n d, one after the other."""
    kernel: Literal["riesz", "gaussian", "laplace", "imq"] = "riesz"
    """Kernel between measures, with its default bandwidth or exponent."""
    projections: int = 500
    """Directions per step."""
    repeats: int = 7
    """Rounds of timing."""
    seed: int = 0
    out: Path = Path("results/benchmarks/flows.json")


# Measuring


class Contender(NamedTuple):
    """`call(i)` does the work on the i-th inputs and returns when it is done."""

    name: str
    call: Callable[[int], Any]
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


def compiled(name: str, function: Callable, arguments: Callable[[int], tuple]) -> Contender:
    """`function` compiled for `arguments(0)`; call i runs it on `arguments(i)`."""
    started = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments(0))
    middle = time.perf_counter()
    program = lowered.compile()
    ended = time.perf_counter()
    return Contender(
        name,
        lambda i: jax.block_until_ready(program(*arguments(i))),
        middle - started,
        ended - middle,
        program.memory_analysis().temp_size_in_bytes,
    )


def clock(contender: Contender, calls: range) -> tuple[float, float]:
    """Wall and CPU seconds per call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for i in calls:
        contender.call(i)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / len(calls), cpu / len(calls)


def measure(contenders: Sequence[Contender], repeats: int) -> dict[str, dict[str, Any]]:
    """The statistics of each contender, from rounds in which each runs in turn."""
    counts = {}
    for contender in contenders:
        contender.call(0)
        counts[contender.name] = math.ceil(ROUND_SECONDS / clock(contender, range(1, 2))[0])
    rounds = {contender.name: [] for contender in contenders}
    for number in range(repeats):
        for contender in contenders:
            count = counts[contender.name]
            first = 2 + number * count
            rounds[contender.name].append(clock(contender, range(first, first + count)))
    result = {}
    for contender in contenders:
        wall, cpu = np.array(rounds[contender.name]).T
        result[contender.name] = {
            "lower_seconds": contender.lower_seconds,
            "compile_seconds": contender.compile_seconds,
            "temporary_bytes": contender.temporary_bytes,
            "wall": float(np.median(wall)),
            "wall_min": float(wall.min()),
            "wall_quartiles": np.percentile(wall, [25, 75]),
            "cpu": float(np.median(cpu)),
            "calls_per_round": counts[contender.name],
            "wall_rounds": wall,
            "cpu_rounds": cpu,
        }
    return result


def machine_rates(repeats: int) -> dict[str, float]:
    """Arithmetic of a float32 matrix product, and bytes read and written by an in-place update."""
    size, length = 2048, 2**26
    matrices = [jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0))]
    matmul = compiled("matmul", partial(jnp.matmul, precision="highest"), lambda i: matrices)
    held = [jnp.ones(length, jnp.float32)]
    update = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy(i):
        held[0] = jax.block_until_ready(update(held[0]))

    times = measure([matmul, Contender("copy", copy)], repeats)
    return {
        "matmul_flops": 2 * size**3 / times["matmul"]["wall"],
        "copy_bytes": 2 * 4 * length / times["copy"]["wall"],
    }


# What is measured


class Inputs(NamedTuple):
    x: jax.Array
    y: jax.Array
    keys: list[jax.Array]

    def step(self, i: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.x, self.y, self.keys[i % len(self.keys)]


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Classes of Gaussian points about means of their own."""
    num_classes, _, dimension = shape
    key_x, key_y, key_means, key_calls = jax.random.split(jax.random.key(seed), 4)
    means = jax.random.normal(key_means, (2, num_classes, 1, dimension))
    x = 0.3 * jax.random.normal(key_x, shape) + means[0]
    y = 0.3 * jax.random.normal(key_y, shape) + means[1]
    return Inputs(x, y, list(jax.random.split(key_calls, 64)))


def our_step(options: Options) -> Callable:
    return partial(OURS[options.kernel], n_projs=options.projections)


def published_step(options: Options) -> Callable:
    kernel = PUBLISHED[options.kernel](num_projections=options.projections)
    return partial(published_wow.value_and_grad, kernel)


def step_contenders(inputs: Inputs, options: Options) -> list[Contender]:
    return [
        compiled("ours", our_step(options), inputs.step),
        compiled("published", published_step(options), inputs.step),
    ]


class Part(NamedTuple):
    """A contender, with its arithmetic and the bytes it must at least move."""

    contender: Contender
    flops: float
    bytes: float


def part_contenders(inputs: Inputs, options: Options) -> list[Part]:
    """The parts of `lib.mmd.wow_value_and_grad`, on the arrays that they get there."""
    x, y, keys = inputs
    (num_classes, n, dimension), count = x.shape, options.projections
    p = 1 if options.kernel == "laplace" else 2
    coupling = exact_coupling(n, n)
    mass = coupling.mass.astype(x.dtype)
    directions = random_directions(keys[0], count, dimension)
    projected_x, projected_y = project(x, directions), project(y, directions)
    sorted_x, origin = sort_with_permutation(projected_x)
    sorted_y = sort_columns(projected_y)
    slopes = jax.random.normal(keys[1], (num_classes, num_classes))

    def costs(u, v):
        return (
            self_pairwise_cost(u, mass, p),
            pairwise_cost(u, v, mass, p),
            self_pairwise_cost(v, mass, p),
        )

    def pair_slopes(u, v, slopes):
        # The costs are not returned, so XLA drops them: what is left is the reverse pass.
        _, reverse = jax.vjp(lambda u: costs(u, v)[:2], u)
        return reverse((slopes, slopes))

    def unsort(values, origin):
        return jax.linear_transpose(lambda rows: _take_rows(rows, origin), values)(values)

    def back_projection(values, directions):
        return jax.linear_transpose(lambda points: project(points, directions), x)(values)

    # Sizes in float32 or int32 values.
    points, line, thetas = num_classes * n * dimension, num_classes * n * count, count * dimension
    pairs, product = num_classes * line, 2 * line * dimension
    rows = [
        ("directions", partial(random_directions, num_directions=count, dimension=dimension),
         None, 0, thetas),
        ("projection", lambda x, y, thetas: (project(x, thetas), project(y, thetas)),
         (x, y, directions), 2 * product, 2 * points + thetas + 2 * line),
        ("sort (y)", sort_columns, (projected_y,), 0, 2 * line),
        ("permutation sort (x)", sort_with_permutation, (projected_x,), 0, 3 * line),
        ("pair costs", costs, (sorted_x, sorted_y), 3 * 3 * pairs, 2 * line),
        ("pair slopes", pair_slopes, (sorted_x, sorted_y, slopes), 2 * 4 * pairs, 3 * line),
        ("unsort (x)", unsort, (sorted_x, origin), 0, 3 * line),
        ("back-projection", back_projection, (sorted_x, directions), product,
         points + thetas + line),
    ]  # fmt: skip
    return [
        Part(
            compiled(name, function, lambda i, a=arguments: a or (keys[i % len(keys)],)),
            flops,
            4 * values,
        )
        for name, function, arguments, flops, values in rows
    ]


def pair_contenders(inputs: Inputs, options: Options) -> list[Contender]:
    """One pair of clouds along the same directions: ours and POT's."""
    x, y = inputs.x[0], inputs.y[0]
    draws = [random_directions(key, options.projections, x.shape[1]) for key in inputs.keys[:8]]
    x_numpy, y_numpy = np.asarray(x), np.asarray(y)
    x_torch, y_torch = torch.tensor(x_numpy, requires_grad=True), torch.tensor(y_numpy)
    numpy_draws = [np.ascontiguousarray(draw.T) for draw in draws]
    torch_draws = [torch.tensor(draw) for draw in numpy_draws]

    def arguments(i):
        return x, y, draws[i % len(draws)]

    def pot_numpy(i):
        projections = numpy_draws[i % len(draws)]
        return ot.sliced_wasserstein_distance(x_numpy, y_numpy, projections=projections)

    def pot_torch(i):
        projections = torch_draws[i % len(draws)]
        value = ot.sliced_wasserstein_distance(x_torch, y_torch, projections=projections)
        (gradient,) = torch.autograd.grad(value, x_torch)
        return value.detach(), gradient

    return [
        compiled("pair: ours, value", sliced_wasserstein, arguments),
        Contender("pair: POT numpy, value", pot_numpy),
        compiled("pair: ours, gradient", jax.value_and_grad(sliced_wasserstein), arguments),
        Contender("pair: POT torch, gradient", pot_torch),
    ]


def flow_contenders(inputs: Inputs, options: Options) -> list[Contender]:
    # One function object for both: the engine's compiled loop is cached by it.
    function = our_step(options)

    def flow(i, steps):
        return wasserstein_gradient_descent(
            *inputs.step(i)[:2],
            function,
            inputs.step(i)[2],
            n_epochs=steps,
            lr=0.01,
            show_progress=False,
        )

    return [
        Contender("flow, 1 step", partial(flow, steps=1)),
        Contender(f"flow, {FLOW_STEPS} steps", partial(flow, steps=FLOW_STEPS)),
    ]


def benchmark(
    shape: Shape, platform: str, options: Options, rates: dict, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything about one shape, on the default device."""
    load = os.getloadavg()[0]
    inputs = make_inputs(shape, options.seed)
    say("compiling the steps")
    steps = step_contenders(inputs, options)
    say("timing the steps")
    contenders = measure(steps, options.repeats)
    values = {step.name: [float(step.call(i)[0]) for i in range(NUM_VALUES)] for step in steps}
    say("the parts of ours")
    parts = part_contenders(inputs, options)
    part_times = measure([part.contender for part in parts], options.repeats)
    for part in parts:
        bound = max(part.flops / rates["matmul_flops"], part.bytes / rates["copy_bytes"])
        part_times[part.contender.name] |= {"flops": part.flops, "bytes": part.bytes}
        part_times[part.contender.name]["least_seconds"] = bound
    say("short flows")
    contenders |= measure(flow_contenders(inputs, options), options.repeats)
    if platform == "cpu":
        say("single pairs, beside POT")
        pairs = pair_contenders(inputs, options)
        contenders |= measure(pairs, options.repeats)
        results = {pair.name: pair.call(0) for pair in pairs}
        values |= {k: float(v[0] if isinstance(v, tuple) else v) for k, v in results.items()}
    result = {
        "platform": platform,
        "shape": shape,
        "load_average_before": load,
        "contenders": contenders,
        "values": values,
        "parts": part_times,
    }
    return result | {"ratios": ratios(result, options)}


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def milliseconds(seconds: float | None) -> str:
    return (
        "-"
        if seconds is None
        else f"{1e3 * seconds:.3g}"
        if seconds < 1
        else f"{1e3 * seconds:.0f}"
    )


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.1f}"


def label(result: dict) -> str:
    return f"{result['platform']} {','.join(map(str, result['shape']))}"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def ratios(result: dict, options: Options) -> dict[str, Any]:
    """Published over ours. The floor was set for a CPU, the Riesz kernel and 500 directions."""
    ours, published = (result["contenders"][name] for name in ("ours", "published"))
    standing = options.kernel == "riesz" and options.projections == 500
    floor = FLOORS.get(tuple(result["shape"])) if standing and result["platform"] == "cpu" else None
    wall, cpu = (published[time] / ours[time] for time in ("wall", "cpu"))
    return {
        "wall": wall,
        "cpu": cpu,
        "temporaries": published["temporary_bytes"] / max(1, ours["temporary_bytes"]),
        "floor": floor,
        "wall_met": None if floor is None else wall >= floor,
        "cpu_met": None if floor is None else cpu >= floor,
        "temporaries_met": ours["temporary_bytes"] < MAX_TEMPORARY_BYTES,
    }


def ratio_table(results: Sequence[dict]) -> str:
    def row(result):
        ours, published = (result["contenders"][name] for name in ("ours", "published"))
        ratio = result["ratios"]
        floor = ratio["floor"]
        return [
            label(result),
            *map(milliseconds, (ours["wall"], published["wall"])),
            f"{ratio['wall']:.1f}x",
            f"{ratio['cpu']:.1f}x",
            "-" if floor is None else f"{floor}x",
            *("-" if floor is None else verdict(ratio[f"{t}_met"]) for t in ("wall", "cpu")),
            *map(mebibytes, (ours["temporary_bytes"], published["temporary_bytes"])),
            verdict(ratio["temporaries_met"]),
            *(f"{np.mean(result['values'][name]):.4g}" for name in ("ours", "published")),
        ]

    header = ["C,n,d", "ours ms", "published ms", "wall", "CPU", "floor", "wall", "CPU"]
    header += ["ours MiB", "published MiB", f"< {MAX_TEMPORARY_BYTES // MIB} MiB"]
    header += ["F ours", "F published"]
    return table(header, [row(result) for result in results])


def contender_table(results: Sequence[dict]) -> str:
    rows = []
    for result in results:
        for name, contender in result["contenders"].items():
            low, high = contender["wall_quartiles"]
            rows.append(
                [
                    f"{label(result)}: {name}",
                    *map(milliseconds, (contender["wall"], contender["wall_min"], high - low)),
                    milliseconds(contender["cpu"]),
                    mebibytes(contender["temporary_bytes"]),
                    *map(milliseconds, (contender["lower_seconds"], contender["compile_seconds"])),
                ]
            )
    header = ["", "wall ms", "min", "IQR", "CPU ms", "MiB", "lower ms", "compile ms"]
    return table(header, rows)


def part_table(results: Sequence[dict]) -> str:
    rows = []
    for result in results:
        step = result["contenders"]["ours"]
        parts = result["parts"]
        total = {
            quantity: sum(part[quantity] for part in parts.values())
            for quantity in ("wall", "cpu", "least_seconds")
        }
        for name, part in (*parts.items(), ("sum of parts", total)):
            rows.append(
                [
                    f"{label(result)}: {name}",
                    *map(milliseconds, (part["wall"], part["cpu"])),
                    f"{part['wall'] / step['wall']:.0%}",
                    milliseconds(part["least_seconds"]),
                    f"{part['wall'] / part['least_seconds']:.1f}",
                ]
            )
        whole = map(milliseconds, (step["wall"], step["cpu"]))
        rows.append([f"{label(result)}: whole step", *whole, "100%", "-", "-"])
    header = ["", "wall ms", "CPU ms", "of the step", "least ms", "wall / least"]
    return table(header, rows)


def engine_lines(results: Sequence[dict]) -> list[str]:
    lines = []
    for result in results:
        contenders = result["contenders"]
        one, many = contenders["flow, 1 step"], contenders[f"flow, {FLOW_STEPS} steps"]
        step = (many["wall"] - one["wall"]) / (FLOW_STEPS - 1)
        lines.append(
            f"{label(result)}: a flow of one step takes {milliseconds(one['wall'])} ms, each "
            f"further step {milliseconds(step)} ms; the bare step "
            f"{milliseconds(contenders['ours']['wall'])} ms"
        )
    return lines


# The run


def devices() -> list[jax.Device]:
    """A CPU, and a GPU if JAX finds one."""
    one_of_each = jax.devices("cpu")[:1]
    if jax.default_backend() != "cpu":
        one_of_each.append(jax.devices()[0])
    return one_of_each


def report(results: Sequence[dict], rates: dict[str, dict[str, float]]) -> str:
    sections = [
        "Published over ours (F: mean over the same keys)\n" + ratio_table(results),
        "Everything timed\n" + contender_table(results),
        "The parts of our step\n" + part_table(results),
        "The engine\n" + "\n".join(engine_lines(results)),
        "The machine\n"
        + "\n".join(
            f"{platform}: float32 matrix product {rate['matmul_flops'] / 1e9:.0f} GFLOP/s, "
            f"copy {rate['copy_bytes'] / 1e9:.1f} GB/s (read + written)"
            for platform, rate in rates.items()
        ),
    ]
    load = max(result["load_average_before"] for result in results)
    if load > QUIET_LOAD:
        sections.append(f"The machine was busy: load average {load:.1f} before a shape.")
    return "\n\n".join(sections)


def main(options: Options) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {what}", flush=True)

    results, rates = [], {}
    for device in devices():
        with jax.default_device(device):
            say(f"{device.platform}: rates of the machine")
            rates[device.platform] = machine_rates(options.repeats)
            for shape in options.shapes:
                name = f"{device.platform} {','.join(map(str, shape))}"
                result = benchmark(
                    shape,
                    device.platform,
                    options,
                    rates[device.platform],
                    lambda what, name=name: say(f"{name}: {what}"),
                )
                results.append(result)
                # After every shape, so that an interrupted run leaves what it has measured.
                content = {"environment": environment(), "options": options, "machine": rates}
                write_json(options.out, content | {"results": results})
    print("\n" + report(results, rates))
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
