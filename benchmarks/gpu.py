"""The first minutes on a GPU: are the programs right there, how fast are they, one condensed set.

    bash benchmarks/gpu.sh [DATA] [--out FOLDER] [--rehearse]

1. Right: the main programs on the device beside the same in float64 on the CPU, the largest
   difference over the largest value. Networks are compared in float32, at the highest precision,
   and once more at the device's own (TF32 on NVIDIA), where the difference is only told.
2. Fast: seconds of a call after the first, median of rounds; beside them the least in which this
   device could do the same. That is the longer of two: arithmetic of the products at the rate of a
   large product, reading inputs and writing outputs at the rate of a large copy, measured here.
   Sorting, exponentials and launches are not counted, so that small programs are far above it.
3. DATA condensed to ten images per class in as many of 10,000 steps as are left of --minutes, less
   one for the evaluation, but at most in 100 seconds.

Writes gpu.json to the folder after every line, and at the end gpu.md, its tables. `--beside FILE`
adds a column from another gpu.json: by default `published/gpu_on_cpu.json`, two CPU cores.
--rehearse takes tiny sizes, to see that all of it runs. Exit status 1 where something was wrong.
"""

import stand_ins  # noqa: I001  before all that may be missing

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scaling_systems

from lib import flow_matching, kernels, mmd, rff
from lib.flow_matching.unet import UNet
from lib.gmm import Mixture, em, prepare
from lib.gmm.covariances import Full
from lib.networks import classification, convolution, network_by_name
from lib.report.tables import Table
from lib.runs import environment
from lib.runs.files import write_bytes, write_json
from lib.sliced_wasserstein import sort_with_permutation
from xp_dataset_distillation import condense, evaluate
from xp_dataset_distillation.config import EVALUATORS, CondenseConfig, Evaluator
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig
from xp_gmm_source.config import CIFAR10
from xp_gmm_source.sources import GMMSource, gaussian

normal = scaling_systems.normal
SINGLE = 1e-4
ROUNDS, LONG = 5, 3.0
UNET = "multipliers", "blocks", "attention", "patch"  # of a preset, beside the width


# ---- Right


class Check(NamedTuple):
    """`arguments(tiny)` are NumPy's float64 arrays, and others; those of a float32 program are
    rounded for both sides. `mixed`: it takes some of its sums in float64, as EM does."""

    function: Callable
    arguments: Callable[[bool], tuple]
    tolerance: float = SINGLE
    double: bool = False
    mixed: bool = False
    network: bool = False


