"""The programs that `scaling.py` measures: what runs at given sizes, and the bytes that it needs.

Sizes are keywords, which a system hands to its own functions: C classes, n rows, d dimensions, L
directions, N particles or sets, M target points, K components, D frequencies. `Program.memory` are
the bytes of arguments, results and temporaries of a compiled program, less what results take from
arguments; no array of that size is made for it. `predicted` are the same from a formula whose
coefficients count arrays; `scaling.py` holds it against compiled programs.
"""

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gpu_programs
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Spec

from lib import drmmd, gd, kernels, mmd, rff
from lib.devices import partition_spec
from lib.gd import wasserstein_gradient_descent
from lib.gmm import Mixture, em, prepare
from lib.gmm.covariances import Full
from lib.rows import Rows, fourier_means
from lib.rows import sums as row_sums
from lib.simplex_qp import from_means, make_problem, solve
from lib.sliced_wasserstein._distances import MAX_RUNNING_SUM
from xp_dataset_distillation import objectives
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.real_data import RealData, Setting
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig

WHOLE = Spec()  # on every device


class Program(NamedTuple):
    """What runs: `call()` waits for its result; None where nothing is to be run."""

    call: Callable[[], Any] | None
    memory: int


class System(NamedTuple):
    title: str
    double: bool
    """Whether it runs in float64."""
    program: Callable[..., Program]
    """(mesh, run, **sizes)"""
    predicted: Callable[..., float]
    beside: Callable[..., float] = lambda **_: 0
    """Bytes that a flow holds on the device while the program runs."""
    host: Callable[..., float] = lambda **_: 0
    """Bytes of the host, which a CPU's process holds too."""
    on_gpu: Callable[..., float] | None = None
    """`predicted` of programs compiled for an H100 that is not there, where that is another."""

    def needs(self, on_gpu: bool, **sizes) -> float:
        """Bytes that the device holds."""
        predicted = (self.on_gpu if on_gpu else None) or self.predicted
        return predicted(**sizes) + self.beside(**sizes)


def bytes_of(compiled) -> int:
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def from_functions(arguments, function, specs=None) -> Callable[..., Program]:
    """A system's program from `arguments(**sizes)`, traceable, and `function(mesh, **sizes)`."""

    def program(mesh, run, **sizes):
        make = partial(arguments, **sizes)
        given = jax.eval_shape(make)
        if mesh is not None:
            first, *others = given
            spec = specs(first, mesh) if specs else WHOLE
            given = placed(first, mesh, spec), *placed(others, mesh)
        over = mesh if mesh is not None and mesh.size > 1 else None
        compiled = jax.jit(function(over, **sizes)).lower(*given).compile()
        if not run:
            return Program(None, bytes_of(compiled))
        given = jax.block_until_ready(jax.jit(make)())
        return Program(lambda: jax.block_until_ready(compiled(*given)), bytes_of(compiled))

    return program


