"""Do two files of rows, or two folders of images, hold the same distribution? And if not, where?

    python xp_drmmd/two_sample.py --x a.npy --y b.npz [--report page.html]

Files are those of `lib.rows.files.open_rows`: .npy, .npz, .pt, .safetensors; FILE:KEY names one of
several matrices. For scripts: the exit status is 0 where nothing is rejected, 3 where it is, and 1
on an error. Numbers go to `--output_file`, or beside the page.
"""

import io
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from matplotlib import pyplot as plt
from PIL import Image, ImageOps, UnidentifiedImageError

from lib import runs
from lib.networks import ConvNet
from lib.numerics import key_of_seed, named_key
from lib.report import _html as html
from lib.report import plotting
from lib.report.spreads import spread
from lib.rows.files import open_rows
from lib.runs.commands import run_command
from lib.runs.files import write_bytes, write_json
from lib.runs.processes import DeviceOptions
from lib.two_sample import (
    LMBDAS,
    mmd_squared_interval,
    two_sample_test,
    witness,
)
from lib.two_sample._permutations import default_families

REJECTED = 3
TEMPLATE = Path(__file__).with_name("two_sample.html.j2")
SHOWN = 8
"""Points, and coordinates, that are named."""
BATCH = 256  # images that go through the network at once
MAX_INTERVAL = 5000
"""Rows of each sample that the interval of MMD^2 is taken of: it needs all pairs."""


@dataclass(frozen=True)
class Arguments(DeviceOptions):
    x: Path
    """A file of rows, or a folder of images (with folders in it, or not)."""
    y: Path
    alpha: float = 0.05
    """The level of the test: how often it may reject where nothing differs."""
    num_permutations: int = 999
    rank: int | None = None
    """Features in place of exact kernels. None: exact up to 1,024 rows in all, else 300."""
    max_rows: int = 1_000_000
    """Of a larger sample so many rows are drawn."""
    features: Literal["pixels", "convnet"] = "convnet"
    """Of images: as they are, or the outputs of a random convolutional network."""
    side: int = 32
    """Pixels per side that images are scaled to."""
    seed: int = 0
    output_file: Path | None = None
    """JSON of everything. None: beside the report, if there is one."""
    report: Path | None = None
    """A page (.html) with a figure."""


# ---- Samples


def read_images(folder: Path, arguments: Arguments) -> tuple[np.ndarray, list[Path], int]:
    """Color images [n, side, side, 3], cut to a square and scaled, their files, and the number of
    files that they are drawn from."""
    suffixes = Image.registered_extensions()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f"{folder}: no images in this folder")
    total, images = len(files), []
    files = [files[i] for i in drawn(total, arguments)]
    for path in files:
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (arguments.side, arguments.side))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path}: this image cannot be read: {error}") from error
        images.append(np.asarray(fitted))
    return np.stack(images), files, total


def drawn(n: int, arguments: Arguments) -> np.ndarray:
    if n <= arguments.max_rows:
        return np.arange(n)
    rng = np.random.default_rng(arguments.seed)
    return np.sort(rng.choice(n, arguments.max_rows, replace=False))


def embed(images: np.ndarray, arguments: Arguments) -> np.ndarray:
    scaled = images.astype(np.float32) / 255
    if arguments.features == "pixels":
        return scaled.reshape(len(images), -1)
    network = ConvNet(num_classes=None, width=32)
    parameters = network.init(key_of_seed(arguments.seed), jnp.asarray(scaled[:1]))
    outputs = jax.jit(partial(network.apply, parameters))
    starts = range(0, len(scaled), BATCH)
    batches = ((scaled[i : i + BATCH] - 0.5) / 0.25 for i in starts)
    return np.concatenate([outputs(jnp.asarray(batch)) for batch in batches])


class Sample(NamedTuple):
    """Rows [n, d] in float32, what each is called, the number of rows that it is drawn from, and of
    folders the images [n, side, side, 3]."""

    source: str
    rows: np.ndarray
    names: list[str]
    total: int
    images: np.ndarray | None = None


def read_sample(path: Path, arguments: Arguments) -> Sample:
    if path.is_dir():
        images, files, total = read_images(path, arguments)
        names = [str(file.relative_to(path)) for file in files]
        return Sample(str(path), embed(images, arguments), names, total, images)
    file = open_rows(path)
    total = file.shape[0]
    kept = drawn(total, arguments)
    rows = np.asarray(file[slice(0, total) if len(kept) == total else kept], np.float32)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path}: {bad.sum()} rows hold values that are not finite in float32, the first is "
            f"row {kept[np.argmax(bad)]}; leave them out"
        )
    return Sample(str(path), rows, [f"row {i}" for i in kept], total)


