"""Files of rows against the arrays that were written, and every way in which a file can be bad."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from lib.rows import _formats as formats
from lib.rows import check_same_width
from lib.rows.files import check_distinct, open_rows, path_and_key

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int32": "I32"}


def values(dtype="float32", rows=23, columns=7):
    """Rows in a dtype of torch: values of many sizes, negative and subnormal ones, zero."""
    rng = np.random.default_rng(0)
    exponents = rng.integers(-20, 12, size=(rows, columns))
    array = np.ldexp(rng.normal(size=(rows, columns)), exponents)
    array[0, 0] = 0
    return torch.from_numpy(array).to(DTYPES[dtype])


def widened(tensor):
    """What is to be read: float64 as it is, the others in float32, by torch."""
    return tensor.numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


def bits(tensor):
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def safetensors_bytes(tensors, **header):
    """A .safetensors file as its format's description has it."""
    blob, entries = b"", {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(bits(tensor)).tobytes()
        entries[name] = {
            "dtype": CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [len(blob), len(blob) + len(raw)],
        } | header
        blob += raw
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + blob


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
    return np.concatenate(list(open_rows(path, **options).chunks(size)))


# Reading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_and_dtype(tmp_path, kind, dtype):
    if dtype == "bfloat16" and kind not in ("pt", "safetensors"):
        pytest.skip("NumPy's formats have no bfloat16")
    tensor = values(dtype)
    file = open_rows(written(tmp_path, kind, tensor))
    assert (file.shape, file.dtype) == (tuple(tensor.shape), dtype)
    expected = widened(tensor)
    for size in (1, 5, 22, 23, 100):
        for start in (0, 3):
            chunks = list(file.chunks(size, start=start))
            assert [len(c) for c in chunks[:-1]] == [size] * (len(chunks) - 1)
            for chunk in chunks:
                assert chunk.dtype == expected.dtype
                assert chunk.flags.c_contiguous
            np.testing.assert_array_equal(np.concatenate(chunks), expected[start:])
    stored = np.concatenate(list(file.stored_chunks(5, start=3)))
    assert stored.dtype.name == dtype
    np.testing.assert_array_equal(stored.astype(expected.dtype), expected[3:])
    indices = [22, 0, 5, 5, 4]
    np.testing.assert_array_equal(file.take(indices), expected[indices])
    assert file.take([]).shape == (0, 7)


def test_safetensors_as_their_package_writes_them(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {"a": values("bfloat16"), "b": values("float16", columns=3)}
    save_file(tensors, tmp_path / "two.safetensors")
    for name, tensor in tensors.items():
        read_back = read(tmp_path / "two.safetensors", key=name)
        np.testing.assert_array_equal(read_back, widened(tensor))


VIEWS = {
    "transposed": lambda t: t.t(),
    "some columns": lambda t: t[:, 2:5],
    "every third row": lambda t: t[1::3],
    "every second column": lambda t: t[:, ::2],
    "transposed, every second": lambda t: t.t()[::2],
    "one row for all": lambda t: t[2:3].expand(9, -1),
    "one column for all": lambda t: t[:, 2:3].expand(-1, 9),
    "overlapping": lambda t: t.flatten().unfold(0, 6, 2),
    "one column": lambda t: t[:, 3:4],
    "one row": lambda t: t[3:4],
    "one row of a transpose": lambda t: t.t()[3:4],
    "one value": lambda t: t[3:4, 2:3],
    "permuted": lambda t: t[:21].reshape(3, 7, 7).permute(1, 2, 0)[2],
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_that_are_views(tmp_path, view, dtype):
    """torch.save keeps the whole storage and the strides."""
    tensor = VIEWS[view](values(dtype))
    torch.save(tensor, tmp_path / "view.pt")
    file = open_rows(tmp_path / "view.pt")
    expected = widened(tensor.contiguous())
    for size in (1, 4, 100):
        np.testing.assert_array_equal(np.concatenate(list(file.chunks(size))), expected)
    last = len(expected) - 1
    np.testing.assert_array_equal(file.take([last, 0]), expected[[last, 0]])


@pytest.mark.parametrize("view", ["transposed", "some columns", "every third row"])
def test_no_more_is_read_than_is_needed(tmp_path, monkeypatch, view):
    tensor = VIEWS[view](values())
    torch.save(tensor, tmp_path / "view.pt")
    read, fill = [], formats._fill
    monkeypatch.setattr(
        formats, "_fill", lambda file, path, raw: read.append(len(raw)) or fill(file, path, raw)
    )
    list(open_rows(tmp_path / "view.pt").chunks(4))
    assert sum(read) == 4 * tensor.numel()


def test_arrays_stored_by_columns(tmp_path):
    array = np.asfortranarray(values().numpy())
    np.save(tmp_path / "rows.npy", array)
    np.savez(tmp_path / "rows.npz", rows=array)
    for name in ("rows.npy", "rows.npz"):
        file = open_rows(tmp_path / name)
        np.testing.assert_array_equal(np.concatenate(list(file.chunks(4))), array)
        np.testing.assert_array_equal(file.take([7, 1]), array[[7, 1]])
    np.savez_compressed(tmp_path / "rows.npz", rows=array)
    with pytest.raises(ValueError, match=r"rows\.npz, 'rows\.npy' is compressed and column-major"):
        open_rows(tmp_path / "rows.npz")


def test_other_byte_orders_and_headers(tmp_path):
    array = values("float64").numpy()
    np.save(tmp_path / "big.npy", array.astype(">f4"))
    np.testing.assert_array_equal(read(tmp_path / "big.npy"), array.astype(np.float32))
    with open(tmp_path / "two.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    np.testing.assert_array_equal(read(tmp_path / "two.npy"), array)


@pytest.mark.parametrize("container", [dict, list])
def test_one_of_several_tensors(tmp_path, container):
    tensors = {"0": values(), "1": values(columns=3), "2": torch.arange(4.0)}
    path = tmp_path / "many.pt"
    save = {dict: lambda names: {n: tensors[n] for n in names} | {"epoch": 3},
            list: lambda names: [tensors[n] for n in names]}[container]  # fmt: skip
    torch.save(save("012"), path)
    np.testing.assert_array_equal(read(path, key="1"), tensors["1"])
    with pytest.raises(ValueError, match=r"several tensors.*pt:0 \(23, 7\), \S+pt:1 \(23, 3\)$"):
        open_rows(path)
    with pytest.raises(ValueError, match=r"holds no tensor named 'x', but \S+pt:0 "):
        open_rows(path, key="x")
    torch.save(save("02"), path)
    np.testing.assert_array_equal(read(path), tensors["0"])
    torch.save(torch.nn.Parameter(tensors["0"]), path)
    np.testing.assert_array_equal(read(path), tensors["0"])
    with pytest.raises(ValueError, match=r"no tensor named 'x', but \S+pt \(23, 7\)$"):
        open_rows(path, key="x")


SAVE_DICT = {
    "pt": lambda path, arrays: torch.save({k: torch.tensor(a) for k, a in arrays.items()}, path),
    "npz": lambda path, arrays: np.savez(path, **arrays),
    "safetensors": lambda path, arrays: path.write_bytes(
        safetensors_bytes({k: torch.tensor(a) for k, a in arrays.items()})
    ),
}


@pytest.mark.parametrize("folder", ["plain", "a:b", "x.npz:y", "x.pt:1"])
@pytest.mark.parametrize("suffix", SAVE_DICT)
def test_a_path_names_one_of_several_matrices(tmp_path, monkeypatch, folder, suffix):
    """Whatever colons and slashes are in folders and keys; what an error lists can be typed."""
    rng, path = np.random.default_rng(0), tmp_path / folder / f"rows.{suffix}"
    path.parent.mkdir()
    names = ("train", "a:b", "layer.0/weight", "x.npz:y", "twice//slash")
    arrays = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in names}
    SAVE_DICT[suffix](path, arrays)
    monkeypatch.chdir(path.parent)
    for typed in (str, Path):
        for name, array in arrays.items():
            for start in (path, path.name):
                file = open_rows(typed(f"{start}:{name}"))
                assert (file.path, file.key) == (Path(start), name)
                assert file.name == f"{start}:{name}"
                np.testing.assert_array_equal(np.concatenate(list(file.chunks(9))), array)
    with pytest.raises(ValueError, match="several tensors") as error:
        open_rows(path)
    with pytest.raises(ValueError, match="no tensor named 'other'") as other:
        open_rows(f"{path}:other")
    for message in (str(error.value), str(other.value)):
        assert message.count("\n") == 0
        listed = re.findall(rf"{path}:(.*?) \(3, 2\)", message)
        assert listed == [*names]
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


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("maker", [scipy.sparse.random, scipy.sparse.random_array])
def test_sparse_matrices_are_named_as_such(tmp_path, kind, maker):
    shape = (4, 6) if maker is scipy.sparse.random_array else 4
    matrix = maker(shape, *([] if shape != 4 else [6]), density=0.5, format=kind)
    scipy.sparse.save_npz(tmp_path / "rows.npz", matrix)
    with pytest.raises(ValueError, match=r"rows\.npz holds a sparse matrix.*\.toarray\(\)"):
        open_rows(tmp_path / "rows.npz")


def test_tensors_that_share_a_storage(tmp_path):
    rows = values()
    torch.save({"all": rows, "tail": rows[5:], "turned": rows.t()}, tmp_path / "shared.pt")
    np.testing.assert_array_equal(read(tmp_path / "shared.pt", key="tail"), rows[5:])
    np.testing.assert_array_equal(read(tmp_path / "shared.pt", key="turned"), rows.t())


# Bad files


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def saved(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def rezipped(content, compression=zipfile.ZIP_STORED, **replaced):
    """An archive of torch.save, packed again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            name = Path(member.filename).name
            new.writestr(member.filename, replaced.get(name, old.read(member)), compression)
    return file.getvalue()


ROWS = values()
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
    "short storage.pt": (rezipped(saved(ROWS), **{"0": b"1234"}), "damaged or truncated: 644 byte"),
    "array.pt": (saved(ROWS.numpy()), r"is refused: .*more than tensors \(numpy.*_reconstruct\)"),
    "module.pt": (saved(torch.nn.Linear(2, 2)), r"is refused: .*\(torch.nn.modules.linear.Linear"),
    "old.pt": (saved(ROWS, _use_new_zipfile_serialization=False), "is no archive of torch.save"),
    "text file.pt": (b"hello\n" * 50, "is no archive of torch.save"),
    "empty.pt": (b"", "is no archive of torch.save"),
    "no header.npy": (b"hello\n" * 50, "has no header of an .npy file"),
    "empty.npy": (b"", "has no header of an .npy file"),
    "version.npy": (b"\x93NUMPY\x09\x00" + npy_bytes(np.zeros((2, 2)))[8:], "version"),
    "negative.npy": (npy_bytes(np.zeros((2, 2))).replace(b"(2, 2)", b"(-2,2)"), "is empty"),
    "no zip.npz": (b"hello\n" * 50, "is damaged or truncated: File is not a zip file"),
    "other members.npz": (rezipped(saved(ROWS)), "data.pkl' has no header of an .npy file"),
    "empty.safetensors": (b"", "is damaged or truncated"),
    "long.safetensors": (struct.pack("<Q", 2**60) + b"{}", "is damaged or truncated"),
    "no json.safetensors": (struct.pack("<Q", 9) + b"{" * 9, "has no header of a .safetensors"),
    "list.safetensors": (struct.pack("<Q", 2) + b"[]", "has no header of a .safetensors"),
    "fields.safetensors": (struct.pack("<Q", 8) + b'{"a":{}}', "has no header of a .safetensors"),
    "no tensor.safetensors": (struct.pack("<Q", 2) + b"{}", "holds no tensor"),
    "shape.safetensors": (safetensors_bytes({"a": ROWS}, shape=[9, 9]), "is damaged: bytes 0 to"),
    "places.safetensors": (
        safetensors_bytes({"a": ROWS}, data_offsets=[644, 1288]),
        "is damaged or truncated: .* bytes are needed",
    ),
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


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.pt"):
        open_rows(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.pt is a folder"):
        open_rows(tmp_path / "folder.pt")


@pytest.mark.parametrize("kind", WRITERS)
def test_truncated_files(tmp_path, kind):
    """Wherever a file ends, it is refused, at the latest before all its rows are read."""
    whole = written(tmp_path, kind, ROWS).read_bytes()
    path = tmp_path / f"cut.{kind}"
    for length in {*range(0, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\."):
            read(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files(tmp_path, kind):
    """With any bit flipped, a file is read or it is refused; nothing else is raised."""
    path = written(tmp_path, kind, ROWS)
    whole, messages = path.read_bytes(), []
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read(path)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("kind", ["pt", "npy", "npz"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, kind):
    path = written(tmp_path, kind, ROWS)
    chunks = open_rows(path).chunks(2)
    next(chunks)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="is truncated: it ends in the middle of its rows"):
        list(chunks)


def test_wrong_checksum(tmp_path):
    path = written(tmp_path, "compressed.npz", ROWS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.compressed\.npz is damaged or truncated"):
        read(path)


class Malicious:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_with_code_are_refused_and_do_not_run(tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    evil = Malicious(proof)
    for thing in (evil, {"rows": ROWS, "more": evil}, [evil, ROWS]):
        torch.save(thing, path)
        with pytest.raises(
            ValueError, match=r"is refused: .*more than tensors \((posix|nt)\.mkdir\)"
        ):
            open_rows(path)
        torch.save(thing, path, _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match="is refused: unpickling can run code"):
            open_rows(path)
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="is refused: unpickling can run code"):
        open_rows(path)
    objects = np.array([[evil]], dtype=object)
    np.save(tmp_path / "evil.npy", objects)
    np.savez(tmp_path / "evil.npz", rows=objects)
    for name in ("evil.npy", "evil.npz"):
        with pytest.raises(ValueError, match="not object"):
            open_rows(tmp_path / name)
    assert not proof.exists()
    torch.load(io.BytesIO(saved(evil)), weights_only=False)
    assert proof.exists()  # so that the test would have noticed


# Values and sets of files


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite(tmp_path, dtype, bad):
    tensor = values(dtype)
    tensor[[17, 4, 5], [0, 6, 1]] = bad
    tensor[5] = bad
    file = open_rows(written(tmp_path, "pt", tensor))
    for size in (1, 5, 23):
        with pytest.raises(
            ValueError, match=r"rows\.pt: NaN or infinity in 3 of 23 rows, the .* 4$"
        ):
            list(file.chunks(size))
    with pytest.raises(ValueError, match="in 2 of 18 rows, the first is row 5"):
        list(file.chunks(4, start=5))
    with pytest.raises(ValueError, match="1 of the 2 rows taken, the first is row 17"):
        file.take([17, 0])
    assert len(list(file.chunks(6, start=18))) == 1


def test_bad_requests(tmp_path):
    file = open_rows(written(tmp_path, "pt", ROWS))
    with pytest.raises(ValueError, match="not 0 and 0"):
        file.chunks(0)
    for row in (-1, 23):
        with pytest.raises(IndexError, match="has 23 rows"):
            file.take([3, row])


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


# Memory

READ_ALL = """
import resource, sys
from lib import row_formats
from lib.rows.files import open_rows
unit = 1 if sys.platform == "darwin" else 1024
file = open_rows(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(float(chunk[:, 0].sum()) for chunk in file.chunks(512))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * unit, total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows.pt", "columns.pt", "rows.npy", "columns.npy"])
def test_memory_is_that_of_chunks(tmp_path, kind):
    """312 MiB of float16, of which 512 rows make 8 MiB, and 16 MiB in float32."""
    rows = torch.zeros(20_000, 8192, dtype=torch.float16)
    rows[:, 0] = 1
    rows = rows if kind.startswith("rows") else rows.t().contiguous().t()
    path = tmp_path / kind
    torch.save(rows, path) if path.suffix == ".pt" else np.save(path, rows.numpy())
    command = [sys.executable, "-c", READ_ALL, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, total = map(float, done.stdout.split())
    assert total == 20_000
    assert growth < 100 * 2**20
