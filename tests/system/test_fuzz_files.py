"""Damaged files: whatever is done to a file's bytes, it loads or it is refused in our own words.

What comes of a mutation of a valid file are the same values, other values that are as valid, or a
refusal (ValueError or FileNotFoundError that names the file). Any other error, code that runs, or
more than `MOST_BYTES` allocated is a failure.
"""

import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import packed
from PIL import Image
from safetensors.numpy import save_file
from stored import CONDENSED, MIXTURE

from lib import datasets, runs
from lib.rows import Rows
from lib.rows.files import open_rows
from lib.runs.files import load_arrays, load_checkpoint, save_arrays, save_checkpoint
from xp_dataset_distillation import condensed_numpy, export
from xp_gmm_source import gmm_files

MOST_BYTES = 32 * 2**20
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


class Format(NamedTuple):
    """`make` writes a valid file (or more) into a folder and returns the one to be changed; `read`
    reads all of it; errors name `named` of it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    named: Callable[[Path], Path] = lambda path: path


class Payload:
    """Unpickled, it makes the folder that FUZZ_MARKER names."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["FUZZ_MARKER"])),)


# ---- Rows


def read_rows(path):
    rows = Rows(open_rows(path))
    whole = np.concatenate(list(rows.chunks(3)))
    np.testing.assert_array_equal(rows.take([0, rows.shape[0] - 1]), whole[[0, -1]])
    return whole


def made_by(write, name, *arguments, **options):
    """A `make` that calls `write(path of that name, ...)`."""

    def make(folder):
        write(folder / name, *arguments, **options)
        return folder / name

    return make


def save_pickle(path):
    path.write_bytes(pickle.dumps([Payload(), ROWS]))


def save_torch(path, more):
    import torch

    torch.save({"rows": torch.from_numpy(ROWS), "more": more}, path)


# ---- Images


def make_idx(folder):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    images = struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">II", 0x801, 3) + bytes([3, 0, 9])
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return raw / "train-images-idx3-ubyte"


def read_images(path, data_root=None):
    images, labels = datasets.load(path, data_root=data_root)[1:3]
    assert images.dtype == np.uint8
    assert images.ndim == 4
    assert len(images) == len(labels)
    return images, labels


def read_idx(path):
    return read_images("mnist", path.parents[2])


def picture(suffix):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def image_folder(suffix):
    def make(folder):
        for name in ("a", "b"):
            (folder / "images" / name).mkdir(parents=True)
            (folder / "images" / name / f"0.{suffix}").write_bytes(picture(suffix))
        return folder / "images" / "b" / f"0.{suffix}"

    return Format(make, lambda path: read_images(path.parents[1]), lambda path: path.parents[1])


def make_zip(folder):
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a", "b"):
            archive.writestr(f"train/{name}/0.png", picture("png"))
            archive.writestr(f"test/{name}/0.png", picture("png"))
    return folder / "a.zip"


# ---- What runs leave

CONFIG = {"steps": 3, "lr": 0.5, "name": "é"}
STATE = {"x": np.arange(6.0).reshape(2, 3), "key": jax.random.key(0), "n": 3}


def open_it(results):
    return runs.open_run(results, "xp", "flow", CONFIG, seed=0)


def make_metrics(folder):
    run = open_it(folder)
    run.append_metrics([{"step": i, "loss": float(i), "w": [np.nan, 1.0]} for i in range(3)])
    return run.metrics


def read_metrics(path):
    run = runs.Run(path.parent)
    run.truncate_metrics(9)
    return json.dumps(metrics(run))


def read_checkpoint(path):
    state, step = load_checkpoint(path, STATE)
    assert state["x"].shape == (2, 3)
    return state["x"], jax.random.key_data(state["key"]), state["n"], step


def read_arrays(path):
    arrays = load_arrays(path)
    return sorted((name, np.asarray(array).tobytes()) for name, array in arrays.items())


def read_mixture(path):
    stored = gmm_files.load(path)
    assert np.prod(stored.image_shape) == len(stored.mean)
    return jax.tree.leaves(stored.mixture), stored.mean, stored.std


def read_stats(path):
    stats = gmm_files.load_stats(path)
    return stats["mean"].numpy(), stats["std"].numpy()


def read_condensed(path):
    images, labels, _ = condensed_numpy.load(path)
    assert len(images) == len(labels)
    return images, labels, export.load(path).images


