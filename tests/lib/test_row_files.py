"""Files of rows against the arrays that were written, and every way in which a file can be bad."""

import io
import os
import pickle
import re
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from packing import packed
from safetensors.torch import save as safetensors_bytes
from scripts import run_script

from lib.rows import Rows, check_same_width
from lib.rows.files import check_distinct, open_rows, path_and_key

DTYPES = ("float16", "bfloat16", "float32", "float64")


def values(dtype="float32", rows=23, columns=7):
    """Rows in a dtype of torch: values of many sizes, negative and subnormal ones, zero."""
    rng = np.random.default_rng(0)
    exponents = rng.integers(-20, 12, size=(rows, columns))
    array = np.ldexp(rng.normal(size=(rows, columns)), exponents)
    array[0, 0] = 0
    return torch.from_numpy(array).to(getattr(torch, dtype))


def widened(tensor):
    """What is to be read: float64 as it is, the others in float32, by torch."""
    return tensor.numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


WRITERS = {
    "pt": lambda path, tensor: torch.save(tensor, path),
    "npy": lambda path, tensor: np.save(path, tensor.numpy()),
    "npz": lambda path, tensor: np.savez(path, rows=tensor.numpy()),
    "compressed.npz": lambda path, tensor: np.savez_compressed(path, rows=tensor.numpy()),
    "safetensors": lambda path, tensor: path.write_bytes(safetensors_bytes({"rows": tensor})),
}


def written(folder, kind, tensor):
    path = folder / f"rows.{kind}"
    WRITERS[kind](path, tensor)
    return path


def read(path, size=10, **options):
    file = open_rows(path, **options)
    chunks = Rows(file, dtype=np.promote_types(file.dtype, np.float32)).chunks(size)
    return np.concatenate(list(chunks))


# Reading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_and_dtype(tmp_path, kind, dtype):
    if dtype == "bfloat16" and kind not in ("pt", "safetensors"):
        pytest.skip("NumPy's formats have no bfloat16")
    tensor = values(dtype)
    file = open_rows(written(tmp_path, kind, tensor))
    assert (file.shape, file.dtype.name) == (tuple(tensor.shape), dtype)
    expected = widened(tensor)
    for rows in (slice(0, 5), slice(20, 99), np.array([0, 4, 22]), np.array([], int)):
        stored = file[rows]
        assert stored.dtype == file.dtype
        np.testing.assert_array_equal(stored.astype(expected.dtype), expected[rows])
    for size in (1, 22, 100):
        np.testing.assert_array_equal(read(file.path, size), expected)


