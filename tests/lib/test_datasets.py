"""Data sets against what is in their files, read here by other means; every error by its words."""

import bz2
import gzip
import hashlib
import io
import os
import pickle
import stat
import statistics
import struct
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from condensing import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripts import run_script
from sklearn.datasets import load_digits

from lib.datasets import Dataset, synthetic, transforms
from lib.datasets import _datasets as datasets

# Named data sets


def test_spellings():
    for spellings in (
        "mnist MNIST", "fashion_mnist FMNIST FashionMNIST Fashion-MNIST", "kmnist KMNIST",
        "usps USPS", "svhn SVHN", "cifar10 CIFAR10 CIFAR-10", "cifar100 cifar_100", "digits Digits",
    ):  # fmt: skip
        name, *_ = spellings.split()
        assert {datasets._canonical(spelling) for spelling in spellings.split()} == {name}


def test_digits_are_scikit_learns_split_by_every_fifth_of_a_class():
    bunch = load_digits()
    rank = np.array([np.sum(bunch.target[:i] == label) for i, label in enumerate(bunch.target)])
    for split, chosen in (("train", rank % 5 < 4), ("test", rank % 5 == 4)):
        dataset = datasets.load("Digits", split=split)
        np.testing.assert_array_equal(dataset.labels, bunch.target[chosen])
        sixteenths = np.rint(dataset.images[..., 0] * (16 / 255))
        np.testing.assert_array_equal(sixteenths, bunch.images[chosen])
        assert (dataset.images.min(), dataset.images.max()) == (0, 255)
        assert dataset.image_shape == (8, 8, 1)
        assert dataset.class_names == tuple("0123456789")


def read_idx(path: Path) -> np.ndarray:
    data = path.read_bytes()
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.array(memoryview(data)[4 + 4 * rank :]).reshape(shape)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_idx_files_byte_for_byte(data_root, name, folder, split):
    dataset = datasets.load(name, split=split, data_root=data_root)
    raw, prefix = data_root / folder / "raw", {"train": "train", "test": "t10k"}[split]
    images = read_idx(raw / f"{prefix}-images-idx3-ubyte")
    np.testing.assert_array_equal(dataset.images[..., 0], images)
    np.testing.assert_array_equal(dataset.labels, read_idx(raw / f"{prefix}-labels-idx1-ubyte"))
    assert (dataset.images.dtype, dataset.labels.dtype) == (np.uint8, np.int32)
    assert dataset.name == name
    assert dataset.class_names[9] == {"MNIST": "9", "FashionMNIST": "Ankle boot"}.get(folder, "wo")


def test_usps_values_are_scaled_from_minus_one_to_one(data_root):
    dataset = datasets.load("usps", split="test", data_root=data_root)
    with bz2.open(data_root / "USPS" / "usps.t.bz2", "rt") as file:
        rows = [line.split() for line in file]
    assert dataset.images.shape == (len(rows), 16, 16, 1)
    for i in (0, 1, len(rows) - 1):
        values = np.array([float(pair.split(":")[1]) for pair in rows[i][1:]])
        np.testing.assert_allclose(dataset.images[i].ravel(), (values + 1) * 127.5, atol=1)
        assert dataset.labels[i] == int(rows[i][0]) - 1


def test_data_root_defaults_to_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path, "MNIST", images=12)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert len(datasets.load("mnist").images) == 12
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "MNIST").rename(tmp_path / "data" / "MNIST")
    assert len(datasets.load("mnist").images) == 12


def test_torch_is_not_imported_before_it_is_needed():
    code = "import sys, lib.datasets; assert 'torch' not in sys.modules"
    run_script("-W", "ignore", "-c", code, JAX_PLATFORMS="cpu")


# torchvision's files, made small


