"""Data sets and where they come from: the only module that knows torchvision and downloads.

A `Dataset` holds uint8 images and labels as numpy arrays on the host. `draw`, `flat` and
`as_images` lead to jax: points are images as rows of d = H * W * channels numbers in [0, 1], and a
set of class distributions is one array [C, n, d]. Nothing is written but a completed download.
"""

import functools
import hashlib
import http.client
import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float32, Int32, Integer, PRNGKeyArray, Real, UInt8

from lib.datasets._folders import SPLITS, fingerprint, read_image_folder
from lib.runs import CONTENT

Split = Literal["train", "test"]
"""The part of a data set; training and selection see only "train"."""


class Dataset(NamedTuple):
    """Labelled images: `labels[i]` is the index in `class_names` of the class of `images[i]`.

    `origin` is the one of `NAMES` that they are from, None of a folder or zip whatever it is
    called. What changes images changes `name`, and keeps `origin`.
    """

    name: str
    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]
    origin: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels); channels is 1 (gray) or 3 (color)."""
        return self.images.shape[1:]


# ---- Loading


class _Source(NamedTuple):
    """What torchvision reads: its class, its root below `data_root`, and the files of a split."""

    torchvision_class: str
    root: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    archive: str = ""


def _whole(name: str, folder: str, files: str, archive: str = "") -> _Source:
    """Of a set all of whose `files`, told apart by blanks, torchvision wants for either split."""
    paths = tuple(f"{folder}/{file}" for file in files.split())
    return _Source(name, "", paths, paths, archive)


_IDX = "{0}-images-idx3-ubyte {0}-labels-idx1-ubyte "
_IDX = _IDX.format("train") + _IDX.format("t10k")
_BATCHES = "batches.meta test_batch " + " ".join(f"data_batch_{i}" for i in range(1, 6))
_SOURCES = {
    "mnist": _whole("MNIST", "MNIST/raw", _IDX),
    "fashion_mnist": _whole("FashionMNIST", "FashionMNIST/raw", _IDX),
    "kmnist": _whole("KMNIST", "KMNIST/raw", _IDX),
    "usps": _Source("USPS", "USPS", ("USPS/usps.bz2",), ("USPS/usps.t.bz2",)),
    "svhn": _Source("SVHN", "SVHN", ("SVHN/train_32x32.mat",), ("SVHN/test_32x32.mat",)),
    "cifar10": _whole("CIFAR10", "cifar-10-batches-py", _BATCHES, "cifar-10-python.tar.gz"),
    "cifar100": _whole(
        "CIFAR100", "cifar-100-python", "meta train test", "cifar-100-python.tar.gz"
    ),
}
NAMES = ("digits", *_SOURCES)
_SPELLINGS = {name.replace("_", ""): name for name in NAMES} | {"fmnist": "fashion_mnist"}


def _canonical(name: str) -> str | None:
    """The name in `NAMES` that is meant by any of its spellings, such as "CIFAR-10"."""
    return _SPELLINGS.get(name.lower().translate(str.maketrans("", "", "-_ ")))


def load(
    name_or_path: str | Path, *, split: Split = "train", data_root: str | Path | None = None
) -> Dataset:
    """Loads one split of a named data set, or of a folder or zip of images.

    Names, in any case and with or without `-` and `_`: digits, mnist, fashion_mnist (fmnist),
    kmnist, usps, svhn, cifar10, cifar100. `data_root` is a torchvision root (default: the
    environment's DATA_ROOT, else ./data), with USPS/ and SVHN/ as the folders of these two. What
    is missing there is downloaded, and lands there only when complete.

    `digits` needs no file: scikit-learn's 1,797 images of 8x8, whose values 0..16 are scaled to
    0..255. Of every class, in scikit-learn's order, each fifth image is test and the others train.
    Its writers are not known, so the same hand may be in both.

    Anything else is a path (absolute, from here, or from `data_root`) to a folder of images or a
    zip of one, laid out as train/CLASS/FILE and test/CLASS/FILE; or as CLASS/FILE, which is all
    train. Classes are sorted by name, files by name within a class; a name is the same whichever
    way its accents are written. Files are images by their suffix, as Pillow knows it (jpg, jfif,
    png, webp, tiff, ...); a line on stderr counts what is ignored, except hidden files and
    __MACOSX. Images are turned as their metadata say, and of several frames the first is read. A
    zip is read in place. A gray image has one channel and a color image three; all have one size.

    Raises:
      FileNotFoundError: there is no such path, or a named set is missing and the download failed.
      ValueError: a corrupt, truncated or transparent image or data file, which is named; mixed
        sizes, or gray mixed with color; a class without images; another layout; a link to a
        folder that it lies in; no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    root = _root(data_root)
    name = _canonical(str(name_or_path))
    if name == "digits":
        return _load_digits(split)
    if name:
        return _load_with_torchvision(name, split, root.resolve())
    path = _find(name_or_path, root)
    return Dataset(_name(path), *read_image_folder(path, split))


def _root(data_root: str | Path | None) -> Path:
    return Path(data_root or os.environ.get("DATA_ROOT") or "data").expanduser()


def _find(name_or_path: str | Path, root: Path) -> Path:
    path = Path(name_or_path).expanduser()
    for candidate in (path, root / path):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"unknown data set {str(name_or_path)!r}: the names are {', '.join(NAMES)}, and there is "
        f"no such folder or zip of images, here or in {root}"
    )


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def identity(name_or_path: str | Path, *, data_root: str | Path | None = None) -> str:
    """What results from a data set are known by: a name as it is given; of a folder or zip of
    images `lib.runs._folders.CONTENT` and a `fingerprint` of both splits, wherever it lies.

    Reads the files, as fast as the disk gives them (of a zip only its directory). Raises as `load`
    where there are none.
    """
    if _canonical(str(name_or_path)):
        return str(name_or_path)
    path = _find(name_or_path, _root(data_root))
    return f"{CONTENT}{fingerprint(path)[:16]}"


