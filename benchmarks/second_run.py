"""How long a command takes to its first step, and to compile: the first time, and the second.

    python benchmarks/second_run.py [--commands NAME ...]

Each command runs twice in processes of its own, with a cache of compiled programs that is empty at
first (`lib.runs.keep_compiled_programs`) and results that the second run does not find. Seconds are
from the start of Python, imports included, to the end of the first chunk of steps (of commands
without steps, to the end); tracing, lowering and compiling as JAX reports them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from lib.report.tables import Table, write_summary
from lib.runs.commands import run_command
from lib.runs.settings import chosen

COMMANDS = {
    "image_flow": "xp_transfer_learning/image_flow.py --preset quick --n_epochs 5",
    "run": "xp_drmmd/run.py --step_num 200",
    "condense": "xp_dataset_distillation/condense.py echo --dataset digits --iterations 5 "
    "--images_per_class 1",
    "transfer": "xp_transfer_learning/transfer.py --preset quick",
    "flow": "xp_gmm_source/flow.py --dataset digits --num_steps 20 --num_samples 300",
    "gmm_fit": "xp_gmm_source/gmm_fit.py --dataset digits --n_components 2 --output_dir {results}",
    "mmd_data_mixing": "xp_data_mixing/mmd_data_mixing.py --train_paths {data}/0.npy "
    "{data}/1.npy --val_paths {data}/2.npy --sigma_bandwidth auto --output_file {results}/mix.json",
}
WATCH = """
import atexit, json, os, runpy, sys, time
seconds = {"tracing": 0.0, "lowering": 0.0, "compiling": 0.0, "programs": 0, "first step": None}
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
def listen(event, duration, **_):
    if event in EVENTS:
        seconds[EVENTS[event]] += duration
        seconds["programs"] += event.endswith("backend_compile_duration")
import jax
jax.monitoring.register_event_duration_secs_listener(listen)
import lib.runs.loop as loop
progress = loop.progress
class Watched:
    def __init__(self, *arguments, **options): self.inner = progress(*arguments, **options)
    def __enter__(self):
        tick = self.inner.__enter__()
        def first(*arguments, **shown):
            if seconds["first step"] is None:
                seconds["first step"] = time.time() - float(os.environ["BEGAN"])
            tick(*arguments, **shown)
        return first
    def __exit__(self, *error): return self.inner.__exit__(*error)
loop.progress = Watched
def tell():
    seconds["end"] = time.time() - float(os.environ["BEGAN"])
    json.dump(seconds, open(os.environ["TOLD"], "w"))
atexit.register(tell)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Arguments:
    commands: tuple[str, ...] = ()
    """Which; none: all."""
    results: Path = Path("results")


def measure(command: str, data: Path, cache: Path) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as results:
        told = Path(results, "told.json")
        words = command.format(data=data, results=results).split()
        if "--output_" not in command:
            words += ["--results", results]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TOLD": str(told)}
        environment["BEGAN"] = str(time.time())
        done = subprocess.run(
            [sys.executable, "-c", WATCH, *words], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command}\n{done.stderr}")
        return json.loads(told.read_text())


def main(arguments: Arguments) -> Path:
    rows, cells = [], []
    for name in chosen(arguments.commands, COMMANDS, kind="command"):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder)
            for i in range(3):
                rows_of_file = np.random.default_rng(i).normal(size=(2000, 64))
                np.save(data / f"{i}.npy", rows_of_file.astype(np.float32))
            runs = [measure(COMMANDS[name], data, data / "cache") for _ in range(2)]
        rows.append({"command": COMMANDS[name], "first": runs[0], "second": runs[1]})
        for label, run in zip(("first", "second"), runs):
            numbers = run["first step"], run["end"], run["tracing"], run["compiling"]
            shown = ["-" if number is None else f"{number:.1f}" for number in numbers]
            cells.append([name, label, *shown, str(run["programs"])])
            print(cells[-1], flush=True)
    heads = ["command", "run", "first step", "end", "tracing", "compiling", "programs"]
    path = arguments.results / "benchmarks" / "second_run.json"
    caption = "Seconds from the start of Python; a program from the cache counts as compiled."
    return write_summary(path, {"rows": rows}, [Table(heads, cells, caption)])


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments))
