"""Time and memory against the size of a problem, beside what theory says.

    python benchmarks/scaling.py [--rounds 3] [--out FILE]     (5 minutes of CPU time)
    python benchmarks/scaling.py --memory --out FILE           (as many)
    python benchmarks/scaling.py --fits 8 --out FILE           (a quarter of an hour)
    python benchmarks/scaling.py --quick                       (tiny sizes, to see that it runs)

Sweeps vary one size at a time, in factors of 2, where the leading term should dominate. Seconds of
CPU of the process, median over rounds after a call that warms up, compiling apart; wall seconds
beside them. On a shared machine trust the CPU's, and keep to one core, since threads that wait for
each other spin: `OPENBLAS_NUM_THREADS=1 taskset -c 0 python benchmarks/scaling.py`. Memory is that
of the compiled program: arguments, results, temporaries. Exponents are slopes of log time and log
memory over the largest three sizes, and those of theory the same slopes of its leading term over
the same sizes, so that logarithms count too. Writes JSON, and a figure beside it.

With --memory: the formulas of `scaling_systems.py` beside programs compiled for large sizes, how
large a problem fits, what options save and cost, and memory a device when 1 to 8 share the work (in
a process of its own, whose devices are parts of a CPU: no measure of speed).

With --fits: one step of each system at the largest size said to fit in so many GB, each in a
process of its own, and the most memory that it came to hold.
"""

import ctypes
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib import pyplot as plt
from scaling_systems import SYSTEMS, largest

from lib.devices import device_mesh
from lib.report import plotting
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import rounded, write_json

DEVICES = (1, 2, 4, 8)
GIGABYTES = {8: False, 24: True, 80: True}
"""Memory sizes, and whether they are a GPU's."""
USABLE = 0.75
"""Of a device's memory: what JAX takes of a GPU by default."""
COLUMNS = 5  # of the figure
DIGITS = 4  # of the numbers that are written
SHORTEST = 0.05  # seconds; shorter calls are repeated
MOST_RUN = 10**6  # of a size, with --fits


@dataclasses.dataclass(frozen=True)
class Options:
    """Scaling of all systems."""

    quick: bool = False
    memory: bool = False
    """In place of the sweeps: formulas of memory, what options do, devices, what fits."""
    systems: tuple[str, ...] = ()
    """Whose sweeps; none: all."""
    read: tuple[Path, ...] = ()
    """Results of such parts: put together, in place of measuring."""
    rounds: int = 3
    fits: int | None = None
    """GB for which the largest sizes, of `systems` if given, are run in place of the sweeps."""
    fit_alone: str = ""
    """A system and its sizes, as JSON; prints its peak as JSON and ends."""
    devices_alone: bool = False
    """Prints the memory a device as JSON and ends; for the process that has eight."""
    out: Path = Path("results/benchmarks/scaling.json")


class Sweep(NamedTuple):
    """`time` and `memory` are the leading terms and the power of `variable` in them; `logarithms`
    the power of log n that goes with the time."""

    system: str
    variable: str
    values: tuple[int, ...]
    others: dict[str, Any]
    time: tuple[str, int]
    memory: tuple[str, int]
    logarithms: int = 0

    def theory(self, what: str) -> np.ndarray:
        """The leading term at the values, up to a factor."""
        values = np.array(self.values, float)
        _, power = getattr(self, what)
        logs = self.logarithms if what == "time" else 0
        return values**power * np.log(values) ** logs


def doubled(first: int, count: int) -> tuple[int, ...]:
    return tuple(first * 2**k for k in range(count))


RFF = {"approximation": "rff", "M": 1000, "d": 2}
NYSTROM = {"approximation": "nystrom", "d": 2}