def file_stem(name_or_path: str | Path, *, data_root: str | Path | None = None) -> str:
    """For names of files: a data set's name; of a folder or zip the last part of its path and of
    its `identity`, so that two that are called alike do not share a file."""
    known_by = identity(name_or_path, data_root=data_root)
    if not known_by.startswith(CONTENT):
        return known_by
    return f"{_name(_find(name_or_path, _root(data_root)))}-{known_by[len(CONTENT) :][:8]}"


def _load_digits(split: Split) -> Dataset:
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin if spec and spec.origin else "").parent / "datasets/data/digits.csv.gz"
    if path.is_file():  # without the seconds that importing scikit-learn takes
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    else:
        from sklearn.datasets import load_digits

        table = np.column_stack(load_digits(return_X_y=True))
    labels = table[:, -1].astype(np.int32)  # after 8 x 8 pixels 0..16
    in_test = np.zeros(len(labels), bool)
    for c in range(10):
        in_test[np.flatnonzero(labels == c)[4::5]] = True
    chosen = in_test == (split == "test")
    images = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return Dataset("digits", images[chosen], labels[chosen], tuple("0123456789"), "digits")


@functools.cache
def _torchvision_datasets() -> tuple[Any, Any]:
    """(`torchvision.datasets`, what must stay alive with it)."""
    library = None
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        # A CUDA-built torchvision beside a CPU-only torch cannot load its operators, and fails
        # when it registers shapes for these two. Reading data needs neither: declare them.
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        from torchvision import datasets
    return datasets, library


def _load_with_torchvision(name: str, split: Split, root: Path) -> Dataset:
    source = _SOURCES[name]
    paths = [root / file for file in getattr(source, split)]
    torchvision_class = getattr(_torchvision_datasets()[0], source.torchvision_class)
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    opener = functools.partial(torchvision_class, **which)
    if not all(path.is_file() for path in paths):
        _download(name, split, root, functools.partial(opener, download=True))

    for path in paths:
        if path.name.endswith("-ubyte"):
            _check_idx(path)
    try:
        data = opener(root / source.root, download=False)
    except Exception as error:  # bz2, MATLAB and pickle readers each raise their own
        culprits = _altered(torchvision_class, paths) if "cifar" in name else paths
        reason = str(error).split(". You can use")[0] or type(error).__name__
        raise ValueError(
            f"{name}: {', '.join(map(str, culprits))} is corrupt or truncated ({reason}); "
            "put the original there, or delete it and it is downloaded again"
        ) from error

    images = np.asarray(data.data)
    if name == "svhn":
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    images = images.reshape(*images.shape[:3], -1)
    labels = np.asarray(data.labels if name == "svhn" else data.targets).astype(np.int32)
    # MNIST's names are "0 - zero" there.
    classes = tuple(c.split(" - ")[0] for c in getattr(data, "classes", "0123456789"))
    if not 0 < len(images) == len(labels) or not set(labels) <= set(range(len(classes))):
        raise ValueError(
            f"{name}: {len(images)} images and {len(labels)} labels, or labels beyond "
            f"{len(classes)} classes, in {', '.join(map(str, paths))}"
        )
    return Dataset(name, images, labels, classes, name)


def _check_idx(path: Path) -> None:
    """Raises unless the size of an IDX file is the one that its header promises."""
    rank = int(path.name[-len("1-ubyte")])
    header = np.fromfile(path, ">u4", count=1 + rank)
    if len(header) < 1 + rank or header[0] != 0x800 + rank:
        raise ValueError(f"{path} is corrupt: no header of an IDX file of {rank}-d bytes")
    shape = [int(size) for size in header[1:]]
    if 0 in shape:
        raise ValueError(f"{path} is corrupt: its header promises {shape}, no image")
    promised, actual = 4 * (1 + rank) + math.prod(shape), path.stat().st_size
    if promised != actual:
        raise ValueError(
            f"{path} is corrupt or truncated: its header promises {' x '.join(map(str, shape))} "
            f"values, a file of {promised} bytes, and it has {actual}"
        )


