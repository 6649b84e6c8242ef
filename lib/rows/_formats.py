"""Matrices in .npy, .npz, .pt and .safetensors files, by the libraries that own these formats.

Values of .npy and .pt are mapped by NumPy, those of .safetensors by its package, anew for every
read: pages of a mapped file count as memory of the process until it is unmapped. An .npz is read
whole. torch reads the pickle of a .pt but not its values: mapped by torch, compressed or missing
ones would be whatever bytes lie there. Files are data: a pickle that asks for code is refused.

Used through `lib.rows.files.open_rows`.
"""

import contextlib
import importlib
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lib.runs.files import read_npy_header

DTYPES = ("float16", "bfloat16", "float32", "float64")

Read = Callable[[slice | np.ndarray], np.ndarray]
"""The rows of a slice without step, or of indices."""

_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_MOST_MAPPED = 64 * 2**20  # bytes, where columns lie apart
_PAGES_AT_ONCE = 2**16  # bytes that Linux maps around each place that is read


class StoredArray(NamedTuple):
    """An array in a file.

    `open` checks that its values are there; it raises ValueError. Call it for two dimensions and a
    dtype of `DTYPES` only.
    """

    shape: tuple[int, ...]
    dtype: str
    open: Callable[[], Read]


def find_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by name, "" for one that has none.

    Raises ValueError, naming the file, if it is damaged or truncated, would run code, or needs a
    package that is not installed.
    """
    with clear_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FORMATS[path.suffix.lower()](path)


class _Refused(ValueError):
    """An error in words of this module."""


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Whatever a library raises on a damaged file, as a ValueError of one line that names it."""
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(f"{path} is damaged, truncated or of another format: {reason}") from error


def _package(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _Refused(
            f"{path}: {path.suffix} files are read by the package {name}, which is not installed: "
            f"pip install {name}, or save the rows as .npy"
        ) from error


def _mapped(path, offset, size, shape, dtype, *, start=0, strides=None) -> Read:
    """Reads rows from bytes `offset` to `offset + size` of a file, whose first number is `start`
    bytes after the first; NumPy raises ValueError where a number would lie outside."""

    def view():
        return np.ndarray(
            shape, dtype, np.memmap(path, np.uint8, "r", offset, size), start, strides
        )

    def read(rows):
        count = len(range(shape[0])[rows] if isinstance(rows, slice) else rows)
        values = np.empty((count, shape[1]), dtype.newbyteorder("="))
        for first in range(0, shape[1], width):
            values[:, first : first + width] = view()[rows, first : first + width]
        return values

    apart = view().strides
    by_rows = apart[0] >= apart[1]
    width = shape[1] if by_rows else max(1, _MOST_MAPPED // (apart[1] + _PAGES_AT_ONCE))
    return read


# NumPy


def _npy_arrays(path: Path) -> dict[str, StoredArray]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        if "Python objects" in str(error):
            raise _Refused(
                f"{path} holds Python objects, which are not read: save numbers, "
                "np.save(path, np.asarray(rows, np.float32))"
            ) from error
        raise
    read = partial(
        _mapped, path, array.offset, array.nbytes, array.shape, array.dtype, strides=array.strides
    )
    return {"": StoredArray(array.shape, array.dtype.name, read)}


def _npz_arrays(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = read_npy_header(file)
                arrays[member.filename.removesuffix(".npy")] = StoredArray(
                    shape, dtype.name, _npz_array(path, member, file.tell(), shape, dtype)
                )
    return arrays


def _npz_array(path, member, header, shape, dtype):
    def open_array():
        needed = header + math.prod(shape) * dtype.itemsize
        if needed > member.file_size:  # nothing is allocated that the file does not hold
            raise ValueError(f"{member.filename} needs {needed} of {member.file_size} bytes")
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
        return values.astype(dtype.newbyteorder("="), copy=False).__getitem__

    return open_array


# safetensors


def _safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    safe_open = _package(path, "safetensors").safe_open
    arrays = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            shape, code = tuple(tensor.get_shape()), tensor.get_dtype()
            read = partial(_safetensor, safe_open, path, name, shape)
            arrays[name] = StoredArray(shape, _SAFETENSORS.get(code, code), read)
    return arrays


def _safetensor(safe_open, path, name, shape) -> Read:
    def read(rows):
        with safe_open(path, framework="numpy") as file:
            tensor = file.get_slice(name)
            if isinstance(rows, slice):
                start, stop, _ = rows.indices(shape[0])
                return tensor[start:stop]
            return np.concatenate([tensor[row : row + 1] for row in map(int, rows)])

    return read


# PyTorch


def _torch_arrays(path: Path) -> dict[str, StoredArray]:
    """A zip with a pickle that describes tensors, and their values uncompressed beside it."""
    if not zipfile.is_zipfile(path):
        raise _Refused(
            f"{path} is no archive of torch.save (a pickle, or from before PyTorch 1.6, or "
            "damaged) and is refused: unpickling can run code. Load it where you trust it, and "
            "save the tensor with torch.save"
        )
    torch = _package(path, "torch")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = archive.infolist()
        if any(archive.read(m) != b"little" for m in members if m.filename.endswith("/byteorder")):
            raise _Refused(f"{path} is big-endian, which is not supported")
        stored = [member for member in members if member.compress_type == zipfile.ZIP_STORED]
        sizes = {_data_offset(file, member): member.file_size for member in stored}
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({asked[1].rstrip('.,')[:80]})" if asked else ""
        raise _Refused(
            f"{path} is refused: its pickle asks for more than tensors{what}, and to unpickle "
            "that can run code. Save only the tensor: torch.save(tensor, path)"
        ) from error
    if isinstance(loaded, torch.Tensor):
        return {"": _torch_array(path, sizes, loaded)}
    if not isinstance(loaded, dict | list | tuple):
        raise _Refused(f"{path} holds no tensor but a {type(loaded).__name__}")
    items = loaded.items() if isinstance(loaded, dict) else enumerate(loaded)
    tensors = {str(name): item for name, item in items if isinstance(item, torch.Tensor)}
    return {name: _torch_array(path, sizes, tensor) for name, tensor in tensors.items()}


def _data_offset(file, member: zipfile.ZipInfo) -> int:
    """Where in a zip the bytes of a member start."""
    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    return member.header_offset + 30 + name_length + extra_length


def _torch_array(path: Path, sizes: dict[int, int], tensor: Any) -> StoredArray:
    """`sizes` are those of the archive's uncompressed members, by where their bytes start."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def open_array():
        if str(tensor.layout) != "torch.strided":
            raise _Refused(f"{path} holds a tensor of layout {tensor.layout}: save a dense one")
        # torch notes there where in the archive the values are that it was told not to load.
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset not in sizes:
            raise _Refused(f"{path}: the tensor's values do not lie uncompressed in the archive")
        stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        start = tensor.storage_offset() * stored.itemsize
        strides = tuple(step * stored.itemsize for step in tensor.stride())
        size = sizes[offset]
        return _mapped(path, offset, size, shape, stored, start=start, strides=strides)

    return StoredArray(shape, dtype, open_array)


FORMATS = {
    ".pt": _torch_arrays,
    ".pth": _torch_arrays,
    ".npy": _npy_arrays,
    ".npz": _npz_arrays,
    ".safetensors": _safetensors_arrays,
}