def points(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def sorted_twice(keys):
    """By the sort, and by its permutation, which may differ where keys are equal."""
    values, order = sort_with_permutation(keys)
    return values, jnp.take_along_axis(keys, order, axis=0)


def measures(tiny):
    """Few points: where two of many projections lie within float32's rounding, they change places,
    and with them two gradients."""
    C, n, d, L = (3, 16, 4, 8) if tiny else (10, 32, 784, 16)
    directions = points(2, L, d)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return points(0, C, n, d), 1 + points(1, C, n, d), directions


def wow(kernel: mmd.SlicedKernel) -> Check:
    return Check(partial(mmd.wow_value_and_grad, kernel), measures)


def mmd_and_slope(x, y):
    kernel = kernels.gaussian(1.5)
    return jax.value_and_grad(lambda x: mmd.mmd_squared_unbiased(kernel, x, y))(x)


def two_samples(tiny):
    n = 20 if tiny else 3000
    return points(0, n, 5), 0.2 + points(1, n, 5)


def flow_step(**options) -> Check:
    """Value and velocity of one step, in float64; the target is prepared on the way."""

    def step(x, y):
        config = FlowConfig(
            source_particle_num=x.shape[1], target_particle_num=len(y), bandwidth=0.3, **options
        )
        prepared = flows.prepare(config, y)
        memory = flows.first_memory(prepared)
        return flows.objective(config)(x, prepared, jax.random.key(0), memory)[:2]

    def particles(tiny):
        n = 20 if tiny else 1000
        return 0.3 * points(0, 1, n, 2), 0.3 * points(1, n, 2)

    return Check(step, particles, 1e-6, double=True)


def random_mixture(K: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means, and covariances with eigenvalues between 1 and about 5."""
    roots = points(5, K, d, d) / d**0.5
    return np.full(K, 1 / K), points(6, K, d), np.eye(d) + roots @ np.swapaxes(roots, 1, 2)


def full_mixture(weights, means, covariances) -> Mixture:
    factors = jnp.linalg.cholesky(covariances)
    eye = jnp.broadcast_to(jnp.eye(means.shape[1], dtype=means.dtype), factors.shape)
    inverse = jax.lax.linalg.triangular_solve(factors, eye, left_side=True, lower=True)
    return Mixture(weights, means, Full(factors, inverse))


def moments(weights, means, covariances, rows):
    prepared = prepare(full_mixture(weights, means, covariances), rows.dtype)
    return em.block_moments(prepared, rows, jnp.ones(len(rows), rows.dtype))


def mixture_and_rows(tiny):
    K, d = (2, 3) if tiny else (5, 300)
    return *random_mixture(K, d), points(7, 64 if tiny else 4096, d)


def condensation_check(tiny) -> Check:
    sizes = {"C": 2, "n": 8, "ipc": 1, "side": 16, "width": 8, "channels": 3}
    if not tiny:
        sizes |= {"C": 10, "n": 64, "ipc": 10, "side": 32, "width": 128}
    return Check(
        lambda *arguments: scaling_systems._condensation_function(None, **sizes)(*arguments)[:2],
        lambda _: scaling_systems._condensation_arguments(**sizes),
        1e-3,
        network=True,
    )


def unet_check(tiny) -> Check:
    side = 8 if tiny else 32

    def velocity(x, t):
        network = UNet(width=8 if tiny else 128, convolution=convolution.fastest())
        parameters = network.init(jax.random.key(0), x[:1], t[:1])
        # Its last layer starts at 0.
        parameters = jax.tree.map(lambda leaf: leaf + 0.02, parameters)
        return network.apply(parameters, x, t)

    return Check(velocity, lambda _: (points(0, 4, side, side, 3), np.linspace(0, 1, 4)), 1e-3,
                 network=True)  # fmt: skip


def checks(tiny: bool) -> dict[str, Check]:
    return {
        "sort and its permutation": Check(
            sorted_twice, lambda _: (points(0, 33 if tiny else 5000, 8),), 0.0
        ),
        "WoW, Riesz": wow(mmd.sliced_riesz()),
        "WoW, Gaussian": wow(mmd.sliced_gaussian(1.0)),
        "WoW, Laplace": wow(mmd.sliced_laplace(1.0)),
        "WoW, IMQ": wow(mmd.sliced_imq(1.0)),
        "MMD², unbiased, and its slope": Check(mmd_and_slope, two_samples, 1e-3),
        "DrMMD step": flow_step(flow="drmmd"),
        "KALE step": flow_step(flow="kale"),
        "DrMMD step, Nyström": flow_step(flow="drmmd", approximation="nystrom", rank=20),
        "E-step": Check(moments, mixture_and_rows, 1e-3, mixed=True),
        "mean embedding": Check(
            lambda x, frequencies: rff.mean_embedding(x, frequencies, 4.0),
            lambda _: (points(0, 64 if tiny else 4096, 32), points(1, 128, 32)),
        ),
        "condensation step": condensation_check(tiny),
        "U-Net": unet_check(tiny),
    }


def cast(arrays: Any, dtype: Any, *, of: Any) -> Any:
    """NumPy's arrays of dtype `of`, in another; all else as it is."""

    def one(leaf):
        return leaf.astype(dtype) if isinstance(leaf, np.ndarray) and leaf.dtype == of else leaf

    return jax.tree.map(one, arrays)


def difference(check: Check, tiny: bool, device: jax.Device, precision: str | None) -> float:
    """The largest over the outputs of max |computed - expected| / max |expected|; inf where one of
    them is not finite."""
    wide, given = not check.network, check.arguments(tiny)
    if not check.double:
        given = cast(given, np.float32, of=np.float64)
    exact = cast(given, np.float64, of=np.float32) if wide else given

    def outputs(place: jax.Device, arguments: tuple, x64: bool, precision: str | None):
        with (
            jax.enable_x64(x64),
            jax.default_device(place),
            jax.default_matmul_precision(precision),
        ):
            placed = jax.device_put(arguments, place)
            return jax.tree.map(np.asarray, jax.jit(check.function)(*placed))

    computed = outputs(device, given, check.double or check.mixed, precision)
    expected = outputs(jax.local_devices(backend="cpu")[0], exact, wide, "highest")

    def apart(computed, expected):
        gap = np.max(np.abs(computed.astype(np.float64) - expected), initial=0.0)
        largest = np.max(np.abs(expected), initial=0.0)
        return float(gap / largest if largest else gap)

    # Python's max would lose a NaN behind a number.
    worst = np.max(jax.tree.leaves(jax.tree.map(apart, computed, expected)))
    return float(worst) if np.isfinite(worst) else float("inf")


# ---- Fast


class Timed(NamedTuple):
    """A call, the arithmetic of its products, at which rate, and the bytes it must move."""

    call: Callable[[], Any]
    products: float
    traffic: float
    rate: Literal["single", "network", "double"] = "single"


def wow_step(C, n, d, L, block_size=None) -> Timed:
    function = jax.jit(
        mmd.target_value_and_grad(mmd.sliced_riesz(), num_directions=L, block_size=block_size)
    )
    x, y = normal(0, C, n, d), 1 + normal(1, C, n, d)
    # x and y are projected, slopes brought back; projections are written and read, sorted or not.
    products, projected = 6 * C * n * d * L, 4 * 2 * C * n * L
    return Timed(
        partial(function, x, y, jax.random.key(2)), products, 12 * C * n * d + 4 * projected
    )


def particle_step(N, M, flow="drmmd", rank=None) -> Timed:
    low_rank = {} if rank is None else {"approximation": "nystrom", "rank": rank}
    config = FlowConfig(
        flow=flow, source_particle_num=N, target_particle_num=M, bandwidth=0.3, **low_rank
    )
    prepared = flows.prepare(config, normal(1, M, 2, dtype=jnp.float64))
    memory = flows.first_memory(prepared)
    x = normal(0, 1, N, 2, dtype=jnp.float64)
    call = partial(jax.jit(flows.objective(config)), x, prepared, jax.random.key(0), memory)
    if rank is None:  # eigenvectors of the target, there and back
        return Timed(call, 4 * M**2, 8 * (2 * M**2 + N * M), "double")
    return Timed(call, 4 * N * rank**2, 8 * N * rank, "double")


def em_iteration(n, K, d) -> Timed:
    block = 512 if jax.default_backend() == "cpu" else None
    program = scaling_systems._em_program(None, True, n=n, d=d, K=K, block_size=block)
    return Timed(program.call, 4 * K * n * d**2, 4 * (2 * K * d**2 + n * d))


def draws(num, K, d) -> Timed:
    mixture = full_mixture(*(jnp.asarray(a, jnp.float32) for a in random_mixture(K, d)))
    source = GMMSource(mixture, jnp.zeros(d), jnp.ones(d))
    sample = jax.jit(lambda key, source: source.sample(key, num))
    traffic = 4 * (K * d**2 + 2 * num * d)
    return Timed(partial(sample, jax.random.key(0), source), 2 * num * d**2, traffic)


def mean_embeddings(n, d, D) -> Timed:
    program = scaling_systems._stream_program(None, True, n=n, d=d, D=D)
    return Timed(program.call, 2 * n * d * D, 4 * (n * d + D * d))


def convnet_products(side, width, channels) -> int:
    """Of one image through three convolutions, each at half the side of the one before."""
    inputs = (channels, width, width)
    return sum(18 * c * width * (side >> i) ** 2 for i, c in enumerate(inputs))


def condensation_step(C, n, ipc, side, width, networks) -> Timed:
    sizes = {"C": C, "n": n, "ipc": ipc, "side": side, "channels": 3}
    function = scaling_systems._condensation_function(None, width=width, networks=networks, **sizes)
    arguments = jax.jit(partial(scaling_systems._condensation_arguments, **sizes))()
    images = C * (n + 3 * 4 * ipc)  # forward; of 4 decoded for each stored one backward too
    products = networks * images * convnet_products(side, width, 3)
    return Timed(partial(jax.jit(function), *arguments), products, 0, "network")


def matching_step(batch, width, side, **unet) -> Timed:
    optimizer, images = optax.adam(2e-4), jnp.zeros((1024, side, side, 3), jnp.uint8)

    def prepared(method: convolution.Method):
        network = UNet(width=width, convolution=method, **unet)
        options = {"network": network, "optimizer": optimizer}
        start = partial(flow_matching.init, image_shape=images.shape[1:], **options)
        step = jax.jit(partial(flow_matching.train_step, batch_size=batch, **options))
        return start, step, (gaussian(3 * side**2), images)

    start, step, others = prepared("xla")  # whose convolutions XLA counts as such
    key = jax.random.key(1)
    counted = step.lower(key, jax.eval_shape(start, key), *others).cost_analysis()["flops"]
    start, step, others = prepared(convolution.fastest())
    return Timed(partial(step, key, jax.jit(start)(key), *others), counted, 0, "network")


def evaluation(n, side, width, epochs, seeds, at_once) -> Timed:
    shape, method = (side, side, 3), convolution.fastest()
    network = network_by_name("convnet", 10, shape, width=width, convolution=method)
    images, labels = normal(0, n, side, side, 3), jnp.arange(n) % 10

    def one(key):
        optimizer = optax.sgd(0.01, momentum=0.9)
        return classification.train(
            key, network, images, labels, optimizer=optimizer, num_epochs=epochs
        )[1]

    all_seeds = jax.vmap(one) if at_once else partial(jax.lax.map, one)
    products = 3 * n * epochs * seeds * convnet_products(side, width, 3)
    keys = jax.random.split(jax.random.key(1), seeds)
    return Timed(partial(jax.jit(all_seeds), keys), products, 0, "network")


Sizes = dict[str, Any]


def timings(tiny: bool) -> dict[str, tuple[Callable[..., Timed], Sizes]]:
    small_images = {"side": 8, "width": 8}
    images = small_images if tiny else {"side": 32, "width": 128}
    measures = [(2, 8, 4, 8)] if tiny else [
        (3, 80, 2, 500), (10, 100, 784, 500), (10, 500, 784, 500), (40, 50, 784, 500)
    ]  # fmt: skip
    programs: dict[str, tuple[Callable[..., Timed], Sizes]] = {
        f"WoW step, {shape[:3]}": (wow_step, dict(zip("CndL", shape))) for shape in measures
    }
    large = (2, 16, 4, 8, 4) if tiny else (10, 5000, 784, 2000, 50)
    programs["WoW step, (10, 5000, 784), 2,000 directions, 50 at a time"] = (
        wow_step,
        dict(zip(("C", "n", "d", "L", "block_size"), large)),
    )
    exact = {"N": 8, "M": 8} if tiny else {"N": 300, "M": 2000}
    many = {"N": 16, "M": 16, "rank": 4} if tiny else {"N": 20_000, "M": 20_000, "rank": 300}
    rows, large_d = (64, 4) if tiny else (16_384, 3072)
    condensed = {"C": 2, "n": 8, "ipc": 1} if tiny else {"C": 10, "n": 256, "ipc": 10}
    sets = {"n": 16, "epochs": 1, "seeds": 2} if tiny else {"n": 400, "epochs": 5, "seeds": 5}
    embedded = {"n": 64, "d": 4, "D": 8} if tiny else {"n": 8192, "d": 8192, "D": 10_000}
    if jax.default_backend() != "cpu":  # which would take half an hour
        shape = {name: getattr(CIFAR10, name) for name in ("width", *UNET)}
        preset = "flow matching step, 512 images, gpu preset"
        programs[preset] = matching_step, shape | {"side": 32, "batch": 512}
    return programs | {
        "DrMMD step, 300 particles, 2,000 points": (particle_step, exact),
        "KALE step, the same": (particle_step, exact | {"flow": "kale"}),
        "DrMMD step, Nyström, 20,000": (particle_step, many),
        "EM, 16,384 rows, K = 2, d = 3072": (em_iteration, {"n": rows, "K": 2, "d": large_d}),
        "EM, the same, K = 10": (em_iteration, {"n": rows, "K": 10, "d": large_d}),
        "10,000 draws, K = 10, d = 3072": (
            draws, {"num": 16 if tiny else 10_000, "K": 10, "d": large_d},
        ),
        "mean embeddings, 8,192 rows, d = 8,192, D = 10,000": (mean_embeddings, embedded),
        "condensation step, 1 network": (condensation_step, condensed | images | {"networks": 1}),
        "condensation step, 4 networks": (condensation_step, condensed | images | {"networks": 4}),
        "flow matching step, 512 images": (matching_step, images | {"batch": 4 if tiny else 512}),
        "ConvNet, 5 seeds, 5 epochs of 400": (evaluation, sets | images | {"at_once": True}),
        "the same, one after another": (evaluation, sets | images | {"at_once": False}),
    }  # fmt: skip


def rates(tiny: bool, round_seconds: float) -> dict[str, float]:
    """Products of large matrices, FLOP/s, and a large copy, bytes read and written a second."""

    def product_rate(n: int, precision: str | None, dtype: Any) -> float:
        with jax.enable_x64(dtype == np.float64):
            a = jnp.ones((n, n), dtype)
            function = jax.jit(partial(jnp.matmul, precision=precision))
            return 2 * n**3 / clock(partial(function, a, a), round_seconds)["seconds"]

    n = 128 if tiny else 2048 if jax.default_backend() == "cpu" else 8192
    row = jnp.ones(2**12 if tiny else 2**27)
    copy = partial(jax.jit(lambda row: row + 1), row)
    return {
        "single": product_rate(n, "highest", np.float32),
        "network": product_rate(n, None, np.float32),
        "double": product_rate(n // 2, None, np.float64),
        "bytes": 8 * row.size / clock(copy, round_seconds)["seconds"],
    }


def clock(call: Callable[[], Any], round_seconds: float) -> dict[str, float]:
    """Seconds of the first call, and of a later one: the median of rounds, or one long one."""

    def of(repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / repeats

    first, once = of(1), of(1)
    if once > LONG:
        return {"first": first, "seconds": once}
    repeats = max(1, round(round_seconds / once))
    return {"first": first, "seconds": float(np.median([of(repeats) for _ in range(ROUNDS)]))}


# ---- One condensed set


def condensed(data: Path, out: Path, num_steps: int, tiny: bool) -> dict[str, Any]:
    """Ten images per class, and the accuracy of one classifier trained on them."""
    small = {"images_per_class": 1, "real_batch": 4, "width": 8, "factor": 1} if tiny else {}
    config = CondenseConfig(str(data), **{"images_per_class": 10, "num_steps": num_steps} | small)
    run = condense.condense(config, seed=0, results=out, show_progress=False)
    name = "idc"
    if tiny:
        name = "rehearsal"
        EVALUATORS[name] = Evaluator(num_epochs=2, width=8)
    began = time.perf_counter()
    arguments = evaluate.Arguments(
        run.folder / "condensed",
        evaluators=(name,),
        num_networks=1,
        dataset=str(data),
        results=out,
    )
    accuracy = float(np.mean(evaluate.main(arguments)[name]))
    return {
        "steps": num_steps,
        "seconds": float(run.load_arrays()["seconds"]),
        "accuracy": accuracy,
        "evaluation_seconds": time.perf_counter() - began,
    }


# ---- The command


def tables(report: dict[str, Any], beside: dict[str, Any]) -> list[Table]:
    checked = [
        [
            name,
            f"{row['difference']:.1e}",
            "told" if row["allowed"] is None else f"{row['allowed']:.0e}",
        ]
        for name, row in report["checks"].items()
    ]
    timed = []
    for name, row in report["times"].items():
        other = beside.get("times", {}).get(name, {}).get("seconds")
        cells = [row["seconds"], row["least"], row["seconds"] / row["least"], row["compiling"]]
        cells += [other, other / row["seconds"]] if other else []
        timed.append([name, *(f"{cell:.3g}" for cell in cells)])
    heads = ["program", "s", "least, s", "times the least", "compiling, s"]
    if beside:
        heads += [f"s on {beside['device']}", "times as fast"]
    where = f"{report['device']}, jax {jax.__version__}"
    shown = [
        Table(["program", "difference", "allowed"], checked, f"Beside float64, on {where}."),
        Table(heads, timed, f"Seconds of one call, on {where}."),
    ]
    if "condensed" in report:
        row = report["condensed"]
        cells = f"{row['steps']:,}", f"{row['seconds']:.0f}", f"{100 * row['accuracy']:.1f}%"
        heads = ["steps", "s, compiling too", "accuracy"]
        shown.append(Table(heads, [cells], f"{row['data']}, ten images per class, on {where}."))
    return shown


def parsed() -> argparse.Namespace:
    published = Path(__file__).parent / "published" / "gpu_on_cpu.json"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu"))
    parser.add_argument("--beside", type=Path, default=published)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of programs to time")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


def check_all(tiny: bool, device: jax.Device, report: dict[str, Any]) -> Iterator[str]:
    """A line for each check, which is then in the report."""
    for name, check in checks(tiny).items():
        for precision in ("highest", None) if check.network else ("highest",):
            allowed = check.tolerance if precision else None
            label = name if precision else f"{name}, at the device's own precision"
            try:
                gap = difference(check, tiny, device, precision)
            except Exception as error:  # the other programs are still worth knowing
                report["failed"][label] = repr(error)
                yield f"{label}: {error!r}"
                continue
            report["checks"][label] = {"difference": gap, "allowed": allowed}
            if allowed is not None and gap > allowed:
                report["failed"][label] = f"differs by {gap:.1e}, not {allowed:.0e}"
            yield f"{label}: {gap:.1e}"


def time_all(tiny: bool, only: list[str], report: dict[str, Any]) -> Iterator[str]:
    """A line for each program, which is then in the report."""
    round_seconds = 0.001 if tiny else 0.3
    measured = report["rates"] = rates(tiny, round_seconds)
    yield ", ".join(f"{name} {rate:.3g}/s" for name, rate in measured.items())
    for name, (build, sizes) in timings(tiny).items():
        if only and not any(part in name for part in only):
            continue
        try:
            with jax.enable_x64(build in (particle_step, em_iteration)):
                timed = build(**sizes)
                row = clock(timed.call, round_seconds)
        except Exception as error:
            report["failed"][name] = repr(error)
            yield f"{name}: {error!r}"
            continue
        first, seconds = row["first"], row["seconds"]
        least = max(timed.products / measured[timed.rate], timed.traffic / measured["bytes"])
        report["times"][name] = {"seconds": seconds, "compiling": first - seconds, "least": least}
        yield f"{name}: {seconds:.3g} s, {seconds / least:.3g} times the least"


def main() -> int:
    arguments, began = parsed(), time.perf_counter()
    data, tiny, device = arguments.data, arguments.rehearse, jax.local_devices()[0]
    if data is not None and "PIL" in stand_ins.MISSING:
        raise SystemExit(f"gpu.py: reading {data} needs Pillow: install it, or give no data")
    if data is not None and not data.exists():
        raise SystemExit(f"gpu.py: there is no {data}")
    about = {"environment": environment(), "rehearsal": tiny, "device": device.device_kind}
    report: dict[str, Any] = about | {"checks": {}, "rates": {}, "times": {}, "failed": {}}
    lines = [] if arguments.only else [check_all(tiny, device, report)]
    for line in chain(*lines, time_all(tiny, arguments.only, report)):
        print(line, flush=True)
        write_json(arguments.out / "gpu.json", report)
    left = 60 * (arguments.minutes - 1) + began - time.perf_counter()
    one = report["times"].get("condensation step, 1 network")
    if data is not None and one and (tiny or left > 10):
        steps = 3 if tiny else max(1, min(10_000, int(min(left, 100) / one["seconds"])))
        outcome = condensed(data, arguments.out / "condensed", steps, tiny)
        report["condensed"] = {"data": data.name} | outcome
    elif data is not None:
        print(f"{data} is not condensed: {left:.0f} s are left for it")
    report["minutes"] = (time.perf_counter() - began) / 60
    write_json(arguments.out / "gpu.json", report)
    beside = json.loads(arguments.beside.read_text()) if arguments.beside.exists() else {}
    text = "\n\n".join(f"{t.caption}\n\n{t.markdown()}" for t in tables(report, beside))
    write_bytes(arguments.out / "gpu.md", f"{text}\n".encode())
    print(f"\n{text}\n\nnumbers: {arguments.out / 'gpu.json'}")
    for name, reason in report["failed"].items():
        print(f"WRONG: {name}: {reason}", file=sys.stderr)
    return bool(report["failed"])


if __name__ == "__main__":
    sys.exit(main())