def read(arguments: Arguments) -> tuple[Sample, Sample]:
    """Both samples. Raises ValueError or FileNotFoundError, naming the file."""
    if arguments.x.is_dir() != arguments.y.is_dir():
        raise ValueError(f"{arguments.x}, {arguments.y}: one is a folder, the other is not")
    x, y = (read_sample(path, arguments) for path in (arguments.x, arguments.y))
    if x.rows.shape[1] != y.rows.shape[1]:
        raise ValueError(
            f"{x.source} has {x.rows.shape[1]} columns and {y.source} {y.rows.shape[1]}: "
            "the two must have equally many"
        )
    for sample in (x, y):
        if len(sample.rows) < 2:
            raise ValueError(f"{sample.source}: two rows or more are needed, it has one")
    return x, y


# ---- What differs


def compare(x: Sample, y: Sample, arguments: Arguments) -> dict[str, Any]:
    """The test, the size of the difference, and the witness of the most telling statistic."""
    key = key_of_seed(arguments.seed)
    scale = spread(np.concatenate([x.rows, y.rows]), axis=0)
    num, rank = arguments.num_permutations, arguments.rank

    @jax.jit
    def test(key, x, y):
        return two_sample_test(key, x, y, num_permutations=num, rank=rank)

    result = jax.tree.map(np.asarray, test(key, x.rows, y.rows))
    if not np.isfinite(result.p_value):
        raise ValueError(
            f"{x.source}, {y.source}: the kernels' values are not finite; scale the rows"
        )
    best = np.unravel_index(np.argmin(result.p_values), result.p_values.shape)
    # Those of the test, by the same key.
    kernels, names = [], []
    families = default_families(named_key(key, "bandwidths"), jnp.concatenate([x.rows, y.rows]))
    for kind, (family, grid) in zip(("Gaussian", "Laplace"), families):
        kernels += [family(bandwidth) for bandwidth in grid]
        names += [f"{kind} kernel, bandwidth {bandwidth:.3g}" for bandwidth in grid]
    kernel, lmbda = kernels[int(best[0])], LMBDAS[int(best[1])]

    few = slice(0, MAX_INTERVAL)
    interval = jax.jit(lambda key, x, y: mmd_squared_interval(key, kernel, x, y))
    size = interval(key, x.rows[few], y.rows[few])

    given = jnp.asarray(x.rows), jnp.asarray(y.rows)
    h = jax.jit(witness(key, kernel, *given, lmbda=lmbda, rank=rank))
    values = [np.asarray(h(sample.rows)) for sample in (x, y)]
    slopes = jax.jit(jax.grad(lambda rows: jnp.sum(h(rows))))
    pooled = np.concatenate([x.rows[few], y.rows[few]])
    influence = np.sqrt(np.mean(np.square(slopes(pooled)), axis=0)) * scale
    return {
        "p_value": float(result.p_value),
        "rejected": bool(result.p_value <= arguments.alpha),
        "p_values": result.p_values.tolist(),
        "statistics": result.statistics.tolist(),
        "kernels": names,
        "lambdas": ["inf" if np.isinf(lmbda) else lmbda for lmbda in LMBDAS],
        "most_telling": {"kernel": int(best[0]), "lambda": str(lmbda)},
        "mmd_squared": {name: float(value) for name, value in size._asdict().items()},
        "witness": values,
        "influence": influence / influence.sum() if influence.sum() > 0 else influence,
    }


def most_telling(comparison: dict, x: Sample, y: Sample) -> dict[str, list]:
    """Points where x is more frequent, and where y is, and the coordinates that matter most."""
    of_x, of_y = comparison["witness"]
    first, last = np.argsort(-of_x)[:SHOWN], np.argsort(of_y)[:SHOWN]
    coordinates = np.argsort(-comparison["influence"])[:SHOWN]
    means = [sample.rows.mean(axis=0) for sample in (x, y)]
    spreads = [spread(sample.rows, axis=0) for sample in (x, y)]
    return {
        "x": [{"name": x.names[i], "witness": float(of_x[i])} for i in first],
        "y": [{"name": y.names[i], "witness": float(of_y[i])} for i in last],
        "coordinates": [
            {
                "column": int(c),
                "share": float(comparison["influence"][c]),
                "means": [float(mean[c]) for mean in means],
                "standard_deviations": [float(deviation[c]) for deviation in spreads],
            }
            for c in coordinates
        ],
    }