def write_idx(root: Path, name: str, *, images: int = 6, labels: int | None = None) -> Path:
    """Four small IDX files; image i is filled with i and has the label i % 10."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    count = images if labels is None else labels
    pixels = struct.pack(">4I", 0x803, images, 28, 28)
    pixels += np.arange(images, dtype=np.uint8).repeat(784).tobytes()
    classes = struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(classes)
    return raw


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def torchvision_datasets():
    return datasets._torchvision_datasets()[0]


@pytest.fixture
def cifar_root(tmp_path, monkeypatch, torchvision_datasets):
    """A CIFAR-10 of two images per batch, with its checksums; channel c of image i is 10 i + c."""
    folder, cifar = tmp_path / "cifar-10-batches-py", torchvision_datasets.CIFAR10
    folder.mkdir()
    rows = np.uint8([[0, 1, 2], [10, 11, 12]]).repeat(1024, axis=1)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for entry in ("train_list", "test_list"):
        sums = [[name, md5(folder / name)] for name, _ in getattr(cifar, entry)]
        monkeypatch.setattr(cifar, entry, sums)
    monkeypatch.setattr(cifar, "meta", dict(cifar.meta, md5=md5(folder / "batches.meta")))
    return tmp_path


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(gray(7)).save(stream, "png")
    return stream.getvalue()


def test_cifar_has_channels_last_and_a_corrupt_batch_is_named(cifar_root):
    train = datasets.load("CIFAR-10", data_root=cifar_root)
    test = datasets.load("cifar10", split="test", data_root=cifar_root)
    assert (train.images.shape, test.images.shape) == ((10, 32, 32, 3), (2, 32, 32, 3))
    np.testing.assert_array_equal(test.images[1, 5, 7], [10, 11, 12])
    np.testing.assert_array_equal(test.labels, [3, 9])
    assert test.class_names == tuple("abcdefghij")
    path = cifar_root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3 is corrupt or truncated") as info:
        datasets.load("cifar10", data_root=cifar_root)
    assert "data_batch_2" not in str(info.value)
    assert info.value.__cause__ is not None


def test_svhn_has_channels_last_and_ten_is_zero(tmp_path, monkeypatch, torchvision_datasets):
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    path = tmp_path / "SVHN" / "test_32x32.mat"
    path.parent.mkdir()
    savemat(path, {"X": images, "y": np.array([[1], [10], [9], [2]], np.uint8)})
    svhn = torchvision_datasets.SVHN
    monkeypatch.setattr(svhn, "split_list", {"test": ["", path.name, md5(path)]})
    dataset = datasets.load("SVHN", split="test", data_root=tmp_path)
    np.testing.assert_array_equal(dataset.labels, [1, 0, 9, 2])
    np.testing.assert_array_equal(dataset.images[2], images[..., 2])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"test_32x32\.mat is corrupt or truncated"):
        datasets.load("svhn", split="test", data_root=tmp_path)


def test_damaged_idx_files_are_named(tmp_path):
    raw = write_idx(tmp_path, "MNIST")
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    sizes = r"is corrupt or truncated.* 6 x 28 x 28 .* 4720 .* 4715"
    for content, message in (
        (whole[:-5], sizes),
        (b"<!DOCTYPE html><html></html>", "is corrupt: no header"),
        (b"", "is corrupt: no header"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-images-idx3-ubyte {message}"):
            datasets.load("mnist", data_root=tmp_path)
    images.write_bytes(whole)
    labels.write_bytes(labels.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="labels beyond 10 classes"):
        datasets.load("mnist", data_root=tmp_path)
    write_idx(tmp_path, "KMNIST", images=6, labels=5)
    with pytest.raises(ValueError, match=r"kmnist: 6 images and 5 labels"):
        datasets.load("kmnist", data_root=tmp_path)


@pytest.mark.parametrize("kept", [0, 40])
def test_truncated_bz2_names_the_file(tmp_path, kept):
    row = " ".join(["5", *(f"{i}:{i / 256:.3f}" for i in range(1, 257))])
    path = tmp_path / "USPS" / "usps.bz2"
    path.parent.mkdir()
    path.write_bytes(bz2.compress(f"{row}\n{row}\n".encode()))
    dataset = datasets.load("usps", data_root=tmp_path)
    np.testing.assert_array_equal(dataset.labels, [4, 4])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"usps: .*usps\.bz2"):
        datasets.load("usps", data_root=tmp_path)


# Missing files, downloads


@pytest.mark.parametrize("name", ["mnist", "usps", "svhn", "cifar10", "cifar100"])
def test_missing_files_without_network(tmp_path, monkeypatch, name):
    refused = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    root = tmp_path / "some" / "root"
    for exists in (False, True):
        if exists:
            root.mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=f"^{name}: no ") as info:
            datasets.load(name, data_root=root)
        for part in (str(root), "no network", "DATA_ROOT", "'digits'"):
            assert part in str(info.value)
        assert info.value.__cause__ is not None
        assert len(list(tmp_path.rglob("*"))) == (2 if exists else 0)
    with pytest.raises(FileNotFoundError, match=r"unknown data set 'mnits'.* mnist, .*no such"):
        datasets.load("mnits", data_root=tmp_path)


class Response(io.BytesIO):
    """What urlopen returns, as far as torchvision looks."""

    def __init__(self, url: str, content: bytes):
        super().__init__(content)
        self.url, self.length = url, len(content)


@pytest.fixture
def mirror(tmp_path, monkeypatch, torchvision_datasets):
    """Serves four small gzipped IDX files as MNIST; returns their bytes by name, to tamper with."""
    raw = write_idx(tmp_path / "mirror", "MNIST")
    served = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in raw.iterdir()}
    mnist = torchvision_datasets.MNIST
    checksums = [(name, hashlib.md5(served[name]).hexdigest()) for name, _ in mnist.resources]
    monkeypatch.setattr(mnist, "resources", checksums)

    def urlopen(request, *args, **kwargs):
        return Response(request.full_url, served[request.full_url.rsplit("/", 1)[1]])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return served


def test_downloads_land_complete_or_leave_nothing(tmp_path, mirror):
    root, archives = tmp_path / "root", dict(mirror)
    name = "t10k-labels-idx1-ubyte.gz"
    mirror[name] = mirror[name][:-3]
    with pytest.raises(FileNotFoundError, match=r"download failed .*t10k-labels-idx1-ubyte"):
        datasets.load("mnist", data_root=root)
    assert not root.exists()
    mirror[name] = archives[name]
    dataset = datasets.load("mnist", data_root=root)
    np.testing.assert_array_equal(dataset.images[:, 3, 4, 0], range(6))
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert len(list((root / "MNIST" / "raw").iterdir())) == 4
    mirror.clear()  # from here on, the files are read
    assert len(datasets.load("mnist", split="test", data_root=root).labels) == 6
    raw = tmp_path / "archives" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, content in archives.items():
        (raw / file).write_bytes(content)
    assert len(datasets.load("mnist", data_root=tmp_path / "archives").labels) == 6


# Folders and zips of images


def write_images(root: Path, files: dict[str, np.ndarray]) -> Path:
    for name, pixels in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def zipped(folder: Path, *, inside: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, Path(inside) / file.relative_to(folder))
    return path


def forms(folder: Path):
    """The folder and a zip of it."""
    return folder, zipped(folder)


def gray(value: int, size=(4, 3)) -> np.ndarray:
    return np.full(size, value, np.uint8)


def color(value: int, size=(4, 3)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(
        tmp_path / "pets",
        {
            "train/dog/1.png": gray(10),
            "train/dog/0.bmp": gray(11),
            "train/cat/9.PNG": gray(20),
            "test/cat/0.png": gray(30),
            "test/dog/0.png": gray(40),
        },
    )


@pytest.mark.parametrize("form", ["folder", "zip", "zip of the folder", "zip two deep"])
def test_train_and_test_folders(folder, form):
    (folder / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "train" / "cat" / "notes.txt").write_text("ignored")
    (folder / "__MACOSX" / "train" / "cat").mkdir(parents=True)
    (folder / "__MACOSX" / "train" / "cat" / "._9.png").write_bytes(b"")
    (folder / ".git").mkdir()
    inside = {"zip of the folder": "pets", "zip two deep": "a/b"}.get(form, "")
    path = folder if form == "folder" else zipped(folder, inside=inside)
    train = datasets.load(path)
    test = datasets.load(str(path), split="test")
    assert train.name == "pets"
    assert len(datasets.load("pets", data_root=folder.parent).labels) == 3
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.image_shape == (4, 3, 1)
    np.testing.assert_array_equal(train.images[:, 0, 0, 0], [20, 11, 10])
    np.testing.assert_array_equal(train.labels, [0, 1, 1])
    np.testing.assert_array_equal(test.images[:, 3, 2, 0], [30, 40])
    np.testing.assert_array_equal(test.labels, [0, 1])
    assert train.labels.dtype == np.int32


@pytest.mark.parametrize("inside", ["", "wrapped"])
def test_classes_without_a_split_are_all_train(tmp_path, inside):
    # A class may be called "train": there are no classes below it.
    files = {"train/0.png": color(1), "plane/0.png": color(2), "plane/1.png": color(3)}
    path = zipped(write_images(tmp_path / "things", files), inside=inside)
    dataset = datasets.load(path)
    assert dataset.class_names == ("plane", "train")
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0], [2, 3, 1])
    with pytest.raises(ValueError, match=r"no train/ and test/ folders.*split='test'"):
        datasets.load(path, split="test")


def test_other_pixel_formats(tmp_path):
    root, rgb = tmp_path / "x" / "a", Image.fromarray(color(200))
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    for i, picture in enumerate((rgb, rgb.convert("RGBA"), rgb.quantize(4))):
        picture.save(root / f"{i}.png")
    rgb.convert("CMYK").save(root / "3.jpg")
    Image.fromarray(pixels).save(root / "4.png")
    images = datasets.load(root.parent).images
    np.testing.assert_array_equal(images[:3], 200)
    np.testing.assert_allclose(images[3], np.full((4, 3, 3), 200), atol=2)
    np.testing.assert_array_equal(images[4], pixels)

    bilevel = write_images(tmp_path / "y", {"a/0.png": gray(255)})
    Image.fromarray(gray(255)).convert("1").save(bilevel / "a" / "1.png")
    Image.fromarray(gray(255)).convert("LA").save(bilevel / "a" / "2.png")
    assert datasets.load(bilevel).images.shape == (3, 4, 3, 1)
    np.testing.assert_array_equal(datasets.load(bilevel).images, 255)

    see_through = rgb.convert("RGBA")
    see_through.putalpha(100)
    for picture, message in (
        (see_through, r"a/3\.png: it is transparent"),
        (Image.fromarray(np.full((4, 3), 60_000, np.uint16)), r"its pixels \(I;16\) are not 8-bit"),
    ):
        picture.save(root / "3.png")
        with pytest.raises(ValueError, match=message):
            datasets.load(root.parent)


# A file of the folder, its content (None for a folder), and words of the error.
DAMAGE = {
    "no png": ("train/cat/0.png", b"no png", r"cannot read the image train/cat/0\.png"),
    "truncated": ("train/dog/1.png", png_bytes()[:50], r"cannot read the image train/dog/1\.png"),
    "empty": ("train/cat/2 \U0001f600.png", b"", "cannot read the image train/cat/2 \U0001f600"),
    "size": (
        "train/dog/2.png",
        gray(1, (5, 3)),
        r"differ .*train/dog/2\.png is \(5, 3, 1\) .*train/cat/9\.PNG is \(4, 3, 1\)",
    ),
    "color": (
        "train/dog/2.png",
        color(1),
        r"differ .*train/dog/2\.png is \(4, 3, 3\) .*train/cat/9\.PNG is \(4, 3, 1\)",
    ),
    "empty class": ("train/emu", None, r"class 'emu' has no image in the .*'train'"),
    "class of test": ("test/emu/2.png", gray(1), "class 'emu' has no image in the split 'train'"),
    "too deep": ("train/dog/deep/2.png", gray(1), r"deep/2\.png is out of place: expected"),
    "HEIC": ("train/cat/I1.HEIC", b"heic", r"train/cat/I1\.HEIC is in a format .* convert it to"),
    "heif": ("train/cat/a.heif", b"heic", r"train/cat/a\.heif is in a format .* convert it to"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(folder, name, content, message):
    if content is None:
        (folder / name).mkdir()
    elif isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        write_images(folder, {name: content})
    for path in forms(folder):
        with pytest.raises(ValueError, match=message) as info:
            datasets.load(path)
        assert "pets" in str(info.value)


# What undoes the turn of the metadata 1 to 8 (TIFF 6.0, tag 274).
TURNS = [
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x[::-1],
    lambda x: x.T,
    np.rot90,
    lambda x: x[::-1, ::-1].T,
    lambda x: np.rot90(x, -1),
]


# As cameras, phones, editors and file managers leave them


@pytest.mark.parametrize(
    "suffix",
    ["jfif", "mpo", "JPE", "JPG", "apng", "avif", "pbm", "TIF", "webp", "j2k", "tga", "qoi"],
)
def test_every_picture_that_pillow_knows_is_read(tmp_path, suffix):
    root = write_images(tmp_path / "x", {"a/0.png": color(90), "a/2.png": color(90)})
    form = Image.registered_extensions()[f".{suffix.lower()}"]
    Image.fromarray(color(90)).save(root / "a" / f"1.{suffix}", form)
    for path in forms(root):
        np.testing.assert_allclose(datasets.load(path).images, np.full((3, 4, 3, 3), 90), atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_pictures_are_turned_as_their_metadata_say(tmp_path, orientation, suffix):
    """What is stored turned beside what is upright, against the standard's table of corners."""
    upright = np.repeat(np.arange(6, dtype=np.uint8).reshape(3, 2) * 40, 16, axis=0).repeat(16, 1)
    exif, mode = Image.Exif(), "RGB" if suffix == "webp" else "L"
    exif[274] = orientation
    root = write_images(
        tmp_path / "x", {"a/0.png": np.asarray(Image.fromarray(upright).convert(mode))}
    )
    turned = np.ascontiguousarray(TURNS[orientation - 1](upright))
    path = root / "a" / f"1.{suffix}"
    Image.fromarray(turned).convert(mode).save(path, exif=exif, quality=100, lossless=True)
    for path in forms(root):
        stored = datasets.load(path).images[1, ..., 0].astype(int)
        np.testing.assert_allclose(stored, upright, atol=3)