def placed(tree, mesh, spec=WHOLE):
    """The shapes of a tree's arrays as they lie on a mesh's devices, which need not be there."""
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def there(leaf):
        if not hasattr(leaf, "dtype"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(there, tree)


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# ---- WoW gradient


def _wow_arguments(C, n, d, **_):
    return normal(0, C, n, d), 1 + normal(1, C, n, d), jax.random.key(2)


def _wow_function(mesh, C, n, d, L, block_size=None, n_sample_batch=None):
    return mmd.target_value_and_grad(
        mmd.sliced_riesz(),
        num_directions=L,
        num_target_points=n_sample_batch,
        block_size=block_size,
        mesh=mesh,
    )


def _wow_predicted(C, n, d, L, block_size=None, n_sample_batch=None):
    """x, y and the gradient; 7 arrays [C, n] of a block's directions, 8 where a network sorts, the
    target's share one of them; running sums of 3.2 [C, C], which many classes keep in pieces; with
    blocks one more gradient."""
    m, block = n_sample_batch or n, min(block_size or L, L)
    arrays = 7 * C * n + C * m
    sums = C**2 * block
    sums = 3.2 * sums if sums <= 2 * MAX_RUNNING_SUM else 2.4 * MAX_RUNNING_SUM
    particles = (3 + (block < L)) * C * n * d
    return 4 * (particles + block * arrays + sums)


FLOW_STEPS = 2


def _wow_flow_program(mesh, run, **sizes):
    """The loop that a flow compiles: momentum, and records between the start and the end."""
    advance, arguments, _ = gpu_programs.wow_flow(record_every=1, **sizes)
    if mesh is not None:
        arguments = placed(arguments, mesh)
    memory = bytes_of(advance.lower(*arguments).compile())
    if not run:
        return Program(None, memory)
    x, y, key = jax.block_until_ready(jax.jit(partial(_wow_arguments, **sizes))())
    follow = partial(wasserstein_gradient_descent, lr=1.0, m=0.9, show_progress=False)
    function = _wow_function(mesh, **sizes)
    return Program(lambda: follow(x, y, function, key, n_epochs=FLOW_STEPS), memory)


def _wow_flow_predicted(C, n, d, **options):
    """Momentum, and the records of a chunk."""
    particles = 4 * C * n * d
    slots = max(1, gd.MAX_RECORD_BYTES_PER_CHUNK // particles)
    return _wow_predicted(C=C, n=n, d=d, **options) + (1 + slots) * particles


def _wow_flow_on_gpu(C, n, d, L, block_size=None):
    """Particles, momentum, records and target; 4 arrays [C, n] of the directions, or with blocks
    the gradient and 5.25 of a block; 7.5 or 5 [C, C], and what XLA keeps of sums over pairs."""
    block = min(block_size or L, L)
    particles, arrays, costs = (5, 5.25, 5) if block < L else (4, 4, 7.5)
    sums = costs * C**2 + 0.6 * min(MAX_RUNNING_SUM, C**2 * max(n, block))
    return 4 * (particles * C * n * d + arrays * C * n * block + sums)


# ---- DrMMD


def _drmmd_config(N, M, approximation="none", rank=300, **_) -> FlowConfig:
    return FlowConfig(
        source_particle_num=N,
        target_particle_num=M,
        bandwidth=1.0,
        approximation=approximation,
        rank=rank,
    )


def _drmmd_arguments(N, M, d, **options):
    scale = d**-0.5  # distances near the bandwidth in any dimension
    target = scale * normal(1, M, d, dtype=jnp.float64)
    prepared = flows.prepare(_drmmd_config(N, M, **options), target)
    start = scale * normal(0, 1, N, d, dtype=jnp.float64)
    return start, prepared, jax.random.key(2), flows.first_memory(prepared)


def _drmmd_function(mesh, **sizes):
    return flows.objective(_drmmd_config(**sizes))


def _drmmd_predicted(N, M, d, approximation="none", rank=300):
    """Both Gram matrices and one more of the larger; M^2 eigenvectors; particles and targets. Of
    features blocks of 1024 rows, and matrices [rank, rank]."""
    if approximation == "none":
        return 8 * (N * N + N * M + N * max(N, M) + M * M + 5 * (N + M) * d)
    blocks = 4 if approximation == "nystrom" else 2
    return 8 * (1024 * rank * blocks + 1.5 * rank**2 + 5 * N * d + 2 * M * d)


def _preparation_arguments(M, d):
    return (d**-0.5 * normal(1, M, d, dtype=jnp.float64),)


def _preparation_function(mesh, **_):
    return partial(drmmd.prepare_target, kernels.gaussian(1.0))


# ---- Condensation


def _condensation_arguments(C, n, ipc=5, side=28, channels=1, **_):
    shape, count = (side, side, channels), max(n, 256)
    images = jax.random.randint(jax.random.key(0), (C * count, *shape), 0, 256, jnp.int32)
    names, colors = tuple(str(c) for c in range(C)), (0.5,) * channels
    real = RealData(images.astype(jnp.uint8), (count,) * C, names, "benchmark", colors, colors)
    target = objectives.Target(real, jax.random.key_data(jax.random.key(1)))
    x = jax.random.uniform(jax.random.key(3), (C, ipc, side * side * channels))
    return x, target, jax.random.key(4), jnp.zeros((), jnp.int32)


def _condensation_function(
    mesh, C, n, width, networks=1, class_chunk=None, ipc=5, side=28, channels=1, **options
):
    pixel = (0.5,) * channels
    setting = Setting(C, (side, side, channels), pixel, pixel, False)
    config = CondenseConfig(
        "benchmark",
        images_per_class=ipc,
        factor=2,
        real_batch=n,
        width=width,
        num_networks=networks,
        class_chunk=class_chunk,
        **options,
    )
    return objectives.objective(config, setting, mesh)


def _condensation_predicted(
    C, n, width, networks=1, class_chunk=None, ipc=5, side=28, channels=1, **_
):
    """Maps of the first layer, as large as the image (28 is filled up to 32): 1.25 of each real
    image, 2.15 of each of the 4 ipc decoded ones, whose gradient is taken; the images."""
    chunk, pixels = min(class_chunk or C, C), (32 if side == 28 else side) ** 2
    maps = 4 * chunk * (1.25 * n + 2.15 * 4 * ipc) * width * pixels
    return maps + C * side**2 * channels * (max(n, 256) + 12 * ipc)


def _condensation_on_gpu(
    C, n, width, networks=1, class_chunk=None, ipc=5, side=28, channels=1, **_
):
    """As above; decoded images are a quarter of a map, and condensed ones take 8 arrays."""
    chunk, pixels = min(class_chunk or C, C), (32 if side == 28 else side) ** 2
    maps = 4 * chunk * (1.235 * n + 0.24 * 4 * ipc) * width * pixels
    return maps + C * side**2 * channels * (max(n, 256) + 34 * ipc)


# ---- EM


def _mixture(K, d) -> Mixture:
    """Components nearly alike: every row is everybody's, so that none is left out."""
    eye = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float64), (K, d, d))
    weights = jnp.full(K, 1 / K, jnp.float64)
    return Mixture(weights, 0.01 * normal(0, K, d, dtype=jnp.float64), Full(eye, eye))


