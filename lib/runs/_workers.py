"""Sweeps: a command for every point of a grid, run by submitit, here or on Slurm.

    results/sweeps/<hash of the command, and of the content of the data that it names>/
        log.txt      the command and what it printed, one start after the other
        done.json    that it ended with exit status 0, when, after how long; written last

A command whose done.json is there is finished and does not run again; any other is started again,
and goes on from what it saved itself. What submitit starts is a worker: it runs one command and
locks its folder (`lib.runs`), so that of two sweeps with a command in common one runs it.
"""

import contextlib
import datetime
import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from lib.runs._folders import printed
from lib.runs._locks import FolderBusyError, lock_folder
from lib.runs.files import write_json

ROOT = Path(__file__).parents[2]  # where commands run
Command = tuple[str, ...]  # what follows `python`
_PLACE = re.compile(r"\{(\w+)\}")
_SLURM_LOOK = 5.0  # seconds from one look at the jobs to the next
_REMIND = 10.0  # seconds; a SIGTERM that comes while a worker starts may be lost


def expand(template: Sequence[str], grid: Iterable[str]) -> list[Command]:
    """The commands of a grid of NAME=VALUE,VALUE...: each {NAME} of the template takes each value.

    The last name varies fastest. Raises ValueError on entries of another form, on names and values
    that come twice, and where names and places do not match.
    """
    values: dict[str, list[str]] = {}
    for entry in grid:
        name, _, text = entry.partition("=")
        options = text.split(",")
        if not (re.fullmatch(r"\w+", name) and all(options)):
            raise ValueError(f"a grid is made of NAME=VALUE,VALUE,..., not of {entry!r}")
        if name in values or len(set(options)) < len(options):
            raise ValueError(f"{entry!r} holds a name or a value for the second time")
        values[name] = options
    places = {name for part in template for name in _PLACE.findall(part)}
    if wrong := places ^ set(values):
        name = min(wrong)
        have, lack = ("command", "grid") if name in places else ("grid", "command")
        raise ValueError(f"{name} is in the {have} and not in the {lack}")

    def filled(point: Mapping[str, str]) -> Command:
        return tuple(_PLACE.sub(lambda place: point[place[1]], part) for part in template)

    return [filled(dict(zip(values, point))) for point in itertools.product(*values.values())]


@dataclass(frozen=True)
class Entry:
    """A command of a sweep and its folder. Making it touches no file."""

    command: Command
    folder: Path

    log = property(lambda self: self.folder / "log.txt")
    done = property(lambda self: self.folder / "done.json")

    def __str__(self) -> str:
        return shlex.join(("python", *self.command))


@dataclass(frozen=True)
class Worker(submitit.helpers.Checkpointable):
    """Runs a command until it ends; called by submitit in a process of its own.

    SIGTERM is passed on, so that the command saves and ends. So is what Slurm sends 90 seconds
    before a time limit or a preemption (SIGUSR2), and then the job goes back into the queue.
    """

    gpus: Mapping[str, str]
    """Variables that give the command its share of this machine's GPUs, which submitit hides."""

    def __call__(self, entry: Entry) -> int | str:
        """Returns the exit status, or in words who else has the command."""
        entry.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_folder(entry.folder)
        except FolderBusyError as error:
            return str(error)
        if entry.done.exists():
            return 0
        received: list[int] = []
        process: subprocess.Popen | None = None

        def stop(number: int, frame: Any) -> None:
            received.append(number)
            if process is not None:
                process.terminate()

        numbers = (signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, stop) for number in numbers}
        start = datetime.datetime.now(datetime.UTC)
        with open(entry.log, "ab", buffering=0) as log:
            log.write(f"# {start:%Y-%m-%d %H:%M:%S} UTC, {platform.node()}: {entry}\n".encode())
            # Without a buffer, the log of a process that is killed says how far it came.
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            if environment.get("SUBMITIT_EXECUTOR") == "local":
                environment.pop("CUDA_VISIBLE_DEVICES", None)
            process = subprocess.Popen(
                [sys.executable, *entry.command],
                cwd=ROOT,
                env={**environment, **self.gpus},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.descriptor],  # a command that outlives its worker keeps the lock
            )
            if received:
                process.terminate()
            status = process.wait()
        end = datetime.datetime.now(datetime.UTC)
        for number, handler in previous.items():
            signal.signal(number, handler)
        if status == 0:
            time, seconds = end.isoformat(timespec="seconds"), (end - start).total_seconds()
            about = {"command": entry.command, "exit_status": 0, "time": time, "seconds": seconds}
            write_json(entry.done, about)
        elif signal.SIGUSR2 in received:
            signal.raise_signal(signal.SIGUSR2)  # submitit's handler does not return
        return status