CODE = np.array([[Payload(), 1]], object)
FORMATS = {
    "npy": Format(made_by(np.save, "a.npy", ROWS), read_rows),
    "npz": Format(made_by(np.savez, "a.npz", rows=ROWS, ids=np.arange(4)), read_rows),
    "npz, compressed": Format(
        made_by(np.savez_compressed, "a.npz", rows=ROWS.repeat(9, axis=0)), read_rows
    ),
    "safetensors": Format(
        made_by(lambda path: save_file({"rows": ROWS}, path, {"format": "pt"}), "a.safetensors"),
        read_rows,
    ),
    "pt": Format(made_by(save_torch, "a.pt", 3), read_rows),
    "pt with code": Format(made_by(save_torch, "a.pt", Payload()), read_rows),
    "pickle named pt": Format(made_by(save_pickle, "a.pt"), read_rows),
    "npy with code": Format(made_by(np.save, "a.npy", CODE), read_rows),
    "npz with code": Format(made_by(np.savez, "a.npz", x=CODE, step=1, names="[]"), read_arrays),
    "idx, images": Format(make_idx, read_idx, lambda path: path.parent),
    "idx, labels": Format(
        lambda folder: make_idx(folder).with_name("train-labels-idx1-ubyte"),
        read_idx,
        lambda path: path.parent,
    ),
    **{
        f"folder of {suffix}": image_folder(suffix)
        for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp")
    },
    "zip of images": Format(make_zip, read_images),
    "config.json": Format(
        lambda folder: open_it(folder).folder / "config.json",
        lambda path: open_it(path.parents[3]) and None,
    ),
    "metrics.jsonl": Format(make_metrics, read_metrics),
    "checkpoint": Format(
        made_by(save_checkpoint, "checkpoint.npz", STATE, step=3), read_checkpoint
    ),
    "arrays": Format(
        made_by(save_arrays, "a.npz", x=ROWS, half=jnp.ones(3, jnp.bfloat16), text="words"),
        read_arrays,
    ),
    "mixture": Format(made_by(gmm_files.save, "mixture.npz", MIXTURE), read_mixture),
    "stats.pt": Format(
        made_by(gmm_files.save_stats, "a_stats.pt", np.zeros(4), np.ones(4), (2, 2, 1)), read_stats
    ),
    "condensed": Format(
        made_by(lambda path: export.save(path.parent, CONDENSED), "set/condensed.npz"),
        read_condensed,
    ),
}
ARCHIVES = (
    "npz", "npz, compressed", "pt", "pt with code", "npz with code", "zip of images",
    "checkpoint", "arrays", "mixture", "stats.pt", "condensed",
)  # fmt: skip

# ---- Mutations

NUMBERS = (b"1000000000000", b"-1", b"0", b"1e999", b"99", b"true", b"null", b"[]", b"1.5", b'"x"')
INTEGERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, bytes, spans, integers, numbers in text, brackets."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _change(content, rng)
    return content


