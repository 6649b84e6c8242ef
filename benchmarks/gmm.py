"""Times EM and sampling of Gaussian mixtures: ours beside scikit-learn's.

    python benchmarks/gmm.py [--cases k2-full k10-pca k10-diag] [--images 10000] [--rounds 3]
    python benchmarks/gmm.py --images 60000 --rounds 5             (the figures of the README)
    python benchmarks/gmm.py --cases cifar10 --images 50000        (memory: in a process of its own)

On Fashion-MNIST in [-1, 1], an iteration of EM (E-step and M-step) from the same start, in float64
and float32, and draws of the fitted mixture:
- k2-full: K = 2, d = 784, full covariances, regularization 1e-3.
- k10-pca: K = 10, the first 100 principal components, full, 1e-6.
- k10-diag: K = 10, d = 784, diagonal, 1e-3.
- cifar10: K = 2, d = 3072, full, only ours, from uint8 images in chunks, with the peak memory of
  the process. In development the data set is a JPEG copy: --cifar10 cifar10_jpeg.zip.

One process, one contender after the other in rounds; compiling apart; medians of wall and CPU time.
Ours is what `lib.gmm.em.fit` does in an iteration, reading the rows included; scikit-learn's is its
`_e_step` and `_m_step`. Log-likelihoods before and after the step are compared: relative in
float64, in nats per dimension in float32. The share of peak is 4 n d^2 K operations per second,
which is what both compute by definition, over the rate of one large product; ours skips some of
them and may pass 1. On a busy machine trust CPU times and ratios.
"""

import dataclasses
import os
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.decomposition import PCA

from lib.datasets import load
from lib.gmm import cast, sample, to_sklearn
from lib.gmm.covariances import diagonal, full
from lib.gmm.em import _iterate, mean_log_likelihood
from lib.gmm.starts import kmeans_start
from lib.rows import Rows
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json

FLOORS = {"k2-full": 1.0, "k10-pca": 2.0, "k10-diag": 1.0}
"""How many times faster than scikit-learn's iteration ours is to be, at either precision."""
SAMPLING_FLOOR = 50

Case = Literal["k2-full", "k10-pca", "k10-diag", "cifar10"]


class Setting(NamedTuple):
    num_components: int
    structure: Callable
    regularization: float


