"""Two-sample tests beside published ones: how often they reject, and how long they take.

    pip install hyppo goodpoints
    python benchmarks/published_tests.py power [--pairs blobs ...]   (an hour on two cores, resumes)
    python benchmarks/published_tests.py level
    python benchmarks/published_tests.py time
    python benchmarks/published_tests.py tables

Each reads what `--results` holds and adds what is missing; `tables` puts it together, with the
published cells where `--results` holds no draws. `power` and `level` know of draws in `--results`
only: `--pairs`, `--levels` and `--sizes` say which to make. Every method gets the same draws.
MMDAgg and MMD-FUSE are written from their papers' descriptions.
"""

import functools
import itertools
import json
import resource
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from scipy.spatial.distance import cdist
from sklearn.ensemble import RandomForestClassifier

from lib.report import plotting
from lib.report.spreads import standard_error
from lib.report.tables import Table, write_summary
from lib.runs import environment
from lib.runs.commands import run_command
from lib.runs.files import write_json
from lib.two_sample import LMBDAS, MMD, two_sample_test
from xp_drmmd.alternatives import left_out, pairs
from xp_drmmd.power import (
    ALPHA,
    OURS,
    Hits,
    Method,
    figure,
    interval,
    key_of,
    mmd_median,
    rejections,
)


@dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["power", "level", "time", "tables"]]
    pairs: tuple[str, ...] = ()
    """Those to draw from; none: all. Likewise of their levels, and of sizes n,m of the null."""
    levels: tuple[float, ...] = ()
    sizes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    draws: int = 200
    null_draws: int = 1000
    results: Path = Path("results")
    data_root: Path | None = None
    measured: tuple[str, ...] = ()
    """A method and a number of points: one measurement of time."""


# ---- Ours


@functools.cache
def _compiled(lmbdas, rank):
    return jax.jit(lambda key, x, y: two_sample_test(key, x, y, lmbdas=lmbdas, rank=rank).p_value)


def ours(rng, x, y, lmbdas=LMBDAS, rank=None) -> bool:
    return float(_compiled(lmbdas, rank)(key_of(rng), x, y)) <= ALPHA


# ---- MMDAgg (Schrab et al., JMLR 2023) and MMD-FUSE (Biggs, Schrab and Gretton, NeurIPS 2023)

NUM_PERMUTATIONS = 1000


def _unbiased_under_relabelling(rng, x, y):
    """{kernel: (unbiased MMD^2 of [1 + B] labelings, mean k^2 off the diagonal)} of Gaussian and
    Laplace kernels (l1) of ten bandwidths, geometric from half the 5% quantile of the pooled
    distances to twice the 95% quantile."""
    n, m, pooled = len(x), len(y), np.concatenate([x, y])
    labels = np.arange(n + m) < n
    labels = np.stack([labels, *(rng.permutation(labels) for _ in range(NUM_PERMUTATIONS))], axis=1)
    first, second = labels.astype(float), (~labels).astype(float)
    upper = np.triu_indices(n + m, 1)
    statistics = {}
    for kind, metric in (("gaussian", "sqeuclidean"), ("laplace", "cityblock")):
        distances = cdist(pooled, pooled, metric)
        between = distances[upper] if kind == "laplace" else np.sqrt(distances[upper])
        low, high = np.quantile(between, (0.05, 0.95)) * (0.5, 2)
        for bandwidth in np.geomspace(max(low, 1e-9 * high), high, 10):
            scale = 2 * bandwidth**2 if kind == "gaussian" else bandwidth
            gram = np.exp(-distances / scale)
            np.fill_diagonal(gram, 0)
            of_first, of_second = gram @ first, gram @ second
            xx, xy = np.sum(first * of_first, axis=0), np.sum(second * of_first, axis=0)
            yy = np.sum(second * of_second, axis=0)
            values = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
            statistics[kind, bandwidth] = values, np.mean(gram[upper] ** 2)
    return statistics


def mmdagg(statistics: np.ndarray) -> bool:
    """`statistics` [kernels, 1 + B]: half of the permutations give the quantiles, half the level;
    the corrected level is found by 50 bisections. Weights are uniform."""
    half = NUM_PERMUTATIONS // 2
    ordered = np.sort(statistics[:, : half + 1], axis=1)  # the observed one among them
    second = statistics[:, half + 1 :]
    count = len(statistics)

    def thresholds(u):
        index = np.ceil((half + 1) * (1 - u / count)).astype(int) - 1
        return ordered[:, max(0, min(index, half))][:, None]

    low, high = 0.0, float(count)
    for _ in range(50):
        middle = (low + high) / 2
        if np.mean(np.any(second > thresholds(middle), axis=0)) <= ALPHA:
            low = middle
        else:
            high = middle
    return bool(np.any(statistics[:, :1] > thresholds(low)))