SWEEPS = [
    Sweep("wow", "n", doubled(512, 5), {"C": 5, "d": 8, "L": 500},
          ("C n log²n L", 1), ("C n L", 1), logarithms=2),
    Sweep("wow", "d", doubled(1024, 5), {"C": 10, "n": 256, "L": 100},
          ("C n d L", 1), ("C n d", 1)),
    Sweep("wow", "C", doubled(32, 5), {"n": 16, "d": 8, "L": 500}, ("C² n L", 2), ("C² L", 2)),
    Sweep("wow", "L", doubled(250, 5), {"C": 8, "n": 256, "d": 64},
          ("C n log²n L", 1), ("C n L", 1)),
    Sweep("drmmd", "N", doubled(512, 5), {"M": 256, "d": 2}, ("N²", 2), ("N²", 2)),
    Sweep("drmmd", "M", doubled(256, 6), {"N": 64, "d": 2}, ("M²", 2), ("M²", 2)),
    Sweep("drmmd", "d", doubled(512, 5), {"N": 512, "M": 512}, ("N² d", 1), ("N d", 1)),
    Sweep("drmmd_target", "M", doubled(128, 6), {"d": 2}, ("M³", 3), ("M²", 2)),
    Sweep("drmmd", "N", doubled(8192, 4), RFF | {"rank": 512}, ("N rank", 1), ("rank²", 0)),
    Sweep("drmmd", "rank", doubled(256, 4), RFF | {"N": 16384}, ("N rank", 1), ("rank²", 2)),
    Sweep("drmmd", "M", doubled(4096, 5), NYSTROM | {"N": 512, "rank": 256},
          ("M rank²", 1), ("rank", 0)),
    Sweep("drmmd", "rank", doubled(64, 4), NYSTROM | {"N": 512, "M": 16384},
          ("M rank²", 2), ("rank", 1)),
    Sweep("condensation", "C", doubled(2, 4), {"n": 64, "width": 32, "networks": 1},
          ("C n", 1), ("C n", 1)),
    Sweep("condensation", "n", doubled(64, 5), {"C": 4, "width": 32, "networks": 1},
          ("C n", 1), ("C n", 1)),
    Sweep("condensation", "width", doubled(32, 4), {"C": 4, "n": 64, "networks": 1},
          ("C n width²", 2), ("C n width", 1)),
    Sweep("condensation", "networks", doubled(1, 5), {"C": 4, "n": 64, "width": 32},
          ("networks", 1), ("C n width", 0)),
    Sweep("em", "n", doubled(8192, 4), {"d": 128, "K": 4}, ("n d² K", 1), ("K d²", 0)),
    Sweep("em", "d", doubled(64, 5), {"n": 8192, "K": 4}, ("n d² K", 2), ("K d²", 2)),
    Sweep("em", "K", doubled(4, 4), {"n": 8192, "d": 128}, ("n d² K", 1), ("K d²", 1)),
    Sweep("embeddings", "n", doubled(4096, 4), {"d": 512, "D": 500, "N": 1},
          ("N n d D", 1), ("d D", 0)),
    Sweep("embeddings", "d", doubled(512, 6), {"n": 4096, "D": 500, "N": 1},
          ("N n d D", 1), ("d D", 1)),
    Sweep("embeddings", "D", doubled(500, 6), {"n": 4096, "d": 512, "N": 1},
          ("N n d D", 1), ("d D", 1)),
    Sweep("embeddings", "N", doubled(1, 4), {"n": 4096, "d": 512, "D": 500},
          ("N n d D", 1), ("d D", 0)),
    Sweep("weights", "N", doubled(100, 5), {"D": 500}, ("N³", 3), ("N²", 2)),
]  # fmt: skip

# Of what compiles in a second.
QUICK = [
    Sweep("wow", "n", (2, 4), {"C": 2, "d": 2, "L": 8}, ("C n log²n L", 1), ("C n L", 1), 2),
    Sweep("drmmd", "N", (8, 16), {"M": 8, "d": 2}, ("N²", 2), ("N²", 2)),
    Sweep("embeddings", "n", (256, 512), {"d": 4, "D": 4}, ("n d D", 1), ("d D", 0)),
    Sweep("weights", "N", (4, 8), {"D": 10}, ("N³", 3), ("N²", 2)),
]