def test_names_that_differ_in_unicode_form_alone_are_one_class(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    names = ["train/dog/0", "test/dog/0"]
    names += [f"train/{composed}/1", f"train/{apart}/2", f"test/{apart}/0"]
    root = write_images(tmp_path / "x", {f"{name}.png": gray(1) for name in names})
    for path in forms(root):
        for split, labels in (("train", [0, 0, 1]), ("test", [0, 1])):
            dataset = datasets.load(path, split=split)
            assert dataset.class_names == (composed, "dog")
            np.testing.assert_array_equal(dataset.labels, labels)


def test_links_are_followed_and_those_upwards_are_named(tmp_path):
    root = write_images(tmp_path / "x" / "imgs", {"a/0.png": gray(1), "b/0.png": gray(2)})
    write_images(tmp_path / "elsewhere", {"0.png": gray(3), "deep/0.png": gray(4)})
    (root / "c").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    np.testing.assert_array_equal(datasets.load(root).images[:, 0, 0, 0], [1, 3, 2, 4])
    for target in (".", "..", "../..", "../../..", "/", "../b/../.."):
        (root / "b" / "up").symlink_to(target)
        with pytest.raises(ValueError, match="b/up is a link to a folder that it lies in"):
            datasets.load(root)
        (root / "b" / "up").unlink()
    (root / "a" / "x").symlink_to("../b")
    (root / "b" / "y").symlink_to("../a")
    with pytest.raises(ValueError, match=r"(a/x/y|b/y/x) is a link to a folder"):
        datasets.load(root)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    root = write_images(tmp_path / "x", {"a/0.png": gray(1)})
    odd = root / "a" / "1.png"
    for make in (
        lambda: os.mkfifo(odd),
        lambda: odd.symlink_to("gone.png"),
        lambda: odd.symlink_to("1.png"),
        lambda: odd.symlink_to("/dev/zero"),
        lambda: os.mknod(odd, stat.S_IFSOCK | 0o600),
    ):
        make()
        for read in (datasets.load, datasets.identity):
            with pytest.raises(ValueError, match=r"cannot read the image a/1\.png: it is no file"):
                read(root)
        odd.unlink()
    os.mkfifo(root / "a" / "pipe")
    np.testing.assert_array_equal(datasets.load(root).images[:, 0, 0, 0], [1])
    with pytest.raises(ValueError, match="pipe is neither a folder nor a file"):
        datasets.load(root / "a" / "pipe")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = write_images(tmp_path / "x", {"a/0.png": gray(1), "b/0.png": gray(1)})
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match="cannot read the folder b/: Permission denied"):
        datasets.load(root)