SETTINGS = {
    "k2-full": Setting(2, full, 1e-3),
    "k10-pca": Setting(10, full, 1e-6),
    "k10-diag": Setting(10, diagonal, 1e-3),
    "cifar10": Setting(2, full, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Ours against scikit-learn's."""

    cases: tuple[Case, ...] = ("k2-full", "k10-pca", "k10-diag")
    images: int = 10_000
    rounds: int = 3
    draws: tuple[int, ...] = (128, 1000)
    """Samples at a time."""
    block_size: int = 512
    cifar10: str = "cifar10"
    """Name or path of the data set of the case cifar10."""
    seed: int = 0
    out: Path = Path("results/benchmarks/gmm.json")


def to_unit(images: jax.Array) -> jax.Array:
    """Pixels in [-1, 1]."""
    return images / 127.5 - 1


def clock(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds in which each runs in turn, after one call that compiles."""
    first = {name: clock(call)[0] for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    result = {}
    for name, pairs in times.items():
        wall, cpu = np.array(pairs).T
        result[name] = {"wall": np.median(wall), "cpu": np.median(cpu), "wall_rounds": wall}
        result[name]["first_call_more"] = max(0.0, first[name] - float(np.median(wall)))
    return result


def product_rate(dtype: Any) -> float:
    """Operations per second of a large matrix product."""
    size = 2048
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
        square = jax.jit(partial(jnp.matmul, precision="highest"))
        times = measure({"product": lambda: square(matrix, matrix)}, 5)
    return 2 * size**3 / times["product"]["wall"]


def points_of(case: str, options: Options) -> np.ndarray:
    """[n, d] float64."""
    images = load("fashion_mnist").images[: options.images]
    x = images.reshape(len(images), -1) / 127.5 - 1
    if case == "k10-pca":
        x = PCA(100, svd_solver="covariance_eigh").fit_transform(x)
    return x


def scikit_learn_step(x: np.ndarray, start, regularization: float):
    """() -> (log-likelihood before the step, model after it), always from the same start."""
    fields = ("weights_", "means_", "precisions_cholesky_", "covariances_")
    begin = {name: getattr(start, name).astype(x.dtype) for name in fields}
    start.reg_covar = regularization

    def step():
        for name, value in begin.items():
            setattr(start, name, value)
        log_likelihood, log_responsibilities = start._e_step(x)
        start._m_step(x, log_responsibilities)
        return float(log_likelihood), start

    return step


def our_step(data: Rows, start, regularization: float):
    """As `scikit_learn_step`."""

    def step():
        with jax.enable_x64(True):
            mixture, info = jax.block_until_ready(_iterate(start, data, regularization))
            return float(info.log_likelihood), mixture

    return step


def em_case(case: str, options: Options, rates: dict[str, float]) -> list[dict[str, Any]]:
    num_components, structure, regularization = SETTINGS[case]
    x = points_of(case, options)
    data = Rows(x, dtype=np.float64, block_size=options.block_size)
    start = kmeans_start(
        jax.random.key(options.seed),
        data,
        num_components,
        structure,
        regularization=regularization,
        max_passes=5,
    )
    rows, operations = [], 4 * len(x) * x.shape[1] ** 2 * num_components
    for dtype in ("float64", "float32"):
        points = x.astype(dtype)
        data = Rows(points, dtype=dtype, block_size=options.block_size)
        with jax.enable_x64(True):
            on_device = cast(start, jnp.float64)
        calls = {
            "ours": our_step(data, on_device, regularization),
            "scikit-learn": scikit_learn_step(points, to_sklearn(start), regularization),
        }
        (before, mixture), (their_before, model) = (call() for call in calls.values())
        after = mean_log_likelihood(mixture, Rows(x, dtype=np.float64))
        their_after = float(model.score(points))
        differences = [before - their_before, after - their_after]
        scale = x.shape[1] if dtype == "float32" else abs(after)
        times = measure(calls, options.rounds)
        ratio = {t: times["scikit-learn"][t] / times["ours"][t] for t in ("wall", "cpu")}
        row = {"case": case, "dtype": dtype, "shape": x.shape, "times": times, "ratio": ratio}
        row |= {"differences": [difference / scale for difference in differences]}
        row |= {"floor": FLOORS[case], "log_likelihoods": [before, after]}
        if structure is full:
            wall = times["ours"]["wall"]
            row["share_of_peak"] = operations / wall / rates[dtype]
        rows.append(row)
        print(
            f"{case:9s} {dtype} n={len(x)} d={x.shape[1]}: ours {times['ours']['wall']:.3f} s, "
            f"scikit-learn {times['scikit-learn']['wall']:.3f} s; {ratio['wall']:.2f}x wall, "
            f"{ratio['cpu']:.2f}x CPU (floor {FLOORS[case]}); share of peak "
            f"{row.get('share_of_peak', float('nan')):.2f}; log-likelihood "
            f"{after:.3f}, off by {max(map(abs, row['differences'])):.1e}",
            flush=True,
        )
    if case == "k2-full":
        rows += sampling_case(mixture, options)
    return rows


def sampling_case(mixture, options: Options) -> list[dict[str, Any]]:
    """Draws of a fitted mixture, ours in float32 with new keys at every call."""
    model, rows = to_sklearn(mixture), []
    small = cast(jax.device_get(mixture), jnp.float32)
    draw = jax.jit(sample, static_argnums=2)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    for count in options.draws:
        calls = {
            "ours": lambda count=count: draw(next(keys), small, count)[0],
            "scikit-learn": lambda count=count: model.sample(count)[0],
        }
        times = measure(calls, max(5, options.rounds))
        ratio = {t: times["scikit-learn"][t] / times["ours"][t] for t in ("wall", "cpu")}
        rows.append({"case": "sampling", "draws": count, "times": times, "ratio": ratio})
        rows[-1] |= {"shape": mixture.means.shape, "floor": SAMPLING_FLOOR}
        print(
            f"sampling  {count} draws: ours {1e3 * times['ours']['wall']:.1f} ms, scikit-learn "
            f"{1e3 * times['scikit-learn']['wall']:.0f} ms; {ratio['wall']:.0f}x wall, "
            f"{ratio['cpu']:.0f}x CPU (floor {SAMPLING_FLOOR})",
            flush=True,
        )
    return rows


def cifar10_case(options: Options, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Two iterations on uint8 images and the memory they took."""
    num_components, structure, regularization = SETTINGS["cifar10"]
    images = load(options.cifar10).images[: options.images]
    data = Rows(images, transform=to_unit, block_size=options.block_size, chunk_size=4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    start = kmeans_start(
        jax.random.key(options.seed),
        data,
        num_components,
        structure,
        regularization=regularization,
        max_passes=5,
    )
    starting = time.perf_counter() - began
    with jax.enable_x64(True):
        held = [cast(start, jnp.float64)]
    del start

    def step():
        """The next iteration, in the memory of the last one: as `fit` does it."""
        with jax.enable_x64(True):
            held[0], info = _iterate(held[0], data, regularization, keep=False)
            return info

    times = measure({"ours": step}, options.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall = times["ours"]["wall"]
    operations = 4 * len(images) * 3072**2 * num_components
    share = operations / wall / rates["float32"]
    print(
        f"cifar10   float32 n={len(images)} d=3072: {wall:.1f} s per iteration, the start "
        f"{starting:.1f} s; share of peak {share:.2f}; {peak / 2**30:.2f} GiB at most, "
        f"{before / 2**30:.2f} before",
        flush=True,
    )
    row = {"case": "cifar10", "shape": [len(images), 3072], "times": times, "start": starting}
    return [row | {"share_of_peak": share, "peak_bytes": peak, "bytes_before": before}]


def main(options: Options) -> None:
    # Of rounding that leaves a covariance singular in scikit-learn nothing is hidden: it raises.
    warnings.simplefilter("ignore", UserWarning)
    load_before, results = os.getloadavg()[0], []
    rates = {dtype: product_rate(dtype) for dtype in ("float64", "float32")}
    print(", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    for case in options.cases:
        results += (cifar10_case if case == "cifar10" else partial(em_case, case))(options, rates)
        about = {"environment": environment(), "options": options, "load_before": load_before}
        write_json(options.out, about | {"rates": rates, "results": results})
    print(f"load before: {load_before:.2f}; written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options))