# Larger than what the coefficients were read off, and compiled without arrays.
CHECKS = {
    "wow": ({"C": 10, "n": 5000, "d": 3072, "L": 500}, {"C": 100, "n": 500, "d": 784, "L": 500},
            {"C": 10, "n": 5000, "d": 3072, "L": 500, "block_size": 50}),
    "wow_flow": ({"C": 10, "n": 5000, "d": 784, "L": 500}, {"C": 500, "n": 50, "d": 784, "L": 500},
                 {"C": 10, "n": 20_000, "d": 784, "L": 500, "block_size": 50}),
    "drmmd": ({"N": 8000, "M": 8000, "d": 2}, {"N": 20000, "M": 5000, "d": 50},
              {"N": 10**6, "M": 10**5, "d": 50, "approximation": "rff", "rank": 2000},
              {"N": 10**6, "M": 10**5, "d": 50, "approximation": "nystrom", "rank": 300}),
    "drmmd_target": ({"M": 4000, "d": 2}, {"M": 16000, "d": 2}),
    "condensation": ({"C": 10, "n": 256, "width": 128, "ipc": 10, "side": 32, "channels": 3},
                     {"C": 20, "n": 128, "width": 64, "ipc": 50, "class_chunk": 5}),
    "em": ({"n": 50_000, "d": 784, "K": 10}, {"n": 50_000, "d": 300, "K": 100}),
    "embeddings": ({"n": 10**6, "d": 4096, "D": 10_000}, {"n": 10**6, "d": 8192, "D": 2000}),
    "weights": ({"N": 300, "D": 2000}, {"N": 1000, "D": 200}),
}  # fmt: skip

WOW = {"C": 10, "n": 512, "d": 784, "L": 500}
CONDENSATION = {"C": 10, "n": 64, "width": 32}
EMBEDDINGS = {"n": 16384, "d": 1024, "D": 1000}
TURNS = [
    ("wow", WOW, {"block_size": 50}),
    ("wow", WOW, {"n_sample_batch": 64}),
    ("wow", WOW, {"L": 100}),
    ("wow", {"C": 64, "n": 50, "d": 784, "L": 500}, {"block_size": 50}),
    ("drmmd", {"N": 3000, "M": 3000, "d": 2}, {"approximation": "nystrom", "rank": 300}),
    ("drmmd", {"N": 3000, "M": 3000, "d": 2}, {"approximation": "rff", "rank": 1000}),
    ("condensation", CONDENSATION, {"class_chunk": 1}),
    ("condensation", CONDENSATION, {"n": 32}),
    ("em", {"n": 8192, "d": 512, "K": 10}, {"d": 100}),
    ("em", {"n": 8192, "d": 64, "K": 64}, {"block_size": 64}),
    ("embeddings", EMBEDDINGS, {"chunk_size": 256}),
    ("embeddings", EMBEDDINGS, {"D": 250}),
]

SHARED = {
    "wow": {"C": 10, "n": 256, "d": 64, "L": 1024},
    "drmmd": {"N": 1600, "M": 400, "d": 2},
    "condensation": {"C": 8, "n": 64, "width": 16, "augmentation": ""},
    "em": {"n": 8192, "d": 128, "K": 8, "chunk_size": 4096},
    "embeddings": {"n": 8192, "d": 512, "D": 2000},
}

FITS = [
    ("wow_flow", "n", {"C": 10, "d": 784, "L": 500}, {"block_size": 50}),
    ("wow_flow", "C", {"n": 50, "d": 784, "L": 500}, {"block_size": 50}),
    ("drmmd", "N=M", {"d": 2}, {"approximation": "nystrom", "rank": 300}),
    ("condensation", "C", {"n": 256, "width": 128, "ipc": 10, "side": 32, "channels": 3},
     {"class_chunk": 1}),
    ("em", "d", {"n": 50_000, "K": 10}, {}),
    ("embeddings", "D", {"n": 10**9, "d": 4096}, {"chunk_size": 256}),
    ("weights", "N", {"D": 2000}, {}),
]  # fmt: skip


