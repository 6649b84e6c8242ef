"""Streams files of embeddings that do not fit in memory, and says what binds: disk or arithmetic.

    python benchmarks/mixing_stream.py [--files 4] [--rows 150000] [--dimension 8192] [--out FILE]

Makes files of float16 rows with `torch.save` in a temporary folder (about 10 GB by default, written
by another process, removed at the end), then for each file in turn:
- stream: `stream_mean_embeddings` of `open_rows(...)`, the whole pipeline;
- disk: the same chunks read and dropped;
- features: the mean embedding of float16 chunks that lie in memory already;
- product: only the matrix product of `features`, float32 rows times frequencies.
At last `MMDDataMixer(estimator=...)` takes weights of all files but the last for the last.

How: one process. Before every pass over a file, the file is dropped from the page cache where the
system can do that (Linux), so that the disk is read. Each file is one round of all four, so that
they share any drift; compiling is done before, on a chunk in memory. The limit is the slower of
disk and product, which can overlap. CPU seconds are those of the process, all threads. Peak RSS is
the process's own, from its start to the end of all rounds. The report is written after every round.
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment spares page faults, as in `run.sh`.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from lib.rff import frequency_projections, gaussian_frequencies
from lib.rows.files import RowFile, open_rows
from lib.rows.fourier_means import stream_mean_embeddings
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import make_folder, write_json
from xp_data_mixing.mixing import Estimator
from xp_data_mixing.mmd_data_mixing import MMDDataMixer

MAX_RESIDENT_BYTES = 2e9
IN_MEMORY_CHUNKS = 8  # a round of what needs no file
WHAT = ("stream", "disk", "features", "product")


@dataclasses.dataclass(frozen=True)
class Options:
    """What it costs to stream embeddings, against the disk and the matrix product."""

    files: int = 4
    rows: int = 150_000
    """Rows of each file."""
    dimension: int = 8192
    num_features: int = 1000
    """D, frequencies: twice as many features."""
    num_bandwidths: int = 1
    num_blocks: int = 1
    """Blocks of rows for a bootstrap."""
    chunk_size: int = 1024
    estimator: Estimator = "auto"
    """Of the weights of all files but the last for the last."""
    folder: Path | None = None
    """Where to make the temporary folder; by default where the system makes them."""
    seed: int = 0
    out: Path = Path("results/benchmarks/mixing_stream.json")


# Files


def make_file(path: Path, options: Options, seed: int) -> None:
    """Normal rows of length about 1, in float16; a block of 4096 distinct rows, shifted about."""
    rng = np.random.default_rng(seed)
    block = rng.standard_normal((4096, options.dimension), np.float32) / options.dimension**0.5
    block = torch.from_numpy(block).half()
    rows = torch.empty(options.rows, options.dimension, dtype=torch.float16)
    for start in range(0, options.rows, len(block)):
        part = rows[start : start + len(block)]
        part.copy_(torch.roll(block, start // len(block), dims=1)[: len(part)])
    torch.save(rows, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def make_files(folder: Path, options: Options) -> list[RowFile]:
    """By a process of their own: torch.save wants a whole tensor in memory."""
    needed, free = (
        2 * options.files * options.rows * options.dimension,
        shutil.disk_usage(folder)[2],
    )
    if needed > 0.95 * free:
        raise ValueError(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} are free")
    paths = [folder / f"{i}.pt" for i in range(options.files)]
    for i, path in enumerate(paths):
        maker = multiprocessing.get_context("spawn").Process(
            target=make_file, args=(path, options, options.seed + i)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"making {path} failed")
    return [open_rows(path) for path in paths]


def forget(path: Path) -> bool:
    """Drops a file from the page cache; False where there is no way to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# Measuring


