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
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from lib.runs import processes

PathLike = str | os.PathLike
"""A path, as text or not."""
Identity = Mapping[str, np.ndarray] | None
_DTYPES = "__dtypes__"  # the npz member that names the dtypes npy has no word for


class RunFileError(ValueError):
    """A file is damaged or belongs to other settings. The message names it and the way out."""


class DamagedFileError(RunFileError):
    """A file is damaged: what was written there once cannot be read any more."""


@contextlib.contextmanager
def atomic_file(path: PathLike, *, previous: PathLike | None = None) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when complete, or leaves no trace. Its folder is
    made where it is missing; the file that it replaces takes the name `previous`, if given."""
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
            if previous is not None and path.exists():
                Path(previous).unlink(missing_ok=True)
                try:
                    os.link(path, previous)
                except OSError:  # a file system without links: for a moment there is no `path`
                    os.replace(path, previous)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def make_folder(folder: PathLike) -> None:
    """Makes the folder, and those above it, unless it is there. Raises OSError that names it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}, so there is no such folder to write to; name another"
        raise OSError(error.errno, reason, str(folder)) from error


def check_writable(path: PathLike, *, is_folder: bool = False) -> None:
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


@contextlib.contextmanager
def named_errors(path: PathLike, temporary: PathLike | None = None) -> Iterator[None]:
    """Errors of writing that name no file, as a full disk's while the file is written to, or the
    temporary one, become errors about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(path), str(temporary)):
            raise
        raise OSError(error.errno, f"{error.strerror}, so it is not written", str(path)) from error


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes `content` to `path`: at every moment the file there is the old one or the new one."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: PathLike, value: Any) -> None:
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
        return float(value) if math.isfinite(value) else json.dumps(float(value))  # its name
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


def save_arrays(path: PathLike, /, **arrays: Any) -> None:
    """Writes the arrays to `path` atomically, as an npz that `numpy.load` reads without pickle.

    Bits are kept. Typed PRNG keys and dtypes that npy does not know (bfloat16, float8) are stored
    as unsigned integers, beside a member that says what they were. Raises TypeError on objects.
    """
    with atomic_file(path) as file:
        _write_arrays(file, path, arrays)


def _write_arrays(file: BinaryIO, path: PathLike, arrays: Mapping[str, Any]) -> None:
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


def load_arrays(path: PathLike) -> dict[str, Any]:
    """What `save_arrays` wrote, bit for bit: numpy arrays, and typed PRNG keys as such.

    Raises FileNotFoundError, or DamagedFileError if the file is damaged: every member's checksum is
    verified first, and nothing is allocated that the file does not hold.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum in {damaged}")
                arrays: dict[str, Any] = {
                    info.filename.removesuffix(".npy"): _read_member(archive, info)
                    for info in archive.infolist()
                }
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


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Raises ValueError unless the member holds, uncompressed, what its npy header promises."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with archive.open(info) as member:
        shape, _, dtype = read_npy_header(member)
        size = member.tell() + math.prod(shape) * dtype.itemsize
        if size != info.file_size and not dtype.hasobject:  # `read_array` refuses objects
            raise ValueError(f"{info.filename} does not hold the {dtype}{list(shape)} it promises")
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False)


def save_checkpoint(path: PathLike, state: PyTree, *, step: int, identity: Identity = None) -> None:
    """Writes the leaves of `state`, their names and the number of steps done, atomically; beside
    them `identity`, which `load_checkpoint` compares. Keeps the file of before (`previous_of`)."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = json.dumps([jax.tree_util.keystr(where) for where, _ in leaves])
    members = {f"leaf{i}": leaf for i, (_, leaf) in enumerate(leaves)}
    members |= {f"identity {name}": value for name, value in (identity or {}).items()}
    with atomic_file(path, previous=previous_of(path)) as file:
        _write_arrays(file, path, {"step": np.int64(step), "names": names, **members})


def previous_of(checkpoint: PathLike) -> Path:
    """Where the checkpoint before this one lies."""
    return Path(checkpoint).with_suffix(".previous.npz")


def load_checkpoint(path: PathLike, like: PyTree, identity: Identity = None) -> tuple[PyTree, int]:
    """The state and the step that `save_checkpoint` wrote, in the structure of `like`.

    `like` has the state's structure, shapes and dtypes, or is a function of the step that returns
    them; its values are not read, so that `jax.eval_shape` of the initial state serves. Leaves are
    numpy arrays (typed PRNG keys are keys, Python numbers are Python numbers) without weak types:
    start from a state without them, or a resumed run may promote otherwise.

    Raises FileNotFoundError, DamagedFileError, or RunFileError if a part of `identity` is another
    one, or the leaves' names, shapes or dtypes are not those of `like`. Leaves are compared by
    their path in the tree: the printed tree can hold the addresses of functions.
    """
    stored = load_arrays(path)
    try:
        names, step = json.loads(str(stored["names"])), int(stored["step"])
        saved = {name: stored[f"leaf{i}"] for i, name in enumerate(names)}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint: delete it to start again") from error
    own = identity or {}
    other = [n for n in own if not np.array_equal(stored.get(f"identity {n}", ()), own[n])]
    if other:
        raise RunFileError(
            f"{path} belongs to a run with another {', '.join(other)}, or was made by another "
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
