"""What every command does around its `main`: devices, checks, and errors in one line."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lib.numerics import check_seed
from lib.runs import console, files, keep_compiled_programs, processes
from lib.runs.processes import DeviceOptions
from lib.runs.settings import settings_of

# Options of commands that name a folder to write to, a file to write, a seed or several.
OUTPUT_FOLDERS = ("results", "output_dir", "out_dir")
OUTPUT_FILES = ("output_file", "report", "out")
SEEDS = ("seed", "seeds", "first_seed", "random_state", "random_seed")


def run_command(main: Callable[..., Any], parse: Callable[[], Any], *, lower: str = "") -> None:
    """`main(parse())`, or `main(parse(), mesh)` where the arguments extend `DeviceOptions`, with
    the mesh of the devices that they ask for (None for one device).

    Errors are as `lib.runs.console.one_line_errors` has them, `lower` what memory depends on. A
    stop where there is nothing to save, as before the first step, ends in one line too. Before the
    work seeds are checked (`lib.numerics.check_seed`), and the folders that results go to are made,
    and written to for a trial.

    Where several processes work together, one that fails ends at once, and so do those that wait
    for it: what they have saved is in the runs' folders.
    """
    try:
        with console.one_line_errors():
            arguments = parse()
            _check_seeds(arguments)
            with _started(arguments) as given:
                try:
                    with console.one_line_errors(lower=lower):
                        _check_outputs(arguments)
                        main(arguments, *given)
                except BaseException as error:
                    if processes.several_processes():
                        _end_alone(error)
                    raise
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        print("Stopped: the same command goes on from what was saved, if anything", file=sys.stderr)
        sys.exit(console.STATUS_OF_A_STOP)


@contextlib.contextmanager
def _started(arguments: Any) -> Iterator[tuple]:
    """What `main` gets after the arguments: the mesh, if they extend `DeviceOptions`. Benchmarks
    choose themselves what they run on, and compile anew."""
    if not isinstance(arguments, DeviceOptions):
        yield ()
        return
    # For programs that must be fast to start: POT then does not import torch, which takes seconds.
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")
    keep_compiled_programs()
    with processes.started(settings_of(DeviceOptions, arguments)) as mesh:
        yield (mesh,)


def _check_seeds(arguments: Any) -> None:
    for name in SEEDS:
        seeds = getattr(arguments, name, None)
        seeds = () if seeds is None else seeds if isinstance(seeds, tuple) else (seeds,)
        for i, seed in enumerate(seeds):
            check_seed(seed, f"--{name}")
            if seed in seeds[:i]:
                raise ValueError(f"--{name} names {seed} twice: each seed counts once")
    if (first := getattr(arguments, "first_seed", None)) is not None:
        last = first + max(1, arguments.ntry) - 1
        check_seed(last, "the last of the seeds, --first_seed + --ntry - 1,")


def _check_outputs(arguments: Any) -> None:
    for name in OUTPUT_FOLDERS + OUTPUT_FILES:
        if (path := getattr(arguments, name, None)) is not None:
            files.check_writable(path, is_folder=name in OUTPUT_FOLDERS)


def _end_alone(error: BaseException) -> None:
    """Ends this process at once, without waiting for the others as a tidy end does; does nothing on
    the stop that all of them have agreed on."""
    status = error.code if isinstance(error, SystemExit) else 1
    if status == console.STATUS_OF_A_STOP:
        return
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            "A process of this command has died or cannot be reached "
            f"({str(error).splitlines()[0][:200]}): run it again on all processes, it goes on from "
            "what was saved last",
            file=sys.stderr,
        )
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
