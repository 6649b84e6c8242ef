"""Files of embeddings, read a few rows at a time: .pt, .npy, .npz and .safetensors.

`open_rows` looks at a file's header alone and returns a `RowFile`: its shape, its dtype, and
`chunks(size)`, which yields the rows in order with at most `size` of them in memory. Beside such a
chunk, what is held is the same rows in the file's dtype. Half precision is widened to float32 as it
is read; float32 and float64 stay what they are. How the formats store values is in
`lib.row_formats`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lib.row_formats import DTYPES, FORMATS, Compressed, Plain, StoredArray, find_arrays


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file's matrix [n, d]. Making it reads no row, and each pass opens the file anew."""

    path: Path
    shape: tuple[int, int]
    dtype: str  # as stored, one of `lib.row_formats.DTYPES`
    values: Plain | Compressed = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The path: what `lib.rows.Rows` are called in messages."""
        return str(self.path)

    def chunks(self, size: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """The rows from `start` on, in order, as arrays [size, d], the last one perhaps shorter.

        float32, or float64 where the file is. Raises ValueError if the file ends early; and after
        the last chunk if values were NaN or infinite, with the number of such rows and the first,
        so that nothing that needs all the rows returns a result.
        """
        return self._checked(self.stored_chunks(size, start=start), start)

    def _checked(self, chunks: Iterable[np.ndarray], start: int) -> Iterator[np.ndarray]:
        position, count, first = start, 0, None
        for chunk in map(_widen, chunks):
            bad = _not_finite(chunk)
            if len(bad):
                first = position + bad[0] if first is None else first
                count += len(bad)
            position += len(chunk)
            yield chunk
        if count:
            raise ValueError(
                f"{self.path}: NaN or infinity in {count} of {position - start} rows, the first is "
                f"row {first}"
            )

    def stored_chunks(self, size: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """As `chunks`, but in the dtype stored and whatever the values: for where a device widens
        and checks them, as `lib.streamed_means.stream_mean_embeddings` does.
        """
        if size < 1 or start < 0:
            raise ValueError(f"{self.path}: size >= 1 and start >= 0, not {size} and {start}")
        native = self.values.dtype.newbyteorder("=")
        return (block.astype(native, copy=False) for block in self.values.blocks(size, start))

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows `indices`, in that order, [len(indices), d] in the dtype of `chunks`.

        Reads these rows alone, but the whole file where it is compressed or stored by columns.
        Raises IndexError for a row that is not there, ValueError if one is not finite.
        """
        wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.shape[0]:
            raise IndexError(
                f"{self.path} has {self.shape[0]} rows: no rows {wanted[0]} to {wanted[-1]}"
            )
        rows = _widen(self.values.rows(wanted))
        bad = _not_finite(rows)
        if len(bad):
            raise ValueError(
                f"{self.path}: NaN or infinity in {len(bad)} of the {len(rows)} rows taken, the "
                f"first is row {wanted[bad[0]]}"
            )
        return rows[places]


def _not_finite(rows: np.ndarray) -> np.ndarray:
    """The indices of the rows with a NaN or an infinity."""
    finite = np.isfinite(rows)
    return np.array([], int) if finite.all() else np.flatnonzero(~finite.all(axis=1))


def _widen(raw: np.ndarray) -> np.ndarray:
    """Stored values as native float32 or float64, row-major."""
    wide = np.float64 if raw.dtype.itemsize == 8 else np.float32
    return raw.astype(wide, order="C", copy=False)


def open_rows(path: str | Path, *, key: str | None = None) -> RowFile:
    """Opens a file that holds a matrix [n, d] of float16, bfloat16, float32 or float64.

    - .pt, .pth: `torch.save` of a 2-D tensor, or of a dict or list with tensors.
    - .npy: `numpy.save`. .npz: `numpy.savez`, or `savez_compressed` of row-major arrays.
    - .safetensors.

    Of several tensors the one named `key` is taken (in a list, its index: "0"); without `key` the
    only one, or the only one with two dimensions.

    Raises FileNotFoundError, or ValueError naming the file: a folder, another suffix, no tensor or
    several, another shape or dtype, no row or no column, a damaged or truncated file, and a pickle
    with more in it than tensors, which is not executed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of rows")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(FORMATS)}")
    name, array = _choose(path, find_arrays(path), key)
    label = f"{path}, {name!r}" if name else f"{path}"
    if len(array.shape) != 2:
        raise ValueError(f"{label}: a 2-D array [n, d] is needed, not the shape {array.shape}")
    if min(array.shape) < 1:
        raise ValueError(f"{label} is empty: shape {array.shape}")
    if array.dtype not in DTYPES:
        raise ValueError(
            f"{label}: the dtype must be one of {', '.join(DTYPES)}, not {str(array.dtype)[:80]}"
        )
    return RowFile(path, array.shape, array.dtype, array.locate())


def _choose(path: Path, arrays: dict[str, StoredArray], key: str | None) -> tuple[str, StoredArray]:
    if not arrays:
        raise ValueError(f"{path} holds no tensor")
    listing = ", ".join(
        f"{repr(name) if name else 'one without a name'} {array.shape}"
        for name, array in arrays.items()
    )
    if key is not None:
        if key not in arrays:
            raise ValueError(f"{path} holds no tensor named {key!r}, but {listing}")
        return key, arrays[key]
    if len(arrays) > 1:
        matrices = {name: array for name, array in arrays.items() if len(array.shape) == 2}
        if len(matrices) != 1:
            raise ValueError(f"{path} holds several tensors, choose one by its key: {listing}")
        arrays = matrices
    return next(iter(arrays.items()))


def check_distinct(paths: Iterable[str | Path]) -> None:
    """Raises ValueError if two paths lead to one file, be it through links or `..`."""
    seen: dict[Path, str | Path] = {}
    for path in paths:
        file = Path(path).expanduser().resolve()
        if file in seen:
            raise ValueError(f"the same file twice: {seen[file]} and {path}")
        seen[file] = path
