"""Condensed images, read with only numpy: a file to copy beside code of your own.

    from condensed_numpy import load

    images, labels, metadata = load("condensed.npz")
    inputs = (images - metadata["mean"]) / metadata["std"]  # what networks were trained on
    torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)  # for PyTorch

condensed.npz has three members, none of them pickled: `images` [N, H, W, channels] float32 in
[0, 1], as stored, or uint8 of 255ths; `labels` [N] int32, sorted, each as often as the others;
`metadata`, a string of JSON, which also says how stored images become training images (`decode`).
"""

import json
import math
import zipfile
from pathlib import Path

import numpy as np

FORMAT = "condensed images, version 1"
DECODE = (
    "Cut each stored image into factor x factor cells (as numpy.array_split does, rows first) and "
    "enlarge each cell to the full size, bilinearly, with pixel centers at half integers "
    "(align_corners=False) and the edge repeated. Training image k factor^2 + i factor + j is the "
    "cell in row i and column j of stored image k, and has its label. Networks see (image - mean) "
    "/ std, by channel."
)


def load(path):
    """(images [N factor^2, H, W, channels] float32 in [0, 1], labels int64, metadata): decoded,
    ready for training. `mean` and `std` of the metadata are arrays [channels] in float32.

    `path` is a condensed.npz or the folder that it is in. Raises FileNotFoundError, or ValueError
    naming the file and what is wrong with it.
    """
    images, labels, metadata = read(path)
    factor = metadata["factor"]
    metadata |= {key: np.array(metadata[key], np.float32) for key in ("mean", "std")}
    return decode(images, factor), np.repeat(labels.astype(np.int64), factor**2), metadata


def read(path):
    """(images [N, H, W, channels] float32, labels [N] int32, metadata), as stored: see `load`."""
    path = Path(path)
    if path.is_dir():
        path = path / "condensed.npz"
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum in {damaged}")
            images, labels, text = (_member(archive, n) for n in ("images", "labels", "metadata"))
        metadata = json.loads(str(text))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged archive raises whatever its parser meets
        reason = " ".join(str(error).split())[:200]
        message = f"{path} holds no condensed images, or is damaged: {reason}"
        raise ValueError(message) from error
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    check(images, labels, metadata, name=str(path))
    return images, labels, metadata


def _member(archive, name):
    """An array without objects; nothing is allocated that the archive does not hold."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        try:
            shape, _, dtype = read_header(file)
        except (MemoryError, RecursionError):  # of Python's parser, however much memory there is
            raise ValueError(f"the header of {name} nests too deeply") from None
        size = file.tell() + math.prod(shape) * dtype.itemsize
        if size != info.file_size and not dtype.hasobject:  # objects are refused below
            raise ValueError(f"{name} is not of the shape {shape} that its header promises")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def check(images, labels, metadata, *, name="condensed images"):
    """Raises ValueError, which begins with `name`, unless the three fit each other: see above."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{name}: not of the format {FORMAT!r}")
    wanted = {"dataset": str, "class_names": list, "factor": int, "mean": list, "std": list}
    for key, kind in wanted.items():
        if type(metadata.get(key)) is not kind:
            raise ValueError(f"{name}: {key} is a {kind.__name__}, not {metadata.get(key)!r}")
    if images.ndim != 4 or 0 in images.shape or images.dtype != np.float32:
        raise ValueError(
            f"{name}: images are float32 [N, H, W, channels], not {images.dtype}"
            f"{list(images.shape)}"
        )
    num, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"{name}: images are gray or color, of 1 or 3 channels, not {channels}")
    _check_classes(name, num, labels, metadata["class_names"])
    if not 1 <= metadata["factor"] <= min(height, width):
        raise ValueError(
            f"{name}: factor {metadata['factor']} leaves no pixels of images of {height} x {width}"
        )
    for key in ("mean", "std"):
        values = metadata[key]
        numbers = all(type(value) in (int, float) for value in values) and len(values) == channels
        finite = numbers and all(abs(value) < 1e30 for value in values)  # in float32 too
        if not finite or (key == "std" and min(values) <= 0):
            sign = "positive " if key == "std" else ""
            raise ValueError(f"{name}: {key} has {channels} {sign}numbers, not {values}")
    if not np.isfinite(images).all():
        raise ValueError(f"{name}: images hold NaN or infinity")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{name}: images are in [0, 1], not in [{images.min():.4g}, {images.max():.4g}]"
        )


def _check_classes(name, num, labels, class_names):
    texts = all(isinstance(c, str) and c for c in class_names)
    if not class_names or not texts or len(set(class_names)) < len(class_names):
        raise ValueError(f"{name}: class names are different texts, not {class_names}")
    if num % len(class_names):
        raise ValueError(f"{name}: {num} images are no equal number of {len(class_names)} classes")
    wanted = np.repeat(np.arange(len(class_names)), num // len(class_names))
    if labels.dtype != np.int32 or not np.array_equal(labels, wanted):
        raise ValueError(
            f"{name}: labels are int32, 0 to {len(class_names) - 1} in order, each "
            f"{num // len(class_names)} times"
        )


def decode(images, factor):
    """Stored images [N, H, W, channels] as training images [N factor^2, H, W, channels] float32:
    see `DECODE`. Computed in float64."""
    images = np.asarray(images)
    height, width = images.shape[1:3]
    if not 1 <= factor <= min(height, width):
        raise ValueError(f"factor {factor} leaves no pixels of images of {height} x {width}")
    rows = [
        _enlarged(_enlarged(cell, height, axis=1), width, axis=2)
        for row in np.array_split(images.astype(np.float64), factor, axis=1)
        for cell in np.array_split(row, factor, axis=2)
    ]
    return np.stack(rows, axis=1).reshape(-1, *images.shape[1:]).astype(np.float32)


def _enlarged(images, size, *, axis):
    """Linear interpolation along `axis`, to `size` values."""
    length = images.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, length - 1)
    share = np.expand_dims(position - before, tuple(i for i in range(images.ndim) if i != axis))
    return (1 - share) * images.take(before, axis) + share * images.take(after, axis)