def test_what_is_ignored_is_counted_once(folder, capsys):
    for name in ("Thumbs.db", "desktop.ini", "IMG_1.CR2", "cat.psd"):
        (folder / "train" / "cat" / name).write_bytes(b"x")
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "README.txt").write_bytes(b"x")
    write_images(folder, {"val/cat/0.png": gray(1), "1.png": gray(1)})
    for path in forms(folder):
        for split in ("train", "test"):
            datasets.load(path, split=split)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"{path}: ignored 5 files not named as an image: README.txt, ")
        assert "outside of train/ and test/: 1.png, val/cat/0.png" in lines[1]
        assert "ignored 2 images" in lines[1]


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "jpg"])
def test_of_several_frames_the_first_is_read_and_they_are_counted(tmp_path, capsys, suffix):
    """A phone's picture with a second one (mpo) is a picture."""
    root = write_images(tmp_path / "x", {"a/0.png": color(1)})
    frames = [Image.fromarray(color(value)) for value in (10, 20, 30)]
    form = "mpo" if suffix == "jpg" else None
    frames[0].save(root / "a" / f"1.{suffix}", form, save_all=True, append_images=frames[1:])
    said = "{}: took the first frame of 1 animated or many-paged image: a/1.{}\n"
    for path in forms(root):
        values = datasets.load(path).images[:, 0, 0, 0].astype(int)
        np.testing.assert_allclose(values, [1, 10], atol=2 if form else 0)
        assert capsys.readouterr().err == ("" if form else said.format(path, suffix))


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_names_in_zips(tmp_path):
    png = png_bytes()
    for prefix, separator in (("", "\\"), ("C:\\pets\\", "\\"), ("/", "/"), ("./", "/")):
        plain = [f"{split}/{name}/0.png" for split in ("train", "test") for name in "ab"]
        names = [prefix + name.replace("/", separator) for name in plain]
        path = zip_of(tmp_path / "names.zip", dict.fromkeys(names, png))
        assert datasets.load(path, split="test").class_names == ("a", "b")
        other = zip_of(tmp_path / "plain.zip", dict.fromkeys(plain, png))
        assert datasets.identity(path) == datasets.identity(other)
    path = zip_of(tmp_path / "out.zip", {"train/a/0.png": png, "train/../../a/1.png": png})
    for read in (datasets.load, datasets.identity):
        with pytest.raises(ValueError, match=r"train/\.\./\.\./a/1\.png leads out of the zip"):
            read(path)