def _altered(cifar: Any, paths: Iterable[Path]) -> list[Path]:
    """The files whose MD5 is not the one that torchvision wants."""
    wanted = dict([*cifar.train_list, *cifar.test_list])
    wanted[cifar.meta["filename"]] = cifar.meta["md5"]
    return [p for p in paths if hashlib.md5(p.read_bytes()).hexdigest() != wanted[p.name]]


def _download(name: str, split: Split, root: Path, opener: Callable[[Path], Any]) -> None:
    """Downloads into a temporary folder beside the target, then moves the wanted files."""
    source = _SOURCES[name]
    files = getattr(source, split)
    parent = next(folder for folder in (root, *root.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as folder:
            staging = Path(folder)
            # An archive that is there already is unpacked, not downloaded again.
            for archive in filter(None, (source.archive, *(f"{file}.gz" for file in files))):
                if (root / archive).is_file():
                    (staging / archive).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(root / archive, staging / archive)
            opener(staging / source.root)
            for file in files:
                if not (root / file).exists():
                    (root / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staging / file, root / file)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        missing = [file for file in files if not (root / file).is_file()]
        raise FileNotFoundError(
            f"{name}: no {', '.join(missing)} in {root}, and the download failed "
            f"({' '.join(str(error).split())}). Put the files there, or set DATA_ROOT (or "
            "data_root) to the folder that holds them, or use 'digits', which needs no file."
        ) from error


# ---- Points


def flat(
    dataset: Dataset, indices: Integer[ArrayLike, "..."] | None = None
) -> Float32[Array, "... d"]:
    """Images as rows [N, d] in [0, 1]; those at `indices` [...], as [..., d], if given."""
    images = dataset.images if indices is None else dataset.images[np.asarray(indices)]
    rows = images.reshape(*images.shape[:-3], math.prod(dataset.image_shape)).astype(np.float32)
    rows /= 255  # in place: CIFAR is 0.6 GB in float32
    return jnp.asarray(rows)


def as_images(
    x: Real[ArrayLike, "... d"], image_shape: tuple[int, int, int]
) -> Real[Array, "... height width channels"]:
    """Rows [..., d] as images [..., H, W, channels]; raises where d is not their product."""
    x = jnp.asarray(x)
    if x.shape[-1] != math.prod(image_shape):
        raise ValueError(f"rows of {x.shape[-1]} numbers are no images of shape {image_shape}")
    return x.reshape(*x.shape[:-1], *image_shape)


def draw_indices(
    key: PRNGKeyArray,
    dataset: Dataset,
    num_per_class: int,
    *,
    classes: Sequence[int | str] | None = None,
) -> Integer[np.ndarray, "classes n"]:
    """Where the images of `draw` are in the data set, as [C, n] indices on the host (so no jit).

    The draw of a class is the beginning of a shuffle of its images, keyed by `fold_in(key, its
    label)`. So it does not depend on what other classes are drawn, and a larger draw with the same
    key begins with the smaller one.
    """
    if num_per_class < 1:
        raise ValueError(f"draw at least 1 image of every class, not {num_per_class}")
    rows = []
    for label in _labels_of(dataset, classes):
        members = np.flatnonzero(dataset.labels == label)
        if num_per_class > len(members):
            raise ValueError(
                f"class {dataset.class_names[label]!r} of {dataset.name} has {len(members)} "
                f"images, fewer than the {num_per_class} asked for"
            )
        # One compiled size serves all classes, and the shuffle is a sort of random words: for
        # MNIST, jax.random.permutation would compile a sort for each of ten class sizes.
        padded = 1 << (len(members) - 1).bit_length()
        words = np.asarray(jax.random.bits(jax.random.fold_in(key, label), (padded,), np.uint32))
        order = np.argsort(words[: len(members)], kind="stable")
        rows.append(members[order[:num_per_class]])
    return np.stack(rows)


def draw(
    key: PRNGKeyArray,
    dataset: Dataset,
    num_per_class: int,
    *,
    classes: Sequence[int | str] | None = None,
) -> Float32[Array, "classes n d"]:
    """Draws `num_per_class` images of every class without replacement: [C, n, d] in [0, 1].

    `classes` are labels or class names, in the order of the result; None is all of them. Which
    images are drawn is what `draw_indices` says. Raises ValueError for a class that is too small
    (named), unknown or repeated, and for `num_per_class` < 1.
    """
    return flat(dataset, draw_indices(key, dataset, num_per_class, classes=classes))


def _labels_of(dataset: Dataset, classes: Sequence[int | str] | None) -> list[int]:
    names = dataset.class_names
    if classes is None:
        return list(range(len(names)))
    labels = []
    for c in classes:
        if c not in names and c not in range(len(names)):
            raise ValueError(
                f"{dataset.name} has no class {c!r}: it has {', '.join(names)}, "
                f"or the labels 0..{len(names) - 1}"
            )
        labels.append(names.index(c) if c in names else int(c))
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"classes are one or more different ones, not {list(classes)}")
    return labels