def figure(comparison: dict, telling: dict, x: Sample, y: Sample) -> bytes:
    of_x, of_y = comparison["witness"]
    with plotting.style():
        drawing, axes = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1.2, 1, 1))
        bins = np.histogram_bin_edges(np.concatenate([of_x, of_y]), 40)
        for values, name in ((of_x, "x"), (of_y, "y")):
            axes[0].hist(values, bins, density=True, alpha=0.5, label=f"{name}, {len(values):,}")
        axes[0].set_xlabel("witness: right, more of x; left, more of y")
        axes[0].set_ylabel("density")
        axes[0].legend()
        if x.images is None:
            rows = telling["coordinates"][::-1]
            axes[1].barh([f"column {row['column']}" for row in rows], [r["share"] for r in rows])
            axes[1].set_xlabel("share of the witness's slope")
            column = telling["coordinates"][0]["column"]
            both = np.concatenate([x.rows[:, column], y.rows[:, column]])
            bins = np.histogram_bin_edges(both, 40)
            for sample, name in ((x, "x"), (y, "y")):
                axes[2].hist(sample.rows[:, column], bins, density=True, alpha=0.5, label=name)
            axes[2].set_xlabel(f"column {column}, counted from 0")
            axes[2].set_ylabel("density")
        else:
            for ax, sample, values, title in (
                (axes[1], x, -of_x, "most typical of x"),
                (axes[2], y, of_y, "most typical of y"),
            ):
                assert sample.images is not None
                side = min(4, int(np.sqrt(len(values))))
                chosen = sample.images[np.argsort(values)[: side**2]] / 255
                plotting.show_images(ax, chosen.reshape(side, side, *chosen.shape[1:]))
                ax.set_title(title)
        stream = io.BytesIO()
        drawing.savefig(stream, format="png")
        plt.close(drawing)
        return stream.getvalue()


def text(document: dict[str, Any]) -> str:
    size, alpha = document["mmd_squared"], document["options"]["alpha"]
    verdict = "they differ" if document["rejected"] else "no difference found"
    lines = [
        f"p = {document['p_value']:.4g}: {verdict} at level {alpha:g}",
        f"MMD^2 {size['estimate']:.3g}, 95% interval [{size['low']:.3g}, {size['high']:.3g}]",
    ]
    if document["rejected"] and not document["images"]:
        columns = ", ".join(
            f"{row['column']} ({row['share']:.0%})"
            for row in document["telling"]["coordinates"][:3]
        )
        lines.append(f"columns that matter most, counted from 0: {columns}")
    return "\n".join(lines)


def main(arguments: Arguments, mesh: Mesh | None = None) -> dict[str, Any]:
    """Prints the result, writes what is asked for, and exits with 3 where the test rejects."""
    if not 0 < arguments.alpha < 1:
        raise ValueError(f"--alpha must be between 0 and 1, not {arguments.alpha}")
    if arguments.report is not None and arguments.report.suffix != ".html":
        raise ValueError(f"{arguments.report}: the report must be an .html")
    x, y = read(arguments)
    comparison = compare(x, y, arguments)
    telling = most_telling(comparison, x, y)
    document = {
        "samples": {
            name: {"path": sample.source, "rows": sample.total, "used": len(sample.rows)}
            for name, sample in (("x", x), ("y", y))
        },
        **{
            name: value
            for name, value in comparison.items()
            if name not in ("witness", "influence")
        },
        "telling": telling,
        "images": x.images is not None,
        "options": asdict(arguments),
        "environment": runs.environment(),
    }
    print(text(document))
    output = arguments.output_file
    if arguments.report is not None:
        output = output or arguments.report.with_suffix(".json")
        picture = html.data_uri(figure(comparison, telling, x, y), "png")
        page = html.render(TEMPLATE, {**document, "figure": picture, "text": text(document)})
        write_bytes(arguments.report, page.encode())
        print(f"report: {arguments.report}")
    if output is not None:
        write_json(output, document)
        print(f"numbers: {output}")
    if document["rejected"]:
        sys.exit(REJECTED)
    return document


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments), lower="--max_rows")