def test_an_encrypted_zip_names_the_file(tmp_path):
    path = zip_of(tmp_path / "x.zip", {"a/0.png": png_bytes()})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1  # the flag of encryption
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image a/0\.png: .*encrypted"):
        datasets.load(path)


def test_no_class_at_all_and_no_zip(tmp_path, folder):
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(ValueError, match=r"empty holds no class of images: expected train/CLASS"):
        datasets.load(root)
    write_images(root, {"0.png": gray(1)})
    with pytest.raises(ValueError, match=r"0\.png is out of place: expected train/CLASS"):
        datasets.load(root)
    (root / "all").mkdir()  # as the error says
    (root / "0.png").rename(root / "all" / "0.png")
    assert datasets.load(root).class_names == ("all",)
    path = zipped(folder)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"pets\.zip is no zip, or a truncated one"):
        datasets.load(path)


# Points


def test_flat_and_as_images_are_inverse():
    dataset = toy(shape=(3, 2, 3))
    rows = datasets.flat(dataset)
    assert (rows.shape, rows.dtype) == ((21, 18), jnp.float32)
    np.testing.assert_allclose(rows[4], dataset.images[4].ravel() / 255, rtol=1e-6)
    images = datasets.as_images(rows, dataset.image_shape)
    np.testing.assert_array_equal(np.rint(images * 255), dataset.images)
    some = datasets.flat(dataset, np.array([[3, 1], [0, 20]]))
    np.testing.assert_array_equal(some, rows[np.array([[3, 1], [0, 20]])])
    assert datasets.as_images(some, (3, 2, 3)).shape == (2, 2, 3, 2, 3)
    with pytest.raises(ValueError, match=r"rows of 18 .* \(4, 4, 1\)"):
        datasets.as_images(rows, (4, 4, 1))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 5),
    classes=st.permutations([0, 1, 2]),
    count=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_draws_are_of_their_class_without_replacement(seed, n, classes, count):
    """And the same with fewer classes, at first with fewer images, and in either precision."""
    dataset, key, chosen = toy(), jax.random.key(seed), classes[:count]
    indices = datasets.draw_indices(key, dataset, n)
    assert indices.shape == (3, n)
    for label in range(3):
        assert set(dataset.labels[indices[label]]) == {label}
        assert len(set(indices[label])) == n
    np.testing.assert_array_equal(indices[:, :2], datasets.draw_indices(key, dataset, 2))
    points = datasets.draw(key, dataset, n)
    np.testing.assert_allclose(points, dataset.images[indices].reshape(3, n, 6) / 255.0, rtol=1e-6)
    for selected in (chosen, ["abc"[c] for c in chosen]):
        with jax.enable_x64(count == 2):
            some = datasets.draw(key, dataset, n, classes=selected)
        assert some.dtype == jnp.float32
        np.testing.assert_array_equal(some, points[np.array(chosen)])