def _em_program(mesh, run, n, d, K, block_size=512, chunk_size=4096):
    """An iteration; its memory is the larger of the program that adds a chunk, beside the mixture,
    and of the one that maximizes."""
    devices = tuple(mesh.devices.flat) if mesh is not None else (jax.devices()[0],)
    single, size = np.dtype(np.float32), min(n, chunk_size)
    zeros, add, over = row_sums._chunk_adder(em.block_moments, None, single, block_size, devices)
    mixture = jax.eval_shape(partial(_mixture, K, d))
    prepared = jax.eval_shape(partial(prepare, dtype=single), mixture)
    chunk = jax.ShapeDtypeStruct((size, d), single), jax.ShapeDtypeStruct((size,), np.float64)
    total = jax.eval_shape(zeros, prepared, *chunk)

    total, chunk = placed((total, chunk), over, Spec("rows"))
    prepared, mixture = placed((prepared, mixture), over)
    adding = bytes_of(add.lower(total, prepared, *chunk).compile())
    adding += sum(leaf.size * 8 for leaf in jax.tree.leaves(mixture))
    sums = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), total)
    sums = placed(sums, over)
    maximize = em.maximize_in_place.lower(mixture, sums, regularization=1e-6)
    memory = max(adding, bytes_of(maximize.compile()))
    if not run:
        return Program(None, memory)
    x = np.random.default_rng(0).normal(size=(n, d)).astype(single)
    data = Rows(x, block_size=block_size, chunk_size=chunk_size, devices=devices)
    start = jax.block_until_ready(jax.jit(partial(_mixture, K, d))())
    return Program(lambda: jax.block_until_ready(em._iterate(start, data, 1e-6)), memory)


def _em_predicted(n, d, K, block_size=512, chunk_size=4096):
    """Factors before and after a step, moments, and 8 matrices of one component; or beside the
    factors those of a chunk's sums, with 1.6 arrays [K, block, d]."""
    maximizing = 8 * d**2 * (4.6 * K + 8)
    block = 4 * (1.6 * K * min(block_size, n) * d + min(chunk_size, n) * d)
    return max(maximizing, 8 * d**2 * (4.3 * K + 1) + block)


def _em_on_gpu(n, d, K, **_):
    return 8 * d**2 * (5 * K + 8)


# ---- Mean embeddings in one pass, and mixing weights