def _change(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    if rng.random() < 0.5:  # headers are at the ends
        edge = rng.randrange(min(len(content), 200) + 1)
        at = rng.choice((edge, len(content) - edge))
    head, tail, size = content[:at], content[at:], rng.randrange(1, 1 << rng.randrange(1, 8))
    code = rng.choice(("<I", ">I", "<Q", "<H"))
    width = struct.calcsize(code)
    integer = struct.pack(code, rng.choice(INTEGERS) % (1 << 8 * width))
    digits = [match.span() for match in re.finditer(rb"[0-9]+", content)]
    first, last = rng.choice(digits or [(at, at)])
    byte = tail[0] if tail else 0
    kinds = (
        lambda: head + bytes([byte ^ 1 << rng.randrange(8)]) + tail[1:],
        lambda: head + bytes([rng.choice((0, 255, 127, 128, rng.randrange(256)))]) + tail[1:],
        lambda: head + rng.randbytes(size) + tail,
        lambda: head + tail[size:],
        lambda: head,
        lambda: head + tail[:size] + tail,
        lambda: head + integer + tail[width:],
        lambda: content[:first] + rng.choice(NUMBERS) + content[last:],
        lambda: head + rng.choice((b"[", b"(", b"{", b'"')) * rng.choice((1, 40, 5000)) + tail,
    )
    return rng.choice(kinds)()


def resealed(content: bytes, rng: random.Random) -> bytes:
    """The archive with one member changed, dropped, copied or renamed, and right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    kinds = {info.filename: info.compress_type for info, _ in members}
    names = [(info.filename, data) for info, data in members]
    name, data = names[at]
    match rng.randrange(8):
        case 4 if data.startswith(b"\x93NUMPY"):
            names[at] = name, relabelled(data, rng)
        case 0:
            del names[at]
        case 1:
            names[at] = name, rng.choice(names)[1]
        case 2:
            names[at] = name[:-5] + rng.choice(("x.npy", "", "\0.npy", "é.npy", "/")), data
        case 3:
            kinds[name] = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case _:
            names[at] = name, mutated(data, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in names:
            archive.writestr(zipfile.ZipInfo(name), data, kinds.get(name, 0))
    return stream.getvalue()


def relabelled(content: bytes, rng: random.Random) -> bytes:
    """A .safetensors or .npy file with its header changed, and the length of the header right."""
    code, start = ("<H", 8) if content.startswith(b"\x93NUMPY") else ("<Q", 0)
    begin = start + struct.calcsize(code)
    (length,) = struct.unpack(code, content[start:begin])
    header = mutated(content[begin : begin + length], rng)
    size = struct.pack(code, min(len(header), 2**16 - 1))
    return content[:start] + size + header + content[begin + length :]


def attempt(name: str, path: Path, content: bytes, expected: Any) -> str:
    """What comes of these bytes in place of the file's: "same", "other" or "refused"; and that no
    more is allocated than a small file may."""
    made, marker = FORMATS[name], path.parent / "code ran"
    os.environ["FUZZ_MARKER"] = str(marker)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        outcome = "same" if _same(made.read(path), expected) else "other"
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, UnicodeError) or str(made.named(path)) not in str(error):
            raise AssertionError(f"not in our words: {error!r}") from error
        if len(str(error)) > 2000 or len(str(error).splitlines()) > 1:
            raise AssertionError(f"{len(str(error))} characters: {error!r}"[:500]) from error
        outcome = "refused"
    finally:
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not marker.exists()
        if not path.exists():  # a checkpoint that the one before it took the place of
            path.write_bytes(content)
    assert largest < MOST_BYTES
    return outcome


def _same(found: Any, expected: Any) -> bool:
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    return len(found) == len(expected) and all(
        np.shape(one) == np.shape(other) and np.array_equal(one, other)
        for one, other in zip(found, expected)
    )


def valid(name: str, folder: Path) -> tuple[Path, bytes, Any]:
    """The file, its bytes, and what they hold; None where the file is refused to begin with."""
    path = FORMATS[name].make(folder)
    expected = None if "code" in name or "pickle" in name else FORMATS[name].read(path)
    return path, path.read_bytes(), expected


def mutation(name: str, content: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    if name in ARCHIVES and rng.random() < 0.5:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of two members of one name
            return resealed(content, rng)
    if name in ("npy", "safetensors", "npy with code") and rng.random() < 0.5:
        return relabelled(content, rng)
    return mutated(content, rng)


# ---- Tests


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return cache(lambda name: valid(name, tmp_path_factory.mktemp("fuzz")))


FAST = [name for name in FORMATS if not name.startswith("idx")]
SLOW = [pytest.param(name, 1000, marks=pytest.mark.slow, id=f"{name}, often") for name in FORMATS]


@pytest.mark.parametrize(("name", "times"), [*((name, 30) for name in FAST), *SLOW])
def test_a_damaged_file_loads_or_is_refused(files, name, times):
    path, content, expected = files(name)
    wanted = "refused" if expected is None and "json" not in name else "same"
    assert attempt(name, path, content, expected) == wanted
    assert attempt(name, path, b"", expected) == ("other" if "metrics" in name else "refused")

    @settings(max_examples=times, deadline=None, database=None)
    @given(seed=st.integers(0, 2**32))
    def check(seed):
        attempt(name, path, mutation(name, content, seed), expected)

    check()


# Found by these tests, or by thinking; each failed once.


def png_chunk_of_four_gigabytes(content):
    at = content.index(b"IDAT")
    length = struct.pack(">I", 2**31 - 1)
    return content[: at - 4] + length + b"tEXt" + content[at + 4 :]


def zip_entry_of_four_gigabytes(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        length = archive.infolist()[0].compress_size
    at = content.index(length.to_bytes(4, "little"), content.index(b"PK\x01\x02"))
    return content[:at] + b"\xff\xff\xff\xfe" + content[at + 4 :]


def tiff_of_another_height(content):
    at = content.index(struct.pack("<HHII", 257, 4, 1, 9)) + 8  # its height, 9
    return content[:at] + struct.pack("<I", 2**23) + content[at + 4 :]


def with_members(change):
    """What changes an archive by `change` of {name: bytes}, with right checksums."""

    def changed(content):
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(stream, "w") as other:
            for name in archive.namelist():
                other.writestr(name, change(name, archive.read(name)))
        return stream.getvalue()

    return changed


def header_that_promises(promised, member="x.npy", shape=b"(4, 3)"):
    """In place of a shape, and as long as it was: headers are padded with spaces."""
    width = max(len(shape), len(promised)) + 3
    old, new = ((text + b", }").ljust(width) for text in (shape, promised))
    return with_members(lambda name, data: data.replace(old, new) if name == member else data)


def with_header(header):
    """In place of the header of an .npy file, or of those in an archive."""

    def changed(data):
        return data[:8] + struct.pack("<H", len(header)) + header

    in_archive = with_members(lambda _, data: changed(data))
    return lambda content: (in_archive if content.startswith(b"PK") else changed)(content)


def with_arrays(change=lambda arrays: {}, **members):
    """What replaces members of an .npz file, also by `change` of them, or drops those of None."""

    def changed(content):
        with np.load(io.BytesIO(content)) as archive:
            arrays = {**archive, **members, **change(archive)}
        return packed(np.savez, **{name: a for name, a in arrays.items() if a is not None})

    return changed


def with_metadata(**changes):
    return with_arrays(
        lambda arrays: {"metadata": json.dumps(json.loads(str(arrays["metadata"])) | changes)}
    )


def with_shape(number):
    def changed(content):
        header = content[8:-48].replace(b"[4,3]", f"[{number},3]".encode())
        return struct.pack("<Q", len(header)) + header + content[-48:]

    return changed


# Python's parser has a MemoryError for the first, a RecursionError for the second.
DEEP = b"(1, 2" + 2000 * b"{", 5000 * b"-" + b"1"
REFUSED = [
    ("folder of png", png_chunk_of_four_gigabytes),
    ("zip of images", zip_entry_of_four_gigabytes),
    ("folder of tiff", tiff_of_another_height),
    ("condensed", header_that_promises(b"(4000000000000,)", "images.npy", b"(4, 4, 4, 1)")),
    ("arrays", header_that_promises(b"(4000000000000,)")),
    ("arrays", header_that_promises(b"(-1,)")),
    ("arrays", header_that_promises(b"(2, 3)")),
    ("arrays", lambda content: packed(np.savez_compressed, x=np.zeros(10))),
    *((name, with_header(h)) for name in ("npy", "npz", "arrays", "condensed") for h in DEEP),
    ("idx, images", lambda content: struct.pack(">IIII", 0x803, 3, 0, 28)),
    ("idx, images", lambda content: struct.pack(">IIII", 0x803, 0, 28, 28)),
    *(("safetensors", with_shape(n)) for n in ("1e999", "[1, 2]", "null", "1000000000000", "-4")),
    ("mixture", with_arrays(pca_centre=None)),
    ("mixture", with_arrays(pca_components=np.float64(1))),
    ("mixture", with_arrays(weights=np.float64(1))),
    ("mixture", with_arrays(image_shape=np.array([-2, -2, 1]))),
    ("mixture", with_arrays(image_shape=np.array([4]))),
    ("mixture", with_arrays(header='{"format": "mixture of images, version 1", "kind": "diag"}')),
    ("mixture", with_arrays(header="[" * 100_000)),
    ("mixture", with_arrays(header='"format"')),
    ("condensed", with_metadata(mean=[10**400])),
    ("condensed", with_metadata(std=[1e300])),
    ("condensed", with_metadata(factor=True)),
    ("condensed", with_metadata(class_names=[[], {}])),
    *(
        (name, lambda content, text=text: text + b"\n")
        for name in ("config.json", "metrics.jsonl")
        for text in (b"[" * 100_000, b"\x80", b"9" * 5000, b"null", b'{"step": []}')
    ),
]


@pytest.mark.parametrize(
    ("name", "change"), REFUSED, ids=[f"{name} {i}" for i, (name, _) in enumerate(REFUSED)]
)
def test_what_promises_more_or_holds_less_is_refused_and_allocates_little(files, name, change):
    path, content, expected = files(name)
    changed = change(content)
    assert changed != content
    assert attempt(name, path, changed, expected) == "refused"