def gpu_shares(workers: int) -> list[dict[str, str]]:
    """Variables for each of so many workers here. GPUs are divided among them; of more workers than
    GPUs several share one, and what JAX takes of its memory at the start, .75."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [gpu for gpu in (named or "").split(",") if gpu]
    if named is None:
        gpus = (printed("nvidia-smi", "--query-gpu=index", "--format=csv,noheader") or "").split()
    if not gpus:
        return [{} if named is None else {"CUDA_VISIBLE_DEVICES": named}] * workers
    memory = {}
    if workers > len(gpus) and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        share = 0.75 / -(-workers // len(gpus))
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
    shares = (gpus[i::workers] or [gpus[i % len(gpus)]] for i in range(workers))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share), **memory} for share in shares]


def slurm_options(texts: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, or only NAME, of sbatch's long options as a mapping. Raises ValueError unless
    time, in minutes, is among them."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.lstrip("-").partition("=")
        options[name.replace("-", "_")] = value if equals else True
    if not str(options.get("time")).isdecimal():
        raise ValueError("give Slurm a time limit in minutes: --slurm time=120 ...")
    return {**options, "time": int(options["time"])}


def submit(
    entries: Sequence[Entry],
    slurm: Mapping[str, Any] | None,
    *,
    workers: int,
    gpus: Mapping[str, str],
) -> list[submitit.Job]:
    """Starts a worker for each entry and prints a line: on Slurm as one array, `workers` at once;
    else here, all, on a share of the `gpus` (see `gpu_shares`).

    Raises OSError where there is no Slurm or it refuses the job.
    """
    sweeps = entries[0].folder.parent
    sweeps.mkdir(parents=True, exist_ok=True)
    # A folder of its own: the local executor's files go by process ids, which come again.
    folder = tempfile.mkdtemp(prefix="workers-", dir=sweeps)
    if slurm is None:
        executor: submitit.Executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=10 * 365 * 24 * 60)  # it wants a limit: ten years
        # Ctrl-C goes to all processes of a terminal: only the sweep shall answer it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            jobs = executor.map_array(Worker(gpus), entries)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    else:
        options = {"job_name": "sweep", **slurm}
        try:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(
                time=slurm["time"], array_parallelism=workers, additional_parameters=options
            )
            jobs = executor.map_array(Worker(gpus), entries)
        except RuntimeError as error:
            raise OSError(f"no job for Slurm: {' '.join(str(error).split())}") from error
    for entry, job in zip(entries, jobs):
        verb = "submitted" if slurm else "started"
        print(f"{verb}: {entry}  (job {job.job_id}, {entry.log})", flush=True)
    return jobs


def _outcome(entry: Entry, job: submitit.Job) -> str:
    """How a job ended, in words: "finished", or what happened."""
    local, status = isinstance(job, submitit.LocalJob), None
    # On Slurm files may take a while to show, for which result() waits.
    if not local or job.paths.result_pickle.exists():
        with contextlib.suppress(submitit.core.utils.UncompletedJobError):
            status = job.result()
    if entry.done.exists() or status == 0:
        words = "finished"
    elif status is None:
        state = "" if local else f" ({job.state})"  # its files stay: they may say more
        return ": ".join(filter(None, (f"worker died{state}", last_line(job.paths.stderr))))
    elif isinstance(status, str):
        words = status
    elif status < 0:
        words = f"killed by signal {-status} ({signal.strsignal(-status)})"
    else:
        words = f"exit status {status}"
    if local:
        shutil.rmtree(job.paths.folder, ignore_errors=True)
    return words


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, of a long one the first 200 characters."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace").rstrip())
    return lines[-1][:200]


def run(
    entries: Sequence[Entry],
    slurm: Mapping[str, Any] | None,
    *,
    workers: int,
    stop_requested: Callable[[], bool],
) -> dict[Entry, str]:
    """Runs the entries, `workers` at once, prints a line at each start and end, and returns how
    each that was started ended: "finished", or what happened.

    When a stop is requested nothing more is started; what runs is told to save and waited for. Jobs
    of Slurm are cancelled, which tells them the same and gives them Slurm's KillWait.
    """
    waiting, outcomes = list(entries), {}
    running: dict[submitit.Job, tuple[Entry, float, dict[str, str]]] = {}
    free = [{}] if slurm else gpu_shares(workers)
    remind_at = None
    while running or (waiting and not stop_requested()):
        while waiting and free and not stop_requested():
            batch, waiting = (waiting, []) if slurm else (waiting[:1], waiting[1:])
            gpus = free.pop()
            for entry, job in zip(batch, submit(batch, slurm, workers=workers, gpus=gpus)):
                running[job] = entry, time.monotonic(), gpus
        for job, (entry, began, gpus) in list(running.items()):
            if job.done():
                outcomes[entry] = _outcome(entry, job)
                seconds = time.monotonic() - began
                print(f"{outcomes[entry]} after {seconds:.0f} s: {entry}", flush=True)
                del running[job]
                free.append(gpus)
        if stop_requested() and slurm:
            for job, (entry, *_) in running.items():
                job.cancel(check=False)
                outcomes[entry] = "cancelled"
            break
        if stop_requested() and running and (remind_at is None or time.monotonic() > remind_at):
            if remind_at is None:
                print(f"stopping {len(running)}, which save first", flush=True)
            for job in running:
                os.kill(int(job.job_id), signal.SIGTERM)
            remind_at = time.monotonic() + _REMIND
        time.sleep(_SLURM_LOOK if slurm else 0.1)
    return outcomes
