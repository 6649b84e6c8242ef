"""Run folders, metrics, checkpoints, atomic writes, progress: what a run leaves on disk.

    results/<experiment>/<name>-<hash of config>/seed<k>/
        config.json      the configuration and the seed
        env.json         versions, device, commit and command line of the first start
        metrics.jsonl    one JSON object a line, each with its "step"
        checkpoint.npz   the state after so many steps
        arrays.npz       the final result, written last, so it marks a finished run

Every file but metrics.jsonl is written to a temporary name in its folder, synced, and renamed, so
a file that exists is complete. metrics.jsonl grows by whole lines; a line that a killed process
left without its end does not count. Beside the checkpoint lies the one before it
(checkpoint.previous.npz), to resume from should the last one be damaged.

One process at a time may hold an unfinished run: `open_run` locks its folder (`lib.run_locks`),
and the lock goes with the `Run`. To read a run that may be going on elsewhere, make `Run(folder)`
directly: only `open_run` writes. Of several processes that work on one command (`lib.hosts`) the
first one writes, and the others wait for it.

JSON has no NaN and no infinity: they are written as "NaN", "Infinity" and "-Infinity".
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jax
import ml_dtypes
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from lib import hosts
from lib.run_locks import FolderLock, lock_folder

STATUS_OF_A_STOP = 130
NOT_HASHED = ("seed", "progress", "results")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_DTYPES = "__dtypes__"  # the npz member that names the dtypes npy has no word for
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "jaxopt", "scikit-learn", "torch")


class RunFileError(ValueError):
    """A file is damaged or belongs to other settings. The message names it and the way out."""


class DamagedFileError(RunFileError):
    """A file is damaged: what was written there once cannot be read any more."""


class Interrupted(KeyboardInterrupt):
    """A run stopped on request after `step` steps, its state saved in `checkpoint`."""

    def __init__(self, checkpoint: str | os.PathLike, step: int):
        super().__init__(
            f"stopped on request after step {step}; the state is in {checkpoint}: "
            "run the same command again to resume"
        )


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike, *, previous: str | os.PathLike | None = None
) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when complete, or leaves no trace.

    The file that it replaces takes the name `previous`, if given. Raises OSError that names `path`
    where it cannot be written: a full disk, a read-only folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with hosts.first_alone(f"writing {path}") as first, named_errors(path, temporary):
        if not first:
            yield io.BytesIO()
            return
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None:
                _keep(path, Path(previous))
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Gives the file at `path`, if there is one, the name `previous` too."""
    if path.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without links: for a moment there is no `path`
            os.replace(path, previous)