def _stream_program(mesh, run, n, d, D, N=1, chunk_size=1024):
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    over = jax.sharding.Mesh(np.array(devices), ("rows",))
    size = min(n, chunk_size)
    rows, whole = (jax.sharding.NamedSharding(over, spec) for spec in (Spec("rows"), Spec()))
    compiled = fourier_means._chunk_sums.lower(
        jax.ShapeDtypeStruct((size, d), np.float32, sharding=rows),
        size,
        0,
        None,
        (jax.ShapeDtypeStruct((D, d), np.float32, sharding=whole), jnp.ones(1), None, None, None),
        None,
        mesh=over,
        num_blocks=1,
    ).compile()
    memory = bytes_of(compiled) + 4 * size * d  # the next chunk, on its way
    if not run:
        return Program(None, memory)
    row = np.random.default_rng(0).normal(size=d).astype(np.float32)
    sample = Rows(np.broadcast_to(row, (n // size * size, d)))
    frequencies = jax.block_until_ready(rff.gaussian_frequencies(jax.random.key(0), D, d))

    def call():
        for _ in range(N):
            fourier_means.stream_mean_embeddings(
                sample, frequencies, [1.0], chunk_size=size, devices=devices
            )

    return Program(call, memory)


def _stream_predicted(n, d, D, N=1, chunk_size=1024):
    """Two chunks, the frequencies, the products and 2 D features, which are put together once."""
    size = min(n, chunk_size)
    return 4 * (2 * size * d + D * d + 4 * size * D)


def _stream_on_gpu(n, d, D, N=1, chunk_size=1024):
    """From 100,000 frequencies on features come piece by piece."""
    size = min(n, chunk_size)
    return 4 * (2 * size * d + D * d + 1.25 * size * D)


def _weights_program(mesh, run, N, D):
    """Numpy's own arrays, as they are traced; the means are given."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(N, D)) + 0.3 * generator.normal(size=D)
    target = generator.dirichlet(np.ones(N)) @ means

    def call():
        return solve(make_problem(from_means(means, target), ridge=1e-5))

    call()
    tracemalloc.start()
    call()
    memory = tracemalloc.get_traced_memory()[1] + means.nbytes
    tracemalloc.stop()
    return Program(call, memory)


def _weights_predicted(N, D):
    """The means twice; 4.1 matrices [N, N]."""
    return 8 * (2 * N * D + 4.1 * N * N)


SYSTEMS = {
    "wow": System(
        "WoW gradient",
        False,
        from_functions(_wow_arguments, _wow_function),
        _wow_predicted,
    ),
    "wow_flow": System(
        "WoW flow",
        False,
        _wow_flow_program,
        _wow_flow_predicted,
        # The caller's particles, and the records.
        host=lambda C, n, d, **_: 4 * C * n * d * (2 + FLOW_STEPS),
        on_gpu=_wow_flow_on_gpu,
    ),
    "drmmd": System(
        "DrMMD step",
        True,
        from_functions(
            _drmmd_arguments,
            _drmmd_function,
            lambda start, mesh: partition_spec(start.shape, (-2, -3), mesh),
        ),
        _drmmd_predicted,
        # The target's Gram matrix, which other flows need.
        lambda M, approximation="none", **_: 8 * M**2 if approximation == "none" else 0,
    ),
    "drmmd_target": System(
        "DrMMD target",
        True,
        from_functions(_preparation_arguments, _preparation_function),
        lambda M, d: 8 * 3 * M**2,
    ),
    "condensation": System(
        "condensation step",
        False,
        from_functions(_condensation_arguments, _condensation_function),
        _condensation_predicted,
        on_gpu=_condensation_on_gpu,
    ),
    "em": System("EM iteration", True, _em_program, _em_predicted, on_gpu=_em_on_gpu),
    "embeddings": System(
        "mean embeddings", False, _stream_program, _stream_predicted, on_gpu=_stream_on_gpu
    ),
    "weights": System("mixing weights", False, _weights_program, _weights_predicted),
}


def largest(name: str, variable: str, budget: float, on_gpu: bool = False, **sizes) -> int:
    """The largest `variable`, or several alike ("N=M"), whose predicted bytes are in `budget`."""
    system, low, high = SYSTEMS[name], 1, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        named = sizes | dict.fromkeys(variable.split("="), middle)
        if system.needs(on_gpu, **named) <= budget:
            low = middle
        else:
            high = middle
    return low