# ---- Measuring


def clock(call: Callable[[], Any], times: int) -> tuple[float, float]:
    """CPU and wall seconds per call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        call()
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def point(name: str, sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One program: seconds, and bytes as compiled. Sweeps share points."""
    return _point(name, tuple(sorted(sizes.items())), rounds)


@cache
def _point(name, sizes, rounds):
    system = SYSTEMS[name]
    with jax.enable_x64(system.double):
        began = time.process_time()
        program = system.program(None, True, **dict(sizes))
        compiling = time.process_time() - began
        first, _ = clock(program.call, 1)
        times = max(1, math.ceil(SHORTEST / max(clock(program.call, 1)[0], 1e-6)))
        timings = np.array([clock(program.call, times) for _ in range(rounds)])
    cpu, wall = map(float, np.median(timings, axis=0))
    compiling += max(0.0, first - cpu)
    return {"cpu": cpu, "wall": wall, "compiling": compiling, "memory": program.memory}


def exponent(sizes, values) -> float:
    """The slope of log value against log size, least squares over the largest three sizes."""
    slope = np.polyfit(np.log(sizes)[-3:], np.log(values)[-3:], 1)[0]
    return round(float(slope), 4) + 0.0  # no -0


def run_sweep(sweep: Sweep, rounds: int) -> dict[str, Any]:
    points = [
        point(sweep.system, sweep.others | {sweep.variable: value}, rounds)
        for value in sweep.values
    ]
    row = sweep._asdict() | {"title": title(sweep), "points": points}
    for what, measured in (("time", "cpu"), ("memory", "memory")):
        expected = sweep.theory(what)
        row[f"{what}_exponent"] = exponent(sweep.values, [p[measured] for p in points])
        row[f"{what}_theory"] = exponent(sweep.values, expected)
        row[f"{what}_shape"] = expected / expected[-1]
    return row


def title(sweep: Sweep) -> str:
    kind = sweep.others.get("approximation")
    return SYSTEMS[sweep.system].title + (f", {kind}" if kind else "")