VIEWS = {
    "transposed": lambda t: t.t(),
    "some columns": lambda t: t[:, 2:5],
    "every third row": lambda t: t[1::3],
    "transposed, every second": lambda t: t.t()[::2],
    "one row for all": lambda t: t[2:3].expand(9, -1),
    "one column for all": lambda t: t[:, 2:3].expand(-1, 9),
    "overlapping": lambda t: t.flatten().unfold(0, 6, 2),
    "one row of a transpose": lambda t: t.t()[3:4],
    "one value": lambda t: t[3:4, 2:3],
    "permuted": lambda t: t[:21].reshape(3, 7, 7).permute(1, 2, 0)[2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_tensors_that_are_views(tmp_path, monkeypatch, view):
    """torch.save keeps the whole storage and the strides; few columns are mapped at a time."""
    monkeypatch.setattr("lib.rows._formats._MOST_MAPPED", 2**17)
    tensor = VIEWS[view](values("bfloat16"))
    torch.save({"all": values(), "view": tensor}, tmp_path / "view.pt")
    expected = widened(tensor.contiguous())
    for size in (1, 4, 100):
        np.testing.assert_array_equal(read(tmp_path / "view.pt", size, key="view"), expected)
    last = len(expected) - 1
    taken = open_rows(tmp_path / "view.pt", key="view")[np.array([0, last])]
    np.testing.assert_array_equal(taken.astype("f"), expected[[0, last]])


def test_arrays_by_columns_and_of_other_byte_orders(tmp_path):
    array = values("float64").numpy()
    for stored in (np.asfortranarray(array), array.astype(">f8")):
        np.save(tmp_path / "rows.npy", stored)
        np.savez(tmp_path / "rows.npz", rows=stored)
        np.savez_compressed(tmp_path / "small.npz", rows=stored)
        for name in ("rows.npy", "rows.npz", "small.npz"):
            np.testing.assert_array_equal(read(tmp_path / name), array)
            assert open_rows(tmp_path / name)[:2].dtype.isnative


@pytest.mark.parametrize("container", [dict, list])
def test_one_of_several_tensors(tmp_path, container):
    tensors = {"0": values(), "1": values(columns=3), "2": torch.arange(4.0)}
    path = tmp_path / "many.pt"

    def save(names):
        some = {name: tensors[name] for name in names}
        torch.save(some | {"epoch": 3} if container is dict else list(some.values()), path)

    save("012")
    np.testing.assert_array_equal(read(path, key="1"), tensors["1"])
    with pytest.raises(ValueError, match=r"several tensors.*pt:0 \(23, 7\), \S+pt:1 \(23, 3\)$"):
        open_rows(path)
    save("02")
    np.testing.assert_array_equal(read(path), tensors["0"])
    torch.save(torch.nn.Parameter(tensors["0"]), path)
    np.testing.assert_array_equal(read(path), tensors["0"])
    with pytest.raises(ValueError, match=r"no tensor named 'x', but \S+pt \(23, 7\)$"):
        open_rows(path, key="x")


SAVE_DICT = {
    "pt": lambda path, tensors: torch.save(tensors, path),
    "npz": lambda path, tensors: np.savez(path, **tensors),
    "safetensors": lambda path, tensors: path.write_bytes(safetensors_bytes(tensors)),
}


@pytest.mark.parametrize("folder", ["plain", "a:b", "x.npz:y", "x.pt:1"])
@pytest.mark.parametrize("suffix", SAVE_DICT)
def test_a_path_names_one_of_several_matrices(tmp_path, monkeypatch, folder, suffix):
    """Whatever colons and slashes are in folders and keys; what an error lists can be typed."""
    path = tmp_path / folder / f"rows.{suffix}"
    path.parent.mkdir()
    names = ("train", "a:b", "layer.0/weight", "x.npz:y", "twice//slash")
    tensors = {name: torch.randn(3, 2) for name in names}
    SAVE_DICT[suffix](path, tensors)
    monkeypatch.chdir(path.parent)
    for typed in (str, Path):
        for name, tensor in tensors.items():
            for start in (path, path.name):
                file = open_rows(typed(f"{start}:{name}"))
                assert (file.path, file.key) == (Path(start), name)
                assert file.name == f"{start}:{name}"
                np.testing.assert_array_equal(file[:], tensor)
    with pytest.raises(ValueError, match="several tensors") as error:
        open_rows(path)
    with pytest.raises(ValueError, match="no tensor named 'other'") as other:
        open_rows(f"{path}:other")
    for message in (str(error.value), str(other.value)):
        assert message.count("\n") == 0
        assert sorted(re.findall(rf"{path}:(.*?) \(3, 2\)", message)) == sorted(names)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_rows(path.with_name(f"absent.{suffix}:train"))


def test_a_file_whose_name_looks_like_a_key_is_itself(tmp_path):
    np.save(tmp_path / "rows.npz:a.npy", ROWS)
    np.testing.assert_array_equal(read(tmp_path / "rows.npz:a.npy"), ROWS)
    assert path_and_key(r"C:\data\rows.PT:a") == (Path(r"C:\data\rows.PT"), "a")
    assert path_and_key("rows.npz:") == (Path("rows.npz:"), None)


def test_of_many_tensors_the_first_are_listed(tmp_path):
    np.savez(tmp_path / "many.npz", **{f"layer{i}": ROWS[:2] for i in range(300)})
    with pytest.raises(ValueError, match=r"many\.npz:layer9 \(2, 7\) and 290 more$"):
        open_rows(tmp_path / "many.npz")


@pytest.mark.parametrize("kind", ["csr", "coo", "dia"])
def test_sparse_matrices_are_named_as_such(tmp_path, kind):
    matrix = scipy.sparse.random_array((4, 6), density=0.5, format=kind)
    scipy.sparse.save_npz(tmp_path / "rows.npz", matrix)
    with pytest.raises(ValueError, match=r"rows\.npz holds a sparse matrix.*\.toarray\(\)"):
        open_rows(tmp_path / "rows.npz")


# Bad files


npy_bytes = partial(packed, np.save)


def saved(thing, **options):
    return packed(lambda file: torch.save(thing, file, **options))


def rezipped(content, compression=zipfile.ZIP_STORED, **replaced):
    """An archive of torch.save, packed again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            name = Path(member.filename).name
            new.writestr(member.filename, replaced.get(name, old.read(member)), compression)
    return file.getvalue()


class Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(PROOF),)


PROOF = Path(tempfile.gettempdir(), f"code ran in {os.getpid()}")
ROWS = values()
OBJECTS = np.array([[Code()]], dtype=object)
TENSORS = safetensors_bytes({"a": ROWS})
DAMAGED = "is damaged, truncated or of another format: "
BAD = {
    "one dimension.pt": (saved(ROWS[0]), r"not the shape \(7,\)"),
    "three.npy": (npy_bytes(np.zeros((2, 3, 4))), r"not the shape \(2, 3, 4\)"),
    "no row.pt": (saved(ROWS[:0]), r"is empty: shape \(0, 7\)"),
    "no column.npy": (npy_bytes(np.zeros((2, 0))), r"is empty: shape \(2, 0\)"),
    "integers.pt": (saved(ROWS.int()), "one of float16.*not int32"),
    "complex.pt": (saved(ROWS + 0j), "not complex64"),
    "bool.npy": (npy_bytes(np.zeros((2, 2), bool)), "not bool"),
    "quarter.pt": (saved(ROWS.to(torch.float8_e4m3fn)), "not float8_e4m3fn"),
    "long double.npy": (npy_bytes(np.zeros((2, 2), np.longdouble)), "not (float128|longdouble)"),
    "integers.safetensors": (safetensors_bytes({"a": ROWS.int()}), ":a: the dtype .* not I32"),
    "text.pt": (saved("hello"), "holds no tensor but a str"),
    "nothing.pt": (saved({"epoch": 3}), "holds no tensor"),
    "sparse.pt": (saved(ROWS.to_sparse()), "tensor of layout torch.sparse_coo"),
    "meta.pt": (saved(ROWS.to("meta")), "values do not lie uncompressed"),
    "compressed.pt": (rezipped(saved(ROWS), zipfile.ZIP_DEFLATED), "do not lie uncompressed"),
    "big-endian.pt": (rezipped(saved(ROWS), byteorder=b"big"), "is big-endian"),
    "short storage.pt": (rezipped(saved(ROWS), **{"0": b"1234"}), DAMAGED),
    "array.pt": (saved(ROWS.numpy()), r"is refused: .*more than tensors \(numpy.*_reconstruct\)"),
    "module.pt": (saved(torch.nn.Linear(2, 2)), r"is refused: .*\(torch.nn.modules.linear.Linear"),
    "old.pt": (saved(ROWS, _use_new_zipfile_serialization=False), "is no archive of torch.save"),
    "text file.pt": (b"hello\n" * 50, "is no archive of torch.save"),
    "empty.pt": (b"", "is no archive of torch.save"),
    "no header.npy": (b"hello\n" * 50, DAMAGED + "the magic string"),
    "version.npy": (b"\x93NUMPY\x09\x00" + npy_bytes(np.zeros((2, 2)))[8:], "version"),
    "negative.npy": (npy_bytes(np.zeros((2, 2))).replace(b"(2, 2)", b"(-2,2)"), "negative"),
    "no zip.npz": (b"hello\n" * 50, DAMAGED + "File is not a zip file"),
    "other members.npz": (rezipped(saved(ROWS)), DAMAGED),
    "empty.safetensors": (b"", DAMAGED),
    "long.safetensors": ((2**60).to_bytes(8, "little") + TENSORS[8:], DAMAGED),
    "no tensor.safetensors": (safetensors_bytes({}), "holds no tensor"),
    "shape.safetensors": (TENSORS.replace(b"[23,7]", b"[99,9]"), DAMAGED),
    "places.safetensors": (TENSORS.replace(b"[0,644]", b"[9,653]"), DAMAGED),
    "code.pt": (saved({"rows": ROWS, "more": Code()}), r"more than tensors \((posix|nt)\.mkdir\)"),
    "code in a list.pt": (saved([Code(), ROWS]), r"more than tensors \((posix|nt)\.mkdir\)"),
    "old code.pt": (saved(Code(), _use_new_zipfile_serialization=False), "unpickling can run code"),
    "pickle.pt": (pickle.dumps(Code()), "is refused: unpickling can run code"),
    "objects.npy": (npy_bytes(OBJECTS), "holds Python objects, .*: save numbers, np.save"),
    "objects.npz": (packed(np.savez, rows=OBJECTS), "not object"),
    "rows.csv": (b"1,2\n", r"the suffix must be one of \.pt, \.pth, \.npy, \.npz, \.safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_raise_one_line_that_names_them(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not PROOF.exists()


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.pt"):
        open_rows(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.pt is a folder"):
        open_rows(tmp_path / "folder.pt")


@pytest.mark.parametrize(("kind", "package"), [("pt", "torch"), ("safetensors", "safetensors")])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, kind, package):
    path = written(tmp_path, kind, ROWS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"rows\.{kind}: .*package {package}.*pip install"):
        open_rows(path)


@pytest.mark.parametrize("kind", ["pt", "npy", "safetensors"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, kind):
    path = written(tmp_path, kind, ROWS)
    chunks = Rows(open_rows(path)).chunks(2)
    next(chunks)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"rows\.{kind} {DAMAGED}"):
        list(chunks)


def test_files_of_one_set(tmp_path):
    for name, columns in (("a", 7), ("b", 7), ("c", 5)):
        torch.save(values(columns=columns), tmp_path / f"{name}.pt")
    a, b, c = (open_rows(tmp_path / f"{name}.pt") for name in "abc")
    check_same_width([])
    check_same_width([a, b])
    with pytest.raises(ValueError, match=r"a\.pt has shape \(23, 7\), .*c\.pt has shape \(23, 5\)"):
        check_same_width([a, b, c])


def test_the_same_file_twice(tmp_path, monkeypatch):
    for name in "ab":
        torch.save(ROWS, tmp_path / f"{name}.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", a=ROWS, b=ROWS, c=ROWS[0])
    np.savez("one.npz", a=ROWS, c=ROWS[0])
    check_distinct(map(open_rows, [tmp_path / "a.pt", "b.pt", "two.npz:a", "two.npz:b"]))
    for one, other in (
        *(("a.pt", name) for name in (tmp_path / "a.pt", "link.pt", f"../{tmp_path.name}/a.pt")),
        ("two.npz:a", "./two.npz:a"),
        ("one.npz", "one.npz:a"),
    ):
        with pytest.raises(ValueError, match="the same file twice"):
            check_distinct(map(open_rows, [one, "b.pt", other]))


MEMORY = """
import resource, sys
import jax
from lib.rff import gaussian_frequencies
from lib.rows import Rows
from lib.rows.files import open_rows
from lib.rows.fourier_means import stream_mean_embeddings
def memory():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frequencies = jax.block_until_ready(gaussian_frequencies(jax.random.key(0), 100, 8192))
file = open_rows(sys.argv[1])
before = memory()
total = sum(float(chunk[:, 0].sum()) for chunk in Rows(file).chunks(512))
print(memory() - before, total)
if "embeddings" in sys.argv:
    streamed = stream_mean_embeddings(file, frequencies, [50.0, 100.0], chunk_size=256)
    print(memory() - before, streamed.num_rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["r.pt", "columns.pt", "r.npy", "columns.npy", "r.safetensors"])
def test_memory_is_that_of_chunks_also_for_mean_embeddings(tmp_path, kind):
    """312 MiB of float16, of which 512 rows make 8 MiB, and 16 MiB in float32."""
    rows = torch.zeros(20_000, 8192, dtype=torch.float16)
    rows[:, 0] = 1
    rows = rows.t().contiguous().t() if kind.startswith("columns") else rows
    path = tmp_path / kind
    WRITERS[path.suffix[1:]](path, rows)
    embeddings = ["embeddings"] if kind == "r.pt" else []
    printed = run_script("-c", MEMORY, path, *embeddings, JAX_PLATFORMS="cpu")
    for line in printed.splitlines():
        growth, total = map(float, line.split())
        assert total == 20_000
        assert growth < 150 * 2**20
