"""Where .pt, .npy, .npz and .safetensors files keep their arrays, and the reading of rows there.

Only headers are parsed. Values that lie uncompressed in a file are read from where they lie,
whatever the order they are stored in, and not mapped into memory, since the pages of a mapped file
count as memory of the process. Only a compressed .npz has to be read from its start. Files are
data: nothing in them is executed, and a pickle that asks for code is refused.

Used through `lib.rows.files.open_rows`.
"""

import contextlib
import io
import json
import math
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from lib.runs.files import read_npy_header

DTYPES = ("float16", "bfloat16", "float32", "float64")

_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_LONGEST_HEADER = 100_000_000  # bytes of JSON, the format's own limit
_ZIP_START = b"PK\x03\x04"
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # encrypted, or compressed in an unknown way
    UnicodeDecodeError,
)
_PASS_SIZE = 1024  # rows at a time where single rows cannot be read


# Rows from where they lie


class Plain(NamedTuple):
    """Values uncompressed in a file: [i, j] is at byte offset + i strides[0] + j strides[1]."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype
    offset: int
    strides: tuple[int, int]

    def blocks(self, size: int, start: int) -> Iterator[np.ndarray]:
        """The rows from `start` on, `size` at a time, in the dtype stored."""
        with self._open() as file:
            for first in range(start, self.shape[0], size):
                yield self._read(file, first, min(size, self.shape[0] - first))

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """The rows of increasing indices `wanted`."""
        if self.strides[0] < self.strides[1]:
            return _pick(self, wanted)
        rows = np.empty((len(wanted), self.shape[1]), self.dtype)
        with self._open() as file:
            for place, row in enumerate(wanted):
                rows[place] = self._read(file, int(row), 1)[0]
        return rows

    def _open(self) -> io.FileIO:
        return open(self.path, "rb", buffering=0)

    def _read(self, file, first, count):
        offset = self.offset + first * self.strides[0]
        shape = (count, self.shape[1])
        return _read_strided(file, self.path, offset, shape, self.strides, self.dtype)


class Compressed(NamedTuple):
    """A compressed member of an .npz, row-major."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype
    member: str

    def blocks(self, size: int, start: int) -> Iterator[np.ndarray]:
        """The rows from `start` on, `size` at a time, in the dtype stored."""
        row_bytes = self.shape[1] * self.dtype.itemsize
        with (
            _clear_errors(self.path),
            _open_zip(self.path) as archive,
            cast(zipfile.ZipExtFile, archive.open(self.member)) as file,
        ):
            read_npy_header(file)
            file.seek(start * row_bytes, 1)
            for first in range(start, self.shape[0], size):
                raw = np.empty(min(size, self.shape[0] - first) * row_bytes, np.uint8)
                _fill(file, self.path, raw)
                yield raw.view(self.dtype).reshape(-1, self.shape[1])

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """The rows of increasing indices `wanted`."""
        return _pick(self, wanted)


def _pick(values: Plain | Compressed, wanted: np.ndarray) -> np.ndarray:
    """The rows of increasing indices `wanted`, by a pass over all of them."""
    rows, first = np.empty((len(wanted), values.shape[1]), values.dtype), 0
    for block in values.blocks(_PASS_SIZE, 0):
        places = slice(*np.searchsorted(wanted, (first, first + len(block))))
        rows[places] = block[wanted[places] - first]
        first += len(block)
    return rows


def _read_strided(file, path, offset, shape, strides, dtype):
    """Values [i, j] at offset + i strides[0] + j strides[1]; what lies between rows is not read."""
    (rows, columns), item = shape, dtype.itemsize
    if strides[0] < strides[1]:
        return _read_strided(file, path, offset, shape[::-1], strides[::-1], dtype).T
    if strides == (columns * item, item):
        raw = np.empty(rows * columns * item, np.uint8)
        file.seek(offset)
        _fill(file, path, raw)
        return raw.view(dtype).reshape(shape)
    values, line = np.empty(shape, dtype), np.empty((columns - 1) * strides[1] + item, np.uint8)
    for row in range(rows):
        file.seek(offset + row * strides[0])
        _fill(file, path, line)
        values[row] = np.ndarray(columns, dtype, line, strides=strides[1:])
    return values