def clock(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Work:
    """The four things that are timed, each a call on a file that returns the rows it did."""

    def __init__(self, options: Options):
        key, block_key, chunk_key = jax.random.split(jax.random.key(options.seed), 3)
        self.size = min(options.chunk_size, options.rows)
        self.frequencies = gaussian_frequencies(key, options.num_features, options.dimension)
        self.bandwidths = np.geomspace(0.5, 2, options.num_bandwidths)
        self.blocks = {"num_blocks": options.num_blocks, "block_key": block_key}
        self.on_device = jax.random.normal(chunk_key, (self.size, options.dimension))
        self.rows = np.tile(np.asarray(self.on_device.astype(jnp.float16)), (IN_MEMORY_CHUNKS, 1))
        self.product_of = jax.jit(frequency_projections)

    def embed(self, sample: Any) -> int:
        return stream_mean_embeddings(
            sample, self.frequencies, self.bandwidths, chunk_size=self.size, **self.blocks
        ).num_rows

    def stream(self, file: RowFile) -> int:
        return self.embed(file)

    def disk(self, file: RowFile) -> int:
        starts = range(0, file.shape[0], self.size)
        return sum(len(file[start : start + self.size]) for start in starts)

    def features(self, file: RowFile) -> int:
        return self.embed(self.rows)

    def product(self, file: RowFile) -> int:
        for _ in range(IN_MEMORY_CHUNKS):
            jax.block_until_ready(self.product_of(self.on_device, self.frequencies))
        return IN_MEMORY_CHUNKS * self.size


def one_round(work: Work, file: RowFile) -> dict[str, dict[str, float]]:
    measured = {}
    for name in WHAT:
        cold = forget(file.path) if name in ("stream", "disk") else None
        done = []
        wall, cpu = clock(lambda name=name, done=done: done.append(getattr(work, name)(file)))
        measured[name] = {"rows": done[0], "wall": wall, "cpu": cpu, "cold": cold}
    return measured


def summary(rounds: list[dict], options: Options, resident: dict[str, int]) -> dict[str, Any]:
    """Rates over all rounds together, and which of them is the limit."""
    rates = {}
    for name in WHAT:
        rows, wall, cpu = (sum(r[name][field] for r in rounds) for field in ("rows", "wall", "cpu"))
        rates[name] = {
            "rows_per_second": rows / wall,
            "bytes_per_second": 2 * options.dimension * rows / wall,
            "cpu_seconds_per_1000_rows": 1000 * cpu / rows,
        }
    flops = 2 * options.dimension * options.num_features
    binds = min("disk", "product", key=lambda name: rates[name]["rows_per_second"])
    limit = rates[binds]["rows_per_second"]
    return {
        "rates": rates,
        "product_flops": flops * rates["product"]["rows_per_second"],
        "binds": binds,
        "share_of_limit": rates["stream"]["rows_per_second"] / limit,
        "resident_bytes": resident,
        "resident_met": resident["peak"] < MAX_RESIDENT_BYTES,
    }


def report(outcome: dict[str, Any], options: Options) -> str:
    lines = [f"{'':10} {'rows/s':>10} {'GB/s':>8} {'CPU s per 1000 rows':>21}"]
    for name, rate in outcome["rates"].items():
        rows, size = rate["rows_per_second"], rate["bytes_per_second"] / 1e9
        lines.append(
            f"{name:10} {rows:10.0f} {size:8.2f} {rate['cpu_seconds_per_1000_rows']:21.3f}"
        )
    total = 2 * options.files * options.rows * options.dimension
    resident = outcome["resident_bytes"]
    met = "below" if outcome["resident_met"] else "NOT below"
    lines += [
        "",
        f"the {outcome['binds']} binds: streaming went at {outcome['share_of_limit']:.0%} of the "
        f"rate it has by itself (the product's is {outcome['product_flops'] / 1e9:.0f} GFLOP/s)",
        f"peak RSS {resident['peak'] / 1e9:.2f} GB, {met} {MAX_RESIDENT_BYTES / 1e9:.0f} GB, for "
        f"{total / 1e9:.2f} GB of files; {resident['before'] / 1e9:.2f} GB before the first file",
    ]
    return "\n".join(lines)


def main(options: Options) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {what}", flush=True)

    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        if options.folder:
            make_folder(options.folder)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        say(f"making {options.files} files of {options.rows} x {options.dimension} in {folder}")
        files = make_files(Path(folder), options)
        say("compiling")
        work = Work(options)
        first, _ = clock(lambda: (work.features(files[0]), work.product(files[0])))
        again, _ = clock(lambda: (work.features(files[0]), work.product(files[0])))
        resident = {"before": peak_resident_bytes()}
        rounds = []
        for i, file in enumerate(files):
            say(f"file {i + 1} of {len(files)}")
            rounds.append(one_round(work, file))
            resident["peak"] = peak_resident_bytes()
            outcome = summary(rounds, options, resident)
            content = {"environment": environment(), "options": options, "load_before": load}
            content |= {"compile_seconds": first - again, "rounds": rounds}
            write_json(options.out, content | outcome)
        for file in files:
            forget(file.path)
        say(f"weights, estimator {options.estimator}")
        paths = [file.path for file in files]
        mixer = MMDDataMixer(
            estimator=options.estimator,
            auto_dimension=options.num_features,
            sigma_bandwidth="auto",
            bootstrap=200,
        )
        wall, cpu = clock(lambda: mixer.mix(paths[:-1], paths[-1:]).weights)
        mixing = {"seconds": wall, "cpu_seconds": cpu, "resident_bytes": peak_resident_bytes()}
        mixing["rows_per_second"] = options.files * options.rows / wall
        write_json(options.out, content | outcome | {"mixing": mixing})
    print("\n" + report(outcome, options))
    print(
        f"weights by {options.estimator}: {mixing['rows_per_second']:.0f} rows/s in all "
        f"({wall:.0f} s), peak RSS {mixing['resident_bytes'] / 1e9:.2f} GB"
    )
    print(f"\nload average before: {load:.1f}; written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
