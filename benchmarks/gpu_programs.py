"""The main programs at the papers' sizes, as an accelerator would be given them.

Each is a function of a device that returns (jitted function, arguments, keywords). Arguments are
shapes: no array is made, and nothing runs. `tests/system/test_gpu_lowering.py` lowers them,
`absent_gpu.py` compiles them for a GPU that is not there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib import drmmd, flow_matching, gd, kernels, mmd
from lib.gmm import Mixture, em, prepare
from lib.gmm.covariances import Full
from lib.networks import classification, network_by_name
from lib.rows import fourier_means, sums
from lib.sliced_wasserstein import basis_directions
from lib.two_sample import MMD, two_sample_test
from xp_dataset_distillation import objectives
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.real_data import RealData, Setting
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig
from xp_gmm_source import flow
from xp_gmm_source.config import CIFAR10
from xp_gmm_source.shaped_sources import FrequencySource
from xp_gmm_source.sources import GMMSource

CHUNK_OF_ROWS = 4096


class Program(NamedTuple):
    build: Callable[[jax.Device], tuple[Any, tuple, dict[str, Any]]]
    double: bool = False
    """Whether it runs in float64."""
    networks: bool = False
    """Networks take their products and convolutions at the platform's own precision."""


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def key(*sizes: int) -> Any:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sizes or ()))


def step_number() -> jax.ShapeDtypeStruct:
    return shape(dtype=jnp.int32)


# ---- Flows of labelled data sets


def wow(kernel: str, C: int, n: int, d: int, L: int, **options):
    kernel_of_measures = getattr(mmd, f"sliced_{kernel}")()
    function = mmd.target_value_and_grad(kernel_of_measures, num_directions=L, **options)
    particles = shape(C, n, d)
    return jax.jit(function), (particles, particles, key()), {}