def test_every_image_is_as_likely_in_every_class_and_keys_differ():
    # 200 classes of six images in order: the rank of an image is its index modulo 6.
    labels = np.repeat(np.arange(200, dtype=np.int32), 6)
    images = np.zeros((1200, 1, 1, 1), np.uint8)
    dataset = Dataset("many", images, labels, tuple(map(str, range(200))))
    drawn, other = (datasets.draw_indices(jax.random.key(i), dataset, 2) for i in (0, 1))
    assert (drawn != other).any()
    counts = np.bincount(drawn.ravel() % 6)
    # Each rank is drawn in a third of 200: mean 66.7, deviation sqrt(200 * 1/3 * 2/3) = 6.7.
    assert np.abs(counts - 200 / 3).max() < 4 * 6.7


def test_draw_errors():
    dataset, key = toy(), jax.random.key(0)
    assert datasets.draw(key, dataset, 6, classes=["a", 2]).shape == (2, 6, 6)
    for n, classes, message in (
        (6, None, "class 'b' of toy has 5 images, fewer than the 6"),
        (0, None, "at least 1 image of every class, not 0"),
        *((1, [label], f"toy has no class {label!r}: it has a, b, c") for label in ("z", 3, -1)),
        (1, [], "one or more different ones"),
        (1, ["a", 0], "one or more different ones"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.draw(key, dataset, n, classes=classes)


def test_rings_are_uniform_on_their_circles(x64):
    points = synthetic.rings(jax.random.key(0), 500)
    assert points.shape == (3, 500, 2)
    offsets = np.asarray(points) - np.array([[0, 0], [-0.75, 0], [-1.5, 0]])[:, None]
    np.testing.assert_allclose(np.linalg.norm(offsets, axis=-1), 0.3, rtol=1e-14)
    # Uniform angles: the mean of cos t and sin t is 0, with deviation sqrt(1 / 2n) = .032.
    assert np.abs(offsets.mean(axis=1) / 0.3).max() < 0.13
    assert np.abs(offsets[0] - offsets[1]).max() > 0.1
    assert not np.array_equal(points, synthetic.rings(jax.random.key(1), 500))
    points = synthetic.rings_even(4, centers=((1.0, 2.0),), radius=2.0)
    np.testing.assert_allclose(points, [[[3, 2], [1, 4], [-1, 2], [1, 0]]], atol=1e-15)


@pytest.mark.parametrize("exponent", [-6, 0, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_synthetic_sets_scale_with_their_lengths_in_the_dtype_that_jax_works_in(dtype, exponent):
    centers, key, scale = np.array([[1.0, 2.0], [-3.0, 4.0]]), jax.random.key(0), 10.0**exponent

    def sets(scale):
        means, widths = scale * centers, np.full(2, scale)
        return [
            synthetic.rings(key, 5, centers=means, radius=scale),
            synthetic.rings_even(5, centers=means, radius=scale),
            synthetic.gaussians(key, means, 5, scale=widths),
            synthetic.gaussian_mixture(key, np.array([0.0, 3.0]), means, widths, 5),
        ]

    with jax.enable_x64(dtype == np.float64):
        for unit, scaled in zip(sets(1.0), sets(scale)):
            assert scaled.dtype == dtype
            bound = 32 * np.finfo(dtype).eps * np.abs(unit).max()
            np.testing.assert_allclose(scaled / scale, unit, rtol=0, atol=bound)


# One data set from another


@pytest.mark.parametrize("size", [16, (5, 12), 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_antialiased_bilinear(size, channels):
    dataset = toy((3, 2), shape=(8, 8, channels))
    height, width = (size, size) if isinstance(size, int) else size
    resized = transforms.resize(dataset, size)
    expected = jax.image.resize(
        dataset.images.astype(np.float32), (5, height, width, channels), "linear", antialias=True
    )
    assert resized.name == f"toy-{height}x{width}"
    np.testing.assert_allclose(resized.images, expected, atol=1.6)  # Pillow rounds twice


def test_gray_and_rgb():
    dataset = toy(shape=(3, 2, 3))
    in_gray = transforms.to_gray(dataset)
    luma = dataset.images @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(in_gray.images, luma[..., None], atol=0.51)
    rgb = transforms.to_rgb(in_gray)
    np.testing.assert_array_equal(rgb.images, np.concatenate([in_gray.images] * 3, axis=-1))
    np.testing.assert_array_equal(transforms.to_gray(rgb).images, in_gray.images)
    assert transforms.to_gray(in_gray) is in_gray
    assert transforms.to_rgb(dataset) is dataset
    assert (in_gray.name, rgb.name) == ("toy-gray", "toy-gray-rgb")


def test_rotate_and_invert():
    dataset = toy()
    turned = transforms.rotate(dataset, 1)
    # Anticlockwise: the last column becomes the first row.
    np.testing.assert_array_equal(turned.images, np.rot90(dataset.images, axes=(1, 2)))
    assert (turned.name, turned.image_shape) == ("toy-rotated90", (2, 3, 1))
    assert transforms.rotate(dataset, 4) is dataset
    np.testing.assert_array_equal(transforms.rotate(turned, -1).images, dataset.images)
    inverted = transforms.invert(dataset)
    assert inverted.name == "toy-inverted"
    np.testing.assert_array_equal(inverted.images.astype(int) + dataset.images, 255)
    np.testing.assert_array_equal(inverted.labels, dataset.labels)


def test_normalization_constants_by_a_loop():
    dataset = toy(shape=(3, 2, 3))
    for channel, (mean, std) in enumerate(zip(*transforms.normalization_constants(dataset))):
        values = [float(v) / 255 for v in dataset.images[..., channel].ravel()]
        assert mean == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert std == pytest.approx(statistics.pstdev(values), rel=1e-12)


def test_gaussians_have_their_moments():
    means = np.array([[0.0, 1.0], [5.0, -2.0]])
    gaussians = partial(synthetic.gaussians, jax.random.key(0), means)
    points, scales = gaussians(20_000, scale=np.array([0.5, 3.0])), (0.5, 3.0)
    np.testing.assert_allclose(points.mean(axis=1), means, atol=0.08)
    for cloud, scale in zip(points, scales, strict=True):
        np.testing.assert_allclose(np.cov(cloud.T), scale**2 * np.eye(2), atol=0.06 * scale**2)
    np.testing.assert_array_equal(gaussians(3, scale=0.0), np.repeat(means[:, None], 3, 1))


def test_gaussian_mixture_has_its_shares_and_spreads():
    weights, scales = np.array([1.0, 3.0, 0.0]), np.array([0.1, 0.5, 1.0])
    means = np.array([[-10.0, 0.0, 0.0], [10.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    points = np.asarray(
        synthetic.gaussian_mixture(jax.random.key(0), weights, means, scales, 20_000)
    )
    assert points.shape == (20_000, 3)
    assert points[:, 1].max() < 10  # a component of no weight is not drawn
    left = points[:, 0] < 0
    assert left.mean() == pytest.approx(0.25, abs=0.015)
    np.testing.assert_allclose(points[left].std(axis=0), 0.1, rtol=0.05)
    np.testing.assert_allclose(points[~left].std(axis=0), 0.5, rtol=0.05)
