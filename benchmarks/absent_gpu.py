"""Compiles the main programs for an H100 that is not there: launches and memory of each.

    pip install "jax[cuda12]==VERSION"     # the version of jax that is installed; 6 GB
    python benchmarks/absent_gpu.py [--programs NAME_PART ...] [--fits]

XLA's compiler for GPUs needs no GPU. Its optimized program says how many kernels, copies and
library calls a call launches, loops times their known trip counts, a loop of unknown length once;
of branches the longer counts. Memory is that of arguments, results and temporaries, less what
results take from arguments. Nothing runs, so nothing here is a time.
"""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from gpu_programs import PROGRAMS, Program
from jax.experimental import topologies
from jax.sharding import Mesh
from scaling import GIGABYTES, named, sizes_of, what_fits
from scaling_systems import SYSTEMS, bytes_of, placed

from lib.networks import convolution
from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command

# No tuning of kernels by trial: there is nothing to try them on.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NOT_LAUNCHED = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "add-dependency", "async-start", "async-done", "async-update", "copy-done", "opt-barrier",
    "partition-id", "replica-id",
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    programs: tuple[str, ...] = ()
    """Those whose names hold one of these; none: all."""
    fits: bool = False
    """Instead: the memory of what is said to fill a GPU, by docs/scaling.md."""
    results: Path = Path("results")


def launches(text: str) -> int:
    """Launches of the entry of an optimized program, as printed."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif name and " = " in line:
            computations[name].append(line)

    def called(line: str, role: str) -> list[str]:
        given = re.search(rf"{role}=(?:\{{(.*?)\}}|([\w.\-%]+))", line)
        names = (given[1] or given[2]).split(",") if given else []
        return [name.strip().lstrip("%") for name in names]

    def count(name: str) -> int:
        total = 0
        for line in computations[name]:
            operation = re.search(r"[\])}] ([a-z][\w\-]*)\(", line.split(" = ", 1)[1])
            kind = operation[1] if operation else ""
            if kind == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                body = sum(count(n) for role in ("body", "condition") for n in called(line, role))
                total += (int(trips[1]) if trips else 1) * body
            elif kind == "conditional":
                branches = called(line, "branch_computations")
                branches += called(line, "true_computation") + called(line, "false_computation")
                total += max(map(count, branches))
            elif kind == "call":
                total += sum(map(count, called(line, "to_apply")))
            elif kind not in NOT_LAUNCHED:
                total += 1
        return total

    return count(entry)


def compiled(program: Program, device):
    """The program compiled for the device."""
    with jax.enable_x64(program.double):
        function, arguments, keywords = program.build(device)
        arguments = placed(arguments, Mesh([device], ("devices",)))
        return function.trace(*arguments, **keywords).lower().compile()


def fits(device) -> tuple[list[dict], Table]:
    rows, cells = [], []
    for row, gb in itertools.product(what_fits(), GIGABYTES):
        name, system = row["system"], SYSTEMS[row["system"]]
        sizes = sizes_of(row, gb)
        # Mixing weights are numpy's; some options need so little that time is what ends it.
        if not GIGABYTES[gb] or name == "weights" or "nystrom" in sizes.values():
            continue
        with jax.enable_x64(system.double):
            held = system.program(Mesh([device], ("devices",)), False, **sizes).memory
        held += system.beside(**sizes)
        ratio = held / system.needs(True, **sizes)
        rows.append({"system": name, "sizes": sizes, "bytes": held, "held / said": ratio})
        cells.append([system.title, named(sizes), f"{held / 1e9:.1f}", f"{ratio:.2f}"])
        print(cells[-1], flush=True)
    caption = "Programs of the largest sizes, compiled for an H100 that is not there."
    return rows, Table(["system", "sizes", "GB", "held / said"], cells, caption)


def main(arguments: Arguments) -> Path:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    jax.config.update("jax_platforms", "cpu")
    convolution._on_cpu = lambda: False  # what lib asks the device that is there
    one_gpu = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
    (device,) = topologies.get_topology_desc("", **one_gpu).devices
    path = arguments.results / "benchmarks" / "absent_gpu.json"
    if arguments.fits:
        rows, table = fits(device)
        return write_summary(path.with_stem("absent_gpu_fits"), {"rows": rows}, [table])
    rows, cells = [], []
    for name, program in PROGRAMS.items():
        if arguments.programs and not any(part in name for part in arguments.programs):
            continue
        made = compiled(program, device)
        count, held = launches(made.as_text()), bytes_of(made)
        rows.append({"program": name, "launches": count, "bytes": held})
        cells.append([name, f"{count:,}", f"{held / 1e6:,.0f}"])
        print(cells[-1], flush=True)
    heads = ["program", "launches", "MB"]
    caption = "Compiled for an H100 that is not there; a loop of unknown length counts once."
    return write_summary(path, {"rows": rows}, [Table(heads, cells, caption)])


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments))