def fuse(statistics: np.ndarray, squares: np.ndarray, n: int) -> bool:
    """log mean_k exp(t MMD_k^2 / sqrt(mean k^2)) / t with t = sqrt(n (n - 1)), as one statistic."""
    t = np.sqrt(n * (n - 1))
    scaled = t * statistics / np.sqrt(squares)[:, None]
    top = scaled.max(axis=0)
    values = top + np.log(np.mean(np.exp(scaled - top), axis=0))
    return float(np.mean(values >= values[0])) <= ALPHA


def agg_and_fuse(rng, x, y) -> dict[str, bool]:
    of_kernels = _unbiased_under_relabelling(rng, x, y)
    statistics, squares = (np.stack(list(part)) for part in zip(*of_kernels.values()))
    return {"MMDAgg": mmdagg(statistics), "MMD-FUSE": fuse(statistics, squares, len(x))}


# ---- Libraries


def compress_then_test(rng, x, y) -> bool:
    """goodpoints' CTT (Domingo-Enrich, Dwivedi and Mackey, AISTATS 2023), as many points as fill
    its bins."""
    from goodpoints.ctt import ctt

    bins = 16
    n = len(x) // bins * bins
    x, y = (rng.permutation(sample)[:n].astype(float) for sample in (x, y))
    bandwidth = np.median(cdist(x[:100], y[:100]))
    seeds = {"null_seed": int(rng.integers(2**31)), "statistic_seed": int(rng.integers(2**31))}
    result = ctt(x, y, g=4, B=199, s=bins, lam=np.sqrt(2) * bandwidth, alpha=ALPHA, **seeds)
    return bool(rng.random() < result.rejects)


def hyppo_energy(rng, x, y) -> bool:
    """hyppo's k-sample test by distance correlation: the energy distance."""
    from hyppo.ksample import KSample

    seed = int(rng.integers(2**31))
    with warnings.catch_warnings(action="ignore"):  # of fewer permutations than 1,000
        result = KSample("Dcorr").test(x, y, reps=199, auto=False, random_state=seed)
    return result[1] <= ALPHA