def wow_flow(C: int, n: int, d: int, L: int, *, record_every: int = 50, **options):
    """The compiled loop of `lib.gd`, as `wasserstein_gradient_descent` calls it."""
    function = mmd.target_value_and_grad(mmd.sliced_riesz(), num_directions=L, **options)
    x, optimizer = shape(C, n, d), optax.sgd(1.0, momentum=0.9)
    num_bytes = 4 * C * n * d
    most = gd._max_steps(num_bytes, record_every)
    large = num_bytes > gd.MAX_RECORD_BYTES_PER_CHUNK
    buffers = shape(most), shape(-(-most // record_every), C, n, d)
    state = jax.eval_shape(partial(gd.flow_init, optimizer), x)
    advance = gd._advance(function, optimizer, record_every, None, large)
    return advance, (key(), state, x, step_number(), buffers), {}


def sliced_energy(C: int, n: int, d: int, L: int, **options):
    """With directions of one basis, as the flows take them."""
    function = mmd.target_value_and_grad_sliced_energy(
        num_directions=L, draw_directions=basis_directions, **options
    )
    particles = shape(C, n, d)
    return jax.jit(function), (particles, particles, key()), {}


# ---- Flows of particles


def particle_step(flow: str, N: int, M: int, **options):
    config = FlowConfig(
        flow=flow, source_particle_num=N, target_particle_num=M, bandwidth=0.15, **options
    )
    prepared = jax.eval_shape(partial(flows.prepare, config), shape(M, 2, dtype=jnp.float64))
    points = M if isinstance(prepared.target, drmmd.Target) else 0
    scalars = shape(1, dtype=jnp.float64)
    memory = flows.Memory(scalars, scalars, scalars, shape(1, points, dtype=jnp.float64))
    particles = shape(1, N, 2, dtype=jnp.float64)
    return jax.jit(flows.objective(config)), (particles, prepared, key(), memory), {}


def target_of_particles(M: int):
    prepare_target = partial(drmmd.prepare_target, kernels.gaussian(0.15))
    return jax.jit(prepare_target), (shape(M, 2, dtype=jnp.float64),), {}


# ---- Condensation and networks


def condensation(num_networks: int, images_per_class: int = 10):
    half = (0.5,) * 3
    config = CondenseConfig(
        "cifar10", images_per_class=images_per_class, num_networks=num_networks, width=128
    )
    setting = Setting(10, (32, 32, 3), half, half, True)
    images = shape(50_000, 32, 32, 3, dtype=jnp.uint8)
    names = tuple(map(str, range(10)))
    target = objectives.Target(
        RealData(images, (5000,) * 10, names, "cifar10", half, half), shape(2, dtype=jnp.uint32)
    )
    stored = shape(10, images_per_class, 3072)
    function = jax.jit(objectives.objective(config, setting))
    return function, (stored, target, key(), step_number()), {}


def training(name: str, side: int, channels: int, *, num_seeds: int = 5, num_images: int = 400):
    network = network_by_name(name, 10, (side, side, channels), convolution="xla")
    options = {"network": network, "optimizer": optax.sgd(0.01, momentum=0.9)}
    images, labels = shape(num_images, side, side, channels), shape(num_images, dtype=jnp.int32)
    start = partial(classification._start_all, num_epochs=100, **options)
    keys = key(num_seeds)
    state = jax.eval_shape(start, keys, images)
    options |= {"batch_size": 64, "transform": None}
    return classification._advance, (state, step_number(), keys, images, labels), options


# ---- Mixtures and flow matching


def mixture(K: int, d: int, dtype: Any) -> Mixture:
    made = partial(shape, dtype=dtype)
    return Mixture(made(K), made(K, d), Full(made(K, d, d), made(K, d, d)))


def e_step(K: int, d: int, device: jax.Device):
    """One chunk of rows."""
    zeros, add, _ = sums._chunk_adder(
        em.block_moments, None, np.dtype("f4"), CHUNK_OF_ROWS, (device,)
    )
    chunk = shape(CHUNK_OF_ROWS, d), shape(CHUNK_OF_ROWS, dtype=jnp.float64)
    prepared = jax.eval_shape(partial(prepare, dtype=np.dtype("f4")), mixture(K, d, jnp.float64))
    return add, (jax.eval_shape(zeros, prepared, *chunk), prepared, *chunk), {}


def m_step(K: int, d: int):
    start = mixture(K, d, jnp.float64)
    prepared = jax.eval_shape(partial(prepare, dtype=np.dtype("f4")), start)
    moments = jax.eval_shape(em.block_moments, prepared, shape(512, d), shape(512))
    moments = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=jnp.float64), moments)
    return em.maximize_in_place, (start, moments), {"regularization": 1e-6}


def source(K: int, d: int) -> GMMSource:
    return GMMSource(mixture(K, d, jnp.float32), shape(d), shape(d))


def frequency_source(side: int, channels: int) -> FrequencySource:
    colors, pixels = shape(channels, channels), shape(side, side, channels)
    return FrequencySource(shape(side, side), shape(side, side), colors, colors, pixels, pixels)


def draws(drawn_from: flow_matching.Source, num: int):
    return jax.jit(lambda key, source: source.sample(key, num)), (key(), drawn_from), {}


def matching_step(coupling: flow_matching.Coupling, batch_size: int = 512):
    """Of the gpu preset."""
    network, optimizer = flow.network(CIFAR10), optax.adam(2e-4)
    start = partial(
        flow_matching.init, network=network, optimizer=optimizer, image_shape=(32, 32, 3)
    )
    images = shape(50_000, 32, 32, 3, dtype=jnp.uint8)
    options = {"network": network, "optimizer": optimizer, "batch_size": batch_size}
    options |= {"ema_decay": 0.9999, "augment_flip": True, "mesh": None}
    table = shape(64, batch_size, dtype=jnp.int32) if coupling == "optimal" else None
    state = jax.eval_shape(start, key())
    arguments = state, step_number(), shape(1024), table, key(), source(10, 3072), images
    return flow_matching.training._advance, arguments, options


