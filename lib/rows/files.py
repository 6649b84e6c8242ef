"""Files of embeddings, read a few rows at a time: .pt, .npy, .npz and .safetensors.

`open_rows` looks at a file's header alone and returns a `RowFile`: its shape, its dtype, and
`chunks(size)`, which yields the rows in order with at most `size` of them in memory. Beside such a
chunk, what is held is the same rows in the file's dtype. Half precision is widened to float32 as it
is read; float32 and float64 stay what they are. How the formats store values is in
`lib.rows`.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from lib.rows._formats import (
    DTYPES,
    FORMATS,
    Compressed,
    Plain,
    StoredArray,
    find_arrays,
)


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file's matrix [n, d]. Making it reads no row, and each pass opens the file anew."""

    path: Path
    key: str  # of the matrix in the file, "" where it has none
    name: str  # in messages, as it was asked for: PATH or PATH:KEY
    shape: tuple[int, int]
    dtype: str  # as stored, one of `lib.rows._formats.DTYPES`
    values: Plain | Compressed = dataclasses.field(repr=False)

    def fingerprint(self) -> str:
        """What the file holds: SHA-256, in hex, of its size, the key and its bytes.

        Of more than 64 MiB only of 64 blocks of 1 MiB, spread evenly from the first byte to the
        last: what differs only between them is not seen. Raises OSError.
        """
        size, block = self.path.stat().st_size, 1 << 20
        starts = np.arange(0, size, block)
        if len(starts) > 64:
            starts = np.linspace(0, size - block, 64).astype(np.int64)
        digest = hashlib.sha256(f"{size} {self.key}".encode())
        with self.path.open("rb", buffering=0) as file:
            for start in starts:
                file.seek(int(start))
                digest.update(file.read(block))
        return digest.hexdigest()

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
                f"{self.name}: NaN or infinity in {count} of {position - start} rows, the first is "
                f"row {first}"
            )

    def stored_chunks(self, size: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """As `chunks`, but in the dtype stored and whatever the values: for where a device widens
        and checks them, as `lib.rows.fourier_means.stream_mean_embeddings` does.
        """
        if size < 1 or start < 0:
            raise ValueError(f"{self.name}: size >= 1 and start >= 0, not {size} and {start}")
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
                f"{self.name} has {self.shape[0]} rows: no rows {wanted[0]} to {wanted[-1]}"
            )
        rows = _widen(self.values.rows(wanted))
        bad = _not_finite(rows)
        if len(bad):
            raise ValueError(
                f"{self.name}: NaN or infinity in {len(bad)} of the {len(rows)} rows taken, the "
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

    Of several tensors the one named `key` is taken (in a list, its index: "0"), which the path may
    give too, as PATH:KEY; without, the only one, or the only one with two dimensions.

    Raises FileNotFoundError, or ValueError naming the file: a folder, another suffix, no tensor or
    several, a sparse matrix, another shape or dtype, no row or no column, a damaged or truncated
    file, and a pickle with more in it than tensors, which is not executed.
    """
    path, found_key = path_and_key(path)
    key = found_key if key is None else key
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of rows")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(FORMATS)}")
    asked = key is not None
    key, array = _choose(path, find_arrays(path), key)
    label = f"{path}:{key}" if key else str(path)
    if len(array.shape) != 2:
        raise ValueError(f"{label}: a 2-D array [n, d] is needed, not the shape {array.shape}")
    if min(array.shape) < 1:
        raise ValueError(f"{label} is empty: shape {array.shape}")
    if array.dtype not in DTYPES:
        raise ValueError(
            f"{label}: the dtype must be one of {', '.join(DTYPES)}, not {str(array.dtype)[:80]}"
        )
    name = label if asked else str(path)
    return RowFile(path, key, name, array.shape, array.dtype, array.locate())


def path_and_key(path: str | Path) -> tuple[Path, str | None]:
    """The file and the key of PATH:KEY, None where there is no key.

    What exists under the whole name is taken as a path. Otherwise a key begins behind a colon that
    follows one of the suffixes: so drive letters, and colons in folders and keys, do no harm.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path, None
    ends = [match.end() for match in _BEFORE_KEY.finditer(str(path))]
    found = [(Path(str(path)[: end - 1]), str(path)[end:]) for end in ends]
    there = [one for one in found if one[0].is_file()]
    return next(iter(there or found), (path, None))


_BEFORE_KEY = re.compile(rf"(?:{'|'.join(map(re.escape, FORMATS))}):(?=.)", re.IGNORECASE)


def _choose(path: Path, arrays: dict[str, StoredArray], key: str | None) -> tuple[str, StoredArray]:
    if not arrays:
        raise ValueError(f"{path} holds no tensor")
    if key is not None:
        # A path may have changed slashes in the key.
        same = [name for name in arrays if name and PurePath(name) == PurePath(key)]
        for name in (key, *same):
            if name in arrays:
                return name, arrays[name]
        raise ValueError(f"{path} holds no tensor named {key!r}, but {_listing(path, arrays)}")
    if arrays.keys() >= _SPARSE:
        raise ValueError(
            f"{path} holds a sparse matrix of scipy.sparse, which is not read: save its rows, as "
            "with numpy.save('rows.npy', scipy.sparse.load_npz(path).toarray())"
        )
    matrices = {name: array for name, array in arrays.items() if len(array.shape) == 2}
    if len(arrays) > 1 and len(matrices) != 1:
        listing = _listing(path, matrices or arrays)
        raise ValueError(f"{path} holds several tensors, choose one by its key: {listing}")
    return next(iter((matrices or arrays).items()))


_SPARSE = {"format", "shape", "data"}
"""Keys that every file of scipy.sparse.save_npz has."""


def _listing(path: Path, arrays: dict[str, StoredArray]) -> str:
    """What to ask for, and its shape; of many arrays the first."""
    shown = [
        f"{path}:{name} {array.shape}" if name else f"{path} {array.shape}"
        for name, array in list(arrays.items())[:_MOST_LISTED]
    ]
    rest = len(arrays) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


_MOST_LISTED = 10


def check_distinct(files: Iterable[RowFile]) -> None:
    """Raises ValueError if two are one matrix of one file, be it through links or `..`."""
    seen: dict[tuple[Path, str], RowFile] = {}
    for file in files:
        matrix = file.path.resolve(), file.key
        if matrix in seen:
            raise ValueError(f"the same file twice: {seen[matrix].name} and {file.name}")
        seen[matrix] = file
