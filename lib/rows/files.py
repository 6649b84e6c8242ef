"""Files of embeddings, read a few rows at a time: .pt, .npy, .npz and .safetensors.

`open_rows` looks at a file's header and returns a `RowFile`, which `lib.rows.Rows` and what takes
samples read a chunk at a time. How the formats store values is in `lib.rows._formats`.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np

from lib.rows._formats import DTYPES, FORMATS, Read, StoredArray, clear_errors, find_arrays

_ROWS_AT_ONCE = 512  # of those read one by one: what is mapped for them stays below 64 MiB
_MOST_LISTED = 10
_SPARSE = {"format", "shape", "data"}  # keys that every file of scipy.sparse.save_npz has
_BEFORE_KEY = re.compile(rf"(?:{'|'.join(map(re.escape, FORMATS))}):(?=.)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file's matrix [n, d]: `file[rows]` reads the rows of a slice or of indices, as stored.

    Every read opens the file anew, so that only the rows that it returns are in memory; an .npz is
    read whole when it is opened. Raises ValueError, naming the file, where it has been truncated.
    """

    path: Path
    key: str  # of the matrix in the file, "" where it has none
    name: str  # in messages, as it was asked for: PATH or PATH:KEY
    shape: tuple[int, int]
    dtype: np.dtype  # as stored
    read: Read = dataclasses.field(repr=False)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        with clear_errors(self.path):
            if isinstance(rows, slice):
                return self.read(rows)
            values = np.empty((len(rows), self.shape[1]), self.dtype)
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(first, first + _ROWS_AT_ONCE)
                values[part] = self.read(rows[part])
            return values

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


def open_rows(path: str | Path, *, key: str | None = None) -> RowFile:
    """Opens a file that holds a matrix [n, d] of float16, bfloat16, float32 or float64.

    - .pt, .pth: `torch.save` of a 2-D tensor, or of a dict or list with tensors.
    - .npy: `numpy.save`.
    - .npz: `numpy.savez` or `savez_compressed`; the matrix is read whole.
    - .safetensors.

    `key` names one of several tensors (in a list, its index: "0"), which the path may
    do too, as PATH:KEY; without, the only one, or the only one with two dimensions.

    Raises FileNotFoundError, or ValueError naming the file: a folder, another suffix, no tensor or
    several, a sparse matrix, another shape or dtype, no row or no column, a damaged or truncated
    file, a pickle with more in it than tensors, which is not executed, and a .pt or .safetensors
    where the package torch or safetensors is not installed.
    """
    path, key_in_path = path_and_key(path)
    key = key_in_path if key is None else key
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of rows")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: the suffix must be one of {', '.join(FORMATS)}; a table of text becomes "
            "one by np.save('rows.npy', np.loadtxt('rows.csv', delimiter=',', skiprows=1))"
        )
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
    dtype = np.dtype(ml_dtypes.bfloat16 if array.dtype == "bfloat16" else array.dtype)
    with clear_errors(path):
        return RowFile(path, key, name, array.shape, dtype, array.open())


def path_and_key(path: str | Path) -> tuple[Path, str | None]:
    """The file and the key of PATH:KEY, None where there is no key.

    What exists under the whole name is taken as a path. Otherwise a key begins behind a colon that
    follows one of the suffixes: so drive letters, and colons in folders and keys, do no harm.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path, None
    ends = [match.end() for match in _BEFORE_KEY.finditer(str(path))]
    splits = [(Path(str(path)[: end - 1]), str(path)[end:]) for end in ends]
    of_files = [split for split in splits if split[0].is_file()]
    return next(iter(of_files or splits), (path, None))


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


def _listing(path: Path, arrays: dict[str, StoredArray]) -> str:
    """What to ask for, and its shape; of many arrays the first."""
    shown = [
        f"{path}:{name} {array.shape}" if name else f"{path} {array.shape}"
        for name, array in list(arrays.items())[:_MOST_LISTED]
    ]
    rest = len(arrays) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def check_distinct(files: Iterable[RowFile]) -> None:
    """Raises ValueError if two are one matrix of one file, be it through links or `..`."""
    seen: dict[tuple[Path, str], RowFile] = {}
    for file in files:
        matrix = file.path.resolve(), file.key
        if matrix in seen:
            raise ValueError(f"the same file twice: {seen[matrix].name} and {file.name}")
        seen[matrix] = file
