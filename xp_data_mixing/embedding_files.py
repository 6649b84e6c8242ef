"""Embedding files, .npy and .pt, written a batch of rows at a time."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from jaxtyping import ArrayLike, Float

from lib.runs.files import atomic_file, make_folder

_NPY_HEADER = 128  # bytes


def write_embeddings(
    path: str | Path,
    batches: Iterable[Float[ArrayLike, "n d"]],
    *,
    dtype: Literal["float16", "float32"] = "float32",
) -> tuple[int, int]:
    """Writes the rows of all batches as one array [n, d] and returns its shape.

    By the path's suffix: .npy, or .pt, a tensor saved by torch (which can be read with
    `mmap=True, weights_only=True`). No more than two batches are in memory; a .pt passes through an
    unnamed temporary file of its size in the same folder. The file takes its name when complete.

    Raises ValueError for another suffix or dtype, no rows, batches that are not 2-d or not of one
    width, and rows that are not finite in `dtype` (float16 ends at 65,504); OSError where
    its folder, which is made where it is missing, cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"{path}: embeddings are written as .npy or .pt, not {path.suffix!r}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"{path}: embeddings are float16 or float32, not {dtype}")
    make_folder(path.parent)
    if path.suffix == ".npy":
        with atomic_file(path) as file:
            file.seek(_NPY_HEADER)
            shape = _append_rows(file, path, batches, dtype)
            file.seek(0)
            file.write(_npy_header(shape, dtype))
        return shape

    import torch

    with tempfile.TemporaryFile(dir=path.parent) as rows, atomic_file(path) as file:
        shape = _append_rows(rows, path, batches, dtype)
        rows.flush()
        mapped = np.memmap(rows, _little_endian(dtype), mode="r+", shape=shape)
        try:
            torch.save(torch.from_numpy(mapped), file)
        except RuntimeError as error:  # torch's way to end where the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return shape


def _little_endian(dtype):
    return np.dtype(dtype).newbyteorder("<")


def _npy_header(shape, dtype):
    """Version 1.0 of the format, always of `_NPY_HEADER` bytes: the shape is known last."""
    described = {"descr": _little_endian(dtype).str, "fortran_order": False, "shape": shape}
    text = str(described).ljust(_NPY_HEADER - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def _append_rows(file: BinaryIO, path: Path, batches, dtype) -> tuple[int, int]:
    count, width = 0, None
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 2 or batch.shape[1] == 0 or batch.shape[1] != (width or batch.shape[1]):
            raise ValueError(
                f"{path}: a batch of shape {batch.shape} after {count} rows of "
                f"{width or 'd >= 1'} numbers"
            )
        with np.errstate(over="ignore"):  # reported below, with the row
            stored = batch.astype(_little_endian(dtype), order="C", copy=False)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            first = int(np.argmin(finite))
            largest = np.abs(batch[first]).max()
            raise ValueError(
                f"{path}: row {count + first} is not finite in {dtype} (its largest is {largest})"
            )
        file.write(stored.data)
        count, width = count + len(batch), batch.shape[1]
    if width is None or not count:
        raise ValueError(f"{path}: no rows to write")
    return count, width