def classifier(rng, x, y) -> bool:
    """A random forest trained on half; its scores of the other half, under permuted labels."""
    samples = [rng.permutation(sample) for sample in (x, y)]
    train, test = (
        np.concatenate([sample[part(len(sample))] for sample in samples])
        for part in (lambda n: slice(n // 2), lambda n: slice(n // 2, n))
    )
    halves = [(len(s) // 2, len(s) - len(s) // 2) for s in samples]
    labels, truth = (np.repeat([0, 1], sizes) for sizes in zip(*halves))
    forest = RandomForestClassifier(100, random_state=int(rng.integers(2**31)))
    scores = forest.fit(train, labels).predict_proba(test)[:, 1]
    shuffled = np.stack([truth, *(rng.permutation(truth) for _ in range(999))])
    gaps = shuffled @ scores  # the scores' sum over the second sample's points
    return float(np.mean(gaps >= gaps[0] - 1e-9)) <= ALPHA


METHODS: dict[str, Method] = {
    "ours": lambda *a: {OURS: ours(*a)},
    "ours, MMD": lambda *a: {"MMD": ours(*a, lmbdas=MMD)},
    "ours, features": lambda *a: {"features": ours(*a, rank=100)},
    "median": mmd_median,
    "agg": agg_and_fuse,
    "ctt": lambda *a: {"CTT": compress_then_test(*a)},
    "hyppo": lambda *a: {"hyppo, energy": hyppo_energy(*a)},
    "classifier": lambda *a: {"classifier": classifier(*a)},
}


# ---- Draws


def chosen(arguments: Arguments) -> dict[str, Method]:
    names = arguments.methods or [name for name in METHODS if name != "ours, features"]
    return {name: METHODS[name] for name in names}


def power(arguments: Arguments, folder: Path) -> None:
    for name, pair in pairs(arguments.data_root).items():
        if arguments.pairs and name not in arguments.pairs:
            continue
        for level in pair.levels:
            if arguments.levels and level not in arguments.levels:
                continue
            began = time.perf_counter()
            path = folder / f"power_{name}_{level:g}.json"

            def draw(rng, pair=pair, level=level):
                return pair.draw(rng, pair.n, level)

            hits = rejections(path, draw, chosen(arguments), arguments.draws, name, level)
            rates = ", ".join(f"{method} {np.mean(row):.2f}" for method, row in hits.items())
            print(f"{name} {level:g}: {rates} ({time.perf_counter() - began:.0f} s)", flush=True)


def _digits(rng, n):
    return left_out(rng, n, 0, name="MNIST", data_root=None)


NULLS: dict[str, Callable] = {
    "normal, d = 5": lambda rng, n: rng.normal(size=(n, 5)),
    "Student's t, 2 degrees, d = 5": lambda rng, n: rng.standard_t(2, size=(n, 5)),
    "counts, Poisson(1), d = 2": lambda rng, n: rng.poisson(1.0, size=(n, 2)).astype(float),
    "rare events, 2%, d = 3": lambda rng, n: (rng.random((n, 3)) < 0.02).astype(float),
}
DIGITS = "images of digits"
SIZES = ((20, 20), (20, 60), (200, 200), (100, 300), (2000, 2000))


def _null(title: str, n: int, m: int):
    def draw(rng):
        if title in NULLS:
            return NULLS[title](rng, n), NULLS[title](rng, m)
        x, y = _digits(rng, max(n, m))
        return x[:n], y[:m]

    return draw


def level(arguments: Arguments, folder: Path) -> None:
    for title, (n, m) in itertools.product([*NULLS, DIGITS], SIZES):
        wanted = not arguments.sizes or f"{n},{m}" in arguments.sizes
        if not wanted or (arguments.pairs and title not in arguments.pairs):
            continue
        began, method = time.perf_counter(), "ours" if n < 2000 else "ours, features"
        path = folder / f"level_{zlib.crc32(repr((title, n, m)).encode())}.json"
        draws = arguments.null_draws
        methods = {method: METHODS[method]}
        (row,) = rejections(path, _null(title, n, m), methods, draws, title, n, m).values()
        seconds = time.perf_counter() - began
        print(f"{title} {n} {m}: {np.mean(row):.3f} ({seconds:.0f} s)", flush=True)


# ---- Time


def timed(name: str, n: int) -> dict[str, float]:
    """Of a process with nothing else in it; the second call."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, n, 64)).astype(np.float32)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        METHODS[name](rng, x, y)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": seconds[0], "seconds": seconds[1], "bytes": peak}


def times(arguments: Arguments, folder: Path) -> None:
    """Methods that would take more than `LONGEST` by the growth of the last two are left out."""
    path = folder / "time.json"
    timings = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.methods or TIMED:
        done = timings.setdefault(name, {})
        for n in COUNTS:
            last = [row["seconds"] for row in done.values()]
            growth = (n / COUNTS[COUNTS.index(n) - 1]) ** 2
            if str(n) in done or (last and last[-1] * growth > LONGEST and name not in LINEAR):
                continue
            command = [sys.executable, __file__, "time", "--measured", name, str(n)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if output.returncode:
                print(f"{name} {n}: failed", flush=True)
                break
            done[str(n)] = json.loads(output.stdout.splitlines()[-1])
            print(f"{name} {n}: {done[str(n)]}", flush=True)
            write_json(path, timings)


COUNTS = (500, 2000, 10_000, 100_000, 1_000_000)
LONGEST = 60.0
LINEAR = ("ours", "ctt", "classifier")
TIMED = ("ours", "ours, MMD", "median", "agg", "ctt", "hyppo", "classifier")


# ---- Tables


def paired(ours: list[bool], other: list[bool]) -> str:
    """Mean difference, and 1.96 standard errors of it over the draws."""
    difference = np.subtract(ours, other, dtype=float)
    return f"{difference.mean():+.2f} ± {1.96 * standard_error(difference):.2f}"


def stored(folder: Path, name: str, level: float, num_draws: int) -> Hits:
    """Of a pair's level where every method has all its draws, else nothing."""
    path = folder / f"power_{name}_{level:g}.json"
    by_method = json.loads(path.read_text()) if path.exists() else {}
    hits = {
        test: row[:num_draws] for of_method in by_method.values() for test, row in of_method.items()
    }
    return (
        hits
        if len(by_method) == len(chosen(Arguments("tables")))
        and min(map(len, hits.values())) == num_draws
        else {}
    )


PUBLISHED = Path(__file__).parent / "published" / "published_tests.json"
NAMES = (OURS, "MMD", "MMD, median", "MMDAgg", "MMD-FUSE", "CTT", "hyppo, energy", "classifier")


def cell(folder: Path, name: str, level: float, num_draws: int, published: dict) -> dict | None:
    """Of a pair's level: from its draws, else as published, else None."""
    hits = stored(folder, name, level, num_draws)
    if not hits:
        return published.get(f"{name} {level:g}")
    rates = {method: float(np.mean(row)) for method, row in hits.items()}
    best = max((m for m in rates if m not in NAMES[:2]), key=rates.__getitem__)
    return {
        "draws": {method: len(row) for method, row in hits.items()},
        "power": rates,
        "intervals": {method: interval(row) for method, row in hits.items()},
        "ours less the best other": f"{best} {paired(hits[OURS], hits[best])}",
        "commit": environment()["commit"],
    }


def tables(arguments: Arguments, folder: Path) -> Path:
    published = json.loads(PUBLISHED.read_text())["power"]
    rows, document = [], {}
    for name, pair in pairs(arguments.data_root).items():
        for level in pair.levels:
            entry = cell(folder, name, level, arguments.draws, published)
            if entry is None:
                continue
            cells = [f"{entry['power'][m]:.2f}" if m in entry["power"] else "-" for m in NAMES]
            against = entry["ours less the best other"]
            rows.append([pair.title, f"{pair.varied} {level:g}", *cells, against])
            document[f"{name} {level:g}"] = entry
    heads = ["samples", "level", *NAMES, "ours less the best other"]
    caption = (
        f"Rejections at level {ALPHA} over {arguments.draws} draws, the same for every method; "
        "last, the paired difference from the best published one with 1.96 standard errors."
    )
    made = [Table(heads, rows, caption)]
    levels, before = [], {row[0]: row[1:] for row in published["level"]}
    for title in (*NULLS, DIGITS):
        cells = before.get(title, ["-"] * len(SIZES))
        for i, (n, m) in enumerate(SIZES):
            path = folder / f"level_{zlib.crc32(repr((title, n, m)).encode())}.json"
            by_method = json.loads(path.read_text()) if path.exists() else {}
            (row,) = next(iter(by_method.values()), {"": []}).values()
            if len(row) == arguments.null_draws:
                cells[i] = f"{np.mean(row):.3f}"
        levels.append([title, *cells])
    heads = ["null", *(f"{n}, {m}" for n, m in SIZES)]
    error = np.sqrt(ALPHA * (1 - ALPHA) / arguments.null_draws)
    made.append(Table(heads, levels, f"Rejections at level {ALPHA} where nothing differs, of "
        f"{arguments.null_draws} draws (standard error {error:.3f})."))  # fmt: skip
    path = folder / "time.json"
    timing = published["time"] | (json.loads(path.read_text()) if path.exists() else {})
    cells = [[name, *(_cell(row.get(str(n))) for n in COUNTS)] for name, row in timing.items()]
    made.append(Table(["method", *(f"n = m = {n:,}" for n in COUNTS)], cells,
        "Seconds of the second call, and GB that the process held, d = 64."))  # fmt: skip
    return write_summary(
        arguments.results / "benchmarks" / "published_tests.json",
        {"power": document | {"time": timing, "level": levels}},
        made,
        figures=functools.partial(draw_figure, document),
    )


def _cell(row) -> str:
    return f"{row['seconds']:.2f} s, {row['bytes'] / 1e9:.1f}" if row else "-"


def draw_figure(document: dict, path: Path) -> list[Path]:
    """From the rates: how many of the draws are hits, not which."""
    curves = {}
    for name, pair in pairs().items():
        by_level = {
            level: document[f"{name} {level:g}"]
            for level in pair.levels
            if f"{name} {level:g}" in document
        }
        hits = [
            {m: np.arange(one["draws"][m]) < round(rate * one["draws"][m])
             for m, rate in one["power"].items()}
            for one in by_level.values()
        ]  # fmt: skip
        if by_level:
            curves[name] = pair._replace(levels=tuple(by_level)), hits
    with plotting.style():
        return [plotting.save_figure(figure(curves), path.with_suffix(".png"))]


def main(arguments: Arguments) -> None:
    jax.config.update("jax_enable_x64", True)
    folder = arguments.results / "benchmarks" / "published_tests"
    if arguments.measured:
        print(json.dumps(timed(arguments.measured[0], int(arguments.measured[1]))))
        return
    {"power": power, "level": level, "time": times, "tables": tables}[arguments.what](
        arguments, folder
    )


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Arguments))