def check(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The formula of memory beside the compiled program."""
    system = SYSTEMS[name]
    with jax.enable_x64(system.double):
        compiled = system.program(None, False, **sizes).memory
    predicted = system.predicted(**sizes)
    return {"system": name, "sizes": sizes, "compiled": compiled, "ratio": predicted / compiled}


def turn(name: str, base: dict[str, Any], change: dict[str, Any], rounds: int) -> dict[str, Any]:
    """What an option does to memory and time, as factors."""
    before, after = (point(name, sizes, rounds) for sizes in (base, base | change))
    factors = {key: after[key] / before[key] for key in ("memory", "cpu")}
    return {"system": name, "sizes": base, "change": change} | factors


def memory_a_device() -> list[dict[str, Any]]:
    """In a process that has all devices."""
    rows = []
    for name, sizes in SHARED.items():
        system = SYSTEMS[name]
        with jax.enable_x64(system.double):
            held = [system.program(device_mesh(count), False, **sizes).memory for count in DEVICES]
        rows.append({"system": name, "sizes": sizes, "bytes": held})
    return rows


def in_a_process(*arguments: str, **environment: str) -> Any:
    """The JSON that this program prints last."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def what_fits() -> list[dict[str, Any]]:
    rows = []
    for name, variable, sizes, turned in FITS:
        for options in ({}, turned) if turned else ({},):
            row = {"system": name, "variable": variable, "sizes": sizes | options}
            row["largest"] = {
                str(gb): largest(name, variable, USABLE * gb * 1e9, on_gpu, **sizes | options)
                for gb, on_gpu in GIGABYTES.items()
            }
            rows.append(row)
    return rows


def sizes_of(row: dict[str, Any], gigabytes: int) -> dict[str, Any]:
    """All sizes of a row's program that fills so much memory."""
    varied = dict.fromkeys(row["variable"].split("="), row["largest"][str(gigabytes)])
    return row["sizes"] | varied


# Rows that no memory depends on, in place of more than a step needs.
FEWER = {"em": {"n": 4096}, "embeddings": {"n": 2048}}


def run_fits(gigabytes: int, systems: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for row in what_fits():
        name, sizes = row["system"], sizes_of(row, gigabytes) | FEWER.get(row["system"], {})
        if systems and name not in systems:
            continue
        if row["largest"][str(gigabytes)] > MOST_RUN or "class_chunk" in sizes:  # hours
            continue
        system = SYSTEMS[name]
        predicted = system.needs(GIGABYTES[gigabytes], **sizes) + system.host(**sizes)
        measured = in_a_process("--fit_alone", json.dumps([name, sizes]))
        rows.append({"system": name, "sizes": sizes, "predicted": predicted} | measured)
        held, said = measured["peak"] / 1e9, predicted / 1e9
        seconds = f"{measured['seconds']:.0f} s"
        print(f"{name} {named(sizes)}: {held:.2f} GB held, {said:.2f} said; {seconds}", flush=True)
    return rows


def peak_of(name: str, sizes: dict[str, Any]) -> dict[str, float]:
    """The most bytes held while a program runs, its arguments among them: of the device (there also
    while they are made), or else of the process, on Linux, less what it holds with nothing to do.
    Seconds are those of all of it."""
    system, began = SYSTEMS[name], time.perf_counter()
    with jax.enable_x64(system.double):
        device = next(iter(jax.block_until_ready(jax.numpy.zeros(1)).devices()))
        empty = most_resident()
        program = system.program(None, True, **sizes)
        ctypes.CDLL(None).malloc_trim(0)  # what making the arguments took, and glibc keeps
        Path("/proc/self/clear_refs").write_text("5")  # the most from here on
        program.call()
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", most_resident() - empty)
    return {"peak": peak, "seconds": time.perf_counter() - began}


def most_resident() -> int:
    """Bytes, of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---- Printing and drawing


def named(sizes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def show(row: dict[str, Any]) -> None:
    points = row["points"]
    seconds = " ".join(f"{p['cpu']:.3g}" for p in points)
    megabytes = " ".join(f"{p['memory'] / 1e6:.3g}" for p in points)
    print(f"{row['title']}, {row['variable']} = {' '.join(map(str, row['values']))}")
    print(f"    {named(row['others'])}; CPU s {seconds}; MB {megabytes}", end="")
    print(f"; compiling {points[-1]['compiling']:.1f} s")
    for what in ("time", "memory"):
        leading, measured, theory = row[what][0], row[f"{what}_exponent"], row[f"{what}_theory"]
        print(f"    {what}: exponent {measured:.2f}, theory {theory:.2f} ({leading})", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """A column a system: CPU seconds above, memory below; theory through the largest size."""
    present = {row["title"] for row in rows}
    titles = [name for name in dict.fromkeys(map(title, SWEEPS)) if name in present]
    lines = math.ceil(len(titles) / COLUMNS)
    with plotting.style():
        figure, grid = plt.subplots(2 * lines, COLUMNS, figsize=(11, 4.6 * lines))
        for axes in grid.flat:
            axes.set_axis_off()
        for i, name in enumerate(titles):
            line, place = divmod(i, COLUMNS)
            column = grid[2 * line : 2 * line + 2, place]
            for row in (row for row in rows if row["title"] == name):
                draw_sweep(column, row)
            column[0].set_title(name)
            column[1].set_xlabel("size / smallest")
            for axes in column:
                axes.set_axis_on()
                whole_decades(axes)
                axes.legend(fontsize=6.5, handlelength=1, labelspacing=0.2)
        for axes, label in zip(grid[:, 0], ("CPU seconds", "MB, as compiled") * lines, strict=True):
            axes.set_ylabel(label)
        return plotting.save_figure(figure, path)


def draw_sweep(column, row: dict[str, Any]) -> None:
    values = np.array(row["values"]) / row["values"][0]
    for axes, key, unit, what in (
        (column[0], "cpu", 1, "time"),
        (column[1], "memory", 1e6, "memory"),
    ):
        measured = np.array([p[key] for p in row["points"]]) / unit
        label = f"{row['variable']}: {row[f'{what}_exponent']:.2f} ({row[f'{what}_theory']:.2f})"
        (line,) = axes.loglog(values, measured, "o-", ms=3, label=label)
        theory = measured[-1] * np.array(row[f"{what}_shape"])
        axes.loglog(values, theory, lw=0.7, color=line.get_color(), ls="--")


def whole_decades(axes) -> None:
    """And a tick at each doubling."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    doublings = 2 ** np.arange(round(math.log2(axes.dataLim.intervalx[1])) + 1)
    axes.set_xticks(doublings, [str(number) for number in doublings])
    axes.minorticks_off()


def sweeps(options: Options, about: dict[str, Any]) -> dict[str, Any]:
    """Written after each: a long run that is stopped leaves something."""
    results: dict[str, Any] = {"runs": [about], "sweeps": []}
    for sweep in QUICK if options.quick else SWEEPS:
        if options.systems and sweep.system not in options.systems:
            continue
        row = run_sweep(sweep, options.rounds)
        show(row)
        results["sweeps"].append(row)
        write_json(options.out, rounded(results, DIGITS))
    return results


def together(paths: tuple[Path, ...]) -> dict[str, Any]:
    parts = [json.loads(path.read_text()) for path in paths]
    names = ("runs", "sweeps", "checks", "turns", "devices", "ran")
    merged = {name: [row for part in parts for row in part.get(name, [])] for name in names}
    return merged | {"fits": what_fits()}


def memory(options: Options) -> dict[str, Any]:
    checks = []
    for name, listed in CHECKS.items():
        for sizes in listed:
            row = check(name, sizes)
            compiled = f"{row['compiled'] / 1e9:.3g} GB compiled"
            print(
                f"{name} {named(sizes)}: {compiled}, formula {row['ratio']:.2f} of it", flush=True
            )
            checks.append(row)
    fits = what_fits()
    for row in fits:
        print(f"{row['system']} {named(row['sizes'])}: largest {row['variable']} {row['largest']}")
    turns = []
    for name, base, change in TURNS:
        row = turn(name, base, change, options.rounds)
        factors = f"memory x {row['memory']:.2f}, CPU x {row['cpu']:.2f}"
        print(f"{name} {named(base)}, {named(change)}: {factors}", flush=True)
        turns.append(row)
    flags = f"--xla_force_host_platform_device_count={DEVICES[-1]}"
    devices = in_a_process("--devices_alone", XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    for row in devices:
        shares = " ".join(f"{share / row['bytes'][0]:.2f}" for share in row["bytes"])
        print(f"{row['system']} {named(row['sizes'])}, devices {DEVICES}: {shares}")
    return {"checks": checks, "fits": fits, "turns": turns, "devices": devices}


def main(options: Options) -> dict[str, Any]:
    if options.devices_alone:
        print(json.dumps(memory_a_device()))
        return {}
    if options.fit_alone:
        print(json.dumps(peak_of(*json.loads(options.fit_alone))))
        return {}
    about = {"environment": environment(), "load_before": os.getloadavg()[0]}
    about["cores_used"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if options.memory:
        results = {"runs": [about]} | memory(options)
    elif options.fits:
        results = {"runs": [about], "ran": run_fits(options.fits, options.systems)}
    else:
        results = together(options.read) if options.read else sweeps(options, about)
        print(draw(results["sweeps"], options.out.with_suffix(".png")))
    write_json(options.out, rounded(results, DIGITS))
    print(f"written to {options.out}")
    return results


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
