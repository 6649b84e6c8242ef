"""Run folders: what a run leaves on disk, and on what machine it was made.

    results/<experiment>/<name>-<hash of config>/seed<k>/
        config.json      the configuration and the seed
        env.json         versions, device, commit and command line of the first start
        metrics.jsonl    one JSON object a line, each with its "step"
        checkpoint.npz   the state after so many steps
        arrays.npz       the final result, written last, so it marks a finished run

Every file but metrics.jsonl is written atomically (`lib.runs.files`). metrics.jsonl grows by whole
lines; a line that a killed process left without its end does not count. Beside the checkpoint lies
the one before it (checkpoint.previous.npz), to resume from should the last one be damaged. A
finished run keeps neither.

Where the configuration names data of the user's own, it does so by their content (`CONTENT`), not
by a path: the same data elsewhere have the same folder, other data another one.

One process at a time may hold an unfinished run: `open_run` locks its folder. To read a run that
may be going on elsewhere, make `Run(folder)` directly: only `open_run` writes.
"""

import contextlib
import dataclasses
import datetime
import glob
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lib.numerics import check_seed
from lib.runs import files, processes
from lib.runs._locks import FolderLock, lock_folder
from lib.runs._programs import first_core, versions
from lib.runs.files import DamagedFileError, Identity, PathLike, RunFileError