def _fill(file: io.FileIO | zipfile.ZipExtFile, path: Path, raw: np.ndarray) -> None:
    """Fills `raw` from the file, which may give less at a time than it is asked for."""
    view, done = raw.data, 0
    while done < len(raw):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{path} is truncated: it ends in the middle of its rows")
        done += count


# Arrays in files


class StoredArray(NamedTuple):
    """An array found in a file.

    `locate` checks that its values are there and says where; it raises ValueError. Call it for two
    dimensions and a dtype of `DTYPES` only.
    """

    shape: tuple[int, ...]
    dtype: str
    locate: Callable[[], Plain | Compressed]


def find_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by name, "" for one that has none.

    Raises ValueError, naming the file, if it is damaged or truncated, or would run code.
    """
    with _clear_errors(path):
        return FORMATS[path.suffix.lower()](path)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """What zipfile and struct raise on damaged files, as a ValueError that names the file."""
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is damaged or truncated: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The error in one line of bounded length: some repeat what they cannot read."""
    named = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError)
    text = repr(error) if named else str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def _check_end(path: Path, end: int, available: int) -> None:
    if end > available:
        raise ValueError(
            f"{path} is damaged or truncated: {end} bytes are needed where {available} are there"
        )


def _stored_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of one of `DTYPES`, little-endian."""
    if dtype == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype).newbyteorder("<")


def _open_zip(path: Path) -> zipfile.ZipFile:
    """The archive, of which every member is said to start within the file."""
    try:
        archive = zipfile.ZipFile(path)
    except ValueError as error:  # a place before the file's start
        raise zipfile.BadZipFile(str(error)) from error
    for member in archive.infolist():
        if not 0 <= member.header_offset < path.stat().st_size:
            archive.close()
            raise zipfile.BadZipFile(f"{member.filename} at byte {member.header_offset}")
    return archive


def _data_offset(file: io.IOBase, member: zipfile.ZipInfo) -> int:
    """Where in a zip the bytes of a member start."""
    file.seek(member.header_offset)
    start, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
    if start != _ZIP_START:
        raise zipfile.BadZipFile(f"no header of {member.filename}")
    return member.header_offset + 30 + name_length + extra_length


# NumPy


def _npy_array(
    path: Path, file: io.IOBase, size: int, *, start: int | None = 0, member: str = ""
) -> StoredArray:
    """The array of an .npy file of `size` bytes, or of a member that begins at byte `start` of an
    archive, None where it is compressed."""
    label = f"{path}, {member!r}" if member else f"{path}"
    try:
        shape, by_columns, dtype = read_npy_header(file)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{label} has no header of an .npy file: {_reason(error)}") from error
    header = file.tell()

    def locate():
        _check_end(path, header + math.prod(shape) * dtype.itemsize, size)
        count, width = shape
        if start is not None:
            steps = (1, count) if by_columns else (width, 1)
            strides = (steps[0] * dtype.itemsize, steps[1] * dtype.itemsize)
            return Plain(path, (count, width), dtype, start + header, strides)
        if by_columns:
            raise ValueError(
                f"{label} is compressed and column-major, so it cannot be read by rows: save it "
                "after numpy.ascontiguousarray"
            )
        return Compressed(path, (count, width), dtype, member)

    return StoredArray(shape, dtype.name, locate)


def _npy_arrays(path: Path) -> dict[str, StoredArray]:
    with open(path, "rb") as file:
        return {"": _npy_array(path, file, path.stat().st_size)}


def _npz_arrays(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    with open(path, "rb") as whole, _open_zip(path) as archive:
        for member in archive.infolist():
            stored = member.compress_type == zipfile.ZIP_STORED
            start = _data_offset(whole, member) if stored else None
            name, size = member.filename, member.file_size
            with cast(zipfile.ZipExtFile, archive.open(member)) as file:
                array = _npy_array(path, file, size, start=start, member=name)
            arrays[name.removesuffix(".npy")] = array
    return arrays


# safetensors


def _safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    """A length in 8 bytes, so much JSON, then the values, all little-endian and row-major."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        _check_end(path, 8 + length, min(size, _LONGEST_HEADER))
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [
            (name, entry["dtype"], *(tuple(map(int, entry[f])) for f in ("shape", "data_offsets")))
            for name, entry in header.items()
        ]
        return {
            name: _safetensor(path, size, 8 + length, _SAFETENSORS.get(code, code), shape, *span)
            for name, code, shape, span in entries
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        message = f"{path} has no header of a .safetensors file: {_reason(error)}"
        raise ValueError(message) from error


def _safetensor(path, size, data, dtype, shape, start, end):
    def locate():
        stored = _stored_dtype(dtype)
        if start < 0 or end - start != math.prod(shape) * stored.itemsize:
            raise ValueError(f"{path} is damaged: bytes {start} to {end} for {dtype} {shape}")
        _check_end(path, data + end, size)
        strides = (shape[1] * stored.itemsize, stored.itemsize)
        return Plain(path, shape, stored, data + start, strides)

    return StoredArray(shape, dtype, locate)


# PyTorch


def _torch_arrays(path: Path) -> dict[str, StoredArray]:
    """A zip with a pickle that describes tensors, and their values uncompressed beside it."""
    with open(path, "rb") as file:
        if file.read(4) != _ZIP_START:
            raise ValueError(
                f"{path} is no archive of torch.save (a pickle, or from before PyTorch 1.6, or "
                "damaged) and is refused: unpickling can run code. Load it where you trust it, and "
                "save the tensor with torch.save"
            )
        with _open_zip(path) as archive:
            members = archive.infolist()
            orders = [archive.read(m) for m in members if m.filename.endswith("/byteorder")]
        if any(order != b"little" for order in orders):
            raise ValueError(f"{path} is big-endian, which is not supported")
        uncompressed = [m for m in members if m.compress_type == zipfile.ZIP_STORED]
        sizes = {_data_offset(file, member): member.file_size for member in uncompressed}
    loaded = _load_without_values(path)

    import torch

    if isinstance(loaded, torch.Tensor):
        return {"": _torch_array(path, sizes, loaded)}
    if not isinstance(loaded, dict | list | tuple):
        raise ValueError(f"{path} holds no tensor but a {type(loaded).__name__}")
    items = loaded.items() if isinstance(loaded, dict) else enumerate(loaded)
    tensors = {str(name): item for name, item in items if isinstance(item, torch.Tensor)}
    return {name: _torch_array(path, sizes, tensor) for name, tensor in tensors.items()}


def _load_without_values(path: Path) -> Any:
    """What was given to torch.save, with tensors that have a shape and a place but no values."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        asked = f" ({found[1].rstrip('.,')[:80]})" if found else ""
        raise ValueError(
            f"{path} is refused: its pickle asks for more than tensors{asked}, and to unpickle "
            "that can run code. Save the tensor alone: torch.save(tensor, path)"
        ) from error
    except Exception as error:  # whatever the many parts of torch raise
        message = f"{path} holds no plain tensor, or is damaged: {_reason(error)}"
        raise ValueError(message) from error


def _torch_array(path: Path, sizes: dict[int, int], tensor: Any) -> StoredArray:
    """`sizes` are those of the archive's uncompressed members, by where their bytes start."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def locate():
        if str(tensor.layout) != "torch.strided":
            raise ValueError(f"{path} holds a tensor of layout {tensor.layout}: save a dense one")
        stored = _stored_dtype(dtype)
        # torch notes there where in the archive the values are that it was told not to load.
        member = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if member not in sizes:
            raise ValueError(f"{path}: the tensor's values do not lie uncompressed in the archive")
        steps = tuple(step * stored.itemsize for step in tensor.stride())
        first = tensor.storage_offset() * stored.itemsize
        last = first + sum((side - 1) * step for side, step in zip(shape, steps))
        _check_end(path, last + stored.itemsize, sizes[member])
        return Plain(path, shape, stored, member + first, steps)

    return StoredArray(shape, dtype, locate)


FORMATS = {
    ".pt": _torch_arrays,
    ".pth": _torch_arrays,
    ".npy": _npy_arrays,
    ".npz": _npz_arrays,
    ".safetensors": _safetensors_arrays,
}