def matching_costs(batch_size: int = 512):
    images = shape(50_000, 32, 32, 3, dtype=jnp.uint8)
    options = {"batch_size": batch_size, "augment_flip": True, "mesh": None}
    arguments = step_number(), key(), source(10, 3072), images, None, None
    return flow_matching.training._costs, arguments, options


# ---- Mixing and tests


def embeddings(D: int, d: int, device: jax.Device):
    mesh = jax.sharding.Mesh(np.array([device]), ("rows",))
    shared = shape(D, d), shape(1), None, None, None
    arguments = shape(1024, d), 1024, 0, None, shared, None
    return fourier_means._chunk_sums, arguments, {"mesh": mesh, "num_blocks": 1}


def permutation_test(n: int, d: int):
    def test(key, x, y):
        grid = [kernels.gaussian(bandwidth) for bandwidth in kernels.bandwidth_grid(key, x, y)]
        return two_sample_test(key, x, y, grid, lmbdas=MMD)

    return jax.jit(test), (key(), shape(n, d), shape(n, d)), {}


def program(build: Callable, *arguments: Any, double=False, networks=False, **options) -> Program:
    """Of a builder that does not ask for the device."""
    return Program(lambda device: build(*arguments, **options), double, networks)


PROGRAMS = {
    "WoW, Riesz (10, 200, 784)": program(wow, "riesz", 10, 200, 784, 500),
    "WoW, Riesz (10, 500, 784)": program(wow, "riesz", 10, 500, 784, 500),
    "WoW, Gaussian (10, 500, 784)": program(wow, "gaussian", 10, 500, 784, 500),
    "WoW, IMQ, percentiles (10, 500, 784)": program(wow, "imq", 10, 500, 784, 500, num_levels=100),
    "sliced energy (10, 1000, 784)": program(sliced_energy, 10, 1000, 784, 784),
    "sliced energy, 100,000, 20 directions at a time": program(
        sliced_energy, 1, 100_000, 50, 100, block_size=20
    ),
    "WoW flow, rings (3, 80, 2)": program(wow_flow, 3, 80, 2, 500),
    "WoW flow (10, 200, 784)": program(wow_flow, 10, 200, 784, 500),
    "WoW flow (10, 500, 784)": program(wow_flow, 10, 500, 784, 500),
    "WoW flow (10, 5000, 784), 2,000 directions, 50 at a time": program(
        wow_flow, 10, 5000, 784, 2000, block_size=50
    ),
    "DrMMD target, 2,000": program(target_of_particles, 2000, double=True),
    "DrMMD step (300, 2,000)": program(particle_step, "drmmd", 300, 2000, double=True),
    "KALE step (300, 2,000)": program(particle_step, "kale", 300, 2000, double=True),
    "DrMMD step, Nystrom, 20,000": program(
        particle_step, "drmmd", 20_000, 20_000, approximation="nystrom", double=True
    ),
    "condensation, 1 network": program(condensation, 1, networks=True),
    "condensation, 4 networks": program(condensation, 4, networks=True),
    "training, LeNet-5, 5 seeds": program(training, "lenet", 28, 1, networks=True),
    "training, ConvNet, 5 seeds": program(training, "convnet", 32, 3, networks=True),
    "E-step, K = 10, d = 3072": Program(partial(e_step, 10, 3072), double=True),
    "E-step, K = 100, d = 300": Program(partial(e_step, 100, 300), double=True),
    "M-step, K = 10, d = 3072": program(m_step, 10, 3072, double=True),
    "draws of a mixture, K = 10, d = 3072": program(draws, source(10, 3072), 512),
    "draws without high frequencies, d = 3072": program(draws, frequency_source(32, 3), 512),
    "flow matching, 512 images": program(matching_step, "independent", networks=True),
    "flow matching, optimal": program(matching_step, "optimal", networks=True),
    "distances of a batch": program(matching_costs),
    "mean embeddings, D = 10,000, d = 8,192": Program(partial(embeddings, 10_000, 8192)),
    "two-sample test, 10,000": program(permutation_test, 10_000, 10),
}