CONTENT = "content:"  # begins a value of a configuration that stands for the content of data
NOT_HASHED = ("seed", "progress", "results")
_PACKAGES = (
    *("jax", "jaxlib", "numpy", "optax", "flax", "scikit-learn", "torch"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)


def config_hash(config: Any, *, exclude: Iterable[str] = NOT_HASHED) -> str:
    """The first ten hex digits of SHA-256 over a dataclass's or mapping's canonical JSON.

    The order of fields does not count, nor do the top-level fields named in `exclude`.
    """
    return hashlib.sha256(_canonical(config, exclude).encode()).hexdigest()[:10]


def _canonical(config: Any, exclude: Iterable[str]) -> str:
    return json.dumps(_hashed(config, exclude), sort_keys=True, separators=(",", ":"))


def _hashed(config: Any, exclude: Iterable[str]) -> dict[str, Any]:
    plain, exclude = files.to_json(config), set(exclude)
    if not isinstance(plain, dict):
        raise TypeError(f"a configuration is a dataclass or a mapping, not {config!r}")
    return {name: value for name, value in plain.items() if name not in exclude}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder and the paths of its files. Making it touches no file."""

    folder: Path
    lock: FolderLock | None = dataclasses.field(default=None, repr=False, compare=False)

    checkpoint = property(lambda self: self.folder / "checkpoint.npz")
    previous_checkpoint = property(lambda self: files.previous_of(self.checkpoint))
    arrays = property(lambda self: self.folder / "arrays.npz")
    metrics = property(lambda self: self.folder / "metrics.jsonl")

    @property
    def finished(self) -> bool:
        """Whether the final result is there; it is written whole and last."""
        return self.arrays.exists()

    def finish(self, /, **arrays: Any) -> None:
        """Writes the final result, after everything else, and deletes what was saved."""
        files.save_arrays(self.arrays, **arrays)
        self.discard_saved()

    def load_arrays(self) -> dict[str, Any]:
        """The final result of a finished run; see `lib.runs.files.load_arrays`."""
        return files.load_arrays(self.arrays)

    def save_checkpoint(self, state: PyTree, *, step: int, identity: Identity = None) -> None:
        """Writes the checkpoint and keeps the one before it; append the metrics of the steps before
        it first."""
        files.save_checkpoint(self.checkpoint, state, step=step, identity=identity)

    def load_checkpoint(self, like: PyTree, identity: Identity = None) -> tuple[PyTree, int] | None:
        """The state and its step, or None where no checkpoint is; see
        `lib.runs.files.load_checkpoint`.

        Where the checkpoint is damaged, or a writer was killed as it replaced it, this is the one
        before it, and a line on stderr says so. Raises DamagedFileError if neither can be read. A
        checkpoint of other settings raises RunFileError, whatever the one before it is.
        """
        damage = None
        if self.checkpoint.exists():
            try:
                return files.load_checkpoint(self.checkpoint, like, identity)
            except DamagedFileError as error:
                damage = error
        if not self.previous_checkpoint.exists():
            if damage:
                raise damage
            return None
        try:
            state, step = files.load_checkpoint(self.previous_checkpoint, like, identity)
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{damage or f'{self.checkpoint} is gone'}; the one before it cannot be read "
                f"either: {error}"
            ) from error
        if damage:
            reason = f"{self.checkpoint} is damaged"
            print(f"{reason}: going on from step {step}, the one before", file=sys.stderr)
            with processes.first_alone(f"putting {self.checkpoint} right"):
                if self.lock:  # else the next save would keep the damaged one
                    os.replace(self.previous_checkpoint, self.checkpoint)
        return state, step

    def discard_saved(self) -> None:
        """Deletes what was saved to resume from, if anything; the next start begins anew."""
        with processes.first_alone(f"discarding what was saved in {self.folder}") as first:
            if first:
                self.previous_checkpoint.unlink(missing_ok=True)
                self.checkpoint.unlink(missing_ok=True)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line a row, all of them or none. Raises ValueError if a row has no integer
        "step", OSError that names the file if it cannot be written.

        Call `truncate_metrics` once before the first append, with 0 where there is no checkpoint.
        """
        lines = []
        for row in map(files.to_json, rows):
            if not isinstance(row.get("step"), int):
                raise ValueError(f'a row of metrics needs an integer "step": {row}')
            lines.append(json.dumps(row, allow_nan=False) + "\n")
        content = memoryview("".join(lines).encode())
        with processes.first_alone(f"appending to {self.metrics}") as first:
            if not first:
                return
            with files.named_errors(self.metrics), open(self.metrics, "ab", buffering=0) as file:
                before = file.tell()
                try:
                    while content:
                        content = content[file.write(content) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows at or after `step`, and a line without its end; keeps the other bytes.

        Raises RunFileError on a line that is no row.
        """
        with processes.first_alone(f"shortening {self.metrics}") as first:
            kept = b"".join(line for line, at in self._lines() if at < step)
            if first and self.metrics.exists() and self.metrics.stat().st_size != len(kept):
                files.write_bytes(self.metrics, kept)

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """The lines, each with its step, except a last one without its end."""
        if not self.metrics.exists():
            return
        for number, line in enumerate(self.metrics.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield line, json.loads(line)["step"] + 0
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                message = f"{self.metrics}, line {number} is no row of metrics: delete the line"
                raise RunFileError(message) from error


def open_run(
    results_root: PathLike,
    experiment: str,
    name: str,
    config: Any,
    *,
    seed: int,
    exclude: Iterable[str] = NOT_HASHED,
    wait: bool = False,
) -> Run:
    """Makes or reopens `results_root/experiment/name-<hash>/seed<k>`, to be written by one process.

    Writes config.json (the hashed fields and the seed) and env.json where they are missing. Unless
    the run is finished, locks the folder for as long as the `Run` is around, and removes what
    killed writers left; a folder that another process holds is an error or, with `wait` (for
    by-products that several runs share), waited for. A finished run may be opened by anyone; what
    a writer that was killed in `Run.finish` left to resume from is deleted.

    The folder of the same data and settings is reopened under whatever name it has, and where the
    data are others than those of a folder that is there, a line on stderr says so.

    Raises RunFileError if config.json holds something else, FolderBusyError, OSError where the
    folder cannot be written, and ValueError for a seed as `lib.numerics.check_seed` does.
    """
    seed = check_seed(seed)
    exclude = tuple(exclude)
    folder = _folder(Path(results_root, experiment), name, config, exclude) / f"seed{seed}"
    run = Run(folder)
    with processes.first_alone(f"opening {folder}") as first:
        if first:
            files.make_folder(folder)
            if not run.finished:
                run = Run(folder, lock_folder(folder, wait=wait))
                for leftover in folder.glob(".*.tmp"):  # of killed writers, as we hold the folder
                    if leftover.is_dir():
                        shutil.rmtree(leftover)
                    else:
                        leftover.unlink(missing_ok=True)
            if run.finished:
                with contextlib.suppress(OSError):  # a folder that may only be read
                    run.discard_saved()
    path, wanted = folder / "config.json", {**_hashed(config, exclude), "seed": seed}
    if not path.exists():
        files.write_json(path, wanted)
    stored = None
    with contextlib.suppress(ValueError, RecursionError):
        stored = json.loads(path.read_bytes())
    if stored != wanted:
        raise RunFileError(
            f"{path} is not this run's configuration: it was edited, or two configurations share a "
            f"hash. Restore it, or move {folder} away"
        )
    if not (folder / "env.json").exists():
        files.write_json(folder / "env.json", environment())
    return run


def _folder(parent: Path, name: str, config: Any, exclude: Iterable[str]) -> Path:
    """Where the runs of a configuration lie; a line says so where other data have some."""
    digest = config_hash(config, exclude=exclude)
    folder = parent / f"{name}-{digest}"
    settings = _canonical(config, exclude)
    if CONTENT not in settings or folder.exists():
        return folder
    if same := sorted(parent.glob(f"*-{digest}")):
        return same[0]
    for other in sorted(parent.glob(f"{glob.escape(name)}-*/seed*/config.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            stored = _canonical(json.loads(other.read_bytes()), (*exclude, "seed"))
            if _without_data(stored) == _without_data(settings):
                if processes.is_first():
                    was = f"the data are no longer those of {other.parents[1]}"
                    print(f"{was}: a new result, {folder}", file=sys.stderr, flush=True)
                break
    return folder


def _without_data(settings: str) -> str:
    return re.sub(rf'"{CONTENT}[0-9a-f]*"', f'"{CONTENT}"', settings)


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration: versions, device, commit, command, time.

    "commit" and "dirty" are None outside a git checkout; "dirty" counts untracked files.
    """
    device, changes = jax.devices()[0], _git("status", "--porcelain")
    about = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    if device.platform == "gpu":
        about["runtime"] = device.client.platform_version
        query = "--query-gpu=driver_version"
        about["driver"] = printed("nvidia-smi", "--id=0", query, "--format=csv,noheader")
    processor = platform.processor() or platform.machine()
    models = [line.partition(":")[2] for line in first_core() if line.startswith("model name")]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
        "system": platform.platform(),
        "device": about,
        "x64": bool(jax.config.read("jax_enable_x64")),
        "cpu": {"model": [*models, processor][0].strip(), "cores": os.cpu_count()},
    }


def provenance(summary: PathLike) -> str:
    """Where the numbers of a stored summary come from, as a line of Markdown: file, commit, device,
    day, seeds where it names them, command. Reads what `environment` wrote."""
    told = json.loads(Path(summary).read_text())
    written = told["environment"]
    commit = f"commit `{written['commit'][:7]}`" if written["commit"] else "no commit"
    device, cpu = written["device"], written["cpu"]
    where = f"{device['count']} x {device['kind']}"
    if device["platform"] == "cpu":
        where = f"{cpu['model']}, {cpu['cores']} cores"
    parts = [commit + (" and changes" if written["dirty"] else ""), where, written["time"][:10]]
    if "seeds" in told:
        seeds = ", ".join(map(str, told["seeds"]))
        parts.insert(2, f"seed{'s' if len(told['seeds']) > 1 else ''} {seeds}")
    return f"`{Path(summary).name}`: {'; '.join(parts)}; `{written['command']}`"


def _git(*arguments: str) -> str | None:
    return printed("git", "-C", str(Path(__file__).parent), *arguments)


def printed(*command: str) -> str | None:
    """What a command prints, if there is one and it ends well."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()
    return None