@contextlib.contextmanager
def named_errors(
    path: str | os.PathLike, temporary: str | os.PathLike | None = None
) -> Iterator[None]:
    """Errors of writing that name no file, or the temporary one, become errors about `path`.

    A full disk names no file where a file is written to, but where it is opened.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(path), str(temporary)):
            raise
        raise OSError(error.errno, f"{error.strerror}, so it is not written", str(path)) from error


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` to `path`: at every moment the file there is the old one or the new one."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` to `path` atomically, as indented JSON.

    Dataclasses become objects, arrays and tuples lists, paths strings. Raises TypeError on
    anything else that JSON does not know.
    """
    write_bytes(path, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    """`value` as JSON's own types."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    raise TypeError(f"no JSON for {value!r} of type {type(value).__name__}")


def _revive(value: Any) -> Any:
    """Undoes what `_plain` does to NaN and the infinities."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_revive(item) for item in value]
    if isinstance(value, dict):
        return {name: _revive(item) for name, item in value.items()}
    return value


def save_arrays(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Writes the arrays to `path` atomically, as an npz that `numpy.load` reads without pickle.

    Bits are kept. Typed PRNG keys and dtypes that npy does not know (bfloat16, float8) are stored
    as unsigned integers, beside a member that says what they were. Raises TypeError on objects.
    """
    with atomic_file(path) as file:
        _write_arrays(file, path, arrays)


def _write_arrays(file: BinaryIO, path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    members, dtypes = {}, {}
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
            dtypes[name] = f"key:{jax.random.key_impl(array)}"
            array = jax.random.key_data(array)
        array = np.asarray(array)
        if array.dtype.isbuiltin == 2:  # a type that a package (ml_dtypes) registered with numpy
            dtypes[name] = array.dtype.name
            array = array.view(f"u{array.dtype.itemsize}")
        if array.dtype.hasobject or name == _DTYPES:
            raise TypeError(f"cannot save {name!r} of dtype {array.dtype} in {path}")
        members[name] = array
    if dtypes:
        members[_DTYPES] = np.asarray(json.dumps(dtypes))
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            # A ZipInfo carries a constant date: the same arrays make the same file.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_arrays` wrote, bit for bit: numpy arrays, and typed PRNG keys as such.

    Raises FileNotFoundError, or DamagedFileError if the file is damaged: every member's checksum is
    verified first, and nothing is allocated that the file does not hold.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum in {damaged}")
                arrays = {}
                for info in archive.infolist():
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as member:
                        _check_promise(member, info)
                    with archive.open(info) as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
            for name, dtype in json.loads(str(arrays.pop(_DTYPES, "{}"))).items():
                if dtype.startswith("key:"):
                    impl = dtype.removeprefix("key:")
                    arrays[name] = jax.random.wrap_key_data(arrays[name], impl=impl)
                else:
                    arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            message = f"{path} is damaged ({reason}): delete it and run again"
            raise DamagedFileError(message) from error
    return arrays


def _check_promise(member: zipfile.ZipExtFile, info: zipfile.ZipInfo) -> None:
    """Raises ValueError unless the member holds, uncompressed, what its npy header promises."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(member)]
    shape, _, dtype = read_header(member)
    size = member.tell() + math.prod(shape) * dtype.itemsize
    if size != info.file_size and not dtype.hasobject:  # objects are refused by who reads them
        raise ValueError(f"{info.filename} does not hold the {dtype}{list(shape)} it promises")


def save_checkpoint(
    path: str | os.PathLike,
    state: PyTree,
    *,
    step: int,
    previous: str | os.PathLike | None = None,
) -> None:
    """Writes the leaves of `state`, their names and the number of steps done, atomically.

    The checkpoint that was there is kept as `previous`, if given.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = json.dumps([jax.tree_util.keystr(where) for where, _ in leaves])
    members = {f"leaf{i}": leaf for i, (_, leaf) in enumerate(leaves)}
    with atomic_file(path, previous=previous) as file:
        _write_arrays(file, path, {"step": np.int64(step), "names": names, **members})


def load_checkpoint(path: str | os.PathLike, like: PyTree) -> tuple[PyTree, int]:
    """The state and the step that `save_checkpoint` wrote, in the structure of `like`.

    `like` has the state's structure, shapes and dtypes; its values are not read, so that
    `jax.eval_shape` of the initial state serves. Leaves are numpy arrays (typed PRNG keys are keys,
    Python numbers are Python numbers); put them on the device yourself. They are strongly typed:
    start from a state without weak types, or a resumed run may promote otherwise.

    Raises FileNotFoundError, DamagedFileError, or RunFileError if the leaves' names, shapes or
    dtypes are not those of `like`. Leaves are compared by their path in the tree rather than by the
    printed tree, which can hold the addresses of functions.
    """
    stored = load_arrays(path)
    try:
        names, step = json.loads(str(stored["names"])), int(stored["step"])
        saved = {name: stored[f"leaf{i}"] for i, name in enumerate(names)}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint: delete it to start again") from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(where): leaf for where, leaf in leaves}
    for name in [*wanted, *saved]:
        there, here = _describe(saved, name), _describe(wanted, name)
        if there != here:
            raise RunFileError(
                f"{path}: leaf {name or 'state'} is {there} in the file but {here} in this run. "
                "It comes from other settings or another version: delete it to start again"
            )
    state = [saved[n] if hasattr(leaf, "dtype") else saved[n].item() for n, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(structure, state), step


def _describe(leaves: Mapping[str, Any], name: str) -> str:
    """A leaf's dtype and shape in words, such as float32[3, 2]."""
    if name not in leaves:
        return "absent"
    leaf = leaves[name] if hasattr(leaves[name], "dtype") else np.asarray(leaves[name])
    return f"{leaf.dtype}{list(leaf.shape)}"


def config_hash(config: Any, *, exclude: Iterable[str] = NOT_HASHED) -> str:
    """The first ten hex digits of SHA-256 over a dataclass's or mapping's canonical JSON.

    The order of fields does not count, nor do the top-level fields named in `exclude`.
    """
    text = json.dumps(_hashed(config, exclude), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _hashed(config: Any, exclude: Iterable[str]) -> dict[str, Any]:
    plain, exclude = _plain(config), set(exclude)
    if not isinstance(plain, dict):
        raise TypeError(f"a configuration is a dataclass or a mapping, not {config!r}")
    return {name: value for name, value in plain.items() if name not in exclude}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder and the paths of its files. Making it touches no file.

    `lock` keeps other processes out for as long as the run of `open_run` is around.
    """

    folder: Path
    lock: FolderLock | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.npz"

    @property
    def previous_checkpoint(self) -> Path:
        return self.folder / "checkpoint.previous.npz"

    @property
    def arrays(self) -> Path:
        return self.folder / "arrays.npz"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the final result is there; it is written whole and last."""
        return self.arrays.exists()

    def finish(self, /, **arrays: Any) -> None:
        """Writes the final result, after everything else: from here on the run is finished."""
        save_arrays(self.arrays, **arrays)

    def load_arrays(self) -> dict[str, Any]:
        """The final result of a finished run; see `load_arrays`."""
        return load_arrays(self.arrays)

    def save_checkpoint(self, state: PyTree, *, step: int) -> None:
        """Writes the checkpoint and keeps the one before it; append the metrics of the steps before
        it first."""
        save_checkpoint(self.checkpoint, state, step=step, previous=self.previous_checkpoint)

    def load_checkpoint(self, like: PyTree) -> tuple[PyTree, int] | None:
        """The state and its step, or None where no checkpoint is; see `load_checkpoint`.

        Where the checkpoint is damaged, or a writer was killed as it replaced it, this is the one
        before it, and a line on stderr says so. Raises DamagedFileError if neither can be read. A
        checkpoint of other settings raises RunFileError, whatever the one before it is.
        """
        damage = None
        if self.checkpoint.exists():
            try:
                return load_checkpoint(self.checkpoint, like)
            except DamagedFileError as error:
                damage = error
        if not self.previous_checkpoint.exists():
            if damage:
                raise damage
            return None
        try:
            state, step = load_checkpoint(self.previous_checkpoint, like)
        except DamagedFileError as error:
            raise DamagedFileError(
                f"{damage or f'{self.checkpoint} is gone'}; the one before it cannot be read "
                f"either: {error}"
            ) from error
        if damage:
            reason = f"{self.checkpoint} is damaged"
            print(f"{reason}: going on from step {step}, the one before", file=sys.stderr)
            with hosts.first_alone(f"putting {self.checkpoint} right"):
                if self.lock:  # else the next save would keep the damaged one
                    os.replace(self.previous_checkpoint, self.checkpoint)
        return state, step

    def discard_checkpoint(self) -> None:
        """Deletes the checkpoint and the one before it: of a run that is done."""
        with hosts.first_alone(f"discarding {self.checkpoint}") as first:
            if first:
                self.previous_checkpoint.unlink(missing_ok=True)
                self.checkpoint.unlink(missing_ok=True)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line a row, all of them or none. Raises ValueError if a row has no integer
        "step", OSError that names the file if it cannot be written.

        Call `truncate_metrics` once before the first append, with 0 where there is no checkpoint.
        """
        lines = []
        for row in map(_plain, rows):
            if not isinstance(row.get("step"), int):
                raise ValueError(f'a row of metrics needs an integer "step": {row}')
            lines.append(json.dumps(row, allow_nan=False) + "\n")
        with hosts.first_alone(f"appending to {self.metrics}") as first:
            if first:
                self._append("".join(lines).encode())

    def _append(self, content: bytes) -> None:
        with named_errors(self.metrics), open(self.metrics, "ab", buffering=0) as file:
            before, content = file.tell(), memoryview(content)
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows at or after `step`, and a line without its end; keeps the other bytes."""
        kept = b"".join(line for line, row in self._lines() if row["step"] < step)
        if self.metrics.exists() and self.metrics.stat().st_size != len(kept):
            write_bytes(self.metrics, kept)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows, NaN and infinities as floats again; none if there is no file.

        A last line without its end is left out. Raises RunFileError on any other broken line.
        """
        return [_revive(row) for _, row in self._lines()]

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.metrics.exists():
            return
        for number, line in enumerate(self.metrics.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                row["step"] + 0
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                message = f"{self.metrics}, line {number} is no row of metrics: delete the line"
                raise RunFileError(message) from error
            yield line, row


def open_run(
    results_root: str | os.PathLike,
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
    by-products that several runs share), waited for. A finished run may be opened by anyone.

    Raises RunFileError if config.json holds something else, FolderBusyError, and OSError where the
    folder cannot be written.
    """
    exclude = tuple(exclude)
    folder = Path(results_root, experiment, f"{name}-{config_hash(config, exclude=exclude)}")
    folder = folder / f"seed{seed}"
    run = Run(folder)
    with hosts.first_alone(f"opening {folder}") as first:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            if not run.finished:
                run = Run(folder, lock_folder(folder, wait=wait))
                _remove_leftovers(folder)
    path, wanted = folder / "config.json", {**_hashed(config, exclude), "seed": seed}
    if not path.exists():
        write_json(path, wanted)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if found != wanted:
        raise RunFileError(
            f"{path} is not this run's configuration: it was edited, or two configurations share a "
            f"hash. Restore it, or move {folder} away"
        )
    if not (folder / "env.json").exists():
        write_json(folder / "env.json", environment())
    return run


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders, which are those of killed writers while we hold it."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration: versions, device, commit, command, time.

    "commit" and "dirty" are None outside a git checkout; "dirty" counts untracked files.
    """
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device, changes = jax.devices()[0], _git("status", "--porcelain")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "versions": versions,
        "system": platform.platform(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "x64": bool(jax.config.jax_enable_x64),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
    }


def provenance(summary: str | os.PathLike) -> str:
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
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def one_line_errors(*, lower: str = "") -> Iterator[None]:
    """For commands: bad input, a diverged flow, a file that cannot be written, memory that does not
    suffice, or a requested stop end in one line on stderr.

    `lower` names the command's options that memory depends on, for the line about memory. The exit
    status is 1, and 130 after a stop. `python -X dev` keeps the traceback.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, Interrupted) as error:
        _end(
            error,
            f"{type(error).__name__}: {error}",
            STATUS_OF_A_STOP if isinstance(error, Interrupted) else 1,
        )
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = f"lower {lower}" if lower else "take a smaller problem"
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        _end(error, f"Out of memory: {advice}, or use a machine with more{reason}", 1)


def _end(error: BaseException, line: str, status: int) -> NoReturn:
    if sys.flags.dev_mode:
        raise error
    print(line, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM ask for a stop instead of raising.

        with interruptible() as stop_requested:
            for chunk in chunks:
                ...
                if stop_requested():
                    run.save_checkpoint(state, step=step)
                    raise Interrupted(run.checkpoint, step)

    A SIGINT after the first request raises KeyboardInterrupt as soon as Python can, that is when a
    running device call returns. A request that the block ends without answering is delivered again
    after it, to the handlers of before, so that none is lost: do the final save inside the block.
    Signals that the process ignores stay ignored. Off the main thread the block changes nothing.
    """
    requests: list[int] = []
    previous = {}

    def request(number: int, frame: Any) -> None:
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that was not set from Python and could not be set back.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, request)
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests:
        signal.raise_signal(requests[0])


class _Lines:
    """A stderr on which each of tqdm's redrawn bars is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def progress(
    total: int,
    *,
    initial: int = 0,
    description: str,
    enabled: bool = True,
    line_every: float | None = None,
) -> Iterator[Callable[..., None]]:
    """Yields `advance(steps, **shown)`, which moves a tqdm bar on stderr and shows the values; of
    several processes the first shows them.

    Where stderr is no terminal nothing is shown, or, with `line_every`, a line that many seconds
    apart and at both ends. Values are converted to floats only when something is shown.
    """
    enabled = enabled and hosts.is_first()
    if sys.stderr.isatty():
        style = {"dynamic_ncols": True}
    elif line_every is not None:
        style = {"file": _Lines(), "mininterval": line_every, "ncols": 0}
    else:
        enabled, style = False, {}
    with tqdm(
        total=total, initial=initial, desc=description, disable=not enabled, miniters=1, **style
    ) as bar:

        def advance(steps: int, **shown: Any) -> None:
            if enabled:
                values = (f"{name}={float(value):.4g}" for name, value in shown.items())
                bar.set_postfix_str(", ".join(values), refresh=False)
                bar.update(steps)

        yield advance
