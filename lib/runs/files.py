"""Files that are whole or not there: atomic writes, JSON, arrays and checkpoints in npz.

A file is written to a temporary name in its folder, synced, and renamed, so a file that exists is
complete. What cannot be written is an OSError that names the file, what cannot be read back a
`RunFileError` that names it and the way out. Of several processes that work on one command
(`lib.runs.processes`) the first one writes, and the others wait for it.

JSON has no NaN and no infinity: they are written as "NaN", "Infinity" and "-Infinity".
"""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from lib.runs import processes

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_DTYPES = "__dtypes__"  # the npz member that names the dtypes npy has no word for


class RunFileError(ValueError):
    """A file is damaged or belongs to other settings. The message names it and the way out."""


class DamagedFileError(RunFileError):
    """A file is damaged: what was written there once cannot be read any more."""


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike, *, previous: str | os.PathLike | None = None
) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when complete, or leaves no trace. Its folder is
    made where it is missing.

    The file that it replaces takes the name `previous`, if given. Raises OSError that names `path`
    where it cannot be written: a full disk, a read-only folder.
    """
    path = Path(path)
    temporary = _temporary(path)
    with processes.first_alone(f"writing {path}") as first, named_errors(path, temporary):
        if not first:
            yield io.BytesIO()
            return
        make_folder(path.parent)
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def make_folder(folder: str | os.PathLike) -> None:
    """Makes the folder, and those above it, unless it is there. Raises OSError that names it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}, so there is no such folder to write to; name another"
        raise OSError(error.errno, reason, str(folder)) from error


def check_writable(path: str | os.PathLike, *, is_folder: bool = False) -> None:
    """Makes the folder that `path` lies in, or `path` itself, and tries to write there: to be
    called before the work whose result goes there. Raises OSError, which names it."""
    path = Path(path)
    temporary = _temporary(path / "trial" if is_folder else path)
    with processes.first_alone(f"trying to write to {path}") as first:
        if not first:
            return
        make_folder(temporary.parent)
        with named_errors(path, temporary):
            if not is_folder and path.is_dir():
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            open(temporary, "xb").close()
            temporary.unlink()


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
    write_bytes(path, (json.dumps(to_json(value), indent=2, allow_nan=False) + "\n").encode())


def to_json(value: Any) -> Any:
    """`value` as JSON's own types; see `write_json`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return to_json(np.asarray(value).tolist())
    raise TypeError(f"no JSON for {value!r} of type {type(value).__name__}")


def rounded(value: Any, digits: int) -> Any:
    """Floats to so many significant digits, in lists, tuples (as lists) and dictionaries too."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def from_json(value: Any) -> Any:
    """Undoes what `to_json` does to NaN and the infinities."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return {name: from_json(item) for name, item in value.items()}
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
                arrays: dict[str, Any] = {}
                for info in archive.infolist():
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as member:
                        _check_promise(cast(zipfile.ZipExtFile, member), info)
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


def read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether column-major, dtype); leaves the file where the values start.

    Raises ValueError, SyntaxError or tokenize.TokenError.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote, or that are no Python
        try:
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(file)
            return np.lib.format.read_array_header_2_0(file)
        except (MemoryError, RecursionError):  # of Python's parser, however much memory there is
            raise ValueError("a header that nests too deeply") from None


def _check_promise(member: zipfile.ZipExtFile, info: zipfile.ZipInfo) -> None:
    """Raises ValueError unless the member holds, uncompressed, what its npy header promises."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    shape, _, dtype = read_npy_header(member)
    size = member.tell() + math.prod(shape) * dtype.itemsize
    if size != info.file_size and not dtype.hasobject:  # objects are refused by who reads them
        raise ValueError(f"{info.filename} does not hold the {dtype}{list(shape)} it promises")


def save_checkpoint(
    path: str | os.PathLike,
    state: PyTree,
    *,
    step: int,
    identity: Mapping[str, np.ndarray] | None = None,
    previous: str | os.PathLike | None = None,
) -> None:
    """Writes the leaves of `state`, their names and the number of steps done, atomically; beside
    them `identity`, which `load_checkpoint` compares.

    The checkpoint that was there is kept as `previous`, if given.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = json.dumps([jax.tree_util.keystr(where) for where, _ in leaves])
    members = {f"leaf{i}": leaf for i, (_, leaf) in enumerate(leaves)}
    members |= {f"identity {name}": value for name, value in (identity or {}).items()}
    with atomic_file(path, previous=previous) as file:
        _write_arrays(file, path, {"step": np.int64(step), "names": names, **members})


def load_checkpoint(
    path: str | os.PathLike, like: PyTree, identity: Mapping[str, np.ndarray] | None = None
) -> tuple[PyTree, int]:
    """The state and the step that `save_checkpoint` wrote, in the structure of `like`.

    `like` has the state's structure, shapes and dtypes, or is a function of the step that returns
    them; its values are not read, so that `jax.eval_shape` of the initial state serves. Leaves are
    numpy arrays (typed PRNG keys are keys, Python numbers are Python numbers); put them on the
    device yourself. They are strongly typed: start from a state without weak types, or a resumed
    run may promote otherwise.

    Raises FileNotFoundError, DamagedFileError, or RunFileError if a part of `identity` is another
    one, or the leaves' names, shapes or dtypes are not those of `like`. Leaves are compared by
    their path in the tree rather than by the printed tree, which can hold the addresses of
    functions.
    """
    stored = load_arrays(path)
    try:
        names, step = json.loads(str(stored["names"])), int(stored["step"])
        saved = {name: stored[f"leaf{i}"] for i, name in enumerate(names)}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint: delete it to start again") from error
    differing = [
        name
        for name, value in (identity or {}).items()
        if not np.array_equal(stored.get(f"identity {name}", ()), value)
    ]
    if differing:
        raise RunFileError(
            f"{path} belongs to a run with another {', '.join(differing)}, or was made by another "
            "version: delete its folder to start anew"
        )
    like = like(step) if callable(like) else like
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
